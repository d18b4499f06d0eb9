"""`python benchmarks/gpu.py`: what a CUDA device makes of the published sizes, in under eight minutes.

Needs torch 2.11 or later, diffusers and numpy; no Ray, MLflow or network. Weights are random: time does not depend on
them. Rows come in the order of their worth; when the time is up the rest are written down as left out. A row that
fails says why and the others go on. `--device cpu --size tiny` runs the same code anywhere.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain import plain_heun, ratio
from raysyn.config import ModelConfig, NetConfig, VAEConfig
from raysyn.diffusion.batching import probe_batch
from raysyn.diffusion.generate import generate
from raysyn.diffusion.loss import diffusion_loss
from raysyn.models import build_denoiser, build_vae, describe
from raysyn.nets.codecs import LatentCodec, PixelCodec
from raysyn.nets.fixed_shape import FixedShapeNet, store_weights
from raysyn.nets.precision import AMP_DTYPES, amp_dtype, autocast
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
COMPILE_SECONDS = 100  # what compiling one of the published nets may take


@dataclass
class Bench:
    """The device, what there is time for, and what was found."""

    device: torch.device
    tiny: bool
    stop: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    ceiling: float = float("nan")

    @property
    def machine(self) -> str:
        """The device's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def add(self, name: str, case: str = "", size: int | str = "", **values: Any) -> None:
        """One row, printed at once."""
        cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}
        row = {"name": name, "model": case, "size": size, **cells}
        self.rows.append({**row, "machine": self.machine, "date": datetime.date.today().isoformat()})
        print(" | ".join(f"{k} {v}" if k in values else str(v) for k, v in row.items() if v != ""), flush=True)

    def attempt(self, name: str, work: Callable[[], None], needs: float = 5.0) -> None:
        """Run `work` if there are `needs` seconds left; what fails is a row with the reason."""
        if time.monotonic() + needs > self.stop:
            return self.add(name, note="left out: no time left")
        try:
            work()
        except Exception as error:
            self.add(name, note=f"failed: {type(error).__name__}: {(str(error) or '-').splitlines()[0][:160]}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], object], rounds: int = 3) -> float:
        """Median seconds of `work` after one warm-up."""
        return ratio(work, lambda: None, rounds, self.finish)[1]


def ten_products(a: torch.Tensor, b: torch.Tensor) -> None:
    for _ in range(10):
        a @ b


def matmul_ceiling(bench: Bench) -> None:
    """The fastest bf16 matrix product that this device was seen to do, TFLOP/s."""
    best = 0.0
    for side in (256,) if bench.tiny else (4096, 8192, 16384):
        a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in "ab")
        seconds = bench.seconds(partial(ten_products, a, b)) / 10
        best = max(best, 2 * side**3 / seconds / 1e12)
    bench.ceiling = best
    bench.add("ceiling: bf16 matrix product", value=best, unit="TFLOP/s")


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


class Case:
    """One model at one size on the device: nets, maps and the two procedures."""

    def __init__(self, bench: Bench, name: str) -> None:
        downscale, channels, self.limit = MODELS[name]
        self.bench, self.name, self.image_size = bench, name, 32 if bench.tiny else 256
        settings = VAEConfig(channels=channels) if channels else VAEConfig()
        net = TINY if bench.tiny else NetConfig()
        space = "latent" if channels else "pixel"
        self.config = ModelConfig(name=name, space=space, latent_downscale=downscale, vae=settings, net=net)
        self.limit = 4 if bench.tiny else self.limit
        sampler = self.config.sampler
        sampler.solver, sampler.num_steps, sampler.sigma_min, sampler.sigma_max = "heun", NUM_STEPS, LOW, HIGH
        torch.manual_seed(0)
        with torch.device(bench.device):
            self.published = build_denoiser(self.config, self.image_size).eval()
            with torch.no_grad():  # the last layers begin at zero: awake, all of the net reaches the image
                for p in self.published.parameters():
                    p.add_(0.02 * torch.randn_like(p))
            vae = build_vae(self.config).eval() if channels else None
        self.denoiser = copy.deepcopy(self.published).to(memory_format=torch.channels_last)
        self.codec = LatentCodec(vae) if vae is not None else PixelCodec()
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

    def grey(self, x: Tensor) -> Tensor:
        """Grey levels of what was drawn."""
        image = self.codec.decode(x, self.sector[: len(x)])
        return ((image.float() + 1) * 127.5).round()

    def add(self, name: str, **values: Any) -> None:
        """A row about this model."""
        self.bench.add(name, self.name, self.image_size, **values)


def against_plain(case: Case, what: str) -> None:
    """Our sampler as the net stands against the published procedure, images a second, with its MFU."""
    few = min(4, case.limit)
    ratios, ours, other = ratio(lambda: case.ours(case.batch), lambda: case.plain(few), 3, case.bench.finish)
    scaled = [r * case.batch / few for r in ratios]
    per_image = ours / case.batch
    evaluations, whole, maps = (
        case.cost[k] for k in ("network_evaluations", "gflops_per_evaluation", "gflops_modulations")
    )
    needed = (evaluations * (whole - maps) + maps) / 1e3
    net = case.denoiser.net
    reasons = "; ".join(net.fallbacks) if isinstance(net, FixedShapeNet) else ""
    note = f"batch {case.batch}, MFU {needed / per_image / case.bench.ceiling:.1%}" + (
        f"; {reasons}" if reasons else ""
    )
    spread = {"ratio_median": sorted(scaled)[1], "ratio_min": min(scaled), "ratio_max": max(scaled)}
    case.add(f"sampler, {what}, against the plain procedure", **spread, ours_seconds=per_image,
             other_seconds=other / few, value=1 / per_image, unit="images/s", note=note)  # fmt: skip


