"""The text of the tasks: GLUE from the Hub or a folder, or a task from files of one's own."""

import glob
import logging
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetsError

from .data.errors import first_line
from .data.hub_datasets import cache_of_folder, check_copy, reading_errors
from .data.sources import check_stamps, stamps_of
from .glue import COLUMNS, TASKS, GlueError, Task, cause_of
from .model_files import hash_of

logger = logging.getLogger(__name__)

NAMED_CLASSES = 5
GLUE_DATASET = "nyu-mll/glue"
DIAGNOSTIC = "ax"  # predicted by the model of MNLI, and part of a submission
EXTENSIONS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ABSENT = ("na", "n/a", "nan", "null", "none")  # no number, among numbers
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
RESERVED_NAMES = {*TASKS, *COLUMNS, DIAGNOSTIC, "predictions", "checkpoints"}


@dataclass
class TaskData:
    """The splits of a task: `validation` by column of the results, `test` by file name of a submission."""

    task: Task
    train: Dataset
    validation: dict[str, Dataset]
    test: dict[str, Dataset]

    @property
    def is_regression(self) -> bool:
        return not self.task.label_names


def load_glue_task(task: Task, glue_data: str | None = None) -> TaskData:
    """
    A task's splits from a folder laid out like the data set `nyu-mll/glue` (`<task>/<split>-*.parquet`), or from it.

    A test split may be absent. MNLI has the diagnostic set `ax` as a further test split, where that is there. Raises
    [`GlueError`] where train or validation is absent, or a column.
    """
    data = _pick_splits(task, _load_splits(task.name, glue_data), str(glue_data or GLUE_DATASET))
    if task.name == "mnli" and (glue_data is None or (Path(glue_data) / DIAGNOSTIC).is_dir()):
        diagnostic = _load_splits(DIAGNOSTIC, glue_data)
        if "test" in diagnostic:
            data.test["AX"] = diagnostic["test"]
    return data


def _load_splits(name: str, glue_data: str | None) -> DatasetDict:
    if glue_data is None:
        try:
            return load_dataset(GLUE_DATASET, name)
        except reading_errors() as error:
            raise GlueError(
                f"{GLUE_DATASET} ({name}) cannot be loaded: {first_line(error)}; "
                "give a folder laid out like it with --glue_data"
            ) from error
    folder = Path(glue_data) / name
    files: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.parquet")):
        files.setdefault(path.name.split("-")[0], []).append(str(path))
    if not files:
        raise GlueError(f"glue_data: no <split>-*.parquet in {folder}")
    return DatasetDict(
        {split: _read("parquet", paths, f"glue_data: {folder}, {split}") for split, paths in files.items()}
    )


def _read(kind: str, paths: Sequence[str], place: str) -> Dataset:
    """The rows of files. Raises [`GlueError`], naming the `place`, where they cannot be read or are none."""
    stamps = stamps_of(map(Path, paths))
    try:
        if kind == "csv":
            rows = _read_csv(*paths)
            check_stamps(stamps)
        else:
            # The library's own place goes by the files' names and times, and would hand out what others held.
            cache_dir = cache_of_folder(hash_of(kind, list(stamps)))
            files = [glob.escape(path) for path in paths]  # the library takes names for patterns
            rows = load_dataset(kind, data_files=files, split="train", cache_dir=cache_dir)
            check_copy(cache_dir, lambda: check_stamps(stamps))
    except (ArithmeticError, DatasetsError, OSError, TypeError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise GlueError(f"{place} holds no rows") from error
        raise GlueError(f"{place} cannot be read as {kind}: {cause_of(error)}") from error
    if not len(rows):
        raise GlueError(f"{place} holds no rows")
    return rows


def _read_csv(path: str) -> Dataset:
    """
    The rows of a csv file, where the type of a column is that of all its values, and "None" and "NA" are values.

    Not by the datasets library, which takes the first ten thousand rows for the type of all. Raises `ValueError` where
    they cannot be read, `ArithmeticError` or `TypeError` where they are of no one type, and `OSError`.
    """
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""], low_memory=False)
    if not isinstance(frame.index, pd.RangeIndex):  # rows are longer than the header, and would lose what stands first
        raise ValueError("rows have more fields than the header names: name each column, and quote texts with commas")
    return Dataset.from_pandas(frame, preserve_index=False)


