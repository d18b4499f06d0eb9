"""Typed configuration. Defaults are the paper's; `configs/` holds presets. Values are checked before any work starts.

Each job has one dataclass. What decides a result is in `data`, `model`, `task`, `synthesize` and the like and enters
the fingerprints; where and how it runs (`storage`, `ray`, `workers`, `tracking`) does not, `cost` only the study's, whose
table has money in it.
"""

from raysyn.config.data import DataConfig, SynthesizeConfig, WarpConfig
from raysyn.config.fingerprints import fingerprint, to_dict
from raysyn.config.jobs import CompareJob, FitJob, JobConfig, PrepareJob, SynthesizeJob, TuneJob
from raysyn.config.model import SOLVERS, AugmentConfig, FitConfig, ModelConfig, NetConfig, SamplerConfig, VAEConfig
from raysyn.config.running import CostConfig, RayConfig, TrackingConfig, WorkersConfig
from raysyn.config.task import SearchConfig, TaskConfig

__all__ = [
    "SOLVERS",
    "AugmentConfig",
    "CompareJob",
    "CostConfig",
    "DataConfig",
    "FitConfig",
    "FitJob",
    "JobConfig",
    "ModelConfig",
    "NetConfig",
    "PrepareJob",
    "RayConfig",
    "SamplerConfig",
    "SearchConfig",
    "SynthesizeConfig",
    "SynthesizeJob",
    "TaskConfig",
    "TrackingConfig",
    "TuneJob",
    "VAEConfig",
    "WarpConfig",
    "WorkersConfig",
    "fingerprint",
    "to_dict",
]
