"""`dmm` runs notebooks, skips what is done, and says in one line what is wrong."""

import json
import os
import signal
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import yaml
from typer.testing import CliRunner

from dmmlib import forget_sets, presets, progress
from dmmlib.app import batch, cli, report
from dmmlib.progress import silent
from dmmlib.study import Study
from tests.conftest import TINY


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def dmm(tmp_path, monkeypatch):
    monkeypatch.setenv("DMM_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("DMM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return call


@pytest.fixture
def tiny_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"preset": TINY}))
    return path


def test_list_names_presets_and_stages(dmm):
    out = dmm("list").output
    assert "laptop" in out
    assert "stage 04: dmm versus baselines" in out


def test_from_any_folder_a_stage_in_short(dmm, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(
        batch, "run", lambda notebooks, out, *a, **k: begun.append(([p.name[:2] for p in notebooks], out))
    )
    monkeypatch.setattr(report, "record", lambda study, folder: None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert dmm("run", "smoke", "--stage", "4", "--stage", "10").exit_code == 0
    monkeypatch.delenv("DMM_RUNS")
    assert dmm("run", "smoke", "--stage", "04").exit_code == 0
    clone = batch.NOTEBOOKS.parent
    assert begun == [(["04", "10"], tmp_path / "runs/smoke/notebooks"), (["04"], clone / "runs/smoke/notebooks")]
    assert not list(Path().iterdir()), "nothing is begun in the folder where one is"


def test_help_version_and_what_a_shell_completes():
    assert call("-h").output == call("--help").output
    assert all(f" {name} " in call("-h").output for name in ("run", "status", "report", "forget", "audit"))
    assert "--stage" in call("run", "-h").output
    assert call("--version").output == f"dmm {metadata.version('dmmlib')}\n"

    def completed(words):
        asked = {"_DMM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner().invoke(cli.app, [], env=asked, prog_name="dmm").output.split()

    assert completed("dmm st") == ["status"]
    assert completed("dmm run la") == ["laptop"]
    assert completed("dmm run smoke --stage 1") == ["10", "11"]
    assert "--forget-set" in completed("dmm run smoke --fo")


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process at once")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_told_to_end_cleans_up(number, code):
    script = (
        "import signal, time\nfrom dmmlib.app import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def names():\n"
        "    try:\n        print('begun', flush=True), time.sleep(60)\n"
        "    finally:\n        print('cleaned', flush=True)\n"
        "cli.presets.names = names\ncli.app(['list'])"
    )
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "cleaned\n")
    assert error.startswith("dmm: interrupted; ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["list"], ["run", "-h"]])
def test_what_computes_nothing_imports_nothing_heavy(arguments):
    script = (
        "import sys\nfrom dmmlib.app.cli import app\n"
        f"try:\n    app({arguments})\nfinally:\n"
        "    print({'torch', 'numpy', 'pandas', 'zarr', 'papermill', 'tqdm'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_run_skip_report_and_compare(dmm, tiny_file, tmp_path):
    first = dmm("run", tiny_file, "--stage", "3")
    assert first.exit_code == 0, first.output
    assert "03_forget_set_selection: done in" in first.output
    executed = tmp_path / "runs" / "tiny" / "notebooks" / "03_forget_set_selection.ipynb"
    notebook = nbformat.read(executed, as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells)
    assert str(tmp_path) not in json.dumps(notebook), "an executed notebook names no place on this machine"
    assert (tmp_path / "figures" / "tiny" / "03_forget_sets.png").stat().st_size > 5000
    written = (executed.parents[1] / "run.json").stat().st_mtime_ns
    assert "already done" in dmm("run", tiny_file, "--stage", "03").output
    assert (executed.parents[1] / "run.json").stat().st_mtime_ns == written, "the record is that of what was executed"
    (executed.parents[1] / "run.json").write_text("{")
    assert "03_forget_set_selection: done in" in dmm("run", tiny_file, "--stage", "03").output, "it is made anew"
    assert '"versions"' in (executed.parents[1] / "run.json").read_text()
    for overrides in ({}, {"ensembles.n_models": 9}):  # stage 04 asserts more than models this small can show
        study = Study(str(tiny_file), overrides, progress=silent)
        study.save_table(study.results(), "results.csv")
        report.record(study, study.output)
    said = dmm("report", "tiny")
    assert said.exit_code == 0, said.output
    page = (tmp_path / "runs" / "tiny" / "report.html").read_text()
    assert "data:image/webp;base64," in page
    assert "tiny" in page
    assert dmm("report", tiny_file, "--set", "ensembles.n_models=9").exit_code == 0
    assert (tmp_path / "runs" / "tiny+ensembles.n_models-9" / "report.html").exists()
    pair = dmm("compare", "tiny", "tiny+ensembles.n_models-9", "--html", tmp_path / "pair.html")
    assert "ensembles.n_models 8 9" in " ".join(pair.output.split())
    assert "clear differences" in pair.output
    assert "tiny+ensembles.n_models-9" in (tmp_path / "pair.html").read_text()


def test_a_dry_run_trains_nothing(dmm, tiny_file, tmp_path):
    said = dmm("run", tiny_file, "--dry-run", "--set", "ensembles.n_models=9")
    assert said.exit_code == 0, said.output
    assert "tiny+ensembles.n_models-9: digits, 120 training" in said.output
    assert "stages: 01 convex setting" in said.output
    assert "all in all: not known before a run" in said.output
    forget_sets.make("mine", [3, 4], Study(TINY).data, kind="chosen", preset="tiny").save(tmp_path / "mine.json")
    said = dmm("run", tiny_file, "--dry-run", "--forget-set", tmp_path / "mine.json")
    assert said.output.strip().endswith("stages: 04 dmm versus baselines"), said.output
    assert not (tmp_path / "runs").exists()


def test_status_says_what_is_done_missing_and_damaged(dmm, tiny_file, tmp_path):
    assert "0 of " in dmm("status", tiny_file).output
    _ = Study(str(tiny_file), runs=tmp_path / "runs", progress=silent).subsets()
    (chunk,) = (tmp_path / "runs").glob("store/subsets-*.zarr/logits/c/2/0/0")
    chunk.write_bytes(chunk.read_bytes()[:50])
    said = dmm("status", tiny_file)
    assert said.exit_code == 0, said.output
    rows = {row[0].strip(): row[1:] for row in (line.rsplit(None, 4) for line in said.output.splitlines()) if row}
    assert rows["subset models"] == ["120", "80", "20", "20"], "planned, done, missing, damaged"
    assert rows["originals"] == ["8", "0", "8", "0"]
    assert "20 damaged\n" in said.output
    assert "shard 2, is damaged; a run trains it again" in said.output


@pytest.mark.slow
def test_a_failing_notebook_keeps_what_was_done(dmm, tiny_file, tmp_path, monkeypatch):
    bad = tmp_path / "notebooks" / "03_bad.ipynb"
    bad.parent.mkdir()
    cells = [
        nbformat.v4.new_code_cell("preset = None", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("1 / 0"),
    ]
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), bad)
    monkeypatch.setattr(batch, "NOTEBOOKS", bad.parent)
    result = dmm("run", tiny_file)
    assert result.exit_code == 2
    assert "03_bad failed: ZeroDivisionError: division by zero" in result.output
    assert (tmp_path / "runs" / "tiny" / "notebooks" / "03_bad-failed.ipynb").exists()
    assert not (tmp_path / "runs" / "tiny" / "notebooks" / "03_bad.ipynb").exists()


def test_a_warning_is_a_line_without_the_place_in_the_code(dmm, monkeypatch):
    monkeypatch.setattr(cli.presets, "names", lambda: [warnings.formatwarning("mind this", UserWarning, "code.py", 3)])
    assert "presets: dmm: mind this\n" in dmm("list").output
    assert cli.presets.names()[0].startswith("code.py:3"), "anywhere else it is as usual"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "labtop"], "Unknown preset 'labtop'"),
        (["run", "smoke", "--stage", "99"], "Unknown stage '99'; use one of 01, 02"),
        (["run", "smoke", "--stage", "99", "--dry-run"], "Unknown stage '99'; use one of 01, 02"),
        (["run", "smoke", "--stage", "4", "--stage", "x", "--dry-run"], "Unknown stage 'x'; use one of 01, 02"),
        (["run", "smoke", "--stage", "", "--dry-run"], "Unknown stage ''; use"),
        (["run", "smoke", "--stage", "04,05"], "Unknown stage '04,05'; use"),
        (["run", "smoke", "--beside", "--dry-run"], "--beside was given without --forget-set"),
        (["run", "smoke", "--forget-set", "f", "--stage", "6"], "Stage 06 takes no --forget-set; use it with 02"),
        (["run", "smoke", "--forget-set", "f", "--beside", "--stage", "2"], "no --forget-set --beside; use it with 04"),
        (["run", "smoke", "--set", "seed=1_0"], "1_0 can be read in two ways"),
        (["run", "smoke", "--runs", "s3://bucket/runs"], "give a folder on this machine"),
        (["run", "smoke", "--set", "n_train"], "--set got 'n_train'; give key=value"),
        (["run", "smoke", "--set", "seed=1", "--set", "seed=2"], "--set gives seed twice"),
        (["run", "smoke", "--runs", ""], "A folder's name is empty; give a name, or leave the option out"),
        (["report", "smoke", "--runs", " "], "A folder's name is empty"),
        (["prepare", "recipe.py", "--prepared", ""], "A folder's name is empty"),
        (["run", "smoke", "--set", "data.n_trian=5"], "unknown key 'data.n_trian' (did you mean 'n_train'?)"),
        (["run", "smoke", "--set", "unlearning.methods=[dmmm]"], "Unknown method 'dmmm'"),
        (["run", "smoke", "--forget-set", "nowhere.json"], "cannot be read as JSON"),
        (["run", "smoke", "--device", "tpu"], "given 'tpu'"),
        (["run", "labtop", "--dry-run"], "Unknown preset 'labtop'"),
        (["run", "smoke", "--dry-run", "--forget-set", "nowhere.json"], "cannot be read as JSON"),
        (["run", "cifar10", "--dry-run", "--set", "data.path=nowhere"], "nowhere does not exist; correct data.path"),
        (["run", "smoke", "--store", "no://where"], "no://where cannot be reached (Protocol not known"),
        (["run", "smoke", "--dry-run", "--store", "no://where"], "cannot be reached"),
        (["status", "smoke", "--store", "zip::nowhere.zip"], "cannot be reached"),
        (["status", "smoke", "--store", __file__], "cannot be a folder, as"),
        (["run", "smoke", "--dry-run", "--store", __file__], "is a file; choose another place"),
        (["run", "smoke", "--set", "training.epochs=010"], "--set training.epochs: 010 can be read in two ways"),
        (["run", "smoke", "--dry-run", "--set", "model.options={hidden: -1}"], "Model 'mlp' fails"),
        (["run", "smoke", "--dry-run", "--set", "model.options={a: 1}"], "use its own: hidden"),
        (["run", "smoke", "--set", "attribution.options={a: 1}"], "Options of attributor 'bayesian'"),
        (["run", "smoke", "--set", "scheduler=nonsense"], "key 'scheduler'"),
        (["compare", "a" * 5000, "b"], "File name too long"),
        (["report", "labtop"], "No run 'labtop' with tables"),
        (["compare", "smoke", "laptop"], "use `dmm run smoke` first"),
    ],
)
def test_mistakes_get_one_clear_line_and_leave_nothing(dmm, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(progress, "FIRST", 1000.0)  # on a busy machine there would be a line of it
    result = dmm(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_request_is_answered_with_what_it_needs(dmm, tiny_file, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(batch, "run", lambda notebooks, out, given, *a, **k: begun.append((notebooks, given)))
    data = Study(str(tiny_file), progress=silent).data
    mine = tmp_path / "mine.json"
    forget_sets.make("mine", [3, 5], data).save(mine)

    def asked(*arguments):
        said = dmm("run", tiny_file, "--forget-set", mine, *arguments)
        assert said.exit_code == 0, said.output
        (notebooks, given) = begun.pop()
        return said.output, [path.name[:2] for path in notebooks], given["preset"]["unlearning"]["methods"]

    said, stages, methods = asked()
    assert "mine: 16 models retrained without it, to measure against, are yet to be trained" in said
    assert (stages, methods) == (["04"], ["do_nothing", "retrain", "dm_direct", "dmm"])
    study = Study(str(tiny_file), {"unlearning.methods": methods}, forget_set=mine, progress=silent)
    assert not study.results().empty
    assert "yet to be trained" not in asked()[0]
    assert {path.name.partition("-")[0] for path in study.runs.glob("store/*.zarr")} == {
        "originals", "attribution", "oracles", "floor"
    }, "nothing else is trained for a request"  # fmt: skip
    assert asked("--stage", "05", "--set", "unlearning.methods=[gd]")[1:] == (["05"], ["gd"])
    assert asked("--beside")[1:] == (["04", "05"], list(presets.METHODS))
    planned = dmm("run", tiny_file, "--forget-set", mine, "--dry-run").output
    assert "oracles and floor, mine" in planned
    assert not any(other in planned for other in ("tuning", "random_6", "subset models", "stage 07"))
    listed = dmm("run", tiny_file, "--forget-set", mine, "--beside", "--dry-run").output
    assert all(other in listed for other in ("oracles and floor, mine", "oracles and floor, random_6", "tuning: "))
    assert "stage 07" not in listed


def test_a_set_of_ones_own_goes_to_the_stages_that_study_it():
    def using(name):
        source = {n: "".join(c.source for c in nbformat.read(p, 4).cells) for n, p in batch.stages().items()}
        return tuple(n for n, text in source.items() if f"{name}={name}" in text and "study.forget_sets()" in text)

    assert using("forget_set") == batch.STUDY
    assert using("beside") == cli.BESIDE


@pytest.mark.parametrize(
    ("places", "arguments"),
    [
        ({"scheduler": "cluster"}, []),
        ({"scheduler": "tcp://192.0.2.1:8786"}, []),
        ({"cluster": {"type": "dask_jobqueue.SLURMCluster"}}, ["--scheduler", "cluster"]),
    ],
)
def test_a_file_from_elsewhere_that_names_a_cluster_is_asked_about(dmm, tmp_path, monkeypatch, places, arguments):
    started = []
    monkeypatch.setattr(batch, "run", lambda *a, **k: started.append(a))
    path = tmp_path / "sent.yaml"
    path.write_text(yaml.safe_dump({"preset": TINY | places}))
    said = dmm("run", path, *arguments)
    assert said.exit_code == 2
    assert "sent.yaml names a cluster" in said.output
    assert not started
    assert dmm("run", path, *arguments, "--trust-preset").exit_code == 0
    assert dmm("run", path, "--scheduler", "local").exit_code == 0
    assert dmm("run", path, "--scheduler", "tcp://127.0.0.1:8786").exit_code == 0, "one's own choice"
    assert len(started) == 3


def test_absent_cuda_is_said(dmm):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "torch finds no GPU here; use device='auto' or 'cpu'" in dmm("run", "smoke", "--device", "cuda").output


def test_environment_is_left_as_it_was(dmm):
    dmm("list")
    assert "DMM_PROGRESS_FILE" not in os.environ


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    """As on Windows, or in a container without a locale: presets and notebooks hold letters beyond ASCII."""
    preset = tmp_path / "own.yaml"
    preset.write_text(f"# größer als ½\n{yaml.safe_dump({'preset': TINY})}", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "import sys; from dmmlib.app import batch; from dmmlib.study import Study;"
        "study = Study(sys.argv[1], runs=sys.argv[2]); study.forget_sets(); assert study.preset.name == 'tiny';"
        "[batch.key(path, {}) for path in batch.stages().values()]"
    )
    command = [sys.executable, "-c", code, str(preset), str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
