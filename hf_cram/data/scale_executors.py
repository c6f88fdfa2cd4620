"""datatrove's executors for the stages of a plan: on this machine, on a Ray cluster, by Slurm."""

import itertools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig

from .deduplication import choose_bands
from .errors import DataError
from .scale_arguments import ScaleArguments
from .scale_plan import MINHASH_RECALL, ScalePlan
from .scale_steps import (
    AfterStage,
    FilterAndTokenize,
    OpenManyFiles,
    PrepareText,
    ReadDocuments,
    SpacedWords,
    WriteRows,
)
from .workers import WorkerKilledError, available_workers, worker_pool

logger = logging.getLogger(__name__)

ATTEMPTS = 3


@dataclass(frozen=True)
class Stage:
    """Tasks that may run side by side, once those of the stage before are done; `memory_gb` of each."""

    name: str
    steps: list[PipelineStep]
    tasks: int
    memory_gb: int
    always: bool = False  # cheap, and what it makes may have been deleted


def make_stages(plan: ScalePlan, arguments: ScaleArguments) -> list[Stage]:
    """From text to rows. Near-duplicates go by datatrove's MinHash, before the filters see them."""
    small, large = arguments.memory_gb, arguments.rows_memory_gb
    reader = ReadDocuments(plan)
    tokenize: list[PipelineStep] = [reader, FilterAndTokenize(plan, reader)]
    stages = [Stage("text", [PrepareText(plan)], 1, large, always=True)]
    similarity = plan.arguments.near_dedup_similarity
    if similarity is not None:
        bands, band_rows = choose_bands(similarity, MINHASH_RECALL)
        config = MinhashConfig(
            num_buckets=bands,
            hashes_per_bucket=band_rows,
            hash_config=HashConfig(64, "sha1"),  # xxhash, the default, takes no str in its version 4
            norm_config=TextNormConfig(norm_numbers=False, norm_unicode_diacritics=False),  # as on one machine
        )
        signatures, pairs, clusters = (str(plan.folder / "minhash" / name) for name in ("sigs", "pairs", "clusters"))
        sign = MinhashDedupSignature(signatures, config, language=SpacedWords())
        stages += [
            Stage("minhash-signatures", [ReadDocuments(plan), sign], plan.tasks, small),
            Stage(
                "minhash-buckets",
                [OpenManyFiles(), MinhashDedupBuckets(signatures, pairs, config=config)],
                bands,
                small,
            ),
            Stage("minhash-clusters", [OpenManyFiles(), MinhashDedupCluster(pairs, clusters, config)], 1, large),
        ]
        tokenize.insert(1, MinhashDedupFilter(clusters))
    stages.append(Stage("tokens", tokenize, plan.tasks, small))
    rows = f"rows-{plan.rows_stage().key}"
    stages.append(Stage(rows, [WriteRows(plan)], 1, large, always=True))
    for before, stage in itertools.pairwise(stages):
        if not before.always:  # of those the mark may be an earlier run's
            stage.steps.insert(0, AfterStage(Path(_logs(plan, before)), before.tasks))
    return stages


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's, on a pool that notices when one of its processes is killed; its own waits for it for ever."""

    def run(self) -> None:
        self.save_executor_as_json()
        in_vain = 0
        while in_vain < ATTEMPTS:
            ranks = self.get_incomplete_ranks()
            if not ranks or self._run_ranks(ranks):
                return
            in_vain = 0 if len(self.get_incomplete_ranks()) < len(ranks) else in_vain + 1
        raise DataError(
            f"tasks were killed {ATTEMPTS} times and none was finished, most often for want of memory: lower workers; "
            "what is finished is kept"
        )

    def _run_ranks(self, ranks: list[int]) -> bool:
        """Whether all came to their end, and no process was killed."""
        try:
            with worker_pool(min(self.workers, len(ranks)), "runs tasks", "lower workers") as pool:
                # Of each run the first task shows its log.
                for future in as_completed([pool.submit(self._run_for_rank, rank, rank) for rank in ranks]):
                    future.result()
        except WorkerKilledError:
            return False
        return True


def run_locally(plan: ScalePlan, arguments: ScaleArguments) -> None:
    """Run all stages in processes of this machine."""
    for stage in make_stages(plan, arguments):
        workers = min(stage.tasks, available_workers(arguments.workers))
        logs = _begin(plan, stage)
        executor = LocalExecutor(stage.steps, stage.tasks, workers, logs, skip_completed=not stage.always)
        executor.run()
        _check_whole(executor, logs)


