"""A store survives interruption and says what is wrong with it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr
from zarr.storage import FsspecStore

from dmmlib.errors import StoreError
from dmmlib.files import config_hash
from dmmlib.progress import silent
from dmmlib.store import Store

ARRAYS = {"logits": ((5, 2), "float32"), "masks": ((7,), "bool")}


def values(rows, seed=0):
    rng = np.random.default_rng([seed, rows.start])
    return {"logits": rng.normal(size=(len(rows), 5, 2)).astype("float32"), "masks": rng.random((len(rows), 7)) < 0.5}


def make(path, n=25, shard_size=10, config=None):
    return Store.open(path, config or {"lr": 0.1}, n, ARRAYS, shard_size)


@pytest.fixture
def full(tmp_path):
    store = make(tmp_path / "s")
    for shard in store.missing():
        store.write(shard, values(store.models(shard)))
    return store


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "s"


def test_what_is_written_is_read_in_any_order(tmp_path):
    store = make(tmp_path / "s")
    assert store.missing() == [0, 1, 2]
    for shard in (2, 0):
        store.write(shard, values(store.models(shard)))
    assert make(tmp_path / "s").missing() == [1]
    np.testing.assert_array_equal(store.read("logits", 20, 25), values(range(20, 25))["logits"])
    with pytest.raises(StoreError, match=r"lacks 1 of 3 shards \(first: 1\)"):
        store.read("logits")
    store.write(1, values(store.models(1)))
    assert make(tmp_path / "s").read("logits").shape == (25, 5, 2)
    assert store.read("masks").dtype == bool


def test_zeros_are_content_not_damage(tmp_path):
    store = make(tmp_path / "s", n=10)
    store.write(0, {"logits": np.zeros((10, 5, 2), "float32"), "masks": np.zeros((10, 7), bool)})
    assert not store.read("masks").any()
    assert store.damaged() == []


def test_another_configuration_is_refused_with_both_hashes(full, folder):
    with pytest.raises(StoreError) as error:
        make(folder, config={"lr": 0.2})
    assert config_hash({"lr": 0.1}) in str(error.value)
    assert config_hash({"lr": 0.2}) in str(error.value)


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match="is no store of this library"):
        make(tmp_path / "s")
    assert (tmp_path / "s" / "photo.jpg").exists()


def test_a_truncated_description_is_written_anew_if_the_rest_is_of_the_same_store(full, folder):
    description = folder / "zarr.json"
    before = description.read_text()
    description.write_text(before[:40])
    assert make(folder).damaged() == []
    assert description.read_text() == before
    description.write_text(before[:40])
    shutil.rmtree(folder / "done")
    with pytest.raises(StoreError, match="no store of this library"):
        make(folder)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_only_that_shard_repaired(full, folder, damage):
    before = full.read("logits")
    chunk = folder / "logits" / "c" / "1" / "0" / "0"
    raw = bytearray(chunk.read_bytes())
    raw[17] ^= 4
    if damage == "remove":
        chunk.unlink()
    else:
        chunk.write_bytes(bytes(raw) if damage == "flip" else bytes(raw[:50]))
    store = make(folder)
    with pytest.raises(StoreError, match=r"damaged in shards \[1\]"):
        store.read("logits")
    assert store.damaged() == [1]
    np.testing.assert_array_equal(store.read("logits", 20, 25), before[20:])
    store.drop(1)
    assert store.missing() == [1]
    store.write(1, values(store.models(1)))
    np.testing.assert_array_equal(store.read("logits"), before)


def test_a_full_disk_loses_nothing(full, folder, monkeypatch):
    before = full.read("logits")
    full.drop(2)

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("zarr.storage._local._put", no_space)
        with pytest.raises(StoreError, match=r"Shard 2 .*No space left on device.*finished shards are kept"):
            full.write(2, values(full.models(2)))
    store = make(folder)
    assert store.missing() == [2]
    np.testing.assert_array_equal(store.read("logits", 0, 20), before[:20])


def test_unknown_array(full):
    with pytest.raises(StoreError, match=r"no array 'margins'; it has \['done', 'logits', 'masks'\]"):
        full.read("margins")


def test_a_disk_that_is_really_full(tmp_path):
    """A file may not grow beyond 1 kB in this process, as on a full disk."""
    script = """
import resource, signal, sys
from pathlib import Path
from tests.test_store import make, values
store = make(Path(sys.argv[1]), n=400, shard_size=100)
store.write(0, values(store.models(0)))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
store.write(1, values(store.models(1)))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "s")]
    process = subprocess.run(command, capture_output=True, text=True, cwd=os.getcwd())
    assert "StoreError: Shard 1 of" in process.stderr
    assert "cannot be written (File too large); free space and run again" in process.stderr
    store = make(tmp_path / "s", n=400, shard_size=100)
    assert store.missing() == [1, 2, 3]
    np.testing.assert_array_equal(store.read("logits", 0, 100), values(range(100))["logits"])


def test_a_disk_that_gives_back_something_else(full, monkeypatch):
    full.drop(0)
    put = zarr.storage._local._put

    def flips(path, value, exclusive=False):
        written = put(path, value, exclusive)
        if "logits" in str(path):
            raw = bytearray(path.read_bytes())
            raw[3] ^= 1
            path.write_bytes(bytes(raw))
        return written

    with monkeypatch.context() as patch:
        patch.setattr("zarr.storage._local._put", flips)
        with pytest.raises(StoreError, match=r"Shard 0 .*cannot be written"):
            full.write(0, values(full.models(0)))
    assert full.missing() == [0]


