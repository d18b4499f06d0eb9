"""A stage's place: `<storage>/<stage>/<fingerprint>/`. `manifest.json` is written last: there means complete."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from raysyn.data.storage import Storage
from raysyn.types import Outcome, UserError

MANIFEST = "manifest.json"
PLACES = ("frames", "model_dir", "autoencoder")  # entries of manifests that say where something lies


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
        """What an earlier run finished here; None when there is no manifest, so work is to be done or resumed.

        Raises UserError for a manifest that is another stage's.
        """
        if not self.storage.exists(MANIFEST):
            return None
        manifest = read_manifest(self.storage)
        if (manifest.get("stage"), manifest.get("fingerprint")) != (self.stage, self.fingerprint):
            where = self.storage.locate(MANIFEST)
            raise UserError(f"{where}: is not of {self.stage} {self.fingerprint}; remove it and run again")
        return Outcome(self.stage, self.path, self.fingerprint, manifest, skipped=True)

    def clear(self) -> None:
        """Remove what an earlier run left here: for overwrite=true, once nothing can be refused any more."""
        self.storage.remove(MANIFEST)  # first: killed in the middle, what is left must not read as whole
        self.storage.remove_tree()

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


def read_manifest(storage: Storage) -> dict[str, Any]:
    """The manifest in a stage's folder, places as they are now.

    It names them as they were when it was written. A fingerprint names the same work wherever its storage was moved or
    copied to, so what lies beside this stage now is taken first. Raises UserError for one that is no manifest.
    """
    manifest = storage.read_json(MANIFEST)
    if not isinstance(manifest, dict):
        raise UserError(f"{storage.locate(MANIFEST)}: is no manifest; remove it and run again")
    root = storage.parent.parent
    for key in (key for key in PLACES if manifest.get(key)):
        here = root.join(place) if (place := below_storage(manifest[key])) else root
        if place and here.uri != manifest[key] and here.exists():
            manifest[key] = here.uri
    return manifest


def below_storage(uri: str) -> str:
    """`<stage>/<fingerprint>/…` of a place that a stage made, the same wherever its storage lies; "" for any other."""
    found = re.search(r"/([a-z_]+/[0-9a-f]{16}(?:/.*)?)$", Storage.at(uri).path)
    return found[1] if found else ""


def refuse_foreign(stage: StageDir, names: Iterable[str]) -> None:
    """Raise UserError for a Parquet file that is none of the shards `names`: readers of the folder would take it for one."""
    ours = set(names)
    foreign = next((name for name in stage.storage.list(suffix=".parquet") if name not in ours), None)
    if foreign:
        raise UserError(
            f"{stage.storage.locate(foreign)}: not a shard of this data set; move it elsewhere, then run again"
        )


def lost_shards(stage: StageDir, manifest: Any) -> bool:
    """Whether shards of a finished frame set are gone or damaged; if so they are removed and it is unfinished again.

    In a folder each shard's bytes are compared with its sha256 (a second for 1 to 2 GB); of an object store, where that
    would fetch the whole set and objects do not rot, only sizes. Raises UserError for a manifest that tells of no shards.
    """
    sizes = stage.storage.sizes(suffix=".parquet")
    try:
        lost = [
            record["name"]
            for record in manifest["shards"]
            if sizes.get(record["name"]) != record["bytes"] or not _as_written(stage.storage, record)
        ]
    except (KeyError, TypeError):
        where = stage.storage.locate(MANIFEST)
        raise UserError(f"{where}: tells of no shards, so it was altered; remove it and run again") from None
    if lost:
        says = f"{len(lost)} shards of {stage.path} are gone or damaged, first {lost[0]}; making them again"
        print(f"{stage.stage}: {says}", flush=True)
        for name in (MANIFEST, *lost):
            stage.storage.remove(name)
    return bool(lost)


def _as_written(storage: Storage, record: Any) -> bool:
    if not storage.is_local:
        return True
    with storage.open_input(record["name"]) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]


def open_stage(storage_uri: str, stage: str, fingerprint: str) -> StageDir:
    """The folder for `stage` under `storage_uri`; nothing is written yet."""
    return StageDir(stage, fingerprint, Storage.at(storage_uri).join(stage, fingerprint))
