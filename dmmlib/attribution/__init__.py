"""Data attribution: what leaving training points out does to a model's logits, by several methods.

Every method here fits an `Attributor` (`dmmlib.datamodels`) to a `Context`: subset models' masks and outputs,
some of their weights, and the originals. One of your own registers by name:

    @attribution.register("mine")
    def mine(context: Context) -> Attributor: ...

Importing this package registers the built-in ones.
"""

from dmmlib.attribution import bayesian, gradient, kernel, lasso, linearised, ridge  # noqa: F401 (register themselves)
from dmmlib.attribution.base import Context, MarginDatamodel, calibrated, fit, get, names, register, source
from dmmlib.attribution.compare import compare

__all__ = ["Context", "MarginDatamodel", "calibrated", "compare", "fit", "get", "names", "register", "source"]
