"""The script for a GPU machine, on a CPU: every stage has a result and a log, whatever becomes of the others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu.sh"


@pytest.mark.skipif(shutil.which("bash") is None or sys.platform == "win32", reason="a script for bash")
def test_a_stage_that_runs_out_of_time_stops_no_other(tmp_path):
    quick = {"DEVICE": "cpu", "QUICK": "1", "OUT": str(tmp_path / "out")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for total, results in (("0", {"not-started"}), ("14", {"passed", "out-of-time", "not-started"})):
        environment = {**os.environ, **quick, "TOTAL": total, "PATH": path}
        said = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in said.splitlines()[-4:]]
        assert rows[0] == ["stage", "result", "seconds"]
        assert [row[0] for row in rows[1:]] == ["cuda_tests", "notebooks", "engine"]
        assert {row[1] for row in rows[1:]} <= results
    assert (tmp_path / "out" / "cuda_tests.log").stat().st_size or rows[1][1] == "out-of-time"
