"""`dmm prepare`, `dmm forget` and `dmm audit`: models of one's own on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from dmmlib import presets
from dmmlib.errors import ModelError, PresetError, StoreError
from dmmlib.files import replacing
from dmmlib.progress import Pulse

if TYPE_CHECKING:
    from dmmlib.own.prepare import Prepared
    from dmmlib.study import Study

RecipeFile = Annotated[
    str, typer.Option(help="A Python file with `recipe = dmmlib.Recipe(...)`, which is run; or a preset of the study.")
]
Models = Annotated[int, typer.Option(help="How many subset models are trained, once for all requests.")]


def directory(given: str | Path) -> Path:
    """The folder that an option names; StoreError for an empty name, which would be the current folder's."""
    if not str(given).strip():
        raise StoreError("A folder's name is empty; give a name, or leave the option out.")
    return Path(given)


Folder = Annotated[Path, typer.Option(help="Where they are kept.", parser=directory, metavar="PATH")]
Asked = Annotated[str, typer.Option(help="Ids: a .csv, .json or text file, a folder of files, a class, or one id.")]
N_MODELS, PREPARED = 100, Path("prepared")  # where nothing else is asked for
Trust = Annotated[
    bool, typer.Option("--trust-preset", help="Use the cluster or scheduler that a preset from elsewhere names.")
]
DryRun = Annotated[bool, typer.Option(help="Only say what would be trained, for how long, and what it takes.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to an app."""
    for command in (prepare, forget, audit):
        app.command()(command)


def prepare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A Python file with `recipe = dmmlib.Recipe(...)`.")],
    models: Models = N_MODELS,
    prepared: Folder = PREPARED,
    trust_preset: Trust = False,
    dry_run: DryRun = False,
) -> None:
    """Train the subset models of a recipe and fit the attributor, once; interrupted, it goes on where it was."""
    made = _opened(recipe, models, prepared, trust_preset, dry_run)
    if not dry_run:
        made.attributor()
        given = f" --models {models}" * (models != N_MODELS) + f" --prepared {prepared}" * (prepared != PREPARED)
        given += " --trust-preset" * trust_preset
        said = f"`dmm forget MODEL --recipe {recipe} --forget IDS{given}`"
        typer.echo(f"prepared in {made.runs}: answer requests with {said}")


def forget(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Weights, .safetensors or .pt.")],
    recipe: RecipeFile,
    forget: Asked,
    out: Annotated[
        Path, typer.Option(help="Where weights, record and report go.", parser=directory, metavar="PATH")
    ] = Path("unlearned"),
    method: Annotated[str, typer.Option(help="A registered method.")] = "dmm",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method, e.g. cost=0.1; may be repeated."),
    ] = None,
    models: Models = N_MODELS,
    prepared: Folder = PREPARED,
    trust_preset: Trust = False,
    dry_run: DryRun = False,
) -> None:
    """Make a model forget training points: unlearned weights, a record and a report; the model given is left alone."""
    from dmmlib import unlearn
    from dmmlib.own import forget as own
    from dmmlib.own import record
    from dmmlib.own.requests import SHOWN

    options = parse(set_)
    (own.check_method if recipe.endswith(".py") else unlearn.check_setting)(method, options)
    made = _opened(recipe, models, prepared, trust_preset, dry_run)
    indices, name, original, gone = own.asked(model, forget, made)  # what is wrong is said before anything is trained
    record.check_out(out, indices, record.sha256(original.state_dict()), "report.html")
    earlier = f", {len(gone)} more forgotten before" if len(gone) else ""
    ids = indices if made.data.ids is None else made.data.ids[indices]
    which = f"{', '.join(map(str, ids[:SHOWN]))}{', ...' * (len(ids) > SHOWN)}"
    typer.echo(f"request {name!r}: {len(indices)} of {made.data.n_train:,} training points ({which}){earlier}")
    if dry_run:
        return
    _check_writable(out)
    result = own.forget(original, indices, made, method=method, name=name, after=gone, **options)
    judged = result.audit()
    result.save(out, judged)
    page = result.report(out / "report.html", judged)
    typer.echo(f"{judged}\n{result.anew}\nwritten: {page}, model.safetensors and record.json")


