"""What scripts write into pages that people write."""

import re
from pathlib import Path

from dmmlib.files import write_bytes


def put(page: Path, name: str, text: str) -> None:
    """Put a text between a page's marks of that name."""
    marks = re.compile(rf"(<!-- {name}[^>]*-->).*(<!-- /{name} -->)", re.DOTALL)
    write_bytes(page, marks.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", page.read_text("utf-8")).encode())
