"""Attribution methods equal their explicit definitions on small cases, and share one protocol."""

import sys

import numpy as np
import pytest
import torch
from sklearn import linear_model
from torch import nn

from dmmlib import attribution, ensemble, forget_sets, metrics, models
from dmmlib import data as datasets
from dmmlib.attribution import Context
from dmmlib.attribution.kernel import calibrate, conditional_residuals, gram, kernel, margin
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.errors import DataError, ForgetSetError, MethodError


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
}


def problem(factory, n=10, n_val=4, m=12, k=3, seed=0):
    """A context of models that were not trained: the formulas ask for no more than weights and outputs."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n + n_val, 16)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 3, n + n_val))
    masks = np.stack([np.isin(np.arange(n), rng.permutation(n)[: n // 2]) for _ in range(m)])
    models = ensemble.initialise(factory, range(m))
    outputs = models.logits(x).numpy()
    originals = ensemble.initialise(factory, range(100, 105))
    return Context(x, y, masks, outputs, models[:k], originals, originals.logits(x).numpy())


def jacobians(context, i, models=None):
    """Gradients of margins (n_train, p) and of logits (n_points, n_classes, p) of model i, one backward pass each."""
    models = models or context.models
    params = {k: v[i].clone().requires_grad_() for k, v in models.params.items()}
    buffers = {k: v[i] for k, v in models.buffers.items()}
    models.module.eval()
    logits = torch.func.functional_call(models.module, (params, buffers), (context.x,))
    m = margin(logits, context.y)

    def flat(output):
        return torch.cat([g.flatten() for g in torch.autograd.grad(output, list(params.values()), retain_graph=True)])

    n = context.n_train
    g = torch.stack([torch.stack([flat(z) for z in row]) for row in logits])
    return torch.stack([flat(m[j]) for j in range(n)]).double().numpy(), g.double().numpy()


def explicit_t(context, lam, models=None):
    """T averaged over models (n_train, n_points, n_classes), and T on the margins of the training points."""
    models = models or context.models
    t, t_margin = 0, 0
    for i in range(models.n_models):
        phi, g = jacobians(context, i, models)
        k = phi @ phi.T
        a = k + lam * np.diag(k).mean() * np.eye(len(k))
        t = t + np.linalg.solve(a, np.einsum("ip,tcp->itc", phi, g).reshape(len(k), -1)) / models.n_models
        t_margin = t_margin + np.linalg.solve(a, k) / models.n_models
    return t.reshape(context.n_train, len(context.x), -1), t_margin


def test_margin_is_that_of_the_metrics():
    z, y = torch.randn(7, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_allclose(margin(z, y), metrics.margins(z[None].numpy(), y.numpy())[0], atol=1e-5)


@pytest.mark.parametrize("name", FACTORIES)
def test_gram_equals_products_of_explicit_gradients(name):
    context = problem(FACTORIES[name])
    phi, _ = jacobians(context, 1)
    n = context.n_train
    np.testing.assert_allclose(gram(context.models, 1, context.x[:n], context.y[:n]), phi @ phi.T, rtol=1e-3, atol=1e-4)


def test_many_gradients_are_projected(monkeypatch):
    monkeypatch.setattr("dmmlib.attribution.kernel.FEATURES", 10)
    context = problem(FACTORIES["conv"])
    n = context.n_train
    phi, _ = jacobians(context, 0)
    exact = phi @ phi.T
    close = gram(context.models, 0, context.x[:n], context.y[:n]).numpy()
    assert not np.allclose(close, exact, rtol=1e-5)
    assert np.abs(close - exact).max() < 0.1 * np.diag(exact).mean()


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("residual", ["mean", "held_out"])
def test_effect_equals_the_explicit_solve(name, residual):
    context = problem(FACTORIES[name])
    fitted = kernel(context, lam=0.2, residual=residual)
    t, _ = explicit_t(context, 0.2)
    q = 1 - torch.tensor(metrics.margins(context.outputs[:, :10], context.labels[:10])).sigmoid().numpy()
    out = ~context.masks
    r = q.mean(0) if residual == "mean" else (q * out).sum(0) / out.sum(0)
    np.testing.assert_allclose(fitted.residual, r, rtol=1e-4)
    for forget in ([3], [0, 5, 7]):
        expected = -fitted.scale * np.einsum("itc,i->tc", t[forget], r[forget])
        np.testing.assert_allclose(fitted.effect(forget), expected, rtol=1e-2, atol=1e-4)
    predicted = context.outputs.mean(0) + fitted.scale * np.einsum(
        "itc,mi->mtc", t, (context.masks - context.masks.mean(0)) * r
    )
    np.testing.assert_allclose(fitted.predict(context.masks), predicted, rtol=1e-2, atol=1e-3)


def test_it_is_trak_as_published():
    """tau(z) = (1/M sum Q) (1/M sum phi(z) (Phi^T Phi + lam I)^-1 Phi^T), in margins, for Phi without projection."""
    context = problem(FACTORIES["mlp"])
    fitted = kernel(context, lam=0.2, residual="mean")
    n = context.n_train
    tau = 0
    for i in range(3):
        phi, _ = jacobians(context, i)
        lam = 0.2 * (phi**2).sum(1).mean()
        tau = tau + phi @ np.linalg.solve(phi.T @ phi + lam * np.eye(phi.shape[1]), phi.T) / 3  # (target, train)
    np.testing.assert_allclose(fitted.among(np.arange(n)).T, tau, atol=1e-3)


def test_a_group_of_kernel_ridge_regression_leaves_exactly():
    """With residuals of the model without F, T^T r is the exact change of kernel ridge regression on leaving F out."""
    rng = np.random.default_rng(0)
    k, y, lam, forget = rng.normal(size=(8, 8)), rng.normal(size=8), 0.3, [1, 4, 6]
    k = k @ k.T
    keep = np.setdiff1d(np.arange(8), forget)
    full = k @ np.linalg.solve(k + lam * np.eye(8), y)
    without = k[:, keep] @ np.linalg.solve(k[np.ix_(keep, keep)] + lam * np.eye(5), y[keep])
    t = np.linalg.solve(k + lam * np.eye(8), k)
    r = y[forget] - without[forget]
    np.testing.assert_allclose(full - t[forget].T @ r, without, atol=1e-10)


def test_group_residuals_solve_their_equation_and_exceed_single_ones():
    context = problem(FACTORIES["mlp"])
    fitted = kernel(context, lam=0.2, residual="group")
    forget = np.array([0, 5, 7])
    r = fitted.residuals(forget)
    assert fitted.margins is not None
    _, t = explicit_t(context, 0.2)
    m = fitted.margins[:, forget] - fitted.scale * t[np.ix_(forget, forget)].T @ r
    np.testing.assert_allclose(r, (1 / (1 + np.exp(m))).mean(0), atol=1e-4)
    # two copies of one point: alone it is held by the other, together they are not
    among = np.full((2, 2), 3.0)
    pair = conditional_residuals(np.full((4, 2), 2.0), among)
    single = conditional_residuals(np.full((4, 1), 2.0), among[:1, :1])
    assert pair[0] > single[0] > 1 / (1 + np.exp(2))


def test_measured_residuals_give_back_the_rise_of_own_margins():
    context = problem(FACTORIES["mlp"])
    fitted = kernel(context, lam=0.2, residual="measured")
    _, t = explicit_t(context, 0.2)
    np.testing.assert_allclose(fitted.own(), np.diag(t), atol=1e-4)
    m = metrics.margins(context.outputs[:, :10], context.labels[:10])
    for i in (0, 6):
        seen = context.masks[:, i]
        np.testing.assert_allclose(t[i, i] * fitted.residual[i], m[seen, i].mean() - m[~seen, i].mean(), rtol=1e-2)


def test_calibration_recovers_scales_and_shrinks_noise():
    rng = np.random.default_rng(0)
    p = rng.normal(size=(40, 30, 4))
    truth = np.where(np.arange(30) < 15, 1.0, 3.0)
    a = truth[:, None] * p + rng.normal(size=(40, 30, 1))  # a shift of all logits changes nothing
    assert 1.5 < calibrate(p, a, per_point=False) < 2.5
    np.testing.assert_allclose(calibrate(p, a, per_point=True), truth, atol=1e-3)
    noisy = 2 * p + 20 * rng.normal(size=p.shape)
    common, own = calibrate(p, noisy, per_point=False), calibrate(p, noisy, per_point=True)
    alone = np.array([calibrate(p[:, [j]], noisy[:, [j]], per_point=False) for j in range(30)])
    assert np.std(own) < np.std(alone) / 2
    assert abs(own.mean() - common) < 0.5


def test_kernel_ridge_regresses_what_the_kernel_leaves():
    context = problem(FACTORIES["mlp"])
    prior = kernel(context, lam=0.2)
    mixed = attribution.fit("kernel_ridge", context, lam=0.2, ridge_lam=0.3)
    rest = RidgeDatamodel.fit(context.masks, context.outputs - prior.predict(context.masks), 0.3)
    np.testing.assert_allclose(mixed.effect([1, 2]), prior.effect([1, 2]) + rest.effect([1, 2]), atol=1e-5)
    nearly = attribution.fit("kernel_ridge", context, lam=0.2, ridge_lam=1e7)
    np.testing.assert_allclose(nearly.effect([1, 2]), prior.effect([1, 2]), atol=1e-5)


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
    monkeypatch.setattr("dmmlib.attribution.lasso.BLOCK", 7)  # several blocks of targets
    context, _ = sparse(m)
    fitted = attribution.fit("lasso", context, shares=[share], tol=1e-6)
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


def test_lasso_chooses_its_penalty_on_held_out_subsets():
    context, weights = sparse(400)
    fitted = attribution.fit("lasso", context, shares=[0.9, 0.05])
    assert (fitted.shares == np.float32(0.05)).mean() > 0.9
    missed = fitted.weights.toarray().reshape(weights.shape) - weights
    assert np.abs(missed).mean() < 0.2
    noise = Context(
        context.x, context.y, context.masks, np.random.default_rng(1).normal(size=context.outputs.shape).astype("f4")
    )
    assert (attribution.fit("lasso", noise, shares=[0.9, 0.05]).shares == np.float32(0.9)).mean() > 0.5


def test_gradients_at_the_originals():
    context = problem(FACTORIES["mlp"])
    fitted = kernel(context, lam=0.2, residual="mean", at="originals", n_models=2)
    t, _ = explicit_t(context, 0.2, context.originals[:2])
    expected = -fitted.scale * (t[[3]] * fitted.residual[3]).sum(0)
    np.testing.assert_allclose(fitted.effect([3]), expected, rtol=1e-2, atol=1e-4)


def test_bad_input():
    context = problem(FACTORIES["linear"])
    parts = {k: getattr(context, k) for k in ("x", "y", "masks", "outputs")}
    with pytest.raises(DataError, match=r"outputs have shape \(12, 13, 3\) for 12 masks and 14"):
        Context(**parts | {"outputs": context.outputs[:, :13]})
    with pytest.raises(DataError, match="but only 2 masks; give the weights of the first"):
        Context(**parts | {"masks": context.masks[:2], "outputs": context.outputs[:2]}, models=context.models)
    bare = Context(**parts)
    with pytest.raises(DataError, match="give the context `models`"):
        attribution.fit("kernel", bare)
    with pytest.raises(DataError, match="no `originals`"):
        attribution.fit("kernel", bare, at="originals")
    with pytest.raises(DataError, match="give the context `original_logits`"):
        attribution.fit("kernel", Context(**parts, models=context.models), residual="group")
    with pytest.raises(DataError, match="penalty is 0; give a positive number"):
        attribution.fit("kernel", context, lam=0)
    with pytest.raises(ForgetSetError, match="index 10 is outside the training set of 10"):
        attribution.fit("kernel", context).effect([10])
    with pytest.raises(DataError, match="give numbers between 0 and 1"):
        attribution.fit("lasso", bare, shares=[0.5, 1.5])
    with pytest.raises(DataError, match="leave at least two to fit to"):
        attribution.fit("lasso", bare, held_out=0.95)
    with pytest.raises(MethodError, match="Unknown attribution method 'nope'; use one of"):
        attribution.get("nope")


@attribution.register("nothing")
class Nothing:
    """A user's own attributor, without `predict`."""

    def __init__(self, context, size=0.0):
        self.change = np.full((len(context.x), context.n_classes), size, np.float32)

    def effect(self, forget):
        return self.change


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
    context = Context(x, y, masks[:40], logits[0][:40], subsets[:8], originals, logits[1])
    return context, (masks[40:], logits[0][40:]), {"f": (forget, logits[2])}


