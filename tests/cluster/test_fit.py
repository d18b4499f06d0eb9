"""The fit stage on a real Ray: models come out, workers share a batch, bad input is one line, a second run skips."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raysyn.cluster.fit import check, fit, fit_fingerprint
from raysyn.cluster.fit_data import collect, frame_dataset, in_order, read_directly
from raysyn.cluster.inputs import frames_uri, prepare, prepare_fingerprint
from raysyn.cluster.session import ray_session
from raysyn.compose import load_job
from raysyn.config import FitJob, PrepareJob, RayConfig
from raysyn.data.storage import Storage
from raysyn.types import Outcome, UserError

TINY = [
    "scale=demo",
    "data.num_train_patients=3",
    "data.num_validation_patients=1",
    "data.num_test_patients=1",
    "workers.cpus_per_worker=0.5",
    "model.net.base_channels=8",
    "model.net.spade_hidden=4",
    "model.fit.num_images=80",
    "model.fit.global_batch=4",
    "model.fit.micro_batch=4",
    "model.fit.amp=none",
    "model.fit.num_validation_images=4",
    "model.fit.checkpoint_every_steps=10",
    "tracking.enabled=false",
]
LATENT = ["model.vae.channels=[8]", "model.vae.fit.num_images=64", "model.vae.fit.num_validation_images=4"]


def job(storage: Path, *overrides: str) -> FitJob:
    config: FitJob = load_job("fit", [*TINY, f"storage={storage}", *overrides])
    return config


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A storage with prepared frames, Ray running."""
    path = tmp_path_factory.mktemp("fit")
    with ray_session(RayConfig(num_cpus=2, object_store_mb=128)):
        prepare(prepare_job(job(path, "model=edm")))
        yield path


def prepare_job(config: FitJob) -> PrepareJob:
    return PrepareJob(**{f.name: getattr(config, f.name) for f in dataclasses.fields(PrepareJob)})


def losses_of(outcome: Outcome) -> list[float]:
    loss: list[float] = json.loads((Path(outcome.path) / "history.json").read_text())["loss"]
    return loss


@pytest.fixture(scope="module")
def pixel(storage: Path) -> Outcome:
    return fit(job(storage, "model=edm"))


@pytest.mark.cluster
def test_a_pixel_model_comes_out_and_draws(storage: Path, pixel: Outcome) -> None:
    from raysyn.pipeline import load_model_dir, synthesize_images

    manifest = pixel.manifest
    assert manifest["num_steps"] == 20
    assert manifest["images_seen"] == 80
    assert manifest["num_train_frames"] == 12
    assert manifest["train_cpu_seconds"] > 0
    assert manifest["validation_loss"] > 0
    model = load_model_dir(manifest["model_dir"])
    assert model.checkpoint_sha256 == manifest["checkpoint_sha256"]
    frames = read_directly(frames_uri(prepare(prepare_job(job(storage, "model=edm")))), "validation")
    images = synthesize_images(model, frames.label_map, frames.view, list(range(len(frames))))
    assert images.shape == (4, 64, 64)
    assert not images[frames.label_map == 0].any()
    assert (Path(pixel.path) / "samples" / "step-000000020.png").is_file()
    losses = losses_of(pixel)
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.cluster
def test_a_second_run_finds_it_done(storage: Path, pixel: Outcome) -> None:
    again = fit(job(storage, "model=edm"))
    assert again.skipped
    assert again.path == pixel.path
    assert again.manifest == pixel.manifest
    with pytest.raises(UserError, match="what: autoencoder: edm works on pixels"):
        fit(job(storage, "model=edm", "what=autoencoder"))


@pytest.mark.cluster
def test_two_workers_ray_data_and_another_memory_layout_give_the_same_loss_curve(
    storage: Path, pixel: Outcome, tmp_path: Path
) -> None:
    other = ("workers.num_workers=2", "workers.ray_data_from_mb=0", "model.fit.channels_last=true")
    two = fit(job(tmp_path, "model=edm", *other))
    assert two.fingerprint == pixel.fingerprint
    assert np.allclose(losses_of(pixel), losses_of(two), rtol=0, atol=1e-4)
    assert two.manifest["validation_loss"] == pytest.approx(pixel.manifest["validation_loss"], abs=1e-4)


