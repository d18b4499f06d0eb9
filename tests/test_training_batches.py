"""Positions decide everything: which frame, which warp, which noise; and image and label map are warped alike."""

import time

import numpy as np
import pytest
import torch

from raysyn.config import AugmentConfig
from raysyn.training_batches import (
    NOISE,
    WARP,
    Batch,
    FrameSource,
    Prefetcher,
    epoch_order,
    frames_at,
    micro_slices,
    normal_noise,
    num_micro_batches,
    rank_slice,
    uniform,
    warp_matrices,
    warp_pair,
)
from raysyn.types import UserError

STILL = AugmentConfig(flip=False, rotation_deg=0, translation=0, scale_min=1, scale_max=1)


def make_source(num: int = 10, size: int = 16, **options) -> FrameSource:
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 5, (num, size, size), dtype=np.uint8)
    labels[:, :2] = 0
    images = rng.integers(1, 256, (num, size, size), dtype=np.uint8)
    return FrameSource(images, labels, rng.integers(0, 2, num).astype(np.uint8), seed=3, **options)


def test_each_epoch_visits_each_frame_once_in_another_order() -> None:
    frame, epoch = frames_at(np.arange(30), 10, seed=5)
    assert epoch.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    for e in range(3):
        assert sorted(frame[10 * e : 10 * e + 10]) == list(range(10))
    assert frame[:10].tolist() != frame[10:20].tolist()
    assert epoch_order(10, 5, 0).tolist() != epoch_order(10, 6, 0).tolist()


@pytest.mark.parametrize(
    ("batch", "world", "micro"), [(48, 1, 8), (48, 5, 8), (7, 3, 2), (3, 2, 1), (4, 4, 8), (5, 2, 1)]
)
def test_ranks_and_micro_batches_share_a_batch_without_gap_or_overlap(batch: int, world: int, micro: int) -> None:
    parts = num_micro_batches(batch, world, micro)
    seen: list[int] = []
    for rank in range(world):
        slices = micro_slices(*rank_slice(batch, rank, world), micro, parts)
        assert len(slices) == parts
        assert slices[-1][1] > slices[-1][0], "gradients are exchanged at the last micro-batch: it may not be empty"
        assert all(b - a <= micro for a, b in slices)
        seen += [p for a, b in slices for p in range(a, b)]
    assert seen == list(range(batch))


def test_more_workers_than_images_is_refused() -> None:
    with pytest.raises(UserError, match="global_batch: 2 is smaller than the number of workers 3"):
        rank_slice(2, 0, 3)


def test_random_numbers_belong_to_the_position_not_to_the_batch() -> None:
    positions = np.arange(100, 108)
    together = normal_noise(1, NOISE, positions, (1, 4, 4))
    apart = torch.cat([normal_noise(1, NOISE, positions[i : i + 1], (1, 4, 4)) for i in range(8)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, normal_noise(2, NOISE, positions, (1, 4, 4)))
    source = make_source(augment=AugmentConfig())
    image, index, _ = source.pairs(positions, seed=3)
    image_5, index_5, _ = source.pairs(positions[5:6], seed=3)
    assert torch.allclose(image[5:6], image_5, atol=1e-6)
    assert torch.equal(index[5:6], index_5)


def test_streams_are_standard_normal_and_uniform() -> None:
    noise = normal_noise(0, NOISE, np.arange(400), (1, 16, 16))
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.var()) - 1) < 0.02
    values = uniform(0, WARP, np.arange(4000))
    assert abs(values.mean() - 0.5) < 0.02
    assert abs(values.var() - 1 / 12) < 0.005


def test_without_augmentation_frames_come_as_they_are() -> None:
    source = make_source()
    image, index, _ = source.pairs(np.arange(10), seed=0)
    frame, _ = frames_at(np.arange(10), 10, seed=3)
    labels = source.label_map[frame]
    expected = source.image_u8[frame].astype(np.float32) / 255 * (labels != 0)
    assert np.allclose(image[:, 0].numpy(), expected)
    assert np.array_equal(index.numpy(), labels + 5 * source.view[frame][:, None, None])


def test_a_warp_that_does_nothing_changes_nothing() -> None:
    source = make_source()
    image_u8, labels = torch.from_numpy(source.image_u8), torch.from_numpy(source.label_map)
    image, warped = warp_pair(image_u8, labels, warp_matrices(STILL, 0, WARP, range(10)))
    assert torch.equal(warped, labels)
    assert torch.allclose(image[:, 0], image_u8.float() / 255 * (labels != 0), atol=1e-5)


