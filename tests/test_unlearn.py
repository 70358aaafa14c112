"""Every method changes its model, in the direction it promises, at the cost it reports."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dmmlib import data, ensemble, metrics, models, unlearn
from dmmlib.attributors.gradients import margin
from dmmlib.datamodels import Attributor
from dmmlib.ensemble import Training
from dmmlib.errors import DataError, ForgetSetError, MethodError, OptionError
from dmmlib.matching import gauss_newton, match
from dmmlib.matching.gauss_newton import Jacobian
from dmmlib.optim import SGD
from dmmlib.unlearn import Problem
from tests.conftest import Watched

N_TRAIN, FORGET = 150, np.array([3, 30, 77, 100, 149])
TUNED = ["gd", "ga", "ga_gd", "scrub"]
MOVING = [*TUNED, "oracle_matching", "dmm", "oracle_matching_adam", "dmm_adam"]


class TrueEffect(Attributor):
    """An attributor that knows: the mean difference of oracles and originals."""

    def __init__(self, change):
        self.change = change

    def effects(self, forget_sets):
        assert [list(forget) for forget in forget_sets] == [FORGET.tolist()]
        return self.change[None]

    def predict(self, masks):
        raise NotImplementedError


@pytest.fixture(scope="module")
def problem():
    d = data.load("digits", N_TRAIN, 60)
    x, y = models.pooled(d, d.x), torch.from_numpy(d.y)
    training = Training(epochs=20, batch_size=25, lr=0.1)

    def factory():
        return models.build("mlp", tuple(x.shape[1:]), 10, hidden=32)

    keep = np.ones((8, N_TRAIN), bool)
    originals = ensemble.train(factory, x[:N_TRAIN], y[:N_TRAIN], keep, range(8), training)
    keep[:, FORGET] = False
    oracles = ensemble.train(factory, x[:N_TRAIN], y[:N_TRAIN], keep, range(100, 108), training).logits(x).numpy()
    logits = originals.logits(x).numpy()
    return Problem(
        originals=originals,
        original_logits=logits,
        x=x,
        y=y,
        n_train=N_TRAIN,
        forget=FORGET,
        training=training,
        attributor=TrueEffect((oracles - logits).mean(0)),
        oracle_logits=oracles,
        checkpoints=3,
        seed=1,
    )


@pytest.fixture(scope="module")
def before(problem):
    return metrics.margins(problem.original_logits, problem.labels)


@pytest.mark.parametrize("name", MOVING)
def test_every_method_moves_every_model(problem, before, name):
    weights = {k: v.clone() for k, v in problem.originals.params.items()}
    result = unlearn.get(name)(problem)
    assert result.margins.shape == result.correct.shape == before.shape
    assert np.isfinite(result.margins).all()
    assert (np.abs(result.margins - before).max(1) > 1e-3).all(), "each of the models must have moved"
    for key, value in problem.originals.params.items():
        assert torch.equal(value, weights[key]), "the originals themselves stay as they are"


@pytest.mark.parametrize("name", MOVING)
def test_trajectories_end_where_the_method_ends(problem, name):
    result = unlearn.get(name)(problem)
    assert len(result.costs) == len(result.trajectory) >= 1
    assert (np.diff(result.costs) > 0).all()
    assert result.costs[-1] == pytest.approx(result.cost)
    np.testing.assert_allclose(result.trajectory[-1], result.margins, atol=1e-5)


def test_costs_are_sample_gradients_over_those_of_retraining(problem):
    retraining = 20 * (N_TRAIN - 5)
    assert problem.retraining == retraining
    cost = {name: unlearn.get(name)(problem, **kw).cost for name, kw in {
        "do_nothing": {},
        "retrain": {},
        "dm_direct": {},
        "gd": {"epochs": 2.0},
        "ga": {"epochs": 3.0},
        "ga_gd": {"ascent_epochs": 1.0, "descent_epochs": 2.0},
        "scrub": {"epochs": 3, "max_epochs": 2},
        "dmm": {"cost": 0.2},
        "dmm_adam": {"ratio": "1:3", "epochs": 2},
    }.items()}  # fmt: skip
    assert cost["do_nothing"] == cost["dm_direct"] == 0
    assert cost["retrain"] == 1
    assert cost["gd"] == pytest.approx(2 * 145 / retraining)
    assert cost["ga"] == pytest.approx(3 * 5 / retraining)
    assert cost["ga_gd"] == pytest.approx((5 + 2 * 145) / retraining)
    assert cost["scrub"] == pytest.approx((3 * 145 + 2 * 5) / retraining)
    assert cost["dmm"] == pytest.approx(0.2, abs=4 / retraining)
    assert cost["dmm_adam"] == pytest.approx(2 * 4 * 5 / retraining)


def test_ascent_lowers_the_margins_of_the_forget_set(problem, before):
    after = unlearn.get("ga")(problem, epochs=5.0, lr=3e-2).margins
    assert after[:, FORGET].mean() < before[:, FORGET].mean() - 0.1


@pytest.mark.parametrize("name", TUNED)
def test_no_step_of_fine_tuning_waits_for_a_device(problem, name):
    read, steps = [], []
    few = replace(problem, checkpoints=0)
    longer = {"gd": "epochs", "ga": "epochs", "ga_gd": "descent_epochs", "scrub": "epochs"}[name]
    unlearn.get(name)(few)  # what is found out once
    for epochs in (3, 5):
        with Watched() as seen:
            unlearn.get(name)(few, **{longer: epochs})
        read.append(seen.read)
        steps.append(epochs * -(-len(problem.forget if name == "ga" else problem.retain) // 64))
    assert read[1] - read[0] == steps[1] - steps[0], "of each step the rate is read, which is on the CPU"


def test_scrub_moves_away_from_its_teacher_on_f_and_stays_near_it_on_r(problem, before):
    after = unlearn.get("scrub")(problem, epochs=6, max_epochs=6, lr=3e-2, alpha=0.5).margins
    shift = np.abs(after - before).mean(0)
    assert shift[FORGET].mean() > 3 * shift[problem.retain].mean()


def test_matching_reaches_its_targets(problem):
    """Within a few hundredths of where its targets have moved F, and R with it."""
    targets = match.oracle_targets(problem)
    start = metrics.margins(problem.original_logits, problem.labels)
    result = unlearn.get("oracle_matching")(problem, cost=0.5)
    left, asked = result.margins - targets, start - targets

    def ratio(at):
        return (np.square(left[:, at]).mean() / np.square(asked[:, at]).mean()) ** 0.5

    assert ratio(FORGET) < 0.1
    assert ratio(problem.retain) < 0.6
    assert result.cost == pytest.approx(0.5, rel=0.05)


def test_dmm_matches_what_its_attributor_predicts(problem):
    predicted = unlearn.get("dm_direct")(problem).margins[:, FORGET]
    start = metrics.margins(problem.original_logits, problem.labels)[:, FORGET]
    result = unlearn.get("dmm")(problem, cost=0.5)
    assert np.square(result.margins[:, FORGET] - predicted).mean() < 0.01 * np.square(start - predicted).mean()


def test_a_gauss_newton_step_is_that_of_explicit_gradients(problem):
    """theta + M^-1 G^T (G M^-1 G^T + Lambda)^-1 r, with every matrix built and M from inputs of each layer."""
    models, x, y = problem.originals, problem.x[:12], problem.y[:12]
    params, buffers = models.state_of(0)
    seen = Jacobian(models.module.eval(), params, buffers, x, y, 8)
    names = list(params)

    def margins_at(flat):
        parts = flat.split([params[k].numel() for k in names])
        given = {k: part.view_as(params[k]) for k, part in zip(names, parts, strict=True)}
        return margin(torch.func.functional_call(models.module, (given, buffers), (x,)), y)

    flat = torch.cat([params[k].flatten() for k in names]).double()
    params, x = {k: v.double() for k, v in params.items()}, x.double()
    g = torch.func.jacrev(margins_at)(flat)
    inputs, metric = x, torch.zeros(len(flat), len(flat), dtype=torch.double)
    at = dict(zip(names, np.cumsum([0, *(params[k].numel() for k in names)]), strict=False))
    for weight, bias in zip(names[::2], names[1::2], strict=True):  # one hidden layer
        out, size = params[weight].shape
        u = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)[-8:]
        a = u.T @ u / 8
        a.diagonal().add_(gauss_newton.DAMPING * a.diagonal().mean())
        for o in range(out):
            place = [*range(at[weight] + o * size, at[weight] + (o + 1) * size), at[bias] + o]
            metric[np.ix_(place, place)] = a
        inputs = (inputs @ params[weight].T + params[bias]).relu()
    k = g @ torch.linalg.solve(metric, g.T)
    torch.testing.assert_close(seen.kernel.double(), k, rtol=1e-3, atol=1e-3 * float(k.diagonal().mean()))
    r, ridge = torch.linspace(-1, 1, 12).double(), torch.full((12,), 0.05).double()
    a = torch.linalg.solve(k + torch.diag(ridge * k.diagonal().mean()), r)
    expected = torch.linalg.solve(metric, g.T @ a)
    step = seen.solve(r.float(), ridge.float())
    found = torch.cat([step[k].flatten() for k in names]).double()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("make", ["convolutions", "shared and normed"])
def test_a_small_step_moves_margins_as_it_says(make):
    """K a is the change of margins to first order, whatever layers the weights are in."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.norm = nn.Linear(48, 10), nn.Linear(10, 10), nn.LayerNorm(10)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.twice(self.norm(self.act(self.twice(self.act(self.first(x.flatten(1)))))))

    convolutions = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 2, groups=2), nn.Flatten(),
        nn.Linear(8, 10, bias=False),
    )  # fmt: skip
    torch.manual_seed(0)
    module = (convolutions if make == "convolutions" else Shared()).double().eval()
    x, y = torch.randn(9, 3, 4, 4, dtype=torch.double), torch.arange(9) % 10
    params = {k: v.detach().clone() for k, v in module.named_parameters()}
    seen = Jacobian(module, params, {}, x, y, 5)
    wanted, ridge = 1e-4 * torch.linspace(-1, 1, 9).double(), torch.full((9,), 1e-9).double()
    step = seen.solve(wanted, ridge)
    moved = {k: v + step[k] for k, v in params.items()}
    change = margin(torch.func.functional_call(module, moved, (x,)), y) - seen.margins
    torch.testing.assert_close(change, wanted, rtol=0.02, atol=1e-7)


