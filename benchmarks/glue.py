"""
Fine-tuning examples/s of run_glue.py beside the settings of transformers' own GLUE script, for the same model.

    python benchmarks/glue.py --model out/quickstart --glue_data DIR [--tasks sst2,mrpc] [--examples 640] [--rounds 3]

The peer is the plain Trainer with every example padded to 128 tokens, in random order and fp32, as that script does by
default; batch size and optimiser steps are the same. One pass over the same examples each, in turn, medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from command_line import choose, run_main, verdict
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator
from transformers.utils import logging as transformers_logging

import hf_cram  # noqa: F401 registers the crammed BERT
from hf_cram.classifier import build_classifier, load_tokenizer
from hf_cram.fine_tuning import FineTuner
from hf_cram.fine_tuning_args import EncoderArguments, FineTuningArguments
from hf_cram.glue import TASKS
from hf_cram.glue_data import load_glue_task
from hf_cram.glue_encoding import EncodedTask, encode_task

BAR = 1.5
BATCH_SIZE = 16


def ours(tuner: FineTuner, task: EncodedTask) -> float:
    """Examples/s of the training that run_glue.py does."""
    return tuner.run(task, 1, lambda predictions, references: {}).examples_per_second


def padded_to_128(encoder: EncoderArguments, tokenizer, task: EncodedTask, folder: str) -> float:
    """Examples/s of the plain Trainer on examples padded to 128 tokens."""
    examples = [
        {**tokenizer.pad({k: v for k, v in example.items() if k != "label"}, padding="max_length", max_length=128),
         "labels": example["label"]}
        for example in task.train
    ]  # fmt: skip
    args = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=BATCH_SIZE, num_train_epochs=1, learning_rate=4e-5,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = Trainer(
        build_classifier(encoder, task.data), args, train_dataset=examples, data_collator=default_data_collator
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    return len(examples) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/quickstart")
    parser.add_argument("--glue_data", default=str(Path(__file__).parents[2] / "shared" / "data" / "glue"))
    parser.add_argument("--tasks", default="sst2,mrpc")
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    names = choose(parser, "--tasks", options.tasks, TASKS)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    encoder = EncoderArguments(options.model)
    tokenizer = load_tokenizer(encoder)
    with tempfile.TemporaryDirectory() as folder:
        args = FineTuningArguments(output_dir=folder, num_train_epochs=1, per_device_train_batch_size=BATCH_SIZE)
        tuner = FineTuner(encoder, args, tokenizer)
        for name in names:
            task = encode_task(load_glue_task(TASKS[name], options.glue_data), tokenizer, 128, options.examples)
            task.validation.clear()
            task.test.clear()
            rates: dict[str, list[float]] = {"run_glue.py": [], "padded to 128": []}
            for number in range(options.rounds + 1):  # the first round warms up
                measured = ours(tuner, task), padded_to_128(encoder, tokenizer, task, folder)
                if number:
                    for values, rate in zip(rates.values(), measured, strict=True):
                        values.append(rate)
            medians = {key: statistics.median(values) for key, values in rates.items()}
            ratio = medians["run_glue.py"] / medians["padded to 128"]
            figures = ", ".join(f"{key} {value:.1f} examples/s" for key, value in medians.items())
            print(f"{name}: {figures}, {ratio:.2f}x, bar {BAR}: {verdict(ratio >= BAR)}", flush=True)


if __name__ == "__main__":
    run_main(main)
