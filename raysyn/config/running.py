"""Where and how a job runs. Nothing of it changes a result; of it only `cost` enters a fingerprint, the study's."""

from __future__ import annotations

from dataclasses import dataclass

from raysyn.config.checks import INF, within
from raysyn.types import UserError


@dataclass
class RayConfig:
    """Where Ray runs. address "" joins RAY_ADDRESS or the job's cluster, else starts a local one with `num_cpus`."""

    address: str = ""
    num_cpus: int | None = None
    object_store_mb: int = 1024

    def __post_init__(self) -> None:
        within(self, num_cpus=(1, 1e5), object_store_mb=(75, 1e9))  # Ray takes no less
        if self.address not in ("", "auto") and not self.address.rpartition(":")[2].isdigit():
            raise UserError(f"address: {self.address!r} is neither host:port, ray://host:port nor auto")


@dataclass
class WorkersConfig:
    """Placement. It never changes a result: only how many processes share the work, and what each may use.

    A fit holds its frames in memory, at most `max_resident_gb` a worker; sets of `ray_data_from_mb` (decoded) or more
    are read and decoded by Ray Data, smaller ones by the worker itself.
    """

    num_workers: int = 1
    min_workers: int = 0
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0
    threads_per_worker: int = 1
    max_failures: int = 3
    max_resident_gb: float = 16.0
    ray_data_from_mb: float = 32.0

    def __post_init__(self) -> None:
        within(self, num_workers=(1, 1e5), min_workers=(0, 1e5), gpus_per_worker=(0, 64), cpus_per_worker=(0, 4096))
        within(self, threads_per_worker=(1, 4096), max_failures=(-1, 1e6), max_resident_gb=(0, INF))
        within(self, ray_data_from_mb=(0, INF))


@dataclass
class TrackingConfig:
    """MLflow. uri "" means a sqlite database under the storage folder."""

    enabled: bool = True
    uri: str = ""
    experiment: str = "raysyn"

    def __post_init__(self) -> None:
        known = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
        if self.uri and self.uri.partition("://")[0].partition("+")[0] not in known:
            raise UserError(
                f"uri: {self.uri!r} is no address of an MLflow server or database; "
                "give http://host:5000, sqlite:////folder/mlflow.db or postgresql://..."
            )
        if self.uri.startswith("sqlite") and not self.uri.partition("://")[2].startswith("//"):
            raise UserError(
                f"uri: {self.uri!r} names no absolute path, and workers have other working folders; "
                "give sqlite:////folder/mlflow.db"
            )


@dataclass
class CostConfig:
    """Prices, for the money columns. No default is a quotation: set your own."""

    usd_per_gpu_hour: float = 2.5
    usd_per_cpu_hour: float = 0.05

    def __post_init__(self) -> None:
        within(self, usd_per_gpu_hour=(0, 1e6), usd_per_cpu_hour=(0, 1e6))
