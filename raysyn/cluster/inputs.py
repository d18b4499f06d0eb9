"""The prepare stage: phantom, CAMUS or PNG folders → `<storage>/prepare/<fingerprint>/<split>/shard-….parquet`.

Patients get their split before anything else. A chunk of patients is one Ray task and one shard, so that the shards are
the same bytes whatever the number of workers or their order; shards that are there already are kept. (Ray Data's own
write names files by run and writes them in place, so a shard could neither be compared nor trusted after a kill.)
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysyn.cluster.board import reporter, watch
from raysyn.cluster.session import ray_session
from raysyn.cluster.stage import StageDir, lost_shards, open_stage, refuse_foreign
from raysyn.config import DataConfig, JobConfig, fingerprint
from raysyn.data.frames import frames_to_table, open_shard, table_to_bytes, table_to_frames
from raysyn.data.readers import Index, Patient, Reader, Skipped, open_reader
from raysyn.data.schema import SCHEMA_VERSION
from raysyn.data.storage import Storage
from raysyn.types import SPLITS, Frame, Outcome, UserError

PREPARE_VERSION = 1  # of what decides the bytes of a shard
PATIENTS_PER_SHARD = 32
SKIPPED_KEY = b"raysyn_skipped"


@dataclass(frozen=True)
class Chunk:
    """The patients of one shard, all of one split."""

    name: str
    patients: tuple[Patient, ...]


def prepare_fingerprint(config: JobConfig, needs: Iterable[str] = ()) -> str:
    """Names the frame set of `config.data`: its settings and, for real input, the names, sizes and times of its files.

    Raises UserError when the input is not there, or has no patient in a split that the job `needs`.
    """
    data = config.data
    if data.name == "phantom":
        return _fingerprint(data, "")
    index = open_reader(data).index()
    there = {patient.split for patient in index.patients}
    if lacking := [split for split in needs if split not in there]:
        raise UserError(f"data.root: {data.root} holds no {lacking[0]} patients, and this job needs some")
    return _fingerprint(data, index.digest)


def _fingerprint(data: DataConfig, digest: str) -> str:
    shape: dict[str, Any] = {"name": data.name, "image_size": data.image_size}
    if data.name == "phantom":
        from raysyn.data.phantom import PHANTOM_VERSION

        keys = ("num_train_patients", "num_validation_patients", "num_test_patients", "seed")
        shape |= {key: getattr(data, key) for key in keys} | {"phantom_version": PHANTOM_VERSION}
    else:
        shape |= {"on_bad_frame": data.on_bad_frame, "files": digest}
        shape |= {"source": data.source} if data.source != "real" else {}
    return fingerprint("prepare", PREPARE_VERSION, SCHEMA_VERSION, PATIENTS_PER_SHARD, shape)


def frames_uri(outcome: Outcome) -> str:
    """Where the frames of a finished prepare stage lie, for `read_arrays(uri, split)`."""
    return str(outcome.manifest["frames"])


def prepare(config: JobConfig) -> Outcome:
    """Make the frame set of `config.data`, or find it made. Real input must be visible from every worker.

    Raises UserError for bad input; with data.on_bad_frame=raise nothing is written then. With `skip` the frames are
    left out and listed in the manifest.
    """
    reader = open_reader(config.data)
    index = reader.index()
    chunks = make_chunks(index.patients)
    if not any(c.name.startswith("train/") for c in chunks):
        raise UserError(f"data.root: {config.data.root}: no usable training patient is left; {_shown(index.skipped)}")
    stage = open_stage(config.storage, "prepare", _fingerprint(config.data, index.digest))
    if config.plan_only:
        return _plan(stage, reader, index, chunks)
    if not config.overwrite:
        refuse_foreign(stage, (chunk.name for chunk in chunks))
        if (done := stage.outcome()) is not None and not lost_shards(stage, done.manifest):
            return done
    for note in index.notes:
        print(f"prepare: note: {note}", flush=True)
    stage.storage.check_writable()
    with ray_session(config.ray):
        if config.overwrite:
            stage.clear()
        stage.storage.clean_temporaries()
        shards = _run(reader, chunks, stage.storage)
    return stage.finish(_manifest(config.data, reader, index, shards, stage))


def make_chunks(patients: list[Patient]) -> list[Chunk]:
    """Patients in their order, 32 a shard, none of them in two. Raises UserError when a patient comes twice."""
    counts = Counter(p.patient_id for p in patients)
    twice = [p for p, count in counts.items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: comes twice in the input; a patient belongs to one split only")
    chunks = []
    for split in SPLITS:
        of_split = [p for p in patients if p.split == split]
        for number, start in enumerate(range(0, len(of_split), PATIENTS_PER_SHARD)):
            name = f"{split}/shard-{number:05d}.parquet"
            chunks.append(Chunk(name, tuple(of_split[start : start + PATIENTS_PER_SHARD])))
    return chunks


def make_shard(reader: Reader, chunk: Chunk, storage: Storage, write: bool) -> tuple[dict[str, Any], bytes]:
    """Runs on a worker: the shard's manifest entry, and its bytes unless they are written (or were there) already.

    Bad input comes back as the entry {"problem": line}, since it is no fault of the worker; that a damaged shard was
    there and is removed as {"damaged": line} beside the others.
    """
    damaged = {}
    try:
        if storage.exists(chunk.name):
            try:
                return _found(storage, chunk.name), b""
            except UserError as error:
                if error.__cause__ is not None:  # of the disk or its permissions, not of what the file holds
                    raise
                damaged = {"damaged": str(error)}
                storage.remove(chunk.name)
        frames: list[Frame] = []
        skipped: list[Skipped] = []
        for patient in chunk.patients:
            found, left_out = reader.read(patient)
            frames += found
            skipped += left_out
        listed = json.dumps([asdict(s) for s in skipped])
        data = table_to_bytes(frames_to_table(frames, {SKIPPED_KEY.decode(): listed}))
        if write:
            storage.write_atomic(chunk.name, data)
        entry = _describe(chunk.name, data, pq.ParquetFile(pa.BufferReader(data)))
        return entry | damaged, b"" if write else data
    except UserError as error:
        return {"problem": str(error)}, b""


def _found(storage: Storage, name: str) -> dict[str, Any]:
    """The entry of a shard that is there, each of its pictures decoded: no checksum of it was kept. Raises UserError."""
    with open_shard(storage, name) as file:
        for group in range(file.num_row_groups):
            table_to_frames(file.read_row_group(group), storage.locate(name))
        return _describe(name, storage.read_bytes(name), file)


def _describe(name: str, data: bytes, file: pq.ParquetFile) -> dict[str, Any]:
    """A shard's entry, from its bytes alone, so that one found there and one just made are described alike."""
    columns = file.read(columns=["split", "view", "phase", "patient_id"]).to_pydict()
    return {
        "name": name,
        "rows": file.metadata.num_rows,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "views": dict(sorted(Counter(columns["view"]).items())),
        "phases": dict(sorted(Counter(columns["phase"]).items())),
        "patients": len(set(columns["patient_id"])),
        "skipped": json.loads((file.schema_arrow.metadata or {}).get(SKIPPED_KEY, b"[]")),
    }


