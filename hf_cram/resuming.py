"""Whether a checkpoint is of the run that is to go on from it."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from .checkpointing import CheckpointError, RunState, load_errors
from .data.errors import REPEAT_TEXT
from .files import read_json

# Saving writes these into config.json, whatever the model.
CONFIG_FIELDS_OF_SAVING = {"architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"}
# Training itself sets these, some from the labels and the tokenizer.
CONFIG_FIELDS_OF_TRAINING = {"use_cache", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id"}


def load_run_state(checkpoint: Path, dataset_id: str | None, row_order: str, model: Any) -> RunState:
    """
    The state of the run in `checkpoint`, for a run with this data set, order of rows and model. Raises
    [`CheckpointError`] where the folder is no complete checkpoint, or is of a run with others.
    """
    state = RunState.load(checkpoint)
    _check_dataset(checkpoint, state.dataset_id, dataset_id)
    _check_row_order(checkpoint, state.row_order, row_order)
    if isinstance(model, PreTrainedModel):
        _check_model(checkpoint, model)
    with load_errors(checkpoint):
        read_json(checkpoint / TRAINER_STATE_NAME, "global_step")
    _check_optimizer(checkpoint)
    return state


def _check_optimizer(checkpoint: Path) -> None:
    """Without its state the Trainer would begin with a fresh optimiser, and say nothing."""
    for name in ("optimizer", "scheduler"):
        if not any(checkpoint.glob(f"{name}*")):
            raise CheckpointError(f"{checkpoint} has no {name}.pt: name a whole checkpoint, or start a new run")


def _check_dataset(checkpoint: Path, earlier: str | None, now: str | None) -> None:
    """A dataset that has a `dataset_id` must be the one that the checkpoint has seen rows of."""
    if None not in (earlier, now) and earlier != now:
        raise CheckpointError(
            f"{checkpoint} has seen rows of the dataset {earlier}, and the one given now is {now}: {REPEAT_TEXT}"
        )


def _check_row_order(checkpoint: Path, earlier: str | None, now: str) -> None:
    """In another order the next unseen row would be one that was seen, and others never would."""
    if earlier not in (None, now):
        raise CheckpointError(
            f"{checkpoint} has read its rows in the order {earlier!r}, and the one now is {now!r}: set "
            "seed, data_seed and train_sampling_strategy as they were, or start a new run"
        )


def _check_model(checkpoint: Path, model: PreTrainedModel) -> None:
    """Weights fit models that compute something else with them: other heads, another norm."""
    path = checkpoint / CONFIG_NAME
    if not path.is_file():
        return
    config = model.config
    with load_errors(checkpoint):
        of_checkpoint = type(config).from_dict(read_json(path))  # a field that is newer has its default
    saved, now = (json.loads(each.to_json_string(use_diff=False)) for each in (of_checkpoint, config))
    ignored = CONFIG_FIELDS_OF_SAVING | CONFIG_FIELDS_OF_TRAINING
    names = sorted(name for name in (saved.keys() & now.keys()) - ignored if saved.get(name) != now.get(name))
    if names:
        changes = ", ".join(f"{name} {saved.get(name)!r}" for name in names)
        raise CheckpointError(
            f"{checkpoint} is of another model: set {changes} as they were there, or start a new run"
        )