@pytest.mark.cluster
def test_what_one_rank_of_two_cannot_do_is_one_line_and_the_fit_goes_on_later(
    storage: Path, pixel: Outcome, tmp_path: Path
) -> None:
    """Rank 0 alone meets the full disk; the other waits for it. No retry after retry, and no fault: bad input."""
    config = job(tmp_path, "model=edm", "workers.num_workers=2", "workers.max_failures=3")
    prepare(prepare_job(config))
    stage = tmp_path / "fit" / fit_fingerprint(config, prepare_fingerprint(config))
    place = stage / "checkpoints"
    place.mkdir(parents=True)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with pytest.raises(UserError, match=r"no space left"):
            fit(config)
        assert not (stage / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=50m", str(place)], check=True)
        assert np.allclose(losses_of(pixel), losses_of(fit(config)), rtol=0, atol=1e-4)
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.cluster
def test_a_latent_model_shares_its_autoencoder(storage: Path) -> None:
    first = fit(job(storage, "model=edm_l128", *LATENT, "what=autoencoder"))
    assert first.stage == "fit_autoencoder"
    assert first.manifest["perceptual_term"].startswith("off: no weights")
    config = job(storage, "model=edm_l128", *LATENT, "model.fit.latent_copies=2")
    whole = fit(config)
    assert whole.stage == "fit"
    assert whole.manifest["autoencoder"] == first.manifest["model_dir"]
    assert len(list(Path(storage / "fit_autoencoder").iterdir())) == 1
    latents = Storage.at(whole.path).list("latents")
    assert latents == [f"latents/{n}.parquet" for n in ("train/copy-000", "train/copy-001", "validation/copy-000")]
    from raysyn.nets.codecs import LatentCodec
    from raysyn.pipeline import load_model_dir

    codec = load_model_dir(whole.manifest["model_dir"]).codec
    assert isinstance(codec, LatentCodec)
    assert float(codec.vae.latent_std) != 1.0, "latents are standardised by their own statistics"
    fly = fit(job(storage, "model=edm_l128", *LATENT, "model.fit.latents=on_the_fly"))
    assert fly.manifest["autoencoder"] == first.manifest["model_dir"]
    assert fly.path != whole.path


@pytest.mark.cluster
def test_plan_only_tells_each_part_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(tmp_path, "model=edm_l128", *LATENT, "plan_only=true", "cost.usd_per_cpu_hour=0.5")
    with ray_session(RayConfig(num_cpus=2, object_store_mb=128)):
        outcome = fit(config)
    assert outcome.skipped
    assert not list(tmp_path.iterdir())
    plans = outcome.manifest["plan"]
    assert list(plans) == ["autoencoder", "diffusion"]
    assert [p["num_steps"] for p in plans.values()] == [4, 20]
    for plan in plans.values():
        assert plan["hours"] == pytest.approx(plan["seconds_per_step"] * plan["num_steps"] / 3600)
        assert plan["usd"] == pytest.approx(plan["hours"] * 0.5 * 0.5), "half a core at half a dollar an hour"
        assert plan["parameters"] > 0 < plan["gflops_per_step"]
        assert 0 < plan["memory_gb"] < 8
    said = capsys.readouterr().out
    assert "fit plan: edm_l128 autoencoder:" in said
    assert "fit plan: edm_l128 diffusion:" in said


@pytest.mark.cluster
def test_ray_data_reads_what_a_direct_read_gives(storage: Path) -> None:
    uri = frames_uri(prepare(prepare_job(job(storage, "model=edm"))))
    by_ray, direct = collect(frame_dataset(uri, "train")), read_directly(uri, "train")
    assert by_ray.frame_id == direct.frame_id == sorted(direct.frame_id)
    assert by_ray.patient_id == direct.patient_id, (
        "a model says on whom it was fitted, so that no task is tested on them"
    )
    for key in ("image_u8", "label_map", "view"):
        assert np.array_equal(getattr(by_ray, key), getattr(direct, key))
    assert in_order(direct.take(np.arange(12)[::-1])).frame_id == direct.frame_id


@pytest.mark.cluster
def test_bad_input_is_one_line(storage: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"workers\.max_resident_gb: the frames take"):
        fit(job(storage, "model=edm", "model.fit.seed=5", "workers.max_resident_gb=0.00001"))
    with pytest.raises(UserError, match="no test frames"):
        read_directly(str(tmp_path), "test")
    empty = job(tmp_path, "model=edm")
    place = Storage.at(prepare(prepare_job(empty)).path)

    def leave_out(split: str) -> None:
        """As data are prepared of which nobody is in `split`."""
        place.remove_tree(split)
        manifest = place.read_json("manifest.json")
        shards = [shard for shard in manifest["shards"] if not shard["name"].startswith(split)]
        place.write_json("manifest.json", {**manifest, "shards": shards})

    leave_out("validation")
    with pytest.raises(UserError, match="no validation frames"):
        fit(empty)
    leave_out("train")
    with pytest.raises(UserError, match="no train frames"):
        fit(dataclasses.replace(empty, model=dataclasses.replace(empty.model, name="other")))


def test_sizes_and_workers_are_checked_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.image_size: 66 is not a multiple of 4, the stride of edm"):
        check(job(tmp_path, "model=edm", "data.image_size=66"))
    with pytest.raises(UserError, match=r"workers\.num_workers: 5 is more than model\.fit\.global_batch 4"):
        check(job(tmp_path, "model=edm", "workers.num_workers=5"))
    with pytest.raises(UserError, match=r"workers\.min_workers: 3 is above num_workers 2"):
        check(job(tmp_path, "model=edm", "workers.num_workers=2", "workers.min_workers=3"))


def test_damaged_latents_are_told_by_name(tmp_path: Path) -> None:
    from raysyn.cluster.fit_latents import Encoded, load_moments, moments_to_bytes
    from raysyn.config import WorkersConfig
    from raysyn.models import build_vae
    from raysyn.training_batches import FrameSource

    pictures = np.zeros((2, 8, 8), np.uint8)
    sets = {"train": Encoded(FrameSource(pictures, pictures, np.zeros(2, np.uint8), 0), ["a", "b"])}
    whole = moments_to_bytes(np.ones((2, 2, 1, 4, 4), np.float32), ["a", "b"], 0, ("shape", "rate"))
    place, vae = Storage.at(tmp_path), build_vae(job(tmp_path, "model=edm_l128", *LATENT).model)
    place.write_atomic("train/copy-000.parquet", whole)
    assert load_moments(place, sets, WorkersConfig(), vae).train.shape == (1, 2, 2, 1, 4, 4)
    place.write_atomic("train/copy-000.parquet", whole[:-9])
    with pytest.raises(UserError, match=r"train/copy-000\.parquet: damaged \(.*remove it and run again"):
        load_moments(place, sets, WorkersConfig(), vae)


def test_the_fingerprint_follows_what_decides_the_result(tmp_path: Path) -> None:
    base = fit_fingerprint(job(tmp_path, "model=edm_l128"), "frames")
    same = (
        "model.fit.log_every_steps=7",
        "model.fit.micro_batch=2",
        "model.sampler.num_steps=9",
        "workers.num_workers=2",
    )
    for override in same:
        assert fit_fingerprint(job(tmp_path, "model=edm_l128", override), "frames") == base, override
    other = ("model.fit.lr=0.5", "model.net.base_channels=16", "model.vae.weight_kl=0.5", "model.vae.fit.seed=3")
    for override in other:
        assert fit_fingerprint(job(tmp_path, "model=edm_l128", override), "frames") != base, override
    assert fit_fingerprint(job(tmp_path, "model=edm_l128"), "other frames") != base
    pixel_model = fit_fingerprint(job(tmp_path, "model=edm"), "frames")
    assert fit_fingerprint(job(tmp_path, "model=edm", "model.vae.weight_kl=0.5"), "frames") == pixel_model
