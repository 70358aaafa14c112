"""Models as people bring them are trained as PyTorch does it, unlearned and attributed, or refused at once."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from dmmlib import attribution, datamodels, ensemble, models, stacking, train, unlearn
from dmmlib.attributors.gradients import margin, margins_of, separable
from dmmlib.attributors.kernel import gram
from dmmlib.baselines.dampening import importance
from dmmlib.baselines.gradient import mean_gradient
from dmmlib.errors import DataError, ModelError
from dmmlib.execution import Execution
from dmmlib.metrics import margin_gauge
from dmmlib.models import fingerprint
from dmmlib.progress import silent
from dmmlib.study import Study
from tests.conftest import TINY
from tests.odd_models import NOISY, ODD, REFUSED, D, K, mlp, table

TRAINING = ensemble.Training(epochs=2, batch_size=10, lr=0.05)
N, SEEDS = 30, [5, 6, 7]
REORDERED = ("encoder with dropout", "shared layer")  # torch.func fills a tensor with noise in another order
DRAWN_ANEW = (
    "weight norm",
    "spectral norm",
    "weight norm alone",
    "spectral norm alone",
    "orthogonal alone",
    "constant",
    "python's chance",
)  # not by a `reset_parameters`: bad_teacher and eu_k refuse


def points_of(name):
    make, points = ODD[name]
    x = points()
    return make, x, torch.arange(len(x)) % K


def trained(name, seeds=SEEDS, masks=None, **options):
    make, x, y = points_of(name)
    masks = np.ones((len(seeds), N), bool) if masks is None else masks
    return ensemble.train(make, x[:N], y[:N], masks, seeds, TRAINING, **options), x, y


def by_torch(make, x, y, seed):
    """The same training in plain PyTorch, one model; a weight that a batch does not meet has a gradient of 0.

    Noise is the same wherever PyTorch fills tensors in one order, with `torch.func` and without.
    """
    with stacking.drawing(seed):
        model, rng, step = make(), np.random.default_rng(seed), 0
    optimizer = torch.optim.SGD(model.parameters(), 0.0, 0.9, weight_decay=TRAINING.weight_decay, nesterov=True)
    n_batches = math.ceil(len(x) / TRAINING.batch_size)
    for _ in range(TRAINING.epochs):
        for batch in np.array_split(rng.permutation(len(x)), n_batches):
            optimizer.param_groups[0]["lr"] = TRAINING.rate((step + 0.5) / (TRAINING.epochs * n_batches))
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            with stacking.drawing(ensemble.noise(seed, step, batch)):
                answers = model(x[batch])
            F.cross_entropy(answers, y[batch]).backward()
            optimizer.step()
            step += 1
    return model.eval()


@pytest.mark.parametrize("name", [name for name in ODD if name not in REORDERED])
def test_a_stack_is_trained_as_pytorch_trains_each_model(name):
    models, x, y = trained(name)
    make, before, _ = points_of(name)
    for i, seed in enumerate(SEEDS):
        alone = by_torch(make, x[:N].clone(), y[:N], seed)
        torch.testing.assert_close(models.logits(x)[i], alone(x.clone()).detach().float(), rtol=1e-3, atol=1e-3)
        for key, value in alone.named_buffers():
            torch.testing.assert_close(models.buffers[key][i], value, rtol=1e-3, atol=1e-3)
    assert torch.equal(x, before), "points are lent"


@pytest.mark.parametrize("name", [*NOISY, "lstm", "batch norm", "branching"])
def test_a_model_is_the_same_whichever_others_share_its_step(name):
    rng = np.random.default_rng(0)
    masks = np.stack([rng.permutation(N) < 20 for _ in SEEDS])
    whole, x, _ = trained(name, masks=masks)
    for way in (Execution(1), Execution(2), Execution(1, 2), Execution(4, compile=name in NOISY)):
        again = trained(name, masks=masks, execution=way)[0]
        torch.testing.assert_close(again.logits(x), whole.logits(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trained(name, SEEDS[1:], masks[1:])[0].logits(x), whole.logits(x)[1:])


def test_noise_is_each_models_own_and_leaves_torchs_generator():
    seen = []

    class Seen(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(torch.rand(3))
            return super().forward(x)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    x, y = table(), torch.arange(36) % K
    models = ensemble.initialise(lambda: Seen(D, K), [0, 1])
    batches, sgd = [np.array([[3, 4], [3, 4]])] * 2, TRAINING.optimizer
    with torch.random.fork_rng():
        stacking.stackable(models.module.train(), models.params, models.buffers, x[batches[0]])
    seen.clear()
    ensemble.descend(models, x, batches, ensemble.classification(y), sgd, sgd.start(models.params))
    assert len({tuple(z.tolist()) for z in seen}) == 4, "two models, two steps"
    assert torch.equal(torch.get_rng_state(), before)


def gradients(models, i, x, values):
    """Gradients (n_points, n_weights) of values(logits, j) of single points, by autograd of one model."""
    params, buffers = models.state_of(i)
    leaves = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
    module, rows = stacking.copied(models.module).eval(), []
    for j in range(len(x)):
        z = functional_call(module, (leaves, buffers), (x[j : j + 1].clone(),))
        found = torch.autograd.grad(values(z, j), [*leaves.values()], allow_unused=True)
        slopes = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), found, strict=True)]
        rows.append(torch.cat([slope.flatten() for slope in slopes]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ODD)
def test_gradients_are_those_of_autograd(name):
    """Of margins, for attribution; of losses, mean for SalUn and squared for SSD."""
    models, x, y = trained(name)
    slopes = gradients(models, 1, x, lambda z, j: margin(z, y[j : j + 1])[0])
    size = float(slopes.square().sum(1).max())
    torch.testing.assert_close(gram(models, 1, x, y), (slopes @ slopes.T).float(), rtol=1e-3, atol=1e-3 * size)
    indices = np.arange(7)
    slopes = gradients(models, 1, x[:7], lambda z, j: F.cross_entropy(z, y[j : j + 1]))
    problem = problem_of(models, x, y, [1])
    for found, right in (
        (mean_gradient(problem, models, indices), slopes.mean(0)),
        (importance(problem, indices), slopes.square().mean(0)),
    ):
        rows = torch.cat([found[k][1].flatten() for k in models.params])
        torch.testing.assert_close(rows, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


class Same(datamodels.Attributor):
    """Every logit rises by one."""

    def effects(self, forget_sets):
        return np.ones((len(forget_sets), 36, K), np.float32)

    def predict(self, masks):
        raise NotImplementedError


def problem_of(models, x, y, forget):
    logits = models.logits(x).numpy()
    lower = logits - np.eye(K, dtype=np.float32)[y.numpy()]  # oracles are less sure of every label
    more = {"oracle_logits": lower, "earlier": (0.5, models)}
    return unlearn.Problem(models, logits, x, y, N, np.array(forget), TRAINING, Same(), **more)


@pytest.mark.parametrize("name", ODD)
def test_every_method_unlearns_five_points_and_one(name):
    models, x, y = trained(name)
    before, still = models.clone(), x.clone()
    for forget in ([2, 3, 5, 7, 11], [4]):
        problem = problem_of(models, x, y, forget)
        idle = unlearn.get("do_nothing")(problem).margins
        for method in unlearn.names():
            if method in ("bad_teacher", "eu_k", "msg", "short_retrain") and name.removeprefix("old ") in DRAWN_ANEW:
                continue
            if method == "ct" and not any(v.ndim == 5 and v[0, 0, 0].numel() > 1 for v in models.params.values()):
                continue
            margins = unlearn.get(method)(problem).margins
            assert np.isfinite(margins).all(), method
            assert (margins != idle).any() or method in ("do_nothing", "retrain", "ssd"), method
    assert all(torch.equal(before.params[k], v) for k, v in models.params.items()), "originals stay"
    assert all(torch.equal(before.buffers[k], v) for k, v in models.buffers.items())
    assert torch.equal(x, still)


@pytest.mark.parametrize("name", ODD)
def test_attributors_fit(name):
    masks = np.random.default_rng(1).random((8, N)) < 0.75
    models, x, y = trained(name, range(8), masks)
    before = x.clone()
    context = attribution.Context(x, y, masks, margin_gauge(models.logits(x).numpy(), y.numpy()), models)
    for method in ("kernel", "linearised", "bayesian"):
        effects = attribution.fit(method, context, n_models=2).effects([[2, 3]])
        assert np.isfinite(effects).all()
        assert effects.any()
    assert torch.equal(x, before)


@pytest.mark.parametrize(("name", "words"), [("tied", "shared weights"), ("lstm", "maps models over points")])
def test_dattri_takes_not_all(name, words):
    pytest.importorskip("dattri")
    masks = np.random.default_rng(1).random((8, N)) < 0.75
    models, x, y = trained(name, range(8), masks)
    context = attribution.Context(x, y, masks, margin_gauge(models.logits(x).numpy(), y.numpy()), models)
    with pytest.raises(DataError, match=words):
        attribution.fit("tracin", context, n_models=1)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_takes_its_running_statistics_where_a_point_is_alone(momentum):
    """One step of ascent on one point: PyTorch's with batch norm in evaluation mode; statistics stay."""
    models = ensemble.initialise(lambda: mlp(nn.BatchNorm1d(8, momentum=momentum), nn.ReLU()), [0, 1])
    x, y, sgd = table(), torch.arange(36) % K, ensemble.SGD(0.1)
    before = models.clone()
    torch.manual_seed(1)
    alone = mlp(nn.BatchNorm1d(8, momentum=momentum), nn.ReLU()).eval()
    loss = -F.cross_entropy(alone(x[4:5]), y[4:5])
    slopes = torch.autograd.grad(loss, [*alone.parameters()])
    ascent = ensemble.classification(y, sign=-1.0)
    ensemble.descend(models, x, [np.array([[4], [4]])], ascent, sgd, sgd.start(models.params))
    for (name, p), slope in zip(alone.named_parameters(), slopes, strict=True):
        torch.testing.assert_close(models.params[name][1], p.detach() - 0.1 * slope)
    assert all(torch.equal(models.buffers[k], v) for k, v in before.buffers.items())
    ensemble.descend(models, x, [np.array([[4, 5], [4, 5]])], ascent, sgd, sgd.start(models.params))
    assert (models.buffers["1.running_mean"] != before.buffers["1.running_mean"]).any(), "two points move them"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(name):
    make, words = REFUSED[name]
    with pytest.raises(ModelError, match=words) as refusal:
        stacking.check(make, table(), K)
    assert "\n" not in str(refusal.value)


