"""Worker processes for the text: as many as there are cores to use, and none that outlives the process it works for."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from joblib import cpu_count

from .errors import DataError

SECONDS_BETWEEN_LOOKS = 0.5


class WorkerKilledError(DataError):
    """A worker process was killed before its work was done."""


def available_workers(asked_for: int | None) -> int:
    """
    Worker processes to use: as many as asked for, or one for each core that this process may use, by its affinity and by
    the limit of its container.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return cpu_count() if asked_for is None else asked_for


@contextmanager
def worker_pool(
    workers: int, does: str, way_out: str, initializer: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """
    Processes that start with `initializer(*arguments)`, and end with this one. Forked: a fresh interpreter would take
    seconds to import. What was submitted and is not begun at the end of the block is not done.

    Raises [`WorkerKilledError`], which says what a process `does` and the way out, where one was killed.
    """
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start,
        initargs=(os.getpid(), initializer, arguments),
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise WorkerKilledError(
            f"a process that {does} was killed, most often for want of memory: {way_out}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(parent: int, initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a killed one can't tell, and the pool's processes wait for ever."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)
