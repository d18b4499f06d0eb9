"""The phantom's heart: where its chambers, walls and valves lie, in millimetres below the transducer.

Coordinates: x to the right and z down the picture, the transducer's virtual apex at (0, 0). Chambers are outlines in the
frame of the left ventricle (s along its axis from the apex, u across it to the right) and are kept as star-shaped
tables, so that a point is inside or outside by one angle and one look-up, at any resolution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from raysyn.data.phantom_patient import Patient, Pose

NUM_ANGLES = 2048
SEPTUM_ATRIA_MM = 3.0  # interatrial septum, drawn as wall


@dataclass(frozen=True)
class Star:
    """A region star-shaped about `centre` (x, z): its edge's distance from there in mm by angle, [NUM_ANGLES]."""

    centre: tuple[float, float]
    radius: np.ndarray

    @staticmethod
    def around(outline: np.ndarray, centre: np.ndarray) -> Star:
        """From a closed outline [N, 2] in (x, z) mm and a point inside it."""
        offset = outline - centre
        angle = np.arctan2(offset[:, 1], offset[:, 0])
        order = np.argsort(angle)
        grid = (np.arange(NUM_ANGLES) + 0.5) * (2 * np.pi / NUM_ANGLES) - np.pi
        radius = np.interp(grid, angle[order], np.hypot(offset[:, 0], offset[:, 1])[order], period=2 * np.pi)
        return Star((float(centre[0]), float(centre[1])), radius.astype(np.float32))

    def polar(self, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance from the centre in mm and the index of the angle, of points x, z [...]."""
        dx, dz = x - self.centre[0], z - self.centre[1]
        turn = (np.arctan2(dz, dx) + np.pi) * (NUM_ANGLES / (2 * np.pi))
        return np.hypot(dx, dz), np.minimum(turn.astype(np.int32), NUM_ANGLES - 1)

    def beyond(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Distance past the edge along the ray from the centre, mm; negative inside. Points x, z [...]."""
        distance, index = self.polar(x, z)
        return distance - self.radius[index]


@dataclass(frozen=True)
class Strand:
    """A thin bright structure: a polyline [N, 2] in (x, z) mm, its half-thickness and its level over myocardium."""

    points: np.ndarray
    half_mm: float
    level_db: float


@dataclass(frozen=True)
class Heart:
    """One view at one phase. `lv_epi` is the outer edge of the wall about the same centre as `lv_endo`."""

    lv_endo: Star
    lv_epi: Star
    la: Star
    strands: list[Strand]
    blobs: list[tuple[float, float, float, float, float]]  # papillary muscles: x, z, half axes in mm, turn in radians
    bright_points: list[tuple[float, float]]  # hinges of the valves, the crux
    roof_mm: float  # depth of the far wall of the atria, the same at ED and ES
    rv: Star | None = None
    ra: Star | None = None

    def wall(self, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(inside the cavity, in the wall, mm past the endocardium, mm past the epicardium) at points x, z [...]."""
        distance, index = self.lv_endo.polar(x, z)
        inner, outer = self.lv_endo.radius[index], self.lv_epi.radius[index]
        cavity = distance < inner
        # Below 0.3 mm the two edges are the same line: the mitral plane, where there is no wall.
        wall = (distance < outer) & ~cavity & (outer - inner > 0.3)
        return cavity, wall, distance - inner, distance - outer


def _bullet(t: np.ndarray, widest: float, base: float) -> np.ndarray:
    """Half-width of a ventricle over its own, by t from the apex (0) to the base (1)."""
    near = np.sqrt(np.maximum(1 - np.abs(1 - t / widest) ** 2.2, 0))
    return np.where(t < widest, near, 1 - (1 - base) * ((t - widest) / (1 - widest)) ** 2)


def _atrium(t: np.ndarray, top: float, form: tuple[float, float]) -> np.ndarray:
    """Half-width of an atrium over its own, by t from the valve (0, width `top`) to the roof (1); form as `atria`."""
    widest, square = form
    near = top + (1 - top) * np.sin(np.pi / 2 * np.minimum(t / widest, 1))
    return near * np.maximum(1 - np.maximum((t - widest) / (1 - widest), 0) ** square, 0) ** 0.5


def _closed(left: np.ndarray, right: np.ndarray, num: int = 40) -> np.ndarray:
    """Outline from its left side down to its right side up, the gap at the start of both closed by a straight line."""
    t = np.linspace(0, 1, num)[1:-1, None]
    lid = right[0] + (left[0] - right[0]) * t
    return np.concatenate([left, right[::-1], lid])


def build_heart(patient: Patient, pose: Pose, view: str, phase: str) -> Heart:
    """The heart of `patient` at ED or ES: at ES shorter, narrower, thicker-walled, the valve plane nearer the apex."""
    systole = 1.0 if phase == "ES" else 0.0
    length = patient.lv_length * (1 - patient.shortening * systole)
    left, right = _cavity(patient, pose, systole, length)
    outer_left, outer_right = _outer(left, right, patient.wall * (1 + patient.thickening * systole), pose, length)
    centre = pose.world(np.array(0.6 * length), np.array(0.0))
    endo = Star.around(pose.world(*_closed(left, right).T), centre)
    epi = Star.around(pose.world(*_closed(outer_left, outer_right).T), centre)
    roof = patient.lv_length + patient.la_length * pose.la_size
    valve = (float(left[0, 1]), float(right[0, 1]))
    la, la_left = _left_atrium(patient, pose, systole, length, roof - length, valve)
    heart = Heart(
        lv_endo=endo,
        lv_epi=Star(epi.centre, np.maximum(epi.radius, endo.radius)),
        la=la,
        strands=_mitral(pose, length, valve, phase),
        blobs=_papillary(pose, left, right, length),
        bright_points=[pose.point(length, valve[0] - 1.5), pose.point(length, valve[1] + 1.5)],
        roof_mm=pose.point(roof, pose.la_lean)[1],
    )
    if view != "4CH":
        return heart
    return _with_right_heart(heart, patient, pose, systole, length, roof, outer_left, la_left)


def _cavity(patient: Patient, pose: Pose, systole: float, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Left and right side of the left ventricle's cavity [N, 2] in (s, u), each from the mitral plane to the apex."""
    half = patient.lv_half_width * pose.width * (1 - patient.narrowing * systole)
    t = patient.lv_widest * (1 - np.cos(np.linspace(0, np.pi / 2, 50)))
    t = np.concatenate([t, np.linspace(patient.lv_widest, 1, 41)[1:]])
    edge = half * _bullet(t, patient.lv_widest, patient.lv_annulus + 0.12 * systole)
    for i, (amplitude, turn) in enumerate(patient.wiggle):
        edge = edge * (1 + amplitude * np.sin((i + 2) * np.pi * t + turn) * (1 - t**4))
    middle = pose.bend_mm * 4 * t * (1 - t)
    sides = middle - edge * pose.left, middle + edge * pose.right
    left, right = (np.stack([t * length, u], axis=1)[::-1] for u in sides)
    return left, right


def _outer(
    inner_left: np.ndarray, inner_right: np.ndarray, wall: float, pose: Pose, length: float
) -> tuple[np.ndarray, np.ndarray]:
    """Epicardial sides from base to apex: the cavity's edge moved along its normal by the wall, thinner at the apex."""
    side = np.concatenate([inner_left, inner_right[::-1][1:]])
    tangent = np.gradient(side, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    t = np.clip(side[:, 0] / length, 0, 1)
    across = np.linspace(-1, 1, len(side))
    blend = 0.5 + 0.5 * np.tanh(across / 0.3)
    thick = wall * (pose.left_wall * (1 - blend) + pose.right_wall * blend)
    thick = thick * (0.72 + 0.28 * np.clip(t / 0.3, 0, 1)) * (1 - 0.2 * np.clip((t - 0.7) / 0.3, 0, 1) ** 2)
    outer = side + normal * thick[:, None]
    outer[:, 0] = np.minimum(outer[:, 0], length)
    middle = len(inner_left)
    return outer[:middle], outer[middle - 1 :][::-1]


def _left_atrium(
    patient: Patient, pose: Pose, systole: float, top: float, length: float, valve: tuple[float, float]
) -> tuple[Star, np.ndarray]:
    """The atrium below the mitral plane (s = `top`), and its left edge (s, u) from valve to roof."""
    t = np.sin(np.linspace(0, np.pi / 2, 60))
    half = patient.la_half_width * pose.la_size * (1 + 0.08 * systole)
    neck = 0.48 * (valve[1] - valve[0])
    middle = 0.5 * (valve[0] + valve[1]) + pose.la_lean * t
    edge = half * _atrium(t, neck / half, patient.atria)
    s = top + length * t
    left, right = np.stack([s, middle - edge], 1), np.stack([s, middle + edge], 1)
    centre = pose.world(np.array(top + 0.45 * length), np.array(middle[0] + 0.4 * pose.la_lean))
    return Star.around(pose.world(*_closed(left, right).T), centre), left


def _mitral(pose: Pose, length: float, valve: tuple[float, float], phase: str) -> list[Strand]:
    """Two leaflets from the hinges: closed and tented towards the apex, or at ED still a little open."""
    gap = pose.open_mm if phase == "ED" else 0.0
    meet = valve[0] + (valve[1] - valve[0]) * 0.56
    tip_s = length - (pose.tent_mm * (1.0 if phase == "ED" else 0.7) + 0.9 * gap)
    strands = []
    ends = (valve[0], meet - 0.7 * gap, pose.leaflets[0]), (valve[1], meet + 0.7 * gap, pose.leaflets[1])
    for hinge, tip, level in ends:
        s = np.array([length + 0.5, 0.35 * length + 0.65 * tip_s, tip_s])
        u = np.array([hinge, 0.5 * (hinge + tip), tip])
        strands.append(Strand(pose.world(s, u), 0.75, level))
    return strands


def _papillary(
    pose: Pose, left: np.ndarray, right: np.ndarray, length: float
) -> list[tuple[float, float, float, float, float]]:
    """Hints of the papillary muscles on the walls inside the cavity: (x, z, half length, half width, turn)."""
    blobs = []
    for (place, size, presence), side, inward in zip(pose.papillary, (left, right), (1.0, -1.0)):
        if presence > 0.4:
            u = float(np.interp(place * length, side[::-1, 0], side[::-1, 1])) + inward * 2.5 * size
            x, z = pose.point(place * length, u)
            blobs.append((x, z, 8.0 * size, 3.0 * size, pose.tilt - 0.12 * inward))
    return blobs


def _with_right_heart(
    heart: Heart,
    patient: Patient,
    pose: Pose,
    systole: float,
    length: float,
    roof: float,
    septum: np.ndarray,
    la_left: np.ndarray,
) -> Heart:
    """Add ventricle and atrium left of the septum, the tricuspid valve and the moderator band: 4CH only, never a label."""
    t = np.linspace(0, 1, 60)
    base = length - 5.0  # the tricuspid valve sits nearer to the apex than the mitral one
    start = patient.rv_start * length
    s = start + (base - start) * t
    medial = np.interp(s, septum[::-1, 0], septum[::-1, 1]) - 0.3
    width = patient.rv_width * pose.rv_size * (1 - 0.2 * systole)
    lateral = medial - width * (1 - (1 - t) ** 1.7) * (1 - 0.1 * t**4) - 0.5
    sides = np.stack([s, lateral], 1)[::-1], np.stack([s, medial], 1)[::-1]
    centre = pose.world(s[40], 0.5 * (medial[40] + lateral[40]))
    rv = Star.around(pose.world(*_closed(*sides).T), centre)

    half = patient.ra_half_width * pose.rv_size * (1 + 0.08 * systole)
    top = base + 0.5
    ra_length = min(patient.ra_length * (1 + 0.06 * systole), roof - top + 4)
    r = np.sin(np.linspace(0, np.pi / 2, 60))
    beside = np.interp(top + ra_length * 0.45, la_left[:, 0], la_left[:, 1]) - SEPTUM_ATRIA_MM - 0.95 * half
    valve = 0.5 * (medial[-1] + lateral[-1])
    middle = valve + (beside - valve) * np.minimum(r / 0.45, 1)
    edge = half * _atrium(r, min(0.48 * (medial[-1] - lateral[-1]) / half, 0.95), patient.atria)
    s_ra = top + ra_length * r
    outline = _closed(np.stack([s_ra, middle - edge], 1), np.stack([s_ra, middle + edge], 1))
    ra = Star.around(pose.world(*outline.T), pose.world(np.array(top + 0.45 * ra_length), np.array(beside)))

    meet = medial[-1] + 0.45 * (lateral[-1] - medial[-1])
    tip = base - 0.6 * pose.tent_mm
    strands = [
        Strand(
            pose.world(np.array([base, 0.4 * base + 0.6 * tip, tip]), np.array([h, 0.5 * (h + meet), meet])), 0.8, 3.0
        )
        for h in (float(medial[-1]), float(lateral[-1]))
    ]
    band = pose.world(s[[32, 24, 18]], np.array([medial[32], 0.5 * (medial[24] + lateral[24]), lateral[18]]))
    strands.append(Strand(band, 0.8, pose.band_db))
    hinges = [pose.point(base, float(lateral[-1])), pose.point(0.5 * (base + length), float(medial[-1]) + 2.0)]
    points = heart.bright_points + hinges
    return replace(heart, rv=rv, ra=ra, strands=heart.strands + strands, bright_points=points)
