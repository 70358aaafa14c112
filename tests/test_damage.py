"""A disk that changes what it keeps: the numbers are right all the same, or one sentence names the file."""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from dmmlib import files
from dmmlib.analysis import ablation
from dmmlib.app import report, status
from dmmlib.app.cli import app
from dmmlib.errors import DamageError, DmmError, StoreError
from dmmlib.progress import silent
from dmmlib.store import Store
from dmmlib.study import Study
from tests.conftest import TINY
from tests.test_store import make, values

VALUE = {"setting": 3, "score": [0.25, 1e-7, -3.0], "name": "größer", "none": None, "nan": float("inf")}
ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "cost": np.float64(0.25), "yes": np.array([True, False])}
TABLE = pd.DataFrame({"method": ["dmm", "gd"], "value": [0.419, 7.5], "n": [8, 8]})


def flipped(content, rng, n):
    """A file's content with one bit changed: of the first byte, of the last, and at n places between."""
    for place in (0, len(content) - 1, *rng.integers(0, len(content), n).tolist()):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        yield bytes(changed)


def tried(read, *arguments):
    """What a reader returns, and what it raises."""
    try:
        return read(*arguments), None
    except DmmError as error:
        return None, error


def same(a, b):
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in b)
    return a.equals(b) if isinstance(b, pd.DataFrame) else a == b


@pytest.mark.parametrize(
    ("name", "value", "write", "read"),
    [
        ("search-gd-1.json", VALUE, files.write_json, files.read_json),
        ("unlearned-gd-1.npz", ARRAYS, files.write_arrays, files.read_arrays),
        ("results.csv", TABLE, files.write_table, files.read_table),
        (".results.csv.json", TABLE, files.write_table, files.read_table),
    ],
)
def test_a_small_file_is_what_was_written_or_named(tmp_path, name, value, write, read):
    path = tmp_path / name
    kept = tmp_path / "results.csv" if "csv" in name else path
    write(kept, value)
    content = path.read_bytes()
    named = 0
    for changed in [*flipped(content, np.random.default_rng(0), 500), content[:20], content[:-1], b"", b"[" * 100_000]:
        path.write_bytes(changed)
        found, error = tried(read, kept)
        named += error is not None
        assert same(found, value) if error is None else str(path) in str(error)
        assert isinstance(error, DamageError | None)
        assert "\n" not in str(error)
    assert named > 300, "others were of no consequence"
    path.write_bytes(changed[:7])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert same(files.kept(kept, lambda: value, read, write), value)
    assert [str(path) in str(w.message) for w in said] == [True], "said, and made anew"
    assert same(read(kept), value)


def test_a_file_in_the_place_of_another_is_damage(tmp_path):
    for name in ("search-a.json", "search-b.json"):
        files.write_json(tmp_path / name, {"of": name})
    shutil.copyfile(tmp_path / "search-a.json", tmp_path / "search-b.json")
    with pytest.raises(DamageError, match=r"search-b\.json is damaged"):
        files.read_json(tmp_path / "search-b.json")


def test_what_may_not_be_read_is_not_made_anew(tmp_path, monkeypatch):
    path = tmp_path / "search-a.json"
    files.write_json(path, VALUE)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(StoreError, match=r"search-a\.json cannot be read \(Permission denied\)"):
        files.kept(path, lambda: 1 / 0, files.read_json, files.write_json)


# --- stores ----------------------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path):
    store = make(tmp_path / "s")
    for shard in store.missing():
        store.write(shard, values(store.models(shard)))
    return tmp_path / "s"


def mended(place):
    """Reads a store as `Trainer.read` does, and says which shards were trained again."""
    again = set()
    for name in ("logits", "masks"):
        store = make(place)
        for shard in store.missing():
            again.add(shard)
            store.write(shard, values(store.models(shard)))
        found, error = tried(store.read, name)
        if error is not None:
            assert str(place) in str(error)
            again |= {*error.shards}
            for shard in error.shards:
                store.drop(shard)
                store.write(shard, values(store.models(shard)))
            found = store.read(name)
        rows = [values(range(start, min(start + 10, 25)))[name] for start in (0, 10, 20)]
        np.testing.assert_array_equal(found, np.concatenate(rows))
    return again


def test_every_file_of_a_store_may_be_damaged(full):
    rng = np.random.default_rng(0)
    whole = {p.relative_to(full): p.read_bytes() for p in sorted(full.rglob("*")) if p.is_file()}
    assert len(whole) == 1 + 3 + 3 * 3, "descriptions, flags and chunks"
    for path, content in whole.items():
        for changed in [None, *flipped(content, rng, 3), content[:-1], b"", content + b"\0"]:
            if changed is None:
                (full / path).unlink()
            else:
                (full / path).write_bytes(changed)
            found, error = tried(Store.existing, full)
            looked = found and {*found.missing(), *found.damaged()}
            again = mended(full)
            if path.name == "zarr.json":
                assert str(full / path) in str(error) if changed else found is None or error
                assert again == set(), "nothing is lost with a description"
            else:
                assert again == looked, "what a status says is what is made anew"
                harmless = changed is not None and changed.startswith(content)
                assert again == {int(path.parts[2])} or (harmless and not again)
            for other, same in whole.items():
                (full / other).write_bytes(same)


@pytest.mark.parametrize("kind", ["logits", "masks", "done"])
def test_chunks_that_change_places_are_not_used(full, kind):
    (a, b) = (next(p for p in (full / kind / "c" / shard).rglob("*") if p.is_file()) for shard in "01")
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    assert make(full).damaged() == [0, 1]
    assert mended(full) == {0, 1}


