"""A fitted model is logged, registered and loaded back."""

from pathlib import Path

import numpy as np
import pytest

from raysyn.tracking import Tracker
from raysyn.tracking.model import log_model
from raysyn.tracking.places import open_client
from tests.tracking.runs import ON


def test_a_model_is_logged_registered_and_loaded_back(storage: str, tmp_path: Path, monkeypatch) -> None:
    import mlflow

    (tmp_path / "echo_loader.py").write_text(
        "import pathlib\n"
        "class Echo:\n"
        "    def __init__(self, path): self.add = int((pathlib.Path(path) / 'add.txt').read_text())\n"
        "    def predict(self, maps, params=None): return (maps + self.add + params['seed']).astype('uint8')\n"
        "def _load_pyfunc(path): return Echo(path)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "add.txt").write_text("7")
    (folder / "README.md").write_text("# A card")
    with Tracker.start(ON, storage, "fit") as logged:
        run_id = logged.wait_run_id()
        example = np.ones((1, 8, 8), np.uint8)
        for _ in range(2):
            uri = log_model(
                logged.uri, run_id, folder, example=example, registered_name="echo", loader_module="echo_loader"
            )
    client = open_client(logged.uri)
    versions = client.search_model_versions("name = 'echo'")
    assert {v.version for v in versions} == {1, 2}
    assert versions[0].description == "# A card"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(logged.uri)
    try:
        for name in (uri, "models:/echo/2"):
            model = mlflow.pyfunc.load_model(name)
            assert (model.predict(example, params={"seed": 1}) == 9).all()
            assert [p.name for p in model.metadata.signature.params] == ["seed", "num_steps"]
            assert (model.input_example == example).all()
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.slow
def test_a_fitted_model_draws_images_through_mlflow(storage: str, tmp_path: Path) -> None:
    import mlflow
    import torch

    from raysyn.compose import load_model
    from raysyn.models import build_denoiser
    from raysyn.nets.codecs import PixelCodec
    from raysyn.pipeline import load_model_dir, save_model, synthesize_images

    config = load_model("edm", "demo")
    torch.manual_seed(0)
    unet = build_denoiser(config, 32).net
    save_model(tmp_path / "model", unet, unet, PixelCodec(), config, 32)
    semantic = np.full((2, 32, 32), 2, np.uint8)
    semantic[:, :8], semantic[1] = 0, np.where(semantic[1] == 0, 5, 7)
    semantic[1, :8] = 5
    with Tracker.start(ON, storage, "fit") as logged:
        for _ in range(2):  # the second time as a fit that was killed after the first
            log_model(logged.uri, logged.wait_run_id(), tmp_path / "model", example=semantic)
    client = open_client(logged.uri)
    experiment = client.get_run(logged.run_id).info.experiment_id
    (found,) = client.search_logged_models([experiment], f"source_run_id = '{logged.run_id}'")
    assert found.model_id in {output.model_id for output in client.get_run(logged.run_id).outputs.model_outputs}
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(logged.uri)
    try:
        model = mlflow.pyfunc.load_model(f"models:/{found.model_id}")
    finally:
        mlflow.set_tracking_uri(before)
    drawn = model.predict(semantic, params={"seed": 3, "num_steps": 2})
    config.sampler.num_steps = 2
    label_map, view = semantic % 5, np.array([0, 1], np.uint8)
    wanted = synthesize_images(load_model_dir(tmp_path / "model"), label_map, view, [3, 4], config.sampler)
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn, wanted)
    assert (drawn[:, :8] == 0).all(), "nothing outside the sector"
    assert drawn[:, 8:].std() > 1, "an unfitted net draws faint noise, not nothing"
