import csv
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import datasets
import evaluate
import httpx2
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, SHARED, VOCAB_SIZE
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Trainer,
    pipeline,
)

import run_glue
from hf_cram import (
    CrammedBertConfig,
    CrammedBertForMaskedLM,
    CrammedBertForMultipleChoice,
    CrammedBertForSequenceClassification,
)
from hf_cram.classifier import build_classifier, fingerprint, load_tokenizer, pin, set_dropout
from hf_cram.fine_tuning import parameter_groups
from hf_cram.fine_tuning_args import EncoderArguments, FineTuningArguments
from hf_cram.glue import METRIC_PATH, TASKS, GlueError, Task, aggregate, choose_tasks, headline_metrics, load_metric
from hf_cram.glue_args import GlueArguments, parse_seeds
from hf_cram.glue_data import load_glue_task, load_own_task
from hf_cram.glue_encoding import encode_task
from hf_cram.glue_outputs import is_fuller, median_seed, submission_lines
from hf_cram.glue_run import GlueRun
from hf_cram.paper_results import PAPER_GLUE_ROWS
from hf_cram.report import load_run, markdown_table

WORDS = VOCAB_SIZE - 5


def sentences(count, seed):
    """Sentences of 3 to 9 words, all from the first half of the vocabulary (label 0) or from the second (label 1)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).tolist()
    rows = [rng.integers(0, WORDS // 2, rng.integers(3, 10)) + label * (WORDS // 2) for label in labels]
    return [" ".join(f"w{word}" for word in row) for row in rows], labels


def write_task(folder, task, sizes, labels=2):
    """Synthetic splits in the layout of nyu-mll/glue."""
    task = TASKS[task]
    for number, (split, count) in enumerate(sizes.items()):
        texts, classes = sentences(count, number)
        columns = dict.fromkeys(task.text_columns, texts)
        if not task.label_names:
            columns["label"] = [5.0 * value for value in classes]
        elif split.startswith("test"):
            columns["label"] = [-1] * count
        else:
            columns["label"] = [value * (labels - 1) for value in classes]
        path = folder / task.name / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({**columns, "idx": list(range(count))}).to_parquet(path)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def glue_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    write_task(folder, "sst2", {"train": 256, "validation": 64, "test": 40})
    write_task(folder, "stsb", {"train": 64, "validation": 32})
    splits = ("validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    write_task(folder, "mnli", {"train": 48, **dict.fromkeys(splits, 24)}, labels=3)
    texts = sentences(12, 9)[0]
    (folder / "ax").mkdir()
    diagnostic = {"premise": texts, "hypothesis": texts, "label": [-1] * 12}
    datasets.Dataset.from_dict(diagnostic).to_parquet(folder / "ax" / "test-00000-of-00001.parquet")
    write_task(folder, "wnli", {"train": 16, "validation": 16})
    return folder


def save_model(folder, model_class, config, tokenizer):
    """A model with random weights, the same each time, and its tokenizer; returns the folder."""
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Of the models beside ours.
TINY = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def model_folder(tiny_config, tokenizer, tmp_path):
    return save_model(tmp_path / "model", CrammedBertForMaskedLM, tiny_config, tokenizer)


@pytest.fixture
def bert_folder(tokenizer, tmp_path):
    return save_model(tmp_path / "bert", BertForMaskedLM, BertConfig(**TINY, intermediate_size=64), tokenizer)


@pytest.fixture
def modernbert_folder(tokenizer, tmp_path):
    special = {f"{name}_token_id": tokenizer.cls_token_id for name in ("cls", "bos")}
    special |= {f"{name}_token_id": tokenizer.sep_token_id for name in ("sep", "eos")}
    config = ModernBertConfig(**TINY, intermediate_size=64, pad_token_id=tokenizer.pad_token_id, **special)
    return save_model(tmp_path / "modernbert", ModernBertForMaskedLM, config, tokenizer)


@pytest.fixture
def gpt2_folder(tokenizer, tmp_path):
    """A decoder whose configuration knows no padding token, beside a tokenizer that was given one."""
    config = GPT2Config(**TINY, bos_token_id=tokenizer.sep_token_id, eos_token_id=tokenizer.sep_token_id)
    return save_model(tmp_path / "gpt2", GPT2LMHeadModel, config, tokenizer)


FAST = ["--learning_rate", "3e-3", "--num_train_epochs", "3", "--bf16", "false", "--dropout", "0"]


def fast_arguments(model_folder, glue_data, tmp_path):
    """A short run of `model_folder` into `tmp_path / "out"`."""
    places = {"model_name_or_path": model_folder, "glue_data": glue_data, "output_dir": tmp_path / "out"}
    return [*(part for name, value in places.items() for part in (f"--{name}", value)), *FAST]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *map(str, arguments)])
    run_glue.main()


def prepared(model_folder, tmp_path, **glue):
    """A run that is ready to train, and its arguments."""
    args = FineTuningArguments(str(tmp_path / "out"), report_to="none", bf16=False)
    return GlueRun(EncoderArguments(str(model_folder)), GlueArguments(**glue), args), args


def results_of(folder):
    return json.loads((folder / "glue_results.json").read_text())


@pytest.fixture(autouse=True)
def charts_of_no_interest(request, monkeypatch):
    """Drawing takes as long as a small run; one test looks at what is drawn."""
    if request.function.__name__ != "test_all_outputs_of_a_run":
        monkeypatch.setattr("hf_cram.glue_run.draw_chart", lambda *arguments: arguments[-1].write_bytes(b"\x89PNG"))


# ---- Metrics and averages ----


def test_metrics_are_those_of_the_benchmark():
    def compute(configuration, predictions, references):
        return evaluate.load(METRIC_PATH, configuration).compute(predictions=predictions, references=references)

    assert compute("sst2", [1, 0, 1, 1], [1, 0, 0, 1]) == {"accuracy": 0.75}
    # 2 hits, 1 false alarm, no miss
    assert compute("mrpc", [1, 0, 1, 1], [1, 0, 0, 1]) == {"accuracy": 0.75, "f1": 0.8}
    # (2 * 1 - 1 * 0) / sqrt(3 * 2 * 2 * 1)
    assert compute("cola", [1, 0, 1, 1], [1, 0, 0, 1])["matthews_correlation"] == pytest.approx(2 / 12**0.5)
    assert compute("stsb", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx({"pearson": 1.0, "spearmanr": 1.0})
    assert compute("stsb", [1.0, 2.0, 4.0], [1.0, 8.0, 64.0])["spearmanr"] == pytest.approx(1.0)
    assert compute("stsb", [1.0, 1.0, 1.0], [2.0, 4.0, 6.0]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert compute("classification", [0, 2, 2], [0, 1, 2])["f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    with pytest.raises(ValueError, match="Unknown configuration 'sst'"):
        compute("sst", [1], [1])


def test_the_average_follows_the_papers_rule():
    row = PAPER_GLUE_ROWS["BERT-base, fully trained"]
    headlines = headline_metrics(list(TASKS.values()))
    scores = {
        column: {
            seed: {metric: row[column] + offset, "other": 0.0} for seed, offset in ((1, -3.0), (2, 0.0), (3, 1.0))
        }
        for column, metric in headlines.items()
        if column in row
    }
    scores["wnli"] = {1: {"accuracy": 0.0}}
    results = aggregate(scores, headlines)
    assert results["average"] == pytest.approx(row["average"], abs=0.05)  # medians of seeds, MNLI twice, no WNLI
    assert len(results["columns"]) == 9
    assert results["seeds"] == [1, 2, 3]
    assert results["tasks"]["stsb"]["pearson"]["values"] == pytest.approx([83.7, 86.7, 87.7])
    partial = aggregate({"rte": {1: {"accuracy": 60.0}}, "cola": {1: {"matthews_correlation": 40.0}}}, headlines)
    assert (partial["average"], partial["columns"]) == (50.0, ["rte", "cola"])
    assert aggregate({"wnli": {1: {"accuracy": 60.0}}}, headlines)["average"] is None


# ---- The program ----


def test_all_outputs_of_a_run(monkeypatch, capsys, glue_data, model_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", out, *FAST]
    run(monkeypatch, *arguments, "--tasks", "sst2,stsb,mnli,wnli", "--seeds", "2")
    results = results_of(out)
    assert set(results["tasks"]) == {"sst2", "stsb", "mnli", "mnli_mismatched", "wnli"}
    assert results["columns"] == ["mnli", "mnli_mismatched", "sst2", "stsb"]
    assert results["seeds"] == [1, 2]
    accuracy = results["tasks"]["sst2"]["accuracy"]
    assert accuracy["median"] == np.median(accuracy["values"])
    assert accuracy["median"] > 85  # the task can be learned
    assert results["setting"]["learning_rate"] == 3e-3
    assert (out / "glue_results.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    assert "4 of 9 columns" in printed
    assert f"{accuracy['median']:.1f}" in printed

    with zipfile.ZipFile(out / "glue_submission.zip") as archive:
        assert sorted(archive.namelist()) == ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "SST-2.tsv"]
        table = {
            name: list(csv.reader(io.TextIOWrapper(archive.open(name)), delimiter="\t")) for name in archive.namelist()
        }
    assert table["SST-2.tsv"][0] == ["index", "prediction"]
    assert [row[0] for row in table["SST-2.tsv"][1:]] == [str(index) for index in range(40)]
    # Predictions stand in the order of the test split, although it was read sorted by length.
    expected = sentences(40, 2)[1]
    agreement = np.mean([int(row[1]) == label for row, label in zip(table["SST-2.tsv"][1:], expected, strict=True)])
    assert agreement > 0.8
    assert {row[1] for row in table["MNLI-m.tsv"][1:]} <= {"entailment", "neutral", "contradiction"}


def test_the_predictions_of_the_median_seed_are_submitted(monkeypatch, glue_data, model_folder, tmp_path):
    arguments = [*fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "sst2", "--seeds", "2"]
    run(monkeypatch, *arguments)
    values = results_of(tmp_path / "out")["tasks"]["sst2"]["accuracy"]["values"]
    chosen = median_seed(dict(enumerate(values, start=1)))
    (other,) = (tmp_path / "out").rglob(f"SST-2.seed-{3 - chosen}.tsv")
    with zipfile.ZipFile(tmp_path / "out" / "glue_submission.zip") as archive:
        before = archive.read("SST-2.tsv")
    other.write_text("x")
    run(monkeypatch, *arguments)
    with zipfile.ZipFile(tmp_path / "out" / "glue_submission.zip") as archive:
        assert archive.read("SST-2.tsv") == before


def test_a_limit_that_limits_nothing_is_not_told(glue_data, model_folder, tmp_path):
    for limit, told in ((8, 8), (100_000, None)):
        glue = {"glue_data": str(glue_data), "tasks": "wnli", "max_train_samples": limit}
        assert prepared(model_folder, tmp_path, **glue)[0]._binding_limit() == told


def test_own_data_that_changes_while_it_is_read_is_told(monkeypatch, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\na,0\nb,1\n")
    read = pd.read_csv

    def rewrite(*arguments, **options):
        path.write_text("text,label\nlater,0\nb,1\n")
        return read(*arguments, **options)

    monkeypatch.setattr(pd, "read_csv", rewrite)
    with pytest.raises(GlueError, match="train.csv: it has changed since this run began"):
        load_own_task(str(path), str(path))


def test_a_run_goes_on_with_the_missing_pairs(monkeypatch, glue_data, model_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", out, *FAST]
    arguments += ["--tasks", "stsb,wnli"]
    run(monkeypatch, *arguments, "--seeds", "3")
    log = out / "glue_runs.jsonl"
    whole, results = log.read_text().splitlines(), results_of(out)
    assert [(json.loads(line)["task"], json.loads(line)["seed"]) for line in whole] == [
        (task, seed) for task in ("stsb", "wnli") for seed in (1, 2, 3)
    ]
    # As a kill leaves it: the fifth line cut short.
    log.write_text("\n".join(whole[:4]) + "\n" + whole[4][:50])
    run(monkeypatch, *arguments, "--seeds", "3")
    again = log.read_text().splitlines()
    assert again[:4] == whole[:4]  # not trained again: the seconds are the same
    assert len(again) == 6
    assert results_of(out)["tasks"] == results["tasks"]  # a seed decides the scores
    # Another setting does not take them over.
    run(monkeypatch, *arguments, "--seeds", "1,", "--learning_rate", "1e-3")
    assert len(log.read_text().splitlines()) == 8
    assert results_of(out)["seeds"] == [1]


def test_what_is_fine_tuned(glue_data, model_folder):
    data = load_glue_task(TASKS["sst2"], str(glue_data))
    pretrained = CrammedBertForMaskedLM.from_pretrained(model_folder).model.layers[0].mlp.dense_in.weight
    kept, fresh = (
        build_classifier(EncoderArguments(str(model_folder), from_scratch=from_scratch, dropout=0.3), data)
        for from_scratch in (False, True)
    )
    assert torch.equal(kept.model.layers[0].mlp.dense_in.weight, pretrained)
    assert not torch.equal(fresh.model.layers[0].mlp.dense_in.weight, pretrained)
    for model in (kept, fresh):
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    tokenizer = load_tokenizer(EncoderArguments(str(model_folder)))
    part, again = (encode_task(data, tokenizer, 128, 20).train for _ in range(2))
    assert len(part) == 20
    assert part == again
    assert part != encode_task(data, tokenizer, 128).train[:20]


def test_from_scratch_is_a_run_of_its_own(monkeypatch, glue_data, model_folder):
    arguments = ["--model_name_or_path", model_folder, "--glue_data", glue_data, "--tasks", "wnli", "--seeds", "1"]
    run(monkeypatch, *arguments, *FAST)
    run(monkeypatch, *arguments, *FAST, "--from_scratch", "true")
    assert not results_of(model_folder)["from_scratch"]
    scratch = model_folder.with_name("model-from-scratch")
    assert results_of(scratch)["from_scratch"]
    assert results_of(scratch)["setting_id"] != results_of(model_folder)["setting_id"]


def test_the_search_picks_one_setting_for_all_tasks(monkeypatch, glue_data, model_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", out, *FAST]
    run(
        monkeypatch, *arguments, "--tasks", "sst2,stsb", "--seeds", "2", "--search_learning_rate", "1e-7", "3e-3",
        "--search_batch_size", "16", "64",
    )  # fmt: skip
    results = results_of(out)
    assert results["setting"]["learning_rate"] == 3e-3
    lines = [json.loads(line) for line in (out / "glue_runs.jsonl").read_text().splitlines()]
    tried = {}
    for line in lines:
        score = line["scores"][line["task"]][TASKS[line["task"]].headline]
        setting = (line["setting"]["learning_rate"], line["setting"]["per_device_train_batch_size"])
        if line["seed"] == 1:
            tried.setdefault(setting, []).append(score)
    assert len(tried) == 4
    best = max(tried, key=lambda setting: sum(tried[setting]))
    assert results["setting"]["per_device_train_batch_size"] == best[1]
    assert len(lines) == 4 * 2 + 2  # the second seed of both tasks; the first was run in the search


def test_a_search_of_one_setting_trains_with_it(monkeypatch, glue_data, model_folder, tmp_path):
    arguments = [*fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "wnli", "--seeds", "1"]
    run(monkeypatch, *arguments, "--search_learning_rate", "8e-5", "--search_batch_size", "4")
    setting = results_of(tmp_path / "out")["setting"]
    assert (setting["learning_rate"], setting["per_device_train_batch_size"]) == (8e-5, 4)
    assert setting["num_train_epochs"] == 3


def test_a_search_without_an_average_is_refused_before_training(monkeypatch, glue_data, model_folder, tmp_path):
    arguments = [*fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "wnli", "--seeds", "1"]
    with pytest.raises(GlueError, match="a task that enters the average"):
        run(monkeypatch, *arguments, "--search_learning_rate", "8e-5", "1e-4")
    assert not (tmp_path / "out" / "glue_runs.jsonl").exists()


def test_the_head_of_another_task_is_not_started_from(model_folder, glue_data, tiny_config, tokenizer, tmp_path):
    torch.manual_seed(0)
    trained = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2)
    trained.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    data = load_glue_task(TASKS["sst2"], str(glue_data))
    torch.manual_seed(1)
    weights = build_classifier(EncoderArguments(str(tmp_path / "classifier")), data).state_dict()
    same = {name for name, tensor in trained.state_dict().items() if torch.equal(tensor, weights[name])}
    assert {name for name in weights if name.startswith("model.")} == {
        name for name in same if name.startswith("model.")
    }
    assert not same & {"classifier.dense.weight", "classifier.out_proj.weight"}


def test_heads_of_other_kinds_are_not_started_from(model_folder, glue_data, tokenizer, tmp_path):
    """Their tensors may go by the same names, and have the same shapes."""
    trained = CrammedBertForMultipleChoice.from_pretrained(model_folder)
    trained.save_pretrained(tmp_path / "choices")
    tokenizer.save_pretrained(tmp_path / "choices")
    data = load_glue_task(TASKS["stsb"], str(glue_data))
    weights = build_classifier(EncoderArguments(str(tmp_path / "choices")), data).state_dict()
    assert trained.classifier.out_proj.weight.shape == weights["classifier.out_proj.weight"].shape
    for name, tensor in trained.classifier.named_parameters():
        if name.endswith("weight"):
            assert not torch.equal(tensor, weights[f"classifier.{name}"])


def test_a_classifier_of_two_classes_is_tuned_to_a_regression(model_folder, glue_data, tokenizer, tmp_path):
    """The first loss has written the kind of its task into the configuration, without names of its classes."""
    trained = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2)
    trained.config.problem_type = "single_label_classification"
    trained.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    encoder = EncoderArguments(str(tmp_path / "classifier"))
    model = build_classifier(encoder, load_glue_task(TASKS["stsb"], str(glue_data)))
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert model(torch.tensor([[2, 5, 3]])).logits.shape == (1, 1)


def test_the_prediction_head_is_no_part_of_a_classifier(glue_data, tokenizer, tmp_path):
    config = CrammedBertConfig.original_bert(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        classifier_hidden_size=32,
    )  # fmt: skip
    pretrained = CrammedBertForMaskedLM(config)
    pretrained.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classifier = build_classifier(EncoderArguments(str(tmp_path)), load_glue_task(TASKS["sst2"], str(glue_data)))
    assert pretrained.head.dense.weight.shape == classifier.classifier.dense.weight.shape
    assert not torch.equal(pretrained.head.dense.weight, classifier.classifier.dense.weight)


@pytest.mark.parametrize("told", ["bf16", "fp16"])
def test_the_launchers_precision_counts_as_told(monkeypatch, glue_data, model_folder, tmp_path, told):
    monkeypatch.setattr("hf_cram.fine_tuning.bf16_trains_faster", lambda model, batch: pytest.fail("measured"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    args = FineTuningArguments(str(tmp_path / "out"), report_to="none")
    glue = GlueArguments(tasks="wnli", glue_data=str(glue_data))
    GlueRun(EncoderArguments(str(model_folder)), glue, args)
    assert (args.bf16, args.fp16, args.mixed_precision) == (told == "bf16", told == "fp16", told)


def test_results_stand_though_the_models_card_cannot_be_read(
    monkeypatch, capsys, caplog, glue_data, model_folder, tmp_path
):
    (model_folder / "README.md").write_text("---\nlanguage: [en\n---\n")
    run(monkeypatch, *fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "wnli", "--seeds", "1")
    assert "WNLI" in capsys.readouterr().out
    assert results_of(tmp_path / "out")["tasks"]["wnli"]
    assert "but not in the folder of their model: the front matter of" in caplog.text


@pytest.mark.parametrize(("model", "task"), [("model_folder", "stsb"), ("bert_folder", "wnli")])
def test_the_gradient_is_that_of_the_step_however_it_is_cut(monkeypatch, request, glue_data, tmp_path, model, task):
    """Else clipping would see a norm that grows with the micro-batches."""
    folder, norms = request.getfixturevalue(model), []
    clip = Accelerator.clip_grad_norm_

    def recorded(self, *args, **kwargs):
        norms.append(float(clip(self, *args, **kwargs)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", recorded)
    for size, micro_batches in ((16, 1), (4, 4)):
        arguments = fast_arguments(folder, glue_data, tmp_path / str(size))
        more = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", micro_batches]
        more += ["--tasks", task, "--seeds", "1", "--max_steps", "1", "--train_sampling_strategy", "sequential"]
        run(monkeypatch, *arguments, *more)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_examples_of_like_length_are_padded_together(monkeypatch, glue_data, model_folder, tmp_path):
    """Each batch to its own longest example."""
    seen, forward = {}, CrammedBertForSequenceClassification.forward

    def note(self, input_ids=None, attention_mask=None, **inputs):
        if self.training:
            tokens, padded = seen.get(strategy, (0, 0))
            seen[strategy] = tokens + int(attention_mask.sum()), padded + input_ids.numel()
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(CrammedBertForSequenceClassification, "forward", note)
    monkeypatch.setattr("hf_cram.fine_tuning.PADDING_MULTIPLE", 1)
    for strategy in ("group_by_length", "random"):
        arguments = fast_arguments(model_folder, glue_data, tmp_path / strategy)
        more = ["--per_device_train_batch_size", "4", "--train_sampling_strategy", strategy, "--max_steps", "8"]
        run(monkeypatch, *arguments, "--tasks", "sst2", "--seeds", "1", *more)
    shares = {strategy: tokens / padded for strategy, (tokens, padded) in seen.items()}
    assert shares["group_by_length"] > shares["random"] + 0.05


def test_examples_are_dropped_in_training_alone(monkeypatch, glue_data, model_folder, tmp_path):
    arguments = [*fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "wnli", "--seeds", "1"]
    run(monkeypatch, *arguments, "--dataloader_drop_last", "true")  # 16 validation examples, in batches of 64
    assert "accuracy" in results_of(tmp_path / "out")["tasks"]["wnli"]


def test_both_texts_of_a_pair_can_be_pooled_apart(monkeypatch, glue_data, model_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", out, *FAST]
    run(monkeypatch, *arguments, "--tasks", "stsb", "--seeds", "1", "--pooling", "segments", "--save_models", "true")
    model = AutoModelForSequenceClassification.from_pretrained(out / "stsb")
    assert model.classifier.dense.in_features == 4 * model.config.hidden_size
    with pytest.raises(GlueError, match="pooling: crammed_bert has no 'max'"):
        run(monkeypatch, *arguments, "--tasks", "stsb", "--seeds", "1", "--pooling", "max")


@pytest.mark.parametrize("model", ["bert_folder", "modernbert_folder"])
def test_other_architectures_are_scored_by_the_same_command(monkeypatch, request, glue_data, tmp_path, model):
    out, folder = tmp_path / "out", request.getfixturevalue(model)
    recipe = tmp_path / "recipe.yaml"  # of a crammed model: what this one cannot take is left to it
    recipe.write_text("pooling: segments\n")
    run(
        monkeypatch, recipe, "--pooling", "none", "--model_name_or_path", folder, "--glue_data", glue_data,
        "--output_dir", out, *FAST, "--dropout", "none", "--tasks", "sst2", "--seeds", "1",
    )  # fmt: skip
    assert results_of(out)["tasks"]["sst2"]["accuracy"]["median"] > 80
    assert results_of(out)["setting"]["dropout"] is None


@pytest.mark.parametrize("extension", ["csv", "json", "parquet"])
def test_own_data_comes_in_any_format(tmp_path, extension):
    columns = {"headline": ["None", "w1 w2"], "topic": ["sport", "culture"]}
    data = datasets.Dataset.from_dict(columns)
    path = tmp_path / f"news.{extension}"
    {"csv": data.to_csv, "json": data.to_json, "parquet": data.to_parquet}[extension](path)
    own = load_own_task(str(path), str(path), label_column="topic")
    assert own.train["headline"] == columns["headline"]
    assert own.task.label_names == ("culture", "sport")


def test_own_data(monkeypatch, model_folder, tmp_path):
    files = {}
    for split, (count, seed) in {"train": (192, 0), "validation": (48, 1), "test": (16, 2)}.items():
        texts, labels = sentences(count, seed)
        columns = {"headline": texts, "topic": [("sport", "culture")[label] for label in labels]}
        if split == "test":
            del columns["topic"]
        data = datasets.Dataset.from_dict(columns)
        files[split] = tmp_path / f"{split}.csv"
        data.to_csv(files[split])
    out = tmp_path / "out"
    own_data = [
        *FAST, "--num_train_epochs", "8", "--train_file", files["train"], "--validation_file", files["validation"],
        "--test_file", files["test"], "--label_column", "topic", "--task_name", "news", "--seeds", "1",
    ]  # fmt: skip
    (model_folder / "README.md").write_text("---\nlanguage: de\nlicense: cc0-1.0\n---\n")
    arguments = ["--model_name_or_path", model_folder, "--output_dir", out, *own_data]
    run(monkeypatch, *arguments, "--model_license", "MIT")  # the language is the base model's
    results = results_of(out)
    assert results["columns"] == ["news"]
    assert results["tasks"]["news"]["accuracy"]["median"] > 80
    # The fine-tuned model is there to be used, with the names of the classes, its scores and how to load it.
    model = AutoModelForSequenceClassification.from_pretrained(out / "news")
    assert model.config.label2id == {"culture": 0, "sport": 1}
    card = ModelCard((out / "news" / "README.md").read_text())
    assert card.data.pipeline_tag == "text-classification"
    assert [result.dataset_name for result in card.data.eval_results][:1] == ["news"]
    assert "# out\n" in card.text
    assert (card.data.language, card.data.license) == ("de", "mit")
    assert results_of(out / "news") == results
    told_later = ["--model_license", "apache-2.0"]
    run(monkeypatch, "--model_name_or_path", model_folder, "--output_dir", out, *own_data, *told_later)
    card = ModelCard((out / "news" / "README.md").read_text())
    assert (card.data.language, card.data.license) == ("de", "apache-2.0")
    run(monkeypatch, "--model_name_or_path", model_folder, "--output_dir", out, *own_data, "--model_license", "none")
    card = ModelCard((out / "news" / "README.md").read_text())
    assert (card.data.language, card.data.license) == ("de", None)
    # What a person has written or put there outlives another training of the model; scores of these weights do not.
    scores = "<!-- hf_cram: glue -->\nOf GLUE.\n<!-- hf_cram: end of glue -->"
    (out / "news" / "README.md").write_text(f"{card}\nMy notes.\n{scores}\n")
    (out / "news" / "model.onnx").write_text("mine")
    run(monkeypatch, *arguments, "--learning_rate", "2e-3")
    assert (out / "news-1" / "model.onnx").read_text() == "mine"
    assert not (out / "news" / "model.onnx").exists()
    assert "Of GLUE." not in (out / "news" / "README.md").read_text()
    text = (out / "news" / "README.md").read_text()
    assert "My notes." in text
    results = results_of(out)
    assert f"| {results['tasks']['news']['accuracy']['median']:.1f} |" in text
    # Of another metric, whose unit nobody knows, no scores take the place of those of the earlier weights.
    (tmp_path / "hits.py").write_text(HITS)
    run(monkeypatch, *arguments, "--learning_rate", "1e-3", "--metric", tmp_path / "hits.py")
    text = (out / "news" / "README.md").read_text()
    assert "My notes." in text
    assert "accuracy" not in text
    (predictions,) = (out / "predictions" / results["setting_id"]).rglob("news.seed-1.tsv")
    predictions = predictions.read_text().splitlines()
    assert {line.split("\t")[1] for line in predictions[1:]} <= {"culture", "sport"}


def test_a_decoder_is_scored_while_the_precision_is_open(monkeypatch, glue_data, gpt2_folder, tmp_path):
    out = tmp_path / "out"
    run(
        monkeypatch, "--model_name_or_path", gpt2_folder, "--glue_data", glue_data, "--output_dir", out,
        "--tasks", "wnli", "--seeds", "1", "--num_train_epochs", "1",
    )  # fmt: skip
    assert 0 <= results_of(out)["tasks"]["wnli"]["accuracy"]["median"] <= 100


def test_a_checkpoint_is_shared_apart_from_the_finished_model_of_its_run(glue_data, model_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    checkpoint = model_folder.rename(tmp_path / "mine" / "checkpoint-6000")
    assert (
        prepared(checkpoint, tmp_path, tasks="wnli", glue_data=str(glue_data))[0].shared_name == "mine-checkpoint-6000"
    )


def test_other_content_of_a_file_of_the_same_time_is_read(tmp_path):
    path = tmp_path / "train.csv"
    for text in ("the first", "the other"):
        path.write_text(f"text,label\n{text},0\nb,1\n")
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert load_own_task(str(path), str(path)).train["text"][0] == text


def test_floats_make_a_regression(tmp_path):
    texts, labels = sentences(8, 0)
    for name in ("train", "dev"):
        datasets.Dataset.from_dict({"a": texts, "b": texts, "label": [float(x) for x in labels]}).to_csv(
            tmp_path / f"{name}.csv"
        )
    data = load_own_task(str(tmp_path / "train.csv"), str(tmp_path / "dev.csv"))
    assert data.is_regression
    assert data.task.text_columns == ("a", "b")
    assert data.task.headline == "pearson"


HITS = (
    "import datasets\nimport evaluate\n\n"
    "class Hits(evaluate.Metric):\n"
    "    def _info(self):\n"
    "        value = datasets.Value('int64')\n"
    "        features = datasets.Features({'predictions': value, 'references': value})\n"
    "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n"
    "    def _compute(self, predictions, references):\n"
    "        return {'hits': sum(a == b for a, b in zip(predictions, references))}\n"
)


def test_another_metric_of_evaluate(monkeypatch, glue_data, model_folder, tmp_path):
    metric = tmp_path / "hits.py"
    metric.write_text(HITS)
    out = tmp_path / "out"
    run(
        monkeypatch, "--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", out, *FAST,
        "--tasks", "sst2", "--seeds", "1", "--metric", metric,
    )  # fmt: skip
    assert results_of(out)["tasks"]["sst2"]["hits"]["median"] > 48  # of 64 examples


def test_an_edited_metric_is_another_setting_where_it_is_named_by_its_folder(glue_data, model_folder, tmp_path):
    folder = tmp_path / "hits"
    folder.mkdir()
    names = set()
    for script in (HITS, HITS.replace("a == b", "a != b")):
        (folder / "hits.py").write_text(script)
        glue_run, args = prepared(model_folder, tmp_path, tasks="sst2", glue_data=str(glue_data), metric=str(folder))
        names.add(glue_run.setting_id(args))
    assert len(names) == 2


def test_classes_have_the_benchmarks_names_in_a_submission():
    def named(task, count):
        return [str(label) for _, label in submission_lines(TASKS[task], np.arange(count))]

    assert named("mnli", 3) == ["entailment", "neutral", "contradiction"]
    assert named("qnli", 2) == named("rte", 2) == ["entailment", "not_entailment"]
    assert named("sst2", 2) == named("wnli", 2) == ["0", "1"]


def test_the_submission_is_that_of_the_median_seed():
    assert median_seed({1: 3.0, 2: 1.0, 3: 2.0}) == 3
    assert median_seed({1: 3.0, 2: 1.0}) == 2


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_headline_metric(name):
    metric, _ = load_metric(None, TASKS[name])
    scores = metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 1])
    assert TASKS[name].headline in scores


def test_values_of_a_regression_are_cut_for_the_benchmark_only():
    own = Task("prices", ("text",), "pearson", (), {}, {})
    assert submission_lines(own, np.array([-3.25, 120.5])) == [(0, "-3.25"), (1, "120.5")]
    assert submission_lines(TASKS["stsb"], np.array([-3.25, 2.5, 120.5])) == [(0, "0"), (1, "2.5"), (2, "5")]


def test_precision_is_decided_once_and_kept(monkeypatch, glue_data, model_folder, tmp_path):
    answers = iter([True])  # a second measurement would fail
    monkeypatch.setattr("hf_cram.fine_tuning.bf16_trains_faster", lambda model, batch: next(answers))
    AcceleratorState._reset_state()
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", out]
    arguments += ["--num_train_epochs", "1", "--tasks", "wnli,stsb"]
    run(monkeypatch, *arguments, "--seeds", "1")
    run(monkeypatch, *arguments, "--seeds", "2")
    lines = [json.loads(line) for line in (out / "glue_runs.jsonl").read_text().splitlines()]
    assert [line["setting"]["bf16"] for line in lines] == [True] * 4
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    "change",
    [{"weight_decay": 0.1}, {"warmup_steps": 0.2}, {"layer_lr_decay": 0.9}, {"max_grad_norm": 0.5},
     {"adam_beta2": 0.98}, {"gradient_accumulation_steps": 2}, {"max_steps": 5}, {"train_sampling_strategy": "random"}],
)  # fmt: skip
def test_another_setting_is_other_pairs(glue_data, model_folder, tmp_path, change):
    run, args = prepared(model_folder, tmp_path, glue_data=str(glue_data), tasks="wnli")
    changed = FineTuningArguments(str(tmp_path / "out"), report_to="none", bf16=False, **change)
    assert run.setting_id(changed) != run.setting_id(args)


def test_fewer_examples_are_other_pairs(glue_data, model_folder, tmp_path):
    all_of_them, args = prepared(model_folder, tmp_path, glue_data=str(glue_data), tasks="wnli")
    few, _ = prepared(model_folder, tmp_path, glue_data=str(glue_data), tasks="wnli", max_train_samples=20)
    assert few.setting_id(args) != all_of_them.setting_id(args)


def test_other_data_are_other_pairs(monkeypatch, model_folder, tmp_path):
    out, folder = tmp_path / "out", tmp_path / "data"
    arguments = [
        "--model_name_or_path",
        model_folder,
        "--glue_data",
        folder,
        "--output_dir",
        out,
        *FAST,
        "--seeds",
        "1",
    ]
    sizes = []
    for test in (8, 8, 12, 8, None):  # new data in the same place, and the first again
        shutil.rmtree(folder, ignore_errors=True)
        write_task(folder, "wnli", {"train": 16, "validation": 16, **({"test": test} if test else {})})
        run(monkeypatch, *arguments)
        if test is not None:
            with zipfile.ZipFile(out / "glue_submission.zip") as archive:
                sizes.append(len(archive.read("WNLI.tsv").splitlines()) - 1)
    assert len((out / "glue_runs.jsonl").read_text().splitlines()) == 3
    assert sizes == [8, 8, 12, 8]  # the predictions of the data that are scored
    assert not (out / "glue_submission.zip").exists()  # the last have no test split


def test_another_diagnostic_set_is_other_data(glue_data, model_folder, tmp_path):
    folder = shutil.copytree(glue_data, tmp_path / "glue")
    before, _ = prepared(model_folder, tmp_path, tasks="mnli", glue_data=str(folder))
    (diagnostic,) = (folder / "ax").iterdir()
    datasets.Dataset.from_parquet(str(diagnostic)).select(range(6)).to_parquet(diagnostic)
    after, _ = prepared(model_folder, tmp_path, tasks="mnli", glue_data=str(folder))
    assert after.data_ids != before.data_ids


def test_what_a_submission_lacks_is_said(monkeypatch, caplog, model_folder, tmp_path):
    write_task(tmp_path / "data", "wnli", dict.fromkeys(("train", "validation", "test"), 8))
    arguments = [*fast_arguments(model_folder, tmp_path / "data", tmp_path), "--seeds", "1"]
    run(monkeypatch, *arguments)
    assert "not in the submission" not in caplog.text
    shutil.rmtree(tmp_path / "out" / "predictions")
    run(monkeypatch, *arguments)
    assert "WNLI is not in the submission" in caplog.text


def test_the_kept_model_is_the_one_of_the_results(monkeypatch, model_folder, tmp_path):
    texts, labels = sentences(32, 0)
    datasets.Dataset.from_dict({"text": texts, "label": labels}).to_csv(tmp_path / "train.csv")
    arguments = ["--model_name_or_path", model_folder, "--train_file", tmp_path / "train.csv", "--validation_file"]
    arguments += [tmp_path / "train.csv", *FAST, "--seeds", "1"]
    out = model_folder.with_name("model-train")  # not the folder of the pretrained model

    def weights(learning_rate):
        run(monkeypatch, *arguments, "--learning_rate", learning_rate)
        return AutoModelForSequenceClassification.from_pretrained(out / "train").classifier.out_proj.weight

    first, second, third = weights("1e-3"), weights("3e-3"), weights("1e-3")
    assert not torch.equal(first, second)
    assert torch.equal(first, third)
    assert not (model_folder / "glue_results.json").exists()


def test_a_model_of_other_data_of_that_name_is_moved_aside(monkeypatch, caplog, model_folder, tmp_path):
    kept = model_folder.with_name("model-train")

    def weights_after(place, seed, *more):
        texts, labels = sentences(32, seed)
        file = tmp_path / place / "train.csv"
        file.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"text": texts, "label": labels}).to_csv(file)
        run(monkeypatch, "--model_name_or_path", model_folder, "--train_file", file, "--validation_file", file, *FAST,
            "--seeds", "1", *more)  # fmt: skip
        return (kept / "train" / "model.safetensors").read_bytes()

    first = weights_after("reviews", 0)
    assert weights_after("reviews", 0, "--test_file", tmp_path / "reviews" / "train.csv") == first
    assert not (kept / "train-1").exists()  # another file to predict is no other model
    second = weights_after("tweets", 1)
    assert first != second
    assert (kept / "train-1" / "model.safetensors").read_bytes() == first
    assert results_of(kept / "train-1") != results_of(kept / "train")
    assert f"{kept / 'train'} is of other files, and was moved to {kept / 'train-1'}" in caplog.text


# ---- Folders ----


@pytest.mark.parametrize("content", ["notes", "a model without our mark", "a file", "a link"])
def test_a_folder_of_the_users_is_never_replaced(monkeypatch, glue_data, model_folder, tmp_path, content):
    place = tmp_path / "wnli"
    if content == "a file":
        place.write_text("mine")
    elif content == "a link":
        (tmp_path / "mine").mkdir()
        place.symlink_to(tmp_path / "mine")
    else:
        place.mkdir()
        (place / ("config.json" if "model" in content else "notes.txt")).write_text("mine")
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", ".", *FAST]
    arguments += ["--tasks", "wnli", "--seeds", "1"]
    with pytest.raises(GlueError, match="take the place of wnli, which holds something else"):
        run(monkeypatch, *arguments, "--save_models", "true")
    assert place.is_symlink() or [path.read_text() for path in (place, *place.glob("*")) if path.is_file()] == ["mine"]
    assert not (tmp_path / "glue_runs.jsonl").exists()  # known before training
    run(monkeypatch, *arguments)  # where no model is kept, nothing is in the way


def test_the_results_of_another_model_are_never_replaced(monkeypatch, glue_data, model_folder, tmp_path):
    arguments = [*fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "wnli", "--seeds", "1"]
    run(monkeypatch, *arguments, "--save_models", "true")
    renamed = model_folder.rename(tmp_path / "renamed")
    run(monkeypatch, *arguments, "--model_name_or_path", renamed, "--save_models", "true")  # nothing is left to do
    before = (tmp_path / "out" / "glue_results.json").read_bytes()
    other = tmp_path / "other" / "renamed"
    retrained = CrammedBertForMaskedLM.from_pretrained(renamed)
    retrained.decoder.weight.data += 1
    retrained.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(renamed / name, other)
    for more in (["--model_name_or_path", other], ["--model_name_or_path", renamed, "--from_scratch", "true"]):
        with pytest.raises(GlueError, match="holds the scores of another model: choose another folder"):
            run(monkeypatch, *arguments, *more)
    assert (tmp_path / "out" / "glue_results.json").read_bytes() == before
    (tmp_path / "out" / "glue_results.json").unlink()  # as a run leaves it that was interrupted
    with pytest.raises(GlueError, match="take the place of .*wnli, which holds something else"):
        run(monkeypatch, *arguments, "--model_name_or_path", other, "--save_models", "true")


def test_a_smaller_run_elsewhere_leaves_a_models_fuller_results(
    monkeypatch, caplog, glue_data, model_folder, tmp_path
):
    arguments = ["--model_name_or_path", model_folder, "--glue_data", glue_data, *FAST, "--tasks", "wnli"]
    run(monkeypatch, *arguments, "--seeds", "2")
    fuller = results_of(model_folder)
    arguments += ["--output_dir", tmp_path / "out"]
    run(monkeypatch, *arguments, "--seeds", "1")
    assert results_of(model_folder) == fuller
    assert f"those in {model_folder} are of more scores or training examples, and stay" in caplog.text
    run(monkeypatch, *arguments, "--seeds", "3")
    assert results_of(model_folder)["seeds"] == [1, 2, 3]
    # Neither tells all that the other does: the new ones count, and the earlier ones stay readable.
    other = [part if part != "wnli" else "sst2" for part in arguments]
    run(monkeypatch, *other, "--seeds", "1")
    assert list(results_of(model_folder)["tasks"]) == ["wnli"]
    run(monkeypatch, *other, "--seeds", "3")
    assert list(results_of(model_folder)["tasks"]) == ["sst2"]
    assert json.loads((model_folder / "glue_results.json-1").read_text())["seeds"] == [1, 2, 3]


def test_fuller_results_in_the_models_own_folder_are_moved_aside(monkeypatch, caplog, glue_data, model_folder):
    arguments = [*FAST, "--model_name_or_path", model_folder, "--glue_data", glue_data, "--tasks"]
    run(monkeypatch, *arguments, "sst2,stsb", "--seeds", "1")
    fuller = results_of(model_folder)
    run(monkeypatch, *arguments, "sst2,stsb", "--seeds", "1")
    assert not (model_folder / "glue_results.json-1").exists()
    run(monkeypatch, *arguments, "sst2", "--seeds", "1")
    assert list(results_of(model_folder)["tasks"]) == ["sst2"]
    assert json.loads((model_folder / "glue_results.json-1").read_text()) == fuller
    assert "were moved to glue_results.json-1" in caplog.text


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        ({}, False),
        ({"tasks": {"sst2": {}}}, False),
        ({"tasks": {"sst2": {}, "rte": {}, "cola": {}}}, True),
        ({"tasks": {"sst2": {}, "cola": {}}}, True),
        ({"seeds": [1, 2, 3]}, True),
        ({"seeds": [3, 4]}, True),
        ({"seeds": [1, 2, 3], "model_id": "other weights"}, False),
        ({"setting": {"max_train_samples": None}}, True),
        ({"setting": {"max_train_samples": 8}}, False),
    ],
)
def test_results_are_fuller_by_columns_seeds_and_examples_of_the_same_weights(difference, expected):
    results = {
        "model_id": "these", "tasks": {"sst2": {}, "rte": {}}, "seeds": [1, 2], "setting": {"max_train_samples": 64},
    }  # fmt: skip
    assert is_fuller({**results, **difference}, results) == expected
    assert not is_fuller({}, results)


def test_a_model_that_reads_token_types_is_given_them(tiny_config, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for type_vocab_size in (0, 2):
        tiny_config.type_vocab_size = type_vocab_size
        tiny_config.save_pretrained(tmp_path)
        encoded = load_tokenizer(EncoderArguments(str(tmp_path)))("w1", "w2")
        assert ("token_type_ids" in encoded) == (type_vocab_size == 2)


def test_checkpoints_of_a_pretraining_are_not_rotated_away(monkeypatch, glue_data, model_folder):
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-100"):
        (model_folder / name).mkdir()
        (model_folder / name / "model.safetensors").write_text("pretrained")
    run(
        monkeypatch, "--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", model_folder, *FAST,
        "--tasks", "wnli", "--seeds", "1", "--save_strategy", "epoch", "--save_total_limit", "1",
    )  # fmt: skip
    kept = {path.parent.name: path.read_bytes() for path in model_folder.glob("checkpoint-*/model.safetensors")}
    assert kept == dict.fromkeys(("checkpoint-1", "checkpoint-2", "checkpoint-100"), b"pretrained")


def test_nothing_is_made_where_the_program_was_started(monkeypatch, glue_data, model_folder, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(
        monkeypatch,
        "--model_name_or_path",
        model_folder,
        "--glue_data",
        glue_data,
        *FAST,
        "--tasks",
        "wnli",
        "--seeds",
        "1",
    )
    assert list((tmp_path / "here").iterdir()) == []


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("cola,sst", "unknown task 'sst'; did you mean 'sst2'"), ("cola", "no <split>-.*cola")],
)
def test_unknown_and_absent_tasks(monkeypatch, glue_data, model_folder, tasks, message):
    with pytest.raises(GlueError, match=message):
        run(monkeypatch, "--model_name_or_path", model_folder, "--glue_data", glue_data, "--tasks", tasks)


def test_tasks_default_to_those_that_are_there(glue_data, tmp_path):
    assert [task.name for task in choose_tasks(None, str(glue_data))] == ["sst2", "stsb", "mnli", "wnli"]
    assert len(choose_tasks(None, None)) == 9
    with pytest.raises(GlueError, match="no task in ','"):
        choose_tasks(",", None)
    with pytest.raises(GlueError, match="holds no folder of a task"):
        choose_tasks(None, str(tmp_path))
    with pytest.raises(GlueError, match="there is no folder"):
        choose_tasks(None, str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ({"text": ["a", "b"], "label": ["x", "y"]}, {"text": ["a"], "label": ["z"]}, "dev.csv: label 'z' does not occur"),
        ({"text": ["a", "b"], "label": ["x", "x"]}, {"text": ["a"], "label": ["x"]}, "all rows have the label 'x'"),
        ({"text": ["a", "b"], "class": [0, 1]}, {"text": ["a"], "class": [0]}, "train.csv: no column 'label'"),
        ({"text": ["a", "b", "c"], "label": [0, 1, None]}, {"text": ["a"], "label": [0]}, "train.csv: rows without a value"),
        ({"text": ["a", "b", "c"], "label": ["0", "1", "NA"]}, {"text": ["a"], "label": [0]}, "train.csv: rows without a value"),
        ({"text": ["a", "b"], "label": [0.5, 1]}, {"text": ["a", "b"], "label": ["1e-1", "NaN"]}, "dev.csv: rows without a"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, {"text": ["a"], "label": ["x"]}, "dev.csv: .* must hold numbers"),
        ({"n": [1, 2], "label": [0, 1]}, {"n": [1], "label": [0]}, "--text_columns"),
    ],
)  # fmt: skip
def test_own_data_that_cannot_be_used(tmp_path, train, validation, message):
    for name, columns in (("train", train), ("dev", validation)):
        datasets.Dataset.from_dict(columns).to_csv(tmp_path / f"{name}.csv")
    with pytest.raises(GlueError, match=message):
        load_own_task(str(tmp_path / "train.csv"), str(tmp_path / "dev.csv"))


def test_own_data_does_not_take_the_name_of_a_task(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_csv(tmp_path / "mrpc.csv")
    for name in (None, "..", "a/b", "checkpoints"):
        with pytest.raises(GlueError, match="choose another with --task_name"):
            load_own_task(str(tmp_path / "mrpc.csv"), str(tmp_path / "mrpc.csv"), name=name)


def test_three_texts_are_refused(tmp_path):
    datasets.Dataset.from_dict({"a": ["x"], "b": ["y"], "c": ["z"], "label": [0]}).to_csv(tmp_path / "train.csv")
    with pytest.raises(GlueError, match="text_columns: a model reads one or two texts, not 3"):
        load_own_task(*[str(tmp_path / "train.csv")] * 2, text_columns=["a", "b", "c"])


def test_a_label_column_beside_the_one_that_is_named(tmp_path):
    columns = {"text": ["a", "b", "c"], "label": ["x", "y", "x"], "stars": [1, 5, 3]}
    datasets.Dataset.from_dict(columns).to_csv(tmp_path / "train.csv")
    paths = [str(tmp_path / "train.csv")] * 2
    classes = load_own_task(*paths, label_column="stars")
    assert classes.task.label_names == ("1", "3", "5")
    assert list(classes.train["label"]) == [0, 2, 1]
    assert load_own_task(*paths, label_column="stars", regression=True).is_regression


def test_classes_and_texts_called_none_or_na(tmp_path):
    columns = {"text": ["NA", "null", "a", "b"], "stance": ["None", "Favor", "n/a", "Favor"]}
    datasets.Dataset.from_dict(columns).to_csv(tmp_path / "train.csv")
    data = load_own_task(*[str(tmp_path / "train.csv")] * 2, label_column="stance")
    assert data.task.label_names == ("Favor", "None", "n/a")
    assert list(data.train["text"]) == columns["text"]


def test_classes_go_by_name_where_files_are_typed_otherwise(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": ["1", "2", "x"]}).to_csv(tmp_path / "train.csv")
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [2, 1]}).to_csv(tmp_path / "dev.csv")
    data = load_own_task(str(tmp_path / "train.csv"), str(tmp_path / "dev.csv"))
    assert list(data.validation["train"]["label"]) == [1, 0]


def test_classes_go_by_name_where_files_number_them_otherwise(tmp_path):
    texts = ["a", "b", "c"]

    def write(name, labels, names):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        data = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
        data.to_parquet(tmp_path / name)
        return str(tmp_path / name)

    train = write("train.parquet", [0, 1, 1], ["sport", "culture"])
    test = write("test.parquet", [-1, -1, -1], ["sport", "culture"])
    rows = {"text": texts, "label": ["culture", "sport", "sport"]}
    datasets.Dataset.from_dict(rows).to_csv(tmp_path / "dev.csv")
    for validation in (write("dev.parquet", [0, 1, 1], ["culture", "sport"]), str(tmp_path / "dev.csv")):
        data = load_own_task(train, validation, test)
        assert data.task.label_names == ("sport", "culture")
        assert list(data.train["label"]) == [0, 1, 1]
        assert list(data.validation["train"]["label"]) == [1, 0, 0]
        assert list(data.test["train"]["label"]) == [-1, -1, -1]
    with pytest.raises(GlueError, match="test.parquet: label 'class -1' does not occur in training"):
        load_own_task(train, test)


@pytest.mark.parametrize("option", ["--from_scratch", "--model_name_or_path"])
def test_scores_do_not_go_into_the_folder_of_a_model_that_has_not_made_them(
    monkeypatch, glue_data, model_folder, option
):
    other = shutil.copytree(model_folder, model_folder.with_name("other"))
    value = {"--from_scratch": "true", "--model_name_or_path": other}[option]
    arguments = ["--model_name_or_path", model_folder, "--output_dir", model_folder, "--glue_data", glue_data]
    with pytest.raises(GlueError, match="model holds a model, and these would not be the scores of it"):
        run(monkeypatch, *arguments, option, value)


def test_a_tokenizer_that_cannot_read_the_texts_is_told_before_training(monkeypatch, caplog, model_folder, tmp_path):
    arguments = [
        "--model_name_or_path", model_folder, "--output_dir", tmp_path / "out", *FAST, "--seeds", "1", "--train_file",
        tmp_path / "train.csv", "--validation_file", tmp_path / "train.csv", "--save_models", "false",
    ]  # fmt: skip
    for unread, total in ((60, 100), (2, 100)):
        texts = ["хорошо"] * unread + ["w1 w2"] * (total - unread)
        rows = {"text": texts, "label": ["a", "b"] * (total // 2)}
        datasets.Dataset.from_dict(rows).to_csv(tmp_path / "train.csv")
        if unread > 50:
            with pytest.raises(
                GlueError, match="train: of 60% of the training texts the model's tokenizer knows no word"
            ):
                run(monkeypatch, *arguments)
        else:
            run(monkeypatch, *arguments)
            assert "train: of 2% of the training texts the model's tokenizer knows no word" in caplog.text


def test_pooling_by_segments_needs_a_tokenizer_that_tells_them_apart(monkeypatch, glue_data, model_folder, tmp_path):
    loaded = AutoTokenizer.from_pretrained(model_folder)
    loaded.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    loaded.save_pretrained(model_folder)
    arguments = [
        *fast_arguments(model_folder, glue_data, tmp_path),
        "--pooling",
        "segments",
        "--seeds",
        "1",
        "--tasks",
    ]
    with pytest.raises(GlueError, match="pooling: segments tells the texts of a pair apart, .*: set --pooling mean"):
        run(monkeypatch, *arguments, "stsb")
    run(monkeypatch, *arguments, "sst2")


def test_a_column_has_the_type_of_all_its_values(tmp_path):
    """A half star far down makes a regression of whole ones, a word makes classes of numbers."""
    for last, is_regression in (("4.5", True), ("unknown", False)):
        lines = ["text,label", *(f"text {number},{number % 5}" for number in range(12_000)), f"text,{last}"]
        (tmp_path / "train.csv").write_text("\n".join(lines))
        data = load_own_task(*[str(tmp_path / "train.csv")] * 2)
        assert data.is_regression == is_regression
        assert is_regression or data.task.label_names == ("0", "1", "2", "3", "4", "unknown")


def test_what_is_read_of_own_data_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "train.csv").write_text("id,text,label\nR-1,good,yes\nR-2,bad,no\n")
    load_own_task(*[str(tmp_path / "train.csv")] * 2)
    assert "train: text from id and text; 2 classes (no, yes) by label; 2 / 2 rows" in caplog.text


def test_rows_of_own_data_with_too_many_fields_are_told(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nHello, world,a\nGood, bye,b\n")
    with pytest.raises(GlueError, match="train.csv cannot be read as csv: rows have more fields .*: name each column"):
        load_own_task(*[str(tmp_path / "train.csv")] * 2)
    (tmp_path / "train.csv").write_text(f"id,text,label\n{10**24},good,a\n1,bad,b\n")
    with pytest.raises(GlueError, match="train.csv cannot be read as csv: "):
        load_own_task(*[str(tmp_path / "train.csv")] * 2)


def test_an_adapter_is_no_model(monkeypatch, glue_data, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        GlueError, match="no configuration loads from .*adapter: it is an adapter: merge it into its model"
    ):
        run(monkeypatch, *fast_arguments(tmp_path / "adapter", glue_data, tmp_path), "--tasks", "wnli")


def test_results_without_a_card_say_so(monkeypatch, caplog, glue_data, model_folder):
    run(
        monkeypatch,
        *[*FAST, "--model_name_or_path", model_folder, "--glue_data", glue_data, "--tasks", "wnli"],
        "--seeds",
        "1",
    )
    assert f"No card tells of the results: there is no README.md in {model_folder}" in caplog.text


@pytest.mark.parametrize("name", ["absent.csv", "notes.txt", "broken.csv", "broken.parquet", "empty.csv"])
def test_own_files_that_cannot_be_read(tmp_path, name):
    if name != "absent.csv":
        (tmp_path / name).write_text("" if name == "empty.csv" else 'a,b\n"x\n1,2,3\n')
    with pytest.raises(GlueError, match=name):
        load_own_task(str(tmp_path / name), str(tmp_path / name))


def test_names_of_files_are_no_patterns(glue_data, tmp_path):
    folder = tmp_path / "reviews [2024]"
    shutil.copytree(glue_data / "wnli", folder / "wnli")
    for name, text in (("train[12].csv", "good"), ("train1.csv", "another")):
        (folder / name).write_text(f"text,label\n{text},a\nbad,b\n")
    data = load_own_task(str(folder / "train[12].csv"), str(folder / "train1.csv"), name="reviews")
    assert list(data.train["text"]) == ["good", "bad"]
    assert len(load_glue_task(TASKS["wnli"], str(folder)).train) > 0


def test_an_output_folder_that_cannot_be_is_known_before_training(monkeypatch, glue_data, model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["--model_name_or_path", model_folder, "--glue_data", glue_data, *FAST, "--tasks", "wnli"]
    with pytest.raises(GlueError, match="output_dir: .*file/out cannot be written to: choose another folder"):
        run(monkeypatch, *arguments, "--output_dir", tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval_strategy", "epoch"], "eval_strategy has no place here: each task is scored at its end"),
        (["--eval_steps", "5"], "eval_steps has no place here"),
        (["--logging_steps", "5"], "logging_steps does nothing by itself: set logging_strategy: steps"),
        (["--save_steps", "5"], "save_steps does nothing by itself: set save_strategy: steps"),
        (["--search_seeds", "2"], "search_seeds is for a search: give search_learning_rate"),
        (["--search_seeds", "2", "--search_learning_rate", "1e-4"], "search_seeds is for a search"),
        (["--train_file", "a.csv", "--save_models", "false", "--language", "de"], "of your own data that is kept"),
    ],
)
def test_options_that_would_do_nothing_are_one_line(
    monkeypatch, capsys, glue_data, model_folder, tmp_path, options, message
):
    own = "--train_file" in options
    data = [] if own else ["--glue_data", glue_data, "--tasks", "wnli"]
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(monkeypatch, "--model_name_or_path", model_folder, "--output_dir", tmp_path / "out", *data, *options)
    assert message in capsys.readouterr().err + str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_line(python_environment, glue_data):
    process = subprocess.run(
        [sys.executable, REPOSITORY / "run_glue.py", "--model_name_or_path", "/no/model", "--glue_data", glue_data],
        env=python_environment, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.strip().count("\n") == 0
    assert "run_glue.py: error: model_name_or_path: no configuration loads from /no/model" in process.stderr


@pytest.mark.parametrize("text", ["0", "x", "", "1,-2", "1000000", "1,4294967296"])
def test_seeds_that_are_none(text):
    with pytest.raises(GlueError, match="seeds must be"):
        parse_seeds("seeds", text)
    assert parse_seeds("seeds", "3") == [1, 2, 3]
    assert parse_seeds("seeds", "7,") == [7]


@pytest.mark.parametrize(
    ("split", "column", "values", "message"),
    [
        ("train", None, None, "wnli, train holds no rows"),
        ("validation", None, None, "wnli, validation holds no rows"),
        ("test", None, None, "wnli, test holds no rows"),
        ("validation", "label", [-1] * 8, "validation: label -1 is no class from 0 to 1"),
        ("test", "sentence1", None, "test, has no column 'sentence1'"),
    ],
)
def test_all_tasks_are_looked_at_before_the_first_is_trained(
    monkeypatch, glue_data, model_folder, tmp_path, split, column, values, message
):
    folder = tmp_path / "data"
    shutil.copytree(glue_data / "sst2", folder / "sst2")
    write_task(folder, "wnli", dict.fromkeys(("train", "validation", "test"), 8))
    path = folder / "wnli" / f"{split}-00000-of-00001.parquet"
    data = datasets.Dataset.from_parquet(str(path))
    if column is None:
        data = data.select([])
    else:
        data = data.remove_columns(column)
        data = data if values is None else data.add_column(column, values)
    data.to_parquet(path)
    arguments = ["--model_name_or_path", model_folder, "--glue_data", folder, "--output_dir", tmp_path / "out", *FAST]
    with pytest.raises(GlueError, match=message):
        run(monkeypatch, *arguments, "--tasks", "sst2,wnli", "--seeds", "1")
    assert not (tmp_path / "out").exists()


def test_a_metric_that_does_not_suit_a_task_is_known_before_training(monkeypatch, glue_data, model_folder, tmp_path):
    metric = tmp_path / "classes.py"
    metric.write_text(
        "import datasets\nimport evaluate\n\n"
        "class Classes(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        value = datasets.Value('float32')\n"
        "        features = datasets.Features({'predictions': value, 'references': value})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        if any(value % 1 for value in references):\n"
        "            raise TypeError('classes only')\n"
        "        return {'table': [1, 2]}\n"
    )
    arguments = fast_arguments(model_folder, glue_data, tmp_path)
    for name, tasks, message in (
        (metric, "stsb", "does not score stsb: classes only"),
        (metric, "wnli", "gives no number for wnli"),
        ("acuracy", "wnli", "'acuracy' cannot be loaded"),
    ):
        with pytest.raises(GlueError, match=message):
            run(monkeypatch, *arguments, "--tasks", tasks, "--metric", name)
    with pytest.raises(GlueError, match="label_smoothing_factor: stsb has no classes"):
        run(monkeypatch, *arguments, "--tasks", "wnli,stsb", "--label_smoothing_factor", "0.1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max_train_samples", "0", "max_train_samples must be at least 1"),
        ("--max_seq_length", "0", "max_seq_length must be at least 8"),
        ("--learning_rate", "nan", "learning_rate must be a number, got nan"),
        ("--gradient_accumulation_steps", "0", "gradient_accumulation_steps must be at least 1, got 0"),
        ("--per_device_train_batch_size", "0", "per_device_train_batch_size must be at least 1, got 0"),
        ("--per_device_eval_batch_size", "0", "per_device_eval_batch_size must be at least 1, got 0"),
        ("--search_batch_size", "0", "search_batch_size must be at least 1, got 0"),
        ("--bf16_full_eval", "true", "bf16_full_eval has no place here"),
        ("--fp16_full_eval", "true", "fp16_full_eval has no place here"),
        ("--auto_find_batch_size", "true", "auto_find_batch_size would train with another batch"),
        ("--load_best_model_at_end", "true", "load_best_model_at_end has no place here: the last weights are scored"),
        ("--metric_for_best_model", "f1", "metric_for_best_model has no place here"),
        ("--greater_is_better", "true", "greater_is_better has no place here"),
        ("--hub_always_push", "true", "hub_always_push has no place here"),
        ("--eval_delay", "2", "eval_delay has no place here"),
        ("--save_strategy", "best", "save_strategy best has no place here"),
        ("--model_license", "MIT license", "model_license must be an identifier of the Hub"),
        ("--language", "German", "language must be a code of two or three letters such as de"),
        ("--enable_jit_checkpoint", "true", "enable_jit_checkpoint would score what a signal has stopped half-way"),
        ("--language", "de", "language is for the card of a model of your own data"),
        ("--prediction_loss_only", "true", "prediction_loss_only would leave no predictions to score"),
        ("--eval_do_concat_batches", "false", "eval_do_concat_batches has no place here"),
        ("--lr_scheduler_kwargs", '{"min_lr": 1e-5}', "lr_scheduler_kwargs do not suit lr_scheduler_type cosine: "),
        (
            "--lr_scheduler_type",
            "cosine_with_min_lr",
            "lr_scheduler_kwargs do not suit lr_scheduler_type cosine_with_min_lr: ",
        ),
        ("--optim", "adafactor", "leave out optim"),
        ("--seed", "7", "seed is chosen by seeds: leave it out, and name one seed as '7,'"),
        ("--resume_from_checkpoint", "true", "an interrupted run goes on by itself"),
        ("--num_train_epochs", "0", "num_train_epochs must be above 0, got 0.0"),
        ("--search_learning_rate", "0", "search_learning_rate must be above 0, got 0.0"),
        ("--search_learning_rate", "inf", "search_learning_rate must be above 0, got inf"),
        ("--search_num_train_epochs", "0", "search_num_train_epochs must be above 0, got 0.0"),
        ("--seeds", "five", "seeds must be a number of seeds"),
        ("--search_seeds", "five", "search_seeds must be a number of seeds"),
        ("--validation_file", "dev.csv", "validation_file belongs to data of your own: name a train_file"),
        ("--text_columns", "text", "text_columns belongs to data of your own"),
        ("--label_column", "topic", "label_column belongs to data of your own"),
        ("--train_sampling_strategy", "group_by_size", "invalid choice: 'group_by_size'"),
    ],
)
def test_settings_that_cannot_be(monkeypatch, capsys, model_folder, option, value, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model_name_or_path", model_folder, option, value)
    assert message in capsys.readouterr().err


def test_a_push_of_nothing_is_refused_before_training(monkeypatch, glue_data, model_folder, tmp_path):
    arguments = [*fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "wnli", "--seeds", "1"]
    with pytest.raises(GlueError, match="push_to_hub: .* nothing could be pushed: leave it out"):
        run(monkeypatch, *arguments, "--from_scratch", "true", "--push_to_hub", "true")
    assert not (tmp_path / "out" / "glue_runs.jsonl").exists()


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000]), "as a sequence classifier: "),
        ("model.safetensors", lambda path: path.write_bytes(b"no"), "as a sequence classifier: "),
        ("config.json", lambda path: path.write_text("[]"), "no configuration loads from"),
        ("config.json", lambda path: edit_json(path, hidden_size="x"), "no configuration .*hidden_size.*got str"),
        ("config.json", lambda path: edit_json(path, vocab_size=50), "1 weights of .* do not have the shapes"),
        ("tokenizer.json", lambda path: path.unlink(), "neither a tokenizer.json nor another vocabulary"),
        ("tokenizer.json", lambda path: path.write_text(path.read_text()[:500]), "tokenizer .* cannot be loaded"),
        ("tokenizer.json", lambda path: path.write_text("[1]"), "tokenizer .* its files are damaged"),
        ("tokenizer_config.json", lambda path: path.write_text("[]"), "tokenizer .* its files are damaged"),
        ("tokenizer_config.json", lambda path: edit_json(path, pad_token=None), "has no pad_token"),
    ],
)
def test_damaged_checkpoints_are_one_line(monkeypatch, glue_data, model_folder, tmp_path, name, damage, message):
    damage(model_folder / name)
    with pytest.raises(GlueError, match=f"^model_name_or_path: .*{message}") as caught:
        run(
            monkeypatch, "--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", tmp_path / "out",
            *FAST, "--tasks", "wnli", "--seeds", "1",
        )  # fmt: skip
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model(monkeypatch, glue_data, model_folder, tiny_config, tmp_path):
    tiny_config.vocab_size = 50
    CrammedBertForMaskedLM(tiny_config).save_pretrained(model_folder)
    with pytest.raises(GlueError, match=r"gives token \d+, but its model has embeddings for 50 only"):
        run(
            monkeypatch, "--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", tmp_path / "out",
            *FAST, "--tasks", "wnli", "--seeds", "1",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: lower --per_device_train_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 GB"), "out of memory: lower --per_device_train"),
        (OSError(28, "No space left on device", "out/x"), "out/x: No space left on device"),
        (ModuleNotFoundError("No module named 'einops'"), "No module named 'einops'"),
    ],
)
def test_faults_of_the_machine_are_one_line(monkeypatch, glue_data, model_folder, tmp_path, fault, message):
    def fail(*arguments, **options):
        raise fault

    monkeypatch.setattr("transformers.Trainer.train", fail)
    arguments = fast_arguments(model_folder, glue_data, tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *map(str, arguments), "--tasks", "wnli", "--seeds", "1"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "run_glue.py"), run_name="__main__")
    assert str(caught.value.code).startswith(f"run_glue.py: error: {message}")
    assert "\n" not in str(caught.value.code)


def test_ctrl_c_keeps_the_finished_pairs(monkeypatch, capsys, glue_data, model_folder, tmp_path):
    train, trainings = Trainer.train, []

    def interrupted(trainer, *arguments, **options):
        trainings.append(trainer)
        if len(trainings) == 2:
            raise KeyboardInterrupt
        return train(trainer, *arguments, **options)

    monkeypatch.setattr(Trainer, "train", interrupted)
    arguments = fast_arguments(model_folder, glue_data, tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *map(str, arguments), "--tasks", "wnli", "--seeds", "3"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "run_glue.py"), run_name="__main__")
    assert caught.value.code == 130
    assert capsys.readouterr().err.endswith(
        "run_glue.py: stopped; finished pairs are kept: the same command goes on with the others\n"
    )
    assert len((tmp_path / "out" / "glue_runs.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("told", "expected"),
    [([], "eager"), (["--torch_compile", "false"], "no"), (["--torch_compile_backend", "aot_eager"], "aot_eager")],
)
def test_the_launchers_compiling_counts_unless_told(monkeypatch, glue_data, model_folder, tmp_path, told, expected):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    backends = []
    monkeypatch.setattr(GlueRun, "run", lambda run, args, *_, **__: backends.append(args.torch_compile_backend))
    monkeypatch.setattr(GlueRun, "write", lambda *_: None)
    monkeypatch.setattr(run_glue, "results_table", lambda *_: "")
    run(monkeypatch, *fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "wnli", *told)
    assert backends == [expected]


def test_compiling_without_a_compiler_is_one_line(monkeypatch, model_folder):
    monkeypatch.setattr("hf_cram.hardware_choices.can_compile", lambda device: False)
    with pytest.raises(ValueError, match="^torch_compile: .*compiler"):
        run(monkeypatch, "--model_name_or_path", model_folder, "--torch_compile", "true")


def test_code_that_comes_with_a_checkpoint_is_run_where_so_told(monkeypatch, glue_data, model_folder, tmp_path):
    (model_folder / "configuration_foreign.py").write_text("")
    edit_json(
        model_folder / "config.json", model_type="foreign", auto_map={"AutoConfig": "configuration_foreign.Foreign"}
    )
    with pytest.raises(GlueError, match="pass --trust_remote_code if you trust it") as caught:
        run(monkeypatch, *fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "wnli", "--seeds", "1")
    assert "\n" not in str(caught.value)


def test_a_length_that_the_model_does_not_take_is_said(monkeypatch, caplog, glue_data, model_folder, tmp_path):
    arguments = [*fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "wnli", "--seeds", "1"]
    run(monkeypatch, *arguments, "--max_seq_length", "1024")
    assert "max_seq_length 1024 is more than model takes: examples are cut at 64" in caplog.text
    assert results_of(tmp_path / "out")["setting"]["max_seq_length"] == 64


@pytest.mark.parametrize("asked_for", [True, False])
def test_logs_within_a_task_are_printed_where_asked_for(
    monkeypatch, capsys, glue_data, model_folder, tmp_path, asked_for
):
    arguments = [*fast_arguments(model_folder, glue_data, tmp_path), "--tasks", "wnli", "--seeds", "1"]
    run(monkeypatch, *arguments, *(["--logging_strategy", "steps", "--logging_steps", "1"] if asked_for else []))
    assert ("'loss'" in capsys.readouterr().out) is asked_for


def test_glue_of_the_hub_is_the_default(monkeypatch, glue_data, tmp_path):
    """A folder of the data set's name stands for it: the card names what `datasets` reads of the Hub."""
    folder = tmp_path / "nyu-mll" / "glue"
    shutil.copytree(glue_data, folder)
    parts = [{"config_name": task, "data_dir": task} for task in ("sst2", "wnli")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(parts)}\n---\n")
    monkeypatch.chdir(tmp_path)
    for task in ("sst2", "wnli"):
        assert load_glue_task(TASKS[task]).train.to_dict() == load_glue_task(TASKS[task], str(folder)).train.to_dict()


