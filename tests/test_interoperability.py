"""A checkpoint of ours in other people's hands: without this package, in pipelines, as embeddings, as ONNX."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, VOCAB_SIZE, Rows
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    pipeline,
    set_seed,
)

from hf_cram import CrammedBertConfig, CrammedBertForMaskedLM, CrammedBertForSequenceClassification
from hf_cram.data.collator import DataCollatorForFixedCountMasking
from hf_cram.embedding_initialization import neighbour_tables
from hf_cram.trainer import CramTrainer
from hf_cram.training_args import CramTrainingArguments

AUTO_CLASSES = (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMultipleChoice,
    AutoModelForTextEncoding,
)
SENTENCES = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8", "w50"]

# Named sitecustomize.py, Python runs it before anything else, and whatever is installed, `import hf_cram` fails.
HIDE_THE_PACKAGE = """
import sys


class HiddenPackage:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "hf_cram":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, HiddenPackage)
"""


def make_config(**fields):
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "neighbour_table_size": 16,
        "mask_token_id": 4,
        "classifier_hidden_size": 24,
        "initializer_range": 0.2,
    }
    return CrammedBertConfig(**{**sizes, **fields})


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def crammed(tokenizer, tmp_path_factory):
    """The folder of a short run: its last model, and an intermediate one in checkpoint-2."""
    folder = tmp_path_factory.mktemp("crammed") / "model"
    set_seed(0)
    arguments = CramTrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_interval="50%",
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        embeddings_from_text=True,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        torch_compile=False,
        use_cpu=True,
    )
    trainer = CramTrainer(
        CrammedBertForMaskedLM(make_config(neighbour_table_entries=500)),
        arguments,
        train_dataset=Rows(32),
        data_collator=DataCollatorForFixedCountMasking(tokenizer, 0.25),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def environment_without_hf_cram(python_environment, tmp_path):
    """Environment of a process in which hf_cram cannot be imported, with caches of its own."""
    hiding = tmp_path / "hiding"
    hiding.mkdir()
    (hiding / "sitecustomize.py").write_text(HIDE_THE_PACKAGE)
    path = os.pathsep.join([str(hiding), python_environment["PYTHONPATH"]])
    return {**python_environment, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "home")}


def run(command, environment, folder):
    """Run Python with `command` in `folder`; fails with what it wrote, returns its standard output."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def example_ids():
    """Token ids (4, 12) without special tokens."""
    return torch.randint(5, VOCAB_SIZE, (4, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["model", "checkpoint-2"])
def test_every_auto_class_loads_a_crammed_checkpoint_into_our_classes(crammed, name):
    folder = crammed if name == "model" else crammed / name
    body = CrammedBertForMaskedLM.from_pretrained(folder).model.state_dict()
    for auto_class in AUTO_CLASSES:
        model = auto_class.from_pretrained(folder)
        assert type(model).__module__ == "hf_cram.modeling_crammed_bert"
        for key, tensor in model.base_model.state_dict().items():
            assert torch.equal(tensor, body[key]), (auto_class, key)
    assert sorted(path.name for path in folder.glob("*.py")) == [
        "configuration_crammed_bert.py",
        "modeling_crammed_bert.py",
    ]


WITHOUT_THE_PACKAGE = """
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainingArguments, pipeline

try:
    import hf_cram
except ModuleNotFoundError:
    print("hf_cram is not here")

crammed, output = Path(sys.argv[1]), Path(sys.argv[2])
expected = load_file(output / "expected.safetensors")
input_ids = expected["input_ids"]
REMOTE = {"trust_remote_code": True}
TARGETS = {
    "AutoModelForPreTraining": {"labels": input_ids},
    "AutoModelForMaskedLM": {"labels": input_ids},
    "AutoModelForSequenceClassification": {"labels": input_ids[:, 0] % 2},
    "AutoModelForTokenClassification": {"labels": input_ids % 2},
    "AutoModelForQuestionAnswering": {"start_positions": input_ids[:, 0] % 5, "end_positions": input_ids[:, 1] % 9},
    "AutoModelForMultipleChoice": {"labels": input_ids[:, 0] % 3},
}


def load(name, folder, **options):
    model = getattr(transformers, name).from_pretrained(folder, **REMOTE, **options).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model


def inputs_of(name):
    return input_ids.unsqueeze(1).repeat(1, 3, 1) if name == "AutoModelForMultipleChoice" else input_ids


@torch.no_grad()
def outputs_of(name, model):
    return [tensor.clone() for tensor in model.eval()(inputs_of(name)).to_tuple()]


def train_one_step(name, model, folder):
    columns = {"input_ids": inputs_of(name), **TARGETS[name]}
    rows = [{key: column[index] for key, column in columns.items()} for index in range(len(input_ids))]
    arguments = TrainingArguments(
        str(folder), max_steps=1, save_steps=1, learning_rate=0.1, report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=len(rows),
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()


try:
    transformers.AutoModel.from_pretrained(crammed)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
    print("\\nasks before it runs code")

for place, folder in (("final", crammed), ("intermediate", crammed / "checkpoint-2")):
    for name in ("AutoModel", "AutoModelForMaskedLM"):
        assert torch.equal(outputs_of(name, load(name, folder))[0], expected[f"{place} {name}"]), (place, name)
    print(place, "outputs are equal bit for bit")

whole_map = json.loads((crammed / "config.json").read_text())["auto_map"]
for name in sorted(whole_map):
    if name == "AutoConfig":
        continue
    for place, folder in (("final", crammed), ("intermediate", crammed / "checkpoint-2")):
        model = load(name, folder)
        before = outputs_of(name, model)
        tuned = output / place / name
        states = [tuned]
        if name in TARGETS and place == "final":
            train_one_step(name, model, tuned)
            states.append(tuned / "checkpoint-1")
            assert not torch.equal(outputs_of(name, model)[0], before[0]), name
        else:
            model.save_pretrained(tuned)
        for state in states:
            assert json.loads((state / "config.json").read_text())["auto_map"] == whole_map, state
            assert len(list(state.glob("*.py"))) == 2, state
            again = outputs_of(name, load(name, state))
            for first, second in zip(outputs_of(name, model), again, strict=True):
                assert torch.equal(first, second), state
    print(name, "comes back")

classifier = output / "final" / "AutoModelForSequenceClassification"
tuned_body = load("AutoModel", classifier)
for name in sorted(TARGETS):  # a fine-tuned state is itself a start for every other head
    for key, tensor in load(name, classifier, ignore_mismatched_sizes=True).base_model.state_dict().items():
        assert torch.equal(tensor, tuned_body.state_dict()[key]), (name, key)
print("one head's state starts another")

AutoTokenizer.from_pretrained(crammed, **REMOTE).save_pretrained(classifier)
best = pipeline("fill-mask", model=str(crammed), device="cpu", **REMOTE)("w1 w2 [MASK] w4")[0]
assert best["token"] == expected["filled"].item(), best
scores = pipeline("text-classification", model=str(classifier), device="cpu", **REMOTE)("w1 w2", top_k=None)
assert {score["label"] for score in scores} == {"LABEL_0", "LABEL_1"}
features = pipeline("feature-extraction", model=str(crammed), device="cpu", **REMOTE)("w1 w2 w3")
assert torch.tensor(features).shape == (1, 3, 32)
print("pipelines run")
"""


def test_a_checkpoint_lives_on_where_the_package_is_not_installed(crammed, environment_without_hf_cram, tmp_path):
    """Loaded, trained by the library's Trainer, saved and loaded again as every head, with the code it carries."""
    tensors = {"input_ids": example_ids()}
    with torch.no_grad():
        for place, folder in (("final", crammed), ("intermediate", crammed / "checkpoint-2")):
            for auto_class in (AutoModel, AutoModelForMaskedLM):
                outputs = auto_class.from_pretrained(folder).eval()(tensors["input_ids"])
                tensors[f"{place} {auto_class.__name__}"] = outputs[0].contiguous()
    tensors["filled"] = torch.tensor(pipeline("fill-mask", model=str(crammed))("w1 w2 [MASK] w4")[0]["token"])
    save_file(tensors, tmp_path / "expected.safetensors")
    assert not torch.equal(tensors["final AutoModel"], tensors["intermediate AutoModel"])

    printed = run(["-c", WITHOUT_THE_PACKAGE, crammed, tmp_path], environment_without_hf_cram, tmp_path)
    names = {auto_class.__name__ for auto_class in AUTO_CLASSES}
    assert set(printed.splitlines()) >= {
        "hf_cram is not here",
        "asks before it runs code",
        "final outputs are equal bit for bit",
        "intermediate outputs are equal bit for bit",
        *(f"{name} comes back" for name in names),
        "one head's state starts another",
        "pipelines run",
    }


def test_pipelines_give_what_the_model_computes(crammed, tokenizer, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(crammed).eval()
    encoded = tokenizer("w1 w2 [MASK] w4", return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**encoded).logits[0, 2].softmax(-1)
        hidden_states = model.model(**encoded).last_hidden_state
    filled = pipeline("fill-mask", model=str(crammed), top_k=3)("w1 w2 [MASK] w4")
    assert [fill["token"] for fill in filled] == probabilities.topk(3).indices.tolist()
    assert [fill["score"] for fill in filled] == pytest.approx(probabilities.topk(3).values.tolist())
    features = pipeline("feature-extraction", model=str(crammed))("w1 w2 [MASK] w4")
    torch.testing.assert_close(torch.tensor(features), hidden_states)

    labels = {0: "dull", 1: "fine", 2: "odd"}
    classifier = AutoModelForSequenceClassification.from_pretrained(crammed, id2label=labels).eval()
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-classification", model=str(tmp_path), top_k=None)
    # The sentences go through the model in one padded batch.
    for sentence, scores in zip(SENTENCES, pipe(SENTENCES, batch_size=3, padding=True), strict=True):
        with torch.no_grad():
            expected = classifier(**tokenizer(sentence, return_tensors="pt")).logits[0].softmax(-1)
        by_label = {score["label"]: score["score"] for score in scores}
        assert [by_label[labels[index]] for index in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)


def needs(*packages):
    """Skip a test where an optional package of the test extra is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"optional package not installed: {', '.join(missing)}")


def mean_of_kept_tokens(model, tokenizer, sentences):
    """Mean of the last hidden states over the tokens that are not padding, sentence by sentence, (sentences, H)."""
    rows = []
    for sentence in sentences:
        with torch.no_grad():
            hidden_states = model.eval()(tokenizer(sentence, return_tensors="pt").input_ids).last_hidden_state
        rows.append(hidden_states[0].mean(0))
    return torch.stack(rows)


@needs("sentence_transformers")
def test_sentence_transformers_average_the_tokens_of_each_sentence(crammed, tokenizer, tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(crammed), device="cpu")
    assert encoder[1].pooling_mode == "mean"
    embeddings = encoder.encode(SENTENCES, convert_to_tensor=True)
    expected = mean_of_kept_tokens(AutoModel.from_pretrained(crammed), tokenizer, SENTENCES)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)
    encoder.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(again.encode(SENTENCES, convert_to_tensor=True), embeddings)


EMBED_WITHOUT_THE_PACKAGE = """
import sys

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

crammed, output, *sentences = sys.argv[1:]
encoder = SentenceTransformer(crammed, device="cpu", trust_remote_code=True)
embeddings = encoder.encode(sentences, convert_to_tensor=True)
torch.testing.assert_close(embeddings, load_file(output + "/expected.safetensors")["embeddings"], rtol=0, atol=1e-5)
encoder.save(output + "/saved")
again = SentenceTransformer(output + "/saved", device="cpu", trust_remote_code=True)
assert torch.equal(again.encode(sentences, convert_to_tensor=True), embeddings)
assert "hf_cram" not in sys.modules
print("equal")
"""


@pytest.mark.slow
@needs("sentence_transformers")
def test_sentence_transformers_without_the_package(crammed, tokenizer, environment_without_hf_cram, tmp_path):
    expected = mean_of_kept_tokens(AutoModel.from_pretrained(crammed), tokenizer, SENTENCES)
    save_file({"embeddings": expected}, tmp_path / "expected.safetensors")
    command = ["-c", EMBED_WITHOUT_THE_PACKAGE, crammed, tmp_path, *SENTENCES]
    assert run(command, environment_without_hf_cram, tmp_path).split() == ["equal"]


def padded_batch(rows, length):
    """Token ids and attention mask, both (rows, length); every row but the last ends in padding."""
    input_ids = torch.randint(5, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    kept = torch.tensor([length - (rows - 1 - row) * length // (rows + 1) for row in range(rows)])
    attention_mask = (torch.arange(length) < kept.unsqueeze(1)).long()
    return input_ids * attention_mask, attention_mask


def export_to_onnx(model, path):
    """Write `model` with free batch and length axes, from one unpadded example."""
    axes = {0: "batch", 1: "length"}
    input_ids = torch.randint(5, VOCAB_SIZE, (2, 9))
    torch.onnx.export(
        model,
        kwargs={"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)},
        f=str(path),
        dynamo=True,
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        verbose=False,
    )


ONNX_CASES = [
    (CrammedBertForMaskedLM, {}),
    (CrammedBertForSequenceClassification, {"position_embedding_type": "rotary", "classifier_pooling": "mean"}),
    (CrammedBertForMaskedLM, {"position_embedding_type": "rotary", "neighbour_table_entries": 500}),
    (CrammedBertForSequenceClassification, {}),
    (CrammedBertForMaskedLM, {"position_embedding_type": "learned", "prediction_head": True, "norm_scheme": "post"}),
    (CrammedBertForSequenceClassification, {"norm_type": "rms_norm", "gated_linear_unit": False}),
]


@needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("model_class", "fields"),
    [*ONNX_CASES[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in ONNX_CASES[2:])],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value.__name__,
)
def test_onnx_gives_the_same_logits_for_any_batch_and_length(model_class, fields, tmp_path):
    import onnxruntime

    set_seed(0)
    model = model_class(make_config(**fields))
    for module in neighbour_tables(model):
        module.table.random_(-127, 128)
    model.save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path).eval()
    export_to_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for rows, length in ((1, 1), (1, 30), (3, 9), (5, 64)):
        input_ids, attention_mask = padded_batch(rows, length)
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        logits = torch.from_numpy(session.run(["logits"], feed)[0])
        with torch.no_grad():
            expected = model(input_ids=input_ids, attention_mask=attention_mask).logits
        assert logits.shape == expected.shape
        kept = attention_mask.bool() if logits.ndim == 3 else slice(None)
        torch.testing.assert_close(logits[kept], expected[kept], rtol=0, atol=1e-4)


ACCURACY_METRIC = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(map(int.__eq__, predictions, references)) / len(references)}
"""


def write_sentence_pairs(folder):
    """GLUE's MRPC and STS-B in small: the label follows from the words."""
    labels = {"mrpc": ClassLabel(names=["not_equivalent", "equivalent"]), "stsb": Value("float32")}
    for task, kind in labels.items():
        features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": kind})
        for split, rows in (("train", 64), ("validation", 24), ("test", 16)):
            words = torch.randint(0, 90, (rows, 3), generator=torch.Generator().manual_seed(rows)).tolist()
            columns = {
                "sentence1": [f"w{a} w{b} w{c}" for a, b, c in words],
                "sentence2": [f"w{c} w{a}" for a, b, c in words],
                "label": [a % 2 if task == "mrpc" else 5 * a / 90 for a, b, c in words],
            }
            (folder / task).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(columns, features=features).to_parquet(folder / task / f"{split}-00000-of-00001.parquet")
    configs = [
        {
            "config_name": task,
            "data_files": [{"split": split, "path": f"{task}/{split}-*"} for split in ("train", "validation", "test")],
        }
        for task in labels
    ]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")


@pytest.fixture
def example_folder(tmp_path):
    """A working directory in which the scripts find data and metrics by the names that they have on the Hub."""
    write_sentence_pairs(tmp_path / "nyu-mll" / "glue")
    metrics = {"glue": (REPOSITORY / "hf_cram" / "glue_metric.py").read_text(), "accuracy": ACCURACY_METRIC}
    for name, text in metrics.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(text)
    lines = Rows(400, length=20).rows - 5
    (tmp_path / "text.txt").write_text("\n".join(" ".join(f"w{word}" for word in line) for line in lines))
    return tmp_path


def example_script(name):
    """Path of one of transformers' own example scripts below the folder that HF_EXAMPLES names."""
    if "HF_EXAMPLES" not in os.environ:
        pytest.skip("set HF_EXAMPLES to a folder with transformers' examples: its wheel does not hold them")
    return min(Path(os.environ["HF_EXAMPLES"]).resolve().rglob(name))


def assert_loads_again(folder, auto_class, start):
    """The script left a checkpoint with code and map, whose weights are no longer those of `start`."""
    assert json.loads((folder / "config.json").read_text())["auto_map"] == CrammedBertConfig().auto_map
    assert len(list(folder.glob("*.py"))) == 2
    trained, before = auto_class.from_pretrained(folder).base_model, AutoModel.from_pretrained(start)
    weights = [model.layers[0].mlp.dense_in.weight for model in (trained, before)]
    assert not torch.equal(*weights)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "scores"), [("mrpc", {"eval_accuracy", "eval_f1"}), ("stsb", {"eval_pearson"})])
