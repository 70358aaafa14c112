"""A file is what it was or what it shall be, never a part."""

import pytest

from dmmlib.errors import StoreError
from dmmlib.files import read_json, replacing, write_json


def test_a_failed_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def fill_the_disk():
        with replacing(path) as temporary:
            temporary.write_text("half of")
            raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"cannot be written \(No space left on device\).*is unchanged"):
        fill_the_disk()
    assert read_json(path) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path], "nothing is left lying about"


def test_an_interruption_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def interrupt():
        with replacing(path) as temporary:
            temporary.write_text("half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert read_json(path) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another place"):
        write_json(tmp_path / "file" / "a.json", {})


def test_what_is_no_json(tmp_path):
    with pytest.raises(StoreError, match="cannot be read as JSON"):
        read_json(tmp_path / "missing.json")
