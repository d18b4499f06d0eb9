"""Who the phantom's patients are and how a view cuts them: everything about anatomy that is drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Patient:
    """What stays the same in all frames of a patient; lengths in mm, angles in radians, the rest are ratios."""

    lv_length: float
    lv_half_width: float
    lv_widest: float
    lv_annulus: float
    wall: float
    shortening: float
    narrowing: float
    thickening: float
    la_length: float
    la_half_width: float
    atria: tuple[float, float]  # where along its length an atrium is widest, and how square its roof is
    rv_width: float
    rv_start: float
    ra_half_width: float
    ra_length: float
    wiggle: np.ndarray  # [3, 2] relative amplitude and phase of the cavity's edge


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draw a heart: adult sizes, from small and vigorous to large and weak."""
    build = rng.uniform(0.92, 1.1)
    weak = rng.beta(1.2, 2.2)  # 0 healthy, 1 dilated and weak
    return Patient(
        lv_length=build * (rng.uniform(72, 84) + 5 * weak),
        lv_half_width=build * (rng.uniform(19.5, 23.5) + 5 * weak),
        lv_widest=rng.uniform(0.52, 0.7),
        lv_annulus=rng.uniform(0.62, 0.78),
        wall=build * rng.uniform(8.0, 11.0),
        shortening=rng.uniform(0.12, 0.18) * (1 - 0.5 * weak),
        narrowing=rng.uniform(0.24, 0.34) * (1 - 0.6 * weak),
        thickening=rng.uniform(0.3, 0.5) * (1 - 0.5 * weak),
        la_length=build * rng.uniform(34, 44),
        la_half_width=build * rng.uniform(15.5, 21),
        atria=(rng.uniform(0.38, 0.58), rng.uniform(2.0, 3.2)),
        rv_width=build * rng.uniform(34, 46),
        rv_start=rng.uniform(0.06, 0.26),
        ra_half_width=build * rng.uniform(16, 22),
        ra_length=build * rng.uniform(34, 46),
        wiggle=np.stack([rng.uniform(0.0, [0.03, 0.02, 0.015]), rng.uniform(0, 2 * np.pi, 3)], axis=1),
    )


@dataclass(frozen=True)
class Pose:
    """How a view cuts the heart: the left ventricle's apex (x, z) in mm, its axis's tilt in radians, ratios, levels."""

    apex: tuple[float, float]
    tilt: float
    width: float
    left: float
    right: float
    bend_mm: float
    la_lean: float
    la_size: float
    left_wall: float
    right_wall: float
    tent_mm: float
    open_mm: float
    rv_size: float
    leaflets: tuple[float, float]  # levels of the mitral leaflets, dB over myocardium
    band_db: float  # level of the right ventricle's moderator band
    papillary: np.ndarray  # [2, 3] position along the axis, size, presence

    def world(self, s: np.ndarray, u: np.ndarray) -> np.ndarray:
        """(s, u) of the ventricle's frame, arrays [N], to (x, z) [N, 2]."""
        c, n = np.cos(self.tilt), np.sin(self.tilt)
        return np.stack([self.apex[0] + s * n + u * c, self.apex[1] + s * c - u * n], axis=-1)

    def point(self, s: float, u: float) -> tuple[float, float]:
        """One (s, u) as (x, z)."""
        x, z = self.world(np.array(s), np.array(u))
        return float(x), float(z)


def draw_pose(rng: np.random.Generator, view: str) -> Pose:
    """How a patient is seen in a view; in 4CH the ventricle lies right of the middle, to leave room for the right heart."""
    four = view == "4CH"
    return Pose(
        apex=(rng.uniform(-2, 5) if four else rng.uniform(-5, 6), rng.uniform(26, 33)),
        tilt=rng.uniform(0.05, 0.15) if four else rng.uniform(-0.06, 0.14),
        width=rng.uniform(0.96, 1.04) if four else rng.uniform(0.98, 1.08),
        left=rng.uniform(0.86, 0.98) if four else rng.uniform(0.88, 1.04),
        right=rng.uniform(0.98, 1.07) if four else rng.uniform(0.94, 1.08),
        bend_mm=rng.uniform(-2.0, 2.5),
        la_lean=rng.uniform(-7, 2) if four else rng.uniform(-5, 5),
        la_size=rng.uniform(0.94, 1.06),
        left_wall=rng.uniform(0.95, 1.15),
        right_wall=rng.uniform(0.9, 1.05),
        tent_mm=rng.uniform(3, 8),
        open_mm=max(0.0, rng.uniform(-12, 8)),
        rv_size=rng.uniform(0.9, 1.12),
        leaflets=(rng.uniform(-10, 4), rng.uniform(-14, 3)),
        band_db=rng.uniform(-24, -9),
        papillary=np.stack([rng.uniform(0.38, 0.55, 2), rng.uniform(0.8, 1.25, 2), rng.uniform(0, 1, 2)], axis=1),
    )
