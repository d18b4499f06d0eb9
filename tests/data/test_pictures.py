import numpy as np

from raysyn.data.pictures import as_grey, resize_grey, resize_labels


def test_labels_are_picked_and_never_blended() -> None:
    """Between outside (0) and the atrium (4) lie three other structures, which blending would invent."""
    labels = np.where(np.add.outer(np.arange(61), np.arange(61)) % 7 < 3, 4, 0).astype(np.uint8)
    for size in (32, 61, 96):
        assert set(np.unique(resize_labels(labels, size))) == {0, 4}
    assert (resize_labels(labels, 61) == labels).all()
    assert (resize_labels(np.repeat(np.repeat(labels, 3, 0), 3, 1), 61) == labels).all()  # the pixel at the centre


def test_grey_levels_are_averaged_where_a_picture_shrinks() -> None:
    lines = np.where(np.arange(256) % 2, 200, 0).astype(np.uint8)
    small = resize_grey(np.tile(lines, (256, 1)), 64)
    assert np.abs(small[:, 2:-2].astype(int) - 100).max() <= 2


def test_grey_levels_between_whole_numbers_are_rounded() -> None:
    assert as_grey(np.array([[0.6, 254.7]]), "x").tolist() == [[1, 255]]
