"""Readers of public records, on generated trees of the published layouts."""

import itertools

import numpy as np
import pytest

from dmmlib import metrics
from dmmlib.app import public
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.errors import DataError, ForgetSetError

N_TRAIN, N_VAL, N = 60, 20, 12
FORGET = np.array([41, 3, 17, 8])


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


@pytest.fixture
def easydub(tmp_path):
    """Its layout; originals answer forget points with much higher margins than oracles."""
    rng = np.random.default_rng(0)
    root, base = tmp_path / "EasyDUB-dataset", tmp_path / "EasyDUB-dataset" / "margins" / "cifar10"
    save(root / "forget_sets" / "cifar10" / "forget_set_2.npy", FORGET)
    original, oracle = (rng.normal(size=(N, N_TRAIN)).astype(np.float32) for _ in range(2))
    original[:, FORGET] += 30
    val = rng.normal(size=(2, N, N_VAL)).astype(np.float32)
    for i in range(N):
        name = f"resnet9/id_{i}_epoch_23.npy"
        save(base / "pretrain" / "retain" / name, original[i])
        save(base / "pretrain" / "forget_2" / name, original[i, FORGET])
        save(base / "pretrain" / "val" / name, val[0, i])
        save(base / "oracle" / "forget_2" / "retain" / name, np.delete(oracle[i], FORGET))
        save(base / "oracle" / "forget_2" / "forget" / name, oracle[i, FORGET])
        save(base / "oracle" / "forget_2" / "val" / name, val[1, i])
    return root, original, oracle


def test_easydub_puts_every_point_where_its_split_says(easydub):
    root, original, oracle = easydub
    record = public.easydub(root, 2, n_models=N)
    assert (record.forget == FORGET).all()
    assert {k: len(v) for k, v in record.splits.items()} == {"forget": 4, "retain": N_TRAIN - 4, "validation": N_VAL}
    retain = np.setdiff1d(np.arange(N_TRAIN), FORGET)
    assert (record.originals[:, record.splits["forget"]] == original[:, FORGET]).all()
    assert (record.originals[:, record.splits["retain"]] == original[:, retain]).all()
    assert (record.oracles[:, record.splits["retain"]] == oracle[:, retain]).all()
    assert record.oracles[:, record.splits["forget"]].tolist() == oracle[:, FORGET].tolist()


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("forget", np.array([3.7, 8.0]), "float64; give integers"),
        ("forget", np.array([3.0, np.nan]), "float64; give integers"),
        ("forget", np.array([True, False]), "bool; give integers"),
        ("forget", np.array(3), r"shape \(\)"),
        ("forget", np.array(["a"]), "not numbers"),
        ("forget", np.array([], int), "not numbers"),
        ("margins", np.array(1.0), "must be .n_points"),
        ("margins", np.ones(N_VAL, complex), "complex128.*not numbers"),
        ("margins", np.array(["a"] * N_VAL), "not numbers"),
    ],
)
def test_easydub_of_other_content(easydub, part, array, message):
    root = easydub[0]
    if part == "forget":
        save(root / "forget_sets" / "cifar10" / "forget_set_2.npy", array)
    else:
        for i in range(N):
            save(root / "margins" / "cifar10" / "pretrain" / "val" / "resnet9" / f"id_{i}_epoch_23.npy", array)
    with pytest.raises((DataError, ForgetSetError), match=message):
        public.easydub(root, 2, n_models=N)


def test_whole_numbers_that_were_saved_as_floats_are_indices(easydub):
    save(easydub[0] / "forget_sets" / "cifar10" / "forget_set_2.npy", FORGET.astype(float))
    assert public.easydub(easydub[0], 2, n_models=N).forget.tolist() == FORGET.tolist()


@pytest.mark.parametrize(
    "given",
    [{"n_models": 1.5}, {"n_models": "2"}, {"data": "../.."}, {"model": 5}, {"forget_set": "../1"}, {"root": 5}],
)
def test_what_is_asked_of_easydub_is_checked(easydub, given):
    with pytest.raises(DataError, match=r"no name|asked for|no path"):
        public.easydub(**({"root": easydub[0], "forget_set": 2, "n_models": 2} | given))


def reference_klom(p, q):
    """The public code's definition for one point, written out: bins open on the right, then renormalised."""
    low, high = min(p.min(), q.min()), max(p.max(), q.max())
    edges = np.linspace(low, high, 21)
    shares = []
    for values in (p, q):
        counts = np.array([((values >= a) & (values < b)).sum() for a, b in itertools.pairwise(edges)])
        shares.append(counts / counts.sum())
    return sum(a * np.log(a / max(b, 1e-5)) for a, b in zip(*shares, strict=True) if a > 0)


