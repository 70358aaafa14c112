"""Notebooks side by side: what runs when, with how many threads, what is left where one fails or all stop, and what is
executed again."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from dmmlib import presets, progress
from dmmlib.app import batch
from dmmlib.errors import DmmError, StoreError
from dmmlib.registry import VERSIONS
from dmmlib.unlearn import METHODS
from tests.conftest import alive


def beside_progress(text):
    """What stands there besides lines such as "4% of 2 stages | starting"."""
    return re.sub(r"^\d+% of .*\n?", "", text.replace("\r", "\n"), flags=re.MULTILINE).strip()


NOTE = """
import json, os, pathlib, time
start = time.time()
time.sleep(1)
threads = os.environ.get("OMP_NUM_THREADS")
pathlib.Path(place, "{number}.json").write_text(json.dumps([start, time.time(), threads]))
pathlib.Path(place, "{number}.csv").write_text("table")
print("said")
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes notebooks, number -> what is executed at the end of each, and returns their paths."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(batch, "NOTEBOOKS", folder)

    def make(codes):
        for number, code in codes.items():
            cells = [
                nbformat.v4.new_code_cell("place = '.'", metadata={"tags": ["parameters"]}),
                nbformat.v4.new_code_cell(NOTE.format(number=number)),
                nbformat.v4.new_code_cell(code),
            ]
            metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
            nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / f"{number}_note.ipynb")
        return list(batch.stages().values())

    return make


@pytest.mark.slow
def test_two_at_a_time_after_what_they_need_and_the_wide_alone(write, tmp_path):
    notebooks = write(dict.fromkeys(["01", "02", "03", "04", "05", "11"], ""))
    said = []
    batch.run(
        notebooks, tmp_path / "out", {"place": str(tmp_path)}, lambda *s: said.append(s), threads=6, wide=["02", "04"]
    )
    noted = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert sorted(noted) == ["01", "02", "03", "04", "05", "11"]
    span = {number: (start, end) for number, (start, end, _) in noted.items()}
    beside = {(a, b) for a in span for b in span if a < b and span[a][0] < span[b][1] and span[b][0] < span[a][1]}
    assert beside, "some ran at the same time"
    assert not any({"02", "04"} & set(pair) for pair in beside), "the wide ones ran alone"
    assert all(span[need][1] < span[n][0] for n in span for need in batch.NEEDS.get(n, ()))
    assert span["02"][0] == min(start for start, _ in span.values()), "the main results come first"
    assert {number: threads for number, (_, _, threads) in noted.items()} == dict.fromkeys(
        ["01", "03", "05", "11"], "3"
    ) | dict.fromkeys(["02", "04"]), "half of the threads each; the wide take all"
    assert "OMP_NUM_THREADS" not in os.environ
    assert len(said) == 6
    assert all("done in" in line and done for line, done in said)

    def again():
        said.clear()
        batch.run(notebooks, tmp_path / "out", {"place": str(tmp_path)}, lambda *s: said.append(s), threads=6)
        return {line[:2] for line, done in said if done}

    assert again() == set()
    assert all("already done" in line for line, _ in said)
    assert len(said) == 6
    (tmp_path / "01.csv").unlink()
    cut, silent = (tmp_path / "out" / f"{number}_note.ipynb" for number in ("03", "05"))
    cut.write_bytes(cut.read_bytes()[:-20])
    notebook = nbformat.read(silent, as_version=4)
    for cell in notebook.cells:
        cell.outputs = []
    nbformat.write(notebook, silent)
    (tmp_path / "out" / ".11_note.json").write_text("[]")
    assert again() == {"01", "03", "05", "11"}, "what is no longer there, or whole, is made again"


