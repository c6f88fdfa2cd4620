"""Documents of local files of every kind, in bounded memory; what is no usable text is left out and counted."""

import codecs
import csv
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from .compression import decompressed
from .errors import DataError, SkipReport, nearest, shortened, system_cause
from .input_files import format_suffix

PARQUET_BATCH_ROWS = 64
PROGRESS_DOCUMENTS = 16
NAMED_COLUMNS = 20
CSV_FIELD_CHARACTERS = 100_000_000  # beyond it quoting is broken, and the rest of the file can't be told apart
OTHER_SEPARATORS = (";", "\t", "|")
NUL_SHARE = 20  # a text that holds more than one in so many is another encoding
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
            raise DataError(f"{file}: cannot be read ({system_cause(error)})") from error
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
        _check_encoding(file, stream)
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


def _check_encoding(file: Path, stream: Any) -> None:
    """Pass over the mark of UTF-8 at the beginning of a buffered stream. Raises [`DataError`] for that of UTF-16."""
    beginning = stream.peek(len(codecs.BOM_UTF8))[: len(codecs.BOM_UTF8)]
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{file}: it is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    if beginning == codecs.BOM_UTF8:
        stream.read(len(beginning))


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
        elif "\0" in text and NUL_SHARE * text.count("\0") > len(text):
            report.add("NUL characters, as in UTF-16 or binary data", f"{file}:{place}")
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
    """A document a line, or (`"blank_line"`) paragraphs up to a blank line, or (`"file"`) all lines."""
    if text_file_documents == "line":
        yield from ((number, line.strip() if isinstance(line, bytes) else line) for number, line in lines)
        return
    block: list[bytes] = []
    size, start, too_long = 0, 1, None
    for number, line in lines:
        if isinstance(line, DataError) or size > max_characters * UTF8_BYTES_PER_CHARACTER:
            too_long = DataError(TOO_LONG)
            block, size = [], 0
        if isinstance(line, bytes) and not line.strip() and text_file_documents == "blank_line":
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
    with io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="") as text_stream:
        reader = csv.DictReader(text_stream)
        names = reader.fieldnames
        if names is not None and len(names) == 1:
            for other in OTHER_SEPARATORS:
                if other in names[0]:
                    raise DataError(f"{file}: its fields are separated by {other!r}: write it with commas")
        if names is not None and text_column not in names:
            raise missing_column(str(file), text_column, names)
        for record in reader:
            text = record.get(text_column)
            if any(record.get(None, ())):  # what stands behind the last field, most likely the rest of a text
                yield reader.line_num, DataError("more fields than the header names: quote texts that hold commas")
            else:
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
    told = ", ".join(map(shortened, names[:NAMED_COLUMNS])) + (", ..." if len(names) > NAMED_COLUMNS else "")
    return DataError(f"{place}: no column {text_column!r}{hint} (columns: {told}): set text_column")
