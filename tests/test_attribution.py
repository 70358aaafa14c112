"""Attribution methods equal their explicit definitions on small cases, and share one protocol."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax
from sklearn import linear_model
from torch import nn

from benchmarks import gpu_study
from dmmlib import attribution, ensemble, forget_sets, metrics, models
from dmmlib import data as datasets
from dmmlib.analysis.side_by_side import compare
from dmmlib.attribution import Context
from dmmlib.attributors import gradients
from dmmlib.attributors.bayesian import covariance, fit
from dmmlib.attributors.gradients import margin
from dmmlib.attributors.kernel import EASY, Kernel, gradient_kernel, gram, hardness, kernel, kernel_response
from dmmlib.attributors.lasso import Solver
from dmmlib.attributors.linearised import FLAT, LAM, LinearisedResponse, leading, linearised_response
from dmmlib.attributors.margins import calibrated
from dmmlib.datamodels import Attributor, lds, retrained
from dmmlib.errors import DataError, ForgetSetError, MethodError, OptionError


class Conv(nn.Module):
    """A convolution, batch norm, and a linear layer: explicit gradients and outer products in one kernel."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))

    def forward(self, x):
        return self.body(x.view(-1, 1, 4, 4))


class Twice(nn.Module):
    """One linear layer used twice, whose gradient is no outer product."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 3, bias=False)

    def forward(self, x):
        return self.head(self.inner(self.inner(x).relu()).relu())


FACTORIES = {
    "linear": lambda: nn.Linear(16, 3),
    "mlp": lambda: nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)),
    "conv": Conv,
    "twice": Twice,
    "five classes": lambda: nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5)),
}


def problem(factory, n=10, n_val=4, m=12, k=3, seed=0):
    """A context of models that were not trained: the formulas ask for no more than weights and outputs."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n + n_val, 16)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 3, n + n_val))
    masks = np.stack([np.isin(np.arange(n), rng.permutation(n)[: n // 2]) for _ in range(m)])
    models = ensemble.initialise(factory, range(m))
    outputs = metrics.margin_gauge(models.logits(x).numpy(), y.numpy())
    originals = ensemble.initialise(factory, range(100, 105))
    return Context(x, y, masks, outputs, models[:k], originals, originals.logits(x).numpy())


def jacobians(context, i, models=None):
    """Gradients of the margins of all points (n_points, p) of model i, one backward pass each."""
    models = models or context.models
    params = {k: v[i].clone().requires_grad_() for k, v in models.params.items()}
    buffers = {k: v[i] for k, v in models.buffers.items()}
    models.module.eval()
    m = margin(torch.func.functional_call(models.module, (params, buffers), (context.x,)), context.y)

    def flat(output):
        return torch.cat([g.flatten() for g in torch.autograd.grad(output, list(params.values()), retain_graph=True)])

    return torch.stack([flat(z) for z in m]).double().numpy()


def logits_and_gradients(context, i):
    """Logits (n_points, n_classes) of model i and their gradients (n_points, n_classes, p), in double precision."""
    params, buffers = ({k: v[i].double() if v.is_floating_point() else v[i] for k, v in state.items()}
                       for state in (context.models.params, context.models.buffers))  # fmt: skip
    module = context.models.module.eval()

    def logits(params):
        return torch.func.functional_call(module, (params, buffers), (context.x.double(),))

    found = torch.func.jacrev(logits)(params)
    return logits(params).numpy(), torch.cat([g.flatten(2) for g in found.values()], 2).numpy()


def explicit_kernel(context, lam, h=1.0, models=None):
    """T (n_train, n_points) and G (n_train, n_train), times mean diag K, averaged over models."""
    n, t, g, models = context.n_train, 0, 0, models or context.models
    for i in range(models.n_models):
        phi = jacobians(context, i, models)
        k = phi[:n] @ phi.T
        unit = np.diag(k).mean()
        a = k[:, :n] + lam * unit * np.eye(n) / h
        t, g = t + np.linalg.solve(a, k) / models.n_models, g + unit * np.linalg.inv(a) / models.n_models
    return t, g


def test_margin_is_that_of_the_metrics():
    z, y = torch.randn(7, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_allclose(margin(z, y), metrics.margins(z[None].numpy(), y.numpy())[0], atol=1e-5)


@pytest.mark.parametrize("name", FACTORIES)
def test_gram_equals_products_of_explicit_gradients(name):
    context = problem(FACTORIES[name])
    n = context.n_train
    phi = jacobians(context, 1)[:n]
    np.testing.assert_allclose(gram(context.models, 1, context.x[:n], context.y[:n]), phi @ phi.T, rtol=1e-3, atol=1e-4)


def test_many_gradients_are_projected(monkeypatch):
    monkeypatch.setattr("dmmlib.attributors.kernel.FEATURES", 10)
    context = problem(FACTORIES["conv"])
    n = context.n_train
    phi = jacobians(context, 0)[:n]
    exact = phi @ phi.T
    close = gram(context.models, 0, context.x[:n], context.y[:n]).numpy()
    assert not np.allclose(close, exact, rtol=1e-5)
    assert np.abs(close - exact).max() < 0.1 * np.diag(exact).mean()


@pytest.mark.parametrize("name", FACTORIES)
def test_sketched_gradients_keep_inner_products_in_expectation(name):
    context = problem(FACTORIES[name])
    phi = jacobians(context, 0)
    exact, unit = phi @ phi.T, np.square(phi).sum(1).mean()
    found = [gram(context.models, 0, context.x, context.y, seed, project=16).numpy() for seed in range(60)]
    spread = unit * (2 / 16) ** 0.5  # of one sketch, at most about
    assert np.abs(np.mean(found, 0) - exact).max() < 4.5 * spread / 60**0.5
    many = gram(context.models, 0, context.x, context.y, project=4096).numpy()
    assert np.abs(many - exact).max() < 0.1 * unit


def test_a_sketch_is_the_same_in_blocks_of_any_size(monkeypatch):
    context = problem(FACTORIES["conv"])
    whole = gram(context.models, 0, context.x, context.y, project=32)
    monkeypatch.setattr("dmmlib.attributors.kernel.BLOCK", {context.x.device.type: 1})
    torch.testing.assert_close(gram(context.models, 0, context.x, context.y, project=32), whole)


MEASURE = """
import resource, sys, torch
from dmmlib import ensemble, models
from dmmlib.attributors import gradients, kernel
from dmmlib.matching.gauss_newton import Jacobian, separable_weights
torch.set_num_threads(1)
torch.manual_seed(0)
what, n = sys.argv[1], int(sys.argv[2])
x, y = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
stacked = ensemble.initialise(lambda: models.build("resnet9", (3, 32, 32), 10, width=64), [0])
gradients.POINTS, kernel.BLOCK = 8, {"cpu": 20_000_000}  # points, and numbers that eight of these take
(params, buffers), (known, others) = stacked.state_of(0), separable_weights(stacked, x, y)
assert others == 2688, "of batch norm"
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if what == "gram":
    found = kernel.gram(stacked, 0, x[:n], y[:n], project=8192)
else:
    seen = Jacobian(stacked.module.eval(), params, buffers, x[:n], y[:n], n // 2, known)
    found = seen.kernel
    assert all(v.isfinite().all() for v in seen.solve(torch.ones(n), torch.full((n,), 0.01)).values())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, found.diagonal()[:8].tolist())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux reports it")
@pytest.mark.parametrize(("what", "most"), [("gram", 4e6), ("jacobian", 15e6)])
def test_gradients_of_a_full_resnet_fit_into_bounded_memory(what, most):
    """ResNet-9 of width 64 on 32 x 32 images: 2.3 million weights, whose gradients take 9 MB for each point.

    A kernel sees eight points at a time. A Gauss-Newton step sees all of its points, of which there are few: it keeps
    what layers are given and their outputs' gradients, but not a gradient of any weight.
    """
    peaks, diagonals = [], []
    for n in ("8", "32"):
        command = [sys.executable, "-c", MEASURE, what, n]
        peak, _, diagonal = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition(" ")
        peaks.append(float(peak))
        diagonals.append(json.loads(diagonal))
    assert peaks[1] < 1e9
    assert (peaks[1] - peaks[0]) / 24 < most
    assert min(diagonals[1]) > 0
    if what == "gram":
        np.testing.assert_allclose(diagonals[0], diagonals[1], rtol=1e-2)
    else:
        assert peaks[1] / 32 < 2 * gpu_study.A_POINT, "the docs count with that"


@pytest.mark.parametrize("name", FACTORIES)
def test_kernel_equals_the_explicit_solve(name):
    context = problem(FACTORIES[name])
    m = metrics.margins(context.outputs[:, :10], context.labels[:10])
    q, seen = 1 / (1 + np.exp(m)), context.masks
    h = np.maximum(q.mean(0) / q.mean(), 0.01)
    t, g = explicit_kernel(context, 0.2, h)
    found = kernel_response(context, 0.2)
    np.testing.assert_allclose(found.kernel.transfer, t, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(found.kernel.inverse, g, rtol=2e-2, atol=2e-3 * np.abs(g).max())
    coupling = g / np.diag(g)[:, None]

    def shortfall(r, without):
        return np.linalg.solve(coupling[np.ix_(without, without)], r[without])

    # the mean shortfall of a point over the subsets without it is its rise
    rise = np.array([m[seen[:, i], i].mean() - m[~seen[:, i], i].mean() for i in range(10)])
    shortfalls = np.zeros((12, 10))
    for row, mask in zip(shortfalls, seen, strict=True):
        row[~mask] = shortfall(found.residuals, np.flatnonzero(~mask))
    np.testing.assert_allclose(shortfalls.sum(0) / (~seen).sum(0), rise / np.diag(t), rtol=5e-2, atol=5e-2)
    fitted = kernel(context, lam=0.2)
    effect, right = fitted.effect([0, 5]), np.eye(context.n_classes, dtype=bool)[context.labels]
    change = -shortfall(found.residuals, [0, 5]) @ t[[0, 5]]
    np.testing.assert_allclose(effect[right], fitted.scale * change, rtol=5e-2, atol=1e-2 * np.abs(effect).max())
    assert (effect[~right] == 0).all()
    predicted = metrics.right_logits(fitted.predict(seen), context.labels)
    actual = metrics.right_logits(context.outputs, context.labels)
    np.testing.assert_allclose(predicted.mean(0), actual.mean(0), atol=1e-4)
    centred = [z - z.mean(0) for z in (predicted, actual)]
    assert (centred[0] * centred[1]).sum() == pytest.approx((centred[0] ** 2).sum(), rel=1e-2)  # least squares


def against_others(logits, labels, ranking, n_logits):
    """Logits (n, n_logits) of a point's own class and the likeliest wrong ones, less that of the others together."""
    found = []
    for z, label, likely in zip(logits, labels, ranking, strict=True):
        order = [label, *(c for c in np.argsort(-likely) if c != label)]
        found.append(z[order[:n_logits]] - logsumexp(z[order[n_logits:]]))
    return np.stack(found)


def softmax_regression(j, start, keep, penalty, pull):
    """Weights of the penalised softmax regression of the module `linearised`, by quasi-Newton steps."""

    def loss(theta):
        z = np.pad((start + j @ theta)[keep], ((0, 0), (0, 1)))
        wrong = softmax(z, 1)[:, :-1] - (np.arange(j.shape[1]) == 0)
        gradient = penalty * theta + np.einsum("nc,ncr->r", wrong, j[keep]) + pull
        return -log_softmax(z, 1)[:, 0].sum() + penalty / 2 * theta @ theta + pull @ theta, gradient

    options = {"maxiter": 5000, "gtol": 1e-7}
    return minimize(loss, np.zeros(j.shape[2]), jac=True, method="L-BFGS-B", options=options).x


@pytest.mark.parametrize("n_logits", [1, 2, 9])
@pytest.mark.parametrize("name", ["mlp", "conv", "twice", "five classes"])
def test_linearised_retraining_is_softmax_regression_on_gradients(name, n_logits):
    context, lam = problem(FACTORIES[name]), 0.1
    n, labels, c = context.n_train, context.labels, min(n_logits, context.n_classes - 1)
    found, margins, first_order = linearised_response(context, lam, n_models=2, n_logits=n_logits), 0, 0
    masks, ranking = np.ones((3, n), bool), context.outputs.mean(0)
    masks[0, [3]] = masks[1, [0, 4, 5, 8]] = False
    for i in range(2):
        # gradients of logits, of which those against others are combinations, in a basis of those of training margins
        now, j = logits_and_gradients(context, i)
        phi = jacobians(context, i)[:n].astype(float)
        j = j @ np.linalg.qr(phi.T)[0]
        step, base = 1e-6, against_others(now, labels, ranking, c)
        slopes = np.stack([against_others(now + step * e, labels, ranking, c) - base for e in np.eye(now.shape[1])], 2)
        j = np.einsum("tck,tkr->tcr", slopes / step, j)
        penalty, seen = lam * (phi**2).sum(1).mean(), context.masks[i]
        start, pull = against_others(np.zeros(now.shape), labels, ranking, c), np.zeros(j.shape[2])
        if i == 1:  # retrained from where it is
            start = base
            wrong = softmax(np.pad(start, ((0, 0), (0, 1))), 1)[:, :-1] - (np.arange(c) == 0)
            pull = -np.einsum("nc,ncr->r", wrong[:n][seen], j[:n][seen])
            np.testing.assert_allclose(softmax_regression(j[:n], start[:n], seen, penalty, pull), 0, atol=1e-4)
        thetas = [softmax_regression(j[:n], start[:n], mask, penalty, pull) for mask in masks]
        logits = [np.pad(start + j @ theta, ((0, 0), (0, 1))) for theta in thetas]
        margins = margins + metrics.margins(np.stack(logits), 0 * labels) / 2
        margins -= margins[2]
        z = logits[2]
        p = softmax(z, 1)[:, :-1]
        hessian = np.einsum("ncr,nc,ncs->rs", j[:n], p[:n], j[:n]) + penalty * np.eye(j.shape[2])
        mean = np.einsum("nc,ncr->nr", p[:n], j[:n])
        hessian -= mean.T @ mean
        steps = np.einsum("nc,ncr->nr", ((np.arange(c) == 0) - p)[:n], j[:n])
        others = softmax(np.where(np.arange(c + 1) == 0, -np.inf, z), 1)[:, :-1]
        rises = np.einsum("nc,ncr->nr", (np.arange(c) == 0) - others, j)
        first_order = first_order + steps @ np.linalg.solve(hessian, rises.T) / 2
    change, _ = found.change(masks)
    size = np.abs(margins).max()
    np.testing.assert_allclose(change, margins, atol=0.02 * size)
    np.testing.assert_allclose(change[2], 0, atol=1e-5)
    np.testing.assert_allclose(found.weights, first_order, atol=0.02 * np.abs(first_order).max())
    fitted = attribution.fit("linearised", context, lam=lam, n_models=2, n_logits=n_logits)
    right = np.eye(context.n_classes, dtype=bool)[labels]
    effect = fitted.effect([0, 4, 5, 8])
    np.testing.assert_allclose(effect[right], fitted.scale * change[1], atol=1e-3 * size)
    assert (effect[~right] == 0).all()


@pytest.mark.parametrize("lam", [LAM, 1e-5])
def test_effects_that_are_small_are_followed_to_their_end(tiny, monkeypatch, lam):
    """Of single points: with a small penalty, a first step moves no logit by much, and is far from the last."""
    (model,) = linearised_response(tiny.context(), lam=lam, n_models=1).models
    masks = ~np.eye(model.n_train, dtype=bool)[:40]
    found = model.change(masks)
    monkeypatch.setattr("dmmlib.attributors.linearised.STILL", 1e-4)
    true = model.change(masks)
    assert (found * true).sum() / (true * true).sum() == pytest.approx(1, abs=0.15)


def test_leverage_is_the_length_of_a_newton_step():
    context = problem(FACTORIES["five classes"])
    response = linearised_response(context, n_models=1)
    (model,) = response.models
    j, theta = model.features[:10].double().numpy(), model.weights.double().numpy()
    p = softmax(np.pad(model.initial[:10].double().numpy() + j @ theta, ((0, 0), (0, 1))), 1)
    right, at_least = np.arange(j.shape[1]) == 0, np.maximum(p, FLAT)
    q = at_least[:, :-1]
    curve = np.einsum("nc,cd->ncd", q, np.eye(j.shape[1])) - q[:, :, None] * q[:, None] / at_least.sum(1)[:, None, None]
    metric = np.einsum("ncr,ncd,nds->rs", j, curve, j) / 10 + model.penalty * np.eye(j.shape[2])
    pull = np.einsum("nc,ncr->r", (right - p[:, :-1])[[1, 6]], j[[1, 6]]) / 10
    moved = np.linalg.solve(metric, pull)
    assert response.leverage(np.array([1, 6])) == pytest.approx(np.sqrt(moved @ metric @ moved), rel=1e-3)


def test_masks_are_solved_for_one_by_one_or_together(monkeypatch):
    context = problem(FACTORIES["mlp"])
    response = linearised_response(context, n_models=1)
    together, _ = response.change(context.masks)
    monkeypatch.setattr("dmmlib.attributors.linearised.BLOCK", 5)
    np.testing.assert_allclose(response.change(context.masks)[0], together, atol=1e-4)
    every = linearised_response(context).models
    mean = np.mean([LinearisedResponse((model,)).change(context.masks)[0] for model in every], 0)
    np.testing.assert_allclose(LinearisedResponse(every).change(context.masks)[0], mean, atol=1e-4)


def test_a_mean_over_models_knows_how_noisy_it_is():
    context = problem(FACTORIES["mlp"])
    every = linearised_response(context).models
    for same in (every[:1] * 3, every[:1]):
        np.testing.assert_allclose(LinearisedResponse(same).change(context.masks)[1], 0, atol=1e-5)
    changes = np.stack([model.change(context.masks) for model in every])
    centred = changes - changes.mean(1, keepdims=True)
    k = len(every)
    expected = centred.var(0, ddof=1).mean(0) / k  # of a mean of k models
    mean, noise = LinearisedResponse(every).change(context.masks)
    np.testing.assert_allclose(mean, changes.mean(0), atol=1e-4)
    np.testing.assert_allclose(noise, expected, rtol=1e-3, atol=1e-5)


@dataclass(frozen=True)
class Noisy:
    """A linear response with noise of some variance."""

    weights: np.ndarray
    noise: float
    told: bool = True

    @property
    def n_train(self) -> int:
        return len(self.weights)

    def change(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        clean = (masks - 1.0) @ self.weights
        noise = np.sqrt(self.noise) * np.random.default_rng(0).normal(size=clean.shape)
        return clean + noise, np.full(self.weights.shape[1], self.noise if self.told else 0)


@pytest.mark.parametrize("scaled", [fit, calibrated])
def test_noise_in_a_response_does_not_shrink_its_scale(scaled):
    context, _, w0 = gaussian(n=80, n_points=400, m=50, rho=1e-3, scale=1.5)
    noise = float(((context.masks - context.masks.mean(0)) @ w0).var()) / 2
    clean, noisy = (scaled(context, Noisy(w0, v)).scale for v in (0.0, noise))
    assert noisy == pytest.approx(clean, rel=0.05)
    assert scaled(context, Noisy(w0, noise, told=False)).scale < 0.8 * clean


def test_compressed_features_keep_the_leading_directions_of_a_kernel():
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(30, 12)) * np.geomspace(1, 1e-3, 12)
    kernel = torch.from_numpy(phi[:20] @ phi.T).float()
    full, few = (kernel.T @ leading(kernel[:, :20], rank) for rank in (20, 5))
    np.testing.assert_allclose(full[:20] @ full.T, kernel, atol=1e-4)
    assert few.shape == (30, 5)
    u, s, _ = np.linalg.svd(phi[:20])
    best = (u[:, :5] * s[:5] ** 2) @ u[:, :5].T
    np.testing.assert_allclose(few[:20] @ few[:20].T, best, atol=1e-3 * s[0] ** 2)


def test_hardness_is_relative_and_bounded():
    h = hardness(np.array([[0.0, 100.0, -100.0], [0.0, 100.0, 100.0]]))
    np.testing.assert_allclose(h, [1.5, EASY, 1.5])


def test_points_that_are_always_in_a_subset_have_no_residual():
    found = Kernel(np.eye(4, 6, dtype=np.float32) + 0.1, np.eye(4, dtype=np.float32))
    masks = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 0, 0]], bool)
    r = found.measured(np.where(masks, 3.0, 1.0), masks)
    np.testing.assert_allclose(r, [0, 2 / 1.1, 2 / 1.1, 2 / 1.1], rtol=1e-6)


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_residuals_are_of_single_deletions_though_subsets_leave_out_many(share):
    """Kernel ridge regressions on random subsets of points with near-copies: y - m of each point alone is found."""
    rng, n = np.random.default_rng(0), 60
    x = rng.normal(size=(n, 12))
    x[30:] = x[:30] + 0.3 * rng.normal(size=(30, 12))
    k, y = (1 + x @ x.T / 12) ** 2, 2 * x[:, 0] + rng.normal(size=n)
    penalised = k + np.diag(0.1 * np.diag(k).mean() / np.exp(rng.normal(size=n)))
    masks = np.stack([np.isin(np.arange(n), rng.permutation(n)[: int(share * n)]) for _ in range(3000)])
    margins = np.stack([k[:, m] @ np.linalg.solve(penalised[np.ix_(m, m)], y[m]) for m in masks])
    inverse = np.linalg.inv(penalised)
    true = inverse @ y / np.diag(inverse)
    found = Kernel(inverse @ k, inverse).measured(margins, masks)
    assert found @ true / (found @ found) == pytest.approx(1, abs=0.1)
    assert np.linalg.norm(found - true) < 0.2 * np.linalg.norm(true)


@pytest.mark.parametrize("name", ["bayesian", "kernel", "linearised", "lasso", "ridge"])
def test_outputs_that_are_not_finite_are_refused(name):
    context = problem(FACTORIES["mlp"])
    context.outputs[3, 12] = np.nan
    with pytest.raises(DataError, match="hold NaN or infinity; train those models anew"):
        attribution.fit(name, context).effect([0])


def test_one_training_set_tells_nothing():
    context = problem(FACTORIES["mlp"])
    with pytest.raises(DataError, match="All 1 masks are alike"):
        replace(context, masks=context.masks[:1], outputs=context.outputs[:1], models=None)


def test_it_is_trak_as_published():
    """tau(z) = (1/M sum Q) (1/M sum phi(z) (Phi^T Phi + lam I)^-1 Phi^T), in margins, for Phi without projection."""
    context = problem(FACTORIES["mlp"])
    n, tau = context.n_train, 0
    for i in range(3):
        every = jacobians(context, i)
        phi = every[:n]
        lam = 0.2 * (phi**2).sum(1).mean()
        tau = tau + every @ np.linalg.solve(phi.T @ phi + lam * np.eye(phi.shape[1]), phi.T) / 3  # (target, train)
    found = gradient_kernel(context.models, context.x, context.y, n, 0.2)
    np.testing.assert_allclose(found.transfer.T, tau, atol=1e-3)


def test_the_slope_that_calibrates_scores_recovers_their_unit():
    context = problem(FACTORIES["mlp"], m=60)
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(10, 14)).astype(np.float32)
    outputs = metrics.margin_gauge(rng.normal(size=(60, 14, 3)), context.labels) * 1e-3
    right = np.eye(context.n_classes, dtype=bool)[context.labels]
    outputs[:, right] += -2.5 * context.masks @ raw
    moved = Context(context.x, context.y, context.masks, outputs.astype(np.float32))
    np.testing.assert_allclose(calibrated(moved, raw).weights, -2.5 * raw, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("forget", [[3], [1, 4, 6]])
def test_a_group_leaves_kernel_ridge_regression_exactly(forget):
    """Against regressions without F, whose points have penalties of their own; residuals are of single deletions."""
    rng = np.random.default_rng(0)
    k, y, penalty = rng.normal(size=(11, 8)), rng.normal(size=8), rng.uniform(0.1, 3, 8)
    k = k @ k.T  # 8 training points, 3 others

    def predicted(keep):
        return k[:, keep] @ np.linalg.solve(k[np.ix_(keep, keep)] + np.diag(penalty[keep]), y[keep])

    everything = np.arange(8)
    alone = np.array([y[i] - predicted(np.delete(everything, i))[i] for i in range(8)])
    inverse = np.linalg.inv(k[:8, :8] + np.diag(penalty))
    ridge = Kernel(inverse @ k[:8], 5 * inverse)
    change = predicted(np.setdiff1d(everything, forget)) - predicted(everything)
    mask = ~np.isin(everything, forget)
    np.testing.assert_allclose(ridge.change(alone, mask[None])[0], change, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ridge.change(alone, np.ones((1, 8), bool)), 0)


def gaussian(n=12, n_points=40, m=60, rho=0.5, scale=1.5, sigma=0.3, delta=0.3, seed=0):
    """A context drawn from the Bayesian datamodel's own model, its weights, and the prior mean it was drawn with."""
    rng = np.random.default_rng(seed)
    w0 = rng.normal(size=(n, 3)) @ rng.normal(size=(3, n_points))
    root = np.linalg.cholesky(covariance(w0, delta))
    weights = scale * w0 + np.sqrt(rho) * sigma * root @ rng.normal(size=(n, n_points))
    weights[np.arange(n), np.arange(n)] += rng.uniform(3, 6, n)
    masks = np.stack([np.isin(np.arange(n), rng.permutation(n)[: n // 2]) for _ in range(m)])
    y = rng.integers(0, 3, n_points)
    outputs = 0.1 * rng.normal(size=(m, n_points, 3))
    outputs[:, np.eye(3, dtype=bool)[y]] = 1 + masks @ weights + sigma * rng.normal(size=(m, n_points))
    context = Context(torch.zeros(n_points, 1), torch.from_numpy(y), masks, outputs.astype(np.float32))
    return context, weights, w0.astype(np.float32)


def test_the_posterior_is_that_of_generalised_least_squares():
    """Against the textbook form: own weights by GLS, the rest by kriging what is left, one output at a time."""
    context, _, w0 = gaussian(m=20)
    fitted = fit(context, w0, delta=0.3)
    a, n, labels = context.masks - context.masks.mean(0), 12, context.labels
    c = covariance(w0, 0.3)
    inverse = np.linalg.inv(fitted.rho * a @ c @ a.T + np.eye(20))
    u = np.isin(np.arange(n), [0, 4, 7]).astype(float)
    effect, sd = fitted.effect([0, 4, 7]), fitted.sd([0, 4, 7])
    np.testing.assert_allclose(fitted.effects([[2], [0, 4, 7]]), [fitted.effect([2]), effect], atol=1e-5)
    for j in range(40):
        for k in range(3):
            y = context.outputs[:, j, k].astype(float)
            prior = fitted.scale * w0[:, j] if k == labels[j] else np.zeros(n)
            left = y - y.mean() - a @ prior
            own = 0.0
            if j < n:
                own = a[:, j] @ inverse @ left / (a[:, j] @ inverse @ a[:, j])
                left = left - own * a[:, j]
            w = prior + fitted.rho * c @ a.T @ inverse @ left
            if j < n:
                w[j] += own
            np.testing.assert_allclose(effect[j, k], -u @ w, atol=2e-3)
        q = a @ c @ u
        variance = fitted.rho * u @ c @ u - fitted.rho**2 * q @ inverse @ q
        if j < n:
            x = a[:, j]
            variance += (u[j] - fitted.rho * x @ inverse @ q) ** 2 / (x @ inverse @ x)
        np.testing.assert_allclose(sd[j], fitted.sigma[j] * np.sqrt(variance), rtol=1e-3)


def test_left_out_residuals_are_those_of_a_fit_without_the_model():
    """By universal kriging from the other 19 models, with the same scale, rho and covariance."""
    context, _, w0 = gaussian(m=20)
    fitted = fit(context, w0, delta=0.3)
    a, out, labels = context.masks - context.masks.mean(0), 7, context.labels
    others = np.arange(20) != out
    r = fitted.rho * a @ covariance(w0, 0.3) @ a.T + np.eye(20)
    inverse = np.linalg.inv(r[np.ix_(others, others)])
    left = context.margins - metrics.right_logits(fitted.prior.predict(context.masks), labels)
    for j in range(40):
        x = np.stack([np.ones(20), *([a[:, j]] if j < 12 else [])], 1)
        known, y = x[others], left[others, j]
        trend = np.linalg.solve(known.T @ inverse @ known, known.T @ inverse @ y)
        predicted = x[out] @ trend + r[out, others] @ inverse @ (y - known @ trend)
        np.testing.assert_allclose(fitted.left_out()[out, j], left[out, j] - predicted, atol=1e-3)


def test_evidence_finds_the_scale_and_intervals_cover():
    covered, scales = [], []
    for seed in range(12):
        context, weights, w0 = gaussian(seed=seed)
        fitted = fit(context, w0, delta=0.3)
        scales.append(fitted.scale)
        forget = [1, 3, 8]
        error = metrics.right_logits(fitted.effect(forget), context.labels) + weights[forget].sum(0)
        covered.append(np.abs(error) < 1.96 * fitted.sd(forget))
    np.testing.assert_allclose(np.mean(scales), 1.5, atol=0.1)
    assert 0.9 < np.mean(covered) < 0.99


def test_few_models_are_enough_where_the_kernel_knows_who_acts_alike():
    context, weights, w0 = gaussian(m=24)
    forget = [0, 2, 5, 9]
    true = -weights[forget].sum(0)[12:]

    def error(delta, around):
        predicted = metrics.right_logits(fit(context, around, delta).effect(forget), context.labels)[12:]
        return ((predicted - true) ** 2).mean()

    wrong = np.random.default_rng(1).normal(size=w0.shape).astype(np.float32)
    assert error(0.3, w0) < 0.3 * error(1.0, wrong)


def test_the_predicted_oracle_has_the_predicted_margin_and_keeps_the_common_mode():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(5, 7, 4)).astype(np.float32) * 3, rng.integers(0, 4, 7)
    effect = rng.normal(size=(7, 4)) * 3
    new = retrained(z, effect, y)
    change = metrics.margins(new, y) - metrics.margins(z, y)
    np.testing.assert_allclose(change, np.broadcast_to(metrics.right_logits(effect, y), (5, 7)), atol=1e-5)
    gauge = metrics.margin_gauge(z, y)
    np.testing.assert_allclose(metrics.right_logits(gauge, y), metrics.margins(z, y), atol=1e-5)
    np.testing.assert_allclose(retrained(z, np.zeros((7, 4)), y), z, atol=1e-5)
    wrong = np.eye(4, dtype=bool)[y][None]
    common = [np.log(np.where(wrong, 0, np.exp(x)).sum(-1)) for x in (z, new)]
    np.testing.assert_allclose(*common, atol=1e-4)


def sparse(m=60, n=12, points=5, seed=0):
    """A context without weights whose outputs depend on two training points each."""
    rng = np.random.default_rng(seed)
    masks = np.stack([np.isin(np.arange(n), rng.permutation(n)[: n // 2]) for _ in range(m)])
    weights = np.zeros((n, n + points, 3))
    for target in range(n + points):
        weights[rng.permutation(n)[:2], target] = 3 * rng.normal(size=(2, 3))
    outputs = np.einsum("mn,npc->mpc", masks, weights) + 1 + 0.5 * rng.normal(size=(m, n + points, 3))
    x = torch.zeros(n + points, 2)
    return Context(x, torch.zeros(n + points, dtype=torch.long), masks, outputs.astype(np.float32)), weights


@pytest.mark.parametrize("share", [0.02, 0.2, 0.7])
@pytest.mark.parametrize("m", [8, 60], ids=["fewer subsets than points", "more"])
def test_lasso_equals_that_of_scikit_learn(share, m, monkeypatch):
    monkeypatch.setattr("dmmlib.attributors.lasso.BLOCK", 7)  # several blocks of targets
    context, _ = sparse(m)
    fitted = attribution.fit("lasso", context, shares=[share], tol=1e-5)
    a = context.masks - context.masks.mean(0)
    y = context.outputs.reshape(m, -1) - context.outputs.reshape(m, -1).mean(0)
    for target in range(0, y.shape[1], 5):
        lam = share * np.abs(a.T @ y[:, target] / m).max()
        theirs = linear_model.Lasso(alpha=lam, tol=1e-9, max_iter=100_000).fit(context.masks, y[:, target]).coef_
        ours = fitted.weights.toarray()[:, target]
        objective = [((y[:, target] - a @ w) ** 2).sum() / 2 / m + lam * np.abs(w).sum() for w in (ours, theirs)]
        np.testing.assert_allclose(*objective, rtol=1e-4)
        if m > 12:  # else the minimiser need not be unique
            np.testing.assert_allclose(ours, theirs, atol=2e-3)
    w = fitted.weights.toarray().reshape(12, -1, 3)
    np.testing.assert_allclose(fitted.effect([1, 4]), -w[[1, 4]].sum(0), atol=1e-6)
    predicted = context.outputs.mean(0) + np.einsum("mn,npc->mpc", a, w)
    np.testing.assert_allclose(fitted.predict(context.masks), predicted, atol=1e-5)


@pytest.mark.parametrize("m", [15, 200], ids=["fewer subsets than points", "more"])
def test_lasso_by_masks_or_by_their_gram_matrix_is_that_of_scikit_learn(m):
    rng = np.random.default_rng(0)
    masks, y, shares = rng.random((m, 40)) < 0.7, rng.normal(size=(30, m)), rng.uniform(0.1, 0.9, 30)
    solver, zero = Solver(torch.from_numpy(masks.astype(float))), torch.zeros(30, 40, dtype=torch.double)
    assert (solver.gram is None) == (m == 15)
    given = [torch.from_numpy(v) for v in (y, shares)]
    ours = solver.solve(*given, zero, tol=1e-11).numpy()
    warm = solver.solve(*given, torch.from_numpy(rng.normal(size=(30, 40))), tol=1e-11).numpy()
    a, y = masks - masks.mean(0), y - y.mean(1, keepdims=True)
    lam = shares * np.abs(y @ a / m).max(1)
    theirs = [
        linear_model.Lasso(alpha=l, tol=1e-13, max_iter=100_000).fit(a, v).coef_ for l, v in zip(lam, y, strict=True)
    ]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(warm, theirs, atol=1e-4)
    loose = solver.solve(*given, zero, tol=0.05).numpy()
    objective = [((y - w @ a.T) ** 2).sum(1) / 2 / m + lam * np.abs(w).sum(1) for w in (loose, ours)]
    assert (objective[0] - objective[1] <= 0.05 * (y**2).sum(1) / 2 / m).all()  # what the duality gap promises
    with pytest.raises(DataError, match="not converged"):
        solver.solve(*(v[:3] for v in given), zero[:3], tol=-1.0)


def chosen_shares(fitted, context, shares):
    """For each target, the share whose fit alone has its weights."""
    alone = [attribution.fit("lasso", context, shares=[share]).weights.toarray() for share in shares]
    missed = np.abs(np.stack(alone) - fitted.weights.toarray()).max(1)
    assert missed.min(0).max() < 5e-2, "each target has one of the shares"
    return np.array(shares)[missed.argmin(0)]


def test_lasso_goes_no_denser_than_its_held_out_error_falls():
    context, _ = sparse(40)
    noise = np.random.default_rng(1).normal(size=context.outputs.shape).astype("f4")
    context, shares = Context(context.x, context.y, context.masks, noise), [0.9, 0.3, 0.02]
    fitted = attribution.fit("lasso", context, shares=shares)
    assert 0.3 < (chosen_shares(fitted, context, shares) == 0.9).mean() < 1


def test_lasso_chooses_its_penalty_on_held_out_subsets():
    (context, weights), shares = sparse(400), [0.9, 0.05]
    fitted = attribution.fit("lasso", context, shares=shares)
    assert (chosen_shares(fitted, context, shares) == 0.05).mean() > 0.9
    assert np.abs(fitted.weights.toarray().reshape(weights.shape) - weights).mean() < 0.2
    noise = np.random.default_rng(1).normal(size=context.outputs.shape).astype("f4")
    context = Context(context.x, context.y, context.masks, noise)
    fitted = attribution.fit("lasso", context, shares=shares)
    assert (chosen_shares(fitted, context, shares) == 0.9).mean() > 0.5


def test_bad_input():
    context = problem(FACTORIES["linear"])
    parts = {k: getattr(context, k) for k in ("x", "y", "masks", "outputs")}
    with pytest.raises(DataError, match=r"\(12, 13, 3\) for 12 masks"):
        Context(**parts | {"outputs": context.outputs[:, :13]})
    with pytest.raises(DataError, match="only 2 masks"):
        Context(**parts | {"masks": context.masks[:2], "outputs": context.outputs[:2]}, models=context.models)
    bare = Context(**parts)
    with pytest.raises(DataError, match="context `models`"):
        attribution.fit("kernel", bare)
    with pytest.raises(OptionError, match="delta=0"):
        attribution.fit("bayesian", context, delta=0)
    few = Context(**parts | {"masks": context.masks[:2], "outputs": context.outputs[:2]}, models=context.models[:2])
    with pytest.raises(DataError, match="at least 3"):
        attribution.fit("bayesian", few)
    for name in ("kernel", "linearised"):
        with pytest.raises(OptionError, match=r"lam=0 .*greater than 0"):
            attribution.fit(name, context, lam=0)
    for options in ({"rank": 0}, {"n_models": 0}):
        with pytest.raises(OptionError, match=r"=0 .*greater than 0"):
            attribution.fit("bayesian", context, **options)
    with pytest.raises(DataError, match="context `models`"):
        attribution.fit("linearised", bare)
    with pytest.raises(ForgetSetError, match=r"index 10 .* 10"):
        attribution.fit("kernel", context).effect([10])
    with pytest.raises(OptionError, match=r"shares=\[0.5, 1.5\] .*less than 1"):
        attribution.fit("lasso", bare, shares=[0.5, 1.5])
    with pytest.raises(DataError, match="at least two"):
        attribution.fit("lasso", bare, held_out=0.95)
    for odd in ({"tol": 1e-7}, {"tol": "x"}, {"tol": np.nan}, {"held_out": "x"}, {"held_out": np.nan}):
        with pytest.raises(OptionError, match=r"of attributor .lasso. was given"):
            attribution.fit("lasso", bare, **odd)
    for odd in ("abc", None, [], ["a"], [np.nan]):
        with pytest.raises(OptionError, match=r"shares=.* of attributor .lasso. was given"):
            attribution.fit("lasso", bare, shares=odd)
    with pytest.raises(MethodError, match="Unknown attributor 'nope'"):
        attribution.get("nope")


@attribution.register("nothing")
class Nothing(Attributor):
    """A user's own attributor."""

    def __init__(self, context, size=0.0):
        self.change = np.full((len(context.x), context.n_classes), size, np.float32)

    def effects(self, forget_sets):
        return np.stack([self.change] * len(forget_sets))

    def predict(self, masks):
        return np.stack([self.change] * len(masks))


def trained(name, options):
    """A context of 40 trained models of digits, 10 held-out ones, and oracles of a forget set."""
    data = datasets.load("digits", 100, 30, 0)
    spec = models.get(name)
    x, y = spec.prepare(data, data.x), torch.from_numpy(data.y)

    def factory():
        return spec.factory(tuple(x.shape[1:]), data.n_classes, **options)

    rng = np.random.default_rng(0)
    masks = np.stack([np.isin(np.arange(100), rng.permutation(100)[:50]) for _ in range(50)])
    forget = forget_sets.make("f", range(6), data)
    training = ensemble.Training(epochs=8, batch_size=25, lr=0.1)

    def train(masks, first):
        return ensemble.train(factory, x[:100], y[:100], masks, range(first, first + len(masks)), training)

    subsets = train(masks, 0)
    originals = train(np.ones((12, 100), bool), 100)
    oracles = train(np.tile(forget.mask(100), (12, 1)), 200)
    logits = [m.logits(x).numpy() for m in (subsets, originals, oracles)]
    outputs = metrics.margin_gauge(logits[0], data.y)
    context = Context(x, y, masks[:40], outputs[:40], subsets[:8], originals, logits[1])
    return context, (masks[40:], logits[0][40:]), {"f": (forget, logits[2])}


@pytest.mark.parametrize(("name", "options"), [("linear", {}), ("mlp", {"hidden": 24})])
def test_comparison_at_equal_cost(name, options):
    context, held_out, oracles = trained(name, options)
    settings = {
        "kernel": ("kernel", {}),
        "linearised": ("linearised", {}),
        "bayesian": ("bayesian", {}),
        "ridge": ("ridge", {"lam": 0.3}),
        "lasso": ("lasso", {"shares": [0.3]}),
        "nothing": ("nothing", {}),
    }
    table = compare(settings, context, held_out, oracles)
    assert list(table.columns) == [
        *("attributor", "n_models", "method", "forget_set", "split", "statistic", "value", "low", "high")
    ]
    assert (table["n_models"] == 40).all()
    assert len(table) == len(settings) * (3 + 3 * (2 + 1))
    cost = table[table["statistic"] == "cost"].set_index("attributor")["value"]
    assert (cost == context.masks.mean(1).sum()).all()  # models of halves cost half a retraining each
    assert (table.loc[table["statistic"] == "seconds", "value"] > 0).all()
    lds = table[table["statistic"] == "lds"].set_index("attributor")["value"]
    assert lds["nothing"] == 0
    assert lds["kernel"] > lds["ridge"] > 0.05  # what gradients add where models are few
    assert lds["kernel"] > 0.25
    klom = table[(table["statistic"] == "klom_mean") & (table["split"] == "forget")].set_index("attributor")["value"]
    assert klom["kernel"] < klom["nothing"]
    assert klom["bayesian"] < klom["ridge"]
    assert lds["bayesian"] > lds["ridge"]
    assert lds["linearised"] > lds["ridge"]


def test_comparison_takes_other_ways_of_unlearning_by_an_attributor():
    context, held_out, oracles = trained("linear", {})
    before, after = (metrics.margins(z, context.labels) for z in (context.original_logits, oracles["f"][1]))

    def half_way(attributor, forget_set):
        return before + metrics.right_logits(attributor.effect(forget_set.indices), context.labels) / 2

    table = compare({"ridge": ("ridge", {})}, context, held_out, oracles, {"half": half_way})
    found = table[table["statistic"] == "klom_p95"].set_index(["method", "split"])["value"]
    fitted = attribution.fit("ridge", context)
    expected = np.percentile(metrics.klom(half_way(fitted, oracles["f"][0]), after)[:6], 95)
    assert found["half", "forget"] == pytest.approx(expected)
    assert found["dm_direct", "forget"] != found["half", "forget"]
    assert set(table.loc[table["statistic"] == "slope", "method"]) == {"dm_direct"}
    assert set(table.loc[table["low"].notna(), "statistic"]) == {"lds"}  # no resamples of models were asked for


@pytest.mark.parametrize("name", ["trak", "tracin", "ekfac", "logra"])
def test_gradient_attributors_of_dattri_or_a_clear_error(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "dattri", None)
    with pytest.raises(MethodError, match=r"pip install --no-deps dattri"):
        attribution.fit(name, problem(FACTORIES["mlp"]))


@pytest.mark.parametrize("name", ["trak", "tracin"])
def test_dattri_agrees_with_explicit_scores(name):
    pytest.importorskip("dattri")
    context = problem(FACTORIES["mlp"])
    with pytest.raises(DataError, match="without buffers"):
        attribution.fit(name, problem(FACTORIES["conv"]))
    options = {"n_features": None, "regularization": 0.01, "n_models": 1} if name == "trak" else {"n_models": 2}
    fitted = attribution.fit(name, context, **options)
    if name == "tracin":
        raw = 0
        for i in range(2):
            phi = jacobians(context, i)
            m = metrics.margins(context.models[[i]].logits(context.x).numpy(), context.labels)[0, :10]
            raw = raw + (phi[:10] / (1 + np.exp(m))[:, None]) @ phi.T
    else:  # whole gradients: the same as the exact kernel with the same regularisation and residuals of one model
        phi = jacobians(context, 0)
        lam = 0.01 * phi.shape[1] / (phi[:10] ** 2).sum(1).mean()
        r = 1 / (1 + np.exp(metrics.margins(context.outputs[:1, :10], context.labels[:10])[0]))
        raw = r[:, None] * gradient_kernel(context.models[:1], context.x, context.y, 10, lam).transfer
    slope = (raw * fitted.weights).sum() / (raw**2).sum()
    np.testing.assert_allclose(fitted.weights, slope * raw, atol=1e-2 * np.abs(fitted.weights).max())
    if name == "trak":
        assert attribution.fit(name, context, n_models=2).effect([1]).shape == (14, 3)


def test_ekfac_of_dattri_damped_away_is_the_product_of_gradients(capfd):
    pytest.importorskip("dattri")
    context = problem(FACTORIES["mlp"], n=20, m=30)
    flat, damped, curved = (
        attribution.fit(name, context, n_models=1, **options).weights
        for name, options in (("tracin", {}), ("ekfac", {"damping": 1e6}), ("ekfac", {}))
    )
    np.testing.assert_allclose(damped, flat, atol=1e-3 * np.abs(flat).max())
    assert np.abs(curved - flat).max() > 0.05 * np.abs(flat).max()
    with pytest.raises(DataError, match="linear layers only"):
        attribution.fit("ekfac", problem(lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3))))
    assert "calculating gradient" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_ekfac_of_dattri_equals_its_formula(name):
    """A layer's gradients d a^T turned by eigenvectors of mean a a^T and mean d d^T, over their mean squares there."""
    pytest.importorskip("dattri")
    n, context, raw, turned = 20, problem(FACTORIES[name], n=20, m=30), 0, []
    phi = jacobians(context, 0)
    q = 1 / (1 + np.exp(metrics.margins(context.models[[0]].logits(context.x).numpy(), context.labels)[0, :n]))
    shapes = [v[0].shape for v in context.models.params.values()][::2]
    parts = np.split(phi, np.cumsum([n_out * (n_in + 1) for n_out, n_in in shapes])[:-1], axis=1)
    for (n_out, n_in), part in zip(shapes, parts, strict=True):
        weight, d = part[:, : n_out * n_in].reshape(-1, n_out, n_in), part[:, n_out * n_in :]
        a = np.einsum("poi,po->pi", weight, d) / (d**2).sum(1, keepdims=True)
        a, loss = np.concatenate([a, np.ones((len(a), 1))], 1), q[:, None] * d[:n]
        q_a, q_d = (np.linalg.eigh(v.T @ v)[1] for v in (a[:n], loss))
        a, d, loss = a @ q_a, d @ q_d, loss @ q_d
        turned.append((a, d, loss, (loss**2).T @ (a[:n] ** 2) / n))
    damping = 0.1 * np.concatenate([v.ravel() for *_, v in turned]).mean()
    for a, d, loss, v in turned:
        raw = raw + np.einsum("io,ip,jo,jp,op->ij", loss, a[:n], d, a, 1 / (v + damping), optimize=True)
    fitted = attribution.fit("ekfac", context, n_models=1)
    slope = (raw * fitted.weights).sum() / (raw**2).sum()
    np.testing.assert_allclose(fitted.weights, slope * raw, atol=5e-3 * np.abs(fitted.weights).max())


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_logra_of_dattri_with_enough_features_is_the_influence_function(name, tmp_path, monkeypatch, capfd):
    """A projection that loses nothing changes nothing: g_i^T H^-1 dm_j with the layers' mean products of gradients."""
    pytest.importorskip("dattri")
    monkeypatch.chdir(tmp_path)
    n, context, raw = 300, problem(FACTORIES[name], n=300, m=40), 0
    fitted = attribution.fit("logra", context, rank=32, damping=1e-3, n_models=2)
    sizes = [v[0].numel() for v in context.models.params.values()]
    ends = np.cumsum(sizes)[1::2]  # of each layer's weight and bias
    for i in range(2):
        phi = jacobians(context, i)
        m = metrics.margins(context.models[[i]].logits(context.x).numpy(), context.labels)[0, :n]
        for phi_l in np.split(phi, ends[:-1], axis=1):
            g = phi_l[:n] / (1 + np.exp(m))[:, None]
            raw = raw + g @ np.linalg.pinv(g.T @ g / n, rcond=1e-9, hermitian=True) @ phi_l.T
    slope = (raw * fitted.weights).sum() / (raw**2).sum()
    np.testing.assert_allclose(fitted.weights, slope * raw, atol=5e-3 * np.abs(fitted.weights).max())
    assert not list(tmp_path.iterdir())  # dattri would leave one
    assert "Computing" not in capfd.readouterr().err


def test_logra_of_dattri_ranks_effects_in_their_unit():
    pytest.importorskip("dattri")
    context, (masks, outputs), _ = trained("mlp", {"hidden": 24})
    fitted = attribution.fit("logra", context, rank=8, n_models=4)
    predicted, actual = (metrics.right_logits(z, context.labels) for z in (fitted.predict(masks), outputs))
    assert lds(predicted, actual).mean() > 0.3
    predicted, actual = (z - z.mean(0) for z in (predicted, actual))
    assert 0.5 < (predicted * actual).sum() / (predicted**2).sum() < 1.5
    other = attribution.fit("logra", replace(context, seed=1), rank=8, n_models=4)
    assert not np.allclose(other.weights, fitted.weights, atol=1e-3)  # other projections


def test_logra_refuses_what_it_has_no_gradients_of():
    pytest.importorskip("dattri")
    with pytest.raises(DataError, match="without buffers"):
        attribution.fit("logra", problem(FACTORIES["conv"]))
    for factory in (FACTORIES["twice"], lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3))):
        with pytest.raises(DataError, match=r"LoGra.* linear layers only"):
            attribution.fit("logra", problem(factory))
    for options in ({"rank": 0}, {"damping": 0}):
        with pytest.raises(OptionError, match=r"=0 of attributor 'logra' was given; it should be greater than 0"):
            attribution.fit("logra", problem(FACTORIES["mlp"]), **options)


@pytest.mark.parametrize("architecture", ["mlp", "convolution"])
def test_principal_loadings_equal_those_of_the_explicit_kernel(architecture):
    """In a network of linear layers, of all its weights; where there is none, of explicit gradients."""
    x = torch.randn(20, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    factory = {
        "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        "convolution": lambda: nn.Sequential(nn.Conv2d(1, 3, (2, 3)), nn.Flatten()),
    }[architecture]
    models, y = ensemble.initialise(factory, [1, 2, 3]), torch.arange(20) % 3
    hardness = np.random.default_rng(0).random(20)
    found = gradients.principal_loadings(models, x, y, hardness, 2)
    rows = []
    for i in range(3):
        one = factory()
        one.load_state_dict({k: v[i] for k, v in models.params.items()})
        for point, label in zip(x, y, strict=True):
            z = one(point[None])[0]
            others = torch.cat([z[:label], z[label + 1 :]])
            grads = torch.autograd.grad(z[label] - others.logsumexp(0), list(one.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
    g = torch.stack(rows).reshape(3, 20, -1).numpy()
    k = np.einsum("mip,mjp->ij", g, g) * np.sqrt(hardness[:, None] * hardness)
    centred = k - k.mean(0) - k.mean(1)[:, None] + k.mean()
    vectors = np.linalg.eigh(centred)[1][:, :-3:-1]
    expected = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    np.testing.assert_allclose(found, expected, atol=2e-3)
