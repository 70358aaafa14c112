"""Further attribution methods, each registered under its name: gradient kernels, LASSO, ridge, those of dattri."""

from dmmlib.attributors import dattri, kernel, lasso, ridge
