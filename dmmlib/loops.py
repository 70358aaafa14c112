"""Train models with a function of the user's own: any optimizer, schedule or augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from dmmlib import stacking
from dmmlib.ensemble import initialise
from dmmlib.errors import DmmError, ModelError

Loop = Callable[[nn.Module, Tensor, Tensor, int], nn.Module]
"""Trains a fresh model on points (n, ...) and labels (n,), drawing by the seed, and returns it."""

_RETURNED: WeakSet[nn.Module] = WeakSet()


def trained(loop: Loop, make: Callable[[], nn.Module], x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Train a fresh model on points x (n, ...) with labels y (n,).

    Raises ModelError, in one line, where the loop fails, or returns what is no model as `make` makes it.
    """
    with stacking.drawing(seed, x.device):
        model, fresh = (make().to(x.device) for _ in range(2))
        try:
            found = loop(model, x.clone(), y.clone(), seed)
        except DmmError:
            raise
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ModelError(f"The train function fails on {len(x)} points ({said}); mend it.") from error
    if not isinstance(found, nn.Module):
        raise ModelError(f"The train function returns a {type(found).__name__}; return the trained model.")
    if found in _RETURNED:
        raise ModelError("The train function trains the same module again and again; train the model it is given.")
    _RETURNED.add(found)
    try:
        fresh.load_state_dict(found.state_dict())  # frozen or not as when it was new
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ModelError(f"The train function returns another model than it was given ({said:.200}).") from error
    return fresh


def train_shard(
    loop: Loop,
    make: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    shard: tuple[np.ndarray, Sequence[int], bool, float],
) -> dict[str, np.ndarray]:
    """Train one model for each mask (k, n_train) and seed: logits at all points x, masks, and weights if asked."""
    masks, seeds, keep_models, until = shard
    if until < 1:
        raise ModelError("A training loop of one's own ends where it ends; leave out methods that rewind to before.")
    kept = []
    for mask, seed in zip(masks, seeds, strict=True):
        points = torch.from_numpy(np.flatnonzero(mask)).to(x.device)
        alone = initialise(partial(trained, loop, make, x[points], y[points], seed), [seed], x.device)
        kept.append({"logits": alone.logits(x).numpy(), **(alone.state() if keep_models else {})})
    return {name: np.concatenate([arrays[name] for arrays in kept]) for name in kept[0]} | {"masks": masks}