@pytest.mark.parametrize(
    "error", [httpx2.ProxyError("refused"), httpx2.RemoteProtocolError("cut")], ids=["proxy", "cut"]
)
def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("hf_cram.glue_data.load_dataset", fail)
    with pytest.raises(GlueError, match=r"nyu-mll/glue \(sst2\) cannot be loaded: .*--glue_data"):
        load_glue_task(TASKS["sst2"])


def test_lines_of_the_log_that_are_no_results_are_passed_over(monkeypatch, glue_data, model_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "glue_runs.jsonl").write_bytes(b'\xff\n[1]\n3\n{"task": "wnli"}\n')
    arguments = ["--model_name_or_path", model_folder, "--glue_data", glue_data, "--output_dir", out, *FAST]
    run(monkeypatch, *arguments, "--tasks", "wnli", "--seeds", "1")
    assert results_of(out)["seeds"] == [1]


# ---- Settings of the fine-tuning ----


def test_pairs_told_apart_in_training_are_told_apart_in_a_pipeline(monkeypatch, model_folder, tokenizer, tmp_path):
    texts, labels = sentences(48, 0)
    rows = {"first": texts, "second": texts[::-1], "label": labels}
    datasets.Dataset.from_dict(rows).to_csv(tmp_path / "pairs.csv")
    files = ["--train_file", tmp_path / "pairs.csv", "--validation_file", tmp_path / "pairs.csv"]
    first, second = tmp_path / "first", tmp_path / "second"
    run(
        monkeypatch, "--model_name_or_path", model_folder, *files, "--output_dir", first, *FAST, "--seeds", "1",
        "--pooling", "segments",
    )  # fmt: skip
    # A checkpoint that pools so of itself.
    run(
        monkeypatch, "--model_name_or_path", first / "pairs", *files, "--output_dir", second, *FAST, "--seeds", "1",
    )  # fmt: skip
    inputs = tokenizer(texts[0], texts[-1], return_token_type_ids=True, return_tensors="pt")
    for folder in (first / "pairs", second / "pairs"):
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            told_apart, blind = model(**inputs).logits[0], model(inputs["input_ids"]).logits[0]
        assert not torch.allclose(told_apart, blind, atol=1e-3)
        classify = pipeline("text-classification", model=str(folder), function_to_apply="none", top_k=None)
        scores = {score["label"]: score["score"] for score in classify({"text": texts[0], "text_pair": texts[-1]})}
        assert [scores["0"], scores["1"]] == pytest.approx(told_apart.tolist(), abs=1e-5)


