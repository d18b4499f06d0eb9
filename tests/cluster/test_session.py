import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from raysyn.cluster import session
from raysyn.cluster.session import _quiet, ray_session, secure
from raysyn.config import RayConfig
from raysyn.types import Resumable, UserError

ROOT = Path(__file__).resolve().parents[2]
OWN_SESSION = """
import json, os, urllib.request, urllib.error
from raysyn.cluster.session import in_foreground, is_own, ray_session
from raysyn.config import RayConfig, WorkersConfig
def policies():
    before = os.sched_getscheduler(0)
    in_foreground()
    return before, os.sched_getscheduler(0), os.environ["MALLOC_ARENA_MAX"]
with ray_session(RayConfig(num_cpus=1, object_store_mb=100), WorkersConfig(cpus_per_worker=0.5), 2):  # they just fit
    import ray
    dashboard = ray._private.worker.global_worker.node.webui_url
    def status(headers):
        request = urllib.request.Request(f"http://{dashboard}/api/jobs/", headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as error:
            return error.code
    token = os.environ["RAY_AUTH_TOKEN"]
    with ray_session(RayConfig()):
        nested = ray.is_initialized()
    *scheduled, arenas = [os.sched_getscheduler(0), *ray.get(ray.remote(policies).remote())]
    print(json.dumps({"scheduled": scheduled, "arenas": arenas, "dashboard": dashboard, "without": status({}),
        "with": status({"Authorization": "Bearer " + token}),
        "usage": os.environ["RAY_USAGE_STATS_ENABLED"], "own": is_own(), "nested": nested,
        "after_nested": ray.is_initialized()}))
print(ray.is_initialized())
"""


@pytest.mark.cluster
def test_a_ray_of_our_own_asks_for_a_token_and_keeps_its_dashboard_on_loopback() -> None:
    ran = subprocess.run([sys.executable, "-c", OWN_SESSION], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said, after = ran.stdout.strip().splitlines()[-2:]
    facts = json.loads(said)
    assert facts["dashboard"].startswith("127.0.0.1:")
    assert facts["without"] == 401
    assert facts["with"] == 200
    assert facts["usage"] == "0"
    assert facts["scheduled"] == [os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_OTHER], "who waits, and who computes"
    assert facts["arenas"] == "1", "a fit's thread reuses the memory it frees"
    assert facts["own"]
    assert facts["nested"]
    assert facts["after_nested"]
    assert after == "False"


STOPPED_AS_RAY_STARTS = """
import os, signal
from raysyn.cluster.session import ray_session, secure
from raysyn.config import RayConfig
secure()
import ray
from ray._private.node import Node
def stop(*_):
    raise KeyboardInterrupt("stopped")
signal.signal(signal.SIGTERM, stop)
start = Node.start_head_processes
def asked_to_stop(node):
    os.kill(os.getpid(), signal.SIGTERM)
    start(node)
    print("head started")
Node.start_head_processes = asked_to_stop
try:
    with ray_session(RayConfig(num_cpus=1, object_store_mb=100)):
        print("went on")
except BaseException as end:
    print(repr(end), signal.getsignal(signal.SIGTERM) is stop, ray.is_initialized())
"""


@pytest.mark.cluster
def test_sigterm_as_ray_starts_waits_until_it_has_and_comes_to_our_own_handler() -> None:
    """Ray's own handler of that time exits in the middle; what the process then ends with is chance, 134 among it."""
    code = STOPPED_AS_RAY_STARTS
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ran.stdout.splitlines() == ["head started", "KeyboardInterrupt('stopped') True False"], ran.stderr[-2000:]
    assert ran.returncode == 0


def test_ray_imported_too_early_is_a_clear_error() -> None:
    code = "import ray\nfrom raysyn.cluster.session import secure\nsecure()"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert "UserError: RAY_AUTH_MODE" in ran.stderr


@pytest.mark.cluster
def test_workers_that_never_fit_are_refused_and_do_not_wait() -> None:
    code = (
        "from raysyn.cluster.session import ray_session\n"
        "from raysyn.config import RayConfig, WorkersConfig\n"
        "from raysyn.types import UserError\n"
        "ray, said = RayConfig(num_cpus=2, object_store_mb=100), []\n"
        "for workers, at_once in ((WorkersConfig(gpus_per_worker=1), 1), (WorkersConfig(cpus_per_worker=1.5), 2)):\n"
        "    try:\n"
        "        with ray_session(ray, workers, at_once): pass\n"
        "    except UserError as error:\n"
        "        said.append(str(error))\n"
        "print('\\n'.join(said))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    gpu, cpu = ran.stdout.strip().splitlines()[-2:]
    assert gpu.startswith("workers.gpus_per_worker: 1 worker(s) of 1 GPU do not fit this machine's 0")
    assert cpu.startswith("workers.cpus_per_worker: 2 worker(s) of 1.5 CPU do not fit this machine's 2")


def test_a_stop_is_no_fault_of_ray_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data.exceptions import omit_traceback_stdout

    logged: list[str] = []
    logger = logging.getLogger("ray.data.exceptions")
    monkeypatch.setattr(logger, "handle", lambda record: logged.append(record.msg) if logger.filter(record) else None)
    _quiet()

    @omit_traceback_stdout
    def ends(error: Exception) -> None:
        raise error

    with pytest.raises(Resumable):
        ends(Resumable("stopped by SIGTERM"))
    assert logged == []
    with pytest.raises(OSError, match="broken"):
        ends(OSError("broken"))
    assert logged, "a fault is still told"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "cannot reach 127.0.0.1:1 "),
        ("http://127.0.0.1:8265", "cannot reach http://"),
        ("somewhere", "cannot join somewhere "),
    ],
)
def test_an_unreachable_address_is_bad_input(address: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"ray\.address: {says}") as caught, ray_session(RayConfig()):
        pass
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("RAY_ADDRESS")
    if ":" in address:
        with pytest.raises(UserError, match=says), ray_session(RayConfig(address=address)):
            pass


def test_a_local_address_is_a_ray_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its token and its `ray.num_cpus`, where the variable, taken as a cluster's, would have neither."""
    started = []
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr("raysyn.cluster.session._start_local", started.append)
    with ray_session(own := RayConfig(num_cpus=1)):
        assert started == [own]
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(UserError, match="RAY_AUTH_MODE: set it to token"):
        secure()


@pytest.mark.parametrize(("held", "share"), [({"GPU": 0.25}, 0.25), ({"GPU": 2.0}, 1.0), ({"CPU": 1.0}, 1.0)])
def test_a_process_counts_as_much_of_a_gpu_as_ray_gave_it(held: dict, share: float, monkeypatch) -> None:
    context = SimpleNamespace(get_assigned_resources=lambda: held)
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(session, "on_gpu", lambda: True)
    assert session.gpu_share() == share
    monkeypatch.setattr(session, "on_gpu", lambda: False)
    assert session.gpu_share() == 0
