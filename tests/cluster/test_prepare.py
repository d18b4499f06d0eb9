import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest

from raysyn.cluster.inputs import (
    PATIENTS_PER_SHARD,
    frames_uri,
    make_chunks,
    make_shard,
    prepare,
    prepare_fingerprint,
)
from raysyn.cluster.session import ray_session
from raysyn.cluster.stage import open_stage
from raysyn.config import DataConfig, PrepareJob, RayConfig
from raysyn.data.frames import read_arrays, read_frames
from raysyn.data.readers import Patient, open_reader
from raysyn.data.storage import Storage
from raysyn.types import PHASES, VIEWS, Outcome, UserError
from tests.s3 import KEYS, s3_storage

ROOT = Path(__file__).resolve().parents[2]
RAY = RayConfig(num_cpus=2, object_store_mb=100)


@pytest.fixture(scope="module")
def session():
    """Ray whose workers have S3 credentials, as they take their environment from where Ray was started."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in KEYS.items():
            patch.setenv(key, value)
        with ray_session(RAY):
            yield


def phantom_job(storage: Path | str, **changes) -> PrepareJob:
    data = {"image_size": 32, "num_train_patients": 35, "num_validation_patients": 2, "num_test_patients": 3}
    return PrepareJob(storage=str(storage), data=DataConfig(**{**data, **changes}), ray=RAY)


def camus_job(storage: Path, root: Path, policy: str = "raise") -> PrepareJob:
    data = DataConfig(name="camus", root=str(root), image_size=32, on_bad_frame=policy)
    return PrepareJob(storage=str(storage), data=data, ray=RAY)


def counted(uri: str) -> dict[str, dict[str, int]]:
    """What a manifest counts, from the frames themselves: no frame comes twice, no patient is in two splits."""
    frames = list(read_frames(uri))
    assert len({f.frame_id for f in frames}) == len(frames)
    patients = {(f.patient_id, f.split) for f in frames}
    assert len({patient for patient, _ in patients}) == len(patients)
    return {"num_frames": Counter(f.split for f in frames), "num_patients": Counter(split for _, split in patients)}


def write_camus(root: Path, num_patients: int = 36) -> Path:
    """The NIfTI release with tiny pictures: the last two patients are validation and test."""
    y, x = np.mgrid[:24, :20]
    image = np.where(np.abs(x - 10) <= y / 2, 90, 0).astype(np.uint8)
    labels = np.zeros_like(image)
    labels[8:16, 7:13], labels[9:14, 8:12], labels[17:21, 8:12] = 2, 1, 3
    names = [f"patient{i:04d}" for i in range(1, num_patients + 1)]
    for name in names:
        folder = root / "database_nifti" / name
        folder.mkdir(parents=True)
        for view in VIEWS:
            (folder / f"Info_{view}.cfg").write_text("EF: 61\nImageQuality: Good\n")
            for phase in PHASES:
                for end, values in (("", image), ("_gt", labels)):
                    file = folder / f"{name}_{view}_{phase}{end}.nii.gz"
                    nibabel.save(nibabel.Nifti1Image(values.T, np.eye(4)), file)
    (root / "database_split").mkdir()
    for split, listed in (("training", names[:-2]), ("validation", names[-2:-1]), ("testing", names[-1:])):
        (root / "database_split" / f"subgroup_{split}.txt").write_text("\n".join(listed))
    return root


def shards(outcome: Outcome) -> dict[str, bytes]:
    storage = Storage.at(outcome.path)
    return {name: storage.read_bytes(name) for name in storage.list(suffix=".parquet")}


def test_chunks_keep_patients_whole_and_apart() -> None:
    patients = [Patient(f"p{i}", "test" if i % 7 == 0 else "train") for i in range(100)]
    chunks = make_chunks(patients)
    assert [c.name for c in chunks] == [f"train/shard-{i:05d}.parquet" for i in range(3)] + ["test/shard-00000.parquet"]
    assert [p for c in chunks[:3] for p in c.patients] == [p for p in patients if p.split == "train"]
    assert max(len(c.patients) for c in chunks) == PATIENTS_PER_SHARD
    with pytest.raises(UserError, match="p1: comes twice"):
        make_chunks([Patient("p1", "train"), Patient("p1", "test")])


def test_fingerprint_names_what_decides_the_frames(tmp_path: Path) -> None:
    base = prepare_fingerprint(phantom_job(tmp_path))
    assert prepare_fingerprint(phantom_job("elsewhere", on_bad_frame="skip", root="/no")) == base
    others = [{"seed": 1}, {"image_size": 64}, {"num_train_patients": 36}]
    assert len({base, *(prepare_fingerprint(phantom_job(tmp_path, **o)) for o in others)}) == 4
    real = write_camus(tmp_path / "camus", 3)
    before = prepare_fingerprint(camus_job(tmp_path, real))
    os.utime(real / "database_nifti" / "patient0001" / "patient0001_2CH_ED.nii.gz", (1, 1))
    assert prepare_fingerprint(camus_job(tmp_path, real)) != before
    (tmp_path / "png" / "images" / "training").mkdir(parents=True)
    pictures = [
        DataConfig(name="png_folder", root=str(tmp_path / "png"), source=source) for source in ("real", "synthetic")
    ]
    assert len({prepare_fingerprint(PrepareJob(data=data)) for data in pictures}) == 2, (
        "else one is taken for the other"
    )


def test_plan_only_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = phantom_job(tmp_path / "runs")
    job.plan_only = True
    outcome = prepare(job)
    assert outcome.manifest["plan"] == {"train": 35, "validation": 2, "test": 3}
    assert "35 train, 2 validation, 3 test; 4 shards" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.cluster
def test_phantom(session, tmp_path: Path) -> None:
    outcome = prepare(phantom_job(tmp_path))
    manifest = outcome.manifest
    assert Path(outcome.path) == tmp_path / "prepare" / outcome.fingerprint
    assert frames_uri(outcome) == outcome.path
    assert (manifest["data"], manifest["image_size"], manifest["schema_version"]) == ("phantom", 32, "1")
    assert manifest["num_frames"] == {"train": 140, "validation": 8, "test": 12}
    assert manifest["num_patients"] == {"train": 35, "validation": 2, "test": 3}
    assert manifest["num_frames_by_view"]["test"] == {"2CH": 6, "4CH": 6}
    assert {key: manifest[key] for key in ("num_frames", "num_patients")} == counted(outcome.path)
    assert {f.source for f in read_frames(outcome.path)} == {"phantom"}
    reader = open_reader(phantom_job(tmp_path).data)
    assert {f.patient_id for f in read_frames(outcome.path)} == {p.patient_id for p in reader.index().patients}
    assert read_arrays(outcome.path, "test").image_u8.shape == (12, 32, 32)
    again = prepare(phantom_job(tmp_path))
    assert again.skipped
    assert again.manifest == manifest
    for name, damage in (("train/shard-00000.parquet", b"PAR1"), ("test/shard-00000.parquet", None)):
        place = Path(outcome.path, name)
        place.unlink() if damage is None else place.write_bytes(damage)
        assert prepare(phantom_job(tmp_path)).manifest["shards"] == manifest["shards"], "made again"


@pytest.mark.cluster
def test_shards_are_the_same_bytes_anywhere_and_those_present_are_kept(session, tmp_path: Path) -> None:
    job = phantom_job(tmp_path / "a")
    outcome = prepare(job)
    first = shards(outcome)
    assert len(first) == 4
    reader = open_reader(job.data)
    alone = Storage.at(tmp_path / "alone")
    for chunk in reversed(make_chunks(reader.index().patients)):
        entry, data = make_shard(reader, chunk, alone, write=False)
        assert data == first[chunk.name]
        assert {**entry, "skipped": []} == {
            **next(e for e in outcome.manifest["shards"] if e["name"] == chunk.name),
            "skipped": [],
        }
    gone = "train/shard-00001.parquet"
    folder = Path(outcome.path)
    (folder / gone).unlink()
    (folder / "manifest.json").unlink()
    stamps = {name: (folder / name).stat().st_mtime_ns for name in first if name != gone}
    resumed = prepare(job)
    assert not resumed.skipped
    assert shards(resumed) == first
    assert {name: (folder / name).stat().st_mtime_ns for name in stamps} == stamps
    assert resumed.manifest["shards"] == outcome.manifest["shards"]


@pytest.mark.cluster
def test_overwrite_makes_it_again(session, tmp_path: Path) -> None:
    outcome = prepare(phantom_job(tmp_path, num_train_patients=1))
    stamp = (Path(outcome.path) / "train" / "shard-00000.parquet").stat().st_mtime_ns
    job = phantom_job(tmp_path, num_train_patients=1)
    job.overwrite = True
    again = prepare(job)
    assert not again.skipped
    assert (Path(again.path) / "train" / "shard-00000.parquet").stat().st_mtime_ns > stamp


@pytest.mark.cluster
def test_camus(session, tmp_path: Path) -> None:
    outcome = prepare(camus_job(tmp_path / "runs", write_camus(tmp_path / "camus")))
    assert outcome.manifest["num_frames"] == {"train": 136, "validation": 4, "test": 4}
    assert outcome.manifest["skipped"] == []
    facts = outcome.manifest["patients"]["patient0036"]
    assert facts == {"split": "test", "ejection_fraction": 61.0, "image_quality": {"2CH": "Good", "4CH": "Good"}}
    assert counted(outcome.path)["num_patients"] == {"test": 1, "train": 34, "validation": 1}
    assert {f.source for f in read_frames(outcome.path)} == {"real"}


@pytest.mark.cluster
def test_one_bad_frame_and_nothing_is_written(session, tmp_path: Path) -> None:
    """The bad one is in the last shard, so that others are ready before it is found."""
    root = write_camus(tmp_path / "camus")
    bad = root / "database_nifti" / "patient0036" / "patient0036_4CH_ED_gt.nii.gz"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(UserError, match=r"patient0036_4CH_ED_gt\.nii\.gz: cannot be read as NIfTI"):
        prepare(camus_job(tmp_path / "runs", root))
    assert not (tmp_path / "runs").exists()
    outcome = prepare(camus_job(tmp_path / "runs", root, "skip"))
    assert outcome.manifest["num_frames"] == {"train": 136, "validation": 4, "test": 3}
    (left_out,) = outcome.manifest["skipped"]
    assert left_out["file"] == str(bad)
    assert "cannot be read" in left_out["reason"]
    (Path(outcome.path) / "manifest.json").unlink()
    assert prepare(camus_job(tmp_path / "runs", root, "skip")).manifest["skipped"] == [left_out]


@pytest.mark.cluster
def test_a_worker_that_cannot_write_gives_one_clear_line(session, tmp_path: Path) -> None:
    job = phantom_job(tmp_path, num_train_patients=1)
    place = tmp_path / "prepare" / prepare_fingerprint(job)
    place.mkdir(parents=True)
    (place / "train").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"shard-00000\.parquet: a file stands where a folder should be") as caught:
        prepare(job)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_done_is_said_before_ray_starts_and_removes_nothing(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_) -> None:
        raise UserError("ray.address: cannot reach it")

    monkeypatch.setattr("raysyn.cluster.inputs.ray_session", refuse)
    (tmp_path / "file").write_text("oops")
    with pytest.raises(UserError, match="a file stands where a folder should be"):
        prepare(phantom_job(tmp_path / "file"))
    job = phantom_job(tmp_path)
    stage = open_stage(str(tmp_path), "prepare", prepare_fingerprint(job))
    stage.storage.write_atomic("train/shard-00009.parquet", b"of elsewhere")
    with pytest.raises(UserError, match=r"shard-00009\.parquet: not a shard of this data set"):
        prepare(job)
    stage.storage.remove("train/shard-00009.parquet")
    stage.finish({"shards": []})
    job.overwrite = True
    with pytest.raises(UserError, match="cannot reach it"):
        prepare(job)
    assert stage.outcome() is not None


def test_a_shard_that_was_damaged_meanwhile_is_made_again(tmp_path: Path) -> None:
    """Cut off, or with one byte of a picture changed, which neither Parquet's footer nor the other columns show."""
    reader = open_reader(phantom_job(tmp_path, num_train_patients=1).data)
    (chunk, *_), storage = make_chunks(reader.index().patients), Storage.at(tmp_path)
    made, _ = make_shard(reader, chunk, storage, True)
    assert make_shard(reader, chunk, storage, True)[0] == made, "found as it was made"
    whole = storage.read_bytes(chunk.name)
    spoilt = {whole[:-9]: "not a whole Parquet file", b"": "not a whole Parquet file"}
    group = pq.read_metadata(tmp_path / chunk.name).row_group(0)
    for column in (group.column(i) for i in range(group.num_columns)):
        if column.path_in_schema in ("image.bytes", "label_map.bytes"):
            for part in (3, 5, 7):
                changed = bytearray(whole)
                changed[column.data_page_offset + column.total_compressed_size * part // 9] ^= 1
                spoilt[bytes(changed)] = "shard-00000.parquet: "
    assert len(spoilt) == 8
    for content, says in spoilt.items():
        storage.write_atomic(chunk.name, content)
        again, _ = make_shard(reader, chunk, storage, True)
        assert says in again.pop("damaged")
        assert again == made
        assert storage.read_bytes(chunk.name) == whole


@pytest.mark.skipif(os.getuid() != 0, reason="drops root's rights")
def test_a_shard_that_may_not_be_read_is_named_and_stays(open_tmp_path: Path) -> None:
    reader = open_reader(phantom_job(open_tmp_path, num_train_patients=1).data)
    (chunk, *_), storage = make_chunks(reader.index().patients), Storage.at(open_tmp_path / "set")
    make_shard(reader, chunk, storage, True)
    file = open_tmp_path / "set" / chunk.name
    file.chmod(0)
    file.parent.chmod(0o777)
    code = (
        "import os, pickle, sys\n"
        "from raysyn.cluster.inputs import make_shard\n"
        "arguments = pickle.load(sys.stdin.buffer)\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "print(make_shard(*arguments, True)[0]['problem'])\n"
    )
    given = pickle.dumps((reader, chunk, storage))
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=given, capture_output=True, timeout=120)
    assert b"shard-00000.parquet: no permission" in ran.stdout, ran.stderr
    assert file.exists()