def test_a_store_at_an_fsspec_address():
    place = "memory://bucket/runs/s.zarr"
    store = make(place)
    for shard in store.missing():
        store.write(shard, values(store.models(shard)))
    again = make(place)
    assert again.missing() == again.damaged() == []
    np.testing.assert_array_equal(again.read("logits", 10, 20), values(range(10, 20))["logits"])
    with pytest.raises(StoreError, match="choose another directory"):
        make(place, config={"lr": 0.2})
    with pytest.raises(StoreError, match="cannot be reached"):
        make("nosuch://bucket/s")


def test_an_address_that_fails_in_its_own_way(monkeypatch):
    store = make("memory://bucket/runs/unreachable.zarr")

    async def fails(*_, **__):
        raise RuntimeWarning("no route to bucket")  # like botocore's, no OSError

    with monkeypatch.context() as patch:
        patch.setattr(FsspecStore, "set", fails)
        with pytest.raises(StoreError, match=r"Shard 0 .* cannot be written \(no route to bucket\)"):
            store.write(0, values(store.models(0)))
    assert 0 in store.missing()
    monkeypatch.setattr(FsspecStore, "get", fails)
    with pytest.raises(StoreError, match=r"cannot be reached \(no route to bucket\); try again"):
        make("memory://bucket/runs/unreachable.zarr")


def test_a_creation_that_was_interrupted_is_completed(tmp_path):
    make(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "done")
    shutil.rmtree(tmp_path / "s" / "masks")
    store = make(tmp_path / "s")
    store.write(1, values(store.models(1)))
    assert store.missing() == [0, 2]


def test_a_creation_that_was_killed_in_its_first_write_is_begun_anew(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "zarr.json.0123abcd.partial").write_bytes(b"{")
    assert make(tmp_path / "s").missing() == [0, 1, 2]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "notes.txt").write_bytes(b"mine")
    with pytest.raises(StoreError, match="no store of this library"):
        make(tmp_path / "t")


@pytest.mark.parametrize("sealed", [True, False])
def test_another_run_that_writes_the_same_shard_to_other_last_bits_does_no_harm(tmp_path, monkeypatch, sealed):
    mine, other = make(tmp_path / "s"), make(tmp_path / "s")
    equal, of_other = np.array_equal, values(range(10), seed=1)

    def met(*arrays, **how):  # as this run reads back what it wrote
        monkeypatch.setattr(np, "array_equal", equal)
        other.write(0, of_other)
        if not sealed:
            other.drop(0)
        return equal(mine._array("logits")[:10], arrays[1], **how)

    monkeypatch.setattr(np, "array_equal", met)
    mine.write(0, values(range(10)))
    assert mine.missing() == [1, 2]
    assert mine.damaged() == []
    expected = of_other if sealed else values(range(10))
    np.testing.assert_array_equal(mine.read("logits", 0, 10), expected["logits"])


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from dmmlib.ensemble import train
from dmmlib.progress import silent
from dmmlib.study import Study
from tests.conftest import TINY

def train_all(runs):
    torch.set_num_threads(1)
    Study(TINY | {"device": "cpu"}, runs=runs, progress=silent).subsets()

def shards(runs):
    return len(list(Path(runs).glob("store/subsets-*/done/c/*")))

random.seed(0)
kills = finished = 0
while kills < 50:
    runs = f"{sys.argv[1]}/{finished}"
    child = os.fork()  # torch and zarr are imported once; neither has started threads here
    if child == 0:
        train_all(runs)
        os._exit(0)
    time.sleep(random.uniform(0.03, 0.45))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    kills += os.WIFSIGNALED(status)
    finished += not os.WIFSIGNALED(status)
print(kills, finished, shards(f"{sys.argv[1]}/{finished}"))
"""


@pytest.mark.slow
def test_training_killed_fifty_times_ends_as_if_undisturbed(tmp_path, tiny):
    from dmmlib.study import Study  # here, or processes that only write would import torch
    from tests.conftest import TINY

    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, cwd=os.getcwd(), env=environment, check=True)
    kills, finished, _ = map(int, output.stdout.split())
    assert kills == 50
    for run in range(finished + 1):  # the last one is completed here
        resumed = Study(TINY, runs=tmp_path / str(run), progress=silent)
        np.testing.assert_allclose(resumed.subsets()[1], tiny.subsets()[1], atol=1e-4)
        np.testing.assert_array_equal(resumed.subsets()[0], tiny.subsets()[0])


WRITER = """
import sys
from pathlib import Path
from tests.test_store import make, values
store = make(Path(sys.argv[1]), n=400, shard_size=4)
for shard in store.missing():
    store.write(shard, values(store.models(shard)))
"""


def test_two_runs_on_one_store_do_no_harm(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "s")]
    runs = [subprocess.Popen(command, cwd=os.getcwd(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate()[1] for run in runs] == ["", ""]
    store = make(tmp_path / "s", n=400, shard_size=4)
    assert store.missing() == store.damaged() == []
    for shard in (0, 50, 99):
        rows = store.models(shard)
        np.testing.assert_array_equal(store.read("logits", rows.start, rows.stop), values(rows)["logits"])


MAKER = """
import sys, time
from pathlib import Path
from tests.test_store import make
print("ready", flush=True)
sys.stdin.readline()
for i in range(60):
    make(Path(sys.argv[1]) / str(i), n=40, shard_size=4)
"""


def test_two_runs_that_create_the_same_stores_at_once(tmp_path):
    command = [sys.executable, "-c", MAKER, str(tmp_path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    runs = [subprocess.Popen(command, cwd=os.getcwd(), text=True, **pipes) for _ in range(2)]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    assert [run.communicate()[1] for run in runs] == ["", ""]


def test_description_says_what_it_holds(full, folder):
    attributes = json.loads((folder / "zarr.json").read_text())["attributes"]
    assert attributes["config"] == {"lr": 0.1}
    assert attributes["n_models"] == 25