def test_chunks_of_another_store_are_not_used(full, tmp_path):
    other = make(tmp_path / "t", config={"lr": 0.2})
    for shard in other.missing():
        other.write(shard, values(other.models(shard), seed=1))
    for kind in ("logits", "done"):
        shutil.rmtree(full / kind / "c")
        shutil.copytree(tmp_path / "t" / kind / "c", full / kind / "c")
    assert make(full).damaged() == [0, 1, 2]
    assert mended(full) == {0, 1, 2}


# --- a study ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A study whose every kind of file is on disk, and what is read of it."""
    place = tmp_path_factory.mktemp("ran")
    answers = everything(place)
    return place, answers


def everything(place):
    """All that a study keeps in small files, read or made."""
    study = Study(TINY | {"device": "cpu"}, runs=place / "runs", figures=place / "figures", progress=silent)
    study.fine_tuning()
    forget_set = study.forget_sets()["random_6"]
    found = {
        "search": study.search("gd"),
        "unlearned": pd.DataFrame(study.unlearned("gd", forget_set).margins),
        "measured": ablation.measure(study, "dmm", {}, forget_set),
        "logits": pd.DataFrame(study.original_logits()[:, :, 0]),
    }
    if not (study.output / "results.csv").exists() or status.damage(study):  # as a stage that is not done
        study.save_table(found["search"], "results.csv")
        report.record(study, study.output)
    run = report.open_run(study.output)
    return found | {"results": run.tables["results"], "record": run.record["data"]["sha256"]}


def test_a_study_gives_the_same_numbers_on_a_disk_that_flips_bits(ran, tmp_path):
    place, expected = ran
    shutil.copytree(place, tmp_path / "copy")
    place, rng = tmp_path / "copy", np.random.default_rng(1)
    kinds = ("search-gd*.json", "unlearned-*.npz", "measured-*.json", "execution-*.json", "*/zarr.json", "*/done/c/0/0")
    there = [next(iter((place / "runs" / "store").glob(kind))) for kind in kinds if "execution" not in kind]
    there += [*(place / "runs" / "store").glob("execution-*.json")]
    there += [place / "runs" / "tiny" / name for name in ("run.json", "results.csv", ".results.csv.json")]
    for path in there:
        content = path.read_bytes()
        for changed in (list(flipped(content, rng, 1))[-1], content[: len(content) // 2]):
            path.write_bytes(changed)
            said = CliRunner().invoke(app, ["status", str(preset(tmp_path)), "--runs", str(place / "runs")])
            assert said.exit_code == 0, said.output
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found, error = tried(everything, place)
            path.write_bytes(content)
            assert error is None or path.name in str(error)
            for name, value in expected.items() if error is None else ():
                if isinstance(value, pd.DataFrame):
                    pd.testing.assert_frame_equal(found[name], value)
                else:
                    assert found[name] == value


def preset(folder):
    import yaml

    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"preset": TINY | {"device": "cpu"}}), encoding="utf-8")
    return path


def test_status_names_files_that_were_cut_short_and_leaves_those_of_older_versions(tmp_path):
    study, store = Study(TINY, runs=tmp_path, progress=silent), tmp_path / "store"
    for name, content in {"search-a.json": VALUE, "search-b.json": VALUE, "old.json": VALUE}.items():
        files.write_json(store / name, content)
    for name in ("unlearned-a.npz", "unlearned-b.npz"):
        files.write_arrays(store / name, ARRAYS)
    (store / "old.json").write_text('{"score": 3}')
    np.savez(store / "old.npz", **ARRAYS)
    assert status.damage(study) == []
    for path in store.glob("*-a.*"):
        os.truncate(path, path.stat().st_size // 2)
    for path in store.glob("*-b.*"):
        os.truncate(path, 0)
    for path in store.glob("old.*"):
        os.truncate(path, path.stat().st_size - 1)
    there, said = sorted(store.iterdir()), status.damage(study, repair=True)
    assert [str(path) in line for path, line in zip(there, said, strict=True)] == [True] * 6
    assert not list(store.iterdir())


def test_status_names_what_is_damaged_and_repairs_it(ran, tmp_path):
    place, expected = ran
    shutil.copytree(place, tmp_path / "copy")
    runs = tmp_path / "copy" / "runs"

    def said_by(*options):
        said = CliRunner().invoke(app, ["status", str(preset(tmp_path)), "--runs", str(runs), *options])
        assert said.exit_code == 0, said.output
        return [line for line in said.output.splitlines() if "damaged" in line and "planned" not in line]

    assert [line.rpartition(", ")[2] for line in said_by()] == ["0 damaged"]
    store = next((runs / "store").glob("originals-*.zarr"))
    flag, chunk = store / "done" / "c" / "0" / "0", store / "logits" / "c" / "0" / "0" / "0"
    small = [next((runs / "store").glob(kind)) for kind in ("search-gd*", "measured-*", "unlearned-*")]
    small += [runs / "tiny" / name for name in ("run.json", "results.csv")]
    for path in (flag, chunk, *small):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 2
        path.write_bytes(bytes(content))
    os.truncate(next((runs / "store").glob("oracles-*.zarr")) / "logits" / "zarr.json", 9)
    said = "\n".join(said_by())
    assert "8 damaged" in said
    assert all(str(path) in said for path in small)
    assert f"{store.as_uri()}, shard 0, is damaged" in said
    assert "logits/zarr.json is damaged" in said
    assert said_by("--repair")
    assert not any(path.exists() for path in small)
    left = said_by()
    assert [line for line in left if "zarr.json" not in line] == [left[0]], "of what is gone nothing is said"
    assert "0 damaged" in left[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pd.testing.assert_frame_equal(everything(tmp_path / "copy")["unlearned"], expected["unlearned"])
