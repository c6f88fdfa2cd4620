"""
Sizes of the crammed BERT, and what a budget can do with each on a machine: its speed, its tokens, how near the best.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForMaskedLM

from .configuration_crammed_bert import CrammedBertConfig
from .hardware import bf16_is_faster, measure_matmul_flops, random_batch, training_flops

# Share of the decoder's measured speed that training reaches, optimiser and data included (LOG.md: 52 to 60 % over ten
# minutes at that size on a CPU, a step alone 69 %; of GPUs it is not known).
MATMUL_PEAK_SHARE = 0.6
# Tokens of the text for each parameter where the loss is lowest, by the FLOPs of the whole run: of the study, where 1.4 M
# and 4.7 M parameters meet, and the 20 predictions of Hoffmann et al. (2022) where 30 % of the tokens are predicted.
# Between both it grows evenly on logarithmic scales, outside of them it stays.
TOKENS_PER_PARAMETER = ((1e14, 4.0), (1e18, 20 / 0.3))
# Few tokens teach most with many of them masked (LOG.md, 27 November); many with 30 % (Wettig et al. 2023). What a table
# knows of the text (LOG.md, 28 November) is worth most to a run that sees few tokens, and was tried with no others.
FEW_TOKENS = 1e8
MANY_MASKED, USUAL_MASKED = 0.4, 0.3
NEIGHBOUR_TABLE = {"neighbour_table_entries": 2**19, "neighbour_table_size": 128}
# Of control groups, version 2 and 1, as a container sees its own.
CGROUP_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


@dataclass(frozen=True)
class Shape:
    """A size of the crammed BERT: what decides its parameters and FLOPs."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int

    def model_fields(self, max_seq_length: int, sees_few_tokens: bool) -> dict[str, Any]:
        """
        The configuration's fields but the vocabulary: heads of 64, gated feed-forward of four times the width, and a
        neighbour table for a run that `sees_few_tokens`.
        """
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.hidden_size // 64,
            "intermediate_size": 4 * self.hidden_size,
            # Longer sequences than the trained ones come without parameters.
            "position_embedding_type": "rotary",
            "max_position_embeddings": max(512, max_seq_length),
            **(NEIGHBOUR_TABLE if sees_few_tokens else {}),
        }

    def config(self, max_seq_length: int, sees_few_tokens: bool) -> CrammedBertConfig:
        """The model's configuration."""
        return CrammedBertConfig(vocab_size=self.vocab_size, **self.model_fields(max_seq_length, sees_few_tokens))

    @property
    def decoder_shape(self) -> tuple[int, int]:
        """(out, in) features of the decoder, the largest of the products."""
        return self.vocab_size, self.hidden_size


# Deeper with the width, and a larger vocabulary. The last but one is the paper's.
SHAPES = (
    Shape(128, 2, 8192),
    Shape(256, 4, 8192),
    Shape(384, 4, 8192),
    Shape(512, 4, 8192),
    Shape(512, 8, 16384),
    Shape(768, 12, 32768),
    Shape(768, 16, 32768),
    Shape(1024, 24, 32768),
)


@dataclass(frozen=True)
class Machine:
    """
    What decides a plan, of one process.

    Args:
        matmul_flops: FLOP/s of products with a weight of (out, in) features, in the machine's `precision`.
        precision: `"bf16"`, `"fp16"` or `"fp32"`.
        memory_bytes: what a micro-batch has to fit into.
        is_cpu: small micro-batches are as fast as large ones.
    """

    matmul_flops: Callable[[tuple[int, int]], float]
    precision: str
    memory_bytes: float
    is_cpu: bool = False


def measured_machine(device: torch.device) -> Machine:
    """This machine, by a second or two of matrix products for each shape."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    else:
        memory = main_memory_bytes()
        precision = "bf16" if bf16_is_faster(device, (1024, 1024)) else "fp32"
    dtype = AUTOCAST_DTYPES[precision] or torch.float32
    speed = lru_cache(lambda shape: measure_matmul_flops(device, dtype, shape))
    return Machine(speed, precision, memory, is_cpu=device.type == "cpu")


def main_memory_bytes() -> int:
    """Main memory, or what the limit of this container leaves of it, in bytes."""
    memory = psutil.virtual_memory().total
    for path in CGROUP_MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # another system, or "max"
            return min(memory, int(path.read_text()))
    return memory


@dataclass(frozen=True)
class Candidate:
    """What the budget can do with a shape."""

    shape: Shape
    num_parameters: int
    flops_per_token: float
    tokens_per_second: float
    tokens: float
    sees_few_tokens: bool

    @property
    def mlm_probability(self) -> float:
        return masked_share(self.sees_few_tokens)

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.num_parameters

    @property
    def best_tokens_per_parameter(self) -> float:
        """Where the loss is lowest after so many FLOPs."""
        return best_tokens_per_parameter(self.tokens * self.flops_per_token)

    @property
    def times_off(self) -> float:
        """By which factor the tokens for each parameter miss the best, upwards or downwards: at least 1."""
        ratio = self.tokens_per_parameter / self.best_tokens_per_parameter
        return max(ratio, 1 / ratio)


def best_tokens_per_parameter(flops: float) -> float:
    """Tokens for each parameter at the lowest loss that so many FLOPs buy (see `TOKENS_PER_PARAMETER`)."""
    (low_flops, low), (high_flops, high) = TOKENS_PER_PARAMETER
    share = math.log(flops / low_flops) / math.log(high_flops / low_flops)
    return low * (high / low) ** min(max(share, 0.0), 1.0)


def masked_share(sees_few_tokens: bool) -> float:
    """Of the tokens, how many are predicted."""
    return MANY_MASKED if sees_few_tokens else USUAL_MASKED


@lru_cache
def count_work(shape: Shape, max_seq_length: int, sees_few_tokens: bool) -> tuple[int, float]:
    """Parameters of a shape, and FLOPs of training for each token; nothing is allocated."""
    meta = torch.device("meta")
    with meta:
        model = AutoModelForMaskedLM.from_config(shape.config(max_seq_length, sees_few_tokens))
        batch = random_batch(model, shape.vocab_size, (8, max_seq_length), masked_share(sees_few_tokens), meta)
        flops = training_flops(model, batch)
    return model.num_parameters(), flops / batch["input_ids"].numel()


def evaluate_shape(shape: Shape, budget_seconds: float, machine: Machine, max_seq_length: int) -> Candidate:
    """What the budget can do with a shape on a machine."""
    speed = MATMUL_PEAK_SHARE * machine.matmul_flops(shape.decoder_shape)
    for sees_few_tokens in (True, False):
        num_parameters, flops = count_work(shape, max_seq_length, sees_few_tokens)
        tokens = speed / flops * budget_seconds
        if tokens < FEW_TOKENS:
            break
    return Candidate(shape, num_parameters, flops, speed / flops, tokens, sees_few_tokens)
