"""Frames on disk: one Parquet schema for real, phantom and synthetic frames, read by anything that reads Parquet.

A frame set is `<folder>/<split>/shard-00000.parquet`, … The schema carries Hugging Face feature metadata, so that
`datasets.load_dataset("parquet")` decodes `image` and `label_map`, and a schema version.
The same rows give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from raysyn.data.schema import ALLOWED, COLUMNS, LIGHT_COLUMNS, SCHEMA, STRING, check_schema, check_table
from raysyn.data.storage import Storage
from raysyn.labels import check_label_map
from raysyn.types import PHASES, SPLITS, VIEWS, Frame, FrameArrays, Provenance, UserError

ROW_GROUP_ROWS = 64
PNG_COMPRESSION = 1  # speckle hardly compresses: level 9 costs ten times the time for some 5 % of the bytes
_PROVENANCE = tuple(f.name for f in fields(Provenance))


def encode_png(grey: np.ndarray) -> bytes:
    """uint8 [H, W] to PNG bytes; the same array gives the same bytes."""
    if grey.dtype != np.uint8 or grey.ndim != 2:
        raise ValueError(f"expected a uint8 array [H, W], got {grey.dtype} {list(grey.shape)}")
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def decode_png(data: bytes, name: str = "image") -> np.ndarray:
    """PNG bytes to uint8 [H, W]. Raises UserError that names `name` for anything but a whole 8-bit grey PNG."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode != "L":
                raise UserError(f"{name}: expected an 8-bit grey PNG, got mode {image.mode}")
            return np.asarray(image)
    except (OSError, SyntaxError) as error:  # PIL's way of saying: no image, or cut off
        raise UserError(f"{name}: not a whole PNG ({error})") from None


def check_frame(frame: Frame) -> None:
    """Raise UserError unless the frame is one: sizes equal, labels and vocabulary known."""
    name = f"frame {frame.frame_id}"
    check_label_map(frame.label_map, name)
    if frame.image.shape != frame.label_map.shape or frame.image.dtype != np.uint8:
        got = f"{frame.image.dtype} {list(frame.image.shape)} and {list(frame.label_map.shape)}"
        raise UserError(f"{name}: image and label_map must be uint8 of one size, got {got}")
    for key, allowed in ALLOWED.items():
        if getattr(frame, key) not in allowed:
            raise UserError(f"{name}: {key} {getattr(frame, key)!r} is not one of {', '.join(allowed)}")
    if not frame.frame_id or not frame.patient_id:
        raise UserError(f"{name}: frame_id and patient_id may not be empty")


def frames_to_table(frames: Sequence[Frame], metadata: Mapping[str, str] | None = None) -> pa.Table:
    """Frames as a table of `SCHEMA`; `metadata` is added to the schema's. Raises UserError for a frame that is none."""
    for frame in frames:
        check_frame(frame)
    rows = [_row(frame) for frame in frames]
    schema = SCHEMA.with_metadata({**SCHEMA.metadata, **{k.encode(): v.encode() for k, v in (metadata or {}).items()}})
    return pa.Table.from_pylist(rows, schema=schema)


def _row(frame: Frame) -> dict[str, Any]:
    row: dict[str, Any] = {key: getattr(frame, key) for key in ("frame_id", *ALLOWED, "patient_id")}
    for key in ("image", "label_map"):
        row[key] = {"bytes": encode_png(getattr(frame, key)), "path": f"{frame.frame_id}_{key}.png"}
    row["spacing_mm"] = None if frame.spacing_mm is None else [float(v) for v in frame.spacing_mm]
    return row | (asdict(frame.provenance) if frame.provenance is not None else {})


def table_to_frames(table: pa.Table, name: str = "table") -> list[Frame]:
    """The frames of a table; `name` is used in errors. Raises UserError for what `check_table` refuses."""
    check_table(table, name)
    frames = []
    for row in table.to_pylist():
        label = f"{name}: {row['frame_id']}"
        frame = Frame(
            image=decode_png(row["image"]["bytes"], label),
            label_map=decode_png(row["label_map"]["bytes"], label),
            spacing_mm=None if row["spacing_mm"] is None else tuple(row["spacing_mm"]),  # type: ignore[arg-type]
            provenance=None if row["model"] is None else Provenance(**{k: row[k] for k in _PROVENANCE}),
            **{key: row[key] for key in ("frame_id", *ALLOWED, "patient_id")},
        )
        check_frame(frame)
        frames.append(frame)
    return frames


