"""From a worker's job to what is fitted: frames in memory, nets on the device, the objective."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from raysyn.cluster import fit_data
from raysyn.cluster.fit_latents import Encoded, load_moments, precompute_moments
from raysyn.config import FitConfig, FitJob
from raysyn.data.storage import Storage
from raysyn.models import build_denoiser, build_vae
from raysyn.nets.codecs import Codec, LatentCodec, PixelCodec
from raysyn.nets.gamma_vae import GammaVAE
from raysyn.pipeline import weights_sha256
from raysyn.training import Parallel
from raysyn.training_batches import FrameSource, torch_seed
from raysyn.training_objectives import AutoencoderObjective, DiffusionObjective
from raysyn.types import FrameArrays, UserError


@dataclass(frozen=True)
class WorkerJob:
    """What a worker is given. `what` is autoencoder or diffusion; the folders are URIs; `autoencoder` may be ""."""

    config: FitJob
    what: str
    key: str
    stage: str
    frames: str
    autoencoder: str = ""
    use_ray_data: bool = False
    watch_preemption: bool = False

    @property
    def fit(self) -> FitConfig:
        """The settings of what is fitted here."""
        return self.config.model.vae.fit if self.what == "autoencoder" else self.config.model.fit

    @property
    def title(self) -> str:
        """Its name in the progress display and in MLflow."""
        name = self.config.model.name
        return f"fit autoencoder of {name}" if self.what == "autoencoder" else f"fit {name}"


@dataclass
class Built:
    """What `build` made. `validation` is None when the config validates on nothing."""

    objective: AutoencoderObjective | DiffusionObjective
    codec: Codec
    train: FrameArrays
    validation: FrameArrays | None

    @property
    def denoiser(self) -> Any:
        """The denoiser of a diffusion objective."""
        assert isinstance(self.objective, DiffusionObjective)
        return self.objective.denoiser


def build(job: WorkerJob, parallel: Parallel) -> Built:
    """Read the frames and build nets and objective; the same weights on every rank. Raises UserError for bad input."""
    train = _frames(job, "train")
    validation = _frames(job, "validation") if job.fit.num_validation_images else None
    torch.manual_seed(torch_seed(job.fit.seed, 0, 0))
    if job.what == "autoencoder":
        objective, codec = _autoencoder(job, train, validation, parallel)
        return Built(objective, codec, train, validation)
    diffusion, diffusion_codec = _diffusion(job, train, validation, parallel)
    return Built(diffusion, diffusion_codec, train, validation)


def compile_net(net: torch.nn.Module) -> None:
    """`torch.compile` what a fit calls: the U-Net itself, of an autoencoder its two halves."""
    for part in (net.encoder, net.decoder) if isinstance(net, GammaVAE) else (net,):
        part.compile()


def _frames(job: WorkerJob, split: str) -> FrameArrays:
    if not job.use_ray_data:
        return fit_data.read_directly(job.frames, split)
    import ray.train

    return fit_data.collect(ray.train.get_dataset_shard(split))


def _held_out(job: WorkerJob, validation: FrameArrays | None) -> FrameSource | None:
    return None if validation is None else FrameSource.of(validation, job.fit.seed)


def _autoencoder(
    job: WorkerJob, train: FrameArrays, validation: FrameArrays | None, parallel: Parallel
) -> tuple[AutoencoderObjective, Codec]:
    model = job.config.model
    vae = build_vae(model).to(parallel.device)
    source = FrameSource.of(train, job.fit.seed, job.fit.augment, device=parallel.device)
    return AutoencoderObjective(vae, model.vae, source, _held_out(job, validation), parallel.device), LatentCodec(vae)


def _diffusion(
    job: WorkerJob, train: FrameArrays, validation: FrameArrays | None, parallel: Parallel
) -> tuple[DiffusionObjective, Codec]:
    model, config, size = job.config.model, job.fit, train.image_u8.shape[1]
    denoiser = build_denoiser(model, size).to(parallel.device)
    held_out = _held_out(job, validation)
    if model.space == "pixel":
        pixels = PixelCodec()
        source = FrameSource.of(train, config.seed, config.augment, device=parallel.device)
        shape = pixels.shape(size)
        return DiffusionObjective(denoiser, source, held_out, shape, config, model.label_dropout), pixels
    codec = LatentCodec(load_autoencoder(job.autoencoder).to(parallel.device))
    copies = config.latent_copies if config.latents == "precomputed" else 0
    # Of latents encoded beforehand only the maps are asked for again, beside posteriors that are on the CPU.
    device = torch.device("cpu") if copies else parallel.device
    source = FrameSource.of(train, config.seed, config.augment, copies, device)
    moments = None
    if copies:
        sets = {"train": Encoded(source, train.frame_id, copies)}
        if held_out is not None and validation is not None:
            sets["validation"] = Encoded(held_out, validation.frame_id)
        place = Storage.at(job.stage).join("latents")
        precompute_moments(place, codec.vae, sets, parallel)
        moments = load_moments(place, sets, job.config.workers, codec.vae)
    shape = codec.shape(size)
    return DiffusionObjective(denoiser, source, held_out, shape, config, model.label_dropout, codec, moments), codec


def load_autoencoder(model_dir: str) -> GammaVAE:
    """The autoencoder in the model folder (path or URI) of a finished `fit_autoencoder` stage, not to be trained.

    Raises UserError when it is missing or damaged.
    """
    storage = Storage.at(model_dir)
    again = f"remove {storage.parent.uri} and run again: it is fitted anew"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns about its own loading defaults
        if not storage.is_local:
            storage.download_tree(folder)
        place = Path(storage.path if storage.is_local else folder)
        try:
            vae: GammaVAE = GammaVAE.from_pretrained(place, low_cpu_mem_usage=False)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{storage.uri}: the autoencoder cannot be read ({why}); {again}") from None
        manifest = storage.parent.read_json("manifest.json") if storage.parent.exists("manifest.json") else {}
        if manifest.get("checkpoint_sha256", digest := weights_sha256(place)) != digest:
            raise UserError(f"{storage.uri}: the autoencoder's weights are not those that were written; {again}")
        return vae.eval().requires_grad_(False)
