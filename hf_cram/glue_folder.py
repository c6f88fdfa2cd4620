"""Where the results of a fine-tuning go, and what in a folder may be replaced."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .files import read_object
from .fine_tuning_args import EncoderArguments
from .glue import GlueError

KEPT_NAME = "fine_tuned_from.json"  # beside a kept model: the pair it belongs to
DEFAULT_OUTPUT_DIR = "trainer_output"  # the Trainer's own default


def output_folder(encoder: EncoderArguments, output_dir: str | None, endings: Sequence[str] = ()) -> Path:
    """
    Where the results go: `output_dir`, or the model's own folder where it is a local one, else `out/glue/<model>`.

    Results from scratch, and those that have `endings` (own data, another metric), never go into the folder of the
    pretrained model, but beside it: `<folder>-<ending>-from-scratch`.
    """
    if output_dir and output_dir != DEFAULT_OUTPUT_DIR:
        return Path(output_dir)
    folder = Path(encoder.model_name_or_path).resolve()
    if not folder.is_dir():
        folder = Path("out", "glue", folder.name)
    return folder.with_name("-".join([folder.name, *endings, *(["from-scratch"] if encoder.from_scratch else [])]))


def check_replaceable(folder: Path, is_ours: Callable[[dict[str, Any]], bool]) -> None:
    """
    Raise [`GlueError`] for a folder that holds something else than a model which an earlier run has kept there, and
    `is_ours` knows by what it has written beside it.
    """
    is_replaceable = folder.is_dir() and not folder.is_symlink()
    if is_replaceable and any(folder.iterdir()):
        kept = read_object(folder / KEPT_NAME)
        is_replaceable = bool(kept) and is_ours(kept)
    if not is_replaceable and (folder.exists() or folder.is_symlink()):
        raise GlueError(
            f"output_dir: the fine-tuned model would take the place of {folder}, which holds something else: choose "
            "another --output_dir"
        )