def _pick_splits(task: Task, splits: DatasetDict, source: str) -> TaskData:
    labelled = ("train", *task.validation_splits.values())
    for split in labelled:
        if split not in splits:
            raise GlueError(f"{task.name}: {source} has no split {split!r} (it has {', '.join(splits)})")
    tests = {name: split for name, split in task.test_splits.items() if split in splits}
    for split in (*labelled, *tests.values()):
        place = f"{task.name}: {source}, {split}"
        for column in (*task.text_columns, *(["label"] if split in labelled else [])):
            if column not in splits[split].column_names:
                raise GlueError(f"{place}, has no column {column!r} (it has {', '.join(splits[split].column_names)})")
        if split in labelled:
            _check_labels(task, splits[split], place)
    return TaskData(
        task,
        splits["train"],
        {column: splits[split] for column, split in task.validation_splits.items()},
        {name: splits[split] for name, split in tests.items()},
    )


def _check_labels(task: Task, dataset: Dataset, place: str) -> None:
    """Raise [`GlueError`] for a label that is no class of the task, such as a test split's -1, or no finite value."""
    classes = range(len(task.label_names))
    for value in dataset.unique("label"):
        is_right = value in classes if task.label_names else value is not None and math.isfinite(value)
        if not is_right:
            expected = f"class from 0 to {len(classes) - 1}" if task.label_names else "finite number"
            raise GlueError(f"{place}: label {value!r} is no {expected}")


def load_own_task(
    train_file: str,
    validation_file: str,
    test_file: str | None = None,
    text_columns: Sequence[str] = (),
    label_column: str = "label",
    name: str | None = None,
    regression: bool = False,
) -> TaskData:
    """
    A task from csv, json(l) or parquet files: floats in `label_column` make a regression, and numbers with
    `regression`; all else are classes.

    Without `text_columns`, the one or two columns of text beside the label are read. Raises [`GlueError`]
    for what cannot be used.
    """
    name = name or Path(train_file).stem
    if name in RESERVED_NAMES or not re.fullmatch(r"[\w-]+", name):
        raise GlueError(f"task_name: {name!r} cannot name a task of your own; choose another with --task_name")
    files = {"train": train_file, "validation": validation_file, **({"test": test_file} if test_file else {})}
    if len(text_columns) > 2:
        raise GlueError(f"text_columns: a model reads one or two texts, not {len(text_columns)}")
    splits = DatasetDict({split: _load_file(path) for split, path in files.items()})
    texts = tuple(text_columns) or _text_columns(splits["train"], train_file, label_column)
    for split, dataset in splits.items():
        for column in (*texts, *(() if split == "test" else (label_column,))):
            if column not in dataset.column_names:
                raise GlueError(
                    f"{files[split]}: no column {column!r} (it has {', '.join(dataset.column_names)}): "
                    "see --text_columns and --label_column"
                )
        splits[split] = _rename_label(dataset, label_column, texts)
        if split != "test" and _lacks_labels(splits[split]["label"]):
            raise GlueError(f"{files[split]}: rows without a value in column {label_column!r}: fill or drop them")
    label_names: tuple[str, ...] = ()
    if regression or _kind(splits["train"]).startswith("float"):
        for split in ("train", "validation"):
            if not _kind(splits[split]).startswith(("float", "int", "uint")):
                raise GlueError(f"{files[split]}: column {label_column!r} must hold numbers for a regression")
            splits[split] = splits[split].cast_column("label", Value("float64"))
    else:
        label_names, splits = _number_labels(splits, label_column, files)
    classes = (
        f"{len(label_names)} classes ({', '.join(label_names[:NAMED_CLASSES])})" if label_names else "a regression"
    )
    logger.info(
        "%s: text from %s; %s by %s; %s rows",
        name, " and ".join(texts), classes, label_column, " / ".join(f"{len(split):,}" for split in splits.values()),
    )  # fmt: skip
    headline = "accuracy" if label_names else "pearson"
    task = Task(name, texts, headline, label_names, {name: "validation"}, {name: "test"}, label_names)
    return _pick_splits(task, splits, train_file)


