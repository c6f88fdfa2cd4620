"""
Text to rows: the steps in their order, each cached by what goes into it.

    python -m hf_cram.data.pipeline RECIPE [--field value ...]

prepares the text of a recipe and prints what each step read, kept and cost; training finds the rows in the cache.
"""

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from .cache import cached_entry, hash_of
from .deduplication import DeduplicationArguments
from .errors import REPEAT_TEXT, DataError, system_cause
from .filtering import FilterArguments
from .ordering import OrderingArguments
from .packing import PackedRows, token_dtype
from .published import PublishedCorpus, find_published_corpus
from .source_arguments import INSTALLED_DOCS, SourceArguments
from .sources import TextSource
from .stages import STATISTICS_NAME, PackingArguments, RowsStage, TokenizerStage, TokensStage
from .steps import StepRecord, format_table
from .texts import FORMAT_VERSION, Place, SourceText, deduplicate
from .tokenization import load_tokenizer


@dataclass
class DataArguments(SourceArguments, DeduplicationArguments, FilterArguments, PackingArguments, OrderingArguments):
    """Which text, what of it, which tokenizer, which rows in which order."""

    preprocessing_workers: int | None = field(
        default=None, metadata={"help": "Processes that filter and tokenize; default: one for each core."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where prepared text is kept; default: hf_cram in the Hugging Face cache."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare anew what the cache holds."})

    def __post_init__(self) -> None:
        SourceArguments.__post_init__(self)
        DeduplicationArguments.__post_init__(self)
        FilterArguments.__post_init__(self)
        PackingArguments.__post_init__(self)
        OrderingArguments.__post_init__(self)
        is_deduplicated = (self.near_dedup_similarity, self.dedup_substring_bytes) != (None, None)
        for name, source in self.named_sources().items():
            if is_deduplicated and source.max_passes > 1:
                raise DataError(
                    f"source {name!r}: deduplication would remove what max_passes repeats: leave one of them out"
                )
        if self.preprocessing_workers is not None and self.preprocessing_workers < 1:
            raise DataError(f"preprocessing_workers must be at least 1, got {self.preprocessing_workers}")


@dataclass
class PreparedCorpus:
    """
    Rows and tokenizer, ready for training; `statistics` counts documents, characters, tokens, rows, what was left out
    by reason, each source, and what each step cost. `settings` are those that a published corpus was made with.
    """

    directory: Path
    train_dataset: PackedRows
    eval_dataset: PackedRows
    tokenizer: PreTrainedTokenizerBase
    statistics: dict[str, Any]
    from_cache: bool
    settings: dict[str, Any] | None = None

    @property
    def table(self) -> str:
        """What each step read, kept and cost, and what was left out, for a person."""
        dropped = ", ".join(f"{reason} ({count:,})" for reason, count in self.statistics["dropped"].items())
        steps = format_table(StepRecord(**record) for record in self.statistics["steps"])
        return f"{steps}\ndropped: {dropped or 'nothing'}"

    @property
    def summary(self) -> str:
        """The table, and how many rows came of it."""
        rows = f"{len(self.train_dataset):,} rows to train on, {len(self.eval_dataset):,} held out"
        return f"{self.table}\n{rows}"


def prepare_corpus(
    arguments: DataArguments, given: Collection[str] = (), expected_id: str | None = None
) -> PreparedCorpus:
    """
    Read, deduplicate, filter, tokenize, pack and order the text, or find it in the cache.

    The cache knows the result of each step by the content of the text and by every setting that changes it. An entry
    appears when it is complete and is checked when it is read: nothing half-written is used. An interrupted run goes
    on behind the last step, or shard of tokens, that it has finished. A data set that holds a published corpus gives its
    rows as they are: what is `given` counts though it is a default, if it says how rows are read. Raises
    [`DataError`], also where the rows to be made would be others than those of `expected_id` (the `dataset_id` of a run
    that goes on).
    """
    place = Place(open_cache(arguments), arguments.overwrite_cache, arguments.preprocessing_workers)
    published = published_corpus(arguments)
    if published is not None:
        return open_published(published, arguments, place, given)
    source = SourceText(TextSource(arguments, place.cache, arguments.overwrite_cache, place.workers))
    text = deduplicate(source, arguments, place, arguments.token_limit)
    tokens = TokensStage(TokenizerStage(text, arguments, place), arguments, arguments)
    rows = RowsStage(tokens, arguments, arguments)
    if expected_id not in (None, rows.key):
        raise DataError(
            f"the run to resume has seen rows of the dataset {expected_id}, and these would be {rows.key}: {REPEAT_TEXT}"
        )
    directory, from_cache = rows.open()
    return open_corpus(directory, arguments.max_seq_length, from_cache, list(arguments.named_sources()))


def published_corpus(arguments: DataArguments) -> PublishedCorpus | None:
    """The published corpus that the data set holds, `None` where it is a text. Raises [`DataError`]."""
    if arguments.dataset_name in (None, INSTALLED_DOCS):
        return None
    return find_published_corpus(
        str(arguments.dataset_name),
        arguments.dataset_config_name,
        arguments.dataset_revision,
        arguments.text_column,
        described_only=arguments.dataset_data_dir is not None,  # a folder inside a data set is text
    )


def open_published(
    published: PublishedCorpus, arguments: DataArguments, place: Place, given: Collection[str] = ()
) -> PreparedCorpus:
    """The rows of a published corpus, through the cache. Raises [`DataError`] where the arguments ask for others."""
    published.check_arguments(arguments, given)
    entry = place.cache / "corpora" / hash_of(FORMAT_VERSION, "published", published.identity, published.config_name)
    directory, from_cache = cached_entry(entry, published.write, place.overwrite)
    corpus = open_corpus(directory, published.max_seq_length, from_cache)
    corpus.settings = published.description.get("settings", {})
    return corpus


def open_cache(arguments: DataArguments) -> Path:
    """The cache's folder. Raises [`DataError`] where it cannot be made."""
    cache = Path(arguments.cache_dir or Path(HF_HOME) / "hf_cram")
    try:
        cache = cache.expanduser()
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter for an unknown user's home
        raise DataError(f"cache_dir {cache} cannot be used: {system_cause(error)}") from error
    return cache


def open_corpus(
    directory: Path, max_seq_length: int, from_cache: bool, source_names: Sequence[str] | None = None
) -> PreparedCorpus:
    """A complete corpus on disk; it may have been made from the same text under other names than `source_names`."""
    statistics = json.loads((directory / STATISTICS_NAME).read_text(encoding="utf-8"))
    if source_names is not None:
        statistics["sources"] = dict(zip(source_names, statistics["sources"].values(), strict=True))
    tokenizer = load_tokenizer(directory / "tokenizer")
    dtype = token_dtype(len(tokenizer))
    return PreparedCorpus(
        directory=directory,
        train_dataset=PackedRows(directory / "train.bin", dtype, max_seq_length),
        eval_dataset=PackedRows(directory / "eval.bin", dtype, max_seq_length),
        tokenizer=tokenizer,
        statistics=statistics,
        from_cache=from_cache,
    )


if __name__ == "__main__":
    # The program reads recipes, which belong to a higher layer.
    from ..prepare import main

    sys.exit(main())
