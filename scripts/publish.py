"""Put a run's results where a reader of the repository finds them.

    python scripts/publish.py laptop

Executed notebooks go over those in notebooks/ (with their own default parameters), the run's tables and record
beside the figures with what the book's page "Explore" shows, and the main tables into the README.
"""

import base64
import io
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).parent))
import explore
from pages import put

from dmmlib.analysis import tables
from dmmlib.files import place

ROOT = Path(__file__).parents[1]


def compact(png: bytes) -> bytes:
    """The picture in 256 colours, with its texts: a third as large, and nobody sees it."""
    picture, texts, found = Image.open(io.BytesIO(png)), PngInfo(), io.BytesIO()
    for name, said in picture.info.items():
        if isinstance(said, str):
            texts.add_text(name, said)
    few = picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(found, "PNG", optimize=True, pnginfo=texts)
    return min(found.getvalue(), png, key=len)


def publish_notebook(path: Path) -> None:
    """The executed notebook, without injected parameters and lines on progress, with stable ids and counts."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = [o for o in cell.outputs if o.output_type != "display_data" or set(o.data) != {"text/plain"}]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
                if "image/png" in output.get("data", {}):  # a widget's still: without its kernel there is no widget
                    output.data.pop("application/vnd.jupyter.widget-view+json", None)
                    small = compact(base64.b64decode(output.data["image/png"]))
                    output.data["image/png"] = base64.b64encode(small).decode()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nbformat.write(notebook, ROOT / "notebooks" / path.name)


def main(preset: str) -> int:
    run, figures = place("runs") / preset, place("figures") / preset
    executed = sorted((run / "notebooks").glob("[0-9][0-9]_*[!d].ipynb"))
    if not executed or not (run / "results.csv").exists():
        sys.stderr.write(f"Preset {preset!r} has no complete run; use `dmm run {preset}` first.\n")
        return 1
    for path in executed:
        publish_notebook(path)
    for figure in figures.glob("*.png"):
        (ROOT / "figures" / preset / figure.name).write_bytes(compact(figure.read_bytes()))
    for name in (
        "results.csv",
        "trajectories.csv",
        "datamodels.csv",
        "attributors.csv",
        "convex.csv",
        "run.json",
    ):  # for `dmm report`
        if (run / name).exists():
            shutil.copy(run / name, ROOT / "figures" / preset / name)
    explore.main(preset, ROOT / "figures" / preset / "explore.json")
    results = pd.read_csv(run / "results.csv")
    (ROOT / "docs" / "results.md").write_text(tables.by_sets(results), encoding="utf-8")
    put(ROOT / "README.md", "results", tables.readme(results))
    sys.stdout.write(f"{len(executed)} notebooks, results.csv and the README's tables are those of {preset!r}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or ["laptop"]))
