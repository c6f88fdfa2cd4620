"""Arguments of a budgeted training run."""

import json
import logging
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy
from transformers.utils import is_liger_kernel_available

from .budget import Interval, build_lr_schedule, parse_duration

logger = logging.getLogger(__name__)

ADAMW_NAMES = ("adamw_torch", "adamw_torch_fused")
# Fields of the Trainer that mean nothing under a budget, and what does.
REPLACED_FIELDS = {
    "num_train_epochs": "time_budget or max_steps",
    "warmup_steps": "the rise in lr_scheduler_kwargs, in fractions of the budget (warmup; triangle2's and one_cycle's is "
    "peak_at)",
    "lr_scheduler_type": "lr_schedule",
}
REFUSED_FIELDS = {
    "bf16_full_eval": "has no place here: evaluation has the precision of training; leave it out",
    "fp16_full_eval": "has no place here: evaluation has the precision of training; leave it out",
    "remove_unused_columns": "has no place here: drop the columns from the data set, or leave it out",
    "save_only_model": "would leave checkpoints that no run can continue from: leave it out",
    "load_best_model_at_end": "has no place under a budget: the last model is the result; leave it out",
    "metric_for_best_model": "has no place under a budget: the last model is the result; leave it out",
    "hub_always_push": "has no place here: while one push runs, the newest checkpoint waits",
    "eval_delay": "has no place under a budget: set eval_interval; leave it out",
    "enable_jit_checkpoint": "has no place here: SIGTERM saves a checkpoint anyway; leave it out",
    "auto_find_batch_size": "restarts training inside the clock: set per_device_train_batch_size",
    "label_smoothing_factor": "would change the held-out loss as well: override compute_loss, and smooth while model.training",
    "dataloader_drop_last": "would leave held-out rows out: training has full batches anyway; leave it out",
}
STEPS_OF_STRATEGY = {
    "save_steps": ("save_strategy", "save_interval"),
    "logging_steps": ("logging_strategy", "logging_interval"),
    "eval_steps": ("eval_strategy", "eval_interval"),
}
# What spreads one model over processes, and the launcher's word for it.
SHARDING = {
    "fsdp": "ACCELERATE_USE_FSDP",
    "deepspeed": "ACCELERATE_USE_DEEPSPEED",
    "parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
OPTIM_ARG = re.compile(r"\s*\w+\s*=[^=]+")
SAMPLING_STRATEGIES = ("random", "sequential")


def resume_choice(value: str | bool | None) -> str | bool | None:
    """A checkpoint's folder, `True` for the last one, `None` for a new run; "true" and "false" are no folders."""
    text = str(value).strip().lower()
    if text == "true":
        return True
    return None if text in ("false", "none", "") else value


@dataclass
class OpenPrecisionArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] that leave bf16 open until it is measured, and know it on CPUs too."""

    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 autocast; default: whichever a short measurement finds faster."}
    )
    torch_compile: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "torch.compile; default: as the launcher says, else not."}
    )

    def __post_init__(self) -> None:
        if self.hub_token is not None:
            raise ValueError("hub_token would be written to training_args.bin: set HF_TOKEN or log in instead")
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{spec.name} must be a number, got {value}")
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
            self.use_cpu = True  # the launcher's --cpu, which moves the model whatever the base class says
        # The base class knows bf16 on GPUs only, and refuses it on a CPU that was not asked for by use_cpu.
        asked_for_bf16, self.bf16 = self.bf16, False
        launcher = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
        if (self.torch_compile_backend or "").lower() == "no":  # also of arguments that were copied
            self.torch_compile = False
        if self.torch_compile is False:  # the base class would compile for either of these
            self.torch_compile_backend = self.torch_compile_mode = None
        is_open = self.torch_compile is None and self.torch_compile_backend is None
        if is_open and launcher != "no":  # counts as told, as its --mixed_precision does
            self.torch_compile, self.torch_compile_backend = True, launcher
        self._check_compiling()
        try:
            super().__post_init__()
        except ImportError as error:  # deepspeed, fsdp, an optimiser of another package
            raise ValueError(" ".join(str(error).split())) from error
        if self.n_gpu > 1:
            # torch's DataParallel would leave out autocast and compiling.
            logger.warning(
                "One process uses one GPU, and %d are here: start one each by accelerate launch --num_processes %d",
                self.n_gpu, self.n_gpu,
            )  # fmt: skip
            self._n_gpu = 1
        if self.torch_compile is False:
            self.torch_compile_backend = "no"  # None would let the launcher's environment decide
        self._check_packages()
        self._set_bf16(asked_for_bf16)
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type == "cuda"

    def _check_compiling(self) -> None:
        if self.torch_compile_backend is not None:
            names = [name.lower() for name in DynamoBackend.__members__]
            if self.torch_compile_backend.lower() not in names:
                raise ValueError(
                    f"torch_compile_backend must be one of {', '.join(names)}, got {self.torch_compile_backend!r}"
                )
        if self.torch_compile_mode is not None and self.torch_compile_backend in (None, "inductor"):
            from torch._inductor import list_mode_options

            if self.torch_compile_mode not in list_mode_options():
                modes = ", ".join(list_mode_options())
                raise ValueError(f"torch_compile_mode must be one of {modes}, got {self.torch_compile_mode!r}")

    def _check_packages(self) -> None:
        """What the Trainer would notice only after the text was prepared."""
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("use_liger_kernel: liger-kernel is not installed: pip install it, or leave it out")
        for name in self.report_to or ():
            if name in INTEGRATION_TO_CALLBACK and name not in (*get_available_reporting_integrations(), "flyte"):
                raise ValueError(f"report_to: {name} is not installed: install its package, or set report_to: none")
        if self.optim_args and not all(OPTIM_ARG.fullmatch(part) for part in str(self.optim_args).split(",")):
            raise ValueError(f"optim_args must be name=value,name=value, got {self.optim_args!r}")
        try:
            Trainer.get_optimizer_cls_and_kwargs(self)
        except ImportError as error:
            raise ValueError(f"optim: {' '.join(str(error).split())}") from error
        except ValueError as error:  # also of an optimiser that wants to see the model first
            if "could not convert" in str(error):
                raise ValueError(f"optim_args: {error}, in {self.optim_args!r}") from error

    def _set_bf16(self, asked_for: bool | None) -> None:
        if asked_for and self.fp16:
            raise ValueError("bf16 and fp16 are both true: choose one")
        if asked_for and self.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError("bf16: true, but this GPU has no bf16: use fp16: true")
        self.bf16 = asked_for
        if asked_for:
            self.mixed_precision = "bf16"
        elif asked_for is False and self.mixed_precision == "bf16":  # the launcher's
            self.mixed_precision = "no"

    def set_precision(self, bf16: bool) -> None:
        """Train in bf16 autocast, or in what `fp16` says. accelerate knows one precision at a time in a process."""
        self.bf16 = bf16
        self.mixed_precision = "fp16" if self.fp16 else "bf16" if bf16 else "no"


@dataclass
class CramTrainingArguments(OpenPrecisionArguments):
    """
    [`~transformers.TrainingArguments`] with a wall-clock budget. At least one of `time_budget` and `max_steps` is set;
    where both are, the run ends at whichever comes first, and what is scheduled follows the larger of the two used
    shares. `per_device_train_batch_size` is the micro-batch; optimiser steps accumulate micro-batches.
    """

    time_budget: str | None = field(
        default=None,
        metadata={
            "help": "Wall-clock time from the start of training, compiling, evaluating and saving included: '24h', "
            "'90m', '600s' or seconds; none: max_steps alone ends the run."
        },
    )
    lr_schedule: str = field(
        default="triangle2",
        metadata={
            "help": "Learning rate over the budget: triangle2 (the paper), linear, cosine, flat_then_linear, one_cycle "
            "or constant. Its shape goes into lr_scheduler_kwargs, in fractions of the budget."
        },
    )
    train_batch_rows: int | None = field(
        default=None,
        metadata={
            "help": "Rows of an optimiser step over all processes, a multiple of per_device_train_batch_size x "
            "processes; default: that product."
        },
    )
    batch_ramp_until: float = field(
        default=0.0,
        metadata={
            "help": "Fraction of the budget at which the batch, growing linearly from one micro-batch a process, "
            "reaches train_batch_rows (paper: 0.6); 0 starts with the full batch."
        },
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of Muon for the matrices of the layers (about 0.02); learning_rate is then AdamW's "
            "for the rest. Default: AdamW for all."
        },
    )
    embeddings_from_text: bool = field(
        default=False,
        metadata={
            "help": "Start the word embeddings from which tokens stand near each other in the text, counted on the clock "
            "in seconds, instead of noise; fills the neighbour table too."
        },
    )
    logging_interval: str | None = field(
        default=None, metadata={"help": "Log every '1%%' of the budget, or every '30s' of the clock."}
    )
    eval_interval: str | None = field(
        default=None, metadata={"help": "Evaluate every '10%%' of the budget, or every '30m' of the clock."}
    )
    save_interval: str | None = field(
        default=None, metadata={"help": "Save a checkpoint every '10%%' of the budget, or every '30m' of the clock."}
    )
    ddp_timeout: int = field(
        default=7 * 24 * 3600,
        metadata={"help": "Seconds that processes wait for each other: the first one may prepare a text for hours."},
    )
    max_nonfinite_steps: int = field(
        default=10,
        metadata={"help": "Steps in a row with a loss or gradient that is not finite before the run stops."},
    )
    torch_compile: bool | None = field(
        default=None, metadata={"help": "Compile the model; default: where it can pay off inside the budget."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention while training: eager, sdpa, flash_attention_2 ...; default: the model's, but eager where it "
            "is faster, compiled in bf16 on a CPU without attention dropout."
        },
    )
    save_strategy: SaveStrategy | str = field(
        default="no", metadata={"help": "Save by steps instead of save_interval."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_strategy: IntervalStrategy | str = field(
        default="no", metadata={"help": "Log by steps instead of logging_interval."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Unused here: the collator chooses what it reads of a row."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for parameters without gradient in data-parallel runs (slow)."}
    )

    def __post_init__(self) -> None:
        self.time_budget_seconds: float | None = None
        if self.time_budget is not None:
            self.time_budget_seconds = parse_duration(self.time_budget)
        elif self.max_steps <= 0:
            raise ValueError("Nothing ends the run: set time_budget (for example '10m') or max_steps")
        self._check_fields()
        # Read once here: the coercions below must not change them, and a wrong interval is an error at start.
        for name in ("logging_interval", "eval_interval", "save_interval"):
            if getattr(self, name) is not None:
                Interval(getattr(self, name))
        if self.eval_interval is not None:
            self.do_eval = True
        # The sampler continues at the next unseen row by itself.
        self.ignore_data_skip = True
        self.resume_from_checkpoint = resume_choice(self.resume_from_checkpoint)  # type: ignore[assignment]
        self.lr_scheduler_kwargs = read_schedule_shape(self.lr_scheduler_kwargs)
        super().__post_init__()
        build_lr_schedule(self.lr_schedule, self.lr_schedule_shape)
        self._check_batch()

    @property
    def lr_schedule_shape(self) -> dict[str, Any]:
        """Shape parameters of `lr_schedule`."""
        return dict(self.lr_scheduler_kwargs or {})  # type: ignore[arg-type]

    @property
    def smallest_batch_rows(self) -> int:
        """Rows of one micro-batch on every process."""
        return self.per_device_train_batch_size * self.world_size

    @property
    def largest_batch_rows(self) -> int:
        """Rows of a full optimiser step over all processes."""
        return self.train_batch_rows or self.smallest_batch_rows

    def _check_fields(self) -> None:
        self._check_sharding()
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps follows from train_batch_rows here: set train_batch_rows instead"
            )
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            if getattr(self, name) == "epoch":
                interval = name.replace("strategy", "interval")
                raise ValueError(f"{name}: epoch has no place under a budget: set {interval}, or {name}: steps")
        defaults = {spec.name: spec.default for spec in fields(self)}
        for name, instead in REPLACED_FIELDS.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(_replaced(name, instead))
        for name, (strategy, interval) in STEPS_OF_STRATEGY.items():
            if getattr(self, name) != defaults[name] and getattr(self, strategy) == "no":
                raise ValueError(_without_strategy(name, strategy, interval))
            steps = getattr(self, name)
            if getattr(self, strategy) == "steps" and steps is not None and steps < 1 and self.max_steps <= 0:
                raise ValueError(f"{name} below 1 is a share of max_steps, which is not set: set {interval} instead")
        if self.train_sampling_strategy not in SAMPLING_STRATEGIES:
            raise ValueError(
                f"train_sampling_strategy must be {' or '.join(SAMPLING_STRATEGIES)}, got {self.train_sampling_strategy!r}"
            )
        for name, reason in REFUSED_FIELDS.items():
            if getattr(self, name):
                raise ValueError(f"{name} {reason}")
        if self.save_strategy == "best":
            raise ValueError("save_strategy: best has no place under a budget: set save_interval")
        if self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE, "end", "every_save"):
            raise ValueError(
                "hub_strategy would upload the optimiser's state, which is not safetensors: use every_save or end"
            )
        if not self.dataloader_in_order:
            raise ValueError("dataloader_in_order: false would change which rows a step sees: leave it out")
        if self.dataloader_persistent_workers and self.dataloader_num_workers < 1:
            raise ValueError(
                "dataloader_persistent_workers: there are none: set dataloader_num_workers, or leave it out"
            )
        if self.dataloader_multiprocessing_context is not None and self.dataloader_num_workers < 1:
            raise ValueError(
                "dataloader_multiprocessing_context: there are no workers: set dataloader_num_workers, or leave it out"
            )
        if not 0 <= self.batch_ramp_until <= 1:
            raise ValueError(f"batch_ramp_until is a fraction of the budget from 0 to 1, got {self.batch_ramp_until}")
        if self.batch_ramp_until > 0 and self.train_batch_rows is None:
            raise ValueError("batch_ramp_until has nothing to ramp up to: set train_batch_rows with it")
        self._check_optimizer()
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps must be at least 1, got {self.max_nonfinite_steps}")

    def _check_sharding(self) -> None:
        for name, variable in SHARDING.items():
            if getattr(self, name) or os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
                raise ValueError(
                    f"{name}: every process holds the whole model here: leave it out, and start the processes by "
                    "accelerate launch --multi_gpu"
                )

    def _check_optimizer(self) -> None:
        optim = str(getattr(self.optim, "value", self.optim))
        if optim.endswith("_layerwise") or optim in ("lomo", "adalomo"):
            raise ValueError(
                f"optim {optim!r} takes its steps within the backward pass, where no clock rules the learning rate: choose "
                "another"
            )
        if self.muon_learning_rate is not None and self.muon_learning_rate <= 0:
            raise ValueError(f"muon_learning_rate must be above 0, got {self.muon_learning_rate}")
        if self.muon_learning_rate is not None and (self.optim_args or self.optim not in ADAMW_NAMES):
            raise ValueError(
                "muon_learning_rate brings its own optimiser, with AdamW for the rest: leave out optim and optim_args, "
                "or muon_learning_rate"
            )
        if self.optim_args and self.optim in (*ADAMW_NAMES, "adafactor"):
            raise ValueError(
                f"optim_args: optim {str(self.optim)!r} takes none: set its own fields, such as adam_beta2"
            )

    def _check_batch(self) -> None:
        rows = self.smallest_batch_rows if self.train_batch_rows is None else self.train_batch_rows
        if rows < 1 or rows % self.smallest_batch_rows:
            raise ValueError(
                f"train_batch_rows ({self.train_batch_rows}) must be a multiple of {self.smallest_batch_rows} "
                f"(per_device_train_batch_size {self.per_device_train_batch_size} x {self.world_size} processes): change "
                "one of these"
            )
        accelerator_config: Any = self.accelerator_config
        if (accelerator_config.gradient_accumulation_kwargs or {}).get("num_steps", 1) != 1:  # the Trainer writes 1
            raise ValueError(
                "accelerator_config: num_steps of gradient_accumulation_kwargs follows from train_batch_rows here: set "
                "that instead"
            )


def check_given(given: Collection[str], args: CramTrainingArguments) -> None:
    """
    Raises `ValueError` for a field that a recipe or the command line sets to its default and that does nothing under a
    budget: the arguments alone cannot tell it from one that is not set.
    """
    for name, instead in REPLACED_FIELDS.items():
        if name in given:
            raise ValueError(_replaced(name, instead))
    for name, (strategy, interval) in STEPS_OF_STRATEGY.items():
        if name in given and getattr(args, name) is not None and getattr(args, strategy) == "no":
            raise ValueError(_without_strategy(name, strategy, interval))


def _replaced(name: str, instead: str) -> str:
    return f"{name} has no place under a budget: set {instead}"


def _without_strategy(name: str, strategy: str, interval: str) -> str:
    return f"{name} does nothing by itself: set {interval} instead, or {strategy}: steps with it"


def read_schedule_shape(given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """
    `lr_scheduler_kwargs` as numbers by name, from a dict or its JSON. A number in quotes is one too: YAML takes `1e-2`
    for text. Raises `ValueError` for what is neither.
    """
    if given is None:
        return None
    try:
        shape = json.loads(given) if isinstance(given, str) else given
        return {name: float(value) if isinstance(value, str) else value for name, value in shape.items()}
    except (ValueError, AttributeError):
        raise ValueError(
            f'lr_scheduler_kwargs must be numbers by name, like {{"final_factor": 0.1}}, got {given!r}'
        ) from None
