"""Write the API pages, made of the docstrings of the public names: `make docs`, then open docs/api/dmmlib.html."""

import sys
from pathlib import Path

import pdoc
import pdoc.render

import dmmlib


def main(folder: Path, math: bool = True) -> None:
    """Write the pages into a folder; formulas are drawn by a script from elsewhere, or stay as they are typed."""
    for name in dmmlib.__all__:
        getattr(dmmlib, name)  # names are loaded when they are first used, and pdoc looks at those that are there
    pdoc.render.configure(docformat="google", math=math, footer_text=f"dmmlib {dmmlib.__version__}")
    pdoc.pdoc("dmmlib", output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "api"))
