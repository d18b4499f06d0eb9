import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysyn.config import DataConfig
from raysyn.data.pictures import BadPicture
from raysyn.data.png_folder import parse_name
from raysyn.data.readers import open_reader
from raysyn.labels import LEFT_ATRIUM, LV_CAVITY, MYOCARDIUM, OUTSIDE, TISSUE
from raysyn.types import PHASES, VIEWS, UserError

SIZE = 64
_Y, _X = np.mgrid[:SIZE, :SIZE]
CONE = np.abs(_X - 32) <= _Y / 2


def picture() -> np.ndarray:
    image = np.where(CONE, 100, 0).astype(np.uint8)
    image[30:36, 30:34] = 0
    return image


def annotation() -> np.ndarray:
    labels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    labels[26:40, 26:38] = 2
    labels[30:36, 30:34] = 1
    labels[46:54, 28:36] = 3
    return labels


def structures() -> np.ndarray:
    labels = np.where(CONE, TISSUE, OUTSIDE).astype(np.uint8)
    for camus, ours in ((2, MYOCARDIUM), (1, LV_CAVITY), (3, LEFT_ATRIUM)):
        labels[annotation() == camus] = ours
    return labels


def save(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(file)


def write(root: Path, split: str, name: str, *, sector: bool = False, suffix: str = "") -> None:
    save(root / "images" / split / f"{name}.png", picture())
    save(root / "annotations" / split / f"{name}{suffix}.png", annotation())
    if sector:
        save(root / "sector_annotations" / split / f"{name}{suffix}.png", structures())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, split in enumerate(("training", "training", "validation", "testing"), 1):
        for view in VIEWS:
            for phase in PHASES:
                write(tmp_path, split, f"patient{number:04d}_{view}_{phase}", sector=number == 1, suffix="_gt")
    return tmp_path


def read_all(root: Path, policy: str = "raise", source: str = "real"):
    data = DataConfig(name="png_folder", root=str(root), image_size=32, on_bad_frame=policy, source=source)
    reader = open_reader(data)
    index = reader.index()
    frames, skipped = [], list(index.skipped)
    for patient in index.patients:
        found, left_out = reader.read(patient)
        frames += found
        skipped += left_out
    return index, frames, skipped


def test_a_published_synthetic_set_is_not_called_real(root: Path) -> None:
    assert {f.source for f in read_all(root)[1]} == {"real"}
    assert {f.source for f in read_all(root, source="synthetic")[1]} == {"synthetic"}
    with pytest.raises(UserError, match=r"data\.source"):
        DataConfig(name="camus", source="synthetic")


def test_the_published_layout(root: Path) -> None:
    index, frames, skipped = read_all(root)
    assert [p.split for p in index.patients] == ["train", "train", "validation", "test"]
    assert len(frames) == 16
    assert not skipped
    assert not index.notes
    by_id = {f.frame_id: f for f in frames}
    with_sector, without = by_id["patient0001_4CH_ES"], by_id["patient0002_4CH_ES"]
    assert (with_sector.label_map == without.label_map).all()
    assert (with_sector.label_map == structures()[::2, ::2]).mean() > 0.9
    assert (without.view, without.phase, without.patient_id, without.spacing_mm) == ("4CH", "ES", "patient0002", None)
    assert set(np.unique(without.label_map)) == {OUTSIDE, LV_CAVITY, TISSUE, MYOCARDIUM, LEFT_ATRIUM}
    assert (without.image[without.label_map == OUTSIDE] == 0).all()


def test_sector_annotations_win(root: Path) -> None:
    labels = structures()
    labels[46:54, 28:36] = TISSUE
    save(root / "sector_annotations" / "training" / "patient0001_2CH_ED.png", labels)
    frames = {f.frame_id: f for f in read_all(root)[1]}
    assert LEFT_ATRIUM not in frames["patient0001_2CH_ED"].label_map
    assert LEFT_ATRIUM in frames["patient0001_2CH_ES"].label_map


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("patient0001_2CH_ED.png", ("patient0001", "2CH", "ED")),
        ("patient0450_4CH_ES_warp3_seed1.png", ("patient0450", "4CH", "ES")),
        ("sdm_25_patient0007_4CH_ED_0000.png", ("patient0007", "4CH", "ED")),
    ],
)
def test_names(name: str, parsed: tuple[str, str, str]) -> None:
    assert parse_name(name) == parsed


@pytest.mark.parametrize(
    "name",
    [
        "patient1_2CH_ED.png",
        "patient0001_3CH_ED.png",
        "patient0001_2CH_EDX.png",
        "xpatient0001_2CH_ED.png",
        "patient0001_2CH_ED.png.bak",
        "patient0001_2CH.png",
        "patient0001_2CH_ED_patient0002_4CH_ES.png",
    ],
)
def test_names_are_matched_whole(name: str) -> None:
    with pytest.raises(BadPicture):
        parse_name(name)


def test_folder_names_say_nothing_about_the_split(tmp_path: Path) -> None:
    """A root that holds the word testing, as a split by substring would trip over."""
    odd = tmp_path / "testing_validation" / "data"
    write(odd, "training", "patient0001_2CH_ED")
    index, frames, _ = read_all(odd)
    assert [f.split for f in frames] == ["train"]
    assert index.notes == [
        "there is no images/validation/, so there is no validation split",
        "there is no images/testing/, so there is no test split",
    ]


def test_several_pictures_of_one_mask_stay_apart(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "training", f"patient0001_2CH_ED_seed{seed}")
    assert sorted(f.frame_id for f in read_all(tmp_path)[1]) == [f"patient0001_2CH_ED_seed{i}" for i in range(3)]