@pytest.mark.cluster
@pytest.mark.s3
def test_prepare_into_s3(session, tmp_path: Path) -> None:
    with s3_storage() as uri:
        outcome = prepare(phantom_job(uri, num_train_patients=2))
        local = prepare(phantom_job(tmp_path, num_train_patients=2))
        assert outcome.fingerprint == local.fingerprint
        assert shards(outcome) == shards(local)
        assert len(read_arrays(frames_uri(outcome), "train")) == 8
        assert prepare(phantom_job(uri, num_train_patients=2)).skipped


def run_job(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/prepare.py", "ray.num_cpus=2", "ray.object_store_mb=100", *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_the_job_refuses_bad_input_with_exit_code_2(tmp_path: Path) -> None:
    root = write_camus(tmp_path / "camus", 3)
    (root / "database_nifti" / "patient0002" / "patient0002_2CH_ES_gt.nii.gz").unlink()
    ran = run_job("data=camus", f"data.root={root}", f"storage={tmp_path / 'runs'}")
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "patient0002_2CH_ES_gt.nii.gz: the ground truth is missing" in ran.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.cluster
@pytest.mark.slow
def test_the_job_goes_on_after_kill_9(tmp_path: Path) -> None:
    settings = ["data.image_size=32", "data.num_train_patients=64", "data.num_validation_patients=1"]
    settings += ["data.num_test_patients=1", f"storage={tmp_path}"]
    command = [sys.executable, "jobs/prepare.py", "ray.num_cpus=1", "ray.object_store_mb=100", *settings]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    whole: list[Path] = []
    while not whole and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        whole = list(tmp_path.glob("prepare/*/train/shard-*.parquet"))
    job.send_signal(signal.SIGKILL)
    job.wait(timeout=30)
    assert whole
    assert not list(tmp_path.glob("prepare/*/manifest.json"))
    stamps = {file: file.stat().st_mtime_ns for file in whole}
    ran = run_job(*settings)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (manifest,) = tmp_path.glob("prepare/*/manifest.json")
    assert json.loads(manifest.read_text())["num_frames"]["train"] == 256
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert counted(str(manifest.parent))["num_patients"]["train"] == 64
    assert f"prepare: done: {manifest.parent}" in ran.stdout
