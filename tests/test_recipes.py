"""Every recipe parses and builds its model; every mistake is one line."""

import importlib
import itertools
import sys
from dataclasses import fields, replace

import pytest
import torch
import yaml
from conftest import REPOSITORY
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

from hf_cram import CrammedBertConfig, CrammedBertForMaskedLM
from hf_cram.data.pipeline import DataArguments
from hf_cram.fine_tuning_args import EncoderArguments, FineTuningArguments
from hf_cram.glue_args import GlueArguments
from hf_cram.recipes import ModelArguments, RecipeParser, build_config
from hf_cram.script_args import MaskingArguments
from hf_cram.training_args import CramTrainingArguments

GLUE_RECIPES = sorted((REPOSITORY / "training_args").glob("glue*.yaml"))
RECIPES = sorted({*(REPOSITORY / "training_args").glob("*.yaml")} - {*GLUE_RECIPES})
TEXT_RECIPES = sorted((REPOSITORY / "training_args" / "text").glob("*.yaml"))


def parse(*arguments):
    parser = RecipeParser((ModelArguments, DataArguments, MaskingArguments, CramTrainingArguments), prog="cram")
    return parser.parse([str(argument) for argument in arguments]), parser


def parse_text(*arguments):
    parser = RecipeParser((DataArguments,), prog="text")
    return parser.parse([str(argument) for argument in arguments]), parser


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


class Sized(PreTrainedTokenizerFast):
    """Stands in for a trained tokenizer of a recipe's size."""

    def __init__(self, size, pad_token_id=0):
        self.size = size

    def __len__(self):
        return self.size

    pad_token_id, mask_token_id = 0, 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_builds_its_model(path):
    (model_args, data_args, masking_args, training_args), _ = parse(path)
    config = build_config(model_args, Sized(data_args.vocab_size))
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    assert isinstance(model, CrammedBertForMaskedLM)
    assert data_args.max_seq_length <= config.max_position_embeddings
    assert training_args.time_budget_seconds > 0
    given = yaml.safe_load(path.read_text())
    assert training_args.learning_rate == float(given["learning_rate"])


def parse_glue(*arguments):
    parser = RecipeParser((EncoderArguments, GlueArguments, FineTuningArguments), prog="glue")
    return parser.parse([*map(str, arguments), "--model_name_or_path", "out"])


@pytest.mark.parametrize("path", GLUE_RECIPES, ids=lambda path: path.stem)
def test_every_glue_recipe_parses_and_keeps_the_papers_rule(path):
    _, glue, args = parse_glue(path)
    assert max([args.num_train_epochs, *glue.search_num_train_epochs]) <= 5


def test_the_glue_recipe_is_the_papers_protocol_and_the_default():
    _, glue, args = parse_glue(REPOSITORY / "training_args/glue.yaml")
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.learning_rate) == (5, 16, 4e-5)
    assert (args.lr_scheduler_type, args.warmup_steps, glue.seeds) == ("cosine", 0.1, "5")
    encoder, default_glue, defaults = parse_glue()
    assert defaults.setting == args.setting
    assert default_glue == glue
    assert (encoder.dropout, encoder.max_seq_length) == (0.1, 128)


def test_the_papers_recipe_is_the_papers():
    (model_args, data_args, masking_args, training_args), _ = parse(REPOSITORY / "training_args/crammed_bert_24h.yaml")
    assert build_config(model_args, Sized(32768)).to_dict() == CrammedBertConfig().to_dict()
    assert (data_args.vocab_size, data_args.max_seq_length, masking_args.mlm_probability) == (32768, 128, "0.25")
    assert training_args.time_budget_seconds == 86400
    assert (training_args.learning_rate, training_args.lr_schedule) == (1e-3, "triangle2")
    assert (training_args.train_batch_rows, training_args.batch_ramp_until) == (8192, 0.6)
    assert (training_args.adam_beta1, training_args.adam_beta2, training_args.adam_epsilon) == (0.9, 0.98, 1e-12)
    assert (training_args.weight_decay, training_args.max_grad_norm) == (0.01, 0.5)