@pytest.mark.parametrize(("name", "options"), [("linear", {}), ("mlp", {"hidden": 24})])
def test_comparison_at_equal_cost(name, options):
    context, held_out, oracles = trained(name, options)
    settings = {
        "kernel": ("kernel", {}),
        "mixture": ("kernel_ridge", {}),
        "ridge": ("ridge", {"lam": 0.3}),
        "lasso": ("lasso", {"shares": [0.3]}),
        "nothing": ("nothing", {}),
    }
    table = attribution.compare(settings, context, held_out, oracles)
    assert list(table.columns) == [
        *("attributor", "n_models", "forget_set", "split", "statistic", "value", "low", "high")
    ]
    assert (table["n_models"] == 40).all()
    assert len(table) == len(settings) * (1 + 3 * 3)
    lds = table[table["statistic"] == "lds"].set_index("attributor")["value"]
    assert lds["nothing"] == 0
    assert lds["kernel"] > lds["ridge"] > 0.05  # what gradients add where models are few
    assert lds["kernel"] > 0.25
    klom = table[(table["statistic"] == "klom_mean") & (table["split"] == "forget")].set_index("attributor")["value"]
    assert klom["kernel"] < klom["nothing"]


def test_gradient_attributors_of_dattri_or_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "dattri", None)
    with pytest.raises(MethodError, match=r"needs the library dattri .*pip install --no-deps dattri"):
        attribution.fit("trak", problem(FACTORIES["mlp"]))


