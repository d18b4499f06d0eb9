"""What is damaged, closed or missing in a CAMUS folder is named, and left out where that is asked for."""

import errno
import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from raysyn.data import pictures
from raysyn.types import UserError
from tests.data.camus_files import (
    BAD,
    SPACING_X,
    annotation,
    file_of,
    picture,
    read_all,
    touch_patient,
    with_header,
    write_mhd,
    write_nifti,
    write_patient,
)


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
