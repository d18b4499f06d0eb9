"""Model folders on any storage: a local one is read in place, another is fetched to a cache of this process first."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysyn.config import ModelConfig
from raysyn.data.storage import Storage


@functools.lru_cache(maxsize=4)
def local_copy(uri: str) -> str:
    """A local path with the contents of `uri`."""
    storage = Storage.at(uri)
    if storage.is_local:
        return storage.path
    folder = tempfile.mkdtemp(prefix="raysyn-model-")
    storage.download_tree(folder)
    return folder


@dataclass(frozen=True)
class CheckedModel:
    """What a model folder says of itself, its weights being those that were written."""

    config: ModelConfig
    image_size: int
    checkpoint_sha256: str


def check_model(uri: str) -> CheckedModel:
    """A model folder, checked without loading it: a study's sets are planned side by side, on one head.

    Raises UserError for a missing, foreign or damaged one.
    """
    from raysyn.pipeline import check_model_dir, check_saved_nets

    folder = Path(local_copy(uri))
    checked = CheckedModel(*check_model_dir(folder))
    check_saved_nets(folder, checked.config, checked.image_size)
    return checked


def open_model(uri: str) -> Any:
    """The `FittedModel` of a model folder. Raises UserError for a missing, foreign or damaged one."""
    from raysyn.pipeline import load_model_dir

    return load_model_dir(local_copy(uri))
