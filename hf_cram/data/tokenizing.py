"""Documents to tokens in worker processes: each document is filtered, tokenized once, and filtered by its tokens."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from accelerate.utils import patch_environment
from tokenizers import Tokenizer

from .filtering import DocumentFilter, DroppedSamples, FilterArguments
from .tokenization import NON_ASCII
from .workers import worker_pool

BATCHES_WAITING = 2  # beyond one for each worker, so that none has to wait for text
CACHED_WORDS = 500_000
CACHED_CHARACTERS = 20_000_000
NO_TOKENS = "no token of the vocabulary"
CHARACTERWISE_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFD", "StripAccents"}
ASCII_ONLY = {"type": "Replace", "pattern": {"Regex": NON_ASCII}, "content": ""}


class HasDocuments(Protocol):
    """A batch of documents, with whatever else its maker wants to find again."""

    documents: list[str]


Batch = TypeVar("Batch", bound=HasDocuments)


@dataclass(frozen=True)
class TokenizingSettings:
    """What turns documents into tokens; `tokenizer` must encode text as text, see [`plain_text_tokenizer`]."""

    tokenizer: Tokenizer
    dtype: np.dtype
    separator_id: int
    filters: FilterArguments


@dataclass
class TokenizedBatch:
    """
    The kept documents of a batch: `tokens` of all of them, a separator after each, and for each document its length
    with the separator, (d,) int64, and the hash of its tokens, (d,) uint64. `dropped` counts the others by reason.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    num_characters: int
    dropped: Counter[str]
    samples: DroppedSamples


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


def content_key(tokens: bytes) -> int:
    """64-bit hash of a document's tokens, the same in every run."""
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little")


class _WordEncoder:
    """Encodes each different word once: a language has few, and a dictionary is faster than any tokenizer."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.tokens_of_words: dict[str, bytes] = {}
        self.num_characters = 0

    def __call__(self, documents: list[str]) -> list[bytes]:
        if len(self.tokens_of_words) > CACHED_WORDS or self.num_characters > CACHED_CHARACTERS:
            self.tokens_of_words.clear()
            self.num_characters = 0
        words_of_documents = [document.replace("\n", " ").split(" ") for document in documents]
        known = self.tokens_of_words
        # Sorted, so that nothing depends on the order of a set.
        new_words = sorted(set().union(*words_of_documents).difference(known))
        encodings = self.tokenizer.encode_batch_fast(new_words, add_special_tokens=False)
        for word, encoding in zip(new_words, encodings, strict=True):
            known[word] = np.array(encoding.ids, dtype=self.dtype).tobytes()
            self.num_characters += len(word)
        return [b"".join(map(known.__getitem__, words)) for words in words_of_documents]


class _DocumentEncoder:
    """Encodes whole documents, for tokenizers whose words hang together."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        self.tokenizer = tokenizer
        self.dtype = dtype

    def __call__(self, documents: list[str]) -> list[bytes]:
        encodings = self.tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype).tobytes() for encoding in encodings]


class DocumentTokenizer:
    """Filters and tokenizes batches of documents, see [`TokenizedBatch`]."""

    def __init__(self, settings: TokenizingSettings):
        encoder = _WordEncoder if has_independent_words(settings.tokenizer) else _DocumentEncoder
        self.encode = encoder(settings.tokenizer, settings.dtype)
        self.dtype = settings.dtype
        self.separator = np.array([settings.separator_id], dtype=settings.dtype).tobytes()
        self.filter = DocumentFilter(settings.filters)
        self.sample_dropped = settings.filters.sample_dropped

    def __call__(self, documents: list[str]) -> TokenizedBatch:
        dropped: Counter[str] = Counter()
        samples = DroppedSamples(self.sample_dropped)

        def keeps(document: str, reason: str | None) -> bool:
            if reason is not None:
                dropped[reason] += 1
                samples.add(reason, document)
            return reason is None

        documents = [document for document in documents if keeps(document, self.filter.check_text(document))]
        kept = [
            (document, tokens)
            for document, tokens in zip(documents, self.encode(documents), strict=True)
            if keeps(document, self._check_tokens(document, tokens))
        ]
        encoded = [tokens for _, tokens in kept]
        return TokenizedBatch(
            tokens=np.frombuffer(self.separator.join([*encoded, b""]), dtype=self.dtype),
            lengths=np.fromiter(map(len, encoded), np.int64, len(kept)) // self.dtype.itemsize + 1,
            keys=np.fromiter(map(content_key, encoded), np.uint64, len(kept)),
            num_characters=sum(len(document) for document, _ in kept),
            dropped=dropped,
            samples=samples,
        )

    def _check_tokens(self, document: str, tokens: bytes) -> str | None:
        if not tokens:
            return NO_TOKENS
        return self.filter.check_tokens(len(tokens) // self.dtype.itemsize, len(document))


# Of a worker process: set when it starts.
_tokenize_in_worker: DocumentTokenizer | None = None


def _start_worker(settings: TokenizingSettings) -> None:
    global _tokenize_in_worker
    _tokenize_in_worker = DocumentTokenizer(settings)


def _tokenize_batch_in_worker(documents: list[str]) -> TokenizedBatch:
    assert _tokenize_in_worker is not None
    return _tokenize_in_worker(documents)


def tokenize_batches(
    batches: Iterable[Batch], settings: TokenizingSettings, workers: int
) -> Generator[tuple[Batch, TokenizedBatch]]:
    """
    Each batch with its tokens, in order; what comes out does not depend on the number of workers.

    The batches are read a few ahead of the one handed over: one for each worker and two more.
    """
    batches = iter(batches)
    here = DocumentTokenizer(settings)
    if workers == 1:
        yield from ((batch, here(batch.documents)) for batch in batches)
        return
    # A small text is done before the workers have started.
    for batch in batches:
        yield batch, here(batch.documents)
        break
    second = next(batches, None)
    if second is None:
        return
    way_out = "lower preprocessing_workers; what is finished is kept"
    no_threads = patch_environment(TOKENIZERS_PARALLELISM="false")  # said before a fork, it spares a warning
    with no_threads, worker_pool(workers, "tokenizes", way_out, _start_worker, settings) as pool:

        def submit(batch: Batch) -> tuple[Batch, Future[TokenizedBatch]]:
            return batch, pool.submit(_tokenize_batch_in_worker, batch.documents)

        yield from _in_order(submit, second, batches, workers + BATCHES_WAITING)


def _in_order(
    submit: Callable[[Batch], tuple[Batch, Future[TokenizedBatch]]],
    first: Batch,
    others: Iterable[Batch],
    in_flight: int,
) -> Iterator[tuple[Batch, TokenizedBatch]]:
    pending = deque([submit(first)])
    for batch in others:
        pending.append(submit(batch))
        if len(pending) >= in_flight:
            done, future = pending.popleft()
            yield done, future.result()
    while pending:
        done, future = pending.popleft()
        yield done, future.result()
