"""Load a checkpoint as a classifier for a task: tokenizer, configuration, a new head; and the hash that names it."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .data.errors import DataError
from .data.tokenization import read_tokenizer
from .fine_tuning_args import EncoderArguments
from .glue import GlueError
from .glue_data import TaskData
from .model_files import LOADING_ERRORS, content_of, has_file, hash_of, loading_cause
from .out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

# Few different lengths: kernels are made for each shape on CPUs (oneDNN), and tensor cores want multiples of 8.
PADDING_MULTIPLE = 8
# Classes whose heads may go by the names of a sequence classifier's.
OTHER_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification")


def fingerprint(encoder: EncoderArguments) -> str:
    """A hash of what is fine-tuned: the settings of the encoder, and the model as in [`name_model`]."""
    settings = asdict(encoder)
    del settings["trust_remote_code"], settings["model_name_or_path"], settings["model_revision"]
    origin, files = content_of(encoder.model_name_or_path, encoder.model_revision)
    return hash_of({**settings, **origin}, files)


def pin(encoder: EncoderArguments) -> EncoderArguments:
    """The encoder at the commit that its revision names now: a model of the Hub may change while it is scored."""
    name, revision = encoder.model_name_or_path, encoder.model_revision
    try:
        commit = content_of(name, revision)[0].get("commit")
    except LOADING_ERRORS:
        return encoder  # what loads it first says why
    # Of an adapter the model is in another repository, whose commits are others.
    if commit is None or has_file(name, "adapter_config.json", commit):
        return encoder
    return replace(encoder, model_revision=commit)


def load_tokenizer(encoder: EncoderArguments) -> PreTrainedTokenizerBase:
    """
    The checkpoint's tokenizer, which tells the texts of a pair apart (`token_type_ids`) where the model does: in its
    embeddings, or in the classifier's pooling. Raises [`GlueError`] where there is none.
    """
    config = load_config(encoder).to_dict()
    has_segments = config.get("classifier_pooling") == "segments" or (config.get("type_vocab_size") or 0) > 1
    try:
        tokenizer = read_tokenizer(encoder.model_name_or_path, encoder.trust_remote_code, encoder.model_revision)
    except DataError as error:
        raise GlueError(f"model_name_or_path: {error}") from error
    if tokenizer.pad_token is None:
        raise GlueError(f"model_name_or_path: the tokenizer of {encoder.model_name_or_path} has no pad_token: set one")
    if has_segments and "token_type_ids" not in tokenizer.model_input_names:
        tokenizer.model_input_names = [*tokenizer.model_input_names, "token_type_ids"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # so that it is saved with the model
    return tokenizer


def load_config(encoder: EncoderArguments, **kwargs: Any) -> Any:
    """The checkpoint's configuration with the encoder's dropout and pooling. Raises [`GlueError`]."""
    try:
        config = AutoConfig.from_pretrained(
            encoder.model_name_or_path,
            revision=encoder.model_revision,
            trust_remote_code=encoder.trust_remote_code,
        )
        # Not by from_pretrained, which holds them against what the file says of another task.
        for field, value in kwargs.items():
            setattr(config, field, value)
    except LOADING_ERRORS as error:
        name, revision = encoder.model_name_or_path, encoder.model_revision
        is_adapter = has_file(name, "adapter_config.json", revision) and not has_file(name, "config.json", revision)
        why = (
            "it is an adapter: merge it into its model first (merge_and_unload)"
            if is_adapter
            else loading_cause(error)
        )
        raise GlueError(f"model_name_or_path: no configuration loads from {name}: {why}") from error
    set_dropout(config, encoder.dropout)
    set_pooling(config, encoder.pooling)
    return config


def check_pairs(encoder: EncoderArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises [`GlueError`] where the classifier pools the texts of a pair apart, which the tokenizer cannot tell apart."""
    if load_config(encoder).to_dict().get("classifier_pooling") != "segments":
        return
    if 1 not in tokenizer("a", "b", return_token_type_ids=True)["token_type_ids"]:
        raise GlueError(
            f"pooling: segments tells the texts of a pair apart, and the tokenizer of {encoder.model_name_or_path} gives "
            "both the same token_type_ids: set --pooling mean or cls"
        )


