"""A stage's folder: what its manifest names is found where the storage is now."""

import hashlib
from pathlib import Path

import pytest

from raysyn.cluster.stage import below_storage, lost_shards, open_stage
from raysyn.types import UserError

FRAMES, VAE, FIT = "0" * 16, "1" * 16, "2" * 16


def test_what_a_manifest_names_is_found_where_its_storage_was_moved_or_copied_to(tmp_path: Path) -> None:
    runs = str(tmp_path / "runs")
    frames = open_stage(runs, "prepare", FRAMES)
    frames.finish({"frames": frames.path})
    vae = open_stage(runs, "fit_autoencoder", VAE)
    vae.storage.write_json("model/config.json", {})
    vae.finish({"frames": frames.path, "model_dir": f"{vae.path}/model", "autoencoder": ""})
    fitted = open_stage(runs, "fit", FIT)
    theirs = str(tmp_path / "theirs" / "model")
    fitted.finish({"frames": frames.path, "model_dir": theirs, "autoencoder": f"{vae.path}/model"})
    moved = (tmp_path / "runs").rename(tmp_path / "runs2")
    read = {stage: open_stage(str(moved), stage, key).outcome() for stage, key in (("prepare", FRAMES), ("fit", FIT))}
    assert read["prepare"].manifest["frames"] == f"{moved}/prepare/{FRAMES}"
    assert read["fit"].manifest["frames"] == f"{moved}/prepare/{FRAMES}"
    assert read["fit"].manifest["autoencoder"] == f"{moved}/fit_autoencoder/{VAE}/model"
    assert read["fit"].manifest["model_dir"] == theirs, "lies elsewhere"


def test_a_shard_of_the_same_size_and_other_bytes_is_made_again(tmp_path: Path) -> None:
    stage = open_stage(str(tmp_path), "prepare", FRAMES)
    shards = []
    for name in ("train/a.parquet", "train/b.parquet"):
        stage.storage.write_atomic(name, name.encode())
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        shards.append({"name": name, "bytes": len(name), "sha256": sha256})
    manifest = stage.finish({"shards": shards}).manifest
    assert not lost_shards(stage, manifest)
    stage.storage.write_atomic("train/b.parquet", b"train/x.parquet")
    assert lost_shards(stage, manifest)
    assert stage.storage.list() == ["train/a.parquet"]
    assert stage.outcome() is None


def test_a_stages_place_is_told_from_any_other() -> None:
    assert below_storage(f"/a/task/{FIT}/model") == f"task/{FIT}/model"
    assert below_storage(f"s3://b/a/prepare/{FIT}?region=x") == f"prepare/{FIT}"
    assert below_storage("/a/task/model") == ""


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"stage": "fit", "fingerprint": "f1"}', '{"stage": "prep'])
def test_a_manifest_of_something_else_is_named_and_stays(tmp_path: Path, content: str) -> None:
    stage = open_stage(str(tmp_path), "prepare", FRAMES)
    stage.storage.write_atomic("manifest.json", content.encode())
    with pytest.raises(UserError, match=r"manifest\.json: .*remove it and run again"):
        stage.outcome()
    assert stage.storage.read_bytes("manifest.json").decode() == content
