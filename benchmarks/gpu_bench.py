"""What the rows of gpu.py share: the device and the table, and one model at one size on it."""

from __future__ import annotations

import copy
import csv
import datetime
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain import plain_heun, ratio
from raysyn.config import ModelConfig, NetConfig, VAEConfig
from raysyn.diffusion.batching import free_memory
from raysyn.diffusion.generate import generate
from raysyn.models import build_denoiser, build_vae, describe
from raysyn.nets.codecs import LatentCodec, PixelCodec
from raysyn.nets.precision import autocast, precision
from raysyn.nets.spade import one_hot_from_index

COLUMNS = (
    *("name", "model", "size", "ratio_median", "ratio_min", "ratio_max", "ours_seconds", "other_seconds"),
    *("value", "unit", "note", "machine", "date"),
)
MODELS = {"edm_l64": (4, [64, 128, 192], 64), "edm": (1, [], 16), "edm_l128": (2, [64, 128], 32)}  # last: largest batch
TINY = NetConfig(
    base_channels=8, channel_multipliers=[1, 2], num_blocks=1, attention_resolutions=[8], spade_hidden=8, dropout=0.0
)
NUM_STEPS, LOW, HIGH = 4, 0.002, 80.0


@dataclass
class Bench:
    """The device, what there is time for, and what was found: `output` holds each row as soon as it is known."""

    device: torch.device
    tiny: bool
    stop: float
    output: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    ceiling: float = float("nan")

    @property
    def machine(self) -> str:
        """The device's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def low(self) -> str:
        """What bf16 comes to on the device."""
        return precision("bf16", self.device)

    @property
    def backend(self) -> str:
        """torch.compile's; a CPU compiles nothing, as it runs this code only to see that it runs."""
        return "inductor" if self.device.type == "cuda" else "eager"

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def add(self, name: str, case: str = "", size: int | str = "", **values: Any) -> None:
        """One row, printed and written at once: what kills the process takes no row with it."""
        cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}
        row = {"name": name, "model": case, "size": size, **cells}
        self.rows.append({**row, "machine": self.machine, "date": datetime.date.today().isoformat()})
        with self.output.open("w" if len(self.rows) == 1 else "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            if len(self.rows) == 1:
                writer.writeheader()
            writer.writerow(self.rows[-1])
        print(" | ".join(f"{k} {v}" if k in values else str(v) for k, v in row.items() if v != ""), flush=True)

    def attempt(self, name: str, work: Callable[[], None], needs: float = 5.0) -> None:
        """Run `work` if there are `needs` seconds left; what fails is a row with the reason."""
        if time.monotonic() + needs > self.stop:
            return self.add(name, note="left out: no time left")
        try:
            torch.compiler.reset()  # one code is compiled a few times only, for all nets together; then it runs plainly
            gc.collect()  # graphs and their memory hang on cycles
            free_memory()
            work()
        except Exception as error:
            self.add(name, note=f"failed: {type(error).__name__}: {(str(error) or '-').splitlines()[0][:160]}")

    def seconds(self, work: Callable[[], object], rounds: int = 3) -> float:
        """Median seconds of `work` after one warm-up."""
        return ratio(work, lambda: None, rounds, self.finish)[1]


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """fp32 to the last bit: on a GPU torch gives convolutions TF32, ten bits of fraction, unless told not to."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def label_index(count: int, size: int) -> np.ndarray:
    """Semantic indices (0 to 9) like an apical view's, uint8 [count, size, size]: sector, wall, cavity, atrium."""
    row, column = np.mgrid[0:size, 0:size] / size
    maps = []
    for i in range(count):
        tilt = 0.05 * np.sin(i)
        label = np.where(np.abs(column - 0.5) < 0.75 * row + 0.05, 2, 0) * (np.hypot(row, column - 0.5) < 0.95)
        for value, (centre, height, width) in {
            3: (0.42, 0.3, 0.19),
            1: (0.45, 0.24, 0.12),
            4: (0.78, 0.1, 0.13),
        }.items():
            inside = ((row - centre) / height) ** 2 + ((column - 0.5 - tilt) / width) ** 2 < 1
            label = np.where(inside & (label > 0), value, label)
        maps.append(label + 5 * (i % 2) * (label > 0))
    return np.stack(maps).astype(np.uint8)


def model_config(name: str, tiny: bool) -> ModelConfig:
    """A model at published size, or tiny."""
    downscale, channels, _ = MODELS[name]
    settings = VAEConfig(channels=channels) if channels else VAEConfig()
    net = TINY if tiny else NetConfig()
    space = "latent" if channels else "pixel"
    return ModelConfig(name=name, space=space, latent_downscale=downscale, vae=settings, net=net)


class Case:
    """One model at one size on the device: nets, maps and the two procedures."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name, self.image_size = bench, name, 32 if bench.tiny else 256
        self.limit = 4 if bench.tiny else MODELS[name][2]
        self.config = model_config(name, bench.tiny)
        sampler = self.config.sampler
        sampler.solver, sampler.num_steps, sampler.sigma_min, sampler.sigma_max = "heun", NUM_STEPS, LOW, HIGH
        torch.manual_seed(0)
        with torch.device(bench.device):
            self.published = build_denoiser(self.config, self.image_size).eval()
            with torch.no_grad():  # the last layers begin at zero: awake, all of the net reaches the image
                for p in self.published.parameters():
                    p.add_(0.02 * torch.randn_like(p))
            vae = build_vae(self.config).eval() if self.config.space == "latent" else None
        self.denoiser = copy.deepcopy(self.published).to(memory_format=torch.channels_last)
        self.codec = LatentCodec(vae.to(memory_format=torch.channels_last)) if vae is not None else PixelCodec()
        self.shape = self.codec.shape(self.image_size)
        index = torch.from_numpy(label_index(self.limit, self.image_size)).to(bench.device)
        self.maps, self.sector = one_hot_from_index(index), (index % 5 > 0)[:, None].float()
        self.batch, self.cost = self.limit, describe(self.config, self.image_size)

    def ours(self, batch: int, amp: str = "bf16", cache: float = float("inf")) -> Tensor:
        """Our sampler for the first `batch` maps."""
        options = {"shape": self.shape, "amp": amp, "modulation_cache_bytes": cache}
        return generate(self.denoiser, self.maps[:batch], range(batch), self.config.sampler, **options)

    def plain(self, batch: int) -> Tensor:
        """The published procedure for the same."""
        return plain_heun(self.published, self.maps[:batch], range(batch), self.shape, NUM_STEPS, LOW, HIGH)

    def grey(self, x: Tensor, amp: str = "none") -> Tensor:
        """Grey levels of what was drawn."""
        with autocast(amp, self.bench.device):
            image = self.codec.decode(x, self.sector[: len(x)])
        return ((image.float() + 1) * 127.5).round()

    def add(self, name: str, **values: Any) -> None:
        """A row about this model."""
        self.bench.add(name, self.name, self.image_size, **values)

    def agreement(self, name: str, found: Tensor, exact: Tensor) -> None:
        """A row: the share of pixels within one grey level, of those neither black nor white, which all would be."""
        grey = (exact > 0) & (exact < 255)
        near = ((found - exact).abs() <= 1)[grey].float().mean().item()
        note = f"random weights; of the pixels that are grey, {grey.float().mean().item():.0%}"
        self.add(f"{name} against fp32", value=near, unit="share within one grey level", note=note)