def test_the_librarys_glue_script_runs_unmodified(crammed, environment_without_hf_cram, example_folder, task, scores):
    script = example_script("run_glue.py")
    options = (
        f"--model_name_or_path {crammed} --trust_remote_code --task_name {task} --do_train --do_eval --do_predict "
        "--max_seq_length 16 --max_steps 8 --learning_rate 1e-3 --save_steps 4 --output_dir out --report_to none"
    )
    run([script, *options.split()], environment_without_hf_cram, example_folder)
    out = example_folder / "out"
    results = json.loads((out / "eval_results.json").read_text())
    assert scores <= set(results)
    assert len((out / f"predict_results_{task}.txt").read_text().splitlines()) == 1 + 16
    assert_loads_again(out, AutoModelForSequenceClassification, crammed)
    assert_loads_again(out / "checkpoint-4", AutoModelForSequenceClassification, crammed)


@pytest.mark.slow
def test_the_librarys_masked_lm_script_runs_unmodified(crammed, environment_without_hf_cram, example_folder):
    script = example_script("run_mlm.py")
    options = (
        f"--model_name_or_path {crammed} --trust_remote_code --train_file text.txt --validation_split_percentage 20 "
        "--max_seq_length 32 --do_train --do_eval --max_steps 8 --learning_rate 1e-3 --output_dir out --report_to none"
    )
    run([script, *options.split()], environment_without_hf_cram, example_folder)
    results = json.loads((example_folder / "out" / "eval_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1
    assert results["perplexity"] > 1
    assert_loads_again(example_folder / "out", AutoModelForMaskedLM, crammed)
