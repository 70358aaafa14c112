"""Bad teaching: distil from a teacher that knows nothing on F, from the original on R.

Chundawat et al., "Can Bad Teaching Induce Forgetting?", AAAI 2023.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import PositiveInt

from dmmlib.baselines.fresh import fresh
from dmmlib.baselines.scrub import distillation
from dmmlib.optim import Adam
from dmmlib.unlearn.base import Amount, Part, Phase, Positive, Problem, Unlearned, finetune, passes, register


@register(
    "bad_teacher",
    space={
        "epochs": [4.0],
        "lr": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3],
        "retain_share": [0.3, 1.0],
        "temperature": [1.0, 4.0],
    },
    limits={"lr": [1e-5], "retain_share": [0.3, 1.0], "temperature": [1.0]},  # it hardly moves; as published
    paper="bad teacher; Chundawat et al., AAAI 2023",
    cost="epochs (n_F + retain_share n_R) + n_F",
    elsewhere="vikram2000b/bad-teaching-unlearning, if-loops/selective-synaptic-dampening, xcadet/deepunlearn",
)
def bad_teacher(
    problem: Problem,
    *,
    epochs: Amount = 1.0,
    lr: Positive = 1e-3,
    retain_share: Part = 0.3,
    temperature: Positive = 1.0,
    batch_size: PositiveInt = 64,
) -> Unlearned:
    """Descend KL(teacher || student): the teacher is an untrained model on F, and the original on R.

    F and a sample of R, drawn once for each model, are shuffled together; Adam at a constant rate, as in the authors'
    code. That averages the divergence over classes too, which Adam does not notice; here it is a mean over the batch.
    The paper leaves open whether the untrained teacher is one for all; here each original has its own. Its answers on
    F are counted as |F| sample gradients.
    """
    size = max(1, round(retain_share * len(problem.retain)))
    sample = np.stack([rng.choice(problem.retain, size, replace=False) for rng in problem.rngs(use=2)])
    pools = np.concatenate([np.tile(problem.forget, (problem.n_models, 1)), sample], axis=1)
    teacher = torch.from_numpy(problem.original_logits[:, : problem.n_train].copy())
    teacher[:, problem.forget] = fresh(problem).logits(problem.x[problem.forget])
    phase = Phase(passes(problem, pools, epochs, batch_size), distillation(teacher.to(problem.x.device), temperature))
    return finetune(problem, [phase], Adam(lr), spent=len(problem.forget))
