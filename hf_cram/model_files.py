"""The files of a checkpoint: the hash that names what they hold, and what loading them raises."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from httpx2 import InvalidURL
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import cached_file, extract_commit_hash

from .hub_errors import first_line

# The content of a checkpoint, as far as it decides the scores.
HASHED_FILES = (
    "config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*.json", "vocab*", "merges.txt", "*.model",
    "special_tokens_map.json", "added_tokens.json", "adapter_config.json", "*.py",
)  # fmt: skip
# What a checkpoint with missing, damaged or contradictory files raises, and a Hub or a proxy that does not answer.
LOADING_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, HTTPError, ImportError, InvalidURL, LookupError, OSError, RuntimeError, SafetensorError,
    StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


def name_model(name_or_path: str, from_scratch: bool = False, revision: str | None = None) -> str:
    """
    A hash of the model, or of what it is built like from scratch: the name and commit on the Hub or, of a local folder,
    the content of config, weights and tokenizer.
    """
    origin, files = content_of(name_or_path, revision)
    return hash_of({"from_scratch": from_scratch, **origin}, files)


def content_of(name_or_path: str, revision: str | None = None) -> tuple[dict[str, Any], list[Path]]:
    """Where a model of the Hub comes from, or the files that make a local one."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return {}, sorted({file for pattern in HASHED_FILES for file in folder.glob(pattern) if file.is_file()})
    config_file = cached_file(
        name_or_path, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return {"model_name_or_path": name_or_path, "commit": extract_commit_hash(config_file, None)}, []


def has_file(name: str, file: str, revision: str | None) -> bool:
    """Whether a model, of the Hub at a revision or in a folder, has a file; not, where that cannot be told from here."""
    try:
        return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
    except LOADING_ERRORS:
        return False


def hash_of(settings: Any, files: Sequence[Path] = ()) -> str:
    """Twelve hexadecimal digits that name settings and the content of files."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def loading_cause(error: BaseException) -> str:
    """What loading has raised, in one line: the first of a long story, all of a validation's."""
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())
    is_bare = isinstance(error, AttributeError | LookupError | TypeError)
    told = f"{type(error).__name__}: {first_line(error)}" if is_bare else first_line(error)
    if "trust_remote_code" in str(error) and "trust_remote_code" not in told:
        told += "; pass --trust_remote_code if you trust it"
    return told
