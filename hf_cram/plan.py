"""
Which model for this machine and this budget: a shape and its training, from the machine's measured speed.

    python -m hf_cram.plan --time_budget 10m [--output_recipe my.yaml] [--matmul_tflops 300 --memory_gb 80]

Prints what the budget can do with every shape, the choice with its reasons, and the recipe, of one process. Nothing is
trained. What the choice rests on is the scaling study in benchmarks/LOG.md (2 CPU cores, up to ten minutes); far beyond
it, for a day on a GPU, it is a guess after Hoffmann et al. (2022). The rows of a batch are those of all processes.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from .budget import parse_duration
from .files import write_atomically
from .markup import describe_count
from .programs import ending_in_one_line
from .recipes import RecipeParser
from .shapes import (
    AUTOCAST_DTYPES,
    FEW_TOKENS,
    MANY_MASKED,
    MATMUL_PEAK_SHARE,
    NEIGHBOUR_TABLE,
    SHAPES,
    USUAL_MASKED,
    Candidate,
    Machine,
    evaluate_shape,
    measured_machine,
)
from .training_memory import BYTES_PER_GB, TrainingSetup, estimate_training_memory, usable_bytes

PROGRAM = "python -m hf_cram.plan"
# The ten-minute recipe's batch and learning rate, and what they belong to. The batch grows with the square root of the
# tokens (Zhang et al. 2024, critical batch size), the rate falls with that of the width.
TOKENS_AT_REFERENCE, BATCH_TOKENS_AT_REFERENCE = 1e7, 2048
WIDTH_AT_REFERENCE, RATE_AT_REFERENCE = 256, 2e-3
SMALLEST_BATCH_ROWS, LARGEST_BATCH_ROWS = 8, 2048
MOST_ROWS_AT_ONCE_ON_CPU = 64
# Muon wins at equal steps and loses at equal time where the batch is small (LOG.md, 24 and 27 November): in where its
# own products are no more than this share of a step's.
MUON_LEARNING_RATE, MUON_ITERATIONS, LARGEST_MUON_SHARE = 0.02, 5, 0.1
# A choice further off than this factor means that the shapes end.
FAR_OFF = 3.0


@dataclass(frozen=True)
class Plan:
    """The chosen shape and its training."""

    candidate: Candidate
    precision: str
    max_seq_length: int
    batch_rows: int
    micro_batch_rows: int
    is_cpu: bool

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
            **shape.model_fields(self.max_seq_length, self.candidate.sees_few_tokens),
            "time_budget": time_budget, "learning_rate": self.learning_rate,
        }  # fmt: skip
        if self.uses_muon:
            recipe["muon_learning_rate"] = MUON_LEARNING_RATE
        recipe |= {
            "lr_schedule": "flat_then_linear", "lr_scheduler_kwargs": {"warmup": 0.02, "decay_from": 0.4},
            "per_device_train_batch_size": self.micro_batch_rows, "train_batch_rows": self.batch_rows,
            "max_grad_norm": 0.5, "adam_beta2": 0.98, "adam_epsilon": 1e-12, "weight_decay": 0.01,
            "embeddings_from_text": True, "mlm_probability": self.candidate.mlm_probability,
        }  # fmt: skip
        if (
            self.precision != "fp32" and not self.is_cpu
        ):  # where the run measures which is faster: another may have no bf16
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
    config = plan.candidate.shape.config(plan.max_seq_length, plan.candidate.sees_few_tokens)
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
            plan = Plan(
                candidate, machine.precision, max_seq_length, batch_rows, micro_batch_rows, machine.is_cpu
            )  # fmt: skip
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


def describe_ratio(ratio: float) -> str:
    """Two digits of a small number, all of a large one."""
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:,.0f}"


def describe(plan: Plan, candidates: Sequence[Candidate], time_budget: str) -> str:
    """The table of shapes and the reasons, for a person."""
    titles = ("layers x width", "vocabulary", "parameters", "FLOPs/token", "tokens/s", "tokens", "a parameter", "best")
    lines = [titles[0] + "".join(f"{title:>13}" for title in titles[1:])]
    for candidate in candidates:
        shape = candidate.shape
        counts = (
            candidate.num_parameters, candidate.flops_per_token, candidate.tokens_per_second, candidate.tokens
        )  # fmt: skip
        ratios = (candidate.tokens_per_parameter, candidate.best_tokens_per_parameter)
        cells = [f"{shape.vocab_size:,}", *map(describe_count, counts), *map(describe_ratio, ratios)]
        lines.append(
            f"{f'{shape.num_hidden_layers} x {shape.hidden_size}':<14}"
            + "".join(f"{cell:>13}" for cell in cells)
            + (" <-" if candidate is plan.candidate else "")
        )
    chosen, nearest = plan.candidate, nearest_first(candidates)[0]
    why = "the nearest to"
    if chosen is not nearest:
        shape = nearest.shape
        why = f"the nearest that fits the memory ({shape.num_hidden_layers} x {shape.hidden_size} does not) to"
    lines += [
        f"Speed: {MATMUL_PEAK_SHARE:.0%} of the {plan.precision} products of each shape's decoder, as measured or given.",
        f"Size: in {time_budget} this one sees {describe_ratio(chosen.tokens_per_parameter)} tokens a parameter, {why} the "
        f"{describe_ratio(chosen.best_tokens_per_parameter)} at which {chosen.tokens * chosen.flops_per_token:.1e} FLOPs buy the "
        "lowest loss. Its depth and vocabulary come with its width.",
        f"Batch: {plan.batch_rows} rows ({plan.batch_tokens:,} tokens), by the square root of the tokens; "
        f"{plan.micro_batch_rows} rows at once; about {describe_count(chosen.tokens / plan.batch_tokens)} steps.",
        f"Masked: {chosen.mlm_probability:.0%}; up to {describe_count(FEW_TOKENS)} tokens {MANY_MASKED:.0%}, "
        f"then {USUAL_MASKED:.0%}.",
        f"Neighbour table: up to {describe_count(FEW_TOKENS)} tokens too"
        + (f", {math.prod(NEIGHBOUR_TABLE.values()) / 1e6:.0f} MB." if chosen.sees_few_tokens else ": none."),
        f"Rate: AdamW {plan.learning_rate:g}, by the square root of the width"
        + (f"; Muon {MUON_LEARNING_RATE:g} for the matrices" if plan.uses_muon else "; no Muon")
        + f", whose own products would be {plan.muon_share:.0%} of a step's (up to {LARGEST_MUON_SHARE:.0%} pays).",
    ]
    is_short_of_text = chosen.tokens_per_parameter < chosen.best_tokens_per_parameter
    is_beyond = chosen.shape is (SHAPES[0] if is_short_of_text else SHAPES[-1])
    if is_beyond and chosen.times_off > FAR_OFF:
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
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return measured_machine(accelerator or torch.device("cpu"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan, and write its recipe where asked to."""
    parser = RecipeParser((PlanArguments,), prog=PROGRAM)
    (args,) = parser.parse(sys.argv[1:] if arguments is None else arguments)
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
    with ending_in_one_line(PROGRAM, ValueError, OSError):
        main()