def test_the_original_recipe_is_bert_base():
    (model_args, data_args, _, _), _ = parse(REPOSITORY / "training_args/bert_original_24h.yaml")
    expected = CrammedBertConfig.original_bert(vocab_size=data_args.vocab_size).to_dict()
    assert build_config(model_args, Sized(data_args.vocab_size)).to_dict() == expected


PROGRAMS = (
    "run_mlm_cram", "run_glue", "hf_cram.prepare", "hf_cram.memory", "hf_cram.plan", "hf_cram.minimal_pairs",
    "hf_cram.report", "hf_cram.hub", "hf_cram.convert_cramming_checkpoint",
)  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_explains_its_options(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(program).main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_every_field_of_the_model_has_its_help():
    helps = {spec.name: spec.metadata["help"] for spec in fields(ModelArguments)}
    assert helps["final_norm"] == "a norm after the last layer."
    assert "gates the other half, so the second matrix is" in helps["intermediate_size"]  # of several lines
    assert len(set(helps.values())) == len(helps)


def test_none_on_the_command_line_is_a_recipes_null():
    recipe = REPOSITORY / "training_args/crammed_bert_24h.yaml"
    (_, data_args, _, training_args), _ = parse(
        recipe, "--dataset_name", "none", "--train_files", "a.txt", "--time_budget", "none", "--max_steps", "5"
    )
    assert (data_args.dataset_name, data_args.train_files) == (None, ["a.txt"])
    (mixed,), _ = parse_text(TEXT_RECIPES[0], "--sources", "none", "--train_files", "a.txt")
    assert (mixed.sources, mixed.train_files) == (None, ["a.txt"])
    assert training_args.time_budget_seconds is None


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "output_dir: out\ntime_budget: 600\nlearning_rate: 1e-3\nhidden_size: 48\nbf16: false\n"
        "train_files: [a.txt, b.txt]\nlr_schedule: flat_then_linear\nlr_scheduler_kwargs: {warmup: 0.1}\n"
    )
    (model_args, data_args, _, training_args), parser = parse(recipe, "--learning_rate", "2e-4", "--hidden_size", 24)
    assert (model_args.hidden_size, training_args.learning_rate) == (24, 2e-4)
    assert training_args.time_budget_seconds == 600
    assert training_args.bf16 is False
    assert training_args.torch_compile is None
    assert training_args.lr_schedule_shape == {"warmup": 0.1}
    assert data_args.train_files == ["a.txt", "b.txt"]
    assert parser.given["learning_rate"] == 2e-4
    assert parser.given["time_budget"] == 600


@pytest.mark.parametrize(
    ("recipe", "text"),
    [*itertools.product(RECIPES, TEXT_RECIPES[:1]), *itertools.product(RECIPES[:1], TEXT_RECIPES[1:])],
    ids=lambda path: path.stem,
)
def test_every_training_recipe_takes_every_text(recipe, text, tmp_path):
    other = tmp_path / "other.yaml"  # whatever another text was named by is gone
    other.write_text("dataset_data_dir: a\ndataset_revision: b\ndataset_config_name: c\ntrain_files: [d]\n"
                     "streaming: false\ntext_file_documents: blank_line\n")  # fmt: skip
    (alone,), _ = parse_text(text)
    for before in ([], [other, TEXT_RECIPES[0]]):
        (_, data_args, _, training_args), _ = parse(recipe, *before, text)
        expected = replace(alone, max_documents=data_args.max_documents)
        assert data_args.named_sources() == expected.named_sources()
        assert data_args.hub_names == alone.hub_names != []
    assert training_args.output_dir == yaml.safe_load(recipe.read_text())["output_dir"]


