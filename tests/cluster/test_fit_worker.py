"""A worker's own decisions, without Ray: its device, and what it says of a fit that diverged."""

from types import SimpleNamespace

import pytest
import torch

from raysyn.cluster import fit_worker as room
from raysyn.cluster.fit_build import WorkerJob, load_autoencoder
from raysyn.compose import load_job
from raysyn.data.storage import Storage
from raysyn.training import Diverged
from raysyn.types import UserError


def test_a_cpu_fit_on_a_machine_with_a_gpu_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.train.torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        ray.train.torch, "get_device", lambda: torch.device("cpu")
    )  # what Ray says without GPUs asked for
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    assert room._parallel(context).device.type == "cpu"


@pytest.mark.parametrize(("what", "part"), [("diffusion", "model.fit"), ("autoencoder", "model.vae.fit")])
def test_divergence_comes_with_what_to_change(tmp_path, monkeypatch: pytest.MonkeyPatch, what: str, part: str) -> None:
    import ray.train

    def diverge(job: object, parallel: object) -> None:
        raise Diverged("fit diverged: loss nan")

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(room, "_fit", diverge)
    monkeypatch.setattr(room, "relay_warnings", lambda key: None)  # no Ray here to relay to
    job = WorkerJob(load_job("fit", ["scale=tiny"]), what, "key", str(tmp_path), "")
    report = room.fit_worker(job)
    assert report["status"] == "diverged"
    assert report["message"].startswith(f"fit diverged: loss nan; try a lower {part}.lr, {part}.grad_clip=1")


def test_a_damaged_autoencoder_is_one_line(tmp_path) -> None:
    from raysyn.models import build_vae
    from raysyn.pipeline import weights_sha256

    folder, stage = tmp_path / "model", Storage.at(tmp_path)
    build_vae(load_job("fit", ["scale=tiny", "model=edm_l128"]).model).save_pretrained(folder)
    stage.write_json("manifest.json", {"checkpoint_sha256": weights_sha256(folder)})
    assert load_autoencoder(str(folder)).decoder is not None
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damaged, said in ((whole[:-1] + b"x", "not those that were written"), (whole[:-9], "cannot be read")):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{folder}: .*{said}.*remove {tmp_path} and run again"):
            load_autoencoder(str(folder))
    weights.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_autoencoder(str(folder))
