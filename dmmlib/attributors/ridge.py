"""Ridge datamodels under their name in the registry."""

from __future__ import annotations

from dmmlib.attribution import Context, register
from dmmlib.datamodels import RidgeDatamodel


@register("ridge")
def ridge(context: Context, lam: float = 0.1, own_share: float = 1.0) -> RidgeDatamodel:
    """`dmmlib.datamodels.RidgeDatamodel` on all subset models."""
    return RidgeDatamodel.fit(context.masks, context.outputs, lam, context.device, own_share)
