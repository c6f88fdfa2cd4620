"""The program that prepares text, and the limit that the budget sets."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import REPOSITORY

from hf_cram import CrammedBertModel, text_budget
from hf_cram.data.errors import DataError
from hf_cram.data.export import export_corpus
from hf_cram.data.pipeline import DataArguments, prepare_corpus
from hf_cram.launching import threads_of_a_process
from hf_cram.prepare import TrainingFields, _training_args, main
from hf_cram.recipes import ModelArguments
from hf_cram.script_args import MaskingArguments, TextBudgetArguments
from hf_cram.text_budget import is_limit_wanted, limit_text_to_budget, measure_tokens_per_second, round_up
from hf_cram.training_args import CramTrainingArguments

WORDS = ["the", "old", "man", "saw", "a", "boat", "near", "house", "and", "went", "home", "by", "night", "with", "his"]
DATA_FIELDS = ("train_files", "cache_dir", "vocab_size", "max_seq_length", "eval_rows")
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def recipe(tmp_path):
    """A training recipe over a text of 2000 lines, which asks for what no machine here has."""
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, rng.integers(5, 30))) for _ in range(2000)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    values = {
        "output_dir": "out", "train_files": [str(tmp_path / "text.txt")], "cache_dir": str(tmp_path / "cache"),
        "vocab_size": 200, "max_seq_length": 16, "eval_rows": 16, "drop_below_characters": 40, "time_budget": "1h",
        "fp16": True, "torch_compile": True, "learning_rate": "1e-3", "mlm_probability": "0:0.3,0.5:0.15",
        "model_license": "none", "muon_learning_rate": 0.02, **TINY,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_training_recipe_is_prepared_and_the_rows_found_again(recipe, tmp_path, capsys):
    assert main([str(recipe), "--preprocessing_workers", "1"]) == 0
    first = capsys.readouterr().out
    for word in ("documents in", "peak memory", "filter and tokenize", "pack", "dropped: too few characters ("):
        assert word in first
    (corpus,) = (path for path in (tmp_path / "cache/corpora").iterdir() if path.is_dir())
    statistics = json.loads((corpus / "statistics.json").read_text())
    assert f"{statistics['train_rows']:,} rows to train on, 16 held out" in first
    assert main([str(recipe), "--learning_rate", "1", "--hidden_size", "64"]) == 0
    assert f"in {corpus} (was there before)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rat", "1"], "unknown option --learning_rat; did you mean 'learning_rate'?"),
        (["--max_train_tokens", "few"], "max_train_tokens"),
        (["--row_order", "up"], "row_order must be one of"),
        (["--eval_rows", "0"], "eval_rows must be at least 1, got 0"),
        (["--dry_run_documents", "0"], "dry_run_documents must be at least 1"),
        (["--dry_run_documents", "500"], "dry_run_documents is for a dry run"),
        (["--corpus_language", "English"], "corpus_language must be a code of two or three letters"),
        (["--corpus_license", "MIT License"], "corpus_license must be an identifier of the Hub"),
        (["--num_processes", "0"], "num_processes must be at least 1"),
        (["--train_files", "missing.txt"], "missing.txt: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line(recipe, capsys, options, message):
    try:
        status = main([str(recipe), *options])
    except SystemExit as caught:
        status = caught.code
    error = capsys.readouterr().err
    assert status in (1, 2)
    assert error.startswith("python -m hf_cram.data.pipeline: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_command_of_the_readme(recipe, tmp_path, python_environment):
    command = [sys.executable, "-m", "hf_cram.data.pipeline", str(recipe)]
    environment = {**python_environment, "PYTHONHASHSEED": "5", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # Another process makes the same: tokenizer and rows.
    assert main([str(recipe), "--cache_dir", str(tmp_path / "another")]) == 0
    for name in ("tokenizer/tokenizer.json", "train.bin", "eval.bin"):
        ((one,), (other,)) = ((tmp_path / cache / "corpora").glob(f"*/{name}") for cache in ("cache", "another"))
        assert one.read_bytes() == other.read_bytes()
    assert "rows to train on, 16 held out" in done.stdout
    for step in ("tokenizer", "filter and tokenize", "pack"):
        assert f"{step}: " in done.stderr  # its progress bar
    assert "RuntimeWarning" not in done.stderr


def predicted(output):
    lines = output.split("predicted to have:\n")[1].splitlines()
    return {line[:16].strip(): float(line[16:].replace(",", "")) for line in lines}


def test_a_dry_run_predicts_the_totals_and_leaves_nothing(recipe, tmp_path, capsys):
    assert main([str(recipe), "--dry_run", "true", "--dry_run_documents", "500"]) == 0
    totals = predicted(capsys.readouterr().out)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == []
    assert main([str(recipe)]) == 0
    (statistics,) = (tmp_path / "cache/corpora").glob("*/statistics.json")
    real = json.loads(statistics.read_text())
    assert totals["documents read"] == pytest.approx(2000, rel=0.05)
    assert totals["documents kept"] == pytest.approx(real["documents"], rel=0.05)
    assert totals["tokens kept"] == pytest.approx(real["tokens"], rel=0.1)
    assert totals["rows"] == pytest.approx(real["train_rows"] + real["eval_rows"], rel=0.1)
    assert totals["characters read"] == pytest.approx(real["sources"]["text.txt"]["characters"], rel=0.05)


def test_a_dry_run_of_a_small_text_or_a_limited_one_knows_where_it_ends(recipe, capsys):
    assert main([str(recipe), "--dry_run", "true", "--dry_run_documents", "5000"]) == 0
    assert predicted(capsys.readouterr().out)["documents read"] == 2000
    assert main([str(recipe), "--dry_run", "true", "--dry_run_documents", "500", "--max_train_tokens", "10000"]) == 0
    totals = predicted(capsys.readouterr().out)
    assert totals["tokens kept"] == 10000 + 16 * 16
    assert totals["documents read"] < 1000


CARD = """---
dataset_info:
  features:
  - {name: text, dtype: string}
  splits:
  - {name: train, num_bytes: 1, num_examples: 3000}
