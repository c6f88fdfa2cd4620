"""The table and the picture across runs: what stands in them, and what a user is told where something is wrong."""

import csv
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hf_cram.markup import describe_count
from hf_cram.paper_results import GLUE_COLUMNS, HEADLINE_METRICS, PAPER_GLUE_ROWS
from hf_cram.report import (
    ReportError,
    describe_budget,
    draw_glue,
    draw_losses,
    draw_report,
    load_run,
    load_runs,
    main,
    markdown_table,
    paper_rows,
)

PRETRAINING = {
    "eval_loss": 3.91294,
    "eval_perplexity": 50.05,
    "tokens_seen": 5_339_136,
    "tokens_per_second": 8897.6,
    "train_seconds": 600.06,
    "time_budget_seconds": 600.0,
    "preprocessing_seconds": 0.1,
}
NEWER = {"hardware": "1 x 2 CPU threads | x86_64", "num_parameters": 4_724_000, "text_name": "documentation"}
HISTORY = [
    {"elapsed_seconds": 60.0, "loss": 6.5},
    {"elapsed_seconds": 300.0, "loss": 5.0},
    {"elapsed_seconds": 300.0, "eval_loss": 4.8},
    {"elapsed_seconds": 600.0, "train_loss": 5.1},
]
PARTIAL = {"sst2": 80.0, "stsb": 40.5, "mrpc": 81.0, "cola": 7.1}


def glue_results(scores, seeds=3):
    """The file of run_glue.py: the headline metric has the score, another one on the side has not."""
    tasks = {
        task: {HEADLINE_METRICS[task]: {"median": score, "values": [score] * seeds}, "spearmanr": {"median": -1.0}}
        for task, score in scores.items()
    }
    return {"model": "m", "tasks": tasks, "average": 0.0, "columns": list(scores), "seeds": list(range(seeds))}


@pytest.fixture
def make_run(tmp_path):
    def make(name, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for stem, content in files.items():
            (folder / f"{stem}.json").write_text(json.dumps(content))
        return folder

    return make


def read_markdown(text):
    """Rows of the first table as dicts of title -> cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines]
    assert len({len(line) for line in table}) == 1
    return [dict(zip(table[0], line, strict=True)) for line in table[2:]]


def test_report_of_a_full_an_old_and_a_glue_only_run(make_run, tmp_path, capsys):
    full = make_run(
        "full", all_results=PRETRAINING | NEWER, trainer_state={"log_history": HISTORY},
        glue_results=glue_results(dict.fromkeys(GLUE_COLUMNS, 50.0) | {"cola": 59.0, "wnli": 99.0}),
        minimal_pairs_results={"accuracy": 61.25, "pairs": 400},
    )  # fmt: skip
    old = make_run("old", all_results=PRETRAINING)
    bert = make_run("bert", glue_results=glue_results(PARTIAL, seeds=1))
    output = tmp_path / "new" / "report"
    main([str(old), str(full), str(bert), "--output_dir", str(output)])

    assert sorted(path.name for path in output.iterdir()) == ["report.csv", "report.md", "report.png"]
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert (output / "report.md").read_text().startswith(printed)

    shown = read_markdown(printed)
    assert [row["model"] for row in shown] == ["old", "full", "bert", *PAPER_GLUE_ROWS]
    titles = list(shown[0])
    assert titles[titles.index("MNLI-m") : titles.index("GLUE") + 1] == [*GLUE_COLUMNS.values(), "GLUE"]
    expected = {
        "source": "run", "budget": "10 min", "hardware": "1 x 2 CPU threads / x86_64", "parameters": "4.7M",
        "tokens": "5.3M", "text": "documentation", "MLM loss": "3.913", "MNLI-mm": "50.0", "CoLA": "59.0",
        "GLUE": "51.0", "seeds": "3", "minimal pairs": "61.2",
    }  # fmt: skip
    assert {title: shown[1][title] for title in expected} == expected
    assert shown[2]["GLUE"] == "52.1 (4 of 9)"
    assert shown[2]["STS-B"] == "40.5"
    filled = {title for title, cell in shown[0].items() if cell}
    assert filled == {"model", "source", "budget", "tokens", "MLM loss"}

    read = list(csv.DictReader(io.StringIO((output / "report.csv").read_text())))
    assert [row["name"] for row in read] == ["old", "full", "bert", *PAPER_GLUE_ROWS]
    assert float(read[0]["eval_loss"]) == 3.91294
    assert read[0]["hardware"] == read[0]["cola"] == read[0]["glue_average"] == read[0]["averaged_columns"] == ""
    assert read[1]["hardware"] == NEWER["hardware"]
    assert float(read[1]["glue_average"]) == pytest.approx(51.0)
    assert (float(read[2]["glue_average"]), read[2]["averaged_columns"]) == (pytest.approx(52.15), "4")
    assert (read[2]["mnli"], read[2]["eval_loss"], read[2]["seeds"]) == ("", "", "1")


def test_a_table_that_was_counted_stands_beside_the_parameters(make_run, tmp_path, capsys):
    run = make_run("run", all_results=PRETRAINING | NEWER | {"neighbour_table_bytes": 67_108_864})
    main([str(run), "--output_dir", str(tmp_path)])
    assert read_markdown(capsys.readouterr().out)[0]["parameters"] == "4.7M and a table of 67 MB"
    (row, *_) = csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text()))
    assert (float(row["num_parameters"]), float(row["neighbour_table_bytes"])) == (4_724_000, 67_108_864)


def test_csv_on_request(make_run, tmp_path, capsys):
    main([str(make_run("run", all_results=PRETRAINING)), "--format", "csv", "--output_dir", str(tmp_path)])
    assert capsys.readouterr().out == (tmp_path / "report.csv").read_text()


@pytest.mark.parametrize("name", PAPER_GLUE_ROWS)
def test_facts_of_the_paper_agree_with_each_other(name):
    row = PAPER_GLUE_ROWS[name]
    # The recorded average is rounded, and so are its columns.
    assert sum(row[column] for column in GLUE_COLUMNS) / len(GLUE_COLUMNS) == pytest.approx(row["average"], abs=0.1)
    assert row["source"] in ("V", "R")
    if row["budget"] is not None:
        assert describe_budget(row["time_budget_seconds"]) == row["budget"]


def test_paper_rows_show_the_recorded_average_unmarked():
    shown = {row["model"]: row for row in read_markdown(markdown_table(paper_rows()))}
    bert = shown["BERT-base, fully trained"]
    assert (bert["MNLI-m"], bert["MNLI-mm"], bert["GLUE"], bert["source"]) == ("83.2", "83.4", "80.9", "paper (V)")
    assert shown["BERT-base, no pretraining"]["CoLA"] == "0.0"
    assert shown["crammed v1, RTX 2080 Ti"]["source"] == "paper (R)"


def test_own_tasks_and_wnli_are_in_no_average(make_run):
    results = glue_results({"wnli": 56.3})
    results["tasks"]["reviews"] = {"accuracy": {"median": 91.0, "values": [91.0]}}
    row = load_run(make_run("run", glue_results=results | {"average": 91.0}))
    assert row["glue_average"] is None


def test_same_named_folders_are_told_apart_and_order_is_kept(make_run, monkeypatch, tmp_path):
    for name in ("b/x/out", "a/x/out", "c/out", "single"):
        make_run(name, all_results=PRETRAINING)
    monkeypatch.chdir(tmp_path / "single")
    rows = load_runs(["../b/x/out", ".", "../a/x/out", "../c/out", "../b/x/out/"])
    assert [row["name"] for row in rows] == ["b/x/out", "single", "a/x/out", "c/out"]


@pytest.mark.parametrize("name", ["_base", "a$b_$", "$\\frac$"])
def test_a_name_of_marks_stands_in_the_picture(make_run, name):
    runs = load_runs([make_run(name, all_results=PRETRAINING, trainer_state={"log_history": HISTORY})])
    axes = Figure().subplots()
    draw_losses(axes, runs)
    assert [text.get_text().strip().replace("\\$", "$") for text in axes.legend().get_texts()] == [name]
    assert draw_report(runs)[:4] == b"\x89PNG"


def test_losses_are_drawn_over_the_clock_with_the_last_evaluation(make_run):
    runs = load_runs(
        [
            make_run("drawn", all_results=PRETRAINING, trainer_state={"log_history": HISTORY}),
            make_run("scores", glue_results=glue_results(PARTIAL)),
        ]
    )
    axes = Figure().subplots()
    draw_losses(axes, runs)
    training, held_out = [line.get_xydata().tolist() for line in axes.lines]
    assert training == [[1.0, 6.5], [5.0, 5.0]]
    assert held_out == [[5.0, 4.8], [pytest.approx(10.0, abs=0.01), 3.91294]]
    assert axes.get_legend_handles_labels()[1] == ["drawn"]


def test_bars_stand_for_the_columns_that_were_run(make_run):
    runs = load_runs(
        [
            make_run("one", glue_results=glue_results(PARTIAL)),
            make_run("loss_only", all_results=PRETRAINING),
            make_run("two", glue_results=glue_results({"cola": 1.0})),
        ]
    )
    axes = Figure().subplots()
    draw_glue(axes, runs)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["SST-2", "STS-B", "MRPC", "CoLA"]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert list(heights) == ["one", "two", "BERT-base, no pretraining", "BERT-base, fully trained"]
    assert heights["one"] == [80.0, 40.5, 81.0, 7.1]
    assert heights["two"] == pytest.approx([float("nan")] * 3 + [1.0], nan_ok=True)


def test_other_rows_of_one_text_are_told_apart(make_run):
    ids = {"a": "1234567890", "b": "1234567890", "c": "abcdef0123", "old": None}
    folders = [make_run(name, all_results=PRETRAINING | NEWER | {"dataset_id": key}) for name, key in ids.items()]
    assert [row["text_name"] for row in load_runs(folders[:2])] == ["documentation"] * 2
    assert [row["text_name"] for row in load_runs(folders)] == [
        "documentation (123456)", "documentation (123456)", "documentation (abcdef)", "documentation",
    ]  # fmt: skip


def test_training_on_a_part_is_marked(make_run, tmp_path, capsys):
    results = {**glue_results(PARTIAL), "setting": {"max_train_samples": 10_000}}
    folder = make_run("part", glue_results=results)
    main([str(folder), "--output_dir", str(tmp_path), "--format", "csv"])
    (row, *_) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["max_train_samples"] == "10000"
    row = read_markdown((tmp_path / "report.md").read_text())[0]
    assert row["GLUE"] == "52.1 (4 of 9; at most 10,000 training examples a task)"
    axes = Figure().subplots()
    draw_glue(axes, load_runs([folder]))
    assert axes.containers[0].get_label() == "part, at most 10,000 training examples a task"


@pytest.mark.parametrize(
    ("stem", "content", "complaint"),
    [
        ("all_results", '{"eval_loss": 3.9', "cannot be read"),
        ("all_results", "[]", "not an object"),
        ("all_results", "[" * 100_000, "cannot be read"),
        ("all_results", '{"eval_loss": "low"}', "eval_loss is not a number"),
        ("glue_results", "{}", "no 'tasks'"),
        ("glue_results", '{"tasks": {"cola": 3}}', "tasks.cola.matthews_correlation"),
        ("glue_results", '{"tasks": {}, "seeds": 3}', "seeds is not a list"),
        ("trainer_state", '{"log_history": {"', "cannot be read"),
        ("minimal_pairs_results", "\xff", "cannot be read"),
    ],
)
def test_broken_files_are_named(make_run, stem, content, complaint):
    folder = make_run("run", all_results=PRETRAINING)
    (folder / f"{stem}.json").write_text(content, encoding="latin-1")
    with pytest.raises(ReportError, match=complaint) as caught:
        load_run(folder)
    assert f"{stem}.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_results_ends_the_program_in_one_line(make_run, tmp_path, monkeypatch):
    empty = make_run("empty", trainer_state={"log_history": []})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(empty)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("hf_cram.report", run_name="__main__")
    assert caught.value.code.startswith(f"python -m hf_cram.report: error: {empty} holds none of all_results.json")
    assert "\n" not in caught.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_missing_folder_and_unwritable_output_are_named(make_run, tmp_path):
    with pytest.raises(ReportError, match="there is no folder .*absent"):
        main([str(tmp_path / "absent"), "--output_dir", str(tmp_path)])
    run = make_run("run", all_results=PRETRAINING)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(ReportError, match="cannot be written to .*file"):
        main([str(run), "--output_dir", str(in_the_way)])


@pytest.mark.parametrize("name", ["report.md", "report.csv", "report.png"])
def test_a_file_of_a_person_is_not_replaced(make_run, tmp_path, name):
    folder = make_run("run", all_results=PRETRAINING)
    for _ in range(2):  # one of its own is
        main([str(folder), "--output_dir", str(tmp_path / "own")])
    (tmp_path / name).write_text("# My report\n")
    with pytest.raises(ReportError, match=rf"{name} is no report of this program"):
        main([str(folder), "--output_dir", str(tmp_path)])
    assert (tmp_path / name).read_text() == "# My report\n"


def test_a_failed_write_leaves_the_earlier_report(make_run, tmp_path, monkeypatch):
    run, output = make_run("run", all_results=PRETRAINING), tmp_path / "report"
    main([str(run), "--output_dir", str(output)])
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    (run / "all_results.json").write_text(json.dumps(PRETRAINING | {"eval_loss": 1.0}))

    write_bytes = Path.write_bytes

    def fill_the_disk(path, content):
        if "png" in path.name:
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(ReportError, match="No space left"):
        main([str(run), "--output_dir", str(output)])
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_counts_and_budgets_in_words():
    budgets = [90, 600, 5400, 129_600, 86_400, 345_600, 0.5]
    assert [describe_budget(seconds) for seconds in budgets] == [
        "90 s", "10 min", "90 min", "36 h", "1 day", "4 days", "0.5 s",
    ]  # fmt: skip
    assert [describe_count(count) for count in (9.1e9, 119_500_000, 20_480, 7)] == ["9.1B", "119.5M", "20.5k", "7"]
