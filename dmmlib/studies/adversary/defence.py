"""What the service sees of requests before it serves them, and what it refuses."""

from __future__ import annotations

from typing import Any

import pandas as pd

from dmmlib.errors import ForgetSetError
from dmmlib.studies.adversary import service
from dmmlib.studies.adversary.experiments import Prepared, watch
from dmmlib.studies.adversary.world import World

WATCHED = {
    "honest": ("honest_datamodel", "honest_gradient"),
    "ddpa_clean": ("ddpa_clean",),
    "ddpa_dirty": ("ddpa_dirty", "random"),
    "surrogate_clean": ("surrogate_clean",),
    "surrogate_dirty": ("surrogate_dirty",),
}
"""Training set -> the attacks that ask for points of it."""


def scores(world: World, prepared: Prepared) -> pd.DataFrame:
    """Scores of every attack's requests and of as many honest ones of the same size, a row a request (`watch`)."""
    parts = [
        watch(
            world, prepared.monitors[name], prepared.places[name], name,
            {attack: prepared.asked[attack].requests for attack in attacks}, world.s.n_honest,
        )
        for name, attacks in WATCHED.items()
    ]  # fmt: skip
    return pd.concat([*parts, prepared.watched], ignore_index=True)


def detection(scores: pd.DataFrame) -> pd.DataFrame:
    """Area under the ROC of each component and of the score, against each kind of honest request of the same sites.

    With 95 % intervals of the score's area and of the share detected at 5 % false alarms: requests are resampled.
    """
    rows = []
    for (place, attack), part in scores[scores["malicious"]].groupby(["site", "request"], sort=False):
        for kind in scores.loc[~scores["malicious"], "request"].unique():
            honest = scores[(scores["site"] == place) & (scores["request"] == kind)]
            row: dict[str, Any] = {"attack": attack, "against": kind, "n": len(part), "n_honest": len(honest)}
            for name in service.COMPONENTS:
                row[name] = service.area(honest[name].to_numpy(), part[name].to_numpy())
            for name, statistic in (("score", service.area), ("detected at 5 %", service.detected)):
                e = service.resampled(statistic, honest["score"].to_numpy(), part["score"].to_numpy())
                row |= {name: e.value, f"{name} low": e.low, f"{name} high": e.high}
            rows.append(row)
    return pd.DataFrame(rows)


def refusals(prepared: Prepared) -> pd.DataFrame:
    """What the service answers to each kind of request: served, or the reason why not, a row a kind."""
    site, poison = prepared.places["ddpa_dirty"], prepared.crafted["ddpa_dirty"].poison
    own, phantom = prepared.asked["ddpa_dirty"].requests[0], prepared.asked["never_trained"]
    extra, where = phantom.site(0).data, phantom.requests[0]
    held = site.data
    cases = {
        "DDPA: its own points": (held.x_train[own], held.y_train[own]),
        "honest points of others": (held.x_train[:5], held.y_train[:5]),
        "points that were never contributed": (extra.x_train[where], extra.y_train[where]),
        "its own points before their pixels were changed": (poison.bases[:5], poison.labels[:5]),
        "its own points under other labels": (held.x_train[own], (held.y_train[own] + 1) % held.n_classes),
    }
    rows = []
    for kind, (images, given) in cases.items():
        try:
            answer = f"served: {len(service.resolve(held, images, given, site.own))} points"
        except ForgetSetError as error:
            answer = f"refused: {error}"
        rows.append({"request": kind, "answer": answer})
    return pd.DataFrame(rows)


def burned(prepared: Prepared) -> tuple[int, int]:
    """How many of the never-trained requests the service refuses, and how many there are."""
    phantom = prepared.asked["never_trained"]
    refused = 0
    for t, forget in enumerate(phantom.requests):
        data = phantom.site(t).data
        try:
            service.resolve(prepared.places["honest"].data, data.x_train[forget], data.y_train[forget])
        except ForgetSetError:
            refused += 1
    return refused, len(phantom.requests)
