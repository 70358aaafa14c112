"""Model in, model out: forget from a model of one's own, and know whether it worked."""
