"""Fine-tune any sequence classifier on one task with one seed."""

import contextlib
import copy
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import cached_file, extract_commit_hash
from transformers.utils import logging as transformers_logging

from .data.errors import DataError, first_line
from .data.tokenization import read_tokenizer
from .glue import GlueError, TaskData, encode
from .hardware import bf16_trains_faster, is_out_of_memory
from .optimization import decayed_parameter_names
from .training_args import OpenPrecisionArguments

logger = logging.getLogger(__name__)

# Few different lengths: kernels are made for each shape on CPUs (oneDNN), and tensor cores want multiples of 8.
PADDING_MULTIPLE = 8
# The content of a checkpoint, as far as it decides the scores.
HASHED_FILES = (
    "config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*.json", "vocab*", "merges.txt", "*.model",
    "special_tokens_map.json", "added_tokens.json", "*.py",
)  # fmt: skip
# What a checkpoint with missing, damaged or contradictory files raises.
LOADING_ERRORS = (
    AttributeError, LookupError, OSError, RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


@dataclass
class EncoderArguments:
    """Which checkpoint is fine-tuned, and how its head is put on."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub repository that AutoModel loads."})
    from_scratch: bool = field(
        default=False, metadata={"help": "Random weights of the same shape: the baseline without pretraining."}
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "Tokens of an example; longer ones are cut (paper: 128)."}
    )
    dropout: float | None = field(
        default=0.1,
        metadata={"help": "All of the model's dropouts while fine-tuning (paper: 0.1); none: the model's."},
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "help": "What the classifier reads, for models with classifier_pooling: cls, mean, or (the crammed BERT) "
            "segments: both texts of a pair apart; none: the model's."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run modelling code that lies in the checkpoint (hf_cram's own needs no such)."},
    )

    def __post_init__(self) -> None:
        if self.max_seq_length < 8:
            raise ValueError(f"max_seq_length must be at least 8 tokens, got {self.max_seq_length}")


@dataclass
class FineTuningArguments(OpenPrecisionArguments):
    """
    [`~transformers.TrainingArguments`] with the paper's protocol as default (section 5.1): 5 epochs of 16 examples, peak
    learning rate 4e-5, cosine after 10 % of warm-up.
    """

    per_device_train_batch_size: int = field(default=16, metadata={"help": "Examples of a step on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples of an evaluation batch."})
    num_train_epochs: float = field(
        default=5.0, metadata={"help": "Passes over the task (the paper's rule: at most 5)."}
    )
    learning_rate: float = field(default=4e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "One of transformers' schedules."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up, or their share where below 1."})
    weight_decay: float = field(default=0.01, metadata={"help": "On matrices and embeddings."})
    layer_lr_decay: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of a layer as a fraction of the one above it; embeddings are the lowest layer."
        },
    )
    head_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the new head in multiples of learning_rate."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "group_by_length pads least.", "choices": ["group_by_length", "random", "sequential"]},
    )
    save_strategy: SaveStrategy | str = field(default="no", metadata={"help": "Trainer checkpoints within a task."})
    logging_strategy: IntervalStrategy | str = field(default="no", metadata={"help": "Trainer logs within a task."})
    disable_tqdm: bool = field(
        default=True, metadata={"help": "The bar over tasks and seeds stands for the Trainer's."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Unused here: examples hold inputs only."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layer_lr_decay", "head_lr_multiplier"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.optim_args or self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError("fine-tuning is done with AdamW, by the paper's protocol: leave out optim and optim_args")

    def with_seed(self, seed: int) -> "FineTuningArguments":
        """A copy for one seed."""
        arguments = copy.copy(self)
        arguments.seed = arguments.data_seed = seed
        arguments.push_to_hub = False  # results are pushed, once all are there
        return arguments

    def with_setting(self, learning_rate: float, batch_size: int, num_train_epochs: float) -> "FineTuningArguments":
        """A copy for one point of a search."""
        arguments = copy.copy(self)
        arguments.learning_rate = learning_rate
        arguments.per_device_train_batch_size = batch_size
        arguments.num_train_epochs = num_train_epochs
        return arguments

    def set_precision(self, bf16: bool) -> None:
        """Train in bf16 autocast, or in what `fp16` says. Once a process: accelerate knows one precision."""
        self.bf16 = bf16
        self.mixed_precision = "fp16" if self.fp16 else "bf16" if bf16 else "no"

    @property
    def setting(self) -> dict[str, Any]:
        """What decides the scores, beside the model and the data."""
        names = (
            "learning_rate", "per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type", "warmup_steps",
            "weight_decay", "layer_lr_decay", "head_lr_multiplier", "adam_beta1", "adam_beta2", "adam_epsilon",
            "max_grad_norm", "max_steps", "bf16", "fp16", "gradient_accumulation_steps", "label_smoothing_factor",
            "lr_scheduler_kwargs", "train_sampling_strategy", "dataloader_drop_last", "neftune_noise_alpha",
            "train_batch_size",
        )  # fmt: skip
        setting = {name: getattr(self, name) for name in names}
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        return {**setting, "lr_scheduler_type": schedule, "world_size": self.world_size}


@dataclass
class PairResult:
    """One task with one seed: scores by column of the results, outputs of the test splits by file name."""

    scores: dict[str, dict[str, float]]
    test_outputs: dict[str, np.ndarray]
    train_seconds: float
    examples_per_second: float


def fingerprint(encoder: EncoderArguments) -> str:
    """
    A hash of what is fine-tuned: the settings of the encoder, and the name and commit on the Hub or, of a local folder,
    the content of config, weights and tokenizer.
    """
    settings = asdict(encoder)
    del settings["trust_remote_code"]
    folder = Path(encoder.model_name_or_path)
    if folder.is_dir():
        del settings["model_name_or_path"]
        return hash_of(
            settings, sorted({file for pattern in HASHED_FILES for file in folder.glob(pattern) if file.is_file()})
        )
    config_file = cached_file(encoder.model_name_or_path, "config.json", _raise_exceptions_for_missing_entries=False)
    return hash_of({**settings, "commit": extract_commit_hash(config_file, None)})


def hash_of(settings: Any, files: Sequence[Path] = ()) -> str:
    """Twelve hexadecimal digits that name settings and the content of files."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def load_tokenizer(encoder: EncoderArguments) -> PreTrainedTokenizerBase:
    """
    The checkpoint's tokenizer, which tells the texts of a pair apart (`token_type_ids`) where the classifier's pooling
    does. Raises [`GlueError`] where there is none.
    """
    pooling = getattr(load_config(encoder), "classifier_pooling", None)
    try:
        tokenizer = read_tokenizer(encoder.model_name_or_path, encoder.trust_remote_code)
    except DataError as error:
        raise GlueError(f"model_name_or_path: {error}") from error
    if tokenizer.pad_token is None:
        raise GlueError(f"model_name_or_path: the tokenizer of {encoder.model_name_or_path} has no pad_token: set one")
    if pooling == "segments" and "token_type_ids" not in tokenizer.model_input_names:
        tokenizer.model_input_names = [*tokenizer.model_input_names, "token_type_ids"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # so that it is saved with the model
    return tokenizer


def load_config(encoder: EncoderArguments, **kwargs: Any) -> Any:
    """The checkpoint's configuration with the encoder's dropout and pooling. Raises [`GlueError`]."""
    try:
        config = AutoConfig.from_pretrained(
            encoder.model_name_or_path, trust_remote_code=encoder.trust_remote_code, **kwargs
        )
    except LOADING_ERRORS as error:
        raise GlueError(
            f"model_name_or_path: no configuration loads from {encoder.model_name_or_path}: {cause(error)}"
        ) from error
    set_dropout(config, encoder.dropout)
    set_pooling(config, encoder.pooling)
    return config


def longest_example(encoder: EncoderArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Tokens of the longest example: `max_seq_length`, or what tokenizer and model can take, padding included, where that
    is less.
    """
    positions = load_config(encoder).to_dict().get("max_position_embeddings") or sys.maxsize
    longest = min(encoder.max_seq_length, tokenizer.model_max_length)
    padded = -longest % PADDING_MULTIPLE + longest
    return longest if padded <= positions else positions // PADDING_MULTIPLE * PADDING_MULTIPLE or positions


def cause(error: BaseException) -> str:
    """What went wrong, in one line: the first of a long story, all of a validation's."""
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())
    is_bare = isinstance(error, AttributeError | LookupError | TypeError)
    return f"{type(error).__name__}: {first_line(error)}" if is_bare else first_line(error)


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
            f"model_name_or_path: {encoder.model_name_or_path} does not load as a sequence classifier: {cause(error)}"
        ) from error
    encoder_prefix = f"{model.base_model_prefix}."
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


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_lr_decay: float, head_lr_multiplier: float
) -> list[dict[str, Any]]:
    """
    Groups of the optimiser by depth: layer `i` of `n` has `learning_rate * layer_lr_decay ** (n - 1 - i)`, what lies
    before the layers one step of decay less, the head `learning_rate * head_lr_multiplier`.
    """
    decayed = set(decayed_parameter_names(model))
    encoder = f"{model.base_model_prefix}."
    numbers = {
        name: int(match.group(1))
        for name, _ in model.named_parameters()
        if name.startswith(encoder) and (match := re.search(r"\.(\d+)\.", name))
    }
    layers = max(numbers.values(), default=-1) + 1
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(encoder):
            rate = learning_rate * head_lr_multiplier
        elif name in numbers:
            rate = learning_rate * layer_lr_decay ** (layers - 1 - numbers[name])
        else:
            below = "embed" in name
            rate = learning_rate * (layer_lr_decay**layers if below else 1.0)
        decay = weight_decay if name in decayed else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


