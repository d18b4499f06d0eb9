"""Synthesis without Ray: a shard is a function of the plan, and what may stand in a data set's folder."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from raysyn.cluster.sampler_actor import ShardWriter, SynthesisSpec, faithfulness_of, read_record, settings_of
from raysyn.cluster.stage import lost_shards, open_stage
from raysyn.cluster.synthesis_model import segmenter_patients
from raysyn.cluster.synthesis_plan import probe
from raysyn.cluster.synthesize import claim, finish, mask_ids
from raysyn.config import SamplerConfig, SynthesizeConfig, SynthesizeJob, TaskConfig
from raysyn.data.frames import read_arrays, read_frames, write_frames
from raysyn.data.phantom import phantom_patient
from raysyn.data.requests import RequestPlan
from raysyn.data.storage import Storage
from raysyn.types import UserError

MOCK = '''
"""Draws an image that depends on map and seed alone, slowly, and notes who drew what."""
import os, pathlib, time
import numpy as np

def make(spec):
    def draw(label_map, view, seeds):
        time.sleep(float(os.environ.get("MOCK_SECONDS", "0.05")))
        with open(pathlib.Path(spec.output).parents[2] / "drawn.log", "a") as file:  # beside the storage
            file.write("".join(f"{os.getpid()} {s}\\n" for s in seeds))
        noise = np.stack([np.random.default_rng(s).integers(0, 256, label_map.shape[1:]) for s in seeds])
        return ((noise + view[:, None, None]) % 256 * (label_map > 0)).astype(np.uint8)
    return draw
'''


def masks_in(folder: Path) -> str:
    """A frame set of four phantom patients, for masks."""
    for split, patients in (("train", range(3)), ("validation", range(3, 4))):
        made = [f for p in patients for f in phantom_patient(0, p, 64, split)]
        write_frames(Storage.at(folder), f"{split}/shard-00000.parquet", made)
    return str(folder)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> str:
    return masks_in(tmp_path_factory.mktemp("frames"))


def make_spec(frames: str, storage: Path, **options) -> SynthesisSpec:
    config = SynthesizeConfig(**{"num_warps": 6, "batch_size": 4, "shard_size": 8, **options})
    masks = {s: read_arrays(frames, s).frame_id for s in config.mask_splits}
    return SynthesisSpec(
        plan=RequestPlan.of(config, masks), config=config,
        settings=settings_of("c" * 64, SamplerConfig(), config), metadata={"raysyn_fingerprint": "drill"},
        frames=frames, output=Storage.at(storage).join("synthesize", "drill").uri, model_dir="", model="mock",
        solver="heun", num_steps=2, num_function_evals=3, threads=1, key="synthesize mock", sampler="mock_sampler:make",
    )  # fmt: skip


def test_a_shard_is_a_pure_function_of_the_plan(frames, tmp_path, monkeypatch) -> None:
    """Without Ray: two writers, in other orders, make the same bytes; provenance and splits are the masks'."""
    (tmp_path / "mock_sampler.py").write_text(MOCK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MOCK_SECONDS", "0")
    found = []
    for name, order in (("a", 1), ("b", -1)):
        spec = make_spec(frames, tmp_path / name)
        writer = ShardWriter(spec)
        for shard in list(spec.plan.shards())[::order]:
            writer.write(shard)
        out = Storage.at(spec.output)
        found.append({n: out.read_bytes(n) for n in out.list(suffix=".parquet")})
    assert found[0] == found[1]
    masks = {f.frame_id: f for split in ("train", "validation") for f in read_frames(frames, split)}
    for frame in read_frames(spec.output):
        mask = masks[frame.provenance.mask_frame_id]
        assert (frame.patient_id, frame.split, frame.view, frame.phase) == (
            mask.patient_id,
            mask.split,
            mask.view,
            mask.phase,
        )
        assert frame.source == "synthetic"
        assert frame.provenance.cpu_seconds is None
        assert not np.array_equal(frame.label_map, mask.label_map)
        assert (frame.image[frame.label_map == 0] == 0).all()


def test_the_quality_gate_retries_under_new_seeds_and_counts_them(frames, tmp_path, monkeypatch) -> None:
    (tmp_path / "mock_sampler.py").write_text(MOCK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MOCK_SECONDS", "0")
    spec = make_spec(frames, tmp_path / "runs", min_faithfulness=0.5, max_attempts=3)
    writer = ShardWriter(spec)
    writer.faithfulness = lambda images, maps: (images.mean((1, 2)) % 1 + 0.2).clip(0, 1)
    shard = next(spec.plan.shards())
    record = writer.write(shard)
    found = list(read_frames(spec.output))
    assert record["attempts"] > 8
    assert record["below_min_faithfulness"] == sum(f.provenance.faithfulness < 0.5 for f in found)
    first = {r.noise_seed for b in spec.plan.batches(shard) for r in b}
    assert any(f.provenance.noise_seed not in first for f in found)
    for other in spec.plan.shards():
        writer.write(other)
    earlier = {key: value for key, value in record.items() if key != "precision"}  # of before it was kept
    Storage.at(spec.output).write_json(shard.record, earlier)
    judged = dataclasses.replace(spec, segmenter_fitted_on=("p1",))
    manifest = finish(SynthesizeJob(), open_stage(str(tmp_path / "runs"), "synthesize", "drill"), judged).manifest
    assert (manifest["fitted_on"], manifest["segmenter_fitted_on"]) == ([], ["p1"])
    assert manifest["precision"] == "fp32, unknown"


def test_another_data_sets_folder_is_refused(frames, tmp_path) -> None:
    spec = make_spec(frames, tmp_path)
    assert claim(open_stage(str(tmp_path / "new"), "synthesize", "drill"), spec).threads == 1
    later = claim(open_stage(str(tmp_path / "new"), "synthesize", "drill"), dataclasses.replace(spec, threads=2))
    assert later.threads == 1, "finished with the threads it was begun with"
    assert later.metadata["raysyn_threads"] == "1"
    stage = open_stage(str(tmp_path), "synthesize", "drill")
    stage.storage.write_json("plan.json", {"fingerprint": "other", "num_requests": 1, "settings": {}})
    with pytest.raises(UserError, match="holds another data set"):
        claim(stage, spec)
    for damaged in ({}, [], "x"):
        stage.storage.write_json("plan.json", damaged)
        with pytest.raises(UserError, match=r"plan\.json names none"):
            claim(stage, spec)
    stage.storage.remove("plan.json")
    stage.storage.write_atomic("train/shard-00000.parquet", b"x")
    with pytest.raises(UserError, match="not this data set's"):
        claim(stage, spec)


def test_what_a_killed_overwrite_leaves_is_not_whole(tmp_path, monkeypatch) -> None:
    stage = open_stage(str(tmp_path), "synthesize", "key")
    stage.storage.write_atomic("train/a.parquet", b"x")
    stage.finish({"shards": [{"name": "train/a.parquet"}]})

    def killed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "remove_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.clear()
    assert open_stage(str(tmp_path), "synthesize", "key").outcome() is None
    assert stage.storage.exists("train/a.parquet")


def test_a_finished_set_that_lost_a_shard_is_unfinished(tmp_path, capsys) -> None:
    stage = open_stage(str(tmp_path), "synthesize", "key")
    sha256 = hashlib.sha256(b"x").hexdigest()
    manifest = {"shards": [{"name": f"train/{name}.parquet", "bytes": 1, "sha256": sha256} for name in "ab"]}
    write = stage.storage.write_atomic
    for damage in (stage.storage.remove, lambda name: write(name, b""), lambda name: write(name, b"y")):
        for name in "ab":
            stage.storage.write_atomic(f"train/{name}.parquet", b"x")
        stage.finish(manifest)
        assert not lost_shards(stage, manifest)
        damage("train/b.parquet")
        assert lost_shards(stage, manifest)
        assert stage.outcome() is None
        assert "1 shards of" in capsys.readouterr().out
    for altered in ({}, [], {"shards": 3}, {"shards": [{"name": "train/a.parquet"}]}):
        with pytest.raises(UserError, match=r"manifest\.json: tells of no shards"):
            lost_shards(stage, altered)


def test_a_lost_plan_is_told_by_the_shards(frames, tmp_path) -> None:
    spec = make_spec(frames, tmp_path)
    stage = open_stage(str(tmp_path), "synthesize", "drill")
    told = {"raysyn_fingerprint": "drill", "raysyn_threads": "3", "raysyn_packages": "torch 1"}
    name = list(spec.plan.shards())[1].name
    stage.storage.write_atomic(next(spec.plan.shards()).name, b"cut off")
    write_frames(stage.storage, name, list(read_frames(frames, limit=1)), told)
    assert claim(stage, spec).threads == 3
    assert stage.storage.read_json("plan.json")["packages"] == "torch 1"
    stage.storage.remove("plan.json")
    write_frames(stage.storage, name, list(read_frames(frames, limit=1)), {**told, "raysyn_fingerprint": "other"})
    with pytest.raises(UserError, match="not this data set's"):
        claim(stage, spec)


def test_a_file_that_readers_would_take_for_a_shard_is_refused(frames, tmp_path) -> None:
    spec = make_spec(frames, tmp_path)
    stage = open_stage(str(tmp_path), "synthesize", "drill")
    claim(stage, spec)
    stage.storage.write_atomic(next(spec.plan.shards()).name, b"x")
    stage.storage.write_atomic("notes.txt", b"x")
    claim(stage, spec)
    stage.storage.write_atomic("train/shard-00000 (copy).parquet", b"x")
    with pytest.raises(UserError, match=r"\(copy\)\.parquet: not a shard of this data set"):
        claim(stage, spec)


def test_a_split_without_masks_is_told_by_its_key(frames, tmp_path) -> None:
    write_frames(Storage.at(tmp_path), "train/shard-00000.parquet", list(read_frames(frames, "train", limit=2)))
    assert len(mask_ids(str(tmp_path), ["train"])["train"]) == 2
    with pytest.raises(UserError, match=r"synthesize\.mask_splits: validation: .*no validation frames"):
        mask_ids(str(tmp_path), ["train", "validation"])


def test_what_is_written_of_a_synthesis_is_json_to_every_reader(frames, tmp_path) -> None:
    spec = make_spec(frames, tmp_path)
    stage = open_stage(str(tmp_path), "synthesize", "drill")
    claim(stage, spec)
    assert b"Infinity" not in stage.storage.read_bytes("plan.json")
    assert stage.storage.read_json("plan.json")["settings"]["sampler"]["guidance_sigma_max"] is None


def test_what_a_worker_cannot_load_is_refused_and_no_fault(frames, tmp_path, monkeypatch) -> None:
    """An actor whose constructor raises would be started again and again."""
    (tmp_path / "mock_sampler.py").write_text(MOCK)
    (tmp_path / "segmenter").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    spec = make_spec(frames, tmp_path / "runs", segmenter_dir=str(tmp_path / "segmenter"))
    with pytest.raises(UserError, match="segmenter: not a task model"):
        faithfulness_of(spec.config)
    with monkeypatch.context() as patched:
        patched.setattr("raysyn.tasks.fitting.load_task", lambda _: SimpleNamespace(task=TaskConfig("classification")))
        with pytest.raises(UserError, match="segmenter holds a classification network"):
            faithfulness_of(spec.config)
    with pytest.raises(UserError, match="segmenter: not a task model"):
        probe(spec)
    writer = ShardWriter(spec)
    shard = next(spec.plan.shards())
    rows = {key: np.array([getattr(shard, key)]) for key in ("split", "number", "start", "stop")}
    assert "segmenter: not a task model" in writer(rows)["refused"][0]
    Storage.at(tmp_path / "segmenter").write_json("task.json", {"patients": ["p1", "p2"]})
    assert segmenter_patients(spec.config) == ("p1", "p2")
    assert segmenter_patients(SynthesizeConfig()) == ()
    record = Storage.at(spec.output)
    record.write_atomic(shard.name, b"x")
    for altered in ({}, [], {"bytes": 1}):
        record.write_json(shard.record, altered)
        assert read_record(record, shard) is None


def test_a_fit_is_found_where_its_storage_was_moved_to(tmp_path) -> None:
    from raysyn.cluster.fit import fit_fingerprint
    from raysyn.cluster.inputs import prepare_fingerprint
    from raysyn.cluster.synthesize import find_model
    from raysyn.compose import load_job

    jobs = [load_job(job, ["scale=tiny", "model=edm", f"storage={tmp_path}"]) for job in ("fit", "synthesize")]
    stage = open_stage(str(tmp_path), "fit", fit_fingerprint(jobs[0], prepare_fingerprint(jobs[0])))
    stage.finish({"model_dir": "/where/it/was/fitted/model"})
    assert find_model(jobs[1]) == f"{stage.path}/model"


def test_a_quality_gate_without_a_judge_is_refused(tmp_path) -> None:
    from raysyn.cluster.synthesize import synthesize
    from raysyn.compose import load_job

    base = ["scale=tiny", f"storage={tmp_path}", "synthesize.min_faithfulness=0.9"]
    with pytest.raises(UserError, match=r"needs synthesize\.segmenter_dir"):
        synthesize(load_job("synthesize", base))
    with pytest.raises(UserError, match="no such folder"):
        synthesize(load_job("synthesize", [*base, f"synthesize.segmenter_dir={tmp_path}/none"]))
    with pytest.raises(UserError, match="is not fitted under"):
        synthesize(load_job("synthesize", base[:2]))


def test_a_foreign_model_folder_ends_with_2_before_ray_or_frames(tmp_path, capsys, monkeypatch) -> None:
    from raysyn.cluster.job import run_job

    def start(*args: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("raysyn.cluster.synthesize.ray_session", start)
    stage, storage = "raysyn.cluster.synthesize:synthesize", tmp_path / "runs"
    base = ["scale=tiny", f"storage={storage}", "tracking.enabled=false"]
    foreign = tmp_path / "foreign"
    for content, says in (
        (None, "no model.json there"),
        ("{}", "not a model of this version"),
        ("{", "cannot be read"),
    ):
        if content is not None:
            foreign.mkdir(exist_ok=True)
            (foreign / "model.json").write_text(content)
        assert run_job("synthesize", stage, [*base, f"model_dir={foreign}"]) == 2
        assert says in capsys.readouterr().err.strip().splitlines()[-1]
        assert not storage.exists()
