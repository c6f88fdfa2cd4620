"""
Which model for this machine and this budget: a shape and its training, from the machine's measured speed.

    python -m hf_cram.plan --time_budget 10m [--output_recipe my.yaml] [--matmul_tflops 300 --memory_gb 80]

Prints what the budget can do with every shape, the choice with its reasons, and the recipe, of one process. Nothing is
trained. What the choice rests on is the scaling study in benchmarks/LOG.md (2 CPU cores, up to ten minutes); far beyond
it, for a day on a GPU, it is a guess after Hoffmann et al. (2022). The rows of a batch are those of all processes.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForMaskedLM

from .budget import parse_duration
from .configuration_crammed_bert import CrammedBertConfig
from .files import write_atomically
from .hardware import bf16_is_faster, measure_matmul_flops, random_batch, training_flops
from .memory import BYTES_PER_GB, TrainingSetup, estimate_training_memory, usable_bytes
from .recipes import RecipeParser

# Share of the matrix products' measured speed that training reaches, optimiser and data included (LOG.md: 54 to 89 %).
MATMUL_PEAK_SHARE = 0.65
# Tokens of the text for each parameter where the loss is lowest, by the FLOPs of the whole run: of the study, where 1.4 M
# and 4.7 M parameters meet, and the 20 predictions of Hoffmann et al. (2022) where 30 % of the tokens are predicted.
# Between both it grows evenly on logarithmic scales, outside of them it stays.
TOKENS_PER_PARAMETER = ((1e14, 4.0), (1e18, 20 / 0.3))
# The ten-minute recipe's batch and learning rate, and what they belong to. The batch grows with the square root of the
# tokens (Zhang et al. 2024, critical batch size), the rate falls with that of the width.
TOKENS_AT_REFERENCE, BATCH_TOKENS_AT_REFERENCE = 1e7, 2048
WIDTH_AT_REFERENCE, RATE_AT_REFERENCE = 256, 2e-3
SMALLEST_BATCH_ROWS, LARGEST_BATCH_ROWS = 8, 2048
MOST_ROWS_AT_ONCE_ON_CPU = 64
# Few tokens teach most with many of them masked (LOG.md, 27 November); many with 30 % (Wettig et al. 2023).
MANY_MASKED, USUAL_MASKED, MANY_MASKED_UNTIL_TOKENS = 0.4, 0.3, 1e8
# Muon wins at equal steps and loses at equal time where the batch is small (LOG.md, 24 and 27 November): in where its
# own products are no more than this share of a step's.
MUON_LEARNING_RATE, MUON_ITERATIONS, LARGEST_MUON_SHARE = 0.02, 5, 0.1
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
# A choice further off than this factor means that the shapes end.
FAR_OFF = 3.0


@dataclass(frozen=True)
class Shape:
    """A size of the crammed BERT: what decides its parameters and FLOPs."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int

    def model_fields(self, max_seq_length: int) -> dict[str, Any]:
        """The configuration's fields but the vocabulary: heads of 64, gated feed-forward of four times the width."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.hidden_size // 64,
            "intermediate_size": 4 * self.hidden_size,
            # Longer sequences than the trained ones come without parameters.
            "position_embedding_type": "rotary",
            "max_position_embeddings": max(512, max_seq_length),
        }

    def config(self, max_seq_length: int) -> CrammedBertConfig:
        """The model's configuration."""
        return CrammedBertConfig(vocab_size=self.vocab_size, **self.model_fields(max_seq_length))

    @property
    def decoder_shape(self) -> tuple[int, int]:
        """(out, in) features of the decoder, whose product the trainer measures too."""
        return self.vocab_size, self.hidden_size


# Deeper with the width; the vocabulary is a small part of each but the first. The last but one is the paper's.
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
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        precision = "bf16" if bf16_is_faster(device, (1024, 1024)) else "fp32"
    dtype = AUTOCAST_DTYPES[precision] or torch.float32
    speed = lru_cache(lambda shape: measure_matmul_flops(device, dtype, shape))
    return Machine(speed, precision, memory, is_cpu=device.type == "cpu")


