import errno
import gzip
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from raysyn.config import DataConfig
from raysyn.data import pictures
from raysyn.data.camus import NO_TEST, CamusReader, read_info
from raysyn.data.pictures import sector_mask
from raysyn.data.readers import open_reader
from raysyn.labels import LEFT_ATRIUM, LV_CAVITY, MYOCARDIUM, OUTSIDE, TISSUE
from raysyn.types import PHASES, VIEWS, UserError

ROWS, COLUMNS = 60, 40  # of the picture; the arrays in the files are (x, y) = (40, 60)
SPACING_X, SPACING_Y = 0.3, 0.15


def picture() -> np.ndarray:
    """A cone from the top, with a black cavity in it: uint8 [rows, columns]."""
    y, x = np.mgrid[:ROWS, :COLUMNS]
    image = np.where(np.abs(x - COLUMNS / 2) <= y / 3 + 1, 120, 0).astype(np.uint8)
    image[20:30, 17:23] = 0
    return image


def annotation() -> np.ndarray:
    """LV cavity high, myocardium around it, left atrium low in the picture."""
    labels = np.zeros((ROWS, COLUMNS), dtype=np.uint8)
    labels[16:34, 15:26] = 2
    labels[20:30, 17:23] = 1
    labels[40:50, 14:20] = 3
    return labels


def write_nifti(file: Path, values: np.ndarray) -> None:
    image = nibabel.Nifti1Image(values.T, np.diag([-SPACING_X, -SPACING_Y, 1, 1]))
    image.header.set_zooms((SPACING_X, SPACING_Y, 1.0)[: values.ndim])
    nibabel.save(image, file)


def write_mhd(file: Path, values: np.ndarray) -> None:
    image = sitk.GetImageFromArray(values[None])
    image.SetSpacing((SPACING_X, SPACING_Y, 1.0))
    sitk.WriteImage(image, str(file))


def write_patient(folder: Path, suffix: str, write) -> None:
    folder.mkdir(parents=True)
    for view in VIEWS:
        for phase in PHASES:
            stem = f"{folder.name}_{view}_{phase}"
            write(folder / f"{stem}.{suffix}", picture())
            write(folder / f"{stem}_gt.{suffix}", annotation())
        (folder / f"Info_{view}.cfg").write_text(f"ED: 1\nES: 18\nImageQuality: Good{view}\nEF: 56.5\nFrameRate: 50\n")


def touch_patient(folder: Path) -> None:
    """A patient of the older release whose files are empty."""
    folder.mkdir(parents=True)
    for stem in (f"{folder.name}_{view}_{phase}" for view in VIEWS for phase in PHASES):
        for name in (f"{stem}.mhd", f"{stem}_gt.mhd"):
            (folder / name).touch()


def write_splits(root: Path, **splits: list[str]) -> None:
    (root / "database_split").mkdir(exist_ok=True)
    for name, patients in splits.items():
        (root / "database_split" / f"subgroup_{name}.txt").write_text("\n".join(patients) + "\n")


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    """Four patients in the NIfTI release: 0001 and 0004 train, 0002 validation, 0003 test."""
    for number in range(1, 5):
        write_patient(tmp_path / "database_nifti" / f"patient{number:04d}", "nii.gz", write_nifti)
    write_splits(
        tmp_path, training=["patient0004", "patient0001"], validation=["patient0002"], testing=["patient0003", ""]
    )
    return tmp_path


def read_all(root: Path, policy: str = "raise", size: int = 30):
    reader = open_reader(DataConfig(name="camus", root=str(root), image_size=max(size, 32), on_bad_frame=policy))
    reader = CamusReader(reader.root, size, policy)
    index = reader.index()
    frames, skipped = [], list(index.skipped)
    for patient in index.patients:
        found, left_out = reader.read(patient)
        frames += found
        skipped += left_out
    return index, frames, skipped


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


BAD = "patient0002_4CH_ES"


def file_of(root: Path, name: str) -> Path:
    return root / "database_nifti" / "patient0002" / name


def cut(root: Path, name: str) -> None:
    file = file_of(root, name)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def end_cut_off(root: Path, name: str) -> None:
    """All pixels are there; the checksum is not."""
    file = file_of(root, name)
    file.write_bytes(file.read_bytes()[:-1])


