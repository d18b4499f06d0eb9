"""Learning and mixing curves of a study: Dice against the number of synthetic frames and the share of real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raysyn.config import CompareJob
from raysyn.data.storage import Storage
from raysyn.types import Outcome

SET_SHARES = (0.125, 0.25, 0.5)  # of a synthetic set; the whole set is the row's own run
REAL_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the training frames; none is the row's own run


@dataclass(frozen=True)
class CurvePoint:
    """One further training of the segmentation task on the set of the row `row`."""

    curve: str  # "num_synthetic" or "real_fraction"
    row: str
    model: str
    share: float

    @property
    def key(self) -> str:
        """Its node's name."""
        return f"{self.curve} {self.share:g} {self.row}"


def curve_points(config: CompareJob, rows: list[Any]) -> list[CurvePoint]:
    """The points to train for `curves=true`: both curves, of each model's last row (its most steps)."""
    if not config.curves:
        return []
    last = {row.model.label: row.key for row in rows if row.kind == "synthetic"}
    shares = {"num_synthetic": SET_SHARES, "real_fraction": REAL_SHARES}
    return [CurvePoint(curve, row, model, s) for model, row in last.items() for curve in shares for s in shares[curve]]


def curves_of(config: CompareJob, rows: list[Any], results: dict[str, Outcome]) -> dict[str, list[dict[str, Any]]]:
    """Points {series, x, y, low, high} by curve, from what has finished; validation losses of the fits among them."""
    found: dict[str, list[dict[str, Any]]] = {"learning": _learning(config, results)}
    points = curve_points(config, rows)
    for row, model in dict.fromkeys((p.row, p.model) for p in points):
        own = results.get(f"segmentation {row} seed 0")
        if own is not None:
            found.setdefault("num_synthetic", []).append(_point(model, own.manifest["num_train_frames"], own))
            found.setdefault("real_fraction", []).append(_point(model, 0.0, own))
    for point in points:
        outcome = results.get(point.key)
        if outcome is not None:
            x = outcome.manifest["num_train_frames"] if point.curve == "num_synthetic" else point.share
            found[point.curve].append(_point(point.model, x, outcome))
    return {name: entries for name, entries in found.items() if entries}


def _point(series: str, x: float, outcome: Outcome) -> dict[str, Any]:
    scores = outcome.manifest["scores"]
    low, high = scores["mean_dice_low"], scores["mean_dice_high"]
    return {"series": series, "x": x, "y": scores["mean_dice"], "low": low, "high": high}


def _learning(config: CompareJob, results: dict[str, Outcome]) -> list[dict[str, Any]]:
    points = []
    for model in config.models:
        fitted = results.get(f"fit {model.label}")
        if fitted is None:
            continue
        history = Storage.at(fitted.path).read_json("history.json")
        for step, loss in history["validation"]:
            points.append({"series": model.label, "x": step * model.fit.global_batch, "y": loss})
    return points
