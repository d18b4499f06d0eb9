"""Pictures as they come: grey levels, labels and the scan sector as uint8, or refused with a reason; resizing."""

from __future__ import annotations

import numpy as np

NUM_CAMUS_LABELS = 4


class BadPicture(Exception):
    """A file that cannot be used; the message is the reason without the name."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason


def check_readable(file: str) -> None:
    """Raise BadPicture when a file is missing, empty or may not be read."""
    try:
        with open(file, "rb") as stream:
            if not stream.read(1):
                raise BadPicture(file, "the file is empty")
    except FileNotFoundError:
        raise BadPicture(file, "no such file") from None
    except IsADirectoryError:
        raise BadPicture(file, "is a folder, not a file") from None
    except PermissionError:
        raise BadPicture(file, "no permission to read it") from None
    except OSError as error:
        raise BadPicture(file, f"cannot be read ({error.strerror})") from None


def as_grey(values: np.ndarray, file: str) -> np.ndarray:
    """Grey levels as uint8 [H, W]. Raises BadPicture unless it is one picture with values in 0 to 255."""
    _check_plain(values, file, "picture")
    if values.dtype == np.uint8:
        return values
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255:
        raise BadPicture(file, "holds grey levels outside 0 to 255")
    if values.max() <= 1 and (values != np.rint(values)).any():
        raise BadPicture(file, "holds grey levels scaled to 0 to 1; they must be 0 to 255")
    return np.rint(values).astype(np.uint8)


def as_labels(values: np.ndarray, file: str, num_labels: int) -> np.ndarray:
    """Labels as uint8 [H, W]. Raises BadPicture for a value that is not one of 0 … `num_labels` - 1."""
    _check_plain(values, file, "label map")
    known = np.isin(values, np.arange(num_labels))
    if not known.all():
        unknown = np.unique(values[~known])
        shown = ", ".join(f"{v:g}" for v in unknown[:5])
        raise BadPicture(file, f"holds unknown label values {shown}; known are 0 to {num_labels - 1}")
    return values.astype(np.uint8)


def _check_plain(values: np.ndarray, file: str, what: str) -> None:
    if values.ndim != 2 or not values.size:
        raise BadPicture(file, f"holds an array of shape {list(values.shape)}, not one {what}")
    if values.dtype.kind not in "buif":
        kind = "colours" if values.dtype.names else f"{values.dtype} numbers"
        raise BadPicture(file, f"holds {kind}, not one {what}")


def sector_mask(image: np.ndarray, file: str) -> np.ndarray:
    """The scan cone of a picture, bool [H, W]: its non-zero pixels, holes filled, the largest connected piece.

    Raises BadPicture for an all-black picture. REFERENCE §3.
    """
    from scipy import ndimage

    filled = ndimage.binary_fill_holes(image > 0)
    pieces, count = ndimage.label(filled, structure=np.ones((3, 3)))
    if not count:
        raise BadPicture(file, "the picture is all black: no scan sector in it")
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return np.asarray(pieces == sizes.argmax())


def resize_grey(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W] to [size, size], bilinear, antialiased where it shrinks. The published approach: aspect not kept."""
    from PIL import Image

    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def resize_labels(labels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W] to [size, size], nearest."""
    from PIL import Image

    return np.array(Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST))
