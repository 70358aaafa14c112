"""What stands between the library and a machine: command line, batch runs, plans, reports, clusters, file formats."""