---
"""


@pytest.fixture(params=[False, True], ids=["table", "stream"])
def hub_folder(request, tmp_path):
    """A folder laid out like a data set of the Hub, and how to read it."""
    rng = np.random.default_rng(1)
    lines = [" ".join(rng.choice(WORDS, rng.integers(5, 30))) for _ in range(3000)]
    (tmp_path / "set" / "data").mkdir(parents=True)
    for number in range(3):
        table = pa.table({"text": lines[number * 1000 : (number + 1) * 1000]})
        pq.write_table(table, tmp_path / "set" / "data" / f"train-0000{number}-of-00003.parquet")
    (tmp_path / "set" / "README.md").write_text(CARD)
    return ["--dataset_name", str(tmp_path / "set"), "--streaming", str(request.param)], lines


def test_a_dry_run_of_a_data_set_predicts_its_totals(recipe, tmp_path, hub_folder, capsys):
    named, lines = hub_folder
    values = {**yaml.safe_load(recipe.read_text()), "drop_below_characters": None}
    del values["train_files"]
    recipe.write_text(yaml.safe_dump(values))
    dry_run = [str(recipe), *named, "--dry_run", "true", "--dry_run_documents", "500"]
    assert main([*dry_run, "--text_for_budget", "false"]) == 0
    totals = predicted(capsys.readouterr().out)
    assert totals["documents read"] == totals["documents kept"] == 3000
    assert totals["characters read"] == pytest.approx(sum(map(len, lines)), rel=0.05)
    assert main([*dry_run, "--max_documents", "2000", "--text_for_budget", "false"]) == 0
    assert predicted(capsys.readouterr().out)["documents read"] == 2000
    # What a run would read, by its budget, where the machine that trains can be known.
    limited = ["--fp16", "false", "--max_steps", "10", "--time_budget", "1000h", "--per_device_train_batch_size", "64"]
    assert main([*dry_run, *limited, "--use_cpu", "true", "--bf16", "false", "--text_for_budget", "true"]) == 0
    assert predicted(capsys.readouterr().out)["tokens kept"] == 10 * 64 * 16 + 16 * 16
    assert main([*dry_run, "--text_for_budget", "true"]) == 0
    assert predicted(capsys.readouterr().out)["documents read"] == 3000


def test_a_stream_that_does_not_tell_its_size_is_predicted_by_its_limit(recipe, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    lines = (tmp_path / "text.txt").read_text().splitlines()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    values = yaml.safe_load(recipe.read_text())
    del values["train_files"]
    recipe.write_text(yaml.safe_dump({**values, "dataset_name": str(tmp_path / "set"), "streaming": True}))
    dry_run = [str(recipe), "--dry_run", "true", "--dry_run_documents", "500"]
    assert main([*dry_run, "--text_for_budget", "false"]) == 0
    assert "unknown: a source does not tell its size" in capsys.readouterr().out
    assert main([*dry_run, "--max_train_tokens", "100000"]) == 0
    assert predicted(capsys.readouterr().out)["tokens kept"] == 100000 + 16 * 16


def test_a_dry_run_multiplies_no_tokenizer(recipe, capsys):
    values = yaml.safe_load(recipe.read_text())
    sources = {"a": {"train_files": values.pop("train_files"), "max_passes": 1000}}
    recipe.write_text(yaml.safe_dump({**values, "sources": sources}))
    assert main([str(recipe), "--dry_run", "true", "--dry_run_documents", "50"]) == 0
    totals = predicted(capsys.readouterr().out)
    assert totals["documents read"] == pytest.approx(2_000_000, rel=0.1)
    # Tokens and rows take 2 bytes a token each, and some for each document.
    assert 4 * totals["tokens kept"] < totals["GB on disk"] * 1e9 < 7 * totals["tokens kept"]


def test_a_dry_run_of_published_rows_is_one_line(recipe, tmp_path, capsys):
    values = {**yaml.safe_load(recipe.read_text()), "drop_below_characters": None}
    export_corpus(prepare_corpus(DataArguments(**{k: values[k] for k in DATA_FIELDS})), tmp_path / "published")
    capsys.readouterr()
    options = {"dataset_name": tmp_path / "published", "cache_dir": tmp_path / "other", "output_dir": "out"}
    options |= {"max_seq_length": 16, "dry_run": "true", "text_for_budget": "false"}
    assert main([word for name, value in options.items() for word in (f"--{name}", str(value))]) == 1
    assert "holds prepared rows: there is nothing to predict" in capsys.readouterr().err


def test_published_rows_are_used_as_they_are_whatever_the_budget(recipe, tmp_path, capsys, monkeypatch):
    """A recipe that streams, in fp16, and own files of the recipe: neither speed nor text is looked at."""
    folder = tmp_path / "published"
    assert main([str(recipe), "--export_corpus_to", str(folder), "--drop_below_characters", "0"]) == 0
    options = ["--train_files", "none", "--dataset_name", str(folder), "--streaming", "true"]
    monkeypatch.setattr(text_budget, "measure_tokens_per_second", None)
    assert main([str(recipe), *options, "--drop_below_characters", "0", "--text_for_budget", "true"]) == 0
    found = prepare_corpus(DataArguments(dataset_name=str(folder), cache_dir=str(tmp_path / "cache")))
    assert f"{len(found.train_dataset):,} rows to train on" in capsys.readouterr().out
    assert not (tmp_path / "cache" / "speeds").exists()


def test_rows_beyond_the_positions_are_one_line(recipe, capsys):
    options = ["--fp16", "false", "--use_cpu", "true", "--text_for_budget", "true", "--max_seq_length", "1024"]
    assert main([str(recipe), *options]) == 1
    assert "max_seq_length (1024) is beyond max_position_embeddings (" in capsys.readouterr().err


def test_ctrl_c_is_one_line(recipe, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_cram.prepare.prepare_corpus", interrupt)
    assert main([str(recipe)]) == 130
    assert capsys.readouterr().err.endswith("hf_cram.data.pipeline: stopped; what was finished is kept\n")


def test_a_mix_is_not_repeated_and_deduplicated(tmp_path):
    sources = {"a": {"train_files": ["a.txt"], "max_passes": 2}, "b": {"train_files": ["b.txt"]}}
    DataArguments(sources=sources)
    for option in ({"near_dedup_similarity": 0.8}, {"dedup_substring_bytes": 100}):
        with pytest.raises(DataError, match="source 'a': deduplication would remove what max_passes repeats"):
            DataArguments(sources=sources, **option)


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--fp16", "true"], "trains in fp16"), (["--fp16", "false", "--bf16", "true"], "trains in bf16"),
     (["--fp16", "true", "--use_cpu", "true"], "trains in fp16")],
)  # fmt: skip
def test_the_speed_of_a_gpu_is_not_measured_without_one(recipe, capsys, options, told):
    assert main([str(recipe), *options, "--text_for_budget", "true"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert told in error[0]
    assert "max_train_tokens" in error[0]


def test_bf16_is_measured_where_a_cpu_is_meant(recipe, tmp_path, capsys):
    options = ["--fp16", "false", "--bf16", "true", "--use_cpu", "true", "--text_for_budget", "true"]
    assert main([str(recipe), *options, "--time_budget", "1s"]) == 0
    assert len(list((tmp_path / "cache/speeds").glob("*.json"))) == 1


def test_what_a_machine_refuses_is_one_line(recipe, tmp_path, monkeypatch, capsys):
    options = [str(recipe), "--fp16", "false", "--use_cpu", "true", "--bf16", "false", "--text_for_budget", "true"]

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    def too_large(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    for name, fault, told in (
        ("write_json_atomically", read_only, "Read-only file system): set cache_dir, or max_train_tokens"),
        ("measure_tokens_per_second", too_large, "memory ran out with per_device_train_batch_size 8: lower it"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(text_budget, name, fault)
            assert main(options) == 1
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("python -m hf_cram.data.pipeline: error: ")
        assert told in error[-1]
    with monkeypatch.context() as patch:
        patch.setattr("hf_cram.prepare.prepare_corpus", read_only)
        assert main([*options[:1], "--text_for_budget", "false"]) == 1
    assert "error: [Errno 30] Read-only file system" in capsys.readouterr().err


def arguments(tmp_path, **training):
    data_args = DataArguments(cache_dir=str(tmp_path / "cache"), vocab_size=200, max_seq_length=16)
    values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4}
    return data_args, CramTrainingArguments(**{**values, **training})


def limited(data_args, training_args, **text):
    model_args = ModelArguments(**TINY)
    limit_text_to_budget(data_args, model_args, MaskingArguments(), training_args, TextBudgetArguments(**text))
    return data_args.max_train_tokens


def test_the_limit_is_what_the_budget_can_consume(tmp_path, monkeypatch, caplog):
    measured = []

    def measure(config, training_args, batch, rate):
        measured.append((config.hidden_size, config.vocab_size, batch, rate))
        return 12345.0

    monkeypatch.setattr(text_budget, "measure_tokens_per_second", measure)
    caplog.set_level("INFO")
    data_args, training_args = arguments(tmp_path, time_budget="100s")
    assert limited(data_args, training_args, text_for_budget=True) == 2_500_000
    assert measured == [(32, 200, (4, 16), 0.25)]
    assert "text is read for 2,500,000 (the same elsewhere: --max_train_tokens 2500000)" in caplog.text
    # Another time the machine is slower: the number, and with it the rows, stay the same.
    monkeypatch.setattr(text_budget, "measure_tokens_per_second", lambda *args: 3.0)
    data_args, training_args = arguments(tmp_path, time_budget="100s")
    assert limited(data_args, training_args, text_for_budget=True) == 2_500_000
    data_args, training_args = arguments(tmp_path, time_budget="100s", max_steps=10, train_batch_rows=8)
    assert limited(data_args, training_args, text_for_budget=True) == 10 * 8 * 16
    (remembered,) = (tmp_path / "cache/speeds").glob("*.json")
    remembered.write_text("{")
    data_args, training_args = arguments(tmp_path, time_budget="100s")
    assert limited(data_args, training_args, text_for_budget=True) == 600


def test_processes_on_a_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr("hf_cram.data.workers.cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    with threads_of_a_process(3, torch.device("cpu")):
        assert torch.get_num_threads() == 4
    with threads_of_a_process(3, torch.device("cuda")):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("limit", [{"time_budget": "100s"}, {"max_steps": 10}])
def test_text_for_several_processes_is_theirs_together(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(text_budget, "measure_tokens_per_second", lambda *_: 1000.0)

    def tokens(**options):
        data_args, training_args = arguments(tmp_path, **limit)
        text = TextBudgetArguments(text_for_budget=True)
        limit_text_to_budget(data_args, ModelArguments(**TINY), MaskingArguments(), training_args, text, **options)
        return data_args.max_train_tokens

    assert tokens(num_processes=8) == 8 * tokens()


def test_another_library_or_machine_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(text_budget, "measure_tokens_per_second", lambda *_: 1000.0)
    for changed, value in (
        (None, None),
        ("transformers.__version__", "0"),
        ("__version__", "0"),
        ("available_workers", lambda _: 99),
    ):
        with monkeypatch.context() as patch:
            if changed is not None:
                patch.setattr(f"hf_cram.text_budget.{changed}", value)
            data_args, training_args = arguments(tmp_path, time_budget="100s")
            limited(data_args, training_args, text_for_budget=True)
    assert len(list((tmp_path / "cache/speeds").glob("*.json"))) == 4


def test_another_model_batch_or_mask_rate_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(text_budget, "measure_tokens_per_second", lambda *_: 1000.0)
    for number, (model, training, rate) in enumerate(
        [
            ({}, {}, "0.25"),
            ({"hidden_size": 64}, {}, "0.25"),
            ({}, {"per_device_train_batch_size": 8}, "0.25"),
            ({}, {}, "0.4"),
            ({}, {"bf16": True}, "0.25"),
            ({}, {"activation_checkpointing": True}, "0.25"),
        ],
        start=1,
    ):
        data_args, training_args = arguments(tmp_path, time_budget="100s", **training)
        masking, text = MaskingArguments(mlm_probability=rate), TextBudgetArguments(text_for_budget=True)
        limit_text_to_budget(data_args, ModelArguments(**{**TINY, **model}), masking, training_args, text)
        assert len(list((tmp_path / "cache/speeds").glob("*.json"))) == number


def test_a_limit_is_for_streams_and_on_request(tmp_path):
    for streaming, told, given, wanted in (
        (False, None, None, False),
        (True, None, None, True),
        (True, False, None, False),
        (False, True, None, True),
        (True, True, 5000, False),
    ):
        data_args = DataArguments(dataset_name="some/set", streaming=streaming, max_train_tokens=given)
        assert is_limit_wanted(data_args, TextBudgetArguments(text_for_budget=told)) == wanted
    mix = {"a": {"dataset_name": "some/set"}, "b": {"dataset_name": "other/set", "streaming": True}}
    assert is_limit_wanted(DataArguments(sources=mix), TextBudgetArguments())
    # A recipe of a stream, given own files in its place: they are all read.
    assert not is_limit_wanted(DataArguments(train_files=["a.txt"], streaming=True), TextBudgetArguments())


def test_runs_that_begin_together_read_the_same_text(tmp_path, monkeypatch):
    begun, speeds = threading.Event(), iter([1000.0, 3000.0])

    def measure(*_):
        begun.set()
        time.sleep(0.3)
        return next(speeds)

    def limit():
        data_args, training_args = arguments(tmp_path, time_budget="100s")
        return limited(data_args, training_args, text_for_budget=True)

    monkeypatch.setattr(text_budget, "measure_tokens_per_second", measure)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(limit)
        assert begun.wait(60)
        assert limit() == first.result() == 200_000


def test_the_speed_is_that_of_the_training(tmp_path, tiny_config, monkeypatch):
    """With the launcher's precision, and with activation checkpointing, without which a batch might not fit."""
    seen = []

    def forward(self, *arguments, **options):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        seen.append((dtype, self.gradient_checkpointing))
        return original(self, *arguments, **options)

    original = CrammedBertModel.forward
    monkeypatch.setattr(CrammedBertModel, "forward", forward)
    for environment, values, expected in (
        ("no", {}, (torch.float32, False)),
        ("bf16", {"bf16": None}, (torch.bfloat16, False)),
        ("no", {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
         (torch.float32, True)),
    ):  # fmt: skip
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
        _, training_args = arguments(tmp_path, time_budget="100s", **values)
        seen.clear()
        measure_tokens_per_second(tiny_config, training_args, (4, 16), 0.25)
        assert set(seen) == {expected}


@pytest.mark.parametrize("is_there", [False, True])
def test_any_accelerator_counts_as_the_one_that_trains(tmp_path, monkeypatch, is_there):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: is_there)
    fields = TrainingFields(output_dir=str(tmp_path), time_budget="1h", bf16=True)
    if is_there:
        assert _training_args(fields).bf16
    else:
        with pytest.raises(DataError, match="trains in bf16, on a GPU that is not here"):
            _training_args(fields)


