"""Repeated passages out of a text: of each one the first copy stays."""

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .repeated_windows import OnProgress, RepeatFinder
from .stored_text import StoredText


@dataclass
class SubstringReport:
    """What removing repeated passages did."""

    documents_in: int = 0
    documents_out: int = 0
    documents_changed: int = 0
    documents_emptied: int = 0
    characters_in: int = 0
    characters_out: int = 0
    bytes_removed: int = 0


def remove_repeated_substrings(
    documents: Iterable[str],
    min_bytes: int,
    work_folder: Path,
    report: SubstringReport,
    memory_mb: int = 1000,
    on_progress: OnProgress = lambda step, num_bytes, total: None,
) -> Iterator[tuple[int, str]]:
    """
    The documents without the passages of at least `min_bytes` UTF-8 bytes that stood before, each with its number
    among the documents read (paper, section 4.4: 75 or 100 bytes, after Lee et al. 2021).

    A byte goes if it lies in a window of `min_bytes` bytes, all in one document, whose content first stood in an
    earlier document or in the same one at least `min_bytes` bytes before; of characters whose bytes do not all go,
    all stay. So the first copy of everything stays as it is (Lee et al. strike that one, too), and of a passage that
    goes on repeating itself its first `min_bytes` bytes. Documents that are left empty or as white space are left out.

    All documents are read before the first one comes out. `work_folder` then holds their bytes, and one to two times
    as many for the search, until the last one is out; nothing in it is used twice. Memory: `memory_mb` megabytes
    (10**6 bytes) beside what the process has, 8 bytes a document and the longest document. Raises [`DataError`] where
    that is too little for so much text (about 20 times `memory_mb` fits), `OSError` where the disk is full.
    """
    with tempfile.TemporaryDirectory(dir=work_folder, prefix=".substrings") as folder:
        text = _store(documents, Path(folder) / "text", report, on_progress)
        try:
            finder = RepeatFinder(text, min_bytes, memory_mb * 10**6, on_progress)
            yield from _without_spans(text, finder.find(Path(folder)), report, on_progress)
        finally:
            text.close()


def _store(documents: Iterable[str], path: Path, report: SubstringReport, on_progress: OnProgress) -> StoredText:
    offsets = array("q", [0])
    with open(path, "wb") as file:
        for document in documents:
            content = document.encode("utf-8", "surrogatepass")
            file.write(content)
            offsets.append(offsets[-1] + len(content))
            report.documents_in += 1
            report.characters_in += len(document)
            on_progress("storing the text", len(content), None)
    return StoredText(path, np.frombuffer(offsets, np.int64))


def _without_spans(
    text: StoredText, spans: Iterator[tuple[int, int]], report: SubstringReport, on_progress: OnProgress
) -> Iterator[tuple[int, str]]:
    span = next(spans, None)
    for number in range(len(text.offsets) - 1):
        start, end = int(text.offsets[number]), int(text.offsets[number + 1])
        cuts: list[tuple[int, int]] = []
        while span is not None and span[0] < end:
            touches = cuts and cuts[-1][1] == span[0] - start
            cuts.append((cuts.pop()[0] if touches else span[0] - start, span[1] - start))
            span = next(spans, None)
        content = text.read(start, end)
        rest = cut_characters(content, cuts)
        document = rest.decode("utf-8", "surrogatepass")
        on_progress("removing repeats", end - start, text.num_bytes)
        report.bytes_removed += len(content) - len(rest)
        if len(rest) < len(content):
            report.documents_changed += 1
            if not document.strip():
                report.documents_emptied += 1
                continue
        report.documents_out += 1
        report.characters_out += len(document)
        yield number, document


def cut_characters(content: bytes, cuts: list[tuple[int, int]]) -> bytes:
    """UTF-8 bytes without the characters that lie in `cuts`, spans in order, from their first byte to their last."""
    parts = []
    kept_from = 0
    for start, end in cuts:
        while start < end and _is_inside_character(content, start):
            start += 1
        while start < end and _is_inside_character(content, end):
            end -= 1
        parts.append(content[kept_from:start])
        kept_from = end
    parts.append(content[kept_from:])
    return b"".join(parts)


def _is_inside_character(content: bytes, place: int) -> bool:
    """Whether a character goes on at this place."""
    return place < len(content) and content[place] & 0b1100_0000 == 0b1000_0000
