"""Files that are whole or absent."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

# The results of a model, beside its weights: of training it, and of scoring it.
TRAINING_RESULTS, GLUE_RESULTS = "all_results.json", "glue_results.json"
MINIMAL_PAIRS_RESULTS = "minimal_pairs_results.json"
WITHOUT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # what file systems say whose folders cannot be flushed
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what file systems say that have none


@contextmanager
def file_lock(path: Path, timeout: float = -1.0) -> Iterator[bool]:
    """
    Hold the lock on the file `path`, which is made and stays; gives False where the file system has no locks.

    Raises filelock's `Timeout` after so many seconds (default: never), and `OSError` where it cannot be made.
    """
    # Not a marker file in the place of a lock: a killed process would leave it behind.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=timeout)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    try:
        yield lock.is_locked
    finally:
        lock.release()


def can_make(path: Path) -> bool:
    """Whether files can be made in the folder `path`, or where it is not there, the folder itself. Raises `OSError`."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def flush_to_disk(folder: Path) -> None:
    """Ask the system to write every file below `folder` out, so that the rename after it means they are there."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in WITHOUT_FLUSH or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def write_atomically(folder: Path, contents: Mapping[str, bytes]) -> None:
    """
    Write files into `folder`, created where it is absent: all under temporary names, then each renamed in one step.

    A disk that fills up leaves the earlier files as they were. Raises `OSError`.
    """
    temporary = {name: (folder / name).with_name(f".{Path(name).name}.{os.getpid()}") for name in contents}
    try:
        for name, content in contents.items():
            temporary[name].parent.mkdir(parents=True, exist_ok=True)
            temporary[name].write_bytes(content)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give a file a second name or, where the file system has no hard links, a copy. Raises `OSError`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sha256_of_file(path: Path) -> str:
    """Hexadecimal hash of the content. Raises `OSError`."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path, *required: str) -> dict[str, Any]:
    """The object in the JSON file `path`. Raises `OSError`, and `ValueError` where it is none or lacks a key."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("not an object of names and values")
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"no {', '.join(missing)}")
    return values


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file or it holds anything else."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def write_json_atomically(path: Path, values: dict[str, Any]) -> None:
    """Replace `path` by the new content in one step."""
    write_atomically(path.parent, {path.name: json.dumps(values).encode() + b"\n"})
