"""A file is what it was or what it shall be, never a part."""

import pytest

from dmmlib.errors import StoreError
from dmmlib.files import load_json, read_json, replacing, write_json

FULL = r"cannot be written \(No space left on device\).*is unchanged"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [(OSError(28, "No space left on device"), StoreError, FULL), (KeyboardInterrupt(), KeyboardInterrupt, None)],
)
def test_a_failed_or_interrupted_write_leaves_the_old_content(tmp_path, error, raised, message):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def write():
        with replacing(path) as temporary:
            temporary.write_text("half of")
            raise error

    with pytest.raises(raised, match=message):
        write()
    assert read_json(path) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path], "nothing is left lying about"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another place"):
        write_json(tmp_path / "file" / "a.json", {})


def test_what_is_no_json(tmp_path):
    with pytest.raises(StoreError, match="cannot be read as JSON"):
        load_json(tmp_path / "missing.json")