def _write_shard(storage: Storage, name: str, data: bytes) -> dict[str, Any]:
    try:
        storage.write_atomic(name, data)
    except UserError as error:
        return {"problem": str(error)}
    return {}


def _run(reader: Reader, chunks: list[Chunk], storage: Storage) -> list[dict[str, Any]]:
    """All shards' entries. Where input may be bad, none is written before every one was made without a problem."""
    import ray

    started, done = time.monotonic(), 0
    total = sum(len(c.patients) for c in chunks)
    entries: list[dict[str, Any]] = []
    held: list[tuple[str, Any]] = []  # shards that wait in Ray's object store until all are checked
    with watch(lambda: "prepare"):
        report = reporter("prepare")
        for chunk, entry, data_ref in _made(reader, chunks, storage):
            if damage := entry.pop("damaged", ""):
                print(f"prepare: {damage}; made again", flush=True)
            entries.append(entry)
            if not reader.writes_before_checked:
                held.append((chunk.name, data_ref))
            done += len(chunk.patients)
            rate = done / max(time.monotonic() - started, 1e-9)
            report({"done": done, "total": total, "unit": "patients", "per_second": rate})
        write = ray.remote(num_cpus=0.5, max_retries=3)(_write_shard)
        for answer in ray.get([write.remote(storage, name, ref) for name, ref in held if not storage.exists(name)]):
            _unless_problem(answer)
    return entries


