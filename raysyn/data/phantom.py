"""The phantom: a procedural apical echocardiogram with exact labels, the project's embedded default data.

Deterministic by (seed, patient, view, phase) and the same at every size: tissue is imaged once on a fixed polar grid and
scan-converted (small pictures are means of finer pixels), while labels are read off the anatomy at each pixel's centre.
It is a drawing with the statistics of an echocardiogram, named `phantom` wherever it appears.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysyn.data.phantom_anatomy import Heart, build_heart
from raysyn.data.phantom_patient import draw_patient, draw_pose
from raysyn.data.phantom_speckle import amplitude, complex_noise, compress, scan_convert, smooth_field, speckle
from raysyn.data.phantom_tissue import Look, PolarGrid, clutter_levels, draw_look, shadow_db, tissue_levels
from raysyn.labels import LEFT_ATRIUM, LV_CAVITY, MYOCARDIUM, OUTSIDE, TISSUE, view_index
from raysyn.types import PHASES, VIEWS, Frame, UserError

PHANTOM_VERSION = 1  # raise it when the pictures change: it enters the fingerprint of prepared frames
NUM_SAMPLES, NUM_BEAMS = 320, 144
NUM_LOOKS = 2  # pictures compounded after compression, as scanners do
MIN_SIZE, MAX_SIZE = 16, 1024
FIELD_WIDTH, FIELD_HEIGHT = 1.34, 1.03  # of the depth


@dataclass(frozen=True)
class Scanner:
    """Set-up of a view: the sector's half angle, its near and far radius in mm, and how levels become grey."""

    half_angle: float
    near_mm: float
    far_mm: float
    shift: tuple[float, float]  # of the sector in the picture, in parts of its depth
    grey_at_0db: float
    range_db: float
    noise_db: float
    slope_db: float  # depth gain left over after attenuation, over the whole depth
    sliders_db: np.ndarray  # [5] time gain compensation


def draw_scanner(rng: np.random.Generator, deepest_mm: float) -> Scanner:
    """Draw a set-up that shows everything down to `deepest_mm`."""
    return Scanner(
        half_angle=np.deg2rad(rng.uniform(36.5, 43.5)),
        near_mm=rng.uniform(3, 7),
        far_mm=deepest_mm + rng.uniform(7, 26),
        shift=(rng.uniform(-0.01, 0.01), rng.uniform(0.005, 0.02)),
        grey_at_0db=rng.uniform(0.6, 0.7),
        range_db=rng.uniform(52, 62),
        noise_db=rng.uniform(-40, -33),
        slope_db=rng.uniform(-3, 2),
        sliders_db=rng.uniform(-1.5, 1.5, 5),
    )


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _check(seed: int, patient: int, view: str, phase: str, image_size: int) -> None:
    view_index(view)
    if phase not in PHASES:
        raise UserError(f"phase {phase!r} is not one of {', '.join(PHASES)}")
    if not MIN_SIZE <= image_size <= MAX_SIZE:
        raise UserError(f"image_size: the phantom is made from {MIN_SIZE} to {MAX_SIZE} px, not {image_size}")
    if seed < 0 or patient < 0:
        raise UserError(f"the phantom's seed and patient count from 0, not {seed} and {patient}")


def scene(seed: int, patient: int, view: str, phase: str) -> tuple[Heart, Scanner, Look]:
    """Anatomy, set-up and look; all but the phase's changes of the heart are shared by a view's ED and ES."""
    person = draw_patient(_generator(seed, patient))
    rng = _generator(seed, patient, 1 + view_index(view))
    pose = draw_pose(rng, view)
    heart = build_heart(person, pose, view, phase)
    return heart, draw_scanner(rng, heart.roof_mm), draw_look(rng)


def polar_picture(heart: Heart, scanner: Scanner, look: Look, key: tuple[int, ...]) -> np.ndarray:
    """Grey levels in [0, 1] on the polar grid [NUM_SAMPLES, NUM_BEAMS]."""
    grid = PolarGrid.spanning(scanner.near_mm, scanner.far_mm, scanner.half_angle, NUM_SAMPLES, NUM_BEAMS)
    still, moving = _generator(*key[:3], 10), _generator(*key, 11)  # a view's unevenness; a frame's scatterers
    tissue = tissue_levels(heart, grid, look, still)
    clutter = clutter_levels(grid, look, still)
    strength = np.hypot(amplitude(tissue - shadow_db(grid, look)), amplitude(clutter))
    depth = np.linspace(0, 1, NUM_SAMPLES, dtype=np.float32)[:, None]
    sliders = np.interp(depth[:, 0], np.linspace(0, 1, len(scanner.sliders_db)), scanner.sliders_db)[:, None]
    gain = scanner.slope_db * (depth - 0.4) + sliders + 0.7 * smooth_field(still, tissue.shape, (2, 4))
    noise = amplitude(scanner.noise_db + 7 * depth**2)
    looks = []
    for _ in range(NUM_LOOKS):
        echo = speckle(moving, strength) + complex_noise(moving, tissue.shape) * noise
        looks.append(compress(np.abs(echo), gain, scanner.grey_at_0db, scanner.range_db))
    return np.mean(looks, axis=0)


