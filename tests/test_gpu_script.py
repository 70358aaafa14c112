"""The script for a GPU machine, on a CPU: every stage has a result and a log, whatever becomes of the others."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import gpu_study
from dmmlib import presets

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu.sh"


pytestmark = pytest.mark.skipif(shutil.which("bash") is None or sys.platform == "win32", reason="a script for bash")


def call(out, runs, **settings):
    """Run the script in small on a CPU: rows of its table, below the heading."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quick = {"DEVICE": "cpu", "QUICK": "1", "OUT": str(out), "DMM_RUNS": str(runs), "PATH": path}
    quick["TORCH_COMPILE_DISABLE"] = "1"  # half a minute, for numbers that nobody reads here
    done = subprocess.run(
        ["bash", str(SCRIPT)], env={**os.environ, **quick, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return rows[rows.index(["stage", "result", "seconds"]) + 1 :]


def test_a_stage_that_runs_out_of_time_stops_no_other(tmp_path):
    out = tmp_path / "out"
    for total, results in (("0", {"not-started"}), ("14", {"passed", "out-of-time", "not-started"})):
        rows = call(out, tmp_path / "runs", TOTAL=total)
        assert [row[0] for row in rows] == ["cuda_tests", "notebooks", "engine", "study"]
        assert {row[1] for row in rows} <= results
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert "./cuda_tests.log" in logs.getnames()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_stage_passes_the_study_resumes_and_files_are_few(tmp_path):
    """All stages, and the study again, in small. A machine gives back 8 files, not over two folders down."""
    kept = []
    for turn, stages in (("first", "cuda_tests notebooks engine study"), ("second", "study")):
        rows = call(tmp_path / turn, tmp_path / "runs", STAGES=stages, TOTAL="1200")
        assert [row[:2] for row in rows] == [[stage, "passed"] for stage in stages.split()]
        kept.append({path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "store").rglob("*")})
    assert kept[0] == kept[1], "a second call goes on from the store: nothing is left to train"
    files = [path for path in (tmp_path / "first").rglob("*") if path.is_file()]
    of_study = {"results.csv", "medians.md", "measures.png"}
    assert {path.name for path in files} == of_study | {"table.txt", "logs.tar.gz", "engine.json"}
    assert all(len(path.relative_to(tmp_path / "first").parts) <= 3 for path in files)
    results = pd.read_csv(tmp_path / "first" / "results.csv")
    assert set(results["method"]) == set(presets.load("gpu").unlearning.methods)
    assert results["forget_set"].nunique() == 3
    assert {"klom_p95", "mean_gap", "ks_share", "u_lira", "cost"} <= set(results["statistic"])
    assert results[results["statistic"] != "cost"][["value", "low", "high"]].notna().all().all()


def test_the_study_is_sized_as_the_docs_say():
    preset = presets.load("gpu")
    docs = (SCRIPT.parents[1] / "docs" / "speed.md").read_text(encoding="utf-8")
    assert gpu_study.markdown(preset) in docs
    assert gpu_study.memory(preset) in " ".join(docs.split())
    seconds = sum(part.seconds for part in gpu_study.estimate(preset))
    assert seconds < 300, "with the script's 480 s, the study alone must fit"
    n, classes = preset.data.n_train, 10
    sizes = [f.size or round(f.share * n / classes) for f in preset.forget_sets]
    assert (n, preset.ensembles.n_models, preset.attribution.n_subsets, sizes) == (10_000, 20, 60, [100, 200, 100])
    training = next(gpu_study.estimate(preset))
    points = 20 * 10_000 + 60 * 7_500 + 2 * 20 * (9_900 + 9_800 + 9_900)
    per_point = training.flop / (points * preset.training.epochs)
    assert per_point == pytest.approx(3 * 0.583e9, rel=0.01), "backward costs twice as much as forward"


def test_matrix_products_of_the_estimate_are_those_of_a_module_by_hand():
    flop = gpu_study.Flop.of(presets.load("gpu", {"model.options.width": 4}))
    convolutions = [  # side of the output, inputs x filter, outputs
        (32, 3 * 9, 4), (16, 4 * 25, 8), (16, 8 * 9, 8), (16, 8 * 9, 8), (16, 8 * 9, 16), (8, 16 * 9, 16),
        (8, 16 * 9, 16), (6, 16 * 9, 8),
    ]  # fmt: skip
    assert flop.answer == sum(2 * side**2 * d * out for side, d, out in convolutions) + 2 * 8 * 10
    assert flop.matching == sum(2 * side**2 * d**2 + out * d**2 for side, d, out in convolutions)
