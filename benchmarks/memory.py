"""
Peak memory of training on this machine's GPU, or CPU without one, against the calculation of `hf_cram/training_memory.py`.

    python benchmarks/memory.py [--cases small-16,medium-32] [--compile]

Each case is a process of its own: two optimiser steps of the CramTrainer with bf16 autocast on rows of 128 tokens,
25 % masked, AdamW, two micro-batches a step where the name ends in -accumulating. Measured are the highest resident set
less that before the model was built (libraries and kernels loaded by a tiny run), and what the second step adds to
what lasts. With --compile only the latter counts, because compiling itself leaves hundreds of MB behind: its figure
against the calculation, which is of the eager step, tells how much compiling saves. On a GPU the tensors are
measured, as its allocator counts them.
"""

import argparse
import gc
import json
import tempfile

import numpy as np
import psutil
import torch
from command_line import measure_apart, run_main, verdict
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback

from hf_cram import CrammedBertConfig, CrammedBertForMaskedLM
from hf_cram.data.collator import DataCollatorForFixedCountMasking
from hf_cram.hardware import forget_peak_memory, peak_memory_bytes
from hf_cram.trainer import CramTrainer
from hf_cram.training_args import CramTrainingArguments
from hf_cram.training_memory import TrainingSetup, estimate_training_memory

BAR = 0.15
LENGTH = 128
# layers, hidden size, heads, feed-forward, vocabulary
SHAPES = {
    "small": (4, 256, 4, 1024, 8192),
    "medium": (8, 512, 8, 2048, 32768),
    "paper": (16, 768, 12, 3072, 32768),
}
CASES = ("small-16", "small-64", "small-128", "small-64-accumulating", "medium-16", "medium-32-accumulating")
GPU_CASES = ("medium-64", "paper-64", "paper-256", "paper-256-accumulating", "paper-512")
ON_GPU, CPU = torch.cuda.is_available(), torch.device("cpu")
# Freed tensors go back to the system at once: what is measured is what lives, not what the allocator keeps.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "TOKENIZERS_PARALLELISM": "false"}


def highest_bytes() -> int:
    """Most memory that was taken since the last [`restart_highest`]."""
    return torch.cuda.max_memory_allocated() if ON_GPU else peak_memory_bytes(CPU)


def restart_highest() -> int:
    """Let [`highest_bytes`] start again from what is taken now, which is returned."""
    gc.collect()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    forget_peak_memory(CPU)
    return psutil.Process().memory_info().rss


class StepMeter(TrainerCallback):
    """Most memory of the whole run and of its second step."""

    def __init__(self) -> None:
        self.highest = self.between_steps = self.second_step = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.highest = max(self.highest, highest_bytes())
        if state.global_step == 1:
            self.between_steps = restart_highest()
        else:
            self.second_step = highest_bytes() - self.between_steps


def build_config(shape: tuple[int, ...]) -> CrammedBertConfig:
    layers, hidden_size, heads, intermediate_size, vocab_size = shape
    return CrammedBertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        max_position_embeddings=LENGTH,
    )


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(vocab_size - 2)}
    backend = Tokenizer(models.WordLevel({"[PAD]": vocab_size - 2, "[MASK]": vocab_size - 1, **words}, "[PAD]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", mask_token="[MASK]")


def train(config: CrammedBertConfig, micro_batch: int, micro_batches: int, compiled: bool) -> StepMeter:
    """Two optimiser steps of a new model."""
    tokenizer, meter = build_tokenizer(config.vocab_size), StepMeter()
    rows = np.random.default_rng(0).integers(0, config.vocab_size - 2, (4 * micro_batch * micro_batches, LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        arguments = CramTrainingArguments(
            output_dir=folder, max_steps=2, per_device_train_batch_size=micro_batch, bf16=True, use_cpu=not ON_GPU,
            train_batch_rows=micro_batch * micro_batches, torch_compile=compiled, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        CramTrainer(
            CrammedBertForMaskedLM(config),
            arguments,
            train_dataset=[{"input_ids": row} for row in rows],
            data_collator=DataCollatorForFixedCountMasking(tokenizer, "0.25"),
            callbacks=[meter],
        ).train()
    return meter


def read_case(case: str) -> tuple[CrammedBertConfig, int, int]:
    """Configuration, rows of a micro-batch, micro-batches of a step. Raises `ValueError` for what is no case."""
    shape, _, rest = case.partition("-")
    rows, *accumulating = rest.split("-")
    if shape not in SHAPES or not rows.isdecimal() or int(rows) < 1 or accumulating not in ([], ["accumulating"]):
        raise ValueError(f"--cases: {case!r} is not SHAPE-ROWS[-accumulating] with a shape of {', '.join(SHAPES)}")
    return build_config(SHAPES[shape]), int(rows), 2 if accumulating else 1


def measure(case: str, compiled: bool) -> dict[str, int]:
    """Bytes that training one case takes in this process."""
    train(build_config((1, 64, 1, 128, 512)), 2, 1, compiled=False)
    base = restart_highest()
    meter = train(*read_case(case), compiled)
    return {"total": meter.highest - base, "step": meter.second_step}


def calculate(case: str) -> dict[str, int]:
    """The same by calculation."""
    config, rows, micro_batches = read_case(case)
    setup = TrainingSetup(LENGTH, 0.25, torch.bfloat16, accumulates_gradients=micro_batches > 1)
    memory = estimate_training_memory(config, setup, rows)
    return {"total": memory.total_bytes, "step": memory.total_bytes - memory.weights - memory.optimizer_states}


def run_case(case: str, compiled: bool) -> dict[str, int]:
    return measure_apart(["--measure", case, *["--compile"] * compiled], **ENVIRONMENT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", default=",".join(GPU_CASES if ON_GPU else CASES), help="comma-separated: SHAPE-ROWS[-accumulating]"
    )
    parser.add_argument("--compile", action="store_true", help="the compiled step against the eager calculation")
    parser.add_argument("--measure", help="measure this case here and print JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.compile)))
        return
    cases = options.cases.split(",")
    for case in cases:
        read_case(case)
    print(
        f"{'case':<26}{'total MB':>10}{'calculated':>12}{'error':>8}{'':>8}{'step MB':>10}{'calculated':>12}{'error':>8}"
    )
    for case in cases:
        measured, calculated = run_case(case, options.compile), calculate(case)
        error = {name: calculated[name] / measured[name] - 1 for name in measured}
        passed = "" if options.compile else verdict(abs(error["total"]) <= BAR)
        columns = [
            f"{measured[name] / 1e6:>10,.0f}{calculated[name] / 1e6:>12,.0f}{error[name]:>+8.1%}" for name in measured
        ]
        print(f"{case:<26}{columns[0]}{passed:>8}{columns[1]}", flush=True)


if __name__ == "__main__":
    run_main(main)
