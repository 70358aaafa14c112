"""Machine unlearning by datamodel matching, measured against retraining."""
