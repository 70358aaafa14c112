"""Choosing what to forget by looking at it, in JupyterLab, with an instant preview.

    Chooser(study)              choose a forget set, see what forgetting it would do, save it, run it
    Results(study, forget_set)  a finished run's points by KLoM, and their margins

What is chosen (`selection`) and what is predicted (`preview`) need no browser and no widget.
"""

from dmmlib.widgets.chooser import Chooser
from dmmlib.widgets.preview import Measured, Preview, Previewer
from dmmlib.widgets.results import Results
from dmmlib.widgets.selection import Filters, Selection

__all__ = ["Chooser", "Filters", "Measured", "Preview", "Previewer", "Results", "Selection"]
