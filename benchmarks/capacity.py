"""`python -m benchmarks.capacity`: the tables of infra/CAPACITY.md. Arithmetic, not measurements.

Work is counted in FLOPs of the published network; a GPU is its peak times an assumed share of it. No GPU was measured.
"""

from __future__ import annotations

from raysyn.config import CompareJob
from raysyn.diffusion.solvers import num_function_evals

GFLOP = {64: 326, 128: 1209, 256: 4666}  # one evaluation of the published network with SPADE, batch of one
SDM, PIXEL = "sdm, guided (two networks an evaluation)", "vp, ve, edm"
SIZES = {SDM: 256, PIXEL: 256, "edm_l128": 128, "edm_l64": 64}  # what the network sees of a 256 px image
NUM_MODELS = {SDM: 1, PIXEL: 3, "edm_l128": 1, "edm_l64": 1}
NUM_NETWORKS = {SDM: 2, PIXEL: 3, "edm_l128": 1, "edm_l64": 1}  # asked at an evaluation of all models of the row
PEAK_TFLOPS = {"A100": 312, "H100": 989}  # dense bf16, the makers' figures
SHARES = (0.2, 0.3, 0.4)
IMAGES_GRID, IMAGES_LARGE = 9_000, 10_000_000
TRAIN_IMAGES, TRAIN_FACTOR = 500_000, 3  # backward costs twice the forward


def gpu_hours(flop: float, gpu: str, share: float) -> float:
    """Hours of one GPU for `flop` floating-point operations at `share` of its peak."""
    return flop / (PEAK_TFLOPS[gpu] * 1e12 * share) / 3600


def grid_evaluations() -> int:
    """Network evaluations an image over the paper's solvers and steps."""
    job = CompareJob()
    return sum(num_function_evals(solver, steps) for solver in job.solvers for steps in job.steps)


def flop(size: int, images: float, evaluations: float) -> float:
    """FLOPs to draw `images` with `evaluations` each by a network that sees `size` px."""
    return GFLOP[size] * 1e9 * images * evaluations


def row(name: str, work: float) -> str:
    """One line of a table: the work, then GPU hours at each assumed share."""
    hours = [f"{gpu_hours(work, gpu, share):,.0f}" for gpu in PEAK_TFLOPS for share in SHARES]
    return f"| {name} | {work:.2e} | " + " | ".join(hours) + " |"


def table(rows: list[tuple[str, float]]) -> str:
    """Markdown: rows of (name, FLOPs) with GPU hours."""
    heads = [f"{gpu} at {share:.0%}" for gpu in PEAK_TFLOPS for share in SHARES]
    lines = ["| | FLOP | " + " | ".join(heads) + " |", "|---|" + "---|" * (1 + len(heads))]
    return "\n".join(lines + [row(name, work) for name, work in rows])


def main() -> None:
    """Print the page's tables."""
    evaluations = grid_evaluations()
    drawn = [(name, NUM_NETWORKS[name] * flop(s, IMAGES_GRID, evaluations)) for name, s in SIZES.items()]
    fitted = sum(NUM_MODELS[name] * flop(s, TRAIN_IMAGES, TRAIN_FACTOR) for name, s in SIZES.items())
    print(f"The grid: {evaluations} evaluations an image over all solvers and steps, GPU hours\n")
    print(table([*drawn, ("all six drawn", sum(w for _, w in drawn)), ("all six fitted", fitted)]))
    print("\n10 million images, GPU hours\n")
    large = [
        (f"{'a pixel model' if name == PIXEL else name}, {label}", flop(size, IMAGES_LARGE, count))
        for name, size in SIZES.items()
        if name != SDM
        for label, count in (("Heun 25", num_function_evals("heun", 25)), ("DPM-Solver++ 8", 8))
    ]
    print(table(large))


if __name__ == "__main__":
    main()
