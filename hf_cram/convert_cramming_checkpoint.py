"""
Turn the checkpoint format that the paper's authors publish into ours, and back: `IN OUT`, the direction shows in IN.

Their format (arXiv 2212.14034, the authors' code) is a state dict and a `config.json` of `model_type` "crammedBERT" with
all settings nested under `arch`. Masked language models and sequence classifiers are converted, tensors bit for bit.
"""

import argparse
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from .configuration_crammed_bert import SIZES, CrammedBertConfig
from .data.errors import DataError
from .data.tokenization import read_tokenizer
from .files import flush_to_disk, read_json
from .modeling_crammed_bert import (
    CrammedBertForMaskedLM,
    CrammedBertForSequenceClassification,
    CrammedBertPreTrainedModel,
)
from .programs import ending_in_one_line

logger = logging.getLogger(__name__)

PROGRAM = "python -m hf_cram.convert_cramming_checkpoint"
PAPER_MODEL_TYPE = "crammedBERT"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)

# Our field, and the key under `arch` that holds the same value.
SAME_VALUE = {
    "vocab_size": "embedding.vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_transformer_layers",
    "num_attention_heads": "attention.num_attention_heads",
    "intermediate_size": "intermed_size",
    "max_position_embeddings": "embedding.max_seq_length",
    "classifier_hidden_size": "classification_head.head_dim",
    "pad_token_id": "embedding.pad_token_id",
    "qkv_bias": "attention.qkv_bias",
    "linear_bias": "use_bias",
    "decoder_bias": "decoder_bias",
    "final_norm": "final_norm",
    "embedding_norm": "embedding.normalization",
    "norm_eps": "norm_eps",
    "embedding_dropout_prob": "embedding.dropout_prob",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "attention_probs_dropout_prob": "attention.dropout_prob",
    "initializer_range": "init.std",
    "classifier_dropout": "classification_head.classifier_dropout",
}
ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU", "silu": "SiLU", "mish": "Mish", "tanh": "Tanh", "sigmoid": "Sigmoid"}
# Our field, the key under `arch`, and our value: theirs.
CHOICES: dict[str, tuple[str, dict[Any, Any]]] = {
    "position_embedding_type": (
        "embedding.pos_embedding",
        {"scaled_sinusoidal": "scaled-sinusoidal", "sinusoidal": "sinusoidal", "learned": "learned"},
    ),
    "norm_type": ("norm", {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}),
    "norm_scheme": ("norm_scheme", {"pre": "pre"}),
    "prediction_head": ("skip_head_transform", {False: True, True: False}),
    "tie_word_embeddings": ("tie_weights", {True: True}),  # their code ties whatever this says
    "classifier_pooling": ("classification_head.pooler", {"cls": "zero_index", "mean": "avg"}),
    "classifier_activation": ("classification_head.nonlin", ACTIVATIONS),
}
# What our model has no field for, at the only value that it computes.
FIXED = {
    "architectures": ["ScriptableCrammedBERT"],
    "attention.causal_attention": False,
    "attention.rotary_embedding": False,  # their rotation returns its input unturned
    "attention.sequence_op": "torch-softmax",
    "attention.skip_output_projection": False,
    "attention.type": "self-attention",
    "classification_head.include_ff_layer": True,
    "ffn_layer_frequency": 1,
    "init.type": "normal",
    "loss": "cross-entropy",
    "objective_layout": "MLM",
}
# Settings of a training run, not of a model, with the values of the paper's recipe: reported where they are lost.
TRAINING = {"sparse_prediction": 0.25, "attention.seq_op_in_fp32": False, "embedding.stable_low_precision": False}

