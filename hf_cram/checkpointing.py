"""Checkpoints that are whole or absent, and the heartbeat that keeps the clock of a killed run."""

import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from .data.errors import first_line
from .files import flush_to_disk, read_json, write_json_atomically
from .out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

RUN_STATE_NAME = "cram_state.json"
CLOCK_NAME = "clock.json"
STAGING_NAME = ".saving"
CHECKPOINT_PATTERN = re.compile(r"checkpoint-(\d+)")
REPLACED = "replaced-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the folder, the cause and the way out."""


@dataclass
class RunState:
    """What a run must remember beside the Trainer's own state, to continue where it was."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    elapsed_seconds: float = 0.0
    rows_seen: int = 0
    tokens_seen: int = 0
    training_flops: float = 0.0
    skipped_steps: int = 0
    dataset_id: str | None = None
    max_train_tokens: int | None = None  # for which the text was read
    # What the first session measured, or was told: the later ones compute alike.
    bf16: bool | None = None
    torch_compile: bool | None = None
    optimizer: str | None = None
    row_order: str | None = None

    def save(self, folder: Path) -> None:
        (folder / RUN_STATE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "RunState":
        """Raises [`CheckpointError`] where `folder` is not a complete checkpoint of a budgeted run."""
        if not folder.is_dir():
            raise CheckpointError(f"There is no checkpoint folder {folder}")
        try:
            values = read_json(folder / RUN_STATE_NAME, "run_id", "elapsed_seconds", "rows_seen")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} is not a complete checkpoint of hf_cram ({RUN_STATE_NAME}: {error}): name another one, or "
                "pass --resume_from_checkpoint true for the last complete one in the output folder"
            ) from error
        return cls(**{name: values[name] for name in (spec.name for spec in fields(cls)) if name in values})


def read_clock(output_dir: Path) -> dict[str, Any] | None:
    """The last heartbeat in `output_dir`, or `None` where no budgeted run has been."""
    path = output_dir / CLOCK_NAME
    if not path.is_file():
        return None
    try:
        return read_json(path, "run_id", "elapsed_seconds")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it to start its clock anew") from error


@contextmanager
def save_errors(target: Path) -> Iterator[None]:
    """Turn a failure to write below `target` (disk full, no permission) into one [`CheckpointError`] line."""
    try:
        yield
    # torch.save reports a full disk as a RuntimeError, safetensors as an error of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"Saving {target} failed: {first_line(error)}. Earlier checkpoints are untouched; make room, then continue "
            "with --resume_from_checkpoint true (into another --output_dir with the last checkpoint's path instead of true)"
        ) from error


@contextmanager
def load_errors(checkpoint: Path) -> Iterator[None]:
    """Turn a failure to read `checkpoint` (damaged, of another model) into one [`CheckpointError`] line."""
    try:
        yield
    except (EOFError, OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        if is_out_of_memory(error):
            raise
        # torch tells of such a file how to read foreign ones; "Unsupported" names what it will not read.
        is_no_archive = isinstance(error, EOFError | UnpicklingError) and "Unsupported" not in str(error)
        cause = "a file of it is damaged" if is_no_archive else " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{checkpoint} cannot be loaded ({cause}): name another one, with the fields "
            "of the model and the optimiser as they were, or start a new run"
        ) from error


def clear_staging(output_dir: Path) -> None:
    """Remove what a killed process left half-written or half-deleted; what it was about to replace goes back."""
    staging = output_dir / STAGING_NAME
    for replaced in staging.glob(f"{REPLACED}*"):
        with suppress(OSError):  # its successor is there, and not empty
            os.rename(replaced, output_dir / replaced.name.removeprefix(REPLACED))
    shutil.rmtree(staging, ignore_errors=True)


def publish_checkpoint(staged: Path, output_dir: Path) -> Path:
    """Flush the folder `staged` and move it to its place in `output_dir` in one step; returns that place."""
    flush_to_disk(staged)
    target = output_dir / staged.name
    if target.exists():  # saved again at the same step
        os.rename(target, staged.with_name(REPLACED + target.name))
    os.rename(staged, target)
    return target


def publish_files(staged: Path, output_dir: Path) -> None:
    """Flush the folder `staged` and move its files into `output_dir`, each in one step, the weights last."""
    flush_to_disk(staged)
    for path in sorted(staged.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, output_dir / path.name)
    staged.rmdir()


def retire_checkpoint(folder: Path, output_dir: Path) -> None:
    """Delete a checkpoint so that a kill in the middle does not leave half of it under its name."""
    trash = output_dir / STAGING_NAME / f"deleted-{folder.name}"
    trash.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def rotate(output_dir: Path, save_total_limit: int | None) -> None:
    """Keep the newest `save_total_limit` complete checkpoints."""
    if save_total_limit is not None and save_total_limit > 0:
        for folder in complete_checkpoints(output_dir)[:-save_total_limit]:
            retire_checkpoint(folder, output_dir)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 for another name."""
    match = CHECKPOINT_PATTERN.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in `output_dir`, the oldest first."""
    folders = [folder.parent for folder in output_dir.glob(f"checkpoint-*/{RUN_STATE_NAME}")]
    return sorted((folder for folder in folders if step_of(folder) >= 0), key=step_of)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint in `output_dir`, or `None`."""
    return next(reversed(complete_checkpoints(output_dir)), None)


class Heartbeat:
    """
    Writes the clock to `clock.json` every second from a thread of its own, so that a killed run loses no time.

    Args:
        output_dir: where `clock.json` goes.
        values: returns the current content; called in the thread.
    """

    def __init__(self, output_dir: Path, values: Callable[[], dict[str, Any]]):
        self.path = output_dir / CLOCK_NAME
        self.values = values
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hf_cram-heartbeat", daemon=True)
        self._warned = False

    def __enter__(self) -> "Heartbeat":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._write()

    def _beat(self) -> None:
        while not self._stopped.wait(1.0):
            self._write()

    def _write(self) -> None:
        try:
            write_json_atomically(self.path, self.values())
        except OSError as error:  # a full disk must not end the run by its clock
            if not self._warned:
                logger.warning("The clock could not be written to %s: %s", self.path, error)
            self._warned = True
