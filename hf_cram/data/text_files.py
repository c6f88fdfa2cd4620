"""Documents of local files of every kind, in bounded memory; what is no usable text is left out and counted."""

import csv
import glob
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from tqdm import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from .compression import decompressed
from .errors import DataError, SkipReport, first_line, nearest

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".zst")
PARQUET_BATCH_ROWS = 64
PROGRESS_DOCUMENTS = 16
HASHED_BYTES = 1 << 20
SECONDS_WITHOUT_BAR = 2
NAMED_COLUMNS, COLUMN_CHARACTERS = 20, 60
CSV_FIELD_CHARACTERS = 100_000_000  # beyond it quoting is broken, and the rest of the file can't be told apart
PARQUET_BUFFER_BYTES = 1 << 20
UTF8_BYTES_PER_CHARACTER = 4
JSON_BYTES_PER_CHARACTER = 12  # an escaped surrogate pair
TOO_LONG = "longer than the limit (max_document_characters)"


@dataclass
class ReadProgress:
    """How far a reader is: bytes of files, rows of a data set."""

    total: int | None = None
    before: int = 0  # in the files that are done
    position: float = 0

    @property
    def share(self) -> float | None:
        """0 to 1, `None` where the total is unknown."""
        return (self.before + self.position) / self.total if self.total else None


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
            raise DataError(f"{_short(str(place))}: cannot be read ({_cause(error)})") from error
    for file in files.values():
        if format_suffix(file) not in TEXT_SUFFIXES:
            raise DataError(f"{file}: unknown format, name one of {', '.join(TEXT_SUFFIXES)} (also .gz, .zst)")
    return list(files.values())


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(p for p in files_below(path) if format_suffix(p) in TEXT_SUFFIXES)
        if not found:
            raise DataError(f"{path}: the folder holds no text file ({', '.join(TEXT_SUFFIXES)}, also .gz, .zst)")
    elif path.is_file():
        found = [path]
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise DataError(f"{pattern}: no such file or folder, and no file matches it")
    return found


def files_below(folder: Path) -> Iterator[Path]:
    """
    The files below a folder, also by links to folders; links that lead nowhere among them. Raises `OSError` for a folder
    that is closed.
    """
    yield from _files_below(folder, ())


def _files_below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    with os.scandir(folder) as entries:  # globbing would pass over a closed folder in silence
        paths = [Path(entry.path) for entry in entries]
    for path in paths:
        if path.is_dir():
            yield from _files_below(path, (*above, real))
        elif path.is_file() or path.is_symlink():
            yield path


def size_of_files(files: Iterable[Path]) -> int:
    """Bytes of the files. Raises [`DataError`] where one cannot be looked at."""
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({_cause(error)})") from error
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
                raise DataError(f"{file}: cannot be read ({_cause(error)})") from error
            digest.update(f"{format_suffix(file)}{compression_suffix(file)}".encode() + content)
    return digest.hexdigest()


def _hash_file(file: Path, on_progress: Callable[[int], Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    with open(file, "rb", buffering=0) as stream:
        while content := stream.read(HASHED_BYTES):
            digest.update(content)
            on_progress(len(content))
    return digest.digest()


def progress_bar(what: str, total: int | None, unit: str) -> tqdm:
    """The bar of work that is no step of its own, shown where it takes longer than two seconds."""
    return tqdm(
        desc=what, total=total, unit=unit, unit_scale=True, delay=SECONDS_WITHOUT_BAR,
        disable=not is_progress_bar_enabled(),
    )  # fmt: skip


def read_files(
    files: Iterable[Path],
    report: SkipReport,
    text_column: str = "text",
    text_file_documents: str = "line",
    max_document_characters: int = 10_000_000,
    progress: ReadProgress | None = None,
) -> Iterator[str]:
    """
    Documents of the files, one after the other, in bounded memory; `progress` follows.

    Single bad documents (not UTF-8, not JSON, no text, longer than `max_document_characters`) are skipped and counted
    in `report`. Raises [`DataError`] for a file that is unreadable, empty, lacks the column or holds no good document.
    """
    progress = progress or ReadProgress()
    for file in files:
        good = False
        skipped = SkipReport(report)
        try:
            for document in _read_file(
                file, skipped, text_column, text_file_documents, max_document_characters, progress
            ):
                good = True
                yield document
            progress.before, progress.position = progress.before + file.stat().st_size, 0
        # A damaged parquet file may have columns whose names are no text.
        except (
            EOFError, OSError, UnicodeDecodeError, pa.ArrowException, zlib.error, zstandard.ZstdError, csv.Error,
        ) as error:  # fmt: skip
            raise DataError(f"{file}: cannot be read ({_cause(error)})") from error
        if not good and skipped.counts:
            count = skipped.counts.total()
            raise DataError(f"{file}: none of its {count} documents can be used ({skipped.describe()})")
        if not good:
            raise DataError(f"{file}: it is empty (add text or leave it out)")


def _read_file(
    file: Path,
    report: SkipReport,
    text_column: str,
    text_file_documents: str,
    max_characters: int,
    progress: ReadProgress,
) -> Iterator[str]:
    suffix = format_suffix(file)
    if suffix == ".parquet":
        yield from check_documents(_read_parquet(file, text_column, progress), file, report, max_characters)
        return
    with open(file, "rb") as raw, decompressed(raw, file) as stream:
        if suffix == ".csv":
            documents = _read_csv(file, stream, text_column, max_characters)
        elif suffix == ".txt":
            lines = _bounded_lines(stream, max_characters * UTF8_BYTES_PER_CHARACTER)
            documents = _text_documents(lines, text_file_documents, max_characters)
        else:
            lines = _bounded_lines(stream, max_characters * JSON_BYTES_PER_CHARACTER)
            documents = _json_documents(file, lines, text_column)
        for number, document in enumerate(check_documents(documents, file, report, max_characters)):
            if number % PROGRESS_DOCUMENTS == 0:  # asking costs as much as a line of text
                progress.position = raw.tell()
            yield document


def check_documents(
    documents: Iterable[tuple[int, Any]], file: Path, report: SkipReport, max_characters: int
) -> Iterator[str]:
    """Pass (place, text) on as text; count what is no usable text."""
    for place, text in documents:
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                report.add("not valid UTF-8", f"{file}:{place}")
                continue
        if isinstance(text, DataError):
            report.add(str(text), f"{file}:{place}")
        elif not isinstance(text, str):
            report.add("no text", f"{file}:{place}")
        elif len(text) > max_characters:
            report.add(TOO_LONG, f"{file}:{place}")
        elif not _is_encodable(text):
            report.add("not valid UTF-8", f"{file}:{place}")
        elif text.strip():
            yield text


def _is_encodable(text: str) -> bool:
    """Whether it holds no half of a surrogate pair, which JSON can escape and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _bounded_lines(stream: IO[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | DataError]]:
    """Lines with their numbers; of a line beyond `max_bytes` only that it was too long, and it is never held whole."""
    number = 0
    while line := stream.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while (rest := stream.readline(max_bytes)) and not rest.endswith(b"\n"):
                pass
            yield number, DataError(TOO_LONG)
        else:
            yield number, line


def _text_documents(
    lines: Iterator[tuple[int, bytes | DataError]], text_file_documents: str, max_characters: int
) -> Iterator[tuple[int, Any]]:
    """A document a line, or (`"blank_line"`) paragraphs up to a blank line."""
    if text_file_documents == "line":
        yield from ((number, line.strip() if isinstance(line, bytes) else line) for number, line in lines)
        return
    block: list[bytes] = []
    size, start, too_long = 0, 1, None
    for number, line in lines:
        if isinstance(line, DataError) or size > max_characters * UTF8_BYTES_PER_CHARACTER:
            too_long = DataError(TOO_LONG)
            block, size = [], 0
        if isinstance(line, bytes) and not line.strip():
            yield start, too_long or b"".join(block)
            block, size, start, too_long = [], 0, number + 1, None
        elif isinstance(line, bytes) and too_long is None:
            block.append(line)
            size += len(line)
    yield start, too_long or b"".join(block)


def _json_documents(
    file: Path, lines: Iterator[tuple[int, bytes | DataError]], text_column: str
) -> Iterator[tuple[int, Any]]:
    """The text column of a JSON object a line. The first object decides whether the column is missing."""
    seen_object = False
    for number, line in lines:
        if isinstance(line, DataError):
            yield number, line
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            yield number, DataError("not valid UTF-8")
            continue
        except (ValueError, RecursionError):  # the latter for brackets in brackets in brackets
            yield number, DataError("not valid JSON")
            continue
        if not isinstance(record, dict):
            yield number, DataError("not a JSON object a line")
            continue
        if not seen_object and text_column not in record:
            raise missing_column(str(file), text_column, record)
        seen_object = True
        yield number, record.get(text_column)


def _read_csv(file: Path, stream: IO[bytes], text_column: str, max_characters: int) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(max(CSV_FIELD_CHARACTERS, max_characters))
    # Invalid bytes pass as lone surrogates and are found when the text is encoded again.
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text_stream:
        reader = csv.DictReader(text_stream)
        if reader.fieldnames is not None and text_column not in reader.fieldnames:
            raise missing_column(str(file), text_column, reader.fieldnames)
        for record in reader:
            text = record.get(text_column)
            yield reader.line_num, text if text is None else text.encode("utf-8", errors="surrogateescape")


def _read_parquet(file: Path, text_column: str, progress: ReadProgress) -> Iterator[tuple[int, Any]]:
    # Without read-ahead, and by a buffer: else a whole row group of the column is read at once.
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES)
    schema = parquet.schema_arrow
    if text_column not in schema.names:
        raise missing_column(str(file), text_column, schema.names)
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{file}: column {text_column!r} is {kind}, not text: name another with text_column")
    row, bytes_per_row = 0, file.stat().st_size / max(1, parquet.metadata.num_rows)
    for batch in parquet.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_column]):
        # As bytes: the reader lets invalid UTF-8 pass, and one bad value must not end the file.
        for text in batch.column(0).cast(pa.large_binary()).to_pylist():
            row += 1
            progress.position = row * bytes_per_row
            yield row, text


def missing_column(place: str, text_column: str, columns: Iterable[str]) -> DataError:
    """The error for a text column that is not there."""
    names = list(columns)
    hint = nearest(text_column, names)
    told = ", ".join(map(_short, names[:NAMED_COLUMNS])) + (", ..." if len(names) > NAMED_COLUMNS else "")
    return DataError(f"{place}: no column {text_column!r}{hint} (columns: {told}): set text_column")


def _cause(error: BaseException) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def _short(name: str) -> str:
    """A name from elsewhere in one line of bounded length."""
    line = " ".join(name.split())
    return line if len(line) <= COLUMN_CHARACTERS else f"{line[:COLUMN_CHARACTERS]}..."