@dataclass(frozen=True)
class Candidate:
    """What the budget can do with a shape."""

    shape: Shape
    num_parameters: int
    flops_per_token: float
    tokens_per_second: float
    tokens: float
    mlm_probability: float

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


@lru_cache
def count_work(shape: Shape, max_seq_length: int, mlm_probability: float) -> tuple[int, float]:
    """Parameters of a shape, and FLOPs of training for each token; nothing is allocated."""
    meta = torch.device("meta")
    with meta:
        model = AutoModelForMaskedLM.from_config(shape.config(max_seq_length))
        batch = random_batch(model, shape.vocab_size, (8, max_seq_length), mlm_probability, meta)
        flops = training_flops(model, batch)
    return model.num_parameters(), flops / batch["input_ids"].numel()


def evaluate_shape(shape: Shape, budget_seconds: float, machine: Machine, max_seq_length: int) -> Candidate:
    """What the budget can do with a shape on a machine."""
    speed = MATMUL_PEAK_SHARE * machine.matmul_flops(shape.decoder_shape)
    for mlm_probability in (MANY_MASKED, USUAL_MASKED):
        num_parameters, flops = count_work(shape, max_seq_length, mlm_probability)
        tokens = speed / flops * budget_seconds
        if tokens < MANY_MASKED_UNTIL_TOKENS:
            break
    return Candidate(shape, num_parameters, flops, speed / flops, tokens, mlm_probability)


@dataclass(frozen=True)
class Plan:
    """The chosen shape and its training."""

    candidate: Candidate
    precision: str
    max_seq_length: int
    batch_rows: int
    micro_batch_rows: int

    @property
    def batch_tokens(self) -> int:
        return self.batch_rows * self.max_seq_length

    @property
    def learning_rate(self) -> float:
        """AdamW's peak."""
        rate = RATE_AT_REFERENCE * math.sqrt(WIDTH_AT_REFERENCE / self.candidate.shape.hidden_size)
        return float(f"{rate:.2g}")

    @property
    def muon_share(self) -> float:
        """FLOPs of Muon's iterations over a square matrix of the width, in proportion to a step's own with that matrix."""
        width = self.candidate.shape.hidden_size
        return MUON_ITERATIONS * 6 * width**3 / (6 * width**2 * self.batch_tokens)

    @property
    def uses_muon(self) -> bool:
        return self.muon_share <= LARGEST_MUON_SHARE

    def recipe(self, time_budget: str) -> dict[str, Any]:
        """The keys of a training recipe, all but its text and output folder."""
        shape = self.candidate.shape
        recipe: dict[str, Any] = {
            "vocab_size": shape.vocab_size, "max_seq_length": self.max_seq_length,
            **shape.model_fields(self.max_seq_length), "time_budget": time_budget, "learning_rate": self.learning_rate,
        }  # fmt: skip
        if self.uses_muon:
            recipe["muon_learning_rate"] = MUON_LEARNING_RATE
        recipe |= {
            "lr_schedule": "flat_then_linear", "lr_scheduler_kwargs": {"warmup": 0.02, "decay_from": 0.4},
            "per_device_train_batch_size": self.micro_batch_rows, "train_batch_rows": self.batch_rows,
            "max_grad_norm": 0.5, "adam_beta2": 0.98, "adam_epsilon": 1e-12, "weight_decay": 0.01,
            "embeddings_from_text": True, "mlm_probability": self.candidate.mlm_probability,
        }  # fmt: skip
        if self.precision != "fp32":
            recipe[self.precision] = True
        return recipe | {"logging_interval": "1%", "eval_interval": "25%", "save_interval": "10%"}


