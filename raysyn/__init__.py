"""raysyn: synthetic echocardiograms that train real models."""

from typing import Any

__version__ = "0.1.0"

# What a saved pipeline names in its model_index.json, imported when asked for.
_LAZY = {
    "GammaVAE": "raysyn.nets.gamma_vae",
    "ModelMixin": "diffusers.models.modeling_utils",  # diffusers looks here for how our nets are loaded
    "SemanticDiffusionPipeline": "raysyn.pipeline",
    "SemanticUNet": "raysyn.nets.unet",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'raysyn' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
