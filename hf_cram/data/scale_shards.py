"""What tasks leave on the disk: whole or not at all, and put together again."""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..files import flush_to_disk
from .errors import DataError
from .steps import StepRecord
from .token_shards import TokenShards


def write_once(folder: Path, write: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> None:
    """
    Fill `folder` by `write`, which gets a folder of its own beside it, moved when all is on the disk.

    Of two processes that do the same work, since one was taken for dead, the first to finish counts.
    """
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    staged.mkdir(parents=True)
    try:
        write(staged)
        flush_to_disk(staged)
        if folder.exists() and not is_whole(folder):
            shutil.rmtree(folder)
        try:
            os.rename(staged, folder)
        except OSError:
            if not is_whole(folder):
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove_unfinished(folder: Path, min_age_seconds: float) -> None:
    """Delete what killed processes have left of [`write_once`], where nothing was added to it for so long."""
    for leftover in folder.glob(".*"):
        with contextlib.suppress(FileNotFoundError):  # it was finished meanwhile
            if time.time() - leftover.stat().st_mtime >= min_age_seconds:
                shutil.rmtree(leftover, ignore_errors=True)


class JoinedShards(TokenShards):
    """
    The shards of several folders, those of one behind those of the other; the last summary has the sums of what the
    tasks read and left out. Raises [`DataError`] where one is damaged.
    """

    def __init__(self, folders: list[Path], dtype: np.dtype):
        self.folder = folders[0].parent
        self.dtype = dtype
        self.summaries = []
        self._places: list[tuple[Path, int]] = []
        skipped: Counter[str] = Counter()
        read: Counter[str] = Counter(documents=0, characters=0)
        for folder in folders:
            part = TokenShards(folder, dtype)
            if not part.is_finished:
                raise DataError(f"the tokens of a task in {folder} are missing or damaged: delete {folder.parents[1]}")
            self.summaries += part.summaries
            self._places += [(folder, index) for index in range(len(part.summaries))]
            skipped.update(part.summaries[-1].position["skipped"])
            read.update(part.summaries[-1].position["read"])
        self.summaries[-1].position = {"skipped": dict(skipped), "read": dict(read)}

    def _path(self, index: int, suffix: str) -> Path:
        folder, number = self._places[index]
        return folder / f"shard-{number:05d}{suffix}"


def sum_of_steps(records: list[StepRecord]) -> StepRecord:
    """One step of many tasks: their sums, and the memory of the largest."""
    total = StepRecord(records[0].step)
    for name in ("documents_in", "documents_out", "characters_in", "characters_out", "tokens_out", "seconds"):
        setattr(total, name, sum(getattr(record, name) for record in records))
    total.peak_memory_bytes = max(record.peak_memory_bytes for record in records)
    return total


def task_seconds(logs: Path, stages: str) -> float:
    """Seconds of all tasks of some stages (a glob), as datatrove's statistics tell."""
    steps = [step for file in logs.glob(f"{stages}/stats/*.json") for step in json.loads(file.read_text("utf-8"))]
    return sum(step["time_stats"]["total"] for step in steps if step["time_stats"])
