"""Latents encoded once, as Parquet beside the fit: the posterior's two parameters, so that each epoch draws anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raysyn.cluster.fit_data import check_resident
from raysyn.config import WorkersConfig
from raysyn.data.storage import Storage
from raysyn.nets.gamma_vae import GammaVAE
from raysyn.training import Parallel
from raysyn.training_batches import FrameSource
from raysyn.training_objectives import Moments, encode_rows
from raysyn.types import UserError

PARAMETERS = {"gamma": ("shape", "rate"), "kl": ("location", "log_variance")}
ENCODE_BATCH = 32


@dataclass(frozen=True)
class Encoded:
    """What is encoded: a source with the ids of its frames, in `copies` fixed warps each."""

    source: FrameSource
    frame_id: list[str]
    copies: int = 1


def shard_name(split: str, copy: int) -> str:
    """File of one copy of a split."""
    return f"{split}/copy-{copy:03d}.parquet"


def precompute_moments(place: Storage, vae: GammaVAE, sets: Mapping[str, Encoded], parallel: Parallel) -> None:
    """Encode what is not there yet, a shard a copy, shards shared out among the ranks; returns when all are there."""
    shards = [(split, copy) for split, encoded in sets.items() for copy in range(encoded.copies)]
    for number, (split, copy) in enumerate(shards):
        if number % parallel.world_size != parallel.rank or place.exists(shard_name(split, copy)):
            continue
        encoded = sets[split]
        frames = np.arange(len(encoded.source))
        moments = encode_rows(vae, encoded.source, copy, frames, parallel.device, ENCODE_BATCH)
        data = moments_to_bytes(moments, encoded.frame_id, copy, PARAMETERS[_kind(vae)])
        place.write_atomic(shard_name(split, copy), data)
    parallel.all_reduce(torch.zeros(1, device=parallel.device))


def load_moments(place: Storage, sets: Mapping[str, Encoded], workers: WorkersConfig, vae: GammaVAE) -> Moments:
    """The moments of `train` and, if there is one, `validation`. Raises UserError when they do not fit into memory."""
    arrays = {}
    for split, encoded in sets.items():
        parts = []
        for copy in range(encoded.copies):
            table = _read(place, shard_name(split, copy))
            part = table_to_moments(table, encoded.frame_id, PARAMETERS[_kind(vae)], f"{place.uri}/{split}")
            check_resident(part.nbytes * encoded.copies, workers, "the latents (model.fit.latents=on_the_fly has none)")
            parts.append(part)
        arrays[split] = np.stack(parts)
    return Moments(arrays["train"], arrays.get("validation", arrays["train"][:, :0]))


def _read(place: Storage, name: str) -> pa.Table:
    data = place.read_bytes(name)
    try:
        return pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{place.locate(name)}: damaged ({why}); remove it and run again: it is made anew") from None


def moments_to_bytes(moments: np.ndarray, frame_id: list[str], copy: int, names: tuple[str, str]) -> bytes:
    """Parquet of moments [n, 2, C, h, w]: frame_id, copy and the two parameters as lists of C·h·w float32."""
    shape = moments.shape[2:]
    size = int(np.prod(shape))
    columns: dict[str, Any] = {"frame_id": pa.array(frame_id), "copy": pa.array([copy] * len(frame_id), pa.int32())}
    for i, name in enumerate(names):
        flat = pa.array(np.ascontiguousarray(moments[:, i], dtype=np.float32).reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, size)
    table = pa.table(columns).replace_schema_metadata({"raysyn_latent_shape": ",".join(map(str, shape))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


def table_to_moments(table: pa.Table, frame_id: list[str], names: tuple[str, str], where: str) -> np.ndarray:
    """Moments float32 [n, 2, C, h, w] of the frames `frame_id`. Raises UserError when the table has others."""
    if table["frame_id"].to_pylist() != frame_id:
        raise UserError(f"{where}: encoded from other frames than these; remove that folder and run again")
    shape = tuple(int(v) for v in table.schema.metadata[b"raysyn_latent_shape"].decode().split(","))
    parts = [table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in names]
    return np.stack([p.reshape(len(frame_id), *shape) for p in parts], axis=1)


def _kind(vae: GammaVAE) -> str:
    settings: Any = vae.config
    return str(settings.kind)
