"""Realism measures where the answer is known: Gaussians in closed form, equal sets, blurred and copied ones."""

import math
import tracemalloc
from functools import partial

import numpy as np
import pytest
from scipy import linalg, ndimage

from raysyn.metrics.extractors import open_extractor
from raysyn.metrics.realism import (
    frechet_distance,
    histogram_distance,
    kernel_distance,
    precision_recall,
    realism,
    speckle_snr,
    spectrum_distance,
    ssim_diversity,
)
from raysyn.types import FrameArrays, UserError
from tests.phantoms import phantom_arrays


def test_frechet_distance_is_its_formula_with_a_matrix_square_root() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (300, 6)) @ rng.normal(0, 1, (6, 6)), rng.normal(0.5, 2, (200, 6))
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a + s_b - 2 * linalg.sqrtm(s_a @ s_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_fewer_frames_than_features() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, (20, 100))
    shift = np.zeros(100)
    shift[0] = 3.0
    assert frechet_distance(a, a + shift) == pytest.approx(9.0, rel=1e-9)


def test_kernel_distance_is_unbiased_at_zero() -> None:
    rng = np.random.default_rng(0)
    values = [
        kernel_distance(rng.normal(size=(100, 8)), rng.normal(size=(100, 8)), num_subsets=3, seed=i)[0]
        for i in range(60)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(60)
    far, sd = kernel_distance(rng.normal(size=(100, 8)), rng.normal(1.0, 1, size=(100, 8)))
    assert far > 5 * sd > 1e-3
    assert kernel_distance(rng.normal(size=(60, 8)), rng.normal(size=(60, 8)))[1] > 1e-3  # small sets spread too


def test_precision_and_recall_tell_missing_modes_from_bad_images() -> None:
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(-5, 1, (100, 4)), rng.normal(5, 1, (100, 4))])
    one_mode = precision_recall(real, rng.normal(-5, 1, (200, 4)))
    assert one_mode["precision"] > 0.9
    assert 0.4 < one_mode["recall"] < 0.65
    assert one_mode["coverage"] < 0.6
    junk = precision_recall(real, rng.normal(0, 30, (200, 4)))
    assert junk["precision"] < 0.1


arrays = partial(phantom_arrays, 3)


@pytest.fixture(scope="module")
def sets() -> tuple[FrameArrays, FrameArrays, FrameArrays]:
    a, b = arrays(range(8)), arrays(range(8, 16))
    blurred = b.take(range(len(b)))
    blurred.image_u8 = np.stack([ndimage.gaussian_filter(i.astype(float), 1.0) for i in b.image_u8]).astype(np.uint8)
    return a, b, blurred


def test_blur_is_further_off_than_other_patients(sets) -> None:
    a, b, blurred = sets
    near, far = realism(b, a), realism(blurred, a)
    assert far["fd_lite0"] > 2 * near["fd_lite0"]
    assert far["kd_lite0"] > near["kd_lite0"]
    assert far["spectrum_distance"] > 2 * near["spectrum_distance"]
    assert far["speckle_snr_blood"] > near["speckle_snr_blood"]
    assert near["extractor"] == "lite0"
    assert len(near["extractor_sha256"]) == 64
    assert near["num_frames"] == near["num_reference_frames"] == 32


def test_extractor_free_measures_are_zero_on_the_same_set(sets) -> None:
    a = sets[0]
    assert histogram_distance(a, a) == 0
    assert spectrum_distance(a, a) == 0
    brighter = a.take(range(len(a)))
    brighter.image_u8 = np.where(a.label_map > 0, np.minimum(a.image_u8.astype(int) + 10, 255), 0).astype(np.uint8)
    assert 8 < histogram_distance(brighter, a) <= 10
    assert all(v > 0 for v in speckle_snr(a).values())


