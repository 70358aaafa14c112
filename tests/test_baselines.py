"""Each further baseline does what its paper says, to every model on its own."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dmmlib import data, ensemble, metrics, models, unlearn
from dmmlib.analysis import tables
from dmmlib.baselines import (
    bad_teacher,
    dampening,
    fresh,
    gradient,
    last_layers,
    newton,
    relabel,
    reset,
    scrub,
    whitening,
)
from dmmlib.ensemble import Ensemble, Training
from dmmlib.errors import DataError, MethodError, OptionError
from dmmlib.matching import match
from dmmlib.unlearn import Problem, base

N_MODELS, N_TRAIN = 6, 120
FORGET = np.array([1, 20, 33, 50, 64, 90])
FINE_TUNED = ["neggrad_plus", "random_labels", "salun", "bad_teacher", "l1_sparse", "cf_k", "eu_k"]
FINE_TUNED += ["ga_gd_turns", "msg", "short_retrain", "rewind"]
BASELINES = [*FINE_TUNED, "ssd", "newton"]
STRONG = {  # settings under which this small problem shows a method's direction
    "ga_gd_turns": {"epochs": 3, "ascent_epochs": 2, "lr": 1e-2, "batch_size": 30},
    "msg": {"epochs": 3.0, "lr": 3e-2, "share": 0.3, "batch_size": 30},
    "short_retrain": {"epochs": 5.0},
    "rewind": {"scale": 0.5},
    "neggrad_plus": {"epochs": 3.0, "lr": 3e-2, "beta": 0.5, "batch_size": 30},
    "random_labels": {"epochs": 3, "lr": 3e-2, "batch_size": 30},
    "salun": {"epochs": 3, "lr": 3e-2, "batch_size": 30, "share": 0.3},
    "bad_teacher": {"epochs": 5.0, "lr": 3e-3, "retain_share": 0.3, "batch_size": 20},
    "l1_sparse": {"epochs": 3.0, "lr": 1e-2, "gamma": 1e-3, "batch_size": 30},
    "cf_k": {"epochs": 3.0, "lr": 3e-2, "batch_size": 30},
    "eu_k": {"epochs": 6.0, "lr": 1e-1, "batch_size": 30},
    "ssd": {"alpha": 2.0, "strength": 0.3},
    "newton": {"damping": 3e-3, "iterations": 10, "cost": 0.705},
}


def a_problem(model, n_models=N_MODELS, n_train=N_TRAIN, forget=FORGET, training=None, **options):
    d = data.load("digits", n_train, 40)
    prepare = models.get(model).prepare
    x, y = prepare(d, d.x), torch.from_numpy(d.y)
    training = training or Training(epochs=15, batch_size=30, lr=0.1)

    def factory():
        return models.build(model, tuple(x.shape[1:]), 10, **options)

    masks = np.ones((n_models, n_train), bool)
    given = factory, x[:n_train], y[:n_train], masks, range(n_models), training
    half = ensemble.train_and(Ensemble.state, *given, until=0.6)
    originals = ensemble.train(factory, x[:n_train], y[:n_train], masks, range(n_models), training)
    masks[:, forget] = False
    oracles = ensemble.train(factory, x[:n_train], y[:n_train], masks, range(50, 50 + n_models), training)
    return Problem(
        originals=originals,
        original_logits=originals.logits(x).numpy(),
        oracle_logits=oracles.logits(x).numpy(),
        earlier=(0.6, Ensemble.from_state(factory(), half)),
        x=x,
        y=y,
        n_train=n_train,
        forget=forget,
        training=training,
        checkpoints=2,
        seed=3,
    )


@pytest.fixture(scope="module")
def problem():
    return a_problem("mlp", hidden=24)


@pytest.fixture(scope="module")
def linear():
    return a_problem("linear")


@pytest.fixture(scope="module")
def before(problem):
    return metrics.margins(problem.original_logits, problem.labels)


@pytest.fixture
def end(monkeypatch):
    """The weights that the last fine-tuning ended with, by name."""
    seen, descend = [], base.descend

    def spy(tuned, *args, **kwargs):
        seen.append(tuned)
        descend(tuned, *args, **kwargs)

    monkeypatch.setattr(base, "descend", spy)
    return lambda: seen[-1].params


def some(problem, models):
    return dataclasses.replace(
        problem,
        originals=problem.originals[models],
        original_logits=problem.original_logits[models],
        oracle_logits=problem.oracle_logits[models],
        earlier=(problem.earlier[0], problem.earlier[1][models]),
    )


# --- all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_every_model_moves_alike_again_and_whatever_its_company(problem, before, name):
    weights = {k: v.clone() for k, v in problem.originals.params.items()}
    run = unlearn.get(name)
    result = run(problem, **STRONG[name])
    assert result.margins.shape == result.correct.shape == before.shape
    assert np.isfinite(result.margins).all()
    assert (np.abs(result.margins - before).max(1) > 1e-2).all(), "each of the models must have moved"
    for key, value in problem.originals.params.items():
        assert torch.equal(value, weights[key]), "the originals themselves stay as they are"
    np.testing.assert_array_equal(run(problem, **STRONG[name]).margins, result.margins)
    few = run(some(problem, slice(0, 2)), **STRONG[name])
    np.testing.assert_allclose(few.margins, result.margins[:2], rtol=2e-3, atol=5e-3)
    other = run(dataclasses.replace(problem, seed=4), **STRONG[name])
    assert name == "ssd" or not np.array_equal(other.margins, result.margins), "the seed must matter"


@pytest.mark.parametrize("name", BASELINES)
def test_trajectories_end_where_the_method_ends(problem, name):
    result = unlearn.get(name)(problem, **STRONG[name])
    assert len(result.costs) == len(result.trajectory) == (2 if name in FINE_TUNED else 1)
    assert result.costs[-1] == pytest.approx(result.cost)
    np.testing.assert_allclose(result.trajectory[-1], result.margins, atol=1e-5)


def test_costs_count_every_pass(problem):
    n_retain, n_forget, retraining = 114, 6, 15 * 114
    expected = {
        "ga_gd_turns": 3 * n_retain + 2 * n_forget,
        "msg": 3 * n_retain + 2 * n_forget,
        "short_retrain": 5 * n_retain,
        "rewind": 6 * n_retain,
        "neggrad_plus": 3 * (n_retain + 4 * n_forget),  # four steps a pass, each with all of F
        "random_labels": 3 * (n_retain + n_forget),
        "salun": 3 * (n_retain + n_forget) + n_forget,
        "bad_teacher": 5 * (34 + n_forget) + n_forget,
        "l1_sparse": 3 * n_retain,
        "cf_k": 3 * n_retain,
        "eu_k": 6 * n_retain,
        "ssd": N_TRAIN + n_forget,
        "newton": n_forget + 2 * 10 * 60,
    }
    for name, gradients in expected.items():
        assert unlearn.get(name)(problem, **STRONG[name]).cost == pytest.approx(gradients / retraining), name


def test_convolutions_and_batch_norm(problem):
    """Methods work on any module: here two resnet9 on images of noise."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, 32, 32, generator=rng)
    y = torch.arange(50) % 10
    originals = ensemble.initialise(lambda: models.build("resnet9", (3, 32, 32), 10, width=4), range(2))
    logits = originals.logits(x).numpy()
    small = dataclasses.replace(
        problem, originals=originals, original_logits=logits, x=x, y=y, n_train=40, forget=FORGET[:3],
        oracle_logits=None, earlier=(0.6, originals),
    )  # fmt: skip
    start = metrics.margins(logits, small.labels)
    for name in [*BASELINES, "ct"]:
        result = unlearn.get(name)(small, **STRONG.get(name, {}))
        assert np.isfinite(result.margins).all(), name
        assert (np.abs(result.margins - start).max(1) > 1e-4).all(), name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("neggrad_plus", {"beta": 0.0}, "beta=0.0 of method .neggrad_plus. was given; it should be greater than 0"),
        ("neggrad_plus", {"beta": 1.5}, "beta=1.5 .*less than or equal to 1"),
        ("random_labels", {"epochs": 1.5}, "epochs=1.5 .*a valid integer"),
        ("random_labels", {"batch_size": 0}, "batch_size=0"),
        ("salun", {"share": 2}, "share=2 .*less than or equal to 1"),
        ("bad_teacher", {"temperature": -1}, "temperature=-1"),
        ("bad_teacher", {"retain_share": float("nan")}, "retain_share=nan"),
        ("l1_sparse", {"gamma": "big"}, "gamma='big'"),
        ("l1_sparse", {"lr": 0}, "lr=0"),
        ("cf_k", {"k": 3}, "k=3 was given, but the model has 2 layers; use 1 to 2"),
        ("cf_k", {"k": 0}, "k=0"),
        ("eu_k", {"k": 1.0}, "k=1.0"),
        ("ssd", {"alpha": 0}, "alpha=0"),
        ("newton", {"iterations": 2.5}, "iterations=2.5"),
        ("newton", {"damping": 0.0}, "damping=0.0"),
        ("oracle_matching", {"targets": "mean"}, "targets='mean' .*'shifted' or 'oracle'"),
    ],
)
def test_options_that_make_no_sense(problem, name, options, message):
    with pytest.raises(OptionError, match=message) as error:
        unlearn.get(name)(problem, **options)
    assert "\n" not in str(error.value)