def run_on_ray(plan: ScalePlan, arguments: ScaleArguments) -> None:
    """Run all stages on the Ray cluster of this process, or the one that `ray_address` or `ray start` tells of."""
    import ray

    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
        # Without an address Ray would begin a cluster of this machine alone.
        ray.init(address=arguments.ray_address or "auto", log_to_driver=False)
    try:
        stages = make_stages(plan, arguments)
        _check_memory(stages, ray.nodes())
        for stage in stages:
            logs = _begin(plan, stage)
            executor = RayPipelineExecutor(
                stage.steps,
                stage.tasks,
                _workers(stage, arguments)
                if arguments.workers or not arguments.ray_task_seconds
                else min(stage.tasks, _room(stage, ray.nodes())),
                logging_dir=logs,
                skip_completed=not stage.always,
                mem_per_cpu_gb=stage.memory_gb,
                # A task that runs alone takes as long as the whole text does, not as a part of it.
                time=arguments.ray_task_seconds if stage.tasks > 1 else None,
            )
            _run_with_time(executor)
            _check_whole(executor, logs)
    finally:
        if started:
            ray.shutdown()


def _check_memory(stages: list[Stage], nodes: list[dict[str, Any]]) -> None:
    """Ray waits for ever for a node that can hold a task, unless the cluster grows by itself."""
    largest = max((_memory_gb(node) for node in nodes if node["Alive"]), default=0.0)
    needed = max(stage.memory_gb for stage in stages)
    if needed > largest:
        logger.warning(
            "Tasks are to have %d GB, and no node of the Ray cluster offers more than %.1f: unless it grows, lower memory_gb "
            "and rows_memory_gb",
            needed, largest,
        )  # fmt: skip


def _memory_gb(node: dict[str, Any]) -> float:
    return node["Resources"].get("memory", 0.0) / 2**30


def _room(stage: Stage, nodes: list[dict[str, Any]]) -> int:
    """How many tasks the cluster holds at a time. Of more, those that wait would take the room of ones that are ended."""
    held = (
        min(node["Resources"].get("CPU", 0.0), _memory_gb(node) // stage.memory_gb) for node in nodes if node["Alive"]
    )
    return max(1, int(sum(held)))


def _run_with_time(executor: RayPipelineExecutor) -> None:
    """datatrove ends a task that takes too long, and then stumbles over it: what has not finished is begun anew."""
    for _ in range(ATTEMPTS):
        try:
            return executor.run()
        except KeyError:
            if executor.time is None:
                raise
    raise DataError(
        f"tasks have taken longer than ray_task_seconds {ATTEMPTS} times: raise it; what is finished is kept"
    )


def _check_whole(executor: PipelineExecutor, logs: str) -> None:
    failed = executor.get_incomplete_ranks(skip_completed=True)
    if failed:
        names = ", ".join(f"task_{rank:05d}.log" for rank in failed[:3])
        raise DataError(f"{len(failed)} tasks have failed, see {names} in {logs}/logs; what is finished is kept")


def submit_to_slurm(plan: ScalePlan, arguments: ScaleArguments) -> None:
    """Submit a job array for each stage, each waiting for the one before."""
    executors: list[SlurmPipelineExecutor] = []
    for stage in make_stages(plan, arguments):
        executors.append(
            SlurmPipelineExecutor(
                stage.steps,
                stage.tasks,
                time=arguments.slurm_time,
                partition=str(arguments.slurm_partition),
                mem_per_cpu_gb=stage.memory_gb,
                workers=_workers(stage, arguments),
                job_name=f"hf_cram-{stage.name}",
                qos=arguments.slurm_qos or "",
                env_command=arguments.slurm_setup or _this_environment(),
                depends=executors[-1] if executors else None,
                logging_dir=_logs(plan, stage),
                skip_completed=not stage.always,
            )
        )
    try:
        executors[-1].run()
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is not here: submit from a machine that has Slurm's commands") from error
    except subprocess.CalledProcessError as error:  # its own words stand above
        raise DataError(
            "sbatch has refused the job, see its message: look at slurm_partition, slurm_time and slurm_qos"
        ) from error


def _this_environment() -> str:
    return f'export PATH="{Path(sys.executable).parent}:$PATH"'


def _workers(stage: Stage, arguments: ScaleArguments) -> int:
    return min(stage.tasks, arguments.workers or stage.tasks)


def _logs(plan: ScalePlan, stage: Stage) -> str:
    return str(plan.folder / "logs" / stage.name)


def _begin(plan: ScalePlan, stage: Stage) -> str:
    """The stage's logs. Of one that always runs, the marks of an earlier run do not say that this one has finished."""
    logs = _logs(plan, stage)
    if stage.always:
        shutil.rmtree(Path(logs, "completions"), ignore_errors=True)
    return logs


RUN: dict[str, Callable[[ScalePlan, ScaleArguments], object]] = {
    "local": run_locally,
    "ray": run_on_ray,
    "slurm": submit_to_slurm,
}
