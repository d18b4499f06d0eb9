"""The worker of a synthesis: opens its sampler once, then draws whole shards and writes each whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from raysyn.cluster.board import reporter
from raysyn.cluster.metrics_export import count_if_replaced, count_shard
from raysyn.cluster.session import gpu_share
from raysyn.config import SynthesizeConfig
from raysyn.data.frames import frames_to_table, table_to_bytes
from raysyn.data.masks import MaskFrames, warp_label_map
from raysyn.data.requests import Request, RequestPlan, Shard, synthetic_frame_id
from raysyn.data.storage import Storage
from raysyn.metrics.cost import Cost, measured, on_gpu
from raysyn.types import VIEWS, Frame, Provenance, UserError

SUMMED = tuple(f"{part}{unit}" for part in ("", "decode_", "rejected_") for unit in ("cpu_seconds", "gpu_seconds"))
RECORD = {"name", "rows", "bytes", "sha256", "seconds", *SUMMED, "attempts", "below_min_faithfulness", "energy_joules"}
RECORD |= {"peak_memory_mb", "peak_gpu_memory_mb"}  # what the manifest is made from
LOOK_UPS = 32  # at once, of shards in an object store: each is a round trip


class Sampler(Protocol):
    """Draws images uint8 [B, H, W] for label maps uint8 [B, H, W], views uint8 [B] and a seed each.

    It may have a `batch_size` (else the plan's), `decoding` (what its autoencoder cost) and a `precision`.
    """

    def __call__(self, label_map: np.ndarray, view: np.ndarray, seeds: list[int]) -> np.ndarray: ...


@dataclass(frozen=True)
class SynthesisSpec:
    """All that a worker needs. `sampler` is a factory "module:function" called with this spec, on the worker.

    `settings` (checkpoint, sampler, amp, warp) enters every frame_id and each shard's metadata; `model` and
    `num_function_evals` fill the provenance columns. `fitted_on` are the patients that the model names,
    `segmenter_fitted_on` those of the segmenter that judges.
    """

    plan: RequestPlan
    config: SynthesizeConfig
    settings: dict[str, Any]
    metadata: dict[str, str]
    frames: str
    output: str
    model_dir: str
    model: str
    solver: str
    num_steps: int
    num_function_evals: int
    threads: int
    key: str
    sampler: str = "raysyn.cluster.model_sampler:ModelSampler"
    fitted_on: tuple[str, ...] = ()
    segmenter_fitted_on: tuple[str, ...] = ()


def _load(path: str) -> Any:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)


class ShardWriter:
    """Ray Data calls it with rows {split, number, start, stop}: one shard each. Kept on one actor with its model."""

    def __init__(self, spec: SynthesisSpec) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(spec.threads))
        self.spec, self.storage = spec, Storage.at(spec.output)
        self.refused = ""
        try:
            self.masks = {split: MaskFrames.read(spec.frames, split) for split in spec.plan.masks}
            self.sampler: Sampler = _load(spec.sampler)(spec)
            self.faithfulness = faithfulness_of(spec.config)
        except UserError as error:  # raised here it would be an actor that dies, and is started again and again
            self.refused = str(error)
        self.rejected, self.rejected_decoding = Cost(), Cost()
        self.report, self.started, self.images = reporter(f"{spec.key} worker {os.getpid()}"), time.perf_counter(), 0
        count_if_replaced(spec.key)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        records = []
        for split, number, start, stop in zip(rows["split"], rows["number"], rows["start"], rows["stop"]):
            shard = Shard(str(split), int(number), int(start), int(stop))
            if self.refused:
                records.append({"name": shard.name, "rows": 0, "seconds": 0.0, "refused": self.refused})
                continue
            # A retried block may hold shards that were finished before the worker died: they are whole, so they stay.
            try:
                records.append({"refused": "", **(read_record(self.storage, shard) or self.write(shard))})
            except UserError as error:  # no space left, a damaged mask: for the user to read, and no fault to retry
                records.append({"name": shard.name, "rows": 0, "seconds": 0.0, "refused": str(error)})
        return {key: [r[key] for r in records] for key in ("name", "rows", "seconds", "refused")}

    def write(self, shard: Shard) -> dict[str, Any]:
        """Draw the images of a shard and write it; returns its record."""
        attempts, below, tables = 0, 0, []
        self.rejected, self.rejected_decoding, decoded = Cost(), Cost(), self._decoding()
        batches = list(self.spec.plan.batches(shard, getattr(self.sampler, "batch_size", 0)))
        # Warping of the next batch's maps and PNG encoding of the last one's images run beside the sampling.
        with measured(gpu_share()) as cost, ThreadPoolExecutor(2) as pool:
            ready = pool.submit(self.conditions, shard.split, batches[0])
            for i, batch in enumerate(batches):
                maps, view = ready.result()
                if i + 1 < len(batches):
                    ready = pool.submit(self.conditions, shard.split, batches[i + 1])
                frames, tried, failed = self.draw(shard.split, batch, maps, view)
                attempts, below = attempts + tried, below + failed
                tables.append(pool.submit(frames_to_table, frames, self.spec.metadata))
                self._progress(len(batch))
            data = table_to_bytes(pa.concat_tables([t.result() for t in tables]))
        record = {
            "name": shard.name,
            "rows": shard.stop - shard.start,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "seconds": round(cost.wall_seconds, 4),
            "cpu_seconds": round(cost.cpu_seconds, 4),
            "gpu_seconds": round(cost.gpu_seconds, 4),
            "precision": getattr(self.sampler, "precision", "fp32"),
            "attempts": attempts,
            "below_min_faithfulness": below,
            "peak_memory_mb": round(cost.peak_memory_mb),
            "peak_gpu_memory_mb": round(cost.peak_gpu_memory_mb),
            "energy_joules": cost.energy_joules,
        }
        kept_decoding = self._decoding() - decoded - self.rejected_decoding  # so that no second is in two parts
        for part, own in (("decode", kept_decoding), ("rejected", self.rejected)):
            record |= {
                f"{part}_cpu_seconds": round(own.cpu_seconds, 4),
                f"{part}_gpu_seconds": round(own.gpu_seconds, 4),
            }
        # The record first: a shard that is there is whole and has its record, so nothing whole is ever made again.
        self.storage.write_json(shard.record, record)
        self.storage.write_atomic(shard.name, data)
        count_shard(self.spec.key, record)
        return record

    def _decoding(self) -> Cost:
        return getattr(self.sampler, "decoding", Cost())

    def conditions(self, split: str, batch: list[Request]) -> tuple[np.ndarray, np.ndarray]:
        """What a batch is drawn from: warped label maps uint8 [B, H, W], views uint8 [B]."""
        masks, warp = self.masks[split], self.spec.config.warp
        maps = np.stack([warp_label_map(masks.label_map(r.mask_index), warp, r.warp_seed) for r in batch])
        return maps, masks.view[[r.mask_index for r in batch]]

    def draw(
        self, split: str, batch: list[Request], maps: np.ndarray, view: np.ndarray
    ) -> tuple[list[Frame], int, int]:
        """(frames, images drawn, frames kept below the threshold) of one batch; rejected ones get new seeds."""
        config = self.spec.config
        seeds = [r.noise_seed for r in batch]
        images = np.array(self.sampler(maps, view, seeds))
        scores = self.faithfulness(images, maps) if self.faithfulness else None
        drawn, todo = len(batch), np.array([], dtype=int)
        if scores is not None:
            for attempt in range(1, config.max_attempts):
                todo = np.flatnonzero(scores < config.min_faithfulness)
                if not len(todo):
                    break
                again = [batch[i].retry(attempt) for i in todo]
                decoded = self._decoding()
                with measured(gpu_share()) as cost:
                    fresh = self.sampler(maps[todo], view[todo], again)
                    fresh_scores = self.faithfulness(fresh, maps[todo])
                self.rejected += cost  # an image is drawn anew for each that is thrown away
                self.rejected_decoding += self._decoding() - decoded
                drawn += len(todo)
                for i, image, score, seed in zip(todo, fresh, fresh_scores, again):
                    if score > scores[i]:
                        images[i], scores[i], seeds[i] = image, score, seed
            todo = np.flatnonzero(scores < config.min_faithfulness)
        frames = [
            self._frame(split, r, maps[i], images[i], seeds[i], None if scores is None else float(scores[i]))
            for i, r in enumerate(batch)
        ]
        return frames, drawn, len(todo)

    def _frame(
        self, split: str, request: Request, label_map: np.ndarray, image: np.ndarray, seed: int, score: float | None
    ) -> Frame:
        spec, masks, i = self.spec, self.masks[split], request.mask_index
        view = VIEWS[masks.view[i]]
        return Frame(
            frame_id=synthetic_frame_id(spec.settings, request.mask_frame_id, request.warp_seed, seed, label_map, view),
            image=image,
            label_map=label_map,
            view=view,
            phase=masks.phase[i],
            patient_id=masks.patient_id[i],
            split=split,
            source="synthetic",
            spacing_mm=masks.spacing_mm[i],
            provenance=Provenance(
                model=spec.model,
                checkpoint_sha256=spec.settings["checkpoint_sha256"],
                mask_frame_id=request.mask_frame_id,
                warp_seed=request.warp_seed,
                noise_seed=seed,
                solver=spec.solver,
                num_steps=spec.num_steps,
                num_function_evals=spec.num_function_evals,
                faithfulness=score,
            ),
        )

    def _progress(self, images: int) -> None:
        self.images += images
        status = {
            "done": self.images,
            "unit": "images",
            "per_second": self.images / (time.perf_counter() - self.started),
        }
        self.report({**status, "note": gpu_memory()})


def read_record(storage: Storage, shard: Shard) -> dict[str, Any] | None:
    """The record of a whole shard; None when the shard is to be made."""
    if not storage.exists(shard.name):
        return None
    try:
        record: dict[str, Any] = storage.read_json(shard.record)
    except FileNotFoundError:
        return None
    whole = isinstance(record, dict) and record.keys() >= RECORD and record["bytes"] == storage.size(shard.name)
    return record if whole else None


def whole_shards(storage: Storage, shards: Iterable[Shard]) -> dict[str, dict[str, Any]]:
    """Records of the shards that are whole, by name, from a listing and, of an object store, four requests a shard."""
    present = set(storage.list(suffix=".parquet"))
    there = [s for s in shards if s.name in present]
    with ThreadPoolExecutor(1 if storage.is_local else LOOK_UPS) as pool:
        records = pool.map(lambda shard: read_record(storage, shard), there)
        return {s.name: record for s, record in zip(there, records) if record is not None}


def faithfulness_of(config: SynthesizeConfig) -> Any:
    """A function (images, maps) -> Dice of a real-trained segmenter's reading with the requested map [B], or None.

    Raises UserError for a `segmenter_dir` that holds none.
    """
    if not config.segmenter_dir:
        return None
    from raysyn.cluster.model_store import local_copy
    from raysyn.metrics.faithfulness import mean_region_dice
    from raysyn.tasks.fitting import load_task
    from raysyn.tasks.segmentation import predict_label_maps

    segmenter = load_task(local_copy(config.segmenter_dir))
    if segmenter.task.kind != "segmentation":
        raise UserError(f"synthesize.segmenter_dir: {config.segmenter_dir} holds a {segmenter.task.kind} network")
    return lambda images, maps: mean_region_dice(predict_label_maps(segmenter, images), maps)


def gpu_memory() -> str:
    """GPU memory in use by this process, in words; empty without a GPU."""
    if not on_gpu():
        return ""
    import torch

    return f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB GPU"


def settings_of(checkpoint_sha256: str, sampler: Any, config: SynthesizeConfig) -> dict[str, Any]:
    """What determines an image beside its mask and seeds."""
    return {
        "checkpoint_sha256": checkpoint_sha256,
        "sampler": dataclasses.asdict(sampler),
        "amp": config.amp,
        "warp": dataclasses.asdict(config.warp),
    }