def power_of_two_at_most(number: float) -> int:
    """The largest power of two up to `number`, which is at least 1."""
    return 2 ** math.floor(math.log2(number))


def fits_memory(plan: Plan, machine: Machine) -> bool:
    """Whether a step of the plan, by calculation, fits the machine's memory with a reserve."""
    setup = TrainingSetup(
        max_seq_length=plan.max_seq_length,
        mlm_probability=plan.candidate.mlm_probability,
        autocast_dtype=AUTOCAST_DTYPES[plan.precision],
        optimizer="muon" if plan.uses_muon else "adamw",
    )
    config = plan.candidate.shape.config(plan.max_seq_length)
    memory = estimate_training_memory(config, setup, plan.micro_batch_rows)
    return memory.total_bytes <= usable_bytes(machine.memory_bytes)


def nearest_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates in the order of how near they come to the best number of tokens for each parameter."""
    return sorted(candidates, key=lambda candidate: candidate.times_off)


def choose(candidates: Sequence[Candidate], machine: Machine, max_seq_length: int) -> Plan:
    """
    The plan of the first of [`nearest_first`] that fits the memory, whose micro-batch is the batch, halved until it does.

    Raises `ValueError` where of none 8 rows fit.
    """
    for candidate in nearest_first(candidates):
        rows = BATCH_TOKENS_AT_REFERENCE / max_seq_length * math.sqrt(candidate.tokens / TOKENS_AT_REFERENCE)
        nearest = power_of_two_at_most(max(rows * math.sqrt(2), 1))
        batch_rows = min(max(nearest, SMALLEST_BATCH_ROWS), LARGEST_BATCH_ROWS)
        micro_batch_rows = min(batch_rows, MOST_ROWS_AT_ONCE_ON_CPU if machine.is_cpu else batch_rows)
        while micro_batch_rows >= SMALLEST_BATCH_ROWS:
            plan = Plan(candidate, machine.precision, max_seq_length, batch_rows, micro_batch_rows)
            if fits_memory(plan, machine):
                return plan
            micro_batch_rows //= 2
    raise ValueError(
        f"{machine.memory_bytes / BYTES_PER_GB:.1f} GB hold of no shape {SMALLEST_BATCH_ROWS} rows of {max_seq_length} "
        "tokens: plan for more memory_gb, or a smaller max_seq_length"
    )


def plan_training(time_budget: str, machine: Machine, max_seq_length: int = 128) -> tuple[Plan, list[Candidate]]:
    """The plan for a budget on a machine, and all shapes that it was chosen from."""
    seconds = parse_duration(time_budget)
    candidates = [evaluate_shape(shape, seconds, machine, max_seq_length) for shape in SHAPES]
    return choose(candidates, machine, max_seq_length), candidates


def short(number: float) -> str:
    """A number of three digits and its unit, for a table."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.2g}" if number < 100 else f"{number:.0f}"


