"""Folders that are whole or absent: what is prepared once and found again."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import flush_to_disk
from .errors import DataError, system_cause

MANIFEST_NAME = "manifest.json"
KEY = re.compile(r"([0-9a-f]{24}|[0-9a-f]{32})(\.export)?")  # what entries are named by


def hash_of(*parts: Any) -> str:
    """A key for plain values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def cached_entry(
    entry: Path, write: Callable[[Path], None], overwrite: bool, clear_up: Callable[[], None] = lambda: None
) -> tuple[Path, bool]:
    """
    The folder `entry`, filled by `write(folder)` where it is missing or damaged; and whether it was there.

    It is written beside its place under a lock and moved there when complete, with the sizes of its files, which are
    compared on every later use; `clear_up()` then removes what only its making needed. Raises [`DataError`] where it
    cannot be written.
    """
    if not overwrite and is_complete(entry):
        return entry, True
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            if not overwrite and is_complete(entry):
                return entry, True
            remove_leftovers(entry)
            staged = entry.parent / f".{entry.name}.{os.getpid()}"
            staged.mkdir()
            try:
                write(staged)
                sizes = {str(p.relative_to(staged)): p.stat().st_size for p in staged.rglob("*") if p.is_file()}
                (staged / MANIFEST_NAME).write_text(json.dumps(sizes) + "\n", encoding="utf-8")
                flush_to_disk(staged)
                if entry.exists():
                    shutil.rmtree(entry)
                os.rename(staged, entry)
                clear_up()
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"the cache {entry.parent} cannot be written ({system_cause(error)}): set cache_dir"
        ) from error
    return entry, False


def remove_leftovers(entry: Path) -> None:
    """
    Delete what killed processes left beside `entry`, whose lock is held: folders with the names that [`cached_entry`]
    gives them and that no living process has locked.
    """
    for leftover in entry.parent.glob(".*.*"):
        name, _, process = leftover.name[1:].rpartition(".")
        is_ours = process.isdecimal() and leftover.is_dir() and (name == entry.name or KEY.fullmatch(name))
        if not is_ours:
            continue
        lock = nullcontext() if name == entry.name else FileLock(entry.parent / f"{name}.lock", timeout=0)
        try:
            with lock:
                shutil.rmtree(leftover, ignore_errors=True)
        except Timeout:
            continue  # another process is at work on it


def is_complete(entry: Path) -> bool:
    """Whether a cache entry has all its files at their sizes."""
    try:
        sizes = json.loads((entry / MANIFEST_NAME).read_text(encoding="utf-8"))
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
