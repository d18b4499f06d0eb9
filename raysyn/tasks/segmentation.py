"""Segmentation of LV cavity, myocardium and left atrium: 4 classes, scored by the regions of the field."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raysyn.config import TaskConfig
from raysyn.labels import TASK_CLASSES, TASK_REGIONS, to_task_classes
from raysyn.metrics.bootstrap import patient_interval, subset_protocol, with_spread
from raysyn.metrics.function import METHODS, ejection_fraction_errors
from raysyn.metrics.overlap import dice_by_region, hausdorff, mean_of_means
from raysyn.metrics.paired import by_frame
from raysyn.tasks.fitting import FittedTask, Report, fit_task
from raysyn.tasks.mixing import mix_frames
from raysyn.tasks.nets import build_segmenter
from raysyn.types import FrameArrays, UserError


def _loss(task: TaskConfig, logits: Tensor, label: Tensor) -> Tensor:
    target = torch.from_numpy(to_task_classes(label.cpu().numpy())).long().to(logits.device)
    loss = F.cross_entropy(logits, target)
    if task.loss == "dice_cross_entropy":
        p = logits.softmax(1)[:, 1:]
        t = F.one_hot(target, len(TASK_CLASSES)).permute(0, 3, 1, 2)[:, 1:].to(p.dtype)
        overlap = 2 * (p * t).sum((0, 2, 3)) / (p.sum((0, 2, 3)) + t.sum((0, 2, 3))).clamp(min=1)
        loss = loss + (1 - overlap).mean()
    return loss


def train_segmentation(
    train: FrameArrays,
    validation: FrameArrays,
    task: TaskConfig,
    *,
    real: FrameArrays | None = None,
    report: Report | None = None,
) -> FittedTask:
    """Train on `train` (mixed with `real` as the task says), keep the best by mean Dice on `validation`.

    Raises UserError for an empty set.
    """
    for name, frames in (("train", train), ("validation", validation)):
        if len(frames) == 0:
            raise UserError(f"{name} frames: there are none; a task needs at least 1")
    torch.manual_seed(task.seed)
    size = train.image_u8.shape[1]
    truth = to_task_classes(validation.label_map)

    def score(fitted: FittedTask) -> float:
        return mean_of_means(dice_by_region(predict_label_maps(fitted, validation.image_u8), truth))

    def loss_of(logits: Tensor, label: Tensor, index: np.ndarray, frames: FrameArrays) -> Tensor:
        return _loss(task, logits, label)

    return fit_task(build_segmenter(task, size), task, mix_frames(train, real, task), loss_of, score, size, report)


def predict_label_maps(fitted: FittedTask, image_u8: np.ndarray) -> np.ndarray:
    """Task classes uint8 [N, H, W] (0 to 3) for image_u8 [N, H, W]."""
    if len(image_u8) == 0:
        return np.empty((0, *image_u8.shape[1:]), np.uint8)
    return np.concatenate([logits.argmax(1).to(torch.uint8).numpy() for logits in fitted.logits(image_u8)])


def evaluate_segmentation(fitted: FittedTask, test: FrameArrays, *, seed: int = 0) -> dict[str, Any]:
    """Scores on held-out frames, each a mean with sd and a 95 % interval over patients.

    Keys: `<region>_dice`, `<region>_hausdorff_<unit>`, `<region>_hd95_<unit>` (unit: mm where every spacing is known, else
    px), each with `_sd`, `_low`, `_high` and the published protocol's `_protocol_mean` and `_protocol_sd`; `mean_dice` with
    interval and protocol; and where the frames hold ED with ES `<rule>_ef_*`, errors of the ejection fraction, spread likewise.
    `by_frame`: each frame's id, patient and Dice by region, for paired differences.
    """
    predicted, truth = predict_label_maps(fitted, test.image_u8), to_task_classes(test.label_map)
    dice = dice_by_region(predicted, truth)
    frame_scores = by_frame(test, {f"{region}_dice": values for region, values in dice.items()})
    scores: dict[str, Any] = {"num_frames": len(test), "by_frame": frame_scores}
    for region, values in dice.items():
        scores |= _summary(f"{region}_dice", values, test.patient_id, seed)
    scores |= with_spread(
        "mean_dice",
        lambda index: mean_of_means(dice, index),
        test.patient_id,
        seed,
    )
    known = bool(np.isfinite(test.spacing_mm).all())
    unit = "mm" if known else "px"
    for region in TASK_REGIONS:
        spacing = test.spacing_mm if known else np.ones_like(test.spacing_mm)
        full, most = hausdorff(predicted, truth, region, spacing)
        scores |= _summary(f"{region}_hausdorff_{unit}", full, test.patient_id, seed)
        scores |= _summary(f"{region}_hd95_{unit}", most, test.patient_id, seed)
    for method in METHODS:
        errors = ejection_fraction_errors(predicted, truth, test, method, seed=seed)
        scores |= {f"{method}_{key}": value for key, value in errors.items()}
    return scores


def _protocol(name: str, values: np.ndarray, seed: int) -> dict[str, float]:
    mean, sd = subset_protocol(values, seed=seed)
    return {f"{name}_protocol_mean": mean, f"{name}_protocol_sd": sd}


def _summary(name: str, values: np.ndarray, patients: list[str], seed: int) -> dict[str, float]:
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return {
            name: float("nan"),
            f"{name}_sd": float("nan"),
            f"{name}_low": float("nan"),
            f"{name}_high": float("nan"),
            **_protocol(name, values, seed),
        }
    low, high = patient_interval(values, patients, seed=seed)
    known = {name: float(finite.mean()), f"{name}_sd": float(finite.std()), f"{name}_low": low, f"{name}_high": high}
    return {**known, **_protocol(name, values, seed)}
