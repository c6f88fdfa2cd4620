"""How a recipe is shared among processes and machines."""

from dataclasses import dataclass, field, fields

from .errors import DataError
from .scale_estimate import EstimateArguments

EXECUTORS = ("local", "ray", "slurm")


@dataclass
class ScaleArguments(EstimateArguments):
    """Where the tasks run."""

    executor: str = field(default="local", metadata={"help": "Who runs the tasks: local, ray or slurm."})
    tasks: int = field(
        default=64,
        metadata={"help": "Parts of the text, several for each worker: one that is killed begins its part anew."},
    )
    workers: int | None = field(
        default=None,
        metadata={
            "help": "Tasks that run at a time; default: one for each core here, all elsewhere, with ray_task_seconds as many "
            "as the cluster has room for."
        },
    )
    memory_gb: int = field(default=2, metadata={"help": "Memory that Ray and Slurm keep for each task, GB."})
    rows_memory_gb: int = field(
        default=8, metadata={"help": "Memory for the tasks that run alone (tokenizer, rows), GB; see --estimate."}
    )
    ray_address: str | None = field(
        default=None, metadata={"help": "Address of the Ray cluster; default: the one `ray start` has begun here."}
    )
    ray_task_seconds: int | None = field(
        default=None,
        metadata={"help": "On Ray: of tasks side by side, one that has taken so long is ended and begun anew."},
    )
    slurm_partition: str | None = field(default=None, metadata={"help": "Slurm's partition."})
    slurm_time: str = field(default="24:00:00", metadata={"help": "Slurm's limit for each task."})
    slurm_qos: str | None = field(default=None, metadata={"help": "Slurm's quality of service, where one is needed."})
    slurm_setup: str | None = field(
        default=None, metadata={"help": "Shell command that opens the Python environment; default: this one's path."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.executor not in EXECUTORS:
            raise DataError(f"executor must be one of {', '.join(EXECUTORS)}, got {self.executor!r}")
        for name in ("tasks", "workers", "memory_gb", "rows_memory_gb", "ray_task_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")
        for spec in fields(self):
            owner = spec.name.partition("_")[0]
            if owner in ("ray", "slurm") and owner != self.executor and getattr(self, spec.name) != spec.default:
                raise DataError(
                    f"{spec.name} is for executor {owner}, and the executor is {self.executor}: set executor"
                )
        if self.executor == "slurm" and not self.slurm_partition:
            raise DataError("executor slurm needs slurm_partition")
