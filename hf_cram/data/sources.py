"""Where text comes from: Hub data sets and local files, as a stream of documents."""

import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".zst")
PARQUET_BATCH_ROWS = 64
CSV_FIELD_CHARACTERS = 100_000_000  # beyond it quoting is broken, and the rest of the file can't be told apart
UTF8_BYTES_PER_CHARACTER = 4
JSON_BYTES_PER_CHARACTER = 12  # an escaped surrogate pair
TOO_LONG = "longer than the limit (max_document_characters)"


class DataError(ValueError):
    """The text cannot be used; the message names the file or data set, the cause and the way out."""


class SkipReport:
    """Counts documents left out, by reason, and remembers the first place of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first_places: dict[str, str] = {}

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        self.first_places.setdefault(reason, place)

    def describe(self, before: Counter[str] | None = None) -> str:
        """The reasons in one line; those added since `before` only, where it is given."""
        new = self.counts - (before or Counter())
        return ", ".join(f"{reason} ({count})" for reason, count in sorted(new.items()))

    def warn(self) -> None:
        """Log one line for each reason."""
        for reason, count in sorted(self.counts.items()):
            logger.warning("%d documents skipped: %s (first: %s)", count, reason, self.first_places[reason])


def format_suffix(path: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`: the format without the compression, lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes else ""


def expand_files(patterns: Iterable[str]) -> list[Path]:
    """
    Files named by paths, folders (all text files below, sorted) and globs, in the order given.

    Raises [`DataError`] where a pattern names nothing or a file has an unknown format.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and format_suffix(p) in TEXT_SUFFIXES)
            if not found:
                raise DataError(f"{path}: the folder holds no text file ({', '.join(TEXT_SUFFIXES)}, also .gz, .zst)")
        elif path.is_file():
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not found:
                raise DataError(f"{pattern}: no such file or folder, and no file matches it")
        files.extend(found)
    files = list({file.resolve(): file for file in files}.values())  # each once, where it is named first
    for file in files:
        if format_suffix(file) not in TEXT_SUFFIXES:
            raise DataError(f"{file}: unknown format, name one of {', '.join(TEXT_SUFFIXES)} (also .gz, .zst)")
    return files


