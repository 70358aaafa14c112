"""Shards sent to other processes come back the same, and a dead worker loses nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
import torch

from dmmlib import models
from dmmlib.app import cluster
from dmmlib.app.status import trained
from dmmlib.errors import PresetError, SchedulerError
from dmmlib.presets import ClusterSection
from dmmlib.progress import silent
from dmmlib.study import Study
from dmmlib.trainer import WORKERS
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
distributed = pytest.importorskip("distributed", reason="the extra `cluster` (Dask) is not installed")


@pytest.fixture(scope="module")
def workers():
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local:
        yield local


@pytest.fixture
def started():
    """Workers that were connected to during a test; clusters that were started for it are closed after it."""
    connect, workers = WORKERS["dask"], []
    WORKERS.add("dask", lambda trainer: workers.append(connect(trainer)) or workers[-1])
    yield workers
    WORKERS.add("dask", connect)
    for each in workers:
        if isinstance(each, cluster.Dask):
            if each.client.cluster is not None:
                each.client.cluster.close()
            each.client.close()


def study(runs, **places):
    return Study(TINY | {"device": "cpu"}, places, runs=runs, progress=silent)


def test_results_equal_the_serial_ones(tmp_path, workers, tiny):
    far = study(tmp_path, scheduler=workers.scheduler_address)
    np.testing.assert_allclose(far.subsets()[1], tiny.subsets()[1], atol=1e-5)
    np.testing.assert_array_equal(far.subsets()[0], tiny.subsets()[0])
    np.testing.assert_allclose(far.originals().logits(far.x).numpy(), tiny.original_logits(), atol=1e-5)
    forget_set = far.forget_sets()["random_6"]
    far.train_oracles()
    np.testing.assert_allclose(far.oracles(forget_set), tiny.oracles(forget_set), atol=1e-5)
    assert far.preset.name == "tiny", "where it runs is not part of what it is"


@pytest.mark.parametrize("scheduler", ["local-cluster", "cluster"])
def test_clusters_that_a_preset_names_train_the_same(tmp_path, tiny, started, scheduler):
    threads = torch.get_num_threads()
    options = {"n_workers": 0, "threads_per_worker": 1, "dashboard_address": None}  # `jobs` are started afterwards
    try:
        far = study(tmp_path, scheduler=scheduler, threads=1, cluster={"options": options, "jobs": 1})
        np.testing.assert_allclose(far.subsets()[1], tiny.subsets()[1], atol=1e-5)
    finally:
        torch.set_num_threads(threads)
    assert len(started[0].client.cluster.workers) == 1


SCRIPT = """
import sys, torch
from dmmlib import data, models
from dmmlib.progress import silent
from dmmlib.study import Study
from tests.conftest import TINY

WIDE = 12
digits = data.load("digits", 200, 60)


@models.register("wide", prepare=models.pooled)
def wide(shape, n_classes):
    return torch.nn.Sequential(torch.nn.Linear(shape[0], WIDE), torch.nn.ReLU(), torch.nn.Linear(WIDE, n_classes))


@data.register("mine")
def mine():
    return digits


def outputs(scheduler):
    own = {"model.name": "wide", "data.name": "mine", "scheduler": scheduler, "threads": 1}
    return Study(TINY | {"device": "cpu"}, own, runs=f"{sys.argv[1]}/{scheduler}", progress=silent).subsets()[1][:]
"""
GUARDED = """
if __name__ == "__main__":
    print("apart by", abs(outputs("local-cluster") - outputs("local")).max())
