"""
Removing repeated passages and near-duplicate documents: speed on one core, and whether the memory bound is kept.

    python benchmarks/deduplication.py [--text FILE.parquet] [--memory_mb 1000] [--copies 2] [--change_every 1000]

The text as it is, and that text several times over, in every copy but the first about one word in `change_every`
characters replaced: nearly all of it repeats then, the hard case. Every measurement is a process of its own on one
thread, which reads the text from a file. MB are 10**6 bytes of text a second of processor time, which other users of
the machine do not change; the seconds that passed stand beside it. Memory is the peak above what the process held
before, and the stated bound is `memory_mb` for passages.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from command_line import BOOKS, check_file, measure_apart, run_main, verdict

SPEED_BAR = 1.5
NEAR_SIMILARITY = 0.8


def write_text(text: Path, target: Path, copies: int, change_every: int) -> int:
    """The text `copies` times as JSON lines; returns its bytes."""
    num_bytes = 0
    with open(target, "w", encoding="utf-8") as file:
        for copy in range(copies):
            rng = random.Random(copy)
            for batch in pq.ParquetFile(text).iter_batches(500, columns=["text"]):
                for document in batch["text"].to_pylist():
                    changed = change_words(document, rng, change_every) if copy else document
                    num_bytes += len(changed.encode())
                    file.write(json.dumps(changed, ensure_ascii=False) + "\n")
    return num_bytes


def change_words(document: str, rng: random.Random, change_every: int) -> str:
    """The document with a word of five letters in the place of one in about `change_every` characters."""
    parts = []
    place = 0
    while True:
        start = document.find(" ", place + rng.randint(0, 2 * change_every))
        end = document.find(" ", start + 1)
        if start < 0 or end < 0:
            break
        parts.append(document[place:start] + " " + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)))
        place = end
    return "".join([*parts, document[place:]])


def read_text(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def measure(what: str, text: Path, min_bytes: int, memory_mb: int) -> dict:
    from hf_cram.data.deduplication import find_near_duplicates
    from hf_cram.data.substring_deduplication import SubstringReport, remove_repeated_substrings

    process = psutil.Process()
    held = process.memory_info().rss
    wall, processor = time.perf_counter(), time.process_time()
    if what == "near":
        repeated = find_near_duplicates(read_text(text), NEAR_SIMILARITY, text.parent)
        done = f"{repeated.sum():,} of {len(repeated):,} documents dropped"
    else:
        report = SubstringReport()
        for _ in remove_repeated_substrings(read_text(text), min_bytes, text.parent, report, memory_mb):
            pass
        done = f"{report.bytes_removed / 1e6:.1f} MB removed from {report.documents_changed:,} documents"
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"wall": wall, "processor": processor, "memory_mb": (peak - held) / 1e6, "peak": peak / 1e6, "done": done}


def run(what: str, text: Path, min_bytes: int, memory_mb: int) -> dict:
    """One measurement in a fresh process on one thread."""
    return measure_apart(
        ["--measure", what, "--text", str(text), "--min_bytes", str(min_bytes), "--memory_mb", str(memory_mb)],
        OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip


def report(options: argparse.Namespace) -> None:
    print(f"{options.text.name}: {options.min_bytes} bytes, bars {SPEED_BAR} MB/s a core and {options.memory_mb} MB")
    for copies in (1, options.copies):
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            target = Path(folder) / "text.jsonl"
            num_bytes = write_text(options.text, target, copies, options.change_every)
            name = (
                "as it is" if copies == 1 else f"{copies} times, a word in {options.change_every} characters changed"
            )
            print(f"{name}, {num_bytes / 1e6:.0f} MB:")
            for what in ("substrings", "near"):
                result = run(what, target, options.min_bytes, options.memory_mb)
                speed = num_bytes / 1e6 / result["processor"]
                kept = verdict(result["memory_mb"] <= options.memory_mb) if what == "substrings" else ""
                print(
                    f"  {what:<11}{speed:>6.1f} MB/s a core {verdict(speed >= SPEED_BAR)} ({result['processor']:.0f} s, "
                    f"passed {result['wall']:.0f} s); memory +{result['memory_mb']:.0f} MB {kept} (process "
                    f"{result['peak']:.0f} MB); {result['done']}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=BOOKS, help="parquet file with a text column")
    parser.add_argument("--min_bytes", type=int, default=100)
    parser.add_argument("--memory_mb", type=int, default=1000)
    parser.add_argument("--copies", type=int, default=2, help="how often the text stands in the hard case")
    parser.add_argument("--change_every", type=int, default=1000, help="characters between changes in a copy")
    parser.add_argument("--work", type=Path, help="folder for the text and what is sorted; default: the system's")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_file(parser, "--text", options.text)
    if options.measure:
        print(json.dumps(measure(options.measure, options.text, options.min_bytes, options.memory_mb)))
    else:
        report(options)


if __name__ == "__main__":
    run_main(main)
