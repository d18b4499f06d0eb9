"""A stage's folder: what its manifest names is found where the storage is now."""

from pathlib import Path

from raysyn.cluster.stage import below_storage, open_stage

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


def test_a_stages_place_is_told_from_any_other() -> None:
    assert below_storage(f"/a/task/{FIT}/model") == f"task/{FIT}/model"
    assert below_storage(f"s3://b/a/prepare/{FIT}?region=x") == f"prepare/{FIT}"
    assert below_storage("/a/task/model") == ""
