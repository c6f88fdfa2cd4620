"""The steps from text to rows, each a cache entry that is known by all that goes into it."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import is_progress_bar_enabled

from ..files import link_or_copy
from .cache import MANIFEST_NAME, cached_entry, hash_of, is_complete
from .errors import DataError, TextChangedError
from .filtering import DocumentFilter, FilterArguments
from .ordering import HISTOGRAM_BINS, OrderingArguments, order_rows, order_settings
from .packing import pack_rows, token_dtype
from .source_arguments import SourceArguments
from .steps import StepRecord, measured_step, read_steps, write_steps
from .texts import CHARACTERS_FOR_A_TOKEN, FORMAT_VERSION, Place, Text
from .token_shards import SHARD_CHARACTERS, TokenShards, write_token_shards
from .tokenization import SMALLEST_VOCABULARY, load_tokenizer, saved_settings, tokenizer_settings, train_tokenizer
from .tokenizing import TokenizingSettings, plain_text_tokenizer
from .workers import available_workers

logger = logging.getLogger(__name__)

STATISTICS_NAME = "statistics.json"


@dataclass
class PackingArguments:
    """Tokenizer and rows."""

    tokenizer_name: str | None = field(
        default=None, metadata={"help": "An existing tokenizer by name or path; default: train one on the text."}
    )
    vocab_size: int = field(default=32768, metadata={"help": "Tokens of a trained tokenizer."})
    tokenizer_training_characters: int = field(
        default=1_000_000_000, metadata={"help": "Characters of text that a tokenizer is trained on, at most."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a row."})
    eval_rows: int = field(
        default=1024,
        metadata={
            "help": "Held-out rows, at most 5 %% of the text or, where no document is so short, one document's."
        },
    )
    max_train_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Stop reading the text when the documents kept have so many tokens for training. Default: all of "
            "it, or what a training run can consume (text_for_budget)."
        },
    )

    def __post_init__(self) -> None:
        for name in ("eval_rows", "tokenizer_training_characters"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_seq_length < 8:
            raise DataError(f"max_seq_length must be at least 8, got {self.max_seq_length}")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise DataError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, got {self.vocab_size}")
        if self.max_train_tokens is not None and self.max_train_tokens < 1:
            raise DataError(f"max_train_tokens must be at least 1, got {self.max_train_tokens}")

    @property
    def token_limit(self) -> int | None:
        """Tokens to keep for training and held-out rows together, None for all."""
        return None if self.max_train_tokens is None else self.max_train_tokens + self.eval_rows * self.max_seq_length


class TokenizerStage:
    """An existing tokenizer, or one trained on the text."""

    def __init__(self, text: Text, arguments: PackingArguments, place: Place):
        self.text = text
        self.arguments = arguments
        self.place = place

    @cached_property
    def key(self) -> str:
        """What the tokenizer is made of; an existing one is known by the content of its files."""
        a = self.arguments
        if a.tokenizer_name is not None:
            tokenizer = load_tokenizer(a.tokenizer_name)
            special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
            return hash_of(tokenizer.backend_tokenizer.to_str(), special)
        return hash_of(FORMAT_VERSION, self.text.identity, a.vocab_size, self._max_characters, tokenizers.__version__)

    @property
    def _max_characters(self) -> int:
        """Characters to train on at most: of a text that is limited to some tokens not much more than these take."""
        limit, most = self.arguments.token_limit, self.arguments.tokenizer_training_characters
        return most if limit is None else min(most, CHARACTERS_FOR_A_TOKEN * limit)

    @cached_property
    def steps(self) -> list[StepRecord]:
        """What training it cost; empty for an existing one."""
        return [] if self._entry is None else read_steps(self._entry)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._entry or str(self.arguments.tokenizer_name))

    @cached_property
    def _entry(self) -> Path | None:
        if self.arguments.tokenizer_name is not None:
            return None
        return cached_entry(self.place.cache / "tokenizers" / self.key, self._write, self.place.overwrite)[0]

    def _write(self, folder: Path) -> None:
        a, record = self.arguments, StepRecord("tokenizer", 0, None, 0, None)
        with measured_step(record, estimate_total=self._characters_to_read) as advance:
            documents = self._first_characters(record, advance)
            train_tokenizer(documents, a.vocab_size, show_progress=is_progress_bar_enabled()).save_pretrained(folder)
        self.text.check_unchanged()
        write_steps(folder, [record])

    def _characters_to_read(self) -> int | None:
        estimate = self.text.estimated_characters
        return None if estimate is None else min(estimate, self._max_characters)

    def _first_characters(self, record: StepRecord, advance: Callable[[int], None]) -> Iterator[str]:
        documents = characters = 0
        for document in self.text.documents():
            documents, characters = documents + 1, characters + len(document)
            advance(len(document))
            yield document
            if characters >= self._max_characters:
                break
        record.documents_in, record.characters_in = documents, characters


class TokensStage:
    """The text filtered and tokenized, in shards; an interrupted run goes on behind its last whole shard."""

    def __init__(self, tokenizer: TokenizerStage, filters: FilterArguments, arguments: SourceArguments):
        self.text = tokenizer.text
        self.tokenizer = tokenizer
        self.place = tokenizer.place
        self.filters = filters
        self.token_limit = tokenizer.arguments.token_limit
        self.counts_source_tokens = any(source.max_tokens for source in arguments.named_sources().values())

    @cached_property
    def key(self) -> str:
        rules = DocumentFilter(self.filters).describe()
        return hash_of(
            FORMAT_VERSION, self.text.identity, self.tokenizer.key, tokenizers.__version__, rules,
            self.filters.sample_dropped, self.token_limit, SHARD_CHARACTERS,
        )  # fmt: skip

    def open(self) -> tuple[TokenShards, list[StepRecord]]:
        """The shards, made where they are missing, and what they cost."""
        entry, _ = cached_entry(self._entry, self._write, self.place.overwrite, self._remove_unfinished)
        shards = TokenShards(entry / "shards", self.settings.dtype)
        if not shards.is_finished:
            raise DataError(f"{entry}: its shards are damaged: delete it, or set overwrite_cache")
        return shards, read_steps(entry)

    @property
    def _entry(self) -> Path:
        return self.place.cache / "tokens" / self.key

    @property
    def _unfinished(self) -> Path:
        """Beside the entry: what is whole in it outlives an interruption, and nobody takes it for the entry."""
        return self._entry.with_name(f"{self.key}.unfinished")

    def _remove_unfinished(self) -> None:
        shutil.rmtree(self._unfinished, ignore_errors=True)

    @cached_property
    def settings(self) -> TokenizingSettings:
        """What turns documents into tokens."""
        tokenizer = self.tokenizer.tokenizer
        backend = plain_text_tokenizer(tokenizer.backend_tokenizer)
        dtype = token_dtype(len(tokenizer))
        return TokenizingSettings(backend, dtype, int(tokenizer.sep_token_id), self.filters)

    @property
    def token_counter(self) -> Callable[[str], int] | None:
        """Counts the tokens of a text where a source is limited by them."""
        return self._count_tokens if self.counts_source_tokens else None

    def _write(self, folder: Path) -> None:
        settings, record = self.settings, StepRecord("filter and tokenize")
        if self.place.overwrite:
            self._remove_unfinished()
        try:
            with measured_step(record, estimate_total=lambda: self.text.estimated_characters) as advance:
                shards = write_token_shards(
                    self.text.documents(self.token_counter),
                    settings,
                    self._unfinished,
                    lambda: {"skipped": dict(self.text.report.counts), "sources": self.text.counts},
                    available_workers(self.place.workers),
                    self.token_limit,
                    advance,
                )
            self.text.check_unchanged()
        except TextChangedError:
            self._remove_unfinished()  # the key is that of the text as it was
            raise
        self.text.report.warn()
        record.documents_in, record.documents_out = shards.total("documents_in"), shards.total("documents")
        record.characters_in, record.characters_out = shards.total("characters_in"), shards.total("characters")
        record.tokens_out = shards.num_tokens
        write_steps(folder, [record])
        self._warn_of_too_few(shards.num_tokens)
        # In both places until the entry is in its own: a process that dies before loses no shard.
        shutil.copytree(self._unfinished, folder / "shards", copy_function=link_or_copy)

    def _warn_of_too_few(self, num_tokens: int) -> None:
        """Deduplication reads a limited text only so far: say so where that was not far enough."""
        if self.token_limit is None or num_tokens >= self.token_limit or not self.text.steps:
            return
        if (self.text.steps[0].characters_in or 0) >= CHARACTERS_FOR_A_TOKEN * self.token_limit:
            logger.warning(
                "%s tokens are left of the %s asked for: deduplication and filters have taken the rest of the %d "
                "characters read for each; a larger max_train_tokens reads more", f"{num_tokens:,}",
                f"{self.token_limit:,}", CHARACTERS_FOR_A_TOKEN,
            )  # fmt: skip

    def _count_tokens(self, text: str) -> int:
        return len(self.settings.tokenizer.encode(text, add_special_tokens=False).ids)


class RowsStage:
    """Training and held-out rows, the training rows in their order, with the tokenizer and all counts beside them."""

    def __init__(self, tokens: TokensStage, packing: PackingArguments, ordering: OrderingArguments):
        self.tokens = tokens
        self.packing = packing
        self.ordering = ordering
        self.place = tokens.place

    @cached_property
    def key(self) -> str:
        """That of the rows; another one where the same rows lie beside another configuration of an existing tokenizer."""
        if self.packing.tokenizer_name is None:
            return self._rows_key
        settings = tokenizer_settings(self.tokens.tokenizer.tokenizer)
        beside = saved_settings(self._rows_entry / "tokenizer")
        return self._rows_key if beside in (None, settings) else hash_of(self._rows_key, sorted(settings.items()))

    @cached_property
    def _rows_key(self) -> str:
        order = None if self.ordering.row_order == "none" else tuple(order_settings(self.ordering).values())
        return hash_of(FORMAT_VERSION, self.tokens.key, self.packing.max_seq_length, self.packing.eval_rows, order)

    @property
    def _rows_entry(self) -> Path:
        return self.place.cache / "corpora" / self._rows_key

    def open(self) -> tuple[Path, bool]:
        """
        The folder of the rows, made where it is missing, and whether it was there. The stages before it are asked for
        only when it is not.
        """
        return cached_entry(self.place.cache / "corpora" / self.key, self._write, self.place.overwrite)

    def _write(self, folder: Path) -> None:
        if self.key != self._rows_key and not self.place.overwrite and is_complete(self._rows_entry):
            others = shutil.ignore_patterns("tokenizer", MANIFEST_NAME)
            shutil.copytree(self._rows_entry, folder, ignore=others, copy_function=link_or_copy, dirs_exist_ok=True)
            self.tokens.tokenizer.tokenizer.save_pretrained(folder / "tokenizer")
            return
        shards, token_steps = self.tokens.open()
        tokenizer_stage = self.tokens.tokenizer
        text = self.tokens.text
        steps = [*text.steps, *tokenizer_stage.steps, *token_steps]
        record = StepRecord("pack", tokens_in=shards.num_tokens)
        with measured_step(record, "token", shards.num_tokens) as advance:
            counts = pack_rows(shards, self.packing.max_seq_length, self.packing.eval_rows, folder, advance)
        record.tokens_out = (counts["train_rows"] + counts["eval_rows"]) * self.packing.max_seq_length
        steps.append(record)
        position = shards.summaries[-1].position
        statistics: dict[str, Any] = {
            **{name: shards.total(name) for name in ("documents", "characters", "tokens")},
            **counts,
            "skipped": position["skipped"],
            "dropped": shards.dropped(),
            "sources": position["sources"],
            "removed": text.removed,
            "filters": DocumentFilter(self.tokens.filters).describe(),
        }
        if self.ordering.row_order != "none":
            statistics["row_scores"] = self._order(folder, shards.dtype, tokenizer_stage.tokenizer, steps)
        statistics["steps"] = [asdict(record) for record in steps]
        shards.samples(self.tokens.filters.sample_dropped).write(folder / "dropped")
        tokenizer_stage.tokenizer.save_pretrained(folder / "tokenizer")
        (folder / STATISTICS_NAME).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")

    def _order(
        self, folder: Path, dtype: np.dtype, tokenizer: PreTrainedTokenizerBase, steps: list[StepRecord]
    ) -> dict[str, Any]:
        """Put the training rows into their order; returns the order's settings and a histogram of the scores."""
        rows, length = folder / "train.bin", self.packing.max_seq_length
        record = StepRecord("order")
        with measured_step(record, "row") as bar:
            order, scores = order_rows(rows, rows, dtype, length, tokenizer, self.ordering, bar.show_part)
        record.tokens_in = record.tokens_out = len(order) * length
        steps.append(record)
        np.save(folder / "row_order.npy", order)
        counts, edges = np.histogram(scores, HISTOGRAM_BINS)
        return {**order_settings(self.ordering), "counts": counts.tolist(), "edges": edges.tolist()}
