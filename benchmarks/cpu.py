"""`make bench`: side-by-side ratios on this machine's CPU, into benchmarks/results/cpu.csv.

Each row alternates two procedures in one process and reports the median ratio of their CPU times with its spread: (a) our
sampler against a plain, faithful implementation of the published procedure at equal weights, solver and steps; (b) our
network against diffusers' UNet2DModel of equal width; (c) cost against image size and batch; (d), (e) what Ray adds and
what a second actor is worth (ray_overhead.py).
"""

from __future__ import annotations

import copy
import csv
import datetime
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import ray_overhead
from benchmarks.plain import PLAIN_BATCH, plain_heun, ratio
from raysyn.compose import load_model
from raysyn.diffusion.batching import keep_freed_memory
from raysyn.diffusion.generate import generate
from raysyn.models import build_denoiser, build_vae
from raysyn.nets.codecs import LatentCodec, PixelCodec
from raysyn.nets.fixed_shape import FixedShapeNet, store_weights
from raysyn.nets.precision import amp_dtype
from raysyn.report.write import machine

RESULTS = Path(__file__).parent / "results" / "cpu.csv"
COLUMNS = ("name", "size", "ratio_median", "ratio_min", "ratio_max", "ours_seconds", "other_seconds", "machine", "date")


FEW_STEPS = ("dpmpp_2m", 3)  # benchmarks/few_steps.py
OUR_BATCH = 32  # the demo's (synthesize.batch_size)
LARGE_BATCH = 8  # at laptop size, where more only takes minutes
measure = partial(ratio, clock=time.process_time)  # one thread: other processes' share of the machine is left out


def demo_denoiser(name: str, image_size: int, scale: str = "demo"):
    """(config, denoiser with all layers awake, maps [OUR_BATCH, 10, H, W], shape of x)."""
    torch.manual_seed(0)
    config = load_model(name, scale)
    denoiser = build_denoiser(config, image_size).eval()
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.02 * torch.randn_like(p))
    rows = np.add.outer(np.arange(image_size), np.arange(image_size)) * 5 // (2 * image_size)
    index = torch.from_numpy(np.stack([(rows + i) % 10 for i in range(OUR_BATCH)]))
    one_hot = torch.nn.functional.one_hot(index, 10).permute(0, 3, 1, 2).float()
    size = image_size // config.latent_downscale
    return config, denoiser, one_hot, (config.vae.latent_channels, size, size)


def against_plain(
    name: str, image_size: int, num_steps: int = 5, few_steps: bool = False, compiled: bool = False, scale: str = "demo"
) -> list:
    """(a): seconds an image at the same weights and seeds, decoded; ours in batches, bf16, modulations kept.

    At equal solver and steps (Heun) the images agree to rounding in fp32, which is checked. With `few_steps` ours is
    what benchmarks/few_steps.py found to reach the task Dice of Heun with 25 steps. `compiled` is synthesize.compile.
    """
    config, published, one_hot, shape = demo_denoiser(name, image_size, scale)
    vae = build_vae(config).eval() if config.space == "latent" else None
    codec = LatentCodec(vae) if vae else PixelCodec()
    own_codec = LatentCodec(copy.deepcopy(vae).to(memory_format=torch.channels_last)) if vae else codec
    sector = torch.ones(OUR_BATCH, 1, image_size, image_size)
    denoiser = copy.deepcopy(published).to(memory_format=torch.channels_last)
    own = config.sampler
    batch, few = (OUR_BATCH, 2 * PLAIN_BATCH) if scale == "demo" else (LARGE_BATCH, PLAIN_BATCH)
    own.solver, own.num_steps = FEW_STEPS if few_steps else ("heun", num_steps)

    def ours(amp: str = "bf16", count: int = batch):
        options = {"shape": shape, "amp": amp, "modulation_cache_bytes": 1 << 30}
        x = generate(denoiser, one_hot[:count], range(count), own, **options)
        return own_codec.decode(x, sector[:count])

    def plain():
        x = plain_heun(published, one_hot[:few], range(few), shape, num_steps, own.sigma_min, own.sigma_max)
        return torch.cat([codec.decode(part, sector[: len(part)]) for part in x.split(PLAIN_BATCH)])

    if not few_steps:
        difference = float((ours("none", few) - plain()).abs().max())
        assert difference < 1e-3 * float(plain().abs().max()), f"the two procedures differ by {difference}"
    if compiled:
        if (dtype := amp_dtype("bf16", torch.device("cpu"))) is not None:
            store_weights(denoiser.net, dtype)
        denoiser.net = net = FixedShapeNet(denoiser.net, graphs=False)
        ours()
        assert not net.fallbacks, net.fallbacks
    ratios, ours_seconds, plain_seconds = measure(ours, plain, 5 if num_steps < 10 else 3)
    what = f"{own.solver} {own.num_steps}" + (f" for heun {num_steps}, equal task Dice" if few_steps else "")
    of = "" if scale == "demo" else f" ({scale})"
    title = f"sampler{' (compiled)' if compiled else ''} against the plain procedure: {name}{of}, {what}"
    return [title, image_size, [r * batch / few for r in ratios], ours_seconds / batch, plain_seconds / few]


