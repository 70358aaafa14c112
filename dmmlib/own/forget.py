"""Answer a request: move a model of one's own to what it would answer had it never seen some points."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dmmlib import unlearn
from dmmlib.datamodels import Attributor, Indices
from dmmlib.ensemble import initialise
from dmmlib.errors import ForgetSetError, MethodError, ModelError
from dmmlib.forget_sets import check_forget_indices
from dmmlib.matching.match import LARGEST, predicted_oracle
from dmmlib.metrics import correct, margins
from dmmlib.own import audit as audits
from dmmlib.own import record
from dmmlib.own.prepare import Prepared
from dmmlib.own.requests import resolve
from dmmlib.own.weights import Model, answered, bare, loaded, with_weights
from dmmlib.stacking import copied
from dmmlib.study import Study

STEPS, STEP = 4, 100  # of matching, and how many points each sees at least
ANEW = 0.05  # of training points: in benchmarks/results/sequence.txt a fifth of what they show is then left
MADE: dict[tuple[str, str], np.ndarray] = {}  # points that models made here have forgotten, by their weights and data
FAR = 0.05  # of points, or four standard deviations, by which accuracies may differ from the recipe's without a warning


@dataclass(frozen=True)
class Result:
    """An unlearned model, and what was predicted of it."""

    model: nn.Module  # of the same class, unlearned
    original: nn.Module  # as it was given
    prepared: Prepared | Study = field(repr=False)
    name: str  # of the request
    method: str
    forget: np.ndarray  # points of this request, indices of training points
    forgotten: np.ndarray  # these and those of earlier requests
    before: np.ndarray = field(repr=False)  # logits (n_points, n_classes), training points first, as it was given
    after: np.ndarray = field(repr=False)  # and unlearned
    predicted: np.ndarray = field(repr=False)  # margins (n_points,) of the model, had it never seen the points
    sd: np.ndarray | None = field(repr=False)  # their standard deviation, as far as the attributor knows it
    cost: float  # sample gradients, relative to one retraining
    options: dict[str, Any] = field(default_factory=dict)  # of the method

    def margins(self, when: str = "after") -> np.ndarray:
        """Margins (n_points,) "before" or "after"."""
        return margins(getattr(self, when)[None], self.prepared.data.y)[0]

    @property
    def anew(self) -> str:
        """From when on to prepare anew: predictions come from models that hold what was forgotten."""
        n, total = len(self.forgotten), self.prepared.data.n_train
        when = f"once {ANEW:.0%} are" if n < ANEW * total else "before the next request"
        return f"{n} of {total:,} training points are forgotten in all; prepare anew {when}."

    def audit(self, retrained: Sequence[Model] = (), *, relearn: bool = True) -> audits.Audit:
        """Judge whether it worked; see `audit.audit`."""
        return audits.audit(self, retrained, relearn=relearn)

    def save(self, folder: str | Path, audit: audits.Audit | None = None) -> Path:
        """Write model.safetensors and record.json to a folder; StoreError if it cannot be, or holds another's."""
        return record.save(self, folder, audit)

    def report(self, path: str | Path, audit: audits.Audit | None = None) -> Path:
        """Write a page to read, with an audit, which is made if None."""
        return record.report(self, path, audit or self.audit())


def given(original: Model, model: Model, forget: Any, prepared: Prepared | Study) -> Result:
    """A result of unlearning by whatever tool, to be audited: models before and after it, and what was forgotten."""
    indices, name, source, gone = asked(original, forget, prepared)
    modules = (source, loaded(model, prepared))
    before, after = (answered(part, prepared) for part in modules)
    if not len(gone):
        _compare(before, prepared)
    attributor = Later(prepared.attributor(), gone) if len(gone) else prepared.attributor()
    moved, both = attributor.retrained(before[None], indices, prepared.data.y), np.union1d(indices, gone)
    predicted, sd = margins(moved, prepared.data.y)[0], attributor.sd(both)
    return Result(modules[1], modules[0], prepared, name, "given", indices, both, before, after, predicted, sd, 0.0)


