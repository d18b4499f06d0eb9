"""Every job by `ray job submit` to a real head with token authentication: what the submitter sees, and what is uploaded."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
UPLOAD_LIMIT = 2 << 20
TINY = ["scale=tiny", "tracking.enabled=false"]
SMALL = ["data=phantom", "workers.num_workers=1", "workers.gpus_per_worker=0", "workers.cpus_per_worker=0.5"]
LONG_FIT = ["model=edm", "model.fit.num_images=3200", "model.fit.validate_every_steps=200"]  # 400 steps


def free_ports(count: int) -> list[int]:
    """Ports that were free together a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Head:
    """A head of our own on loopback, and a submitter beside it that knows the address and the token only."""

    port: int
    agent_port: int
    env: dict[str, str]
    token: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cli(self, *arguments: str, token: str | None = "") -> subprocess.CompletedProcess[str]:
        """`ray job …` as a submitter types it in the project's folder; token None goes without one."""
        process = self._begin(token, *arguments)
        said, _ = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, said)

    def _begin(self, token: str | None, *arguments: str) -> subprocess.Popen[str]:
        env = {k: v for k, v in self.env.items() if not k.startswith("RAY_AUTH")}
        if token is not None:
            env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token or self.token}
        command = [RAY, "job", arguments[0], "--address", self.url, *arguments[1:]]
        return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def submit(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        return self.cli("submit", "--submission-id", name, "--working-dir", ".", "--", *command)

    def start(self, name: str, *command: str) -> subprocess.Popen[str]:
        """A submission whose submitter is still there."""
        return self._begin("", "submit", "--submission-id", name, "--working-dir", ".", "--", *command)

    def job(self, name: str, storage: Path, *overrides: str) -> str:
        """Submit the entrypoint of the job's manifest at test scale, expect it to be done, return what it said."""
        started = time.monotonic()
        ran = self.submit(f"{name}-{time.time_ns()}", *manifest_command(name, f"storage={storage}", *overrides))
        print(f"{name}: {time.monotonic() - started:.0f} s")
        assert ran.returncode == 0, ran.stdout[-4000:]
        return ran.stdout

    def info(self, name: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/api/jobs/{name}", headers=headers)) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def manifest_command(name: str, *overrides: str) -> list[str]:
    """The command line of infra/kuberay/jobs/<name>, with other values for some keys and the phantom for CAMUS."""
    overlay = yaml.safe_load((ROOT / f"infra/kuberay/jobs/{name}/kustomization.yaml").read_text())
    operations = [o for patch in overlay["patches"] for o in yaml.safe_load(patch["patch"])]
    entrypoint = next(o["value"] for o in operations if o["path"] == "/spec/entrypoint")
    python, file, *given = shlex.split(entrypoint)
    values = dict(text.split("=", 1) for text in [*given, *SMALL, *overrides])
    values.pop("data.root", None)
    return [python, file, *(f"{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` with its own ports, folder and token file; nothing of this checkout is on its path."""
    folder = Path(tempfile.mkdtemp(prefix="rs-head-"))  # short: Ray's sockets lie below it
    token_file, token = folder / "token", "t" * 43
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "PYTHONPATH"))}
    env = {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += (
        "metrics-export-port",
        "ray-client-server-port",
        "runtime-env-agent-port",
        "node-manager-port",
        "object-manager-port",
    )
    ports = dict(zip(names, free_ports(len(names))))
    command = [RAY, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
    command += ["--num-cpus", "2", "--object-store-memory", str(200 << 20), "--temp-dir", str(folder / "ray")]
    command += [
        "--disable-usage-stats",
    ]
    command += [f"--{name}={port}" for name, port in ports.items()]
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
        env={**env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)},
    )  # fmt: skip
    made = Head(ports["dashboard-port"], ports["dashboard-agent-listen-port"], env, token)
    try:
        wait_until(lambda: made.cli("list").returncode == 0 or process.poll() is not None, 120)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        yield made
    finally:
        for pid in session_members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def session_members(session: int) -> list[int]:
    """The processes of one session, the head's: `ray stop` would end every Ray of this machine."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == session:
                members.append(pid)
    return members


def wait_until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("submitted") / "runs"


def packed(folder: Path, target: Path) -> dict[str, int]:
    """Names and sizes of what `ray job submit --working-dir folder` uploads, by Ray's own packing."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), target, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(target) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def test_the_upload_is_the_sources_and_small(tmp_path: Path) -> None:
    project = tmp_path / "project"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, project / name)
    strangers = ("runs/x/model.safetensors", ".venv/lib/big.so", ".git/objects/pack", "raysyn/__pycache__/a.pyc")
    for name in (*strangers, "camus/patient0001/a.nii.gz", "study/fit/model.safetensors", "d/x.png", ".env", "core"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(os.urandom(3 << 20))
    found = packed(project, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < UPLOAD_LIMIT
    sources = {n for n in listed.split("\0") if n.startswith(("raysyn/", "jobs/", "configs/"))}
    assert {name for name in found if not name.endswith("/")} == sources, "all of these and nothing else"
    here = packed(ROOT, tmp_path / "here.zip")
    assert (tmp_path / "here.zip").stat().st_size < UPLOAD_LIMIT, sorted(here, key=here.get)[-5:]  # type: ignore[arg-type]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_submission_without_the_token_is_refused(head: Head) -> None:
    for token in (None, "w" * 43):
        refused = head.cli("submit", "--submission-id", "stranger", "--", "touch", "/tmp/never", token=token)
        assert refused.returncode != 0
        assert "token" in refused.stdout.lower(), refused.stdout[-1500:]
    assert "stranger" not in head.cli("list").stdout


@pytest.mark.cluster
@pytest.mark.slow
def test_the_manifests_probes_find_this_head_well_and_a_silent_port_not(head: Head) -> None:
    spec = yaml.safe_load((ROOT / "infra/kuberay/raycluster.yaml").read_text())["spec"]
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    probes = [pod["containers"][0]["readinessProbe"]["exec"]["command"] for pod in pods]
    (silent,) = free_ports(1)
    for dashboard, agent, found in ((head.port, head.agent_port, 0), (silent, silent, 1)):
        for _, option, code in probes:
            code = re.sub(":8265/", f":{dashboard}/", re.sub(":52365/", f":{agent}/", code))
            ran = subprocess.run([sys.executable, option, code], capture_output=True, timeout=30)
            assert ran.returncode == found, ran.stderr.decode()[-1000:]


@pytest.mark.cluster
@pytest.mark.e2e
@pytest.mark.slow
def test_exit_codes_reach_the_submitter(head: Head, storage: Path) -> None:
    """`ray job submit` itself knows 0 and 1; the job's own code is in its info."""
    commands = {
        "where": ["-c", "import raysyn; print('code at', raysyn.__file__)"],
        "wrong": ["jobs/fit.py", *TINY, f"storage={storage}", "model.fit.lr=100"],
        "fault": ["-c", "import sys; from raysyn.cluster.job import run_job; sys.exit(run_job('fit', 'os:no', []))"],
    }
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(head.submit, name, "python", *rest) for name, rest in commands.items()]
    done, wrong, fault = (r.result() for r in running)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "runtime_resources/working_dir_files" in done.stdout, "the uploaded code is what runs"
    assert wrong.returncode == 1
    assert "raysyn fit: " in wrong.stdout
    assert "lr: 100" in wrong.stdout
    assert head.info("wrong")["driver_exit_code"] == 2
    assert (head.info("where")["status"], head.info("where")["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert (fault.returncode, head.info("fault")["driver_exit_code"]) == (1, 1)
    assert "the same command resumes" in fault.stdout


@pytest.mark.cluster
@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_job_by_submission(head: Head, storage: Path) -> None:
    """The manifests' own entrypoints, one storage for all: each finds what the ones before made, a second finds all."""
    assert "prepare: done" in head.job("prepare", storage, *TINY)
    assert "fit: done" in head.job("fit", storage, *TINY, "model=edm")
    with ThreadPoolExecutor() as pool:
        again = pool.submit(head.job, "fit", storage, *TINY, "model=edm")
        assert "synthesize: done" in head.job("synthesize", storage, *TINY, "model=edm")
    assert "fit: already there" in again.result()
    synthetic = next(storage.glob("synthesize/*/manifest.json")).parent
    few = ["search.num_trials=1", "search.max_concurrent=1"]
    assert "tune: done" in head.job("tune", storage, *TINY, f"train_sets=[{synthetic}]", *few)
    said = head.job("compare", storage, "scale=tiny", "model=[edm]", "controls=[]", "curves=false", *few)
    assert "compare: done" in said
    table = (storage / "report" / "table.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in table] == ["model", "", "edm"], "a header, the ceiling and one model's row"


@pytest.mark.cluster
@pytest.mark.e2e
@pytest.mark.slow
def test_job_stop_in_mid_fit_leaves_a_state_that_the_same_command_finishes(head: Head, storage: Path) -> None:
    arguments = ["python", "jobs/fit.py", *TINY, f"storage={storage}", *LONG_FIT]
    before = set(storage.glob("fit/*"))
    submitter = head.start("stopped", *arguments)

    def stage() -> Path | None:
        new = [p for p in set(storage.glob("fit/*")) - before if list(p.glob("checkpoints/step-*/checkpoint.json"))]
        return new[0] if new else None

    wait_until(stage, 400)
    folder = stage()
    assert folder is not None
    submitter.send_signal(signal.SIGINT)  # Ctrl-C ends the submitter, not the job
    assert submitter.wait(60) != 0
    assert head.info("stopped")["status"] == "RUNNING"
    stop = head.cli("stop", "stopped")
    assert stop.returncode == 0, stop.stdout
    assert head.info("stopped")["status"] == "STOPPED"
    assert not (folder / "manifest.json").exists(), "it was finished before it was stopped"
    reached = newest_step(folder)
    assert 0 < reached < 400
    again = head.submit("again", *arguments)
    assert again.returncode == 0, again.stdout[-4000:]
    assert "fit: done" in again.stdout
    history = json.loads((folder / "history.json").read_text())
    assert len(history["loss"]) == 400
    assert [p for p in set(storage.glob("fit/*")) - before if p != folder] == [], "the same stage went on"


def newest_step(stage: Path) -> int:
    marks = stage.glob("checkpoints/step-*/checkpoint.json")
    return max(int(m.parent.name.removeprefix("step-")) for m in marks)
