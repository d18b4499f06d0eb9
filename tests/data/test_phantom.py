import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import label

from raysyn.data.phantom import phantom_frame, phantom_patient, scene
from raysyn.data.phantom_anatomy import Star
from raysyn.data.phantom_speckle import amplitude, compress, scan_convert, smooth_field, speckle
from raysyn.labels import LEFT_ATRIUM, LV_CAVITY, MYOCARDIUM, OUTSIDE, STRUCTURES, TISSUE, check_label_map
from raysyn.types import PHASES, VIEWS, Frame, UserError

SIZE = 64
PATIENTS = range(8)


@pytest.fixture(scope="module")
def frames() -> dict[tuple[int, str, str], Frame]:
    return {(p, f.view, f.phase): f for p in PATIENTS for f in phantom_patient(5, p, SIZE, "train")}


def area_mm2(frame: Frame, *structures: int) -> float:
    assert frame.spacing_mm is not None
    return float(np.isin(frame.label_map, structures).sum()) * frame.spacing_mm[0] * frame.spacing_mm[1]


def test_a_patient_is_four_frames_named_and_marked_as_phantom() -> None:
    four = phantom_patient(3, 12, SIZE, "validation")
    assert [(f.view, f.phase) for f in four] == [(v, p) for v in VIEWS for p in PHASES]
    assert [f.frame_id for f in four][-1] == "phantom-s3-p00012-4CH-ES"
    assert {(f.patient_id, f.source, f.split, f.provenance) for f in four} == {
        ("phantom-s3-p00012", "phantom", "validation", None)
    }


def test_the_same_arguments_give_the_same_frame_whatever_was_drawn_before(frames: dict) -> None:
    again = phantom_frame(5, 7, "4CH", "ES", SIZE)
    assert np.array_equal(again.image, frames[7, "4CH", "ES"].image)
    assert np.array_equal(again.label_map, frames[7, "4CH", "ES"].label_map)


def test_seeds_patients_views_and_phases_are_all_different_frames(frames: dict) -> None:
    images = [f.image for f in frames.values()] + [phantom_frame(6, 0, v, p, SIZE).image for v in VIEWS for p in PHASES]
    assert len({image.tobytes() for image in images}) == len(images)
    assert len({f.frame_id for f in frames.values()}) == len(frames)
    # Two patients share no speckle: away from the transducer their difference from the local mean is uncorrelated.
    a, b = (f.image[20:, :].astype(float) - f.image[20:, :].mean() for f in (images_of(0), images_of(1)))
    assert abs(np.corrcoef(np.diff(a, axis=1).ravel(), np.diff(b, axis=1).ravel())[0, 1]) < 0.4


def images_of(patient: int) -> Frame:
    return phantom_frame(5, patient, "2CH", "ED", SIZE)


def test_labels_are_whole_and_the_image_is_black_outside_the_sector(frames: dict) -> None:
    for frame in frames.values():
        check_label_map(frame.label_map)
        assert set(np.unique(frame.label_map)) == set(range(len(STRUCTURES)))
        assert frame.image.dtype == np.uint8
        assert not frame.image[frame.label_map == OUTSIDE].any()
        assert (frame.image[frame.label_map != OUTSIDE] > 0).mean() > 0.98
        assert 0.35 < (frame.label_map != OUTSIDE).mean() < 0.75


def test_each_structure_is_one_piece_of_believable_size(frames: dict) -> None:
    for frame in frames.values():
        for structure in (LV_CAVITY, MYOCARDIUM, LEFT_ATRIUM):
            sizes = np.bincount(label(frame.label_map == structure)[0].ravel())[1:]
            assert sizes.max() >= 0.98 * sizes.sum(), (frame.frame_id, structure)  # the sector may cut a corner off
        assert 900 < area_mm2(frame, LV_CAVITY) < 5500
        assert 600 < area_mm2(frame, LEFT_ATRIUM) < 3200


def test_the_ventricle_shrinks_and_the_atrium_grows_from_ed_to_es(frames: dict) -> None:
    shrunk = []
    for patient in PATIENTS:
        for view in VIEWS:
            ed, es = frames[patient, view, "ED"], frames[patient, view, "ES"]
            assert ed.spacing_mm == es.spacing_mm
            assert area_mm2(es, LV_CAVITY) < area_mm2(ed, LV_CAVITY)
            assert area_mm2(es, LEFT_ATRIUM) > area_mm2(ed, LEFT_ATRIUM)
            shrunk.append(area_mm2(es, LV_CAVITY) / area_mm2(ed, LV_CAVITY))
    assert 0.5 < np.mean(shrunk) < 0.8
    assert np.std(shrunk) > 0.03


