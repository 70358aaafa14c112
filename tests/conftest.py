"""Shared fixtures: a study small enough to train in a second or two."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process for each core, and more
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils._python_dispatch import TorchDispatchMode

from dmmlib.progress import silent
from dmmlib.study import Study

DEVICE = os.environ.get("DMM_TEST_DEVICE", "auto")
SHARED = Path(__file__).parents[2] / "shared"

settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are busy
settings.load_profile("suite")

TINY = {
    "name": "tiny",
    "device": DEVICE,
    "data": {"name": "digits", "n_train": 120, "n_val": 40},
    "model": {"name": "linear"},
    "training": {"epochs": 5, "batch_size": 40, "lr": 0.1},
    "ensembles": {"n_models": 8, "chunk": 16, "shard": 20},
    "datamodels": {"n_subsets": 100, "n_held_out": 20, "lambdas": [0.1, 0.5], "sizes": [50, 100]},
    "attribution": {"n_subsets": 30},
    "forget_sets": [{"name": "random_6", "kind": "random", "size": 6}, {"name": "pc1", "kind": "pc", "size": 6}],
    "tuning": {"forget_sets": [{"name": "tune", "kind": "random", "size": 6}], "n_models": 8, "budget": 2},
    "unlearning": {"checkpoints": 2},
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Three processes on two cores, as many wait for a browser, a kernel or the disk; four take as long."""
    return max(1, 3 * (os.cpu_count() or 1) // 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that have many slow tests, so that no core waits for one of them at the end.

    Notebooks under nbval come after these, as they find trained what those in JupyterLab needed (`smoke_store`).
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -0.5 if item.path.name == "test_notebooks.py" else -slow[item.path])


@pytest.fixture(scope="session")
def smoke_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is trained on the smoke preset, by whichever test comes first, in a folder that all processes share."""
    own = tmp_path_factory.getbasetemp()
    store = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "smoke-store"
    store.mkdir(exist_ok=True)
    return store


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A tiny study that trains as it is asked."""
    folder = tmp_path_factory.mktemp("tiny")
    return Study(TINY, runs=folder / "runs", figures=folder / "figures", progress=silent)


@pytest.fixture
def device() -> torch.device:
    """The device that the suite was asked to run on."""
    from dmmlib.models import resolve_device

    return resolve_device(DEVICE)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


class Watched(TorchDispatchMode):
    """Notes, of all that torch does, numbers that Python reads off tensors, and layouts that convolutions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.channels_last = 0, list[bool]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.read += function is torch.ops.aten._local_scalar_dense.default
        if function is torch.ops.aten.convolution.default:
            self.channels_last.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return function(*args, **(kwargs or {}))


def alive(pid: int) -> bool:
    """Whether a process runs: it exists, and not only because nobody asked how it ended."""
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def damages(path, rng, n=200):
    """Write a file n times with three bits flipped, and say when."""
    whole = path.read_bytes()
    for _ in range(n):
        damaged = bytearray(whole)
        for at in rng.integers(len(whole), size=3):
            damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        yield
