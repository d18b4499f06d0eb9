"""A stage's place: `<storage>/<stage>/<fingerprint>/`. `manifest.json` is written last: there means complete."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from raysyn.data.storage import Storage
from raysyn.types import Outcome, UserError

MANIFEST = "manifest.json"


@dataclass
class StageDir:
    """The folder of one stage under one fingerprint. Made by `open_stage`."""

    stage: str
    fingerprint: str
    storage: Storage
    started: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> str:
        """Path or URI of the folder."""
        return self.storage.uri

    def outcome(self) -> Outcome | None:
        """What an earlier run finished here; None when there is no manifest, so work is to be done or resumed."""
        if not self.storage.exists(MANIFEST):
            return None
        manifest = self.storage.read_json(MANIFEST)
        return Outcome(self.stage, self.path, self.fingerprint, manifest, skipped=True)

    def finish(self, manifest: dict[str, Any]) -> Outcome:
        """Write the manifest, which declares the rest of the folder whole."""
        manifest = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "wall_seconds": round(time.monotonic() - self.started, 3),
            **manifest,
        }
        self.storage.write_json(MANIFEST, manifest)
        return Outcome(self.stage, self.path, self.fingerprint, manifest)


def lost_shards(stage: StageDir, manifest: Any) -> bool:
    """Whether shards of a finished frame set are gone or cut off; if so they are removed and it is unfinished again.

    Raises UserError for a manifest that tells of no shards.
    """
    sizes = stage.storage.sizes(suffix=".parquet")
    try:
        lost = [record["name"] for record in manifest["shards"] if sizes.get(record["name"]) != record["bytes"]]
    except (KeyError, TypeError):
        where = stage.storage.locate(MANIFEST)
        raise UserError(f"{where}: tells of no shards, so it was altered; remove it and run again") from None
    if lost:
        says = f"{len(lost)} shards of {stage.path} are gone or cut off, first {lost[0]}; making them again"
        print(f"{stage.stage}: {says}", flush=True)
        for name in (MANIFEST, *lost):
            stage.storage.remove(name)
    return bool(lost)


def open_stage(storage_uri: str, stage: str, fingerprint: str, *, overwrite: bool = False) -> StageDir:
    """The folder for `stage` under `storage_uri`; with `overwrite` what an earlier run left there is removed first."""
    storage = Storage.at(storage_uri).join(stage, fingerprint)
    if overwrite:
        storage.remove(MANIFEST)  # first: killed in the middle, what is left must not read as whole
        storage.remove_tree()
    return StageDir(stage, fingerprint, storage)
