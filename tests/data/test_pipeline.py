"""The cache: a hit when nothing that matters changed, never half an entry."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from hf_cram.data import stages, texts, token_shards
from hf_cram.data.cache import cached_entry, is_complete
from hf_cram.data.errors import DataError
from hf_cram.data.export import export_corpus
from hf_cram.data.ordering import OrderingArguments, score_rows
from hf_cram.data.pipeline import DataArguments, prepare_corpus

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
    again = prepare_corpus(arguments(tmp_path, moved))
    assert again.from_cache
    assert list(again.statistics["sources"]) == [moved.name]
    folders = {first.directory}
    for change in (
        {"vocab_size": 190},
        {"max_seq_length": 32},
        {"eval_rows": 3},
        {"max_documents": 200},
        {"drop_below_characters": 60},
        {"sample_dropped": 1, "drop_below_characters": 60},
        {"row_order": "random"},
        {"row_order": "random", "row_order_seed": 1},
        {"row_order": "unigram"},
        {"row_order": "unigram", "reverse_row_order": True},
        {"max_train_tokens": 3000},
        {"near_dedup_similarity": 0.7},
        {"near_dedup_similarity": 0.95},
        {"dedup_substring_bytes": 60},
        {"dedup_substring_bytes": 80},
        {"tokenizer_training_characters": 5000},
    ):
        corpus = prepare_corpus(arguments(tmp_path, text, **change))
        assert not corpus.from_cache, change
        folders.add(corpus.directory)
    assert len(folders) == 17
    assert prepare_corpus(arguments(tmp_path, text, preprocessing_workers=1)).from_cache
    with pytest.raises(DataError, match="too few to hold some out"):  # the whole file as one document
        prepare_corpus(arguments(tmp_path, text, text_file_documents="blank_line"))
    text.write_text(text.read_text() + "\none more document")
    assert not prepare_corpus(arguments(tmp_path, text)).from_cache


def test_another_row_length_keeps_the_tokenizer(tmp_path, text, monkeypatch):
    prepare_corpus(arguments(tmp_path, text))
    monkeypatch.setattr(stages, "train_tokenizer", lambda *args, **kwargs: pytest.fail("trained again"))
    prepare_corpus(arguments(tmp_path, text, max_seq_length=32))


def test_existing_tokenizer(tmp_path, text):
    trained = prepare_corpus(arguments(tmp_path, text))
    trained.tokenizer.save_pretrained(tmp_path / "tokenizer")
    corpus = prepare_corpus(arguments(tmp_path, text, tokenizer_name=str(tmp_path / "tokenizer")))
    assert np.array_equal(corpus.train_dataset.rows, trained.train_dataset.rows)


def test_an_edited_configuration_of_a_tokenizer_is_beside_the_rows(tmp_path, text, monkeypatch):
    prepare_corpus(arguments(tmp_path, text)).tokenizer.save_pretrained(tmp_path / "tokenizer")
    with_it = arguments(tmp_path, text, tokenizer_name=str(tmp_path / "tokenizer"))
    first = prepare_corpus(with_it)
    assert prepare_corpus(with_it).from_cache
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    original = path.read_text()
    path.write_text(json.dumps({**json.loads(original), "padding_side": "left"}))
    shutil.rmtree(tmp_path / "cache" / "tokens")  # as behind hf_cram.data.scale
    monkeypatch.setattr(stages, "write_token_shards", lambda *args, **kwargs: pytest.fail("tokenized again"))
    second = prepare_corpus(with_it)
    assert second.tokenizer.padding_side == "left"
    assert np.array_equal(second.train_dataset.rows, first.train_dataset.rows)
    assert prepare_corpus(with_it).directory == second.directory
    with pytest.raises(pytest.fail.Exception, match="tokenized again"):  # nothing of before is taken
        prepare_corpus(replace(with_it, overwrite_cache=True))
    path.write_text(original)
    assert prepare_corpus(with_it).directory == first.directory


def test_a_damaged_shard_is_no_end_of_the_text(tmp_path, text, monkeypatch):
    monkeypatch.setattr(token_shards, "SHARD_CHARACTERS", 3000)
    monkeypatch.setattr(token_shards, "BATCH_CHARACTERS", 1000)
    corpus = prepare_corpus(arguments(tmp_path, text))
    (shards,) = (tmp_path / "cache" / "tokens").glob("*/shards")
    assert len(list(shards.glob("*.json"))) > 2
    summary = shards / "shard-00001.json"
    summary.write_text("x" * summary.stat().st_size)
    shutil.rmtree(corpus.directory)
    with pytest.raises(DataError, match="its shards are damaged: delete it"):
        prepare_corpus(arguments(tmp_path, text))
    assert not corpus.directory.exists()


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

    monkeypatch.setattr(stages, "pack_rows", full)
    with pytest.raises(DataError, match="No space left on device.*cache_dir"):
        prepare_corpus(arguments(tmp_path, text))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cache_dir"):
        prepare_corpus(arguments(tmp_path, text, cache_dir=str(tmp_path / "file" / "cache")))


def fork(work, *arguments):
    """The process id of a fork of this process that does the work and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def test_a_killed_preparation_is_never_trusted(tmp_path):
    entry, (read_end, write_end) = tmp_path / "corpora" / "key", os.pipe()

    def write_and_wait(folder):
        (folder / "part.bin").write_bytes(b"x" * 1000)
        os.write(write_end, b"!")
        time.sleep(60)

    pid = fork(cached_entry, entry, write_and_wait, False)
    os.close(write_end)  # a fork that fails ends the reading
    assert os.read(read_end, 1) == b"!"
    os.close(read_end)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not is_complete(entry)
    assert any(path.name.startswith(".key.") for path in entry.parent.iterdir())

    def write(folder: Path) -> None:
        (folder / "whole.bin").write_bytes(b"y")

    assert cached_entry(entry, write, False) == (entry, False)
    assert sorted(path.name for path in entry.iterdir()) == ["manifest.json", "whole.bin"]
    assert not any(path.name.startswith(".key.") for path in entry.parent.iterdir())
    assert cached_entry(entry, write, False) == (entry, True)


