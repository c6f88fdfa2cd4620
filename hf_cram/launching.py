"""Makes `accelerate launch --cpu --num_processes N` start N processes."""

import os
import sys
from collections.abc import Mapping, Sequence

import psutil

MPI_PREFIXES = ("OMPI_", "PMI_", "MPI_", "MV2_")


def missing_processes(environment: Mapping[str, str], launcher: Sequence[str]) -> int | None:
    """
    How many processes `accelerate launch --cpu` was asked for where it has started one only; else `None`.

    With `--cpu`, accelerate 1.15 starts a single process unless MPI is there, however many were asked for; that more
    than one was shows in `MASTER_PORT`. `launcher` is the command line of the launcher. Raises `ValueError` where the
    number stands in a configuration file only.
    """
    asked_for_several = environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in environment
    if not asked_for_several or "RANK" in environment or any(name.startswith(MPI_PREFIXES) for name in environment):
        return None
    for position, argument in enumerate(launcher):
        name, _, value = argument.partition("=")
        if name in ("--num_processes", "--num-processes", "-n"):
            return int(value or launcher[position + 1])
    raise ValueError(
        "accelerate launch --cpu started one process of several: name --num_processes on its command line, or start "
        "with torchrun --nproc_per_node N"
    )


def start_missing_processes() -> None:
    """Replace this process by a torch launcher of as many as were asked for; returns where none is missing."""
    parent = psutil.Process().parent()
    processes = missing_processes(os.environ, parent.cmdline() if parent is not None else [])
    if processes is not None and processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        os.execv(sys.executable, [*launcher, *sys.argv])
