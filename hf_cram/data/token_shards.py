"""Tokens of a text on disk, in shards: an interrupted run goes on behind its last whole shard."""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_json_atomically
from .filtering import DroppedSamples
from .tokenizing import TokenizedBatch, TokenizingSettings, tokenize_batches

SHARD_CHARACTERS = 64_000_000
BATCH_CHARACTERS = 2_000_000
DOCUMENT_RECORD = np.dtype([("length", "<i8"), ("key", "<u8")])


@dataclass
class TextBatch:
    """Neighbouring documents; `position` is what the source had read and left out when the last one was drawn."""

    documents: list[str]
    num_characters: int
    ends_shard: bool
    is_last: bool
    position: dict[str, Any]


@dataclass
class ShardSummary:
    """
    What a shard was made of and what it holds: documents and characters read and kept, tokens with the separators,
    documents dropped by reason with samples of them, and where the source stood at its end.
    """

    documents_in: int = 0
    characters_in: int = 0
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    samples: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    position: dict[str, Any] = field(default_factory=dict)
    is_last: bool = False

    def add(self, batch: TextBatch, result: TokenizedBatch) -> None:
        self.documents_in += len(batch.documents)
        self.characters_in += batch.num_characters
        self.documents += len(result.lengths)
        self.characters += result.num_characters
        self.tokens += len(result.tokens)
        self.dropped = dict(Counter(self.dropped) + result.dropped)
        samples = DroppedSamples(result.samples.limit, self.samples)
        samples.merge(result.samples)
        self.samples = samples.by_reason
        self.position, self.is_last = batch.position, batch.is_last


class TokenShards:
    """
    The whole shards of a folder, in order; the samples of their summaries stay on the disk. Raises `OSError` where one
    cannot be read.
    """

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder = folder
        self.dtype = dtype
        self.summaries: list[ShardSummary] = []
        while (summary := self._read_summary(len(self.summaries))) is not None:
            self.summaries.append(summary)

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / f"shard-{index:05d}{suffix}"

    def _read_summary(self, index: int) -> ShardSummary | None:
        """A shard is whole where its summary, which is written last, and both files at the sizes it tells are there."""
        try:
            summary = ShardSummary(**json.loads(self._path(index, ".json").read_text(encoding="utf-8")))
            sizes = [self._path(index, suffix).stat().st_size for suffix in (".tokens", ".documents")]
        except (FileNotFoundError, ValueError, TypeError):
            return None
        expected = [summary.tokens * self.dtype.itemsize, summary.documents * DOCUMENT_RECORD.itemsize]
        summary.samples = {}
        return summary if sizes == expected else None

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards, separators included."""
        return sum(summary.tokens for summary in self.summaries)

    @property
    def is_finished(self) -> bool:
        """Whether nothing follows the last shard."""
        return bool(self.summaries) and self.summaries[-1].is_last

    def total(self, name: str) -> int:
        """Sum of one number of the summaries."""
        return sum(getattr(summary, name) for summary in self.summaries)

    def dropped(self) -> dict[str, int]:
        """Documents dropped, by reason."""
        return dict(sorted(sum((Counter(summary.dropped) for summary in self.summaries), Counter()).items()))

    def left_out(self) -> dict[str, int]:
        """Documents that the source skipped or the filters dropped, by reason."""
        skipped = self.summaries[-1].position.get("skipped", {}) if self.summaries else {}
        return dict(sorted((Counter(skipped) + Counter(self.dropped())).items()))

    def samples(self, limit: int) -> DroppedSamples:
        """Up to `limit` dropped documents for each reason; those of one shard are in memory at a time."""
        samples = DroppedSamples(limit)
        for index in range(len(self.summaries) if limit else 0):
            summary = json.loads(self._path(index, ".json").read_text(encoding="utf-8"))
            samples.merge(DroppedSamples(limit, summary["samples"]))
        return samples

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths with the separator, (D,) int64, and [`content_key`]s, (D,) uint64, of all documents in order."""
        records = [np.fromfile(self._path(i, ".documents"), DOCUMENT_RECORD) for i in range(len(self.summaries))]
        joined = np.concatenate([np.zeros(0, DOCUMENT_RECORD), *records])
        return joined["length"].astype(np.int64), joined["key"].astype(np.uint64)

    def read(self, start: int, end: int) -> Iterator[np.ndarray]:
        """Tokens `start` to `end` of all shards laid end to end, in parts; read, so that no map counts as memory."""
        for index, summary in enumerate(self.summaries):
            if start < min(end, summary.tokens):
                count = min(end, summary.tokens) - start
                yield np.fromfile(self._path(index, ".tokens"), self.dtype, count, offset=start * self.dtype.itemsize)
            start, end = max(0, start - summary.tokens), end - summary.tokens
            if end <= 0:
                return

    def write_next(
        self,
        results: Iterator[tuple[TextBatch, TokenizedBatch]],
        token_limit: int | None,
        on_progress: Callable[[int], None],
    ) -> None:
        """Write the next shard from results up to one that ends it; the summary last, when all is on the disk."""
        index, summary = len(self.summaries), ShardSummary()
        self._path(index, ".json").unlink(missing_ok=True)
        with open(self._path(index, ".tokens"), "wb") as tokens, open(self._path(index, ".documents"), "wb") as rest:
            for batch, result in results:
                result.tokens.tofile(tokens)
                records = np.empty(len(result.lengths), DOCUMENT_RECORD)
                records["length"], records["key"] = result.lengths, result.keys
                records.tofile(rest)
                summary.add(batch, result)
                on_progress(batch.num_characters)
                if token_limit is not None and self.num_tokens + summary.tokens >= token_limit:
                    summary.is_last = True
                if batch.ends_shard or summary.is_last:
                    break
            for stream in (tokens, rest):
                stream.flush()
                os.fsync(stream.fileno())
        write_json_atomically(self._path(index, ".json"), asdict(summary))
        summary.samples = {}
        self.summaries.append(summary)


