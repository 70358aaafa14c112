"""Data attribution: what leaving training points out does to a model's logits, by several methods.

Every method here fits an `Attributor` (`dmmlib.datamodels`) to a `Context`: subset models' masks and outputs,
some of their weights, and the originals. One of your own registers by name:

    @attribution.register("mine")
    def mine(context: Context) -> Attributor: ...
"""

from dmmlib.attribution.base import ATTRIBUTORS, Context, MarginDatamodel, calibrated, fit, get, names, register

__all__ = ["ATTRIBUTORS", "Context", "MarginDatamodel", "calibrated", "fit", "get", "names", "register"]