def _made(reader: Reader, chunks: list[Chunk], storage: Storage) -> Iterator[tuple[Chunk, dict[str, Any], Any]]:
    """(chunk, entry, reference to the bytes), in the order of `chunks`; a few tasks a CPU are in flight at a time."""
    import ray

    make = ray.remote(num_cpus=1, num_returns=2, max_retries=3)(make_shard)
    window = max(4, 2 * int(ray.cluster_resources().get("CPU", 1)))
    reader_ref = ray.put(reader)
    pending: deque[tuple[Chunk, Any, Any]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, *make.remote(reader_ref, chunk, storage, reader.writes_before_checked)))
            if len(pending) >= window:
                done, entry_ref, data_ref = pending.popleft()
                yield done, _unless_problem(ray.get(entry_ref)), data_ref
        while pending:
            done, entry_ref, data_ref = pending.popleft()
            yield done, _unless_problem(ray.get(entry_ref)), data_ref
    finally:
        for _, entry_ref, _ in pending:
            ray.cancel(entry_ref)


def _unless_problem(entry: dict[str, Any]) -> dict[str, Any]:
    if "problem" in entry:
        raise UserError(entry["problem"])
    return entry


def _manifest(
    data: DataConfig, reader: Reader, index: Index, shards: list[dict[str, Any]], stage: StageDir
) -> dict[str, Any]:
    skipped = [asdict(s) for s in index.skipped] + [s for shard in shards for s in shard["skipped"]]
    by_split = {s: [e for e in shards if e["name"].startswith(f"{s}/")] for s in SPLITS}
    num_frames = {split: sum(e["rows"] for e in entries) for split, entries in by_split.items()}
    if not num_frames["train"]:
        raise UserError(f"data.root: {data.root}: no usable training frame is left; {_shown(index.skipped)}")
    views = {split: dict(sum((Counter(e["views"]) for e in entries), Counter())) for split, entries in by_split.items()}
    facts = {p.patient_id: {"split": p.split, **reader.facts(p)} for p in index.patients} if index.digest else {}
    return {
        "data": data.name,
        "frames": stage.path,
        "image_size": data.image_size,
        "schema_version": SCHEMA_VERSION,
        "num_frames": num_frames,
        "num_frames_by_view": views,
        "num_patients": {split: sum(e["patients"] for e in entries) for split, entries in by_split.items()},
        "skipped": skipped,
        "notes": index.notes,
        "shards": [{k: v for k, v in e.items() if k != "skipped"} for e in shards],
        "patients": facts,
    }


def _shown(skipped: list[Skipped]) -> str:
    return f"the first left out: {skipped[0].file}: {skipped[0].reason}" if skipped else "nothing was left out"


def _plan(stage: StageDir, reader: Reader, index: Index, chunks: list[Chunk]) -> Outcome:
    """What prepare would do, printed."""
    counts = Counter(p.split for p in index.patients)
    patients = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
    print(f"prepare plan: {reader.name}: patients {patients}; {len(chunks)} shards in {stage.path}")
    for line in (*index.notes, *(f"left out: {s.file}: {s.reason}" for s in index.skipped)):
        print(f"prepare plan: {line}")
    return Outcome("prepare", "", stage.fingerprint, {"plan": dict(counts), "shards": len(chunks)}, skipped=True)
