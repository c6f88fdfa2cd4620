"""The output folder of a run: one run at a time, and nothing in it of another run or of other weights."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import Timeout

from .checkpointing import CheckpointError, RunState, clear_staging, last_checkpoint, read_clock, step_of
from .files import TRAINING_RESULTS, file_lock, read_json

logger = logging.getLogger(__name__)

LOCK_NAME = ".run.lock"
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
# What run_glue.py and hf_cram.minimal_pairs leave in a model's folder, the card that tells of it, and the recipe.
OF_EARLIER_WEIGHTS = (
    "glue_results.*", "glue_submission.zip*", "minimal_pairs_results.json*", ".eval_results", "README.md", "recipe.yaml",
)  # fmt: skip
LOCK_SECONDS = 10.0  # the loader's workers of a killed run hold its lock until they notice


@contextmanager
def lock_run(output_dir: Path) -> Iterator[None]:
    """
    Keep `output_dir`, made where it is not there, for one run. Raises [`CheckpointError`] where another is at work:
    each would move or delete what the other has written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            is_locked = stack.enter_context(file_lock(output_dir / LOCK_NAME, LOCK_SECONDS))
        except Timeout:
            raise CheckpointError(
                f"Another run is at work in {output_dir}: wait for its end, stop it, or name another --output_dir"
            ) from None
        if not is_locked:
            logger.warning("%s cannot be locked on this file system: start no other run in it", output_dir)
        yield


def set_later_checkpoints_aside(checkpoint: Path, output_dir: Path) -> Path | None:
    """
    Move the checkpoints in `output_dir` that are not among those before `checkpoint` out of the way of the run that
    goes on from there: neither rotated away as if old, nor taken for its own.

    Returns where they went, `<output_dir>/set-aside-N`, or `None` where there were none.
    """
    step = step_of(checkpoint.resolve()) if checkpoint.resolve().parent == output_dir.resolve() else -1
    return set_aside([folder for folder in _checkpoints_of_anyone(output_dir) if step_of(folder) > step], output_dir)


def _checkpoints_of_anyone(output_dir: Path) -> list[Path]:
    """Folders named like checkpoints, another program's too: one of a step that this run saves would be lost."""
    return sorted(path for path in output_dir.glob("checkpoint-*/") if step_of(path) >= 0 and any(path.iterdir()))


def set_aside(paths: Sequence[Path], output_dir: Path) -> Path | None:
    """Move what belongs to the run no more to `<output_dir>/set-aside-N`, which is returned; `None` for nothing."""
    if not paths:
        return None
    target = first_free(output_dir / "set-aside")
    try:
        target.mkdir()
        for path in paths:
            os.rename(path, target / path.name)
    except OSError as error:
        names = ", ".join(path.name for path in paths)
        raise CheckpointError(
            f"{names} in {output_dir} cannot be moved to {target} ({error.strerror}): move them away"
        ) from error
    return target


def first_free(path: Path) -> Path:
    """`path` with the first number behind it that nothing has yet: `<path>-1`, `<path>-2`, ..."""
    number = 1
    while (numbered := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return numbered


def holds_model(folder: Path) -> bool:
    """Whether a model lies in `folder` itself, not in a checkpoint below it."""
    return any((folder / name).exists() for name in MODEL_FILES)


def move_earlier_run_aside(output_dir: Path) -> Path | None:
    """
    Move the output of an earlier run, or any model or checkpoint, out of the way of a new run: nothing is overwritten.

    Returns where it went, `<output_dir>.previous-N`, or `None` where there was none.
    """
    has_clock = read_clock(output_dir) is not None
    has_model = holds_model(output_dir)
    if not (has_clock or has_model or _checkpoints_of_anyone(output_dir)):
        return None
    way_out = "name another --output_dir"
    if has_clock:
        way_out += ", or continue the run with --resume_from_checkpoint true"
    if Path.cwd().is_relative_to(output_dir.resolve()):
        raise CheckpointError(
            f"{output_dir} holds an earlier run or a model, and is (or is above) the working folder, which cannot be "
            f"moved: {way_out}"
        )
    folder = output_dir.resolve()  # a link stays, and its folder on its disk
    target = first_free(folder.with_name(f"{folder.name}.previous"))
    try:
        os.rename(folder, target)
    except OSError as error:
        raise CheckpointError(
            f"{output_dir} holds an earlier run or a model, and cannot be moved to {target} ({error.strerror}): {way_out}"
        ) from error
    folder.mkdir()
    return target


def holds_result(folder: Path, step: int) -> bool:
    """Whether a run has ended in `folder`, at `step` or later; rank 0's answer counts."""
    try:
        held = read_json(folder / TRAINING_RESULTS, "optimizer_steps")["optimizer_steps"] >= step
    except (OSError, ValueError):
        held = False
    return broadcast_object_list([held])[0]


def set_earlier_results_aside(folder: Path) -> None:
    """What earlier weights in the folder have scored is not the score of those that take their place."""
    moved = set_aside(sorted(path for pattern in OF_EARLIER_WEIGHTS for path in folder.glob(pattern)), folder)
    if moved is not None:
        logger.warning("Scores, card and recipe of what was in the folder before were moved to %s", moved)


def state_of_the_resumed(output_dir: Path, resume_from_checkpoint: str | bool | None) -> RunState | None:
    """
    What the run to resume has seen: it goes on with the same rows, whatever its budget and its speed are now. A checkpoint
    that a kill has left half replaced is put back first. Raises [`CheckpointError`] for a folder that is no checkpoint, or
    is another run's.
    """
    if resume_from_checkpoint and output_dir.is_dir():
        with lock_run(output_dir):
            clear_staging(output_dir)  # which puts back what a kill has left half replaced
    checkpoint = last_checkpoint(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    return RunState.load(Path(checkpoint)) if checkpoint else None
