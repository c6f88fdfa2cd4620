"""
Tokenizing and packing: hf_cram against the way of transformers' run_mlm.py and against the tokenizer alone.

    python benchmarks/data_pipeline.py [--text FILE.parquet] [--repeats 3] [--processes 2]

Every measurement is a process of its own; the arms take turns; medians are compared. All arms use one tokenizer,
trained on the text first. hf_cram's time includes reading the file; the other arms have the text loaded before their
clock starts. Peak memory is that of the whole preparation with its worker processes, tokenizer training included, on
the text once and twice.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_TEXT = REPOSITORY.parent / "shared" / "data" / "classic_books.parquet"
LENGTH = 128
VOCAB_SIZE = 32768
TOKENIZER_CHARACTERS = 20_000_000
ENCODE_BATCH_CHARACTERS = 2_000_000
ARMS = ("hf_cram", "run_mlm", "encode")
RUN_MLM_BAR = 3.0
ENCODE_BAR = 1.25
MEMORY_BAR_GB = 2.0
GROWTH_BAR = 1.1  # "flat": twice the text may cost a tenth more memory


def measure_hf_cram(text: Path, work: Path, processes: int) -> dict:
    from hf_cram.data.packing import write_rows
    from hf_cram.data.sources import SkipReport, read_files
    from hf_cram.data.tokenization import load_tokenizer

    tokenizer = load_tokenizer(work / "tokenizer")
    report = SkipReport()
    started = time.perf_counter()
    counts = write_rows(
        read_files([text], report),
        tokenizer.backend_tokenizer,
        tokenizer.sep_token_id,
        LENGTH,
        1024,
        Path(tempfile.mkdtemp(dir=work)),
        report,
    )
    return {"seconds": time.perf_counter() - started, "tokens": counts["tokens"]}


def measure_run_mlm(text: Path, work: Path, processes: int) -> dict:
    """The two maps of run_mlm.py (without line_by_line), into files, as the script does by default."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    dataset = load_dataset("parquet", data_files=str(text), split="train", cache_dir=tempfile.mkdtemp(dir=work))

    def tokenize(examples: dict) -> dict:
        return tokenizer(examples["text"], return_special_tokens_mask=True)

    def group_texts(examples: dict) -> dict:
        joined = {name: [item for part in parts for item in part] for name, parts in examples.items()}
        total = len(joined["input_ids"]) // LENGTH * LENGTH
        return {name: [items[i : i + LENGTH] for i in range(0, total, LENGTH)] for name, items in joined.items()}

    started = time.perf_counter()
    tokenized = dataset.map(tokenize, batched=True, num_proc=processes, remove_columns=dataset.column_names)
    rows = tokenized.map(group_texts, batched=True, num_proc=processes)
    return {"seconds": time.perf_counter() - started, "tokens": len(rows) * LENGTH}


def measure_encode(text: Path, work: Path, processes: int) -> dict:
    """`encode_batch_fast` on the text in memory; the encodings are thrown away."""
    from tokenizers import Tokenizer

    from hf_cram.data.sources import SkipReport, read_files

    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    batches: list[list[str]] = [[]]
    size = 0
    for document in read_files([text], SkipReport()):
        if size >= ENCODE_BATCH_CHARACTERS:
            batches.append([])
            size = 0
        batches[-1].append(document)
        size += len(document)
    tokens = 0
    started = time.perf_counter()
    for batch in batches:
        tokens += sum(map(len, tokenizer.encode_batch_fast(batch, add_special_tokens=False)))
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def measure_memory(text: Path, work: Path, copies: int) -> dict:
    """Peak resident memory of `prepare_corpus`, from nothing to rows."""
    from hf_cram.data.pipeline import DataArguments, prepare_corpus

    folder = Path(tempfile.mkdtemp(dir=work))
    files = [str(text)]
    for index in range(1, copies):
        files.append(str(shutil.copy(text, folder / f"copy{index}{text.suffix}")))
    memory = PeakMemory()
    started = time.perf_counter()
    corpus = prepare_corpus(DataArguments(train_files=files, vocab_size=VOCAB_SIZE, cache_dir=str(folder / "cache")))
    seconds = time.perf_counter() - started
    peak = memory.stop() / 1e9
    return {"seconds": seconds, "tokens": corpus.statistics["tokens"], "peak_gb": peak}