def test_later_recipes_and_then_the_command_line_override(tmp_path):
    first, second, third = (tmp_path / f"{name}.yaml" for name in ("first", "second", "third"))
    first.write_text("output_dir: out\ntime_budget: 600\nhidden_size: 48\nlearning_rate: 1e-3\nmax_documents: 9\n")
    second.write_text("hidden_size: 24\nmax_documents: null\nsources: {a: {dataset_name: b, weight: 2}}\n")
    third.write_text("learning_rate: 2e-3\n")
    (model_args, data_args, _, training_args), parser = parse(first, second, third, "--learning_rate", "3e-3")
    assert (model_args.hidden_size, training_args.learning_rate, data_args.max_documents) == (24, 3e-3, None)
    assert data_args.named_sources()["a"].weight == 2
    assert parser.given["max_documents"] is None
    assert (parser.given["learning_rate"], parser.given["hidden_size"], parser.given["time_budget"]) == (3e-3, 24, 600)
    # What is written down of a recipe reads back as the same mix.
    (again,), _ = parse_text("--sources", parser.given["sources"])
    assert again.sources == data_args.sources


def test_a_revision_that_looks_like_a_date(tmp_path):
    recipe = tmp_path / "text.yaml"
    recipe.write_text("sources: {a: {dataset_name: b, dataset_revision: 2024-01-01}}\n")
    (arguments,), _ = parse_text(recipe)
    assert arguments.named_sources()["a"].dataset_revision == "2024-01-01"


def test_names_that_look_like_numbers_are_read_as_they_stand(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "output_dir: out\nmax_steps: 1_0\nlearning_rate: 0.10\ntime_budget: 600.0\n"
        "dataset_name: a/b\ndataset_revision: 1.10\ndataset_config_name: 0123456\n"
    )
    parser = RecipeParser((DataArguments, CramTrainingArguments))
    data, training = parser.parse([str(recipe)])
    assert (data.dataset_revision, data.dataset_config_name) == ("1.10", "0123456")
    assert (training.max_steps, training.learning_rate, training.time_budget_seconds) == (10, 0.1, 600.0)
    recipe.write_text("output_dir: out\nmax_steps: 1__0\n")  # a number to YAML alone
    with pytest.raises(SystemExit):
        parser.parse([str(recipe)])


def test_what_yaml_takes_for_something_else(tmp_path, capsys):
    """A word of the Trainer's for false, a time for a number of base 60, a date that is none."""
    (tmp_path / "recipe.yaml").write_text(
        "output_dir: out\nmax_steps: 1\nsave_strategy: no\ndataset_name: a/b\ndataset_revision: 2024-02-30\n"
    )
    parser = RecipeParser((DataArguments, CramTrainingArguments))
    data, training = parser.parse([str(tmp_path / "recipe.yaml")])
    assert (training.save_strategy, data.dataset_revision) == ("no", "2024-02-30")
    (tmp_path / "recipe.yaml").write_text("output_dir: out\ntime_budget: 24:00\n")
    with pytest.raises(SystemExit):
        parser.parse([str(tmp_path / "recipe.yaml")])
    assert "'24:00' is not a duration" in capsys.readouterr().err


