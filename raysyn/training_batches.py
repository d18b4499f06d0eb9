"""Which images a step sees and everything random about them, as pure functions of (seed, position).

Position p is the p-th image of the fit: epoch p // N, and within it the p % N-th of that epoch's permutation. Step s
sees positions [s·B, (s+1)·B). Augmentation, noise, σ, dropped labels and posterior draws have generators of their own
for each position, so a result does not depend on how many workers share a batch, in which micro-batches it is computed
or how often the fit was resumed.
"""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raysyn.config import AugmentConfig
from raysyn.labels import STRUCTURES
from raysyn.types import FrameArrays, UserError

CPU = torch.device("cpu")
ORDER, WARP, NOISE, SIGMA, DROP, POSTERIOR, COPY = range(7)  # streams of random numbers, one a purpose

T = TypeVar("T")


def generator_of(seed: int, stream: int, position: int) -> np.random.Generator:
    """The generator of one position and purpose: Philox (counter-based) keyed by (seed, stream, position)."""
    key = np.array([(seed & 0xFFFFFFFFFFFF) << 8 | stream, position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def torch_seed(seed: int, stream: int, position: int) -> int:
    """A seed for a `torch.Generator` of one position and purpose (splitmix64 of the three), in [0, 2^63)."""
    value = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + position * 0x8CB92BA72F3D8DD7) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (value ^ (value >> 31)) >> 1


@functools.lru_cache(maxsize=4)
def epoch_order(num_frames: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0 … num_frames-1 in which epoch `epoch` visits the frames, int64."""
    return generator_of(seed, ORDER, epoch).permutation(num_frames)


def frames_at(positions: np.ndarray, num_frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(frame number, epoch) of each position, both int64 like `positions`."""
    epoch, offset = np.divmod(np.asarray(positions, dtype=np.int64), num_frames)
    frame = np.array([epoch_order(num_frames, seed, int(e))[o] for e, o in zip(epoch, offset)], dtype=np.int64)
    return frame, epoch


def rank_slice(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of rank `rank`'s contiguous share of `count` items; shares differ by one at most.

    Raises UserError when there are fewer items than workers.
    """
    if count < world_size:
        raise UserError(f"fit.global_batch: {count} is smaller than the number of workers {world_size}")
    base, extra = divmod(count, world_size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)


def micro_slices(start: int, stop: int, micro_batch: int, num_parts: int) -> list[tuple[int, int]]:
    """[start, stop) cut into `num_parts` runs of at most `micro_batch`; every rank gets the same number of parts.

    Parts but the last may be empty (a rank with one item less than there are parts)."""
    edges = np.linspace(start, stop, num_parts + 1).round().astype(int)
    assert max(np.diff(edges)) <= micro_batch
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def num_micro_batches(global_batch: int, world_size: int, micro_batch: int) -> int:
    """How many micro-batches a step takes on each rank."""
    largest_share = -(-global_batch // world_size)
    return -(largest_share // -micro_batch)


# --- geometric augmentation, image and label map alike (REFERENCE §2) ----------------------------------------------


def is_identity(augment: AugmentConfig) -> bool:
    """Whether augmentation changes nothing."""
    still = augment.rotation_deg == 0 and augment.translation == 0
    return still and not augment.flip and augment.scale_min == 1 and augment.scale_max == 1


def warp_matrices(augment: AugmentConfig, seed: int, stream: int, keys: Sequence[int] | np.ndarray) -> Tensor:
    """Affine maps float32 [B, 2, 3] from output to input coordinates in [-1, 1], as `affine_grid` takes them.

    For each key: left-right flip with probability ½, rotation ±rotation_deg, translation ± the given share of the
    image, scale in [scale_min, scale_max]. An apical view is never turned upside down.
    """
    matrices = np.empty((len(keys), 2, 3), dtype=np.float32)
    for i, key in enumerate(keys):
        u = generator_of(seed, stream, int(key)).uniform(size=5)
        angle = np.deg2rad(augment.rotation_deg) * (2 * u[0] - 1)
        scale = augment.scale_min + (augment.scale_max - augment.scale_min) * u[1]
        mirror = -1.0 if augment.flip and u[4] < 0.5 else 1.0
        shift = 2 * augment.translation * (2 * u[2:4] - 1)  # a share of the image is twice that in [-1, 1]
        linear = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
        linear = np.diag([mirror, 1.0]) @ linear
        matrices[i, :, :2], matrices[i, :, 2] = linear, -linear @ shift
    return torch.from_numpy(matrices)


def warp_pair(image_u8: Tensor, label_map: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Warp images (bilinear) and label maps (nearest) [B, H, W] uint8 by `matrices` [B, 2, 3].

    Returns image_01 float32 [B, 1, H, W], 0 outside the warped sector, and the label maps uint8 [B, H, W].
    """
    size = [len(image_u8), 1, *image_u8.shape[1:]]
    grid = F.affine_grid(matrices, size, align_corners=False)
    image = F.grid_sample(image_u8[:, None].float() / 255, grid, mode="bilinear", align_corners=False)
    labels = F.grid_sample(label_map[:, None].float(), grid, mode="nearest", align_corners=False)
    return image * (labels != 0), labels[:, 0].to(torch.uint8)


# --- what a step is computed from ---------------------------------------------------------------------------------


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`; from pinned memory, so that the copy overlaps with computing."""
    return value if value.device.type == device.type else value.pin_memory().to(device, non_blocking=True)


@dataclass
class Batch:
    """One micro-batch, on the CPU or on a device. Entries that an objective does not use are None.

    positions int64 [B]; index uint8 [B, H, W], the conditioning as `semantic_index`, 0 … 9; image_01 float32
    [B, 1, H, W]; epoch float32 [B]; latent float32 [B, C, h, w], standardised; uniform float64 [B] in [0, 1), the
    quantile of the noise level; noise float32 like what is diffused; dropped bool [B], where the label is left out;
    seeds, of each sample's posterior draw.
    """

    positions: Tensor
    index: Tensor
    image_01: Tensor | None = None
    epoch: Tensor | None = None
    latent: Tensor | None = None
    uniform: Tensor | None = None
    noise: Tensor | None = None
    dropped: Tensor | None = None
    seeds: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: _moved(v, device) for k, v in values.items() if isinstance(v, Tensor)})


@dataclass
class FrameSource:
    """Frames in memory and the warp of each position. `image_u8`, `label_map` uint8 [N, H, W]; `view` uint8 [N].

    With `copies` K > 0 there are K fixed warps of each frame instead (copy 0 is the frame itself), and epoch e visits
    copy (e + frame) mod K: what latents encoded beforehand are made from. Frames go to `device` as 8-bit grey levels
    and are warped there.
    """

    image_u8: np.ndarray
    label_map: np.ndarray
    view: np.ndarray
    seed: int
    augment: AugmentConfig | None = None
    copies: int = 0
    device: torch.device = CPU

    @staticmethod
    def of(
        frames: FrameArrays,
        seed: int,
        augment: AugmentConfig | None = None,
        copies: int = 0,
        device: torch.device = CPU,
    ) -> FrameSource:
        """A source of all frames; no augmentation when `augment` changes nothing."""
        chosen = None if augment is None or is_identity(augment) else augment
        return FrameSource(frames.image_u8, frames.label_map, frames.view, seed, chosen, copies, device)

    def __len__(self) -> int:
        return len(self.image_u8)

    def copy_of(self, frame: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """Which copy of its frame a position sees, int64 [B]."""
        return (epoch + frame) % max(self.copies, 1)

    def pairs(self, positions: np.ndarray, seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
        """image_01 float32 [B, 1, H, W], conditioning index uint8 [B, H, W] and epoch [B] of positions."""
        frame, epoch = frames_at(positions, len(self), self.seed)
        if self.copies:
            image, index = self.copied(frame, self.copy_of(frame, epoch))
        else:
            matrices = None
            if self.augment is not None:
                matrices = warp_matrices(self.augment, seed, WARP, positions)
            image, index = self._warped(frame, matrices)
        return image, index, epoch

    def copied(self, frame: np.ndarray, copy: np.ndarray) -> tuple[Tensor, Tensor]:
        """Copies `copy` of frames `frame`: image_01 float32 [B, 1, H, W] and index uint8 [B, H, W]."""
        matrices = None
        if self.augment is not None:
            matrices = warp_matrices(self.augment, self.seed, COPY, copy * len(self) + frame)
            matrices[torch.from_numpy(copy == 0)] = torch.eye(2, 3)
        return self._warped(frame, matrices)

    def _warped(self, frame: np.ndarray, matrices: Tensor | None) -> tuple[Tensor, Tensor]:
        arrays = self.image_u8[frame], self.label_map[frame], self.view[frame].astype(np.uint8)
        image, labels, view = (_moved(torch.from_numpy(array), self.device) for array in arrays)
        if matrices is None:
            image_01 = image[:, None].float() / 255 * (labels != 0)[:, None]
        else:
            image_01, labels = warp_pair(image, labels, _moved(matrices, self.device))
        return image_01, labels + len(STRUCTURES) * view[:, None, None]


def normal_noise(seed: int, stream: int, positions: np.ndarray, shape: Sequence[int]) -> Tensor:
    """Standard normal noise float32 [B, *shape], a generator a position."""
    noise = np.empty((len(positions), *shape), dtype=np.float32)
    for row, position in zip(noise, positions):
        generator_of(seed, stream, int(position)).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)


def uniform(seed: int, stream: int, positions: np.ndarray) -> np.ndarray:
    """One uniform number in [0, 1) a position, float64 [B]."""
    return np.array([generator_of(seed, stream, int(p)).random() for p in positions])


# --- making batches while the device computes ----------------------------------------------------------------------


class Prefetcher(Iterator[T]):
    """Runs `make(0)`, `make(1)`, … of `jobs` in one thread, a few ahead. Iterating gives the results in order.

    `stalled_seconds` is how long the consumer had to wait in all. An exception in the thread is raised to the consumer.
    Use as a context manager, so that the thread ends with it.
    """

    def __init__(self, make: Callable[[Any], T], jobs: Iterator[Any], depth: int = 2) -> None:
        self._make, self._jobs = make, jobs
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self.stalled_seconds = 0.0
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)

    def __enter__(self) -> Prefetcher[T]:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def __next__(self) -> T:
        start = time.perf_counter()
        kind, value = self._queue.get()
        self.stalled_seconds += time.perf_counter() - start
        if kind == "error":
            raise value
        if kind == "end":
            raise StopIteration
        return value  # type: ignore[no-any-return]

    def _work(self) -> None:
        try:
            for job in self._jobs:
                if not self._put("item", self._make(job)):
                    return
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)

    def _put(self, kind: str, value: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put((kind, value), timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
