"""`make bench`: side-by-side ratios on this machine's CPU, into benchmarks/results/cpu.csv.

Each row alternates two procedures in one process and reports the median ratio of their times with its spread: (a) our
sampler against a plain, faithful implementation of the published procedure at equal weights, solver and steps; (b) our
network against diffusers' UNet2DModel of equal width; (c) cost against image size and batch.
"""

from __future__ import annotations

import csv
import datetime
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from raysyn.compose import load_model
from raysyn.diffusion.generate import generate
from raysyn.diffusion.noise import karras_sigmas, seeded_noise
from raysyn.models import build_denoiser
from raysyn.report.write import machine

RESULTS = Path(__file__).parent / "results" / "cpu.csv"
COLUMNS = ("name", "size", "ratio_median", "ratio_min", "ratio_max", "ours_seconds", "other_seconds", "machine", "date")
ROUNDS = 5


def plain_heun(denoiser, one_hot, seeds, shape, num_steps: int, low: float, high: float) -> torch.Tensor:
    """The published procedure, from REFERENCE: batches of 2, SPADE's convolutions at every evaluation, fp64 state."""
    parts = []
    sigmas = karras_sigmas(num_steps, sigma_min=low, sigma_max=high).tolist()
    for start in range(0, len(seeds), 2):
        maps = one_hot[start : start + 2]
        x = seeded_noise(seeds[start : start + 2], shape).double() * sigmas[0]
        for sigma, lower in pairwise(sigmas):
            slope = (x - denoiser(x.float(), sigma, maps).double()) / sigma
            euler = x + (lower - sigma) * slope
            if lower > 0:
                slope = 0.5 * (slope + (euler - denoiser(euler.float(), lower, maps).double()) / lower)
            x = x + (lower - sigma) * slope
        parts.append(x)
    return torch.cat(parts).float()


def ratio(ours: Callable[[], object], other: Callable[[], object]) -> tuple[list[float], float, float]:
    """(ratios other/ours of alternating rounds, median seconds of ours, of the other's), after one warm-up each."""
    ours(), other()
    times = []
    for _ in range(ROUNDS):
        pair = []
        for procedure in (ours, other):
            started = time.perf_counter()
            procedure()
            pair.append(time.perf_counter() - started)
        times.append(pair)
    seconds = [statistics.median(t[i] for t in times) for i in (0, 1)]
    return [t[1] / t[0] for t in times], seconds[0], seconds[1]


def demo_denoiser(name: str, image_size: int):
    """(denoiser with all layers awake, maps [16, 10, H, W], shape of x)."""
    torch.manual_seed(0)
    config = load_model(name, "demo")
    denoiser = build_denoiser(config, image_size).eval()
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.02 * torch.randn_like(p))
    rows = np.add.outer(np.arange(image_size), np.arange(image_size)) * 5 // (2 * image_size)
    index = torch.from_numpy(np.stack([(rows + i) % 10 for i in range(16)]))
    one_hot = torch.nn.functional.one_hot(index, 10).permute(0, 3, 1, 2).float()
    size = image_size // config.latent_downscale
    return config, denoiser, one_hot, (config.vae.latent_channels, size, size)


def against_plain(name: str, image_size: int, num_steps: int = 5) -> list:
    """(a): the same weights, seeds, solver and steps; the images agree to rounding."""
    config, denoiser, one_hot, shape = demo_denoiser(name, image_size)
    seeds = list(range(16))
    config.sampler.solver, config.sampler.num_steps = "heun", num_steps
    low, high = config.sampler.sigma_min, config.sampler.sigma_max

    def ours(amp: str = "bf16"):
        return generate(denoiser, one_hot, seeds, config.sampler, shape=shape, amp=amp, modulation_cache_bytes=1 << 30)

    def plain():
        with torch.inference_mode():
            return plain_heun(denoiser, one_hot, seeds, shape, num_steps, low, high)

    difference = float((ours("none") - plain()).abs().max())
    assert difference < 1e-3 * float(plain().abs().max()), f"the two procedures differ by {difference}"
    return [f"sampler against the plain procedure: {name}, heun {num_steps}", image_size, *ratio(ours, plain)]


def against_diffusers(image_size: int = 64) -> list:
    """(b): one evaluation of our unconditional-width net and of UNet2DModel with the same channels and blocks."""
    from diffusers import UNet2DModel

    _, denoiser, one_hot, shape = demo_denoiser("edm", image_size)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1)
    other = UNet2DModel(
        image_size // 2, in_channels=4 + 10, out_channels=4, block_out_channels=(24, 48), norm_num_groups=6, **blocks
    ).eval()
    x, sigma = torch.randn(16, *shape), torch.ones(16)
    folded = torch.cat([torch.nn.functional.pixel_unshuffle(x, 2), one_hot[:, :, ::2, ::2]], 1)
    modulations = denoiser.modulations(one_hot)
    with torch.inference_mode():
        ratios = ratio(lambda: denoiser(x, sigma, one_hot, modulations), lambda: other(folded, 10).sample)
    return ["one evaluation against diffusers' UNet2DModel of equal width (no SPADE)", image_size, *ratios]


def growth(image_size: int) -> list:
    """(c): cost of an image at twice the side against this one, the same net and batch."""
    procedures = []
    for size in (image_size, 2 * image_size):
        config, denoiser, one_hot, shape = demo_denoiser("edm", size)
        procedures.append(
            lambda d=denoiser, o=one_hot, c=config, s=shape: generate(
                d, o[:4], [0, 1, 2, 3], c.sampler, shape=s, modulation_cache_bytes=1 << 30
            )
        )
    return ["cost of an image at twice the side against this size: edm", image_size, *ratio(*procedures)]


def main() -> None:
    """Run all rows and write the CSV."""
    torch.set_num_threads(1)
    rows = [
        against_plain("edm_l128", 64),
        against_plain("edm_l64", 64),
        against_plain("edm", 64),
        against_plain("edm", 128, 3),
        against_diffusers(),
        growth(32),
        growth(64),
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name, size, ratios, ours, other in rows:
            numbers = [statistics.median(ratios), min(ratios), max(ratios), ours, other]
            cells = [name, size, *(f"{v:.4g}" for v in numbers), machine(), datetime.date.today().isoformat()]
            writer.writerow(cells)
            print(f"{name} ({size} px): {numbers[0]:.2f} [{numbers[1]:.2f}, {numbers[2]:.2f}]")


if __name__ == "__main__":
    main()
