"""Choosing what to forget by looking at it, in JupyterLab, with an instant preview.

Chooser(study)              choose a forget set, see what forgetting it would do, save it, run it
Results(study, forget_set)  a finished run's points by KLoM, and their margins
"""

from dmmlib.widgets.chooser import Chooser
from dmmlib.widgets.results import Results

__all__ = ["Chooser", "Results"]
