"""Attributors, each registered under its name: Bayesian and linearised datamodels, kernels, LASSO, ridge, dattri's."""

from dmmlib.attributors import bayesian, dattri, kernel, lasso, linearised, ridge