def _lacks_labels(labels: Sequence[Any]) -> bool:
    """Whether a label is absent, or is a word for that in a column of numbers, which it has turned into text."""
    if None in labels:
        return True
    values = {value for value in labels if isinstance(value, Hashable)}
    words = {value for value in values if isinstance(value, str) and not NUMBER.fullmatch(value)}
    return bool(words) and words < values and all(word.strip().lower() in ABSENT for word in words)


def _kind(dataset: Dataset) -> str:
    """Type of the label column's values; "" for lists and objects."""
    feature = dataset.features["label"]
    return feature.dtype if isinstance(feature, Value | ClassLabel) else ""


def _text_columns(train: Dataset, train_file: str, label_column: str) -> tuple[str, ...]:
    texts = tuple(
        column
        for column, feature in train.features.items()
        if isinstance(feature, Value)
        and feature.dtype in ("string", "large_string")
        and column not in (label_column, "label")
    )
    if not 1 <= len(texts) <= 2:
        raise GlueError(
            f"{train_file}: name the one or two columns of text with --text_columns (it has "
            f"{', '.join(train.column_names)})"
        )
    return texts


def _rename_label(dataset: Dataset, label_column: str, texts: Sequence[str]) -> Dataset:
    """The texts and, where it is there, the label column under the name `label`."""
    has_label = label_column in dataset.column_names
    dataset = dataset.select_columns([*texts, *([label_column] if has_label else [])])
    return dataset.rename_column(label_column, "label") if has_label and label_column != "label" else dataset


def _load_file(path: str) -> Dataset:
    if not Path(path).is_file():
        raise GlueError(f"There is no file {path}")
    kind = EXTENSIONS.get(Path(path).suffix.lower())
    if kind is None:
        raise GlueError(f"{path}: cannot tell its format; supported: {', '.join(EXTENSIONS)}")
    return _read(kind, [path], path)


def _number_labels(
    splits: DatasetDict, label_column: str, files: Mapping[str, str]
) -> tuple[tuple[str, ...], DatasetDict]:
    """Class names in order (of the numbers or the alphabet), and the splits with class numbers in `label`."""
    feature = splits["train"].features["label"]
    if not isinstance(feature, Value | ClassLabel):
        raise GlueError(f"{files['train']}: column {label_column!r} must hold one text or number a row")
    classes = feature.names if isinstance(feature, ClassLabel) else sorted(set(splits["train"]["label"]))
    names = tuple(str(name) for name in classes)
    if len(names) < 2:
        raise GlueError(f"{files['train']}: all rows have the label {names[0]!r}: nothing to learn")
    # By name: each file is typed alone. One may hold numbers where another holds text, or number the classes otherwise.
    numbers = {name: number for number, name in enumerate(names)}
    numbered = {}
    for split, dataset in splits.items():
        if "label" in dataset.column_names:
            labels = _label_texts(dataset)
            unknown = set(labels) - set(numbers)
            if unknown and split != "test":
                raise GlueError(
                    f"{files[split]}: label {min(unknown)!r} does not occur in training, where labels are like "
                    f"{names[0]!r}"
                )
            dataset = dataset.remove_columns("label").add_column("label", [numbers.get(value, -1) for value in labels])
        numbered[split] = dataset
    return names, DatasetDict(numbered)


def _label_texts(dataset: Dataset) -> list[str]:
    """The label of each row as text: its name, where the file names its numbers (all but -1, which stands for none)."""
    feature = dataset.features["label"]
    if not isinstance(feature, ClassLabel):
        return [str(value) for value in dataset["label"]]
    names = dict(enumerate(feature.names))
    return [str(names.get(value, f"class {value}")) for value in dataset["label"]]
