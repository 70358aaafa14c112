"""A store survives interruption and says what is wrong with it."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dmmlib.errors import StoreError
from dmmlib.hashing import config_hash
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


def test_another_configuration_is_refused_with_both_hashes(full):
    with pytest.raises(StoreError) as error:
        make(full.path, config={"lr": 0.2})
    assert config_hash({"lr": 0.1}) in str(error.value)
    assert config_hash({"lr": 0.2}) in str(error.value)


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match="is no store of this library"):
        make(tmp_path / "s")
    assert (tmp_path / "s" / "photo.jpg").exists()


def test_a_truncated_description_is_refused(full):
    description = full.path / "zarr.json"
    description.write_text(description.read_text()[:40])
    with pytest.raises(StoreError, match="description is damaged"):
        make(full.path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_only_that_shard_repaired(full, damage):
    before = full.read("logits")
    chunk = full.path / "logits" / "c" / "1" / "0" / "0"
    raw = bytearray(chunk.read_bytes())
    raw[17] ^= 4
    if damage == "remove":
        chunk.unlink()
    else:
        chunk.write_bytes(bytes(raw) if damage == "flip" else bytes(raw[:50]))
    store = make(full.path)
    with pytest.raises(StoreError, match=r"damaged in shards \[1\]"):
        store.read("logits")
    assert store.damaged() == [1]
    np.testing.assert_array_equal(store.read("logits", 20, 25), before[20:])
    store.drop(1)
    assert store.missing() == [1]
    store.write(1, values(store.models(1)))
    np.testing.assert_array_equal(store.read("logits"), before)


def test_a_full_disk_loses_nothing(full, monkeypatch):
    before = full.read("logits")
    full.drop(2)

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("zarr.storage._local._put", no_space)
        with pytest.raises(StoreError, match=r"Shard 2 .*No space left on device.*finished shards are kept"):
            full.write(2, values(full.models(2)))
    store = make(full.path)
    assert store.missing() == [2]
    np.testing.assert_array_equal(store.read("logits", 0, 20), before[:20])


def test_unknown_array(full):
    with pytest.raises(StoreError, match=r"no array 'margins'; it has \['done', 'logits', 'masks'\]"):
        full.read("margins")


WRITER = """
import sys
from pathlib import Path
from tests.test_store import make, values
store = make(Path(sys.argv[1]), n=400, shard_size=4)
print("ready", flush=True)
for shard in store.missing():
    store.write(shard, values(store.models(shard)))
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_content(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "s"
    kills = 0
    for _ in range(25):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            cwd=os.getcwd(),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.04))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process.stdout.close()
        if not make(path, n=400, shard_size=4).missing():
            break
    store = make(path, n=400, shard_size=4)
    for shard in store.missing():
        store.write(shard, values(store.models(shard)))
    assert kills >= 3
    assert store.damaged() == []
    for shard in range(store.n_shards):
        rows = store.models(shard)
        np.testing.assert_array_equal(store.read("logits", rows.start, rows.stop), values(rows)["logits"])


def test_description_says_what_it_holds(full):
    attributes = json.loads((full.path / "zarr.json").read_text())["attributes"]
    assert attributes["config"] == {"lr": 0.1}
    assert attributes["n_models"] == 25
