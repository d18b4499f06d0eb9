"""The GPU benchmark's code, run small on a CPU: every row is there, none failed, nothing but torch, diffusers, numpy."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.gpu import main, matmul_ceiling
from benchmarks.gpu_bench import Bench, exact_convolutions, label_index
from benchmarks.plain import plain_heun
from raysyn.diffusion.precondition import EDM, Denoiser
from raysyn.nets.precision import AMP_DTYPES, precision

LOW = precision("bf16", torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_row_is_measured_small_on_a_cpu(tmp_path) -> None:
    main(["--device", "cpu", "--size", "tiny", "--minutes", "60", "--output", str(tmp_path / "gpu.csv")])
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert not [r["note"] for r in rows if "failed" in r["note"] or "left out" in r["note"]]
    names = {r["name"] for r in rows}
    for model in ("edm_l64", "edm", "edm_l128"):
        assert {r["name"] for r in rows if r["model"] == model} >= {
            f"sampler, {LOW}, against the plain procedure",
            "sampler, CUDA graph, against the plain procedure",
            "all modulations kept, against none kept",
            "modulations as tables, against none kept",
            "largest batch found by the probe",
            f"training in {LOW}",
            "cuDNN's kernels by trial, against by rule",
            *(f"{amp} against fp32" for amp in AMP_DTYPES if precision(amp, torch.device("cpu")) == amp),
        }
    assert {"sampler, compiled, CUDA graph, against the plain procedure", f"training in {LOW}, compiled"} <= names
    decoded = [r["model"] for r in rows if r["name"] == f"decoding in {LOW} against fp32" and r["ours_seconds"]]
    assert decoded == ["edm_l64", "edm_l128"]
    exact = [r for r in rows if r["name"].startswith("plain procedure")]
    assert all(float(r["value"]) == 1 for r in exact)
    assert not any(r["note"].endswith(" 0%") for r in exact), "nothing to compare: all is black or white"
    assert rows[0]["note"].startswith(f"torch {torch.__version__}")
    graphs = [r for r in rows if "CUDA graph" in r["name"]]
    assert all("no CUDA graphs on cpu" in r["note"] and "MFU" in r["note"] for r in graphs)


def test_with_no_time_every_row_says_so(tmp_path) -> None:
    main(["--device", "cpu", "--size", "tiny", "--minutes", "0", "--output", str(tmp_path / "gpu.csv")])
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert rows
    assert all(r["note"] == "left out: no time left" for r in rows)


def test_a_row_is_on_disk_when_the_next_begins_and_a_failure_takes_none(tmp_path) -> None:
    bench = Bench(torch.device("cpu"), True, float("inf"), tmp_path / "gpu.csv")
    seen = []

    def fails() -> None:
        seen.append((tmp_path / "gpu.csv").read_text())
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    bench.attempt("first", lambda: bench.add("first", value=1.0))
    bench.attempt("second", fails)
    assert [line.split(",")[0] for line in seen[0].splitlines()] == ["name", "first"]
    names = [(r["name"], r["note"]) for r in csv.DictReader((tmp_path / "gpu.csv").open())]
    assert names == [
        ("first", ""),
        ("second", "failed: RuntimeError: CUDA error: an illegal memory access was encountered"),
    ]


def test_a_device_that_fails_for_good_is_a_row_too(tmp_path, monkeypatch) -> None:
    def gone() -> None:
        raise RuntimeError("CUDA error: device lost")

    monkeypatch.setattr("benchmarks.gpu_bench.free_memory", gone)
    bench = Bench(torch.device("cpu"), True, float("inf"), tmp_path / "gpu.csv")
    for name in ("first", "second"):
        bench.attempt(name, lambda: None)
    assert [r["note"] for r in bench.rows] == ["failed: RuntimeError: CUDA error: device lost"] * 2


def test_rows_say_what_bf16_comes_to(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("raysyn.nets.precision.computes_in", lambda amp, kind: False)
    bench = Bench(torch.device("cpu"), True, float("inf"), tmp_path / "gpu.csv")
    bench.attempt("ceiling", lambda: matmul_ceiling(bench))
    assert [(r["name"], r["unit"]) for r in bench.rows] == [("ceiling: fp32 matrix product", "TFLOP/s")]


def test_grey_levels_are_compared_in_whole_fp32() -> None:
    before = torch.backends.cudnn.allow_tf32
    with exact_convolutions():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_saturated_pixels_do_not_count_as_agreement() -> None:
    from benchmarks.gpu_bench import Case

    rows = []
    case = SimpleNamespace(add=lambda name, **values: rows.append(values))
    exact = torch.tensor([0.0, 255, 0, 255, 0, 255, 100, 101])
    Case.agreement(case, "bf16", exact + torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 2]), exact)
    assert rows[0]["value"] == 0.5
    assert rows[0]["note"].endswith("of the pixels that are grey, 25%")


def test_the_plain_procedures_noise_levels_are_on_the_device() -> None:
    """A number from the CPU would make it wait at each evaluation, to our advantage."""
    levels = []

    class Net(torch.nn.Module):
        def forward(self, x, c_noise, one_hot, modulations=None):
            return torch.zeros_like(x)

    denoiser = Denoiser(Net(), EDM())
    own = denoiser.with_variance
    denoiser.with_variance = lambda x, sigma, *rest: levels.append(sigma) or own(x, sigma, *rest)
    plain_heun(denoiser, torch.zeros(1, 10, 4, 4), [0], (1, 4, 4), 2, 0.002, 80.0)
    assert [type(level) for level in levels] == [torch.Tensor] * 3


@pytest.mark.slow
def test_a_fit_of_published_kind_learns_each_way(tmp_path) -> None:
    given = [
        "--device",
        "cpu",
        "--size",
        "tiny",
        "--minutes",
        "60",
        "--fit",
        "6",
        "--only-fit",
        "--output",
        str(tmp_path / "fit.csv"),
    ]
    main(given)
    rows = list(csv.DictReader((tmp_path / "fit.csv").open()))
    ways = ["fit, bf16, compiled", "fit, bf16", "fit, fp32", "fit, bf16, compiled, CUDA graphs"]
    assert [r["name"] for r in rows] == ["device", f"ceiling: {LOW} matrix product", *ways]
    for row in rows[2:]:
        assert float(row["value"]) > 0, row["note"]
        assert row["note"].startswith("batch 4, 6 steps")
        assert "waited for batches" in row["note"]
        assert ("is fp32 on this device" in row["note"]) == (LOW == "fp32" and "bf16" in row["name"])


def test_a_fit_of_no_steps_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", "--only-fit", "--output", str(tmp_path / "fit.csv")])
    assert stopped.value.code == 2
    assert "--fit" in capsys.readouterr().err


def test_it_needs_no_ray_mlflow_or_hydra(tmp_path) -> None:
    code = "import sys, benchmarks.gpu; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"ray", "mlflow", "hydra", "omegaconf", "pyarrow", "matplotlib"}
    fit = subprocess.run(
        [sys.executable, "-c", code.replace("benchmarks.gpu", "benchmarks.gpu_fit")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    loaded = set(fit.stdout.split())
    assert "scipy" in loaded
    assert not loaded & {"ray", "mlflow", "hydra", "omegaconf"}


def test_its_maps_are_apical_views() -> None:
    maps = label_index(4, 64)
    assert maps.dtype == np.uint8
    assert [sorted(np.unique(m).tolist()) for m in maps[:2]] == [[0, 1, 2, 3, 4], [0, 6, 7, 8, 9]]
    assert (maps[0] != maps[2]).any()
