"""Hand a prepared corpus on: as a folder laid out like a Hub data set, or as a data set on the Hub."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import flush_to_disk
from ..hub_errors import RETRY_SECONDS, SILENCE_SECONDS, HubError, Result, explain, with_retries
from .cache import MANIFEST_NAME, cached_entry
from .data_card import build_data_card, draw_histogram
from .errors import DataError, first_line
from .languages import language_code
from .ordering import OrderingArguments, score_rows
from .packing import PackedRows
from .published import (
    COLUMN,
    DESCRIPTION_NAME,
    TOKENIZER_FOLDER,
    VERSION,
    VERSION_KEY,
    read_description,
    row_settings,
    sha256_of_file,
    without_folders,
)
from .text_files import progress_bar

if TYPE_CHECKING:
    from .pipeline import PreparedCorpus

logger = logging.getLogger(__name__)

# Bytes of tokens in a file, and so in memory at a time.
SHARD_BYTES = 256_000_000
# Tokens that a reader has to decode at once.
GROUP_TOKENS = 1_000_000
# Rows that are scored for the histogram of a corpus in the order of its text.
SCORED_ROWS = 100_000
HISTOGRAM_BINS = 50
DATA_FOLDER = "data"
LOADING_KEYS = ("is_local", "local_files_only", "name_or_path")
PLACEHOLDER = "PATH_OR_REPOSITORY"
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
                _check_is_free(folder)
        self.corpus_language = language_code(self.corpus_language)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise DataError(f"push_corpus_to_hub: {str(error).splitlines()[0]}") from error


def publish_if_asked(corpus: "PreparedCorpus", arguments: PublishArguments, data_arguments: Any) -> str | None:
    """
    Hand the corpus on as the arguments ask for; returns the address of the data set after a push, or None.

    A folder that holds this corpus already is left as it is. Raises [`DataError`].
    """
    settings = row_settings(data_arguments)
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


def _check_is_free(folder: Path) -> None:
    """Raises [`DataError`] for a folder that holds anything, for what is no folder, and where none can be made."""
    try:
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        place = next(path for path in folder.parents if path.exists())
        is_writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    except OSError as error:
        raise DataError(f"{folder} cannot be used ({error.strerror}): name another folder") from error
    if not is_writable:
        raise DataError(f"{folder} cannot be made in {place}: name another folder")
    if not is_free:
        raise DataError(f"{folder} is there already: name a new folder, or an empty one")


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
        return with_retries(
            action, lambda error: explain(error, repo_id, None, "push_corpus_to_hub"), RETRY_SECONDS, SILENCE_SECONDS
        )

    def write(folder: Path) -> None:
        _write_files(corpus, folder, settings or {}, full_name, language, license_name)

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
        folder, _ = cached_entry(entry, write, overwrite=True)
        return exchange(lambda: _upload(folder, full_name))
    except HubError as error:
        raise DataError(
            f"the corpus is not pushed to {repo_id}: {error}; the same command again goes on from what is there"
        ) from error
    finally:
        shutil.rmtree(entry, ignore_errors=True)


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


def export_corpus(
    corpus: "PreparedCorpus",
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    language: str | None = None,
    license_name: str | None = None,
) -> None:
    """
    Write a corpus into the new or empty folder `folder`, laid out like a Hub data set, which `load_dataset(folder)` reads.

    It holds `data/*.parquet` with one column `input_ids` in splits `train` and `validation`, `tokenizer/`, a card with
    a histogram, and `corpus.json` with all counts. `settings` are those of [`row_settings`]. Memory holds one file of
    rows. The folder appears when it is whole. Raises [`DataError`] where it holds anything or cannot be written.
    """
    folder = folder.absolute()
    _check_is_free(folder)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        staged.mkdir(parents=True)
        _write_files(corpus, staged, settings or {}, PLACEHOLDER, language, license_name)
        flush_to_disk(staged)
        os.rename(staged, folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error}): name another folder") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write_files(
    corpus: "PreparedCorpus",
    folder: Path,
    settings: Mapping[str, Any],
    repository: str,
    language: str | None,
    license_name: str | None,
) -> None:
    """Write all files of the data set into `folder`."""
    rows = {"train": corpus.train_dataset, "validation": corpus.eval_dataset}
    splits = {name: _write_split(dataset, name, folder / DATA_FOLDER) for name, dataset in rows.items()}
    _write_tokenizer(corpus, folder / TOKENIZER_FOLDER)
    tokenizer_files = sorted((folder / TOKENIZER_FOLDER).iterdir())
    description = {
        VERSION_KEY: VERSION,
        "max_seq_length": corpus.train_dataset.max_seq_length,
        "vocab_size": len(corpus.tokenizer),
        "dtype": corpus.train_dataset.dtype.name,
        "tokenizer_files": {path.name: sha256_of_file(path) for path in tokenizer_files},
        "splits": splits,
        "settings": without_folders(settings),
        "statistics": without_folders(corpus.statistics),
    }
    (folder / DESCRIPTION_NAME).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    image, score_words = _histogram(corpus)
    (folder / "row_scores.png").write_bytes(image)
    info = _dataset_info(corpus.train_dataset, splits, folder / DATA_FOLDER)
    card = build_data_card(repository, description, info, score_words, language, license_name)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _features(rows: PackedRows) -> Any:
    from datasets import Features, List, Value  # seconds of import that preparing alone does not need

    return Features({COLUMN: List(Value(rows.dtype.name), length=rows.max_seq_length)})


def _write_split(rows: PackedRows, split: str, folder: Path) -> dict[str, Any]:
    """Write the rows as parquet files into `folder`; returns their number and the SHA-256 of their ids."""
    folder.mkdir(exist_ok=True)
    digest = hashlib.sha256()
    rows_per_file = max(1, SHARD_BYTES // (rows.max_seq_length * rows.dtype.itemsize))
    files = math.ceil(len(rows) / rows_per_file)
    with progress_bar(f"writing the rows of {split}", len(rows), "row") as bar:
        for number in range(files):
            start = number * rows_per_file
            end = min(start + rows_per_file, len(rows))
            _write_file(rows, start, end, folder / f"{split}-{number:05d}-of-{files:05d}.parquet", digest)
            bar.update(end - start)
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def _write_file(rows: PackedRows, start: int, end: int, path: Path, digest: Any) -> None:
    """Write rows `start` to `end` as parquet into `path`, and their ids into `digest`."""
    from datasets import Dataset

    ids = _read_rows(rows, start, end).ravel()
    digest.update(ids.data)
    column = pa.FixedSizeListArray.from_arrays(pa.array(ids), rows.max_seq_length)
    table = pa.table({COLUMN: column}, schema=_features(rows).arrow_schema)
    # The fingerprint names no content: nothing is cached under it, and the library's own would cost a pass.
    Dataset(table, fingerprint=path.stem).to_parquet(path, batch_size=max(1, GROUP_TOKENS // rows.max_seq_length))


def _read_rows(rows: PackedRows, start: int, end: int) -> np.ndarray:
    """Rows `start` to `end`, (N, max_seq_length): read, since the pages of a map would count as memory in use."""
    length = rows.max_seq_length
    offset = start * length * rows.dtype.itemsize
    return np.fromfile(rows.path, rows.dtype, (end - start) * length, offset=offset).reshape(-1, length)


def _write_tokenizer(corpus: "PreparedCorpus", folder: Path) -> None:
    """Write the tokenizer without what `save_pretrained` notes about how it was loaded here."""
    corpus.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in LOADING_KEYS}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dataset_info(rows: PackedRows, splits: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Features and splits in the form of the Hub's metadata, from which `load_dataset` checks the rows' number."""
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    row_bytes = rows.max_seq_length * rows.dtype.itemsize
    sizes = {
        name: SplitInfo(name, num_bytes=split["rows"] * row_bytes, num_examples=split["rows"])
        for name, split in splits.items()
    }
    info = DatasetInfo(
        features=_features(rows),
        splits=SplitDict(sizes),
        download_size=sum(path.stat().st_size for path in folder.iterdir()),
        dataset_size=sum(size.num_bytes for size in sizes.values()),
    )
    data = DatasetCardData()
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data.to_dict()["dataset_info"]


def _histogram(corpus: "PreparedCorpus") -> tuple[bytes, str]:
    """The histogram of the scores that the rows are ordered by, or else of the paper's, and its words."""
    scores = corpus.statistics.get("row_scores")
    if scores is not None:
        words = f"The training rows are in the order `{scores['row_order']}`" + (
            ", reversed." if scores["reverse_row_order"] else "."
        )
        return draw_histogram(scores["counts"], scores["edges"], scores["row_order"]), words
    rows = corpus.train_dataset
    step = math.ceil(len(rows) / SCORED_ROWS)
    sample = np.concatenate([_read_rows(rows, index, index + 1) for index in range(0, len(rows), step)])
    measured = score_rows(sample, corpus.tokenizer, OrderingArguments(row_order="sentence_length"))
    counts, edges = np.histogram(measured, HISTOGRAM_BINS)
    words = (
        f"The rows are in the order of their text; the scores are those of `sentence_length` for {len(sample):,} "
        "training rows at equal distances."
    )
    return draw_histogram(counts.tolist(), edges.tolist(), "sentence_length"), words
