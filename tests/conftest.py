"""One thread a process, no telemetry, and Ray's token authentication on before anything imports Ray."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("RAY_ADDRESS", None)

from raysyn.cluster.session import QUIET, secure

for _key, _value in QUIET.items():
    if _key != "PYTHONWARNINGS":
        os.environ.setdefault(_key, _value)
secure()
