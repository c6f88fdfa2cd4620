"""Which text: one source, or a mix of several."""

import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from .errors import DataError, nearest
from .languages import language_code

INSTALLED_DOCS = "installed-docs"
NAMED_FILES = 2


@dataclass
class SourceSettings:
    """One source of text."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A Hub data set, a folder laid out like one, or 'installed-docs' (default): the prose of the "
            "documentation and comments of Python's library and of every installed package."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_data_dir: str | None = field(
        default=None, metadata={"help": "Folder inside the data set to read, where no configuration names it."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    streaming: bool = field(default=False, metadata={"help": "Read the data set without downloading it whole."})
    train_files: list[str] | None = field(
        default=None,
        metadata={"help": "Local text instead: files, folders and globs of txt, jsonl, csv, parquet, also .gz, .zst."},
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    text_file_documents: str = field(
        default="line",
        metadata={"help": "A document in a txt file is a 'line', ends at a 'blank_line' or is the whole 'file'."},
    )
    max_documents: int | None = field(default=None, metadata={"help": "Use the first documents only."})
    max_document_characters: int = field(default=10_000_000, metadata={"help": "Skip longer documents."})

    def __post_init__(self) -> None:
        if self.dataset_name is not None and not self.dataset_name.strip():
            raise DataError("dataset_name is empty: name a data set or a folder, or leave it out")
        if isinstance(self.train_files, str):
            self.train_files = [self.train_files]
        if self.train_files is not None and not (self.train_files and all(name.strip() for name in self.train_files)):
            raise DataError(
                "train_files is empty or holds an empty name: name files, folders or globs, or leave it out"
            )
        self.dataset_config_name = language_code(self.dataset_config_name)
        if self.dataset_name is not None and self.train_files:
            raise DataError(
                "dataset_name and train_files are both set: name one source of text (--dataset_name none or --train_files "
                "none leaves a recipe's out), or a mix with sources"
            )
        if self.text_file_documents not in ("line", "blank_line", "file"):
            raise DataError(
                f"text_file_documents must be 'line', 'blank_line' or 'file', got {self.text_file_documents!r}"
            )
        for name in ("max_documents", "max_document_characters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")


@dataclass
class MixedSource(SourceSettings):
    """One source of a mix, with its share and its limits, which hold over all its passes."""

    weight: float = 1.0  # share of the mix's characters, relative to the other weights
    max_characters: int | None = None
    max_tokens: int | None = None  # estimated (MixedStream): the mix is made before the tokenizer
    max_passes: int = 1  # a source that ends begins again, so many times in all

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"weight must be above 0, got {self.weight}")
        for name in ("max_characters", "max_tokens", "max_passes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")


@dataclass
class SourceArguments(SourceSettings):
    """The text: one source, or several by name."""

    sources: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "A mix instead of one source: a mapping (JSON on the command line) from a name of yours to the "
            "fields above for each source, and weight (its share of the characters of the mix, relative to the other "
            "weights; default 1), max_characters, max_tokens (estimated) and max_passes (1: a source that ends is not "
            "repeated; the others go on). Splits, columns, streaming and the limit of a document's length count for "
            "all sources that do not set their own; max_documents is that of the mix."
        },
    )

    def __post_init__(self) -> None:
        if [name.lower() for name in self.train_files or ()] == ["none"]:  # on the command line
            self.train_files = None
        super().__post_init__()
        if isinstance(self.sources, str) and self.sources.lower() == "none":
            self.sources = None
        if isinstance(self.sources, str):
            try:
                self.sources = json.loads(self.sources, object_pairs_hook=_each_once)
            except ValueError as error:
                raise DataError(f"sources is not valid JSON ({error})") from error
        self.named_sources()

    def named_sources(self) -> dict[str, MixedSource]:
        """Every source by its name. Raises [`DataError`] for what cannot be one."""
        if self.sources is None:
            own = {spec.name: getattr(self, spec.name) for spec in fields(SourceSettings)}
            return {self.source_name: MixedSource(**own)}
        if not isinstance(self.sources, dict) or not self.sources:
            raise DataError(f"sources must map names to the fields of each source, got {self.sources!r}")
        for name in ("dataset_name", "dataset_config_name", "dataset_data_dir", "dataset_revision", "train_files"):
            if getattr(self, name) is not None:
                raise DataError(
                    f"sources and {name} are both set: put it among the sources, set {name}: null, or leave a recipe's "
                    "sources out with --sources none"
                )
        names = ("dataset_split", "streaming", "text_column", "text_file_documents", "max_document_characters")
        common = {name: getattr(self, name) for name in names}
        return {str(name): _mixed_source(str(name), values, common) for name, values in self.sources.items()}

    @property
    def source_name(self) -> str:
        """The text in words, for cards and logs."""
        if isinstance(self.sources, dict):
            return ", ".join(map(str, self.sources))
        if self.train_files:
            # Names of files may be many, as a shell gives them, and any bytes.
            names = [
                Path(os.path.abspath(name)).name.encode("utf-8", "backslashreplace").decode()
                for name in self.train_files
            ]
            more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
            return ", ".join(names[:NAMED_FILES]) + more
        return self.dataset_name or INSTALLED_DOCS

    @property
    def hub_names(self) -> list[str]:
        """The data sets of the text that are on the Hub, each once, for cards."""
        names = dict.fromkeys(source.dataset_name for source in self.named_sources().values())
        return [name for name in names if name not in (None, INSTALLED_DOCS) and not _is_there(str(name))]

    @property
    def hub_name_of_all(self) -> str | None:
        """The data set of the Hub that is the whole text, where one is."""
        return next(iter(self.hub_names), None) if len(self.named_sources()) == 1 else None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name = next(name for name, _ in pairs if [key for key, _ in pairs].count(name) > 1)
        raise ValueError(f"{name!r} stands twice")
    return values


def _is_there(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # closed to us, or too long for a path
        return True


def _mixed_source(name: str, values: Any, common: dict[str, Any]) -> MixedSource:
    """A source of a mix from its part of a recipe."""
    if not isinstance(values, dict):
        raise DataError(f"source {name!r} must be 'field: value' pairs, got {values!r}")
    annotations = get_type_hints(MixedSource)  # a parser changes the types that the fields themselves name
    for key in values:
        if key not in annotations:
            raise DataError(f"source {name!r}: unknown key {key!r}{nearest(str(key), annotations)}")
    given = {key: _convert(f"source {name!r}: {key}", annotations[key], value) for key, value in values.items()}
    if given.get("dataset_name") is None and not given.get("train_files"):
        raise DataError(f"source {name!r}: set dataset_name or train_files")
    if not given.get("train_files"):
        common = {name: value for name, value in common.items() if name != "text_file_documents"}
    try:
        return MixedSource(**{**common, **given})
    except DataError as error:
        raise DataError(f"source {name!r}: {error}") from None


def _convert(place: str, annotation: Any, value: Any) -> Any:
    """A value as its field's type; numbers may come as text, since YAML takes `1e9` for it."""
    kinds = get_args(annotation) or (annotation,)
    kind = kinds[0]
    if value is None and NoneType in kinds:
        return None
    if kind in (int, float):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        good = math.isfinite(number) and (kind is float or number.is_integer())
        value = kind(number) if good else value
    elif kind in (bool, str):
        good = isinstance(value, kind)
    else:
        good = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if not good:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        if kind is str and isinstance(value, bool):
            words[str] = "text (in quotes, since YAML takes a bare yes, no, on or off for true or false)"
        raise DataError(f"{place} must be {words.get(kind, 'a list of texts')}, got {value!r}")
    return value
