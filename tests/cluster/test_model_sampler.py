"""The worker's own sampler, without Ray: a batch that does not fit is drawn in halves, in order; its size may be probed."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch

from raysyn.cluster.model_sampler import ModelSampler
from raysyn.config import SamplerConfig, SynthesizeConfig
from raysyn.metrics.cost import Cost


class Model:
    """Stands in for a fitted model; remembers what it was asked for."""

    fixed, image_size = "", 4

    def to(self, device: str):
        return self

    def fix_shapes(self, amp: str) -> None:
        self.fixed = amp


def made(monkeypatch, output="", graphs=False, **options) -> tuple[ModelSampler, Model, list[int]]:
    """A sampler whose device holds 3 images, with `graphs` 1 at fixed shapes, its model, and the sizes of the batches that
    it was asked for."""
    model, batches = Model(), []

    def draw(given, maps, view, seeds, sampler, *, amp, modulation_cache_bytes):
        assert given is model
        batches.append(len(seeds))
        if len(seeds) > (1 if model.fixed and graphs else 3):
            raise torch.OutOfMemoryError("full")
        return torch.tensor(seeds)

    def decode(given, x, maps):
        return np.stack([np.full((4, 4), int(seed), np.uint8) for seed in x])

    monkeypatch.setattr("raysyn.cluster.model_store.open_model", lambda folder: model)
    monkeypatch.setattr("raysyn.pipeline.sample_latents", draw)
    monkeypatch.setattr("raysyn.pipeline.decode_images", decode)
    settings = {"sampler": dataclasses.asdict(SamplerConfig())}
    config = SynthesizeConfig(**options)
    spec = SimpleNamespace(threads=1, model_dir="", config=config, settings=settings, output=str(output))
    return ModelSampler(spec), model, batches


def test_a_batch_that_does_not_fit_is_drawn_in_halves(monkeypatch) -> None:
    monkeypatch.setattr("raysyn.nets.precision.computes_in", lambda amp, kind: True)
    sampler, model, batches = made(monkeypatch, amp="bf16", compile=True)
    images = sampler(np.zeros((10, 4, 4), np.uint8), np.zeros(10, np.uint8), list(range(10)))
    assert images[:, 0, 0].tolist() == list(range(10))
    assert batches == [10, 5, 2, 3, 5, 2, 3]
    assert (model.fixed, sampler.precision) == ("bf16", "bf16")
    assert sampler.decoding.wall_seconds > 0


def test_a_batch_of_open_size_is_what_the_first_workers_gpu_holds(monkeypatch, tmp_path) -> None:
    sampler, _, _ = made(monkeypatch, tmp_path, batch_size=0)
    assert (sampler.batch_size, sampler.cache_bytes) == (32, 1 << 30)
    assert made(monkeypatch, tmp_path, batch_size=0, shard_size=6)[0].batch_size == 6
    monkeypatch.setattr("raysyn.cluster.model_sampler.on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    monkeypatch.setattr("raysyn.cluster.model_sampler.measured", lambda on_gpu: nullcontext(Cost()))
    sampler, _, batches = made(monkeypatch, tmp_path, batch_size=0)
    assert (sampler.batch_size, batches) == (2, [8, 4, 2])
    assert sampler.decoding == Cost()
    assert sampler.cache_bytes == 20 << 30
    assert made(monkeypatch, tmp_path, modulation_cache_bytes=7)[0].cache_bytes == 7
    sampler, _, batches = made(monkeypatch, tmp_path, batch_size=0)
    assert (sampler.batch_size, batches) == (2, []), "a set is finished in the batches that it was begun with"


def test_a_batch_is_probed_again_with_its_graph(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("raysyn.cluster.model_sampler.on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    monkeypatch.setattr("raysyn.cluster.model_sampler.measured", lambda on_gpu: nullcontext(Cost()))
    sampler, model, batches = made(monkeypatch, tmp_path, graphs=True, batch_size=0, compile=True)
    assert (sampler.batch_size, batches, model.fixed) == (1, [8, 4, 2, 2, 1], "none")
    assert (tmp_path / "batch_size").read_text() == "1"


def test_workers_that_share_a_gpu_share_the_memory_for_modulations(monkeypatch) -> None:
    monkeypatch.setattr("raysyn.cluster.model_sampler.on_gpu", lambda: True)
    monkeypatch.setattr("raysyn.cluster.model_sampler.gpu_share", lambda: 0.25)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    assert made(monkeypatch, batch_size=2)[0].cache_bytes == 5 << 30