def test_flip_translation_and_quarter_turn_are_exact() -> None:
    source = make_source(num=1)
    image_u8, labels = torch.from_numpy(source.image_u8), torch.from_numpy(source.label_map)
    mirror = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    image, warped = warp_pair(image_u8, labels, mirror)
    assert torch.equal(warped, labels.flip(2))
    assert torch.allclose(image[:, 0], (image_u8.float() / 255 * (labels != 0)).flip(2), atol=1e-5)
    quarter = torch.tensor([[[0.0, 1, 0], [-1, 0, 0]]])
    assert torch.equal(warp_pair(image_u8, labels, quarter)[1], torch.rot90(labels, -1, (1, 2)))
    right_by_half = torch.tensor([[[1.0, 0, -1], [0, 1, 0]]])
    moved = warp_pair(image_u8, labels, right_by_half)[1]
    assert torch.equal(moved[:, :, 8:], labels[:, :, :8])
    assert not moved[:, :, :8].any(), "outside the picture is outside the sector"


def test_warps_stay_in_their_ranges_and_differ_by_sample() -> None:
    augment = AugmentConfig(flip=True, rotation_deg=10, translation=0.1, scale_min=0.8, scale_max=1.2)
    matrices = warp_matrices(augment, 0, WARP, range(2000))
    scale = 1 / torch.linalg.det(matrices[:, :, :2]).abs().sqrt()
    assert 0.8 <= float(scale.min()) < 0.82
    assert 1.18 < float(scale.max()) <= 1.2 + 1e-5
    mirrored = torch.linalg.det(matrices[:, :, :2]) < 0
    assert 0.45 < float(mirrored.float().mean()) < 0.55
    angle = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 1, 1]))
    assert float(angle.abs().max()) <= 10 + 1e-4
    assert float(angle.std()) == pytest.approx(10 / 3**0.5, rel=0.1)
    assert len(torch.unique(matrices.reshape(2000, 6), dim=0)) == 2000


def test_image_and_label_map_are_warped_alike() -> None:
    size = 64
    yy, xx = np.mgrid[:size, :size]
    labels = np.where((yy - 36) ** 2 + (xx - 24) ** 2 < 120, 1, 2).astype(np.uint8)
    image = np.where(labels == 1, 200, 50).astype(np.uint8)
    source = FrameSource(image[None], labels[None], np.zeros(1, np.uint8), 0, AugmentConfig())
    warped, index, _ = source.pairs(np.arange(40), seed=0)
    inside = index != 0
    agree = ((warped[:, 0] > 125 / 255) == (index == 1))[inside].float().mean()
    assert float(agree) > 0.995


def test_copies_are_fixed_and_the_first_is_the_frame_itself() -> None:
    source = make_source(augment=AugmentConfig(), copies=3)
    positions = np.arange(60)
    frame, epoch = frames_at(positions, 10, 3)
    copy = source.copy_of(frame, epoch)
    assert {int(f): sorted(set(copy[frame == f])) for f in range(10)} == {f: [0, 1, 2] for f in range(10)}
    image, index, _ = source.pairs(positions, seed=99)
    for c in range(3):
        again, index_again = source.copied(frame, np.full(60, c))
        chosen = torch.from_numpy(copy == c)
        assert torch.equal(image[chosen], again[chosen])
        assert torch.equal(index[chosen], index_again[chosen])
    plain, _ = source.copied(np.arange(10), np.zeros(10, dtype=np.int64))
    assert torch.allclose(plain, make_source().copied(np.arange(10), np.zeros(10, dtype=np.int64))[0], atol=1e-5)


def test_frames_go_to_the_device_as_grey_levels_and_are_warped_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is a mock: torch's meta tensors, which know their shapes and types alone."""
    meta, copied = torch.device("meta"), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copied.append(tensor.dtype) or tensor)
    image, index, _ = make_source(augment=AugmentConfig(), device=meta).pairs(np.arange(4), seed=0)
    assert copied == [torch.uint8] * 3 + [torch.float32]  # the last: six numbers an image, its warp
    assert (image.device, image.dtype, tuple(image.shape)) == (meta, torch.float32, (4, 1, 16, 16))
    assert (index.device, index.dtype) == (meta, torch.uint8)
    batch = Batch(positions=torch.arange(4), index=index, image_01=image).to(meta)
    assert len(copied) == 5, "what is there already stays"
    assert batch.positions.device == meta
    assert batch.image_01 is image


def test_prefetcher_keeps_order_and_ends() -> None:
    with Prefetcher(lambda n: n * n, iter(range(20))) as squares:
        assert list(squares) == [n * n for n in range(20)]


def test_prefetcher_raises_what_the_thread_met_and_stops_early() -> None:
    def make(n: int) -> int:
        if n == 3:
            raise ValueError("bad frame")
        return n

    with Prefetcher(make, iter(range(10))) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="bad frame"):
            next(items)
    with Prefetcher(lambda n: n, iter(range(10**9))) as endless:
        next(endless)
    assert not endless._thread.is_alive()


def test_prefetcher_tells_how_long_it_was_waited_for() -> None:
    def slow(n: int) -> int:
        time.sleep(0.05)
        return n

    with Prefetcher(slow, iter(range(4))) as items:
        list(items)
        assert 0.15 < items.stalled_seconds < 1.0
