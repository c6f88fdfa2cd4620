"""Past one machine: tasks side by side give the rows of one machine, whoever runs them and whatever is killed."""

import itertools
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from conftest import SHARED

from hf_cram.data import texts
from hf_cram.data.deduplication import choose_bands
from hf_cram.data.errors import DataError, SkipReport
from hf_cram.data.pipeline import DataArguments, prepare_corpus
from hf_cram.data.publish import PublishArguments
from hf_cram.data.scale import main, run_plan
from hf_cram.data.scale_arguments import ScaleArguments
from hf_cram.data.scale_estimate import estimate, parse_size
from hf_cram.data.scale_plan import MINHASH_RECALL, cut_by_size, make_plan
from hf_cram.data.scale_shards import write_once

BOOKS = SHARED / "data" / "classic_books.parquet"
ROW_FILES = ("train.bin", "eval.bin")


def write_files(folder, count=5, documents=60, seed=0):
    rng = np.random.default_rng(seed)
    words = ["the", "of", "and", "house", "to", "in", "river", "was", "that", "12345", "it", "for"]
    folder.mkdir()
    for number in range(count):
        lines = [" ".join(rng.choice(words, rng.integers(2, 40))) + f" {number} {line}" for line in range(documents)]
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")
    return folder


def recipe(files, cache, **changes):
    values = {"train_files": [str(files)], "vocab_size": 200, "max_seq_length": 16, "eval_rows": 8}
    return DataArguments(**{**values, "cache_dir": str(cache), "drop_below_characters": 30, **changes})


def same_rows(corpus, expected):
    for name in ROW_FILES:
        assert (corpus.directory / name).read_bytes() == (expected.directory / name).read_bytes(), name
    ours, theirs = ({**c.statistics, "steps": None} for c in (corpus, expected))
    assert ours == theirs


# The plan


def test_every_document_is_read_by_one_task_in_order(tmp_path):
    files = write_files(tmp_path / "text")
    plan = make_plan(recipe(files, tmp_path / "cache"), tasks=3)
    parts = [list(plan.documents([rank], SkipReport())) for rank in range(3)]
    assert all(parts)
    assert sum(parts, []) == [line for file in sorted(files.iterdir()) for line in file.read_text().splitlines()]


def test_files_that_change_after_the_plan_are_an_error(tmp_path):
    files = write_files(tmp_path / "text")
    plan = make_plan(recipe(files, tmp_path / "cache"), tasks=3)
    with open(files / "4.txt", "a") as stream:
        stream.write("one more line of text\n" * 500)
    read = [list(plan.documents([rank], SkipReport())) for rank in range(2)]
    assert sum(read, []) == [line for n in range(3) for line in (files / f"{n}.txt").read_text().splitlines()]
    with pytest.raises(DataError, match=r"4\.txt: it has changed since this run began"):
        list(plan.documents([2], SkipReport()))


def test_text_that_changes_while_it_is_dealt_is_not_kept(tmp_path, monkeypatch):
    """A limit ends the text before the source's own look at its files."""
    scale_steps = pytest.importorskip("hf_cram.data.scale_steps", reason="needs the extra `scale`")
    files = write_files(tmp_path / "text")
    plan = make_plan(recipe(files, tmp_path / "cache", max_documents=100), tasks=2)
    assert plan.files is None

    def write_and_change(documents, folder):
        texts.write_documents(documents, folder)
        with open(files / "0.txt", "a") as stream:
            stream.write("one more line of text\n")

    monkeypatch.setattr(scale_steps, "write_documents", write_and_change)
    with pytest.raises(DataError, match=r"0\.txt: it has changed since this run began"):
        scale_steps.PrepareText(plan).run()
    assert not plan.blocks.exists()


