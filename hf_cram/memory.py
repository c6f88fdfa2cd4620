"""
The memory of a recipe's training step, and the largest micro-batch that fits a GPU: by the calculation of
[`training_memory`].

    python -m hf_cram.memory training_args/crammed_bert_24h.yaml [--gpu_memory_gb 11 16 48 80] [--field value ...]
"""

import math
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.training_args import OptimizerNames

from .data.collator import parse_phases
from .data.pipeline import DataArguments
from .programs import ending_in_one_line
from .recipes import RecipeParser
from .script_args import RECIPE_PARTS, MaskingArguments, planned_config
from .training_args import ADAMW_NAMES, CramTrainingArguments
from .training_memory import (
    BYTES_PER_GB,
    PARTS,
    RESERVE_BYTES,
    RESERVE_SHARE,
    TrainingMemory,
    TrainingSetup,
    estimate_training_memory,
    largest_micro_batch,
)

PROGRAM = "python -m hf_cram.memory"


@dataclass
class MemoryArguments:
    """For which memories to calculate."""

    gpu_memory_gb: list[float] = field(
        default_factory=lambda: [11.0, 16.0, 48.0, 80.0], metadata={"help": "Memories of GPUs in GB (2^30 bytes)."}
    )

    def __post_init__(self) -> None:
        for value in self.gpu_memory_gb:
            if not 0 < value < math.inf:
                raise ValueError(f"gpu_memory_gb must be numbers above 0, got {value}")


def recipe_setup(
    data_args: DataArguments, masking_args: MaskingArguments, training_args: CramTrainingArguments
) -> TrainingSetup:
    """
    The setup of a recipe, at the largest of its mask rates. Where it leaves bf16 open, fp32 is taken: the larger of
    the two. Raises `ValueError` for an optimiser whose states it does not know, and for activations that are kept elsewhere.
    """
    checkpointing: dict[str, Any] = dict(training_args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]
    if training_args.activation_checkpointing and checkpointing.get("offload"):
        raise ValueError(
            "activation_checkpointing_kwargs: what offload leaves on the GPU is not known here: leave it out"
        )
    if training_args.optim not in ADAMW_NAMES:
        raise ValueError(
            f"optim: the states of {OptimizerNames(training_args.optim).value} are not known here: leave it out"
        )
    return TrainingSetup(
        max_seq_length=data_args.max_seq_length,
        mlm_probability=max(rate for _, rate in parse_phases(masking_args.mlm_probability)),
        autocast_dtype=torch.float16 if training_args.fp16 else torch.bfloat16 if training_args.bf16 else None,
        optimizer="adamw" if training_args.muon_learning_rate is None else "muon",
        gradient_checkpointing=bool(training_args.activation_checkpointing),
        checkpointed_every=checkpointing.get("every_n_layers", 1),
        accumulates_gradients=training_args.largest_batch_rows > training_args.smallest_batch_rows,
    )


def largest_that_fits(config: PreTrainedConfig, setup: TrainingSetup, memory_bytes: float) -> int:
    """[`largest_micro_batch`] in steps of 8 rows, or of single ones where 8 are too many."""
    return largest_micro_batch(config, setup, memory_bytes) or largest_micro_batch(config, setup, memory_bytes, 1)


def format_parts(memory: TrainingMemory) -> str:
    """The total and its parts in GB, in one line."""
    parts = (f"{name.replace('_', ' ')} {getattr(memory, name) / BYTES_PER_GB:.2f}" for name in PARTS)
    return f"{memory.total_bytes / BYTES_PER_GB:.2f} GB: {', '.join(parts)}"


def main() -> None:
    parser = RecipeParser((*RECIPE_PARTS, CramTrainingArguments, MemoryArguments), prog=PROGRAM)
    model_args, data_args, _, _, masking_args, _, training_args, memory_args = parser.parse(sys.argv[1:])
    setup, config = recipe_setup(data_args, masking_args, training_args), planned_config(model_args, data_args)
    if training_args.attn_implementation == "eager":  # the only one that keeps the weights
        config._attn_implementation = "eager"
    print(
        f"{config.num_hidden_layers} layers x {config.hidden_size}, vocabulary {config.vocab_size}, rows of "
        f"{setup.max_seq_length} tokens, {setup.masked_tokens} masked, "
        f"{str(setup.autocast_dtype or torch.float32).removeprefix('torch.')}, {setup.optimizer}, eager; "
        f"{RESERVE_BYTES / 1e9:.0f} GB and {RESERVE_SHARE:.0%} of the step in reserve"
    )
    rows = training_args.per_device_train_batch_size
    print(f"micro-batch {rows}: {format_parts(estimate_training_memory(config, setup, rows))}")
    for memory_gb in memory_args.gpu_memory_gb:
        memory_bytes = memory_gb * BYTES_PER_GB
        rows = largest_that_fits(config, setup, memory_bytes)
        is_split = rows < training_args.largest_batch_rows // training_args.world_size
        if is_split and not setup.accumulates_gradients:  # a step then has several
            rows = largest_that_fits(config, replace(setup, accumulates_gradients=True), memory_bytes)
        print(f"{memory_gb:g} GB: largest micro-batch {rows}")


if __name__ == "__main__":
    with ending_in_one_line(PROGRAM, ValueError):
        main()
