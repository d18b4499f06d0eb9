import json
import subprocess
import sys
from pathlib import Path

import pytest

from raysyn.cluster.session import ray_session
from raysyn.config import RayConfig
from raysyn.types import UserError

ROOT = Path(__file__).resolve().parents[2]
OWN_SESSION = """
import json, os, urllib.request, urllib.error
from raysyn.cluster.session import ray_session
from raysyn.config import RayConfig
with ray_session(RayConfig(num_cpus=1, object_store_mb=100)):
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
    print(json.dumps({"dashboard": dashboard, "without": status({}),
        "with": status({"Authorization": "Bearer " + token}),
        "usage": os.environ["RAY_USAGE_STATS_ENABLED"], "nested": nested, "after_nested": ray.is_initialized()}))
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
    assert facts["nested"]
    assert facts["after_nested"]
    assert after == "False"


def test_ray_imported_too_early_is_a_clear_error() -> None:
    code = "import ray\nfrom raysyn.cluster.session import secure\nsecure()"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert "UserError: RAY_AUTH_MODE" in ran.stderr


def test_an_unreachable_address_is_bad_input() -> None:
    with pytest.raises(UserError, match=r"ray\.address: cannot reach"), ray_session(RayConfig(address="127.0.0.1:1")):
        pass