def test_parts_are_neighbours_of_about_equal_size():
    assert cut_by_size([10, 10, 10, 10], 2) == [slice(0, 2), slice(2, 4)]
    assert cut_by_size([90, 5, 5], 2) == [slice(0, 1), slice(1, 3)]
    assert cut_by_size([], 3) == [slice(0, 0)] * 3
    sizes = np.random.default_rng(0).integers(1, 1000, 500).tolist()
    parts = cut_by_size(sizes, 7)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, 500)
    assert all(abs(sum(sizes[part]) - sum(sizes) / 7) < 1000 for part in parts)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_train_tokens": 1000}, "max_train_tokens"),
        ({"dedup_substring_bytes": 100}, "dedup_substring_bytes"),
        ({"overwrite_cache": True}, "overwrite_cache"),
        ({"cache_dir": None}, "cache_dir"),
    ],
)
def test_what_needs_the_text_in_one_place_is_refused(tmp_path, changes, told):
    arguments = recipe(write_files(tmp_path / "text"), tmp_path / "cache")
    for name, value in changes.items():
        setattr(arguments, name, value)
    with pytest.raises(DataError, match=told):
        make_plan(arguments, tasks=2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"executor": "k8s"}, "local, ray, slurm"), ({"tasks": 0}, "tasks"), ({"executor": "slurm"}, "slurm_partition"),
     ({"rate": 0.0}, "rate"), ({"workers": 0}, "workers"), ({"estimate": "much"}, "800GB"),
     ({"slurm_partition": "cpu"}, "slurm_partition is for executor slurm, and the executor is local"),
     ({"executor": "slurm", "slurm_partition": "cpu", "ray_task_seconds": 9}, "ray_task_seconds is for executor ray")],
)  # fmt: skip
def test_arguments_are_checked(changes, told):
    with pytest.raises(DataError, match=told):
        ScaleArguments(**changes)


def test_bands_find_nine_of_ten_pairs_at_the_similarity():
    assert choose_bands(0.8, MINHASH_RECALL) == (16, 8)
    for similarity in (0.3, 0.5, 0.7, 0.9, 1.0):
        bands, rows = choose_bands(similarity, MINHASH_RECALL)
        assert bands * rows <= 128
        assert 1 - (1 - similarity**rows) ** bands >= 0.9


def test_of_two_processes_at_the_same_work_the_first_counts(tmp_path):
    def is_whole(folder):
        return (folder / "end").exists()

    def slow(folder):
        write_once(tmp_path / "task", lambda other: (other / "end").write_text("first"), is_whole)
        (folder / "end").write_text("second")

    write_once(tmp_path / "task", slow, is_whole)
    assert (tmp_path / "task" / "end").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_half_written_work_is_no_work(tmp_path):
    def fail(folder):
        (folder / "begin").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_once(tmp_path / "task", fail, lambda folder: True)
    assert list(tmp_path.iterdir()) == []


def test_places_hold_wherever_a_task_starts(tmp_path, monkeypatch):
    write_files(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    sources = {"one": {"train_files": ["text/*.txt"]}, "two": {"train_files": ["text/1.txt"]}}
    plain = make_plan(recipe("text", "cache"), tasks=2)
    mix = make_plan(recipe(None, "cache", train_files=None, sources=sources), tasks=2)
    monkeypatch.chdir("/")
    assert plain.files is not None
    assert mix.files is None
    assert len(list(plain.documents([0, 1], SkipReport()))) == 300
    assert mix.arguments.named_sources()["two"].train_files == [str(tmp_path / "text" / "1.txt")]
    assert plain.cache == mix.cache == tmp_path / "cache"


def test_a_relative_folder_of_a_data_set_holds_wherever_a_task_starts(tmp_path, monkeypatch):
    write_files(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    plain = make_plan(recipe(None, "cache", train_files=None, dataset_name="text"), tasks=2)
    sources = {"one": {"dataset_name": "text"}, "two": {"dataset_name": "installed-docs"}}
    (tmp_path / "installed-docs").mkdir()
    monkeypatch.setattr("hf_cram.data.sources.fingerprint_installed", lambda: "environment")
    monkeypatch.setattr("hf_cram.data.sources.read_installed_docs", lambda **_: iter(["a document"]))
    mix = make_plan(recipe(None, "cache", train_files=None, sources=sources), tasks=2)
    assert plain.arguments.dataset_name == str(tmp_path / "text")
    assert mix.arguments.named_sources()["one"].dataset_name == str(tmp_path / "text")
    assert mix.arguments.named_sources()["two"].dataset_name == "installed-docs"


# The estimate


def test_estimate_halves_with_twice_the_machines():
    one = estimate(800e9, ScaleArguments(nodes=1, cores=32, rate=10.0), 128)
    two = estimate(800e9, ScaleArguments(nodes=2, cores=32, rate=10.0), 128)
    assert one.parallel_hours == pytest.approx(800e9 / (32 * 10e6) / 3600)
    assert two.parallel_hours == pytest.approx(one.parallel_hours / 2)
    assert two.alone_hours == one.alone_hours
    # Rows of 2 bytes a token, read four times and written twice at 500 MB/s.
    assert one.order_hours == two.order_hours == pytest.approx(6 * 2 * 800e9 / 4.5 / 500e6 / 3600)
    assert parse_size("5.4 TB") == 5.4e12


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # it is imported here already
@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (["--help"], 0, "usage: python -m hf_cram.data.scale"),
        (["--estimate", "800GB", "--nodes", "4"], 0, "hours"),
        (["--estimate", "800GB", "--text_for_budget", "true"], 2, "text_for_budget stops reading .*: leave it out"),
    ],
)
def test_the_command(monkeypatch, capsys, options, status, told):
    monkeypatch.setattr(sys, "argv", ["hf_cram.data.scale", *options])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("hf_cram.data.scale", run_name="__main__")
    assert caught.value.code == status
    assert re.search(told, "".join(capsys.readouterr()))


def test_estimate_is_printed(capsys):
    assert (
        main(DataArguments(), ScaleArguments(estimate="800GB", nodes=4, cores=32, rate=12.0), PublishArguments()) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("800 GB of text in rows of 128 tokens")
    assert [line.split()[:2] for line in lines[2:]] == [["1", "0.58"], ["4", "0.14"]]


# Without the extra


def test_without_datatrove_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("datatrove.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "hf_cram.data.scale_executors", raising=False)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    data = DataArguments(train_files=[str(write_files(tmp_path / "text"))], cache_dir=str(tmp_path / "cache"))
    assert main(data, ScaleArguments(tasks=2), PublishArguments()) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("error: datatrove is missing: pip install '.[scale]' in a checkout of hf_cram")


# datatrove's local executor


@pytest.fixture
def datatrove():
    return pytest.importorskip("datatrove", reason="the extra 'scale' is not installed")


@pytest.mark.parametrize("row_order", ["none", "unigram"])
def test_local_rows_equal_those_of_one_machine(tmp_path, datatrove, row_order):
    files = write_files(tmp_path / "text")
    (files / "2.txt").write_bytes((files / "2.txt").read_bytes() + b"\xff\xfe not text\n")
    expected = prepare_corpus(recipe(files, tmp_path / "one", row_order=row_order, sample_dropped=2))
    assert expected.statistics["dropped"]
    assert expected.statistics["skipped"]
    arguments = recipe(files, tmp_path / "many", row_order=row_order, sample_dropped=2)
    corpus = run_plan(make_plan(arguments, tasks=4), ScaleArguments(tasks=4, workers=2))
    same_rows(corpus, expected)
    found = prepare_corpus(arguments)
    assert found.from_cache
    assert found.directory == corpus.directory


def test_tasks_with_few_documents_are_told_of(tmp_path, datatrove, monkeypatch, caplog):
    files = write_files(tmp_path / "text")
    scale = ScaleArguments(tasks=2, workers=2)
    run_plan(make_plan(recipe(files, tmp_path / "cache"), tasks=2), scale)
    assert "300 documents are few for 2 tasks" in caplog.text
    caplog.clear()
    monkeypatch.setattr("hf_cram.data.scale.FEW_DOCUMENTS", 150)
    run_plan(make_plan(recipe(files, tmp_path / "cache"), tasks=2), scale)
    assert "are few" not in caplog.text


def test_on_ray_only_tasks_side_by_side_have_a_time(tmp_path, datatrove, monkeypatch, caplog):
    from hf_cram.data import scale_executors

    times = {}

    class Executor:
        def __init__(self, steps, tasks, workers, logging_dir, time, **options):
            times[Path(logging_dir).name.partition("-")[0]] = time

        run = get_incomplete_ranks = lambda self, **_: []

    monkeypatch.setattr(scale_executors, "RayPipelineExecutor", Executor)
    nodes = [{"Alive": True, "Resources": {"memory": 2**34}}]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes))
    plan = make_plan(recipe(write_files(tmp_path / "text"), tmp_path / "cache"), tasks=4)
    scale_executors.run_on_ray(plan, ScaleArguments(executor="ray", tasks=4, ray_task_seconds=60))
    assert times == {"text": None, "tokens": 60, "rows": None}
    scale_executors.run_on_ray(plan, ScaleArguments(executor="ray", tasks=4, rows_memory_gb=64))
    assert "have 64 GB, and no node of the Ray cluster offers more than 16.0: unless it grows" in caplog.text


def test_where_tasks_are_ended_no_more_run_than_there_is_room_for(tmp_path, datatrove, monkeypatch):
    from hf_cram.data import scale_executors

    workers = {}

    class Executor:
        time = None

        def __init__(self, steps, tasks, workers_, logging_dir, **options):
            workers[Path(logging_dir).name.partition("-")[0]] = workers_

        run = get_incomplete_ranks = lambda self, **_: []

    gib = 2**30
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "memory": 5.0 * gib}},
        {"Alive": True, "Resources": {"CPU": 1.0, "memory": 64.0 * gib}},
        {"Alive": False, "Resources": {"CPU": 64.0, "memory": 64.0 * gib}},
    ]
    monkeypatch.setattr(scale_executors, "RayPipelineExecutor", Executor)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes))
    plan = make_plan(recipe(write_files(tmp_path / "text", count=8), tmp_path / "cache"), tasks=8)
    for seconds, given, expected in ((60, None, 3), (60, 6, 6), (60, 20, 8), (None, None, 8), (None, 6, 6)):
        scale = ScaleArguments(executor="ray", tasks=8, workers=given, memory_gb=2, ray_task_seconds=seconds)
        scale_executors.run_on_ray(plan, scale)
        assert workers == {"text": 1, "tokens": expected, "rows": 1}


