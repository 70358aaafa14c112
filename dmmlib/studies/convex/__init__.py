"""Unlearning where everything can be computed: ridge and multinomial logistic regression.

Throughout, S is the training set, F the forget set, R = S \\ F, and

    theta_S = A_S^-1 X_S^T y_S,    A_S = X_S^T X_S + ridge I,    delta = theta - theta_R,

so that delta is what is left to unlearn. Losses are sums over examples (half the squared error, or the
cross-entropy) plus (ridge / 2) ||theta||^2. All arrays are float64; the linear models have no intercept
(add a column of ones for one).

Read `ridge` first, then `synthetic` and `iterations`; the other modules build on these. `figures` and
`explorer` are imported on their own, with the plotting libraries that they need.
"""

from dmmlib.studies.convex.compare import costs, group_errors, trade_off
from dmmlib.studies.convex.images import image_features, image_problems
from dmmlib.studies.convex.iterations import (
    baselines,
    checkpoints,
    closed_form,
    conjugate_gradients,
    distance,
    ga,
    ga_gd,
    gd,
    iterate,
    match,
    match_probes,
    matchers,
    measured_rates,
    rate,
    steps_to,
    unreachable,
)
from dmmlib.studies.convex.logistic import Logistic, logistic_effects, logistic_traces
from dmmlib.studies.convex.ridge import Ridge, effects, oracle, relative_error, subset_datamodel
from dmmlib.studies.convex.settings import ConvexSettings
from dmmlib.studies.convex.stochastic import Moments, match_sgd, sgd, sgd_cost, simulate
from dmmlib.studies.convex.synthetic import Span, Spectrum, Synthetic, scaled_forget, synthetic

__all__ = [
    "ConvexSettings",
    "Logistic",
    "Moments",
    "Ridge",
    "Span",
    "Spectrum",
    "Synthetic",
    "baselines",
    "checkpoints",
    "closed_form",
    "conjugate_gradients",
    "costs",
    "distance",
    "effects",
    "ga",
    "ga_gd",
    "gd",
    "group_errors",
    "image_features",
    "image_problems",
    "iterate",
    "logistic_effects",
    "logistic_traces",
    "match",
    "match_probes",
    "match_sgd",
    "matchers",
    "measured_rates",
    "oracle",
    "rate",
    "relative_error",
    "scaled_forget",
    "sgd",
    "sgd_cost",
    "simulate",
    "steps_to",
    "subset_datamodel",
    "synthetic",
    "trade_off",
    "unreachable",
]
