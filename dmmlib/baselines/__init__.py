"""Unlearning methods that datamodel matching is compared with, one family per file; each registers itself."""

# Methods are listed in this order.
from dmmlib.baselines import gradient  # noqa: I001
from dmmlib.baselines import bad_teacher, dampening, last_layers, newton, relabel, reset, restart, scrub, sparse
from dmmlib.baselines import published