def _pixel_centres(scanner: Scanner, num: int) -> tuple[np.ndarray, np.ndarray]:
    """x [1, num] and z [num, 1] in mm of the centres of `num` x `num` pixels over the whole field."""
    place = (np.arange(num, dtype=np.float32) + 0.5) / num
    x = (place - 0.5) * (FIELD_WIDTH * scanner.far_mm) + scanner.shift[0] * scanner.far_mm
    z = place * (FIELD_HEIGHT * scanner.far_mm) - scanner.shift[1] * scanner.far_mm
    return x[None], z[:, None]


def _label_map(heart: Heart, scanner: Scanner, size: int) -> np.ndarray:
    """Structures uint8 [size, size] at the pixels' centres."""
    x, z = np.broadcast_arrays(*_pixel_centres(scanner, size))
    depth = np.hypot(x, z)
    sector = (depth >= scanner.near_mm) & (depth <= scanner.far_mm)
    sector &= np.abs(x) <= np.tan(scanner.half_angle) * z
    labels = np.where(sector, TISSUE, OUTSIDE).astype(np.uint8)
    x, z = x[sector], z[sector]
    inside = np.full(len(x), TISSUE, dtype=np.uint8)
    inside[heart.la.beyond(x, z) < 0] = LEFT_ATRIUM
    cavity, wall, _, _ = heart.wall(x, z)
    inside[wall] = MYOCARDIUM
    inside[cavity] = LV_CAVITY
    labels[sector] = inside
    return labels


def _picture(polar: np.ndarray, scanner: Scanner, size: int) -> np.ndarray:
    """Scan conversion to grey [size, size] in [0, 1]: at small sizes the mean of finer pixels."""
    finer = max(1, round(256 / size))
    x, z = _pixel_centres(scanner, size * finer)
    depth, angle = np.hypot(x, z), np.arctan2(x, z)
    sample = (depth - scanner.near_mm) * ((NUM_SAMPLES - 1) / (scanner.far_mm - scanner.near_mm))
    beam = (angle + scanner.half_angle) * ((NUM_BEAMS - 1) / (2 * scanner.half_angle))
    fine = scan_convert(polar, sample, beam)
    return fine.reshape(size, finer, size, finer).mean(axis=(1, 3))


def phantom_frame(seed: int, patient: int, view: str, phase: str, image_size: int, split: str = "") -> Frame:
    """One frame, uint8 [image_size, image_size]; the same arguments give the same frame.

    Labels are those of `raysyn.labels.STRUCTURES`; in 4CH the right heart is in the image and not in the labels, as in
    CAMUS. The image is 0 outside the sector; pixels are 1.3 times as wide as they are high (`spacing_mm`).
    Raises UserError for an unknown view or phase, an image size outside 16 to 1024, and a negative seed or patient.
    """
    _check(seed, patient, view, phase, image_size)
    heart, scanner, look = scene(seed, patient, view, phase)
    key = (seed, patient, 1 + view_index(view), PHASES.index(phase))
    labels = _label_map(heart, scanner, image_size)
    grey = _picture(polar_picture(heart, scanner, look, key), scanner, image_size)
    image = np.where(labels != OUTSIDE, np.rint(255 * grey), 0).astype(np.uint8)
    patient_id = f"phantom-s{seed}-p{patient:05d}"
    spacing = (FIELD_HEIGHT * scanner.far_mm / image_size, FIELD_WIDTH * scanner.far_mm / image_size)
    return Frame(
        frame_id=f"{patient_id}-{view}-{phase}",
        image=image,
        label_map=labels,
        view=view,
        phase=phase,
        patient_id=patient_id,
        split=split,
        source="phantom",
        spacing_mm=spacing,
    )


def phantom_patient(seed: int, patient: int, image_size: int, split: str = "") -> list[Frame]:
    """The four frames of a patient: 2CH and 4CH, each at ED and ES. Arguments and errors as in `phantom_frame`."""
    return [phantom_frame(seed, patient, view, phase, image_size, split) for view in VIEWS for phase in PHASES]
