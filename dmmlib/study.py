"""A run of the study: what a preset asks for, computed once, kept on disk under its key, for the notebooks.

Properties only read; what may train, fit or write is a method. Everything resumes: trained models lie in stores
(`trainer`), unlearned results and searches beside them, each under the hash of exactly what it depends on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dmmlib import attribution, datamodels, evaluation, files, forget_sets, keys, metrics, presets, tuning, unlearn
from dmmlib.data import Dataset
from dmmlib.errors import ForgetSetError, MethodError, PresetError
from dmmlib.files import check_alone, config_hash, folded, kept, read_json, replacing, write_json, write_table
from dmmlib.forget_sets import ForgetSet
from dmmlib.prediction import Models
from dmmlib.progress import Progress
from dmmlib.registry import check_call
from dmmlib.trainer import once
from dmmlib.unlearn import Method, Problem, Unlearned

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure


class Study(Models):
    """A validated preset and all that follows from it.

    >>> study = Study("smoke")
    >>> study.data.n_train, study.preset.ensembles.n_models
    (400, 20)

    Args:
        preset: a name in presets/, a path, or a mapping.
        overrides: dotted key -> value; see `presets.load`.
        forget_set: a JSON file of a forget set to study instead of the preset's.
        beside: study that set beside the preset's, not instead of them.
        runs, progress: see `Trainer`.
        figures: directory for figures; see `files.figures_of`.

    Raises:
        PresetError, DataError, ForgetSetError, MethodError, DeviceError: one line each, before any training.
    """

    def __init__(
        self,
        preset: str | Path | Mapping[str, Any] = "laptop",
        overrides: Mapping[str, Any] | None = None,
        *,
        forget_set: str | Path | None = None,
        beside: bool = False,
        runs: str | Path | None = None,
        figures: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(preset, overrides, runs=runs, progress=progress)
        for method in self.preset.unlearning.methods:
            unlearn.get(method)
            attribution.get(method.partition("@")[2] if "@" in method else self.preset.attribution.name)
        for method, options in self.preset.unlearning.settings.items():
            unlearn.check_setting(method, options)
        name, options = self.preset.attribution.name, self.preset.attribution.options
        check_call(f"attributor {name!r}", attribution.get(name), None, **options)
        self.figures = Path(figures or files.figures_of(runs)).absolute()
        taken = _checked(self.preset, self.data, alone=beside and not forget_set)
        self.own = forget_sets.load(Path(forget_set), self.data) if forget_set else None
        self._beside, self._attributors = beside, dict[str, datamodels.Attributor]()
        check_alone(self.directory, PresetError)
        check_alone(self.output, ForgetSetError)
        if beside and self.own is not None and folded(self.own.name) in map(folded, taken):
            had = f"The preset has a forget set {self.own.name!r} already"
            raise ForgetSetError(f"{had}; save yours under another name to study it beside.")

    @property
    def methods(self) -> list[str]:
        """The preset's methods; the two ends of the scale, doing nothing and retraining, are always among them."""
        own = self.preset.unlearning.methods
        return [*(m for m in ("do_nothing", "retrain") if m not in own), *own]

    # --- places ----------------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """Where this preset's forget sets lie."""
        return self.runs / self.preset.name

    @property
    def output(self) -> Path:
        """Where this run's notebooks and tables lie; with a forget set of one's own apart from the preset's."""
        if self.own is None:
            return self.directory
        return self.directory / f"forget_set-{self.own.name}{'-beside' if self._beside else ''}"

    def save_table(self, table: pd.DataFrame, name: str) -> Path:
        """Write a table to the run's directory as CSV, atomically; see `files.write_table`."""
        path = files.inside(self.output, name)
        write_table(path, table)
        return path

    def save_figure(self, figure: Figure, name: str) -> Path:
        """Write a figure to <figures>/<preset>/<name>.png; see `output` for a forget set of one's own."""
        path = files.inside(self.figures / self.output.relative_to(self.runs), f"{name}.png")
        about = {"Software": None, "Description": str(figure.get_label())}
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", metadata=about)
        return path

    def show(self, figure: Figure, name: str) -> Image:
        """Save a figure and return it as the image that was saved, for a notebook to display."""
        import matplotlib.pyplot as plt
        from IPython.display import Image

        path = self.save_figure(figure, name)
        plt.close(figure)
        return Image(data=path.read_bytes(), alt=str(figure.get_label()) or name)

    # --- attributors -----------------------------------------------------------------------------------

    def search_datamodel(self) -> pd.DataFrame:
        """Every ridge penalty and share of it on own weights, scored on the tuning sets; kept on disk.

        The LDS, a rank correlation, is blind to scale; so the score is that of `search`, of DM-direct.
        """

        sets = [f.indices for f in self.tuning_sets().values()]
        ridge = self.ridge([(one["lam"], one["own_share"]) for one in self.preset.datamodels.grid], sets)

        def dm_direct(problem: Problem, lam: float, own_share: float) -> Unlearned:
            return unlearn.get("dm_direct")(dataclasses.replace(problem, attributor=ridge(lam, own_share)))

        # Ridge keeps the coarser measure that its replications were chosen by; the sharper one likes ridge less.
        n, config = self.preset.tuning.n_models, {"datamodels": keys.ridge(self.preset)} | keys.method("dm_direct")
        return self._search("datamodel", dm_direct, self.preset.datamodels.grid, config, "", n)

    @once
    def datamodel(self) -> datamodels.Gauged:
        """Ridge on the raw logits of all M subset models, with the setting that did best on the tuning sets."""
        best = self.search_datamodel().iloc[0]
        return self.ridge([setting := (float(best["lam"]), float(best["own_share"]))])(*setting)

    def attributor(self, name: str = "") -> datamodels.Attributor:
        """An attributor, fitted once and kept on disk; by default what DM-direct, DMM and the widget use.

        Ridge has the many subset models of `datamodels`, others those of `context`.
        """
        name = name or self.preset.attribution.name
        if name == "ridge":
            return self.datamodel()
        config = keys.fitted(self.preset, name) | {"models": self.identity, "n_models": self.preset.ensembles.n_models}
        key = config_hash(config)

        def fit() -> datamodels.Attributor:
            self.progress(f"fit the attributor {name}", 0, 1)
            lent = dataclasses.replace(self.context(), masks=self.context().masks.copy())
            made = attribution.fit(name, lent, **config["attribution"]["options"])
            self.progress(f"fit the attributor {name}", 1, 1)
            return made

        if key not in self._attributors:
            path = self.runs / "store" / f"attributor-{name}-{key}.npz"
            self._attributors[key] = attribution.kept(path, self.device, fit)
        return self._attributors[key]

    # --- forget sets -----------------------------------------------------------------------------------

    @once
    def forget_sets(self) -> dict[str, ForgetSet]:
        """The reported forget sets by name, which share no point; also saved as JSON in the run's directory."""
        own = {} if self.own is None else {self.own.name: self.own}
        return self._make_forget_sets(() if own and not self._beside else self.preset.forget_sets) | own

    @once
    def tuning_sets(self) -> dict[str, ForgetSet]:
        """Forget sets for the search of hyperparameters: they share no point with the preset's own.

        They do not depend on a forget set of one's own, so that what was found on them serves every request.
        """
        standard = self.forget_sets() if self.own is None else self._make_forget_sets(self.preset.forget_sets)
        reported = np.unique(np.concatenate([f.indices for f in standard.values()]))
        return forget_sets.chosen_on(self._make_forget_sets(self.preset.tuning.forget_sets, reported), self.own)

    def _make_forget_sets(
        self, sections: Iterable[presets.ForgetSetSection], exclude: np.ndarray | None = None
    ) -> dict[str, ForgetSet]:
        """Choose sets in their order, none with a point of an earlier one or of `exclude`."""
        made = {}
        for part in sections:
            rng = np.random.default_rng(self.seeds(f"forget:{part.name}", 1)[0])
            points = self.data, lambda: self.features[: self.data.n_train], self.loadings
            indices = forget_sets.choose(part, *points, rng, exclude)
            how = part.model_dump(exclude={"name"})
            made[part.name] = forget_sets.make(part.name, indices, self.data, preset=self.preset.name, **how)
            made[part.name].save(self.directory / "forget_sets" / f"{part.name}.json")
            exclude = indices if exclude is None else np.concatenate([exclude, indices])
        return made

    # --- unlearning ------------------------------------------------------------------------------------

    def problem(self, forget_set: ForgetSet, method: str = "", tuning: bool = False) -> Problem:
        """The unlearning problem of a forget set, with fewer models and no trajectory for tuning.

        It has an attributor where the method takes one: that which its name says after @, or the preset's.
        """
        forget, attributed = self.splits(forget_set)["forget"], method and unlearn.get(method).attributed
        share, then = self.earlier() if method and unlearn.get(method).rewinds else (0.0, None)
        n = self.preset.tuning.n_models if tuning else self.preset.ensembles.n_models
        return Problem(
            originals=self.originals()[:n],
            original_logits=self.original_logits()[:n],
            x=self.x,
            y=self.y,
            n_train=self.data.n_train,
            forget=forget,
            training=self.training,
            attributor=self.attributor(method.partition("@")[2]) if attributed else None,
            oracle_logits=self.oracles(forget_set, floor=True, n=n),
            earlier=None if then is None else (share, then[:n]),
            checkpoints=0 if tuning else self.preset.unlearning.checkpoints,
            follow=slice(None) if tuning else forget,
            seed=self.seeds(f"unlearn:{forget_set.name}", 1)[0],
            execution=self.fine_tuning(),
        )

    def search(self, method: str) -> pd.DataFrame:
        """Every setting tried of a method on the tuning sets, best first; see `tuning.search`. Kept on disk."""
        config = keys.method(method) | keys.attributed(self.preset, method, self.tuning_sets)
        settings = unlearn.configurations(method, self.preset.tuning.budget, self.preset.seed)
        return self._search(method, unlearn.get(method), settings, config, method, self.preset.ensembles.n_models)

    def _search(
        self, name: str, method: Method, settings: list[dict[str, Any]], config: dict[str, Any], problem_of: str, n: int
    ) -> pd.DataFrame:
        """Settings of a method, measured against n oracles on the tuning sets, best first.

        Its problems are those of the registered method `problem_of`, attributor included; with none if "".
        """
        sets = self.tuning_sets()
        config |= keys.searched(self.preset, self.identity, settings, sets, n) | keys.apart(self.data)
        path = self.runs / "store" / f"search-{name}-{config_hash(config)}.json"

        def trial(name: str, forget_set: ForgetSet) -> tuning.Trial:
            oracles = metrics.margins(self.oracles(forget_set)[:n], self.data.y)
            problem = self.problem(forget_set, problem_of, tuning=True)
            return tuning.Trial(name, problem, oracles, self.splits(forget_set, probes=False))

        def search() -> list[dict[Any, Any]]:
            trials = [trial(*named) for named in sets.items()]
            how, halve = self.side_by_side() if problem_of else tuning.ALONE, bool(problem_of)
            return tuning.search(name, method, settings, trials, self.progress, halve, how).to_dict("records")

        return pd.DataFrame(kept(path, search, read_json, write_json))

    def tuned(self, method: str) -> dict[str, Any]:
        """The preset's setting of a method, or the best on the tuning sets and where to `stop`; {} if it has none."""
        if len(settings := self._settings(method)) == 1:
            return settings[0]
        best = self.search(method).iloc[0]
        return settings[int(best["setting"])] | ({"stop": float(best["stop"])} if best["stop"] < 1 else {})

    def _settings(self, method: str) -> list[dict[str, Any]]:
        if method in self.preset.unlearning.settings:
            return [dict(self.preset.unlearning.settings[method])]
        return unlearn.configurations(method, self.preset.tuning.budget, self.preset.seed)

    def key_of(self, method: str, setting: dict[str, Any], forget_set: ForgetSet) -> dict[str, Any]:
        """All that the result of a method with a setting on a forget set depends on."""
        attributed = keys.attributed(self.preset, method, self.tuning_sets)
        return keys.unlearned(self.preset, self.identity, method, setting, forget_set) | attributed

    def unlearned(self, method: str, forget_set: ForgetSet, models: bool = False) -> Unlearned:
        """The result of a method, tuned, on a forget set; kept on disk, but for its `models`, made anew if asked.

        Models that diverge count as `Unlearned.finite` says, or raise MethodError where no setting was searched.
        """
        forget_set, setting = forget_sets.checked(forget_set, self.data), self.tuned(method)
        key = config_hash(self.key_of(method, setting, forget_set))
        path = self.runs / "store" / f"unlearned-{method}-{key}.npz"

        def result() -> Unlearned:
            problem, moved = self.problem(forget_set, method), self.x._version
            options = {k: v for k, v in setting.items() if k != "stop"}
            made = unlearn.get(method)(dataclasses.replace(problem, stop=setting.get("stop", 1.0)), **options)
            if self.x._version != moved:
                raise MethodError(f"{method} changed the points it was given; let it change a copy, and start anew.")
            if made.diverged.any() and len(self._settings(method)) == 1:  # which nobody tried before
                raise MethodError(f"{method} with {setting} gave NaN margins on {forget_set.name!r}; lower its rate.")
            return made

        found = result() if models else kept(path, result, Unlearned.load, lambda path, made: made.save(path))
        return found.finite(self.data.n_classes, f"{method} with {setting} on {forget_set.name!r}")

    # --- results ---------------------------------------------------------------------------------------

    def train_oracles(self) -> None:
        """Train the oracles of all forget sets, at once where there are workers for it."""
        self.train(*(self.oracle_set(f, floor) for f in self.forget_sets().values() for floor in (False, True)))

    def evaluate(self, method: str, forget_set: ForgetSet) -> list[dict[str, Any]]:
        """Rows of the tidy table: the statistics of a method on a forget set, with intervals; see `evaluation`."""
        found = self.unlearned(method, forget_set)
        rows = evaluation.evaluate(found, *self.reference(forget_set), self.splits(forget_set))
        return [{"forget_set": forget_set.name, "size": len(forget_set), "method": method, **row} for row in rows]

    def results(self) -> pd.DataFrame:
        """All methods on all forget sets, tidy: one row per forget set, method, split and statistic."""
        self.train_oracles()
        rows: list[dict[str, Any]] = []
        pairs = [(f, m) for f in self.forget_sets().values() for m in self.methods]
        for i, (forget_set, method) in enumerate(pairs):
            self.progress("unlearn and measure", i, len(pairs))
            rows += self.evaluate(method, forget_set)
        self.progress("unlearn and measure", len(pairs), len(pairs))
        return pd.DataFrame(rows)

    def trajectories(self) -> pd.DataFrame:
        """What happens to F along the way: forget_set, method, and the columns of `evaluation.trajectory`."""
        rows = []
        for forget_set in self.forget_sets().values():
            margins = self.reference(forget_set)[0][:, forget_set.indices]
            for method in self.methods:
                along = evaluation.trajectory(self.unlearned(method, forget_set), margins)
                rows += [(forget_set.name, method, *row) for row in along]
        return pd.DataFrame(rows, columns=["forget_set", "method", *evaluation.TRAJECTORY])


