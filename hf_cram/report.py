"""
One table and one picture across runs, with the paper's rows for reference.

    python -m hf_cram.report out/quickstart out/mine [--output_dir OUT] [--format markdown|csv]

Writes `report.md`, `report.csv` and `report.png`, and prints the table.
"""

import argparse
import csv
import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .files import GLUE_RESULTS, MINIMAL_PAIRS_RESULTS, TRAINING_RESULTS, read_json, write_atomically
from .markup import chart_label, describe_count, table_cell
from .paper_results import GLUE_COLUMNS, HEADLINE_METRICS, PAPER_GLUE_ROWS, examples_note
from .programs import ending_in_one_line

PROGRAM = "python -m hf_cram.report"
STATE_NAME = "trainer_state.json"

# Keys of a row and titles of the table. The CSV has the keys and the figures as they are.
COLUMNS = {
    "name": "model",
    "source": "source",
    "time_budget_seconds": "budget",
    "hardware": "hardware",
    "num_parameters": "parameters",
    "neighbour_table_bytes": "neighbour table",
    "tokens_seen": "tokens",
    "text_name": "text",
    "eval_loss": "MLM loss",
    **GLUE_COLUMNS,
    "glue_average": "GLUE",
    "averaged_columns": "averaged columns",
    "max_train_samples": "training examples",
    "seeds": "seeds",
    "minimal_pairs": "minimal pairs",
}
# Of the CSV alone: in the table they stand in the cells of the parameters and of the average.
NOTED_COLUMNS = ("neighbour_table_bytes", "averaged_columns", "max_train_samples")
TEXT_COLUMNS = ("name", "source", "hardware", "text_name")
PAPER_SEEDS = 5
# The paper's rows that bound what pretraining can bring, and the greys of their bars beside the runs' own.
CHART_REFERENCES = {"BERT-base, no pretraining": "0.8", "BERT-base, fully trained": "0.5"}
NOTES = f"""\
MLM loss: nats per masked token of the run's own held-out text, comparable between runs with the same text and
tokenizer. GLUE: development sets, per cent, medians over the seeds; the mean of {len(GLUE_COLUMNS)} columns (MNLI
counts twice, WNLI not at all), or of those that were run, which is then said. Scores of a fine-tuning on a part of the
training examples say so, and do not compare with others. Minimal pairs: per cent right. The paper's rows (arXiv
2212.14034) are V, read in its text, repository or model card, or R, recalled with the average recomputed; the size of
its crammed models is derived from their shape.
"""


class ReportError(ValueError):
    """A folder or file that cannot be reported, in one line that names it."""


def load_run(folder: str | Path) -> dict[str, Any]:
    """
    The row of one output folder: the keys of `COLUMNS`, with `None` for what is not known.

    Besides, `training_curve` and `held_out_curve` are lists of (seconds on the clock, loss in nats), and `dataset_id`
    names the rows. Raises [`ReportError`] for a folder that is missing or without results, and for a file that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"there is no folder {folder}")
    names = (TRAINING_RESULTS, GLUE_RESULTS, MINIMAL_PAIRS_RESULTS)
    if not any((folder / name).exists() for name in names):
        raise ReportError(
            f"{folder} holds none of {', '.join(names)}: name the output folder of a finished run_mlm_cram.py, "
            "run_glue.py or hf_cram.minimal_pairs"
        )
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row.update(name=folder.resolve().name, source="run")
    row.update(_pretraining(folder))
    if (folder / GLUE_RESULTS).exists():
        row.update(_glue(folder / GLUE_RESULTS))
    pairs_path = folder / MINIMAL_PAIRS_RESULTS
    row["minimal_pairs"] = _number(pairs_path, _read_if_there(pairs_path), "accuracy")
    return row


def load_runs(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """
    A row for each folder in their order, a folder named twice once, same-named ones told apart by their parents. Texts of
    one name but other rows have the beginning of their `dataset_id` behind it: their losses do not compare.
    """
    given = {Path(folder).resolve(): folder for folder in folders}
    names, depth = [path.name for path in given], 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            Path(*path.parts[-depth:]).as_posix() if names.count(name) > 1 else name
            for path, name in zip(given, names, strict=True)
        ]
    rows = [load_run(folder) | {"name": name} for folder, name in zip(given.values(), names, strict=True)]
    texts = {(row["text_name"], row["dataset_id"]) for row in rows if row["dataset_id"] is not None}
    names = [name for name, _ in texts]
    for row in rows:
        if row["dataset_id"] is not None and names.count(row["text_name"]) > 1:
            row["text_name"] = f"{row['text_name']} ({row['dataset_id'][:6]})"
    return rows


def paper_rows() -> list[dict[str, Any]]:
    """The paper's rows in the form of [`load_run`]; their average is the recorded one."""
    rows = []
    for name, facts in PAPER_GLUE_ROWS.items():
        known = {key: facts[key] for key in COLUMNS if key in facts and key != "source"}
        average = {"glue_average": facts["average"], "averaged_columns": len(GLUE_COLUMNS), "seeds": PAPER_SEEDS}
        rows.append(dict.fromkeys(COLUMNS) | known | average | {"name": name, "source": f"paper ({facts['source']})"})
    return rows