def asked(model: Model, forget: Any, prepared: Any, after: Any = None) -> tuple[np.ndarray, str, nn.Module, np.ndarray]:
    """Points and name of a request, the module with the model's weights, and points forgotten before."""
    if not isinstance(prepared, (Prepared, Study)):
        raise ModelError(f"prepared is a {type(prepared).__name__}; give what prepare(...) returned.")
    (indices, called), original = resolve(forget, prepared.data), loaded(model, prepared)
    gone = np.asarray(getattr(after, "forgotten", () if after is None else after))
    gone = check_forget_indices(gone, prepared.data.n_train) if gone.size else np.empty(0, np.int64)
    if isinstance(model, (str, Path)):
        gone = np.union1d(gone, record.earlier(Path(model), original.state_dict(), prepared.data))
    made, weights = getattr(after, "model", None), record.sha256(original.state_dict())
    gone = np.union1d(gone, MADE.get((weights, prepared.data.sha256), gone))
    if made is not None and record.sha256(made.state_dict()) != weights:
        raise ModelError("The model is not the one that the request before (after=) made; give its result's model.")
    if len(again := np.intersect1d(indices, gone)):
        who = (again if prepared.data.ids is None else prepared.data.ids[again])[0]
        raise ForgetSetError(f"Point {who} was forgotten by an earlier request; leave it out.")
    return indices, called, original, gone


class Later(Attributor):
    """What leaving points out does to a model that others have left already."""

    def __init__(self, of: Attributor, gone: np.ndarray) -> None:
        self._of, self._gone = of, gone

    def effects(self, forget_sets: Any) -> np.ndarray:
        together = [np.union1d(forget, self._gone) for forget in forget_sets]
        return self._of.effects(together) - self._of.effect(self._gone)

    def predict(self, masks: np.ndarray) -> np.ndarray:
        return self._of.predict(masks)

    def sd(self, forget: Indices) -> np.ndarray | None:
        return self._of.sd(np.union1d(forget, self._gone))


