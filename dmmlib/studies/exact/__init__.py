"""Exact unlearning of noisy SGD by total-variation stability, and what it is to be compared with.

`problem` the losses, `chains` learn, delete, insert and the proof, `state` a stream of requests over a file,
`evidence` the tests of exactness, `experiments` its price, `compare` the other methods, `figures` the pictures.
"""

from dmmlib.studies.exact.chains import SGD, Chains, Receipt, delete, insert, learn, recomputation_bound, tv_bound
from dmmlib.studies.exact.problem import LOGISTIC, Loss, Problem, from_images
from dmmlib.studies.exact.settings import ExactSettings
from dmmlib.studies.exact.state import Request, load, save, serve

__all__ = [
    "LOGISTIC", "SGD", "Chains", "ExactSettings", "Loss", "Problem", "Receipt", "Request", "delete", "from_images",
    "insert", "learn", "load", "recomputation_bound", "save", "serve", "tv_bound",
]  # fmt: skip
