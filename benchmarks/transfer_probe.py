"""
Does an encoder help downstream? A frozen probe and a short fine-tuning on SST-2, CoLA and STS-B, in under 3 minutes.

    python benchmarks/transfer_probe.py --model out/quickstart --glue_data DIR [--seeds 1] [--from_scratch]

Frozen: logistic or ridge regression on mean-pooled last states (of a pair: the absolute difference and the product of
both means). Short: one setting for all tasks (SHORT below) on at most 4,000 examples. Scores are GLUE's, in per cent.
"""

import argparse
import contextlib
import copy
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from command_line import run_main
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

import hf_cram  # noqa: F401 registers the crammed BERT
from hf_cram.classifier import longest_example
from hf_cram.fine_tuning_args import EncoderArguments, FineTuningArguments
from hf_cram.glue_args import GlueArguments, parse_seeds
from hf_cram.glue_data import TaskData
from hf_cram.glue_encoding import EncodedTask, encode_task
from hf_cram.glue_run import GlueRun

TASKS = "sst2,cola,stsb"
MOST_EXAMPLES = 4000
SHORT = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-4,
    "embedding_lr_multiplier": 5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}


def mean_states(model, tokenizer, examples: list[dict], batch_size: int = 64) -> np.ndarray:
    """Means over the tokens of each example, of each text of a pair apart: (examples, texts, H)."""
    features: list[np.ndarray | None] = [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        keys = ("input_ids", "attention_mask", "token_type_ids")
        batch = tokenizer.pad(
            [{key: examples[index][key] for key in keys if key in examples[index]} for index in chosen],
            pad_to_multiple_of=8, return_tensors="pt",
        )  # fmt: skip
        segments = batch.pop("token_type_ids", torch.zeros_like(batch["input_ids"]))
        with torch.no_grad():
            states = model(**batch).last_hidden_state.float()  # (B, L, H)
        parts = []
        for segment in range(int(segments.max()) + 1):
            kept = (batch["attention_mask"] * (segments == segment)).unsqueeze(-1)  # (B, L, 1)
            parts.append((states * kept).sum(1) / kept.sum(1).clamp(min=1))
        for index, row in zip(chosen, torch.stack(parts, 1).numpy(), strict=True):
            features[index] = row
    return np.stack([row for row in features if row is not None])


def frozen_scores(model, tokenizer, encoded: EncodedTask, data: TaskData) -> float:
    """The task's headline score, in per cent, of a linear model on frozen features (of the STS-B kind: ridge)."""
    from scipy.stats import pearsonr
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sets = []
    for examples in (encoded.train, next(iter(encoded.validation.values()))):
        examples = list(examples)
        states = mean_states(model, tokenizer, examples)
        if states.shape[1] == 2:
            first, second = states[:, 0], states[:, 1]
            states = np.concatenate((np.abs(first - second), first * second), axis=-1)
        sets.append((states.reshape(len(states), -1), np.array([example["label"] for example in examples])))
    (train_x, train_y), (valid_x, valid_y) = sets
    if data.is_regression:
        estimator = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11)))
        return 100 * pearsonr(estimator.fit(train_x, train_y).predict(valid_x), valid_y).statistic
    estimator = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    scores = {"matthews_correlation": matthews_corrcoef, "f1": f1_score, "accuracy": accuracy_score}
    score = scores[data.task.headline]
    return 100 * float(score(valid_y, estimator.fit(train_x, train_y).predict(valid_x)))


def probe(model_folder: str, glue_data: str, seeds: str, from_scratch: bool, tasks: str = TASKS) -> dict:
    """Scores by task: `{"frozen": {task: score}, "short": {task: [score of each seed]}, "seconds": ...}`."""
    started = time.monotonic()
    chosen_seeds = parse_seeds("seeds", seeds)
    config = AutoConfig.from_pretrained(model_folder)
    # No row of pretraining begins with a token of its own: where the model has the choice, the mean is read.
    pooling = (
        "segments"
        if config.model_type == "crammed_bert"
        else "mean"
        if hasattr(config, "classifier_pooling")
        else None
    )
    if pooling != "segments":
        print(
            f"{config.model_type} reads {pooling or 'its first token'}, not both texts apart: compare the frozen scores"
        )
    encoder = EncoderArguments(model_name_or_path=model_folder, from_scratch=from_scratch, pooling=pooling)
    with tempfile.TemporaryDirectory() as folder:
        glue = GlueArguments(tasks=tasks, glue_data=glue_data, max_train_samples=MOST_EXAMPLES)
        args = FineTuningArguments(output_dir=folder, report_to="none", **SHORT)
        run = GlueRun(encoder, glue, args)
        model = AutoModel.from_pretrained(model_folder)
        if from_scratch:
            torch.manual_seed(0)
            model = AutoModel.from_config(model.config)
        # Tells the two texts apart, whatever the model's own head reads.
        tokenizer = copy.deepcopy(run.tokenizer)
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        frozen = {}
        for task in run.tasks:
            data = run.encoded(task).data
            encoded = encode_task(data, tokenizer, longest_example(encoder, tokenizer), MOST_EXAMPLES)
            frozen[task.name] = frozen_scores(model, tokenizer, encoded, data)
        with contextlib.redirect_stderr(io.StringIO()):  # one bar of the harness is enough
            results = run.run(args, chosen_seeds)
    short = {task.name: results["tasks"][task.name][task.headline]["values"] for task in run.tasks}
    return {"frozen": frozen, "short": short, "seconds": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--glue_data", required=True)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--from_scratch", action="store_true", help="random weights of the same shape")
    parser.add_argument("--output", help="write the scores to this JSON file")
    options = parser.parse_args()
    if options.output and not Path(options.output).parent.is_dir():
        parser.error(f"--output: no folder {Path(options.output).parent}")
    transformers_logging.set_verbosity_error()
    result = probe(options.model, options.glue_data, options.seeds, options.from_scratch, options.tasks)
    for name, score in result["frozen"].items():
        values = ", ".join(f"{value:.1f}" for value in result["short"][name])
        print(f"{name:<6} frozen {score:6.1f}   short fine-tuning {values}")
    print(f"{result['seconds']:.0f} s")
    if options.output:
        Path(options.output).write_text(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
