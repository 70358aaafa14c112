"""Forgetting people: MLLMU-Bench for a multimodal model, behind notebook 09. Needs the extra `multimodal`."""
