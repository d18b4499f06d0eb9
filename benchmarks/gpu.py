"""`python benchmarks/gpu.py`: what a CUDA device makes of the published sizes, in under eight minutes.

Needs torch 2.11 or later, diffusers and numpy; no Ray, MLflow or network. Weights are random: time does not depend on
them. Rows come in the order of their worth; when the time is up the rest are written down as left out. A row that
fails says why and the others go on. `--device cpu --size tiny` runs the same code anywhere. `--fit 300` fits edm_l64
to phantom frames for 300 steps each with and without bf16, compilation and CUDA graphs, after the rest (alone with
`--only-fit`), in as many minutes again; that needs scipy and pyarrow beside.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.gpu_bench import MODELS, Bench, Case, exact_convolutions
from benchmarks.plain import ratio
from raysyn.diffusion.batching import probe_batch
from raysyn.diffusion.loss import diffusion_loss
from raysyn.nets.fixed_shape import FixedShapeNet, store_weights
from raysyn.nets.precision import AMP_DTYPES, amp_dtype, autocast, precision

COMPILE_SECONDS = 100  # what compiling one of the published nets may take


def device_row(bench: Bench) -> None:
    """What was measured on, and with."""
    note = f"torch {torch.__version__}, {bench.low} for bf16"
    if bench.device.type == "cuda":
        of = torch.cuda.get_device_properties(bench.device)
        note += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        note += f", {of.multi_processor_count} multiprocessors, {of.total_memory / 2**30:.0f} GiB"
    bench.add("device", note=note)


def ten_products(a: torch.Tensor, b: torch.Tensor) -> None:
    for _ in range(10):
        a @ b


def matmul_ceiling(bench: Bench) -> None:
    """The fastest matrix product in 16 bits that this device was seen to do, TFLOP/s (fp32 where it has no bf16)."""
    best, dtype = 0.0, amp_dtype("bf16", bench.device) or torch.float32
    for side in (256,) if bench.tiny else (4096, 8192, 16384):
        a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in "ab")
        seconds = bench.seconds(partial(ten_products, a, b)) / 10
        best = max(best, 2 * side**3 / seconds / 1e12)
    bench.ceiling = best
    bench.add(f"ceiling: {bench.low} matrix product", value=best, unit="TFLOP/s")


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
    """The plain procedure, bf16 and fp16 against fp32, decoded, in grey levels."""
    few = min(4, case.limit)
    with exact_convolutions():
        exact = case.grey(case.ours(few, "none"))
        case.agreement("plain procedure (fp64 state)", case.grey(case.plain(few)), exact)
    case.agreement("fp32 with torch's own TF32", case.grey(case.ours(few, "none")), exact)
    for amp in AMP_DTYPES:
        if precision(amp, case.bench.device) == amp:
            case.agreement(amp, case.grey(case.ours(few, amp)), exact)


def decoding(case: Case) -> None:
    """From latents to images: as it is done, in fp32, and what 16 bits would gain and change."""
    x = case.ours(case.batch)
    batch = probe_batch(lambda n: case.grey(x[:n]), start=case.batch, limit=case.batch)
    ratios, low, own = ratio(lambda: case.grey(x[:batch], "bf16"), lambda: case.grey(x[:batch]), 3, case.bench.finish)
    spread = {"ratio_median": sorted(ratios)[1], "ratio_min": min(ratios), "ratio_max": max(ratios)}
    case.add(f"decoding in {case.bench.low} against fp32", **spread, ours_seconds=low / batch, other_seconds=own / batch,
             value=batch / own, unit="images/s in fp32", note=f"batch {batch}")  # fmt: skip
    with exact_convolutions():
        exact = case.grey(x[:batch])
    case.agreement(f"decoding in {case.bench.low}", case.grey(x[:batch], "bf16"), exact)


def kernels_by_trial(case: Case) -> None:
    """What cuDNN's choice of kernels by trial gains over its rules."""
    base = case.bench.seconds(lambda: case.ours(case.batch))
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        seconds = case.bench.seconds(lambda: case.ours(case.batch))
    finally:
        torch.backends.cudnn.benchmark = before
    case.add("cuDNN's kernels by trial, against by rule", ratio_median=base / seconds,
             ours_seconds=seconds / case.batch, other_seconds=base / case.batch)  # fmt: skip


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

    def attempt(batch: int) -> None:
        case.denoiser.net = FixedShapeNet(stored, compile=compile, backend=case.bench.backend)
        case.ours(batch)

    try:
        case.batch = probe_batch(attempt, start=largest, limit=largest)
        against_plain(case, "compiled, CUDA graph" if compile else "CUDA graph")
    finally:
        case.denoiser.net, case.batch = plain_net, largest


