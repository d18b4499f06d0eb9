"""The loop that both tasks share: batches with augmentation, AdamW, the best weights by the validation score."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysyn.compose import build
from raysyn.config import AugmentConfig, TaskConfig, to_dict
from raysyn.data.storage import json_values
from raysyn.nets.precision import autocast
from raysyn.training_batches import frames_at, generator_of, torch_seed, warp_matrices, warp_pair
from raysyn.types import FrameArrays, UserError

TASK_WARP, TASK_GREY, TASK_RAND = 16, 17, 18  # streams of random numbers, beside those of the generators' fits
OUTSIDE_SD = -2.0  # what `zscore` puts outside the sector
Report = Callable[[dict[str, Any]], None]


@dataclass
class FittedTask:
    """A trained task network with its set-up, the size it was trained at and what its training said of itself."""

    net: nn.Module
    task: TaskConfig
    image_size: int
    best_score: float
    history: list[dict[str, float]] = field(default_factory=list)
    cpu_seconds: float = 0.0

    @torch.inference_mode()
    def logits(self, image_u8: np.ndarray, batch_size: int = 64) -> Iterator[Tensor]:
        """Batches of logits fp32 on the CPU for image_u8 [N, H, W], in order."""
        self.net.eval()
        device = next(self.net.parameters()).device
        for start in range(0, len(image_u8), batch_size):
            part = torch.from_numpy(image_u8[start : start + batch_size])[:, None].to(device)
            yield self.net(normalise(part.float() / 255, self.task.normalise)).float().cpu()

    def save(self, folder: str | Path, patients: Iterable[str] = ()) -> None:
        """Write weights (safetensors) and set-up (JSON) into a local folder, with the `patients` that it was fitted on."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.net.state_dict().items()}, folder / "task.safetensors")
        facts = {"task": to_dict(self.task), "image_size": self.image_size, "best_score": self.best_score}
        facts["patients"] = sorted(set(patients))
        (folder / "task.json").write_text(json.dumps(json_values(facts, str), indent=2))


def task_sha256(folder: str | Path) -> str:
    """sha256 over what `FittedTask.save` wrote. Raises OSError where it is not there."""
    digest = hashlib.sha256()
    for name in ("task.json", "task.safetensors"):
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()


