"""Model folders on any storage: a local one is read in place, another is fetched to a cache of this process first."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

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


def open_model(uri: str) -> Any:
    """The `FittedModel` of a model folder. Raises UserError for a missing, foreign or damaged one."""
    from raysyn.pipeline import load_model_dir

    return load_model_dir(local_copy(uri))
