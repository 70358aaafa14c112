"""What thousands of subset models buy, from a hundred (notebook 07)."""