def test_blood_is_dark_myocardium_brighter_than_its_surroundings(frames: dict) -> None:
    for frame in frames.values():
        grey = {s: float(frame.image[frame.label_map == s].mean()) for s in range(1, 5)}
        assert grey[LV_CAVITY] < 0.6 * grey[MYOCARDIUM]
        assert grey[LEFT_ATRIUM] < 0.8 * grey[TISSUE]
    means = {s: np.mean([f.image[f.label_map == s].mean() for f in frames.values()]) for s in range(1, 5)}
    assert means[LV_CAVITY] < means[TISSUE] < means[MYOCARDIUM]


def _field(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    assert frame.spacing_mm is not None
    rows, columns = (np.arange(len(frame.image)) + 0.5 for _ in range(2))
    return (columns[None] - 0.5 * len(frame.image)) * frame.spacing_mm[1], rows[:, None] * frame.spacing_mm[0]


def test_the_right_heart_is_dark_in_4ch_absent_in_2ch_and_never_a_label(frames: dict) -> None:
    for patient in PATIENTS:
        heart, scanner, _ = scene(5, patient, "4CH", "ED")
        frame = frames[patient, "4CH", "ED"]
        x, z = _field(frame)
        x, z = np.broadcast_arrays(x + scanner.shift[0] * scanner.far_mm, z - scanner.shift[1] * scanner.far_mm)
        assert heart.rv is not None
        assert heart.ra is not None
        for chamber in (heart.rv, heart.ra):
            past = chamber.beyond(x, z)
            clear = (past < -3) & (frame.label_map == TISSUE)
            assert clear.sum() > 25
            wall = (past > 1) & (past < 6) & (frame.label_map != OUTSIDE) & (frame.label_map != LEFT_ATRIUM)
            wall &= frame.label_map != LV_CAVITY
            assert frame.image[clear].mean() < 0.66 * frame.image[wall].mean(), (patient, chamber)
        assert scene(5, patient, "2CH", "ED")[0].rv is None


def test_the_view_shows_in_the_dark_left_of_the_septum(frames: dict) -> None:
    beside: dict[str, list[float]] = {view: [] for view in VIEWS}
    for (_, view, _), frame in frames.items():
        rows = np.flatnonzero((frame.label_map == LV_CAVITY).any(axis=1))
        wall = np.argmax(frame.label_map == MYOCARDIUM, axis=1)
        grey = np.concatenate([frame.image[r, max(wall[r] - 6, 0) : wall[r] - 1] for r in rows[len(rows) // 2 :]])
        beside[view].append(float(grey.mean() / frame.image[frame.label_map == MYOCARDIUM].mean()))
    assert np.mean(beside["4CH"]) < 0.75 * np.mean(beside["2CH"])


def test_most_of_the_heart_lies_in_the_sector() -> None:
    shares = []
    for patient in PATIENTS:
        for view in VIEWS:
            heart, scanner, _ = scene(5, patient, view, "ED")
            x, z = np.meshgrid(np.arange(-100.0, 101), np.arange(0.0, 200))
            sector = (np.hypot(x, z) < scanner.far_mm) & (np.abs(x) < np.tan(scanner.half_angle) * z)
            cavity, wall, _, _ = heart.wall(x, z)
            shares.append((sector & (cavity | wall)).sum() / (cavity | wall).sum())
    assert min(shares) > 0.95
    assert np.mean(shares) > 0.99


def test_a_small_frame_is_the_mean_of_the_large_one_and_labels_agree() -> None:
    small, large = (phantom_frame(1, 4, "4CH", "ED", size) for size in (64, 256))
    blocks = large.image.reshape(64, 4, 64, 4).astype(float).mean(axis=(1, 3))
    whole = (large.label_map != OUTSIDE).reshape(64, 4, 64, 4).all(axis=(1, 3)) & (small.label_map != OUTSIDE)
    assert np.abs(blocks - small.image)[whole].max() <= 1.0
    for structure in (LV_CAVITY, MYOCARDIUM, LEFT_ATRIUM):
        assert area_mm2(small, structure) == pytest.approx(area_mm2(large, structure), rel=0.05)


@pytest.mark.parametrize("size", [64, 96, 112, 128, 200, 256])
def test_any_size_has_the_same_anatomy_and_brightness(size: int) -> None:
    frame, reference = phantom_frame(2, 3, "2CH", "ES", size), phantom_frame(2, 3, "2CH", "ES", 256)
    assert frame.image.shape == frame.label_map.shape == (size, size)
    assert area_mm2(frame, LV_CAVITY) == pytest.approx(area_mm2(reference, LV_CAVITY), rel=0.05)
    inside, every = frame.image[frame.label_map > 0], reference.image[reference.label_map > 0]
    assert inside.mean() == pytest.approx(every.mean(), rel=0.02)


def test_spacing_is_the_depth_over_the_pixels() -> None:
    frame = phantom_frame(0, 0, "2CH", "ED", 128)
    _, scanner, _ = scene(0, 0, "2CH", "ED")
    assert frame.spacing_mm == pytest.approx((1.03 * scanner.far_mm / 128, 1.34 * scanner.far_mm / 128))
    rows = np.flatnonzero((frame.label_map != OUTSIDE).any(axis=1))
    assert (rows[-1] - rows[0]) * frame.spacing_mm[0] == pytest.approx(scanner.far_mm - scanner.near_mm, abs=5)


def test_sectors_differ_in_angle_and_depth() -> None:
    scanners = [scene(0, p, v, "ED")[1] for p in range(30) for v in VIEWS]
    assert np.ptp([np.rad2deg(s.half_angle) for s in scanners]) > 5
    assert np.ptp([s.far_mm for s in scanners]) > 25


def test_grey_levels_in_the_sector_are_gamma_like(frames: dict) -> None:
    def distance(values: np.ndarray) -> float:
        values = np.maximum(values / 255, 2e-3)
        shape, _, scale = stats.gamma.fit(values, floc=0)
        return float(stats.kstest(values, "gamma", args=(shape, 0, scale)).statistic)

    inside = [f.image[f.label_map != OUTSIDE] for f in frames.values()]
    together = np.concatenate(inside)
    assert distance(together) < 0.1
    assert max(distance(values) for values in inside) < 0.17
    assert 0.22 < together.mean() / 255 < 0.38
    assert stats.skew(together) > 0.2


def test_speckle_of_even_tissue_is_rayleigh_of_unit_power() -> None:
    envelope = np.abs(speckle(np.random.default_rng(0), np.ones((960, 432), np.float32)))
    assert envelope.mean() / envelope.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.02)  # 1.913
    assert (envelope**2).mean() == pytest.approx(1, rel=0.06)  # side lobes add a little
    thinned = envelope[::10, ::24].ravel()
    assert stats.kstest(thinned, "rayleigh", args=(0, np.sqrt(0.5))).pvalue > 0.01
    rows = (envelope**2).mean(axis=1).reshape(16, -1).mean(axis=1)
    assert np.ptp(rows) < 0.35


def test_the_point_spread_is_narrowest_in_the_focus_and_widens_with_depth() -> None:
    echo = np.mean(
        [correlation(np.random.default_rng(seed)) for seed in range(6)],
        axis=0,
    )
    near, focus, far = echo[:60].mean(), echo[380:420].mean(), echo[900:].mean()
    assert focus < far < near
    depth = np.array([0.4, 0.95])
    assert np.sqrt(far / focus) * depth[1] / depth[0] > 2  # width in mm goes with beams times depth


def correlation(rng: np.random.Generator) -> np.ndarray:
    """Squared lateral correlation length of the envelope [960], in beams squared."""
    echo = speckle(rng, np.ones((960, 432), np.float32))
    steps = (np.abs(np.diff(echo, axis=1)) ** 2).mean(axis=1)
    return 1 / np.maximum(steps, 1e-6)


def test_tissue_levels_are_decibels() -> None:
    assert amplitude(np.array([0.0, 20.0, -40.0])) == pytest.approx([1, 10, 0.01], rel=1e-5)
    grey = compress(np.array([1.0, 10.0, 1e3]), np.zeros(3), 0.5, 50.0)
    assert grey[0] < grey[1] < grey[2] == 1.0
    assert compress(np.zeros(1), np.zeros(1), 0.5, 50.0)[0] == 0.0


def test_smooth_fields_have_about_unit_variance() -> None:
    rng = np.random.default_rng(1)
    variances = [smooth_field(rng, (64, 48), (6, 5)).var() for _ in range(40)]
    assert 0.8 < np.mean(variances) < 1.2


def test_scan_conversion_reads_positions_linearly() -> None:
    polar = np.arange(12.0).reshape(3, 4)
    assert scan_convert(polar, np.array([[0.5, 2.0]]), np.array([[1.0, 2.5]])) == pytest.approx(np.array([[3.0, 10.5]]))


def test_a_star_is_its_outline() -> None:
    turn = np.linspace(-np.pi, np.pi, 400, endpoint=False)
    circle = np.stack([3 + 5 * np.cos(turn), -2 + 5 * np.sin(turn)], axis=1)
    star = Star.around(circle, np.array([4.0, -1.0]))
    x, z = np.array([3.0, 3 + 5.05, 3.0, 3.0]), np.array([-2.0, -2.0, -2 - 4.95, 10.0])
    assert (star.beyond(x, z) < 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"view": "3CH"}, "3CH"),
        ({"phase": "MID"}, "MID"),
        ({"image_size": 8}, "image_size"),
        ({"image_size": 4096}, "image_size"),
        ({"seed": -1}, "seed"),
        ({"patient": -1}, "patient"),
    ],
)
def test_bad_arguments_are_named(change: dict, named: str) -> None:
    good = {"seed": 0, "patient": 0, "view": "2CH", "phase": "ED", "image_size": 64}
    with pytest.raises(UserError, match=named):
        phantom_frame(**(good | change))
