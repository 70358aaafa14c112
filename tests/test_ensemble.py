"""Training many models at once gives each the model that it would be alone."""

import copy
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend.process import LokyProcess
from torch import nn
from torch.nn import functional as F

from dmmlib import data, datamodels, ensemble, execution, models, stacking
from dmmlib.baselines.whitening import Whitening
from dmmlib.ensemble import Ensemble, Training
from dmmlib.errors import DataError, DeviceError, MethodError, OptionError, SchedulerError
from dmmlib.execution import Execution, can_compile, candidates, compiled, measure
from dmmlib.optim import SGD, Adam
from tests.conftest import SHARED, Watched, alive, needs_cuda

TRAINING = Training(epochs=3, batch_size=16, lr=0.05)


@pytest.fixture(scope="module")
def points():
    d = data.load("digits", 90, 20)
    return d, models.normalise(d, d.x), torch.from_numpy(d.y)


def factory_for(name, x, **options):
    return lambda: models.build(name, tuple(x.shape[1:]), 10, **options)


def masks_of_sizes(sizes, n=90, seed=0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((len(sizes), n), bool)
    for mask, size in zip(masks, sizes, strict=True):
        mask[rng.permutation(n)[:size]] = True
    return masks


def train_alone(factory, x, y, mask, seed, training):
    """The same training in plain PyTorch, one model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory()
    pool, rng = np.flatnonzero(mask), np.random.default_rng(seed)
    n_batches = math.ceil(len(pool) / training.batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), training.lr, training.momentum, weight_decay=training.weight_decay, nesterov=True
    )
    step, n_steps = 0, training.epochs * n_batches
    seen = []
    for _ in range(training.epochs):
        for batch in np.array_split(rng.permutation(pool), n_batches):
            seen.append(batch)
            for group in optimizer.param_groups:
                group["lr"] = training.rate((step + 0.5) / n_steps)
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            step += 1
    assert set(np.concatenate(seen)) == set(pool)
    return model.eval()


@pytest.mark.parametrize("name", ["linear", "mlp", "convnet", "resnet9"])
def test_members_equal_models_trained_alone(points, name):
    d, x, y = points
    if name in ("linear", "mlp"):
        x = models.pooled(d, d.x)
    if name == "resnet9":
        x = F.interpolate(x, size=32)
    options = {"width": 4} if name == "resnet9" else {}
    x = x.double()  # so that nothing but a real difference shows

    def factory():
        return models.build(name, tuple(x.shape[1:]), 10, **options).double()

    masks = masks_of_sizes([45, 37, 45])
    trained = ensemble.train(factory, x[:90], y[:90], masks, [5, 6, 7], TRAINING)
    logits = trained.logits(x)
    for i, seed in enumerate([5, 6, 7]):
        alone = train_alone(factory, x[:90], y[:90], masks[i], seed, TRAINING)(x)
        torch.testing.assert_close(logits[i].double(), alone.detach(), rtol=1e-4, atol=1e-4)


def test_result_depends_on_seed_and_mask_not_on_neighbours(points):
    d, _, y = points
    x = models.pooled(d, d.x)
    factory = factory_for("mlp", x)
    masks = masks_of_sizes([45, 30, 45, 45, 89, 30])
    seeds = [1, 2, 3, 4, 5, 6]
    whole = ensemble.train(factory, x[:90], y[:90], masks, seeds, TRAINING).logits(x)
    for chunk in (1, 2):
        again = ensemble.train(factory, x[:90], y[:90], masks, seeds, TRAINING, Execution(chunk)).logits(x)
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)
    last = ensemble.train(factory, x[:90], y[:90], masks[3:], seeds[3:], TRAINING).logits(x)
    torch.testing.assert_close(last, whole[3:], rtol=1e-4, atol=1e-4)
    assert (whole[0] - whole[2]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "way",
    [
        Execution(2, 2),
        Execution(2, 2, compile=True),
        Execution(1, 1, compile=True),
        Execution(2, 2, compile=True, processes=True),
    ],
)
def test_how_it_is_carried_out_changes_no_model(points, way):
    if way.compile and not can_compile():
        if not way.processes:
            pytest.skip("no C++ compiler on this machine")
        way = replace(way, compile=False)
    d, _, y = points
    x = models.pooled(d, d.x).double()

    def factory():
        return models.build("mlp", tuple(x.shape[1:]), 10, hidden=8).double()

    masks = masks_of_sizes([45, 30, 45, 45, 45, 30])  # 3 batches of 15, or 2 of 15
    threads = torch.get_num_threads()
    plain = ensemble.train(factory, x[:90], y[:90], masks, range(6), TRAINING, Execution(6)).logits(x)
    other = ensemble.train(factory, x[:90], y[:90], masks, range(6), TRAINING, way).logits(x)
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)
    assert torch.get_num_threads() == threads


def test_members_are_split_evenly_among_workers():
    sizes = [len(part) for part in Execution(16, 2).split(np.arange(100))]
    assert sizes == [13] * 4 + [12] * 4
    assert np.concatenate(Execution(16, 2).split(np.arange(100))).tolist() == list(range(100))
    assert [len(part) for part in Execution(32, 4).split(np.arange(3))] == [1, 1, 1]


def _shift(by):
    return lambda chunk: (chunk + by, os.getpid(), threading.get_ident())


def test_processes_serve_closures_in_order_and_are_kept():
    way = Execution(1, 2, processes=True)
    for by in (10, 20):
        values, pids, _ = zip(*way.run(_shift(by), range(6)), strict=True)
        assert values == tuple(range(by, by + 6))
        assert os.getpid() not in pids
        assert len(set(pids)) <= 2


def test_equal_functions_share_their_code_whatever_pickle_they_came_in():
    """torch compiles a step anew for each code object of a loss."""
    one, two = (execution._unpack(execution._pack(_shift(by)).tobytes()) for by in (1, 2))
    assert (one(0)[0], two(0)[0]) == (1, 2)
    assert one.__code__ is two.__code__


def test_what_cannot_be_sent_is_done_in_threads():
    lock = threading.Lock()

    def work(chunk):
        with lock:
            return os.getpid()

    assert set(Execution(1, 2, processes=True).run(work, range(4))) == {os.getpid()}


def test_a_failure_in_a_process_is_raised_as_it_is():
    def fails(chunk):
        raise DataError(f"chunk {chunk}")

    with pytest.raises(DataError, match=r"chunk \d"):  # whichever fails first
        list(Execution(1, 2, processes=True).run(fails, range(3)))


def test_a_killed_process_gives_one_clear_error_and_the_next_run_works():
    def dies(chunk):
        os.kill(os.getpid(), signal.SIGKILL)

    way = Execution(1, 2, processes=True)
    with pytest.raises(SchedulerError, match="process was killed"):
        list(way.run(dies, range(3)))
    assert [value for value, *_ in way.run(_shift(1), range(3))] == [1, 2, 3]


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_worker_processes_end_with_the_one_that_started_them(tmp_path, blow):
    """As Ctrl-C in a terminal, where the whole group is told; as a killed kernel, whose workers hear nothing."""
    process, workers = waits(tmp_path)
    (os.killpg if blow == signal.SIGINT else os.kill)(process.pid, blow)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert blow == signal.SIGKILL or b"KeyboardInterrupt" in errors
    deadline = time.monotonic() + 60
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def waits(folder, first="signal.signal(signal.SIGINT, signal.default_int_handler)"):
    """A command whose two worker processes are at work, and their numbers; `first` is done before they start."""
    script = folder / "waits.py"
    script.write_text(
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from dmmlib.execution import Execution\n"
        f"{first}\n"
        "def wait(chunk):\n"
        "    Path(f'worker-{os.getpid()}').touch()\n"
        "    time.sleep(100)\n"
        "list(Execution(1, 2, processes=True).run(wait, range(4)))\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        cwd=folder,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(execution.__file__).parents[1])},
    )
    deadline = time.monotonic() + 60
    while len(workers := [int(p.name.split("-")[1]) for p in folder.glob("worker-*")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process, workers


def test_an_interrupt_while_workers_start_leaves_none(monkeypatch):
    """joblib does not know of one that has only just started; at its end this process would wait for it."""
    get_reusable_executor(kill_workers=True).shutdown()
    start, started = LokyProcess.start, []

    def interrupted(process):
        started.append((process, process._args))  # while its queues are kept, it goes on starting
        start(process)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LokyProcess, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(Execution(1, 2, processes=True).run(_shift(1), range(3)))
    ((process, _),) = started
    process.join(timeout=30)
    assert not process.is_alive()
    assert [value for value, *_ in Execution(1, 2, processes=True).run(_shift(1), range(3))] == [1, 2, 3]


def test_an_interrupt_that_is_swallowed_still_ends_the_wait(tmp_path):
    """As in a callback of the garbage collector, which says `Exception ignored` and goes on."""
    process, _ = waits(tmp_path, "signal.signal(signal.SIGINT, lambda *_: None)")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors


COMPILES = """
import torch._dynamo  # sets the folder that torch's processes share by default
from torch._inductor.runtime.cache_dir_utils import cache_dir
from dmmlib.execution import compiled
compiled(lambda x: x + 1)
print(cache_dir())
"""


def test_what_a_killed_compilation_leaves_meets_no_later_run():
    """Half a library in a folder that processes share would stop every later run; so each has one of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    command = [sys.executable, "-c", COMPILES]
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {run.communicate()[0].strip() for run in runs} - {""}
    assert len(folders) == 2
    assert all("dmm-compiled-" in folder for folder in folders), "none is the one that all share"
    assert not any(Path(folder).exists() for folder in folders), "it lasts as long as the process"


def test_many_kinds_of_steps_stay_compiled_in_threads():
    """torch's limit on recompilation is a setting of each thread, and 8 unless raised there."""
    if not can_compile():
        pytest.skip("no C++ compiler on this machine")

    def limit(_):
        compiled(test_many_kinds_of_steps_stay_compiled_in_threads)
        return torch._dynamo.config.recompile_limit

    assert list(Execution(1, 2).run(limit, [0, 1, 2])) == [256] * 3


def test_a_second_architecture_is_compiled_for_its_own_sizes(monkeypatch):
    """What differs between two architectures is no size that varies: as one, the second would be slower."""
    shapes = []

    def sees(graph, inputs):
        values = (node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder")
        shapes.append([value.shape for value in values if isinstance(value, torch.Tensor)])
        return graph

    step = torch.compile(ensemble._step, backend=sees)
    monkeypatch.setattr(execution, "_compile", lambda _: step)
    torch._dynamo.reset()
    for width in (6, 9):
        module = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        stacked = ensemble.initialise(lambda module=module: module, range(3))
        loss, optimizer = ensemble.classification(torch.zeros(7, dtype=torch.long)), Adam(0.01)
        state, batches = optimizer.start(stacked.params), np.zeros((2, 3, 5), np.int64)
        ensemble.descend(stacked, torch.zeros(7, 4), batches, loss, optimizer, state, compile=True)
        sizes = {size for shape in shapes.pop() for size in shape if isinstance(size, int)}
        assert {4, width, 3} <= sizes
        assert not shapes, "one compilation an architecture"


def test_a_failure_in_a_thread_is_raised_and_leaves_the_threads_as_they_were():
    threads = torch.get_num_threads()

    def fails(chunk):
        raise ValueError(f"chunk {chunk}")

    with pytest.raises(ValueError, match="chunk 0"):
        list(Execution(1, 2).run(fails, [0, 1, 2]))
    assert torch.get_num_threads() == threads


def test_measuring_prefers_what_is_fast_and_leaves_out_what_would_take_ages(monkeypatch):
    seconds = {1: 0.2, 4: 0.02, 32: 0.5, 64: 70.0, 1024: 1e4}
    now = 0.0

    def steps(execution, n):
        nonlocal now
        now += 0.01 * execution.chunk + seconds[execution.chunk] * n  # the former for making its models

    monkeypatch.setattr("dmmlib.execution.time", SimpleNamespace(perf_counter=lambda: now))
    rates = measure([Execution(k) for k in seconds], steps)
    assert max(rates, key=rates.get) == Execution(4)
    assert rates[Execution(4)] == pytest.approx(4 / 0.02)
    assert Execution(1024) not in rates, "at the rate of 64, over two seconds a step"


def test_measuring_takes_no_longer_than_training_deserves(monkeypatch):
    now, tried = 0.0, [Execution(k) for k in (1, 4, 16)]

    def steps(execution, n):
        nonlocal now
        now += 0.1 * n

    monkeypatch.setattr("dmmlib.execution.time", SimpleNamespace(perf_counter=lambda: now))
    assert [list(measure(tried, steps, planned)) for planned in (5, 400, 1e9)] == [tried[:1], tried[:2], tried]


def test_measuring_starts_no_processes_for_what_is_slow_in_threads(monkeypatch):
    now = 0.0

    def steps(execution, n):
        nonlocal now
        now += 0.1 * n / (1 + execution.processes)

    monkeypatch.setattr("dmmlib.execution.time", SimpleNamespace(perf_counter=lambda: now))
    tried = [Execution(k, 2, processes=p) for p in (False, True) for k in (1, 4, 16)]
    assert [(e.chunk, e.processes) for e in measure(tried, steps)] == [(1, False), (4, False), (16, False), (16, True)]


def test_measuring_compiles_nothing_that_is_slow_without(monkeypatch):
    now = 0.0

    def steps(execution, n):
        nonlocal now
        now += 0.1 * n

    monkeypatch.setattr("dmmlib.execution.time", SimpleNamespace(perf_counter=lambda: now))
    tried = [Execution(k, compile=c) for c in (False, True) for k in (1, 4, 16)]
    compiled = [e.chunk for e in measure([e for e in tried if e.compile or e.chunk != 4], steps) if e.compile]
    assert compiled == [4, 16], "4 was not tried uncompiled"
    tried = [Execution(k, 2, c, p) for p in (False, True) for c in (False, True) for k in (1, 16)]
    assert [e.chunk for e in measure(tried, steps) if e.compile] == [16, 16], "nor in processes, what was left out"


def test_measuring_leaves_out_what_a_gpus_memory_does_not_hold():
    def steps(execution, n):
        if execution.chunk > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        time.sleep(0.3)

    most = 4
    assert set(measure([Execution(4), Execution(32)], steps)) == {Execution(4)}
    most = 1
    with pytest.raises(DeviceError, match=r"A step of 4 models does not fit .* lower ensembles.chunk"):
        measure([Execution(4), Execution(32)], steps)


@pytest.mark.parametrize("chunk", [1, 3])
def test_no_training_step_waits_for_a_device(chunk):
    """A number that is read off a device makes Python wait for it; the rate, the only one read, is on the CPU."""
    x, y = torch.randn(40, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.arange(40) % 10
    read = []
    for epochs in (1, 3):
        training = Training(epochs=epochs, batch_size=20)
        with Watched() as seen:
            ensemble.train(
                lambda: models.build("resnet9", (3, 16, 16), 10, width=2),
                x, y, np.ones((chunk, 40), bool), range(chunk), training, Execution(chunk),
            )  # fmt: skip
        read.append(seen.read)
    assert read[1] - read[0] == training.steps(40) - training.steps(40) // 3
    if chunk == 1:
        assert all(seen.channels_last[-8 * 4 :]), "alone, a model keeps the layout in which convolutions are fastest"


def test_what_a_preset_settles_is_not_tried():
    cpu = torch.device("cpu")
    assert {e.chunk for e in candidates(cpu, chunk=7)} == {7}
    assert not any(e.compile for e in candidates(cpu, compile=False))
    assert all(e.compile for e in candidates(cpu, compile=True))
    assert not any(e.processes for e in candidates(cpu)), "little work must not wait for processes to start"
    both = {e.processes for e in candidates(cpu, many=True)}
    assert {1, 32} < {e.chunk for e in candidates(torch.device("cuda"))}, (
        "alone or together: a GPU tells which is faster"
    )
    assert both == ({False, True} if torch.get_num_threads() > 1 else {False}), "which is faster is measured"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(0.1, 0.9, 5e-4, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=5e-4, nesterov=True)),
        (SGD(0.1, 0.0), lambda p: torch.optim.SGD(p, 0.1)),
        (Adam(0.03), lambda p: torch.optim.Adam(p, 0.03)),
    ],
)
@pytest.mark.parametrize("fused", [True, False])  # in order of memory or not: by torch's kernel, or as arithmetic
def test_optimizers_are_those_of_torch(ours, theirs, fused):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    start = start if fused else start.T
    params = {"w": start.clone()}
    leaf = start.clone().requires_grad_()
    state, reference = ours.start(params), theirs([leaf])
    for step in range(5):
        leaf.grad = torch.randn(4, 3, generator=generator, dtype=torch.float64).T.reshape(start.shape)
        rate = ours.lr / (step + 1)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        ours.update(params, {"w": leaf.grad}, state, torch.tensor(rate, dtype=torch.float64))
        torch.testing.assert_close(params["w"], leaf.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet9"])
def test_whitened_models_answer_as_before_and_take_white_inputs(name):
    x = torch.rand(100, *((20,) if name == "mlp" else (3, 32, 32)), generator=torch.Generator().manual_seed(0))
    models = ensemble.initialise(factory_for(name, x), [1, 2])
    before = {k: v.clone() for k, v in (models.params | models.buffers).items()}
    points = np.stack([np.arange(100), np.arange(100)[::-1].copy() % 90])
    coordinates = Whitening(x, points, 0.01, models.module)
    white = coordinates.enter(models, np.arange(2))
    torch.testing.assert_close(white.logits(x), models.logits(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(white[1:].logits(x), models[1:].logits(x), rtol=1e-3, atol=1e-4)
    back = coordinates.leave(white)
    assert back.params.keys() == models.params.keys()
    for name, value in back.params.items():
        torch.testing.assert_close(value, models.params[name], rtol=1e-3, atol=1e-4)
    assert back.module is not models.module, "threads evaluate models that were made of the same originals"
    maps = {k: v for k, v in white.params.items() if k.endswith("whitener")}
    weights = {k: v for k, v in models.params.items() if v.ndim > 2}
    assert {k.replace("whitener", "weight") for k in maps} == weights.keys(), "every layer with inputs, no other"
    rows = x[torch.from_numpy(points[1])]
    rows = (rows.movedim(1, -1) if rows.ndim == 4 else rows).flatten(0, -2)
    moment = rows.T @ rows / len(rows)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    first = next(iter(maps.values()))[1]
    torch.testing.assert_close(first @ damped @ first, torch.eye(len(moment)), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(before[k], v) for k, v in (models.params | models.buffers).items())


@pytest.mark.parametrize("seed", range(4))
def test_whitening_takes_moments_whose_rank_is_deficient(seed):
    """Inputs as of a layer whose units are mostly dead, the others alike and of many sizes; all dead on ten points."""
    g, d = torch.Generator().manual_seed(seed), 256
    x = (torch.randn(300, 20, generator=g) @ torch.randn(20, d, generator=g)).relu()
    x *= 10 ** (-6 * torch.rand(d, generator=g)) * (torch.rand(d, generator=g) < 0.2)
    x[:10] = 0
    models = ensemble.initialise(lambda: nn.Linear(d, 3), [1, 2])
    coordinates = Whitening(x, np.stack([np.arange(300), np.arange(300) % 10]), 0.01, models.module)
    white = coordinates.enter(models, np.arange(2))
    torch.testing.assert_close(white.logits(x), models.logits(x), rtol=1e-3, atol=1e-4)
    moment = (x.T @ x / len(x)).double()
    maps = white.params["whitener"].double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(d)
    torch.testing.assert_close(maps[0] @ damped @ maps[0], torch.eye(d).double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(maps[1], torch.eye(d).double())
    back = coordinates.leave(white)
    torch.testing.assert_close(back.params["weight"], models.params["weight"], rtol=1e-3, atol=1e-4)


def test_descent_on_whitened_models_is_preconditioned_descent(points):
    """A step of gradient descent on V is W - rate * gradient * A^(-1), and whiteners do not move."""
    d, _, y = points
    x = models.get("mlp").prepare(d, d.x)
    stacked = ensemble.initialise(factory_for("mlp", x), [3, 4])
    white = Whitening(x, np.tile(np.arange(90), (2, 1)), 0.1, stacked.module).enter(stacked, np.arange(2))
    maps = {k.replace("whitener", "weight"): v.clone() for k, v in white.params.items() if k.endswith("whitener")}
    batch, loss, plain = np.tile(np.arange(20), (2, 1)), ensemble.classification(y), SGD(0.05, 0.0)
    slopes = torch.func.grad(
        lambda p: loss(Ensemble(stacked.module, p, {}).forward(x[batch]), torch.from_numpy(batch), None).sum()
    )(stacked.params)
    names = list(stacked.params)
    start = plain.start({k: white.params[k] for k in names})
    ensemble.descend(white, x, [batch], loss, plain, start, only=names)
    for name in names:
        step = slopes[name] @ maps[name] @ maps[name] if name in maps else slopes[name]
        moved = white.params[name] @ maps[name] if name in maps else white.params[name]
        torch.testing.assert_close(moved, stacked.params[name] - 0.05 * step, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(white.params[k.replace("weight", "whitener")], v) for k, v in maps.items())


class Follows(nn.Module):
    """A buffer follows what a layer answers, gradient and all."""

    def __init__(self):
        super().__init__()
        self.flat, self.layer = nn.Flatten(), nn.Linear(64, 10)
        self.register_buffer("level", torch.zeros(10))

    def forward(self, x):
        z = self.layer(self.flat(x))
        self.level.mul_(0.9).add_(z.mean(0))
        return z - self.level


@pytest.mark.parametrize("factory", [Follows, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])
@pytest.mark.parametrize("n_models", [1, 3])
def test_gradients_are_those_of_functorch_to_the_bit(points, factory, n_models):
    x, y = points[1], points[2]
    stacked = ensemble.initialise(factory, range(n_models))
    batch, loss = np.tile(np.arange(20), (n_models, 1)), ensemble.classification(y)

    def total(params):
        logits, moved = stacking.forward(stacked.module, params, stacked.buffers, x[batch])
        return loss(logits, torch.from_numpy(batch), None).sum(), moved

    expected, moved = torch.func.grad(total, has_aux=True)(stacked.params)
    found, also = stacking.gradient(total, stacked.params)
    (inside, _), _ = torch.func.vjp(lambda params: stacking.gradient(total, params), stacked.params)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert torch.equal(inside[name], value)
    assert all(torch.equal(also[name], value) for name, value in moved.items())
    none = stacking.gradient(lambda params: (torch.ones(()), None), stacked.params)[0]
    assert not any(value.any() for value in none.values())
    ensemble.descend(stacked, x, [batch, batch], loss, SGD(0.05, 0.0), SGD(0.05, 0.0).start(stacked.params))
    assert not any(value.requires_grad for value in (*stacked.params.values(), *stacked.buffers.values()))


def test_every_example_of_a_mask_is_used_each_epoch():
    pools = [np.arange(10), np.arange(5, 15)]
    rngs = [np.random.default_rng(i) for i in range(2)]
    batches = list(ensemble.epoch_batches(pools, 4, 2, rngs))
    assert [b.shape[1] for b in batches] == [4, 3, 3] * 2
    for model, pool in enumerate(pools):
        for epoch in (0, 1):
            assert sorted(np.concatenate([b[model] for b in batches[3 * epoch : 3 * epoch + 3]])) == list(pool)


def test_rate_is_a_triangle():
    t = Training(lr=0.4, warmup=0.25)
    assert [t.rate(p) for p in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([0, 0.2, 0.4, 0.2, 0])


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        *((name, (0, -1), "greater than 0") for name in ("epochs", "batch_size", "lr")),
        *((name, (1.5, math.nan, True, "x", None), "a valid integer|a finite") for name in ("epochs", "batch_size")),
        ("lr", (math.nan, math.inf, True, "x"), "a finite number|a valid number"),
        ("weight_decay", (-1e-9, math.nan, math.inf, "x"), "greater than or equal to 0|a finite number|a valid number"),
        *((name, (1, 2, 1.5, -0.1, math.nan), "less than 1|or equal to 0") for name in ("momentum", "warmup")),
        ("momentum", (True, "x"), "a valid number"),
        ("precision", ("x", None, 32), "'float32' or 'bfloat16'"),
    ],
)
def test_a_training_that_cannot_be_is_refused(name, values, words):
    for value in values:
        with pytest.raises(OptionError, match=f"{name}=.* of Training was given; .*({words})"):
            Training(**{name: value})
    Training(np.int64(1), 1, np.float32(1e-9), 0, 0, 0, "bfloat16")


def test_labels_that_do_not_fit_are_refused():
    x, y, masks = torch.randn(6, 4), torch.arange(6) % 2, np.ones((1, 6), bool)
    for wrong in (y[:5], y.float(), y.int(), y - 1, y[:, None], y.numpy(), torch.full((6,), -100)):
        with pytest.raises(DataError, match=r"Labels are .*tensor \(6,\) of int64 from 0"):
            ensemble.train(lambda: nn.Linear(4, 2), x, wrong, masks, [0], TRAINING)


def test_state_gives_the_same_models_back(points):
    _, x, y = points
    factory = factory_for("resnet9", x, width=4)
    x = F.interpolate(x, size=32)
    trained = ensemble.train(factory, x[:90], y[:90], masks_of_sizes([45, 45]), [0, 1], TRAINING)
    again = Ensemble.from_state(factory(), trained.state())
    assert any(k.startswith("buffers.") for k in trained.state())
    torch.testing.assert_close(again.logits(x), trained.logits(x))


def test_bad_masks_and_seeds(points):
    d, _, y = points
    x = models.pooled(d, d.x)[:90]
    factory = factory_for("linear", x)
    for masks, message in [
        (np.ones((2, 80), bool), "give booleans"),
        (np.ones((2, 90), int), "Masks are int64"),
        (np.ones((2, 90), bool).tolist(), r"Masks are list \(2, 90\)"),
        (np.zeros((2, 90), bool), "model 0 is empty"),
        (np.ones((0, 90), bool), "No masks were given"),
    ]:
        with pytest.raises(DataError, match=message):
            ensemble.train(factory, x, y[:90], masks, [0, 1][: len(masks)], TRAINING)
    for seeds, message in (([0], "2 masks but 1 seeds"), ([-1, 0], "an integer from 0"), ([0, 0.5], r"\[0, 0.5\]")):
        with pytest.raises(DataError, match=message):
            ensemble.train(factory, x, y[:90], np.ones((2, 90), bool), seeds, TRAINING)
    with pytest.raises(OptionError, match=r"training={'epochs': 2} of train was given; .* an instance of Training"):
        ensemble.train(factory, x, y[:90], np.ones((2, 90), bool), [0, 1], {"epochs": 2})


def test_training_does_not_touch_the_global_generator(points):
    d, _, y = points
    x = models.pooled(d, d.x)[:90]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ensemble.train(factory_for("linear", x), x, y[:90], masks_of_sizes([45]), [0], TRAINING)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_trains(points):
    d, _, y = points
    x = models.pooled(d, d.x)
    training = Training(epochs=10, batch_size=16, lr=0.05, precision="bfloat16")
    trained = ensemble.train(factory_for("mlp", x), x[:90], y[:90], np.ones((2, 90), bool), [0, 1], training)
    assert (trained.logits(x[:90]).argmax(-1) == y[:90]).float().mean() > 0.9


def test_a_users_own_module(points):
    _, x, y = points

    @models.register("own")
    def own(shape, n_classes):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), n_classes))

    try:
        factory = factory_for("own", x)
        trained = ensemble.train(factory, x[:90], y[:90], masks_of_sizes([45]), [0], TRAINING)
        assert trained.logits(x).shape == (1, 110, 10)
        assert copy.copy(trained).n_models == 1
    finally:
        models.MODELS.remove("own")
    with pytest.raises(MethodError, match="Unknown model 'own'"):
        models.get("own")


