"""Where a text repeats itself: windows of bytes that stood before, found exactly and in bounded memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from pydivsufsort import divsufsort, kasai

from .collator import mix64
from .errors import DataError
from .stored_text import NUM_BUCKETS, Buckets, StoredText

# (what is being done, bytes of text done since the last call, bytes of text in all or None where not known yet)
OnProgress = Callable[[str, int, int | None], None]

GRAM_BYTES = 32
CHUNK_BYTES = 65536
INDEX_BITS = 18  # a chunk with the windows that reach into and out of it has fewer places than 2**18
MAX_WINDOW_BYTES = 50_000
SUFFIXES_AT_ONCE = 1 << 20
SEPARATOR = b"\xff"  # stands in no UTF-8 text
BASE = 0x9E3779B97F4A7C15  # any odd number has an inverse modulo 2**64
# For what does not grow with the text: chunks, records on their way to disk, the allocator's gaps.
RESERVED_BYTES = 60_000_000
# Shares of the rest of the memory: fingerprints are copied a few times while they are sorted; a byte that goes into a
# suffix array takes 14 bytes (itself, its place, its rank, its common prefix) and those of its matches.
FINGERPRINT_MEMORY_SHARE = 1 / 8
SUFFIX_MEMORY_SHARE = 1 / 24

# A k-gram picked from the windows that start at `position - before` and the ones after it, up to the one that ends the
# `length` bytes of `context`, a hash of these bytes.
FINGERPRINT = np.dtype(
    [("gram", "<u8"), ("context", "<u8"), ("position", "<i8"), ("before", "<i4"), ("length", "<i4")]
)
SPAN = np.dtype([("start", "<i8"), ("end", "<i8")])


class RepeatFinder:
    """
    Finds every window of `window_bytes` bytes that repeats: its content first stood in an earlier document, or in the
    same one without overlap. Windows do not cross from one document into the next, so that both mean: at least
    `window_bytes` bytes before.

    Winnowing (Schleimer et al. 2003) picks k-grams so that equal windows pick the same one at the same place; only
    windows whose k-gram was picked elsewhere too can repeat. Where all the windows of a picked k-gram stand unchanged
    elsewhere, comparing bytes settles them. The others go through suffix arrays, those of one k-gram together, and
    k-grams in parts that fit the memory. Hashes only choose what is compared: the result does not depend on them.
    """

    def __init__(self, text: StoredText, window_bytes: int, memory_bytes: int, on_progress: OnProgress):
        if not 1 <= window_bytes <= MAX_WINDOW_BYTES:
            raise DataError(f"repeated passages have 1 to {MAX_WINDOW_BYTES} bytes at least, got {window_bytes}")
        self.text = text
        self.window_bytes = window_bytes
        self.gram_bytes = min(GRAM_BYTES, (window_bytes + 1) // 2)
        self.grams_in_window = window_bytes - self.gram_bytes + 1
        memory_bytes = max(0, memory_bytes - RESERVED_BYTES)
        self.fingerprint_memory = int(memory_bytes * FINGERPRINT_MEMORY_SHARE)
        self.suffix_capacity = min(2**30, max(16 * window_bytes, int(memory_bytes * SUFFIX_MEMORY_SHARE)))
        self.on_progress = on_progress
        places = CHUNK_BYTES + 2 * window_bytes
        self._powers = np.multiply.accumulate(np.full(places, BASE, np.uint64))
        self._inverse_powers = np.multiply.accumulate(np.full(places, pow(BASE, -1, 2**64), np.uint64))

    def find(self, folder: Path) -> Iterator[tuple[int, int]]:
        """The spans of bytes that repeating windows cover, (start, end), in order and apart from each other."""
        fingerprints = Buckets(folder, "fingerprints", FINGERPRINT)
        self._write_fingerprints(fingerprints)
        spans = Buckets(folder, "spans", SPAN)
        for records, share in self._repeated_fingerprints(fingerprints):
            rest = self._settle_unchanged(records, spans)
            del records
            parts = list(parts_of_grams(rest["gram"], rest["length"], self.suffix_capacity))
            for number, part in enumerate(parts):
                starts = rest["position"][part] - rest["before"][part]
                self._match_suffixes(starts, starts + rest["length"][part], spans)
                done = share * (number + 1) // len(parts) - share * number // len(parts)
                self.on_progress("comparing repeats", done, self.text.num_bytes)
            if not parts:
                self.on_progress("comparing repeats", share, self.text.num_bytes)
        spans.flush()
        return merge_spans(spans)

    def _write_fingerprints(self, buckets: Buckets) -> None:
        for start in range(0, self.text.num_bytes, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, self.text.num_bytes)
            records = self.fingerprints(start, end)
            # The picked k-grams have the smallest of all hashes; their low bits are spread evenly.
            buckets.add(records, (records["gram"] % NUM_BUCKETS).astype(np.int64))
            self.on_progress("looking for repeats", end - start, self.text.num_bytes)
        buckets.flush()

    def fingerprints(self, start: int, end: int) -> np.ndarray:
        """The k-grams picked at the bytes from `start` to `end`, with all windows that pick them."""
        low = max(0, start - self.grams_in_window + 1)
        high = min(self.text.num_bytes, end + self.window_bytes - 1)
        num_windows = high - low - self.window_bytes + 1
        if num_windows < 1:
            return np.empty(0, FINGERPRINT)
        values = np.frombuffer(self.text.read(low, high), np.uint8)
        prefix_hashes = np.zeros(len(values) + 1, np.uint64)
        np.cumsum((values + np.uint64(1)) * self._powers[: len(values)], out=prefix_hashes[1:])
        # Equal bytes have equal hashes wherever they stand.
        grams = prefix_hashes[self.gram_bytes :] - prefix_hashes[: -self.gram_bytes]
        grams = mix64(grams * self._inverse_powers[: len(grams)])
        index_mask = np.uint64((1 << INDEX_BITS) - 1)
        # Of equal k-grams the first is picked: a choice that depends on the window's content alone.
        picked = sliding_minimum((grams & ~index_mask) | np.arange(len(grams), dtype=np.uint64), self.grams_in_window)

        documents = self.text.document_numbers(low, high)
        windows = np.flatnonzero(documents[:num_windows] == documents[self.window_bytes - 1 :])
        picked = (picked[windows] & index_mask).astype(np.int64)
        is_first = np.ones(len(picked), dtype=bool)
        is_first[1:] = picked[1:] != picked[:-1]
        is_last = np.ones(len(picked), dtype=bool)
        is_last[:-1] = is_first[1:]
        places, firsts = picked[is_first], windows[is_first]
        ends = windows[is_last] + self.window_bytes
        # Places outside are complete in another chunk.
        here = (places >= start - low) & (places < end - low)
        places, firsts, ends = places[here], firsts[here], ends[here]
        records = np.empty(len(places), FINGERPRINT)
        records["gram"] = grams[places]
        records["context"] = mix64((prefix_hashes[ends] - prefix_hashes[firsts]) * self._inverse_powers[firsts])
        records["position"] = places + low
        records["before"] = places - firsts
        records["length"] = ends - firsts
        return records

    def _repeated_fingerprints(self, buckets: Buckets) -> Iterator[tuple[np.ndarray, int]]:
        """
        Fingerprints whose k-gram was picked at two places or more, those of one k-gram together and in order; and the
        bytes of text that each such lot stands for.
        """
        largest = int(buckets.num_records.max()) * FINGERPRINT.itemsize
        if largest > self.fingerprint_memory:
            needed = int((largest / FINGERPRINT_MEMORY_SHARE + RESERVED_BYTES) / 1e6) + 1
            raise DataError(f"the repeated passages of so much text take more memory: set dedup_memory_mb to {needed}")
        held: list[np.ndarray] = []
        lot_start = 0
        for index in range(NUM_BUCKETS):
            records = buckets.read(index)
            records = records[occurs_again(records["gram"])]
            if sum(part.nbytes for part in [*held, records]) > self.fingerprint_memory:
                held = [np.concatenate(held)]
                yield held.pop(), self.text.num_bytes * index // NUM_BUCKETS - lot_start
                lot_start = self.text.num_bytes * index // NUM_BUCKETS
            held.append(records)
        held = [np.concatenate(held)]
        yield held.pop(), self.text.num_bytes - lot_start

    def _settle_unchanged(self, records: np.ndarray, spans: Buckets) -> np.ndarray:
        """
        Add the spans of fingerprints all whose windows stand unchanged around an earlier one, and leave these out.

        Returns the others of every k-gram that still has two or more, sorted by k-gram.
        """
        records = records[np.lexsort((records["context"], records["gram"]))]  # stable: positions rise
        starts = records["position"] - records["before"]
        is_new = np.ones(len(records), dtype=bool)
        for name in ("gram", "context", "before", "length"):
            is_new[1:] &= records[name][1:] == records[name][:-1]
        is_new[1:] = ~is_new[1:]
        firsts = np.maximum.accumulate(np.where(is_new, np.arange(len(records)), 0))
        candidates = np.flatnonzero(~is_new & (starts - starts[firsts] >= self.window_bytes))
        settled = candidates[self._have_equal_bytes(starts, records["length"], candidates, firsts[candidates])]
        self._add_spans(starts[settled], starts[settled] + records["length"][settled], spans)
        rest = np.delete(records, settled)
        return rest[occurs_again(rest["gram"])]

    def _have_equal_bytes(
        self, starts: np.ndarray, lengths: np.ndarray, candidates: np.ndarray, firsts: np.ndarray
    ) -> np.ndarray:
        equal = np.empty(len(candidates), dtype=bool)
        pairs = zip(candidates.tolist(), firsts.tolist(), strict=True)
        known, expected = -1, b""
        for number, (candidate, first) in enumerate(pairs):
            length = int(lengths[first])
            if first != known:
                known, expected = first, self.text.read(start := int(starts[first]), start + length)
            equal[number] = self.text.read(start := int(starts[candidate]), start + length) == expected
        return equal

    def _match_suffixes(self, starts: np.ndarray, ends: np.ndarray, spans: Buckets) -> None:
        """Add the spans of repeating windows among those that lie in the regions from `starts` to `ends`."""
        starts, ends = merge_regions(starts, ends)
        content = bytearray()
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            content += self.text.read(start, end) + SEPARATOR
        joined = np.frombuffer(content, np.uint8)
        region_places = np.cumsum(np.append(0, ends - starts + len(SEPARATOR))[:-1])
        suffixes = divsufsort(joined)
        # (N,): whether the windows of a suffix and of the next one in the array are equal
        equal_next = kasai(joined, suffixes) >= self.window_bytes
        low = 0
        while low < len(suffixes):
            high = min(low + SUFFIXES_AT_ONCE, len(suffixes))
            high += int(np.argmin(equal_next[high - 1 :])) if equal_next[high - 1] else 0
            members = equal_next[low:high].copy()
            members[1:] |= equal_next[low : high - 1]
            heads = np.flatnonzero(equal_next[low:high] & ~np.append(False, equal_next[low : high - 1]))
            places = suffixes[low:high][members]
            group_starts = np.cumsum(members)[heads] - 1
            low = high
            if not len(places):
                continue
            regions = np.searchsorted(region_places, places, side="right") - 1
            windows = places - region_places[regions] + starts[regions]
            # A group that runs over a separator does so in all its members.
            inside = windows + self.window_bytes <= ends[regions]
            firsts = np.minimum.reduceat(windows, group_starts)
            firsts = np.repeat(firsts, np.diff(np.append(group_starts, len(places))))
            repeats = np.sort(windows[inside & (windows - firsts >= self.window_bytes)])
            is_first = np.diff(repeats, prepend=-2) > 1
            is_last = np.append(is_first[1:], True)[: len(repeats)]
            self._add_spans(repeats[is_first], repeats[is_last] + self.window_bytes, spans)

    def _add_spans(self, starts: np.ndarray, ends: np.ndarray, spans: Buckets) -> None:
        records = np.empty(len(starts), SPAN)
        records["start"], records["end"] = starts, ends
        spans.add(records, starts // (self.text.num_bytes // NUM_BUCKETS + 1))


def sliding_minimum(values: np.ndarray, width: int) -> np.ndarray:
    """The minimum of each `width` consecutive values, (len(values) - width + 1,)."""
    covered = 1
    while covered < width:
        step = min(covered, width - covered)
        values = np.minimum(values[:-step], values[step:])
        covered += step
    return values


def occurs_again(values: np.ndarray) -> np.ndarray:
    """Whether each value stands in the array a second time."""
    order = np.argsort(values)
    ordered = values[order]
    equal = ordered[1:] == ordered[:-1]
    result = np.zeros(len(values), dtype=bool)
    result[order[1:][equal]] = True
    result[order[:-1][equal]] = True
    return result


def parts_of_grams(grams: np.ndarray, sizes: np.ndarray, capacity: int) -> Iterator[np.ndarray]:
    """
    Parts of sorted k-grams of at most `capacity` bytes, as indices, such that each two equal k-grams meet in a part.

    A k-gram that alone has more, such as a row of dashes, is cut into blocks, each two of which are a part.
    """
    if not len(grams):
        return
    totals = np.append(0, np.cumsum(sizes, dtype=np.int64))
    starts = np.flatnonzero(np.append(True, grams[1:] != grams[:-1]))
    ends = np.append(starts[1:], len(grams))
    group_totals = totals[ends]
    group = 0
    while group < len(starts):
        fitting = int(np.searchsorted(group_totals, totals[starts[group]] + capacity, side="right"))
        if fitting > group:
            yield np.arange(starts[group], ends[fitting - 1])
            group = fitting
            continue
        block_of = (totals[starts[group] : ends[group]] - totals[starts[group]]) // (capacity // 3)
        blocks = np.split(np.arange(starts[group], ends[group]), np.flatnonzero(np.diff(block_of)) + 1)
        for second in range(1, len(blocks)):
            for first in range(second):
                yield np.concatenate([blocks[first], blocks[second]])
        group += 1


def merge_regions(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted regions, those that overlap made one; those that only touch may belong to two documents."""
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    is_first = np.append(True, starts[1:] >= ends[:-1])
    return starts[is_first], ends[np.append(is_first[1:], True)]


def merge_spans(spans: Buckets) -> Iterator[tuple[int, int]]:
    """The spans of all buckets in order, those of one document that overlap made one."""
    held = np.empty(0, SPAN)
    for index in range(NUM_BUCKETS):
        records = np.concatenate([held, spans.read(index)])
        if len(records):
            starts, ends = merge_regions(records["start"], records["end"])
            yield from zip(starts[:-1].tolist(), ends[:-1].tolist(), strict=True)
            held = np.array([(starts[-1], ends[-1])], SPAN)  # may go on in the next bucket
    yield from zip(held["start"].tolist(), held["end"].tolist(), strict=True)
