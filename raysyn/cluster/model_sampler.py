"""What a synthesis draws with by default: a fitted model, in batches that its device holds."""

from __future__ import annotations

import dataclasses

import numpy as np

from raysyn.cluster.sampler_actor import SynthesisSpec
from raysyn.cluster.session import gpu_share
from raysyn.config import SamplerConfig
from raysyn.data.storage import Storage
from raysyn.metrics.cost import Cost, measured, on_gpu

CPU_BATCH = 32  # benchmarks/README.md
BATCH_SIZE = "batch_size"  # file in the data set's folder, where the config leaves it open and GPUs draw


class ModelSampler:
    """The fitted model of `spec.model_dir` on this worker's device; `decoding` is what its autoencoder has cost so far.

    A batch that does not fit the GPU is halved, with a warning in the worker's log: noise is each image's own, so that
    changes an image by no more than the choice of GPU kernels does.
    """

    def __init__(self, spec: SynthesisSpec) -> None:
        import torch

        from raysyn.cluster.model_store import open_model
        from raysyn.diffusion.batching import keep_freed_memory
        from raysyn.nets.precision import precision

        torch.set_num_threads(spec.threads)
        keep_freed_memory()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = open_model(spec.model_dir).to(device)
        self.sampler = SamplerConfig(**spec.settings["sampler"])
        self.config, self.decoding = spec.config, Cost()
        self.precision = precision(spec.config.amp, device)
        self.cache_bytes = _cache_bytes(spec.config.modulation_cache_bytes)
        found = self._known_batch(spec.output)
        self.batch_size = found or self._fitting(self.config.shard_size)
        if spec.config.compile:
            self.model.fix_shapes(spec.config.amp)
            # A graph holds a batch's modulations once more, beside its own memory: what fits without may not fit with it.
            self.batch_size = found or self._fitting(self.batch_size, start=self.batch_size)
        if not found:
            Storage.at(spec.output).write_atomic(BATCH_SIZE, str(self.batch_size).encode())
        self.decoding = Cost()  # without the probe's

    def _known_batch(self, output: str) -> int:
        """The batch that needs no probe: the config's, on a CPU 32, where larger ones gain nothing, or what the first
        worker found; 0 where it is to be found.

        The first worker's finding is kept in the data set's folder: sums of floats may depend on it, so a set is
        finished in the batches that it was begun with.
        """
        if self.config.batch_size:
            return self.config.batch_size
        if not on_gpu():
            return min(CPU_BATCH, self.config.shard_size)
        storage = Storage.at(output)
        return int(storage.read_bytes(BATCH_SIZE)) if storage.exists(BATCH_SIZE) else 0

    def _fitting(self, most: int, start: int = 8) -> int:
        """The largest batch of at most `most` that the GPU holds, by a probe."""
        from raysyn.diffusion.batching import probe_batch

        size = self.model.image_size
        brief = dataclasses.replace(self.sampler, num_steps=min(self.sampler.num_steps, 2))
        # No two places of such a map are alike, so that tables of neighbourhoods save nothing.
        label_map, view = (
            np.random.default_rng(0).integers(0, 5, (most, size, size), np.uint8),
            np.zeros(most, np.uint8),
        )
        return probe_batch(
            lambda n: self._draw(label_map[:n], view[:n], list(range(n)), brief), start=start, limit=most
        )

    def __call__(self, label_map: np.ndarray, view: np.ndarray, seeds: list[int]) -> np.ndarray:
        """Images uint8 [B, H, W]; raises torch.OutOfMemoryError when not even one image fits."""
        from raysyn.diffusion.batching import in_halves

        def draw(part: slice) -> np.ndarray:
            return self._draw(label_map[part], view[part], seeds[part], self.sampler)

        return np.concatenate(in_halves(draw, len(seeds)))

    def _draw(self, label_map: np.ndarray, view: np.ndarray, seeds: list[int], sampler: SamplerConfig) -> np.ndarray:
        from raysyn.pipeline import decode_images, sample_latents

        amp, budget = self.config.amp, self.cache_bytes
        x = sample_latents(self.model, label_map, view, seeds, sampler, amp=amp, modulation_cache_bytes=budget)
        with measured(gpu_share()) as cost:
            images = decode_images(self.model, x, label_map)
        self.decoding += cost
        return images


def _cache_bytes(wanted: int | None) -> float:
    """The memory for modulations: what the config says, else 1 GiB, or a quarter of this worker's share of the GPU."""
    import torch

    if wanted is not None:
        return wanted
    return torch.cuda.mem_get_info()[1] / 4 * (gpu_share() or 1.0) if on_gpu() else 1 << 30
