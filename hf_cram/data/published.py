"""Train from a corpus that was published: its rows as they are, its tokenizer, its row length."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from httpx2 import InvalidURL
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from ..files import sha256_of_file
from ..hub_errors import HubError, with_retries
from .errors import DataError, first_line
from .hub_datasets import fingerprint_folder, place_of, reading_errors
from .ordering import OrderingArguments, order_settings
from .packing import token_dtype
from .stages import STATISTICS_NAME
from .steps import progress_bar
from .tokenization import load_tokenizer

DESCRIPTION_NAME = "corpus.json"
VERSION_KEY = "hf_cram_corpus"
VERSION = 1
COLUMN = "input_ids"
TOKENIZER_FOLDER = "tokenizer"
# Split of the data set -> file of a prepared corpus.
SPLITS = {"train": "train.bin", "validation": "eval.bin"}
ROWS_AT_ONCE = 8192
# Settings that change no row.
NO_SETTING_OF_ROWS = frozenset(
    {"cache_dir", "overwrite_cache", "preprocessing_workers", "dedup_memory_mb", "streaming", "sample_dropped"}
)
FROM_THE_CORPUS = frozenset(
    {
        "dataset_name", "dataset_config_name", "dataset_data_dir", "dataset_revision", "max_seq_length", "vocab_size",
        "tokenizer_name",
    }
)  # fmt: skip
# What counts when it is asked for though it is a default: how rows are read, and not how they were made.
ASKED_OF_ROWS = frozenset({"max_seq_length", "row_order", "reverse_row_order", "row_order_seed"})
LOCAL_FOLDERS = re.compile(r"(?<![\w:/.~])(?:~|\.{1,2})?/(?:[^\s/,:'\"]+/)+")
LONGEST_PATH = 200

NO_TOKENIZER = "its rows have no tokenizer beside them (tokenizer/tokenizer.json): add that of the rows"


def row_settings(arguments: Any, given: Collection[str] = ()) -> dict[str, Any]:
    """
    What of the data's arguments differs from the defaults, or is `given`, and decides the rows, without folders of this
    machine.
    """
    values = {spec.name: getattr(arguments, spec.name) for spec in fields(arguments)}
    changed = {spec.name for spec in fields(arguments) if spec.name in given or values[spec.name] != spec.default}
    return without_folders({name: values[name] for name in values if name in changed - NO_SETTING_OF_ROWS})


def without_folders(value: Any) -> Any:
    """Plain values with every local path cut to its last part, in keys and in texts, all of which UTF-8 can write."""
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(content) for content in value]
    if isinstance(value, str):
        value = value.encode("utf-8", "backslashreplace").decode("utf-8")  # names of files may be any bytes
    if isinstance(value, str) and "/" in value:
        is_local = value.startswith(("/", "~")) or (len(value) < LONGEST_PATH and os.path.exists(value))
        return Path(value).name if is_local else LOCAL_FOLDERS.sub("", value)
    return value


def find_published_corpus(
    name: str,
    config_name: str | None = None,
    revision: str | None = None,
    text_column: str = "text",
    described_only: bool = False,
) -> "PublishedCorpus | None":
    """
    The corpus in a Hub data set or a folder laid out like one; None where it holds text or cannot be looked at.

    Known by its `corpus.json`, beside which `config_name` says nothing, or (unless `described_only`) by a column
    `input_ids` and none of text. A data set of the Hub is downloaded at one
    commit, rows and tokenizer alike; without a network its last download serves. Raises [`DataError`].
    """
    folder = Path(place_of(name))
    path = folder / DESCRIPTION_NAME
    try:
        if not folder.is_dir():
            path = Path(hf_hub_download(name, DESCRIPTION_NAME, repo_type="dataset", revision=revision))
        is_described = _is_ours(path)
    except EntryNotFoundError:
        is_described = False
    except (HTTPError, ImportError, InvalidURL, OSError, ValueError):
        return None  # the reader of text says why
    if is_described:
        config_name = None  # a recipe's, of its text
    elif described_only or not _has_rows(name, config_name, revision, text_column):
        return None
    if folder.is_dir():
        return PublishedCorpus(name, folder, config_name, fingerprint_folder(folder))
    if not is_described:  # before all of its rows are here
        _check_tokenizer(name, revision)
    folder = _download(name, revision)
    return PublishedCorpus(name, folder, config_name, folder.name)


def _is_ours(path: Path) -> bool:
    """Whether the file describes a corpus: data sets of text may have a `corpus.json` of their own."""
    try:
        return bool(read_description(path))
    except (OSError, ValueError, RecursionError):
        return False  # if it is a damaged one of ours, the columns tell


def _has_rows(name: str, config_name: str | None, revision: str | None, text_column: str) -> bool:
    from datasets import load_dataset  # seconds of import that local text does not need

    try:
        splits = load_dataset(place_of(name), config_name, revision=revision, streaming=True)
    except reading_errors():
        return False
    columns = next(iter(splits.values())).column_names or []
    return COLUMN in columns and text_column not in columns


def _check_tokenizer(name: str, revision: str | None) -> None:
    api = HfApi()
    try:
        if any(
            api.file_exists(name, file, repo_type="dataset", revision=revision)
            for file in (f"{TOKENIZER_FOLDER}/tokenizer.json", "tokenizer.json")
        ):
            return
    except (HTTPError, ImportError, InvalidURL, OSError):
        return  # the download says why
    raise DataError(f"data set {name!r}: {NO_TOKENIZER}")


def _download(name: str, revision: str | None) -> Path:
    """The folder of the data set's files at one commit, whose name is the commit's."""
    try:
        return Path(
            with_retries(
                lambda: snapshot_download(name, repo_type="dataset", revision=revision),
                name, revision, "dataset_name", is_download=True,
            )
        )  # fmt: skip
    except HubError as error:
        raise DataError(f"data set {name!r} cannot be downloaded: {error}") from error


class PublishedCorpus:
    """
    A corpus in the folder `folder` of rows of equal length and their tokenizer; `identity` changes with its content.

    The tokenizer lies in a folder `tokenizer` or beside the data. Raises [`DataError`] where it or any row is missing, or
    where it is not the one that was published.
    """

    def __init__(self, name: str, folder: Path, config_name: str | None, identity: str):
        self.name, self.folder, self.config_name, self.identity = name, folder, config_name, identity
        self.description = self._read_description()
        tokenizer = folder / TOKENIZER_FOLDER if (folder / TOKENIZER_FOLDER).is_dir() else folder
        if not (tokenizer / "tokenizer.json").is_file():
            raise self.error(NO_TOKENIZER)
        earlier = {"tokenizer.json": self.description.get("tokenizer_sha256")}
        for file, digest in self.description.get("tokenizer_files", earlier).items():
            if digest is None:
                continue
            if not (tokenizer / file).is_file() or sha256_of_file(tokenizer / file) != digest:
                raise self.error(
                    f"its tokenizer is not the one that was published with it ({file}): download or publish it again"
                )
        self.tokenizer = load_tokenizer(tokenizer)
        first = next(self._columns("train"))[0].as_py()
        if not isinstance(first, list):
            raise self.error(f"{COLUMN} must hold lists of token ids, got {first!r} in the first row")
        self.max_seq_length = len(first)

    def error(self, fault: str) -> DataError:
        """The fault as an error that names the data set."""
        return DataError(f"data set {self.name!r}: {fault}")

    def check_arguments(self, arguments: Any, given: Collection[str] = ()) -> None:
        """
        Raises [`DataError`] for data arguments that ask for other rows than these.

        Rows, row length and tokenizer are the corpus's; what an argument leaves at its default asks for nothing, unless
        it is `given` and says how rows are read: their length and order.
        """
        made_with = self.description.get("settings", {})
        changed = row_settings(arguments, ASKED_OF_ROWS & set(given))
        scores = self.description.get("statistics", {}).get("row_scores", {})
        defaults = order_settings(OrderingArguments())
        row_order = {name: scores[name] for name in defaults if name in scores}
        known = {**defaults, **made_with, **row_order, "max_seq_length": self.max_seq_length}
        if "row_order" in changed:
            changed["reverse_row_order"] = arguments.reverse_row_order
            if arguments.row_order == "random":
                changed["row_order_seed"] = arguments.row_order_seed
            else:  # where it counts for nothing
                changed.pop("row_order_seed", None)
        wrong = {
            name: value for name, value in changed.items()
            if name not in FROM_THE_CORPUS - {"max_seq_length"} and known.get(name) != value
        }  # fmt: skip
        if changed.get("vocab_size") not in (None, made_with.get("vocab_size"), len(self.tokenizer)):
            wrong["vocab_size"] = changed["vocab_size"]
        if arguments.tokenizer_name is not None and not self._has_tokenizer(arguments.tokenizer_name):
            wrong["tokenizer_name"] = arguments.tokenizer_name
        if wrong:
            known["vocab_size"] = len(self.tokenizer)
            settings = ", ".join(
                f"{name} {value!r} (there {known.get(name, 'not set')})" for name, value in wrong.items()
            )
            raise self.error(f"its rows are made, and otherwise than asked for: {settings}; leave that out")

    def _has_tokenizer(self, name: str) -> bool:
        return load_tokenizer(name).backend_tokenizer.to_str() == self.tokenizer.backend_tokenizer.to_str()

    def write(self, folder: Path) -> None:
        """
        Write the files of a prepared corpus into `folder`: rows in their order, tokenizer, statistics.

        Memory holds one batch of rows. Raises [`DataError`] for rows of another length or with ids beyond the
        vocabulary, and for rows that are not those that were published.
        """
        counts = {split: self._write_split(split, folder / file) for split, file in SPLITS.items()}
        statistics = {
            "tokens": sum(counts.values()) * self.max_seq_length,
            "train_rows": counts["train"],
            "eval_rows": counts["validation"],
            "dropped": {},
            "steps": [],
            **self.description.get("statistics", {}),
        }
        (folder / STATISTICS_NAME).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)

    def _write_split(self, split: str, path: Path) -> int:
        """Write the split's rows; returns how many."""
        dtype = token_dtype(len(self.tokenizer))
        published = self.description.get("splits", {}).get(split)
        digest = hashlib.sha256()
        count = 0
        bar = progress_bar(f"reading the rows of {split}", published and published["rows"], "row")
        with open(path, "wb") as stream, bar:
            for column in self._columns(split):
                rows = self._checked(column, f"split {split}, rows {count} to {count + len(column) - 1}")
                content = rows.astype(dtype).tobytes()
                digest.update(content)
                stream.write(content)
                count += len(column)
                bar.update(len(column))
        if published is not None and published != {"rows": count, "sha256": digest.hexdigest()}:
            raise self.error(
                f"the {count} rows of split {split} are not the {published['rows']} that were published (SHA-256 "
                f"{digest.hexdigest()[:12]}..., not {published['sha256'][:12]}...): download or publish it again"
            )
        return count

    def _columns(self, split: str) -> Iterator[pa.Array]:
        """Batches of the split's rows as arrays of lists of integers."""
        from datasets import load_dataset

        is_empty = True
        errors: tuple[type[Exception], ...] = (KeyError, *reading_errors())
        try:
            # A stream, since a folder's cache goes by times, and the rows are written to disk once already.
            dataset = load_dataset(str(self.folder), self.config_name, split=split, streaming=True)
            for table in dataset.select_columns([COLUMN]).with_format("arrow").iter(ROWS_AT_ONCE):
                column = pa.chunked_array(table[COLUMN]).combine_chunks()
                if len(column):
                    is_empty = False
                    yield column
        except errors as error:
            cause = first_line(error).replace(f"{self.folder}/", "")
            raise self.error(f"its split {split} cannot be read ({cause}): download or publish it again") from error
        if is_empty:
            raise self.error(f"its split {split} has no rows")

    def _checked(self, column: pa.Array, place: str) -> np.ndarray:
        """The (N, max_seq_length) token ids of a batch."""
        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            raise self.error(f"{place}: {COLUMN} must hold lists of token ids, got {kind}")
        lengths = pc.list_value_length(column).fill_null(0)
        if pc.any(pc.not_equal(lengths, self.max_seq_length)).as_py():
            raise self.error(f"{place}: not all have {self.max_seq_length} tokens, as the first row: pack them anew")
        values = column.flatten()
        if not pa.types.is_integer(values.type) or values.null_count:
            raise self.error(
                f"{place}: {COLUMN} must hold token ids, got {values.type} with {values.null_count} empty"
            )
        ids = values.to_numpy()
        if ids.min() < 0 or ids.max() >= len(self.tokenizer):
            raise self.error(
                f"{place}: ids from {ids.min()} to {ids.max()}, beyond the {len(self.tokenizer)} tokens of its "
                "tokenizer: add the tokenizer of the rows"
            )
        return ids.reshape(-1, self.max_seq_length)

    def _read_description(self) -> dict[str, Any]:
        """The content of `corpus.json`; empty where there is none of ours."""
        try:
            description = read_description(self.folder / DESCRIPTION_NAME)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise self.error(f"its {DESCRIPTION_NAME} cannot be read ({error}): publish it again") from error
        if description and description[VERSION_KEY] != VERSION:
            raise self.error(f"it was published by another hf_cram (format {description[VERSION_KEY]}): update one")
        parts = [description.get(name, {}) for name in ("settings", "statistics", "tokenizer_files", "splits")]
        if not all(isinstance(part, dict) for part in parts) or not all(
            isinstance(split, dict) and {"rows", "sha256"} <= split.keys() for split in parts[-1].values()
        ):
            raise self.error(f"its {DESCRIPTION_NAME} is not as hf_cram writes it: publish it again")
        return description


def read_description(path: Path) -> dict[str, Any]:
    """The content of a `corpus.json`; empty where it is none of ours. Raises what reading and parsing raise."""
    description = json.loads(path.read_text(encoding="utf-8"))
    return description if isinstance(description, dict) and VERSION_KEY in description else {}
