"""Documents to rows: tokenize, split off the held-out documents, pack into rows of equal length on disk."""

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from .sources import DataError, SkipReport
from .tokenization import NON_ASCII

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 2_000_000
BATCHES_IN_FLIGHT = 4
CACHED_WORDS = 500_000
CACHED_CHARACTERS = 20_000_000
COPY_TOKENS = 4_000_000
# At most this share of the tokens is held out, however small the corpus.
MAX_EVAL_FRACTION = 0.05
CHARACTERWISE_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFD", "StripAccents"}
ASCII_ONLY = {"type": "Replace", "pattern": {"Regex": NON_ASCII}, "content": ""}


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class PackedRows(Dataset):
    """
    Rows of `max_seq_length` tokens in a memory-mapped file.

    An item is `{"input_ids": (max_seq_length,) array, "mask_key": uint64}`; the key depends on the row and on the pass
    set with [`set_epoch`], so that masks drawn from it are the same in every process and differ from pass to pass.
    """

    def __init__(self, path: Path, dtype: np.dtype, max_seq_length: int):
        self.path = path
        self.dtype = dtype
        self.max_seq_length = max_seq_length
        self.epoch = 0
        self._open()

    def _open(self) -> None:
        self.rows = np.memmap(self.path, dtype=self.dtype, mode="r").reshape(-1, self.max_seq_length)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def num_tokens(self) -> int:
        return self.rows.size

    def set_epoch(self, epoch: int) -> None:
        """Enter a pass over the rows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        keys = np.asarray(indices, dtype=np.uint64) + (np.uint64(self.epoch) << np.uint64(40))
        return [{"input_ids": row, "mask_key": key} for row, key in zip(self.rows[list(indices)], keys, strict=True)]


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def has_independent_words(tokenizer: Tokenizer) -> bool:
    """
    Whether text cut at spaces and line feeds gives the tokens of the whole: so it is where normalization works
    character by character and BERT's pre-tokenizer cuts words at white space, and no added token has a say.
    """
    description = json.loads(tokenizer.to_str())
    normalizer = description["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return (
        all(step["type"] in CHARACTERWISE_NORMALIZERS or step == ASCII_ONLY for step in steps)
        and (description["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer"
        and all(token["special"] for token in description["added_tokens"])
    )


class _WordEncoder:
    """Encodes each different word once: a language has few, and a dictionary is faster than any tokenizer."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, separator_id: int):
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.separator = np.array([separator_id], dtype=dtype).tobytes()
        self.tokens_of_words: dict[str, bytes] = {}
        self.num_characters = 0

    def __call__(self, batch: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the documents with a separator after each, and their lengths with the separator."""
        if len(self.tokens_of_words) > CACHED_WORDS or self.num_characters > CACHED_CHARACTERS:
            self.tokens_of_words.clear()
            self.num_characters = 0
        documents = [document.replace("\n", " ").split(" ") for document in batch]
        known = self.tokens_of_words
        # Sorted, so that nothing depends on the order of a set.
        new_words = sorted(set().union(*documents).difference(known))
        encodings = self.tokenizer.encode_batch_fast(new_words, add_special_tokens=False)
        for word, encoding in zip(new_words, encodings, strict=True):
            known[word] = np.array(encoding.ids, dtype=self.dtype).tobytes()
            self.num_characters += len(word)
        encoded = [b"".join(map(known.__getitem__, words)) for words in documents]
        return _join(encoded, self.separator, self.dtype)


def _join(encoded: Sequence[bytes], separator: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.frombuffer(separator.join([*encoded, b""]), dtype=dtype)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) // dtype.itemsize + 1
    return tokens, lengths


# Of a worker process: set when it starts.
_encode_in_worker: _WordEncoder | None = None


def _start_worker(description: str, dtype: np.dtype, separator_id: int) -> None:
    global _encode_in_worker
    _encode_in_worker = _WordEncoder(Tokenizer.from_str(description), dtype, separator_id)


def _encode_batch_in_worker(batch: list[str]) -> tuple[np.ndarray, np.ndarray]:
    assert _encode_in_worker is not None
    return _encode_in_worker(batch)


@contextmanager
def _word_workers(tokenizer: Tokenizer, dtype: np.dtype, separator_id: int) -> Iterator[Executor]:
    """A process a core, each with a dictionary of words. Forked: a fresh interpreter would take seconds to import."""
    told = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in the workers; said before the fork, it spares a warning
    try:
        with ProcessPoolExecutor(
            os.cpu_count(),
            mp_context=multiprocessing.get_context("fork"),
            initializer=_start_worker,
            initargs=(tokenizer.to_str(), dtype, separator_id),
        ) as pool:
            yield pool
    finally:
        if told is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = told


def tokenize_documents(
    documents: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype, separator_id: int
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """
    Batches of (documents, tokens of all of them with a separator after each, lengths with the separator).

    The tokenizer must encode text as text, see [`plain_text_tokenizer`].
    """
    batches = _batches(documents)
    if has_independent_words(tokenizer):
        # A small text is done before the workers have started.
        for batch in itertools.islice(batches, 1):
            yield batch, *_WordEncoder(tokenizer, dtype, separator_id)(batch)
        second = next(batches, None)
        if second is None:
            return
        batches = itertools.chain([second], batches)
        if "fork" in multiprocessing.get_all_start_methods():
            with _word_workers(tokenizer, dtype, separator_id) as pool:
                yield from _in_order(pool, _encode_batch_in_worker, batches)
        else:
            encoder = _WordEncoder(tokenizer, dtype, separator_id)
            yield from ((batch, *encoder(batch)) for batch in batches)
        return

    separator = np.array([separator_id], dtype=dtype).tobytes()

    def encode_whole(batch: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        return _join([np.array(encoding.ids, dtype=dtype).tobytes() for encoding in encodings], separator, dtype)

    # While the ids of one batch are turned into an array, the tokenizer's threads encode another.
    with ThreadPoolExecutor(2, thread_name_prefix="tokenize") as threads:
        yield from _in_order(threads, encode_whole, batches)


def _in_order(
    pool: Executor, encode: Callable[[list[str]], tuple[np.ndarray, np.ndarray]], batches: Iterable[list[str]]
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Results in the order of the batches, with a few in flight."""
    pending: deque[tuple[list[str], Future]] = deque()
    for batch in batches:
        pending.append((batch, pool.submit(encode, batch)))
        if len(pending) > BATCHES_IN_FLIGHT:
            batch, future = pending.popleft()
            yield batch, *future.result()
    for batch, future in pending:
        yield batch, *future.result()


def plain_text_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """
    A copy that encodes whole documents as text: no truncation or padding, which a saved tokenizer may have switched
    on, and `[MASK]` written in a document is no mask.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def content_key(document: str) -> int:
    """64-bit hash of a document, the same in every run."""
    return int.from_bytes(hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def write_rows(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    separator_id: int,
    max_seq_length: int,
    eval_rows: int,
    folder: Path,
    report: SkipReport,
    on_progress: Callable[[int], None] = lambda characters: None,
) -> dict[str, int]:
    """
    Tokenize documents and pack them into `train.bin` and `eval.bin` in `folder`.

    Rows hold documents end to end with a separator between them and no `[CLS]` (paper, section 4.1); only the last
    partial row is dropped. Documents go to the held-out rows by the hash of their content, lowest first, until
    `eval_rows` rows or 5 % of the tokens are full: equal documents land on the same side.

    Returns counts of documents, characters, tokens and rows. Raises [`DataError`] for a text too short for a training
    and a held-out row.
    """
    tokenizer = plain_text_tokenizer(tokenizer)
    dtype = token_dtype(tokenizer.get_vocab_size())
    all_tokens = folder / "tokens.tmp"
    lengths: list[np.ndarray] = []
    keys: list[int] = []
    num_characters = 0
    with open(all_tokens, "wb") as stream:
        for batch, tokens, batch_lengths in tokenize_documents(documents, tokenizer, dtype, separator_id):
            kept = batch_lengths > 1
            for document, is_kept in zip(batch, kept, strict=True):
                if is_kept:
                    keys.append(content_key(document))
                else:
                    report.add("no token of the vocabulary", repr(document[:40]))
            if not kept.all():
                tokens = tokens[np.repeat(kept, batch_lengths)]
            tokens.tofile(stream)
            lengths.append(batch_lengths[kept])
            characters = sum(map(len, batch))
            num_characters += characters
            on_progress(characters)
    document_lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    num_tokens = int(document_lengths.sum())
    if num_tokens < 2 * max_seq_length:
        left_out = f" ({report.describe()} left out)" if report.counts else ""
        raise DataError(
            f"the text has {num_tokens} tokens{left_out}, fewer than one training row and one held-out row of {max_seq_length}: "
            "add text or lower max_seq_length"
        )
    is_eval, eval_order = choose_eval_documents(document_lengths, np.array(keys, np.uint64), max_seq_length, eval_rows)
    if document_lengths[~is_eval].sum() < max_seq_length:
        raise DataError(
            f"the text has {len(document_lengths)} different documents, too few to hold some out: add documents, or "
            "cut the text into more of them"
        )
    tokens = np.memmap(all_tokens, dtype=dtype, mode="r")
    starts = np.cumsum(document_lengths) - document_lengths
    eval_spans = [(starts[index], starts[index] + document_lengths[index]) for index in eval_order]
    num_eval_rows = _copy_rows(tokens, eval_spans, folder / "eval.bin", max_seq_length, eval_rows)
    train_spans = _spans(~is_eval, starts, document_lengths)
    num_train_rows = _copy_rows(tokens, train_spans, folder / "train.bin", max_seq_length, None)
    del tokens
    all_tokens.unlink()
    return {
        "documents": len(document_lengths),
        "characters": num_characters,
        "tokens": num_tokens,
        "train_rows": num_train_rows,
        "eval_rows": num_eval_rows,
        "eval_documents": int(is_eval.sum()),
    }


def choose_eval_documents(
    lengths: np.ndarray, keys: np.ndarray, max_seq_length: int, eval_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    Which documents are held out: (one flag a document, their indices in the order of their keys).

    Documents longer than the whole held-out part stay in training, unless nothing else fills a row.
    """
    target = max(max_seq_length, min(eval_rows * max_seq_length, int(MAX_EVAL_FRACTION * lengths.sum())))
    for longest in (target, lengths.max()):
        order = np.argsort(keys, kind="stable")
        order = order[lengths[order] <= longest]
        filled = np.cumsum(lengths[order])
        if len(order) and filled[-1] >= max_seq_length:
            break
    last = min(int(np.searchsorted(filled, target)), len(order) - 1)
    is_eval = np.isin(keys, keys[order[: last + 1]])
    return is_eval, np.flatnonzero(is_eval)[np.argsort(keys[is_eval], kind="stable")]


def _spans(chosen: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring chosen documents as (first token, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], chosen.astype(np.int8), [0]))))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        yield int(starts[first]), int(starts[end - 1] + lengths[end - 1])


def _copy_rows(
    tokens: np.ndarray, spans: Iterable[tuple[int, int]], path: Path, max_seq_length: int, max_rows: int | None
) -> int:
    """Write the spans end to end, cut to whole rows (and to `max_rows`); returns the rows."""
    count = 0
    with open(path, "wb") as stream:
        for start, end in spans:
            for position in range(start, end, COPY_TOKENS):
                part = tokens[position : min(position + COPY_TOKENS, end)]
                part.tofile(stream)
                count += len(part)
        rows = count // max_seq_length
        rows = rows if max_rows is None else min(rows, max_rows)
        stream.truncate(rows * max_seq_length * tokens.dtype.itemsize)
    return rows
