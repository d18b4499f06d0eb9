"""What a synthesis draws and judges with, read once before any work."""

from __future__ import annotations

import dataclasses
import sys

from raysyn.cluster.sampler_actor import faithfulness_of
from raysyn.config import SynthesizeConfig, SynthesizeJob, fingerprint
from raysyn.data.storage import Storage
from raysyn.types import UserError


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What of the model, and of the segmenter that judges, decides the images or is told beside them."""

    folder: str
    name: str
    fingerprint: str
    checkpoint_sha256: str
    num_function_evals: int
    fitted_on: tuple[str, ...]
    segmenter_sha256: str


def model_facts(config: SynthesizeJob, model_dir: str) -> ModelFacts:
    """One that is bad, or not for this config, is refused here, before Ray and before frames are made for it."""
    from raysyn.cluster.model_store import check_model
    from raysyn.diffusion.generate import num_network_evals
    from raysyn.diffusion.precondition import PRECONDITIONINGS
    from raysyn.pipeline import guidance_doubt

    model, sampler = check_model(model_dir), config.model.sampler
    if model.image_size != config.data.image_size:
        raise UserError(f"data.image_size: {config.data.image_size} is not the model's {model.image_size}")
    if doubt := guidance_doubt(model.config, sampler):
        print(f"synthesize: {doubt}", file=sys.stderr, flush=True)
    precondition = PRECONDITIONINGS[model.config.precondition]()
    return ModelFacts(
        folder=model_dir,
        name=model.config.name,
        fingerprint=fingerprint(model.config),
        checkpoint_sha256=model.checkpoint_sha256,
        num_function_evals=num_network_evals(sampler, precondition),  # refuses a grid that cannot be
        fitted_on=tuple(Storage.at(model_dir).read_json("model.json").get("patients", [])),
        segmenter_sha256=_segmenter_sha256(config.synthesize),
    )


def _segmenter_sha256(config: SynthesizeConfig) -> str:
    """Of the segmenter that judges, "" without one; one that cannot be read is refused here, not on the workers."""
    if faithfulness_of(config) is None:
        return ""
    from raysyn.cluster.model_store import local_copy
    from raysyn.tasks.fitting import task_sha256

    return task_sha256(local_copy(config.segmenter_dir))


def segmenter_patients(config: SynthesizeConfig) -> tuple[str, ...]:
    """Patients that the segmenter which judges was fitted on, as far as it names them."""
    if not config.segmenter_dir:
        return ()
    return tuple(Storage.at(config.segmenter_dir).read_json("task.json").get("patients", []))