def test_each_model_is_rewound_to_the_phase_that_is_chosen(problem):
    batches = unlearn.passes(problem, problem.retain, 3.0, 25)
    phases = [unlearn.Phase(batches[i : i + 6], unlearn.descent(problem)) for i in (0, 6, 12)]

    def run(stop=1.0, **options):
        return unlearn.finetune(dataclasses.replace(problem, stop=stop), phases, SGD(0.1), **options).margins

    rewound = run(rewind=lambda logits: np.arange(logits.shape[1]) % len(logits))
    for k in range(3):
        np.testing.assert_allclose(rewound[k::3], run((k + 1) / 3)[k::3], atol=1e-5)


def test_convolutions_are_taken_a_block_of_outputs_at_a_time(monkeypatch):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 10)
    )
    module, x, y = module.double().eval(), torch.randn(9, 3, 4, 4, dtype=torch.double), torch.arange(9) % 10
    params = {k: v.detach() for k, v in module.named_parameters()}
    found = []
    for numbers in (10**8, 1):
        monkeypatch.setattr("dmmlib.attributors.gradients.FLOATS", numbers)
        seen = Jacobian(module, params, {}, x, y, 5)
        found.append([seen.kernel, *seen.solve(torch.ones(9), torch.full((9,), 0.1)).values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_dm_direct_is_original_plus_effect(problem):
    result = unlearn.get("dm_direct")(problem)
    change = metrics.right_logits(problem.attributor.change, problem.labels)
    expected = metrics.margins(problem.original_logits, problem.labels) + change
    np.testing.assert_allclose(result.margins, expected, atol=1e-5)


def test_mean_of_oracles(problem):
    one, every = (
        unlearn.get("oracle_matching")(problem, n_oracles=n, targets="oracle", cost=0.5).margins[:, FORGET]
        for n in (1, 8)
    )
    assert every.std(0).mean() < one.std(0).mean()
    with pytest.raises(DataError, match="n_oracles=9, but there are 8"):
        unlearn.get("oracle_matching")(problem, n_oracles=9)


def test_originals_keep_their_own_randomness(problem):
    few = Problem(
        **{**vars(problem), "originals": problem.originals[:3], "original_logits": problem.original_logits[:3]}
    )
    np.testing.assert_allclose(
        unlearn.get("dmm")(few).margins, unlearn.get("dmm")(problem).margins[:3], rtol=1e-3, atol=2e-3
    )


def test_a_users_own_method_and_unknown_names(problem):
    @unlearn.register("halve", space={"by": [0.5, 0.25]})
    def halve(problem, *, by=0.5):
        return unlearn.Unlearned.from_logits(problem.original_logits * by, problem.labels, cost=0.0)

    try:
        assert unlearn.configurations("halve", budget=8) == [{"by": 0.5}, {"by": 0.25}]
        assert unlearn.get("halve")(problem, by=0.25).cost == 0
    finally:
        unlearn.base.METHODS.remove("halve")
    with pytest.raises(MethodError, match=r"^Unknown method 'halve'; use one of bad_teacher, cf_k"):
        unlearn.get("halve")


def test_a_method_that_gives_something_else_or_moves_nothing_is_told_so(problem):
    unlearn.register("odd")(lambda problem: problem.original_logits)
    try:
        with pytest.raises(MethodError, match="Method 'odd' gave a ndarray; return what `finetune` does"):
            unlearn.get("odd")(problem)
    finally:
        unlearn.base.METHODS.remove("odd")
    batches = unlearn.passes(problem, problem.retain, 0.1, 10)
    with pytest.raises(OptionError, match="only names 'nope'; the parameters are "):
        unlearn.finetune(problem, [unlearn.Phase(batches, unlearn.descent(problem))], SGD(0.1), only=["nope"])


def test_settings_are_the_whole_grid_or_drawn_without_repeats():
    for name in TUNED:
        settings = unlearn.configurations(name, budget=8)
        assert len(settings) == 8 <= len(unlearn.configurations(name))
        assert all(settings.count(s) == 1 for s in settings)
        assert settings == unlearn.configurations(name, budget=8)
    assert unlearn.configurations("do_nothing", budget=8) == [{}]


class Foreseeing(Attributor):
    """Predicts the same change for every forget set."""

    def __init__(self, change):
        self.change = change

    def effects(self, forget_sets):
        return [self.change for _ in forget_sets]

    def predict(self, masks):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stop": 0.0}, "Option stop=0.0 of Problem was given; it should be greater than 0"),
        ({"checkpoints": -1}, "Option checkpoints=-1"),
        ({"seed": -1}, "Option seed=-1"),
        ({"training": {"epochs": 2}}, "an instance of Training"),
        ({"originals": torch.nn.Linear(2, 2)}, "an instance of Ensemble"),
        ({"x": np.zeros((210, 64))}, "an instance of Tensor"),
        ({"n_train": 211}, "x has 210 points, 211 of them to train on"),
        ({"y": torch.zeros(210)}, r"y is torch.float32 \(210,\); give labels of int64"),
        ({"y": torch.zeros(209, dtype=torch.int64)}, r"y is torch.int64 \(209,\)"),
        ({"y": torch.full((210,), 10)}, r"give \(8, 210, n_classes > 10\)"),
        ({"original_logits": np.zeros((8, 210))}, r"original_logits have shape \(8, 210\)"),
        ({"original_logits": np.full((8, 210, 10), np.nan)}, "original_logits hold NaN or infinity"),
        ({"oracle_logits": np.zeros((8, 209, 10))}, r"oracle_logits have shape \(8, 209, 10\); give \(n_models, 210"),
        ({"oracle_logits": np.full((8, 210, 10), np.inf)}, "oracle_logits hold NaN or infinity"),
    ],
)
def test_a_problem_says_what_does_not_fit(problem, change, said):
    with pytest.raises((DataError, OptionError), match=said) as error:
        dataclasses.replace(problem, **change)
    assert "\n" not in str(error.value)