@pytest.mark.slow
def test_a_log_is_never_silent_for_long(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST", 0.2)
    monkeypatch.setattr(progress, "EVERY", 1.0)
    told = "import os; open(os.environ['DMM_PROGRESS_FILE'], 'w').write('{\"line\": \"train: 3 / 9\"}'); time.sleep(3)"
    notebooks, ends = write({"05": told, "06": "time.sleep(2)"}), []
    start = time.monotonic()
    batch.run(notebooks, tmp_path / "out", {"place": str(tmp_path)}, lambda *said: ends.append(said))
    lines, seconds = capsys.readouterr().err.splitlines(), time.monotonic() - start
    assert seconds / 3 < len(lines) + len(ends) <= seconds + 3, "about one a second"
    shares = [int(line.partition("%")[0]) for line in lines]
    assert shares == sorted(shares)
    assert shares[0] < 50 <= shares[-1]
    assert any(line.endswith("| 05: train: 3 / 9") for line in lines)
    assert "of 2 stages, about" in lines[-1], "once a stage has ended, its pace tells the time that is left"


def keys(write, tmp_path):
    """A notebook, and a function of changes to its parameters that gives its key."""
    (notebook,) = write({"01": ""})
    preset = presets.load("smoke").model_dump(mode="json")

    def key(forget_set=None, **changed):
        return batch.key(notebook, {"preset": preset | changed, "forget_set": str(forget_set)})

    return notebook, key


def test_a_key_is_of_names_settings_and_versions(write, tmp_path, monkeypatch):
    _, key = keys(write, tmp_path)
    before = key()
    assert key(device="cuda", scheduler="tcp://host:8786", store="memory://runs", threads=2) == before
    ensembles = presets.load("smoke").ensembles.model_dump()
    assert key(ensembles=ensembles | {"chunk": 3, "compile": False, "shard": 7}) == before, "which is only faster"
    assert key(ensembles=ensembles | {"n_models": 30}) != before
    assert key(seed=1) != before
    monkeypatch.setitem(VERSIONS, "engine", VERSIONS["engine"] + 1)
    raised = key()
    assert raised != before, "a part of the core"
    monkeypatch.undo()
    assert key() == before
    method, version = METHODS["dmm"], METHODS.version("dmm")
    METHODS.add("dmm", method, version + 1)
    try:
        assert key() not in (before, raised), "a method, registered by name"
        METHODS.add("dmm", dataclasses.replace(method, space={"cost": [0.01, 0.03]}), version)
        assert key() != before, "and what is searched of it"
    finally:
        METHODS.add("dmm", method, version)
    assert key() == before


def test_a_key_is_of_what_files_hold(write, tmp_path):
    notebook, key = keys(write, tmp_path)
    mine, moved, other = (tmp_path / name for name in ("mine.json", "moved.json", "other.json"))
    for path, content in ((mine, "1"), (moved, "1"), (other, "2")):
        path.write_text(content)
    assert key(mine) == key(moved) != key(other)
    folder = tmp_path / "images"
    (folder / "cat").mkdir(parents=True)
    data = presets.load("smoke").data.model_dump()
    empty = key(data=data | {"path": str(folder)})
    (folder / "cat" / "1.png").write_bytes(b"1")
    more = key(data=data | {"path": str(folder)})
    assert more != empty, "one image more"
    assert key(data=data | {"path": str(folder.rename(tmp_path / "moved"))}) == more
    assert key(data=data | {"path": str(mine)}) == key(data=data | {"path": str(moved)}) != key(data=data)
    before, read = key(), nbformat.read(notebook, as_version=4)
    read.cells[-1].outputs = [nbformat.v4.new_output("stream", text="executed")]
    nbformat.write(read, notebook)
    assert key() == before
    read.cells[-1].source = "# changed"
    nbformat.write(read, notebook)
    assert key() != before


def test_a_stage_keeps_account_of_its_own_tables(write, tmp_path):
    first, other = write({"01": "", "06": ""})
    began, out = time.time() - 1, tmp_path / "out"
    out.mkdir()
    stages = [batch._Stage(notebook, out, "key", out / f"{notebook.stem}.part") for notebook in (first, other)]
    for number, stage in zip(("01", "06"), stages, strict=True):
        stage.part.write_text("executed")
        (tmp_path / f"{number}.csv").write_text("table")  # both were at work when the first ended
    for stage in stages:
        stage.keep("", began, lambda *_: None)
    (tmp_path / "06.csv").write_text("of another setting")
    assert [stage.done() for stage in stages] == [True, False]


def test_a_comment_or_a_move_in_the_library_changes_no_key(write, tmp_path):
    notebook, _ = keys(write, tmp_path)
    place = tmp_path / "elsewhere"
    root = Path(batch.__file__).parents[2]
    shutil.copytree(root / "dmmlib", place / "dmmlib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "presets", place / "presets")
    (place / "dmmlib" / "app" / "deep").mkdir()
    (place / "dmmlib" / "app" / "images.py").rename(place / "dmmlib" / "app" / "deep" / "images.py")
    for path in place.rglob("*.py"):
        path.write_text(path.read_text().replace("dmmlib.app.images", "dmmlib.app.deep.images") + "\n# a comment\n")
    script = (
        "import sys, pathlib, dmmlib\nfrom dmmlib import presets\nfrom dmmlib.app import batch\n"
        "assert str(pathlib.Path(dmmlib.__file__).parents[1]) == sys.argv[2]\n"
        "preset = presets.load('smoke').model_dump(mode='json')\n"
        "print(batch.key(pathlib.Path(sys.argv[1]), {'preset': preset, 'forget_set': 'None'}))"
    )
    keys_of = []
    for library in (root, place):  # in processes of their own, where nothing else was registered
        command = [sys.executable, "-c", script, notebook, str(library)]
        environment = os.environ | {"PYTHONPATH": str(library)}
        said = subprocess.run(command, cwd=library, env=environment, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        keys_of.append(said.stdout.strip())
    assert keys_of[0] == keys_of[1]


@pytest.mark.slow
def test_where_one_fails_the_other_is_finished_and_nothing_else_begun(write, tmp_path):
    until = 'while not pathlib.Path(place, "out", "02_note-failed.ipynb").exists(): time.sleep(0.1)'
    notebooks = write({"02": "1 / 0", "09": until, "04": "", "01": ""})
    executed, told = [], iter(["02", "09"])
    noted = {"threads": 2, "executed": lambda: executed.append(next(told))}
    with pytest.raises(DmmError, match="02_note failed: ZeroDivisionError"):
        batch.run(notebooks, tmp_path / "out", {"place": str(tmp_path)}, lambda *s: None, **noted)
    assert (tmp_path / "out" / "09_note.ipynb").exists()
    assert (tmp_path / "out" / "02_note-failed.ipynb").exists()
    assert executed == ["02", "09"]
    assert not list((tmp_path / "out").glob("0[14]*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.kill(os.getppid(), 9)", "06_note failed: Its process was killed, perhaps for want of memory"),
        ("os.kill(os.getpid(), 9)", "06_note failed: Its kernel was killed, perhaps for want of memory"),
        ("assert False", "06_note failed: AssertionError. Everything trained is kept"),
        (
            "raise OSError(28, 'No space left')",
            "06_note failed: OSError: [Errno 28] No space left.",
        ),
    ],
)
def test_what_fails_is_said_in_one_sentence_and_its_neighbour_is_kept(write, tmp_path, code, said):
    notebooks = write({"06": code, "09": "time.sleep(5)"})
    told = []

    def run(notebooks):
        batch.run(notebooks, tmp_path / "out", {"place": str(tmp_path)}, lambda *s: told.append(s), threads=2)

    with pytest.raises(DmmError, match="06_note failed") as error:
        run(notebooks)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
    assert [line[:13] for line, _ in told] == ["09_note: done"]
    assert not list((tmp_path / "out").glob(".*.part")), "nothing is left lying about"
    run(notebooks[1:])
    assert told[1] == ("09_note: already done", False)


@pytest.mark.slow
def test_a_place_that_is_gone_or_full_is_said_in_one_sentence(write, tmp_path, monkeypatch):
    notebooks = write({"06": "pathlib.Path(place, 'out').rename(pathlib.Path(place, 'gone'))"})
    with pytest.raises(DmmError, match=r"06_note failed: output folder .*out doesn't exist .* is kept"):
        batch.run(notebooks, tmp_path / "out", {"place": str(tmp_path)}, lambda *s: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"Nothing can be executed into .*file/out"):
        batch.run(notebooks, tmp_path / "file" / "out", {"place": str(tmp_path)}, lambda *s: None)

    def full(*_):
        raise OSError(28, "No space left on device")

    write({"06": ""})
    monkeypatch.setattr(batch.os, "replace", full)
    with pytest.raises(DmmError, match=r"06_note failed: No space left on device .* is kept"):
        batch.run(notebooks, tmp_path / "out", {"place": str(tmp_path)}, lambda *s: None)


@pytest.mark.slow
def test_two_runs_of_one_preset_at_once_do_no_harm(write, tmp_path):
    (notebook,) = write({"01": "time.sleep(2)"})
    script = (
        "import sys, pathlib\nfrom dmmlib.app import batch\n"
        "batch.run([pathlib.Path(sys.argv[1])], pathlib.Path(sys.argv[2]) / 'out', {'place': sys.argv[2]}, print)"
    )
    command = [sys.executable, "-c", script, str(notebook), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, error = process.communicate()
        assert (process.returncode, beside_progress(error)) == (0, "")
        assert "01_note: done in" in out
    cells = nbformat.read(tmp_path / "out" / "01_note.ipynb", as_version=4).cells
    assert any(cell.get("outputs") for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C in a terminal", "Ctrl-C to the command alone", "killed"])
def test_kernels_end_with_the_command(write, tmp_path, how):
    for number in ("01", "06"):
        write({number: f"pathlib.Path(place, '{number}.pid').write_text(str(os.getpid())); time.sleep(600)"})
    script = tmp_path / "run.py"
    script.write_text(
        "import signal, sys, pathlib\n"
        "from dmmlib.app import batch\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in the background it may be ignored
        "if __name__ == '__main__':\n"
        f"    here = pathlib.Path({str(tmp_path)!r})\n"
        "    batch.NOTEBOOKS = here / 'notebooks'\n"
        "    try:\n"
        "        batch.run(batch.stages().values(), here / 'out', {'place': str(here)}, print, threads=2)\n"
        "    except KeyboardInterrupt:\n"
        "        sys.exit(130)\n"
    )
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, **pipes)
    pids = [tmp_path / "01.pid", tmp_path / "06.pid"]
    until = time.monotonic() + 120
    while not all(p.exists() and p.read_text() for p in pids):
        assert process.poll() is None, "it runs until it is stopped"
        assert time.monotonic() < until
        time.sleep(0.1)
    end = os.killpg if how == "Ctrl-C in a terminal" else os.kill
    end(process.pid, signal.SIGKILL if how == "killed" else signal.SIGINT)
    out, error = (stream.decode() for stream in process.communicate(timeout=60))
    assert (out, beside_progress(error)) == ("", ""), "no stray traceback"
    assert process.returncode == (-signal.SIGKILL if how == "killed" else 130)
    until = time.monotonic() + 30
    while any(alive(int(p.read_text())) for p in pids):
        assert time.monotonic() < until, "kernels end with it"
        time.sleep(0.1)
