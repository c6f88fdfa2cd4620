"""
Push a model to the Hub: in the background while it trains, or later by a command.

    python -m hf_cram.hub OUTPUT_DIR [--hub_model_id ID] [--private]

The token is that of HF_TOKEN or of `hf auth login`; it is no argument, so that no file or log can hold it.
"""

import argparse
import contextlib
import json
import logging
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile
from transformers.dynamic_module_utils import get_relative_import_files

from .files import GLUE_RESULTS, MINIMAL_PAIRS_RESULTS, TRAINING_RESULTS, link_or_copy, sha256_of_file
from .hub_errors import HubError, first_line, with_retries
from .programs import ending_in_one_line

logger = logging.getLogger(__name__)

PROGRAM = "python -m hf_cram.hub"
# How long the end of a run waits for a checkpoint that is on its way.
FINISH_SECONDS = 900.0
PUSHING_NAME = ".pushing"
# One file, or the parts of one: no other weights that lie beside them.
WEIGHTS = ("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors")
# What tells of the weights that it lies beside, and of no others.
OF_WEIGHTS = (
    "README.md", ".eval_results/*.yaml", "recipe.yaml", "loss_curve.png", TRAINING_RESULTS, GLUE_RESULTS,
    "glue_results.png", MINIMAL_PAIRS_RESULTS,
)  # fmt: skip
# All that is ever pushed, beside the code files that config.json names: no optimiser, no state of a run, nothing else
# that may lie in the folder.
SHAREABLE = (
    "config.json", "generation_config.json", *WEIGHTS, "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model",
    "bpe.codes", "emoji.json", *OF_WEIGHTS,
)  # fmt: skip


@dataclass(frozen=True)
class HubTarget:
    """A repository: `model_id` is `name` or `owner/name`, `private` matters where it is created."""

    model_id: str
    private: bool | None = None
    revision: str | None = None

    def command(self, folder: Path) -> str:
        """The command that pushes `folder` here."""
        words = ["python", "-m", "hf_cram.hub", str(folder), "--hub_model_id", self.model_id]
        words += ["--private"] if self.private else []
        words += ["--hub_revision", self.revision] if self.revision else []
        return shlex.join(words)


def shareable_files(folder: Path) -> list[str]:
    """
    Names in `folder` of the files that may be pushed, code files included.

    Raises [`HubError`] where there is no model in `folder`.
    """
    if not folder.is_dir():
        raise HubError(f"there is no folder {folder}")
    config_path = folder / "config.json"
    if not config_path.is_file() or not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        way_out = (
            f"name its checkpoint {checkpoints[-1]}" if checkpoints else "name the output folder of a finished run"
        )
        raise HubError(f"{folder} holds no config.json with model.safetensors: {way_out}")
    files = {path for pattern in SHAREABLE for path in folder.glob(pattern) if path.is_file()}
    files |= _code_files(config_path)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _code_files(config_path: Path) -> set[Path]:
    """The code files that a config.json names, and those that they import. Raises [`HubError`]."""
    try:
        references = json.loads(config_path.read_text(encoding="utf-8")).get("auto_map", {}).values()
        names = {reference.partition(".")[0] for reference in references if isinstance(reference, str)}
        # What is no plain name, or not there, is the code of another repository.
        modules = [config_path.with_name(f"{name}.py") for name in names if name.isidentifier()]
        modules = [module for module in modules if module.is_file()]
        return {*modules, *(Path(file) for module in modules for file in get_relative_import_files(module))}
    except (AttributeError, OSError, ValueError) as error:
        raise HubError(f"{config_path}, or code it names, cannot be read ({error}): write the model again") from error


def _create_repository(target: HubTarget) -> str:
    """Full name of the repository, created where it is absent."""
    return HfApi().create_repo(target.model_id, private=target.private, exist_ok=True).repo_id


def push_folder(
    folder: Path,
    target: HubTarget,
    commit_message: str = "Upload model",
    wait: Callable[[float], bool | None] = time.sleep,
) -> str:
    """
    Push what can be shared of `folder` in one commit and return the repository's address. Where its weights take the
    place of others, the scores, the card and the recipe of those go with them.

    Raises [`HubError`] where there is no model in `folder`, and where the Hub cannot be had after some retries.
    """
    names = shareable_files(folder)

    def upload() -> str:
        repo_id = _create_repository(target)
        if target.revision is not None and not target.revision.startswith("refs/pr/"):
            HfApi().create_branch(repo_id, branch=target.revision, exist_ok=True)
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in names]
        operations += [CommitOperationDelete(name) for name in _of_other_weights(folder, names, repo_id, target)]
        HfApi().create_commit(repo_id, operations, commit_message=commit_message, revision=target.revision)
        return f"{HfApi().endpoint}/{repo_id}"

    return with_retries(upload, target.model_id, target.revision, "hub_model_id", wait=wait)


def push_or_warn(folder: Path, target: HubTarget, commit_message: str = "Upload model") -> bool:
    """Push `folder`; where that fails, or Ctrl-C ends it, warn with the command to do it later and return False."""
    try:
        logger.info("Pushed to %s", push_folder(folder, target, commit_message))
        return True
    except (HubError, KeyboardInterrupt) as error:
        cause = str(error) or "interrupted"
        logger.warning("%s is not pushed to the Hub: %s. Push it with: %s", folder, cause, target.command(folder))
        return False