def _read_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read ({error}): delete it, or write it again") from error


def _list(path: Path, values: dict[str, Any], key: str) -> list[Any]:
    """The list at `key`, empty where there is none."""
    value = values.get(key, [])
    if not isinstance(value, list):
        raise ReportError(f"{path}: {key} is not a list")
    return value


def _number(path: Path, values: Any, *keys: str) -> float | None:
    """The number below `keys` in nested objects, `None` where a key is absent."""
    for key in keys:
        if not isinstance(values, dict):
            raise ReportError(
                f"{path}: there should be names and values where {key!r} of {'.'.join(keys)} is looked up"
            )
        values = values.get(key)
        if values is None:
            return None
    if not isinstance(values, int | float):
        raise ReportError(f"{path}: {'.'.join(keys)} is not a number")
    return values


def _pretraining(folder: Path) -> dict[str, Any]:
    """What `run_mlm_cram.py` left: figures, and the curves out of the state of the Trainer."""
    path = folder / TRAINING_RESULTS
    results = _read_if_there(path)
    keys = ("time_budget_seconds", "num_parameters", "neighbour_table_bytes", "tokens_seen", "eval_loss")
    row: dict[str, Any] = {key: _number(path, results, key) for key in keys}
    row.update({key: results.get(key) for key in ("hardware", "text_name")})
    row["dataset_id"] = None if results.get("dataset_id") is None else str(results["dataset_id"])
    state_path = folder / STATE_NAME
    history = _list(state_path, _read_if_there(state_path), "log_history")
    row["training_curve"] = _curve(state_path, history, "loss")
    row["held_out_curve"] = _curve(state_path, history, "eval_loss")
    seconds = _number(path, results, "train_seconds")
    if row["eval_loss"] is not None and seconds is not None:
        # The state is saved before the last evaluation, whose loss stands in the results only.
        row["held_out_curve"].append((seconds, row["eval_loss"]))
    return row


def _curve(path: Path, history: Sequence[Any], loss: str) -> list[tuple[float, float]]:
    points = [(_number(path, entry, "elapsed_seconds"), _number(path, entry, loss)) for entry in history]
    return [(seconds, value) for seconds, value in points if seconds is not None and value is not None]


def _glue(path: Path) -> dict[str, Any]:
    """Medians of the headline metrics, and the average over those of the paper's columns that are there."""
    results = _read_if_there(path)
    if not isinstance(results.get("tasks"), dict):
        raise ReportError(f"{path} has no 'tasks': let run_glue.py write it again")
    if isinstance(results.get("setting"), dict) and results["setting"].get("metric") is not None:
        return {}  # another metric may go by the same name, in another unit
    scores = {
        column: _number(path, results, "tasks", column, HEADLINE_METRICS[column], "median") for column in GLUE_COLUMNS
    }
    known = [score for score in scores.values() if score is not None]
    average = {"glue_average": statistics.fmean(known), "averaged_columns": len(known)} if known else {}
    limit = _number(path, results, "setting", "max_train_samples")
    return {**scores, **average, "max_train_samples": limit, "seeds": len(_list(path, results, "seeds")) or None}