def _checked(preset: presets.Preset, data: Dataset, alone: bool) -> list[str]:
    """The names of all forget sets; raises where they do not fit the data or one another, or none is `beside` them."""
    if alone:
        raise ForgetSetError("beside was given without a forget set to study; give its file as forget_set, too.")
    every, n = (*preset.forget_sets, *preset.tuning.forget_sets), data.n_train
    for part in every:
        if part.size is not None and part.size >= n:
            raise ForgetSetError(f"Forget set {part.name!r} asks for {part.size} of {n} training points; leave some.")
        for key, most in {"point": n - 1, "component": n - 1, "label": data.n_classes - 1}.items():
            if (given := getattr(part, key)) > most:
                raise ForgetSetError(f"Forget set {part.name!r} has {key} {given}; give at most {most}.")
        if part.kind == "class" and not (data.y_train == part.label).any():
            raise ForgetSetError(f"Forget set {part.name!r}: none of the training points is of class {part.label}.")
        if part.kind == "ids":
            forget_sets.of_ids(data, part.ids or "", part.size, np.random.default_rng(0))
    if (total := sum(part.size or 0 for part in every)) > n:
        raise ForgetSetError(f"The forget sets share no point, but ask for {total} of {n} points; ask for fewer.")
    for key in ("datamodels", "attribution"):
        share = getattr(preset, key).fraction
        if not 0 < round(share * n) < n:
            raise PresetError(f"{key}.fraction={share} of {n} training points is none or all; give some between.")
    names = [part.name for part in every]
    for what, given in (("forget sets", names), ("methods", preset.unlearning.methods)):
        if len(set(map(folded, given))) < len(given):
            raise PresetError(f"Preset {preset.name!r} names two {what} alike: {', '.join(given)}.")
    if (tuned := preset.tuning.n_models) > (most := preset.ensembles.n_models):
        raise PresetError(f"tuning.n_models={tuned} is more than ensembles.n_models={most}; lower it.")
    return names
