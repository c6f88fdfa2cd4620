"""What launchers leave to be done on a CPU: all the processes that were asked for, on all the cores."""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import psutil
import torch

from .data.workers import available_workers

PR_SET_PDEATHSIG = 1  # of Linux's prctl
LAUNCHERS = ("accelerate", "accelerate-launch")
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


def _parent_command() -> list[str]:
    """The command line that started this process; empty where it may not be read, or is gone."""
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []


def start_missing_processes() -> None:
    """Replace this process by a torch launcher of as many as were asked for; returns where none is missing."""
    processes = missing_processes(os.environ, _parent_command())
    if processes is not None and processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        os.execv(sys.executable, [*launcher, *sys.argv])


def end_with_launcher() -> None:
    """
    Receive SIGTERM when `accelerate launch` is gone, which hands no signal on to the one process it has started: a run
    whose launcher was stopped ends as if it had been stopped itself. On Linux; elsewhere such a run goes on.
    """
    command = _parent_command()[:3]
    is_accelerate = any(part.startswith("accelerate.") or Path(part).name in LAUNCHERS for part in command)
    if sys.platform == "linux" and is_accelerate and "RANK" not in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def end_process(status: int = 0) -> NoReturn:
    """
    End this process, whose work is done. One of a data-parallel run ends at once, behind its exit handlers: now and then the
    threads of its group abort while they are torn down, left or not, and the launcher takes the run for failed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def use_all_cores(environment: Mapping[str, str]) -> None:
    """
    Share the cores between the processes of this machine where a launcher has set one thread for each.

    `accelerate launch` and torchrun set `OMP_NUM_THREADS` to 1 unless it is set already, which on a CPU leaves all
    but one core a process idle. Any other number is somebody's choice and stays. Without a number torch takes all cores of the
    machine, which may be more than this process may use.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment
    if launched and environment.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(_share_of_cores(int(environment.get("LOCAL_WORLD_SIZE", "1"))))
    elif "OMP_NUM_THREADS" not in environment:  # torch does not see the limit of a container
        torch.set_num_threads(min(torch.get_num_threads(), available_workers(None)))


@contextlib.contextmanager
def threads_of_a_process(num_processes: int, device: torch.device) -> Iterator[None]:
    """On a CPU, the threads that [`use_all_cores`] will give each of several processes of one machine."""
    threads = torch.get_num_threads()
    is_open = os.environ.get("OMP_NUM_THREADS") in (None, "1")
    if num_processes > 1 and device.type == "cpu" and is_open:
        torch.set_num_threads(_share_of_cores(num_processes))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _share_of_cores(num_processes: int) -> int:
    return max(1, available_workers(None) // num_processes)