@pytest.mark.parametrize("name", ["trak", "tracin"])
def test_dattri_agrees_with_explicit_scores(name):
    pytest.importorskip("dattri")
    context = problem(FACTORIES["mlp"])
    with pytest.raises(DataError, match="models without buffers"):
        attribution.fit(name, problem(FACTORIES["conv"]))
    options = {"n_features": None, "regularization": 0.01, "n_models": 1} if name == "trak" else {"n_models": 2}
    fitted = attribution.fit(name, context, **options)
    if name == "tracin":
        raw = 0
        for i in range(2):
            phi, g = jacobians(context, i)
            m = metrics.margins(context.outputs[[i], :10], context.labels[:10])[0]
            raw = raw + np.einsum("ip,tcp->itc", phi / (1 + np.exp(m))[:, None], g)
        a = context.masks - context.masks.mean(0)
        expected = raw * calibrate(np.einsum("mi,itc->mtc", a, raw), context.outputs, per_point=False)
        np.testing.assert_allclose(fitted.effect([2, 3]), -expected[[2, 3]].sum(0), rtol=1e-2, atol=1e-4)
    else:  # whole gradients: the same as the exact kernel with the same regularisation and residuals of one model
        phi, _ = jacobians(context, 0)
        exact = kernel(context, lam=0.01 * phi.shape[1] / (phi**2).sum(1).mean(), residual="mean", n_models=1)
        r = 1 / (1 + np.exp(metrics.margins(context.outputs[:1, :10], context.labels[:10])[0]))
        u = np.eye(10) * r
        raw = exact.respond(u).reshape(10, -1)
        slope = (raw * fitted.scores).sum() / (raw**2).sum()
        np.testing.assert_allclose(fitted.scores, slope * raw, atol=1e-2 * np.abs(fitted.scores).max())
        projected = attribution.fit(name, context, n_models=2)
        assert projected.effect([1]).shape == (14, 3)