# Our names, theirs; applied in this order.
RENAMED = (
    ("model.embeddings.word_embeddings.", "encoder.embedding.word_embedding."),
    ("model.embeddings.position_embeddings.weight", "encoder.embedding.pos_embedding.embedding.weight"),
    ("model.embeddings.position_embeddings.", "encoder.embedding.pos_embedding."),
    ("model.embeddings.", "encoder.embedding."),
    ("model.", "encoder."),
    (".attention_norm.", ".norm1."),
    (".mlp_norm.", ".norm2."),
    (".attention.query_key_value.", ".attn.self_attention.query_key_value."),
    (".attention.dense.", ".attn.dense."),
    (".mlp.", ".ffn."),
)
# Their class: ours, and the names of its head.
HEADS: dict[str, tuple[type[CrammedBertPreTrainedModel], tuple[tuple[str, str], ...]]] = {
    "ScriptableLMForPreTraining": (CrammedBertForMaskedLM, (("head.", "prediction_head."),)),
    "ScriptableLMForSequenceClassification": (
        CrammedBertForSequenceClassification,
        (("classifier.dense.", "pooler.dense."), ("classifier.out_proj.", "head.")),
    ),
}


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message names the file, what is wrong with it and the way out."""


def flatten(nested: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(nested, dict):
        return {prefix: nested}
    return {
        name: value
        for key, inner in nested.items()
        for name, value in flatten(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}, keys sorted."""
    nested: dict[str, Any] = {}
    for name, value in sorted(flat.items()):
        *outer, last = name.split(".")
        inner = nested
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return nested


def arch_of(config: CrammedBertConfig, classifies: bool) -> dict[str, Any]:
    """The paper's settings, flat, for our `config`. Raises [`ConversionError`] for a value that its code has not."""
    values = config.to_dict()
    arch = {**FIXED, **TRAINING, **{key: values[field] for field, key in SAME_VALUE.items()}}
    for field, (key, choices) in {**CHOICES, "hidden_act": ("nonlin", ACTIVATIONS)}.items():
        if values[field] not in choices:
            raise ConversionError(
                f"{field} = {values[field]!r} cannot be written in the paper's format, which knows only "
                f"{', '.join(map(repr, choices))}"
            )
        arch[key] = choices[values[field]]
    arch["nonlin"] += "glu" if config.gated_linear_unit else ""
    arch["embedding.embedding_dim"] = config.hidden_size
    arch["num_labels"] = config.num_labels if classifies else None
    if classifies and config.classifier_pooling == "mean":
        logger.warning("padded sequences score differently: the paper's mean counts padding, ours leaves it out")
    return arch


