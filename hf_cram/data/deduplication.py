"""Text that stands in a corpus more than once: what is removed, and documents that nearly equal earlier ones."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rensa import RMinHash

from .collator import mix64
from .errors import DataError
from .repeated_windows import MAX_WINDOW_BYTES, OnProgress, occurs_again

SMALLEST_MIN_BYTES = 16
SMALLEST_MEMORY_MB = 100
NUM_PERMUTATIONS = 128
SHINGLE_WORDS = 5
BAND_RECALL = 0.99
MINHASH_SEED = 1
PIECE_BYTES = 1 << 20
MAX_LEADERS = 64
PAIRS_AT_ONCE = 8192
BASE = np.uint64(0x9E3779B97F4A7C15)
# Letters in lower case, digits and what is not ASCII as they are; 0 between words.
WORD_BYTES = np.array(
    [ord(chr(byte).lower()) if byte < 128 and chr(byte).isalnum() else byte * (byte >= 128) for byte in range(256)],
    dtype=np.uint8,
)


@dataclass
class DeduplicationArguments:
    """What is removed because it stood before."""

    dedup_substring_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Remove passages of at least so many bytes that stood before in the text, all but the first copy "
            "(exact substrings, Lee et al. 2021; the paper tried 75 and 100). Off by default."
        },
    )
    near_dedup_similarity: float | None = field(
        default=None,
        metadata={
            "help": "Drop documents that share at least this part of their runs of five words with an earlier one "
            "(Jaccard similarity, estimated by MinHash within about 0.04; 0.8 is usual). Off by default."
        },
    )
    dedup_memory_mb: int = field(
        default=1000,
        metadata={
            "help": "Megabytes that removing passages may take beside the rest of the process; less is slower. It does "
            "not change the result."
        },
    )

    def __post_init__(self) -> None:
        size, similarity = self.dedup_substring_bytes, self.near_dedup_similarity
        if size is not None and not SMALLEST_MIN_BYTES <= size <= MAX_WINDOW_BYTES:
            raise DataError(
                f"dedup_substring_bytes must lie between {SMALLEST_MIN_BYTES} and {MAX_WINDOW_BYTES}, got {size}"
            )
        if similarity is not None and not 0 < similarity <= 1:
            raise DataError(f"near_dedup_similarity must be above 0 and at most 1, got {similarity}")
        if self.dedup_memory_mb < SMALLEST_MEMORY_MB:
            raise DataError(f"dedup_memory_mb must be at least {SMALLEST_MEMORY_MB}, got {self.dedup_memory_mb}")


def find_near_duplicates(
    documents: Iterable[str],
    similarity: float,
    work_folder: Path,
    on_progress: OnProgress = lambda step, num_bytes, total: None,
) -> np.ndarray:
    """
    Whether each document nearly equals an earlier one, (N,) bool, so that the first of those alike is False.

    Two documents are alike if their sets of runs of five words have a Jaccard similarity of at least `similarity`, as
    128 minima of hashes (MinHash, Broder 1997; rensa's) estimate it: the standard error is 0.035 at 0.8. Case and signs
    do not count; a shorter document is one run, and one without words is like no other. Candidates are documents that
    agree in one of the bands of minima (locality-sensitive hashing), which finds 99 % of those at `similarity` and
    more of those above. A document is compared with those of its band that are like none before them, the first 64.

    Memory: about 50 bytes a document, and 50 MB. `work_folder` holds about 700 bytes a document until the end. The
    result depends on the documents and their order only.
    """
    num_bands, band_rows = choose_bands(similarity)
    with tempfile.TemporaryDirectory(dir=work_folder, prefix=".minhash") as name:
        folder = Path(name)
        bands = [folder / f"band{band}" for band in range(num_bands)]
        total_bytes = 0
        has_words: list[np.ndarray] = [np.zeros(0, dtype=bool)]
        with ExitStack() as stack:
            signature_file = stack.enter_context(open(folder / "signatures", "wb"))
            band_files = [stack.enter_context(open(path, "wb")) for path in bands]
            for signatures, with_words, num_bytes in _signatures(documents):
                signature_file.write(signatures.tobytes())
                for band, file in enumerate(band_files):
                    columns = signatures[:, band * band_rows : (band + 1) * band_rows]
                    file.write(hash_sequences(columns.astype(np.uint64)).tobytes())
                has_words.append(with_words)
                total_bytes += num_bytes
                on_progress("hashing documents", num_bytes, None)
        compared = np.concatenate(has_words)
        repeated = np.zeros(len(compared), dtype=bool)
        for band, path in enumerate(bands):
            if compared.any():
                _compare_band(path, folder / "signatures", similarity, compared, repeated)
            done = total_bytes * (band + 1) // num_bands - total_bytes * band // num_bands
            on_progress("comparing documents", done, total_bytes)
    return repeated


def choose_bands(similarity: float, recall: float = BAND_RECALL) -> tuple[int, int]:
    """How many bands of how many minima: the longest ones in one of which this share of pairs so similar agree."""
    for rows in range(NUM_PERMUTATIONS, 1, -1):
        bands = NUM_PERMUTATIONS // rows
        if 1 - (1 - similarity**rows) ** bands >= recall:
            return bands, rows
    return NUM_PERMUTATIONS, 1


def hash_sequences(values: np.ndarray) -> np.ndarray:
    """A hash of each row of (N, M) uint64, (N,)."""
    result = np.zeros(len(values), np.uint64)
    for column in values.T:
        result = mix64(result * BASE + column)
    return result


def _signatures(documents: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """
    The minima of some documents, (n, 128) uint32, whether they have words (n,), and their bytes.

    Long documents are hashed in pieces, so that memory stays small; the few runs across a cut are left out.
    """
    pieces: list[bytes] = []
    firsts: list[int] = []
    num_bytes = 0
    for document in documents:
        content = document.encode("utf-8", "surrogatepass")
        firsts.append(len(pieces))
        for start in range(0, max(1, len(content)), PIECE_BYTES):
            piece = content[start : start + PIECE_BYTES]
            pieces.append(piece)
            num_bytes += len(piece)
        if num_bytes >= PIECE_BYTES:
            yield *_hash_pieces(pieces, firsts), num_bytes
            pieces, firsts, num_bytes = [], [], 0
    if firsts:
        yield *_hash_pieces(pieces, firsts), num_bytes


def _hash_pieces(pieces: list[bytes], firsts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    minima, counts = [], []
    low = 0
    while low < len(pieces):
        high, size = low, 0
        while high < len(pieces) and size < PIECE_BYTES:
            size += len(pieces[high])
            high += 1
        hashes, bounds = shingle_hashes(pieces[low:high])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, bounds, NUM_PERMUTATIONS, MINHASH_SEED)
        minima.append(np.array(matrix.to_rows(), dtype=np.uint32))
        counts.append(np.diff(bounds))
        low = high
    signatures = np.minimum.reduceat(np.concatenate(minima), firsts, axis=0)
    return signatures, np.add.reduceat(np.concatenate(counts), firsts) > 0


def shingle_hashes(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """
    Hashes of the runs of five words of each text, (S,) uint64, and where those of each text start and end, (N + 1,).

    Words are runs of letters, digits and characters beyond ASCII. A text of fewer words than five is one run.
    """
    joined = np.frombuffer(b" ".join([*texts, b""]), np.uint8)
    letters = WORD_BYTES[joined]
    edges = np.flatnonzero(np.diff(letters != 0, prepend=False))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    text_starts = np.cumsum([0, *(len(text) + 1 for text in texts)])
    bounds = np.searchsorted(starts, text_starts)  # (N + 1,) in words
    if not len(starts):
        return np.zeros(0, np.uint64), bounds.astype(np.uint64)
    firsts = np.cumsum(lengths) - lengths
    letters = letters[letters != 0]
    places = np.arange(len(letters)) - np.repeat(firsts, lengths)  # of each letter in its word
    words = np.add.reduceat(mix64(places.astype(np.uint64) * np.uint64(256) + letters), firsts)

    text_of = np.append(np.repeat(np.arange(len(texts)), np.diff(bounds)), np.full(SHINGLE_WORDS - 1, -1))
    words = np.append(words, np.zeros(SHINGLE_WORDS - 1, np.uint64))
    num_words = len(starts)
    hashes = np.zeros(num_words, np.uint64)
    is_run = np.ones(num_words, dtype=bool)
    for shift in range(SHINGLE_WORDS):
        is_run = text_of[shift : shift + num_words] == text_of[:num_words]
        hashes = mix64(hashes * BASE + np.where(is_run, words[shift : shift + num_words], np.uint64(0)))
    # Runs are whole where the fifth word is there too; of shorter texts the first one counts.
    is_run[bounds[:-1][np.diff(bounds) > 0]] = True
    return hashes[is_run], np.append(0, np.cumsum(is_run))[bounds].astype(np.uint64)


def _compare_band(path: Path, signatures: Path, similarity: float, compared: np.ndarray, repeated: np.ndarray) -> None:
    """Mark in `repeated` the documents like an earlier one with the same hash of this band."""
    members = np.flatnonzero(compared & ~repeated)
    hashes = np.fromfile(path, np.uint64)[members]
    again = occurs_again(hashes)
    members, hashes = members[again], hashes[again]
    order = np.argsort(hashes, kind="stable")  # documents of a hash stay in reading order
    members, hashes = members[order], hashes[order]
    rows = np.memmap(signatures, np.uint32, "r").reshape(-1, NUM_PERMUTATIONS)
    for _ in range(MAX_LEADERS):
        is_leader = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
        if is_leader.all():
            return
        leaders = members[is_leader][np.cumsum(is_leader) - 1][~is_leader]
        members, hashes = members[~is_leader], hashes[~is_leader]
        alike = np.zeros(len(members), dtype=bool)
        for start in range(0, len(members), PAIRS_AT_ONCE):
            pairs = slice(start, start + PAIRS_AT_ONCE)
            agreeing = (rows[members[pairs]] == rows[leaders[pairs]]).sum(axis=1)
            alike[pairs] = agreeing >= similarity * NUM_PERMUTATIONS
        repeated[members[alike]] = True
        members, hashes = members[~alike], hashes[~alike]
