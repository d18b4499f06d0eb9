"""The space of a search, and what of a search is refused before Ray starts."""

from __future__ import annotations

import pytest

from raysyn.cluster import tune as tune_stage
from raysyn.cluster.tune import tune
from raysyn.cluster.tune_space import check_nets, check_space, max_iterations, trial_task
from raysyn.compose import load_job
from raysyn.config import TaskConfig
from raysyn.data.frames import write_frames
from raysyn.data.phantom import phantom_patient
from raysyn.data.storage import Storage
from raysyn.types import UserError


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"lr": {"low": 1}}, r"search\.space\.lr: give"),
        ({"speed": {"low": 1, "high": 2}}, r"search\.space\.speed: not a key"),
        ({"lr": {"low": -1, "high": 2}}, r"search\.space\.lr: -1"),
        ({"loss": {"choices": ["mse"]}}, r"search\.space\.loss: 'mse'"),
        ({"train_set": {"choices": [3]}}, "no index of the 2 train_sets"),
        ({"train_set": {"choices": ["x"]}}, r"search\.space\.train_set: 'x' is not a number"),
        ({"min_faithfulness": {"choices": ["abc"]}}, r"search\.space\.min_faithfulness: 'abc' is not a number"),
        ({"lr": {"low": 0.1, "high": 0.01}}, r"search\.space\.lr: low 0\.1 is above high 0\.01"),
        ({"weight_decay": {"low": 0, "high": 0.1, "log": True}}, "a logarithmic range begins above 0"),
        ({"lr": {"low": 1e-3, "high": 0.1, "lgo": True}}, r"search\.space\.lr: give"),
        ({"lr": {"low": 1e-3, "high": 0.1, "log": "maybe"}}, r"search\.space\.lr: give"),
        ({"lr": {"choices": 5}}, r"search\.space\.lr: give"),
        ({"arch": {"low": 1, "high": 2}}, r"search\.space\.arch: 1 to 2 is no range of it; give choices"),
        ({"kind": {"choices": ["segmentation"]}}, r"search\.space\.kind: not a key"),
        ({"validate_on": {"choices": ["real", "synthetic"]}}, "scored on different frames do not compare"),
        ({"lr": None}, r"search\.space: names nothing"),
    ],
)
def test_a_wrong_space_names_its_key(space: dict, says: str) -> None:
    job = load_job("tune", ["scale=tiny", "train_sets=[a,b]"])
    with pytest.raises(UserError, match=says):
        check_space(space, job)


def test_a_range_has_the_type_of_its_key_and_null_takes_one_out() -> None:
    job = load_job("tune", ["scale=tiny", "train_sets=[a,b]"])
    whole = {"low": 0, "high": 1}
    space = {"real_fraction": whole, "min_faithfulness": whole, "train_set": whole, "num_steps": whole, "lr": None}
    found = check_space(space, job)
    assert {key: type(domain["high"]) for key, domain in found.items()} == {
        "real_fraction": float,
        "min_faithfulness": float,
        "train_set": int,
        "num_steps": int,
    }


def test_a_list_where_keys_belong_is_one_line() -> None:
    with pytest.raises(UserError, match=r"search\.space=\[lr\]: "):
        load_job("tune", ["scale=tiny", "search.space=[lr]"])


def test_nets_of_the_space_are_tried_before_any_trial() -> None:
    job = load_job("tune", ["scale=tiny", "train_sets=[a]", "data.image_size=66"])
    space = {"arch": {"choices": ["unet:mobilenetv3_small_050", "unet:small"]}}
    with pytest.raises(UserError, match=r"unet:small takes no images of data\.image_size 66"):
        check_nets(space, job)


def test_a_trial_changes_only_what_was_searched() -> None:
    task = trial_task(TaskConfig(lr=1.0, width=7), {"lr": 0.5, "train_set": 1})
    assert (task.lr, task.width) == (0.5, 7)


def test_pruning_leaves_room_for_the_longest_trial() -> None:
    space = {"lr": {"low": 1e-3, "high": 1e-2, "log": True}}
    assert max_iterations(TaskConfig(num_epochs=250), space) == 250
    assert max_iterations(TaskConfig(num_epochs=250), {"num_epochs": {"low": 10, "high": 400}}) == 400
    assert max_iterations(TaskConfig(num_epochs=9, num_steps=300), {}) >= 5


def test_the_faithfulness_threshold_is_a_key_of_the_data() -> None:
    job = load_job("tune", ["scale=tiny"])
    check_space({"min_faithfulness": {"low": 0.0, "high": 0.9}}, job)
    with pytest.raises(UserError, match=r"search\.space\.min_faithfulness: 2 is outside"):
        check_space({"min_faithfulness": {"choices": [0, 2]}}, job)
    assert trial_task(TaskConfig(), {"min_faithfulness": 0.5}) == TaskConfig()


def test_nets_and_sets_that_cannot_be_are_refused_before_ray_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tune_stage, "ray_session", lambda *_: pytest.fail("Ray was started"))
    empty, held_out = tmp_path / "empty", tmp_path / "held_out"
    empty.mkdir()
    write_frames(Storage.at(held_out), "validation/shard-00000.parquet", phantom_patient(0, 0, 32, "validation"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.parquet").write_bytes(b"PAR1")
    for overrides, says in (
        (["task.arch=unet:nothing"], r"task\.arch: 'unet:nothing' is not known"),
        (["task=classification", "task.arch=no_such_net"], r"task\.arch: 'no_such_net' is not known"),
        ([f"train_sets=[{tmp_path}/none]"], rf"train_sets: {tmp_path}/none: no frames"),
        ([f"train_sets=[{empty}]"], rf"train_sets: {empty}: no frames"),
        ([f"train_sets=[{held_out}]"], rf"train_sets: {held_out}: holds no train frames"),
        ([f"train_sets=[{tmp_path}/damaged]"], rf"train_sets: {tmp_path}/damaged/a\.parquet: not a whole Parquet file"),
    ):
        with pytest.raises(UserError, match=rf"^{says}"):
            tune(load_job("tune", ["scale=tiny", f"storage={tmp_path}/runs", *overrides]))
        assert not (tmp_path / "runs").exists(), "nothing was begun"