def test_changes_that_an_attributor_predicts_are_of_each_logit_and_finite(problem):
    for change, said in ((np.zeros((9, 10)), r"of shape \(9, 10\)"), (np.full((210, 10), np.nan), "NaN or infinity")):
        with pytest.raises(DataError, match=rf"predicts changes .*{said}.*; it is to give finite ones of \(210, 10\)"):
            unlearn.get("dm_direct")(dataclasses.replace(problem, attributor=Foreseeing(change)))
    kept = unlearn.get("dm_direct")(dataclasses.replace(problem, attributor=Foreseeing([[0.0] * 10] * 210)))
    np.testing.assert_allclose(kept.margins, metrics.margins(problem.original_logits, problem.labels), atol=1e-4)


def test_problems_that_make_no_sense(problem):
    with pytest.raises(ForgetSetError, match="is empty"):
        Problem(**{**vars(problem), "forget": np.array([], int)})
    with pytest.raises(DataError, match=r"original_logits have shape .*\(8, 210, n_classes"):
        Problem(**{**vars(problem), "original_logits": problem.original_logits[:3]})
    bare = Problem(**{**vars(problem), "attributor": None, "oracle_logits": None})
    for name, what in [("dmm", "attributor"), ("retrain", "retrained models"), ("oracle_matching", "retrained models")]:
        with pytest.raises(DataError, match=what):
            unlearn.get(name)(bare)
