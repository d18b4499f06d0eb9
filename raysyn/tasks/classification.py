"""View classification: 2CH or 4CH from the image alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raysyn.config import TaskConfig
from raysyn.metrics.bootstrap import lowest_share, with_spread
from raysyn.metrics.classify import auroc, calibration_error
from raysyn.tasks.fitting import FittedTask, Report, fit_task
from raysyn.tasks.mixing import mix_frames
from raysyn.tasks.nets import build_classifier
from raysyn.types import VIEWS, FrameArrays, UserError


def train_classification(
    train: FrameArrays,
    validation: FrameArrays,
    task: TaskConfig,
    *,
    real: FrameArrays | None = None,
    report: Report | None = None,
) -> FittedTask:
    """Train on `train`, keep the best by accuracy on `validation`. Raises UserError for an empty set or a single view."""
    for name, frames in (("train", train), ("validation", validation)):
        if len(frames) == 0:
            raise UserError(f"{name} frames: there are none; a task needs at least 1")
    if len(np.unique(train.view)) < len(VIEWS):
        only = VIEWS[int(train.view[0])]
        raise UserError(f"train frames: all are {only}; view classification needs frames of both {' and '.join(VIEWS)}")
    torch.manual_seed(task.seed)

    def score(fitted: FittedTask) -> float:
        scores = predict_view_scores(fitted, validation.image_u8)
        likelihood = np.where(validation.view == 1, scores, 1 - scores).clip(1e-6)
        # Accuracy first; the likelihood, below 1 % of it, tells equals apart.
        return float(((scores > 0.5) == (validation.view == 1)).mean() + 1e-3 * np.log(likelihood).mean())

    def loss_of(logits: Tensor, label: Tensor, index: np.ndarray, frames: FrameArrays) -> Tensor:
        target = torch.from_numpy(frames.view[index].astype(np.int64)).to(logits.device)
        return F.cross_entropy(logits, target)

    size = train.image_u8.shape[1]
    return fit_task(build_classifier(task), task, mix_frames(train, real, task), loss_of, score, size, report)


def predict_view_scores(fitted: FittedTask, image_u8: np.ndarray) -> np.ndarray:
    """Probability of 4CH, float64 [N], for image_u8 [N, H, W]."""
    parts = [logits.double().softmax(1)[:, 1].numpy() for logits in fitted.logits(image_u8)]
    return np.concatenate(parts) if parts else np.empty(0)


def evaluate_classification(fitted: FittedTask, test: FrameArrays, *, seed: int = 0) -> dict[str, Any]:
    """Accuracy, AUROC from scores and calibration, each with a 95 % interval over patients and the published protocol.

    Where every frame is right a bootstrap has no doubt: the accuracy's lower end is then that of patients without an error.
    Raises UserError when all test frames show one view.
    """
    scores = predict_view_scores(fitted, test.image_u8)
    truth = test.view == 1
    right = (scores > 0.5) == truth
    auroc(scores, truth)  # refuses frames of one view

    def auroc_of(index: np.ndarray) -> float:
        both = 0 < truth[index].sum() < len(index)
        return auroc(scores[index], truth[index]) if both else float("nan")

    found: dict[str, Any] = {"num_frames": len(test)}
    for name, statistic in {
        "view_accuracy": lambda index: float(right[index].mean()),
        "view_auroc": auroc_of,
        "view_calibration_error": lambda index: calibration_error(scores[index], truth[index]),
    }.items():
        found |= with_spread(name, statistic, test.patient_id, seed)
    if right.all():
        found |= {"view_accuracy_low": lowest_share(len(set(test.patient_id))), "view_accuracy_high": 1.0}
    return found
