"""
Does better text help? The same model and clock on a text as it is, filtered, deduplicated, sorted, and all of it.

    python benchmarks/data_ablation.py --clean BOOKS.parquet --noisy DOCS.parquet --output_dir D
        [--time_budget 5m] [--seeds 3] [--arms raw,filtered,...]

The noisy documents are mixed into the clean ones; held out are sections of the books, not whole books. All arms share
one tokenizer, trained on the raw mix, and are measured on one held-out text: clean, shuffled, disjoint by document,
masks drawn once at 15 %. Every run is a process of its own, the arms take turns, compiling and measuring are outside
the clock. D/results.json holds everything.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import speedrun
from command_line import check_file, choose, run_main

from hf_cram.budget import parse_duration
from hf_cram.data.pipeline import DataArguments, prepare_corpus

RECIPE = Path(__file__).parents[1] / "training_args" / "quickstart.yaml"
VOCAB_SIZE, LENGTH, EVAL_ROWS = 8192, 128, 512
HELD_OUT_EVERY = 40  # of the clean documents
SEED = 0

# The paper's filter, Gopher's limits on repetition, English; the paper's length of passages.
FILTERS = {
    "max_tokens_per_character": 0.3,
    "drop_below_characters": 200,
    "min_letter_share": 0.8,
    "max_repeated_line_share": 0.2,
    "max_repeated_ngram_share": 0.15,
    "keep_language": "en",
}
DEDUPLICATION = {"near_dedup_similarity": 0.8, "dedup_substring_bytes": 100}
ORDER = {"row_order": "sentence_length"}
ARMS = {
    "raw": {},
    "filtered": FILTERS,
    "filtered+dedup": {**FILTERS, **DEDUPLICATION},
    "filtered+sorted": {**FILTERS, **ORDER},
    "all": {**FILTERS, **DEDUPLICATION, **ORDER},
}


def build_texts(clean: Path, noisy: Path, folder: Path) -> tuple[Path, Path]:
    """The mix to train on and the clean text to be measured on, both shuffled, as parquet files."""
    rng = np.random.default_rng(SEED)
    books = pq.read_table(clean, columns=["text"])["text"].to_pylist()
    held_out = set(range(0, len(books), HELD_OUT_EVERY))
    mix = [text for index, text in enumerate(books) if index not in held_out]
    mix += pq.read_table(noisy, columns=["text"])["text"].to_pylist()
    paths = []
    for name, texts in (("mix", mix), ("held_out", [books[index] for index in sorted(held_out)])):
        path = folder / f"{name}.parquet"
        pq.write_table(pa.table({"text": [texts[index] for index in rng.permutation(len(texts))]}), path)
        paths.append(path)
    return paths[0], paths[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=Path, required=True, help="parquet file of clean text")
    parser.add_argument("--noisy", type=Path, required=True, help="parquet file of text that needs the steps")
    parser.add_argument("--recipe", default=str(RECIPE), help="model and training of every arm")
    parser.add_argument("--time_budget", default="5m")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    names = choose(parser, "--arms", options.arms, ARMS)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    check_file(parser, "--clean", options.clean)
    check_file(parser, "--noisy", options.noisy)
    arm, budget = speedrun.split_fields(speedrun.read_arm(options.recipe)), parse_duration(options.time_budget)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    mix, held_out = build_texts(options.clean, options.noisy, options.output_dir)
    common = {"max_seq_length": LENGTH, "cache_dir": str(options.output_dir / "cache")}
    raw = prepare_corpus(DataArguments(train_files=[str(mix)], vocab_size=VOCAB_SIZE, eval_rows=1, **common))
    common["tokenizer_name"] = str(raw.directory / "tokenizer")
    # Its training rows are what every arm is measured on: nearly all of the clean text that was held out.
    measured = prepare_corpus(DataArguments(train_files=[str(held_out)], eval_rows=1, **common))

    jobs = {}
    for name in names:
        corpus = prepare_corpus(DataArguments(train_files=[str(mix)], eval_rows=1, **common, **ARMS[name]))
        order = {"train_sampling_strategy": "sequential"} if "row_order" in ARMS[name] else {}
        ordered = {**arm, "training": {**arm["training"], **order}}
        print(f"{name}: {len(corpus.train_dataset):,} rows, dropped {corpus.statistics['dropped']}", flush=True)
        jobs[name] = {
            "arm": ordered, "corpus": str(corpus.directory), "eval_file": str(measured.directory / "train.bin"),
            "length": LENGTH, "eval_rows": EVAL_ROWS, "max_steps": 0, "use_cpu": True, "count_compile": False,
            "time_budget_seconds": budget, "output_dir": str(options.output_dir),
        }  # fmt: skip
    speedrun.check_arms(jobs, measured.tokenizer)
    speedrun.set_earlier_aside(options.output_dir)
    summary = speedrun.report(speedrun.run_all(jobs, options.seeds, options.output_dir), options.output_dir)
    base = statistics.median(summary["arms"][summary["rival"]]["final_loss"])
    for name, arm in summary["arms"].items():
        print(f"{name:<18}{statistics.median(arm['final_loss']) - base:+.3f} nats against {summary['rival']}")


if __name__ == "__main__":
    run_main(main)
