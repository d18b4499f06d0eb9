import os
from pathlib import Path

import numpy as np
import pytest

from raysyn.config import DataConfig
from raysyn.data.camus import NO_TEST, CamusReader, read_info
from raysyn.data.pictures import sector_mask
from raysyn.data.readers import open_reader
from raysyn.labels import LEFT_ATRIUM, LV_CAVITY, MYOCARDIUM, OUTSIDE, TISSUE
from raysyn.types import UserError
from tests.data.camus_files import (
    BAD,
    COLUMNS,
    ROWS,
    SPACING_X,
    SPACING_Y,
    file_of,
    picture,
    read_all,
    touch_patient,
    with_header,
    write_mhd,
    write_patient,
    write_splits,
)


def test_nifti_release(nifti: Path) -> None:
    index, frames, skipped = read_all(nifti)
    assert [(p.patient_id, p.split) for p in index.patients] == [
        ("patient0001", "train"),
        ("patient0002", "validation"),
        ("patient0003", "test"),
        ("patient0004", "train"),
    ]
    assert len(frames) == 16
    assert not skipped
    assert not index.notes
    first = frames[0]
    assert (first.frame_id, first.view, first.phase, first.source) == ("patient0001_2CH_ED", "2CH", "ED", "real")
    assert first.provenance is None
    check_picture(first)


def check_picture(frame) -> None:
    """Orientation, labels and spacing at 30 x 30, from 60 x 40 (rows, columns) with 0.15 x 0.3 mm."""
    assert frame.image.shape == frame.label_map.shape == (30, 30)
    np.testing.assert_allclose(frame.spacing_mm, (SPACING_Y * 60 / 30, SPACING_X * 40 / 30), rtol=1e-5)
    assert frame.label_map[12, 15] == LV_CAVITY
    assert frame.label_map[9, 15] == MYOCARDIUM
    assert frame.label_map[22, 12] == LEFT_ATRIUM
    assert frame.label_map[28, 22] == TISSUE
    assert frame.label_map[2, 2] == frame.label_map[2, 27] == OUTSIDE
    assert (frame.image[frame.label_map == OUTSIDE] == 0).all()
    assert frame.image[20, 17] == 120
    assert frame.image[12, 15] < 60


def test_a_spacing_that_the_header_leaves_open_is_unknown(nifti: Path) -> None:
    with_header(nifti, f"{BAD}.nii.gz", 80, bytes(4))
    spacing = {f.frame_id: f.spacing_mm for f in read_all(nifti)[1]}
    assert spacing.pop(BAD) is None
    assert None not in spacing.values()


def test_old_release(tmp_path: Path) -> None:
    for number in range(1, 53):
        folder = tmp_path / "training" / f"patient{number:04d}"
        if number in (1, 52):
            write_patient(folder, "mhd", write_mhd)
        else:
            touch_patient(folder)
    (tmp_path / "testing" / "patient0001").mkdir(parents=True)
    index, frames, skipped = read_all(tmp_path, "skip")
    assert [p.split for p in index.patients] == ["validation"] * 50 + ["train"] * 2
    assert index.notes == [NO_TEST]
    assert {f.patient_id for f in frames} == {"patient0001", "patient0052"}
    assert len(skipped) == 4 * 50
    assert {s.reason for s in skipped} == {"the file is empty"}
    for frame in frames:
        check_picture(frame)


def test_old_release_with_ground_truth_of_its_test_patients(tmp_path: Path) -> None:
    for number in range(1, 52):
        (tmp_path / "training" / f"patient{number:04d}").mkdir(parents=True)
    write_patient(tmp_path / "testing" / "patient0001", "mhd", write_mhd)
    index, frames, _ = read_all(tmp_path, "skip")
    assert not index.notes
    assert {(f.patient_id, f.split) for f in frames} == {("testing_patient0001", "test")}


def test_old_release_too_small(tmp_path: Path) -> None:
    write_patient(tmp_path / "training" / "patient0001", "mhd", write_mhd)
    with pytest.raises(UserError, match="holds 1 patients; the first 50 are validation"):
        read_all(tmp_path)


def test_both_releases_agree(nifti: Path, tmp_path: Path) -> None:
    write_patient(tmp_path / "testing" / "patient0001", "mhd", write_mhd)
    for number in range(1, 52):
        (tmp_path / "old" / "training" / f"patient{number:04d}").mkdir(parents=True)
    (tmp_path / "testing").rename(tmp_path / "old" / "testing")
    old = read_all(tmp_path / "old", "skip")[1]
    new = read_all(nifti)[1][:4]
    for a, b in zip(old, new):
        assert (a.image == b.image).all()
        assert (a.label_map == b.label_map).all()
        np.testing.assert_allclose(a.spacing_mm, b.spacing_mm, rtol=1e-6)


