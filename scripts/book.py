"""Build the book, a static site, from what lies in the repository: `make book`, then open build/book/index.html.

Notebooks with their outputs, docs, and API pages; and a page on which the published run is explored without a kernel,
by the widgets' own views. Nothing is executed or fetched, and the site asks for nothing from elsewhere.
"""

import json
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).parents[1]
BOOK, EXTRA = ROOT / "docs" / "book", ROOT / "build" / "book-pages"
WIDGETS = ROOT / "dmmlib" / "widgets"
EXPLORED = ROOT / "figures" / "laptop" / "explore.json"


def explore(folder: Path) -> None:
    """Write the scripts of the page "Explore"; plain ones, since a page from a disk may load no modules or data."""
    views = (WIDGETS / "widgets.js").read_text(encoding="utf-8").replace("export default", "window.dmmViews =")
    data = json.dumps(json.loads(EXPLORED.read_text(encoding="utf-8")), separators=(",", ":"))
    page = (BOOK / "explore.js").read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "explore.js").write_text(
        f"window.dmmResults = {data};\n(() => {{\n{views}}})();\n{page}", encoding="utf-8"
    )
    shutil.copy(WIDGETS / "widgets.css", folder / "explore.css")


def main(target: Path) -> int:
    """Build into a folder; a warning is an error."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import api

    shutil.rmtree(EXTRA, ignore_errors=True)
    explore(EXTRA / "explore")
    api.main(EXTRA / "api", math=False)
    (EXTRA / "index.html").write_text(
        '<!doctype html><meta charset="utf-8"><title>Can a trained model forget?</title>'
        '<meta http-equiv="refresh" content="0; url=docs/index.html"><a href="docs/index.html">To the book</a>'
    )
    shutil.rmtree(target, ignore_errors=True)
    return sphinx(
        ["-q", "-W", "--keep-going", "-c", str(BOOK), "-d", str(ROOT / "build" / "book-trees"), str(ROOT), str(target)]
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "book"))
