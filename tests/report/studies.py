"""A study and frames made up for the report."""

import numpy as np

from raysyn.types import FrameArrays


def study(models: tuple[str, ...] = ("edm", "edm_l128"), steps: tuple[int, ...] = (5, 8)) -> list[dict]:
    rows = [
        {"trained_on": "phantom", "fd_lite0": 12.0, "mean_dice": 0.96, "mean_dice_low": 0.95, "mean_dice_high": 0.97}
    ]
    for m, model in enumerate(models):
        for num_steps in steps:
            dice = 0.93 + 0.001 * num_steps + 0.004 * m
            rows.append(
                {"trained_on": "synthetic", "model": model, "space": "latent" if m else "pixel", "solver": "heun"}
                | {
                    "num_steps": num_steps,
                    "num_function_evals": 2 * num_steps - 1,
                    "seconds_per_image": num_steps / (m + 1),
                }
                | {"fd_lite0": 100.0 - num_steps - m, "fd_lite0_low": 80.0, "fd_lite0_high": 120.0}
                | {"mean_dice": dice, "mean_dice_low": dice - 0.01, "mean_dice_high": dice + 0.01}
                | {"cost/fit_cpu_seconds": 100.0, "cost/sample_cpu_seconds": 10.0 * num_steps}
                | {"cost/total_cpu_seconds": 100.0 + 10 * num_steps}
            )
    return rows


def frames(count: int, source: str = "phantom", masks: list[str] | None = None, shift: int = 0) -> FrameArrays:
    label_map = np.zeros((count, 16, 16), np.uint8)
    label_map[:, 4:, 2:14] = 2
    for i in range(count):
        label_map[i, 6:10, 3 + (i + shift) % 5 :][:, :4] = 1
    return FrameArrays(
        image_u8=np.random.default_rng(count).integers(0, 255, (count, 16, 16), dtype=np.uint8),
        label_map=label_map,
        view=np.zeros(count, np.uint8),
        phase=np.zeros(count, np.uint8),
        spacing_mm=np.ones((count, 2), np.float32),
        frame_id=[f"{source}-{i}" for i in range(count)],
        patient_id=[f"p{i}" for i in range(count)],
        mask_frame_id=masks or [""] * count,
        source=[source] * count,
    )
