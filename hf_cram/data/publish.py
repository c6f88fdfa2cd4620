"""Hand a prepared corpus on: as a folder laid out like a Hub data set, or as a data set on the Hub."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import file_lock, sha256_of_file
from ..hub_errors import HubError, Result, with_retries
from .cache import MANIFEST_NAME, cached_entry
from .data_card import check_language, check_license
from .errors import DataError, first_line, system_cause
from .export import DATA_FOLDER, check_is_free, export_corpus, write_files
from .published import DESCRIPTION_NAME, TOKENIZER_FOLDER, read_description, row_settings

if TYPE_CHECKING:
    from .pipeline import PreparedCorpus

logger = logging.getLogger(__name__)

EMPTY_REPOSITORY = {".gitattributes"}


@dataclass
class PublishArguments:
    """Whether and how the prepared corpus is handed on."""

    push_corpus_to_hub: str | None = field(
        default=None,
        metadata={
            "help": "NAME or OWNER/NAME of a data set on the Hub that takes the rows, the tokenizer and a card."
        },
    )
    export_corpus_to: str | None = field(
        default=None,
        metadata={
            "help": "A new or empty folder that takes the same files; --dataset_name FOLDER then trains from them."
        },
    )
    private_corpus: bool | None = field(
        default=None, metadata={"help": "If that data set is created, visible to its owner only."}
    )
    corpus_language: str | None = field(
        default=None, metadata={"help": "Language of the text for its card, a code of the Hub such as 'en'."}
    )
    corpus_license: str | None = field(
        default=None, metadata={"help": "Licence of the text for its card, an identifier of the Hub such as 'odc-by'."}
    )

    def __post_init__(self) -> None:
        if self.push_corpus_to_hub is not None:
            _check_repo_id(self.push_corpus_to_hub)
        if self.export_corpus_to is not None:
            folder = _export_folder(self.export_corpus_to)
            if not os.path.isfile(folder / DESCRIPTION_NAME):  # of which corpus shows when the rows are there
                check_is_free(folder)
        self.corpus_language = check_language("corpus_language", self.corpus_language)
        self.corpus_license = check_license("corpus_license", self.corpus_license)
        for name in ("corpus_language", "corpus_license"):
            if getattr(self, name) == "none":
                setattr(self, name, None)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise DataError(f"push_corpus_to_hub: {first_line(error)}") from error


def publish_if_asked(corpus: "PreparedCorpus", arguments: PublishArguments, data_arguments: Any) -> str | None:
    """
    Hand the corpus on as the arguments ask for; returns the address of the data set after a push, or None.

    A folder that holds this corpus already is left as it is. Raises [`DataError`].
    """
    settings = row_settings(data_arguments) if corpus.settings is None else corpus.settings
    language, license_name = arguments.corpus_language, arguments.corpus_license
    if arguments.export_corpus_to is not None:
        folder = _export_folder(arguments.export_corpus_to)
        if not _holds_rows(folder, corpus):
            export_corpus(corpus, folder, settings, language, license_name)
        logger.info("The rows are in the folder %s: --dataset_name trains from it", folder)
    if arguments.push_corpus_to_hub is None:
        return None
    return publish_corpus(
        corpus, arguments.push_corpus_to_hub, settings, arguments.private_corpus, language, license_name
    )


def _export_folder(name: str) -> Path:
    if not name.strip():
        raise DataError("export_corpus_to is empty: name a new or empty folder, or leave it out")
    try:
        return Path(name).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise DataError(f"export_corpus_to: {name} cannot be used ({first_line(error)})") from error


def _holds_rows(folder: Path, corpus: "PreparedCorpus") -> bool:
    """Whether the folder is an export of the same rows."""
    try:
        splits = read_description(folder / DESCRIPTION_NAME).get("splits")
    except (OSError, ValueError, RecursionError):
        return False
    rows = {"train": corpus.train_dataset, "validation": corpus.eval_dataset}
    return splits == {
        name: {"rows": len(dataset), "sha256": sha256_of_file(dataset.path)} for name, dataset in rows.items()
    }


def publish_corpus(
    corpus: "PreparedCorpus",
    repo_id: str,
    settings: Mapping[str, Any] | None = None,
    private: bool | None = None,
    language: str | None = None,
    license_name: str | None = None,
) -> str:
    """
    Push a corpus to the data set `repo_id` (`name` or `owner/name`), created where it is absent; returns its address.

    The files are those of [`export_corpus`], parquet as `Dataset.push_to_hub` writes it, in one commit, so that nobody
    finds rows without their tokenizer; files of an earlier corpus go in the same commit. What the Hub has already is
    not sent again. A data set that holds anything but such a corpus stays as it is. The token is that of HF_TOKEN or of
    `hf auth login`. Raises [`DataError`] in one line.
    """
    _check_repo_id(repo_id)

    def exchange(action: Callable[[], Result]) -> Result:
        return with_retries(action, repo_id, None, "push_corpus_to_hub")

    def write(folder: Path) -> None:
        write_files(corpus, folder, settings or {}, full_name, language, license_name)

    entry = corpus.directory.with_name(f"{corpus.directory.name}.export")
    try:
        # First, so that a token that is refused is known before the work.
        full_name = exchange(
            lambda: HfApi().create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        )
        if exchange(lambda: _is_foreign(full_name)):
            raise DataError(
                f"the corpus is not pushed to {full_name}: that is a data set which hf_cram has not made, and it stays "
                "as it is: name another push_corpus_to_hub"
            )
        with file_lock(entry.with_name(f"{entry.name}.upload.lock")):  # runs that push at once have one folder
            try:
                folder, _ = cached_entry(entry, write, overwrite=True)
                return exchange(lambda: _upload(folder, full_name))
            finally:
                shutil.rmtree(entry, ignore_errors=True)
    except HubError as error:
        raise DataError(
            f"the corpus is not pushed to {repo_id}: {error}; the same command again goes on from what is there"
        ) from error
    except OSError as error:
        raise DataError(
            f"the cache {entry.parent} cannot be written ({system_cause(error)}): set cache_dir"
        ) from error


def _is_foreign(repo_id: str) -> bool:
    """Whether the data set holds anything, and is no corpus of ours."""
    files = set(HfApi().list_repo_files(repo_id, repo_type="dataset")) - EMPTY_REPOSITORY
    if DESCRIPTION_NAME not in files:
        return bool(files)
    path = Path(hf_hub_download(repo_id, DESCRIPTION_NAME, repo_type="dataset"))
    try:
        return not read_description(path)
    except (ValueError, RecursionError):
        return True


def _upload(folder: Path, repo_id: str) -> str:
    """Make the data set hold the files of `folder` and none of an earlier corpus; returns its address."""
    api = HfApi()
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    del files[MANIFEST_NAME]
    ours = (f"{DATA_FOLDER}/", f"{TOKENIZER_FOLDER}/")
    present = api.list_repo_files(repo_id, repo_type="dataset")
    stale = sorted(name for name in present if name.startswith(ours) and name not in files)
    operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
    operations += [CommitOperationDelete(name) for name in stale]
    api.create_commit(repo_id, operations, repo_type="dataset", commit_message="Upload corpus")
    return f"{api.endpoint}/datasets/{repo_id}"
