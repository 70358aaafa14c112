"""`dmm`: run the study's notebooks in batch. A thin layer on papermill; what computes is imported when it is needed."""

from __future__ import annotations

import shutil
import signal
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dmmlib import presets
from dmmlib.app import batch, own
from dmmlib.errors import DmmError, PresetError, StoreError
from dmmlib.files import LAID_OUT, read_json, resource
from dmmlib.progress import Pulse, duration, silent

REQUEST_STAGE, REQUEST = "04", ["do_nothing", "retrain", "dm_direct", "dmm"]
"""What a forget set of one's own is studied with, unless more is asked for."""
BESIDE = ("04", "05")  # stages that can study a set of one's own beside the preset's
HELP = {"help_option_names": ["-h", "--help"]}


def _terminate(*_: object) -> None:
    """End as by Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one shall not disturb the end
    raise KeyboardInterrupt("SIGTERM")


class Commands(TyperGroup):
    """Commands that say what is wrong, and warn, in one line."""

    def invoke(self, ctx: Any) -> Any:
        usual, warnings.formatwarning = warnings.formatwarning, lambda said, *_, **__: f"dmm: {said}\n"
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # who reads has enough
            raise
        except (DmmError, OSError) as error:
            typer.secho(f"dmm: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stopped:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C shall not disturb the end
            typer.secho("dmm: interrupted; finished shards and stages are kept, run again to go on.", err=True)
            raise typer.Exit(143 if stopped.args else 130) from None
        finally:
            signal.signal(signal.SIGTERM, before)
            warnings.formatwarning = usual


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, context_settings=HELP)


def _presets(incomplete: str) -> list[str]:
    return [name for name in presets.names() if name.startswith(incomplete)]


def _stages(incomplete: str) -> list[tuple[str, str]]:
    return [(number, path.stem[3:]) for number, path in batch.stages().items() if number.startswith(incomplete)]


Named = partial(typer.Argument, metavar="PRESET", autocompletion=_presets)
Name = Annotated[str, Named(help="A name in presets/, or the path of a YAML file.")]
Ran = Annotated[str, Named(help="A preset that was run, or the directory of a run.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a number, e.g. ensembles.n_models=50; may be repeated."),
]
Place = Annotated[str, typer.Option(help="Where trained outputs go: a directory or fsspec address.")]
Runs = Annotated[
    Path | None,
    typer.Option(
        help="Directory for everything computed, figures too (default: runs/).", parser=own.directory, metavar="PATH"
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dmm {metadata.version('dmmlib')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Machine unlearning by datamodel matching: run the study in batch."""


@app.command("list")
def list_() -> None:
    """Show presets and stages."""
    typer.echo("presets: " + ", ".join(presets.names()))
    for number, path in batch.stages().items():
        typer.echo(f"stage {number}: {path.stem[3:].replace('_', ' ')}")


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="Where; it is made if it does not exist.")]) -> None:
    """Lay out notebooks, presets and a README in a folder to work in; what is there already is kept as it is."""
    sources = {folder / name / path.name: path for name in LAID_OUT for path in sorted(resource(name).glob("[!.]*.*"))}
    sources[folder / "README.md"] = Path(__file__).parent / "templates" / "README.md"
    new = [target for target in sources if not target.exists()]
    try:
        for target in new:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sources[target], target)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error
    kept = len(sources) - len(new)
    also = f"; {kept} that were there already are kept as they are" if kept else ""
    typer.echo(f"{folder}: {len(new)} file{'s' * (len(new) != 1)} written{also}.")


