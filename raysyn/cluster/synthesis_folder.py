"""The folder of a synthesis: whose it is, what of it is damaged, and what does not belong there."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from raysyn.cluster.sampler_actor import SynthesisSpec
from raysyn.cluster.stage import StageDir, refuse_foreign
from raysyn.data.frames import open_shard
from raysyn.data.storage import json_values
from raysyn.types import UserError

PLAN = "plan.json"


def claim(stage: StageDir, spec: SynthesisSpec) -> SynthesisSpec:
    """Say whose folder this is before the first shard. Raises UserError when it holds another data set.

    Returns `spec` with the threads that the first run here had: sums of floats may depend on their number, so a data
    set is finished with the number it was begun with.
    """
    settings = json_values(spec.settings)
    mine = {"fingerprint": stage.fingerprint, "num_requests": spec.plan.num_requests(), "settings": settings}
    mine |= {"threads": spec.threads, "packages": spec.metadata.get("raysyn_packages", "")}
    if stage.storage.exists(PLAN):
        read = stage.storage.read_json(PLAN)
        theirs = read if isinstance(read, dict) else {}
        if any(theirs.get(key) != mine[key] for key in ("fingerprint", "num_requests")):
            whose = theirs.get("fingerprint", f"{PLAN} names none")
            raise UserError(f"{stage.path}: holds another data set ({whose}); overwrite=true replaces it")
        if theirs.get("packages", mine["packages"]) != mine["packages"]:
            print(f"{spec.key}: begun with {theirs['packages']}, now {mine['packages']}; each shard tells its own")
    else:
        theirs = mine | _told_by_shards(stage)
        stage.storage.write_json(PLAN, theirs)
    refuse_foreign(stage, (shard.name for shard in spec.plan.shards()))
    stage.storage.clean_temporaries(older_than_s=600)  # a killed run's last writer may still be at it
    threads = theirs.get("threads", spec.threads)
    return dataclasses.replace(spec, threads=threads, metadata={**spec.metadata, "raysyn_threads": str(threads)})


def _told_by_shards(stage: StageDir) -> dict[str, Any]:
    """What a lost plan.json said of threads and packages, from a shard; {} where there is none.

    Raises UserError when what is there is not of this data set.
    """
    names = stage.storage.list(suffix=".parquet")
    for name in names:
        with contextlib.suppress(UserError):  # one that was cut off tells nothing
            with open_shard(stage.storage, name) as file:
                told = {k.decode(): v.decode() for k, v in (file.schema_arrow.metadata or {}).items()}
            if told.get("raysyn_fingerprint") == stage.fingerprint:
                return {"threads": int(told["raysyn_threads"]), "packages": told["raysyn_packages"]}
            break
    if names:
        raise UserError(f"{stage.path}: holds Parquet files that are not this data set's; overwrite=true replaces them")
    return {}