def fingerprint_files(files: Iterable[Path]) -> str:
    """Hash of the formats and contents of the files in order; where they lie and when they changed is left out."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            with open(file, "rb") as stream:
                content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        digest.update(format_suffix(file).encode() + content.digest())
    return digest.hexdigest()


def read_files(
    files: Iterable[Path],
    report: SkipReport,
    text_column: str = "text",
    text_file_documents: str = "line",
    max_document_characters: int = 10_000_000,
) -> Iterator[str]:
    """
    Documents of the files, one after the other, in bounded memory.

    Single bad documents (not UTF-8, not JSON, no text, longer than `max_document_characters`) are skipped and counted
    in `report`. Raises [`DataError`] for a file that is unreadable, empty, lacks the column or holds no good document.
    """
    for file in files:
        good = False
        skipped_before_counts = report.counts.copy()
        skipped_before = skipped_before_counts.total()
        try:
            for document in _read_file(file, report, text_column, text_file_documents, max_document_characters):
                good = True
                yield document
        except (EOFError, OSError, pa.ArrowInvalid, zlib.error, zstandard.ZstdError, csv.Error) as error:
            cause = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise DataError(f"{file}: cannot be read ({cause})") from error
        if not good:
            skipped = report.counts.total() - skipped_before
            why = f"none of its {skipped} documents can be used" if skipped else "it is empty"
            reasons = report.describe(skipped_before_counts) if skipped else "add text or leave it out"
            raise DataError(f"{file}: {why} ({reasons})")


def _read_file(
    file: Path, report: SkipReport, text_column: str, text_file_documents: str, max_characters: int
) -> Iterator[str]:
    suffix = format_suffix(file)
    if suffix == ".parquet":
        texts = _read_parquet(file, text_column)
    else:
        with _open_binary(file) as stream:
            if suffix == ".csv":
                yield from _checked(_read_csv(file, stream, text_column, max_characters), file, report, max_characters)
                return
            if suffix == ".txt":
                lines = _bounded_lines(stream, max_characters * UTF8_BYTES_PER_CHARACTER)
                documents = _text_documents(lines, text_file_documents, max_characters)
            else:
                lines = _bounded_lines(stream, max_characters * JSON_BYTES_PER_CHARACTER)
                documents = _json_documents(file, lines, text_column)
            yield from _checked(documents, file, report, max_characters)
            return
    yield from _checked(texts, file, report, max_characters)


def _open_binary(file: Path) -> IO[bytes]:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(file))
    return open(file, "rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of all frames of a file. The library's own reader takes a file cut short for a whole one."""

    def __init__(self, file: Path):
        self._stream = open(file, "rb")  # noqa: SIM115 (closed by close)
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_has_begun = False
        self._input = b""
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._stream.read(1 << 16)
            if not self._input:
                if self._frame_has_begun:
                    raise EOFError("the compressed file ends early")
                return 0
            self._output = self._frame.decompress(self._input)
            self._input, self._frame_has_begun = b"", True
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._frame_has_begun = False
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _checked(
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
        except ValueError:
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


def _read_parquet(file: Path, text_column: str) -> Iterator[tuple[int, Any]]:
    # Without read-ahead the reader holds one batch of the one column.
    parquet = pq.ParquetFile(file, pre_buffer=False)
    schema = parquet.schema_arrow
    if text_column not in schema.names:
        raise missing_column(str(file), text_column, schema.names)
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{file}: column {text_column!r} is {kind}, not text: name another with text_column")
    row = 0
    for batch in parquet.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_column]):
        # As bytes: the reader lets invalid UTF-8 pass, and one bad value must not end the file.
        for text in batch.column(0).cast(pa.large_binary()).to_pylist():
            row += 1
            yield row, text


def missing_column(place: str, text_column: str, columns: Iterable[str]) -> DataError:
    """The error for a text column that is not there."""
    names = list(columns)
    near = difflib.get_close_matches(text_column, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(f"{place}: no column {text_column!r}{hint} (columns: {', '.join(names)}): set text_column")


def load_hub_dataset(
    name: str, config: str | None, split: str, revision: str | None, text_column: str, streaming: bool
) -> Any:
    """A Hub data set, or a folder laid out like one. Raises [`DataError`] where it cannot be had."""
    from datasets import load_dataset  # seconds of import that local text does not need

    try:
        dataset = load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except (ValueError, OSError, RuntimeError) as error:  # not found, no such config or split, offline
        cause = str(error).strip().splitlines()[0]
        raise DataError(f"data set {name!r} (config {config}, split {split}) cannot be loaded: {cause}") from error
    columns = dataset.column_names
    if columns is not None and text_column not in columns:
        raise missing_column(f"data set {name!r}", text_column, columns)
    return dataset


def fingerprint_hub_dataset(dataset: Any, name: str, revision: str | None) -> str:
    """Identity of a loaded data set: its fingerprint, or where it streams the files' hash or the commit's."""
    from datasets import IterableDataset

    if Path(name).is_dir():  # the library's own fingerprint follows the files' times
        return fingerprint_files(sorted(p for p in Path(name).rglob("*") if p.is_file()))
    if not isinstance(dataset, IterableDataset):
        return dataset._fingerprint
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except (HfHubHTTPError, OSError) as error:
        raise DataError(
            f"data set {name!r}: its revision cannot be asked for ({error}); set streaming: false"
        ) from error


def read_hub_dataset(
    dataset: Any, name: str, report: SkipReport, text_column: str, max_document_characters: int
) -> Iterator[str]:
    """Documents of a loaded Hub data set; bad ones are counted like those of files."""
    rows = enumerate((row[text_column] for row in dataset.select_columns([text_column])), start=1)
    yield from _checked(rows, Path(name), report, max_document_characters)
