"""Write a prepared corpus into a folder laid out like a Hub data set: rows, tokenizer, card, counts."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..files import can_make, file_lock, flush_to_disk, sha256_of_file
from .data_card import build_data_card, draw_histogram
from .errors import DataError, system_cause
from .ordering import HISTOGRAM_BINS, OrderingArguments, score_rows
from .packing import PackedRows, read_rows
from .published import (
    COLUMN,
    DESCRIPTION_NAME,
    TOKENIZER_FOLDER,
    VERSION,
    VERSION_KEY,
    without_folders,
)
from .steps import progress_bar
from .tokenization import tokenizer_settings

if TYPE_CHECKING:
    from .pipeline import PreparedCorpus

# Bytes of tokens in a file, and so in memory at a time.
SHARD_BYTES = 256_000_000
# Tokens that a reader has to decode at once.
GROUP_TOKENS = 1_000_000
# Rows that are scored for the histogram of a corpus in the order of its text.
SCORED_ROWS = 100_000
DATA_FOLDER = "data"
PLACEHOLDER = "PATH_OR_REPOSITORY"


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
    rows. The folder appears when it is whole; what a killed export left beside it is removed. Raises [`DataError`] where it
    holds anything or cannot be written.
    """
    folder = folder.absolute()
    check_is_free(folder)
    staged = folder.with_name(f".{folder.name}.unfinished")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = staged.with_name(f"{staged.name}.lock")
        with file_lock(lock):
            check_is_free(folder)
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            try:
                write_files(corpus, staged, settings or {}, PLACEHOLDER, language, license_name)
                flush_to_disk(staged)
                os.rename(staged, folder)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({system_cause(error)}): name another folder") from error


def check_is_free(folder: Path) -> None:
    """Raises [`DataError`] for a folder that holds anything, for what is no folder, and where none can be made."""
    try:
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        is_writable = can_make(folder.parent)
    except OSError as error:
        raise DataError(f"{folder} cannot be used ({system_cause(error)}): name another folder") from error
    if not is_free:
        raise DataError(f"{folder} is there already: name a new folder, or an empty one")
    if not is_writable:
        raise DataError(f"{folder} cannot be made in {folder.parent}: name another folder")


def write_files(
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

    ids = read_rows(rows.path, rows.dtype, rows.max_seq_length, start, end).ravel()
    digest.update(ids.data)
    column = pa.FixedSizeListArray.from_arrays(pa.array(ids), rows.max_seq_length)
    table = pa.table({COLUMN: column}, schema=_features(rows).arrow_schema)
    # The fingerprint names no content: nothing is cached under it, and the library's own would cost a pass.
    Dataset(table, fingerprint=path.stem).to_parquet(path, batch_size=max(1, GROUP_TOKENS // rows.max_seq_length))


def _write_tokenizer(corpus: "PreparedCorpus", folder: Path) -> None:
    """Write the tokenizer without what `save_pretrained` notes about how it was loaded here."""
    corpus.tokenizer.save_pretrained(folder)
    settings = json.dumps(tokenizer_settings(corpus.tokenizer), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(f"{settings}\n", encoding="utf-8")


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
    shape = rows.path, rows.dtype, rows.max_seq_length
    sample = np.concatenate([read_rows(*shape, index, index + 1) for index in range(0, len(rows), step)])
    measured = score_rows(sample, corpus.tokenizer, OrderingArguments(row_order="sentence_length"))
    counts, edges = np.histogram(measured, HISTOGRAM_BINS)
    words = (
        f"The rows are in the order of their text; the scores are those of `sentence_length` for {len(sample):,} "
        "training rows at equal distances."
    )
    return draw_histogram(counts.tolist(), edges.tolist(), "sentence_length"), words
