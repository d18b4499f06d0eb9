"""Checks of whole frame sets: what must hold between frames, not only within one."""

from __future__ import annotations

from collections import Counter
from typing import Any

from raysyn.data.frames import frame_files, read_light
from raysyn.data.storage import Storage
from raysyn.types import UserError


def check_frames(uri: str | Storage) -> dict[str, Any]:
    """Counts of a frame set by split and view, after checking it; no picture is decoded.

    Raises UserError when a frame_id comes twice, a patient is in two splits, or a file is foreign or broken.
    """
    seen: set[str] = set()
    split_of: dict[str, str] = {}
    views: Counter[tuple[str, str]] = Counter()
    for storage, name in frame_files(uri):
        table = read_light(storage, name)
        for frame_id, patient, split, view in zip(
            *(table[key].to_pylist() for key in ("frame_id", "patient_id", "split", "view"))
        ):
            if frame_id in seen:
                raise UserError(f"{storage.locate(name)}: frame {frame_id} comes twice in the set")
            if split_of.setdefault(patient, split) != split:
                raise UserError(
                    f"{storage.locate(name)}: {patient} is in {split} and {split_of[patient]}; splits share no patient"
                )
            seen.add(frame_id)
            views[split, view] += 1
    splits = sorted(set(split_of.values()))
    return {
        "num_frames": {s: sum(n for (split, _), n in views.items() if split == s) for s in splits},
        "num_frames_by_view": {
            s: {view: n for (split, view), n in sorted(views.items()) if split == s} for s in splits
        },
        "num_patients": dict(sorted(Counter(split_of.values()).items())),
    }
