"""A fit's state and its checkpoints: weights, EMA, optimizer and progress, written in the background, whole or absent.

A checkpoint is a folder `step-000001000/` of safetensors files; `checkpoint.json`, written last, lists them with size
and sha256. Learning rate and every random number are functions of the position: no generator has state to keep.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raysyn.data.storage import Storage
from raysyn.diffusion.ema import EMA
from raysyn.types import UserError

log = logging.getLogger("raysyn.training")

MARK = "checkpoint.json"
Tensors = dict[str, dict[str, Tensor]]


@dataclass
class Progress:
    """Where a fit is. `losses` has one entry a step; `validations` and `rollbacks` are (step, loss).

    `energy_joules` is that of all ranks' GPUs as NVML tells it, None where it does not.
    """

    step: int = 0
    images_seen: int = 0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    energy_joules: float | None = 0.0
    best_validation: float | None = None
    best_step: int = 0
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    rollbacks: list[tuple[int, float]] = field(default_factory=list)

    def spend(self, wall_seconds: float, cpu_seconds: float, num_ranks: int, num_gpus: float) -> None:
        """Add what one rank measured, for all ranks."""
        self.wall_seconds += wall_seconds
        self.cpu_seconds += cpu_seconds * num_ranks
        self.gpu_seconds += wall_seconds * num_gpus


@dataclass
class TrainState:
    """What a fit changes. `model` is what is trained; `ema` follows it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    progress: Progress = field(default_factory=Progress)

    def tensors(self) -> Tensors:
        """Copies on the CPU of all tensors, by file: model, ema, optimizer."""
        optimizer = self.optimizer.state_dict()["state"]
        flat = {f"{i}.{key}": value for i, entry in optimizer.items() for key, value in entry.items()}
        parts = {"model": self.model.state_dict(), "ema": self.ema.average, "optimizer": flat}
        return {name: {k: _copy(v) for k, v in part.items() if v is not None} for name, part in parts.items()}

    def load(self, tensors: Tensors, progress: dict[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        self.model.load_state_dict(tensors["model"])
        self.ema.load_state_dict({"half_life_images": self.ema.half_life_images, "average": tensors["ema"]})
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors["optimizer"].items():
            index, _, key = name.partition(".")
            entries.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        for parameter, entry in self.optimizer.state.items():
            for key, value in entry.items():  # laid out in memory as the weights, which the fused kernels ask for
                if key != "step" and value.shape == parameter.shape:
                    entry[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        pairs = {key: [tuple(entry) for entry in progress[key]] for key in ("validations", "rollbacks")}
        self.progress = Progress(**{**progress, **pairs})


def _copy(value: Any) -> Tensor:
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    return tensor.to("cpu", copy=True).contiguous()


@dataclass
class Checkpoint:
    """A whole checkpoint, read and verified."""

    step: int
    tensors: Tensors
    meta: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one fit under `storage`. `key` names the config that they belong to.

    `save` returns as soon as the tensors are handed over; one is written at a time. Kept are the last `keep` and the
    one with the lowest validation loss.
    """

    def __init__(self, storage: Storage, key: str, keep: int) -> None:
        self.storage, self.key, self.keep = storage, key, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Tensors, meta: dict[str, Any]) -> None:
        """Write a checkpoint in the background, after the one before is done. Raises what that one met."""
        self.flush()
        self._thread = threading.Thread(target=self._write, args=(step, tensors, meta), name="checkpoint")
        self._thread.start()

    def flush(self) -> None:
        """Wait until what was saved lies in the storage. Raises what went wrong there (UserError: no space left)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, tensors: Tensors, meta: dict[str, Any]) -> None:
        from safetensors.torch import save

        try:
            folder = folder_of(step)
            files = {}
            for name, part in tensors.items():
                data = save(part)
                self.storage.write_atomic(f"{folder}/{name}.safetensors", data)
                files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            self.storage.write_json(f"{folder}/{MARK}", {"step": step, "key": self.key, "files": files, **meta})
            self._prune(step, meta.get("progress", {}).get("best_step"))
        except BaseException as error:
            self._error = error

    def _prune(self, newest: int, best: int | None) -> None:
        """Leave the last `keep` and the best; what a killed writer never finished goes too, once it is behind."""
        kept = {best, *[s for s in self.steps() if s <= newest][-self.keep :]}
        for folder in sorted({name.partition("/")[0] for name in self.storage.list()}):
            step = re.fullmatch(r"step-(\d+)", folder)
            # What is ahead is another run's, where the storage cannot lock one out, or will be overtaken.
            if step and int(step.group(1)) < newest and int(step.group(1)) not in kept:
                self.storage.remove(f"{folder}/{MARK}")  # first: from here on it is no checkpoint
                self.storage.remove_tree(folder)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were written to the end, ascending."""
        found = (re.fullmatch(rf"step-(\d+)/{MARK}", name) for name in self.storage.list())
        return sorted(int(m.group(1)) for m in found if m)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are passed over with a warning. None when there is none.

        Raises UserError when the newest belongs to another config.
        """
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except _Damaged as damage:
                log.warning("%s: passed over: %s", folder_of(step), damage)
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of one step. Raises UserError when it is another config's."""
        from safetensors.torch import load

        folder = folder_of(step)
        meta = self._mark(folder)
        if meta["key"] != self.key:
            where = self.storage.join(folder).uri
            raise UserError(
                f"{where}: belongs to another config ({meta['key']}, this is {self.key}); remove it to go on"
            )
        tensors: Tensors = {}
        for name, expected in meta["files"].items():
            try:
                data = self.storage.read_bytes(f"{folder}/{name}.safetensors")
            except FileNotFoundError:
                raise _Damaged(f"{name}.safetensors is missing") from None
            if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise _Damaged(f"{name}.safetensors has {len(data)} bytes that are not those written")
            tensors[name] = load(data)
        return Checkpoint(step, tensors, meta)

    def _mark(self, folder: str) -> dict[str, Any]:
        try:
            meta = json.loads(self.storage.read_bytes(f"{folder}/{MARK}"))
        except ValueError as error:
            raise _Damaged(f"{MARK} is not readable as JSON ({error})") from None
        if not isinstance(meta, dict) or not {"key", "files", "progress"} <= set(meta):
            raise _Damaged(f"{MARK} is not what was written")
        return meta


class _Damaged(Exception):
    pass


def folder_of(step: int) -> str:
    """Folder name of a step's checkpoint; names sort by step."""
    return f"step-{step:09d}"


def progress_to_json(progress: Progress) -> dict[str, Any]:
    """Plain containers for `checkpoint.json`."""
    return asdict(progress)
