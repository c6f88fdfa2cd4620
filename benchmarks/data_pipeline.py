"""
Filter, tokenize, pack, order: hf_cram against the tokenizer alone, plain `datasets`, datatrove and run_mlm.py.

    python benchmarks/data_pipeline.py [--gigabytes 1] [--repeats 3] [--processes 2] [--arms hf_cram,encode,...]

The text is the source file over and over with one word in fifty put elsewhere in its document, built once in the cache
folder, a file a copy. Every measurement is a process of its own; the arms take turns; medians are compared. All arms
use one tokenizer, trained on the beginning of the text first.

    hf_cram    everything from files to ordered rows: compressibility rule and length, tokens, rows, sentence length
    encode     `encode_batch_fast` alone; reading the text is left out of its time
    datasets   the same steps as hf_cram's with map, filter and sort, as the paper's code does
    datatrove  its local executor: a filter by length, tokens on disk (a rule on tokens would tokenize twice)
    plain      hf_cram without filter and order, against
    run_mlm    the two maps of transformers' run_mlm.py

CPU seconds are those of the whole process, imports and reading included. Peak memory is that of all processes of an arm
together, pages that they share counted once; "whole" is all of the preparation from nothing, tokenizer training
included, on a quarter of the text and on all of it.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from command_line import BOOKS, check_file, choose, measure_apart, run_main, verdict

DEFAULT_CACHE = Path.home() / ".cache" / "hf_cram_benchmarks"
LENGTH = 128
EVAL_ROWS = 1024
VOCAB_SIZE = 32768
TOKENIZER_CHARACTERS = 20_000_000
ENCODE_BATCH_CHARACTERS = 2_000_000
MAX_TOKENS_PER_CHARACTER = 0.3
MIN_CHARACTERS = 200
MOVED_WORDS = 0.02
ARMS = ("hf_cram", "encode", "datasets", "datatrove", "plain", "run_mlm")
# (slower arm, faster arm, at least so many times)
SPEED_BARS = (("datasets", "hf_cram", 2.0), ("datatrove", "hf_cram", 2.0), ("run_mlm", "plain", 3.0))
ENCODE_BARS = (("hf_cram", 1.3), ("plain", 1.25))
MEMORY_BAR_GB = 3.0
GROWTH_BAR = 1.1  # "flat": four times the text may cost a tenth more memory


def build_text(source: Path, gigabytes: float, cache: Path) -> Path:
    """A folder of parquet files with so many 10**9 bytes of UTF-8 text, built where it is missing."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    stamp = source.stat()
    folder = cache / f"{source.stem}-{stamp.st_size}-{stamp.st_mtime_ns}-{gigabytes:g}GB"
    if folder.is_dir():
        return folder
    documents = pq.read_table(source, columns=["text"]).column(0).to_pylist()
    staged = Path(tempfile.mkdtemp(dir=cache))
    written, copy = 0.0, 0
    while written < gigabytes * 1e9:
        rng = np.random.default_rng(copy)
        texts = []
        for document in documents:
            if written >= gigabytes * 1e9:
                break
            texts.append(move_words(document, rng) if copy else document)
            written += len(texts[-1].encode())
        pq.write_table(pa.table({"text": texts}), staged / f"text-{copy:05d}.parquet", row_group_size=256)
        copy += 1
    os.replace(staged, folder)
    return folder


def move_words(document: str, rng) -> str:
    """The document with some words in the places of others."""
    words = document.split(" ")
    count = max(1, int(len(words) * MOVED_WORDS))
    for first, second in rng.integers(0, len(words), (count, 2)).tolist():
        words[first], words[second] = words[second], words[first]
    return " ".join(words)


def files_of(text: Path) -> list[str]:
    return sorted(str(path) for path in text.glob("*.parquet"))


def measure_hf_cram(text: Path, work: Path, processes: int, everything: bool = True) -> dict:
    from hf_cram.data.pipeline import DataArguments, prepare_corpus

    rules: dict = {}
    if everything:
        rules = {
            "max_tokens_per_character": MAX_TOKENS_PER_CHARACTER,
            "drop_below_characters": MIN_CHARACTERS,
            "row_order": "sentence_length",
        }
    started = time.perf_counter()
    corpus = prepare_corpus(
        DataArguments(
            train_files=files_of(text), tokenizer_name=str(work / "tokenizer"), max_seq_length=LENGTH,
            eval_rows=EVAL_ROWS, cache_dir=tempfile.mkdtemp(dir=work), preprocessing_workers=processes, **rules,
        )
    )  # fmt: skip
    return {"seconds": time.perf_counter() - started, "tokens": corpus.statistics["tokens"]}


def measure_plain(text: Path, work: Path, processes: int) -> dict:
    return measure_hf_cram(text, work, processes, everything=False)


