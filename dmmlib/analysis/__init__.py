"""Figures, tables, claims and side studies made of a study's results."""
