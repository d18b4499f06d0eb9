"""Few-step study: network evaluations against task Dice, for every solver and for grids at the cheapest count.

`python -m benchmarks.few_steps runs/demo --seconds 500` goes on where it was and stops after so many seconds; what is
measured lies in benchmarks/results/few_steps.csv (`--into` names another file), a row a (model, sampler, seed). `--plot`
draws few_steps.png and names the cheapest sampler within the noise of the best. A seed stands for its own draw of masks,
warps and noise and its own training of the task; every sampler of a seed has the same masks and the same starting noise.
Test patients are phantom patients of this study alone, so that what it chooses is not chosen on those of any table.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from raysyn.compose import load_job
from raysyn.config import SamplerConfig, TaskConfig, WarpConfig
from raysyn.data.frames import read_arrays
from raysyn.data.masks import warp_label_map
from raysyn.data.phantom import phantom_patient
from raysyn.diffusion.generate import num_network_evals
from raysyn.labels import to_task_classes
from raysyn.metrics.overlap import dice_by_region, mean_of_means
from raysyn.nets import precision as numbers
from raysyn.pipeline import FittedModel, load_model_dir, synthesize_images
from raysyn.tasks.segmentation import predict_label_maps, train_segmentation
from raysyn.types import FrameArrays

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    *("model", "solver", "num_steps", "evaluations", "sigma_max", "rho", "seed"),
    *("dice", "cpu_seconds_per_image", "num_frames", "task_steps"),
)
NUM_TRAIN, NUM_VALIDATION, TASK_STEPS, TASK_BATCH = 160, 24, 240, 8
TEST_PATIENTS = range(10_000, 10_075)  # of the phantom's seed 0; a study's own patients count from 0
SEEDS = (0, 1)
EVALUATIONS = {  # ddim without noise is euler in these units; generalised with the linear schedule is heun
    "dpmpp_2m": (3, 5, 9, 2),
    "heun": (5, 9, 3, 49),  # 49: the published sampler of record, 25 steps
    "euler": (3, 5, 9),
    "dpmpp_3m": (3, 5),
    "ddpm": (5, 9),
    "stochastic_heun": (5, 9),
}
GRIDS = {  # other grids than the model's own at the cheapest count that works
    "edm_l128": [(5.0, 7.0), (2.5, 7.0), (20.0, 7.0), (80.0, 7.0), (10.0, 3.0), (10.0, 10.0)],
    "edm_l64": [(5.0, 7.0), (10.0, 7.0), (80.0, 7.0)],  # measured at laptop size, whose own sigma_max is 20
}
GRID_EVALUATIONS = 3
WORKS = 0.02  # Dice
DICE_TICKS = (0.5, 0.7, 0.8, 0.9, 0.94, 0.95, 0.96)


def samplers(name: str, own: SamplerConfig) -> Iterator[SamplerConfig]:
    """Every cell of the study for a model whose own sampler gives the range of noise levels."""
    for solver, counts in EVALUATIONS.items():
        for count in counts:
            steps = (count + 1) // 2 if "heun" in solver else count
            churn = 10.0 if solver == "stochastic_heun" else 0.0
            yield dataclasses.replace(own, solver=solver, num_steps=steps, s_churn=churn)
    for high, rho in GRIDS.get(name, []):
        yield dataclasses.replace(own, solver="dpmpp_2m", num_steps=GRID_EVALUATIONS, sigma_max=high, rho=rho)


def draw(model: FittedModel, masks: FrameArrays, sampler: SamplerConfig, seed: int) -> tuple[FrameArrays, float]:
    """(the masks' frames with warped maps and drawn images, CPU seconds an image, decoding included)."""
    maps = np.stack([warp_label_map(m, WarpConfig(), 1000 * seed + i) for i, m in enumerate(masks.label_map)])
    images, clock = [], time.process_time()
    for start in range(0, len(masks), 16):
        part = slice(start, start + 16)
        seeds = [100_000 * (seed + 1) + i for i in range(len(masks))][part]
        images.append(synthesize_images(model, maps[part], masks.view[part], seeds, sampler, amp="bf16"))
    seconds = (time.process_time() - clock) / len(masks)
    return dataclasses.replace(masks, image_u8=np.concatenate(images), label_map=maps), seconds


def test_frames(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(images, task classes) of the patients that this study tests on."""
    frames = [frame for patient in TEST_PATIENTS for frame in phantom_patient(0, patient, image_size)]
    return np.stack([f.image for f in frames]), to_task_classes(np.stack([f.label_map for f in frames]))


def dice_of(
    model: FittedModel,
    frames: dict[str, FrameArrays],
    tested: tuple[np.ndarray, np.ndarray],
    sampler: SamplerConfig,
    task: TaskConfig,
) -> tuple[float, float]:
    """(mean Dice on the frames `tested`, CPU seconds an image) of a task trained on what `sampler` draws."""
    sets, seconds = {}, 0.0
    for split, count in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        chosen = np.random.default_rng(task.seed).permutation(len(frames[split]))[:count]
        sets[split], seconds_here = draw(model, frames[split].take(chosen), sampler, task.seed)
        seconds = seconds or seconds_here
    fitted = train_segmentation(sets["train"], sets["validation"], task)
    images, truth = tested
    return mean_of_means(dice_by_region(predict_label_maps(fitted, images), truth)), seconds


def precision(storage: Path, path: Path, count: int = 32) -> None:
    """Share of pixels within one grey level of fp32, and the largest difference, for bf16 and fp16 on trained nets.

    Also of an amp that this CPU has to emulate: what it draws is asked for, not how fast.
    """
    numbers.computes_in = functools.cache(lambda amp, device_type: True)
    rows = []
    for manifest in (json.loads(p.read_text()) for p in sorted(storage.glob("fit/*/manifest.json"))):
        model = load_model_dir(manifest["model_dir"]).to("cpu")
        frames = read_arrays(manifest["frames"], "train", limit=count)
        drawn = {
            amp: synthesize_images(model, frames.label_map, frames.view, range(count), amp=amp).astype(int)
            for amp in ("none", "bf16", "fp16")
        }
        for amp in ("bf16", "fp16"):
            apart = np.abs(drawn[amp] - drawn["none"])
            rows.append((manifest["model"], amp, f"{(apart <= 1).mean():.5f}", int(apart.max()), count))
            print(*rows[-1], flush=True)
    with path.open("w", newline="") as file:
        heading = ("model", "amp", "share_within_one_grey_level", "largest_difference", "num_images")
        csv.writer(file, lineterminator="\n").writerows([heading, *rows])


def read(path: Path) -> list[dict[str, str]]:
    """What is measured so far."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def measure(storage: Path, path: Path, seconds: float, names: list[str]) -> bool:
    """Measure what is missing for at most about so many seconds; whether all is there."""
    stop = time.monotonic() + seconds
    manifests = [json.loads(p.read_text()) for p in sorted(storage.glob("fit/*/manifest.json"))]
    task = load_job("compare", ["scale=demo"]).segmentation
    done = {tuple(row[c] for c in COLUMNS[:7]) for row in read(path)}
    for manifest in sorted((m for m in manifests if m["model"] in names), key=lambda m: names.index(m["model"])):
        model = load_model_dir(manifest["model_dir"])
        frames = {split: read_arrays(manifest["frames"], split) for split in ("train", "validation")}
        tested = test_frames(frames["train"].image_u8.shape[-1])
        for sampler in samplers(manifest["model"], model.config.sampler):
            count = num_network_evals(sampler, model.denoiser.precondition)
            own = (manifest["model"], sampler.solver, sampler.num_steps, count, sampler.sigma_max, sampler.rho)
            for seed in SEEDS:
                cell = tuple(map(str, (*own, seed)))
                if cell in done:
                    continue
                if time.monotonic() > stop:
                    return False
                run = dataclasses.replace(task, num_steps=TASK_STEPS, batch_size=TASK_BATCH, seed=seed)
                dice, cost = dice_of(model, frames, tested, sampler, run)
                write(path, (*cell, f"{dice:.5f}", f"{cost:.5f}", NUM_TRAIN, TASK_STEPS))
    return True


def write(path: Path, row: tuple) -> None:
    """Append a row, under the heading."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, row] if new else [row])
    print(*row, flush=True)


def cells(rows: list[dict[str, str]]) -> dict[tuple, list[float]]:
    """Dice of every seed by (model, solver, evaluations, sigma_max, rho)."""
    found: dict[tuple, list[float]] = {}
    for r in rows:
        key = (r["model"], r["solver"], int(r["evaluations"]), float(r["sigma_max"]), float(r["rho"]))
        found.setdefault(key, []).append(float(r["dice"]))
    return found


def summary(rows: list[dict[str, str]]) -> tuple[float, dict[str, tuple]]:
    """(noise, {model: (best cell, its Dice, cheapest cell within the noise of it, its Dice)}).

    Noise is the standard deviation of one run within a seed: all cells of a seed have the same masks and starting
    weights, so what a seed does to all of them alike is taken off. It is taken from the cells that work (`WORKS` below
    the best at most). Means that differ by less than twice the sd of such a difference are not told apart.
    """
    found = {k: v for k, v in cells(rows).items() if len(v) == len(SEEDS)}
    chosen, squares, free = {}, 0.0, 0
    models = {model: {k: v for k, v in found.items() if k[0] == model} for model in sorted({k[0] for k in found})}
    for cells_here in models.values():
        best = max(np.mean(v) for v in cells_here.values())
        table = np.array([v for v in cells_here.values() if np.mean(v) >= best - WORKS])
        rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        squares, free = squares + float((rest**2).sum()), free + (len(table) - 1) * (len(SEEDS) - 1)
    noise = float(np.sqrt(squares / max(free, 1)))
    for model, cells_here in models.items():
        means = {key: float(np.mean(v)) for key, v in cells_here.items()}
        top = max(means, key=lambda key: means[key])
        near = [key for key in means if means[key] >= means[top] - 2 * noise * np.sqrt(2 / len(SEEDS))]
        cheapest = min(near, key=lambda key: (key[2], -means[key]))
        chosen[model] = (top, means[top], cheapest, means[cheapest])
    return noise, chosen


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Dice against evaluations, a panel a model, a line a solver on the model's own grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = cells(rows)
    models = sorted({key[0] for key in found})
    figure, panels = plt.subplots(1, len(models), figsize=(5.4 * len(models), 4), sharey=True, squeeze=False)
    for axes, model in zip(panels[0], models):
        for solver in EVALUATIONS:
            line = sorted((k[2], v) for k, v in found.items() if k[:2] == (model, solver) and k[3:] == (10.0, 7.0))
            middle = [float(np.mean(v)) for _, v in line]
            spread = [[m - min(v) for m, (_, v) in zip(middle, line)], [max(v) - m for m, (_, v) in zip(middle, line)]]
            axes.errorbar([n for n, _ in line], middle, spread, marker="o", markersize=4, capsize=2, label=solver)
        axes.set(title=model, xlabel="network evaluations an image", xscale="log")
        axes.set_xticks([2, 3, 5, 9, 17, 49], ["2", "3", "5", "9", "17", "49"], minor=False)
        axes.set_yscale("logit")  # what works lies close together
        axes.set_ylim(0.5, 0.968)
        axes.set_yticks(DICE_TICKS, [f"{tick:g}" for tick in DICE_TICKS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("mean Dice on held-out phantom frames")
    panels[0][-1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("storage", nargs="?", type=Path, default=Path("runs/demo"), help="storage of a finished demo")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--models", nargs="+", default=["edm_l128", "edm"])
    parser.add_argument(
        "--into", default="few_steps.csv", help="file of benchmarks/results/ for models of another size"
    )
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--precision", action="store_true", help="only bf16 and fp16 against fp32, into precision.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.precision:
        return precision(options.storage, RESULTS / "precision.csv")
    path = RESULTS / options.into
    if not options.plot and not measure(options.storage, path, options.seconds, options.models):
        print("not all measured yet: run it again")
    noise, chosen = summary(read(path))
    print(f"noise of one run within a seed: {noise:.4f}")
    for best, best_dice, cheapest, dice in chosen.values():
        print(f"best {best} {best_dice:.4f}; cheapest within its noise {cheapest} {dice:.4f}")
    if options.plot:
        plot(read(path), RESULTS / "few_steps.png")


if __name__ == "__main__":
    main()