def test_palette_and_grey_rgb_are_read(root: Path) -> None:
    before = {f.frame_id: f for f in read_all(root)[1]}["patient0003_2CH_ED"]
    palette = Image.frombytes("P", (SIZE, SIZE), annotation().tobytes())
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(root / "annotations" / "validation" / "patient0003_2CH_ED_gt.png")
    save(root / "images" / "validation" / "patient0003_2CH_ED.png", np.repeat(picture()[..., None], 3, axis=2))
    after = {f.frame_id: f for f in read_all(root)[1]}["patient0003_2CH_ED"]
    assert (after.image == before.image).all()
    assert (after.label_map == before.label_map).all()


def test_a_picture_with_a_palette_is_its_colours(root: Path) -> None:
    before = {f.frame_id: f for f in read_all(root)[1]}["patient0003_2CH_ED"]
    file = root / "images" / "validation" / "patient0003_2CH_ED.png"
    indices = np.where(picture() == 100, 0, 1).astype(np.uint8)
    palette = Image.frombytes("P", (SIZE, SIZE), indices.tobytes())
    palette.putpalette([100] * 3 + [0] * 3)
    palette.save(file)
    after = {f.frame_id: f for f in read_all(root)[1]}["patient0003_2CH_ED"]
    assert (after.image == before.image).all()
    palette.putpalette([100, 90, 100] + [0] * 3)
    palette.save(file)
    with pytest.raises(UserError, match="not an 8-bit grey PNG"):
        read_all(root)


def test_what_systems_leave_in_folders_is_no_picture_and_capitals_are_not_dropped(root: Path) -> None:
    folder = root / "images" / "training"
    (folder / "._patient0001_2CH_ED.png").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    assert len(read_all(root)[1]) == 16
    (folder / "patient0001_2CH_ED.png").rename(folder / "patient0001_2CH_ED.PNG")
    with pytest.raises(UserError, match=r"patient0001_2CH_ED\.PNG: the name is not"):
        read_all(root)


def test_label_maps_without_a_picture_are_noted(root: Path) -> None:
    (root / "images" / "testing" / "patient0004_4CH_ED.png").unlink()
    index, frames, _ = read_all(root)
    assert len(frames) == 15
    assert index.notes == ["1 label maps in annotations/testing/ have no picture: patient0004_4CH_ED_gt.png"]


NAME = "patient0003_4CH_ED"


def image_file(root: Path) -> Path:
    return root / "images" / "validation" / f"{NAME}.png"


def label_file(root: Path) -> Path:
    return root / "annotations" / "validation" / f"{NAME}_gt.png"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:90])


def write_png(file: Path, depth: int, colour: int, values: np.ndarray) -> None:
    """A PNG of `depth` bits a sample, in kinds that Pillow reads but does not write."""
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(*values.shape[:2], -1, 2), axis=-1)[..., -depth:]
    rows = [b"\0" + np.packbits(row.ravel()).tobytes() for row in bits]
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


SPOILED = {
    "missing ground truth": (lambda r: label_file(r).unlink(), "the ground truth is missing"),
    "sizes": (lambda r: save(label_file(r), annotation()[:-4]), r"sizes differ: the ground truth is \[60, 64\]"),
    "labels": (lambda r: save(label_file(r), annotation() * 85), "unknown label values 85, 170, 255"),
    "truncated": (lambda r: cut(image_file(r)), "cannot be read as PNG, it may be cut off"),
    "end cut off": (
        lambda r: image_file(r).write_bytes(image_file(r).read_bytes()[:-2]),
        "cannot be read as PNG, its end is cut off",
    ),
    "empty": (lambda r: label_file(r).write_bytes(b""), "the file is empty"),
    "text": (lambda r: label_file(r).write_bytes(b"hello"), "cannot be read as PNG"),
    "colour": (
        lambda r: save(image_file(r), np.dstack([picture(), picture() // 2, picture()])),
        "not an 8-bit grey PNG",
    ),
    "labels of 16 bits": (
        lambda r: write_png(label_file(r), 16, 2, np.repeat(annotation()[..., None], 3, axis=2)),
        r"not an 8-bit grey PNG \(16 bits a sample\)",
    ),
    "labels of 2 bits": (
        lambda r: write_png(label_file(r), 2, 0, annotation()),
        r"not an 8-bit grey PNG \(2 bits a sample\)",
    ),
    "picture of 16 bits": (lambda r: write_png(image_file(r), 16, 0, picture()), "not an 8-bit grey PNG"),
    "black": (lambda r: save(image_file(r), picture() * 0), "all black"),
    "name": (lambda r: image_file(r).rename(image_file(r).with_name(f"{NAME[:-1]}.png")), "the name is not"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_bad_frames(root: Path, kind: str) -> None:
    spoil, says = SPOILED[kind]
    spoil(root)
    with pytest.raises(UserError, match=rf"patient0003_4CH_E.*{says}") as caught:
        read_all(root)
    assert "\n" not in str(caught.value)
    _, frames, skipped = read_all(root, "skip")
    assert len(frames) == 15
    assert len(skipped) == 1


def test_patient_in_two_splits(root: Path) -> None:
    write(root, "testing", "patient0001_2CH_ED")
    with pytest.raises(UserError, match=r"images/testing: patient0001 is also in .*images/training"):
        read_all(root)
    _, frames, skipped = read_all(root, "skip")
    assert "patient0001" not in {f.patient_id for f in frames}
    assert len(skipped) == 1


def test_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no images/training/"):
        read_all(tmp_path)
