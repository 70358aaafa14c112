"""Architectures and data sets that presets call by name."""
