"""Frames for a fit: read and decoded by Ray Data, or by the worker itself where a set is small; kept in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from raysyn.config import WorkersConfig
from raysyn.data.frames import decode_png, frame_files, open_shard, read_arrays
from raysyn.data.storage import Storage
from raysyn.types import VIEWS, FrameArrays, UserError

COLUMNS = ["frame_id", "patient_id", "image", "label_map", "view"]


def resident_bytes(uri: str, split: str, image_size: int) -> int:
    """Bytes of a split once decoded (image and label map). Raises UserError when there is no such split."""
    rows = 0
    for storage, name in frame_files(uri, split):
        with open_shard(storage, name) as file:
            rows += file.metadata.num_rows
    if rows == 0:
        raise UserError(f"{uri}: holds no {split} frames; prepare a set that has some")
    return 2 * rows * image_size * image_size


def check_resident(size: int, workers: WorkersConfig, what: str) -> None:
    """Raise UserError when `size` bytes are more than a worker may hold."""
    limit = workers.max_resident_gb * 2**30
    if size > limit:
        raise UserError(
            f"workers.max_resident_gb: {what} take {size / 2**30:.1f} GB a worker, allowed are "
            f"{workers.max_resident_gb:g}; raise it, or use fewer frames or a smaller data.image_size"
        )


def frame_dataset(uri: str, split: str) -> Any:
    """A `ray.data.Dataset` of one split: frame_id, patient_id, view (index into VIEWS), image, label_map uint8 [H, W]."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    storage = Storage.at(uri)
    paths = [f"{s.path.rstrip('/')}/{name}" for s, name in frame_files(uri, split)]
    frames = ray.data.read_parquet(paths, filesystem=storage.fs).select_columns(COLUMNS)
    return frames.map_batches(_decode, batch_size=128, zero_copy_batch=True)


def _decode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    pictures = {
        key: np.stack([decode_png(v["bytes"], f"{i}: {key}") for i, v in zip(batch["frame_id"], batch[key])])
        for key in ("image", "label_map")
    }
    view = np.array([VIEWS.index(v) for v in batch["view"]], dtype=np.uint8)
    return {"frame_id": batch["frame_id"], "patient_id": batch["patient_id"], "view": view, **pictures}


def collect(blocks: Any) -> FrameArrays:
    """What a fit reads of a data set or a Ray Train shard of it, in order of frame_id."""
    parts = list(blocks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2))
    if not parts:
        raise UserError("no frames to fit on; prepare a set that has some")
    columns = {key: np.concatenate([np.asarray(p[key]) for p in parts]) for key in parts[0]}
    n = len(columns["frame_id"])
    frames = FrameArrays(
        image_u8=columns["image"].astype(np.uint8),
        label_map=columns["label_map"].astype(np.uint8),
        view=columns["view"].astype(np.uint8),
        phase=np.zeros(n, dtype=np.uint8),
        spacing_mm=np.full((n, 2), np.nan, dtype=np.float32),
        frame_id=[str(v) for v in columns["frame_id"]],
        patient_id=[str(v) for v in columns["patient_id"]],
        mask_frame_id=[""] * n,
        source=[""] * n,
    )
    return in_order(frames)


def read_directly(uri: str, split: str) -> FrameArrays:
    """A small split, read by this process, in order of frame_id."""
    return in_order(read_arrays(uri, split))


def in_order(frames: FrameArrays) -> FrameArrays:
    """Frames sorted by frame_id: the order of a fit does not depend on shards or on who read them first."""
    return frames.take(np.argsort(np.array(frames.frame_id), kind="stable"))
