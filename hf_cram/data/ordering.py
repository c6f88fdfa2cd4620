"""The order of the training rows: scored by what they hold, sorted, written anew."""

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from .collator import mix64
from .errors import DataError
from .packing import read_rows

ROW_ORDERS = ("none", "random", "unigram", "sentence_length", "word_length", "rare_tokens")
SENTENCE_ENDS = set(".!?")
CLOSING_MARKS = "\"')]}”’»"
WORD_BEGINNINGS = ("Ġ", "▁")  # how byte-level and sentencepiece vocabularies mark the space before a word
RARE_SHARE_OF_VOCABULARY = 0.5
CHUNK_TOKENS = 1_000_000
PART_BYTES = 64_000_000  # rows are put in order in parts of so much, in larger ones where there would be too many
MOST_PARTS = 1024
FRACTION_BITS = 16

HISTOGRAM_BINS = 50  # of the rows' scores
# (first row, end) -> (rows, max_seq_length) token ids
ReadRows = Callable[[int, int], np.ndarray]
# Gets the part of the work, rows done since the last call, rows in all.
OnProgress = Callable[[str, int, int | None], None]


@dataclass
class OrderingArguments:
    """The order in which training meets the rows."""

    row_order: str = field(
        default="none",
        metadata={
            "help": "Order of the training rows. 'none': as they are read; 'random': shuffled by row_order_seed; "
            "'unigram': likely tokens first; 'sentence_length': most sentence ends (. ! ?) first, the paper's choice; "
            "'word_length': short words first; 'rare_tokens': fewest rare tokens first (of the rarer half of the "
            "vocabulary). Only training that reads the rows in sequence follows it."
        },
    )
    reverse_row_order: bool = field(
        default=False, metadata={"help": "Turn row_order around; rows with equal scores stay as they are read."}
    )
    row_order_seed: int = field(default=0, metadata={"help": "Seed of row_order 'random'."})

    def __post_init__(self) -> None:
        if self.row_order not in ROW_ORDERS:
            raise DataError(f"row_order must be one of {', '.join(ROW_ORDERS)}, got {self.row_order!r}")
        if self.reverse_row_order and self.row_order == "none":
            raise DataError("reverse_row_order turns a row_order around, and row_order is 'none': set both or neither")
        if not 0 <= self.row_order_seed < 2**63:
            raise DataError(f"row_order_seed must be at least 0 and below 2**63, got {self.row_order_seed}")


def order_settings(ordering: OrderingArguments) -> dict[str, Any]:
    """The settings of the order alone, by name; `ordering` may have others too. A seed counts where it is used."""
    settings = {name: getattr(ordering, name) for name in asdict(OrderingArguments())}
    return settings if ordering.row_order == "random" else {**settings, "row_order_seed": 0}


def score_rows(rows: np.ndarray, tokenizer: PreTrainedTokenizerBase, arguments: OrderingArguments) -> np.ndarray:
    """
    A score for each of the (N, max_seq_length) rows, (N,) float64; training meets low scores first.

    `unigram`: mean bits a token under the token frequencies of these rows (paper, section 4.4: likely rows first, which
    the original code reversed). `sentence_length`: tokens a sentence, the row's length over its sentence ends plus one.
    `word_length`: mean characters a word; signs are no words, continuing pieces belong to theirs. `rare_tokens`: share
    of tokens from the rarer half of the vocabulary that occurs. `random`: uniform in [0, 1). `none`: the row's number.
    Sums are of integers, so that neither the machine nor the size of the chunks shows in a score.
    """
    return _score(len(rows), lambda start, end: rows[start:end], rows.shape[1], tokenizer, arguments)


def sort_scores(scores: np.ndarray, arguments: OrderingArguments) -> np.ndarray:
    """The row to read at each place, (N,) int64: low scores first, or high ones; equal ones in reading order."""
    return np.argsort(-scores if arguments.reverse_row_order else scores, kind="stable")


