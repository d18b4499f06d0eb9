"""The whole study from the command line, as `make demo` runs it, at a scale where nothing is learned."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raysyn.compose import build
from raysyn.config import ModelConfig, fingerprint
from tests.processes import kill_driver

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    "trained_on,model,space,solver,num_steps,num_function_evals,seconds_per_image,fd_lite0,lv_endo_dice,lv_epi_dice,"
    "la_dice,mean_dice,view_accuracy"
)
pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.timeout(1500)]


def start(storage: Path, *overrides: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "MLFLOW_TRACKING_URI"))}
    command = [sys.executable, "jobs/compare.py", "scale=tiny", f"storage={storage}", *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, said[-4000:]
    return said


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, str]:
    """A study killed with -9 in the middle, started again, and finished."""
    storage = tmp_path_factory.mktemp("study") / "runs"
    process = start(storage)
    deadline = time.time() + 600
    while not list(storage.glob("fit/*/manifest.json")):
        assert time.time() < deadline, "no model was fitted"
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.5)
    kill_driver(process)
    finished = {p: p.stat().st_mtime_ns for p in storage.glob("*/*/manifest.json")}
    said = finish(start(storage))
    assert all(p.stat().st_mtime_ns == when for p, when in finished.items()), "a finished stage was made again"
    return storage, said


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_its_columns_and_a_row_a_combination(study) -> None:
    storage, said = study
    table = storage / "report" / "table.csv"
    assert table.read_text().splitlines()[0] == COLUMNS
    found = rows(table)
    assert [(r["trained_on"], r["model"], r["num_steps"]) for r in found] == [
        ("phantom", "", ""),
        ("synthetic", "edm", "2"),
        ("synthetic", "edm_l128", "2"),
    ]
    for row in found[1:]:
        assert all(row[c] for c in COLUMNS.split(","))
        assert 0 <= float(row["mean_dice"]) <= 1
        assert int(row["num_function_evals"]) == 2
        assert float(row["seconds_per_image"]) > 0
    assert {r["model"].split()[-1] for r in rows(storage / "report" / "controls.csv")} == {"reconstruction", "prior"}
    assert "mean Dice" in said


def test_the_report_is_one_page_with_its_pictures(study) -> None:
    storage, _ = study
    page = (storage / "report" / "index.html").read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (storage / "report" / "pictures" / "hero.png").is_file()


def test_curves_and_every_part_of_the_cost_are_in_the_report(study) -> None:
    storage, _ = study
    figures = storage / "report" / "figures"
    counts = {r["series"]: [] for r in rows(figures / "num_synthetic.csv")}
    for row in rows(figures / "num_synthetic.csv"):
        counts[row["series"]].append(int(row["x"]))
    assert {series: sorted(x) for series, x in counts.items()} == {m: [3, 6, 12, 24] for m in ("edm", "edm_l128")}
    shares = {float(r["x"]) for r in rows(figures / "real_fraction.csv")}
    assert shares == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {r["series"] for r in rows(figures / "learning.csv")} == {"edm", "edm_l128"}
    assert (figures / "trials.png").is_file()
    full = {r["model"]: r for r in rows(storage / "report" / "table_full.csv")}
    latent, pixel = full["edm_l128"], full["edm"]
    parts = ("autoencoder", "fit", "sample", "decode", "rejected")
    spent = [float(latent[f"cost/{part}_cpu_seconds"]) for part in parts]
    assert all(s > 0 for s in spent[:4])
    assert float(latent["cost/total_cpu_seconds"]) == pytest.approx(sum(spent), rel=1e-4)
    assert not pixel["cost/decode_cpu_seconds"]
    for row in (latent, pixel):
        assert float(row["cost/total_flops"]) > float(row["cost/sample_flops"]) > 0
        assert float(row["cost/sample_peak_memory_mb"]) > 100
        assert 0 <= float(row["realism/faithfulness"]) <= 1
        assert float(row["realism/memorisation_copy_rate"]) >= 0
    assert (storage / "report" / "pictures" / "edm_dpmpp_2m_2_nearest.png").is_file()


def test_shards_and_manifests_name_the_model_they_are_of_and_what_it_worked_in(study) -> None:
    storage, _ = study
    sets = list(storage.glob("synthesize/*/manifest.json"))
    assert sets
    for path in sets:
        manifest = json.loads(path.read_text())
        model = build(ModelConfig, json.loads(Path(manifest["model_dir"], "model.json").read_text())["config"])
        for shard in manifest["shards"]:
            metadata = pq.read_schema(path.parent / shard["name"]).metadata
            assert metadata[b"raysyn_model_fingerprint"].decode() == fingerprint(model)
            assert metadata[b"raysyn_checkpoint_sha256"].decode() == manifest["checkpoint_sha256"]
    for kind in ("fit", "task", "synthesize"):
        found = {json.loads(path.read_text())["precision"] for path in storage.glob(f"{kind}/*/manifest.json")}
        assert found == {"fp32"}, kind


def test_mlflow_has_a_run_a_row_with_the_three_families(study) -> None:
    storage, _ = study
    with sqlite3.connect(storage / "mlflow.db") as database:
        kinds = database.execute(
            "select r.name, m.key from metrics m join runs r using (run_uuid) join tags t using (run_uuid) "
            "where t.key = 'raysyn.kind' and t.value = 'row'"
        ).fetchall()
    families = {}
    for name, key in kinds:
        families.setdefault(name, set()).add(key.split("/")[0])
    assert families["edm dpmpp_2m 2"] == {"cost", "realism", "task"}


def test_mlflow_has_what_each_fit_logged(study) -> None:
    """Loss by noise level, rate, gradient, cost and memory while running; pictures; the model with its signature."""
    storage, _ = study
    with sqlite3.connect(storage / "mlflow.db") as database:
        query = (
            "select r.name, r.artifact_uri, m.key from runs r join metrics m using (run_uuid) where r.name like 'fit %'"
        )
        found = database.execute(query).fetchall()
        models = database.execute("select count(*) from logged_models where lifecycle_stage = 'active'").fetchone()[0]
    keys: dict[str, set[str]] = {}
    for name, _, key in found:
        keys.setdefault(name, set()).add(key)
    assert set(keys) == {"fit edm", "fit edm_l128", "fit autoencoder of edm_l128"}
    always = {f"train/{key}" for key in ("loss", "lr", "grad_norm", "images_per_second", "images_seen")}
    always |= {"validation/loss", "cost/cpu_seconds", "cost/gpu_seconds", "system/memory_mb"}
    for name, logged in keys.items():
        assert always <= logged
        assert any(key.startswith("train/loss_by_sigma/") for key in logged) == ("autoencoder" not in name)
    for place in {uri for _, uri, _ in found}:
        assert list(Path(place.removeprefix("file://")).rglob("*samples*")), "a sample grid with its masks"
    assert models == 2, "the diffusion models, each once though the study was killed"


def test_trials_are_child_runs_of_their_search(study) -> None:
    storage, _ = study
    with sqlite3.connect(storage / "mlflow.db") as database:
        tagged = "select run_uuid from tags where key = 'raysyn.kind' and value = ?"
        searches = database.execute(tagged, ("search",)).fetchall()
        trials = {run for (run,) in database.execute(tagged, ("trial",))}
        parents = database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall()
        scored = {run for (run,) in database.execute("select run_uuid from metrics where key = 'score'")}
    assert len(searches) == 1
    assert trials
    assert set(parents) == {(trial, searches[0][0]) for trial in trials}
    assert trials <= scored
    manifest = json.loads(next(storage.glob("tune/*/manifest.json")).read_text())
    assert len(trials) >= len(manifest["trials"]) > 0


def test_a_second_run_skips_everything_and_prints_the_same_table(study) -> None:
    storage, said = study
    started = time.monotonic()
    again = finish(start(storage))
    assert time.monotonic() - started < 40
    table = [
        line
        for line in said.splitlines()
        if "│" in line or ("edm" in line and "dpmpp" in line and "stages" not in line)
    ]
    assert [line for line in table if line in again] == table
    assert "already there" in again


def test_a_synthetic_set_and_its_model_stand_on_their_own(study) -> None:
    storage, _ = study
    from raysyn.data.frames import read_arrays
    from raysyn.pipeline import load_model_dir

    for folder in storage.glob("fit/*/model"):
        assert load_model_dir(folder).image_size == 64
    for folder in storage.glob("synthesize/*"):
        frames = read_arrays(str(folder), "train")
        assert len(frames) == 24
        assert set(frames.source) == {"synthetic"}