def longest_example(encoder: EncoderArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Tokens of the longest example: `max_seq_length`, or what tokenizer and model can take, padding included, where that
    is less.
    """
    positions = load_config(encoder).to_dict().get("max_position_embeddings") or sys.maxsize
    longest = min(encoder.max_seq_length, tokenizer.model_max_length)
    padded = -longest % PADDING_MULTIPLE + longest
    return longest if padded <= positions else positions // PADDING_MULTIPLE * PADDING_MULTIPLE or positions


def build_classifier(encoder: EncoderArguments, data: TaskData) -> PreTrainedModel:
    """
    The checkpoint with a new head for the task, or random weights of the same shape, in fp32.

    Raises [`GlueError`] where the checkpoint or its class does not load.
    """
    labels = data.task.label_names
    kwargs: dict[str, Any] = {
        "num_labels": max(1, len(labels)),
        "problem_type": "single_label_classification" if labels else "regression",
    }
    if labels:
        kwargs["id2label"] = dict(enumerate(labels))
        kwargs["label2id"] = {label: number for number, label in enumerate(labels)}
    config = load_config(encoder, **kwargs)
    try:
        if encoder.from_scratch:
            return AutoModelForSequenceClassification.from_config(
                config, dtype=torch.float32, trust_remote_code=encoder.trust_remote_code
            )
        model, info = AutoModelForSequenceClassification.from_pretrained(
            encoder.model_name_or_path,
            revision=encoder.model_revision,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=encoder.trust_remote_code,
        )
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise GlueError(
            f"model_name_or_path: {encoder.model_name_or_path} does not load as a sequence classifier: {loading_cause(error)}"
        ) from error
    encoder_prefix = f"{model.base_model_prefix}."
    if any(name.endswith(OTHER_HEADS) for name in config.architectures or ()):
        renew_head(model, encoder_prefix)
    if misshapen := [name for name, *_ in info["mismatched_keys"] if name.startswith(encoder_prefix)]:
        raise GlueError(
            f"model_name_or_path: {len(misshapen)} weights of {encoder.model_name_or_path} do not have the shapes that "
            f"its config.json says, {min(misshapen)} among them"
        )
    missing = [name for name in info["missing_keys"] if name.startswith(encoder_prefix)]
    if missing:
        logger.warning(
            "%d weights of the encoder are not in %s and start at random, %s among them",
            len(missing), encoder.model_name_or_path, missing[0],
        )  # fmt: skip
    return model


@torch.no_grad()
def renew_head(model: PreTrainedModel, encoder_prefix: str) -> None:
    """Put random weights in the place of those that the head has learned on another task."""
    fresh = type(model)._from_config(model.config, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith(encoder_prefix):
            tensor.copy_(fresh[name])


def set_pooling(config: Any, pooling: str | None) -> None:
    """Set what the classifier reads. Raises [`GlueError`] where the model has no such choice."""
    if pooling is None:
        return
    if not hasattr(config, "classifier_pooling"):
        raise GlueError(f"pooling: {config.model_type} has no classifier_pooling; leave pooling out")
    try:
        config.classifier_pooling = pooling
    except StrictDataclassError as error:
        raise GlueError(f"pooling: {config.model_type} has no {pooling!r}: {' '.join(str(error).split())}") from error


def set_dropout(config: Any, dropout: float | None) -> None:
    """Set every dropout of a configuration; one that is `None` follows another and stays."""
    if dropout is not None:
        for name, value in config.to_dict().items():
            if "dropout" in name and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(config, name, dropout)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the bar and the table of new weights that every load prints: a new head is what is wanted here."""
    verbosity = transformers_logging.get_verbosity()
    shows_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bar:
            transformers_logging.enable_progress_bar()
