"""Task and measuring runs on small sets, without a cluster: what they write, and the leaks that they refuse."""

import dataclasses

import numpy as np
import pytest

from raysyn.cluster import task_runs
from raysyn.cluster.task_runs import load_sets, patients_of, refuse_leak, refuse_lineage, run_realism, run_task
from raysyn.config import JobConfig, TaskConfig
from raysyn.data.frames import read_arrays, write_frames
from raysyn.data.phantom import phantom_patient
from raysyn.data.storage import Storage
from raysyn.tasks.fitting import load_task
from raysyn.types import Frame, Provenance, UserError

TASK = TaskConfig(arch="unet:small", width=4, num_steps=4, batch_size=8, lr=1e-2)


def write_set(path, patients: dict[str, range], *, size: int = 64, manifest: dict | None = None, change=None) -> str:
    storage = Storage.at(path)
    for split, numbers in patients.items():
        frames = [f for p in numbers for f in phantom_patient(0, p, size, split)]
        write_frames(storage, f"{split}/shard-00000.parquet", [change(f) if change else f for f in frames])
    if manifest is not None:
        storage.write_json("manifest.json", manifest)
    return storage.uri


def synthetic(frame: Frame) -> Frame:
    """A smoother picture of the frame's own map; ES frames read badly."""
    from scipy import ndimage

    provenance = Provenance("m", "0" * 64, frame.frame_id, 0, 0, "heun", 5, 9, faithfulness=_faith(frame))
    image = ndimage.gaussian_filter(frame.image, 1.0) * (frame.label_map != 0)
    return dataclasses.replace(
        frame, frame_id=f"s-{frame.frame_id}", image=image.astype(np.uint8), source="synthetic", provenance=provenance
    )


def _faith(frame: Frame) -> float:
    return 0.9 if frame.phase == "ED" else 0.3


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    real = write_set(
        folder / "real",
        {"train": range(4), "validation": range(4, 6), "test": range(6, 10)},
        manifest={"fingerprint": "real"},
    )
    made = write_set(
        folder / "made",
        {"train": range(4), "validation": range(4, 6)},
        manifest={"fingerprint": "made"},
        change=synthetic,
    )
    return real, made


@pytest.fixture(autouse=True)
def no_board(monkeypatch) -> None:
    monkeypatch.setattr(task_runs, "reporter", lambda key: lambda status: None)


def test_a_task_run_keeps_its_network_and_is_skipped_when_done(sets, tmp_path) -> None:
    real, made = sets
    job = JobConfig(storage=str(tmp_path))
    first = run_task(job, TASK, [made], real)
    assert 0 <= first.manifest["scores"]["mean_dice"] <= 1
    assert first.manifest["cpu_seconds"] > 0
    assert first.manifest["cost"]["cost/segmentation_peak_memory_mb"] > 1
    assert load_task(first.manifest["model_dir"]).task.width == 4
    named = Storage.at(first.manifest["model_dir"]).read_json("task.json")["patients"]
    assert named == sorted(patients_of(made, ("train", "validation")))
    assert run_task(job, TASK, [made], real).skipped
    assert not run_task(job, dataclasses.replace(TASK, seed=1), [made], real).skipped


def test_measures_of_a_synthetic_set_hold_baseline_copies_and_faithfulness(sets, tmp_path) -> None:
    real, made = sets
    job = JobConfig(storage=str(tmp_path))
    segmenter = run_task(job, TASK, [real], real).manifest["model_dir"]
    outcome = run_realism(job, made, real, segmenter_dir=segmenter)
    scores = outcome.manifest["scores"]
    assert scores["fd_lite0"] > scores["fd_lite0_baseline"] > 0
    assert scores["baseline_num_frames"] == scores["num_frames"] == 16
    assert 0 <= scores["faithfulness_low"] <= scores["faithfulness"] <= scores["faithfulness_high"] <= 1
    assert scores["memorisation_nearest_pixel_correlation"] > scores["memorisation_nearest_pixel_correlation_baseline"]
    pairs = outcome.manifest["worst_pairs"]
    assert len(pairs) == 16
    assert all(p["synthetic"] == f"s-{p['nearest']}" and p["same_mask"] for p in pairs[:3])
    assert Storage.at(outcome.path).read_bytes("worst_pairs.png")[:4] == b"\x89PNG"
    own = run_realism(job, real, real)
    assert own.manifest["scores"]["fd_lite0"] == pytest.approx(scores["fd_lite0_baseline"])
    assert own.manifest["worst_pairs"] == []