def test_a_spectrum_of_many_frames_takes_the_memory_of_a_few(sets) -> None:
    """A grid's row has 9,000 frames of 256 px: as float64 at once they would be 5 GB, several times over."""
    many = sets[0].take(np.tile(np.arange(32), 32))
    tracemalloc.start()
    distance = spectrum_distance(many, sets[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert distance < 1e-9
    assert peak < 8 * many.image_u8.size / 2, "half of all images in float64"


def test_a_collapsed_set_has_no_diversity(sets) -> None:
    a = sets[0]
    same = a.take([0] * 20 + [2] * 20)
    assert ssim_diversity(same) == pytest.approx(0, abs=1e-3)
    assert ssim_diversity(a) > 0.2


def test_frechet_distance_of_more_frames_than_features_is_the_same_by_its_factors() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (500, 3)), rng.normal(0, 2, (4, 3))
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    cross = linalg.sqrtm(s_a @ s_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a + s_b - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_between_gaussians_in_closed_form() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, (40_000, 4)), rng.normal(0.5, 3, (40_000, 4))
    assert frechet_distance(a, b) == pytest.approx(4 * 0.25 + 4 * (3 - 1) ** 2, rel=0.02)


def test_the_baseline_is_real_against_real_of_the_same_n(sets) -> None:
    a, b, blurred = sets
    found = realism(blurred.take(range(20)), a, real=b)
    assert found["baseline_num_frames"] == 20
    assert found["fd_lite0"] > 1.5 * found["fd_lite0_baseline"] > 0
    assert "fd_lite0_at_baseline" not in found
    cut = realism(blurred, a, real=b.take(range(16)))
    assert cut["baseline_num_frames"] == 16
    assert cut["fd_lite0_at_baseline"] > cut["fd_lite0_baseline"]
    assert found["spectrum_distance"] > found["spectrum_distance_baseline"]


def test_sets_of_two_sizes_are_refused(sets) -> None:
    a = sets[0]
    small = a.take(range(8))
    small.image_u8, small.label_map = small.image_u8[:, ::2, ::2], small.label_map[:, ::2, ::2]
    with pytest.raises(UserError, match="different image sizes"):
        realism(small, a)


def test_too_few_frames_name_the_number_needed(sets) -> None:
    a = sets[0]
    with pytest.raises(UserError, match=r"3 are too few .* needs 8"):
        realism(a.take([0, 1, 2]), a)


def test_each_estimator_names_the_number_it_needs(sets) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 3))
    for measure, least in ((frechet_distance, 2), (kernel_distance, 4), (precision_recall, 6)):
        measure(rows, rows[:least])
        with pytest.raises(UserError, match=rf"{least - 1} are too few .* need(s)? {least}"):
            measure(rows, rows[: least - 1])
    nowhere = sets[0].take(range(8))
    nowhere.label_map = np.zeros_like(nowhere.label_map)
    with pytest.raises(UserError, match="label maps: all are 0"):
        histogram_distance(nowhere, sets[0])


def test_extractors_without_weights_are_refused(tmp_path) -> None:
    (tmp_path / "any.pt").write_bytes(b"")
    with pytest.raises(UserError, match="'no_such_net' is no model of timm's"):
        open_extractor(f"no_such_net={tmp_path / 'any.pt'}")
    for spec in ("resnet18", "inception=/no/such/file", "resnet18=/no/such/file"):
        with pytest.raises(UserError, match="names no weights file"):
            open_extractor(spec)


def test_a_timm_backbone_with_given_weights(tmp_path) -> None:
    import timm
    import torch

    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "w.pt")
    extractor = open_extractor(f"test_resnet={tmp_path / 'w.pt'}")
    assert extractor.name == "test_resnet"
    assert extractor.features(np.zeros((3, 64, 64), np.uint8)).shape[0] == 3


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """A file in the published weights' format; the values are random, as the true ones cannot be had offline."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    torch.save({}, tmp_path / "nothing.pth")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        net = FeatureExtractorInceptionV3(
            "made", ["2048"], feature_extractor_weights_path=str(tmp_path / "nothing.pth")
        )
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_inception_by_its_weights_file_is_torch_fidelitys(inception_weights, sets) -> None:
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = open_extractor(f"inception={inception_weights}")
    assert extractor.name == "inception"
    images = sets[0].image_u8[:2]
    net = FeatureExtractorInceptionV3("own", ["2048"], feature_extractor_weights_path=str(inception_weights))
    own = net(torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1))[0]
    features = extractor.features(images)
    assert features.shape == (2, 2048)
    assert np.allclose(features, own.numpy(), rtol=1e-3, atol=1e-4)
    assert np.abs(features[0] - features[1]).max() > 0


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_weights_file_that_is_none_is_refused_and_not_run(tmp_path) -> None:
    import torch

    torch.save({"a": Intruder(tmp_path / "ran")}, tmp_path / "bad.pth")
    (tmp_path / "noise.pth").write_bytes(b"no weights" * 50)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, why in (("bad", "not a file of weights"), ("noise", "not a file of weights"), ("other", "does not hold")):
        with pytest.raises(UserError, match=why):
            open_extractor(f"inception={tmp_path / name}.pth")
    assert not (tmp_path / "ran").exists()