class PeakMemory:
    """Bytes of this process and its children, shared pages counted once (PSS), sampled five times a second."""

    def __init__(self) -> None:
        self.peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stopped.wait(0.2):
            total = 0
            for member in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
                    total += member.memory_full_info().pss
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self.peak


def train_shared_tokenizer(text: Path, work: Path) -> dict:
    from hf_cram.data.sources import SkipReport, read_files
    from hf_cram.data.tokenization import train_tokenizer

    def head():
        seen = 0
        for document in read_files([text], SkipReport()):
            yield document
            seen += len(document)
            if seen >= TOKENIZER_CHARACTERS:
                return

    train_tokenizer(head(), VOCAB_SIZE, show_progress=False).save_pretrained(work / "tokenizer")
    return {}


def run(arm: str, text: Path, work: Path, processes: int) -> dict:
    """One measurement in a fresh process on `processes` cores."""
    command = [sys.executable, __file__, "--arm", arm, "--text", str(text), "--work", str(work)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "RAYON_NUM_THREADS": str(processes),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run([*command, "--processes", str(processes)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{arm} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(arm: str, text: Path, work: Path, processes: int) -> dict:
    if arm.startswith("memory"):
        return measure_memory(text, work, int(arm.removeprefix("memory")))
    if arm == "tokenizer":
        return train_shared_tokenizer(text, work)
    functions = {"hf_cram": measure_hf_cram, "run_mlm": measure_run_mlm, "encode": measure_encode}
    return functions[arm](text, work, processes)


def verdict(passed: bool) -> str:
    return "PASS" if passed else "MISSED"


def report(text: Path, repeats: int, processes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run("tokenizer", text, work, processes)
        results: dict[str, list[dict]] = {arm: [] for arm in ARMS}
        for _ in range(repeats):
            for arm in ARMS:
                results[arm].append(run(arm, text, work, processes))
        once, twice = run("memory1", text, work, processes), run("memory2", text, work, processes)

    print(f"{text.name}: vocabulary {VOCAB_SIZE}, rows of {LENGTH}, {processes} cores, {repeats} rounds, medians")
    print(f"{'arm':<10}{'seconds':>9}{'range':>16}{'tokens':>13}{'Mtokens/s':>11}")
    for arm in ARMS:
        seconds = [result["seconds"] for result in results[arm]]
        median, tokens = statistics.median(seconds), results[arm][0]["tokens"]
        span = f"{min(seconds):.1f} - {max(seconds):.1f}"
        print(f"{arm:<10}{median:>9.1f}{span:>16}{tokens:>13,}{tokens / median / 1e6:>11.2f}")

    def ratio(arm: str, other: str) -> float:
        """Median over the rounds, each compared with its own neighbour in time."""
        pairs = zip(results[arm], results[other], strict=True)
        return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)

    faster, overhead = ratio("run_mlm", "hf_cram"), ratio("hf_cram", "encode")
    growth = twice["peak_gb"] / once["peak_gb"]
    print(f"run_mlm / hf_cram: {faster:.2f} times (bar {RUN_MLM_BAR}) {verdict(faster >= RUN_MLM_BAR)}")
    print(f"hf_cram / encode alone: {overhead:.2f} (bar {ENCODE_BAR}) {verdict(overhead <= ENCODE_BAR)}")
    for name, result in (("once", once), ("twice", twice)):
        print(
            f"whole preparation, text {name}: {result['seconds']:.1f} s, peak memory {result['peak_gb']:.2f} GB "
            f"(bar {MEMORY_BAR_GB}) {verdict(result['peak_gb'] <= MEMORY_BAR_GB)}"
        )
    print(f"memory twice / once: {growth:.2f} (bar {GROWTH_BAR}) {verdict(growth <= GROWTH_BAR)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="parquet file with a text column")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="cores that every arm may use")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.text, options.work, options.processes)))
    else:
        report(options.text.resolve(), options.repeats, options.processes)


if __name__ == "__main__":
    main()
