"""Text to rows, step by step, each step cached by what goes into it."""

import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import zstandard
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import is_progress_bar_enabled

from ..files import flush_to_disk
from .installed_docs import fingerprint_installed, read_installed_docs
from .packing import PackedRows, token_dtype, write_rows
from .sources import (
    DataError,
    SkipReport,
    expand_files,
    fingerprint_files,
    fingerprint_hub_dataset,
    load_hub_dataset,
    read_files,
    read_hub_dataset,
)
from .tokenization import SMALLEST_VOCABULARY, load_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it whenever the same inputs give other files
INSTALLED_DOCS = "installed-docs"
MANIFEST_NAME = "manifest.json"


@dataclass
class DataArguments:
    """Which text, which tokenizer, which rows."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A Hub data set, a folder laid out like one, or 'installed-docs' (default): the prose of the "
            "documentation of every installed package."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    streaming: bool = field(default=False, metadata={"help": "Read the data set without downloading it whole."})
    train_files: list[str] | None = field(
        default=None,
        metadata={"help": "Local text instead: files, folders and globs of txt, jsonl, csv, parquet, also .gz, .zst."},
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    text_file_documents: str = field(
        default="line", metadata={"help": "A document in a txt file is a 'line' or ends at a 'blank_line'."}
    )
    max_documents: int | None = field(default=None, metadata={"help": "Use the first documents only."})
    max_document_characters: int = field(default=10_000_000, metadata={"help": "Skip longer documents."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "An existing tokenizer by name or path; default: train one on the text."}
    )
    vocab_size: int = field(default=32768, metadata={"help": "Tokens of a trained tokenizer."})
    tokenizer_training_characters: int = field(
        default=1_000_000_000, metadata={"help": "Characters of text that a tokenizer is trained on, at most."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a row."})
    eval_rows: int = field(default=1024, metadata={"help": "Held-out rows, at most 5 % of the text."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where prepared text is kept; default: hf_cram in the Hugging Face cache."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare anew what the cache holds."})

    def __post_init__(self) -> None:
        if self.dataset_name is not None and self.train_files:
            raise DataError("dataset_name and train_files are both set: name one source of text")
        if self.text_file_documents not in ("line", "blank_line"):
            raise DataError(f"text_file_documents must be 'line' or 'blank_line', got {self.text_file_documents!r}")
        for name in ("max_seq_length", "eval_rows", "max_document_characters", "tokenizer_training_characters"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_seq_length < 8:
            raise DataError(f"max_seq_length must be at least 8, got {self.max_seq_length}")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise DataError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, got {self.vocab_size}")
        if self.max_documents is not None and self.max_documents < 1:
            raise DataError(f"max_documents must be at least 1, got {self.max_documents}")

    @property
    def source_name(self) -> str:
        """The text in words, for cards and logs."""
        if self.train_files:
            return ", ".join(Path(name).name for name in self.train_files)
        return self.dataset_name or INSTALLED_DOCS


@dataclass
class PreparedCorpus:
    """Rows and tokenizer, ready for training; `statistics` counts documents, characters, tokens, rows and skips."""

    directory: Path
    train_dataset: PackedRows
    eval_dataset: PackedRows
    tokenizer: PreTrainedTokenizerBase
    statistics: dict[str, Any]
    from_cache: bool


class TextSource:
    """The text that the arguments name: its identity, and its documents as often as asked for."""

    def __init__(self, arguments: DataArguments, cache: Path):
        self.arguments = arguments
        self.report = SkipReport()
        self._files: list[Path] | None = None
        self._dataset: Any = None
        if arguments.train_files:
            self._files = expand_files(arguments.train_files)
            self.identity = fingerprint_files(self._files)
        elif arguments.dataset_name in (None, INSTALLED_DOCS):
            self.identity = fingerprint_installed()
            self._files = [self._cached_documentation(cache)]
        else:
            a = arguments
            self._dataset = load_hub_dataset(
                str(a.dataset_name),
                a.dataset_config_name,
                a.dataset_split,
                a.dataset_revision,
                a.text_column,
                a.streaming,
            )
            self.identity = fingerprint_hub_dataset(self._dataset, str(a.dataset_name), a.dataset_revision)

    def _cached_documentation(self, cache: Path) -> Path:
        """Extracting takes a minute: once for each environment."""

        def write(folder: Path) -> None:
            with (
                open(folder / "documents.jsonl.zst", "wb") as raw,
                zstandard.ZstdCompressor().stream_writer(raw) as compressed,
                io.TextIOWrapper(compressed, encoding="utf-8") as stream,
            ):
                for document in read_installed_docs(show_progress=is_progress_bar_enabled()):
                    stream.write(json.dumps({"text": document}) + "\n")

        entry, _ = cached_entry(cache / "texts" / self.identity, write, self.arguments.overwrite_cache)
        return entry / "documents.jsonl.zst"

    def documents(self) -> Iterator[str]:
        """The documents, in a stable order; skips are counted anew each time."""
        a = self.arguments
        self.report = SkipReport()
        if self._files is not None:
            column = a.text_column if a.train_files else "text"
            stream = read_files(self._files, self.report, column, a.text_file_documents, a.max_document_characters)
        else:
            stream = read_hub_dataset(
                self._dataset, str(a.dataset_name), self.report, a.text_column, a.max_document_characters
            )
        for number, document in enumerate(stream):
            if a.max_documents is not None and number >= a.max_documents:
                return
            yield document


def prepare_corpus(arguments: DataArguments) -> PreparedCorpus:
    """
    Read, tokenize and pack the text, or find it in the cache.

    The cache knows a corpus by the content of its text and by every setting that changes the rows. An entry appears
    when it is complete and is checked when it is read: nothing half-written is used. Raises [`DataError`].
    """
    started = time.monotonic()
    cache = Path(arguments.cache_dir).expanduser() if arguments.cache_dir else Path(HF_HOME) / "hf_cram"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cache_dir {cache} cannot be used: {error.strerror or error}") from error
    source = TextSource(arguments, cache)
    text_settings = (arguments.text_column, arguments.text_file_documents, arguments.max_documents,
                     arguments.max_document_characters)  # fmt: skip
    text_key = _hash(FORMAT_VERSION, source.identity, *text_settings)
    tokenizer, tokenizer_key = _prepare_tokenizer(arguments, source, text_key, cache)
    tokenizer_seconds = time.monotonic() - started

    def write(folder: Path) -> None:
        packing_started = time.monotonic()
        with _bar("packing") as advance:
            statistics: dict[str, Any] = write_rows(
                source.documents(),
                tokenizer.backend_tokenizer,
                tokenizer.sep_token_id,
                arguments.max_seq_length,
                arguments.eval_rows,
                folder,
                source.report,
                advance,
            )
        source.report.warn()
        statistics["skipped"] = dict(source.report.counts)
        statistics["seconds"] = {"tokenizer": tokenizer_seconds, "packing": time.monotonic() - packing_started}
        (folder / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder / "tokenizer")

    key = _hash(text_key, tokenizer_key, tokenizers.__version__, arguments.max_seq_length, arguments.eval_rows)
    directory, from_cache = cached_entry(cache / "corpora" / key, write, arguments.overwrite_cache)
    dtype = token_dtype(len(tokenizer))
    return PreparedCorpus(
        directory=directory,
        train_dataset=PackedRows(directory / "train.bin", dtype, arguments.max_seq_length),
        eval_dataset=PackedRows(directory / "eval.bin", dtype, arguments.max_seq_length),
        tokenizer=tokenizer,
        statistics=json.loads((directory / "statistics.json").read_text(encoding="utf-8")),
        from_cache=from_cache,
    )


def _prepare_tokenizer(
    arguments: DataArguments, source: TextSource, text_key: str, cache: Path
) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer and its key: an existing one by the content of its files, or one trained on the text."""
    if arguments.tokenizer_name is not None:
        tokenizer = load_tokenizer(arguments.tokenizer_name)
        return tokenizer, _hash(tokenizer.backend_tokenizer.to_str(), tokenizer.sep_token)

    def write(folder: Path) -> None:
        with _bar("reading for the tokenizer") as advance:
            documents = _first_characters(source.documents(), arguments.tokenizer_training_characters, advance)
            train_tokenizer(documents, arguments.vocab_size, show_progress=is_progress_bar_enabled()).save_pretrained(
                folder
            )

    key = _hash(text_key, arguments.vocab_size, arguments.tokenizer_training_characters, tokenizers.__version__)
    entry, _ = cached_entry(cache / "tokenizers" / key, write, arguments.overwrite_cache)
    tokenizer = load_tokenizer(entry)
    return tokenizer, key