def test_a_thread_for_each_core_or_for_each_of_its_halves_is_one_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(text_budget, "measure_tokens_per_second", lambda *_: 1000.0)
    monkeypatch.setattr(text_budget, "available_workers", lambda _: 16)
    for threads, measured in ((16, 1), (8, 1), (1, 2)):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        data_args, training_args = arguments(tmp_path, time_budget="100s")
        limited(data_args, training_args, text_for_budget=True)
        assert len(list((tmp_path / "cache/speeds").glob("*.json"))) == measured


def test_measuring_a_model_leaves_the_random_state_alone(tmp_path, tiny_config):
    _, training_args = arguments(tmp_path, time_budget="100s")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert measure_tokens_per_second(tiny_config, training_args, (4, 16), 0.25) > 0
    assert torch.equal(torch.rand(3), expected)


def test_rounding_up_keeps_two_digits():
    for number, expected in ((1, 1), (9.2, 10), (99.1, 100), (101, 110), (123456, 130000), (5e11, 5e11)):
        assert round_up(number) == expected


def test_every_recipe_is_one_of_the_program(capsys):
    recipes = REPOSITORY / "training_args"
    for path in [*recipes.glob("*.yaml"), *recipes.glob("text/*.yaml")]:
        if path.stem.startswith("glue"):
            continue
        with pytest.raises(SystemExit):
            main([str(path), "--no_such_field", "1"])
        assert "unknown option --no_such_field" in capsys.readouterr().err
