"""Random labels: teach wrong answers on F; with SalUn, to the weights that matter to F only.

SGD with momentum 0.9 at a constant rate, no weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from dmmlib.baselines.gradient import by_epoch, flat, like, mean_gradient
from dmmlib.ensemble import Loss, cross_entropy
from dmmlib.optim import SGD, Tensors
from dmmlib.unlearn.base import Count, Part, Phase, Positive, Problem, Unlearned, finetune, passes, register


def wrong_labels(problem: Problem, rngs: Sequence[np.random.Generator]) -> Tensor:
    """Labels (n_models, n_train): another class than the correct one, at random, on F; the correct one on R."""
    n_classes = problem.original_logits.shape[2]
    labels = np.tile(problem.labels[: problem.n_train], (problem.n_models, 1))
    shift = np.stack([rng.integers(1, n_classes, len(problem.forget)) for rng in rngs])
    labels[:, problem.forget] = (labels[:, problem.forget] + shift) % n_classes
    return torch.from_numpy(labels).to(problem.x.device)


def relabelling(problem: Problem, epochs: int, batch_size: int) -> list[Phase]:
    """`epochs` passes over S, shuffled, with wrong labels on F that are drawn anew for every pass."""
    rngs = problem.rngs(use=1)

    def towards(labels: Tensor) -> Loss:
        return lambda logits, indices, models: cross_entropy(logits, labels[models[:, None], indices])

    batches = by_epoch(passes(problem, np.arange(problem.n_train), epochs, batch_size), epochs)
    return [Phase(epoch, towards(wrong_labels(problem, rngs))) for epoch in batches]


@register(
    "random_labels",
    space={"epochs": [4], "lr": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]},
    paper="Golatkar et al., CVPR 2020; Graves et al., AAAI 2021 (amnesiac unlearning)",
    cost="epochs (n_F + n_R)",
    elsewhere="OPTML-Group/Unlearn-Saliency, vikram2000b/bad-teaching-unlearning, xcadet/deepunlearn",
)
def random_labels(
    problem: Problem, *, epochs: Count = 3, lr: Positive = 1e-2, batch_size: PositiveInt = 64
) -> Unlearned:
    """Learn random wrong labels on F, and go on with the correct ones on R.

    Sources differ in three ways. The readings taken: a label is another class than the correct one (SalUn's equations,
    Graves et al.; SalUn's code draws from all classes); labels are drawn anew for every pass (SalUn's code; Graves et
    al. draw once); and F is shuffled among R (Graves et al., SalUn's code on CIFAR-100), where SalUn's code on CIFAR-10
    goes through F first and then R in every pass.
    """
    return finetune(problem, relabelling(problem, epochs, batch_size), SGD(lr))


def saliency(problem: Problem, share: float) -> Tensors:
    """SalUn's masks, name -> (n_models, ...): 1 for the share of weights with the largest |gradient of F's loss|."""
    sizes = flat(mean_gradient(problem, problem.originals, problem.forget)).abs()
    top = sizes.topk(max(1, round(share * sizes.shape[1])), dim=1).indices
    return like(problem.originals.params, torch.zeros_like(sizes).scatter_(1, top, 1.0))


@register(
    "salun",
    space={"epochs": [4], "lr": [3e-4, 1e-3, 3e-3, 1e-2], "share": [0.01, 0.03, 0.1, 0.3, 0.5]},
    limits={"share": [0.01]},  # hardly any weight moves
    paper="SalUn; Fan et al., ICLR 2024",
    cost="epochs (n_F + n_R) + n_F",
    elsewhere="OPTML-Group/Unlearn-Saliency, xcadet/deepunlearn",
)
def salun(
    problem: Problem, *, epochs: Count = 3, lr: Positive = 1e-2, share: Part = 0.5, batch_size: PositiveInt = 64
) -> Unlearned:
    """`random_labels`, moving only the weights that are salient for F.

    Weights are ranked over all layers; the paper's threshold is the median, share 0.5. Its authors' code adds up
    batches' mean gradients, in evaluation mode; here it is the gradient of the mean over F at the original, the same
    where batches are of one size.
    """
    phases, masks = relabelling(problem, epochs, batch_size), saliency(problem, share)
    return finetune(problem, phases, SGD(lr), masks=masks, spent=len(problem.forget))