def audit(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Weights after unlearning, by whatever tool.")],
    original: Annotated[Path, typer.Option(help="Weights before it.")],
    recipe: RecipeFile,
    forget: Asked,
    retrained: Annotated[
        list[Path] | None,
        typer.Option(help="Weights of a model retrained without the points, or a folder of such; of ten or more."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write a report there.")] = None,
    models: Models = N_MODELS,
    prepared: Folder = PREPARED,
    trust_preset: Trust = False,
) -> None:
    """Judge whether a model has forgotten training points; exits with 1 if it has not, 3 if that cannot be told."""
    from dmmlib.own.audit import answers
    from dmmlib.own.forget import given
    from dmmlib.own.weights import loaded

    if out:
        if out.suffix != ".html":
            raise StoreError(f"--out got {out}; give the page a name that ends in .html.")
        _check_writable(out.parent)
    made = _opened(recipe, models, prepared, trust_preset)
    others = [loaded(weights, made) for path in retrained or () for weights in _weights(path)]
    answers(others, made, (original, model))  # what is wrong is said before anything is trained
    result = given(original, model, forget, made)
    judged = result.audit(others)
    typer.echo(str(judged))
    if out:
        typer.echo(f"written: {result.report(out, judged)}")
    raise typer.Exit({True: 0, False: 1, None: 3}[judged.forgotten])


def parse(settings: list[str] | None) -> dict[str, Any]:
    """Values by key of what --set got; PresetError for anything but KEY=VALUE."""
    parsed = {}
    for setting in settings or []:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise PresetError(f"--set got {setting!r}; give key=value, such as cost=0.1 or ensembles.n_models=50.")
        if key in parsed:
            raise PresetError(f"--set gives {key} twice, of which one would not count; give it once.")
        try:
            parsed[key] = presets.parse(value)
        except PresetError as error:
            raise PresetError(f"--set {key}: {error}.") from None
        except (yaml.YAMLError, ValueError):
            parsed[key] = value
    return parsed


def ask(given: str, preset: presets.Preset, overrides: dict[str, Any] | None = None) -> None:
    """Raise PresetError where a file that is not in presets/ says on which cluster to run: that runs its code."""
    elsewhere = given.endswith((".yaml", ".yml")) and Path(given).resolve().parent != presets.PRESETS_DIR.resolve()
    chosen = "scheduler" in (overrides or {}) and preset.scheduler != "cluster"  # not by the file
    if elsewhere and not chosen and preset.scheduler not in ("local", "local-cluster"):
        raise PresetError(
            f"{given} names a cluster ({preset.scheduler}, {preset.cluster.type}), which can run any code here; "
            "read the file, then give --trust-preset, or let the file say `scheduler: local`."
        )


def _weights(path: Path) -> list[Path]:
    """A file of weights, or all in a folder; raises StoreError for a folder without any."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pt", ".pth"))
    if not found:
        raise StoreError(f"{path} holds no .safetensors or .pt file; give a folder of retrained models' weights.")
    return found


def _check_writable(folder: Path) -> None:
    """Make a folder; raises StoreError where nothing can be written there."""
    with replacing(folder / ".tried") as tried:
        tried.touch()
    (folder / ".tried").unlink()


def _opened(recipe: str, models: int, folder: Path, trusted: bool, priced: bool = False) -> Prepared | Study | Any:
    """What requests are answered with; says what preparing it takes."""
    from dmmlib.own.prepare import Prepared
    from dmmlib.own.recipe import load

    if not recipe.endswith(".py"):
        from dmmlib.study import Study

        try:
            with Pulse(lambda: f"reading {recipe} and its data"):
                study = Study(recipe)
        except PresetError as error:
            raise PresetError(f"{error} A recipe is a Python file, such as recipe.py.") from None
        if priced or (models, folder) != (N_MODELS, PREPARED):
            raise PresetError(
                f"{recipe} is a preset, which says itself how many models there are and takes no --models, --prepared "
                f"or --dry-run; leave them out, or see `dmm run {recipe} --dry-run`."
            )
        if not trusted:
            ask(recipe, study.preset)
        return study
    try:
        with Pulse(lambda: f"reading {recipe}"):
            given = load(Path(recipe))
        made = Prepared(given, models, folder)
        typer.echo(made.price())
    except SystemExit as error:  # of its module, say, when that is first made
        raise ModelError(f"{recipe} ends the program (SystemExit: {error}); mend it.") from error
    return made