def test_catalogue_says_where_each_method_comes_from():
    table = tables.catalogue(["gd", "scrub", *BASELINES, "oracle_matching", "dmm"])
    assert table.index[2] == "NegGrad+"
    assert (table[["source", "cost", "searched", "elsewhere"]] != "").all(axis=None)
    assert table.loc["SSD", "searched"].startswith("alpha ")


# --- in part, by turns, whitened -----------------------------------------------------------------------


def test_a_rewind_to_the_start_is_retraining_and_ends_like_it(problem):
    epochs = problem.training.epochs
    whole = unlearn.get("short_retrain")(problem, epochs=float(epochs))
    start = dataclasses.replace(problem, earlier=(0.0, fresh.fresh(problem)))
    np.testing.assert_allclose(unlearn.get("rewind")(start).margins, whole.margins, atol=1e-5)
    assert whole.cost == unlearn.get("rewind")(start).cost == 1
    oracles = metrics.margins(problem.oracle_logits, problem.labels)
    gap = np.abs(whole.margins.mean(0) - oracles.mean(0)) / oracles.std(0)
    assert gap[FORGET].mean() < 1.5, "six models of the same kind"
    with pytest.raises(DataError, match="earlier"):
        unlearn.get("rewind")(dataclasses.replace(problem, earlier=None))


