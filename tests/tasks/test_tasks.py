"""Tasks on phantom frames small enough to learn in seconds; mixing; saving; bad input."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from raysyn.config import TaskConfig
from raysyn.tasks.classification import evaluate_classification, predict_view_scores, train_classification
from raysyn.tasks.fitting import load_task, normalise, num_task_steps, task_batch
from raysyn.tasks.mixing import mix_frames
from raysyn.tasks.nets import build_classifier, build_segmenter, check_net
from raysyn.tasks.segmentation import evaluate_segmentation, predict_label_maps, train_segmentation
from raysyn.types import FrameArrays, UserError
from tests.phantoms import phantom_arrays

QUICK = dict(batch_size=8, lr=1e-2, num_steps=150, lr_decay="cosine", width=8)
SEGMENTATION = TaskConfig(arch="unet:small", **QUICK)
CLASSIFICATION = TaskConfig(kind="classification", arch="cnn:small", **QUICK)


arrays = partial(phantom_arrays, 1)


@pytest.fixture(scope="module")
def frames() -> tuple[FrameArrays, FrameArrays, FrameArrays]:
    return arrays(range(16)), arrays(range(16, 19)), arrays(range(19, 25))


@pytest.fixture(scope="module")
def segmenter(frames):
    return train_segmentation(frames[0], frames[1], SEGMENTATION)


def test_segmentation_learns_and_is_scored_on_held_out_patients(frames, segmenter) -> None:
    scores = evaluate_segmentation(segmenter, frames[2])
    assert scores["mean_dice"] > 0.7
    assert scores["mean_dice_low"] <= scores["mean_dice"] <= scores["mean_dice_high"]
    assert scores["lv_endo_hausdorff_mm"] > 0
    assert scores["lv_endo_hd95_mm"] <= scores["lv_endo_hausdorff_mm"]
    assert scores["num_frames"] == 24
    assert segmenter.best_score == max(h["score"] for h in segmenter.history)


def test_unknown_spacing_is_named_in_the_unit(frames, segmenter) -> None:
    test = frames[2].take(range(4))
    test.spacing_mm = np.full_like(test.spacing_mm, np.nan)
    assert "lv_endo_hausdorff_px" in evaluate_segmentation(segmenter, test)


def test_training_is_repeatable_and_its_seed_matters(frames) -> None:
    short = TaskConfig(**{**vars(SEGMENTATION), "num_steps": 5})
    nets = [
        train_segmentation(frames[0], frames[1], TaskConfig(**{**vars(short), "seed": s})).net.state_dict()
        for s in (0, 0, 1)
    ]
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])
    assert not all(torch.equal(nets[0][k], nets[2][k]) for k in nets[0])


def test_a_saved_task_reads_the_same(frames, segmenter, tmp_path) -> None:
    segmenter.save(tmp_path / "s")
    again = load_task(tmp_path / "s")
    found = predict_label_maps(segmenter, frames[2].image_u8)
    assert np.array_equal(found, predict_label_maps(again, frames[2].image_u8))
    assert found.max() <= 3
    with pytest.raises(UserError, match="not a task model"):
        load_task(tmp_path)


def test_classification_beats_chance_and_needs_both_views(frames) -> None:
    fitted = train_classification(frames[0], frames[1], CLASSIFICATION)
    scores = evaluate_classification(fitted, frames[2])
    assert scores["view_accuracy"] > 0.7
    assert scores["view_auroc"] > 0.7
    assert scores["view_accuracy_protocol_sd"] >= 0
    for name in ("view_accuracy", "view_auroc", "view_calibration_error"):
        assert 0 <= scores[f"{name}_low"] <= scores[f"{name}_high"] <= 1
        assert scores[f"{name}_protocol_mean"] == pytest.approx(scores[name], abs=0.1)
    p = predict_view_scores(fitted, frames[2].image_u8)
    assert ((p >= 0) & (p <= 1)).all()
    only = frames[0].take(np.flatnonzero(frames[0].view == 0))
    with pytest.raises(UserError, match="all are 2CH"):
        train_classification(only, frames[1], CLASSIFICATION)


def test_an_accuracy_of_one_has_the_doubt_of_few_patients(frames) -> None:
    test = frames[2]
    sure = np.where(test.view[:, None] == np.arange(2), 5.0, -5.0)
    fitted = SimpleNamespace(logits=lambda images: [torch.from_numpy(sure)])
    scores = evaluate_classification(fitted, test)
    assert (scores["view_accuracy"], scores["view_accuracy_high"]) == (1, 1)
    assert scores["view_accuracy_low"] == pytest.approx(binomtest(6, 6).proportion_ci(method="exact").low)
    sure[0] *= -1
    assert 0.8 < evaluate_classification(fitted, test)["view_accuracy_low"] < 1


def test_empty_sets_are_refused(frames) -> None:
    with pytest.raises(UserError, match="train frames: there are none"):
        train_segmentation(frames[0].take([]), frames[1], SEGMENTATION)
    assert predict_label_maps.__doc__


def test_mixing_keeps_its_shares(frames) -> None:
    synthetic, real = frames[0], frames[1]
    together = TaskConfig(real_fraction=0.25)
    (mixed, share), *rest = mix_frames(synthetic, real, together)
    assert share == 1.0
    assert not rest
    from_real = sum(f in set(real.frame_id) for f in mixed.frame_id)
    assert from_real / len(mixed) == pytest.approx(0.25, abs=0.05)
    phases = mix_frames(synthetic, real, TaskConfig(real_fraction=0.25, mixing="synthetic_then_real"))
    assert [s for _, s in phases] == [0.75, 0.25]
    assert phases[1][0] is real
    assert mix_frames(synthetic, real, TaskConfig())[0][0] is synthetic
    with pytest.raises(UserError, match="real_fraction"):
        mix_frames(synthetic, None, together)


@pytest.mark.parametrize("steps", [1, 5, 7])
def test_one_after_the_other_takes_just_the_steps_asked_for(frames, steps: int) -> None:
    task = TaskConfig(arch="unet:small", batch_size=4, num_steps=steps, width=4, real_fraction=0.5)
    task = dataclasses.replace(task, mixing="synthetic_then_real")
    fitted = train_segmentation(frames[0], frames[1], task, real=frames[0])
    assert fitted.history[-1]["step"] == steps
    assert np.isfinite(fitted.best_score)


def test_the_loss_told_is_the_mean_since_the_last_validation(frames) -> None:
    task = TaskConfig(arch="unet:small", batch_size=4, num_steps=11, width=2, lr=1e-12, augment_strength=0.0)
    losses = [h["loss"] for h in train_segmentation(frames[0], frames[1], task).history]
    assert len(losses) == 6  # after 2, 4, 6, 8, 10 and 11 steps
    assert losses[-1] == pytest.approx(losses[-2], rel=0.2)


def test_training_that_cannot_be_validated_is_refused(frames, monkeypatch) -> None:
    monkeypatch.setattr("raysyn.tasks.segmentation.mean_of_means", lambda _: float("nan"))
    task = TaskConfig(arch="unet:small", batch_size=4, num_steps=2, width=2)
    with pytest.raises(UserError, match="validation frames: show nothing that can be scored"):
        train_segmentation(frames[0], frames[1], task)


def test_augmentation_moves_image_and_map_together(frames) -> None:
    task = TaskConfig(augment_strength=1.0, batch_size=8)
    image, label, index = task_batch(frames[0], np.arange(8), task)
    assert image.shape == (8, 1, 64, 64)
    assert ((image[:, 0] > 0) <= (label > 0)).all()  # nothing is seen outside the warped sector
    assert not np.array_equal(label.numpy(), frames[0].label_map[index])
    plain, unmoved, index = task_batch(frames[0], np.arange(8), TaskConfig(augment_strength=0.0))
    assert np.array_equal(unmoved.numpy(), frames[0].label_map[index])
    assert torch.allclose(plain[:, 0] * 255, torch.from_numpy(frames[0].image_u8[index]).float())


def test_rand_augment_draws_for_each_frame_and_repeats_by_position(frames) -> None:
    task = TaskConfig(kind="classification", augmentation="randaugment", batch_size=8)
    same = frames[0].take([0] * 8)
    before = torch.random.get_rng_state()
    image, _, _ = task_batch(same, np.arange(8), task)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert image.shape == (8, 1, 64, 64)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    assert len({bytes((v * 255).byte().numpy()) for v in image}) > 4
    again, _, _ = task_batch(same, np.arange(4, 8), task)
    assert torch.equal(again, image[4:])  # a frame's draw does not depend on the batch
    with pytest.raises(UserError, match="augmentation: randaugment"):
        TaskConfig(kind="segmentation", augmentation="randaugment")


def test_evaluation_holds_function_protocol_and_intervals(frames, segmenter) -> None:
    scores = evaluate_segmentation(segmenter, frames[2])
    by_frame = scores.pop("by_frame")
    assert by_frame.keys() == {"frame_id", "patient_id", "lv_endo_dice", "lv_epi_dice", "la_dice"}
    for rule in ("simpson", "area_length"):
        assert scores[f"{rule}_ef_num_pairs"] == 12
        assert scores[f"{rule}_ef_mae_low"] <= scores[f"{rule}_ef_mae"] <= scores[f"{rule}_ef_mae_high"]
    assert scores["mean_dice_protocol_mean"] == pytest.approx(scores["mean_dice"], abs=0.02)
    assert scores["la_dice_protocol_sd"] > 0
    assert all(isinstance(v, (int, float)) for v in scores.values())


def test_zscore_takes_gain_and_offset_inside_the_sector_out() -> None:
    torch.manual_seed(0)
    image = torch.rand(3, 1, 16, 16) * 0.4 + 0.1
    image[:, :, :4] = 0
    made = normalise(image, "zscore")
    inside = made[:, :, 4:].flatten(1)
    assert torch.allclose(inside.mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(inside.std(1, correction=0), torch.ones(3), atol=1e-4)
    brighter = torch.where(image > 0, image * 1.5 + 0.2, image)
    assert torch.allclose(normalise(brighter, "zscore"), made, atol=1e-4)
    assert (made[:, :, :4] == -2).all()
    assert torch.equal(normalise(image, "range"), image * 2 - 1)


def test_steps_come_from_epochs_unless_given() -> None:
    assert num_task_steps(TaskConfig(num_epochs=3, batch_size=10), 25) == 9
    assert num_task_steps(TaskConfig(num_steps=7), 25) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arch", "weights"),
    [
        ("segmentation", "dynunet", ""),
        ("segmentation", "unet:tf_efficientnet_lite0", "embedded"),
        ("classification", "tf_efficientnet_lite0", "embedded"),
        ("classification", "tf_efficientnetv2_s", ""),
    ],
)
def test_the_published_and_the_library_nets_run(kind: str, arch: str, weights: str) -> None:
    task = TaskConfig(kind=kind, arch=arch, weights=weights)
    net = build_segmenter(task, 64) if kind == "segmentation" else build_classifier(task)
    with torch.inference_mode():
        out = net.eval()(torch.zeros(2, 1, 64, 64))
    assert out.shape == ((2, 4, 64, 64) if kind == "segmentation" else (2, 2))


def test_unknown_nets_and_weights_are_refused(tmp_path) -> None:
    for task in (TaskConfig(arch="resnet"), TaskConfig(arch="unet:no_such_encoder")):
        with pytest.raises(UserError, match=r"task\.arch"):
            build_segmenter(task, 64)
    with pytest.raises(UserError, match=r"task\.weights"):
        build_segmenter(TaskConfig(arch="unet:tf_efficientnet_lite0", weights=str(tmp_path / "none.pt")), 64)
    with pytest.raises(UserError, match=r"task\.weights: unet:small starts from none"):
        build_segmenter(TaskConfig(arch="unet:small", weights="embedded"), 64)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match=r"task\.weights: .*text\.pt is not a file of weights"):
        build_segmenter(TaskConfig(arch="unet:tf_efficientnet_lite0", weights=str(tmp_path / "text.pt")), 64)


def test_a_net_that_does_not_take_the_image_size_is_refused() -> None:
    check_net(TaskConfig(arch="unet:small", width=2), 64)
    check_net(TaskConfig(kind="classification", arch="cnn:small", width=2), 66)
    with pytest.raises(UserError, match=r"task\.arch: unet:small takes no images of data\.image_size 66"):
        check_net(TaskConfig(arch="unet:small", width=2), 66)
