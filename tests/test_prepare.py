"""The program that prepares text, and the limit that the budget sets."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY

from hf_cram import text_budget
from hf_cram.data.pipeline import DataArguments
from hf_cram.prepare import main
from hf_cram.recipes import ModelArguments
from hf_cram.script_args import MaskingArguments, TextBudgetArguments
from hf_cram.text_budget import is_limit_wanted, limit_text_to_budget, measure_tokens_per_second, round_up
from hf_cram.training_args import CramTrainingArguments

WORDS = ["the", "old", "man", "saw", "a", "boat", "near", "house", "and", "went", "home", "by", "night", "with", "his"]
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


def test_the_command_of_the_readme(recipe, python_environment):
    command = [sys.executable, "-m", "hf_cram.data.pipeline", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=python_environment)
    assert done.returncode == 0, done.stderr
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
    assert "until there are 2,500,000 of them (max_train_tokens)" in caplog.text
    # Another time the machine is slower: the number, and with it the rows, stay the same.
    monkeypatch.setattr(text_budget, "measure_tokens_per_second", lambda *args: 3.0)
    data_args, training_args = arguments(tmp_path, time_budget="100s")
    assert limited(data_args, training_args, text_for_budget=True) == 2_500_000
    data_args, training_args = arguments(tmp_path, time_budget="100s", max_steps=10, train_batch_rows=8)
    assert limited(data_args, training_args, text_for_budget=True) == 10 * 8 * 16
    (remembered,) = (tmp_path / "cache/speeds").iterdir()
    remembered.write_text("{")
    data_args, training_args = arguments(tmp_path, time_budget="100s")
    assert limited(data_args, training_args, text_for_budget=True) == 600


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