def describe_budget(seconds: float) -> str:
    """Seconds in the largest unit that divides them: `10 min`, `36 h`, `1 day`."""
    for unit, length in (("day", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            count = round(seconds / length)
            return f"{count} {unit}{'s' if unit == 'day' and count > 1 else ''}"
    return f"{seconds:g} s"


FORMATS: dict[str, Callable[[Any], str]] = {
    "time_budget_seconds": describe_budget,
    "num_parameters": describe_count,
    "tokens_seen": describe_count,
    "eval_loss": "{:.3f}".format,
    "seeds": str,
}


def _cell(row: dict[str, Any], key: str) -> str:
    """The text of a cell of the markdown table, empty where nothing is known."""
    value = row[key]
    if value is None:
        return ""
    if key in TEXT_COLUMNS:
        return table_cell(value)
    if key == "num_parameters" and row["neighbour_table_bytes"] is not None:
        return f"{describe_count(value)} and a table of {row['neighbour_table_bytes'] / 1e6:.0f} MB"
    if key in FORMATS:
        return FORMATS[key](value)
    notes = []
    if key == "glue_average" and row["averaged_columns"] < len(GLUE_COLUMNS):
        notes.append(f"{row['averaged_columns']} of {len(GLUE_COLUMNS)}")
    if key == "glue_average" and row["max_train_samples"] is not None:
        notes.append(examples_note(row["max_train_samples"]))
    return f"{value:.1f}" + (f" ({'; '.join(notes)})" if notes else "")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """
    Rows of [`load_run`] and [`paper_rows`] as a markdown table; a partial average is marked `67.1 (4 of 9)`, and one of
    partial training says so too.
    """
    keys = [key for key in COLUMNS if key not in NOTED_COLUMNS]
    lines = [[COLUMNS[key] for key in keys], ["---" if key in TEXT_COLUMNS else "---:" for key in keys]]
    lines += [[_cell(row, key) for key in keys] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same rows as CSV, figures unrounded in seconds, counts, nats and per cent; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(COLUMNS), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def glue_columns(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The GLUE columns in which any of the runs has a score, in the paper's order."""
    return [column for column in GLUE_COLUMNS if any(run[column] is not None for run in runs)]


def draw_report(runs: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of the runs: loss over the clock, and bars of the GLUE columns if any run has them."""
    from matplotlib.figure import Figure  # a second of start-up that only this needs

    has_curves = any(run["training_curve"] or run["held_out_curve"] for run in runs)
    panels = [draw_losses] * (has_curves or not glue_columns(runs)) + [draw_glue] * bool(glue_columns(runs))
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(axes, runs)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def draw_losses(axes: Any, runs: Sequence[dict[str, Any]]) -> None:
    """Held-out loss as dots over the minutes of the clock, each run's training loss as a faint line behind it."""
    for number, run in enumerate(runs):
        for key, style in (("training_curve", {"alpha": 0.3}), ("held_out_curve", {"marker": "o", "markersize": 5})):
            if run[key]:
                label = chart_label(run["name"]) if key == "held_out_curve" or not run["held_out_curve"] else None
                minutes, losses = zip(*((seconds / 60, loss) for seconds, loss in run[key]), strict=True)
                axes.plot(minutes, losses, color=f"C{number}", label=label, **style)
    ends = [max(line.get_xdata()) for line in axes.lines]
    if ends and max(ends) > 10 * min(ends) > 0:  # a run of minutes beside one of a day
        axes.set_xscale("log")
    axes.set_title("loss: dots held out, faint lines training")
    axes.set_xlabel("minutes on the clock")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)


def draw_glue(axes: Any, runs: Sequence[dict[str, Any]]) -> None:
    """Bars of the GLUE columns that any run has, the paper's bounds in grey; a score that is missing has no bar."""
    columns = glue_columns(runs)
    groups = [
        (", ".join(filter(None, [run["name"], examples_note(run["max_train_samples"])])), f"C{number}", run)
        for number, run in enumerate(runs)
        if glue_columns([run])
    ]
    groups += [(name, grey, PAPER_GLUE_ROWS[name]) for name, grey in CHART_REFERENCES.items()]
    width = 0.8 / len(groups)
    for position, (name, color, scores) in enumerate(groups):
        places = [place - 0.4 + width * (position + 0.5) for place in range(len(columns))]
        heights = [float("nan") if scores[column] is None else scores[column] for column in columns]
        axes.bar(places, heights, width, color=color, label=chart_label(name))
    axes.set_xticks(range(len(columns)), [GLUE_COLUMNS[column] for column in columns])
    axes.set_title("GLUE, development sets")
    axes.set_ylabel("per cent")
    axes.grid(axis="y", alpha=0.3)


def check_is_report(folder: Path) -> None:
    """Raises [`ReportError`] for a file in `folder` that has a report's name and that no report has written."""
    beginnings = {"report.md": f"| {COLUMNS['name']} |", "report.csv": ",".join(COLUMNS)}
    ours = {
        name: (folder / name).read_bytes().startswith(beginning.encode())
        for name, beginning in beginnings.items()
        if (folder / name).is_file()
    }
    if (folder / "report.png").is_file():  # a report's picture lies beside its tables
        ours["report.png"] = any(ours.values())
    for name, is_ours in ours.items():
        if not is_ours:
            raise ReportError(
                f"{folder / name} is no report of this program, and would be lost: name another --output_dir"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the folders, write the report, print the table."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="One table and one picture across runs.")
    parser.add_argument("folders", metavar="DIR", nargs="+", help="output folder of a run")
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="where the report goes (default: here)")
    parser.add_argument("--format", choices=("markdown", "csv"), default="markdown", help="of the printed table")
    options = parser.parse_args(arguments)
    runs = load_runs(options.folders)
    rows = runs + paper_rows()
    check_is_report(options.output_dir)
    tables = {"markdown": markdown_table(rows), "csv": csv_table(rows)}
    contents = {
        "report.md": f"{tables['markdown']}\n{NOTES}".encode(),
        "report.csv": tables["csv"].encode(),
        "report.png": draw_report(runs),
    }
    try:
        write_atomically(options.output_dir, contents)
    except OSError as error:
        raise ReportError(f"the report cannot be written to {options.output_dir}: {error.strerror}") from error
    print(tables[options.format], end="")


def explain(error: Exception) -> str:
    """What went wrong, for the line that ends the program."""
    if isinstance(error, OSError):  # a folder that is closed
        return f"{error.filename}: cannot be read ({error.strerror})"
    return str(error)


if __name__ == "__main__":
    with ending_in_one_line(PROGRAM, ReportError, OSError, stopped="stopped; nothing was written", tell=explain):
        main()
