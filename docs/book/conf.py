"""The book: docs and notebooks as they lie in the repository, with their outputs; nothing is executed or fetched."""

import json

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

import dmmlib

project = html_title = "Can a trained model forget?"
version = release = dmmlib.__version__
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "notebooks/[0-9]*.ipynb"]
exclude_patterns = [".*", "build", "runs", "figures", "data", "dmmlib", "scripts", "tests", "screenshots", "benchmarks"]
html_theme = "furo"
html_copy_source = False
html_show_sphinx = html_show_copyright = False
html_extra_path = ["../../build/book-pages"]
html_math_renderer = "mathml"
html_css_files = ["../explore/explore.css"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # stills stand for widgets, which would ask for scripts from elsewhere
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3


def mathml(translator, node):
    """Formulas as MathML, which browsers draw by themselves; a block has room for what stands out of its line."""
    block = node.tagname == "math_block"
    drawn = convert(node.astext(), display="block" if block else "inline")
    translator.body.append(drawn.replace("<math ", '<math style="padding: .4em 0" ', 1) if block else drawn)
    raise SkipNode


def fold_code(app, docname, source):
    """Who reads sees what was found; the code that found it is a click away."""
    if docname.startswith("notebooks/"):
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                tags = cell["metadata"].setdefault("tags", [])
                cell["metadata"]["tags"] = sorted({*tags, "hide-input" if cell["outputs"] else "hide-cell"})
                alts = [output.get("metadata", {}).get("image/png", {}).get("alt") for output in cell["outputs"]]
                if said := next(filter(None, alts), ""):
                    cell["metadata"]["mystnb"] = {"image": {"alt": said}}
        source[0] = json.dumps(notebook)


def setup(app):
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("source-read", fold_code)
