"""The examples of a task in token ids."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .glue import GlueError, Task
from .glue_data import TaskData

logger = logging.getLogger(__name__)

UNREAD_TOLD, UNREAD_REFUSED = 0.01, 0.5


@dataclass
class EncodedTask:
    """A task in token ids, encoded once for all seeds."""

    data: TaskData
    train: list[dict[str, Any]]
    validation: dict[str, list[dict[str, Any]]]
    test: dict[str, list[dict[str, Any]]]

    @property
    def largest_token_id(self) -> int:
        """The largest token id of all splits."""
        splits = [self.train, *self.validation.values(), *self.test.values()]
        return max(max(example["input_ids"], default=0) for split in splits for example in split)


def encode_task(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_train_samples: int | None = None,
) -> EncodedTask:
    """Encode every split; `max_train_samples` keeps a random part of training, the same for every model and seed."""
    train = data.train
    if max_train_samples is not None and max_train_samples < len(train):
        train = train.shuffle(seed=0).select(range(max_train_samples))
    encoded = encode(train, data.task, tokenizer, max_length)
    _check_read(train, data.task, encoded, tokenizer)
    return EncodedTask(
        data,
        encoded,
        {column: encode(split, data.task, tokenizer, max_length) for column, split in data.validation.items()},
        {name: encode(split, data.task, tokenizer, max_length) for name, split in data.test.items()},
    )


def _check_read(
    dataset: Dataset, task: Task, encoded: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises [`GlueError`] where the tokenizer can read hardly any of the texts, and warns where it cannot read some."""
    special = set(tokenizer.all_special_ids)  # [UNK] among them
    texts = zip(*(dataset[column] for column in task.text_columns), strict=True)
    has_text = [any(text is not None and str(text).strip() for text in row) for row in texts]
    unread = sum(has and special.issuperset(row["input_ids"]) for has, row in zip(has_text, encoded, strict=True))
    share = unread / max(1, sum(has_text))
    told = f"{task.name}: of {share:.0%} of the training texts the model's tokenizer knows no word or letter"
    if share > UNREAD_REFUSED:
        raise GlueError(f"{told}: fine-tune a model that reads their script")
    if share > UNREAD_TOLD:
        logger.warning("%s", told)


def encode(dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """One dict of the model's inputs an example, cut to `max_length` tokens, with its `label` where there is one."""
    texts = [["" if text is None else str(text) for text in dataset[column]] for column in task.text_columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    columns = {key: encoded[key] for key in encoded}
    if "label" in dataset.column_names:
        columns["label"] = list(dataset["label"])
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