@app.command()
def run(
    preset: Name,
    stage: Annotated[
        list[str] | None, typer.Option(help="Only this stage, e.g. 4; may be repeated.", autocompletion=_stages)
    ] = None,
    set_: Settings = None,
    forget_set: Annotated[
        Path | None,
        typer.Option(
            help="The JSON file of a forget set to study instead of the preset's: in stage 04, with DMM, doing nothing "
            "and retraining, unless --stage or --set unlearning.methods=[...] asks for more."
        ),
    ] = None,
    beside: Annotated[bool, typer.Option(help="Study that set beside the preset's, in stages 04 and 05.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "",
    scheduler: Annotated[
        str, typer.Option(help="Who trains: local, local-cluster, cluster (the preset's), or a Dask address.")
    ] = "",
    store: Place = "",
    trust_preset: own.Trust = False,
    force: Annotated[bool, typer.Option(help="Run stages again that are done.")] = False,
    runs: Runs = None,
    dry_run: Annotated[
        bool, typer.Option(help="Only say what would be trained, for how long, and what it takes and leaves.")
    ] = False,
) -> None:
    """Run notebooks through papermill; stages already done for the same configuration are skipped."""
    places = {"device": device, "scheduler": scheduler, "store": store}
    overrides = own.parse(set_) | {key: value for key, value in places.items() if value}
    known = batch.stages()
    if unknown := [number for number in stage or () if number.zfill(2) not in known]:
        raise PresetError(f"Unknown stage {unknown[0]!r}; use one of {', '.join(known)}, --stage before each.")
    if beside and not forget_set:
        raise PresetError("--beside was given without --forget-set, the file of the set to study; give both.")
    able = (BESIDE if beside else batch.STUDY) if forget_set else tuple(known)
    wanted = [n.zfill(2) for n in stage or ([REQUEST_STAGE] if forget_set and not beside else able)]
    if unable := [number for number in wanted if number not in able]:
        how = "--forget-set" + " --beside" * beside
        raise PresetError(f"Stage {unable[0]} takes no {how}; use it with {', '.join(able)}, and run others without.")
    if dry_run:
        _dry_run(_asked(preset, overrides, forget_set, beside), runs, forget_set, beside, wanted)
        typer.echo("  stages: " + ", ".join(known[n].stem.replace("_", " ") for n in sorted({*wanted})))
        return
    mine = str(forget_set.resolve()) if forget_set else None
    with Pulse(lambda: "reading the preset, data and what is trained"):
        import torch  # only once the arguments have been read

        from dmmlib.app.report import RECORD, record
        from dmmlib.study import Study
        from dmmlib.trainer import MANY_STEPS

        asked = _asked(preset, overrides, forget_set, beside).model_dump(mode="json")
        study = Study(asked, forget_set=mine, beside=beside, runs=runs, progress=silent)  # says what is wrong
    if not trust_preset:
        own.ask(preset, study.preset, overrides)
    content = study.preset.model_dump(mode="json")
    if mine and (price := _price(study)):
        typer.echo(price)
    try:
        read_json(study.output / RECORD)
    except StoreError:  # what the stages that are done were executed with is not known
        force = True
    notebooks, figures = study.output / "notebooks", study.figures / study.output.relative_to(study.runs)
    batch.run(
        [known[number] for number in sorted({*wanted})],
        notebooks,
        {"preset": content, "overrides": {}, "forget_set": mine, "beside": beside},
        _say,
        force=force,
        threads=1 if study.preset.threads else torch.get_num_threads(),  # one's own are for a single notebook
        wide=batch.TRAINING if study.planned >= MANY_STEPS else (),
        environment={"DMM_RUNS": str(study.runs.resolve()), "DMM_FIGURES": str(study.figures.resolve())},
        executed=lambda: record(study, study.output),
    )
    typer.echo(f"executed notebooks: {notebooks}")
    if tables := sorted(study.output.glob("*.csv")):
        typer.echo("tables:             " + ", ".join(map(str, tables)))
    typer.echo(f"figures:            {figures}")


@app.command()
def status(
    preset: Name,
    set_: Settings = None,
    store: Place = "",
    runs: Runs = None,
    repair: Annotated[bool, typer.Option(help="Remove what is damaged, so that a run makes it anew.")] = False,
) -> None:
    """Show what is trained, missing and damaged; trains nothing."""
    overrides = own.parse(set_) | ({"store": store} if store else {})
    with Pulse(lambda: "reading what is trained"):
        from dmmlib.app.status import damage, stores, trained
        from dmmlib.study import Study

        study = Study(preset, overrides, runs=runs, progress=silent)
        found = stores(study)
        table, wrong = trained(study, found=found), damage(study, repair, found)
    typer.echo(table.to_string(index=False))
    done, planned, damaged = (int(table[column].sum()) for column in ("done", "planned", "damaged"))
    typer.echo(f"{done:,} of {planned:,} models trained, {damaged:,} damaged")
    for sentence in wrong:
        typer.echo(sentence)
    if wrong and repair:
        typer.echo("what is damaged is removed; a run makes it anew")


@app.command()
def report(
    name: Ran,
    set_: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The page (default: report.html in the run's directory).")] = None,
    runs: Runs = None,
) -> None:
    """Write a run as one self-contained HTML page: claims with verdicts, tables, figures, settings."""
    from dmmlib.app import report as pages

    overrides = own.parse(set_)
    if overrides or name.endswith((".yaml", ".yml")):
        name = presets.load(name, overrides).name
    run = pages.open_run(name, runs)
    typer.echo(pages.write(pages.html(run), out or run.directory / "report.html"))


@app.command()
def compare(
    a: Ran,
    b: Annotated[str, typer.Argument(metavar="PRESET", help="Another.")],
    statistic: Annotated[str, typer.Option(help="mean_gap, klom_p95, ks_share, u_lira, cost, ...")] = "klom_p95",
    html: Annotated[Path | None, typer.Option(help="Also write a page with every statistic.")] = None,
    runs: Runs = None,
) -> None:
    """Set two runs side by side: which settings differ, and by how much the results do, with intervals."""
    from dmmlib.app import report as pages

    left, right = pages.open_run(a, runs), pages.open_run(b, runs)
    typer.echo(pages.comparison_text(left, right, statistic))
    if html:
        typer.echo(pages.write(pages.comparison_html(left, right), html))


own.add_to(app)


def _asked(preset: str, overrides: dict[str, Any], forget_set: Path | None, beside: bool) -> presets.Preset:
    """The preset, which a forget set of one's own is studied with, by few methods unless more are asked for."""
    content = presets.load(preset, overrides).model_dump(mode="json")
    if forget_set and not beside and "unlearning.methods" not in overrides:
        content["unlearning"]["methods"] = REQUEST
    return presets.load(content)


def _price(study: Any) -> str:
    """Say what training the oracles of a forget set of one's own takes, which nothing but them needs."""
    asked = study.own
    if not (n := study.untrained_oracles(asked)):
        return ""
    steps, rate = n * study.training.steps(study.data.n_train - len(asked)), max(study.rates().values(), default=0)
    seconds = f", about {duration(steps / rate)}" if rate else ""
    return f"{asked.name}: {n} models retrained without it, to measure against, are yet to be trained{seconds}"


def _say(line: str, done: bool) -> None:
    from tqdm import tqdm

    with tqdm.external_write_mode():  # not into the line that shows progress
        typer.secho(line, fg=typer.colors.GREEN if done else typer.colors.BRIGHT_BLACK)


def _dry_run(
    loaded: presets.Preset, runs: Path | None, forget_set: Path | None, beside: bool, stages: list[str]
) -> None:
    with Pulse(lambda: "reading what is trained, and counting"):
        from dmmlib.app import plan

        said = str(plan.plan(loaded, runs, forget_set, beside, stages))
    typer.echo(said)
    if loaded.studies["multimodal"].checkpoint is not None:
        from dmmlib.studies.multimodal.scale import scale

        typer.echo(scale(loaded.studies["multimodal"]))


if __name__ == "__main__":
    app()