def text_batches(text: Path) -> Iterator[list[str]]:
    from hf_cram.data.errors import SkipReport
    from hf_cram.data.text_files import read_files

    batch: list[str] = []
    size = 0
    for document in read_files([Path(name) for name in files_of(text)], SkipReport()):
        batch.append(document)
        size += len(document)
        if size >= ENCODE_BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def measure_encode(text: Path, work: Path, processes: int) -> dict:
    """The encodings are thrown away."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    tokens, seconds = 0, 0.0
    for batch in text_batches(text):
        started = time.perf_counter()
        tokens += sum(map(len, tokenizer.encode_batch_fast(batch, add_special_tokens=False)))
        seconds += time.perf_counter() - started
    return {"seconds": seconds, "tokens": tokens}


def load_text(text: Path, work: Path):
    from datasets import load_dataset

    return load_dataset("parquet", data_files=files_of(text), split="train", cache_dir=tempfile.mkdtemp(dir=work))


def group_texts(examples: dict) -> dict:
    joined = {name: [item for part in parts for item in part] for name, parts in examples.items()}
    total = len(joined["input_ids"]) // LENGTH * LENGTH
    return {name: [items[i : i + LENGTH] for i in range(0, total, LENGTH)] for name, items in joined.items()}


def measure_datasets(text: Path, work: Path, processes: int) -> dict:
    """The steps of the paper's code; the rows are written out in their order at the end, as training reads them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    ends = [tokenizer.convert_tokens_to_ids(sign) for sign in ".!?"]
    dataset = load_text(text, work)

    def tokenize(examples: dict) -> dict:
        encoded = tokenizer(examples["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {
            "input_ids": [[*ids, tokenizer.sep_token_id] for ids in encoded],
            "characters": list(map(len, examples["text"])),
        }

    def keep(examples: dict) -> list[bool]:
        pairs = zip(examples["input_ids"], examples["characters"], strict=True)
        return [size >= MIN_CHARACTERS and len(ids) - 1 < MAX_TOKENS_PER_CHARACTER * size for ids, size in pairs]

    def score(examples: dict) -> dict:
        return {"score": [sum(map(row.count, ends)) for row in examples["input_ids"]]}

    started = time.perf_counter()
    tokenized = dataset.map(tokenize, batched=True, num_proc=processes, remove_columns=dataset.column_names)
    kept = tokenized.filter(keep, batched=True, num_proc=processes).remove_columns("characters")
    rows = kept.map(group_texts, batched=True, num_proc=processes)
    scored = rows.map(score, batched=True, num_proc=processes)
    ordered = scored.sort("score", reverse=True).flatten_indices(num_proc=processes)
    return {"seconds": time.perf_counter() - started, "tokens": len(ordered) * LENGTH}


def measure_run_mlm(text: Path, work: Path, processes: int) -> dict:
    """The two maps of run_mlm.py (without line_by_line), into files, as the script does by default."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    dataset = load_text(text, work)

    def tokenize(examples: dict) -> dict:
        return tokenizer(examples["text"], return_special_tokens_mask=True)

    started = time.perf_counter()
    tokenized = dataset.map(tokenize, batched=True, num_proc=processes, remove_columns=dataset.column_names)
    rows = tokenized.map(group_texts, batched=True, num_proc=processes)
    return {"seconds": time.perf_counter() - started, "tokens": len(rows) * LENGTH}


def is_long_enough(document) -> bool:
    return len(document.text) >= MIN_CHARACTERS


def measure_datatrove(text: Path, work: Path, processes: int) -> dict:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    folder = Path(tempfile.mkdtemp(dir=work))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core
    started = time.perf_counter()
    LocalPipelineExecutor(
        [
            ParquetReader(str(text)),
            LambdaFilter(is_long_enough),
            DocumentTokenizer(
                str(folder / "tokens"), str(work / "tokenizer" / "tokenizer.json"), eos_token="[SEP]",
                batch_size=100, shuffle_documents=False,
            ),
        ],
        tasks=len(files_of(text)), workers=processes, logging_dir=str(folder / "logs"), start_method="fork",
    ).run()  # fmt: skip
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in (folder / "tokens").rglob("*.ds"))
    return {"seconds": seconds, "tokens": size // 2}


def measure_whole(text: Path, work: Path, processes: int) -> dict:
    """From nothing to ordered rows."""
    from hf_cram.data.pipeline import DataArguments, prepare_corpus

    started = time.perf_counter()
    corpus = prepare_corpus(
        DataArguments(
            train_files=files_of(text), vocab_size=VOCAB_SIZE, max_seq_length=LENGTH, eval_rows=EVAL_ROWS,
            max_tokens_per_character=MAX_TOKENS_PER_CHARACTER, row_order="sentence_length",
            preprocessing_workers=processes, cache_dir=tempfile.mkdtemp(dir=work),
        )
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": corpus.statistics["tokens"], "table": corpus.table}


def train_shared_tokenizer(text: Path, work: Path, processes: int) -> dict:
    from hf_cram.data.tokenization import train_tokenizer

    def head():
        seen = 0
        for batch in text_batches(text):
            yield from batch
            seen += sum(map(len, batch))
            if seen >= TOKENIZER_CHARACTERS:
                return

    train_tokenizer(head(), VOCAB_SIZE, show_progress=False).save_pretrained(work / "tokenizer")
    return {}


MEASUREMENTS = {
    "hf_cram": measure_hf_cram,
    "plain": measure_plain,
    "encode": measure_encode,
    "datasets": measure_datasets,
    "run_mlm": measure_run_mlm,
    "datatrove": measure_datatrove,
    "whole": measure_whole,
    "tokenizer": train_shared_tokenizer,
}


def run(arm: str, text: Path, work: Path, processes: int) -> dict:
    """One measurement in a fresh process on `processes` cores."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        (Path(folder) / "tokenizer").symlink_to(work / "tokenizer")
        place = str(work) if arm == "tokenizer" else folder
        return measure_apart(
            ["--arm", arm, "--text", str(text), "--work", place, "--processes", str(processes)],
            RAYON_NUM_THREADS=str(processes), HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        )  # fmt: skip


def measure(arm: str, text: Path, work: Path, processes: int) -> dict:
    from hf_cram.data.steps import PeakMemory

    with PeakMemory() as memory:
        result = MEASUREMENTS[arm](text, work, processes)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    return {**result, "cpu_seconds": cpu_seconds, "peak_gb": memory.peak_bytes / 1e9}


def print_arms(results: dict[str, list[dict]]) -> None:
    print(f"{'arm':<10}{'seconds':>9}{'range':>16}{'tokens':>14}{'Mtokens/s':>11}{'CPU s':>8}{'peak GB':>9}")
    for arm, rounds in results.items():
        seconds = [result["seconds"] for result in rounds]
        median, tokens = statistics.median(seconds), rounds[0]["tokens"]
        span, peak = f"{min(seconds):.1f} - {max(seconds):.1f}", max(result["peak_gb"] for result in rounds)
        cpu = statistics.median(result["cpu_seconds"] for result in rounds)
        speed = tokens / median / 1e6
        print(f"{arm:<10}{median:>9.1f}{span:>16}{tokens:>14,}{speed:>11.2f}{cpu:>8.1f}{peak:>9.2f}")


def print_bars(results: dict[str, list[dict]]) -> None:
    def ratio(arm: str, other: str) -> float:
        """Median over the rounds, each compared with its own neighbour in time."""
        pairs = zip(results[arm], results[other], strict=True)
        return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)

    for arm, bar in ENCODE_BARS:
        if {arm, "encode"} <= set(results):
            overhead = ratio(arm, "encode")
            print(f"{arm} / encode alone: {overhead:.2f} (bar {bar}) {verdict(overhead <= bar)}")
    for slower, faster, bar in SPEED_BARS:
        if {slower, faster} <= set(results):
            times = ratio(slower, faster)
            print(f"{slower} / {faster}: {times:.2f} times (bar {bar}) {verdict(times >= bar)}")


