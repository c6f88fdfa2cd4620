"""Text and fixed-size records on disk, for steps that see more of them than the memory holds."""

import os
from pathlib import Path

import numpy as np

NUM_BUCKETS = 256
HELD_BYTES = 4 << 20


class StoredText:
    """
    Documents as one file of UTF-8 bytes; document i is the bytes from `offsets[i]` to `offsets[i + 1]`.

    Read, not mapped: the pages of a map would count as this process's memory.
    """

    def __init__(self, path: Path, offsets: np.ndarray):
        self.offsets = offsets  # (N + 1,) int64
        self.num_bytes = int(offsets[-1])
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self._descriptor, end - start, start)

    def close(self) -> None:
        os.close(self._descriptor)

    def document_numbers(self, start: int, end: int) -> np.ndarray:
        """The number of the document that holds each byte from `start` to `end`, (end - start,)."""
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, end))
        lengths = np.diff(self.offsets[first : last + 1].clip(start, end))
        return np.repeat(np.arange(first, last), lengths)


class Buckets:
    """Records on disk, each in one of `NUM_BUCKETS` files, in the order in which they came."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.dtype = dtype
        self.num_records = np.zeros(NUM_BUCKETS, np.int64)
        self._paths = [folder / f"{name}{index:03}.bin" for index in range(NUM_BUCKETS)]
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self._held_bytes = 0

    def add(self, records: np.ndarray, indices: np.ndarray) -> None:
        """Append each record to the bucket of its index; reading needs [`flush`] after the last ones."""
        self._held.append((records, indices))
        self._held_bytes += records.nbytes
        if self._held_bytes >= HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._held:
            return
        records, indices = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
        self._held, self._held_bytes = [], 0
        order = np.argsort(indices, kind="stable")
        records = records[order]
        counts = np.bincount(indices, minlength=NUM_BUCKETS)
        self.num_records += counts
        ends = np.cumsum(counts)
        for index in np.flatnonzero(counts).tolist():
            with open(self._paths[index], "ab") as file:
                file.write(records[ends[index] - counts[index] : ends[index]].tobytes())

    def read(self, index: int) -> np.ndarray:
        return np.fromfile(self._paths[index], self.dtype) if self.num_records[index] else np.empty(0, self.dtype)
