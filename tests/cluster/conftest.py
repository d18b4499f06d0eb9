"""Two hosts: Ray's head in one network namespace, a worker in another, an S3 server beside the head.

The hosts share the machine's disk and clock; what tests read goes over the link that is cut.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
IP = shutil.which("ip") or "/usr/sbin/ip"
TAG = str(os.getpid() % 100_000)
SUBNET = f"10.{200 + os.getpid() % 50}.{os.getpid() % 250}"
HEAD, WORKER, MASK = f"{SUBNET}.1", f"{SUBNET}.2", "/30"
OUTSIDE, HEAD_OUTSIDE = f"{SUBNET}.5", f"{SUBNET}.6"
PATIENCE = 400.0
COMMON = ["--block", "--num-cpus", "1", "--object-store-memory", str(100 << 20), "--disable-usage-stats"]


def no_namespaces() -> str:
    """Why there can be no namespaces here; "" when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path(IP).exists():
        return "no ip command (apt-get install iproute2)"
    made = subprocess.run([IP, "netns", "add", f"try-{TAG}"], capture_output=True, text=True)
    if made.returncode == 0:
        subprocess.run([IP, "netns", "del", f"try-{TAG}"], check=True)
    return made.stderr.strip()


def ip(*arguments: str) -> None:
    done = subprocess.run([IP, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclass
class Hosts:
    """Two namespaces with a link between them, and what runs in each."""

    folder: Path
    address: str = f"{HEAD}:6379"
    storage: str = ""
    running: dict[str, list[subprocess.Popen[str]]] = field(default_factory=dict)

    def run(self, host: str, *command: str, **env: str) -> subprocess.Popen[str]:
        """Start a process on a host, in a session of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")}
        own = {
            "HOST": host, "PYTHONPATH": f"{ROOT}:{self.folder}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 43,
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "OMP_NUM_THREADS": "1",
            "MOCK_LOG": str(self.folder / "drawn.log"), "MOCK_SECONDS": "0.5", "GLOO_SOCKET_IFNAME": f"{host[0]}l{TAG}",
            # A host that does not answer is dead after 16 s; by Ray's own settings (10 s, 3 s, 5 times) after 65.
            "RAY_health_check_timeout_ms": "3000", "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "4",
        }  # fmt: skip
        log = (self.folder / f"{host}-{Path(command[0]).name}.log").open("a")
        process = subprocess.Popen(
            [IP, "netns", "exec", f"{host}-{TAG}", *command], cwd=self.folder, env=kept | own | env,
            stdout=log, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        self.running.setdefault(host, []).append(process)
        return process

    def kill(self, host: str) -> None:
        """End at once every process that runs on a host, Ray's own daemons with it."""
        listed = subprocess.run([IP, "netns", "pids", f"{host}-{TAG}"], capture_output=True, text=True).stdout
        for pid in listed.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for process in self.running.pop(host, []):
            process.wait(timeout=30)

    def link(self, state: str) -> None:
        """Cut the worker's link (`down`) or mend it (`up`)."""
        ip("-n", f"worker-{TAG}", "link", "set", f"wl{TAG}", state)

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Raises AssertionError with everything that was said when `condition` stays false."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for: {what}\n{self.said()}"
            time.sleep(0.2)

    def said(self) -> str:
        """The end of each log."""
        return "\n".join(f"== {p.name}\n{p.read_text()[-2500:]}" for p in sorted(self.folder.glob("*.log")))


def connect() -> None:
    """Namespaces head and worker, a link between them, and one from here to the head."""
    for host in ("head", "worker"):
        ip("netns", "add", f"{host}-{TAG}")
        ip("-n", f"{host}-{TAG}", "link", "set", "lo", "up")
    ip("link", "add", f"hl{TAG}", "netns", f"head-{TAG}", "type", "veth", "peer", f"wl{TAG}", "netns", f"worker-{TAG}")
    ip("link", "add", f"ol{TAG}", "type", "veth", "peer", f"ho{TAG}", "netns", f"head-{TAG}")
    places = [("head", f"hl{TAG}", HEAD), ("worker", f"wl{TAG}", WORKER), ("head", f"ho{TAG}", HEAD_OUTSIDE)]
    for host, link, address in places:
        ip("-n", f"{host}-{TAG}", "addr", "add", address + MASK, "dev", link)
        ip("-n", f"{host}-{TAG}", "link", "set", link, "up")
    ip("addr", "add", OUTSIDE + MASK, "dev", f"ol{TAG}")
    ip("link", "set", f"ol{TAG}", "up")
    ip("route", "add", f"{SUBNET}.0{MASK}", "via", HEAD_OUTSIDE)


@pytest.fixture(scope="module")
def head_host() -> Iterator[Hosts]:
    """Both namespaces, the S3 server and Ray's head on one of them; no worker yet. Everything ends with the module."""
    import boto3

    if reason := no_namespaces():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="rs-two-"))
    made = Hosts(folder)
    try:
        connect()
        made.run("head", str(BIN / "moto_server"), "-H", "0.0.0.0", "-p", "5000")
        where = ["--head", "--port", "6379", "--dashboard-host", "127.0.0.1", "--temp-dir", str(folder / "ray")]
        made.run("head", str(BIN / "ray"), "start", "--node-ip-address", HEAD, *where, *COMMON)
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        client = boto3.client("s3", endpoint_url=f"http://{HEAD}:5000", region_name="us-east-1", **keys)
        made.wait_until(lambda: reachable(client), "the S3 server")
        client.create_bucket(Bucket="sets")
        made.wait_until(listening, "the head")
        yield made
    finally:
        for host in ("worker", "head"):
            made.kill(host)
            subprocess.run([IP, "netns", "del", f"{host}-{TAG}"], check=False)
        # A namespace goes when its last process has; the link's end in this one would stay until then.
        subprocess.run([IP, "link", "del", f"ol{TAG}"], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def hosts(head_host: Hosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Both hosts up and joined, a storage of the test's own in the bucket `sets`; the worker's processes end with it."""
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    head_host.storage = f"s3://sets/{time.time_ns()}?scheme=http&endpoint_override={HEAD}:5000&region=us-east-1"
    (head_host.folder / "drawn.log").write_text("")
    join = ["start", "--node-ip-address", WORKER, "--address", f"{HEAD}:6379", *COMMON]
    said = head_host.folder / "worker-ray.log"
    said.unlink(missing_ok=True)
    head_host.run("worker", str(BIN / "ray"), *join)
    head_host.wait_until(lambda: "Ray runtime started" in said.read_text(), "the worker")
    yield head_host
    head_host.kill("worker")


def reachable(client: Any) -> bool:
    try:
        client.list_buckets()
    except Exception:
        return False
    return True


def listening() -> bool:
    try:
        socket.create_connection((HEAD, 6379), timeout=1).close()
    except OSError:
        return False
    return True