def _first_characters(documents: Iterator[str], limit: int, on_progress: Callable[[int], None]) -> Iterator[str]:
    seen = 0
    for document in documents:
        if seen >= limit:
            return
        seen += len(document)
        on_progress(len(document))
        yield document


@contextmanager
def _bar(description: str) -> Iterator[Callable[[int], None]]:
    """A progress bar in characters; how many there are is known at the end only."""
    with tqdm(desc=description, unit="char", unit_scale=True, disable=not is_progress_bar_enabled()) as bar:

        def advance(characters: int) -> None:
            bar.update(characters)

        yield advance


def _hash(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=12).hexdigest()


def cached_entry(entry: Path, write: Callable[[Path], None], overwrite: bool) -> tuple[Path, bool]:
    """
    The folder `entry`, filled by `write(folder)` where it is missing or damaged; and whether it was there.

    It is written beside its place under a lock and moved there when complete, with the sizes of its files, which are
    compared on every later use. Raises [`DataError`] where it cannot be written.
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
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"the cache {entry.parent} cannot be written ({error.strerror or error}): set cache_dir"
        ) from error
    return entry, False


def remove_leftovers(entry: Path) -> None:
    """Delete what killed processes left beside `entry`, whose lock is held: what no living process has locked."""
    for leftover in entry.parent.glob(".*.*"):
        name = leftover.name[1:].rpartition(".")[0]
        lock = nullcontext() if name == entry.name else FileLock(entry.parent / f"{name}.lock", timeout=0)
        try:
            with lock:
                shutil.rmtree(leftover)
        except Timeout:
            continue  # another process is at work on it


def is_complete(entry: Path) -> bool:
    """Whether a cache entry has all its files at their sizes."""
    try:
        sizes = json.loads((entry / MANIFEST_NAME).read_text(encoding="utf-8"))
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