"""


def run_script(tmp_path, text):
    (tmp_path / "script.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)


def test_a_model_and_data_of_ones_own_go_to_the_workers(tmp_path):
    said = run_script(tmp_path, SCRIPT + GUARDED)
    assert "apart by" in said.stdout, said.stderr
    assert float(said.stdout.split()[-1]) < 1e-5, "where arrays lie in memory moves last bits"


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    said = run_script(tmp_path, SCRIPT + "outputs('local-cluster')")
    assert said.returncode == 1
    last = said.stderr.strip().splitlines()[-1]
    assert last.startswith("dmmlib.errors.SchedulerError: ")
    assert "under `if __name__ == '__main__':`" in last
    assert said.stderr.count("Traceback") == 1, "of the script itself; its workers say nothing"


def test_users_of_one_machine_do_not_share_a_workers_folder(tmp_path, monkeypatch):
    (tmp_path / "dmmlib-worker").touch()  # another's, where nothing can be written
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    state = SimpleNamespace(nthreads=torch.get_num_threads())
    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(state=state))
    preset = study(tmp_path, seed=17).preset.model_dump_json()
    packed = np.packbits(np.ones((1, 120), bool), axis=1)
    assert cluster.train_shard(preset, cloudpickle.dumps({}), packed, [0], False)["logits"].shape == (1, 160, 10)


def test_a_model_of_the_library_under_a_name_of_ones_own_goes_to_the_workers(tmp_path):
    models.MODELS.add("mine", models.get("mlp"))
    try:
        sent = cloudpickle.loads(cluster._registered(study(tmp_path, model={"name": "mine"})))
    finally:
        models.MODELS.remove("mine")
    assert sent == {("model", "mine"): models.get("mlp")}, "and not the data set, which workers know"


def test_what_cannot_be_sent_to_workers_is_said(tmp_path, workers):
    lock = threading.Lock()

    def locked(shape, n_classes):
        with lock:
            return torch.nn.Linear(shape[0], n_classes)

    models.register("locked", prepare=models.pooled)(locked)
    try:
        with pytest.raises(SchedulerError, match="model 'locked' cannot be sent"):
            study(tmp_path, **{"scheduler": workers.scheduler_address, "model.name": "locked"}).subsets()
    finally:
        models.MODELS.remove("locked")


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"preload": ["evil.py"]}, "preload"),
        ({"worker_class": "evil.Worker"}, "worker_class"),
        ({"plugins": []}, "plugins"),
        ({"worker_extra_args": ["--preload", "evil.py"]}, "worker_extra_args"),
        ({"scheduler_options": {"preload": ["evil.py"]}}, "preload"),
        ({"scheduler_options": ["preload"]}, "scheduler_options that are no mapping"),
        ({"python": "evil"}, "python"),
    ],
)
def test_options_that_run_code_are_refused(tmp_path, options, refused):
    with pytest.raises(PresetError, match=f"cluster.options has '{refused}'"):
        _ = study(tmp_path, scheduler="cluster", cluster={"options": options}).subsets()


@pytest.mark.parametrize("type", ["distributed.utils.import_file", "distributed.Client", "distributed.Worker"])
def test_what_is_no_cluster_is_not_called(tmp_path, type):
    with pytest.raises(PresetError, match="is no cluster"):
        _ = study(tmp_path, scheduler="cluster", cluster={"type": type}).subsets()


def test_clusters_are_closed_to_strangers_by_default(tmp_path, monkeypatch):
    loopback, jobs = "127.0.0.1:0", {"type": "dask_jobqueue.SLURMCluster", "options": {"cores": 2}}
    assert cluster.guarded(ClusterSection(), tmp_path) == {"dashboard_address": loopback}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    options = cluster.guarded(ClusterSection(**jobs), tmp_path)
    assert options["security"] is True
    assert options["shared_temp_directory"] == str(tmp_path)
    assert options["scheduler_options"] == {"dashboard_address": loopback}
    assert options["worker_extra_args"] == ["--no-dashboard"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SchedulerError, match="needs the package cryptography"):
        cluster.guarded(ClusterSection(**jobs), tmp_path)
    jobs["options"]["security"] = False
    assert "security" not in cluster.guarded(ClusterSection(**jobs), tmp_path)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Slurm's two commands that dask_jobqueue calls, for a queue that starts every job at once; jobs it has had."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    commands = {
        "sbatch": f"""