class HubPusher:
    """
    Pushes checkpoints from a thread of its own, so that training neither waits nor stops for the Hub.

    The repository is created at once, so that a token that is refused is known at the start. While one checkpoint is
    being pushed only the newest of the others waits; it is pinned by hard links against being deleted.
    """

    def __init__(self, output_dir: Path, target: HubTarget):
        self.output_dir, self.target = output_dir, target
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._count = 0
        self._finishing = threading.Event()
        self._is_refused = False
        self._has_warned = False
        # A daemon: an interrupted run, whose checkpoint is safe, does not wait for it.
        self._thread = threading.Thread(target=self._work, name="hf_cram-push", daemon=True)
        self._thread.start()

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Have the complete folder `checkpoint` pushed; returns at once."""
        if self._is_refused or not self._thread.is_alive():
            return
        if self._count == 0:
            self.clear()  # those of a killed run; not earlier, since this one might have been refused the folder
        self._count += 1  # a step may be saved twice
        pinned = self.output_dir / PUSHING_NAME / f"{self._count}-{checkpoint.name}"
        try:
            _pin(checkpoint, pinned, shareable_files(checkpoint))
        except (OSError, HubError) as error:
            self._warn(f"{checkpoint} cannot be read ({error})")
            return
        with self._changed:
            dropped, self._waiting = self._waiting, pinned
            self._changed.notify()
        if dropped is not None:
            shutil.rmtree(dropped, ignore_errors=True)

    def finish(self, folder: Path, commit_message: str) -> bool:
        """Push `folder` as the result, after what is on its way; False, with a warning and a command, if it fails."""
        with self._changed:
            self._finishing.set()
            self._changed.notify()
        with contextlib.suppress(KeyboardInterrupt):
            self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():  # what it pushes would land after the result
            logger.warning(
                "A checkpoint is still being pushed: %s is not. Push it with: %s", folder, self.target.command(folder)
            )
            return False
        self.clear()
        return push_or_warn(folder, self.target, commit_message)

    def clear(self) -> None:
        """Let go of the checkpoints that wait."""
        shutil.rmtree(self.output_dir / PUSHING_NAME, ignore_errors=True)

    def _work(self) -> None:
        target, wait = self.target, self._finishing.wait
        self._attempt(
            lambda: with_retries(
                lambda: _create_repository(target), target.model_id, target.revision, "hub_model_id", wait=wait
            )
        )
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._finishing.is_set())
                pinned, self._waiting = self._waiting, None
            if self._finishing.is_set() or pinned is None:
                return
            message = f"Training in progress, step {pinned.name.rpartition('-')[2]}"
            self._attempt(lambda: push_folder(pinned, self.target, message, self._finishing.wait))  # noqa: B023
            shutil.rmtree(pinned, ignore_errors=True)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except HubError as error:
            self._is_refused = error.is_final
            if not self._finishing.is_set():  # else the last push tells
                self._warn(str(error))

    def _warn(self, cause: str) -> None:
        """Once a run: the rest is said at its end."""
        if not self._has_warned:
            logger.warning(
                "Pushing to the Hub fails: %s. Training goes on, and the push at its end is tried in any case; "
                "by hand it is: %s",
                cause, self.target.command(self.output_dir),
            )  # fmt: skip
        self._has_warned = True


def _of_other_weights(folder: Path, names: Sequence[str], repo_id: str, target: HubTarget) -> list[str]:
    """Files of the repository, besides `names`, that tell of its weights, where these are others than those in `folder`."""
    tree = HfApi().list_repo_tree(repo_id, recursive=True, revision=target.revision)
    files = {entry.path: entry.lfs for entry in tree if isinstance(entry, RepoFile)}
    earlier = {name: None if lfs is None else lfs.sha256 for name, lfs in files.items() if _is_any_of(name, WEIGHTS)}
    if not earlier or earlier == {name: sha256_of_file(folder / name) for name in names if _is_any_of(name, WEIGHTS)}:
        return []
    return [name for name in files if name not in names and _is_any_of(name, OF_WEIGHTS)]


def _is_any_of(name: str, patterns: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    return any(path.match(pattern) and len(path.parts) == pattern.count("/") + 1 for pattern in patterns)


def _pin(folder: Path, pinned: Path, names: Sequence[str]) -> None:
    """Give the files `names` of `folder` a second place; their content stays when the first is deleted."""
    shutil.rmtree(pinned, ignore_errors=True)
    pinned.mkdir(parents=True)
    for name in names:
        (pinned / name).parent.mkdir(exist_ok=True)
        link_or_copy(folder / name, pinned / name)


def name_of_run(folder: Path) -> str:
    """The name of an output folder, also where `folder` is one of its checkpoints."""
    return folder.parent.name if re.fullmatch(r"checkpoint-\d+", folder.name) else folder.name


def main(arguments: Sequence[str] | None = None) -> None:
    """Push a folder and print where it is; ends with status 1 and one line where that fails."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Push a trained model to the Hugging Face Hub.")
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path, help="output folder of a run, or a checkpoint")
    parser.add_argument(
        "--hub_model_id", help="NAME or OWNER/NAME of the repository (default: that of the output folder)"
    )
    parser.add_argument("--private", action="store_true", default=None, help="if created, visible to its owner only")
    parser.add_argument("--hub_revision", help="branch to push to (default: main)")
    options = parser.parse_args(arguments)
    target = HubTarget(
        options.hub_model_id or name_of_run(options.folder.resolve()), options.private, options.hub_revision
    )

    def explain(error: Exception) -> str:
        if isinstance(error, OSError):
            return f"{error.filename or options.folder}: {error.strerror or first_line(error)}"
        return str(error)

    stopped = "stopped; the same command pushes it again"
    with ending_in_one_line(PROGRAM, HubError, OSError, stopped=stopped, tell=explain):
        print(push_folder(options.folder, target))


if __name__ == "__main__":
    main()
