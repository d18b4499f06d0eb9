"""Left-ventricular function from outlines: volumes and ejection fraction, single plane, one an apical view.

Two rules of the field on the LV cavity's area A and length L, from the middle of the mitral plane to the apex:
area-length V = 8A² / (3πL), and Simpson's single-plane disks V = Σ π/4·dᵢ²·L/20. An ellipsoid gives 4/3·πab² by both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage

from raysyn.labels import TASK_CLASSES
from raysyn.metrics.bootstrap import with_spread
from raysyn.types import PHASES, VIEWS, FrameArrays, UserError

METHODS = ("area_length", "simpson")
NUM_DISKS = 20
CAVITY, ATRIUM = TASK_CLASSES.index("lv_cavity"), TASK_CLASSES.index("left_atrium")


def long_axis(classes: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(middle of the mitral plane, unit vector to the apex, length) of the LV cavity in `classes` uint8 [H, W].

    The mitral plane is where cavity and left atrium (the largest part of each) touch, or where but a pixel is between
    them; with no atrium there, the lowest row of the cavity (the apex of an apical view is up). The apex is the cavity's
    farthest pixel. In the unit of `spacing` (row, column).
    """
    cavity = main_part(classes == CAVITY)
    near = ndimage.binary_dilation(main_part(classes == ATRIUM), structure=np.ones((3, 3)))
    touching = cavity & near
    if not touching.any():
        touching = cavity & ndimage.binary_dilation(near, structure=np.ones((3, 3)))
    points = np.argwhere(cavity) * spacing
    base = (np.argwhere(touching) if touching.any() else _lowest(cavity)) * spacing
    middle = base.mean(0)
    offsets = points - middle
    distance = np.linalg.norm(offsets, axis=1)
    # A cavity of one pixel has no direction of its own: up.
    axis = offsets[distance.argmax()] / distance.max() if distance.max() > 0 else np.array([-1.0, 0.0])
    # Pixels have a size: half of one at either end.
    return middle, axis, float(distance.max() + np.abs(axis) @ spacing)


def main_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of bool [H, W]: a stray pixel must become neither the apex nor a piece of the base."""
    parts, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count < 2:
        return np.asarray(parts > 0)
    return np.asarray(parts == np.bincount(parts.ravel())[1:].argmax() + 1)


def _lowest(cavity: np.ndarray) -> np.ndarray:
    row = int(np.flatnonzero(cavity.any(1)).max())
    return np.array([(row, column) for column in np.flatnonzero(cavity[row])])


def volume(classes: np.ndarray, spacing: np.ndarray, method: str = "simpson") -> float:
    """LV cavity volume of task classes uint8 [H, W]; ml where spacing [2] is in mm, else 1000 px³. 0 with no cavity.

    Of a cavity in several parts the largest counts.
    """
    if method not in METHODS:
        raise UserError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    cavity = main_part(classes == CAVITY)
    if not cavity.any():
        return 0.0
    spacing = np.asarray(spacing, dtype=np.float64)
    pixel = float(np.prod(spacing))
    middle, axis, length = long_axis(classes, spacing)
    if method == "area_length":
        return float(8 * (cavity.sum() * pixel) ** 2 / (3 * np.pi * length)) / 1000
    # Each pixel's area is shared out by how far it reaches along the axis: whole pixels in disks hardly thicker would make
    # these uneven, and their squares too large.
    reach, height = float(np.abs(axis) @ spacing), length / NUM_DISKS
    starts = (np.argwhere(cavity) * spacing - middle) @ axis
    below = ((np.arange(1, NUM_DISKS)[:, None] * height - starts) / reach).clip(0, 1).sum(1)
    diameter = np.diff(below, prepend=0, append=len(starts)) * pixel / height
    return float((np.pi / 4 * diameter**2 * height).sum()) / 1000


def ejection_fractions(
    classes: np.ndarray, frames: FrameArrays, method: str = "simpson"
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(EDV, ESV, EF in %) by (patient, view) where `frames` hold both ED and ES; classes uint8 [N, H, W] beside them.

    EF = (EDV − ESV) / EDV; NaN where no cavity was found at ED. Volumes are in ml where the spacing is known, else in
    1000 px³ (their ratio does not mind). Of several frames of one phase the first counts.
    """
    ends: dict[tuple[str, str], dict[str, float]] = {}
    for i, patient in enumerate(frames.patient_id):
        pair = ends.setdefault((patient, VIEWS[int(frames.view[i])]), {})
        phase = PHASES[int(frames.phase[i])]
        if phase not in pair:
            spacing = frames.spacing_mm[i]
            pair[phase] = volume(classes[i], spacing if np.isfinite(spacing).all() else np.ones(2), method)
    found = {}
    for key, pair in ends.items():
        if len(pair) == len(PHASES):
            edv, esv = pair["ED"], pair["ES"]
            found[key] = (edv, esv, 100 * (1 - esv / edv) if edv > 0 else float("nan"))
    return found


def ejection_fraction_errors(
    predicted: np.ndarray, truth: np.ndarray, frames: FrameArrays, method: str = "simpson", *, seed: int = 0
) -> dict[str, Any]:
    """Error of the EF read from `predicted` against that of `truth` (task classes uint8 [N, H, W]), in points of %.

    Keys: `ef_mae`, `ef_bias`, `ef_sd` of the error and `ef_correlation`, each with a 95 % interval over patients and the
    published protocol (`_low`, `_high`, `_protocol_mean`, `_protocol_sd`); `ef_num_pairs`, and `ef_num_undefined`: pairs
    with no cavity found at ED, left out. Empty without a pair.
    """
    read, own = (ejection_fractions(c, frames, method) for c in (predicted, truth))
    keys = [k for k in own if np.isfinite(own[k][2])]
    if not keys:
        return {}
    a, b = (np.array([values[k][2] for k in keys]) for values in (read, own))
    known = np.isfinite(a)
    statistics: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "mae": lambda a, b: float(np.abs(a - b).mean()),
        "bias": lambda a, b: float((a - b).mean()),
        "sd": lambda a, b: float((a - b).std()),
        "correlation": _correlation,
    }
    errors: dict[str, Any] = {}
    for name, statistic in statistics.items():

        def of_pairs(index: np.ndarray, statistic: Callable[[np.ndarray, np.ndarray], float] = statistic) -> float:
            index = index[known[index]]
            return statistic(a[index], b[index]) if len(index) else float("nan")

        errors |= with_spread(f"ef_{name}", of_pairs, [k[0] for k in keys], seed)
    return errors | {"ef_num_pairs": len(keys), "ef_num_undefined": int((~known).sum())}


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN for fewer than three pairs or where either does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() > 0 and b.std() > 0 else float("nan")