def forget(
    model: Model,
    forget: Any,
    prepared: Prepared | Study,
    *,
    method: str = "dmm",
    name: str | None = None,
    after: Result | Indices | None = None,
    **options: Any,
) -> Result:
    """Make a model forget training points; the model that is given stays as it is.

    >>> from tempfile import TemporaryDirectory
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(60, 40), torch.arange(60) % 2
    >>> def fit(model, x, y, seed):
    ...     optimizer = torch.optim.Adam(model.parameters(), 0.05)
    ...     for _ in range(30):
    ...         optimizer.zero_grad()
    ...         nn.functional.cross_entropy(model(x), y).backward()
    ...         optimizer.step()
    ...     return model
    >>> recipe = Recipe(lambda: nn.Linear(40, 2), (x[:50], y[:50], x[50:], y[50:]), fit)
    >>> model = fit(recipe.model(), x[:50], y[:50], seed=0)
    >>> with TemporaryDirectory() as folder:
    ...     result = forget(model, [3, 7], prepare(recipe, models=10, folder=folder))
    >>> bool((result.margins("before") > result.margins("after"))[[3, 7]].all())
    True

    Args:
        model: a module that the recipe trained on all points, its state, or a .safetensors or .pt file of that; of a
            later request the result's model.
        forget: ids or indices, a file of them, a folder, or a class; see `requests.resolve`.
        prepared: what `prepare` made, or a `Study`, whose originals can be given.
        method: a registered method that makes models, with its options.
        name: of the request, on which chance depends; its file's, or "request".
        after: the result of the request before this one, or all points forgotten before. Models that this process made
            are known by their weights, and saved ones by their record.

    Raises ForgetSetError, ModelError, StoreError, MethodError: one line each, before anything is computed.
    """
    check_method(method, options, prepared)
    indices, called, original, gone = asked(model, forget, prepared, after)
    registered, by = unlearn.get(method), method.partition("@")[2]
    alone, before = initialise(lambda: original, [0], prepared.device), answered(original, prepared)[None]
    attributor = prepared.attributor(by) if isinstance(prepared, Study) and by else prepared.attributor()
    called, points = name or called, (prepared.x, prepared.y, prepared.data.n_train)
    predictor, seed = Later(attributor, gone) if len(gone) else attributor, prepared.seeds(f"unlearn:{called}", 1)[0]
    both = np.union1d(indices, gone)
    problem = unlearn.Problem(alone, before, *points, both, prepared.training, predictor, seed=seed)
    if not len(gone):
        _compare(before[0], prepared)
    options = _usual(method, problem, prepared) | options
    made = registered.run(problem, **options)
    if made.models is None:
        raise MethodError(f"{method} makes no models; use one that does, such as dmm.")
    if not np.isfinite(made.margins).all():
        raise MethodError(f"{method} with {options} gave NaN answers; lower its rate. The model is as it was.")
    given = original  # also of a model in half precision, which would lose a part of the steps
    if isinstance(model, nn.Module) and all(v.dtype.itemsize >= 4 for v in model.parameters()):
        given = bare(model, original)
    unlearned, answers = with_weights(copied(given), made.models), made.models.logits(prepared.x).numpy()[0]
    if (weights := record.sha256(unlearned.state_dict())) != record.sha256(original.state_dict()):
        MADE[weights, prepared.data.sha256] = both
    found = (answers, margins(predicted_oracle(problem), prepared.data.y)[0], predictor.sd(both), made.cost)
    return Result(unlearned, given, prepared, called, method, indices, both, before[0], *found, options)


def check_method(method: str, options: dict[str, Any], prepared: Prepared | Study | None = None) -> None:
    """Raise MethodError or OptionError for a method, or its options, that `forget` cannot take."""
    unlearn.check_setting(method, options)
    own, _, by = method.partition("@")
    registered = unlearn.get(method)
    if registered.rewinds or not registered.alone:
        why = "needs it as it was earlier in its training" if registered.rewinds else "makes no model of one alone"
        raise MethodError(f"{method} {why}; use a method that moves a trained model, such as dmm, newton or scrub.")
    if by and not isinstance(prepared, Study):
        raise MethodError(f"{method} names an attributor; a recipe has its own: give {own}.")


def _usual(method: str, problem: unlearn.Problem, prepared: Prepared | Study) -> dict[str, Any]:
    """Options of a method where none are given: a study's; else each step of matching sees all of F, and R as well."""
    if isinstance(prepared, Study):
        return prepared.tuned(method)
    if method.partition("@")[0] != "dmm":
        return {}
    size = min(LARGEST, problem.n_train, max(2 * len(problem.forget), STEP))
    return {"cost": max(0.03, STEPS * size / problem.retraining)}


def _compare(logits: np.ndarray, prepared: Prepared | Study) -> None:
    """Warn where a model (n_points, n_classes) is right about much more or fewer points than models of its recipe."""
    context, n, y = prepared.context(), prepared.data.n_train, prepared.data.y
    right, expected = correct(logits[None], y)[0], correct(np.asarray(context.outputs[: len(context.masks)]), y)
    seen = np.array([row[:n][mask].mean() for row, mask in zip(expected, context.masks, strict=True)])
    for what, part, others in (("training", right[:n], seen), ("validation", right[n:], expected[:, n:].mean(1))):
        own = part.mean()
        if abs(own - others.mean()) > max(FAR, 4 * others.std()):
            warnings.warn(
                f"The model answers {own:.1%} of {what} points correctly, models of its recipe {others.mean():.1%} +- "
                f"{others.std():.1%}: it was made of other data or in another way, so predictions may not hold for it.",
                stacklevel=3,
            )
