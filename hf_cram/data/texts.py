"""The text as the steps see it: a source's documents, or what deduplication has left of them."""

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zstandard

from .cache import cached_entry, hash_of
from .deduplication import DeduplicationArguments, find_near_duplicates
from .errors import SkipReport
from .sources import TextSource
from .steps import StepRecord, measured_step, read_steps, write_steps
from .substring_deduplication import SubstringReport, remove_repeated_substrings
from .text_files import read_files

FORMAT_VERSION = 5  # raise it whenever the same inputs give other files
# With a limit of tokens, deduplication and the training of a tokenizer read so many characters for each: English has 4
# to 5 a token, and the rest is for what they and the filters leave out.
CHARACTERS_FOR_A_TOKEN = 8
FILE_CHARACTERS = 64_000_000
NO_LIMIT = 2**40


@dataclass(frozen=True)
class Place:
    """Where entries lie and how they are made: none of it changes what is in them."""

    cache: Path
    overwrite: bool
    workers: int | None


class Text(Protocol):
    """
    Documents with an identity, as often as asked for. `report` and `counts` tell what the source has left out and read
    so far, `steps` and `removed` what was done to its documents.
    """

    @property
    def identity(self) -> str: ...

    @property
    def report(self) -> SkipReport: ...

    @property
    def counts(self) -> dict[str, dict[str, int]]: ...

    @property
    def estimated_characters(self) -> int | None: ...

    @property
    def steps(self) -> list[StepRecord]: ...

    @property
    def removed(self) -> dict[str, Any]: ...

    def documents(self, count_tokens: Callable[[str], int] | None = None) -> Iterator[str]: ...

    def check_unchanged(self) -> None: ...


class SourceText:
    """
    The documents of a source, or its first ones: those that reach `max_characters`.

    The limit is for steps that have to read all of a text before the first document comes out.
    """

    def __init__(self, source: TextSource, max_characters: int | None = None):
        self.source = source
        self.max_characters = max_characters
        self.steps: list[StepRecord] = []
        self.removed: dict[str, Any] = {}

    @property
    def identity(self) -> str:
        identity = self.source.identity
        return identity if self.max_characters is None else hash_of(identity, self.max_characters)

    @property
    def report(self) -> SkipReport:
        return self.source.report

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return self.source.counts

    @property
    def estimated_characters(self) -> int | None:
        estimate = self.source.estimated_characters
        return self.max_characters if estimate is None else min(estimate, self.max_characters or NO_LIMIT)

    def documents(self, count_tokens: Callable[[str], int] | None = None) -> Iterator[str]:
        characters = 0
        for document in self.source.documents(count_tokens):
            yield document
            characters += len(document)
            if self.max_characters is not None and characters >= self.max_characters:
                return

    def check_unchanged(self) -> None:
        self.source.check_unchanged()


class WithoutNearDuplicates:
    """A text without the documents that nearly equal an earlier one; kept is only which ones these are."""

    def __init__(self, text: Text, similarity: float, place: Place):
        self.text = text
        self.similarity = similarity
        self.place = place
        self.identity = hash_of(FORMAT_VERSION, text.identity, "near duplicates", similarity)

    @cached_property
    def _entry(self) -> Path:
        return cached_entry(self.place.cache / "near_duplicates" / self.identity, self._write, self.place.overwrite)[0]

    def _write(self, folder: Path) -> None:
        record = StepRecord("near duplicates", 0, 0, 0, 0)
        sizes: list[int] = []

        def documents() -> Iterator[str]:
            for document in self.text.documents():
                sizes.append(len(document))
                yield document

        with measured_step(record, "B", estimate_total=lambda: self.text.estimated_characters) as bar:
            repeated = find_near_duplicates(documents(), self.similarity, folder, bar.show_part)
        self.text.check_unchanged()
        characters = np.array(sizes, np.int64)
        record.documents_in, record.documents_out = len(sizes), int((~repeated).sum())
        record.characters_in, record.characters_out = int(characters.sum()), int(characters[~repeated].sum())
        np.save(folder / "repeated.npy", repeated)
        write_steps(folder, [record])

    @property
    def report(self) -> SkipReport:
        return self.text.report

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return self.text.counts

    @property
    def estimated_characters(self) -> int | None:
        return self.steps[-1].characters_out

    @property
    def steps(self) -> list[StepRecord]:
        return [*self.text.steps, *read_steps(self._entry)]

    @property
    def removed(self) -> dict[str, Any]:
        record = self.steps[-1]
        return {**self.text.removed, "near_duplicates": (record.documents_in or 0) - (record.documents_out or 0)}

    def documents(self, count_tokens: Callable[[str], int] | None = None) -> Iterator[str]:
        repeated = np.load(self._entry / "repeated.npy")
        # The limits of the sources follow `count_tokens`, and the marks belong to the documents read without it.
        return (document for document, drop in zip(self.text.documents(), repeated, strict=False) if not drop)

    def check_unchanged(self) -> None:
        self.text.check_unchanged()