def test_train_asks_first(monkeypatch):
    x, y = table(), torch.arange(36) % K
    masks, recipe = np.ones((2, 36), bool), TRAINING
    for name in ("tuple", "count", "own tensor"):
        make, words = REFUSED[name]
        with pytest.raises(ModelError, match=words):
            train(make, x, y, masks, [0, 1], recipe)
    with pytest.raises(ModelError, match=r"give logits \(4, at least 3\)"):
        train(lambda: nn.Linear(D, 2), x, y, masks, [0, 1], recipe)
    assert train(lambda: nn.Linear(D, K + 2), x, y, masks, [0, 1], recipe).n_models == 2, "classes may be unseen"


@pytest.fixture
def register():
    """Registers a model for one test."""
    names = []

    def add(name, factory, **options):
        models.register(name, **options)(factory)
        names.append(name)

    yield add
    for name in names:
        models.MODELS.remove(name)


def study(name, folder, **overrides):
    return Study(TINY | {"model": {"name": name}} | overrides, runs=folder, progress=silent)


@pytest.mark.parametrize(
    ("factory", "options", "words"),
    [
        (
            lambda shape, k: nn.Linear(shape[0], k + 2),
            {"prepare": models.pooled},
            r"'odd' answers \(4, 12\) .* \(4, 10\)",
        ),
        (lambda shape, k: nn.Linear(3, k), {"prepare": models.pooled}, r"'odd' fails on points of shape \(64,\)"),
        (lambda shape, k: nn.Linear(3, k), {"prepare": lambda d, x: x}, "gives a ndarray for 160;"),
        (lambda shape, k: nn.Linear(3, k), {"prepare": lambda d, x: x / "a"}, "What prepares points fails"),
    ],
)
def test_a_study_refuses_before_it_trains(register, tmp_path, factory, options, words):
    register("odd", factory, **options)
    with pytest.raises(ModelError, match=words):
        study("odd", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_built_in_model_on_other_points_is_refused(tmp_path):
    with pytest.raises(ModelError, match="'resnet9' fails on points of shape"):
        study("resnet9", tmp_path)  # digits have 8 x 8 pixels


def test_a_study_of_a_model_with_dropout(register, tmp_path):
    def dropped(shape, k):
        return nn.Sequential(nn.Linear(shape[0], 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, k))

    register("dropped", dropped, prepare=models.pooled)
    one, other = (
        study("dropped", tmp_path / str(chunk), ensembles={"n_models": 8, "chunk": chunk}) for chunk in (8, 3)
    )
    np.testing.assert_allclose(one.original_logits(), other.original_logits(), rtol=1e-4, atol=1e-4)


def test_a_key_sees_what_training_alone_does():
    """The noise of training, or which layers are frozen, shows in no answer of evaluation."""

    def make(level, frozen):
        class Drawing(nn.Linear):
            def forward(self, x):
                return super().forward(x + level * torch.randn_like(x) if self.training else x)

        module = nn.Sequential(Drawing(D, 8), nn.Linear(8, K))
        module[1].requires_grad_(not frozen)
        return module

    keys = [fingerprint(lambda a=a, b=b: make(a, b), table()) for a, b in ((0.1, 0), (0.1, 0), (0.2, 0), (0.1, 1))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("buffer", [False, True])
def test_a_key_sees_what_is_frozen_and_no_point_meets(buffer):
    class Fixed(nn.Module):
        def __init__(self, words):
            super().__init__()
            self.last = nn.Linear(4, K)
            self.words = None if buffer else nn.Embedding.from_pretrained(words)
            self.register_buffer("table", words if buffer else None, persistent=False)

        def forward(self, x):
            return self.last((self.table if self.words is None else self.words.weight)[x].mean(1))

    def key(change):
        words = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
        change(words)
        return fingerprint(lambda: Fixed(words.clone()), torch.arange(24).view(4, 6))

    plain = key(lambda words: None)
    assert plain == key(lambda words: words[300:].mul_(1 + 1e-7)), "last bits are a machine's"
    for change in (lambda words: words[400].neg_(), lambda words: words[300:].copy_(words[300:].flip(0))):
        assert key(change) != plain


def test_a_key_holds_torchs_precision(tmp_path):
    """Weights are drawn and trained in it."""
    identities = []
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            identities.append(study("linear", tmp_path).identity)
        finally:
            torch.set_default_dtype(torch.float32)
    assert identities[0] != identities[1]
    assert "weights" not in identities[1], "keys of before stay"


@pytest.mark.parametrize("name", ODD)
def test_every_model_has_a_key(name):
    make, x, _ = points_of(name)
    before = x.clone()
    assert fingerprint(make, x) == fingerprint(make, x)
    assert torch.equal(x, before)


def test_gradients_are_alike_though_rounding_moves_a_few_kinks():
    right = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    moved = right.clone()
    moved[3, 3] += 1  # one unit of many on the other side of a ReLU
    assert stacking.alike(moved, right)
    assert not stacking.close(moved, right)
    assert not stacking.alike(1.05 * right, right)
    masked = torch.tensor([0.0, -torch.inf, torch.nan])
    assert stacking.alike(masked, masked)
    assert not stacking.alike(masked, torch.zeros(3))
    assert not stacking.alike(torch.tensor(3), torch.tensor(4)), "counters, as of batches, are numbers too"


def test_a_full_resnet_is_known_to_be_a_matter_of_products():
    """Whatever the points: at these sizes rounding always moves some unit."""
    module = models.build("resnet9", (3, 32, 32), 10, width=16).eval()
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    for seed in range(3):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        found = separable(module, params, margins_of(module, buffers), x, torch.tensor([0, 1]), nn.Conv2d, nn.Linear)
        assert len(found) == 9


def test_a_key_holds_no_noise():
    """Of a bias before batch norm the gradient is 0, but for rounding, which layout and threads decide."""

    def make():
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 3))

    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    other = fingerprint(lambda: make().to(memory_format=torch.channels_last), x)
    assert fingerprint(make, x) == other
