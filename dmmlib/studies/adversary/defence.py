"""What the service sees of requests before it serves them, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from dmmlib.analysis.intervals import certain
from dmmlib.data import Dataset
from dmmlib.errors import ForgetSetError
from dmmlib.studies.adversary import service
from dmmlib.studies.adversary.experiments import Prepared, watch
from dmmlib.studies.adversary.serving import bounds
from dmmlib.studies.adversary.world import World


def scores(world: World, prepared: Prepared) -> pd.DataFrame:
    """Score every attack's requests, and honest ones of the same size for the same training set (`watch`).

    Requests for points that were never trained on have none.
    """
    parts = []
    for name, site in prepared.places.items():
        requests = {attack: asked.requests for attack, asked in prepared.asked.items() if asked.sites[0] is site}
        parts.append(watch(world, prepared.monitors[name], site, name, requests, world.s.n_honest))
    return pd.concat([*parts, prepared.watched], ignore_index=True)


def detection(scores: pd.DataFrame) -> pd.DataFrame:
    """Compute the area under the ROC of each component and of the score, against each kind of honest request.

    With 95 % intervals of the score's area and of the share detected at 5 % false alarms: requests are resampled.
    """
    rows, kinds = list[dict[str, Any]](), scores.loc[~scores["malicious"], "request"].unique()
    for (place, attack), part in scores[scores["malicious"]].groupby(["site", "request"], sort=False):
        for kind in kinds:
            honest = scores[(scores["site"] == place) & (scores["request"] == kind)]
            row: dict[str, Any] = {"attack": attack, "against": kind, "n": len(part), "n_honest": len(honest)}
            row |= {name: service.area(honest[name].to_numpy(), part[name].to_numpy()) for name in service.COMPONENTS}
            for name, statistic in (("score", service.area), ("detected at 5 %", service.detected)):
                e = service.resampled(statistic, honest["score"].to_numpy(), part["score"].to_numpy())
                row |= bounds(name, certain(e, len(part)) if statistic is service.detected else e)
            rows.append(row)
    return pd.DataFrame(rows)


def _answer(data: Dataset, images: np.ndarray, labels: np.ndarray, own: np.ndarray | None = None) -> str:
    try:
        return f"served: {len(service.resolve(data, images, labels, own))} points"
    except ForgetSetError as error:
        return f"refused: {error}"


def refusals(prepared: Prepared) -> pd.DataFrame:
    """List what the service answers to each kind of request: served, or the reason why not."""
    site, poison = prepared.places["ddpa_dirty"], prepared.crafted["ddpa_dirty"].poison
    own, phantom = prepared.asked["ddpa_dirty"].requests[0], prepared.asked["never_trained"]
    extra, where, held = phantom.sites[0].data, phantom.requests[0], site.data
    cases = {
        "DDPA: its own points": (held.x_train[own], held.y_train[own]),
        "honest points of others": (held.x_train[:5], held.y_train[:5]),
        "points that were never contributed": (extra.x_train[where], extra.y_train[where]),
        "its own points before their pixels were changed": (poison.bases[:5], poison.labels[:5]),
        "its own points under other labels": (held.x_train[own], (held.y_train[own] + 1) % held.n_classes),
    }
    return pd.DataFrame([{"request": kind, "answer": _answer(held, *c, site.own)} for kind, c in cases.items()])


def burned(prepared: Prepared) -> tuple[int, int]:
    """Count the never-trained requests that the service refuses, and all of them."""
    phantom, held = prepared.asked["never_trained"], prepared.places["honest"].data
    asked = zip(phantom.sites, phantom.requests, strict=True)
    answers = [_answer(held, site.data.x_train[f], site.data.y_train[f]) for site, f in asked]
    return sum(answer.startswith("refused") for answer in answers), len(answers)
