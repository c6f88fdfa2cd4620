"""Which documents to keep: rules that need no model, and dropped documents for a person to read."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from .errors import DataError
from .languages import LANGUAGES, SCRIPTS, count_characters, is_in_language, language_code

TOO_SHORT = "too few characters"
TOO_LONG = "too many characters"
FEW_LETTERS = "too few letters"
MANY_URLS = "too many URLs"
REPEATED_LINES = "repeated lines"
REPEATED_NGRAMS = "repeated n-grams"
OTHER_LANGUAGE = "another language"
MANY_TOKENS = "too many tokens per character"

URL = re.compile(r"(?:https?|ftp)://\S+|www\.\S+")
NGRAM_WORDS = 5
# n-grams are looked at in pieces of so many bytes; the few across a cut are left out.
PIECE_BYTES = 65536
BASE = 0x7F4A7C15  # any odd number has an inverse modulo 2**32
POWERS = np.multiply.accumulate(np.full(PIECE_BYTES, BASE, np.uint32), dtype=np.uint32)
INVERSE_POWERS = np.multiply.accumulate(np.full(PIECE_BYTES, pow(BASE, -1, 2**32), np.uint32), dtype=np.uint32)
SAMPLE_CHARACTERS = 2000


@dataclass
class FilterArguments:
    """Rules that drop documents, each off unless it is set."""

    max_tokens_per_character: float | None = field(
        default=None,
        metadata={
            "help": "Keep documents with fewer tokens than this times their characters: the paper's compressibility "
            "rule (0.3, in the final recipe 0.25), which drops what the tokenizer has not met: code, tables, other "
            "languages."
        },
    )
    drop_below_characters: int | None = field(
        default=None,
        metadata={"help": "Drop documents of fewer characters (Gopher, Rae et al. 2021: 50 words, about 300)."},
    )
    drop_above_characters: int | None = field(
        default=None,
        metadata={"help": "Drop documents of more characters (Gopher: 100,000 words, about 600,000)."},
    )
    min_letter_share: float | None = field(
        default=None,
        metadata={"help": "Letters among the characters that are not white space, at least: prose has above 0.9."},
    )
    max_repeated_line_share: float | None = field(
        default=None,
        metadata={"help": "Characters in lines that stood before, at most (Gopher, Rae et al. 2021: 0.2)."},
    )
    max_repeated_ngram_share: float | None = field(
        default=None,
        metadata={
            "help": "Runs of five words that stood before, at most, as a share of all runs of five words (Gopher, "
            "Rae et al. 2021: 0.15, there of characters)."
        },
    )
    max_url_share: float | None = field(
        default=None, metadata={"help": "Characters in web addresses, at most; 0.2 finds lists of links."}
    )
    keep_language: str | None = field(
        default=None,
        metadata={
            "help": f"Keep one language ({', '.join(LANGUAGES)}), told by its letters and its most frequent words, or "
            f"one script ({', '.join(SCRIPTS)}), which is all that characters tell of other languages. Words are looked "
            "at in three windows of 300 characters: a passage elsewhere escapes, and fewer than ten words tell little. "
            "A language beyond these is known by the frequent words it lacks: its close relatives may pass."
        },
    )
    sample_dropped: int = field(
        default=0, metadata={"help": "Write so many dropped documents for each reason, for a person to read."}
    )

    def __post_init__(self) -> None:
        for name in ("min_letter_share", "max_repeated_line_share", "max_repeated_ngram_share", "max_url_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise DataError(f"{name} is a share from 0 to 1, got {value}")
        if self.max_tokens_per_character is not None and not self.max_tokens_per_character > 0:
            raise DataError(f"max_tokens_per_character must be above 0, got {self.max_tokens_per_character}")
        lowest = 0 if self.drop_below_characters is None else self.drop_below_characters
        if lowest < 0 or (self.drop_above_characters is not None and self.drop_above_characters < max(1, lowest)):
            raise DataError(
                f"drop_below_characters {self.drop_below_characters} and drop_above_characters "
                f"{self.drop_above_characters} leave no document: both are positive, the second not below the first"
            )
        self.keep_language = language_code(self.keep_language)
        if self.keep_language is not None and self.keep_language not in (*LANGUAGES, *SCRIPTS):
            raise DataError(
                f"keep_language must be one of {', '.join(LANGUAGES)} or a script ({', '.join(SCRIPTS)}), got "
                f"{self.keep_language!r}"
            )
        if self.sample_dropped < 0:
            raise DataError(f"sample_dropped must be at least 0, got {self.sample_dropped}")


class DocumentFilter:
    """Answers for a document why it is dropped, or None. Rules that are cheap to check come first."""

    def __init__(self, arguments: FilterArguments):
        self.arguments = arguments

    def describe(self) -> dict[str, Any]:
        """The rules that are on, with their thresholds."""
        names = [rule.name for rule in dataclasses.fields(FilterArguments) if rule.name != "sample_dropped"]
        values = {name: getattr(self.arguments, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def check_text(self, document: str) -> str | None:
        """The reason for dropping a document by its text, or None. No text raises, not even half surrogate pairs."""
        a = self.arguments
        if a.drop_below_characters is not None and len(document) < a.drop_below_characters:
            return TOO_SHORT
        if a.drop_above_characters is not None and len(document) > a.drop_above_characters:
            return TOO_LONG
        if a.min_letter_share is not None or a.keep_language is not None:
            counts = count_characters(document)
            if a.min_letter_share is not None and counts.letter_share < a.min_letter_share:
                return FEW_LETTERS
            if a.keep_language is not None and not is_in_language(document, counts, a.keep_language):
                return OTHER_LANGUAGE
        if a.max_url_share is not None and url_share(document) > a.max_url_share:
            return MANY_URLS
        if a.max_repeated_line_share is not None and repeated_line_share(document) > a.max_repeated_line_share:
            return REPEATED_LINES
        if a.max_repeated_ngram_share is not None and repeated_ngram_share(document) > a.max_repeated_ngram_share:
            return REPEATED_NGRAMS
        return None

    def check_tokens(self, num_tokens: int, num_characters: int) -> str | None:
        """The reason for dropping a document by its number of tokens (no separators), or None."""
        limit = self.arguments.max_tokens_per_character
        return MANY_TOKENS if limit is not None and num_tokens >= limit * num_characters else None


def url_share(document: str) -> float:
    """Characters in web addresses among all characters."""
    if "://" not in document and "www." not in document:
        return 0.0
    return sum(map(len, URL.findall(document))) / len(document)


def repeated_line_share(document: str) -> float:
    """Characters in lines that stood before among the characters of all lines, without the white space around them."""
    lines = [line.strip() for line in document.split("\n")]
    characters = sum(map(len, lines))
    return (characters - sum(map(len, set(lines)))) / max(1, characters)


def repeated_ngram_share(document: str) -> float:
    """Runs of five words that stood before among all runs of five words."""
    encoded = np.frombuffer(document.encode("utf-8", "surrogatepass"), np.uint8)
    starts = range(0, len(encoded), PIECE_BYTES)
    hashes = np.concatenate([np.zeros(0, np.uint32), *(_hash_ngrams(encoded[s : s + PIECE_BYTES]) for s in starts)])
    hashes.sort()
    return np.count_nonzero(hashes[1:] == hashes[:-1]) / max(1, len(hashes))


def _hash_ngrams(encoded: np.ndarray) -> np.ndarray:
    """
    A 32-bit hash for each run of five words in (n,) bytes: the polynomial of its bytes at BASE, white space as 0.

    With running sums a run costs one subtraction, and a product that shifts it to the same power as its copies.
    """
    is_word = encoded > 32
    begins = is_word.copy()
    begins[1:] &= ~is_word[:-1]
    starts = np.flatnonzero(begins)
    sums = np.cumsum((encoded * is_word).astype(np.uint32) * POWERS[: len(encoded)], dtype=np.uint32)
    before = np.append(sums[starts] - encoded[starts] * POWERS[starts], sums[-1:])  # what lies before each word
    return (before[NGRAM_WORDS:] - before[:-NGRAM_WORDS]) * INVERSE_POWERS[starts[: -NGRAM_WORDS + 1]]


class DroppedSamples:
    """
    Up to `limit` dropped documents for each reason: those whose content has the lowest hashes, so that the choice
    depends on the documents alone and not on their order, batches or workers. Equal documents count once.

    `by_reason` holds {reason: {hash: {"characters", "text"}}}, plain values to keep as JSON and to start from again.
    """

    def __init__(self, limit: int, by_reason: dict[str, dict[str, dict[str, Any]]] | None = None):
        self.limit = limit
        self.by_reason = {} if by_reason is None else by_reason

    def add(self, reason: str, document: str) -> None:
        """Offer a dropped document; of its text the first 2000 characters are kept."""
        if self.limit:
            key = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            self._offer(reason, key, {"characters": len(document), "text": document[:SAMPLE_CHARACTERS]})

    def merge(self, other: "DroppedSamples") -> None:
        """Take over what another collection holds, as if its documents had been offered here."""
        for reason, records in other.by_reason.items():
            for key, record in records.items():
                self._offer(reason, key, record)

    def _offer(self, reason: str, key: str, record: dict[str, Any]) -> None:
        records = self.by_reason.setdefault(reason, {})
        records[key] = record
        if len(records) > self.limit:
            del records[max(records)]

    def write(self, folder: Path) -> None:
        """Write `<reason>.jsonl` files into `folder`, a document a line in the order of the hashes."""
        contents = {}
        for reason, records in self.by_reason.items():
            lines = [json.dumps({"reason": reason, **records[key]}) + "\n" for key in sorted(records)]
            contents[re.sub(r"\W+", "_", reason) + ".jsonl"] = "".join(lines).encode()
        write_atomically(folder, contents)