def damaged(root: Path, name: str) -> None:
    file = file_of(root, name)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def with_header(root: Path, name: str, at: int, values: bytes) -> None:
    raw = bytearray(gzip.decompress(file_of(root, name).read_bytes()))
    raw[at : at + len(values)] = values
    file_of(root, name).write_bytes(gzip.compress(bytes(raw)))


def header_alone(root: Path, name: str) -> None:
    file = file_of(root, name)
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:352]))


def loop(root: Path, name: str) -> None:
    file_of(root, name).unlink()
    file_of(root, name).symlink_to(name)


def cut_before_compression(root: Path, name: str) -> None:
    file = file_of(root, name)
    whole = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(whole[: len(whole) // 2]))


def rewrite(root: Path, name: str, values: np.ndarray) -> None:
    write_nifti(file_of(root, name), values)


SPOILED = {
    "missing ground truth": (
        lambda r: file_of(r, f"{BAD}_gt.nii.gz").unlink(),
        "_gt.nii.gz: the ground truth is missing",
    ),
    "missing picture": (lambda r: file_of(r, f"{BAD}.nii.gz").unlink(), "the picture is missing"),
    "sizes": (
        lambda r: rewrite(r, f"{BAD}_gt.nii.gz", annotation()[:-2]),
        r"sizes differ: the ground truth is \[58, 40\]",
    ),
    "labels": (
        lambda r: rewrite(r, f"{BAD}_gt.nii.gz", annotation() * 2),
        "unknown label values 4, 6; known are 0 to 3",
    ),
    "half labels": (lambda r: rewrite(r, f"{BAD}_gt.nii.gz", annotation() * 0.5), "unknown label values 0.5, 1.5"),
    "truncated": (lambda r: cut(r, f"{BAD}.nii.gz"), "cannot be read as NIfTI, it may be cut off"),
    "truncated inside": (lambda r: cut_before_compression(r, f"{BAD}.nii.gz"), "cannot be read as NIfTI"),
    "empty": (lambda r: file_of(r, f"{BAD}.nii.gz").write_bytes(b""), "the file is empty"),
    "end cut off": (lambda r: end_cut_off(r, f"{BAD}.nii.gz"), "cannot be read as NIfTI, it may be cut off"),
    "damaged": (lambda r: damaged(r, f"{BAD}.nii.gz"), "cannot be read as NIfTI"),
    "header alone": (lambda r: header_alone(r, f"{BAD}.nii.gz"), r"it is cut off: 352 of \d+ bytes"),
    "data type": (lambda r: with_header(r, f"{BAD}.nii.gz", 70, b"\xf0\x0f"), "its header is damaged"),
    "huge": (lambda r: with_header(r, f"{BAD}.nii.gz", 42, b"\xff\x7f" * 2), r"it is cut off: \d+ of \d+ bytes"),
    "no NIfTI": (lambda r: file_of(r, f"{BAD}.nii.gz").write_bytes(b"<html>"), "cannot be read as NIfTI"),
    "black": (lambda r: rewrite(r, f"{BAD}.nii.gz", picture() * 0), "all black: no scan sector"),
    "grey levels": (lambda r: rewrite(r, f"{BAD}.nii.gz", picture() * 4.0), "grey levels outside 0 to 255"),
    "grey levels of 1": (lambda r: rewrite(r, f"{BAD}.nii.gz", picture() / 255), "scaled to 0 to 1"),
    "colours": (
        lambda r: rewrite(r, f"{BAD}.nii.gz", picture().astype([("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "holds colours, not one picture",
    ),
    "coloured labels": (
        lambda r: rewrite(r, f"{BAD}_gt.nii.gz", annotation().astype([("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "holds colours, not one label map",
    ),
    "complex": (lambda r: rewrite(r, f"{BAD}.nii.gz", picture() * 1j), "holds complex128 numbers, not one picture"),
    "one axis": (
        lambda r: with_header(r, f"{BAD}.nii.gz", 40, (1).to_bytes(2, "little")),
        r"an array of shape \[40\], not one picture",
    ),
    "a clip": (lambda r: rewrite(r, f"{BAD}.nii.gz", np.stack([picture()] * 3)), "not one picture"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_bad_frames(nifti: Path, kind: str) -> None:
    spoil, says = SPOILED[kind]
    spoil(nifti)
    with pytest.raises(UserError, match=rf"{BAD}.*{says}") as caught:
        read_all(nifti)
    assert "\n" not in str(caught.value)
    assert "on_bad_frame=skip" in str(caught.value)
    _, frames, skipped = read_all(nifti, "skip")
    assert len(frames) == 15
    assert [Path(s.file).name.startswith(BAD) for s in skipped] == [True]
    assert BAD not in {f.frame_id for f in frames}


def test_no_permission(nifti: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = open

    def refuse(file, *args, **kwargs):
        if str(file).endswith(f"{BAD}.nii.gz"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(pictures, "open", refuse, raising=False)
    with pytest.raises(UserError, match=rf"{BAD}\.nii\.gz: no permission to read it"):
        read_all(nifti)
    assert len(read_all(nifti, "skip")[1]) == 15


def refusal_to_another_user(root: Path) -> str:
    """What a user without rights of its own is told of `root`; "" when it reads all."""
    read_all(root, "skip")  # what is imported lazily may lie where only root reads
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            read_all(root)
        except UserError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        message = told.read()
    os.waitpid(child, 0)
    return message


@pytest.mark.skipif(os.getuid() != 0, reason="drops root's rights")
@pytest.mark.parametrize(
    "closed",
    [
        "",
        "database_split/subgroup_testing.txt",
        "database_nifti/patient0002",
        "database_nifti/patient0002/Info_2CH.cfg",
    ],
)
def test_no_permission_for_real(open_tmp_path: Path, nifti: Path, closed: str) -> None:
    (nifti / closed).chmod(0o600)
    message = refusal_to_another_user(nifti)
    assert str(nifti / closed) in message
    assert "no permission to read it" in message


@pytest.mark.skipif(os.getuid() != 0, reason="drops root's rights")
def test_a_closed_folder_of_the_older_release_is_not_one_without_ground_truth(open_tmp_path: Path) -> None:
    root = open_tmp_path
    for number in range(1, 52):
        touch_patient(root / "training" / f"patient{number:04d}")
    write_patient(root / "testing" / "patient0001", "mhd", write_mhd)
    (root / "testing" / "patient0001").chmod(0o700)
    assert refusal_to_another_user(root).startswith(f"{root / 'testing' / 'patient0001'}: no permission to read it")


def test_a_loop_of_links_is_named(nifti: Path) -> None:
    loop(nifti, f"{BAD}.nii.gz")
    with pytest.raises(UserError, match=rf"{BAD}\.nii\.gz: cannot be read \(Too many levels"):
        read_all(nifti)


def test_a_header_that_nibabel_mends_aloud_is_read_in_silence(nifti: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with_header(nifti, f"{BAD}.nii.gz", 76, np.array([-1, -SPACING_X], "<f4").tobytes())  # a negative spacing
    _, frames, _ = read_all(nifti)
    assert len(frames) == 16
    assert not capfd.readouterr().err


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


@pytest.mark.parametrize("spoil", ["raw cut", "raw gone", "header cut"])
def test_broken_metaimage(tmp_path: Path, spoil: str) -> None:
    for number in range(1, 51):
        (tmp_path / "training" / f"patient{number:04d}").mkdir(parents=True)
    folder = tmp_path / "training" / "patient0051"
    write_patient(folder, "mhd", write_mhd)
    raw, header = folder / "patient0051_2CH_ES.raw", folder / "patient0051_2CH_ES.mhd"
    if spoil == "raw cut":
        raw.write_bytes(raw.read_bytes()[:100])
    elif spoil == "raw gone":
        raw.unlink()
    else:
        header.write_bytes(header.read_bytes()[:40])
    _, frames, skipped = read_all(tmp_path, "skip")
    assert len(frames) == 3
    (bad,) = [s for s in skipped if "patient0051" in s.file]
    assert bad.file == str(header)
    assert "cannot be read as MetaImage" in bad.reason