def test_clearing_up_takes_only_what_was_left_by_this_package(tmp_path):
    others = [".git.1", ".cache.old", ".key.new", f".{'a' * 24}.tmp", f".{'a' * 20}.12"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / f".{'b' * 24}.7").write_text("a file of this name is not ours either")
    for name in (".key.12", f".{'c' * 24}.34", f".{'d' * 32}.56"):
        (tmp_path / name).mkdir()
    cached_entry(tmp_path / "key", lambda folder: None, False)
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert left == {*others, f".{'b' * 24}.7"}
    assert not any((tmp_path / f"{name[1:].rpartition('.')[0]}.lock").exists() for name in others if "key" not in name)


def test_a_death_before_the_tokens_are_in_place_loses_no_shard(tmp_path, text, monkeypatch):
    rename = os.rename

    def die_at_the_last_moment(source, target):
        if Path(target).parent.name == "tokens":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die_at_the_last_moment)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(arguments(tmp_path, text))
    (unfinished,) = (tmp_path / "cache/tokens").glob("*.unfinished")
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.iterdir()}
    prepare_corpus(arguments(tmp_path, text))
    (shards,) = (tmp_path / "cache/tokens").glob("*/shards")
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before
    assert not unfinished.exists()


def test_shards_are_copied_where_the_file_system_has_no_links(tmp_path, text, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    expected = content(prepare_corpus(arguments(tmp_path / "one", text)))
    monkeypatch.setattr(os, "link", refuse)
    assert content(prepare_corpus(arguments(tmp_path / "other", text))) == expected


@pytest.mark.slow
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
        ({"text_file_documents": "page"}, "'line', 'blank_line' or 'file'"),
        ({"max_seq_length": 4}, "at least 8"),
        ({"eval_rows": 0}, "eval_rows must be at least 1"),
        ({"max_documents": 0}, "max_documents"),
        ({"max_train_tokens": 0}, "max_train_tokens must be at least 1"),
        ({"preprocessing_workers": 0}, "preprocessing_workers must be at least 1"),
        ({"row_order": "alphabetical"}, "row_order must be one of"),
        ({"min_letter_share": 2}, "min_letter_share is a share"),
    ):
        with pytest.raises(DataError, match=message):
            DataArguments(**values)