def table_to_bytes(table: pa.Table) -> bytes:
    """A Parquet file of the table: the same rows give the same bytes; row groups of 64 rows, so that it streams."""
    sink = pa.BufferOutputStream()
    text = [name for name, kind in COLUMNS.items() if kind == STRING and name != "frame_id"]
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        use_dictionary=text,
        write_statistics=["frame_id", *text],
        store_schema=True,
    )
    return sink.getvalue().to_pybytes()


def write_frames(
    storage: Storage, name: str, frames: Sequence[Frame], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write one shard, whole or not at all. Returns its entry for a manifest: name, rows, bytes, sha256."""
    data = table_to_bytes(frames_to_table(frames, metadata))
    storage.write_atomic(name, data)
    return {"name": name, "rows": len(frames), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def frame_files(uri: str | Storage, split: str | None = None) -> list[tuple[Storage, str]]:
    """(storage, name) of the Parquet files of a frame set, sorted by name.

    `uri` is one .parquet file, a folder of them, or a folder of split folders; of the last `split` chooses one.
    Raises UserError when there is none.
    """
    storage = Storage.at(uri)
    if split is not None and split not in SPLITS:
        raise UserError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if storage.path.endswith(".parquet"):
        return [(storage.parent, storage.name)]
    folders = ("", split) if split else ("", *SPLITS)
    names = [n for n in storage.list(suffix=".parquet") if n.rpartition("/")[0] in folders]
    if not names:
        what = f"{split} frames" if split else "frames"
        raise UserError(
            f"{storage.uri}: no {what} (*.parquet) there; give the folder that prepare or synthesize printed"
        )
    return [(storage, name) for name in names]


@contextlib.contextmanager
def open_shard(storage: Storage, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of frames for the block. Raises UserError, naming it: not there, no frames, cut off or damaged.

    An object that does not read as Parquet is fetched once more: pyarrow takes a body as long as announced for whole.
    """
    where = storage.locate(name)
    try:
        with _parquet(storage, name) as file:
            check_schema(file.schema_arrow, where)
            yield file
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk, not of what the file holds
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: not a whole Parquet file ({line}); remove it and make it again") from None


def _parquet(storage: Storage, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.open_input(name))
    except pa.ArrowInvalid:
        if storage.is_local:
            raise
    again = storage.read_bytes(name)
    try:
        return pq.ParquetFile(pa.BufferReader(again))
    except pa.ArrowInvalid as error:
        raise pa.ArrowInvalid(f"{len(again)} bytes that end in {again[-8:]!r}: {error}") from None


def read_light(storage: Storage, name: str) -> pa.Table:
    """All columns of a shard but the pictures, in the schema's own types, checked. Raises UserError as `open_shard`."""
    with open_shard(storage, name) as file:
        table = file.read(columns=list(LIGHT_COLUMNS)).select(LIGHT_COLUMNS)
        check_table(table, storage.locate(name))
        return table.cast(pa.schema([SCHEMA.field(key) for key in LIGHT_COLUMNS]))


def read_frames(uri: str | Storage, split: str | None = None, limit: int | None = None) -> Iterator[Frame]:
    """The frames of a set one after another, a row group in memory at a time; order: file name, then row."""
    left = limit if limit is not None else float("inf")
    for storage, name in frame_files(uri, split):
        with open_shard(storage, name) as file:
            for group in range(file.num_row_groups if left > 0 else 0):
                for frame in table_to_frames(file.read_row_group(group, columns=list(COLUMNS)), name):
                    if left > 0 and split in (None, frame.split):
                        left -= 1
                        yield frame


@dataclass
class _Shard:
    storage: Storage
    name: str
    light: pa.Table
    chosen: np.ndarray  # row numbers in the file


def _chosen_rows(uri: str | Storage, split: str | None, limit: int | None) -> list[_Shard]:
    """The rows to read, by shard, from the columns without pictures."""
    shards: list[_Shard] = []
    left = limit
    for storage, name in frame_files(uri, split):
        if left == 0:
            break
        light = read_light(storage, name)
        rows = np.arange(light.num_rows)
        if split is not None:
            rows = rows[np.asarray(pc.equal(light["split"], split).to_numpy(), dtype=bool)]
        rows = rows[:left]
        left = None if left is None else left - len(rows)
        if len(rows):
            shards.append(_Shard(storage, name, light.take(pa.array(rows)), rows))
    if not shards:
        raise UserError(f"{Storage.at(uri).uri}: holds no {f'{split} ' if split else ''}frames")
    return shards


def read_arrays(uri: str | Storage, split: str | None = None, limit: int | None = None) -> FrameArrays:
    """A frame set (all splits, or one; at most `limit` frames) as arrays. Order: file name, then row.

    Raises UserError naming the file when it is missing, foreign, of another schema version, or mixes image sizes.
    """
    shards = _chosen_rows(uri, split, limit)
    light = pa.concat_tables([s.light for s in shards])
    images, label_maps = _decode_all(shards)
    spacing = [v if v is not None else (np.nan, np.nan) for v in light["spacing_mm"].to_pylist()]
    return FrameArrays(
        image_u8=images,
        label_map=label_maps,
        view=np.array([VIEWS.index(v) for v in light["view"].to_pylist()], dtype=np.uint8),
        phase=np.array([PHASES.index(v) for v in light["phase"].to_pylist()], dtype=np.uint8),
        spacing_mm=np.array(spacing, dtype=np.float32),
        frame_id=light["frame_id"].to_pylist(),
        patient_id=light["patient_id"].to_pylist(),
        mask_frame_id=[v or "" for v in light["mask_frame_id"].to_pylist()],
        source=light["source"].to_pylist(),
    )


def _decode_all(shards: list[_Shard]) -> tuple[np.ndarray, np.ndarray]:
    """Images and label maps, each uint8 [N, H, W]; PNGs are decoded by threads, a row group in memory at a time."""
    total = sum(len(s.chosen) for s in shards)
    out: list[np.ndarray] = []
    start = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for shard in shards:
            for pictures in _picture_bytes(shard):
                decoded = list(pool.map(_decode_pair, pictures))
                if not out:
                    out = [np.empty((total, *decoded[0][0].shape), dtype=np.uint8) for _ in range(2)]
                for image, label_map in decoded:
                    if image.shape != out[0].shape[1:]:
                        sizes = f"{list(out[0].shape[1:])} and {list(image.shape)}"
                        raise UserError(f"{shard.name}: image sizes {sizes} in one set; prepare it at one size")
                    out[0][start], out[1][start] = image, label_map
                    start += 1
    return out[0], out[1]


def _picture_bytes(shard: _Shard) -> Iterator[list[tuple[str, bytes, bytes]]]:
    """(name for errors, image PNG, label map PNG) of the chosen rows, a list a row group."""
    with open_shard(shard.storage, shard.name) as file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            wanted = shard.chosen[(shard.chosen >= first) & (shard.chosen < first + rows)] - first
            first += rows
            if len(wanted):
                table = file.read_row_group(group, columns=["frame_id", "image", "label_map"])
                table = table.take(pa.array(wanted))
                check_table(table, shard.name)
                yield [
                    (f"{shard.name}: {row['frame_id']}", row["image"]["bytes"], row["label_map"]["bytes"])
                    for row in table.to_pylist()
                ]


def _decode_pair(item: tuple[str, bytes, bytes]) -> tuple[np.ndarray, np.ndarray]:
    name, image_png, label_png = item
    image, label_map = decode_png(image_png, f"{name} image"), decode_png(label_png, f"{name} label_map")
    if image.shape != label_map.shape:
        raise UserError(f"{name}: image {list(image.shape)} and label_map {list(label_map.shape)} differ in size")
    check_label_map(label_map, name)
    return image, label_map