def test_easydub_scores_as_its_own_code_does(easydub):
    record = public.easydub(easydub[0], 2, n_models=N)
    values = metrics.klom(record.originals, record.oracles, convention="easydub")
    expected = [reference_klom(*pair) for pair in zip(record.originals.T, record.oracles.T, strict=True)]
    np.testing.assert_allclose(values, expected, atol=1e-5)
    p95 = {split: np.percentile(values[at], 95) for split, at in record.splits.items()}
    assert p95["forget"] > 9 > p95["validation"]
    summary = metrics.klom_summary(record.originals, record.oracles, record.splits)
    assert summary["forget"]["p95"].low > summary["retain"]["p95"].high


def test_easydub_names_what_is_wrong(easydub, tmp_path):
    root, *_ = easydub
    with pytest.raises(DataError, match="holds no margins/cifar10; give the directory of the data set"):
        public.easydub(tmp_path / "nowhere", 2)
    with pytest.raises(DataError, match=r"id_12_epoch_23\.npy does not exist; complete the download"):
        public.easydub(root, 2, n_models=N + 1)
    with pytest.raises(DataError, match=r"forget_set_3\.npy does not exist"):
        public.easydub(root, 3, n_models=N)
    with pytest.raises(DataError, match="n_models=0"):
        public.easydub(root, 2, n_models=0)
    damaged = root / "margins" / "cifar10" / "pretrain" / "val" / "resnet9" / "id_4_epoch_23.npy"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"cannot be read as an \.npy array"):
        public.easydub(root, 2, n_models=N)
    np.save(damaged, np.zeros(N_VAL + 1, np.float32))
    with pytest.raises(DataError, match=r"holds margins of shapes \[\(20,\), \(21,\)\]"):
        public.easydub(root, 2, n_models=N)
    damaged.write_bytes(whole)
    save(root / "forget_sets" / "cifar10" / "forget_set_2.npy", np.array([N_TRAIN]))
    with pytest.raises(ForgetSetError, match="outside the training set of 60"):
        public.easydub(root, 2, n_models=N)


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("executed",))

    path = tmp_path / "train_masks_50pct.npy"
    np.save(path, np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        public.datamodel_data(tmp_path)


@pytest.fixture
def madry(tmp_path):
    """A linear world: margins are a known function of the mask, plus noise."""
    rng = np.random.default_rng(0)
    masks = np.stack([rng.permutation(20) < 10 for _ in range(400)])
    weight = rng.normal(size=(20, 7))
    margins = masks @ weight + 0.01 * rng.normal(size=(400, 7))
    np.save(tmp_path / "train_masks_50pct.npy", masks)
    np.save(tmp_path / "test_margins_50pct.npy", margins.astype(np.float16))
    np.save(tmp_path / "test_logits_50pct.npy", rng.normal(size=(400, 7, 10)).astype(np.float16))
    return tmp_path, weight


def test_a_ridge_datamodel_of_the_public_margins_finds_the_effect(madry):
    root, weight = madry
    record = public.datamodel_data(root, "test")
    assert isinstance(record.masks, np.memmap)
    assert record.outputs.shape == (400, 7, 1)
    model = RidgeDatamodel.fit(record.masks[:300], record.outputs[:300], lam=1e-4)
    # Subsets have one size, so an effect is known up to what leaving out an average point does.
    found, true = model.effect([1, 5])[:, 0], -(weight[[1, 5]] - weight.mean(0)).sum(0)
    assert np.abs(found - true).max() < 0.1
    assert public.datamodel_data(root, "test", logits=True).outputs.shape == (400, 7, 10)


def test_outputs_on_disk_fit_as_those_in_memory(madry):
    record = public.datamodel_data(madry[0], "test")
    on_disk = RidgeDatamodel.fit(record.masks, record.outputs, lam=0.1)
    in_memory = RidgeDatamodel.fit(record.masks, np.array(record.outputs), lam=0.1)
    np.testing.assert_allclose(on_disk.effect([3]), in_memory.effect([3]), atol=1e-6)


def test_datamodel_data_names_what_is_wrong(madry):
    root, _ = madry
    with pytest.raises(DataError, match="use 'train' or 'test'"):
        public.datamodel_data(root, "val")
    with pytest.raises(DataError, match=r"train_margins_50pct\.npy does not exist"):
        public.datamodel_data(root, "train")
    np.save(root / "train_masks_10pct.npy", np.load(root / "train_masks_50pct.npy"))
    np.save(root / "test_margins_10pct.npy", np.load(root / "test_margins_50pct.npy"))
    with pytest.raises(DataError, match="hold 50% of the training set, not 10 %"):
        public.datamodel_data(root, "test", 10)
    np.save(root / "test_margins_50pct.npy", np.zeros((399, 7), np.float16))
    with pytest.raises(DataError, match=r"shape \(399, 7\) and there are 400 masks"):
        public.datamodel_data(root, "test")
    np.save(root / "train_masks_50pct.npy", np.zeros((400, 20)))
    with pytest.raises(DataError, match="must be booleans"):
        public.datamodel_data(root, "test")
