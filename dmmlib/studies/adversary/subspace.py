"""A few directions of parameter space that matter to many targets, for several models at once.

To first order and with curvature, training on one more point whose loss has the gradient g moves a model's parameters
by -A^-1 g, with A = sum of phi phi^T over the training points + mu I, phi the gradients of their margins: the
Gauss-Newton step that gradient kernels rest on (`attributors.kernel`). Lengths of displacements are measured by A.

The parameters of K models are one stacked vector, inner products the mean over models, A one block for each model. Let
G be the m x m matrix of phi_c . A^-1 phi_c' over m candidate points, with eigenvectors V and eigenvalues s. Then

    w_j = sum_c V_cj s_j^(-1/2) A^-1 phi_c,    j = 1 .. k,

are the k principal directions of the candidates, of length 1 and orthogonal in A, and serve twice: z in R^k stands for
the displacement sum_j z_j w_j, and g has the coordinates g . w_j, so that training on a point adds minus its
coordinates to z, deleting it adds them, and a margin with gradient phi changes by the product of coordinates. With the
training points themselves as candidates they are the directions of highest curvature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, jvp, vmap
from torch.nn.functional import one_hot

from dmmlib.attributors.gradients import explicit, margin, margins_of
from dmmlib.ensemble import Ensemble
from dmmlib.errors import OptionError
from dmmlib.optim import Tensors


def gradients(models: Ensemble, i: int, x: Tensor, y: Tensor) -> Tensor:
    """Compute the gradients (n, n_weights) of the margins of points (n, ...) in the weights of model i."""
    params, buffers = models.state_of(i)
    return torch.cat(list(explicit(params, list(params), margins_of(models.module.eval(), buffers), x, y)))


def _factors(phi: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    kernels = phi @ phi.mT
    mu = lam * kernels.diagonal(dim1=1, dim2=2).mean(1)
    kernels.diagonal(dim1=1, dim2=2).add_(mu[:, None])
    return torch.linalg.cholesky(kernels), mu


@dataclass(frozen=True)
class Metric:
    """A of the module's formula at each model, through the training points' gradients."""

    models: Ensemble  # K models
    x: Tensor  # the points that they were trained on
    y: Tensor  # and their labels
    phi: Tensor  # gradients of those points' margins (K, n, n_weights)
    factors: Tensor  # Cholesky factors of phi phi^T + mu I (K, n, n)
    mu: Tensor  # what was added (K,)

    @classmethod
    def at(cls, models: Ensemble, x: Tensor, y: Tensor, lam: float) -> Metric:
        """Return the metric with mu = lam times the mean squared length of gradients, lam > 0."""
        phi = torch.stack([gradients(models, i, x, y) for i in range(models.n_models)])
        return cls(models, x, y, phi, *_factors(phi, lam))

    def damped(self, lam: float) -> Metric:
        """Return the same metric with another damping."""
        factors, mu = _factors(self.phi, lam)
        return replace(self, factors=factors, mu=mu)

    def solve(self, i: int, g: Tensor) -> Tensor:
        """Compute A^-1 g of model i for each row of g (m, n_weights)."""
        phi = self.phi[i]
        inner = torch.cholesky_solve(phi @ g.T, self.factors[i])
        return (g - inner.T @ phi) / self.mu[i]

    def solved(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Return each model's gradients g of the margins of points (m, ...), and A^-1 g, both (m, n_weights)."""
        for i in range(self.models.n_models):
            g = gradients(self.models, i, x, y)
            yield g, self.solve(i, g)

    def influence(self, x: Tensor, y: Tensor) -> np.ndarray:
        """Predict the change of margins of points (m, ...) on deletion of each training point: (m, n).

        phi . A^-1 g with g = -(1 - p) phi_i the gradient of the training point's loss, p its probability.
        """
        total = torch.zeros(len(x), len(self.x), device=x.device)
        for i, (_, steps) in enumerate(self.solved(x, y)):
            logits = self.models[i : i + 1].forward(self.x[None])[0]
            total -= steps @ self.phi[i].T * torch.sigmoid(-margin(logits, self.y))
        return (total / self.models.n_models).cpu().numpy()


@dataclass(frozen=True)
class Subspace:
    """k directions at K models; see the module."""

    models: Ensemble  # K models
    directions: Tensors  # name -> (k, K, ...), the parts w_j of the parameters of that name

    @classmethod
    def of(cls, metric: Metric, x: Tensor, y: Tensor, k: int) -> Subspace:
        """Find the k principal directions of the candidate points (m, ...) with labels (m,).

        Raises OptionError for a k below 1 or above what the candidates span.
        """
        models = metric.models
        steps, gram = [], torch.zeros(len(x), len(x), device=x.device)
        for g, step in metric.solved(x, y):
            steps.append(step)
            gram += g @ step.T / models.n_models
        s, v = torch.linalg.eigh((gram + gram.T).double() / 2)
        s, v = s.flip(0), v.flip(1)
        rank = int((s > 1e-6 * s[0]).sum())
        if not 1 <= k <= rank:
            raise OptionError(f"k={k} directions were asked for, but the candidates span {rank}; use 1 to {rank}.")
        weights = (v[:, :k] / s[:k].sqrt()).T.float()
        flat = torch.stack([weights @ step for step in steps], 1)  # (k, K, n_weights)
        parts = flat.split([p[0].numel() for p in models.params.values()], 2)
        directions = {
            name: part.reshape(k, *p.shape) for (name, p), part in zip(models.params.items(), parts, strict=True)
        }
        return cls(models, directions)

    @property
    def k(self) -> int:
        return len(next(iter(self.directions.values())))

    def responses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (K, n, n_classes) of points (n, ...), and slopes along each direction (k, K, n, n_classes)."""
        module = self.models.module.eval()

        def one(params: Tensors, buffers: Tensors, direction: Tensors) -> tuple[Tensor, Tensor]:
            return jvp(lambda p: functional_call(module, (p, buffers), (x,)), (params,), (direction,))[:2]

        every_direction = vmap(vmap(one), in_dims=(None, None, 0))
        logits, along = every_direction(self.models.params, self.models.buffers, self.directions)
        return logits[0], along

    def of_losses(self, x: Tensor) -> Tensor:
        """Compute coordinates (n, n_classes, k) of the gradients of points' losses, for each class as their label."""
        logits, along = self.responses(x)
        expected = (logits.softmax(-1) * along).sum(-1, keepdim=True)
        return (expected - along).mean(1).permute(1, 2, 0)

    def of_margins(self, x: Tensor, y: Tensor) -> np.ndarray:
        """Compute coordinates (n, k) of the gradients of the points' margins."""
        logits, along = self.responses(x)
        label = one_hot(y, logits.shape[-1]).to(logits)
        others = logits.masked_fill(label.bool(), -torch.inf).softmax(-1)
        return ((label - others) * along).sum(-1).mean(1).T.cpu().numpy()