def against_diffusers(image_size: int = 64) -> list:
    """(b): one evaluation of our unconditional-width net and of UNet2DModel with the same channels and blocks."""
    from diffusers import UNet2DModel

    _, denoiser, one_hot, shape = demo_denoiser("edm", image_size)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1)
    other = UNet2DModel(
        image_size // 2, in_channels=4 + 10, out_channels=4, block_out_channels=(24, 48), norm_num_groups=6, **blocks
    ).eval()
    one_hot = one_hot[:16]
    x, sigma = torch.randn(16, *shape), torch.ones(16)
    folded = torch.cat([torch.nn.functional.pixel_unshuffle(x, 2), one_hot[:, :, ::2, ::2]], 1)
    modulations = denoiser.modulations(one_hot)
    with torch.inference_mode():
        ratios = measure(lambda: denoiser(x, sigma, one_hot, modulations), lambda: other(folded, 10).sample)
    return ["one evaluation against diffusers' UNet2DModel of equal width (no SPADE)", image_size, *ratios]


def growth(image_size: int) -> list:
    """(c): cost of an image at twice the side against this one, the same net and batch."""

    def sampling(size: int) -> Callable[[], object]:
        config, denoiser, one_hot, shape = demo_denoiser("edm", size)
        options = {"shape": shape, "modulation_cache_bytes": 1 << 30}
        return lambda: generate(denoiser, one_hot[:4], [0, 1, 2, 3], config.sampler, **options)

    ratios = measure(sampling(image_size), sampling(2 * image_size))
    return ["cost of an image at twice the side against this size: edm", image_size, *ratios]


def main() -> None:
    """Run all rows and write the CSV."""
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [
        against_plain("edm_l128", 64),
        against_plain("edm_l64", 64),
        against_plain("edm", 64),
        against_plain("edm", 128, 3),
        against_plain("edm_l128", 128, scale="laptop"),
        against_plain("edm_l64", 128, scale="laptop"),
        against_plain("edm", 128, 3, scale="laptop"),
        against_plain("edm_l128", 64, compiled=True),
        against_plain("edm_l64", 64, compiled=True),
        against_plain("edm_l128", 64, 25, few_steps=True),
        against_plain("edm", 64, 25, few_steps=True),
        against_diffusers(),
        growth(32),
        growth(64),
    ]
    write_rows([*rows, *ray_overhead.rows()])


def write_rows(rows: list[list], renew: bool = True) -> None:
    """Write `rows` (name, size, ratios, seconds of ours, of the other) and print them.

    Other machines' rows stay; without `renew` this one's others too.
    """
    with RESULTS.open(newline="") as file:
        known = list(csv.DictReader(file))
    cells = {(row["name"], row["size"], row["machine"]): list(row.values()) for row in known}
    if renew:
        cells = {key: row for key, row in cells.items() if key[2] != machine()}
    for name, size, ratios, ours, other in rows:
        numbers = [statistics.median(ratios), min(ratios), max(ratios), ours, other]
        said = [f"{v:.4g}" for v in numbers]
        cells[name, str(size), machine()] = [name, str(size), *said, machine(), datetime.date.today().isoformat()]
        print(f"{name} ({size} px): {numbers[0]:.3f} [{numbers[1]:.3f}, {numbers[2]:.3f}]")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *cells.values()])


if __name__ == "__main__":
    main()
