"""How strongly each place of the phantom scatters: levels in dB over average myocardium, in polar space.

The order of brightness is that of a real apical view: blood, lung and far tissue, myocardium, valves, pericardium. Walls
that lie along the beam scatter less than walls across it, the sides of the sector lose contact, and the first
centimetres are filled with the chest wall and its echoes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysyn.data.phantom_anatomy import SEPTUM_ATRIA_MM, Heart, Star, Strand
from raysyn.data.phantom_speckle import smooth_field

LEFT_ATRIUM_WALL_MM = 1.5
RIGHT_WALL_MM = 4.0


@dataclass(frozen=True)
class Look:
    """What of a view's appearance is not anatomy; levels in dB over average myocardium."""

    blood_db: float
    surround_db: float
    pericardium_db: float
    along_beam_db: float  # lost by walls that run along the beam
    patch_db: float  # smooth unevenness of tissue
    dropout_db: float  # lost where contact is poor, in patches
    clutter_db: float
    clutter_mm: float
    band_mm: float
    edge_shadow: tuple[float, float]  # dB lost at the left and right border of the sector
    shadows: np.ndarray  # [2, 3] place across the sector (-1 to 1), width, dB lost


def draw_look(rng: np.random.Generator) -> Look:
    """Draw a view's appearance, from good to poor picture quality."""
    poor = rng.beta(1.5, 2.5)
    return Look(
        blood_db=rng.uniform(-31, -26) + 4 * poor,
        surround_db=rng.uniform(-12, -8),
        pericardium_db=rng.uniform(8, 13),
        along_beam_db=rng.uniform(3, 6) + 2 * poor,
        patch_db=rng.uniform(1.8, 3.4),
        dropout_db=rng.uniform(2, 5) + 4 * poor,
        clutter_db=rng.uniform(1, 5) + 3 * poor,
        clutter_mm=rng.uniform(7.5, 11),
        band_mm=rng.uniform(5, 9),
        edge_shadow=(rng.uniform(0, 12), rng.uniform(0, 9)),
        shadows=np.stack([rng.uniform(-0.95, 0.95, 2), rng.uniform(0.03, 0.1, 2), rng.uniform(-4, 7, 2)], axis=1),
    )


@dataclass(frozen=True)
class PolarGrid:
    """Where the samples of the polar space lie: depth [S, 1] and angle [1, B] as given, x and z [S, B] in mm."""

    depth: np.ndarray
    angle: np.ndarray
    x: np.ndarray
    z: np.ndarray

    @staticmethod
    def spanning(near_mm: float, far_mm: float, half_angle: float, num_samples: int, num_beams: int) -> PolarGrid:
        """Samples evenly from `near_mm` to `far_mm`, beams evenly across the sector, borders included."""
        depth = np.linspace(near_mm, far_mm, num_samples, dtype=np.float32)[:, None]
        angle = np.linspace(-half_angle, half_angle, num_beams, dtype=np.float32)[None]
        return PolarGrid(depth, angle, depth * np.sin(angle), depth * np.cos(angle))


def _across(star: Star, grid: PolarGrid) -> np.ndarray:
    """How far the star's edge faces the beam, 0 (along it) to 1 (across it), the edge seen from the star's centre."""
    dx, dz = grid.x - star.centre[0], grid.z - star.centre[1]
    dot = dx * np.sin(grid.angle) + dz * np.cos(grid.angle)
    return np.abs(dot) / np.maximum(np.hypot(dx, dz), 1e-3)


