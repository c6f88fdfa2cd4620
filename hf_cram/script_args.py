"""What a training recipe may hold beside the Trainer's fields, for the main job and every program that reads its recipe."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

import yaml

from .configuration_crammed_bert import CrammedBertConfig
from .data.collator import check_replacement, parse_phases
from .data.data_card import check_language, check_license
from .data.errors import DataError
from .data.pipeline import DataArguments
from .data.publish import PublishArguments
from .data.tokenization import load_tokenizer
from .recipes import ModelArguments
from .training_args import CramTrainingArguments


@dataclass
class MaskingArguments:
    """How tokens are masked in training."""

    mlm_probability: str = field(
        default="0.25",
        metadata={"help": "Share of the tokens to predict, or phases of the budget: '0:0.30,0.5:0.15'."},
    )
    mask_replace_prob: float = field(default=0.8, metadata={"help": "Share of them shown as [MASK]."})
    random_replace_prob: float = field(default=0.1, metadata={"help": "Share of them shown as a random token."})

    def __post_init__(self) -> None:
        parse_phases(str(self.mlm_probability))
        check_replacement(self.mask_replace_prob, self.random_replace_prob)


@dataclass
class TextBudgetArguments:
    """How much of the text to prepare."""

    text_for_budget: bool | None = field(
        default=None,
        metadata={
            "help": "Prepare no more text than the run can consume, by the measured speed of the model and with a "
            "reserve; default: where the text streams. max_train_tokens sets the number by hand."
        },
    )


@dataclass
class CardArguments:
    """What the model card says of text and model."""

    language: str = field(default="en", metadata={"help": "Language of the text, a code of the Hub; none: left out."})
    model_license: str = field(
        default="apache-2.0", metadata={"help": "Licence of the model, an identifier of the Hub; none: left out."}
    )

    def __post_init__(self) -> None:
        self.language = check_language("language", self.language) or ""
        self.model_license = check_license("model_license", self.model_license) or ""

    @property
    def metadata(self) -> dict[str, str | None]:
        """What was said, as the front matter of a card names it; `None` leaves one out."""
        values = {"language": self.language, "license": self.model_license}
        return {name: None if value == "none" else value for name, value in values.items() if value}


@dataclass
class FineTunedCardArguments(CardArguments):
    """What the card of a model of own data says; nothing of what is not given."""

    language: str = field(
        default="",
        metadata={
            "help": "Language of your own data, a code of the Hub; none: left out; default: a local base model's."
        },
    )
    model_license: str = field(
        default="",
        metadata={
            "help": "Licence of the model of your own data, of the Hub's; none: left out; default: a local base model's."
        },
    )


RECIPE_PARTS = (
    ModelArguments,
    DataArguments,
    TextBudgetArguments,
    PublishArguments,
    MaskingArguments,
    CardArguments,
)

# Of the Trainer's own fields, those that a recipe is made of.
TRAINER_FIELDS = (
    "learning_rate", "lr_scheduler_kwargs", "per_device_train_batch_size", "per_device_eval_batch_size", "max_steps",
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed",
    "data_seed", "fp16", "bf16", "tf32", "activation_checkpointing", "train_sampling_strategy", "dataloader_num_workers",
    "neftune_noise_alpha",
)  # fmt: skip


def check_row_length(max_seq_length: int, max_position_embeddings: int) -> None:
    """Raises [`DataError`] for rows that are longer than the model's positions."""
    if max_seq_length > max_position_embeddings:
        raise DataError(
            f"max_seq_length ({max_seq_length}) is beyond max_position_embeddings ({max_position_embeddings}): raise "
            "the latter"
        )


def planned_config(model_args: Any, data_args: DataArguments) -> CrammedBertConfig:
    """
    The model of a recipe before its text is prepared: with the vocabulary of the named tokenizer, or as asked for. Raises
    [`DataError`].
    """
    check_row_length(data_args.max_seq_length, model_args.max_position_embeddings)
    name = data_args.tokenizer_name
    vocab_size = len(load_tokenizer(name)) if name else data_args.vocab_size
    return CrammedBertConfig(**asdict(model_args), vocab_size=vocab_size)


def shareable(given: dict[str, Any]) -> dict[str, Any]:
    """The recipe in plain values: the fields that decide the result, without what belongs to a machine or an account."""
    decisive = {*TRAINER_FIELDS, *CramTrainingArguments.__annotations__}
    parts = (ModelArguments, DataArguments, TextBudgetArguments, MaskingArguments)
    decisive |= {spec.name for part in parts for spec in fields(part)}
    local = {"train_files", "cache_dir", "overwrite_cache", "preprocessing_workers"}
    plain = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in given.items()
        if name in decisive - local and not is_local(name, value)
    }
    yaml.safe_dump(plain)  # a mistake of ours is to show before training
    return plain


def is_local(name: str, value: Any) -> bool:
    """Whether a field of the recipe names what is on this machine: a tokenizer, a data set, or a source of a mix."""
    if name in ("dataset_name", "tokenizer_name"):
        return os.path.exists(str(value))
    if name != "sources" or str(value).lower() == "none":
        return False
    sources = json.loads(value) if isinstance(value, str) else value
    return any(
        "train_files" in source or is_local("dataset_name", source.get("dataset_name")) for source in sources.values()
    )