def test_sector_is_hole_filled_and_one_piece() -> None:
    image = picture()
    image[2, 39] = 9  # a lone pixel, as a burnt-in mark
    sector = sector_mask(image, "x")
    y, x = np.mgrid[:ROWS, :COLUMNS]
    assert (sector == (np.abs(x - COLUMNS / 2) <= y / 3 + 1)).all()


def test_info(nifti: Path, tmp_path: Path) -> None:
    assert read_info(nifti / "database_nifti" / "patient0001") == {
        "image_quality": {"2CH": "Good2CH", "4CH": "Good4CH"},
        "ejection_fraction": 56.5,
    }
    assert read_info(tmp_path) == {}
    (tmp_path / "Info_2CH.cfg").write_text("EF: nan\n")
    assert read_info(tmp_path) == {}  # the manifest is JSON, which knows no NaN
    (tmp_path / "Info_2CH.cfg").write_text("EF: \nno colon\nImageQuality:")
    assert read_info(tmp_path) == {}


def test_split_files_as_windows_writes_them(nifti: Path) -> None:
    before = [(p.patient_id, p.split) for p in read_all(nifti)[0].patients]
    for file in (nifti / "database_split").iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b" \r\n") + b"\r\n\t\r\n")
    assert [(p.patient_id, p.split) for p in read_all(nifti)[0].patients] == before


def test_split_files_that_list_nobody_are_noted_or_refused(nifti: Path) -> None:
    write_splits(nifti, testing=[""])
    index, frames, _ = read_all(nifti)
    assert "subgroup_testing.txt lists no patient, so there is no test split" in index.notes[0]
    assert {f.split for f in frames} == {"train", "validation"}
    file = nifti / "database_split" / "subgroup_testing.txt"
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"subgroup_testing\.txt: is not a text file"):
        read_all(nifti)


def test_patient_in_two_splits(nifti: Path) -> None:
    write_splits(nifti, validation=["patient0002", "patient0001"])
    with pytest.raises(UserError, match=r"subgroup_validation\.txt: patient0001 is also in .*subgroup_training\.txt"):
        read_all(nifti)
    index, frames, skipped = read_all(nifti, "skip")
    assert "patient0001" not in {p.patient_id for p in index.patients} | {f.patient_id for f in frames}
    assert len(skipped) == 1


def test_missing_split_file(nifti: Path) -> None:
    (nifti / "database_split" / "subgroup_testing.txt").unlink()
    for policy in ("raise", "skip"):
        with pytest.raises(UserError, match=r"subgroup_testing\.txt: the split file is missing"):
            read_all(nifti, policy)


def test_split_file_that_is_none(nifti: Path) -> None:
    write_splits(nifti, testing=["patient0003", "patient12"])
    with pytest.raises(UserError, match="line 2 'patient12' is not a patient name"):
        read_all(nifti)


def test_listed_patient_without_folder(nifti: Path) -> None:
    write_splits(nifti, testing=["patient0003", "patient0009"])
    with pytest.raises(UserError, match=r"patient0009: the folder is missing, though .*subgroup_testing\.txt lists it"):
        read_all(nifti)
    assert len(read_all(nifti, "skip")[1]) == 16


def test_folder_in_no_split_file_is_noted(nifti: Path) -> None:
    write_splits(nifti, training=["patient0001"])
    index, frames, _ = read_all(nifti)
    assert len(frames) == 12
    assert "1 patients are in no split file" in index.notes[0]
    assert "patient0004" in index.notes[0]


def test_roots_that_are_none(tmp_path: Path) -> None:
    for root, says in [
        ("", "data.root: is not set"),
        (str(tmp_path / "no"), "is not a folder"),
        ("s3://b/c", "is a URI"),
    ]:
        with pytest.raises(UserError, match=says):
            open_reader(DataConfig(name="camus", root=root))
    with pytest.raises(UserError, match=r"neither database_nifti/ nor training/"):
        open_reader(DataConfig(name="camus", root=str(tmp_path))).index()


def test_digest_follows_the_files(nifti: Path) -> None:
    reader = CamusReader(str(nifti), 32)
    before = reader.index().digest
    assert reader.index().digest == before
    file = file_of(nifti, f"{BAD}_gt.nii.gz")
    os.utime(file, (1, 1))
    touched = reader.index().digest
    write_splits(nifti, training=["patient0001"])
    assert len({before, touched, reader.index().digest}) == 3
