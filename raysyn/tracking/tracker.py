"""A run that is logged in the background and never stops the work it describes.

`import mlflow` costs five CPU seconds and a server may be slow or away, so a `Tracker` only queues; a thread of its own
imports, connects, batches, retries and, when `finish` has waited long enough, says what it could not deliver.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raysyn.config import TrackingConfig
from raysyn.data.storage import json_values
from raysyn.tracking.entries import first_line, flatten, is_final, safe_key
from raysyn.tracking.places import artifact_location, experiment_id, git_commit, open_client, tracking_uri

log = logging.getLogger("raysyn.tracking")

METRICS_PER_BATCH, ITEMS_PER_BATCH = 1000, 100  # MLflow's own limits on one log_batch call
AWAY_PATIENCE_S = 10.0  # how long `finish` waits for a server that does not answer
KEY_TAG, PARENT_TAG = "raysyn.key", "mlflow.parentRunId"


class Tracker:
    """One MLflow run, written from a thread of its own. Make one with `Tracker.start`; end it with `finish`.

    No method but `start` raises for anything the server does, and none waits for it but `finish` and `wait_run_id`.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str | None, run: dict[str, Any], capacity: int) -> None:
        self.uri, self.experiment = uri, experiment
        self.run_id: str | None = run.get("run_id")
        self.dropped = 0
        self._artifacts, self._run, self._capacity = artifacts, run, capacity
        self._metrics: deque[tuple[str, float, int, int]] = deque()
        self._params: dict[str, str] = {}
        self._known: set[str] = set()  # params that the run has: MLflow refuses a second value
        self._calls: deque[tuple[str, Callable[[Any, str], None]]] = deque()
        self._changed = threading.Condition()
        self._connected = threading.Event()
        self._closing = self._finished = self._off = self._warned = False
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    @staticmethod
    def start(
        config: TrackingConfig,
        storage: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        parent_run_id: str | None = None,
        run_id: str | None = None,
        key: str = "",
        capacity: int = 100_000,
    ) -> Tracker:
        """Begin a run, or go on with one: that of `run_id`, or the one in the experiment that carries the same `key`.

        `params` may be nested (a config as plain containers): flattened here, and kept whole as `config.json`.
        `capacity` bounds the metric points held while the server is away; the oldest go first and are counted.
        Raises UserError when the place to log to cannot be told from the config.
        """
        if not config.enabled:
            return Tracker.disabled()
        uri = tracking_uri(config, storage)
        own = {"mlflow.source.name": "raysyn", "mlflow.source.git.commit": git_commit(), PARENT_TAG: parent_run_id}
        own |= {KEY_TAG: key, **{k: str(v) for k, v in (tags or {}).items()}}
        run = {"run_id": run_id, "name": run_name, "key": key, "tags": {k: v for k, v in own.items() if v}}
        tracker = Tracker(uri, config.experiment, artifact_location(uri, storage), run, capacity)
        tracker._thread.start()
        if params:
            tracker.log_params(params)
            whole = json_values(json.loads(json.dumps(params, default=str)))
            tracker.on_server("config.json", lambda client, run_id: client.log_dict(run_id, whole, "config.json"))
        return tracker

    @staticmethod
    def disabled() -> Tracker:
        """A tracker that takes nothing, as one that was closed."""
        tracker = Tracker("", "", None, {}, 0)
        tracker._closing = tracker._finished = True
        return tracker

    def wait_run_id(self, timeout_s: float = 60.0) -> str | None:
        """The run's id, for child runs and for going on later; None when the server did not answer in time.

        Waits at most `timeout_s` (a new database takes seconds to make), and no longer than 10 s for a server away.
        """
        self._patiently(lambda: self._connected.is_set() or not self._thread.is_alive(), timeout_s)
        return self.run_id

    def log_metrics(self, metrics: Mapping[str, float | None], step: int | None = None) -> None:
        """Queue numbers under their names (`cost/...`); a None is left out."""
        now = int(time.time() * 1000)
        points = [(safe_key(k), float(v), now, step or 0) for k, v in metrics.items() if v is not None]
        with self._changed:
            self._metrics.extend(() if self._closing else points)
            while len(self._metrics) > self._capacity:
                self._metrics.popleft()
                self.dropped += 1
            self._changed.notify()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Queue params, nested or flat. MLflow keeps the first value of a param; later ones are left out."""
        with self._changed:
            if not self._closing:
                self._params |= flatten(params)
                self._changed.notify()

    def log_image(self, name: str, image: str | Path | np.ndarray, step: int | None = None) -> None:
        """Queue a picture: a file, or uint8 [H, W] or [H, W, 3]. With `step` it joins the series `name` of MLflow's
        image view, else it is the artifact `pictures/<name>.png`. A file must stay there until `finish`."""
        from PIL import Image

        picture = image if isinstance(image, (str, Path)) else Image.fromarray(image)

        def send(client: Any, run_id: str) -> None:
            loaded = picture if isinstance(picture, Image.Image) else Image.open(picture)
            if step is None:
                client.log_image(run_id, loaded, artifact_file=f"pictures/{name.removesuffix('.png')}.png")
            else:
                client.log_image(run_id, loaded, key=safe_key(name).replace("/", "_"), step=step)

        self.on_server(name, send)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Queue a local file or folder, which must stay there until `finish`, as an artifact below `folder`."""
        path = Path(path)

        def send(client: Any, run_id: str) -> None:
            (client.log_artifacts if path.is_dir() else client.log_artifact)(run_id, str(path), folder or None)

        self.on_server(str(path), send)

    def finish(self, status: str = "FINISHED", timeout_s: float = 60.0) -> int:
        """Deliver what is queued, set the run's status (FINISHED, FAILED or KILLED) and stop. Returns what was dropped.

        Waits at most `timeout_s`, and no longer than 10 s while the server is away.
        """
        if self._finished:
            return self.dropped
        self._finished = True
        self.close(status)
        self._patiently(lambda: not self._thread.is_alive(), timeout_s)
        with self._changed:
            self._off = True
            self._changed.notify()
            self.dropped += self._queued()
        if self.dropped:
            log.warning("tracking: %d entries of run %s did not reach %s", self.dropped, self._run["name"], self.uri)
        return self.dropped

    def _patiently(self, done: Callable[[], bool], timeout_s: float) -> None:
        """Wait until `done`, for at most `timeout_s`, and no longer than AWAY_PATIENCE_S while the server is away."""
        deadline, away_since = time.monotonic() + timeout_s, 0.0
        while not done() and time.monotonic() < deadline:
            time.sleep(0.05)
            away_since = (away_since or time.monotonic()) if self._failures else 0.0
            if away_since and time.monotonic() - away_since > AWAY_PATIENCE_S:
                break

    def close(self, status: str = "FINISHED") -> None:
        """Take nothing more and deliver what is queued; does not wait. `finish` does both."""
        if self._closing:
            return
        self.on_server("status", lambda client, run_id: client.set_terminated(run_id, status))
        with self._changed:
            self._closing = True
            self._changed.notify()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.finish("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")

    def on_server(self, what: str, send: Callable[[Any, str], None]) -> None:
        """Queue anything else: `send(client, run_id)` is called from the tracker's thread, again when it fails."""
        with self._changed:
            if self._closing:
                return
            if len(self._calls) >= 1000:
                self._calls.popleft()
                self.dropped += 1
            self._calls.append((what, send))
            self._changed.notify()

    def _work(self) -> None:
        client = None
        while self._wait_for_work():
            try:
                client = client or self._connect()
                self._deliver(client)
                self._failures = 0
            except Exception as error:  # whatever the server does must not reach the work that is tracked
                if client is None and is_final(error):
                    log.warning("tracking: %s refuses run %s: %s", self.uri, self._run["name"], first_line(error))
                    self._off = True
                self._failures += 1
                if not self._warned and not self._off:
                    self._warned = True
                    log.warning("tracking: %s is away (%s); will go on trying", self.uri, first_line(error))
                self._back_off(min(0.5 * 2**self._failures, 30.0))

    def _wait_for_work(self) -> bool:
        """Until something is queued; False when all is delivered and `finish` was called, or tracking is off."""
        with self._changed:
            self._changed.wait_for(self._pending)
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, timeout=0.5)  # let a batch gather
            return not self._off and (bool(self._queued()) or not self._connected.is_set())

    def _queued(self) -> int:
        return len(self._metrics) + len(self._params) + len(self._calls)

    def _pending(self) -> bool:
        return bool(self._queued()) or self._closing or self._off or not self._connected.is_set()

    def _back_off(self, seconds: float) -> None:
        with self._changed:
            if self._closing:
                self._changed.wait_for(lambda: self._off, timeout=min(seconds, 1.0))
            else:
                self._changed.wait_for(lambda: self._closing or self._off, timeout=seconds)

    def _connect(self) -> Any:
        from mlflow.entities import RunTag

        client = open_client(self.uri)
        experiment = experiment_id(client, self.experiment, self._artifacts)
        run = self._run
        found = [client.get_run(run["run_id"])] if run["run_id"] else []
        if not found and run["key"]:
            found = list(client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{run['key']}'", max_results=1))
        if found:
            self.run_id = found[0].info.run_id
            client.update_run(self.run_id, status="RUNNING")
            self._known = set(found[0].data.params)
            client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in run["tags"].items()])
        else:
            self.run_id = client.create_run(experiment, tags=run["tags"], run_name=run["name"]).info.run_id
        self._connected.set()
        return client

    def _deliver(self, client: Any) -> None:
        """Send one batch of each kind. What fails for now is put back; what can never be taken counts as dropped."""
        from mlflow.entities import Metric, Param

        run_id = str(self.run_id)
        points = self._take(lambda: self._metrics.popleft() if self._metrics else None, METRICS_PER_BATCH)
        self._send(
            points,
            lambda: client.log_batch(run_id, metrics=[Metric(*p) for p in points]),
            lambda: self._metrics.extendleft(reversed(points)),
        )
        taken = self._take(lambda: self._params.popitem() if self._params else None, ITEMS_PER_BATCH)
        params = [p for p in taken if p[0] not in self._known]
        self._send(
            params,
            lambda: client.log_batch(run_id, params=[Param(*p) for p in params]),
            lambda: self._params.update(params),
        )
        self._known |= {key for key, _ in params}
        calls = self._take(self._next_call, 1)
        self._send(calls, lambda: calls[0][1](client, run_id), lambda: self._calls.extendleft(calls))

    def _next_call(self) -> tuple[str, Callable[[Any, str], None]] | None:
        wait = not self._calls or (self._calls[0][0] == "status" and bool(self._metrics))
        return None if wait else self._calls.popleft()  # the run ends after its last metric

    def _take(self, pop: Callable[[], Any], most: int) -> list[Any]:
        with self._changed:
            taken: list[Any] = []
            while len(taken) < most and (entry := pop()) is not None:
                taken.append(entry)
            return taken

    def _send(self, entries: list[Any], send: Callable[[], Any], put_back: Callable[[], Any]) -> None:
        if not entries:
            return
        try:
            send()
            self._failures = 0
        except Exception as error:  # a final one is counted and left; a passing one is for the next round
            if is_final(error):
                self.dropped += len(entries)
                log.warning("tracking: %d entries not taken: %s", len(entries), first_line(error))
                return
            with self._changed:
                put_back()
            raise
