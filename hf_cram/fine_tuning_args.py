"""The arguments of a fine-tuning: which checkpoint, by which protocol."""

import copy
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from .training_args import OpenPrecisionArguments

DEFAULTS = {spec.name: spec.default for spec in fields(TrainingArguments)}
# Fields of the Trainer that would change or break the scores, which the setting does not tell.
REFUSED_FIELDS = {
    "bf16_full_eval": "has no place here: scores have the precision of training; leave it out",
    "fp16_full_eval": "has no place here: scores have the precision of training; leave it out",
    "auto_find_batch_size": "would train with another batch than the results tell: set per_device_train_batch_size",
    "prediction_loss_only": "would leave no predictions to score: leave it out",
    "enable_jit_checkpoint": "would score what a signal has stopped half-way; finished pairs are kept anyway: leave it out",
    "load_best_model_at_end": "has no place here: the last weights are scored; leave it out",
    "metric_for_best_model": "has no place here: the last weights are scored; leave it out",
    "greater_is_better": "has no place here: the last weights are scored; leave it out",
    "hub_always_push": "has no place here: results are pushed at the end; leave it out",
    "eval_delay": "has no place here: each task is scored at its end; leave it out",
    "eval_strategy": "has no place here: each task is scored at its end; leave it out",
    "eval_steps": "has no place here: each task is scored at its end; leave it out",
    "eval_on_start": "has no place here: each task is scored at its end; leave it out",
    "eval_do_concat_batches": "has no place here: predictions are scored together; leave it out",
}


@dataclass
class EncoderArguments:
    """Which checkpoint is fine-tuned, and how its head is put on."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub repository that AutoModel loads."})
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model of the Hub; default: main."}
    )
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
        if self.model_revision is not None and Path(self.model_name_or_path).is_dir():
            raise ValueError(
                f"model_revision is of a model of the Hub, and {self.model_name_or_path} is a folder: leave it out"
            )
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
    embedding_lr_multiplier: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of the embeddings in multiples of what their depth gives; above 1 a small model learns "
            "better what words mean for the task."
        },
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
        for name, reason in REFUSED_FIELDS.items():
            if getattr(self, name) != DEFAULTS[name]:
                raise ValueError(f"{name} {reason}")
        if self.save_strategy == SaveStrategy.BEST:
            raise ValueError(
                "save_strategy best has no place here: the last weights are scored; set steps, epoch or no"
            )
        super().__post_init__()
        for name in ("layer_lr_decay", "head_lr_multiplier", "embedding_lr_multiplier"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs must be above 0, got {self.num_train_epochs}")
        for name in ("seed", "data_seed"):
            if getattr(self, name) != DEFAULTS[name]:
                raise ValueError(f"{name} is chosen by seeds: leave it out, and name one seed as '7,'")
        if self.resume_from_checkpoint:
            raise ValueError("an interrupted run goes on by itself: leave out resume_from_checkpoint")
        if self.optim_args or self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError("fine-tuning is done with AdamW, by the paper's protocol: leave out optim and optim_args")
        self._check_schedule()

    def _check_schedule(self) -> None:
        """What the Trainer would notice only after a model was loaded."""
        schedule = SchedulerType(self.lr_scheduler_type)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        try:
            get_scheduler(schedule, optimizer, 0, 1000, self.lr_scheduler_kwargs)  # type: ignore[arg-type]
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"lr_scheduler_kwargs do not suit lr_scheduler_type {schedule.value}: {error}") from error

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

    @property
    def setting(self) -> dict[str, Any]:
        """What decides the scores, beside the model and the data."""
        names = (
            "learning_rate", "per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type", "warmup_steps",
            "weight_decay", "layer_lr_decay", "head_lr_multiplier", "embedding_lr_multiplier", "adam_beta1",
            "adam_beta2", "adam_epsilon", "max_grad_norm", "max_steps", "bf16", "fp16",
            "gradient_accumulation_steps", "label_smoothing_factor", "lr_scheduler_kwargs", "train_sampling_strategy",
            "dataloader_drop_last", "neftune_noise_alpha", "train_batch_size",
        )  # fmt: skip
        setting = {name: getattr(self, name) for name in names}
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        return {**setting, "lr_scheduler_type": schedule, "world_size": self.world_size}


def check_given(given: Collection[str], args: FineTuningArguments) -> None:
    """Raises `ValueError` for steps of logs or checkpoints that are set while there are none."""
    for name, strategy in (("logging_steps", "logging_strategy"), ("save_steps", "save_strategy")):
        if name in given and getattr(args, strategy) == "no":
            raise ValueError(f"{name} does nothing by itself: set {strategy}: steps with it, or leave it out")