def test_without_a_ray_cluster_one_line_says_so(tmp_path, datatrove, monkeypatch, capsys):
    def init(address, **_):
        raise ConnectionError(f"Could not find any running Ray instance for {address}.\nStart one.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    data = recipe(write_files(tmp_path / "text"), tmp_path / "cache")
    assert main(data, ScaleArguments(executor="ray", tasks=2), PublishArguments()) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("error: Could not find any running Ray instance for auto. Start one.")


def test_a_text_that_tasks_cannot_share_is_dealt_to_them(tmp_path, datatrove, monkeypatch):
    monkeypatch.setattr(texts, "FILE_CHARACTERS", 2000)  # the processes are forked
    first, second = write_files(tmp_path / "first"), write_files(tmp_path / "second", count=1, seed=1)
    sources = {
        "first": {"train_files": [str(first)], "weight": 3},
        "second": {"train_files": [str(second)], "max_passes": 2, "max_tokens": 900},
    }
    mix = {"train_files": None, "sources": sources, "max_documents": 250}
    expected = prepare_corpus(recipe(None, tmp_path / "one", **mix))
    plan = make_plan(recipe(None, tmp_path / "many", **mix), tasks=3)
    same_rows(run_plan(plan, ScaleArguments(tasks=3, workers=2)), expected)
    assert all(list(plan.documents([rank], SkipReport())) for rank in range(3))
    # Blocks that are gone are no empty text; they are dealt anew, and the tasks' parts stay theirs.
    shutil.rmtree(expected.directory)
    shutil.rmtree(plan.cache / "corpora")
    next(plan.blocks.glob("*.jsonl.zst")).unlink()
    with pytest.raises(DataError, match="the dealt text is missing or damaged: run the command again"):
        list(plan.documents([0], SkipReport()))
    again = prepare_corpus(recipe(None, tmp_path / "one", **mix))
    same_rows(run_plan(plan, ScaleArguments(tasks=3, workers=2)), again)
    assert all(list(plan.documents([rank], SkipReport())) for rank in range(3))


def test_near_duplicates_are_dropped_once(tmp_path, datatrove):
    files = write_files(tmp_path / "text")
    copied = (files / "0.txt").read_text().splitlines()
    copies = [line for line in copied if len(line.split()) > 20]
    (files / "9.txt").write_text("\n".join(line.upper() + "!" for line in copies) + "\n")
    words = "the house by the river was that of"
    numbers = [f"{words} {' '.join(str(10_000 + 100 * row + column) for column in range(12))}" for row in range(7)]
    (files / "8.txt").write_text("\n".join(numbers) + "\n")  # tables of the same words are not the same
    arguments = recipe(files, tmp_path / "cache", near_dedup_similarity=0.8)
    corpus = run_plan(make_plan(arguments, tasks=3), ScaleArguments(tasks=3, workers=2))
    assert corpus.statistics["removed"] == {"near_duplicates": len(copies)}
    assert corpus.statistics["sources"]["text"]["documents"] == 307 + len(copies)
    kept = corpus.statistics["documents"] + sum(corpus.statistics["dropped"].values())
    assert kept == 307
    assert [step["step"] for step in corpus.statistics["steps"]][0] == "near duplicates"
    assert corpus.statistics["steps"][0]["seconds"] > 0


def test_damaged_tokens_are_not_packed(tmp_path, datatrove):
    files = write_files(tmp_path / "text")
    plan = make_plan(recipe(files, tmp_path / "cache"), tasks=2)
    scale = ScaleArguments(tasks=2, workers=2)
    corpus = run_plan(plan, scale)
    rows = (corpus.directory / "train.bin").read_bytes()
    shutil.rmtree(corpus.directory)
    assert (run_plan(plan, scale).directory / "train.bin").read_bytes() == rows
    shutil.rmtree(corpus.directory)
    tokens = plan.task_tokens(1) / "shard-00000.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=f"delete {plan.folder}"):
        run_plan(plan, scale)
    assert not corpus.directory.exists()


def test_files_of_a_hub_snapshot_are_links(tmp_path):
    files = write_files(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in files.iterdir():
        file.rename(file.with_suffix(""))
        (tmp_path / "snapshot" / file.name).symlink_to(file.with_suffix(""))
    plan = make_plan(recipe(tmp_path / "snapshot", tmp_path / "cache"), tasks=2)
    assert len(list(plan.documents([0, 1], SkipReport()))) == 300


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Real text, so much that a task takes seconds, and the rows of one machine."""
    if not BOOKS.exists():
        pytest.skip("the shared text is not here")
    folder = tmp_path_factory.mktemp("books")
    (folder / "text").mkdir()
    table = pq.read_table(BOOKS, columns=["text"])
    for number in range(4):
        pq.write_table(table.slice(number * 600, 600), folder / "text" / f"{number}.parquet")
    return folder / "text", prepare_corpus(book_recipe(folder / "text", folder / "cache"))


def book_recipe(text, cache):
    return recipe(
        text, cache, vocab_size=2048, max_seq_length=128, eval_rows=64, tokenizer_training_characters=2_000_000,
        max_tokens_per_character=0.4, min_letter_share=0.7,
    )  # fmt: skip


class Killer(threading.Thread):
    """Kills the process of the first task whose half-written tokens it sees."""

    def __init__(self, cache: Path, find):
        super().__init__(daemon=True)
        self.cache, self.find = cache, find
        self.killed: int | None = None
        self.name_of_killed = ""
        self.stopped = threading.Event()

    def run(self):
        while not self.stopped.wait(0.01):
            for folder in self.cache.glob("scale/*/tokens/.*"):
                if (folder / "shard-00000.tokens").exists():
                    process = self.find(psutil.Process(int(folder.name.split(".")[2])))
                    self.killed, self.name_of_killed = process.pid, " ".join(process.cmdline())
                    process.send_signal(signal.SIGKILL)
                    return

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self.stopped.set()
        self.join()


@pytest.mark.slow
def test_a_killed_local_task_is_run_again(tmp_path, datatrove, books):
    text, expected = books
    plan = make_plan(book_recipe(text, tmp_path / "many"), tasks=4)
    with Killer(tmp_path / "many", lambda process: process) as killer:
        corpus = run_plan(plan, ScaleArguments(tasks=4, workers=2))
    assert killer.killed is not None
    same_rows(corpus, expected)


@pytest.mark.slow
def test_a_killed_program_goes_on_with_what_is_not_finished(
    tmp_path, datatrove, books, python_environment, repository
):
    text, expected = books
    arguments = book_recipe(text, tmp_path / "many")
    plan = make_plan(arguments, tasks=4)
    given = {name: value for name, value in vars(arguments).items() if value != getattr(DataArguments(), name)}
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{name}: {value!r}" for name, value in given.items()))
    command = [sys.executable, "-m", "hf_cram.data.scale", str(tmp_path / "recipe.yaml"), "--tasks", "4"]
    process = subprocess.Popen(
        [*command, "--workers", "1"], env=python_environment, cwd=repository, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (plan.folder / "logs" / "tokens" / "completions" / "00001").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(children, timeout=5)
    assert {child.status() for child in left} <= {psutil.STATUS_ZOMBIE}  # where nobody is there to bury them
    finished = {rank: os.stat(plan.task_tokens(rank)).st_ino for rank in (0, 1)}
    assert not (tmp_path / "many" / "corpora").exists()
    done = subprocess.run(command, env=python_environment, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    corpus = prepare_corpus(arguments)
    assert corpus.from_cache
    same_rows(corpus, expected)
    assert {rank: os.stat(plan.task_tokens(rank)).st_ino for rank in (0, 1)} == finished
    assert f"{expected.statistics['train_rows']:,} rows to train on" in done.stdout


def test_a_task_that_fails_is_named_and_nothing_is_taken_for_rows(tmp_path, datatrove):
    files = write_files(tmp_path / "text")
    (files / "4.txt").write_text("")
    plan = make_plan(recipe(files, tmp_path / "cache"), tasks=2)
    with pytest.raises(DataError, match="4.txt: it is empty"):
        run_plan(plan, ScaleArguments(tasks=2, workers=2))
    assert not (tmp_path / "cache" / "corpora").exists()


def test_no_stage_begins_before_all_tasks_of_the_one_before_have_finished(tmp_path, datatrove):
    from hf_cram.data.scale_executors import make_stages

    files = write_files(tmp_path / "text")
    scale = ScaleArguments(tasks=3, workers=2)
    plan = make_plan(recipe(files, tmp_path / "cache", near_dedup_similarity=0.8), tasks=3)
    stages = make_stages(plan, scale)
    run_plan(plan, scale)
    for before, stage in itertools.pairwise(stages[1:]):
        first = stage.steps[0]
        assert first(None, 0, stage.tasks) is None
        mark = next((plan.folder / "logs" / before.name / "completions").iterdir())
        mark.unlink()
        with pytest.raises(DataError, match=f"1 tasks of {before.name} have not finished: run the command again"):
            first(None, 0, stage.tasks)
        mark.touch()


def test_kills_end_a_run_only_where_nothing_is_finished_between_them(tmp_path, datatrove, monkeypatch):
    from hf_cram.data import scale_executors

    class Executor(scale_executors.LocalExecutor):
        kills = 0

        def _run_ranks(self, ranks):
            """Every round finishes `finishes` of them, and then a process is killed."""
            type(self).kills += 1
            for rank in ranks[: self.finishes]:
                self.mark_rank_as_completed(rank)
            return False

    monkeypatch.setattr(Executor, "save_executor_as_json", lambda self: None)
    Executor.finishes = 1
    Executor([], 8, 1, str(tmp_path / "slowly")).run()
    assert Executor.kills == 8
    Executor.finishes, Executor.kills = 0, 0
    with pytest.raises(DataError, match="killed 3 times and none was finished"):
        Executor([], 8, 1, str(tmp_path / "never")).run()
    assert Executor.kills == 3


def test_what_a_killed_dealing_leaves_is_cleared_away(tmp_path, datatrove):
    plan = make_plan(recipe(write_files(tmp_path / "text"), tmp_path / "cache"), tasks=2)
    run_plan(plan, ScaleArguments(tasks=2, workers=2))
    leftovers = [plan.folder / ".blocks.1.abcdef", plan.folder / "tokens" / ".00001.1.abcdef"]
    live = plan.folder / ".blocks.2.abcdef"  # of another recipe's run on this text
    for folder in (*leftovers, live):
        folder.mkdir()
    for folder in leftovers:
        os.utime(folder, (0, 0))
    run_plan(plan, ScaleArguments(tasks=2, workers=2))  # the rows are there by now
    assert not any(folder.exists() for folder in leftovers)
    assert live.exists()


def test_another_submission_leaves_a_queue_its_marks(tmp_path, datatrove, slurm):
    files = write_files(tmp_path / "text")
    scale = ScaleArguments(executor="slurm", tasks=3, slurm_partition="cpu")
    plan = make_plan(recipe(files, tmp_path / "cache"), tasks=3)
    mark = plan.folder / "logs" / "text" / "completions" / "00000"
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert run_plan(make_plan(recipe(files, tmp_path / "cache", max_seq_length=32), tasks=3), scale) is None
    assert mark.exists()


# A Ray cluster of two processes


@pytest.fixture(scope="module")
def ray_cluster():
    pytest.importorskip("datatrove", reason="the extra 'scale' is not installed")
    ray = pytest.importorskip("ray", reason="the extra 'scale' is not installed")
    folder = tempfile.mkdtemp(prefix="ray")  # short: sockets lie in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("TMPDIR", folder)  # where datatrove keeps logs of running tasks
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, _temp_dir=folder, log_to_driver=False
        )
    yield ScaleArguments(executor="ray", tasks=4, workers=2, memory_gb=1, rows_memory_gb=1)
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_rows_of_a_ray_cluster_equal_those_of_one_machine(tmp_path, ray_cluster, books):
    text, expected = books
    plan = make_plan(book_recipe(text, tmp_path), tasks=4)
    same_rows(run_plan(plan, ray_cluster), expected)


@pytest.mark.slow
def test_on_ray_a_task_that_hangs_is_begun_anew(tmp_path, ray_cluster, monkeypatch):
    from hf_cram.data import scale_executors

    flag = tmp_path / "hung-once"

    class HangsOnce(scale_executors.FilterAndTokenize):  # of here, so that Ray carries it to its workers
        def run(self, data, rank=0, world_size=1):
            if rank == 1 and not flag.exists():
                flag.touch()
                time.sleep(600)
            return super().run(data, rank, world_size)

    monkeypatch.setattr(scale_executors, "FilterAndTokenize", HangsOnce)
    files = write_files(tmp_path / "text")
    expected = prepare_corpus(recipe(files, tmp_path / "one"))
    plan = make_plan(recipe(files, tmp_path / "many"), tasks=4)
    scale = replace(ray_cluster, tasks=4, workers=None, ray_task_seconds=60)  # 20 fail on a busy machine
    same_rows(run_plan(plan, scale), expected)
    assert flag.exists()


@pytest.mark.slow
def test_a_killed_ray_worker_is_replaced(tmp_path, ray_cluster, books):
    text, expected = books
    plan = make_plan(book_recipe(text, tmp_path), tasks=4)
    # The task runs in a process that the worker has forked.
    with Killer(tmp_path, lambda process: process.parent()) as killer:
        corpus = run_plan(plan, ray_cluster)
    assert killer.killed is not None
    assert "ray::" in killer.name_of_killed
    same_rows(corpus, expected)


# Slurm


SBATCH = """#!/bin/bash
number=$(ls {folder}/*.slurm 2>/dev/null | wc -l)
cp "${{@: -1}}" {folder}/$(printf %02d $number).slurm
echo "$@" >> {folder}/calls
echo Submitted batch job $((100 + number))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Folder of the scripts that a stand-in for sbatch was given."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH.format(folder=folder))
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_slurm_scripts_are_arrays_that_wait_for_each_other(tmp_path, datatrove, slurm, capsys):
    files = write_files(tmp_path / "text")
    scale = ScaleArguments(
        executor="slurm",
        tasks=5,
        workers=2,
        memory_gb=3,
        rows_memory_gb=20,
        slurm_partition="cpu",
        slurm_time="8:00:00",
    )
    assert main(recipe(files, tmp_path / "cache"), scale, PublishArguments()) == 0
    assert "the rows will be in" in capsys.readouterr().out
    scripts = [path.read_text() for path in sorted(slurm.glob("*.slurm"))]
    text, tokens, rows = (script for script in scripts if "launch_pickled_pipeline" in script)
    assert {"#SBATCH --array=0-4%2", "#SBATCH --mem-per-cpu=3G", "#SBATCH --cpus-per-task=1", "#SBATCH --time=8:00:00",
            "#SBATCH --partition=cpu", "#SBATCH --job-name=hf_cram-tokens", "#SBATCH --requeue",
            f'export PATH="{Path(sys.executable).parent}:$PATH"'} <= set(tokens.splitlines())  # fmt: skip
    for script in (text, rows):
        assert {"#SBATCH --array=0-0%1", "#SBATCH --mem-per-cpu=20G"} <= set(script.splitlines())
    for script, stage in ((text, "text"), (tokens, "tokens"), (rows, "rows-*")):
        (executor,) = (tmp_path / "cache").glob(f"scale/*/logs/{stage}/executor.pik")
        assert f"launch_pickled_pipeline {executor}" in script
        assert "--qos" not in script
    calls = [call for call in (slurm / "calls").read_text().splitlines() if "RUN_OFFSET" in call]
    assert "--dependency" not in calls[0]
    assert "--dependency=afterok:100" in calls[1]
    assert "--dependency=afterok:102" in calls[2]


def test_a_job_that_slurm_refuses_is_one_line(tmp_path, datatrove, slurm, capsys):
    (slurm / "sbatch").write_text("#!/bin/bash\necho invalid partition >&2; exit 1\n")
    scale = ScaleArguments(executor="slurm", tasks=2, slurm_partition="cpuu")
    assert main(recipe(write_files(tmp_path / "text"), tmp_path / "cache"), scale, PublishArguments()) == 1
    assert "sbatch has refused the job, see its message: look at slurm_partition" in capsys.readouterr().err


@pytest.mark.slow
def test_what_slurm_is_given_makes_the_rows(tmp_path, datatrove, slurm, monkeypatch, python_environment):
    files = write_files(tmp_path / "text")
    expected = prepare_corpus(recipe(files, tmp_path / "one"))
    plan = make_plan(recipe(files, tmp_path / "many"), tasks=2)
    assert run_plan(plan, ScaleArguments(executor="slurm", tasks=2, slurm_partition="cpu")) is None
    for name, content in (("srun", 'while [[ $1 == -* || $1 =~ ^[0-9]+$ ]]; do shift; done; "$@"'),
                          ("scontrol", "echo node1")):  # fmt: skip
        (slurm / name).write_text(f"#!/bin/bash\n{content}\n")
        (slurm / name).chmod(0o755)
    for script in sorted(slurm.glob("*.slurm")):
        last = int(re.search(r"--array=0-(\d+)", script.read_text())[1])
        for index in range(last + 1):
            environment = {
                **python_environment, "SLURM_ARRAY_TASK_ID": str(index), "RUN_OFFSET": "0", "SLURM_NODELIST": "node1",
            }  # fmt: skip
            if "launch_pickled_pipeline" in script.read_text():
                subprocess.run(["bash", script], env=environment, check=True, capture_output=True)
    same_rows(prepare_corpus(recipe(files, tmp_path / "many")), expected)


def test_without_slurm_one_line_says_so(tmp_path, datatrove, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    scale = ScaleArguments(executor="slurm", tasks=2, slurm_partition="cpu")
    assert main(recipe(write_files(tmp_path / "text"), tmp_path / "cache"), scale, PublishArguments()) == 1
    assert "sbatch is not here" in capsys.readouterr().err.splitlines()[-1]
