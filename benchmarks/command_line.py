"""
What the benchmarks have in common: they measure the package of this checkout, and tell a mistake in one line.

Each imports this module before hf_cram.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
BOOKS = REPOSITORY.parent / "shared" / "data" / "classic_books.parquet"
sys.path.insert(0, str(REPOSITORY))  # not a copy that was installed earlier


def verdict(passed: bool) -> str:
    """Whether a bar was passed, in a word."""
    return "PASS" if passed else "MISSED"


def choose(parser: argparse.ArgumentParser, option: str, text: str, valid: Collection[str]) -> list[str]:
    """The names in a comma-separated text; ends the program for one that is not valid."""
    names = text.split(",")
    for name in names:
        if name not in valid:
            parser.error(f"{option}: no {name!r}: choose from {', '.join(valid)}")
    return names


def check_file(parser: argparse.ArgumentParser, option: str, path: Path) -> None:
    """End the program where there is no such file."""
    if not path.is_file():
        parser.error(f"{option}: no file {path}")


def measure_apart(options: Sequence[str], **environment: str) -> Any:
    """What this benchmark prints last with these options, as JSON, in a process of its own; its words where it fails."""
    done = subprocess.run(
        [sys.executable, sys.argv[0], *options], env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        sys.stderr.write(f"{' '.join(options)} failed:\n{done.stderr}")
    done.check_returncode()  # ends the program in `run_main`
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_main(main: Callable[[], None], kept: str = "nothing is kept") -> None:
    """Run a benchmark: what the user can mend, and Ctrl-C, end it in one line; `kept` says of what there is then."""
    program = f"benchmarks/{Path(sys.argv[0]).name}"

    def end(*_: Any) -> None:
        """SIGTERM: the measurements in processes of their own would go on, beside the next ones."""
        for child in psutil.Process().children(recursive=True):
            child.kill()
        print(f"{program}: stopped; {kept}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        main()
    except KeyboardInterrupt:
        print(f"{program}: stopped; {kept}", file=sys.stderr)
        sys.exit(130)
    except subprocess.CalledProcessError as error:  # a measurement in a process of its own, whose words stand above
        sys.exit(f"{program}: error: a measurement has failed (exit status {error.returncode})")
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"{program}: error: {' '.join(str(error).split())}")
    finally:
        signal.signal(signal.SIGTERM, before)
