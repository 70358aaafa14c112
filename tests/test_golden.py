"""The golden table holds; a change of the library that moves a number is noticed, and the component named."""

import __future__

import ast
import inspect
import textwrap
from contextlib import closing
from itertools import islice

import pytest

from dmmlib import (
    attribution,
    data,
    datamodels,
    ensemble,
    evaluation,
    forget_sets,
    metrics,
    models,
    tuning,
    unlearn,
)
from dmmlib.attributors import bayesian, kernel, lasso, linearised, margins
from dmmlib.baselines import dampening, newton, whitening
from dmmlib.matching import gauss_newton
from dmmlib.matching import match as matching
from dmmlib.optim import SGD, Adam
from dmmlib.trainer import Trainer
from dmmlib.unlearn import base as unlearning
from tests import golden

EXTRAS = {"trak", "tracin", "ekfac", "logra"}  # attributors of an optional library


@pytest.fixture(scope="module")
def today():
    """All rows, of the library as it is."""
    return list(golden.rows())


def first_difference(today):
    """The first row that is not as it was; what lies below is not computed."""
    table = {row[:2]: golden.Recorded(golden.version(row.component), row.value) for row in today}
    with closing(golden.rows()) as rows:
        return next(golden.differences(rows, table), None)


# --- the table -----------------------------------------------------------------------------------------


def test_the_table_holds(today):
    table = golden.read()
    moved = list(golden.differences(today, table))
    if moved:
        first = moved[0].row.component
        others = list(dict.fromkeys(d.row.component for d in moved if d.row.component != first))
        pytest.fail(
            f"{first!r} moved, the first component of the golden table that did. If that is meant, raise its version "
            "and run `python -m tests.golden --update`; otherwise undo it.\n"
            + "\n".join(f"  {d}" for d in moved if d.row.component == first)
            + f"\n{len(others)} components below moved too, perhaps for that: {', '.join(others) or 'none'}.",
            pytrace=False,
        )
    assert [row[:2] for row in today] == list(table), (
        "run `python -m tests.golden --update`: rows are gone or reordered"
    )
    stale = {name for (name, _), recorded in table.items() if recorded.version != golden.version(name)}
    assert not stale, f"run `python -m tests.golden --update`: other versions are recorded of {', '.join(stale)}"


def test_every_registered_part_has_its_rows():
    ours = [
        *(f"model {name}" for name in models.MODELS if models.get(name).factory.__module__.startswith("dmmlib")),
        *(f"method {name}" for name in unlearn.names() if unlearn.get(name).run.__module__.startswith("dmmlib")),
        *(
            f"attributor {name}"
            for name in attribution.names()
            if attribution.get(name).__module__.startswith("dmmlib") and name not in EXTRAS
        ),
    ]
    assert set(ours) <= set(golden.COMPONENTS)
    assert {name for name, _ in golden.read()} == set(golden.COMPONENTS)


# --- changes of the library ----------------------------------------------------------------------------


def edit(function, old, new):
    """A change of a function's text, wherever it is known by name already; decorators and defaults stay."""

    function = inspect.unwrap(function)

    def make(patch):
        text = textwrap.dedent(inspect.getsource(function))
        assert old in text, f"{function.__qualname__} no longer says {old!r}: change this test with it"
        tree = ast.parse(text.replace(old, new))
        tree.body[0].decorator_list.clear()
        made = {}
        code = compile(tree, "<edit>", "exec", flags=__future__.annotations.compiler_flag)
        exec(code, function.__globals__, made)
        patch.setattr(function, "__code__", made[function.__name__].__code__)

    return make


def put(owner, name, value):
    """Another value under a name of a module."""
    return lambda patch: patch.setattr(owner, name, value)


