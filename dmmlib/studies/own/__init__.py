"""Notebook 11: a model of one's own, from training loop to audit."""
