"""Labels: the five structures, the regions that are scored, and the semantic conditioning of the generators."""

from __future__ import annotations

import numpy as np

from raysyn.types import VIEWS, UserError

OUTSIDE, LV_CAVITY, TISSUE, MYOCARDIUM, LEFT_ATRIUM = range(5)
STRUCTURES = ("outside", "lv_cavity", "tissue", "myocardium", "left_atrium")
NUM_CHANNELS = len(STRUCTURES) * len(VIEWS)

# The segmentation task has CAMUS's four classes: background, LV cavity, LV myocardium, left atrium.
TASK_CLASSES = ("background", "lv_cavity", "myocardium", "left_atrium")
# Scored regions as sets of them: LV endo, LV epi (the cavity within), LA.
TASK_REGIONS = {"lv_endo": (1,), "lv_epi": (1, 2), "la": (3,)}
_TASK_OF_STRUCTURE = np.array([0, 1, 0, 2, 3], dtype=np.uint8)
_STRUCTURE_OF_CAMUS = np.array([TISSUE, LV_CAVITY, MYOCARDIUM, LEFT_ATRIUM], dtype=np.uint8)

# RGB for pictures, one a structure.
COLOURS = np.array([[0, 0, 0], [214, 69, 65], [52, 73, 94], [241, 196, 15], [65, 131, 215]], dtype=np.uint8)


def check_label_map(label_map: np.ndarray, name: str = "label map") -> None:
    """Raise UserError unless `label_map` is uint8 [H, W] with values 0 to 4 only."""
    if label_map.ndim != 2 or label_map.dtype != np.uint8:
        raise UserError(f"{name}: expected a uint8 array [H, W], got {label_map.dtype} {list(label_map.shape)}")
    if label_map.size and label_map.max() >= len(STRUCTURES):
        extra = sorted(int(v) for v in np.unique(label_map) if v >= len(STRUCTURES))
        raise UserError(f"{name}: label values {extra} are outside the set 0 to {len(STRUCTURES) - 1} {STRUCTURES}")


def view_index(view: str) -> int:
    """0 for 2CH, 1 for 4CH. Raises UserError for any other name."""
    if view not in VIEWS:
        raise UserError(f"view {view!r} is not one of {', '.join(VIEWS)}")
    return VIEWS.index(view)


def semantic_index(label_map: np.ndarray, view: np.ndarray | int) -> np.ndarray:
    """Channel of each pixel in the conditioning: structure + 5 x view. label_map [..., H, W], view [...] -> uint8."""
    view = np.asarray(view, dtype=np.uint8)
    return (label_map + len(STRUCTURES) * view[..., None, None]).astype(np.uint8)


def one_hot(label_map: np.ndarray, view: str) -> np.ndarray:
    """Semantic conditioning of one frame: label_map uint8 [H, W] -> float32 [10, H, W], a channel a (view, structure)."""
    check_label_map(label_map)
    channel = semantic_index(label_map, view_index(view))
    return (np.arange(NUM_CHANNELS)[:, None, None] == channel[None]).astype(np.float32)


def to_task_classes(label_map: np.ndarray) -> np.ndarray:
    """Structures (0-4) to the segmentation task's classes (0-3): tissue and outside are background. Any shape."""
    return _TASK_OF_STRUCTURE[label_map]


def from_camus(annotation: np.ndarray, sector: np.ndarray) -> np.ndarray:
    """CAMUS labels (0-3) and the sector mask (bool), both [H, W], to structures (0-4); outside the sector is 0."""
    return np.where(sector, _STRUCTURE_OF_CAMUS[annotation], OUTSIDE).astype(np.uint8)