def test_a_hit_writes_nothing(tmp_path, text):
    corpus = prepare_corpus(arguments(tmp_path, text))
    before = {path: path.stat().st_mtime_ns for path in corpus.directory.rglob("*")}
    time.sleep(0.01)
    prepare_corpus(arguments(tmp_path, text))
    assert {path: path.stat().st_mtime_ns for path in corpus.directory.rglob("*")} == before


def content(corpus):
    """Every file of a corpus but the times and the memory that its steps took."""
    files = {
        str(path.relative_to(corpus.directory)): path.read_bytes()
        for path in corpus.directory.rglob("*")
        if path.is_file() and path.name not in ("statistics.json", "manifest.json")
    }
    statistics = json.loads((corpus.directory / "statistics.json").read_text())
    steps = [{**step, "seconds": 0, "peak_memory_bytes": 0} for step in statistics["steps"]]
    return files, {**statistics, "steps": steps}


EVERYTHING = {
    "max_tokens_per_character": 0.5, "drop_below_characters": 72, "sample_dropped": 2, "row_order": "word_length",
}  # fmt: skip


def test_the_number_of_workers_changes_nothing(tmp_path, text, monkeypatch):
    monkeypatch.setattr(token_shards, "SHARD_CHARACTERS", 5000)
    monkeypatch.setattr(token_shards, "BATCH_CHARACTERS", 1000)
    one, *others = [
        content(prepare_corpus(arguments(tmp_path / str(workers), text, preprocessing_workers=workers, **EVERYTHING)))
        for workers in (1, 2, 3)
    ]
    assert one[1]["dropped"]
    assert "dropped/too_few_characters.jsonl" in one[0]
    for other in others:
        assert other == one


def test_killed_between_shards_it_goes_on_to_the_same_bytes(tmp_path, text, monkeypatch):
    monkeypatch.setattr(token_shards, "SHARD_CHARACTERS", 3000)
    monkeypatch.setattr(token_shards, "BATCH_CHARACTERS", 1000)
    values = {
        "train_files": [str(text)], "vocab_size": 200, "max_seq_length": 16, "eval_rows": 4,
        "cache_dir": str(tmp_path / "cache"), "preprocessing_workers": 2, **EVERYTHING,
    }  # fmt: skip
    (read_end, write_end), write_next = os.pipe(), token_shards.TokenShards.write_next

    def write_and_wait(shards, *arguments):
        write_next(shards, *arguments)
        if len(shards.summaries) == 4:
            os.write(write_end, b"!")
            time.sleep(60)  # until the signal comes

    with monkeypatch.context() as patched:
        patched.setattr(token_shards.TokenShards, "write_next", write_and_wait)
        pid = fork(prepare_corpus, DataArguments(**values))
    os.close(write_end)  # a fork that fails ends the reading
    assert os.read(read_end, 1) == b"!"
    os.close(read_end)
    workers = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert workers
    (unfinished,) = (tmp_path / "cache/tokens").glob("*.unfinished")
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.json")}
    assert len(before) == 4
    resumed = prepare_corpus(DataArguments(**values))
    (shards,) = (tmp_path / "cache/tokens").glob("*/shards")
    assert {name: (shards / name).stat().st_mtime_ns for name in before} == before
    assert len([*shards.glob("*.json")]) > 6
    assert not unfinished.exists()
    whole = prepare_corpus(
        DataArguments(**{**values, "cache_dir": str(tmp_path / "other"), "preprocessing_workers": 1})
    )
    assert content(resumed) == content(whole)
    (whole_shards,) = (tmp_path / "other/tokens").glob("*/shards")
    assert {p.name: p.read_bytes() for p in shards.iterdir()} == {
        p.name: p.read_bytes() for p in whole_shards.iterdir()
    }
    _, left = psutil.wait_procs(workers, timeout=10)  # orphans end by themselves
    assert {worker.status() for worker in left} <= {psutil.STATUS_ZOMBIE}  # where nobody is there to bury them