def agreement(case: Case) -> None:
    """fp32 against the plain procedure, then bf16 and fp16 against fp32, in grey levels."""
    few = min(4, case.limit)
    exact = case.grey(case.ours(few, "none"))
    for name, other in (
        ("plain procedure (fp64 state)", case.plain(few)),
        *((a, case.ours(few, a)) for a in AMP_DTYPES),
    ):
        near = ((case.grey(other) - exact).abs() <= 1).float().mean().item()
        case.add(f"{name} against fp32", value=near, unit="share within one grey level", note="random weights")


def caches(case: Case) -> None:
    """No modulations kept, all of them, and tables of neighbourhoods."""
    with torch.inference_mode(), autocast("bf16", case.bench.device):
        kept = case.denoiser.modulations(case.maps[: case.batch])
        whole = sum(t.numel() * t.element_size() for layer in kept for t in layer)
        del kept
    base = case.bench.seconds(lambda: case.ours(case.batch, cache=0.0))
    for name, budget in (("all modulations kept", whole), ("modulations as tables", whole - 1)):
        seconds = case.bench.seconds(partial(case.ours, case.batch, cache=budget))
        case.add(f"{name}, against none kept", ratio_median=base / seconds, ours_seconds=seconds / case.batch,
                 other_seconds=base / case.batch, value=whole / case.batch / 1e6, unit="MB an image as maps")  # fmt: skip


def fixed_shapes(case: Case, *, compile: bool) -> None:
    """The same with CUDA graphs, compiled or not, weights kept in bf16."""
    plain_net, largest = case.denoiser.net, case.batch
    stored, dtype = copy.deepcopy(plain_net), amp_dtype("bf16", case.bench.device)
    if dtype is not None:
        store_weights(stored, dtype)
    backend = "inductor" if case.bench.device.type == "cuda" else "eager"

    def attempt(batch: int) -> None:
        case.denoiser.net = FixedShapeNet(stored, compile=compile, backend=backend)
        case.ours(batch)

    try:
        case.batch = probe_batch(attempt, start=largest, limit=largest)
        against_plain(case, "compiled, CUDA graph" if compile else "CUDA graph")
    finally:
        case.denoiser.net, case.batch = plain_net, largest


def training(bench: Bench, name: str, *, compile: bool) -> None:
    """Steps a second: bf16, fused AdamW, channels last."""
    case = Case(bench, name)
    denoiser = case.denoiser.train()
    if compile:
        denoiser.net.compile(backend="inductor" if bench.device.type == "cuda" else "eager")
    optimizer = torch.optim.AdamW(denoiser.parameters(), 1e-4, fused=True)
    images = torch.randn(8, *case.shape, device=bench.device) * 0.5
    maps = case.maps.repeat(8 // len(case.maps) + 1, 1, 1, 1)

    def step(batch: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast("bf16", bench.device):
            loss = diffusion_loss(denoiser, images[:batch], maps[:batch]).loss
        loss.backward()
        optimizer.step()

    batch = probe_batch(step, start=8, limit=8)
    seconds = bench.seconds(lambda: step(batch), rounds=5)
    mfu = 3 * case.cost["gflops_per_evaluation"] / 1e3 * batch / seconds / bench.ceiling
    note = f"batch {batch}, {batch / seconds:.3g} images/s, MFU {mfu:.1%}"
    case.add(f"training{', compiled' if compile else ''}", value=1 / seconds, unit="steps/s", note=note)


def one_model(bench: Bench, name: str) -> None:
    """All rows of one model, but for training."""
    case = Case(bench, name)
    agreement(case)
    case.batch = probe_batch(case.ours, start=min(8, case.limit), limit=case.limit)
    case.add("largest batch found by the probe", value=case.batch, unit="images")
    bench.attempt(f"{name}: sampler", lambda: against_plain(case, "bf16"))
    bench.attempt(f"{name}: caches", lambda: caches(case))
    bench.attempt(f"{name}: CUDA graph", lambda: fixed_shapes(case, compile=False), 15)
    if name != "edm_l128":
        bench.attempt(
            f"{name}: compiled", lambda: fixed_shapes(case, compile=True), 0 if bench.tiny else COMPILE_SECONDS
        )


def main(arguments: list[str] | None = None) -> None:
    """Run what there is time for, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=["published", "tiny"], default="published")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.csv")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --size tiny runs the same code small")
    bench = Bench(torch.device(options.device), options.size == "tiny", time.monotonic() + 60 * options.minutes)
    bench.attempt("ceiling", lambda: matmul_ceiling(bench))
    for name in MODELS:
        bench.attempt(name, partial(one_model, bench, name), 20)
        bench.attempt(f"{name}: training", partial(training, bench, name, compile=False), 15)
    needs = 0 if bench.tiny else 1.5 * COMPILE_SECONDS
    bench.attempt("edm_l64: training, compiled", lambda: training(bench, "edm_l64", compile=True), needs)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(bench.rows)


if __name__ == "__main__":
    main()