def tissue_levels(heart: Heart, grid: PolarGrid, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Scatterer strength [S, B] in dB over average myocardium. `rng` draws the smooth unevenness."""
    shape = grid.x.shape
    uneven = look.patch_db * smooth_field(rng, shape, (12, 9))
    layers = smooth_field(rng, shape, (44, 6))  # fascia and fibres: thin in depth, long across
    rough = smooth_field(rng, shape, (56, 30))
    contact = smooth_field(rng, shape, (3, 7))
    dropout = -look.dropout_db * np.maximum(contact - 0.2, 0)
    cavity, wall, past_endo, past = heart.wall(grid.x, grid.z)
    la_past = heart.la.beyond(grid.x, grid.z)
    across = _across(heart.lv_endo, grid)

    outside = np.minimum(past, la_past - LEFT_ATRIUM_WALL_MM)
    right = []
    for star in (heart.rv, heart.ra):
        if star is not None:
            right.append((star, star.beyond(grid.x, grid.z)))
            outside = np.minimum(outside, right[-1][1] - RIGHT_WALL_MM)

    # Around the heart: a bright pericardium where it faces the beam, then lung and far tissue that fade.
    la_across = _across(heart.la, grid)
    facing = np.maximum(la_across * (grid.z > 0.6 * heart.roof_mm), 0.85 * across)
    bright = (look.pericardium_db - look.surround_db) * (0.3 + 0.7 * facing**2) + 3.0 * contact + 2.0 * layers
    bright = np.minimum(bright, look.pericardium_db - look.surround_db + 2.0)
    ring = np.exp(-(((outside - 2.2) / 1.7) ** 2))
    deep = np.clip(grid.z / heart.roof_mm - 0.55, 0, 0.4) / 0.4
    behind = deep * (0.75 * np.exp(-np.maximum(outside - 2.2, 0) / 10.0) + 0.1)
    level = look.surround_db + 1.5 * uneven + np.maximum(ring, behind) * bright
    level += 4.0 * np.maximum(layers - 0.5, 0) - 8.0 * (1 - deep) * np.clip(outside / 10, 0, 1)

    across = np.where(la_past < past, la_across - 0.5, across)  # thin walls of the atria: only their roof is seen well
    walls = 1.2 * uneven + 1.2 * layers + 1.5 * rough - look.along_beam_db * (0.75 - across) + dropout
    level = np.where(outside < 0, walls, level)
    level[wall] = walls[wall] + 0.8
    blood = look.blood_db + 1.2 * uneven + 5.0 * np.exp(-grid.depth / 40)
    for _, distance in right:
        level = np.where((distance < 0) & (past > 0) & (la_past > SEPTUM_ATRIA_MM), blood, level)
    level = np.where((la_past < 0) & ~wall & ~cavity, blood, level)
    trabeculae = (past_endo > -3.2) & (rough > 0.35)
    level = np.where(cavity, np.where(trabeculae, walls - 8.0, blood + 1.0), level)
    for x, z, long, short, turn in heart.blobs:
        _ellipse(level, cavity, grid, (x, z, long, short, turn), -5.0 + 2 * rough)
    for strand in heart.strands:
        _draw_strand(level, grid, strand)
    for x, z in heart.bright_points:
        _draw_strand(level, grid, Strand(np.array([[x, z], [x + 0.1, z]]), 2.0, 4.0))
    return level


def _ellipse(
    level: np.ndarray, inside: np.ndarray, grid: PolarGrid, shape: tuple[float, ...], value: np.ndarray
) -> None:
    """Set `level` in a turned ellipse (x, z, half length down, half width, turn) where `inside`."""
    x, z, long, short, turn = shape
    rows = _rows(grid, np.hypot(x, z), long + 1)
    dx, dz = grid.x[rows] - x, grid.z[rows] - z
    c, s = np.cos(turn), np.sin(turn)
    where = (((dz * c + dx * s) / long) ** 2 + ((dx * c - dz * s) / short) ** 2 < 1) & inside[rows]
    level[rows][where] = value[rows][where]


def _rows(grid: PolarGrid, depth: float, reach: float) -> slice:
    """The rows within `reach` mm of `depth`."""
    low, high = np.searchsorted(grid.depth[:, 0], (depth - reach, depth + reach))
    return slice(int(low), int(high) + 1)


def _draw_strand(level: np.ndarray, grid: PolarGrid, strand: Strand) -> None:
    """Raise `level` to the strand's within its half-thickness, falling off softly over one more."""
    for (x0, z0), (x1, z1) in zip(strand.points, strand.points[1:]):
        reach = 2.5 * strand.half_mm
        depths = np.hypot(x0, z0), np.hypot(x1, z1)
        rows = _rows(grid, 0.5 * sum(depths), 0.5 * abs(depths[1] - depths[0]) + reach)
        dx, dz = grid.x[rows] - x0, grid.z[rows] - z0
        length = max(float(np.hypot(x1 - x0, z1 - z0)), 1e-3)
        cx, cz = (x1 - x0) / length, (z1 - z0) / length
        along = np.clip(dx * cx + dz * cz, 0, length)
        distance = np.hypot(dx - along * cx, dz - along * cz)
        value = strand.level_db - 9 * np.maximum(distance / strand.half_mm - 1, 0)
        near = distance < reach
        level[rows][near] = np.maximum(level[rows][near], value[near])


def clutter_levels(grid: PolarGrid, look: Look, rng: np.random.Generator) -> np.ndarray:
    """The chest wall and its echoes [S, B] in dB: strong at the transducer, in bands, gone after a few centimetres."""
    depth = grid.depth + 1.5 * smooth_field(rng, grid.x.shape, (2, 4))
    bands = 3.0 * np.cos(2 * np.pi * depth / look.band_mm) + 5.0 * np.exp(-(((depth - 2.2 * look.band_mm) / 1.5) ** 2))
    return look.clutter_db + bands - 8.7 * np.maximum(depth - 6, 0) / look.clutter_mm


def shadow_db(grid: PolarGrid, look: Look) -> np.ndarray:
    """Level lost behind ribs and lung [S, B], dB >= 0: along the sector's borders and in at most two narrow rays."""
    place = grid.angle / grid.angle.max()
    lost = sum(
        loss * np.clip((side * place - 0.76) / 0.24, 0, 1) ** 1.3 for side, loss in zip((-1, 1), look.edge_shadow)
    )
    for centre, width, loss in look.shadows:
        lost = lost + max(loss, 0.0) * np.exp(-(((place - centre) / width) ** 2))
    return lost * np.clip((grid.depth - 14) / 25, 0, 1)
