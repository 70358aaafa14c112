"""What pyproject.toml cannot say: a wheel holds presets, notebooks and data, in a clone beside the package."""

import json
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

SHARE = {"presets": "*.yaml", "notebooks": "[0-9][0-9]_*.ipynb", "data": "*.npz"}  # found by dmmlib.files.resource


class Build(build_py):
    """Copies notebooks without their outputs, two thirds of the wheel; `dmm run` makes them again."""

    def copy_file(self, infile: str, outfile: str, *options: Any, **more: Any) -> Any:
        if not infile.endswith(".ipynb"):
            return super().copy_file(infile, outfile, *options, **more)
        notebook = json.loads(Path(infile).read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        Path(outfile).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return outfile, True


setup(
    cmdclass={"build_py": Build},
    packages=[*find_packages(include=["dmmlib*"]), *(f"dmmlib.share.{name}" for name in SHARE)],
    package_dir={f"dmmlib.share.{name}": name for name in SHARE},
    package_data={
        "dmmlib.app": ["templates/*"],
        "dmmlib.widgets": ["*.js", "*.css"],
        **{f"dmmlib.share.{name}": [pattern] for name, pattern in SHARE.items()},
    },
)