def read_batches(
    documents: Iterable[str], shard_characters: int, position: Callable[[], dict[str, Any]]
) -> Iterator[TextBatch]:
    """
    Documents in batches of about 2 million characters; a shard ends with the document that fills it.

    A last batch without documents tells what the source left out behind its last document.
    """
    batch: list[str] = []
    size = in_shard = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        in_shard += len(document)
        ends_shard = in_shard >= shard_characters
        if ends_shard or size >= BATCH_CHARACTERS:
            yield TextBatch(batch, size, ends_shard, False, position())
            batch, size = [], 0
            in_shard = 0 if ends_shard else in_shard
    yield TextBatch(batch, size, True, True, position())


def write_token_shards(
    documents: Iterable[str],
    settings: TokenizingSettings,
    folder: Path,
    position: Callable[[], dict[str, Any]],
    workers: int = 1,
    token_limit: int | None = None,
    on_progress: Callable[[int], None] = lambda characters: None,
) -> TokenShards:
    """
    Filter and tokenize documents into shards in `folder`, behind those that an interrupted run has left there.

    A shard holds the documents that fill 64 million characters: what is in it depends neither on the workers nor on
    interruptions. Reading stops with the batch that brings `token_limit` tokens. `position` describes what the source
    has read so far (plain values); the description at the last document used is that of the last summary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = TokenShards(folder, settings.dtype)
    on_progress(shards.total("characters_in"))
    if shards.is_finished:
        return shards
    rest = itertools.islice(documents, shards.total("documents_in"), None)
    batches = read_batches(rest, SHARD_CHARACTERS, position)
    with contextlib.closing(tokenize_batches(batches, settings, workers)) as results:
        while not shards.is_finished:
            shards.write_next(results, token_limit, on_progress)
    return shards
