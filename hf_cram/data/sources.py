"""Where text comes from: Hub data sets, local files, the documentation of installed packages, or a mix of them."""

import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import zstandard
from transformers.utils.logging import is_progress_bar_enabled

from .cache import cached_entry, hash_of
from .errors import DataError, SkipReport, TextChangedError
from .hub_datasets import (
    cache_of_folder,
    check_copy,
    commit_of,
    count_rows,
    fingerprint_folder,
    list_folder,
    load_hub_dataset,
    place_of,
    read_hub_dataset,
    warn_of_formats,
)
from .input_files import expand_files, fingerprint_files, size_of_files
from .installed_docs import fingerprint_installed, read_installed_docs
from .mixing import MixedStream, mix_streams
from .source_arguments import INSTALLED_DOCS, MixedSource, SourceArguments
from .text_files import ReadProgress, read_files

logger = logging.getLogger(__name__)

OF_A_DATASET = ("dataset_config_name", "dataset_data_dir", "dataset_revision")


class _OpenSource:
    """One source, found: what identifies it, and its documents."""

    def __init__(self, settings: MixedSource, cache: Path, overwrite_cache: bool, workers: int | None):
        self.settings = settings
        self.text_column = settings.text_column
        self.progress = ReadProgress()
        self._files: list[Path] = []
        self._folder: Path | None = None  # laid out like a data set
        self._stamps: dict[Path, tuple[int, int] | None] = {}
        self._dataset: Any = None
        if settings.train_files:
            self._files = expand_files(settings.train_files)
            self._stamps = stamps_of(self._files)
            content = fingerprint_files(self._files)
        elif settings.dataset_name in (None, INSTALLED_DOCS):
            content = fingerprint_installed()
            self._files = [_cached_documentation(cache / "texts" / content, overwrite_cache, workers)]
            self.text_column = "text"
            idle = [name for name in OF_A_DATASET if getattr(settings, name) is not None]
            if idle:
                logger.warning(
                    "No data set is named, and %s does nothing: the text is %s", ", ".join(idle), INSTALLED_DOCS
                )
        else:
            content = self._load(str(settings.dataset_name))
        # Where it lies and how it gets here is not what it is.
        places = ("dataset_name", "dataset_revision", "streaming", "train_files")
        choices = {name: value for name, value in asdict(settings).items() if name not in places}
        if self._dataset is None:  # its settings say nothing then
            unread = choices.keys() & {*OF_A_DATASET, "dataset_split"}
            choices |= {name: getattr(MixedSource, name) for name in unread}
        self.identity = hash_of(content, choices)

    def _load(self, name: str) -> str:
        s, content = self.settings, None
        if s.text_file_documents != "line":
            raise DataError(
                f"text_file_documents: the txt files of data set {name!r} are read by lines: name them by train_files "
                "(--text_file_documents line leaves a recipe's out)"
            )
        if os.path.isdir(name):  # of any length
            self._folder = Path(name).absolute()
            files = list_folder(self._folder)
            self._stamps = stamps_of(files)
            warn_of_formats(self._folder, files)
            content = fingerprint_folder(self._folder)
        commit = None
        if content is None and s.streaming:
            commit = commit_of(place_of(name), s.dataset_revision)
        self._dataset = load_hub_dataset(
            name,
            s.dataset_config_name,
            s.dataset_split,
            s.dataset_revision,
            s.text_column,
            s.streaming,
            s.dataset_data_dir,
            None if content is None else cache_of_folder(content),
        )
        if content is not None:
            check_copy(cache_of_folder(content), self.check_unchanged)
        if commit is not None and commit_of(place_of(name), s.dataset_revision) != commit:
            raise TextChangedError(f"data set {name!r}: it has changed since this run began: start again")
        return content or commit or self._dataset._fingerprint

    def documents(self, report: SkipReport) -> Iterator[str]:
        """The documents of all passes, in a stable order; only the first pass counts what it skips."""
        s, size = self.settings, self._size()
        self.progress = ReadProgress(None if size is None else size * s.max_passes)
        for number in range(s.max_passes):
            self.progress.before, self.progress.position = number * (size or 0), 0
            self.check_unchanged()
            yield from itertools.islice(self._read(SkipReport() if number else report), s.max_documents)
            self.check_unchanged()

    def estimate_characters(self, drawn: MixedStream) -> float | None:
        """Characters of all passes, from those drawn so far; `None` where nothing tells."""
        most = self.settings.max_documents
        return drawn.estimate(self.progress.share, None if most is None else most * self.settings.max_passes)

    def _size(self) -> int | None:
        """Bytes of files, rows of a data set, `None` for a stream that does not say."""
        if self._files:
            return size_of_files(self._files)
        return count_rows(self._dataset, self.settings.dataset_split)

    def check_unchanged(self) -> None:
        """Raises [`TextChangedError`] for another file than the one whose content was hashed, by which rows are kept."""
        check_stamps(self._stamps)
        if self._folder is not None and set(list_folder(self._folder)) != set(self._stamps):
            raise TextChangedError(
                f"{self._folder}: its files have changed since this run began: start again when it is complete"
            )

    def _read(self, report: SkipReport) -> Iterator[str]:
        s = self.settings
        longest = s.max_document_characters
        if self._files:
            return read_files(self._files, report, self.text_column, s.text_file_documents, longest, self.progress)
        return read_hub_dataset(self._dataset, str(s.dataset_name), report, s.text_column, longest, self.progress)


