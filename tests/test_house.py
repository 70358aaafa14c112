"""How the library is built: a core that knows nobody, rooms that stand on it, no circles, nothing too large.

`python -m tests.test_house` writes the figure that docs/house.md shows.
"""

import ast
import doctest
import graphlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dmmlib

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "dmmlib"
ROOMS = ("zoo", "attributors", "matching", "baselines", "analysis", "own", "studies", "widgets", "app")
FILES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(LIBRARY.rglob("*.py"))}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): tree for path, tree in FILES.items()}


def room(module):
    part = [*module.split("."), ""][1]
    return part if part in ROOMS else "core"


def imports(tree):
    """Modules of the library that a module imports, wherever in its text, but not for type checkers alone."""
    checked = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dmmlib":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


ARROWS = {module: sorted(set(imports(tree)) - {module}) for module, tree in MODULES.items()}


def lines(*rooms):
    return sum(
        len(path.read_text(encoding="utf-8").splitlines()) for path in FILES if room(module_of(path)) in (rooms or ALL)
    )


ALL = ("core", *ROOMS)


def figure():
    """The rooms, how many lines each has and which rooms each stands on; then what each file of the core is for."""
    below = {name: set() for name in ALL}
    for module, others in ARROWS.items():
        below[room(module)] |= {room(other) for other in others}
    rows = [
        (name, f"{lines(name):,} lines", ", ".join(o for o in ALL if o in below[name] - {name})) for name in ALL[::-1]
    ]
    width, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    rooms = [f"{name:{width}}  {n:>{second}}  " + (f"stands on {o}" if o else "knows nobody") for name, n, o in rows]
    core = {str(p.relative_to(LIBRARY)): FILES[p] for p in FILES if room(module_of(p)) == "core"}
    width = max(map(len, core))
    purposes = {name: ast.get_docstring(tree).splitlines()[0] for name, tree in core.items()}
    files = [f"{name:{width}}  {said}" for name, said in purposes.items() if not name.endswith("__init__.py")]
    return "\n".join([*rooms, "", *files])


def test_the_core_imports_no_room():
    found = [
        f"{m} imports {o}" for m, others in ARROWS.items() if room(m) == "core" for o in others if room(o) != "core"
    ]
    assert not found, "\n".join(found)


def test_rooms_stand_on_rooms_below_them():
    order = {name: i for i, name in enumerate(ALL)}
    found = [f"{m} imports {o}" for m, others in ARROWS.items() for o in others if order[room(o)] > order[room(m)]]
    assert not found, "\n".join(found)


def test_there_are_no_circles():
    graph = {m: [o for o in others if not m.startswith(f"{o}.")] for m, others in ARROWS.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError would name the modules
    assert set(order) >= set(MODULES)


def test_nothing_is_too_large():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    wide = {
        node.name: node.end_lineno - node.lineno + 1
        for tree in FILES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= 300
    }
    assert not long
    assert not wide
    assert lines("core") <= 5_981  # which shall fall, to 4,700
    assert lines("studies") <= 7_500
    assert lines() <= 24_695  # to 18,000


@pytest.mark.parametrize(
    ("module", "refused", "most"),
    [
        ("dmmlib", (), 1),
        ("dmmlib.presets", ROOMS, 10),
        ("dmmlib.study", ("studies", "widgets", "app", "baselines", "analysis", "matching"), 40),
    ],
)
def test_an_import_loads_only_what_it_needs(module, refused, most):
    code = f"import sys, {module}; print(*(m for m in sys.modules if m.split('.')[0] == 'dmmlib'))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(loaded) <= most, loaded
    assert not {room(m) for m in loaded} & set(refused)


def test_the_docs_show_the_house_as_it_is():
    shown = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    assert figure() in shown, "run `python -m tests.test_house`"


@pytest.mark.parametrize("name", dmmlib.__all__)
def test_each_public_name_has_an_example_that_runs(name):
    found = getattr(dmmlib, name)
    known = {"np": np, "torch": torch, "nn": torch.nn, **{public: getattr(dmmlib, public) for public in dmmlib.__all__}}
    known |= vars(sys.modules[found.__module__])
    example = doctest.DocTestParser().get_doctest(found.__doc__, known, name, None, None)
    assert example.examples, f"{name} lacks an example"
    told = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=told.append)
    assert not told, "".join(told)


def test_api_pages_are_made_of_the_public_names(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts" / "api.py"))
    script["main"](tmp_path)
    page = (tmp_path / "dmmlib.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in dmmlib.__all__)


def test_the_changelog_is_read_at_a_glance():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    headings = [line for line in text.splitlines() if line.startswith("### ")]
    assert headings == ["### Added", "### Changed", "### Removed", "### Fixed"]


def test_every_notebook_links_the_glossary():
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert "../docs/glossary.md" in "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]), (
            path
        )


def test_public_names_are_few_and_others_are_refused():
    assert len(dmmlib.__all__) <= 18
    assert set(dmmlib.__all__) <= set(dir(dmmlib))
    with pytest.raises(AttributeError, match="nothing"):
        _ = dmmlib.nothing


if __name__ == "__main__":
    page = ROOT / "docs" / "house.md"
    before, _, after = page.read_text(encoding="utf-8").split("```\n", 2)
    page.write_text(f"{before}```\n{figure()}\n```\n{after}", encoding="utf-8")