class ProgressCallback(TrainerCallback):
    """Tells after each step how much of the training it was."""

    def __init__(self, advance: Callable[[float], None]):
        self.advance = advance

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.advance(1.0 / state.max_steps)


class OrderedEvaluationTrainer(Trainer):
    """
    A Trainer that predicts in the order of the data set (grouping by length would shuffle evaluation as well) and
    draws the order of training from its seed alone, so that all processes of a data-parallel run draw the same.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(self.args.seed)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)


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
    return EncodedTask(
        data,
        encode(train, data.task, tokenizer, max_length),
        {column: encode(split, data.task, tokenizer, max_length) for column, split in data.validation.items()},
        {name: encode(split, data.task, tokenizer, max_length) for name, split in data.test.items()},
    )


class FineTuner:
    """Trains and scores tasks with one encoder and one setting; `args.bf16` is decided (see [`set_precision`])."""

    def __init__(self, encoder: EncoderArguments, args: FineTuningArguments, tokenizer: PreTrainedTokenizerBase):
        self.encoder, self.args, self.tokenizer = encoder, args, tokenizer

    def run(
        self,
        task: EncodedTask,
        seed: int,
        score: Callable[[np.ndarray, Sequence[Any]], dict[str, float]],
        advance: Callable[[float], None] = lambda share: None,
        save_to: Path | None = None,
        working_folder: Path | None = None,
    ) -> PairResult:
        """
        Fine-tune on `task` with `seed` and score the last weights on its validation splits.

        Args:
            score: `(predictions, references) -> {metric: value}`; predictions are classes, or values of a regression.
            advance: told the share of the training that each step was.
            save_to: folder for the fine-tuned model.
            working_folder: where the Trainer writes, and deletes, its checkpoints; default: `output_dir`.
        """
        args = self.args.with_seed(seed)
        if working_folder is not None:
            args.output_dir = str(working_folder)
        set_seed(seed)
        model = self._build_classifier(task)
        set_seed(seed)  # the head of one architecture draws more numbers than that of another
        trainer = OrderedEvaluationTrainer(
            model,
            args,
            data_collator=DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=PADDING_MULTIPLE),
            train_dataset=task.train,
            processing_class=self.tokenizer,
            optimizers=(self._optimizer(model), None),
            callbacks=[ProgressCallback(advance)],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        scores = {
            column: score(predict(trainer, split, task.data), [example["label"] for example in split])
            for column, split in task.validation.items()
        }
        test_outputs = {name: predict(trainer, split, task.data) for name, split in task.test.items()}
        if save_to is not None:
            trainer.save_model(str(save_to))
        return PairResult(scores, test_outputs, seconds, float(trainer.state.epoch or 0) * len(task.train) / seconds)

    def _build_classifier(self, task: EncodedTask) -> PreTrainedModel:
        """The classifier on its device. Raises [`GlueError`] where it has no embedding for a token of the task."""
        with quiet_loading():
            model = build_classifier(self.encoder, task.data)
        vocab_size = model.config.to_dict().get("vocab_size")
        if vocab_size is not None and task.largest_token_id >= vocab_size:
            raise GlueError(
                f"model_name_or_path: the tokenizer of {self.encoder.model_name_or_path} gives token "
                f"{task.largest_token_id}, but its model has embeddings for {vocab_size} only"
            )
        return model.to(self.args.device)  # type: ignore[arg-type]

    def _optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        args = self.args
        groups = parameter_groups(
            model, args.learning_rate, args.weight_decay, args.layer_lr_decay, args.head_lr_multiplier
        )
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True)

    def prefers_bf16(self, task: EncodedTask) -> bool:
        """Whether bf16 autocast is faster than fp32 here, measured on a batch of middling length."""
        model = self._build_classifier(task)
        by_length = sorted(task.train, key=lambda example: len(example["input_ids"]))
        middle = max(0, len(by_length) // 2 - self.args.train_batch_size // 2)
        collator = DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=PADDING_MULTIPLE)
        batch = collator(by_length[middle : middle + self.args.train_batch_size])
        return bf16_trains_faster(model, {key: value.to(self.args.device) for key, value in batch.items()})


def predict(trainer: Trainer, examples: Sequence[dict[str, Any]], data: TaskData) -> np.ndarray:
    """Classes (or values) of the examples, in their order; they go through the model sorted by length, padding least."""
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    inputs = [{key: value for key, value in examples[index].items() if key != "label"} for index in order]
    logits = trainer.predict(inputs).predictions  # type: ignore[arg-type]
    logits = logits[0] if isinstance(logits, tuple) else logits
    outputs = logits[:, 0] if data.is_regression else logits.argmax(-1)
    restored = np.empty_like(outputs)
    restored[order] = outputs
    return restored


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