def describe(plan: Plan, candidates: Sequence[Candidate], time_budget: str) -> str:
    """The table of shapes and the reasons, for a person."""
    titles = ("layers x width", "vocabulary", "parameters", "FLOPs/token", "tokens/s", "tokens", "a parameter", "best")
    lines = [titles[0] + "".join(f"{title:>13}" for title in titles[1:])]
    for candidate in candidates:
        shape = candidate.shape
        figures = (
            candidate.num_parameters, candidate.flops_per_token, candidate.tokens_per_second, candidate.tokens,
            candidate.tokens_per_parameter, candidate.best_tokens_per_parameter,
        )  # fmt: skip
        cells = [f"{shape.vocab_size:,}", *map(short, figures)]
        lines.append(
            f"{f'{shape.num_hidden_layers} x {shape.hidden_size}':<14}"
            + "".join(f"{cell:>13}" for cell in cells)
            + (" <-" if candidate is plan.candidate else "")
        )
    chosen = plan.candidate
    lines += [
        f"Speed: {MATMUL_PEAK_SHARE:.0%} of the measured {plan.precision} products of each shape's decoder.",
        f"Size: in {time_budget} this one sees {short(chosen.tokens_per_parameter)} tokens a parameter, the nearest to the "
        f"{short(chosen.best_tokens_per_parameter)} at which {chosen.tokens * chosen.flops_per_token:.1e} FLOPs buy the "
        "lowest loss. Its depth and vocabulary come with its width.",
        f"Batch: {plan.batch_rows} rows ({plan.batch_tokens:,} tokens), by the square root of the tokens; "
        f"{plan.micro_batch_rows} rows at once; about {short(chosen.tokens / plan.batch_tokens)} steps.",
        f"Masked: {chosen.mlm_probability:.0%}; up to {short(MANY_MASKED_UNTIL_TOKENS)} tokens {MANY_MASKED:.0%}, "
        f"then {USUAL_MASKED:.0%}.",
        f"Rate: AdamW {plan.learning_rate:g}, by the square root of the width"
        + (f"; Muon {MUON_LEARNING_RATE:g} for the matrices" if plan.uses_muon else "; no Muon")
        + f", whose own products would be {plan.muon_share:.0%} of a step's (up to {LARGEST_MUON_SHARE:.0%} pays).",
    ]
    if chosen.times_off > FAR_OFF:
        lines.append(f"The shapes end here: {chosen.times_off:.0f} times off the best tokens a parameter.")
    return "\n".join(lines)


@dataclass
class PlanArguments:
    """What to plan for: this machine, or a GPU that is described."""

    time_budget: str = field(metadata={"help": "Wall-clock time of training: '24h', '90m', '600s' or seconds."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a row."})
    matmul_tflops: float | None = field(
        default=None,
        metadata={"help": "Another GPU's TFLOP/s in bf16 matrix products, as measured, not as advertised."},
    )
    memory_gb: float | None = field(default=None, metadata={"help": "That GPU's memory in GB (2^30 bytes)."})
    output_recipe: str | None = field(default=None, metadata={"help": "Write the recipe to this new YAML file."})

    def __post_init__(self) -> None:
        parse_duration(self.time_budget)
        if self.max_seq_length < 8:
            raise ValueError(f"max_seq_length must be at least 8 tokens, got {self.max_seq_length}")
        for name in ("matmul_tflops", "memory_gb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value}")
        if (self.matmul_tflops is None) != (self.memory_gb is None):
            raise ValueError("matmul_tflops and memory_gb describe another GPU together: give both or neither")
        if self.output_recipe is not None:
            path = Path(self.output_recipe)
            if path.exists() or path.suffix not in (".yaml", ".yml") or not path.parent.is_dir():
                raise ValueError(
                    f"output_recipe must name a new .yaml file in a folder that is there, got {self.output_recipe!r}"
                )

    def machine(self) -> Machine:
        """The machine that was described, or this one."""
        if self.matmul_tflops is not None and self.memory_gb is not None:
            speed = self.matmul_tflops * 1e12
            return Machine(lambda shape: speed, "bf16", self.memory_gb * BYTES_PER_GB)
        return measured_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def main(arguments: Sequence[str]) -> None:
    (args,) = RecipeParser((PlanArguments,), prog="python -m hf_cram.plan").parse(arguments)
    plan, candidates = plan_training(args.time_budget, args.machine(), args.max_seq_length)
    recipe = yaml.safe_dump(plan.recipe(args.time_budget), sort_keys=False)
    print(f"{describe(plan, candidates, args.time_budget)}\n\n{recipe}", end="")
    if args.output_recipe:
        path = Path(args.output_recipe)
        write_atomically(path.parent, {path.name: recipe.encode()})
        print(
            f"\nTrain with: accelerate launch run_mlm_cram.py {path} --train_files 'texts/*.jsonl' --output_dir out/mine",
            file=sys.stderr,
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"python -m hf_cram.plan: error: {error}")