grep -q "SBATCH -p nosuch" "$1" && echo "sbatch: error: invalid partition specified: nosuch" >&2 && exit 1
cp "$1" {tmp_path}/$$  # as it goes when this command ends
setsid sh {tmp_path}/$$ > /dev/null 2>&1 &
cp {tmp_path}/$$ {jobs}/$!
echo "Submitted batch job $!"
""",
        "scancel": 'kill -9 -- -"$1"\n',
    }
    for name, script in commands.items():
        (tmp_path / name).write_text("#!/bin/sh\n" + script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    yield jobs
    for job in jobs.iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(job.name), signal.SIGKILL)


SLURM = {
    "type": "dask_jobqueue.SLURMCluster",
    "options": {
        "cores": 2,
        "processes": 1,
        "memory": "1GB",
        "death_timeout": 300,
        "security": False,
        "scheduler_options": {"dashboard_address": None},
    },
    "jobs": 2,
}


def test_jobs_of_a_queue_train_the_same(tmp_path, queue, tiny, started):
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    told = []
    places = {"scheduler": "cluster", "cluster": SLURM}
    far = Study(TINY | {"device": "cpu"}, places, runs=tmp_path, progress=lambda *done: told.append(done))
    np.testing.assert_allclose(far.subsets()[1], tiny.subsets()[1], atol=1e-5)
    assert told.index(("wait for a worker", 0, 1)) < told.index(("wait for a worker", 1, 1))
    scripts = [job.read_text() for job in queue.iterdir()]
    assert len(scripts) == 2
    assert all("--nthreads 2" in script for script in scripts)


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_that_end_as_at_their_walltime_are_asked_for_again(tmp_path, queue, started, monkeypatch, processes):
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    monkeypatch.setattr(cluster, "LOOK", 0.2)
    monkeypatch.setattr(cluster, "LOST", 1.0)
    told, end = [], str(tmp_path / "end")
    options = SLURM["options"] | {"cores": processes, "processes": processes}
    places = {"scheduler": "cluster", "cluster": SLURM | {"jobs": 1, "options": options}}
    far = Study(TINY | {"device": "cpu"}, places, runs=tmp_path, progress=lambda *done: told.append(done))

    def dawdle(*_):
        while not os.path.exists(end):
            time.sleep(0.1)
        return {}

    def kill():
        while ("wait for a worker", 1, 1) not in told or not any(started[0].client.processing().values()):
            time.sleep(0.1)
        os.killpg(int(next(queue.iterdir()).name), signal.SIGKILL)
        Path(end).touch()

    monkeypatch.setattr(cluster, "train_shard", dawdle)
    killer = threading.Thread(target=kill)
    killer.start()
    assert list(far.trained(lambda _: (np.ones((1, 8), bool), [0], False), ["task"])) == [("task", {})]
    killer.join()
    assert len(list(queue.iterdir())) == 2
    assert told[:3] == [("wait for a worker", done, 1) for done in (0, 1, 0)]


SCHEDULER = """
import time, distributed
local = distributed.LocalCluster(n_workers=1, processes=False, protocol="tcp", dashboard_address=None)
print(local.scheduler_address, flush=True)
time.sleep(600)
"""


def test_a_scheduler_that_dies_is_named_and_another_connected_to(tmp_path, workers, started, monkeypatch):
    def arguments(_):
        return np.ones((1, 8), bool), [0], False

    monkeypatch.setattr(cluster, "train_shard", lambda *_: time.sleep(60))
    with subprocess.Popen([sys.executable, "-c", SCHEDULER], stdout=subprocess.PIPE, text=True) as scheduler:
        far = study(tmp_path, scheduler=scheduler.stdout.readline().strip())

        def kill():
            while not (started and any(started[0].client.processing().values())):
                time.sleep(0.1)
            scheduler.kill()

        threading.Thread(target=kill).start()
        with pytest.raises(SchedulerError, match=r"scheduler ended.* finished shards are kept\.$"):
            list(far.trained(arguments, ["task"]))
    monkeypatch.setattr(cluster, "train_shard", lambda *_: {})
    far = study(tmp_path, scheduler=workers.scheduler_address)
    for _ in range(2):
        assert list(far.trained(arguments, ["task"])) == [("task", {})]
        started[-1].client.close()  # as it does where a scheduler does not come back


def test_a_queue_that_refuses_is_quoted(tmp_path, queue):
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    refused = SLURM | {"options": SLURM["options"] | {"queue": "nosuch"}}
    with pytest.raises(SchedulerError, match="invalid partition specified: nosuch"):
        _ = study(tmp_path, scheduler="cluster", cluster=refused).subsets()
    assert not list(queue.iterdir())


def test_a_worker_trains_one_shard_at_a_time_with_all_its_threads(tmp_path, tiny):
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=3, dashboard_address=None) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):

        def watch():
            train, inside = Study.train_shard, []

            def watched(*given):
                inside.append(torch.get_num_threads())
                assert len(inside) == 1, "another shard is being trained"
                time.sleep(0.05)
                try:
                    assert inside == [3]
                    return train(*given)
                finally:
                    inside.pop()

            Study.train_shard = watched

        client.run(watch)
        far = study(tmp_path, scheduler=local.scheduler_address)
        np.testing.assert_allclose(far.subsets()[1], tiny.subsets()[1], atol=1e-5)


def test_a_worker_killed_in_the_middle_of_a_shard_loses_nothing(tmp_path, workers, tiny):
    far = study(tmp_path, scheduler=workers.scheduler_address)
    over = threading.Event()
    killed = []

    def dawdle():  # in a worker: a shard takes long enough to be killed in, on whatever machine
        train = Study.train_shard
        Study.train_shard = lambda *given: (time.sleep(1), train(*given))[1]

    def kill_one(client, pids):
        while not killed and not over.wait(0.01):
            for worker, tasks in client.processing().items():
                if tasks and worker in pids:
                    os.kill(pids[worker], signal.SIGKILL)
                    killed.append(worker)
                    break

    with distributed.Client(workers.scheduler_address, set_as_default=False) as client:
        client.run(dawdle)
        killer = threading.Thread(target=kill_one, args=(client, client.run(os.getpid)))
        killer.start()
        try:
            subsets = far.subsets()[1]
        finally:
            over.set()
            killer.join()
    assert killed
    np.testing.assert_allclose(subsets, tiny.subsets()[1], atol=1e-5)


def test_a_store_elsewhere(tmp_path, tiny):
    for place in ("memory://bucket/runs", (tmp_path / "elsewhere").as_uri()):
        far = study(tmp_path / "runs", store=place)
        np.testing.assert_allclose(far.subsets()[1], tiny.subsets()[1], atol=1e-5)
        status = trained(far, far.jobs()).set_index("models")
        assert status.loc["subset models", "done"] == 100, "without those held out"
        assert status.loc["originals", "done"] == 0
    assert list((tmp_path / "elsewhere").glob("subsets-*.zarr"))
    assert not list((tmp_path / "runs").glob("store/subsets-*"))


def test_what_cannot_be_reached_is_said_at_once(tmp_path):
    with pytest.raises(PresetError, match="local-cluster"):
        study(tmp_path, scheduler="nonsense")
    with pytest.raises(SchedulerError, match="No Dask scheduler"):
        _ = study(tmp_path, scheduler="nonsense:1").subsets()
    for odd, reason in (("http://127.0.0.1:9", "unknown address scheme 'http'"), ("127.0.0.1:x", "int")):
        with pytest.raises(SchedulerError, match=f"No Dask scheduler .*{reason}"):
            _ = study(tmp_path, scheduler=odd).subsets()
    with pytest.raises(PresetError, match="give a class"):
        _ = study(tmp_path, **{"scheduler": "cluster", "cluster.type": "os.system"}).subsets()
    with pytest.raises(SchedulerError, match="cannot be started"):
        _ = study(tmp_path, **{"scheduler": "cluster", "cluster.type": "distributed.NoSuch"}).subsets()
