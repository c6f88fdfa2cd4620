"""The paper's checkpoint format into ours and back: against a plain reference, the authors' own file, and damage."""

import json
import logging
import runpy
import sys
import zipfile

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_cram import (
    CrammedBertConfig,
    CrammedBertForMaskedLM,
    CrammedBertForSequenceClassification,
    CrammedBertForTokenClassification,
    convert_cramming_checkpoint,
)
from hf_cram.convert_cramming_checkpoint import ConversionError, convert, flatten, main

VOCABULARY, HIDDEN, HEADS, INNER, LAYERS, LENGTH, POOLED = 37, 16, 4, 24, 2, 12, 10
ACTIVATIONS = {"GELU": nn.functional.gelu, "ReLU": torch.relu, "SiLU": nn.functional.silu, "Tanh": torch.tanh}


def paper_config(changes=()):
    """A tiny `config.json` in the paper's format; `changes` are (dotted key under arch, value)."""
    arch = {
        "architectures": ["ScriptableCrammedBERT"],
        "attention": {
            "causal_attention": False,
            "dropout_prob": 0.1,
            "num_attention_heads": HEADS,
            "qkv_bias": False,
            "rotary_embedding": False,
            "seq_op_in_fp32": False,
            "sequence_op": "torch-softmax",
            "skip_output_projection": False,
            "type": "self-attention",
        },
        "classification_head": {
            "classifier_dropout": 0.1,
            "head_dim": POOLED,
            "include_ff_layer": True,
            "nonlin": "Tanh",
            "pooler": "zero_index",
        },
        "decoder_bias": False,
        "embedding": {
            "dropout_prob": 0.1,
            "embedding_dim": HIDDEN,
            "max_seq_length": LENGTH,
            "normalization": True,
            "pad_token_id": 0,
            "pos_embedding": "scaled-sinusoidal",
            "stable_low_precision": False,
            "vocab_size": VOCABULARY,
        },
        "ffn_layer_frequency": 1,
        "final_norm": True,
        "hidden_dropout_prob": 0.1,
        "hidden_size": HIDDEN,
        "init": {"std": 0.02, "type": "normal"},
        "intermed_size": INNER,
        "loss": "cross-entropy",
        "nonlin": "GELUglu",
        "norm": "LayerNorm",
        "norm_eps": 1e-12,
        "norm_scheme": "pre",
        "num_labels": None,
        "num_transformer_layers": LAYERS,
        "objective_layout": "MLM",
        "skip_head_transform": True,
        "sparse_prediction": 0.25,
        "tie_weights": True,
        "use_bias": False,
    }
    for key, value in dict(changes).items():
        *outer, last = key.split(".")
        inner = arch
        for name in outer:
            inner = inner[name]
        inner[last] = value
    head = "PreTraining" if arch["num_labels"] is None else "SequenceClassification"
    return {
        "arch": arch,
        "architectures": [f"ScriptableLMFor{head}"],
        "model_type": "crammedBERT",
        "torch_dtype": "float32",
    }