def print_memory(small: dict, large: dict) -> None:
    for name, result in (("a quarter", small), ("all", large)):
        print(
            f"whole preparation of {name} of the text: {result['seconds']:.1f} s, peak memory "
            f"{result['peak_gb']:.2f} GB (bar {MEMORY_BAR_GB}) {verdict(result['peak_gb'] <= MEMORY_BAR_GB)}"
        )
    growth = large["peak_gb"] / small["peak_gb"]
    print(f"memory for all / a quarter: {growth:.2f} (bar {GROWTH_BAR}) {verdict(growth <= GROWTH_BAR)}")
    print(large["table"])


def report(options: argparse.Namespace) -> None:
    options.cache.mkdir(parents=True, exist_ok=True)
    text = build_text(options.text.resolve(), options.gigabytes, options.cache)
    quarter = build_text(options.text.resolve(), options.gigabytes / 4, options.cache)
    arms, processes = options.arms.split(","), options.processes
    with tempfile.TemporaryDirectory(dir=options.cache) as folder:
        work = Path(folder)
        run("tokenizer", text, work, processes)
        results: dict[str, list[dict]] = {arm: [] for arm in arms}
        for _ in range(options.repeats):
            for arm in arms:
                results[arm].append(run(arm, text, work, processes))
        print(
            f"{text.name}: vocabulary {VOCAB_SIZE}, rows of {LENGTH}, {processes} cores, {options.repeats} rounds, medians"
        )
        print_arms(results)
        print_bars(results)
        if not options.skip_memory:
            print_memory(run("whole", quarter, work, processes), run("whole", text, work, processes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=BOOKS, help="parquet file with a text column")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the text that is built from it")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for that text and all work")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="cores that every arm may use")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms to run, with commas between them")
    parser.add_argument("--skip_memory", action="store_true", help="leave out the whole preparations")
    parser.add_argument("--arm", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.text, options.work, options.processes)))
    else:
        choose(parser, "--arms", options.arms, ARMS)
        check_file(parser, "--text", options.text)
        if "datatrove" in options.arms and importlib.util.find_spec("datatrove") is None:
            parser.error("--arms: datatrove is not installed: pip install '.[dev]', or leave it out")
        report(options)


if __name__ == "__main__":
    run_main(main)
