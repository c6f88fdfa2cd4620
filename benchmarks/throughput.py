"""
Training tokens/s of CramTrainer against transformers' own models in the plain Trainer, at equal shape.

    python benchmarks/throughput.py [--shapes small,base,gpu] [--rounds 3]

Every measurement is a process of its own; the arms take turns; medians are compared. Each arm trains in bf16 and
compiled, on the same rows of random tokens, with the same share of masked tokens, and with the faster attention: on a CPU
eager for the crammed model and ModernBERT, sdpa for BERT, which has dropout in it. The crammed arm also times its bare
step (the same batches, model and optimiser without the Trainer) in turn with the Trainer's, in one process.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass

from command_line import choose, measure_apart, run_main, verdict

SHAPES = {
    "small": {"layers": 4, "hidden": 256, "heads": 4, "ffn": 1024, "micro_batch": 64, "steps": 20},
    "base": {"layers": 12, "hidden": 768, "heads": 12, "ffn": 3072, "micro_batch": 16, "steps": 4},
    "gpu": {"layers": 12, "hidden": 768, "heads": 12, "ffn": 3072, "micro_batch": 256, "steps": 40},
}
ARMS = ("crammed", "bert", "modernbert")
BARS = {"bert": 1.8, "modernbert": 1.25}
VOCAB_SIZE, LENGTH, MASK_RATE, WARMUP_STEPS = 8192, 128, 0.25, 4
OVERHEAD_BAR = 0.03


def build_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    words = [*special.values(), *(f"w{index}" for index in range(VOCAB_SIZE - len(special)))]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


def build_rows(count: int):
    import numpy as np

    tokens = np.random.default_rng(0).integers(5, VOCAB_SIZE, (count, LENGTH))
    return [{"input_ids": row} for row in tokens]


def build_model(arm: str, shape: dict):
    import torch
    from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, ModernBertConfig

    from hf_cram import CrammedBertConfig, CrammedBertForMaskedLM

    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": shape["ffn"],
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
    }
    if arm == "crammed":
        return CrammedBertForMaskedLM(CrammedBertConfig(**common))
    if arm == "bert":
        return BertForMaskedLM(BertConfig(**common))
    # ModernBERT counts the gate apart: so its feed-forward block has the matrices of the crammed one.
    common["intermediate_size"] = shape["ffn"] // 2
    special = {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    config = ModernBertConfig(**common, **special, sparse_prediction=True)
    # CramTrainer chooses it for the crammed one.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    return AutoModelForMaskedLM.from_config(config, attn_implementation=attention)


def synchronize() -> None:
    """Wait for a GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Timer:
    """Marks the time at the end of chosen steps."""

    marks: dict[int, float]

    def mark(self, step: int) -> None:
        synchronize()
        self.marks[step] = time.perf_counter()


def measure(arm: str, shape: dict) -> dict:
    """Train one arm in this process; returns its tokens/s and, for the crammed arm, the Trainer's overhead."""
    import torch
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments, set_seed

    from hf_cram.data.collator import DataCollatorForFixedCountMasking
    from hf_cram.trainer import CramTrainer
    from hf_cram.training_args import CramTrainingArguments

    torch.set_flush_denormal(True)
    set_seed(0)
    steps, micro_batch = shape["steps"], shape["micro_batch"]
    blocks = 2 if arm != "crammed" else 4
    total_steps = WARMUP_STEPS + blocks * (steps // 2)
    tokenizer, model, rows = build_tokenizer(), build_model(arm, shape), build_rows(total_steps * micro_batch)
    timer = Timer({})
    bare_seconds: list[float] = []

    class Timing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            done = state.global_step - WARMUP_STEPS
            if done >= 0 and done % (steps // 2) == 0:
                timer.mark(state.global_step)
                if arm == "crammed":
                    bare_seconds.append(bare_block(trainer, steps // 2))
                    timer.mark(-state.global_step)

    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": micro_batch,
        "max_steps": total_steps,
        "bf16": True,
        "torch_compile": True,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
    }
    if arm == "crammed":
        collator = DataCollatorForFixedCountMasking(tokenizer, MASK_RATE)
        args = CramTrainingArguments(**common, lr_schedule="constant", max_grad_norm=0.5)
        trainer = CramTrainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[Timing()])
    else:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_RATE)
        args = TrainingArguments(**common, logging_steps=10**9)
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[Timing()])

    trainer.train()
    block_tokens = steps // 2 * micro_batch * LENGTH
    marks = timer.marks
    block_steps = [step for step in marks if step > 0]
    seconds = [marks[b] - marks.get(-a, marks[a]) for a, b in zip(block_steps, block_steps[1:], strict=False)]
    result = {"tokens_per_second": block_tokens / statistics.median(seconds)}
    if arm == "crammed":
        pairs = zip(seconds, bare_seconds, strict=False)
        result["overhead"] = statistics.median(trained / bare - 1 for trained, bare in pairs)
    return result


def bare_block(trainer, count: int) -> float:
    """Seconds of `count` steps of the trainer's model and optimiser on its rows, without the Trainer."""
    import torch

    rows, micro_batch = trainer.train_dataset, trainer.args.per_device_train_batch_size
    started = time.perf_counter()
    for index in range(count):
        batch = trainer.data_collator(rows[index * micro_batch : (index + 1) * micro_batch])
        batch = {name: tensor.to(trainer.args.device, non_blocking=True) for name, tensor in batch.items()}
        loss = trainer.model_wrapped(**batch, num_items_in_batch=batch["labels"].ne(-100).sum()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 0.5)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - started


def run_arm(arm: str, shape_name: str) -> dict:
    return measure_apart(["--arm", arm, "--shapes", shape_name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="small,base", help="comma-separated: " + ", ".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS, help="measure this arm here and print JSON")
    options = parser.parse_args()
    shapes = choose(parser, "--shapes", options.shapes, SHAPES)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.arm:
        if len(shapes) > 1:
            parser.error("--arm measures one of --shapes: name it")
        print(json.dumps(measure(options.arm, SHAPES[options.shapes])))
        return
    for shape_name in shapes:
        shape = SHAPES[shape_name]
        print(
            f"{shape_name}: {shape['layers']} layers x {shape['hidden']}, FFN {shape['ffn']}, vocabulary {VOCAB_SIZE},"
        )
        print(f"  rows of {LENGTH}, micro-batch {shape['micro_batch']}, {options.rounds} rounds, medians")
        results: dict[str, list[dict]] = {arm: [] for arm in ARMS}
        for _ in range(options.rounds):
            for arm in ARMS:
                results[arm].append(run_arm(arm, shape_name))
        rates = {arm: statistics.median(r["tokens_per_second"] for r in results[arm]) for arm in ARMS}
        print(f"  {'arm':<12}{'tokens/s':>10}{'crammed / arm':>16}{'bar':>8}")
        for arm in ARMS:
            ratios = [
                a["tokens_per_second"] / b["tokens_per_second"]
                for a, b in zip(results["crammed"], results[arm], strict=True)
            ]
            ratio, bar = statistics.median(ratios), BARS.get(arm)
            passed = "" if bar is None else f"{bar:>8} {verdict(ratio >= bar)}"
            print(f"  {arm:<12}{rates[arm]:>10,.0f}{ratio:>16.2f}{passed}")
        overhead = statistics.median(r["overhead"] for r in results["crammed"])
        print(
            f"  Trainer's overhead over the bare step: {overhead:.1%} (bar under {OVERHEAD_BAR:.0%}) "
            f"{verdict(overhead < OVERHEAD_BAR)}"
        )


if __name__ == "__main__":
    run_main(main)