def test_turns_of_one_epoch_are_ascent_and_then_descent(problem):
    turns = unlearn.get("ga_gd_turns")(problem, epochs=1, ascent_epochs=1, lr=1e-2)
    after = unlearn.get("ga_gd")(problem, ascent_epochs=1.0, descent_epochs=1.0, lr=1e-2)
    np.testing.assert_array_equal(turns.margins, after.margins)


def test_msg_draws_the_weights_with_small_gradients_anew(problem, end):
    small = reset.small_gradients(problem, 0.3)
    assert set(small) == {"0.weight", "2.weight"}
    sample = np.random.default_rng([problem.seed, 3]).choice(problem.retain, len(FORGET), replace=False)
    on_r, on_f = (gradient.mean_gradient(problem, problem.originals, points) for points in (sample, FORGET))
    unlearn.get("msg")(problem, **STRONG["msg"] | {"lr": 1e-9})
    after, drawn, before = end(), fresh.fresh(problem).params, problem.originals.params
    for name, at in small.items():
        assert (at.flatten(1).sum(1) == round(0.3 * at[0].numel())).all()
        sizes = (on_r[name] - on_f[name]).abs()
        assert (torch.where(at, sizes, 0).flatten(1).amax(1) <= torch.where(at, 1e9, sizes).flatten(1).amin(1)).all()
        torch.testing.assert_close(after[name], torch.where(at, drawn[name], before[name]), rtol=0, atol=1e-6)


def test_ct_transposes_kernels_and_needs_some(problem, end):
    images = a_problem("convnet", 2, 40, FORGET[:3], Training(epochs=2, batch_size=20, lr=0.05), width=4)
    unlearn.get("ct")(images, lr=1e-9)
    for name, kernel in images.originals.params.items():
        expected = kernel.transpose(3, 4) if kernel.ndim == 5 else kernel
        torch.testing.assert_close(end()[name], expected, rtol=0, atol=1e-6)
    with pytest.raises(MethodError, match="has none"):
        unlearn.get("ct")(problem)


