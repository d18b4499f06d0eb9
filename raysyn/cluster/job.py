"""What every file in jobs/ calls: read the config, run one stage, say where the result is.

Exit codes: 0 done (or stopped by SIGTERM in a resumable state), 2 bad input, 1 a fault, 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import inspect
import signal
import sys
import threading
import traceback
from types import FrameType

from raysyn.compose import JOBS, environment_overrides, job_keys, load_job, preset_names
from raysyn.types import Fault, Outcome, Resumable, UserError

USAGE = """usage: python jobs/{job}.py [key=value ...]

{doc}
Presets: {presets}
Any key of the config can be set, e.g. {example}. Keys: {keys}.
RAYSYN_STORAGE and MLFLOW_TRACKING_URI stand for storage= and tracking.uri= where those are not given.
--config prints the whole resolved config and stops.
"""
EXAMPLES = {
    "prepare": "data=camus data.root=/data/camus",
    "fit": "model=edm_l64 scale=demo model.fit.lr=1e-4 workers.num_workers=2",
    "synthesize": "model=edm_l64 synthesize.num_warps=5 synthesize.plan_only=true",
    "tune": "task=segmentation search.num_trials=50",
    "compare": "scale=demo model=all",
}


def _usage(job: str) -> str:
    keys = job_keys(job)
    groups = [group for group in ("scale", "data", "model", "task") if group in keys]
    presets = "  ".join(f"{group}={'|'.join(preset_names(group))}" for group in groups)
    doc = inspect.cleandoc(JOBS[job].__doc__ or "")
    return USAGE.format(job=job, doc=doc, presets=presets, example=EXAMPLES[job], keys=", ".join(keys))


def _print_config(config: object) -> None:
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")


class _Stopped(Resumable, KeyboardInterrupt):
    """Out of a wait within Ray only a KeyboardInterrupt comes; any other exception of a signal handler is lost there."""


_terminated = threading.Event()  # Ray raises a KeyboardInterrupt of its own instead, which does not say why


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    _terminated.set()
    raise _Stopped("stopped by SIGTERM")


def run_job(job: str, stage: str, argv: list[str] | None = None) -> int:
    """Run `stage` ("module:function") with the config of `job` from `argv`. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in argv):
        print(_usage(job), end="")
        return 0
    _terminated.clear()
    signal.signal(signal.SIGTERM, _on_sigterm)
    again = "the same command"
    try:
        overrides = [a for a in argv if a != "--config"]
        config = load_job(job, [*environment_overrides(overrides), *overrides])
        if "--config" in argv:
            _print_config(config)
            return 0
        if config.overwrite:
            again += " without overwrite=true"
        module, _, function = stage.partition(":")
        outcome: Outcome = getattr(importlib.import_module(module), function)(config)
    except UserError as error:
        print(f"raysyn {job}: {_user_error_within(error)}", file=sys.stderr)
        return 2
    except Fault as fault:
        print(f"raysyn {job}: {fault}", file=sys.stderr)
        return 1
    except (Resumable, KeyboardInterrupt) as stop:
        asked = isinstance(stop, Resumable) or _terminated.is_set()
        told = (
            str(stop).splitlines()[0] if isinstance(stop, Resumable) else "stopped by SIGTERM"
        )  # OmegaConf adds lines
        why = told if asked else "interrupted"
        print(f"raysyn {job}: {why}; resumable: run {again} again to go on", file=sys.stderr)
        return 0 if asked else 130
    except Exception as error:
        user = _user_error_within(error)
        if user is not None:
            print(f"raysyn {job}: {user}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(
            f"raysyn {job}: failed ({type(error).__name__}); what is whole is kept, {again} resumes",
            file=sys.stderr,
        )
        return 1
    if outcome.path:
        print(f"{outcome.stage}: {'already there' if outcome.skipped else 'done'}: {outcome.path}")
    return 0


def _user_error_within(error: BaseException | None) -> UserError | None:
    """The UserError that a Ray task or worker wrapped, if that is what went wrong.

    What Ray raises for one is a UserError too, whose text is the worker's whole traceback; the innermost says the line.
    """
    seen: set[int] = set()
    found: UserError | None = None
    while error is not None and id(error) not in seen:
        if isinstance(error, UserError):
            found = error
        seen.add(id(error))
        inner = getattr(error, "cause", None)
        error = inner if isinstance(inner, BaseException) else None if found else error.__cause__
    if found is None or type(found) is UserError:
        return found
    return UserError(str(found).strip().splitlines()[-1].removeprefix("raysyn.types.UserError: "))
