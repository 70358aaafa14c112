"""Copy a run's executed notebooks over the ones in notebooks/, with their own default parameters.

python scripts/publish.py laptop
"""

import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]


def main(preset: str) -> int:
    executed = sorted((ROOT / "runs" / preset / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not executed:
        sys.stderr.write(f"No executed notebooks of preset {preset!r}; run `dmm run {preset}` first.\n")
        return 1
    for path in executed:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
        for number, cell in enumerate(notebook.cells):
            cell.id = f"cell-{number:02d}"
        count = 0
        for cell in notebook.cells:
            if cell.cell_type == "code":
                count += 1
                cell.execution_count = count
                for output in cell.outputs:
                    if "execution_count" in output:
                        output.execution_count = count
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        nbformat.write(notebook, ROOT / "notebooks" / path.name)
        sys.stdout.write(f"notebooks/{path.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or ["laptop"]))