def paper_tensors(arch):
    """Random tensors under the names and in the shapes of the paper's state dict."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def linear(name, rows, columns, bias):
        tensors[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        if bias:
            tensors[f"{name}.bias"] = torch.randn(rows, generator=generator)

    def norm(name):
        scale = 1 + 0.1 * torch.randn(HIDDEN, generator=generator)
        if arch["norm"] == "RMSNorm":
            tensors[f"{name}.learnable_scale"] = scale
        else:
            tensors.update({f"{name}.weight": scale, f"{name}.bias": torch.randn(HIDDEN, generator=generator)})

    linear("encoder.embedding.word_embedding", VOCABULARY, HIDDEN, bias=False)
    positions = "encoder.embedding.pos_embedding"
    if arch["embedding"]["pos_embedding"] == "learned":
        linear(f"{positions}.embedding", LENGTH, HIDDEN, bias=False)
        tensors[f"{positions}.position_ids"] = torch.arange(LENGTH).view(1, LENGTH)
    elif arch["embedding"]["pos_embedding"] == "scaled-sinusoidal":
        tensors[f"{positions}.scale_factor"] = torch.tensor([0.3])
    norm("encoder.embedding.norm")
    for layer in (f"encoder.layers.{index}" for index in range(LAYERS)):
        norm(f"{layer}.norm1")
        norm(f"{layer}.norm2")
        linear(f"{layer}.attn.self_attention.query_key_value", 3 * HIDDEN, HIDDEN, arch["attention"]["qkv_bias"])
        tensors[f"{layer}.attn.self_attention.norm_factor"] = torch.tensor(HIDDEN // HEADS).rsqrt()
        linear(f"{layer}.attn.dense", HIDDEN, HIDDEN, arch["use_bias"])
        linear(f"{layer}.ffn.dense_in", INNER, HIDDEN, arch["use_bias"])
        linear(f"{layer}.ffn.dense_out", HIDDEN, INNER // (1 + arch["nonlin"].endswith("glu")), arch["use_bias"])
    if arch["final_norm"]:
        norm("encoder.final_norm")
    if arch["num_labels"] is not None:
        linear("pooler.dense", POOLED, HIDDEN, bias=True)
        linear("head", arch["num_labels"], POOLED, bias=True)
        return tensors
    if not arch["skip_head_transform"]:
        linear("prediction_head.dense", HIDDEN, HIDDEN, arch["use_bias"])
        norm("prediction_head.norm")
    linear("decoder", VOCABULARY, HIDDEN, arch["decoder_bias"])
    tensors["decoder.weight"] = tensors["encoder.embedding.word_embedding.weight"].clone()
    return tensors


def paper_logits(arch, tensors, input_ids):
    """The paper's model written out plainly, head by head: (B, L) -> (B, L, vocabulary) or (B, labels)."""

    def linear(x, name):
        return nn.functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x, name):
        if arch["norm"] == "RMSNorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt() * tensors[f"{name}.learnable_scale"]
        return nn.functional.layer_norm(x, (HIDDEN,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-12)

    def positions(length):
        kind, prefix = arch["embedding"]["pos_embedding"], "encoder.embedding.pos_embedding"
        if kind == "learned":
            return tensors[f"{prefix}.embedding.weight"][:length]
        table = torch.empty(length, HIDDEN)
        for place in range(length):
            for pair in range(HIDDEN // 2):
                angle = torch.tensor(place / 10000.0 ** (2 * pair / HIDDEN))
                table[place, 2 * pair], table[place, 2 * pair + 1] = angle.sin(), angle.cos()
        return table * (tensors[f"{prefix}.scale_factor"] if kind == "scaled-sinusoidal" else 1)

    def attention(x, name):
        size, contexts = HIDDEN // HEADS, []
        for head in linear(x, f"{name}.self_attention.query_key_value").split(3 * size, dim=-1):
            query, key, value = head.split(size, dim=-1)
            contexts.append((query @ key.transpose(1, 2) * size**-0.5).softmax(-1) @ value)
        return linear(torch.cat(contexts, dim=-1), f"{name}.dense")

    activation = ACTIVATIONS[arch["nonlin"].removesuffix("glu")]

    def feed_forward(x, name):
        inner = linear(x, f"{name}.dense_in")
        if arch["nonlin"].endswith("glu"):
            values, gate = inner.split(INNER // 2, dim=-1)
            return linear(activation(gate) * values, f"{name}.dense_out")
        return linear(activation(inner), f"{name}.dense_out")

    words = tensors["encoder.embedding.word_embedding.weight"][input_ids]
    x = norm(words + positions(input_ids.shape[1]), "encoder.embedding.norm")
    for layer in (f"encoder.layers.{index}" for index in range(LAYERS)):
        x = x + attention(norm(x, f"{layer}.norm1"), f"{layer}.attn")
        x = x + feed_forward(norm(x, f"{layer}.norm2"), f"{layer}.ffn")
    x = norm(x, "encoder.final_norm") if arch["final_norm"] else x
    if arch["num_labels"] is not None:
        pooled = x[:, 0] if arch["classification_head"]["pooler"] == "zero_index" else x.mean(1)
        return linear(linear(pooled, "pooler.dense").tanh(), "head")
    if not arch["skip_head_transform"]:
        x = norm(activation(linear(x, "prediction_head.dense")), "prediction_head.norm")
    return linear(x, "decoder")


def write_paper_checkpoint(folder, values, tensors, name="model.safetensors"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder


@pytest.fixture
def paper_folder(tmp_path):
    values = paper_config()
    return write_paper_checkpoint(tmp_path / "paper", values, paper_tensors(values["arch"]))


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_converts_there_and_back(tmp_path, values, tensors, auto_class):
    source = write_paper_checkpoint(tmp_path / "paper", values, tensors)
    convert(source, tmp_path / "ours")
    model = auto_class.from_pretrained(tmp_path / "ours").eval()
    input_ids = torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids).logits
    torch.testing.assert_close(logits, paper_logits(values["arch"], tensors, input_ids), rtol=0, atol=1e-5)
    assert logits.std() > 0.1  # else the comparison says nothing
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == values


VARIANTS = {
    "the paper's": {},
    "biases": {"use_bias": True, "attention.qkv_bias": True, "decoder_bias": True},
    "head": {"skip_head_transform": False, "use_bias": True, "nonlin": "SiLUglu"},
    "rms": {"norm": "RMSNorm", "skip_head_transform": False},
    "learned": {"embedding.pos_embedding": "learned", "nonlin": "ReLU"},
    "unscaled": {"embedding.pos_embedding": "sinusoidal", "final_norm": False, "embedding.pad_token_id": 3},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_masked_language_models_give_the_papers_logits_and_come_back(tmp_path, changes):
    values = paper_config(changes)
    assert_converts_there_and_back(tmp_path, values, paper_tensors(values["arch"]), AutoModelForMaskedLM)


@pytest.mark.parametrize("pooler", ["zero_index", "avg"])
def test_classifiers_give_the_papers_logits_and_come_back(tmp_path, pooler, caplog):
    values = paper_config({"num_labels": 3, "classification_head.pooler": pooler})
    names = {"0": "no", "1": "maybe", "2": "yes"}
    values |= {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}
    tensors = paper_tensors(values["arch"])
    assert_converts_there_and_back(tmp_path, values, tensors, AutoModelForSequenceClassification)
    config = CrammedBertConfig.from_pretrained(tmp_path / "ours")
    assert config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert caplog.text.count("padded sequences") == (2 if pooler == "avg" else 0)  # there and back


def test_a_regression_comes_back_too(tmp_path):
    values = {**paper_config({"num_labels": 1}), "problem_type": "regression"}
    assert_converts_there_and_back(tmp_path, values, paper_tensors(values["arch"]), AutoModelForSequenceClassification)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.pth"])
@pytest.mark.parametrize("named", [False, True], ids=["folder", "file"])
def test_torch_state_dicts_are_read(tmp_path, paper_folder, name, named):
    tensors = load_file(paper_folder / "model.safetensors")
    tied = {**tensors, "decoder.weight": tensors["encoder.embedding.word_embedding.weight"]}
    folder = write_paper_checkpoint(tmp_path / "torch", paper_config(), tied, name)
    convert(folder / name if named else folder, tmp_path / "ours")
    convert(paper_folder, tmp_path / "expected")
    assert_same_tensors(
        load_file(tmp_path / "ours" / "model.safetensors"), load_file(tmp_path / "expected" / "model.safetensors")
    )


def test_a_tied_decoder_may_be_left_out(tmp_path, paper_folder):
    tensors = load_file(paper_folder / "model.safetensors")
    tensors.pop("decoder.weight")
    convert(write_paper_checkpoint(tmp_path / "once", paper_config(), tensors), tmp_path / "ours")
    model = CrammedBertForMaskedLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(model.decoder.weight, tensors["encoder.embedding.word_embedding.weight"])


def test_half_precision_stays_half_precision(tmp_path, paper_folder):
    tensors = {name: tensor.half() for name, tensor in load_file(paper_folder / "model.safetensors").items()}
    values = {**paper_config(), "torch_dtype": "float16"}
    convert(write_paper_checkpoint(tmp_path / "half", values, tensors), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == values


@pytest.mark.parametrize("model_class", [CrammedBertForMaskedLM, CrammedBertForSequenceClassification])
def test_our_models_come_back_from_the_papers_format(tmp_path, tiny_config, tokenizer, model_class):
    tiny_config.num_labels = 5
    model_class(tiny_config).save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back")
    assert_same_tensors(
        load_file(tmp_path / "back" / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    )
    written, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("back", "ours"))
    if model_class is CrammedBertForMaskedLM:  # whose number of labels means nothing
        expected = {key: value for key, value in expected.items() if key not in ("id2label", "label2id")}
    assert written == expected
    assert (tmp_path / "back" / "modeling_crammed_bert.py").is_file()
    for folder in ("theirs", "back"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder)("w1 w2").input_ids == tokenizer("w1 w2").input_ids


@pytest.mark.parametrize("start", ["ours", "theirs"])
def test_a_damaged_tokenizer_is_not_carried_over(tmp_path, tiny_config, tokenizer, start):
    CrammedBertForMaskedLM(tiny_config).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")  # without a tokenizer
    tokenizer.save_pretrained(tmp_path / start)
    (tmp_path / start / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(ConversionError, match="tokenizer .* cannot be loaded: Unterminated string"):
        convert(tmp_path / start, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_authors_own_checkpoint_gives_its_logits_and_comes_back(tmp_path):
    folder = SHARED / "data" / "cramming_checkpoint"
    if not folder.is_dir():
        pytest.skip("the checkpoint written by the paper's code is not beside this project")
    assert convert(folder, tmp_path / "ours") == "CrammedBertForMaskedLM"
    recorded = load_file(folder / "inputs_and_outputs.safetensors")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        plain = model(recorded["input_ids"], labels=recorded["labels"], output_hidden_states=True)
        masked = model(recorded["input_ids"], attention_mask=recorded["attention_mask"])
    torch.testing.assert_close(plain.hidden_states[-1], recorded["hidden_states"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.logits, recorded["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.loss.view(1), recorded["loss"], rtol=0, atol=1e-5)
    kept = recorded["attention_mask"].bool()
    torch.testing.assert_close(masked.logits[kept], recorded["logits_masked"][kept], rtol=0, atol=1e-5)
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), load_file(folder / "model.safetensors"))
    expected = json.loads((folder / "config.json").read_text())
    del expected["transformers_version"]  # of the program that wrote the file
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.rotary_embedding", True),
        ("attention.causal_attention", True),
        ("attention.type", "flash"),
        ("attention.sequence_op", "cumsum"),
        ("attention.skip_output_projection", True),
        ("embedding.pos_embedding", None),
        ("embedding.embedding_dim", 8),
        ("classification_head.pooler", "max"),
        ("classification_head.include_ff_layer", False),
        ("ffn_layer_frequency", 2),
        ("init.type", "megatron"),
        ("nonlin", "Hardswishglu"),
        ("norm", "ScaleNorm"),
        ("norm_scheme", "post"),
        ("objective_layout", "SCRIPT"),
        ("tie_weights", False),
        ("architectures", ["ScriptableRecurrentBERT"]),
        ("layer_drop_theta", 0.5),  # a key of another of their models
    ],
)
def test_settings_that_our_model_does_not_compute_are_refused_by_name(tmp_path, key, value):
    values = paper_config()
    tensors = paper_tensors(values["arch"])
    folder = write_paper_checkpoint(tmp_path / "paper", paper_config({key: value}), tensors)
    with pytest.raises(ConversionError) as error:
        convert(folder, tmp_path / "ours")
    assert f"config.json: arch.{key} = {value!r}" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["paper"]


@pytest.mark.parametrize("key", ["hidden_size", "attention.num_attention_heads", "nonlin", "norm_scheme"])
def test_missing_settings_are_named(tmp_path, paper_folder, key):
    values = paper_config()
    inner = values["arch"]
    *outer, last = key.split(".")
    for name in outer:
        inner = inner[name]
    del inner[last]
    (paper_folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConversionError, match=rf"config.json: arch\.{key} is missing"):
        convert(paper_folder, tmp_path / "ours")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.num_attention_heads", 0, "num_attention_heads = 0 is not a positive number"),
        ("attention.num_attention_heads", 5, "multiple of num_attention_heads"),
        ("embedding.vocab_size", "many", "vocab_size = 'many'"),
        ("use_bias", "yes", "linear_bias.* expected bool"),
        ("hidden_dropout_prob", 2.0, "dropout probability"),
        ("embedding.pad_token_id", 99, "cannot be built: Padding_idx"),
    ],
)
def test_impossible_settings_are_one_line(tmp_path, paper_folder, key, value, message):
    (paper_folder / "config.json").write_text(json.dumps(paper_config({key: value})))
    with pytest.raises(ConversionError, match=message) as error:
        convert(paper_folder, tmp_path / "ours")
    assert "\n" not in str(error.value)


def test_settings_of_the_training_run_are_reported(tmp_path, paper_folder, caplog):
    convert(paper_folder, tmp_path / "silent")
    assert caplog.text == ""
    (paper_folder / "config.json").write_text(json.dumps(paper_config({"sparse_prediction": 0.15})))
    with caplog.at_level(logging.WARNING):
        convert(paper_folder, tmp_path / "ours")
    assert "arch.sparse_prediction = 0.15 is left behind" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position_embedding_type", "rotary"),
        ("rotary_base", 500.0),
        ("type_vocab_size", 2),
        ("norm_scheme", "post"),
        ("tie_word_embeddings", False),
        ("hidden_act", "gelu_new"),
        ("classifier_activation", "gelu_new"),
    ],
)
def test_fields_that_the_papers_code_does_not_know_are_refused_by_name(tmp_path, tiny_config, field, value):
    config = CrammedBertConfig(**{**tiny_config.to_dict(), field: value})
    CrammedBertForMaskedLM(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError) as error:
        convert(tmp_path / "ours", tmp_path / "theirs")
    assert f"config.json: {field} = {value!r} cannot be written" in str(error.value)
    assert not (tmp_path / "theirs").exists()


def test_heads_that_the_paper_has_not_are_refused(tmp_path, tiny_config):
    CrammedBertForTokenClassification(tiny_config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"architectures = \['CrammedBertForTokenClassification'\] cannot"):
        convert(tmp_path / "ours", tmp_path / "theirs")


def without(name):
    return lambda tensors: tensors.pop(name)


def replacing(name, change):
    return lambda tensors: tensors.update({name: change(tensors.get(name))})


DENSE = "encoder.layers.1.ffn.dense_out.weight"
SCALE = "encoder.layers.1.attn.self_attention.norm_factor"
DAMAGE = {
    "missing": (without(DENSE), rf"tensor {DENSE} \(16, 12\) is missing"),
    "missing embedding": (
        without("encoder.embedding.word_embedding.weight"),
        r"word_embedding.weight \(37, 16\) is m",
    ),
    "missing scale": (without(SCALE), rf"tensor {SCALE} \(\) is missing"),
    "misshapen": (replacing(DENSE, lambda x: x[:, :9]), rf"{DENSE} has shape \(16, 9\), expected \(16, 12\)"),
    "unexpected": (
        replacing("pooler.dense.weight", lambda _: torch.ones(2, 3)),
        r"pooler.dense.weight \(2, 3\) is une",
    ),
    "of another type": (replacing(DENSE, torch.Tensor.half), "one floating type"),
    "integers": (
        lambda tensors: [tensors.update({n: t.int()}) for n, t in list(tensors.items())],
        "one floating type",
    ),
    "other scale": (replacing(SCALE, lambda x: 2 * x), f"tensor {SCALE} is not what config.json makes it"),
    "untied": (replacing("decoder.weight", lambda x: x + 1), "decoder.weight differs from .*word_embedding.weight"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_wrong_tensors_are_named(tmp_path, paper_folder, damage, message):
    tensors = load_file(paper_folder / "model.safetensors")
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, paper_folder / "model.safetensors")
    with pytest.raises(ConversionError, match=message) as error:
        convert(paper_folder, tmp_path / "ours")
    assert str(paper_folder / "model.safetensors") in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["paper"]


def test_wrong_tensors_of_ours_are_named(tmp_path, tiny_config):
    CrammedBertForMaskedLM(tiny_config).save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.dense_in.weight"] = torch.zeros(64, 31)
    del tensors["model.final_norm.bias"]
    save_file(tensors, path)
    with pytest.raises(ConversionError) as error:
        convert(tmp_path / "ours", tmp_path / "theirs")
    assert "model.layers.0.mlp.dense_in.weight has shape (64, 31), expected (64, 32)" in str(error.value)
    assert "model.final_norm.bias (32,) is missing" in str(error.value)


def test_many_wrong_tensors_are_counted(tmp_path, paper_folder):
    save_file({"weight": torch.zeros(2)}, paper_folder / "model.safetensors")
    with pytest.raises(ConversionError, match=r"is missing; .* is missing; .* is missing; and \d+ more"):
        convert(paper_folder, tmp_path / "ours")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_truncated_files_are_named(tmp_path, paper_folder, name, share):
    tensors = load_file(paper_folder / "model.safetensors")
    path = write_paper_checkpoint(tmp_path / "cut", paper_config(), tensors, name) / name
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConversionError, match=rf"{path} is truncated") as error:
        convert(tmp_path / "cut", tmp_path / "ours")
    assert "\n" not in str(error.value)


class Armed:
    """An object that would write a file if its file were opened carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_torch_files_are_read_without_running_anything(tmp_path, paper_folder):
    armed = {"weight": Armed(tmp_path / "fired")}
    write_paper_checkpoint(tmp_path / "armed", paper_config(), armed, "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"more than tensors, \w+.open, and is not opened"):
        convert(tmp_path / "armed", tmp_path / "ours")
    assert not (tmp_path / "fired").exists()


def test_a_damaged_pickle_in_a_whole_archive_is_one_line(tmp_path, paper_folder):
    state = {"weight": torch.zeros(2)}
    folder = write_paper_checkpoint(tmp_path / "damaged", paper_config(), state, "pytorch_model.bin")
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content[:-5] if name.endswith("data.pkl") else content)
    with pytest.raises(ConversionError, match="pytorch_model.bin is truncated, or not a file of weights"):
        convert(folder, tmp_path / "ours")


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"model": {"weight": torch.zeros(2)}}, torch.zeros(2)])
def test_torch_files_that_are_no_state_dict_are_refused(tmp_path, content):
    folder = write_paper_checkpoint(tmp_path / "nested", paper_config(), content, "pytorch_model.bin")
    with pytest.raises(ConversionError, match="pytorch_model.bin is not names and tensors alone"):
        convert(folder, tmp_path / "ours")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json cannot be read"),
        ("[" * 100_000, "config.json cannot be read"),
        ("[1]", "not an object"),
        ('{"model_type": "bert"}', "model_type = 'bert' is neither"),
        ("{}", "model_type = None is neither"),
        ('{"model_type": "crammedBERT"}', "architectures = "),
        ('{"model_type": "crammedBERT", "architectures": 3}', "architectures = "),
        (
            '{"model_type": "crammedBERT", "architectures": ["ScriptableLMForPreTraining"]}',
            "arch.embedding.vocab_size",
        ),
    ],
)
def test_wrong_configurations_are_one_line(tmp_path, paper_folder, content, message):
    (paper_folder / "config.json").write_text(content)
    with pytest.raises(ConversionError, match=message):
        convert(paper_folder, tmp_path / "ours")


def test_absent_files_are_named(tmp_path, paper_folder):
    with pytest.raises(ConversionError, match="there is no .*nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "ours")
    (paper_folder / "model.safetensors").rename(paper_folder / "one.pth")
    (paper_folder / "two.pth").touch()
    with pytest.raises(ConversionError, match="one.pth, two.pth"):
        convert(paper_folder, tmp_path / "ours")
    (paper_folder / "config.json").unlink()
    with pytest.raises(ConversionError, match="there is no .*config.json"):
        convert(paper_folder, tmp_path / "ours")


def test_a_model_of_ours_in_several_files_is_named(tmp_path, tiny_config):
    CrammedBertForMaskedLM(tiny_config).save_pretrained(tmp_path / "ours", max_shard_size="10kB")
    with pytest.raises(ConversionError, match="there is no .*model.safetensors: .* in one file"):
        convert(tmp_path / "ours", tmp_path / "paper")


def test_nothing_is_overwritten(tmp_path, paper_folder):
    target = tmp_path / "ours"
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    with pytest.raises(ConversionError, match="ours exists and is not an empty folder: name another OUT"):
        convert(paper_folder, target)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    with pytest.raises(ConversionError, match="not an empty folder"):
        convert(paper_folder, target / "mine.txt")
    assert (target / "mine.txt").read_text() == "kept"
    (target / "mine.txt").unlink()
    convert(paper_folder, target)  # an empty folder is fine
    assert (target / "model.safetensors").is_file()


def test_a_failure_while_writing_leaves_nothing(tmp_path, paper_folder, monkeypatch):
    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_cramming_checkpoint, "flush_to_disk", full_disk)
    with pytest.raises(ConversionError, match="ours cannot be written .*No space left on device"):
        convert(paper_folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["paper"]


def test_the_command_converts(tmp_path, paper_folder, capsys):
    main([str(paper_folder), str(tmp_path / "new" / "ours")])
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'ours'}: CrammedBertForMaskedLM\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ours"]


def test_the_command_fails_in_one_line(tmp_path, paper_folder, monkeypatch, capsys):
    path = paper_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(sys, "argv", ["convert", str(paper_folder), str(tmp_path / "ours")])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("hf_cram.convert_cramming_checkpoint", run_name="__main__")
    assert caught.value.code.startswith(f"python -m hf_cram.convert_cramming_checkpoint: error: {path} is truncated")
    assert "\n" not in caught.value.code
    assert capsys.readouterr().out == ""


def test_settings_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [2]}) == {"a.b": 1, "a.c.d": None, "e": [2]}