def test_scrub_lowers_its_rate_and_rewinds_each_model(problem, monkeypatch):
    rates, descend = [], base.descend
    monkeypatch.setattr(base, "descend", lambda *a, rate, **k: rates.append(rate(0)) or descend(*a, rate=rate, **k))
    options = {"epochs": 5, "max_epochs": 2, "lr": 0.3, "batch_size": 30, "forget_batch_size": 2}
    plain = unlearn.get("scrub")(problem, **options)
    np.testing.assert_allclose(rates[:7], np.array([0.3] * 5 + [0.03] * 2), rtol=1e-6)  # two epochs have two phases
    rewound = unlearn.get("scrub")(problem, **options, rewind=True)
    weights = scrub.like_forget(problem)
    assert weights.sum() == pytest.approx(1)
    aim = plain.correct[:, N_TRAIN:] @ weights
    far, near = (np.abs(r.correct[:, FORGET].mean(1) - aim) for r in (plain, rewound))
    assert (near <= far + 1e-6).all()
    assert len(rewound.trajectory) == 1, "what is on the way is not where a run ends that is stopped there"


def test_a_whitened_step_is_preconditioned_by_the_inputs_second_moment(linear):
    asked = dataclasses.replace(linear, training=Training(epochs=1, batch_size=N_TRAIN, lr=0.1))
    moved = unlearn.get("gd")(asked, epochs=1.0, lr=0.05, batch_size=N_TRAIN, whitened=True)
    assert moved.cost == pytest.approx(2), "the points on which inputs are measured are counted"
    slope = gradient.mean_gradient(asked, asked.originals, asked.retain)
    x = asked.x[asked.retain]
    moment = x.T @ x / len(x)
    moment = moment + whitening.DAMPING * moment.diagonal().mean() * torch.eye(len(moment))
    params = asked.originals.params
    weight = params["weight"] - 0.05 * slope["weight"] @ torch.linalg.inv(moment)
    logits = torch.einsum("nd,mcd->mnc", asked.x, weight) + (params["bias"] - 0.05 * slope["bias"])[:, None]
    np.testing.assert_allclose(moved.margins, metrics.margins(logits.numpy(), asked.labels), atol=2e-3)


# --- gradients and labels ------------------------------------------------------------------------------


def test_neggrad_plus_raises_the_loss_on_f_more_than_on_r(problem):
    def losses(margins):
        loss = np.logaddexp(0, -margins).mean(0)
        return loss[FORGET].mean(), loss[problem.retain].mean()

    f0, r0 = losses(metrics.margins(problem.original_logits, problem.labels))
    f1, r1 = losses(unlearn.get("neggrad_plus")(problem, **STRONG["neggrad_plus"]).margins)
    assert f1 - f0 > 0.2
    assert f1 - f0 > 3 * (r1 - r0)


def test_without_ascent_neggrad_plus_is_descent(problem):
    plus = unlearn.get("neggrad_plus")(problem, epochs=2.0, lr=1e-2, beta=1.0)
    np.testing.assert_allclose(plus.margins, unlearn.get("gd")(problem, epochs=2.0, lr=1e-2).margins, atol=1e-3)


def test_mean_gradient_is_autograd_of_one_model(problem):
    found = gradient.mean_gradient(problem, problem.originals, np.arange(N_TRAIN))  # two blocks
    one = {k: p[4].clone().requires_grad_() for k, p in problem.originals.params.items()}
    z = torch.func.functional_call(problem.originals.module, one, problem.x[:N_TRAIN])
    expected = torch.autograd.grad(F.cross_entropy(z, problem.y[:N_TRAIN]), list(one.values()))
    for g, e in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(g[4], e, rtol=1e-4, atol=1e-6)


def test_wrong_labels_are_wrong_on_f_only(problem):
    rngs = problem.rngs(use=1)
    labels = np.stack([relabel.wrong_labels(problem, rngs).numpy() for _ in range(200)])
    right = problem.labels[:N_TRAIN]
    assert (labels[:, :, FORGET] != right[FORGET]).all()
    assert (labels[:, :, problem.retain] == right[problem.retain]).all()
    for point in FORGET:
        seen, counts = np.unique(labels[:, :, point], return_counts=True)
        assert len(seen) == 9, "every other class comes up"
        assert counts.min() > 0.6 * counts.mean()
    assert (labels[0, 0, FORGET] != labels[0, 1, FORGET]).any(), "each model draws its own"


