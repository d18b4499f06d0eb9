"""A stage's place: `<storage>/<stage>/<fingerprint>/`. `manifest.json` is written last: there means complete."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from raysyn.data.storage import Storage
from raysyn.types import Outcome

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


def open_stage(storage_uri: str, stage: str, fingerprint: str, *, overwrite: bool = False) -> StageDir:
    """The folder for `stage` under `storage_uri`; with `overwrite` what an earlier run left there is removed first."""
    storage = Storage.at(storage_uri).join(stage, fingerprint)
    if overwrite:
        storage.remove(MANIFEST)  # first: killed in the middle, what is left must not read as whole
        storage.remove_tree()
    return StageDir(stage, fingerprint, storage)
