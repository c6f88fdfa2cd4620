"""Fine-tune any sequence classifier on one task with one seed."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import (
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
from transformers.trainer_utils import IntervalStrategy

from .classifier import PADDING_MULTIPLE, build_classifier, quiet_loading
from .fine_tuning_args import EncoderArguments, FineTuningArguments
from .glue import GlueError
from .glue_data import TaskData
from .glue_encoding import EncodedTask
from .hardware import bf16_trains_faster
from .modeling_crammed_bert import CrammedBertForSequenceClassification
from .optimization import decayed_parameter_names


@dataclass
class PairResult:
    """One task with one seed: scores by column of the results, outputs of the test splits by file name."""

    scores: dict[str, dict[str, float]]
    test_outputs: dict[str, np.ndarray]
    train_seconds: float
    examples_per_second: float


def parameter_groups(model: PreTrainedModel, args: FineTuningArguments) -> list[dict[str, Any]]:
    """
    Groups of the optimiser by depth: layer `i` of `n` has `learning_rate * layer_lr_decay ** (n - 1 - i)`, the embeddings
    before the layers one step of decay more, times `embedding_lr_multiplier`, the head
    `learning_rate * head_lr_multiplier`.
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
            rate = args.learning_rate * args.head_lr_multiplier
        elif name in numbers:
            rate = args.learning_rate * args.layer_lr_decay ** (layers - 1 - numbers[name])
        elif "embed" in name:
            rate = args.learning_rate * args.layer_lr_decay**layers * args.embedding_lr_multiplier
        else:
            rate = args.learning_rate
        decay = args.weight_decay if name in decayed else 0.0
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
        if args.logging_strategy == IntervalStrategy.NO:
            trainer.remove_callback(PrinterCallback)  # which tells of the end of each training
        if not isinstance(model, CrammedBertForSequenceClassification):
            # The loss of most models is a mean whatever it is told of the step: the Trainer has to divide.
            trainer.model_accepts_loss_kwargs = False
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        args.dataloader_drop_last = False  # meant for training: every example is scored
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
        text_config = model.config.get_text_config()
        # By it a decoder finds the last token of each example.
        if getattr(text_config, "pad_token_id", None) is None:
            text_config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(self.args.device)  # type: ignore[arg-type]

    def _optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        args = self.args
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW(
            parameter_groups(model, args), lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True
        )

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