class TextSource:
    """
    The text that the arguments name: what identifies it, and its documents as often as asked for.

    Args:
        cache: folder of prepared text; the documentation of installed packages is kept there.
        overwrite_cache: extract that documentation anew.
        workers: processes that extract it; default: one for each core.

    Attributes:
        identity: hash of the content and of every setting that changes the documents or their order.
        report: documents left out in the pass that [`documents`] last began.
    """

    def __init__(
        self, arguments: SourceArguments, cache: Path, overwrite_cache: bool = False, workers: int | None = None
    ):
        self.arguments = arguments
        self.report = SkipReport()
        self._sources = {
            name: _OpenSource(settings, cache, overwrite_cache, workers)
            for name, settings in arguments.named_sources().items()
        }
        self._streams: list[MixedStream] = []
        self._ended: set[str] = set()
        self.identity = hash_of([source.identity for source in self._sources.values()], arguments.max_documents)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Documents and characters read from each source so far, in the pass that [`documents`] last began."""
        return {
            stream.name: {"documents": stream.num_documents, "characters": stream.num_characters}
            for stream in self._streams
        }

    @property
    def estimated_characters(self) -> int | None:
        """
        Characters of the whole text, estimated from the part read in the pass that [`documents`] last began.

        `None` before the first document and where the size of a source is unknown.
        """
        sources = zip(self._sources.values(), self._streams, strict=False)
        totals = [source.estimate_characters(stream) for source, stream in sources]
        known = [total for total in totals if total is not None]
        if not known or len(known) < len(totals):
            return None
        total, limit = sum(known), self.arguments.max_documents
        documents = sum(stream.num_documents for stream in self._streams)
        characters = sum(stream.num_characters for stream in self._streams)
        return round(total if limit is None else min(total, limit * characters / documents))

    def documents(self, count_tokens: Callable[[str], int] | None = None) -> Iterator[str]:
        """
        The documents in a stable order, from the first one on; skips and counts begin anew.

        Nothing is read ahead: a caller that stops has drawn no more than it got. `count_tokens` (number of tokens of
        a text) makes the sources' `max_tokens` more exact than 4.5 characters a token. Raises [`DataError`], also on
        the way.
        """
        self.report = SkipReport()
        self._streams = []
        for name, source in self._sources.items():
            s = source.settings
            documents = source.documents(SkipReport(self.report))
            self._streams.append(MixedStream(name, documents, s.weight, s.max_characters, s.max_tokens, count_tokens))
        return itertools.islice(mix_streams(self._streams, self._note_end), self.arguments.max_documents)

    def check_unchanged(self) -> None:
        """
        Raises [`TextChangedError`] where a file has changed since its content was hashed.

        [`documents`] looks before and behind each file's pass; who stops before the end has to ask.
        """
        for source in self._sources.values():
            source.check_unchanged()

    def _note_end(self, stream: MixedStream, num_left: int) -> None:
        if stream.num_documents == 0:
            skipped = f" ({self.report.describe()})" if self.report.counts else ""
            why = ": its first one is beyond max_characters or max_tokens" if stream.at_limit else skipped
            raise DataError(f"source {stream.name!r} gives no document{why}")
        if num_left and not stream.at_limit and stream.name not in self._ended:
            self._ended.add(stream.name)
            logger.warning(
                "Source %r has ended after %s documents: the others go on with their relative weights "
                "(max_passes repeats it)", stream.name, f"{stream.num_documents:,}",
            )  # fmt: skip


def stamps_of(files: Iterable[Path]) -> dict[Path, tuple[int, int] | None]:
    """Of each file what [`check_stamps`] compares."""
    return {file: _stamp(file) for file in files}


def check_stamps(stamps: Mapping[Path, tuple[int, int] | None]) -> None:
    """Raises [`TextChangedError`] for a file that has changed since its stamp was taken."""
    for file, stamp in stamps.items():
        if _stamp(file) != stamp:
            raise TextChangedError(f"{file}: it has changed since this run began: start again when it is complete")


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and time of the last change; `None` where it cannot be looked at, which its reader tells."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _cached_documentation(entry: Path, overwrite: bool, workers: int | None) -> Path:
    """The file of extracted documentation: extracting takes a minute, once for each environment."""

    def write(folder: Path) -> None:
        with (
            open(folder / "documents.jsonl.zst", "wb") as raw,
            zstandard.ZstdCompressor().stream_writer(raw) as compressed,
            io.TextIOWrapper(compressed, encoding="utf-8") as stream,
        ):
            for document in read_installed_docs(show_progress=is_progress_bar_enabled(), workers=workers):
                stream.write(json.dumps({"text": document}) + "\n")

    return cached_entry(entry, write, overwrite)[0] / "documents.jsonl.zst"
