"""Datamodel matching: move a model, in a few Gauss-Newton steps, to what it would answer had it never seen F."""

from dmmlib.matching import match