@pytest.mark.parametrize("name", ["random_labels", "salun"])
def test_random_labels_lower_the_margins_of_f(problem, before, name):
    shift = (unlearn.get(name)(problem, **STRONG[name]).margins - before).mean(0)
    assert shift[FORGET].mean() < -0.5
    assert shift[FORGET].mean() < shift[problem.retain].mean() - 0.5


def test_saliency_is_the_share_with_the_largest_gradient(problem):
    masks = relabel.saliency(problem, 0.3)
    flat = torch.cat([m.flatten(1).bool() for m in masks.values()], 1)
    assert (flat.sum(1) == round(0.3 * flat.shape[1])).all()
    found = gradient.mean_gradient(problem, problem.originals, FORGET)
    gradients = torch.cat([g.abs().flatten(1) for g in found.values()], 1)
    for mask, g in zip(flat, gradients, strict=True):
        assert g[mask].min() >= g[~mask].max()


def test_salun_leaves_masked_weights_untouched(problem, end):
    unlearn.get("salun")(problem, **STRONG["salun"])
    masks, after = relabel.saliency(problem, STRONG["salun"]["share"]), end()
    for name, start in problem.originals.params.items():
        salient = masks[name].bool()
        assert torch.equal(after[name][~salient], start[~salient]), "bit for bit"
        assert (after[name][salient] != start[salient]).float().mean() > 0.9
    unlearn.get("salun")(problem, **{**STRONG["salun"], "share": 1.0})
    everything = end()
    unlearn.get("random_labels")(problem, **STRONG["random_labels"])
    for name, p in end().items():
        torch.testing.assert_close(everything[name], p)


# --- teachers, sparsity, layers ------------------------------------------------------------------------


def test_fresh_models_are_drawn_as_models_are(problem):
    drawn = fresh.fresh(problem)
    seeds = [int(rng.integers(2**32)) for rng in problem.rngs(use=1)]
    expected = ensemble.initialise(lambda: models.build("mlp", (64,), 10, hidden=24), seeds)
    for name, p in expected.params.items():
        assert torch.equal(drawn.params[name], p)


def test_fresh_models_need_weights_that_can_be_drawn(problem):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(10))

        def forward(self, x):
            return x[:, :10] * self.scale

    odd = ensemble.initialise(lambda: torch.nn.Sequential(Odd()), range(N_MODELS))
    with pytest.raises(MethodError, match=r"Part '0' of the model, a Odd, cannot be initialised anew; give it"):
        fresh.fresh(dataclasses.replace(problem, originals=odd))


def test_bad_teacher_answers_f_as_one_who_knows_nothing(problem, monkeypatch):
    drawn = fresh.fresh(problem)
    monkeypatch.setattr(bad_teacher, "fresh", lambda _: drawn)
    result = unlearn.get("bad_teacher")(problem, **STRONG["bad_teacher"])
    ignorant = metrics.margins(drawn.logits(problem.x).numpy(), problem.labels)
    before = metrics.margins(problem.original_logits, problem.labels)
    gap = np.abs(result.margins - ignorant).mean(0)[FORGET].mean()
    assert gap < 0.7 * np.abs(before - ignorant).mean(0)[FORGET].mean()
    assert result.correct[:, problem.retain].mean() > 0.9


def test_l1_shrinks_the_norm_and_ends_without_penalty(problem, end):
    def norm(**options):
        unlearn.get("l1_sparse")(problem, **{**STRONG["l1_sparse"], **options})
        return sum(p.abs().flatten(1).sum(1) for p in end().values())

    start = sum(p.abs().flatten(1).sum(1) for p in problem.originals.params.values())
    weak, strong = norm(gamma=1e-12), norm()
    assert (strong < start).all()
    assert (strong < weak).all()
    assert (norm(gamma=3e-3) < strong).all()
    unlearn.get("gd")(problem, epochs=3.0, lr=1e-2, batch_size=30)
    plain = end()
    norm(gamma=1e-12)
    for name, p in end().items():
        torch.testing.assert_close(p, plain[name], rtol=1e-4, atol=1e-5)


