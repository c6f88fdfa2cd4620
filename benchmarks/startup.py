"""
Seconds from the command to the first optimiser step, and from the command to the start of training, warm cache.

    python benchmarks/startup.py [--rounds 3]

Runs the quickstart by `python run_mlm_cram.py` without compile for one step, first to warm the cache, then timed; medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from command_line import REPOSITORY, run_main, verdict

BARS = {"to the first step": 15.0, "to the start of training": 10.0}


def start_once(folder: str) -> dict[str, float]:
    """Wall-clock seconds of one start."""
    command = [sys.executable, str(REPOSITORY / "run_mlm_cram.py"), str(REPOSITORY / "training_args/quickstart.yaml")]
    command += ["--output_dir", f"{folder}/out", "--torch_compile", "false", "--max_steps", "1"]
    command += ["--save_interval", "100%"]
    started = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    state = json.loads((Path(folder) / "out" / "trainer_state.json").read_text())
    first = next(entry for entry in state["log_history"] if "loss" in entry)
    clock_started = json.loads((Path(folder) / "out" / "clock.json").read_text())["started_at"]
    to_training = clock_started - started
    return {"to the start of training": to_training, "to the first step": to_training + first["elapsed_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_once(folder)
        rounds = [start_once(folder) for _ in range(options.rounds)]
    for name, bar in BARS.items():
        seconds = statistics.median(result[name] for result in rounds)
        print(f"{name}: {seconds:.1f} s (bar under {bar:.0f} s) {verdict(seconds < bar)}")


if __name__ == "__main__":
    run_main(main)
