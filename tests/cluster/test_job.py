import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysyn.cluster.job import run_job
from raysyn.compose import load_job, preset_names
from raysyn.types import Outcome, Resumable, UserError

ROOT = Path(__file__).resolve().parents[2]


def done(config: object) -> Outcome:
    return Outcome("fit", "here", "f")


def refuses(config: object) -> Outcome:
    raise UserError("mask.png: too small")


def refuses_within_ray(config: object) -> Outcome:
    wrapped = RuntimeError("task failed")
    wrapped.cause = UserError("mask.png: too small")  # as ray.exceptions.RayTaskError carries it
    raise wrapped


def refuses_as_ray_tells_it(config: object) -> Outcome:
    from ray.exceptions import RayTaskError

    cause = UserError("mask.png: too small")
    error = RayTaskError("task", "Traceback:\n  File x\nraysyn.types.UserError: mask.png: too small", cause)
    raised = error.as_instanceof_cause()
    assert isinstance(raised, UserError)
    raise raised


def refuses_in_a_task_within_a_task(config: object) -> Outcome:
    from ray.exceptions import RayTaskError

    try:
        refuses_as_ray_tells_it(config)
    except UserError as error:
        raise RayTaskError("outer", "Traceback:\n  File y\n", error) from None
    raise AssertionError


def breaks(config: object) -> Outcome:
    raise OSError("the disk is on fire")


def stops(config: object) -> Outcome:
    raise Resumable("stopped by SIGTERM")


def waits_within_ray(config: object) -> Outcome:
    """As ray.get takes signals: what their handler raises is lost, but for a KeyboardInterrupt, which it raises anew."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None
    except BaseException:
        return Outcome("fit", "went on", "f")
    raise AssertionError


def stopped_amid_a_config(config: object) -> Outcome:
    """As OmegaConf passes on what is raised while it works: with lines of its own."""
    raise type("Stopped", (Resumable, KeyboardInterrupt), {})("stopped by SIGTERM\n    full_key: a")


def is_interrupted(config: object) -> Outcome:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stage", "code", "says"),
    [
        (done, 0, "fit: done: here"),
        (refuses, 2, "raysyn fit: mask.png: too small"),
        (refuses_within_ray, 2, "raysyn fit: mask.png: too small"),
        (refuses_as_ray_tells_it, 2, "raysyn fit: mask.png: too small\n"),
        (refuses_in_a_task_within_a_task, 2, "raysyn fit: mask.png: too small\n"),
        (breaks, 1, "the same command resumes"),
        (stops, 0, "resumable"),
        (waits_within_ray, 0, "stopped by SIGTERM; resumable"),
        (stopped_amid_a_config, 0, "stopped by SIGTERM; resumable"),
        (is_interrupted, 130, "interrupted; resumable"),
    ],
)
def test_exit_codes(stage, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    sys.modules.setdefault(__name__, sys.modules[stage.__module__])
    try:
        assert run_job("fit", f"{stage.__module__}:{stage.__name__}", []) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    assert says in out + err
    assert code == 1 or err.count("\n") <= 1


@pytest.mark.parametrize("stage", [breaks, stops])
def test_what_overwriting_began_is_gone_on_with_without_it(stage, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    sys.modules.setdefault(__name__, sys.modules[stage.__module__])
    try:
        run_job("fit", f"{stage.__module__}:{stage.__name__}", ["overwrite=true"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "the same command without overwrite=true" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["prepare", "fit", "synthesize", "tune", "compare"])
def test_help_and_bad_keys_are_quick_and_clear(job: str) -> None:
    started = time.monotonic()
    shown = subprocess.run([sys.executable, f"jobs/{job}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert f"jobs/{job}.py" in shown.stdout
    bad = subprocess.run([sys.executable, f"jobs/{job}.py", "no.such=1"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "no" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert time.monotonic() - started < 60
    heavy = "import sys, raysyn.cluster.job; assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_help_names_what_is_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"prepare": "", "fit": "model vae", "synthesize": "model vae", "tune": "task", "compare": "model vae"}
    for job, keys in chosen.items():
        assert run_job(job, "no:stage", ["--help"]) == 0
        shown = capsys.readouterr().out
        listed = shown.partition("Keys: ")[2].partition(".\n")[0].split(", ")
        assert {"model", "vae", "task"} & set(listed) == set(keys.split())
        for key in {"model", "task"} & set(keys.split()):
            assert f"  {key}={'|'.join(preset_names(key))}" in shown


@pytest.mark.parametrize("job", ["fit", "synthesize", "tune", "compare"])
def test_input_that_is_not_there_is_refused_before_ray_starts(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: object) -> None:
        raise AssertionError("Ray was started")

    module = importlib.import_module(f"raysyn.cluster.{job}")
    monkeypatch.setattr(module, "ray_session", start)
    with pytest.raises(UserError, match=r"data\.root: /no/such is not a folder"):
        getattr(module, job)(load_job(job, ["scale=tiny", "data=camus", "data.root=/no/such", "storage=/no/such"]))


@pytest.mark.parametrize("job", ["fit", "tune", "compare"])
def test_input_without_a_split_is_refused_before_ray_starts(job: str, tmp_path: Path, monkeypatch) -> None:
    def start(*args: object) -> None:
        raise AssertionError("Ray was started")

    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
        (tmp_path / kind / "training" / "patient0001_2CH_ED.png").write_bytes(b"not read by an index")
    module = importlib.import_module(f"raysyn.cluster.{job}")
    monkeypatch.setattr(module, "ray_session", start)
    config = load_job(job, ["scale=tiny", "data=png_folder", f"data.root={tmp_path}", f"storage={tmp_path}/runs"])
    with pytest.raises(UserError, match=f"data.root: {tmp_path} holds no validation patients"):
        getattr(module, job)(config)


def test_a_finished_study_is_not_overwritten_before_its_job_can_begin(tmp_path: Path, monkeypatch) -> None:
    from raysyn.cluster.compare import compare, compare_fingerprint
    from raysyn.cluster.stage import open_stage

    def refuse(*_: object) -> None:
        raise UserError("ray.address: cannot reach it")

    monkeypatch.setattr("raysyn.cluster.compare.ray_session", refuse)
    job = load_job("compare", ["scale=tiny", f"storage={tmp_path}", "overwrite=true"])
    stage = open_stage(str(tmp_path), "compare", compare_fingerprint(job))
    stage.finish({"rows": []})
    with pytest.raises(UserError, match="cannot reach it"):
        compare(job)
    assert stage.outcome() is not None
