"""What a GLUE run leaves behind: a line for every finished pair, results, table, chart, submission."""

import csv
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import write_atomically
from .glue import COLUMNS, Task, headline_metrics
from .markup import chart_label
from .paper_results import PAPER_GLUE_ROWS, TASK_TITLES, examples_note

PAIRS_NAME = "glue_runs.jsonl"
CHART_NAME = "glue_results.png"
SUBMISSION_NAME = "glue_submission.zip"


class PairLog:
    """
    The finished pairs of task and seed, of any setting, as JSON lines.

    A line that a kill has cut short is dropped when the file is opened again. `is_writer` is true on one process only;
    the others are given its `lines`.
    """

    def __init__(self, path: Path, is_writer: bool = True):
        self.path, self.is_writer = path, is_writer
        self.lines = _whole_lines(path)
        if is_writer and path.exists() and not path.read_bytes().endswith(b"\n"):
            lines = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_atomically(path.parent, {path.name: lines.encode()})

    def find(self, **values: Any) -> dict[str, Any] | None:
        """The last line with these values."""
        return next((line for line in reversed(self.lines) if values.items() <= line.items()), None)

    def add(self, line: dict[str, Any]) -> None:
        """Append a finished pair; it is on the disk when this returns."""
        self.lines.append(line)
        if not self.is_writer:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # cut short by a kill
        if isinstance(line, dict):
            lines.append(line)
    return lines


def results_table(results: Mapping[str, Any], tasks: Sequence[Task]) -> str:
    """A line a column and metric with the median and all seeds, the average at the end; for the terminal."""
    headlines = headline_metrics(tasks)
    lines = [f"{'task':<16}{'metric':<22}{'median':>8}   seeds"]
    for column, metrics in results["tasks"].items():
        for metric, entry in metrics.items():
            mark = "*" if metric == headlines.get(column) else " "
            values = " ".join(f"{value:.1f}" for value in entry["values"])
            lines.append(f"{TASK_TITLES.get(column, column):<16}{metric + mark:<22}{entry['median']:>8.1f}   {values}")
    if results["average"] is not None:
        lines.append(f"{'average':<16}{average_note(results):<22}{results['average']:>8.1f}   (* enters it)")
    if limit := examples_note(results["setting"]["max_train_samples"]):
        lines.append(f"fine-tuned on {limit}")
    return "\n".join(lines)


def average_note(results: Mapping[str, Any]) -> str:
    """ "" for the paper's nine columns, else how many of them the average is over."""
    columns = results["columns"]
    if set(columns) <= set(COLUMNS):
        return "" if len(columns) == len(COLUMNS) else f"{len(columns)} of {len(COLUMNS)} columns"
    return f"{len(columns)} columns"


def headline_entry(results: Mapping[str, Any], column: str, headline: str) -> dict[str, Any]:
    """Median and values of a column's headline metric, or of the first where another metric was asked for."""
    metrics = results["tasks"][column]
    return metrics.get(headline, next(iter(metrics.values())))


def is_fuller(earlier: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    """Whether earlier results of the same weights tell more: of other columns or seeds, or of more training examples."""
    models = {told["model_id"] for told in (earlier, results) if "model_id" in told}
    if not earlier or len(models) > 1:
        return False
    if any(set(earlier.get(name) or ()) - set(results.get(name) or ()) for name in ("tasks", "seeds")):
        return True
    return _examples(earlier) > _examples(results)


def is_larger(earlier: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    """Whether earlier results of the same weights are of more scores (columns and seeds), or of more training examples."""
    scores = [len(told.get("tasks") or ()) * len(told.get("seeds") or ()) for told in (earlier, results)]
    return is_fuller(earlier, results) and (scores[0] > scores[1] or _examples(earlier) > _examples(results))


def _examples(told: Mapping[str, Any]) -> float:
    return (told.get("setting") or {}).get("max_train_samples") or math.inf


def draw_chart(results: Mapping[str, Any], tasks: Sequence[Task], name: str, path: Path) -> None:
    """Bars of each column's median beside the paper's BERT-base, with and without pretraining, as a PNG."""
    from matplotlib.figure import Figure  # a second of start-up that only this needs

    headlines = headline_metrics(tasks)
    columns = [column for column in (*COLUMNS, "wnli") if column in results["tasks"]]
    columns += [column for column in results["tasks"] if column not in columns]
    limit = examples_note(results["setting"]["max_train_samples"])
    rows: dict[str, dict[str, Any]] = {
        name + (f", {limit}" if limit else ""): {
            column: headline_entry(results, column, headlines[column])["median"] for column in columns
        },
        **{title: row for title, row in PAPER_GLUE_ROWS.items() if title.startswith("BERT-base")},
    }
    figure = Figure(figsize=(2 + 1.1 * len(columns), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for number, (row_name, row) in enumerate(rows.items()):
        places = [place for place, column in enumerate(columns) if row.get(column) is not None]
        heights = [row[columns[place]] for place in places]
        bars = axes.bar(
            [place + (number - 1) * width for place in places], heights, width, label=chart_label(row_name)
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(columns)), [chart_label(TASK_TITLES.get(column, column)) for column in columns])
    axes.set_ylabel("score (per cent)")
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    write_atomically(path.parent, {path.name: buffer.getvalue()})


def submission_lines(task: Task, outputs: np.ndarray) -> list[tuple[int, str]]:
    """Index and prediction of each test example, as the GLUE benchmark's server reads them."""
    if not task.label_names:
        values = outputs.astype(float) if task.value_range is None else outputs.astype(float).clip(*task.value_range)
        return [(index, f"{value:.6g}") for index, value in enumerate(values.tolist())]
    names = task.submitted_labels or tuple(str(number) for number in range(len(task.label_names)))
    return [(index, names[int(value)]) for index, value in enumerate(outputs)]


def prediction_path(folder: Path, setting_id: str, data_id: str, file_name: str, seed: int) -> Path:
    """Where the test predictions of a finished pair, of these data, are kept until the submission is made."""
    return folder / "predictions" / setting_id / data_id.replace("/", "--") / f"{file_name}.seed-{seed}.tsv"


def write_predictions(path: Path, task: Task, outputs: np.ndarray) -> None:
    """A tab-separated file with the header `index prediction`."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerows([("index", "prediction"), *submission_lines(task, outputs)])
    write_atomically(path.parent, {path.name: text.getvalue().encode()})


def write_submission(path: Path, files: Mapping[str, Path]) -> None:
    """The zip that the GLUE benchmark takes: one `<file name>.tsv` for each test split."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, source in files.items():
            archive.write(source, f"{name}.tsv")
    write_atomically(path.parent, {path.name: buffer.getvalue()})


def median_seed(by_seed: Mapping[int, float]) -> int:
    """The seed whose score is the (lower) median: its predictions stand for the model."""
    ordered = sorted(by_seed, key=lambda seed: (by_seed[seed], seed))
    return ordered[(len(ordered) - 1) // 2]