def test_a_further_extractor_adds_its_own_distances(sets, tmp_path) -> None:
    import timm
    import torch

    real, made = sets
    weights = tmp_path / "tiny.pt"
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", pretrained=False).state_dict(), weights)
    both = run_realism(JobConfig(storage=str(tmp_path)), made, real, ["lite0", f"resnet10t={weights}"])
    scores = both.manifest["scores"]
    (other,) = [k for k in scores if k.startswith("fd_resnet10t") and "baseline" not in k]
    assert scores[other] > 0
    assert scores["fd_lite0"] > 0
    assert any(k.startswith("fd_resnet10t") and k.endswith("_baseline") for k in scores)
    assert scores["extractor"] == "lite0"


def test_frames_below_the_faithfulness_asked_for_are_left_out(sets) -> None:
    real, made = sets
    found = load_sets([made], real, TASK, min_faithfulness=0.5)
    assert len(found["train"]) == 8
    assert set(found["train"].phase) == {0}
    assert len(found["validation"]) == 8, "all of them, so that scores at several thresholds compare"
    assert len(load_sets([real], real, TASK, min_faithfulness=0.5)["train"]) == 16  # real ones have none
    with pytest.raises(UserError, match=r"faithfulness of 0\.95 or more"):
        load_sets([made], real, TASK, min_faithfulness=0.95)


def test_every_trial_of_a_search_is_validated_on_the_same_frames(sets) -> None:
    from raysyn.cluster.tune_search import trial_sets

    real, made = sets
    job = {"sets": [made, real], "real": real}
    trials = [{}, {"train_set": 1}, {"train_set": 0, "min_faithfulness": 0.5}]
    found = [trial_sets(job, TASK, params) for params in trials]
    assert [len(f["train"]) for f in found] == [16, 16, 8]
    assert found[1]["train"].frame_id == read_arrays(real, "train").frame_id
    both = [*read_arrays(made, "validation").frame_id, *read_arrays(real, "validation").frame_id]
    assert all(f["validation"].frame_id == both for f in found)
    on_real = trial_sets(job, dataclasses.replace(TASK, validate_on="real"), {})
    assert on_real["validation"].frame_id == read_arrays(real, "validation").frame_id


def test_the_one_of_several_sets_that_holds_test_patients_is_named(sets, tmp_path) -> None:
    real, made = sets
    leak = write_set(tmp_path / "leak", {"train": range(3, 7), "validation": range(4, 6)})
    with pytest.raises(UserError, match=rf"^{leak}: holds test patients \(phantom-s0-p00006\); refused"):
        load_sets([made, leak, made], real, TASK)
    train, test = read_arrays(made, "train"), read_arrays(real, "test")
    refuse_leak(made, train, test)
    train.mask_frame_id[1] = test.frame_id[2]  # a mask of a test frame, under another patient's name
    with pytest.raises(UserError, match=rf"^{made}: .* drawn from their masks \({test.frame_id[2]}\); refused"):
        refuse_leak(made, train, test)


def test_a_model_fitted_on_test_patients_is_refused_whatever_it_drew(sets, tmp_path) -> None:
    real, _ = sets
    other = write_set(tmp_path / "other", {"train": range(6, 8)}, manifest={"fingerprint": "other"})
    assert patients_of(other, ("train",)) & patients_of(real, ("test",))
    for stage, manifest in (
        ("vae_bad", {"frames": other}),
        ("fit_good", {"frames": real}),
        ("fit_bad", {"frames": other}),
        ("fit_on_vae_bad", {"frames": real, "autoencoder": str(tmp_path / "vae_bad" / "model")}),
    ):
        Storage.at(tmp_path / stage).write_json("manifest.json", manifest)
    test = read_arrays(real, "test")
    for stage, kind in (("fit_good", ""), ("fit_bad", "model"), ("fit_on_vae_bad", "autoencoder")):
        manifest = {"fingerprint": stage, "model_dir": str(tmp_path / stage / "model")}
        drawn = write_set(tmp_path / f"set_{stage}", {"train": range(2)}, manifest=manifest, change=synthetic)
        if not kind:
            refuse_lineage([drawn], test)
            continue
        for part in (drawn, f"{drawn}/train", f"{drawn}/train/shard-00000.parquet"):
            with pytest.raises(UserError, match=rf"this {kind} was fitted on test patients"):
                refuse_lineage([part], test)