def training(bench: Bench, name: str, *, compile: bool) -> None:
    """Steps a second: bf16, fused AdamW, channels last, noise on the device as a fit has it."""
    case = Case(bench, name)
    denoiser, most = case.denoiser.train(), len(case.maps)
    if compile:
        denoiser.net.compile(backend=bench.backend)
    optimizer = torch.optim.AdamW(denoiser.parameters(), 1e-4, fused=True)
    images, noise = torch.randn(2, most, *case.shape, device=bench.device)
    sigma = denoiser.precondition.draw_sigma(most).to(bench.device)

    def step(batch: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        given = {"sigma": sigma[:batch], "noise": noise[:batch]}
        with autocast("bf16", bench.device):
            loss = diffusion_loss(denoiser, 0.5 * images[:batch], case.maps[:batch], **given).loss
        loss.backward()
        optimizer.step()

    batch = probe_batch(step, start=min(8, most), limit=most)
    seconds = bench.seconds(lambda: step(batch), rounds=5)
    mfu = 3 * case.cost["gflops_per_evaluation"] / 1e3 * batch / seconds / bench.ceiling
    note = f"batch {batch}, {batch / seconds:.3g} images/s, MFU {mfu:.1%}"
    case.add(f"training in {bench.low}{', compiled' if compile else ''}", value=1 / seconds, unit="steps/s", note=note)


def one_model(bench: Bench, name: str) -> None:
    """All rows of one model, but for training."""
    case = Case(bench, name)
    bench.attempt(f"{name}: agreement", lambda: agreement(case))
    case.batch = probe_batch(case.ours, start=min(8, case.limit), limit=case.limit)
    case.add("largest batch found by the probe", value=case.batch, unit="images")
    bench.attempt(f"{name}: sampler", lambda: against_plain(case, bench.low))
    bench.attempt(f"{name}: caches", lambda: caches(case))
    bench.attempt(f"{name}: CUDA graph", lambda: fixed_shapes(case, compile=False), 15)
    if name != "edm_l128":
        needs = 0 if bench.tiny else COMPILE_SECONDS
        bench.attempt(f"{name}: compiled", lambda: fixed_shapes(case, compile=True), needs)
    if case.config.space == "latent":
        bench.attempt(f"{name}: decoding", lambda: decoding(case))
    bench.attempt(f"{name}: cuDNN", lambda: kernels_by_trial(case), 10)


def all_nets(bench: Bench) -> None:
    """Sampling and training of each model."""
    for name in MODELS:
        bench.attempt(name, partial(one_model, bench, name), 20)
        bench.attempt(f"{name}: training", partial(training, bench, name, compile=False), 15)
    needs = 0 if bench.tiny else 1.5 * COMPILE_SECONDS
    bench.attempt("edm_l64: training, compiled", lambda: training(bench, "edm_l64", compile=True), needs)


def main(arguments: list[str] | None = None) -> None:
    """Run what there is time for, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=["published", "tiny"], default="published")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--fit", type=int, default=0, metavar="STEPS", help="fit edm_l64 for so many steps each way")
    parser.add_argument("--only-fit", action="store_true", help="leave out all rows but those of --fit")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.csv")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --size tiny runs the same code small")
    if options.fit < 0 or (options.only_fit and not options.fit):
        parser.error("--fit: give the number of steps, 1 or more")
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def stop() -> float:
        return time.monotonic() + 60 * options.minutes

    bench = Bench(torch.device(options.device), options.size == "tiny", stop(), options.output)
    bench.attempt("device", lambda: device_row(bench), 0)
    bench.attempt("ceiling", lambda: matmul_ceiling(bench))
    if not options.only_fit:
        all_nets(bench)
    if options.fit:
        from benchmarks.gpu_fit import fits  # needs more packages than the rest

        bench.stop = stop()
        fits(bench, options.fit)


if __name__ == "__main__":
    main()
