"""Tokens to rows: split off the held-out documents, pack the others into rows of equal length on disk."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .errors import DataError
from .token_shards import TokenShards

COPY_TOKENS = 4_000_000
# At most this share of the tokens is held out, however small the corpus.
MAX_EVAL_FRACTION = 0.05


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def read_rows(path: Path, dtype: np.dtype, max_seq_length: int, start: int, end: int) -> np.ndarray:
    """
    Rows `start` to `end` of a file of token ids, (N, max_seq_length): read, since the pages of a map would count as memory
    in use.
    """
    offset = start * max_seq_length * np.dtype(dtype).itemsize
    return np.fromfile(path, dtype, (end - start) * max_seq_length, offset=offset).reshape(-1, max_seq_length)


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
        self.max_train_tokens: int | None = None  # for which the text was read, where somebody says so
        self._open()

    def _open(self) -> None:
        self.rows = np.memmap(self.path, dtype=self.dtype, mode="r").reshape(-1, self.max_seq_length)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def dataset_id(self) -> str:
        """Names the rows: the key of their cache entry."""
        return self.path.parent.name

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


def pack_rows(
    shards: TokenShards,
    max_seq_length: int,
    eval_rows: int,
    folder: Path,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, int]:
    """
    Pack tokenized documents into `train.bin` and `eval.bin` in `folder`.

    Rows hold documents end to end with a separator between them and no `[CLS]` (paper, section 4.1); only the last
    partial row is dropped. Documents go to the held-out rows by the hash of their tokens, lowest first, until
    `eval_rows` rows or 5 % of the tokens are full. Of a held-out document that stands in the text several times one
    copy is held out, and the others are left out of the training rows.

    Returns counts of rows and held-out documents; `on_progress` is told tokens. Memory: 73 bytes a document. Raises
    [`DataError`] for a text too short for a training and a held-out row.
    """
    if shards.num_tokens < 2 * max_seq_length:
        left_out = ", ".join(f"{reason} ({count})" for reason, count in shards.left_out().items())
        raise DataError(
            f"the text has {shards.num_tokens} tokens{f' ({left_out} left out)' if left_out else ''}, fewer than one "
            f"training row and one held-out row of {max_seq_length}: add text or lower max_seq_length"
        )
    lengths, keys = shards.documents()
    is_eval, eval_order = choose_eval_documents(lengths, keys, max_seq_length, eval_rows)
    if lengths[~is_eval].sum() < max_seq_length:
        raise DataError(
            f"the text has {len(np.unique(keys))} different documents, too few to hold some out: add documents, or cut "
            "the text into more of them"
        )
    starts = np.cumsum(lengths) - lengths
    eval_spans = ((int(starts[index]), int(starts[index] + lengths[index])) for index in eval_order)
    train_spans = _spans(~is_eval, starts, lengths)
    return {
        "eval_rows": _copy_rows(shards, eval_spans, folder / "eval.bin", max_seq_length, eval_rows, on_progress),
        "train_rows": _copy_rows(shards, train_spans, folder / "train.bin", max_seq_length, None, on_progress),
        "eval_documents": len(eval_order),
    }


def choose_eval_documents(
    lengths: np.ndarray, keys: np.ndarray, max_seq_length: int, eval_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    Which documents are held out, with all their copies: (one flag a document, the first copies' indices in the order of
    their keys).

    Copies count once for the rows to fill, and all of them for the 5 % of the tokens that may leave the training rows.
    Documents whose copies are longer than the whole held-out part stay in training, unless nothing else fills a row.
    """
    most = max(max_seq_length, int(MAX_EVAL_FRACTION * lengths.sum()))
    target = min(eval_rows * max_seq_length, most)
    order = np.argsort(keys, kind="stable")  # copies together, the first of them first
    groups = np.flatnonzero(np.append(True, np.diff(keys[order]) != 0))
    sizes, totals = lengths[order[groups]], np.add.reduceat(lengths[order], groups)
    for longest in (target, totals.max()):
        chosen = np.flatnonzero(totals <= longest)
        filled = np.cumsum(sizes[chosen])
        if len(chosen) and filled[-1] >= max_seq_length:
            break
    chosen = chosen[: np.searchsorted(filled, target) + 1]
    last = max(np.searchsorted(np.cumsum(totals[chosen]), most), np.searchsorted(filled, max_seq_length))
    chosen = chosen[: last + 1]
    ends = np.append(groups[1:], len(keys))
    is_eval = np.zeros(len(keys), dtype=bool)
    for group in chosen.tolist():
        is_eval[order[groups[group] : ends[group]]] = True
    return is_eval, order[groups[chosen]]


def _spans(chosen: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring chosen documents as (first token, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], chosen.astype(np.int8), [0]))))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        yield int(starts[first]), int(starts[end - 1] + lengths[end - 1])


def _copy_rows(
    shards: TokenShards,
    spans: Iterable[tuple[int, int]],
    path: Path,
    max_seq_length: int,
    max_rows: int | None,
    on_progress: Callable[[int], None],
) -> int:
    """Write the spans end to end, cut to whole rows (and to `max_rows`); returns the rows."""
    count = 0
    with open(path, "wb") as stream:
        for start, end in spans:
            for position in range(start, end, COPY_TOKENS):
                for part in shards.read(position, min(position + COPY_TOKENS, end)):
                    part.tofile(stream)
                    count += len(part)
                    on_progress(len(part))
        rows = count // max_seq_length
        rows = rows if max_rows is None else min(rows, max_rows)
        stream.truncate(rows * max_seq_length * shards.dtype.itemsize)
    return rows
