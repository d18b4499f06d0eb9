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
    right_haze_db: float  # blood of the right heart over that of the left
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
        blood_db=rng.uniform(-33, -28) + 5 * poor,
        right_haze_db=max(0.0, rng.uniform(-6, 6)),
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


@dataclass(frozen=True)
class Texture:
    """Smooth random fields [S, B] of about unit variance."""

    uneven: np.ndarray  # over centimetres
    layers: np.ndarray  # fascia and fibres: thin in depth, long across
    rough: np.ndarray  # over millimetres
    contact: np.ndarray  # of the transducer, over the sector

    @staticmethod
    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Texture:
        """Draw all four."""
        uneven, layers, rough, contact = (smooth_field(rng, shape, m) for m in ((12, 9), (44, 6), (56, 30), (3, 7)))
        return Texture(uneven, layers, rough, contact)


def tissue_levels(heart: Heart, grid: PolarGrid, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Scatterer strength [S, B] in dB over average myocardium. `rng` draws the smooth unevenness."""
    texture = Texture.draw(rng, grid.x.shape)
    cavity, wall, past_endo, past_epi = heart.wall(grid.x, grid.z)
    la_past = heart.la.beyond(grid.x, grid.z)
    right = [star.beyond(grid.x, grid.z) for star in (heart.rv, heart.ra) if star is not None]
    outside = np.minimum(past_epi, la_past - LEFT_ATRIUM_WALL_MM)
    for past in right:
        outside = np.minimum(outside, past - RIGHT_WALL_MM)
    lv_across, la_across = _across(heart.lv_endo, grid), _across(heart.la, grid)

    level = _surroundings(heart, grid, look, texture, outside, lv_across, la_across)
    across = np.where(
        la_past < past_epi, la_across - 0.5, lv_across
    )  # of the atria's thin walls only the roof shows well
    walls = look.patch_db * texture.uneven + 1.2 * texture.layers + 1.5 * texture.rough
    walls -= look.along_beam_db * (0.75 - across) + look.dropout_db * np.maximum(texture.contact - 0.2, 0)
    level = np.where(outside < 0, walls, level)
    level[wall] = walls[wall] + 0.8

    blood = look.blood_db + 0.5 * look.patch_db * texture.uneven + 5.0 * np.exp(-grid.depth / 40)
    for past in right:
        level = np.where((past < 0) & (past_epi > 0) & (la_past > SEPTUM_ATRIA_MM), blood + look.right_haze_db, level)
    level = np.where((la_past < 0) & ~wall & ~cavity, blood, level)
    trabeculae = (past_endo > -3.2) & (texture.rough > 0.35)
    level = np.where(cavity, np.where(trabeculae, walls - 8.0, blood + 1.0), level)
    for blob in heart.blobs:
        _ellipse(level, cavity, grid, blob, -5.0 + 2 * texture.rough)
    points = [Strand(np.array([[x, z], [x + 0.1, z]]), 2.0, 4.0) for x, z in heart.bright_points]
    shine = 3.0 * (texture.rough + texture.contact)
    for strand in heart.strands + points:
        _draw_strand(level, grid, strand, shine)
    return level


def _surroundings(
    heart: Heart,
    grid: PolarGrid,
    look: Look,
    texture: Texture,
    outside: np.ndarray,
    lv_across: np.ndarray,
    la_across: np.ndarray,
) -> np.ndarray:
    """Levels [S, B] around the heart, whose walls end where `outside` (mm) is 0.

    A pericardium, bright where it faces the beam; beside the heart the lung, which fades; behind it bright far tissue.
    """
    facing = np.maximum(la_across * (grid.z > 0.6 * heart.roof_mm), 0.85 * lv_across)
    contrast = look.pericardium_db - look.surround_db
    bright = contrast * (0.15 + 0.85 * facing**2) + 3.0 * texture.contact + 2.0 * texture.layers
    bright = np.minimum(bright, contrast + 2.0)
    ring = np.exp(-(((outside - 2.2) / 1.7) ** 2))
    deep = np.clip(grid.z / heart.roof_mm - 0.55, 0, 0.4) / 0.4
    behind = deep * (0.75 * np.exp(-np.maximum(outside - 2.2, 0) / 10.0) + 0.1)
    level = look.surround_db + 1.2 * look.patch_db * texture.uneven + np.maximum(ring, behind) * bright
    return level + 4.0 * np.maximum(texture.layers - 0.5, 0) - 6.5 * (1 - deep) * np.clip(outside / 10, 0, 1)


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


def _draw_strand(level: np.ndarray, grid: PolarGrid, strand: Strand, uneven: np.ndarray) -> None:
    """Raise `level` to the strand's plus `uneven` within its half-thickness, falling off softly over one more."""
    for (x0, z0), (x1, z1) in zip(strand.points, strand.points[1:]):
        reach = 2.5 * strand.half_mm
        depths = np.hypot(x0, z0), np.hypot(x1, z1)
        rows = _rows(grid, 0.5 * sum(depths), 0.5 * abs(depths[1] - depths[0]) + reach)
        dx, dz = grid.x[rows] - x0, grid.z[rows] - z0
        length = max(float(np.hypot(x1 - x0, z1 - z0)), 1e-3)
        cx, cz = (x1 - x0) / length, (z1 - z0) / length
        along = np.clip(dx * cx + dz * cz, 0, length)
        distance = np.hypot(dx - along * cx, dz - along * cz)
        value = strand.level_db + uneven[rows] - 9 * np.maximum(distance / strand.half_mm - 1, 0)
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
    for centre, width, loss in look.shadows.tolist():
        lost = lost + max(loss, 0.0) * np.exp(-(((place - centre) / width) ** 2))
    return lost * np.clip((grid.depth - 14) / 25, 0, 1)
