"""Documents of Hub data sets, downloaded or streamed, and of folders laid out like them."""

import hashlib
import json
import logging
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
import zstandard
from httpx2 import InvalidURL
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from ..hub_errors import SILENCE_SECONDS, HubError, with_retries
from .errors import DataError, SkipReport, TextChangedError, first_line, system_cause
from .input_files import files_below, fingerprint_files, format_suffix
from .text_files import ReadProgress, check_documents, missing_column

logger = logging.getLogger(__name__)

# Below a folder: of tools, and never text.
NO_TEXT = frozenset({".git", ".cache", ".DS_Store"})
# Of which `datasets` reads one at a time; .json may be about the data.
FORMATS = frozenset({".txt", ".jsonl", ".csv", ".parquet"})


def reading_errors() -> tuple[type[Exception], ...]:
    """What loading and reading raise: not found, no such configuration, offline, cut short, not in its format."""
    from datasets.exceptions import DatasetsError  # seconds of import that local text does not need

    # A type error is a column that changes its type on the way.
    own = (OSError, EOFError, RuntimeError, TypeError, ValueError, pa.ArrowException)
    packed = (zlib.error, zstandard.ZstdError, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
    # YAML: the front matter of a card; the others: of a proxy.
    return DatasetsError, HTTPError, yaml.YAMLError, ImportError, InvalidURL, *own, *packed


def place_of(name: str) -> str:
    """
    What `datasets` is asked for: a Hub data set by its name, a folder by its whole path. Raises [`DataError`] for a format,
    under whose name the library would read all files of the current folder.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if os.path.isdir(name):  # of any length
        return os.path.abspath(name)
    if name in _PACKAGED_DATASETS_MODULES:
        raise DataError(f"dataset_name: {name!r} is a format, not a data set: name files of it by train_files")
    return name


def load_hub_dataset(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    text_column: str,
    streaming: bool,
    data_dir: str | None = None,
    cache_dir: str | None = None,
) -> Any:
    """
    A Hub data set, or a folder laid out like one, in `cache_dir` if not where `datasets` keeps it. Raises [`DataError`]
    where it cannot be had.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        dataset = load_dataset(
            place_of(name),
            config,
            data_dir=data_dir,
            split=split,
            revision=revision,
            streaming=streaming,
            cache_dir=cache_dir,
        )
    except reading_errors() as error:
        wrapped = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        cause = first_line(wrapped or error)
        if "scripts are no longer supported" in cause:
            cause += "; a copy without code may be there with dataset_revision: refs/convert/parquet"
        if "load_from_disk" in cause:
            cause = "it was written by save_to_disk; write it by to_parquet, and name the file in train_files"
        raise DataError(f"data set {name!r} (config {config}, split {split}) cannot be loaded: {cause}") from error
    columns = dataset.column_names
    if columns is not None and text_column not in columns:
        raise missing_column(f"data set {name!r}", text_column, columns)
    return dataset


def cache_of_folder(fingerprint: str) -> str:
    """
    Where `datasets` keeps its copy of a folder with this [`fingerprint_folder`]. Its own place goes by the folder's last
    name and its card alone, and would hand out what another folder held, or this one earlier.
    """
    from datasets import config

    return os.path.join(config.HF_DATASETS_CACHE, "hf_cram-folders", fingerprint)


def check_copy(cache_dir: str, check: Callable[[], None]) -> None:
    """
    Run `check` on the text that was copied to `cache_dir`. Where it raises [`TextChangedError`] the copy goes: its name is
    that of the earlier content.
    """
    try:
        check()
    except TextChangedError:
        shutil.rmtree(cache_dir, ignore_errors=True)
        raise


def list_folder(folder: Path) -> list[Path]:
    """The files below a folder, sorted, without those of git and of the Hub's client. Raises [`DataError`]."""
    try:
        files = sorted(path for path in files_below(folder) if path.is_file())
        return [path for path in files if NO_TEXT.isdisjoint(path.relative_to(folder).parts)]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({system_cause(error)})") from error


def warn_of_formats(folder: Path, files: Iterable[Path]) -> None:
    """One line where a folder laid out like a data set holds text of several formats."""
    formats = sorted(FORMATS & {format_suffix(file) for file in files})
    if len(formats) > 1:
        logger.warning(
            "%s holds files of several formats (%s): as a data set only one of them is read, or what its card names; "
            "train_files reads all", folder, ", ".join(formats),
        )  # fmt: skip


def fingerprint_folder(folder: Path) -> str:
    """Hash of the files below a folder laid out like a data set, whose names decide the splits. Raises [`DataError`]."""
    files = list_folder(folder)
    names = [path.relative_to(folder).as_posix() for path in files]
    return hashlib.blake2b(json.dumps([names, fingerprint_files(files)]).encode(), digest_size=16).hexdigest()


def commit_of(name: str, revision: str | None) -> str:
    """
    The commit that a revision of a Hub data set names now: that of a stream which was opened between two equal answers.
    Raises [`DataError`].
    """
    try:
        sha = with_retries(
            lambda: HfApi().dataset_info(name, revision=revision, timeout=SILENCE_SECONDS).sha,
            name, revision, "dataset_name", is_download=True,
        )  # fmt: skip
    except HubError as error:
        raise DataError(f"data set {name!r} cannot be loaded: {error}") from error
    return str(sha)


def count_rows(dataset: Any, split: str) -> int | None:
    """Rows of a loaded data set; of a stream those that its card tells, if any."""
    from datasets import IterableDataset

    if not isinstance(dataset, IterableDataset):
        return len(dataset)
    splits = dataset.info.splits or {}
    return splits[split].num_examples or None if split in splits else None


def read_hub_dataset(
    dataset: Any,
    name: str,
    report: SkipReport,
    text_column: str,
    max_document_characters: int,
    progress: ReadProgress | None = None,
) -> Iterator[str]:
    """
    Documents of a loaded Hub data set; bad ones are counted like those of files.

    Raises [`DataError`] where the data set breaks off or lacks the column, which a stream shows only when it is read.
    """
    progress = progress or ReadProgress()

    def rows() -> Iterator[tuple[int, Any]]:
        for number, row in enumerate(dataset.select_columns([text_column]), start=1):
            progress.position = number
            yield number, row[text_column]

    try:
        yield from check_documents(rows(), Path(name), report, max_document_characters)
    except KeyError as error:
        raise DataError(f"data set {name!r}: no column {text_column!r}: set text_column") from error
    except reading_errors() as error:
        raise DataError(
            f"data set {name!r}: reading it failed ({first_line(error)}): start again to continue"
        ) from error