KILLED_ANYWHERE = """
import json, sys
from hf_cram.data import token_shards
from hf_cram.data.pipeline import DataArguments, prepare_corpus
token_shards.SHARD_CHARACTERS, token_shards.BATCH_CHARACTERS = 20_000, 5000
print("begun", flush=True)
prepare_corpus(DataArguments(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, python_environment, monkeypatch):
    text = write_text(tmp_path / "text.txt", documents=20_000)
    values = {
        "train_files": [str(text)], "vocab_size": 200, "max_seq_length": 16, "eval_rows": 4, "preprocessing_workers": 2,
        "near_dedup_similarity": 0.9, "dedup_substring_bytes": 80, **EVERYTHING,
    }  # fmt: skip
    monkeypatch.setattr(token_shards, "SHARD_CHARACTERS", 20_000)
    monkeypatch.setattr(token_shards, "BATCH_CHARACTERS", 5000)
    started = time.monotonic()
    whole = prepare_corpus(DataArguments(**values, cache_dir=str(tmp_path / "whole")))
    seconds = time.monotonic() - started
    killed = json.dumps({**values, "cache_dir": str(tmp_path / "killed")})
    rng, kills = np.random.default_rng(0), 0
    while kills < 12:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_ANYWHERE, killed], stdout=subprocess.PIPE, text=True, env=python_environment
        )
        assert process.stdout.readline() == "begun\n"
        time.sleep(rng.uniform(0, seconds / 2))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
        if process.returncode == 0:  # it was quicker
            shutil.rmtree(tmp_path / "killed")
    resumed = prepare_corpus(DataArguments(**json.loads(killed)))
    assert content(resumed) == content(whole)


def test_overwriting_begins_anew(tmp_path, text):
    first = prepare_corpus(arguments(tmp_path, text))
    (shards,) = (tmp_path / "cache/tokens").glob("*/shards")
    unfinished = shards.parent.with_name(f"{shards.parent.name}.unfinished")
    unfinished.mkdir()
    (unfinished / "shard-00000.json").write_text("{}")  # whole, as far as sizes tell: nothing read, nothing kept
    (unfinished / "shard-00000.tokens").write_bytes(b"")
    (unfinished / "shard-00000.documents").write_bytes(b"")
    again = prepare_corpus(arguments(tmp_path, text, overwrite_cache=True))
    assert not again.from_cache
    assert content(again) == content(first)


def test_rows_are_all_that_a_hit_needs(tmp_path, text):
    prepare_corpus(arguments(tmp_path, text))
    for name in ("tokens", "tokenizers"):
        shutil.rmtree(tmp_path / "cache" / name)
    corpus = prepare_corpus(arguments(tmp_path, text))
    assert corpus.from_cache
    assert len(corpus.tokenizer) == 200
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["corpora"]


def test_another_order_of_rows_reads_no_text(tmp_path, text, monkeypatch):
    plain = prepare_corpus(arguments(tmp_path, text))
    monkeypatch.setattr(stages, "write_token_shards", lambda *args, **kwargs: pytest.fail("read again"))
    ordered = prepare_corpus(arguments(tmp_path, text, row_order="word_length"))
    np.testing.assert_array_equal(ordered.eval_dataset.rows, plain.eval_dataset.rows)
    order = np.load(ordered.directory / "row_order.npy")
    assert sorted(order) == list(range(len(plain.train_dataset)))
    np.testing.assert_array_equal(ordered.train_dataset.rows, plain.train_dataset.rows[order])
    scores = score_rows(ordered.train_dataset.rows, ordered.tokenizer, OrderingArguments(row_order="word_length"))
    assert (np.diff(scores) >= 0).all()
    assert scores[0] < scores[-1]
    histogram = ordered.statistics["row_scores"]
    assert sum(histogram["counts"]) == len(order)
    assert (histogram["edges"][0], histogram["edges"][-1]) == (scores[0], scores[-1])
    assert histogram["row_order"] == "word_length"


def test_what_went_in_and_out_is_counted(tmp_path, text, monkeypatch):
    lines = text.read_text().splitlines()
    (tmp_path / "more.jsonl").write_text('{"text": "short"}\n{"text": 5}\n{"text": "他们 说 的 是 什么"}\n')
    sources = {"lines": {"train_files": [str(text)]}, "more": {"train_files": [str(tmp_path / "more.jsonl")]}}
    corpus = prepare_corpus(
        arguments(tmp_path, text, train_files=None, sources=sources, drop_below_characters=10, sample_dropped=5)
    )
    statistics = corpus.statistics
    assert statistics["documents"] == 300
    assert statistics["characters"] == sum(map(len, lines))
    assert statistics["dropped"] == {"no token of the vocabulary": 1, "too few characters": 1}
    assert statistics["skipped"] == {"no text": 1}
    assert statistics["sources"]["more"]["documents"] == 2
    assert statistics["sources"]["lines"] == {"documents": 300, "characters": sum(map(len, lines))}
    assert "short" in (corpus.directory / "dropped/too_few_characters.jsonl").read_text()
    steps = {step["step"]: step for step in statistics["steps"]}
    assert list(steps) == ["tokenizer", "filter and tokenize", "pack"]
    tokenize = steps["filter and tokenize"]
    assert (tokenize["documents_in"], tokenize["documents_out"]) == (302, 300)
    assert tokenize["tokens_out"] == statistics["tokens"] == steps["pack"]["tokens_in"]
    assert steps["pack"]["tokens_out"] == corpus.train_dataset.num_tokens + corpus.eval_dataset.num_tokens
    assert all(step["seconds"] > 0 and step["peak_memory_bytes"] > 10**7 for step in steps.values())
    table = corpus.table.splitlines()
    assert len(table) == 5
    assert table[-1] == "dropped: no token of the vocabulary (1), too few characters (1)"
    assert table[2].split()[3:5] == ["302", "300"]


def test_reading_stops_when_training_has_enough(tmp_path, text, monkeypatch):
    monkeypatch.setattr(token_shards, "BATCH_CHARACTERS", 1000)
    corpus = prepare_corpus(arguments(tmp_path, text, max_train_tokens=1000))
    assert corpus.statistics["steps"][0]["characters_in"] < 8 * 1064 + 200  # the tokenizer has read no more either
    assert 1000 - 16 <= corpus.train_dataset.num_tokens < 2500
    assert corpus.statistics["sources"]["text.txt"]["documents"] < 200


@pytest.fixture
def repetitive(tmp_path):
    """Documents with near copies of some, and one passage in many."""
    rng = np.random.default_rng(1)
    words = [f"w{number}" for number in range(500)]
    originals = [" ".join(rng.choice(words, 60)) for _ in range(120)]
    passage = " ".join(rng.choice(words, 30))
    lines = []
    for index, document in enumerate(originals):
        lines.append(f"{document} {passage} {index}" if index % 10 == 0 else document)
        if index % 4 == 1:
            lines.append(document.replace(document.split()[30], "changed", 1))
    return write_lines(tmp_path / "repetitive.txt", lines), passage, lines


def write_lines(path, lines):
    path.write_text("\n".join(lines))
    return path


def text_of(corpus):
    rows = np.concatenate([corpus.train_dataset.rows.ravel(), corpus.eval_dataset.rows.ravel()])
    return corpus.tokenizer.decode(rows)


def test_what_stood_before_goes(tmp_path, repetitive):
    path, passage, lines = repetitive
    near = {"near_dedup_similarity": 0.7}
    exact = {"dedup_substring_bytes": 60}
    plain = prepare_corpus(arguments(tmp_path, path, vocab_size=400))
    without_near = prepare_corpus(arguments(tmp_path, path, vocab_size=400, **near))
    without_both = prepare_corpus(arguments(tmp_path, path, vocab_size=400, **near, **exact))
    assert without_both.directory != without_near.directory != plain.directory
    assert text_of(plain).count(passage) == text_of(without_near).count(passage) == 12
    assert text_of(plain).count("changed") >= 28
    assert text_of(without_near).count("changed") == 0
    assert text_of(without_both).count(passage) == 1
    statistics = without_both.statistics
    assert statistics["removed"]["near_duplicates"] == 30
    assert statistics["removed"]["repeated_substrings"]["bytes_removed"] >= 11 * (len(passage) - 2)
    assert statistics["sources"] == {"repetitive.txt": {"documents": 150, "characters": sum(map(len, lines))}}
    steps = {step["step"]: step for step in statistics["steps"]}
    assert list(steps) == ["near duplicates", "repeated substrings", "tokenizer", "filter and tokenize", "pack"]
    assert (steps["near duplicates"]["documents_in"], steps["near duplicates"]["documents_out"]) == (150, 120)
    assert steps["repeated substrings"]["documents_in"] == 120
    assert steps["tokenizer"]["documents_in"] == steps["repeated substrings"]["documents_out"]
    assert prepare_corpus(arguments(tmp_path, path, vocab_size=400, **near, **exact, dedup_memory_mb=200)).from_cache


def test_deduplicated_text_in_many_files_is_the_same(tmp_path, repetitive, monkeypatch):
    path, *_ = repetitive
    one = prepare_corpus(arguments(tmp_path / "one", path, vocab_size=400, dedup_substring_bytes=60))
    monkeypatch.setattr(texts, "FILE_CHARACTERS", 3000)
    many = prepare_corpus(arguments(tmp_path / "many", path, vocab_size=400, dedup_substring_bytes=60))
    assert len([*(tmp_path / "many/cache/deduplicated").glob("*/documents-*.jsonl.zst")]) > 5
    assert content(many) == content(one)


def test_deduplication_for_a_limit_reads_the_beginning(tmp_path, repetitive):
    path, *_ = repetitive
    corpus = prepare_corpus(
        arguments(tmp_path, path, vocab_size=400, near_dedup_similarity=0.7, max_train_tokens=900, eval_rows=1)
    )
    steps = {step["step"]: step for step in corpus.statistics["steps"]}
    assert 8 * 916 <= steps["near duplicates"]["characters_in"] < 8 * 916 + 500
    assert corpus.train_dataset.num_tokens >= 880


def test_too_few_tokens_after_deduplication_are_told(tmp_path, repetitive, caplog):
    path, *_ = repetitive
    limited = {"vocab_size": 400, "eval_rows": 1, "max_train_tokens": 900}
    prepare_corpus(arguments(tmp_path, path, near_dedup_similarity=0.7, **limited))
    assert "asked for" not in caplog.text
    lines = [path.read_text().splitlines()[0]] * 400
    same = write_lines(tmp_path / "same.txt", [*path.read_text().splitlines()[:10], *lines])
    corpus = prepare_corpus(arguments(tmp_path, same, near_dedup_similarity=0.7, **limited))
    assert f"{corpus.statistics['tokens']:,} tokens are left of the 916 asked for" in caplog.text
    assert "a larger max_train_tokens reads more" in caplog.text


def test_a_published_corpus_gives_its_rows(tmp_path, text):
    made = prepare_corpus(arguments(tmp_path, text, row_order="word_length"))
    export_corpus(made, tmp_path / "published")
    published = {"dataset_name": str(tmp_path / "published"), "cache_dir": str(tmp_path / "cache")}
    corpus = prepare_corpus(DataArguments(**published))
    assert not corpus.from_cache
    np.testing.assert_array_equal(corpus.train_dataset.rows, made.train_dataset.rows)
    np.testing.assert_array_equal(corpus.eval_dataset.rows, made.eval_dataset.rows)
    assert corpus.train_dataset.max_seq_length == 16
    assert corpus.table == made.table
    assert prepare_corpus(DataArguments(**published)).from_cache
    with pytest.raises(DataError, match="max_seq_length 64"):
        prepare_corpus(DataArguments(**published, max_seq_length=64))
