"""A fitted model in MLflow: logged at the fit's end, or, where MLflow was away then, when its stage is next asked for."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from urllib.parse import urlsplit

from raysyn.cluster.stage import MANIFEST
from raysyn.config import FitJob
from raysyn.data.frames import read_arrays
from raysyn.data.storage import Storage
from raysyn.labels import semantic_index
from raysyn.tracking import Tracker
from raysyn.types import FrameArrays, Outcome

log = logging.getLogger("raysyn.fit")

LOGGED = "mlflow_model"  # in a fit's manifest: whether MLflow has the model; absent where nothing was logged
ANSWER_S = 3.0


def log_fitted(tracker: Tracker, title: str, folder: str | Path, frames: FrameArrays) -> bool:
    """Log a model folder to the tracker's run, with a map of `frames` as example; False, and a warning, where it fails."""
    from raysyn.tracking.model import log_model

    example = semantic_index(frames.label_map[:1], frames.view[:1].astype("uint8"))
    try:
        run_id = tracker.wait_run_id()
        if run_id is None:
            raise ConnectionError("it does not answer")
        log_model(tracker.uri, run_id, folder, example=example)
    except Exception as error:  # whatever MLflow raises: the model is safe in the storage already
        log.warning("MLflow did not take the model of %s: %s", title, str(error).splitlines()[0])
        return False
    return True


def log_missing(config: FitJob, done: Outcome) -> None:
    """Log the model of a finished fit that MLflow did not take at its end, if MLflow answers now; `tracking.uri` is set."""
    if done.manifest.get(LOGGED) is not False or not config.tracking.enabled or not _answers(config.tracking.uri):
        return
    from raysyn.cluster.model_store import local_copy

    title, manifest = f"fit {config.model.name}", done.manifest
    frames = read_arrays(manifest["frames"], "train", limit=1)
    tags = {"stage": "fit_diffusion", "fingerprint": done.fingerprint}
    tracker = Tracker.start(config.tracking, config.storage, title, tags=tags, key=done.fingerprint)
    logged = log_fitted(tracker, title, local_copy(manifest["model_dir"]), frames)
    tracker.finish()
    if logged:
        manifest[LOGGED] = True
        Storage.at(done.path).write_json(MANIFEST, manifest)
        print(f"{title}: its model is in MLflow now", flush=True)


def _answers(uri: str) -> bool:
    """Whether anybody listens at an MLflow server's address; asked before MLflow, which takes seconds, is imported."""
    place = urlsplit(uri)
    if place.scheme not in ("http", "https"):
        return True
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname or "", port), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True