def test_a_set_chosen_by_a_segmenter_that_knew_test_patients_is_refused(sets, tmp_path) -> None:
    real, _ = sets
    test = read_arrays(real, "test")
    manifest = {"fingerprint": "judged", "fitted_on": ["stranger"], "segmenter_fitted_on": ["stranger"]}
    judged = write_set(tmp_path / "judged", {"train": range(2)}, manifest=manifest, change=synthetic)
    refuse_lineage([judged], test)
    Storage.at(judged).write_json("manifest.json", {**manifest, "segmenter_fitted_on": [test.patient_id[0]]})
    with pytest.raises(UserError, match=rf"^{judged}: this set's segmenter was fitted on test patients"):
        refuse_lineage([judged], test)


def test_a_model_that_was_copied_elsewhere_still_names_its_patients(sets, tmp_path) -> None:
    real, _ = sets
    test = read_arrays(real, "test")
    for name, patients in (("good", ["stranger"]), ("bad", [str(test.patient_id[0])])):
        Storage.at(tmp_path / "elsewhere" / name).write_json("model.json", {"patients": patients})
        manifest = {"fingerprint": name, "model_dir": str(tmp_path / "elsewhere" / name)}
        drawn = write_set(tmp_path / f"of_{name}", {"train": range(2)}, manifest=manifest, change=synthetic)
        if name == "good":
            refuse_lineage([drawn], test)
            continue
        with pytest.raises(UserError, match="this model was fitted on test patients"):
            refuse_lineage([drawn], test)


def test_a_model_behind_a_set_is_found_after_a_move_and_refused_when_it_is_nowhere(sets, tmp_path) -> None:
    real, _ = sets
    test, runs = read_arrays(real, "test"), tmp_path / "runs"
    other = write_set(runs / "prepare" / ("a" * 16), {"train": range(6, 8)}, manifest={"fingerprint": "other"})
    fitted = Storage.at(runs / "fit" / ("b" * 16))
    fitted.write_json("model/model.json", {})
    fitted.write_json("manifest.json", {"frames": other, "model_dir": f"{fitted.uri}/model", "autoencoder": ""})
    manifest = {"fingerprint": "drawn", "model_dir": f"{fitted.uri}/model"}
    write_set(runs / "synthesize" / ("c" * 16), {"train": range(2)}, manifest=manifest, change=synthetic)
    moved = runs.rename(tmp_path / "runs2")
    drawn = moved / "synthesize" / ("c" * 16)
    with pytest.raises(UserError, match=r"runs2/fit/b+/model: this model was fitted on test patients"):
        refuse_lineage([str(drawn)], test)
    alone = drawn.rename(tmp_path / "alone")
    with pytest.raises(
        UserError, match=r"alone: whom its model was fitted on cannot be told, .*runs/fit/b+/model is not"
    ):
        refuse_lineage([str(alone)], test)
    Storage.at(alone).write_json("manifest.json", {**manifest, "fitted_on": ["stranger"]})
    refuse_lineage([str(alone)], test)
    Storage.at(alone).write_json("manifest.json", {**manifest, "fitted_on": ["stranger", test.patient_id[0]]})
    with pytest.raises(UserError, match="alone: this model was fitted on test patients"):
        refuse_lineage([str(alone)], test)


def test_test_frames_of_one_view_are_refused_before_a_classifier_is_trained(sets, tmp_path) -> None:
    _, made = sets
    one = Storage.at(tmp_path / "one")
    frames = [f for f in phantom_patient(0, 6, 64, "test") if f.view == "2CH"]
    write_frames(one, "test/shard-00000.parquet", frames)
    with pytest.raises(UserError, match=rf"^{one.uri}: test frames are all of one view"):
        load_sets([made], one.uri, TaskConfig(kind="classification", arch="cnn:small"))
    assert len(load_sets([made], one.uri, TASK)["test"]) == len(frames)


def test_sets_of_two_sizes_are_refused(sets, tmp_path) -> None:
    real, _ = sets
    small = write_set(tmp_path / "small", {"train": range(2), "validation": range(4, 5)}, size=32)
    with pytest.raises(UserError, match="prepare them at one size"):
        load_sets([small], real, TASK)


def test_a_share_of_a_set_is_another_result(sets, tmp_path) -> None:
    real, made = sets
    job = JobConfig(storage=str(tmp_path))
    whole = run_task(job, TASK, [made], real)
    part = run_task(job, TASK, [made], real, set_share=0.25)
    faithful = run_task(job, TASK, [made], real, min_faithfulness=0.5)
    counts = [o.manifest["num_train_frames"] for o in (whole, part, faithful)]
    assert counts == [counts[0], counts[0] // 4, counts[0] // 2]
    assert len({o.fingerprint for o in (whole, part, faithful)}) == 3
