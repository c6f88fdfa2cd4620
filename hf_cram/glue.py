"""The GLUE tasks: what they are, how they are scored and averaged."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np

from .data.errors import did_you_mean
from .paper_results import GLUE_COLUMNS, HEADLINE_METRICS

METRIC_PATH = str(Path(__file__).with_name("glue_metric.py"))
# What somebody else's metric may raise, from its script's syntax to its demands on predictions.
METRIC_ERRORS = (
    ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


class GlueError(ValueError):
    """A task, a file or a column that is not there, in one line."""


@dataclass(frozen=True)
class Task:
    """
    One task: `headline` is the metric that enters the average, `label_names` is empty for a regression.

    `validation_splits` maps the columns of the results to splits; `test_splits` maps the file names of a submission to
    splits. `submitted_labels` are written into a submission instead of the class numbers; values of a regression are
    cut to `value_range` there.
    """

    name: str
    text_columns: tuple[str, ...]
    headline: str
    label_names: tuple[str, ...]
    validation_splits: Mapping[str, str]
    test_splits: Mapping[str, str] = field(default_factory=dict)
    submitted_labels: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None


def _task(name: str, text_columns: str, label_names: str, file_name: str, **kwargs: Any) -> Task:
    splits = {"validation_splits": {name: "validation"}, "test_splits": {file_name: "test"}, **kwargs}
    return Task(name, tuple(text_columns.split()), HEADLINE_METRICS[name], tuple(label_names.split()), **splits)


PAIR = "sentence1 sentence2"
ENTAILMENT = ("entailment", "not_entailment")
MNLI_LABELS = ("entailment", "neutral", "contradiction")
TASKS = {
    task.name: task
    for task in (
        _task("cola", "sentence", "unacceptable acceptable", "CoLA"),
        _task("sst2", "sentence", "negative positive", "SST-2"),
        _task("mrpc", PAIR, "not_equivalent equivalent", "MRPC"),
        _task("stsb", PAIR, "", "STS-B", value_range=(0.0, 5.0)),
        _task("qqp", "question1 question2", "not_duplicate duplicate", "QQP"),
        _task(
            "mnli",
            "premise hypothesis",
            " ".join(MNLI_LABELS),
            "MNLI-m",
            validation_splits={"mnli": "validation_matched", "mnli_mismatched": "validation_mismatched"},
            test_splits={"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"},
            submitted_labels=MNLI_LABELS,
        ),
        _task("qnli", "question sentence", " ".join(ENTAILMENT), "QNLI", submitted_labels=ENTAILMENT),
        _task("rte", PAIR, " ".join(ENTAILMENT), "RTE", submitted_labels=ENTAILMENT),
        _task("wnli", PAIR, "not_entailment entailment", "WNLI"),
    )
}
# The columns of the average: MNLI counts twice, WNLI not at all.
COLUMNS = tuple(GLUE_COLUMNS)


def choose_tasks(names: str | None, glue_data: str | None) -> list[Task]:
    """
    The tasks of a comma-separated list; without one, all that lie in `glue_data` or, on the Hub, all nine.

    Raises [`GlueError`] for an unknown name, naming the nearest, and for a folder without tasks.
    """
    if glue_data is not None and not Path(glue_data).is_dir():
        raise GlueError(f"glue_data: there is no folder {glue_data}")
    if names:
        chosen = [name.strip() for name in names.split(",") if name.strip()]
        for name in chosen:
            if name not in TASKS:
                raise GlueError(f"tasks: unknown task {name!r}{did_you_mean(name, TASKS)}")
        if not chosen:
            raise GlueError(f"tasks: no task in {names!r}: name some of {', '.join(TASKS)}")
        return [TASKS[name] for name in dict.fromkeys(chosen)]
    tasks = [task for task in TASKS.values() if glue_data is None or (Path(glue_data) / task.name).is_dir()]
    if not tasks:
        raise GlueError(f"glue_data: {glue_data} holds no folder of a task ({', '.join(TASKS)})")
    return tasks


def load_metric(name: str | None, task: Task) -> tuple[Any, float]:
    """
    An `evaluate` metric and the factor to per cent (1 for a metric of somebody else, whose unit is not known).

    Without a name it is this package's, in the task's configuration. Raises [`GlueError`] for a metric that does not
    load, or does not score right predictions of the task.
    """
    if name is None:
        configuration = task.name if task.name in TASKS else ("classification" if task.label_names else "regression")
        return evaluate.load(METRIC_PATH, configuration), 100.0
    try:
        metric = evaluate.load(name)
    except METRIC_ERRORS as error:
        raise GlueError(f"metric: {name!r} cannot be loaded: {cause_of(error)}") from error
    right: list[Any] = 2 * list(range(len(task.label_names))) or [0.5, 1.5, 2.5]
    try:
        scores = numbers_of(metric.compute(predictions=right, references=right))
    except METRIC_ERRORS as error:
        raise GlueError(f"metric: {name!r} does not score {task.name}: {cause_of(error)}") from error
    if not scores:
        raise GlueError(f"metric: {name!r} gives no number for {task.name}")
    return metric, 1.0


def numbers_of(scores: Mapping[str, Any] | None) -> dict[str, float]:
    """Those of a metric's results that are one number."""
    return {name: float(value) for name, value in (scores or {}).items() if isinstance(value, float | int | np.number)}


def aggregate(scores: Mapping[str, Mapping[int, Mapping[str, float]]], headlines: Mapping[str, str]) -> dict[str, Any]:
    """
    Medians over seeds, and the paper's average (section 5.1): the mean of the headline medians of its nine columns.

    Args:
        scores: column -> seed -> metric -> value, in per cent.
        headlines: column -> the metric that stands for it; a column without one is not averaged.

    Returns `{"tasks": {column: {metric: {"median", "values"}}}, "average", "columns", "seeds"}`. `columns` are those
    in the average: fewer than nine for a partial set, those that were run where none is GLUE's, none where the
    headline metrics were not computed.
    """
    tasks: dict[str, dict[str, dict[str, Any]]] = {
        column: {
            metric: {
                "median": statistics.median(values[metric] for values in by_seed.values()),
                "values": [by_seed[seed][metric] for seed in sorted(by_seed)],
            }
            for metric in next(iter(by_seed.values()))
        }
        for column, by_seed in scores.items()
    }
    averaged = [column for column in tasks if headlines.get(column) in tasks[column]]
    columns = [column for column in COLUMNS if column in averaged] or [
        column for column in averaged if column not in TASKS
    ]
    average = statistics.fmean(tasks[column][headlines[column]]["median"] for column in columns) if columns else None
    seeds = sorted({seed for by_seed in scores.values() for seed in by_seed})
    return {"tasks": tasks, "average": average, "columns": columns, "seeds": seeds}


def headline_metrics(tasks: Sequence[Task]) -> dict[str, str]:
    """Column -> headline metric, for all columns of the tasks."""
    return {column: task.headline for task in tasks for column in task.validation_splits}


def cause_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    return " ".join(str(error.__cause__ or error).split())