def default(name, value, *functions):
    """Another default of a parameter."""

    def make(patch):
        for function in functions:
            given = [p for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
            assert name in [p.name for p in given]
            patch.setattr(function, "__defaults__", tuple(value if p.name == name else p.default for p in given))

    return make


CHANGES = {
    "points drawn in order": ("data set digits", edit(data.load, "rng.permutation(len(x))", "np.arange(len(x))")),
    "another hash of a stream's name": ("seeds", edit(Trainer.seeds, "zlib.crc32", "zlib.adler32")),
    "masks of the last points": ("seeds", edit(Trainer.random_masks, "[:size]", "[-size:]")),
    "generators that models share": ("seeds", edit(unlearn.Problem.rngs, "[self.seed, i", "[self.seed + i")),
    "another range of pixels": ("model linear", edit(models.normalise, "/ 255", "/ 256")),
    "another activation": ("model mlp", edit(models.get("mlp").factory, "nn.ReLU()", "nn.Tanh()")),
    "batches unshuffled": ("batches", edit(ensemble.epoch_batches, "rng.permutation(pool)", "pool")),
    "no warm-up": ("schedule", edit(ensemble.Training.rate, "progress / self.warmup", "1.0")),
    "SGD, fused: no Nesterov": ("optimizer sgd", edit(SGD.update, "nesterov=self.nesterov", "nesterov=False")),
    "SGD, plain: no momentum": ("optimizer sgd", edit(SGD.update, ".mul_(self.momentum)", ".mul_(0.0)")),
    "Adam: another epsilon": ("optimizer adam", default("epsilon", 1e-6, Adam.__init__)),
    "Adam, plain: no bias correction": ("optimizer adam", edit(Adam.update, " / (1 - self.beta1**t)", "")),
    "losses summed over a batch": ("engine", edit(ensemble.cross_entropy, ".mean(1)", ".sum(1)")),
    "rates of the step before": ("engine", edit(ensemble.train_and, "step + 0.5", "step")),
    "a margin over the best other class": ("metric margin", edit(metrics.margins, ".logsumexp(2)", ".amax(2)")),
    "KLoM: another floor": ("metric klom", put(metrics, "FLOOR", 1e-4)),
    "KLoM: another number of bins": ("metric klom", default("n_bins", 10, metrics.klom)),
    "KLoM: another clip": ("metric klom", put(metrics, "CLIP", 90.0)),
    "KLoM: narrower intervals": ("metric klom", edit(metrics.klom_summary, "std(ddof=1)", "std(ddof=1) * 0.8")),
    "U-LiRA: a scale of all": ("metric u_lira", edit(metrics.u_lira, "fitted.std(0, ddof=1)", "fitted.std()")),
    "ridge: twice the penalty": (
        "ridge",
        edit(datamodels.RidgeDatamodel.fit_all.__func__, "add_(lam)", "add_(2 * lam)"),
    ),
    "predicted logits out of gauge": ("predicted oracle", edit(datamodels.retrained, "moved - wrong", "moved")),
    "lowest instead of highest": ("forget sets", edit(forget_sets.highest, "argsort(-scores", "argsort(scores")),
    "fine-tuning that does not descend": ("finetune", put(unlearning, "descend", lambda *args, **more: None)),
    "costs without what was spent": ("finetune", edit(unlearn.finetune, "spent + np.cumsum", "np.cumsum")),
    "whitening: twice the damping": (
        "whitening",
        edit(whitening.Whitening.enter, "self.damping * mean", "2 * self.damping * mean"),
    ),
    "inner products doubled": (
        "attribution gradients",
        edit(kernel.products, ".float()", ".float() * 2"),
    ),
    "less caution with noisy slopes": ("calibration", edit(margins.slope, "ff / 2", "ff / 4")),
    "linearised: another penalty": (
        "attributor linearised",
        default("lam", 0.01, linearised.linearised_response, linearised.linearised),
    ),
    "Bayesian: a scale that noise shrinks": (
        "attributor bayesian",
        put(bayesian, "slope", lambda yf, ff, noise: yf / ff),
    ),
    "Bayesian: a wider posterior": (
        "attributor bayesian",
        edit(bayesian.BayesianDatamodel.sd, "missing**2", "2 * missing**2"),
    ),
    "kernel: easy points harder": ("attributor kernel", put(kernel, "EASY", 0.3)),
    "LASSO: smaller penalties": ("attributor lasso", edit(lasso.Solver.solve, "shares *", "0.9 * shares *")),
    "Gauss-Newton: another damping": ("gauss-newton", put(gauss_newton, "DAMPING", 0.1)),
    "Gauss-Newton: twice the ridge": ("gauss-newton", edit(gauss_newton.Jacobian.solve, "ridge * k", "2 * ridge * k")),
    "matching: F is not met": ("matching", put(matching, "RIDGE_FORGET", 0.1)),
    "matching: margins that jump": ("matching", edit(matching.match, ".clamp(-farthest, farthest)", "")),
    "GA descends": ("method ga", edit(unlearn.get("ga").run, "sign=-1.0", "sign=1.0")),
    "SCRUB without cross-entropy": (
        "method scrub",
        edit(unlearn.get("scrub").run, "gamma * cross", "0 * cross"),
    ),
    "SSD: fewer weights": ("method ssd", edit(dampening.dampen, "> alpha *", "> 2 * alpha *")),
    "Newton: half a step": (
        "method newton",
        edit(newton.newton, "len(problem.forget) /", "0.5 * len(problem.forget) /"),
    ),
    "another percentile scores": ("search", edit(tuning.score, "95", "90")),
    "accuracy gaps turned round": (
        "results",
        edit(evaluation.evaluate, "(result.correct, correct", "(correct, result.correct"),
    ),
}


@pytest.fixture
def quicker(monkeypatch):
    """Leaves out the one file that takes long to read, and that nothing else comes from."""
    others = {name: found for name, found in golden.COMPONENTS.items() if name != "data set fashion-mnist"}
    monkeypatch.setattr(golden, "COMPONENTS", others)


@pytest.mark.usefixtures("quicker")
@pytest.mark.parametrize(("component", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed_and_its_component_named(monkeypatch, today, component, change):
    change(monkeypatch)
    found = first_difference(today)
    assert found is not None, "no number moved"
    assert found.row.component == component, str(found)


def under_another_name(function):
    def renamed(*args, **more):
        return function(*args, **more)

    return renamed


OTHER_NAMES = [
    put(module, name, under_another_name(function))
    for module in (ensemble, metrics, bayesian, datamodels)
    for name, function in vars(module).items()
    if name.startswith("_") and inspect.isfunction(function) and function.__module__ == module.__name__
]
OTHER_WORDS = [
    edit(metrics.u_lira, "log_density", "log_likelihood"),
    edit(unlearn.finetune, "trajectory", "margins_on_the_way"),
    edit(unlearn.draw_batches, "-(-n_steps * size // len(pool))", "math.ceil(n_steps * size / len(pool))"),
    edit(datamodels.RidgeDatamodel.fit_all.__func__, "(a @ a.T if", "(torch.matmul(a, a.T) if"),
]


def test_harmless_changes_fail_nothing(monkeypatch, today):
    for change in OTHER_NAMES + OTHER_WORDS:
        change(monkeypatch)
    assert first_difference(today) is None


# --- recording -----------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path, monkeypatch, today):
    """A table of today's numbers, to be written over."""
    path = tmp_path / "golden.csv"
    with monkeypatch.context() as patch:
        patch.setattr(golden, "rows", lambda: iter(today))
        golden.update(path)
    return path


def test_a_moved_number_is_recorded_only_with_a_raised_version(monkeypatch, table, today, capsys):
    text, before = table.read_text(), golden.read(table)
    edit(metrics.ks, "return _ks", "return 2 * _ks")(monkeypatch)
    last = max(i for i, row in enumerate(today) if row.component == "metric ks")  # nothing below comes from it
    now = [*islice(golden.rows(), last + 1), *today[last + 1 :]]
    monkeypatch.setattr(golden, "rows", lambda: iter(now))
    with pytest.raises(SystemExit, match="The version of 'metric ks' is 1, as recorded"):
        golden.main(["--update", "--table", str(table)])
    assert table.read_text() == text

    version = golden.version
    monkeypatch.setattr(golden, "version", lambda name: version(name) + (name == "metric ks"))
    golden.main(["--update", "--table", str(table)])
    assert "3 moved, 0 new, 0 gone" in capsys.readouterr().out
    after = golden.read(table)
    assert list(before) == list(after)
    for key, recorded in before.items():
        if key[0] == "metric ks":
            assert after[key].version == 2
            moved = key[1].startswith("mean")
            assert (after[key].value != recorded.value) == moved
            assert "p-value" in key[1] or not moved or after[key].value == pytest.approx(2 * recorded.value)
        else:
            assert after[key] == recorded


def moving(today, *components, by=1.1):
    """Rows of which all numbers of some components moved."""
    return lambda: (row._replace(value=row.value * (by if row.component in components else 1)) for row in today)


def test_a_raised_version_stands_for_what_comes_from_it_and_for_nothing_else(monkeypatch, table, today):
    version = golden.version
    monkeypatch.setattr(golden, "version", lambda name: version(name) + (name == "finetune"))
    monkeypatch.setattr(golden, "rows", moving(today, "finetune", "metric ks", "method gd"))
    with pytest.raises(SystemExit, match="metric ks"):
        golden.update(table)
    monkeypatch.setattr(golden, "rows", moving(today, "finetune", "method gd", "search"))
    golden.update(table)
    assert golden.read(table)["method gd", "mean margin on F"].version == 1
    monkeypatch.setattr(golden, "rows", moving(today))
    with pytest.raises(SystemExit, match="finetune"):
        golden.update(table)


def test_small_moves_do_not_add_up(monkeypatch, table, today):
    before = table.read_text()
    monkeypatch.setattr(golden, "rows", moving(today, *golden.COMPONENTS, by=1 + 1e-10))
    golden.update(table)
    assert table.read_text() == before


def test_nan_has_moved():
    assert not golden.agrees(golden.Row("engine", "", float("nan")), golden.Recorded(1, 1.0))
