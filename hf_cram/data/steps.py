"""What each step of preparing a text read, kept and cost: progress bars, and a table at the end."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil
from tqdm import tqdm
from transformers.utils.logging import is_progress_bar_enabled

STEPS_NAME = "steps.json"
SECONDS_BETWEEN_SAMPLES = 0.25
SECONDS_WITHOUT_BAR = 2


@dataclass
class StepRecord:
    """One step: what went in and came out, None where it does not count that, and what it cost in its last run."""

    step: str
    documents_in: int | None = None
    documents_out: int | None = None
    characters_in: int | None = None
    characters_out: int | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0


class PeakMemory:
    """
    Highest memory of this process and its children in bytes while the block runs, looked at four times a second.

    Pages that forked processes share count once (PSS) where the system tells; elsewhere it is the sum of what each
    holds (RSS).
    """

    def __enter__(self) -> "PeakMemory":
        self.peak_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            total = 0
            # A process that ends meanwhile leaves an error or an empty file behind.
            with contextlib.suppress(psutil.Error, OSError):
                for member in (process, *process.children(recursive=True)):
                    with contextlib.suppress(psutil.Error, OSError):
                        if sys.platform == "linux":
                            total += member.memory_full_info().pss
                        else:
                            total += member.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, total)
            if self._stopped.wait(SECONDS_BETWEEN_SAMPLES):
                return


class StepBar:
    """The progress bar of a step, told of each part done."""

    def __init__(self, bar: tqdm, name: str, estimate_total: Callable[[], int | None] | None):
        self.bar = bar
        self.name = name
        self.estimate_total = estimate_total
        self.part = ""
        self._last_estimate = time.monotonic()

    def __call__(self, count: int) -> None:
        """So much more is done; where the total is estimated, the estimate is asked again."""
        self._estimate()
        self.bar.update(count)

    def _estimate(self) -> None:
        now = time.monotonic()
        if self.estimate_total is not None and now > self._last_estimate + SECONDS_BETWEEN_SAMPLES:
            self.bar.total, self._last_estimate = self.estimate_total(), now

    def show_part(self, part: str, count: int, total: int | None) -> None:
        """So much more of one part of the step is done: the bar begins anew with every part, the estimated ones first."""
        if part != self.part:
            self.part = part
            self.bar.set_description(f"{self.name}: {part}", refresh=False)
            self.bar.reset()
        if total is None:
            self._estimate()
        else:
            self.bar.total = total
        self.bar.update(count)


def progress_bar(what: str, total: int | None, unit: str) -> tqdm:
    """The bar of work that is no step of its own, shown where it takes longer than two seconds."""
    return tqdm(
        desc=what, total=total, unit=unit, unit_scale=True, delay=SECONDS_WITHOUT_BAR,
        disable=not is_progress_bar_enabled(),
    )  # fmt: skip


@contextlib.contextmanager
def measured_step(
    record: StepRecord,
    unit: str = "char",
    total: int | None = None,
    estimate_total: Callable[[], int | None] | None = None,
) -> Iterator[StepBar]:
    """Run a step under a progress bar, and complete its record. The total is given, estimated on the way or unknown."""
    started = time.monotonic()
    bar = tqdm(desc=record.step, total=total, unit=unit, unit_scale=True, disable=not is_progress_bar_enabled())
    with PeakMemory() as memory, bar:
        yield StepBar(bar, record.step, estimate_total)
    record.seconds = time.monotonic() - started
    record.peak_memory_bytes = memory.peak_bytes


def write_steps(folder: Path, records: Iterable[StepRecord]) -> None:
    """Keep the records beside what the steps have made."""
    content = json.dumps([asdict(record) for record in records], indent=2) + "\n"
    (folder / STEPS_NAME).write_text(content, encoding="utf-8")


def read_steps(folder: Path) -> list[StepRecord]:
    """Records that [`write_steps`] has written."""
    return [StepRecord(**values) for values in json.loads((folder / STEPS_NAME).read_text(encoding="utf-8"))]


def format_table(records: Iterable[StepRecord]) -> str:
    """The records as a table for a person: documents, characters and tokens in and out, seconds, peak memory."""
    counts = [spec.name for spec in fields(StepRecord) if spec.name.endswith(("_in", "_out"))]
    lines = [["step", *(name.replace("_", " ") for name in counts), "seconds", "peak memory"]]
    for record in records:
        values = [getattr(record, name) for name in counts]
        numbers = ["-" if value is None else f"{value:,}" for value in values]
        lines.append([record.step, *numbers, f"{record.seconds:.1f}", f"{record.peak_memory_bytes / 1e9:.2f} GB"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )
