"""The request plan of a synthesis: which images are drawn, in which shards and batches, as arithmetic on an index.

Request i of a split is (mask, warp, noise seed) by division, so a plan of a million requests is a few numbers and the
list of masks. Nothing in it depends on who draws the images or when.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysyn.config import SynthesizeConfig
from raysyn.types import UserError


def stable_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on `parts` alone."""
    text = json.dumps(parts, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Request:
    """One image: the mask's frame, the seed of its warp, the seed of its noise (for the first attempt)."""

    mask_frame_id: str
    mask_index: int
    warp_seed: int
    noise_seed: int

    def retry(self, attempt: int) -> int:
        """The noise seed of a later attempt; attempt 0 has the request's own."""
        return self.noise_seed if attempt == 0 else stable_seed("retry", self.noise_seed, attempt)


@dataclass(frozen=True)
class Shard:
    """Requests [start, stop) of a split, written as one file."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The file's name in the frame set."""
        return f"{self.split}/shard-{self.number:05d}.parquet"

    @property
    def record(self) -> str:
        """The name of its record: rows, sha256 and seconds, written before the shard itself."""
        return f"shards/{self.split}-{self.number:05d}.json"


@dataclass(frozen=True)
class RequestPlan:
    """`masks`: split -> frame ids of the masks in their order. Masks vary fastest, then noise seeds, then warps."""

    masks: dict[str, list[str]]
    num_warps: int
    num_noise_seeds: int
    seed: int
    batch_size: int
    shard_size: int

    @staticmethod
    def of(config: SynthesizeConfig, masks: dict[str, list[str]]) -> RequestPlan:
        """The plan of a config. Raises UserError when there is no mask to draw from."""
        chosen = {split: masks.get(split, []) for split in config.mask_splits}
        if not any(chosen.values()):
            raise UserError(
                f"synthesize.mask_splits: no masks in {', '.join(config.mask_splits)}; prepare frames first"
            )
        counts = (config.num_warps, config.num_noise_seeds, config.seed, config.batch_size, config.shard_size)
        return RequestPlan(chosen, *counts)

    def num_requests(self, split: str | None = None) -> int:
        """Images of one split, or of all."""
        splits = self.masks if split is None else [split]
        return sum(len(self.masks[s]) for s in splits) * self.num_warps * self.num_noise_seeds

    def shards(self) -> Iterator[Shard]:
        """All shards, in order."""
        for split in self.masks:
            total = self.num_requests(split)
            for number, start in enumerate(range(0, total, self.shard_size)):
                yield Shard(split, number, start, min(start + self.shard_size, total))

    def request(self, split: str, index: int) -> Request:
        """Request `index` of a split."""
        masks = self.masks[split]
        rest, mask = divmod(index, len(masks))
        warp, noise = divmod(rest, self.num_noise_seeds)
        frame_id = masks[mask]
        warp_seed = stable_seed("warp", self.seed, frame_id, warp)
        return Request(frame_id, mask, warp_seed, stable_seed("noise", self.seed, frame_id, warp, noise))

    def batches(self, shard: Shard, fitting: int = 0) -> Iterator[list[Request]]:
        """The requests of a shard in batches of fixed composition, or where the plan leaves their size open of `fitting`."""
        size = self.batch_size or fitting or self.shard_size
        for start in range(shard.start, shard.stop, size):
            stop = min(start + size, shard.stop)
            yield [self.request(shard.split, i) for i in range(start, stop)]


def synthetic_frame_id(
    settings: dict[str, Any], mask_frame_id: str, warp_seed: int, noise_seed: int, label_map: np.ndarray, view: str
) -> str:
    """Hash of what determines an image: checkpoint and sampler (`settings`), mask and its warp, noise seed, and the view
    and the warped label map uint8 [H, W] themselves, since a mask may be corrected under its name."""
    content = hashlib.sha256(label_map.tobytes()).hexdigest()
    parts = [settings, mask_frame_id, warp_seed, noise_seed, label_map.shape, content, view]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return "syn-" + hashlib.sha256(text.encode()).hexdigest()[:32]
