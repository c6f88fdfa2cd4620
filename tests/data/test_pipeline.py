"""The cache: a hit when nothing that matters changed, never half an entry."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hf_cram.data import pipeline
from hf_cram.data.pipeline import DataArguments, cached_entry, is_complete, prepare_corpus
from hf_cram.data.sources import DataError

WORDS = ["the", "of", "and", "a", "to", "in", "is", "was", "that", "it", "for", "on", "as", "with", "his", "he"]


def write_text(path, documents=300, seed=0):
    rng = np.random.default_rng(seed)
    path.write_text("\n".join(" ".join(rng.choice(WORDS, 20)) + f" {index}" for index in range(documents)))
    return path


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


def arguments(tmp_path, text, **changes):
    values = {"train_files": [str(text)], "vocab_size": 200, "max_seq_length": 16, "eval_rows": 4}
    return DataArguments(**{**values, "cache_dir": str(tmp_path / "cache"), **changes})


def test_prepared_corpus_is_complete_and_found_again(tmp_path, text):
    corpus = prepare_corpus(arguments(tmp_path, text))
    assert not corpus.from_cache
    assert len(corpus.eval_dataset) == 4
    assert len(corpus.train_dataset) == corpus.statistics["train_rows"] > 300
    assert corpus.statistics["documents"] == 300
    assert corpus.train_dataset.rows.dtype == np.uint16
    assert int(corpus.train_dataset.rows.max()) < len(corpus.tokenizer) == 200
    again = prepare_corpus(arguments(tmp_path, text))
    assert again.from_cache
    assert again.directory == corpus.directory
    assert again.statistics == corpus.statistics


def test_what_matters_rebuilds_and_what_does_not_does_not(tmp_path, text):
    first = prepare_corpus(arguments(tmp_path, text))
    os.utime(text, (0, 0))
    moved = tmp_path / "elsewhere.txt"
    moved.write_bytes(text.read_bytes())
    assert prepare_corpus(arguments(tmp_path, text)).from_cache
    assert prepare_corpus(arguments(tmp_path, moved)).from_cache
    folders = {first.directory}
    for change in (
        {"vocab_size": 190},
        {"max_seq_length": 32},
        {"eval_rows": 3},
        {"max_documents": 200},
    ):
        corpus = prepare_corpus(arguments(tmp_path, text, **change))
        assert not corpus.from_cache, change
        folders.add(corpus.directory)
    assert len(folders) == 5
    with pytest.raises(DataError, match="too few to hold some out"):  # the whole file as one document
        prepare_corpus(arguments(tmp_path, text, text_file_documents="blank_line"))
    text.write_text(text.read_text() + "\none more document")
    assert not prepare_corpus(arguments(tmp_path, text)).from_cache


def test_another_row_length_keeps_the_tokenizer(tmp_path, text, monkeypatch):
    prepare_corpus(arguments(tmp_path, text))
    monkeypatch.setattr(pipeline, "train_tokenizer", lambda *args, **kwargs: pytest.fail("trained again"))
    prepare_corpus(arguments(tmp_path, text, max_seq_length=32))


def test_existing_tokenizer(tmp_path, text):
    trained = prepare_corpus(arguments(tmp_path, text))
    trained.tokenizer.save_pretrained(tmp_path / "tokenizer")
    corpus = prepare_corpus(arguments(tmp_path, text, tokenizer_name=str(tmp_path / "tokenizer")))
    assert np.array_equal(corpus.train_dataset.rows, trained.train_dataset.rows)


def test_damaged_entries_are_built_anew(tmp_path, text):
    corpus = prepare_corpus(arguments(tmp_path, text))
    rows = corpus.train_dataset.rows.copy()
    file = corpus.directory / "train.bin"
    del corpus
    file.write_bytes(file.read_bytes()[:-2])
    again = prepare_corpus(arguments(tmp_path, text))
    assert not again.from_cache
    assert np.array_equal(again.train_dataset.rows, rows)
    (again.directory / "eval.bin").unlink()
    assert not prepare_corpus(arguments(tmp_path, text)).from_cache
    assert not prepare_corpus(arguments(tmp_path, text, overwrite_cache=True)).from_cache


def test_a_failure_leaves_nothing_behind(tmp_path, text):
    text.write_text("one short document")
    with pytest.raises(DataError, match="fewer than one training row"):
        prepare_corpus(arguments(tmp_path, text))
    corpora = tmp_path / "cache" / "corpora"
    assert [path for path in corpora.iterdir() if path.is_dir()] == []


def test_disk_errors_are_one_line(tmp_path, text, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "write_rows", full)
    with pytest.raises(DataError, match="No space left on device.*cache_dir"):
        prepare_corpus(arguments(tmp_path, text))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cache_dir"):
        prepare_corpus(arguments(tmp_path, text, cache_dir=str(tmp_path / "file" / "cache")))


KILLED = """
import sys
from hf_cram.data import pipeline
from pathlib import Path
def write(folder):
    (folder / "part.bin").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    import time; time.sleep(60)
pipeline.cached_entry(Path(sys.argv[1]), write, False)
"""


def test_a_killed_preparation_is_never_trusted(tmp_path, python_environment):
    entry = tmp_path / "corpora" / "key"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(entry)], stdout=subprocess.PIPE, text=True, env=python_environment
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not is_complete(entry)
    assert any(path.name.startswith(".key.") for path in entry.parent.iterdir())

    def write(folder: Path) -> None:
        (folder / "whole.bin").write_bytes(b"y")

    assert cached_entry(entry, write, False) == (entry, False)
    assert sorted(path.name for path in entry.iterdir()) == ["manifest.json", "whole.bin"]
    assert not any(path.name.startswith(".key.") for path in entry.parent.iterdir())
    assert cached_entry(entry, write, False) == (entry, True)


def test_two_processes_prepare_once(tmp_path, text, python_environment):
    script = (
        "import sys, json\nfrom hf_cram.data.pipeline import *\n"
        "c = prepare_corpus(DataArguments(train_files=[sys.argv[1]], vocab_size=200, max_seq_length=16, eval_rows=4,"
        " cache_dir=sys.argv[2]))\nprint(json.dumps([c.from_cache, int(c.train_dataset.rows.sum())]))"
    )
    command = [sys.executable, "-c", script, str(text), str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=python_environment) for _ in range(2)
    ]
    results = [json.loads(process.communicate()[0]) for process in processes]
    assert sorted(from_cache for from_cache, _ in results) == [False, True]
    assert results[0][1] == results[1][1]


def test_wrong_arguments_are_one_line(tmp_path):
    for values, message in (
        ({"dataset_name": "x", "train_files": ["y"]}, "both set"),
        ({"text_file_documents": "page"}, "'line' or 'blank_line'"),
        ({"max_seq_length": 4}, "at least 8"),
        ({"eval_rows": 0}, "eval_rows must be at least 1"),
        ({"max_documents": 0}, "max_documents"),
    ):
        with pytest.raises(DataError, match=message):
            DataArguments(**values)


def test_a_hit_writes_nothing(tmp_path, text):
    corpus = prepare_corpus(arguments(tmp_path, text))
    before = {path: path.stat().st_mtime_ns for path in corpus.directory.rglob("*")}
    time.sleep(0.01)
    prepare_corpus(arguments(tmp_path, text))
    assert {path: path.stat().st_mtime_ns for path in corpus.directory.rglob("*")} == before
