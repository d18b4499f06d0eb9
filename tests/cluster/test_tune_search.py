"""The search: pruning counted in validations, a study ahead of Ray Tune's state, repeatability, records of trials."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from raysyn.cluster.stage import open_stage
from raysyn.cluster.tune import tune
from raysyn.cluster.tune_search import pareto_front
from raysyn.cluster.tune_space import suggest
from raysyn.compose import load_job
from raysyn.config import SearchConfig, TaskConfig, TuneJob
from raysyn.data.storage import Storage
from raysyn.types import UserError
from tests.s3 import s3_storage

SPACE = {"lr": {"low": 1e-3, "high": 1e-2, "log": True}}


def test_both_rules_count_validations_not_seconds(monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    from raysyn.cluster.tune_search import _scheduler

    task = TaskConfig(num_epochs=250)
    asha = _scheduler(SearchConfig(scheduler="asha", pruning_grace_epochs=5), task, SPACE)
    median = _scheduler(SearchConfig(scheduler="median", pruning_grace_epochs=5), task, SPACE)
    assert (asha._time_attr, asha._max_t) == ("training_iteration", 250)
    assert (median._time_attr, median._grace_period) == ("training_iteration", 5)
    assert _scheduler(SearchConfig(), task, SPACE) is None


def test_a_database_that_cannot_be_opened_stops_no_search(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    from raysyn.cluster.tune_search import start_run

    (tmp_path / "mlflow.db").write_bytes(bytes(range(256)) * 20)
    config = load_job("tune", ["scale=tiny", f"storage={tmp_path}"])
    parent, run = start_run(config, open_stage(str(tmp_path), "tune", "0" * 16))
    assert run == {"key": f"{'0' * 16}/tune", "parent": None}
    assert parent.finish("FAILED") > 0  # entries that were not delivered


def test_a_study_that_is_ahead_of_the_restored_state_does_no_harm(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    import optuna

    from raysyn.cluster.durable_search import DurableOptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url, state = f"sqlite:///{tmp_path}/optuna.db", str(tmp_path / "state.pkl")

    def search() -> DurableOptunaSearch:
        storage, sampler = optuna.storages.RDBStorage(url), optuna.samplers.TPESampler(seed=0)
        return DurableOptunaSearch(
            space=partial(suggest, SPACE), metric="score", mode="max", sampler=sampler, storage=storage, study_name="s"
        )

    first = search()
    params = first.suggest("a")
    first.on_trial_result("a", {"score": 0.5, "training_iteration": 1})
    first.save(state)
    first.on_trial_complete("a", {"score": 0.7, "training_iteration": 2})  # after the last snapshot; then the kill
    second = search()
    second.restore(state)
    assert second.suggest("a") == params
    second.on_trial_result("a", {"score": 0.6, "training_iteration": 2})
    second.on_trial_complete("a", {"score": 0.6, "training_iteration": 2})
    study = optuna.load_study(study_name="s", storage=url)
    assert [t.value for t in study.trials] == [0.7]


def test_searches_that_make_one_database_at_once_agree(tmp_path) -> None:
    from raysyn.cluster.durable_search import study_storage

    def make(url: str) -> list[object]:
        together.wait()
        return study_storage(url).get_all_studies()

    together = threading.Barrier(6)
    for i in range(3):  # Optuna's own storage fails in nearly all of the six
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(make, [f"sqlite:///{tmp_path}/{i}.db"] * 6)) == [[]] * 6


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "cannot open that URL"),
        ("postgresql://me:secret@127.0.0.1:9/optuna", r"cannot open postgresql://me:\*\*\*@127\.0\.0\.1:9/optuna: "),
        ("sqlite:////no/such/folder/optuna.db", "cannot open sqlite:////no/such/folder/optuna.db: "),
    ],
)
def test_a_study_that_cannot_be_opened_is_refused_before_any_work(url, says, tmp_path) -> None:
    job = load_job("tune", ["scale=tiny", f"storage={tmp_path}/runs", f"search.optuna_url={url}"])
    with pytest.raises(UserError, match=f"^search.optuna_url: {says}") as refused:
        tune(job)
    assert "secret" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_the_front_leaves_pruned_trials_out_whatever_their_length() -> None:
    def trial(name: str, score: float, cost: float, iterations: int, complete: bool) -> dict:
        return {"trial": name, "score": score, "cost": cost, "iterations": iterations, "complete": complete}

    trials = [trial("short", 0.8, 1, 3, True), trial("long", 0.9, 5, 9, True), trial("pruned", 0.95, 0.1, 9, False)]
    assert [t["trial"] for t in pareto_front(trials)] == ["short", "long"]


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3_storage() as uri:
        yield uri


@pytest.mark.cluster
@pytest.mark.s3
def test_a_search_repeats_by_its_seed_and_finished_trials_by_their_records(tmp_path, bucket: str) -> None:
    from raysyn.cluster.session import ray_session
    from raysyn.cluster.tune import tune

    def job(folder: str, **search: object) -> TuneJob:
        overrides = [f"{k}={v}" for k, v in search.items()]
        storage = folder if folder.startswith("s3://") else tmp_path / folder
        shared = ["scale=tiny", "task=segmentation", f"storage={storage}", "tracking.enabled=false"]
        return load_job("tune", [*shared, "search.max_concurrent=1", "search.num_refits=0", *overrides])

    with ray_session(job("a").ray):
        _check_repeats(job, tune)
        _check_object_store(job(bucket), tune)


def _check_object_store(job: TuneJob, tune) -> None:
    """A search whose storage is no folder goes on from it on another machine, its study too."""
    import optuna

    from raysyn.cluster.durable_search import StudyCopy

    first = tune(job)
    stage = Storage.at(first.path)
    stage.remove("manifest.json")
    copy = StudyCopy(stage.uri, first.fingerprint)
    copy.path.unlink()  # what the first machine had
    again = tune(job)
    costs = [sorted(t["cost"] for t in o.manifest["trials"]) for o in (first, again)]  # restored in any order
    assert costs[0] == costs[1]
    copy.path.unlink()
    study = optuna.load_study(study_name=None, storage=copy.fetch())
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 2
    copy.path.unlink()


def _check_repeats(job, tune) -> None:
    first, other = tune(job("a")), tune(job("b"))
    of = {name: [(t["params"], t["score"]) for t in o.manifest["trials"]] for name, o in (("a", first), ("b", other))}
    assert of["a"] == of["b"]
    assert len(of["a"]) == 2
    assert tune(job("a")).skipped
    folder = Path(first.path)  # all that Ray Tune and Optuna know is lost, the records stay
    (folder / "manifest.json").unlink()
    (folder / "optuna.db").unlink()
    shutil.rmtree(folder / "ray_tune")
    again = tune(job("a"))
    costs = [[t["cost"] for t in o.manifest["trials"]] for o in (first, again)]
    assert costs[0] == costs[1]  # to the last digit: nothing was trained twice
    front = tune(job("a", **{"search.objectives": "[score,cost]"})).manifest["pareto"]
    assert front
    assert all(t["complete"] for t in front)