def test_last_layers_of_networks():
    odd = ensemble.initialise(lambda: models.build("resnet9", (3, 32, 32), 10, width=4), [0])
    x = torch.zeros(1, 3, 32, 32)
    assert last_layers.last_layers(odd, 1, x) == {"9.weight"}
    two = last_layers.last_layers(odd, 2, x)
    assert {n.rpartition(".")[0] for n in two} == {"6.0", "6.1", "9"}, "a convolution brings its batch norm"
    assert last_layers.last_layers(odd, 9, x) == set(odd.params)
    with pytest.raises(OptionError, match="k=10 was given, but the model has 9 layers"):
        last_layers.last_layers(odd, 10, x)


def test_last_layers_are_those_that_are_used_last():
    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body, self.spare = (torch.nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            return self.head(self.body(x).relu())

    turned = ensemble.initialise(Turned, [0])
    assert last_layers.last_layers(turned, 1, torch.zeros(1, 6)) == {"head.weight", "head.bias"}


def test_cf_k_leaves_the_first_layers_untouched(problem, end):
    unlearn.get("cf_k")(problem, **STRONG["cf_k"])
    after, start = end(), problem.originals.params
    for name in ("0.weight", "0.bias"):
        assert torch.equal(after[name], start[name]), "bit for bit"
    for name in ("2.weight", "2.bias"):
        assert (after[name] != start[name]).float().mean() > 0.7, "units that no point lights up may stay"


def test_eu_k_starts_its_last_layer_anew(problem, end):
    result = unlearn.get("eu_k")(problem, **{**STRONG["eu_k"], "lr": 1e-9})
    after, drawn = end(), fresh.fresh(problem).params
    assert torch.equal(after["0.weight"], problem.originals.params["0.weight"])
    torch.testing.assert_close(after["2.weight"], drawn["2.weight"], atol=1e-6, rtol=0)
    assert result.correct.mean() < 0.5, "it has not learned yet"
    learned = unlearn.get("eu_k")(problem, **STRONG["eu_k"])
    assert learned.correct[:, problem.retain].mean() > 0.95


# --- dampening -----------------------------------------------------------------------------------------


def test_dampening_by_hand():
    params = {"w": torch.tensor([[1.0, -2.0, 3.0, 4.0, 0.0]])}
    forget = {"w": torch.tensor([[8.0, 8.0, 4.0, 0.0, 8.0]])}
    everything = {"w": torch.tensor([[1.0, 3.0, 2.0, 0.0, 1.0]])}
    found = dampening.dampen(params, forget, everything, alpha=2.0, strength=4.0)["w"]
    # selected where I_F > 2 I_S: the first, second and last; factors 4 / 8, min(12 / 8, 1), 4 / 8
    assert found.tolist() == [[0.5, -2.0, 3.0, 4.0, 0.0]]
    none = dampening.dampen(params, forget, everything, alpha=100.0, strength=0.1)["w"]
    assert torch.equal(none, params["w"])


@pytest.mark.parametrize("which", ["mlp", "convnet"])
def test_importance_is_the_mean_square_of_per_example_gradients(which):
    small = a_problem(which, 2, 30, FORGET[:2], Training(epochs=2, batch_size=10, lr=0.05))
    indices = np.array([0, 7, 9, 29])
    found = dampening.importance(small, indices)
    for i in range(2):
        one = {k: p[i].clone().requires_grad_() for k, p in small.originals.params.items()}
        expected = {k: torch.zeros_like(p) for k, p in one.items()}
        for j in indices:
            z = torch.func.functional_call(small.originals.module, one, small.x[[j]])
            gradients = torch.autograd.grad(F.cross_entropy(z, small.y[[j]]), list(one.values()))
            for k, g in zip(one, gradients, strict=True):
                expected[k] += g**2 / len(indices)
        for k in one:
            torch.testing.assert_close(found[k][i], expected[k], rtol=1e-4, atol=1e-8)


def test_dense_squares_are_squared_gradients(problem, linear):
    for p in (problem, linear):
        args = (p.originals, p.x[:20], p.y[:20])
        quick, slow = dampening.dense_squares(*args), dampening.squared_gradients(*args)
        assert quick.keys() == slow.keys()
        for name in slow:
            torch.testing.assert_close(quick[name], slow[name], rtol=1e-4, atol=1e-7)


def test_ssd_lowers_f_more_than_r(problem, before):
    shift = (unlearn.get("ssd")(problem, **STRONG["ssd"]).margins - before).mean(0)
    assert shift[FORGET].mean() < shift[problem.retain].mean() - 0.1


# --- the Newton step -----------------------------------------------------------------------------------


def test_conjugate_gradients_solve_every_system():
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(3, 8, 8, generator=rng, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(8)
    b = torch.randn(3, 8, generator=rng, dtype=torch.float64)
    b[1] = 0
    x = newton.conjugate_gradients(lambda v: (matrix @ v[..., None])[..., 0], b, 40)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)


def optimum(problem, keep, steps=60):
    """The minimum of mean cross-entropy on `keep` + weight decay, one linear model, by full Newton steps."""
    x, y, decay = problem.x[keep].double(), problem.y[keep], problem.training.weight_decay
    theta = torch.zeros(10 * (x.shape[1] + 1), dtype=torch.float64)

    def objective(theta):
        z = x @ theta[:-10].view(10, -1).mT + theta[-10:]
        return F.cross_entropy(z, y) + decay / 2 * (theta**2).sum()

    for _ in range(steps):
        g, h = torch.func.grad(objective)(theta), torch.func.hessian(objective)(theta)
        theta = theta - torch.linalg.solve(h, g)
        if g.norm() < 1e-12:
            break
    return theta, objective


def test_newton_step_of_a_convex_problem_is_exact_and_near_retraining(linear):
    training = dataclasses.replace(linear.training, weight_decay=0.1)
    convex = dataclasses.replace(linear, training=training)
    theta, _ = optimum(convex, np.arange(N_TRAIN))
    params = {"weight": theta[:-10].view(1, 10, -1), "bias": theta[None, -10:]}
    originals = Ensemble(linear.originals.module, {k: p.float() for k, p in params.items()}, {})
    logits = originals.logits(linear.x).numpy()
    convex = dataclasses.replace(convex, originals=originals, original_logits=logits)

    retrained, objective = optimum(convex, convex.retain)
    g, h = torch.func.grad(objective)(theta), torch.func.hessian(objective)(theta)
    exact = theta - torch.linalg.solve(h, g)  # the Newton step, from the dense Hessian on R
    weight, bias = exact[:-10].view(10, -1), exact[-10:]
    expected = metrics.margins((linear.x.double() @ weight.mT + bias).numpy()[None], linear.labels)

    result = unlearn.get("newton")(convex, damping=1e-9, iterations=200, cost=1000)
    np.testing.assert_allclose(result.margins, expected, atol=2e-4)
    assert (exact - retrained).norm() < 0.05 * (theta - retrained).norm()


def test_newton_step_lowers_f_more_than_r(problem, before):
    def shift(**options):
        moved = (unlearn.get("newton")(problem, iterations=20, cost=1000, **options).margins - before).mean(0)
        return moved[FORGET].mean(), moved[problem.retain].mean()

    (f, r), (short, _) = shift(damping=1e-2), shift(damping=1.0)
    assert f < r - 0.1
    assert f < short < 0, "damping shortens the step"


# --- oracle matching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, None])
def test_shifted_targets_are_original_plus_mean_difference(problem, k):
    shifted, plain = (match.oracle_targets(problem, k, targets) for targets in ("shifted", "oracle"))
    own, oracles = (metrics.margins(z, problem.labels) for z in (problem.original_logits, problem.oracle_logits))
    teachers = np.stack([oracles[[(i + j) % N_MODELS for j in range(k or N_MODELS)]].mean(0) for i in range(N_MODELS)])
    np.testing.assert_allclose(plain, teachers, atol=1e-4)
    np.testing.assert_allclose(shifted, own + teachers - own.mean(0), atol=1e-4)


def test_with_all_oracles_shifted_targets_keep_the_originals_spread(problem):
    means = {}
    for targets in ("oracle", "shifted"):
        result = unlearn.get("oracle_matching")(problem, n_oracles=N_MODELS, targets=targets, cost=1.0)
        means[targets] = result.margins[:, FORGET]
    assert means["shifted"].std(0).mean() > means["oracle"].std(0).mean()
