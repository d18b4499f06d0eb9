"""A fitted model in MLflow: a pyfunc with signature, example and card, that draws images for label maps."""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from raysyn.tracking.places import open_client

REQUIREMENTS = ("torch", "diffusers", "safetensors", "numpy", "pillow", "omegaconf", "hydra-core")


class ConditionalSampler:
    """What MLflow calls: label maps with a view in, images out. `model_dir` is a folder that `jobs/fit.py` saved."""

    def __init__(self, model_dir: str) -> None:
        from raysyn.pipeline import load_model_dir

        self.fitted = load_model_dir(model_dir)

    def predict(self, semantic: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """semantic uint8 [N, H, W] with values 0 to 9 (structure + 5 x view) → images uint8 [N, H, W].

        params: `seed` of the first image (the next ones count up), `num_steps` (0: the model's own). Raises UserError
        for values outside the set, of both views in one map, and for a map of the wrong size.
        """
        import dataclasses

        from raysyn.diffusers_pipeline import check_maps
        from raysyn.pipeline import synthesize_images

        chosen, (maps, view) = params or {}, check_maps(semantic, None, self.fitted.image_size)
        sampler = self.fitted.config.sampler
        if chosen.get("num_steps"):
            sampler = dataclasses.replace(sampler, num_steps=int(chosen["num_steps"]))
        seeds = [int(chosen.get("seed", 0)) + i for i in range(len(maps))]
        return synthesize_images(self.fitted, maps, view, seeds, sampler)


def _load_pyfunc(data_path: str) -> ConditionalSampler:
    """MLflow's entry: the folder that was logged as `data_path`."""
    return ConditionalSampler(data_path)


def log_model(
    uri: str,
    run_id: str,
    model_dir: str | Path,
    *,
    name: str = "model",
    example: np.ndarray | None = None,
    registered_name: str = "",
    loader_module: str = "raysyn.tracking.model",
    with_code: bool = True,
) -> str:
    """Log `model_dir` to a run as a pyfunc; with `registered_name` also as a new version of that registered model.

    example: uint8 [N, H, W], as `ConditionalSampler.predict` takes. Requirements are given, not guessed: guessing takes
    MLflow half a minute. `with_code` sends the package's own source along, so that the model loads where it is not
    installed. The card is the folder's README.md. Without `registered_name` it takes the place of what an earlier, killed
    attempt of the same run logged. Returns the model's URI.
    """
    client = open_client(uri)
    from mlflow import pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.entities.logged_model_status import LoggedModelStatus
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1))])
    params = ParamSchema([ParamSpec("seed", "long", 0), ParamSpec("num_steps", "long", 0)])
    experiment = client.get_run(run_id).info.experiment_id
    if not registered_name:  # a registered version points to its model for good
        for earlier in client.search_logged_models([experiment], f"source_run_id = '{run_id}' AND name = '{name}'"):
            client.delete_logged_model(earlier.model_id)
    logged = client.create_logged_model(experiment, name=name, source_run_id=run_id, model_type="diffusion")
    with tempfile.TemporaryDirectory() as folder:
        # MLflow's own `log_model` would draw an image here, to try the example: minutes for a large model.
        pyfunc.save_model(
            path=f"{folder}/model",
            mlflow_model=Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id),
            loader_module=loader_module,
            data_path=str(model_dir),
            code_paths=[str(Path(__file__).resolve().parent.parent)] if with_code else None,
            signature=ModelSignature(inputs=images, outputs=images, params=params),
            input_example=example,
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in REQUIREMENTS],
        )
        client.log_model_artifacts(logged.model_id, f"{folder}/model")
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
    card = Path(model_dir) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if text:
        client.log_text(run_id, text, "model_card.md")
    if registered_name:
        _register(client, registered_name, logged, run_id, text)
    return str(logged.model_uri)


def _register(client: Any, name: str, logged: Any, run_id: str, card: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    client.create_model_version(
        name, source=logged.artifact_location, run_id=run_id, description=card[:5000], model_id=logged.model_id
    )