def test_devices():
    assert models.resolve_device("cpu").type == "cpu"
    with pytest.raises(DeviceError, match="use auto, cpu or cuda"):
        models.resolve_device("tpu")
    if not torch.cuda.is_available():
        assert models.resolve_device("auto").type == "cpu"
        with pytest.raises(DeviceError, match="finds no GPU here"):
            models.resolve_device("cuda")


@needs_cuda
def test_same_seed_means_same_start_on_cuda(points):
    d, _, _ = points
    x = models.pooled(d, d.x)
    cpu, cuda = (ensemble.initialise(factory_for("mlp", x), [3], device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(cpu.logits(x), cuda.logits(x.cuda()), rtol=1e-3, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("compile", [False, True])
def test_training_on_cuda_gives_the_models_of_the_cpu(points, compile):
    if not can_compile("cuda") and compile:
        pytest.skip("torch.compile does not work on this GPU")
    d, _, y = points
    x = models.pooled(d, d.x).double()

    def factory():
        return models.build("mlp", tuple(x.shape[1:]), 10, hidden=8).double()

    def trained(device):
        way = Execution(2, compile=compile and device == "cuda")
        at = x.to(device), y.to(device)
        masks = masks_of_sizes([45, 45], len(y))
        return ensemble.train(factory, *at, masks, [0, 1], TRAINING, way).logits(at[0])

    torch.testing.assert_close(trained("cuda"), trained("cpu"), rtol=1e-4, atol=1e-4)


@needs_cuda
def test_a_step_on_cuda_never_waits_for_the_device(points):
    _, x, y = points
    x, training = x.cuda(), Training(precision="bfloat16")
    stacked = ensemble.initialise(factory_for("convnet", x), [0, 1], "cuda")

    def batches():
        yield np.arange(32).reshape(2, 16)  # the first starts libraries
        torch.cuda.set_sync_debug_mode("error")
        yield from np.arange(64).reshape(2, 2, 16)

    start, before = training.optimizer.start(stacked.params), {k: v.clone() for k, v in stacked.params.items()}
    try:
        ensemble.descend(
            stacked, x, batches(), ensemble.classification(y.cuda()), training.optimizer, start, precision="bfloat16"
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all((stacked.params[k] != v).any() for k, v in before.items()), "all steps were taken, and none raised"


def test_resnet9_on_real_colour_images():
    path = SHARED / "data" / "cifar10_jpeg_12k.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    d = data.load("cifar10", 200, 50, path=path)
    x, y = models.normalise(d, d.x), torch.from_numpy(d.y)
    training = Training(epochs=12, batch_size=25, lr=0.1)
    factory = factory_for("resnet9", x, width=8)
    trained = ensemble.train(factory, x[:200], y[:200], np.ones((2, 200), bool), [0, 1], training)
    accuracy = (trained.logits(x)[:, :200].argmax(-1) == y[:200]).float().mean()
    assert accuracy > 0.3  # chance is 0.1


class Odd(nn.Module):
    """What models of one's own do: share a weight, freeze a layer, change what they are given."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.third.weight = self.second.weight
        self.first.requires_grad_(False)

    def forward(self, x):
        x *= 0.5
        return self.last(self.third(self.second(self.first(x).relu()).relu()).relu())


def odd():
    x, y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 6
    return x, y, ensemble.initialise(Odd, [0, 1, 2])


def test_a_stack_answers_as_its_modules_do_and_leaves_points_as_they_are():
    x, _, models = odd()
    before = x.clone()
    for i, logits in enumerate(models.logits(x)):
        torch.manual_seed(i)
        torch.testing.assert_close(logits, Odd()(x.clone()).detach())
    assert torch.equal(x, before)


def test_shared_weights_stay_shared_and_frozen_ones_still():
    x, y, models = odd()
    before, points = {k: v.clone() for k, v in models.buffers.items()}, x.clone()
    trained = ensemble.train(Odd, x, y, np.ones((3, 40), bool), [0, 1, 2], ensemble.Training(epochs=3, batch_size=10))
    assert set(trained.params) == {"second.weight", "second.bias", "third.bias", "last.weight", "last.bias"}
    assert all(torch.equal(trained.buffers[k], v) for k, v in before.items())
    assert (trained.params["second.weight"] != models.params["second.weight"]).any()
    assert torch.equal(x, points)
    module = Odd()
    module.load_state_dict(
        {k: v[1] for k, v in (trained.params | trained.buffers).items()}
        | {"third.weight": trained.params["second.weight"][1]}
    )
    torch.testing.assert_close(trained.logits(x)[1], module(x.clone()).detach())


@pytest.mark.parametrize("method", ["gd", "scrub", "newton", "ssd", "dmm", "salun"])
def test_no_method_moves_a_frozen_layer(method):
    """Its weights are no parameters to any method; matching whitens neither it nor a layer that shares its weight."""
    from dmmlib import unlearn

    x, y, models = odd()
    training = ensemble.Training(epochs=3, batch_size=10)
    still = {k: v.clone() for k, v in models.buffers.items()}

    class Same(datamodels.Attributor):
        def effects(self, forget_sets):
            return np.ones((len(forget_sets), 40, 6), np.float32)

        def predict(self, masks):
            raise NotImplementedError

    logits = models.logits(x).numpy()
    problem = unlearn.Problem(models, logits, x, y, 40, np.arange(4), training, attributor=Same())
    result = unlearn.get(method)(problem)
    assert np.isfinite(result.margins).all()
    moved = (result.margins != unlearn.get("do_nothing")(problem).margins).any()
    assert moved or method == "ssd", "of models so young it finds nothing to dampen"
    assert all(torch.equal(models.buffers[k], v) for k, v in still.items())