def fields_of(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Our configuration's fields for the paper's flat settings. Raises [`ConversionError`] for what ours has not."""
    for key in (*SAME_VALUE.values(), *(key for key, _ in CHOICES.values()), "nonlin"):
        if key not in arch:
            raise ConversionError(f"arch.{key} is missing")
    fields = {field: arch[key] for field, key in SAME_VALUE.items()}
    fields["gated_linear_unit"] = str(arch["nonlin"]).endswith("glu")
    plain = {**arch, "nonlin": str(arch["nonlin"]).removesuffix("glu")}
    for field, (key, choices) in {**CHOICES, "hidden_act": ("nonlin", ACTIVATIONS)}.items():
        matching = [ours for ours, theirs in choices.items() if theirs == plain[key]]
        if not matching:
            known = ", ".join(map(repr, choices.values()))
            raise ConversionError(
                f"arch.{key} = {arch[key]!r} has no counterpart in hf_cram, which knows only {known}"
            )
        fields[field] = matching[0]
    return fields


def build_config(values: Mapping[str, Any]) -> CrammedBertConfig:
    """Our configuration from its JSON values. Raises [`ConversionError`] for sizes and types that cannot be."""
    for field in (*SIZES, "num_labels"):
        if field in values and (not isinstance(values[field], int) or values[field] < 1):
            raise ConversionError(f"{field} = {values[field]!r} is not a positive number")
    try:
        return CrammedBertConfig.from_dict(dict(values))
    except (StrictDataclassError, ValueError) as error:
        raise ConversionError(" ".join(str(error).split())) from error


def config_from_paper(values: Mapping[str, Any]) -> CrammedBertConfig:
    """
    Our configuration from the content of the paper's `config.json`.

    Every setting under `arch` is read. Raises [`ConversionError`] naming the first that is missing, unknown, or at a
    value that our model does not compute; settings of a training run are reported and left behind.
    """
    arch = flatten(values.get("arch"))
    classifies = head_of(values)[1] is CrammedBertForSequenceClassification
    fields = fields_of(arch)
    if classifies and isinstance(arch.get("num_labels"), int):
        fields["num_labels"] = arch["num_labels"]
        labels = values.get("id2label")
        if isinstance(labels, dict) and len(labels) == arch["num_labels"]:
            try:
                fields["id2label"], fields["label2id"] = labels, {label: int(index) for index, label in labels.items()}
            except (TypeError, ValueError) as error:
                raise ConversionError(f"id2label = {labels!r} must name each class by its number") from error
    config = build_config({**fields, "problem_type": values.get("problem_type")})
    possible = arch_of(config, classifies)
    for key, value in arch.items():
        if key not in possible:
            raise ConversionError(f"arch.{key} = {value!r} is a setting that hf_cram does not know")
        if value != possible[key] and key not in TRAINING:
            raise ConversionError(f"arch.{key} = {value!r} has no counterpart in hf_cram, only {possible[key]!r} has")
        if value != possible[key]:
            logger.warning("arch.%s = %r is left behind: it belongs to the training run, not the model", key, value)
    return config


def paper_values(config: CrammedBertConfig, architecture: str) -> dict[str, Any]:
    """
    Content of the paper's `config.json` for our `config` and the paper's class `architecture`.

    Raises [`ConversionError`] naming the first field whose value would be lost.
    """
    classifies = HEADS[architecture][0] is CrammedBertForSequenceClassification
    arch = arch_of(config, classifies)
    ours, read_again = config.to_dict(), build_config(fields_of(arch)).to_dict()
    for field in CrammedBertConfig.__annotations__:
        if ours[field] != read_again[field]:
            raise ConversionError(
                f"{field} = {ours[field]!r} cannot be written in the paper's format, only {read_again[field]!r} can"
            )
    values = {"arch": nest(arch), "architectures": [architecture], "model_type": PAPER_MODEL_TYPE}
    if classifies and ours["id2label"] != {index: f"LABEL_{index}" for index in range(len(ours["id2label"]))}:
        values |= {"id2label": ours["id2label"], "label2id": ours["label2id"]}
    return values if config.problem_type is None else {**values, "problem_type": config.problem_type}


def head_of(values: Mapping[str, Any]) -> tuple[str, type[CrammedBertPreTrainedModel]]:
    """The paper's class and ours for the `architectures` of either `config.json`. Raises [`ConversionError`]."""
    names = values.get("architectures")
    names = names if isinstance(names, list) else [names]
    for architecture, (model_class, _) in HEADS.items():
        if architecture in names or model_class.__name__ in names:
            return architecture, model_class
    known = ", ".join(f"{architecture} ({model_class.__name__})" for architecture, (model_class, _) in HEADS.items())
    raise ConversionError(f"architectures = {names!r} cannot be converted, only {known}")


def paper_name(name: str, config: CrammedBertConfig, model_class: type[CrammedBertPreTrainedModel]) -> str:
    """The paper's name of our tensor `name`."""
    head_names = next(names for ours, names in HEADS.values() if ours is model_class)
    for old, new in next(((pair,) for pair in head_names if name.startswith(pair[0])), RENAMED):
        name = name.replace(old, new)
    return re.sub(r"(norm[12]?)\.weight$", r"\1.learnable_scale", name) if config.norm_type == "rms_norm" else name


def expected_shapes(config: CrammedBertConfig, model_class: type[CrammedBertPreTrainedModel]) -> dict[str, torch.Size]:
    """Names and shapes of our model's tensors, without memory for them."""
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
    except (AssertionError, RuntimeError, ValueError) as error:  # torch's own checks of its layers
        raise ConversionError(f"config.json describes a model that cannot be built: {error}") from error


def computed_tensors(config: CrammedBertConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of the paper's state dict that follow from its configuration, and that our models do not keep."""
    scale = torch.tensor(config.hidden_size // config.num_attention_heads).rsqrt().to(dtype)  # a scalar
    tensors = {
        f"encoder.layers.{index}.attn.self_attention.norm_factor": scale.clone()
        for index in range(config.num_hidden_layers)
    }
    if config.position_embedding_type == "learned":
        positions = torch.arange(config.max_position_embeddings).unsqueeze(0)  # (1, positions)
        tensors["encoder.embedding.pos_embedding.position_ids"] = positions
    return tensors


def interleave(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Ours (3 x heads x D, ...) -> the paper's fused rows, q, k, v inside each head: (heads x 3 x D, ...)."""
    return tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)


def separate(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The paper's fused rows (heads x 3 x D, ...) -> ours: all queries, all keys, all values (3 x heads x D, ...)."""
    return tensor.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def check_tensors(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], path: Path) -> None:
    """Raise [`ConversionError`] naming the tensors that are missing, misshapen, unexpected or of another dtype."""
    problems = [f"tensor {name} {tuple(shape)} is missing" for name, shape in shapes.items() if name not in tensors]
    problems += [
        f"tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(shapes[name])}"
        for name, tensor in tensors.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    problems += [
        f"tensor {name} {tuple(tensor.shape)} is unexpected" for name, tensor in tensors.items() if name not in shapes
    ]
    dtypes = {str(tensor.dtype): name for name, tensor in tensors.items() if not name.endswith("position_ids")}
    if len(dtypes) > 1 or not all(dtype.startswith(("torch.float", "torch.bfloat")) for dtype in dtypes):
        problems.append("tensors must be of one floating type: " + ", ".join(f"{n} is {d}" for d, n in dtypes.items()))
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConversionError(f"{path} does not fit its config.json: {'; '.join(problems[:3])}{more}")


def model_from_paper(
    config: CrammedBertConfig,
    model_class: type[CrammedBertPreTrainedModel],
    tensors: Mapping[str, torch.Tensor],
    path: Path,
) -> CrammedBertPreTrainedModel:
    """
    Our model with the paper's `tensors`, in their dtype. `path` is the file that errors name.

    Raises [`ConversionError`] for a tensor that is missing, unexpected or misshapen, for a decoder that is not tied to
    the word embeddings, and for scores that are not scaled by 1 / sqrt(head size).
    """
    shapes = expected_shapes(config, model_class)
    names = {name: paper_name(name, config, model_class) for name in shapes}
    tensors = dict(tensors)
    embedding = names["model.embeddings.word_embeddings.weight"]
    if "decoder.weight" in shapes and embedding in tensors:
        tensors.setdefault("decoder.weight", tensors[embedding])  # a writer may leave out the copy
    computed = computed_tensors(config, torch.float32)
    computed_shapes = {name: tensor.shape for name, tensor in computed.items()}
    check_tensors(tensors, {names[name]: shape for name, shape in shapes.items()} | computed_shapes, path)
    if "decoder.weight" in shapes and not torch.equal(tensors["decoder.weight"], tensors[embedding]):
        raise ConversionError(f"{path}: decoder.weight differs from {embedding}, but arch.tie_weights ties them")
    for name, expected in computed.items():
        if not torch.allclose(tensors[name].to(expected.dtype), expected, rtol=1e-2):
            raise ConversionError(f"{path}: tensor {name} is not what config.json makes it ({expected.tolist()})")
    state = {name: tensors[theirs] for name, theirs in names.items()}
    for name in state:
        if ".query_key_value." in name:
            state[name] = separate(state[name], config.num_attention_heads)
    model = model_class(config)
    nn.Module.to(model, tensors[embedding].dtype)
    model.load_state_dict(state)
    return model


def paper_from_tensors(
    config: CrammedBertConfig,
    model_class: type[CrammedBertPreTrainedModel],
    tensors: Mapping[str, torch.Tensor],
    path: Path,
) -> dict[str, torch.Tensor]:
    """The paper's state dict from ours. `path` is the file that a [`ConversionError`] names."""
    embedding = "model.embeddings.word_embeddings.weight"
    tensors, shapes = dict(tensors), expected_shapes(config, model_class)
    if "decoder.weight" in shapes and embedding in tensors:
        tensors["decoder.weight"] = tensors[embedding].clone()  # tied: our files hold it once, the paper's twice
    check_tensors(tensors, shapes, path)
    theirs = {
        paper_name(name, config, model_class): (
            interleave(tensor, config.num_attention_heads) if ".query_key_value." in name else tensor
        )
        for name, tensor in tensors.items()
    }
    return theirs | computed_tensors(config, tensors[embedding].dtype)


def read_config(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises [`ConversionError`] for a file that is missing or holds anything else."""
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise ConversionError(f"there is no {path}: IN must be a folder with config.json and weights") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read ({error}): is it truncated?") from error


def find_weights(folder: Path) -> Path:
    """The paper's file of weights in `folder`: the usual names first, then the only one there is."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConversionError(
            f"{folder} must have a model.safetensors or one file of weights, name one as IN: {names}"
        )
    return found[0]


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote to `path`, if it is tensors alone: no code in it is run. Raises `ValueError`."""
    if not zipfile.is_zipfile(path):
        raise ValueError("not a whole file of torch.save")
    try:
        unsafe = get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:  # what a damaged archive raises is of no narrower class
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if unsafe:
        raise ValueError(f"it holds more than tensors, {unsafe[0]}, and is not opened")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Names and tensors of a safetensors file or a torch state dict. Raises [`ConversionError`] for any other file."""
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ConversionError(f"{path} is truncated, or not a file of weights ({cause}): download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ConversionError(f"{path} is not names and tensors alone: save the model's state_dict()")
    return tensors


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` at the end, or vanishes where anything fails."""
    target = target.resolve()
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        flush_to_disk(staging)
        os.replace(staging, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConversionError(f"{target} cannot be written ({' '.join(str(error).split())})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_paper_folder(values: Mapping[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """The paper's two files."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file at fault in front of a [`ConversionError`]."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error


def from_paper(values: Mapping[str, Any], folder: Path, weights: Path) -> CrammedBertPreTrainedModel:
    """Our model for the paper's `config.json`, whose content is `values`, and the file `weights`."""
    with naming(folder / "config.json"):
        model_class, config = head_of(values)[1], config_from_paper(values)
    return model_from_paper(config, model_class, read_tensors(weights), weights)


def to_paper(values: Mapping[str, Any], folder: Path, weights: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Content of the paper's `config.json` and its tensors for our `config.json`, whose content is `values`."""
    with naming(folder / "config.json"):
        (architecture, model_class), config = head_of(values), build_config(values)
        content = paper_values(config, architecture)
    tensors = paper_from_tensors(config, model_class, read_tensors(weights), weights)
    dtype = tensors["encoder.embedding.word_embedding.weight"].dtype
    return {**content, "torch_dtype": str(dtype).removeprefix("torch.")}, tensors


def prepare(source: Path) -> tuple[Callable[[Path], object], str]:
    """What writes `source`, converted, into a folder, and the name of the new model's class."""
    if not source.exists():
        raise ConversionError(f"there is no {source}: name a folder with config.json and weights")
    folder = source if source.is_dir() else source.parent
    values = read_config(folder / "config.json")
    if values.get("model_type") == PAPER_MODEL_TYPE:
        model = from_paper(values, folder, find_weights(folder) if source.is_dir() else source)
        return model.save_pretrained, type(model).__name__
    if values.get("model_type") == CrammedBertConfig.model_type:
        weights = folder / "model.safetensors" if source.is_dir() else source
        if not weights.is_file():
            raise ConversionError(
                f"there is no {weights}: name a folder with config.json and model.safetensors in one file"
            )
        content, tensors = to_paper(values, folder, weights)
        return partial(write_paper_folder, content, tensors), content["architectures"][0]
    raise ConversionError(
        f"{folder / 'config.json'}: model_type = {values.get('model_type')!r} is neither {PAPER_MODEL_TYPE!r} "
        f"(the paper's) nor {CrammedBertConfig.model_type!r} (ours)"
    )


def check_tokenizer(folder: Path) -> None:
    """Raise [`ConversionError`] where a tokenizer lies in `folder`, beside a model of ours, that does not load."""
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        try:
            read_tokenizer(folder)
        except DataError as error:
            raise ConversionError(str(error)) from error


def convert(source: Path, target: Path) -> str:
    """
    Convert the checkpoint `source`, a folder or a file of weights beside its `config.json`, into the folder `target`.

    `target` is written whole or not at all; tokenizer files are copied if they load. Returns the name of the new model's class.
    Raises [`ConversionError`] with one line for whatever is wrong with either.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists and is not an empty folder: name another OUT")
    write, class_name = prepare(source)
    folder = source if source.is_dir() else source.parent
    with whole_folder(target) as staging:
        write(staging)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staging / name)
        check_tokenizer(folder if class_name in HEADS else staging)
    return class_name


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and say what was written."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help="folder of the checkpoint, or its file of weights")
    parser.add_argument("target", metavar="OUT", type=Path, help="new or empty folder for the converted one")
    options = parser.parse_args(arguments)
    print(f"{options.target}: {convert(options.source, options.target)}")


if __name__ == "__main__":
    with ending_in_one_line(PROGRAM, ConversionError, stopped="stopped; nothing was written"):
        main()
