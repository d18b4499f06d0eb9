"""The GPU benchmark's code, run small on a CPU: every row is there, none failed, nothing but torch, diffusers, numpy."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import label_index, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_row_is_measured_small_on_a_cpu(tmp_path) -> None:
    main(["--device", "cpu", "--size", "tiny", "--output", str(tmp_path / "gpu.csv")])
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert not [r["note"] for r in rows if "failed" in r["note"] or "left out" in r["note"]]
    names = {r["name"] for r in rows}
    for model in ("edm_l64", "edm", "edm_l128"):
        assert {r["name"] for r in rows if r["model"] == model} >= {
            "sampler, bf16, against the plain procedure",
            "sampler, CUDA graph, against the plain procedure",
            "all modulations kept, against none kept",
            "modulations as tables, against none kept",
            "largest batch found by the probe",
            "fp16 against fp32",
            "training",
        }
    assert {"sampler, compiled, CUDA graph, against the plain procedure", "training, compiled"} <= names
    exact = [r for r in rows if r["name"].startswith("plain procedure")]
    assert all(float(r["value"]) == 1 for r in exact)
    graphs = [r for r in rows if "CUDA graph" in r["name"]]
    assert all("no CUDA graphs on cpu" in r["note"] and "MFU" in r["note"] for r in graphs)


def test_with_no_time_every_row_says_so(tmp_path) -> None:
    main(["--device", "cpu", "--size", "tiny", "--minutes", "0", "--output", str(tmp_path / "gpu.csv")])
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert rows
    assert all(r["note"] == "left out: no time left" for r in rows)


def test_it_needs_no_ray_mlflow_or_hydra(tmp_path) -> None:
    code = "import sys, benchmarks.gpu; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"ray", "mlflow", "hydra", "omegaconf", "pyarrow", "matplotlib"}


def test_its_maps_are_apical_views() -> None:
    maps = label_index(4, 64)
    assert maps.dtype == np.uint8
    assert [sorted(np.unique(m).tolist()) for m in maps[:2]] == [[0, 1, 2, 3, 4], [0, 6, 7, 8, 9]]
    assert (maps[0] != maps[2]).any()