def order_rows(
    source: Path,
    target: Path,
    dtype: np.dtype,
    max_seq_length: int,
    tokenizer: PreTrainedTokenizerBase,
    arguments: OrderingArguments,
    on_progress: OnProgress = lambda part, rows, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Write the rows of the file `source` into `target` in the order of their scores (see [`score_rows`]).

    Returns the order and the scores, each (N,): the row at place `i` of the target was row `order[i]` of the source
    and has `scores[order[i]]`. Files are read and written in sequence only: the rows are dealt into the parts of the
    target where they belong, and each part is put in order in memory. Beside order and scores memory holds two such
    parts, of 64 MB or a 1024th of the file; `target` appears when it is complete and may be `source`. Raises
    [`DataError`] where `source` does not hold whole rows.
    """
    row_bytes = max_seq_length * np.dtype(dtype).itemsize
    num_rows, rest = divmod(source.stat().st_size, row_bytes)
    if rest:
        raise DataError(f"{source}: {num_rows} rows of {max_seq_length} tokens and {rest} bytes more: prepare it anew")

    def read(start: int, end: int) -> np.ndarray:
        return read_rows(source, dtype, max_seq_length, start, end)

    scores = _score(num_rows, read, max_seq_length, tokenizer, arguments, on_progress)
    order = sort_scores(scores, arguments)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        _copy_in_order(source, temporary, order, row_bytes, on_progress)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return order, scores


def _copy_in_order(source: Path, target: Path, order: np.ndarray, row_bytes: int, on_progress: OnProgress) -> None:
    num_rows = len(order)
    part_rows = max(1, PART_BYTES // row_bytes, -(-num_rows // MOST_PARTS))
    part_of = np.empty(num_rows, dtype=np.uint16)  # of each row of the source
    for part, start in enumerate(range(0, num_rows, part_rows)):
        part_of[order[start : start + part_rows]] = part
    next_row = np.arange(0, num_rows, part_rows)  # where each part is written on

    with open(source, "rb", buffering=0) as reader, open(target, "w+b", buffering=0) as writer:
        for start in range(0, num_rows, part_rows):
            rows = _read_rows(reader, start, min(part_rows, num_rows - start), row_bytes)
            parts = part_of[start : start + len(rows)]
            rows = rows[np.argsort(parts, kind="stable")]
            ends = np.cumsum(np.bincount(parts, minlength=len(next_row)))
            for part, (first, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
                _write_rows(writer, int(next_row[part]), rows[first:end])
                next_row[part] += end - first
            on_progress("dealing", len(rows), num_rows)
        for start in range(0, num_rows, part_rows):
            places = order[start : start + part_rows]
            # The rows of a part stand in it in the order of the source.
            rank = np.empty(len(places), dtype=np.int64)
            rank[np.argsort(places, kind="stable")] = np.arange(len(places))
            _write_rows(writer, start, _read_rows(writer, start, len(places), row_bytes)[rank])
            on_progress("placing", len(places), num_rows)


def _read_rows(stream: BinaryIO, start: int, count: int, row_bytes: int) -> np.ndarray:
    """Some rows as bytes, (count, row_bytes); no page of a map, which would count as this process's memory."""
    stream.seek(start * row_bytes)
    return np.fromfile(stream, np.uint8, count * row_bytes).reshape(count, row_bytes)


def _write_rows(stream: BinaryIO, start: int, rows: np.ndarray) -> None:
    if len(rows):
        stream.seek(start * rows.shape[1])
        rows.tofile(stream)


def _score(
    num_rows: int,
    read: ReadRows,
    max_seq_length: int,
    tokenizer: PreTrainedTokenizerBase,
    arguments: OrderingArguments,
    on_progress: OnProgress = lambda part, rows, total: None,
) -> np.ndarray:
    if arguments.row_order == "none":
        return np.arange(num_rows, dtype=np.float64)
    rows_at_once = max(1, CHUNK_TOKENS // max_seq_length)
    spans = [(start, min(start + rows_at_once, num_rows)) for start in range(0, num_rows, rows_at_once)]
    scores = np.empty(num_rows)
    if arguments.row_order == "random":
        key = mix64(np.array([arguments.row_order_seed + 1], dtype=np.uint64))
        for start, end in spans:
            scores[start:end] = mix64(mix64(np.arange(start, end, dtype=np.uint64) + key) + key) / 2.0**64
        return scores
    if arguments.row_order in ("unigram", "rare_tokens"):
        counts = np.zeros(len(tokenizer), dtype=np.int64)
        for start, end in spans:
            counts += np.bincount(read(start, end).ravel(), minlength=len(counts))
            on_progress("counting", end - start, num_rows)
        measure = _measure_by_counts(arguments.row_order, counts)
    else:
        measure = _measure_by_texts(arguments.row_order, tokenizer)
    for start, end in spans:
        scores[start:end] = measure(read(start, end))
        on_progress("scoring", end - start, num_rows)
    return scores


def _measure_by_counts(row_order: str, counts: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The score of (n, L) rows as a function, from how often each token occurs (vocabulary,)."""
    if row_order == "unigram":
        total = _log2(counts.sum(keepdims=True).clip(1))
        values, scale = total - _log2(counts.clip(1)), 2**FRACTION_BITS
    else:
        occurring = np.sort(counts[counts > 0])
        limit = occurring[int((len(occurring) - 1) * RARE_SHARE_OF_VOCABULARY)] if len(occurring) else 0
        values, scale = (counts <= limit).astype(np.int64), 1
    return lambda rows: values[rows].sum(axis=1) / (rows.shape[1] * scale)


def _log2(values: np.ndarray) -> np.ndarray:
    """
    Logarithms to base 2 of positive integers as integers in units of 2**-FRACTION_BITS, rounded down.

    Digit by digit in integers, since the logarithms of mathematical libraries differ in their last bit.
    """
    mantissas, exponents = np.frexp(values.astype(np.float64))
    mantissas = np.ldexp(mantissas, 32).astype(np.uint64)  # in [2**31, 2**32): [1, 2) in fixed point
    result = (exponents.astype(np.int64) - 1) << FRACTION_BITS
    for bit in reversed(range(FRACTION_BITS)):
        squares = mantissas * mantissas
        digits = squares >> np.uint64(63)  # 1 where the square is at least 2
        mantissas = squares >> (digits + np.uint64(31))
        result += digits.astype(np.int64) << bit
    return result


def _measure_by_texts(row_order: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[np.ndarray], np.ndarray]:
    """The score of (n, L) rows as a function, from what each token of the vocabulary says."""
    texts, begins_word = _token_texts(tokenizer)
    if row_order == "sentence_length":
        ends = np.array([_ends_sentence(text) for text in texts], dtype=np.int64)
        return lambda rows: rows.shape[1] / (ends[rows].sum(axis=1) + 1)

    is_word = np.array([any(map(str.isalnum, text)) for text in texts])
    characters = np.where(is_word, [len(text) for text in texts], 0)
    is_bare_mark = np.array([not text for text in texts])  # its word's letters stand in the tokens after it
    begins = ((is_word | is_bare_mark) & begins_word).astype(np.int64)
    continues = (is_word & ~begins_word).astype(np.int64)

    def mean_word_length(rows: np.ndarray) -> np.ndarray:
        # A row that starts inside a word has one word more than word beginnings.
        words = begins[rows].sum(axis=1) + continues[rows[:, 0]]
        return characters[rows].sum(axis=1) / np.maximum(words, 1)

    return mean_word_length


def _ends_sentence(text: str) -> bool:
    """Whether a token is a full stop, an exclamation or question mark, or some of them with closing quotes."""
    marks = text.strip(CLOSING_MARKS)
    return bool(marks) and SENTENCE_ENDS.issuperset(marks)


def _token_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], np.ndarray]:
    """
    What each token stands for without marks of the vocabulary, and whether it begins a word. Special tokens stand for
    nothing and begin none.

    WordPiece marks what continues a word, byte-level and sentencepiece vocabularies what begins one; in a vocabulary
    without marks every token is a word.
    """
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    continuation = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("continuing_subword_prefix")
    if continuation:
        begins = [not token.startswith(continuation) for token in tokens]
    else:
        marks = [mark for mark in WORD_BEGINNINGS if any(token.startswith(mark) for token in tokens)]
        begins = [not marks or token.startswith(tuple(marks)) for token in tokens]
    special = set(tokenizer.all_special_tokens)
    texts = ["" if token in special else tokenizer.convert_tokens_to_string([token]) for token in tokens]
    is_special = np.array([token in special for token in tokens])
    return [text.strip().removeprefix(continuation or "") for text in texts], np.array(begins) & ~is_special