def test_padding_stays_within_the_positions(monkeypatch, tiny_config, tokenizer, tmp_path):
    tiny_config.max_position_embeddings, tiny_config.position_embedding_type = 60, "learned"
    folder = tmp_path / "model"
    CrammedBertForMaskedLM(tiny_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    datasets.Dataset.from_dict({"text": ["w1 " * 99, "w2 " * 99], "label": [0, 1]}).to_csv(tmp_path / "long.csv")
    files = ["--train_file", tmp_path / "long.csv", "--validation_file", tmp_path / "long.csv"]
    run(monkeypatch, "--model_name_or_path", folder, *files, "--output_dir", tmp_path / "out", *FAST, "--seeds", "1")
    assert "accuracy" in results_of(tmp_path / "out")["tasks"]["long"]


def test_another_commit_on_the_hub_is_another_encoder(monkeypatch, tmp_path, model_folder):
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--crammed"
    (repository / "refs").mkdir(parents=True)

    def fingerprint_at(commit):
        shutil.copytree(model_folder, repository / "snapshots" / commit, dirs_exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return fingerprint(EncoderArguments("me/crammed"))

    first, second = fingerprint_at(40 * "a"), fingerprint_at(40 * "b")
    assert first != second
    assert first == fingerprint_at(40 * "a")
    assert fingerprint(EncoderArguments("me/crammed", 40 * "b")) == second


def test_a_model_that_changes_on_the_hub_stays_the_one_of_its_scores(monkeypatch, tmp_path, model_folder, glue_data):
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--crammed"
    for commit in ("a", "b"):
        shutil.copytree(model_folder, repository / "snapshots" / (40 * commit))
    weights = load_file(model_folder / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()},
        repository / "snapshots" / (40 * "b") / "model.safetensors",
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(40 * "a")
    (repository / "snapshots" / (40 * "b") / "adapter_config.json").write_text("{}")
    assert pin(EncoderArguments("me/crammed", 40 * "b")).model_revision == 40 * "b"
    (repository / "refs" / "main").write_text(40 * "b")
    assert pin(EncoderArguments("me/crammed")).model_revision is None  # the commits of its base model are others
    (repository / "snapshots" / (40 * "b") / "adapter_config.json").unlink()
    (repository / "refs" / "main").write_text(40 * "a")
    run_a, _ = prepared("me/crammed", tmp_path, glue_data=str(glue_data), tasks="sst2")
    (repository / "refs" / "main").write_text(40 * "b")
    run_b, _ = prepared("me/crammed", tmp_path / "b", glue_data=str(glue_data), tasks="sst2")
    assert run_a.encoder_id != run_b.encoder_id
    name = "model.embeddings.word_embeddings.weight"
    for scored, expected in ((run_a, weights[name]), (run_b, weights[name] + 1)):
        model = build_classifier(scored.encoder, scored.data["sst2"])
        assert torch.equal(model.state_dict()[name], expected)


def test_a_model_whose_files_change_while_it_is_scored_is_an_error(glue_data, model_folder, tmp_path):
    started, args = prepared(model_folder, tmp_path, glue_data=str(glue_data), tasks="wnli")
    weights = load_file(model_folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, model_folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: it has changed since this run began"):
        started.run(args, [1])
    assert (
        not (tmp_path / "out" / "glue_runs.jsonl").exists() or not (tmp_path / "out" / "glue_runs.jsonl").read_text()
    )


def test_training_on_a_part_is_said_wherever_the_scores_are(monkeypatch, capsys, glue_data, model_folder):
    (model_folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    run(
        monkeypatch, "--model_name_or_path", model_folder, "--glue_data", glue_data, *FAST, "--tasks", "stsb",
        "--seeds", "1", "--max_train_samples", "20",
    )  # fmt: skip
    note = "at most 20 training examples a task"
    assert note in capsys.readouterr().out
    assert note in (model_folder / "README.md").read_text()
    assert note in (model_folder / ".eval_results" / "glue.yaml").read_text()
    assert note in markdown_table([load_run(model_folder)])


def test_learning_rates_by_depth(tiny_config, tmp_path):
    model = AutoModelForSequenceClassification.from_config(tiny_config)
    args = FineTuningArguments(
        str(tmp_path), learning_rate=1e-3, layer_lr_decay=0.5, head_lr_multiplier=4.0, embedding_lr_multiplier=8.0
    )
    groups = parameter_groups(model, args)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {
        names[parameter]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]
    }
    assert set(rates) == set(names.values())
    assert rates["classifier.out_proj.weight"] == (4e-3, 0.01)
    assert rates["classifier.dense.bias"] == (4e-3, 0.0)
    assert rates["model.final_norm.weight"] == (1e-3, 0.0)
    assert rates["model.layers.1.mlp.dense_in.weight"] == (1e-3, 0.01)
    assert rates["model.layers.0.mlp.dense_in.weight"] == (0.5e-3, 0.01)
    assert rates["model.embeddings.word_embeddings.weight"] == (2e-3, 0.01)


def test_dropout_reaches_every_field(tiny_config):
    set_dropout(tiny_config, 0.3)
    assert tiny_config.hidden_dropout_prob == tiny_config.attention_probs_dropout_prob == 0.3
    assert tiny_config.embedding_dropout_prob == tiny_config.classifier_dropout == 0.3
    bert = BertConfig()
    set_dropout(bert, 0.3)
    assert bert.hidden_dropout_prob == 0.3
    assert bert.classifier_dropout is None  # follows hidden_dropout_prob


def test_other_weights_are_another_encoder(model_folder, tiny_config):
    encoder = EncoderArguments(str(model_folder))
    before = fingerprint(encoder)
    assert before == fingerprint(EncoderArguments(str(model_folder)))
    torch.manual_seed(1)
    CrammedBertForMaskedLM(tiny_config).save_pretrained(model_folder)
    assert fingerprint(encoder) != before


@pytest.mark.slow
def test_a_killed_run_loses_the_pair_it_was_in_alone(python_environment, glue_data, model_folder, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, REPOSITORY / "run_glue.py", "--model_name_or_path", model_folder, "--glue_data", glue_data,
        "--output_dir", out, *FAST, "--tasks", "sst2", "--seeds", "6",
    ]  # fmt: skip
    log = out / "glue_runs.jsonl"
    process = subprocess.Popen([*map(str, command)], env=python_environment, stderr=subprocess.DEVNULL)
    while not log.exists() or log.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = log.read_text().splitlines()[:2]
    assert not (out / "glue_results.json").exists()
    subprocess.run([*map(str, command)], env=python_environment, check=True, capture_output=True)
    assert log.read_text().splitlines()[:2] == kept
    assert results_of(out)["seeds"] == [1, 2, 3, 4, 5, 6]
    killed = results_of(out)["tasks"]
    subprocess.run(
        [*map(str, command), "--output_dir", str(tmp_path / "whole")],
        env=python_environment, check=True, capture_output=True,
    )  # fmt: skip
    assert results_of(tmp_path / "whole")["tasks"] == killed


@pytest.mark.slow
def test_two_processes_share_the_work(python_environment, glue_data, model_folder, tmp_path):
    out = tmp_path / "out"
    environment = {**python_environment, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
            REPOSITORY / "run_glue.py", "--model_name_or_path", model_folder, "--glue_data", glue_data,
            "--output_dir", out, *FAST, "--tasks", "sst2", "--seeds", "1",
        ],
        env=environment, check=True,
    )  # fmt: skip
    assert results_of(out)["setting"]["world_size"] == 2
    assert len((out / "glue_runs.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "glue").is_dir(), reason="the real GLUE tasks are not beside this project")
def test_real_tasks_are_read(monkeypatch, model_folder, tmp_path):
    monkeypatch.setattr("hf_cram.glue_encoding.UNREAD_REFUSED", 1.0)  # of these words the tokenizer knows none
    out = tmp_path / "out"
    run(
        monkeypatch, "--model_name_or_path", model_folder, "--glue_data", SHARED / "data" / "glue", "--output_dir", out,
        *FAST, "--num_train_epochs", "1", "--seeds", "1", "--max_train_samples", "64",
    )  # fmt: skip
    assert set(results_of(out)["tasks"]) == {"cola", "sst2", "mrpc", "stsb", "rte", "wnli"}
    assert os.path.exists(out / "glue_submission.zip")
