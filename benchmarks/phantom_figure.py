"""Eight phantoms at 256 px in their true proportions, as the README shows them.

Run: python benchmarks/phantom_figure.py [FILE]    (default: benchmarks/pictures/phantom.png)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from raysyn.data.phantom import phantom_frame
from raysyn.types import PHASES, VIEWS

DEFAULT = Path(__file__).parent / "pictures" / "phantom.png"
PATIENTS = (7, 15)  # of seed 0, one a row: 2CH at ED and ES, 4CH at ED and ES


def tile(patient: int, view: str, phase: str, size: int = 256) -> np.ndarray:
    """One phantom uint8 [size, W], stretched so that a millimetre is as long across as down."""
    frame = phantom_frame(0, patient, view, phase, size)
    assert frame.spacing_mm is not None
    width = round(size * frame.spacing_mm[1] / frame.spacing_mm[0])
    return np.asarray(Image.fromarray(frame.image).resize((width, size), Image.Resampling.BICUBIC))


def main(file: Path) -> None:
    """Write the picture: two rows of four."""
    rows = [[tile(p, view, phase) for view in VIEWS for phase in PHASES] for p in PATIENTS]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows])).save(file, optimize=True)
    print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
