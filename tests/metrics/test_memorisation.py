"""Copies are found, frames of other patients are not called copies."""

import numpy as np
import pytest

from raysyn.metrics.memorisation import memorisation, nearest_by_cosine, nearest_by_pixels, nearest_by_shifted_pixels
from raysyn.types import FrameArrays, UserError


def frames_of(images: np.ndarray, name: str) -> FrameArrays:
    n = len(images)
    return FrameArrays(
        images,
        np.ones_like(images),
        np.zeros(n, np.uint8),
        np.zeros(n, np.uint8),
        np.full((n, 2), np.nan, np.float32),
        [f"{name}{i}" for i in range(n)],
        [f"{name}{i}" for i in range(n)],
        [""] * n,
        ["real"] * n,
    )


def noise(n: int, seed: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8)


def features(frames: FrameArrays) -> np.ndarray:
    return frames.image_u8.reshape(len(frames), -1).astype(np.float64) - 127.5


def measure(images: np.ndarray) -> dict:
    sets = frames_of(images, "s"), frames_of(noise(60, 0), "t"), frames_of(noise(400, 1), "h")
    return memorisation(*sets, (features(sets[0]), features(sets[1]), features(sets[2])))


def test_copies_are_found_and_named() -> None:
    images = noise(40, 2)
    shifted = noise(60, 0)[:10].astype(int) // 2 + 40  # darker, flatter, still a copy
    images[:10] = shifted.astype(np.uint8)
    found = measure(images)
    assert found["copy_rate"] == pytest.approx(0.25, abs=0.03)
    assert [p["nearest"] for p in found["worst_pairs"][:10]] != []
    assert {(p["synthetic"], p["nearest"]) for p in found["worst_pairs"][:10]} == {
        (f"s{i}", f"t{i}") for i in range(10)
    }
    assert len(found["worst_pairs"]) == 16
    assert found["worst_pairs"][0]["pixel_correlation"] > 0.99
    assert found["nearest_pixel_correlation"] > found["nearest_pixel_correlation_baseline"]


def picture(n: int, seed: int, size: int = 64) -> np.ndarray:
    """Speckle of a few pixels' grain."""
    from scipy import ndimage

    fine = np.random.default_rng(seed).normal(size=(n, size, size))
    return (128 + 120 * ndimage.gaussian_filter(fine, (0, 1.2, 1.2))).clip(0, 255).astype(np.uint8)


def test_copies_that_were_moved_or_made_noisy_are_found_whatever_their_features() -> None:
    rng = np.random.default_rng(7)
    train, test = frames_of(picture(40, 0), "t"), frames_of(picture(100, 1), "h")
    images = picture(40, 2)
    for i in range(4):
        images[i] = np.roll(train.image_u8[i], (i - 4, i), (0, 1))
    images[4] = (train.image_u8[4] + rng.normal(0, 8, (64, 64))).clip(0, 255)
    made = frames_of(images, "s")
    blind = [rng.normal(size=(len(f), 4)) for f in (made, train, test)]
    found = memorisation(made, train, test, tuple(blind), num_pairs=5)
    assert found["equal_rate"] == 5 / 40
    assert found["copy_rate"] == pytest.approx(5 / 40, abs=0.03)
    assert {(p["synthetic"], p["nearest"]) for p in found["worst_pairs"]} == {(f"s{i}", f"t{i}") for i in range(5)}


def test_the_best_shift_is_numpys() -> None:
    a, b = noise(3, 0, 20)[:, :, :18], noise(3, 1, 20)[:, :, :18]
    b[0] = np.roll(a[0], (1, -1), (0, 1)) // 2 + 3
    every = [
        [np.corrcoef(x[1:-1, 1:-1].ravel(), y[1 + i : 19 + i, 1 + j : 17 + j].ravel())[0, 1] for x, y in zip(a, b)]
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
    ]
    found = nearest_by_shifted_pixels(frames_of(a, "a"), frames_of(b, "b"), np.arange(3))
    assert found.index[0] == 0
    assert (found.similarity >= np.max(every, axis=0) - 1e-9).all()
    assert found.similarity[0] == pytest.approx(np.max(every, axis=0)[0])


def test_new_frames_are_no_copies() -> None:
    found = measure(noise(300, 3))
    assert found["copy_rate"] <= 0.03
    assert 0 <= found["above_pixel_baseline"] <= 0.04


def test_correlation_is_numpys_and_thumbnails_keep_it() -> None:
    a, b = frames_of(noise(5, 4, 16), "a"), frames_of(noise(7, 5, 16), "b")
    table = np.corrcoef(a.image_u8.reshape(5, -1), b.image_u8.reshape(7, -1))[:5, 5:]
    found = nearest_by_pixels(a, b)
    assert np.array_equal(found.index, table.argmax(1))
    assert found.similarity == pytest.approx(table.max(1), abs=1e-6)
    big = frames_of(np.kron(noise(4, 6, 64), np.ones((3, 3), np.uint8)), "c")
    assert nearest_by_pixels(big, big).similarity == pytest.approx(np.ones(4), abs=1e-6)


def test_blocks_do_not_change_what_is_nearest() -> None:
    rng = np.random.default_rng(0)
    rows, others = rng.normal(size=(25, 6)), rng.normal(size=(40, 6))
    assert np.array_equal(nearest_by_cosine(rows, others, block=4).index, nearest_by_cosine(rows, others).index)


def test_a_flat_frame_is_near_to_nothing() -> None:
    flat = frames_of(np.full((1, 16, 16), 9, np.uint8), "f")
    assert nearest_by_pixels(flat, frames_of(noise(3, 0, 16), "b")).similarity == pytest.approx([0])


def test_too_few_frames_name_the_number_needed() -> None:
    few, many = frames_of(noise(3, 0), "f"), frames_of(noise(9, 1), "m")
    with pytest.raises(UserError, match=r"test frames: 3 are too few .* needs 8"):
        memorisation(many, many, few, (features(many), features(many), features(few)))
