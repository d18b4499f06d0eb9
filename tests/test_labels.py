import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysyn import labels
from raysyn.types import VIEWS, UserError

MAP = np.arange(5, dtype=np.uint8).repeat(5).reshape(5, 5)


@pytest.mark.parametrize("view", VIEWS)
def test_one_hot_marks_each_pixel_once_in_the_channels_of_its_view(view: str) -> None:
    hot = labels.one_hot(MAP, view)
    assert hot.shape == (10, 5, 5)
    assert hot.dtype == np.float32
    assert (hot.sum(0) == 1).all()
    half = slice(0, 5) if view == "2CH" else slice(5, 10)
    assert (hot[half].argmax(0) == MAP).all()


@given(st.integers(5, 255))
def test_a_label_outside_the_set_is_named(value: int) -> None:
    wrong = MAP.copy()
    wrong[0, 0] = value
    with pytest.raises(UserError, match=rf"\[{value}\].*outside the set"):
        labels.check_label_map(wrong, "mask.png")


def test_wrong_shape_and_type_are_refused() -> None:
    for wrong in (MAP[None], MAP.astype(np.int64)):
        with pytest.raises(UserError, match="uint8 array"):
            labels.check_label_map(wrong)


def test_an_unknown_view_is_refused() -> None:
    with pytest.raises(UserError, match="3CH"):
        labels.view_index("3CH")


def test_camus_labels_map_to_structures_and_back_to_task_classes() -> None:
    annotation = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    inside = labels.from_camus(annotation, np.ones_like(annotation, dtype=bool))
    assert inside.tolist() == [[labels.TISSUE, labels.LV_CAVITY, labels.MYOCARDIUM, labels.LEFT_ATRIUM]]
    assert labels.to_task_classes(inside).tolist() == annotation.tolist()
    outside = labels.from_camus(annotation, np.zeros_like(annotation, dtype=bool))
    assert not outside.any()


def test_task_regions_are_made_of_the_right_structures() -> None:
    lv_epi = (labels.LV_CAVITY, labels.MYOCARDIUM)
    regions = {"lv_endo": (labels.LV_CAVITY,), "lv_epi": lv_epi, "la": (labels.LEFT_ATRIUM,)}
    for region, structures in regions.items():
        mapped = {int(labels.to_task_classes(np.array(s))) for s in structures}
        assert mapped == set(labels.TASK_REGIONS[region])
