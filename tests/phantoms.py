"""Frames of phantom patients as arrays."""

import numpy as np

from raysyn.data.phantom import phantom_patient
from raysyn.types import PHASES, VIEWS, FrameArrays


def phantom_arrays(seed: int, patients: range, size: int = 64) -> FrameArrays:
    """Every frame of `patients`, in their order."""
    frames = [f for p in patients for f in phantom_patient(seed, p, size, "train")]
    return FrameArrays(
        image_u8=np.stack([f.image for f in frames]),
        label_map=np.stack([f.label_map for f in frames]),
        view=np.array([VIEWS.index(f.view) for f in frames], np.uint8),
        phase=np.array([PHASES.index(f.phase) for f in frames], np.uint8),
        spacing_mm=np.array([f.spacing_mm for f in frames], np.float32),
        frame_id=[f.frame_id for f in frames],
        patient_id=[f.patient_id for f in frames],
        mask_frame_id=[""] * len(frames),
        source=["phantom"] * len(frames),
    )
