"""One dataclass a job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raysyn.config.checks import each_within, not_empty, one_of, within
from raysyn.config.data import DataConfig, SynthesizeConfig
from raysyn.config.model import SOLVERS, ModelConfig
from raysyn.config.running import CostConfig, RayConfig, TrackingConfig, WorkersConfig
from raysyn.config.task import SearchConfig, TaskConfig
from raysyn.types import UserError

CONTROLS = ("reconstruction", "prior")


@dataclass
class JobConfig:
    """What every job has. `scale` names the preset; `storage` is a folder or a URI (s3://bucket/prefix)."""

    scale: str = "paper"
    storage: str = "runs/paper"
    plan_only: bool = False
    overwrite: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cost: CostConfig = field(default_factory=CostConfig)


@dataclass
class PrepareJob(JobConfig):
    """`jobs/prepare.py`: raw data to frames."""


@dataclass
class FitJob(JobConfig):
    """`jobs/fit.py`: the autoencoder (latent models) and the diffusion model. `what` limits it to the autoencoder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    what: str = "all"

    def __post_init__(self) -> None:
        one_of(self, what=("all", "autoencoder"))


@dataclass
class SynthesizeJob(JobConfig):
    """`jobs/synthesize.py`: masks to frames. `model_dir` is a saved pipeline; "" takes the fit of `model`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    model_dir: str = ""
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)


@dataclass
class TuneJob(JobConfig):
    """`jobs/tune.py`: search one task on one or more frame sets (folders of frames; the first is the default set).

    Trials are scored on the same frames, whichever set they train on: on the validation frames of all `train_sets`
    together, or with task.validate_on real on those of `data`.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    train_sets: list[str] = field(default_factory=list)


@dataclass
class CompareJob(JobConfig):
    """`jobs/compare.py`: the study. One row a (model, solver, number of steps), the ceiling beside them.

    `model` names its models, e.g. model=all or model=[edm,vp]; the keys of each are set in `configs/`.

    `extractors` name what realism is measured with: lite0 (embedded), inception=FILE, <timm model>=FILE.
    """

    models: list[ModelConfig] = field(default_factory=list)
    solvers: list[str] = field(default_factory=lambda: ["euler", "heun"])
    steps: list[int] = field(default_factory=lambda: [5, 10, 25, 50, 100, 200])
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    segmentation: TaskConfig = field(default_factory=TaskConfig)
    classification: TaskConfig = field(default_factory=lambda: TaskConfig(kind="classification"))
    search: SearchConfig = field(default_factory=SearchConfig)
    num_task_seeds: int = 1
    controls: list[str] = field(default_factory=lambda: ["reconstruction", "prior"])
    extractors: list[str] = field(default_factory=lambda: ["lite0"])
    curves: bool = False

    def __post_init__(self) -> None:
        for key, choices in (("solvers", SOLVERS), ("controls", CONTROLS)):
            for value in getattr(self, key):
                if value not in choices:
                    raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}")
        not_empty(self, "solvers", "steps")
        labels = [model.label for model in self.models]
        lists: dict[str, list[Any]] = {"model": labels, "solvers": self.solvers, "steps": self.steps}
        lists |= {"controls": self.controls, "extractors": self.extractors}
        for key, values in lists.items():
            if twice := [v for v in values if values.count(v) > 1]:
                raise UserError(f"{key}: {twice[0]} comes twice; a row has one place in the table")
        each_within(self, steps=(1, 10_000))
        within(self, num_task_seeds=(1, 1000))
        for key in ("segmentation", "classification"):
            if (kind := getattr(self, key).kind) != key:
                raise UserError(f"{key}.kind: is {kind!r}; here it is always {key}")
