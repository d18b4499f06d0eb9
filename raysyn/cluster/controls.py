"""Control sets of the study: what the autoencoder alone keeps, and what latents without any image in them give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from raysyn.cluster.stage import open_stage
from raysyn.config import FitJob, fingerprint
from raysyn.data.frames import frames_to_table, read_arrays, table_to_bytes
from raysyn.data.requests import stable_seed
from raysyn.types import PHASES, VIEWS, Frame, FrameArrays, Outcome, Provenance, UserError

BATCH = 32


def make_control(job: FitJob, name: str, seed: int, prepared: Outcome, autoencoder: Outcome) -> Outcome:
    """A frame set of the prepared maps with other images: `reconstruction` (posterior mean, decoded) or `prior`.

    `prior` decodes draws from the Γ prior under each map's sector: all that a diffusion model can learn when its
    latents are overwritten by prior draws (the reference's fault 2). The study's scores on it are the floor.
    """
    if name not in ("reconstruction", "prior"):
        raise UserError(f"controls: {name!r} is not one of reconstruction, prior")
    sha256 = autoencoder.manifest["checkpoint_sha256"]
    stage = open_stage(job.storage, "control", fingerprint(name, seed, prepared.fingerprint, sha256))
    if (done := stage.outcome()) is not None:
        return done
    vae = _open_vae(autoencoder.manifest["model_dir"])
    counts = {}
    for split in ("train", "validation"):
        frames = read_arrays(prepared.manifest["frames"], split)
        images = np.concatenate(list(_images(vae, frames, name, stable_seed("control", seed, split))))
        made = _frames(job.model.name, name, sha256, split, frames, images)
        stage.storage.write_atomic(f"{split}/shard-00000.parquet", table_to_bytes(frames_to_table(made)))
        counts[split] = len(made)
    entries = {"frames": stage.path, "control": name, "num_frames": counts}
    return stage.finish({**entries, "autoencoder": autoencoder.manifest["model_dir"]})


def _open_vae(model_dir: str) -> Any:
    from pathlib import Path

    from raysyn.cluster.model_store import local_copy
    from raysyn.nets.gamma_vae import GammaVAE

    folder = Path(local_copy(model_dir))
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    return GammaVAE.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def _images(vae: Any, frames: FrameArrays, name: str, seed: int) -> Iterator[np.ndarray]:
    import torch

    from raysyn.pipeline import to_u8

    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for start in range(0, len(frames), BATCH):
            image = torch.from_numpy(frames.image_u8[start : start + BATCH])[:, None].float() / 255
            sector = torch.from_numpy(frames.label_map[start : start + BATCH] != 0)[:, None].float()
            if name == "prior":
                z = vae.draw_prior(len(image), image.shape[2] // vae.downscale, generator) * vae.latent_sector(sector)
            else:
                z = vae.encode(image, sector).mean
            yield to_u8(vae.decode(z, sector).clamp(0, 1) * 2 - 1)


def _frames(model: str, name: str, sha256: str, split: str, frames: FrameArrays, images: np.ndarray) -> list[Frame]:
    made = []
    for i, image in enumerate(images):
        spacing = frames.spacing_mm[i]
        made.append(
            Frame(
                frame_id=f"{name}-{sha256[:12]}-{frames.frame_id[i]}",
                image=image,
                label_map=frames.label_map[i],
                view=VIEWS[frames.view[i]],
                phase=PHASES[frames.phase[i]],
                patient_id=frames.patient_id[i],
                split=split,
                source="synthetic",
                spacing_mm=(float(spacing[0]), float(spacing[1])) if np.isfinite(spacing).all() else None,
                provenance=Provenance(f"{model}:{name}", sha256, frames.frame_id[i], 0, 0, "none", 0, 0),
            )
        )
    return made