def test_a_mistake_in_a_later_recipe_names_its_file(tmp_path, capsys):
    text = tmp_path / "text.yaml"
    text.write_text("datset_name: a\n")
    error = failure(capsys, REPOSITORY / "training_args/debug.yaml", text)
    assert f"recipe {text}: unknown key 'datset_name'; did you mean 'dataset_name'?" in error
    text.write_text("sources: {a: {dataset_nam: b}}\n")
    error = failure(capsys, REPOSITORY / "training_args/debug.yaml", text)
    assert "source 'a': unknown key 'dataset_nam'; did you mean 'dataset_name'?" in error
    assert "missing.yaml cannot be read" in failure(capsys, REPOSITORY / "training_args/debug.yaml", "missing.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1e-3", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("learning_rate: fast", "learning_rate"),
        ("mlm_probability: 0.5,0.2", "a mask rate is a share"),
        ("mask_replace_prob: 0.95", "together at most 1"),
        ("learning_rate: [1, 2]", "learning_rate must be one value"),
        ("train_files: [a.txt, null]", "train_files must be a list of plain values"),
        ("hidden_size: 1.5", "hidden_size"),
        ("hidden_size: null", "hidden_size needs a value; without its line it is 768"),
        ("max_seq_length: null", "max_seq_length needs a value"),
        ("lr_schedule:", "lr_schedule needs a value"),
        ("sources: [a]", "sources must be one value"),
        ("help: me", "unknown key 'help'"),
        ("hidden_size: 100", "hidden_size (100) must be a multiple of num_attention_heads (12)"),
        ("num_attention_heads: 0", "num_attention_heads must be at least 1, got 0"),
        ("hidden_dropout_prob: 7", "hidden_dropout_prob is a share from 0 to 1, got 7"),
        ("hidden_act: geluu", "hidden_act: unknown activation 'geluu'; did you mean 'gelu'?"),
        ("position_embedding_type: fourier", "position_embedding_type must be one of scaled_sinusoidal"),
        ("bf16: maybe", "bf16"),
        ("just text", "must hold 'key: value' lines"),
        ("a: [", "not valid YAML"),
        ("seed: 1\nseed: 2", "key 'seed' stands twice"),
        ("lr_scheduler_kwargs: {warmup: 0.1, warmup: 0.2}", "key 'warmup' stands twice"),
        ("time_budget: soon", "'soon' is not a duration"),
        ("eval_rows: 0", "eval_rows must be at least 1"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(tmp_path, capsys, content, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content + "\noutput_dir: out\n" + ("" if "time_budget" in content else "time_budget: 5s\n")
                      if ":" in content and content[-1] != "[" else content)  # fmt: skip
    error = failure(capsys, recipe)
    assert message in error
    assert error.startswith("cram: error: ")


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        (["--learning-rate", "2e-3"], "learning_rate", 2e-3),
        (["--learning-rate=2e-3"], "learning_rate", 2e-3),
        (["--no_final_norm"], "final_norm", False),
        (["--no-final-norm"], "final_norm", False),
        (["--train-files", "b.txt", "c.txt"], "train_files", ["b.txt", "c.txt"]),
    ],
)
def test_every_spelling_of_a_flag_is_known_as_given(tmp_path, flag, name, value):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: out\ntime_budget: 5\nlearning_rate: 1e-3\nfinal_norm: true\ntrain_files: [a.txt]\n")
    parts, parser = parse(recipe, *flag)
    (part,) = (part for part in parts if hasattr(part, name))
    assert getattr(part, name) == parser.given[name] == value


def test_one_value_is_a_list_of_one_and_its_items_are_converted(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: out\ntime_budget: 5\ntrain_files: a.txt\n")
    (_, data_args, _, _), parser = parse(recipe)
    assert data_args.train_files == parser.given["train_files"] == ["a.txt"]
    recipe.write_text("search_learning_rate: [1e-5, 3]\nsearch_num_train_epochs: 2\n")
    _, glue, _ = parse_glue(recipe)
    assert (glue.search_learning_rate, glue.search_num_train_epochs) == ([1e-5, 3.0], [2])
    recipe.write_text("output_dir: out\ntime_budget: 5\ntrain_files: [2024]\n")
    assert parse(recipe)[0][1].train_files == ["2024"]


def test_a_mistake_on_the_command_line_is_one_line(capsys):
    recipe = REPOSITORY / "training_args/debug.yaml"
    assert "unknown option --learning_rat; did you mean 'learning_rate'?" in failure(
        capsys, recipe, "--learning_rat", 1
    )
    assert "learning_rate" in failure(capsys, recipe, "--learning_rate", "fast")
    assert "cannot be read: No such file" in failure(capsys, "missing.yaml")
    assert "unexpected argument 'more'" in failure(capsys, recipe, "more")
    # Before what the values at their defaults lack.
    assert "unknown option --time_bugdet; did you mean 'time_budget'?" in failure(capsys, "--time_bugdet", "10m")
    assert "recipes stand before the options" in failure(capsys, "--output_dir", "out", str(recipe))
    assert "set time_budget" in failure(capsys, "--output_dir", "out")
    assert "(100) must be a multiple of" in failure(capsys, recipe, "--hidden_size", 100, "--num_attention_heads", 8)
