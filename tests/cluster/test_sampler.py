"""The worker's own sampler, without Ray: a batch that does not fit is drawn in halves, in order."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch

from raysyn.cluster.sampler_actor import ModelSampler
from raysyn.config import SamplerConfig, SynthesizeConfig


class Model:
    """Stands in for a fitted model; remembers what it was asked for."""

    fixed = ""

    def to(self, device: str):
        return self

    def fix_shapes(self, amp: str) -> None:
        self.fixed = amp


def test_a_batch_that_does_not_fit_is_drawn_in_halves(monkeypatch) -> None:
    model, batches = Model(), []

    def draw(given, maps, view, seeds, sampler, *, amp, modulation_cache_bytes):
        assert given is model
        batches.append(len(seeds))
        if len(seeds) > 3:
            raise torch.OutOfMemoryError("full")
        return torch.tensor(seeds)

    def decode(given, x, maps):
        return np.stack([np.full((4, 4), int(seed), np.uint8) for seed in x])

    monkeypatch.setattr("raysyn.cluster.model_store.open_model", lambda folder: model)
    monkeypatch.setattr("raysyn.pipeline.sample_latents", draw)
    monkeypatch.setattr("raysyn.pipeline.decode_images", decode)
    settings = {"sampler": dataclasses.asdict(SamplerConfig())}
    config = SynthesizeConfig(amp="bf16", compile=True)
    sampler = ModelSampler(SimpleNamespace(threads=1, model_dir="", config=config, settings=settings))
    images = sampler(np.zeros((10, 4, 4), np.uint8), np.zeros(10, np.uint8), list(range(10)))
    assert images[:, 0, 0].tolist() == list(range(10))
    assert batches == [10, 5, 2, 3, 5, 2, 3]
    assert model.fixed == "bf16"
    assert sampler.decoding.wall_seconds > 0
