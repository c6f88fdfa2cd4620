"""The files of a text: which there are, how large, and a hash of what they hold."""

import contextlib
import glob
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import DataError, shortened, system_cause
from .steps import progress_bar

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".zst")
HASHED_BYTES = 1 << 20
NAMED_FILES = 3
NO_TEXT_OF_A_DISK = "lost+found"  # at the root of many, and closed


def format_suffix(path: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`: the format without the compression, lower case."""
    if compression_suffix(path):
        path = path.with_suffix("")
    return path.suffix.lower()


def compression_suffix(path: Path) -> str:
    """`.gz` of `a.jsonl.gz`, lower case; "" where the file is not compressed."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSION_SUFFIXES else ""


def expand_files(patterns: Iterable[str]) -> list[Path]:
    """
    Files named by paths, folders (all text files below, sorted) and globs, in the order given.

    Raises [`DataError`] where a pattern names nothing, a folder or file cannot be looked at, or a file has an unknown
    format.
    """
    files: dict[Path, Path] = {}  # each once, where it is named first
    for pattern in patterns:
        try:
            for file in _expand(pattern):
                files.setdefault(file.resolve(), file)
        except (OSError, RuntimeError) as error:  # the latter for an unknown user's home and links in a circle
            place = getattr(error, "filename", None) or pattern
            raise DataError(f"{shortened(str(place))}: cannot be read ({system_cause(error)})") from error
    for file in files.values():
        if format_suffix(file) not in TEXT_SUFFIXES:
            raise DataError(f"{file}: unknown format, name one of {', '.join(TEXT_SUFFIXES)} (also .gz, .zst)")
        if format_suffix(file) == ".parquet" and compression_suffix(file):
            raise DataError(f"{file}: parquet is compressed within: unpack the file")
    # One at a time they would show in the middle of reading, and each that is removed makes another text of the rest.
    empty = [file for file in files.values() if file.exists() and not file.stat().st_size]
    if len(empty) > 1:
        more = ", ..." if len(empty) > NAMED_FILES else ""
        raise DataError(f"{len(empty)} files are empty: {', '.join(map(str, empty[:NAMED_FILES]))}{more}: remove them")
    return list(files.values())


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        hidden: list[Path] = []
        files = sorted(files_below(path, hidden))
        found = [file for file in files if format_suffix(file) in TEXT_SUFFIXES]
        if not found:
            raise DataError(f"{path}: the folder holds no text file ({', '.join(TEXT_SUFFIXES)}, also .gz, .zst)")
        if len(found) < len(files):
            others = sorted({file.suffix or file.name for file in files if format_suffix(file) not in TEXT_SUFFIXES})
            logger.warning(
                "%s: %d files of no known format are passed over (%s)",
                path, len(files) - len(found), shortened(", ".join(others)),
            )  # fmt: skip
        if hidden:
            logger.warning("%s: %d hidden files and folders are passed over", path, len(hidden))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        _look_into_all(path)
        if not found:
            raise DataError(f"{pattern}: no such file or folder, and no file matches it")
    return found


def _look_into_all(pattern: Path) -> None:
    """Raises `OSError` for a folder that a pattern looks into and that is closed: globbing passes over it in silence."""
    if pattern.name == "**":
        pattern /= "*"
    for parent, part in zip(pattern.parents, reversed(pattern.parts), strict=False):
        for folder in filter(os.path.isdir, glob.glob(str(parent), recursive=True)):
            if os.path.basename(folder) == NO_TEXT_OF_A_DISK:
                continue
            if glob.has_magic(part):
                os.scandir(folder).close()
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.stat(os.path.join(folder, part))


def files_below(folder: Path, hidden: list[Path] | None = None, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """
    The files below a folder, also by links to folders; links that lead nowhere among them. Files and folders whose names
    begin with a point, as of trash and of editors, go to the list `hidden` instead, where one is given: a pattern passes
    over them too. `above` are the real paths of the folders on the way. Raises `OSError` for a folder that is closed.
    """
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    with os.scandir(folder) as entries:  # globbing would pass over a closed folder in silence
        paths = [Path(entry.path) for entry in entries if entry.name != NO_TEXT_OF_A_DISK]
    for path in paths:
        if hidden is not None and path.name.startswith("."):
            hidden.append(path)
        elif path.is_dir():
            yield from files_below(path, hidden, (*above, real))
        elif path.is_file() or path.is_symlink():
            yield path


def size_of_files(files: Iterable[Path]) -> int:
    """Bytes of the files. Raises [`DataError`] where one cannot be looked at."""
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({system_cause(error)})") from error
    return total


def fingerprint_files(files: list[Path]) -> str:
    """
    Hash of the formats, compressions and contents of the files in order; where they lie and when they changed is left
    out.
    """
    digest = hashlib.blake2b(digest_size=16)
    with progress_bar("hashing files", size_of_files(files), "B") as bar:
        for file in files:
            try:
                content = _hash_file(file, bar.update)
            except OSError as error:
                raise DataError(f"{file}: cannot be read ({system_cause(error)})") from error
            digest.update(f"{format_suffix(file)}{compression_suffix(file)}".encode() + content)
    return digest.hexdigest()


def _hash_file(file: Path, on_progress: Callable[[int], Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    with open(file, "rb", buffering=0) as stream:
        while content := stream.read(HASHED_BYTES):
            digest.update(content)
            on_progress(len(content))
    return digest.digest()
