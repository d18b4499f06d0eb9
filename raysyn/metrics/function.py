"""Left-ventricular function from outlines: volumes and ejection fraction, single plane, one an apical view.

Two rules of the field on the LV cavity's area A and length L, from the middle of the mitral plane to the apex:
area-length V = 8A² / (3πL), and Simpson's single-plane disks V = Σ π/4·dᵢ²·L/20. An ellipsoid gives 4/3·πab² by both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage

from raysyn.labels import TASK_CLASSES
from raysyn.metrics.bootstrap import patient_interval
from raysyn.types import PHASES, VIEWS, FrameArrays, UserError

METHODS = ("area_length", "simpson")
NUM_DISKS = 20
CAVITY, ATRIUM = TASK_CLASSES.index("lv_cavity"), TASK_CLASSES.index("left_atrium")


def long_axis(classes: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(middle of the mitral plane, unit vector to the apex, length) of the LV cavity in `classes` uint8 [H, W].

    The mitral plane is where cavity and left atrium touch; with no atrium in touch, the lowest row of the cavity (the
    apex of an apical view is up). The apex is the cavity's farthest pixel. In the unit of `spacing` (row, column).
    """
    cavity = classes == CAVITY
    touching = cavity & ndimage.binary_dilation(classes == ATRIUM, structure=np.ones((3, 3)), iterations=2)
    points = np.argwhere(cavity) * spacing
    base = (np.argwhere(touching) if touching.any() else _lowest(cavity)) * spacing
    middle = base.mean(0)
    offsets = points - middle
    distance = np.linalg.norm(offsets, axis=1)
    axis = offsets[distance.argmax()] / max(distance.max(), 1e-12)
    # Pixels have a size: half of one at either end.
    return middle, axis, float(distance.max() + np.abs(axis) @ spacing)


def _lowest(cavity: np.ndarray) -> np.ndarray:
    row = int(np.flatnonzero(cavity.any(1)).max())
    return np.array([(row, column) for column in np.flatnonzero(cavity[row])])


def volume(classes: np.ndarray, spacing: np.ndarray, method: str = "simpson") -> float:
    """LV cavity volume of task classes uint8 [H, W]; ml where spacing [2] is in mm, else 1000 px³. 0 with no cavity."""
    if method not in METHODS:
        raise UserError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    cavity = classes == CAVITY
    if not cavity.any():
        return 0.0
    spacing = np.asarray(spacing, dtype=np.float64)
    pixel = float(np.prod(spacing))
    middle, axis, length = long_axis(classes, spacing)
    if method == "area_length":
        return float(8 * (cavity.sum() * pixel) ** 2 / (3 * np.pi * length)) / 1000
    along = (np.argwhere(cavity) * spacing - middle) @ axis + 0.5 * float(np.abs(axis) @ spacing)
    disk = np.clip((along / length * NUM_DISKS).astype(int), 0, NUM_DISKS - 1)
    height = length / NUM_DISKS
    diameter = np.bincount(disk, minlength=NUM_DISKS) * pixel / height
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

    Keys: `ef_mae` with `_low` and `_high` (95 % over patients), `ef_bias`, `ef_sd` of the error, `ef_correlation`,
    `ef_num_pairs`, and `ef_num_undefined`: pairs with no cavity found at ED, left out. Empty without a pair.
    """
    read, own = (ejection_fractions(c, frames, method) for c in (predicted, truth))
    keys = [k for k in own if np.isfinite(own[k][2])]
    if not keys:
        return {}
    a, b = (np.array([values[k][2] for k in keys]) for values in (read, own))
    error = a - b
    known = np.isfinite(error)
    low, high = patient_interval(np.abs(error), [k[0] for k in keys], seed=seed)
    several = known.sum() > 2 and a[known].std() > 0 and b[known].std() > 0
    return {
        "ef_mae": float(np.abs(error[known]).mean()) if known.any() else float("nan"),
        "ef_mae_low": low,
        "ef_mae_high": high,
        "ef_bias": float(error[known].mean()) if known.any() else float("nan"),
        "ef_sd": float(error[known].std()) if known.any() else float("nan"),
        "ef_correlation": float(np.corrcoef(a[known], b[known])[0, 1]) if several else float("nan"),
        "ef_num_pairs": len(keys),
        "ef_num_undefined": int((~known).sum()),
    }