class WithoutRepeatedSubstrings:
    """A text without the passages that stood before, kept as files of documents."""

    def __init__(self, text: Text, min_bytes: int, memory_mb: int, place: Place):
        self.text = text
        self.min_bytes = min_bytes
        self.memory_mb = memory_mb
        self.place = place
        self.identity = hash_of(FORMAT_VERSION, text.identity, "repeated substrings", min_bytes)
        self._first_places: dict[str, str] = {}

    @cached_property
    def _entry(self) -> Path:
        return cached_entry(self.place.cache / "deduplicated" / self.identity, self._write, self.place.overwrite)[0]

    def _write(self, folder: Path) -> None:
        record, report = StepRecord("repeated substrings"), SubstringReport()
        earlier_steps, documents = self.text.steps, self.text.documents()
        with measured_step(record, "B", estimate_total=lambda: self.text.estimated_characters) as bar:
            rest = remove_repeated_substrings(documents, self.min_bytes, folder, report, self.memory_mb, bar.show_part)
            write_documents((document for _, document in rest), folder)
        self.text.check_unchanged()
        record.documents_in, record.documents_out = report.documents_in, report.documents_out
        record.characters_in, record.characters_out = report.characters_in, report.characters_out
        skips = self.text.report
        history = {
            "counts": self.text.counts,
            "skipped": skips.counts,
            "removed": {**self.text.removed, "repeated_substrings": asdict(report)},
        }
        (folder / "history.json").write_text(json.dumps(history, indent=2) + "\n", encoding="utf-8")
        self._first_places = skips.first_places  # not kept: the same text may lie elsewhere next time
        write_steps(folder, [*earlier_steps, record])

    @cached_property
    def _history(self) -> dict[str, Any]:
        return json.loads((self._entry / "history.json").read_text(encoding="utf-8"))

    @cached_property
    def report(self) -> SkipReport:
        report = SkipReport()
        report.counts.update(self._history["skipped"])
        report.first_places.update(self._first_places)
        return report

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return self._history["counts"]

    @property
    def estimated_characters(self) -> int | None:
        return self.steps[-1].characters_out

    @cached_property
    def steps(self) -> list[StepRecord]:
        return read_steps(self._entry)

    @property
    def removed(self) -> dict[str, Any]:
        return self._history["removed"]

    def documents(self, count_tokens: Callable[[str], int] | None = None) -> Iterator[str]:
        files = sorted(self._entry.glob("documents-*.jsonl.zst"))
        return read_files(files, SkipReport(), max_document_characters=NO_LIMIT)

    def check_unchanged(self) -> None:
        """What is read is a cache entry."""


def write_documents(documents: Iterable[str], folder: Path) -> None:
    """Write documents as JSON lines into compressed files of about 64 million characters."""
    size = number = 0
    with contextlib.ExitStack() as stack:
        for document in documents:
            if size == 0:
                path = folder / f"documents-{number:05d}.jsonl.zst"
                compressed = stack.enter_context(zstandard.open(path, "wb"))
                stream = stack.enter_context(io.TextIOWrapper(compressed, encoding="utf-8"))
            stream.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            size += len(document)
            if size >= FILE_CHARACTERS:
                stack.close()
                size, number = 0, number + 1


def deduplicate(text: SourceText, arguments: DeduplicationArguments, place: Place, token_limit: int | None) -> Text:
    """
    The text without what the arguments remove: first documents like earlier ones, then repeated passages.

    All of it has to be read before the first document comes out; of a text that is to give `token_limit` tokens the
    first 8 characters a token are taken for all.
    """
    similarity, min_bytes = arguments.near_dedup_similarity, arguments.dedup_substring_bytes
    if similarity is None and min_bytes is None:
        return text
    if token_limit is not None:
        text = SourceText(text.source, CHARACTERS_FOR_A_TOKEN * token_limit)
    rest: Text = text
    if similarity is not None:
        rest = WithoutNearDuplicates(rest, similarity, place)
    if min_bytes is not None:
        rest = WithoutRepeatedSubstrings(rest, min_bytes, arguments.dedup_memory_mb, place)
    return rest
