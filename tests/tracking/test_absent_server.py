"""What survives an absent server, and what is counted as lost."""

import time
from pathlib import Path

import pytest

from raysyn.config import TrackingConfig
from raysyn.tracking import Tracker, log_study, tracker


class Server:
    """A stand-in for MLflow's client that is away when told to be."""

    def __init__(self) -> None:
        self.away, self.slow_s, self.refused = False, 0.0, set()
        self.metrics, self.params, self.tags, self.calls = [], {}, {}, []

    def answer(self) -> None:
        time.sleep(self.slow_s)
        if self.away:
            raise ConnectionError("no route to server")

    def get_experiment_by_name(self, name: str):
        self.answer()
        return type("Experiment", (), {"experiment_id": "1"})

    def create_run(self, experiment, tags, run_name):
        self.tags |= tags
        return type("Run", (), {"info": type("Info", (), {"run_id": "r1"})})

    def log_batch(self, run_id, metrics=(), params=(), tags=()) -> None:
        self.answer()
        if any(m.key in self.refused for m in metrics):
            raise ValueError("bad name")
        self.metrics += [(m.key, m.value, m.step) for m in metrics]
        self.params |= {p.key: p.value for p in params}
        self.tags |= {t.key: t.value for t in tags}

    def log_text(self, run_id, text, name) -> None:
        self.answer()
        self.calls.append(name)

    def log_artifact(self, run_id, path, folder) -> None:
        open(path).close()

    def set_terminated(self, run_id, status) -> None:
        self.answer()
        self.calls.append(status)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    away = Server()
    monkeypatch.setattr(tracker, "open_client", lambda uri: away)
    return away


def start(capacity: int = 100_000) -> Tracker:
    return Tracker.start(TrackingConfig(uri="http://127.0.0.1:9"), "unused", "row", capacity=capacity)


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_an_absent_server_gets_everything_when_it_is_back(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.away = True
    logged = start()
    for step in range(3000):
        logged.log_metrics({"loss": float(step)}, step)
    logged.log_params({"a": 1})
    logged.on_server("note", lambda client, run_id: client.log_text(run_id, "text", "note.txt"))
    until(lambda: logged._failures >= 2)
    server.away = False
    until(lambda: len(server.metrics) >= 1000)
    server.away = True  # and goes once more, in the middle
    time.sleep(1.0)
    server.away = False
    assert logged.finish() == 0
    assert server.metrics == [("loss", float(step), step) for step in range(3000)]
    assert server.params == {"a": "1"}
    assert server.calls == ["note.txt", "FINISHED"]
    away = [r for r in caplog.records if "is away" in r.message]
    assert len(away) == 1, "one warning, not one a try"


def test_a_server_that_never_comes_costs_ten_seconds_and_is_told(server: Server, caplog) -> None:
    server.away = True
    logged = start()
    logged.log_metrics({"a": 1.0, "b": 2.0})
    until(lambda: logged._failures >= 1)
    begun = time.monotonic()
    assert logged.finish(timeout_s=60) == 3, "two metrics and the status"
    assert time.monotonic() - begun < 13
    assert logged.wait_run_id() is None, "known at once: nobody is asking the server any more"
    assert time.monotonic() - begun < 14
    assert "3 entries of run row did not reach http://127.0.0.1:9" in caplog.text


def test_logging_never_waits_for_a_slow_server(server: Server) -> None:
    server.slow_s = 0.5
    logged = start()
    begun = time.monotonic()
    for step in range(2000):
        logged.log_metrics({"x": 1.0}, step)
    assert time.monotonic() - begun < 0.5
    assert logged.finish() == 0
    assert len(server.metrics) == 2000


def test_the_buffer_is_bounded_and_keeps_the_newest(server: Server) -> None:
    server.away = True
    logged = start(capacity=50)
    for step in range(80):
        logged.log_metrics({"x": float(step)}, step)
    server.away = False
    assert logged.finish() == 30
    assert [step for _, _, step in server.metrics] == list(range(30, 80))


def test_what_can_never_be_taken_is_counted_and_the_rest_arrives(server: Server, tmp_path: Path, caplog) -> None:
    server.refused = {"bad"}
    logged = start()
    logged.log_metrics({"bad": 1.0})
    until(lambda: logged.dropped == 1)
    logged.log_metrics({"good": 1.0})
    logged.log_artifact(tmp_path / "gone.txt")
    assert logged.finish() == 2
    assert server.metrics == [("good", 1.0, 0)]
    assert server.calls == ["FINISHED"]
    assert "1 entries not taken: ValueError: bad name" in caplog.text


def test_a_study_waits_for_an_absent_server_once_not_once_a_row(server: Server) -> None:
    server.away = True
    rows = [
        {"trained_on": "synthetic", "model": f"m{i}", "solver": "heun", "num_steps": 5, "mean_dice": 0.9}
        for i in range(6)
    ]
    begun = time.monotonic()
    dropped = log_study(TrackingConfig(uri="http://127.0.0.1:9"), "unused", rows, fingerprint="ab")
    assert dropped >= 6 * 3, "of each row its metric, params and status"
    assert time.monotonic() - begun < 30
