"""`dmm`: run the study's notebooks in batch. A thin layer on papermill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from dmmlib import presets
from dmmlib.app import batch
from dmmlib.errors import DmmError, PresetError

TRAINING = ("02", "04")  # stages that keep every core busy by themselves
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _main() -> None:
    """Machine unlearning by datamodel matching: run the study in batch."""


@app.command("list")
def list_() -> None:
    """Show presets and stages."""
    typer.echo("presets: " + ", ".join(presets.names()))
    for number, path in batch.stages().items():
        typer.echo(f"stage {number}: {path.stem[3:].replace('_', ' ')}")


@contextmanager
def _one_line() -> Iterator[None]:
    """Say what is wrong in one line."""
    try:
        yield
    except DmmError as error:
        typer.secho(f"dmm: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None


@app.command()
def run(
    preset: Annotated[str, typer.Argument(help="A name in presets/, or the path of a YAML file.")],
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage, e.g. 04; may be repeated.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace a number: key=value, e.g. datamodels.n_subsets=500."),
    ] = None,
    forget_set: Annotated[
        Path | None, typer.Option(help="A forget set's JSON file, in the preset's sets' place.")
    ] = None,
    beside: Annotated[bool, typer.Option(help="That set beside the preset's, not in their place.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "",
    scheduler: Annotated[
        str, typer.Option(help="Who trains: local, local-cluster, cluster (the preset's), or a Dask address.")
    ] = "",
    store: Annotated[str, typer.Option(help="Where trained outputs go: a directory or fsspec address.")] = "",
    force: Annotated[bool, typer.Option(help="Run stages again that are done.")] = False,
    runs: Annotated[Path | None, typer.Option(help="Directory for everything computed (default: runs/).")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Only say what would be trained, for how long, and what it leaves.")
    ] = False,
) -> None:
    """Run notebooks through papermill; stages already done for the same configuration are skipped."""
    places = {"device": device, "scheduler": scheduler, "store": store}
    try:
        with _one_line():
            overrides = _parse(set_ or []) | {key: value for key, value in places.items() if value}
            if dry_run and forget_set:
                raise PresetError("--dry-run plans the preset's own forget sets; leave --forget-set out.")
            if dry_run:
                _dry_run(preset, overrides, runs)
            else:
                _run(preset, stage or [], overrides, forget_set, beside, force, runs)
    except KeyboardInterrupt:
        typer.secho("dmm: interrupted; finished shards and stages are kept, run again to go on.", err=True)
        raise typer.Exit(130) from None


@app.command()
def status(
    preset: Annotated[str, typer.Argument(help="A name in presets/, or the path of a YAML file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="As for `dmm run`.")] = None,
    store: Annotated[str, typer.Option(help="As for `dmm run`.")] = "",
    runs: Annotated[Path | None, typer.Option(help="As for `dmm run`.")] = None,
) -> None:
    """Show what is trained, missing and damaged; trains nothing."""
    from dmmlib.app import plan
    from dmmlib.progress import silent
    from dmmlib.study import Study

    with _one_line():
        overrides = _parse(set_ or []) | ({"store": store} if store else {})
        table = plan.status(Study(preset, overrides, runs=runs, progress=silent))
    typer.echo(table.to_string(index=False))
    done, planned = int(table["done"].sum()), int(table["planned"].sum())
    typer.echo(f"{done:,} of {planned:,} models trained, {int(table['damaged'].sum()):,} damaged")
    if table["damaged"].any():
        typer.echo("the next run trains the damaged shards again")


@app.command()
def report(
    name: Annotated[str, typer.Argument(metavar="PRESET", help="A preset that was run, or the directory of a run.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Numbers that were replaced, as for `run`.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page (default: report.html in the run's directory).")] = None,
    runs: Annotated[Path | None, typer.Option(help="Directory of runs (default: runs/).")] = None,
) -> None:
    """Write a run as one self-contained HTML page: claims with verdicts, tables, figures, settings."""
    from dmmlib.app import report as pages

    with _one_line():
        run = pages.open_run(pages.preset_name(name, _parse(set_ or [])), runs)
        typer.echo(pages.write(pages.html(run), out or run.directory / "report.html"))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A preset that was run, or the directory of a run.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    statistic: Annotated[str, typer.Option(help="klom_p95, klom_mean, accuracy_gap, u_lira or cost.")] = "klom_p95",
    html: Annotated[Path | None, typer.Option(help="Also write a page with every statistic.")] = None,
    runs: Annotated[Path | None, typer.Option(help="Directory of runs (default: runs/).")] = None,
) -> None:
    """Set two runs side by side: which settings differ, and by how much the results do, with intervals."""
    from dmmlib.app import report as pages

    with _one_line():
        left, right = pages.open_run(a, runs), pages.open_run(b, runs)
        typer.echo(pages.comparison_text(left, right, statistic))
        if html:
            typer.echo(pages.write(pages.comparison_html(left, right), html))


def _parse(settings: list[str]) -> dict[str, Any]:
    parsed = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise PresetError(f"--set got {setting!r}; give key=value, such as datamodels.n_subsets=500.")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed[key] = value
    return parsed


def _run(
    preset: str,
    wanted: list[str],
    overrides: dict[str, Any],
    forget_set: Path | None,
    beside: bool,
    force: bool,
    runs: Path | None,
) -> None:
    import torch  # only once the arguments have been read

    from dmmlib.app.report import record
    from dmmlib.study import Study

    known = batch.stages()
    unknown = [s for s in wanted if s not in known]
    if unknown:
        raise PresetError(f"Unknown stage {unknown[0]!r}; use one of {', '.join(known)}.")
    if runs:
        os.environ["DMM_RUNS"] = str(runs.resolve())
    own = str(forget_set.resolve()) if forget_set else None
    study = Study(preset, overrides, forget_set=own, beside=beside)  # everything that can be wrong is said here
    parameters = {
        "preset": study.preset.model_dump(mode="json", exclude_defaults=False),
        "overrides": {},
        "forget_set": own,
        "beside": beside,
    }
    out = study.output
    record(study, out)
    threads = 1 if study.preset.threads else torch.get_num_threads()  # threads of one's own are for a single notebook
    chosen = [path for number, path in known.items() if not wanted or number in wanted]
    wide = TRAINING if study.trains_much else ()
    batch.run(chosen, out / "notebooks", parameters, _say, force=force, threads=threads, wide=wide)
    tables = sorted(out.glob("*.csv"))
    typer.echo(f"executed notebooks: {out / 'notebooks'}")
    if tables:
        typer.echo("tables:             " + ", ".join(str(t) for t in tables))
    typer.echo(f"figures:            {study.figures / out.relative_to(study.runs)}")


def _say(line: str, done: bool) -> None:
    typer.secho(line, fg=typer.colors.GREEN if done else typer.colors.BRIGHT_BLACK)


def _dry_run(preset: str, overrides: dict[str, Any], runs: Path | None) -> None:
    from dmmlib.app import plan

    loaded = presets.load(preset, overrides)
    typer.echo(plan.plan(loaded, runs))
    if loaded.studies["multimodal"].checkpoint is not None:
        from dmmlib.studies.multimodal.scale import scale

        typer.echo(scale(loaded.studies["multimodal"]))
    typer.echo("  stages: " + ", ".join(path.stem.replace("_", " ") for path in batch.stages().values()))


if __name__ == "__main__":
    app()