def load_task(folder: str | Path) -> FittedTask:
    """Read what `FittedTask.save` wrote. Raises UserError for a missing or foreign folder."""
    from safetensors.torch import load_file

    from raysyn.tasks.nets import build_classifier, build_segmenter

    folder = Path(folder)
    try:
        facts = json.loads((folder / "task.json").read_text())
        task = build(TaskConfig, {**facts["task"], "weights": ""})
        net = build_segmenter(task, facts["image_size"]) if task.kind == "segmentation" else build_classifier(task)
        net.load_state_dict(load_file(folder / "task.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: not a task model ({str(error).splitlines()[0]})") from None
    return FittedTask(net.eval(), task, facts["image_size"], float(facts["best_score"]))


def normalise(image_01: Tensor, how: str) -> Tensor:
    """What a task network is given of image_01 [B, 1, H, W], by TaskConfig.normalise.

    range: [0, 1] to [−1, 1]. zscore: each image to mean 0 and standard deviation 1 over its pixels above 0 (the sector),
    −2 elsewhere, so that the sector's edge still shows: a set brighter than the test frames loses less by it.
    """
    if how == "range":
        return (image_01 - 0.5) / 0.5
    inside = image_01 > 0
    count = inside.sum((1, 2, 3), keepdim=True).clamp(min=1)
    mean = image_01.sum((1, 2, 3), keepdim=True) / count
    centred = torch.where(inside, image_01 - mean, torch.zeros_like(image_01))
    sd = (centred.square().sum((1, 2, 3), keepdim=True) / count).sqrt()
    return torch.where(inside, centred / sd.clamp(min=1e-3), torch.full_like(image_01, OUTSIDE_SD))


def augmentation(strength: float) -> AugmentConfig:
    """Mild geometry, image and map alike; no mirror: the right heart's side tells the views apart."""
    return AugmentConfig(False, 10.0 * strength, 0.05 * strength, 1 - 0.1 * strength, 1 + 0.1 * strength)


def task_batch(frames: FrameArrays, positions: np.ndarray, task: TaskConfig) -> tuple[Tensor, Tensor, np.ndarray]:
    """Augmented (image_01 [B, 1, H, W], label map uint8 [B, H, W], frame numbers) of positions in the epochs."""
    index, _ = frames_at(positions, len(frames), task.seed)
    image, label = torch.from_numpy(frames.image_u8[index]), torch.from_numpy(frames.label_map[index])
    if task.augment_strength == 0:
        return image[:, None].float() / 255, label, index
    if task.augmentation == "randaugment":
        return rand_augmented(image, task, positions), label, index
    matrices = warp_matrices(augmentation(task.augment_strength), task.seed, TASK_WARP, positions)
    image_01, label = warp_pair(image, label, matrices)
    grey = np.stack([generator_of(task.seed, TASK_GREY, int(p)).uniform(-1, 1, 2) for p in positions])
    power = torch.from_numpy(np.exp(0.2 * task.augment_strength * grey)).float()[:, :, None, None, None]
    return (image_01.clamp(min=0) ** power[:, 0] * power[:, 1]).clamp(max=1), label, index


def rand_augmented(image_u8: Tensor, task: TaskConfig, positions: np.ndarray) -> Tensor:
    """RandAugment (arXiv:1909.13719, N=2, M=9·strength), drawn anew for each frame.

    uint8 [B, H, W] -> float32 [B, 1, H, W] in [0, 1].
    """
    from torchvision.transforms import v2

    augment = v2.RandAugment(num_ops=2, magnitude=min(30, round(9 * task.augment_strength)))
    made = []
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        for frame, position in zip(image_u8, positions):
            torch.manual_seed(torch_seed(task.seed, TASK_RAND, int(position)))
            made.append(augment(frame[None]))
    return torch.stack(made).float() / 255


def num_task_steps(task: TaskConfig, num_frames: int) -> int:
    """Optimizer steps: `num_steps`, else `num_epochs` over the frames."""
    return task.num_steps or task.num_epochs * max(1, -(-num_frames // task.batch_size))


def fit_task(
    net: nn.Module,
    task: TaskConfig,
    phases: list[tuple[FrameArrays, float]],
    loss_of: Callable[[Tensor, Tensor, np.ndarray, FrameArrays], Tensor],
    score_of: Callable[[FittedTask], float],
    image_size: int,
    report: Report | None = None,
) -> FittedTask:
    """Train `net` on each phase's frames for its share of the steps; keep the weights of the best validation score.

    `report` gets {step, steps, loss, score} after each validation; what it raises ends the training (a pruned trial).
    Raises UserError where no validation could be scored.
    """
    started = time.process_time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if task.channels_last else torch.contiguous_format
    net = net.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=task.lr, weight_decay=task.weight_decay)
    total = num_task_steps(task, len(phases[0][0]))
    fitted = FittedTask(net, task, image_size, -math.inf)
    best = copy.deepcopy(net.state_dict())
    every = _validation_interval(task, total, len(phases[0][0]))
    step, until = 0, 0.0
    losses: list[float] = []  # since the last validation
    for frames, share in phases:
        until += share
        while step < round(until * total):
            positions = np.arange(step * task.batch_size, (step + 1) * task.batch_size)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(task, step, total)
            losses.append(_step(net, optimizer, task, frames, positions, loss_of, device, layout))
            step += 1
            if step % every == 0 or step == total:
                score = score_of(fitted)
                fitted.history.append({"step": step, "loss": sum(losses) / len(losses), "score": score})
                losses = []
                if score >= fitted.best_score:
                    fitted.best_score, best = score, copy.deepcopy(net.state_dict())
                if report is not None:
                    report({"step": step, "steps": total, **fitted.history[-1]})
    if fitted.best_score == -math.inf:  # every score was NaN: `best` is where training began
        raise UserError("validation frames: show nothing that can be scored; validate on frames that do")
    net.load_state_dict(best)
    fitted.cpu_seconds = time.process_time() - started
    return fitted


def _validation_interval(task: TaskConfig, total: int, num_frames: int) -> int:
    if task.num_steps:
        return max(1, total // 5)
    return task.validate_every_epochs * max(1, -(-num_frames // task.batch_size))


def _learning_rate(task: TaskConfig, step: int, total: int) -> float:
    if task.lr_decay == "none":
        return task.lr
    warmup = max(1, total // 20)
    if step < warmup:
        return task.lr * (step + 1) / warmup
    return task.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: TaskConfig,
    frames: FrameArrays,
    positions: np.ndarray,
    loss_of: Callable,
    device: torch.device,
    layout: torch.memory_format,
) -> float:
    net.train()
    image_01, label, index = task_batch(frames, positions, task)
    x = normalise(image_01, task.normalise).to(device).contiguous(memory_format=layout)
    with autocast(task.amp, device):
        logits = net(x)
    loss = loss_of(logits.float(), label.to(device), index, frames)
    if not torch.isfinite(loss):
        raise RuntimeError(f"task {task.arch}: the loss is {float(loss.detach())}; lower task.lr ({task.lr:g})")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
