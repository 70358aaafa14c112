"""Stability of meta-learning: uniform meta-stability measured against bounds derived for it, and forgetting a task."""
