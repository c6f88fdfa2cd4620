"""The model against a plain reference, its switches, its loading and its manners."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from conftest import VOCAB_SIZE
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_cram
from hf_cram import (
    CrammedBertConfig,
    CrammedBertForMaskedLM,
    CrammedBertForMultipleChoice,
    CrammedBertForQuestionAnswering,
    CrammedBertForSequenceClassification,
    CrammedBertForTokenClassification,
    CrammedBertModel,
)
from hf_cram.hardware import training_flops
from hf_cram.modeling_crammed_bert import eager_attention_forward

HEADS = (
    CrammedBertModel,
    CrammedBertForMaskedLM,
    CrammedBertForSequenceClassification,
    CrammedBertForTokenClassification,
    CrammedBertForQuestionAnswering,
    CrammedBertForMultipleChoice,
)
# One finding each (of the paper's, turned back), alone.
SWITCHES = {
    "num_attention_heads": 2,
    "qkv_bias": True,
    "linear_bias": True,
    "decoder_bias": True,
    "norm_scheme": "post",
    "final_norm": False,
    "embedding_norm": False,
    "norm_type": "rms_norm",
    "gated_linear_unit": False,
    "prediction_head": True,
    "tie_word_embeddings": False,
    "type_vocab_size": 2,
    "intermediate_size": 96,
    "hidden_act": "relu",
}
POSITIONS = ("scaled_sinusoidal", "sinusoidal", "learned", "rotary")


def reference_norm(x, module, config):
    if config.norm_type == "rms_norm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_eps) * module.weight
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + config.norm_eps) * module.weight
        + module.bias
    )


def reference_linear(x, module):
    return x @ module.weight.T + (0 if module.bias is None else module.bias)


def reference_loss(model, input_ids, labels):
    """The masked-LM loss written out, sequence by sequence, head by head."""
    config, body = model.config, model.model
    act = {"gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), "relu": torch.relu}[config.hidden_act]
    norm = lambda x, module: x if isinstance(module, nn.Identity) else reference_norm(x, module, config)  # noqa: E731
    head_size, total, count = config.hidden_size // config.num_attention_heads, 0.0, 0
    for ids, row_labels in zip(input_ids, labels, strict=True):
        x = body.embeddings.word_embeddings.weight[ids]
        kind = config.position_embedding_type
        if "sinusoidal" in kind:
            table = torch.zeros(len(ids), config.hidden_size, dtype=x.dtype)
            for position in range(len(ids)):
                for index in range(0, config.hidden_size, 2):
                    angle = position / 10000 ** (index / config.hidden_size)
                    table[position, index], table[position, index + 1] = math.sin(angle), math.cos(angle)
            scale = body.embeddings.position_embeddings.scale_factor if kind == "scaled_sinusoidal" else 1.0
            x = x + scale * table
        elif kind == "learned":
            x = x + body.embeddings.position_embeddings.weight[: len(ids)]
        if config.type_vocab_size:
            x = x + body.embeddings.token_type_embeddings.weight[0]
        x = norm(x, body.embeddings.norm)
        for layer in body.layers:
            y = norm(x, layer.attention_norm) if config.norm_scheme == "pre" else x
            qkv = reference_linear(y, layer.attention.query_key_value)
            heads = []
            for head in range(config.num_attention_heads):
                part = slice(head * head_size, (head + 1) * head_size)
                q, k, v = (qkv[:, i * config.hidden_size : (i + 1) * config.hidden_size][:, part] for i in range(3))
                if kind == "rotary":
                    q, k = reference_rotate(q, config), reference_rotate(k, config)
                scores = q @ k.T / math.sqrt(head_size)
                weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
                heads.append(weights @ v)
            x = x + reference_linear(torch.cat(heads, -1), layer.attention.dense)
            if config.norm_scheme == "post":
                x = norm(x, layer.attention_norm)
            y = norm(x, layer.mlp_norm) if config.norm_scheme == "pre" else x
            inner = reference_linear(y, layer.mlp.dense_in)
            if config.gated_linear_unit:
                half = config.intermediate_size // 2
                inner = inner[:, :half] * act(inner[:, half:])
            else:
                inner = act(inner)
            x = x + reference_linear(inner, layer.mlp.dense_out)
            if config.norm_scheme == "post":
                x = norm(x, layer.mlp_norm)
        x = norm(x, body.final_norm)
        if config.prediction_head:
            x = norm(act(reference_linear(x, model.head.dense)), model.head.norm)
        log_probs = torch.log_softmax(reference_linear(x, model.decoder), -1)
        for position, label in enumerate(row_labels.tolist()):
            if label != -100:
                total, count = total - log_probs[position, label], count + 1
    return total / count


def reference_rotate(x, config):
    size, half = x.shape[-1], x.shape[-1] // 2
    columns = []
    for index in range(half):
        angle = torch.arange(len(x), dtype=x.dtype) / config.rotary_base ** (2 * index / size)
        a, b = x[:, index], x[:, index + half]
        columns.append((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))
    return torch.stack([pair[0] for pair in columns] + [pair[1] for pair in columns], -1)


def masked_batch(rows=3, length=16, masked=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCAB_SIZE, (rows, length), generator=generator)
    positions = torch.stack([torch.randperm(length, generator=generator)[:masked].sort().values for _ in range(rows)])
    labels = torch.full_like(input_ids, -100).scatter(1, positions, input_ids.gather(1, positions))
    return input_ids.scatter(1, positions, 4), labels, positions


def changed(config, **fields):
    return CrammedBertConfig(**{**config.to_dict(), **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        *({name: value} for name, value in SWITCHES.items()),
        *({"position_embedding_type": p} for p in POSITIONS[1:]),
        {"position_embedding_type": "rotary", "gated_linear_unit": False},
    ],
    ids=str,
)
def test_loss_and_gradients_equal_the_reference(tiny_config, fields):
    torch.manual_seed(0)
    model = CrammedBertForMaskedLM(changed(tiny_config, initializer_range=0.2, **fields)).double().train()
    # sinusoids are fp32 tables; in float64 they are compared at that precision
    input_ids, labels, positions = masked_batch()
    loss = model(input_ids=input_ids, labels=labels, masked_positions=positions).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = reference_loss(model, input_ids, labels)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    for (name, _), actual, wanted in zip(model.named_parameters(), gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("name", "value"), SWITCHES.items())
def test_each_switch_alone_changes_the_model(tiny_config, name, value):
    torch.manual_seed(0)
    default = CrammedBertForMaskedLM(tiny_config).eval()
    torch.manual_seed(0)
    switched = CrammedBertForMaskedLM(changed(tiny_config, **{name: value})).eval()
    H, L, V, I = 32, 2, VOCAB_SIZE, 64  # noqa: E741
    extra_parameters = {
        "qkv_bias": L * 3 * H,
        "linear_bias": L * (H + I + H),
        "decoder_bias": V,
        "final_norm": -2 * H,
        "embedding_norm": -2 * H,
        "norm_type": -(2 * L + 2) * H,
        "gated_linear_unit": L * H * I // 2,
        "prediction_head": H * H + 2 * H,
        "tie_word_embeddings": V * H,
        "type_vocab_size": 2 * H,
        "intermediate_size": L * (H * 32 + H * 16),
    }
    assert switched.num_parameters() - default.num_parameters() == extra_parameters.get(name, 0)
    for parameter in (*default.parameters(), *switched.parameters()):  # biases and norms start neutral
        with torch.no_grad():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    input_ids = masked_batch()[0]
    assert not torch.allclose(default(input_ids=input_ids).logits, switched(input_ids=input_ids).logits, atol=1e-4)


def test_position_embeddings_tell_positions_apart(tiny_config):
    counts = {}
    for kind in POSITIONS:
        model = CrammedBertForMaskedLM(
            changed(tiny_config, position_embedding_type=kind, initializer_range=0.5)
        ).eval()
        counts[kind] = model.num_parameters()
        forward = model(input_ids=torch.tensor([[7, 8, 9, 10]])).logits[0]
        backward = model(input_ids=torch.tensor([[10, 9, 8, 7]])).logits[0].flip(0)
        assert not torch.allclose(forward, backward, atol=1e-4), kind
    assert counts["scaled_sinusoidal"] == counts["sinusoidal"] + 1
    assert counts["learned"] == counts["sinusoidal"] + 64 * 32
    assert counts["rotary"] == counts["sinusoidal"]


def test_dropouts_act_in_training_only(tiny_config):
    input_ids = masked_batch()[0]
    for name in ("embedding_dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        model = CrammedBertModel(changed(tiny_config, **{name: 0.5})).train()
        assert not torch.equal(model(input_ids).last_hidden_state, model(input_ids).last_hidden_state), name
        model.eval()
        assert torch.equal(model(input_ids).last_hidden_state, model(input_ids).last_hidden_state), name


def test_original_bert_has_the_parameters_of_bert_base():
    for vocab_size in (30522, 32768):
        with torch.device("meta"):
            ours = CrammedBertForMaskedLM(CrammedBertConfig.original_bert(vocab_size=vocab_size))
            bert = BertForMaskedLM(BertConfig(vocab_size=vocab_size))
            our_classifier = CrammedBertForSequenceClassification(
                CrammedBertConfig.original_bert(vocab_size=vocab_size)
            )
            bert_classifier = BertForSequenceClassification(BertConfig(vocab_size=vocab_size))
        assert ours.num_parameters() == bert.num_parameters()
        assert our_classifier.num_parameters() == bert_classifier.num_parameters()


PAPER = {
    "num_hidden_layers": 16, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "gated_linear_unit": True, "norm_type": "layer_norm", "norm_scheme": "pre",
    "norm_eps": 1e-12, "final_norm": True, "embedding_norm": True, "position_embedding_type": "scaled_sinusoidal",
    "max_position_embeddings": 512, "qkv_bias": False, "linear_bias": False, "decoder_bias": False,
    "prediction_head": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "tie_word_embeddings": True, "classifier_hidden_size": 1024, "classifier_activation": "tanh",
    "classifier_dropout": 0.1,
}  # fmt: skip


def test_default_is_the_papers_final_model():
    with torch.device("meta"):
        model = CrammedBertForMaskedLM(CrammedBertConfig())
    embeddings = 32768 * 768
    assert model.num_parameters() == 119_589_889
    assert round((model.num_parameters() - embeddings) / 1e6, 1) == 94.4  # the paper's body
    values = CrammedBertConfig().to_dict()
    assert {name: values[name] for name in PAPER} == PAPER


def test_pruned_heads_train_at_masked_positions(tiny_config):
    """Half of the heads taken out of every layer: fused and output projection are narrower than the hidden size."""
    model = CrammedBertForMaskedLM(changed(tiny_config, initializer_range=0.3))
    for layer in model.model.layers:
        attention = layer.attention
        whole = attention.query_key_value.weight.unflatten(0, (3, -1))[:, : tiny_config.hidden_size // 2]
        attention.query_key_value = torch.nn.Linear(
            tiny_config.hidden_size, whole.shape[0] * whole.shape[1], bias=False
        )
        attention.query_key_value.weight.data = whole.flatten(0, 1).detach()
        output = attention.dense.weight[:, : tiny_config.hidden_size // 2].detach()
        attention.dense = torch.nn.Linear(output.shape[1], output.shape[0], bias=False)
        attention.dense.weight.data = output
    input_ids, labels, positions = masked_batch()
    sparse = model.train()(input_ids=input_ids, labels=labels, masked_positions=positions).loss
    torch.testing.assert_close(sparse, model(input_ids=input_ids, labels=labels).loss)


def test_sdpa_and_eager_agree_on_masks_of_booleans(tiny_config):
    """Packed rows that see their own document alone: (B, 1, L, L), true where a token may look."""
    input_ids = masked_batch()[0]
    document = torch.arange(input_ids.shape[1]) // 5
    mask = (document[:, None] == document[None]).expand(len(input_ids), 1, -1, -1)
    model = CrammedBertForMaskedLM(changed(tiny_config, initializer_range=0.3)).eval()
    logits = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(input_ids=input_ids, attention_mask=mask).logits
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=0, atol=1e-5)
    assert not torch.allclose(logits["eager"], model(input_ids=input_ids).logits, atol=1e-2)


def test_sdpa_and_eager_agree_under_padding(tiny_config):
    model = CrammedBertForMaskedLM(changed(tiny_config, initializer_range=0.3)).eval()
    input_ids = masked_batch()[0]
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 10:] = 0
    outputs = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs[implementation] = model(input_ids=input_ids, attention_mask=attention_mask).logits
    kept = attention_mask.bool()
    torch.testing.assert_close(outputs["sdpa"][kept], outputs["eager"][kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", POSITIONS)
def test_padding_never_changes_an_unpadded_row(tiny_config, kind, implementation):
    config = changed(tiny_config, position_embedding_type=kind, initializer_range=0.3)
    model = CrammedBertForMaskedLM(config).eval()
    model.set_attn_implementation(implementation)
    input_ids = masked_batch(rows=1)[0]
    alone = model(input_ids=input_ids).logits[0]
    padded = torch.zeros(2, 40, dtype=torch.long)
    padded[0, :16], padded[1] = input_ids[0], 9
    attention_mask = (padded != 0).long()
    together = model(input_ids=padded, attention_mask=attention_mask).logits[0, :16]
    assert (alone - together).abs().max() < 1e-5


def test_outputs_follow_the_library(tiny_config):
    model = CrammedBertForMaskedLM(tiny_config).eval()
    model.set_attn_implementation("eager")
    input_ids, labels, _ = masked_batch()
    outputs = model(input_ids=input_ids, labels=labels, output_hidden_states=True, output_attentions=True)
    assert outputs.logits.shape == (3, 16, VOCAB_SIZE)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, 16, 32)] * 3
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, 4, 16, 16)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(3, 4, 16))
    as_tuple = model(input_ids=input_ids, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.loss)
    assert torch.equal(as_tuple[1], outputs.logits)
    embedded = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, outputs.logits)


@pytest.mark.parametrize("model_class", HEADS)
def test_every_head_returns_tuples_where_its_configuration_says_so(tiny_config, model_class):
    model = model_class(changed(tiny_config, return_dict=False)).eval()
    outputs = model(**head_inputs(model_class))
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[0], model(**head_inputs(model_class), return_dict=True)[0])


@pytest.mark.parametrize("kind", POSITIONS)
def test_weights_can_be_loaded_in_half_precision(tiny_config, tmp_path, kind):
    CrammedBertForMaskedLM(changed(tiny_config, position_embedding_type=kind)).save_pretrained(tmp_path)
    whole, half = (
        AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    input_ids = masked_batch()[0]
    logits = half(input_ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), whole(input_ids).logits, atol=0.05, rtol=0.05)


def test_token_types_are_ignored_unless_configured(tiny_config):
    input_ids = masked_batch()[0]
    types = torch.ones_like(input_ids)
    ignoring = CrammedBertModel(tiny_config).eval()
    assert torch.equal(ignoring(input_ids, token_type_ids=types)[0], ignoring(input_ids)[0])
    reading = CrammedBertModel(changed(tiny_config, type_vocab_size=2)).eval()
    assert not torch.allclose(reading(input_ids, token_type_ids=types)[0], reading(input_ids)[0])
    assert torch.equal(reading(input_ids, token_type_ids=0 * types)[0], reading(input_ids)[0])


@pytest.mark.parametrize("length", [1, 7, 64])
def test_any_length_up_to_the_limit(tiny_config, length):
    model = CrammedBertModel(tiny_config).eval()
    assert model(torch.full((2, length), 9)).last_hidden_state.shape == (2, length, 32)


def test_too_long_a_sequence_is_a_clear_error(tiny_config):
    model = CrammedBertModel(tiny_config)
    with pytest.raises(ValueError, match=r"65 tokens.*max_position_embeddings \(64\).*from_pretrained\("):
        model(torch.full((1, 65), 9))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_positions_give_the_loss_alone_in_training_and_their_logits_in_evaluation(tiny_config):
    model = CrammedBertForMaskedLM(tiny_config).train()
    input_ids, labels, positions = masked_batch()
    sparse = model(input_ids=input_ids, labels=labels, masked_positions=positions)
    dense = model(input_ids=input_ids, labels=labels)
    assert sparse.logits is None
    torch.testing.assert_close(sparse.loss, dense.loss)
    model.eval()
    evaluated = model(input_ids=input_ids, labels=labels, masked_positions=positions)
    torch.testing.assert_close(evaluated.loss, dense.loss)
    logits = model(input_ids=input_ids).logits.gather(1, positions.unsqueeze(-1).expand(-1, -1, VOCAB_SIZE))
    torch.testing.assert_close(evaluated.logits, logits)
    torch.testing.assert_close(model(input_ids=input_ids, masked_positions=positions).logits, logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"position_embedding_type": "rotary"},
        {"norm_scheme": "post", "final_norm": False, "qkv_bias": True},
    ],
    ids=["default", "rotary", "post_norm"],
)
def test_the_last_layer_at_masked_positions_only_is_exact(tiny_config, switches, padded, implementation):
    torch.manual_seed(0)
    config = changed(tiny_config, **switches)
    config._attn_implementation = implementation
    model = CrammedBertForMaskedLM(config).double().train()
    input_ids, labels, positions = masked_batch()
    attention_mask = torch.ones_like(input_ids) if padded else None
    if attention_mask is not None:
        attention_mask[1, 10:] = 0

    def loss_and_gradients(masked_positions):
        model.zero_grad()
        loss = model(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, masked_positions=masked_positions
        ).loss
        loss.backward()
        return [loss, *(parameter.grad.clone() for parameter in model.parameters())]

    for expected, actual in zip(loss_and_gradients(None), loss_and_gradients(positions), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def loss_at_positions(model, with_positions=True):
    input_ids, labels, positions = masked_batch()
    return model(input_ids=input_ids, labels=labels, masked_positions=positions if with_positions else None).loss


def test_an_adapter_acts_in_the_last_layer_at_masked_positions_too(tiny_config):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    adapter = peft.LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
    model = peft.get_peft_model(CrammedBertForMaskedLM(tiny_config), adapter).train()
    torch.testing.assert_close(loss_at_positions(model), loss_at_positions(model, with_positions=False))
    loss_at_positions(model).backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_offloaded_weights_are_fetched_for_masked_positions_too(tiny_config):
    model = CrammedBertForMaskedLM(tiny_config).train()
    expected = loss_at_positions(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[-1].attention.query_key_value.weight.is_meta
    torch.testing.assert_close(loss_at_positions(model), expected)


def test_a_row_without_masked_positions_is_no_error_in_the_attention(tiny_config):
    model = CrammedBertModel(tiny_config).train()
    positions = torch.zeros(2, 0, dtype=torch.long)
    assert model(torch.full((2, 8), 9), output_positions=positions).last_hidden_state.shape == (2, 0, 32)


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_may_lie_within_the_table_while_the_row_does_not(tiny_config, kind):
    """Packed sequences, whose positions start anew; also given once for all rows."""
    model = CrammedBertModel(changed(tiny_config, position_embedding_type=kind)).eval()
    input_ids, positions = torch.full((2, 100), 9), torch.arange(50).repeat(2)
    states = model(input_ids, position_ids=positions).last_hidden_state
    torch.testing.assert_close(states, model(input_ids, position_ids=positions.expand(2, -1)).last_hidden_state)
    torch.testing.assert_close(states[:, :50], states[:, 50:])


def test_given_positions_reach_the_attention(tiny_config, monkeypatch):
    """Flash attention finds the borders of packed sequences there."""
    reached = []

    def attend(module, query, key, value, mask, **kwargs):
        reached.append((query.shape[2], kwargs.get("position_ids")))
        return eager_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "recorded", attend)
    config = changed(tiny_config)
    config._attn_implementation = "recorded"
    model = CrammedBertForMaskedLM(config).train()
    input_ids, labels, positions = masked_batch()
    position_ids = torch.arange(8).repeat(2).expand(3, -1)
    model(input_ids=input_ids, labels=labels, masked_positions=positions, position_ids=position_ids)
    assert [length for length, _ in reached] == [16] * config.num_hidden_layers
    assert all(torch.equal(given, position_ids) for _, given in reached)


def test_training_costs_less_with_positions(tiny_config):
    model = CrammedBertForMaskedLM(tiny_config)
    input_ids, labels, positions = masked_batch()
    batch = {"input_ids": input_ids, "labels": labels}
    saved = training_flops(model, batch) - training_flops(model, {**batch, "masked_positions": positions})
    hidden_size, inner_size = tiny_config.hidden_size, tiny_config.intermediate_size
    # The decoder, and of the last layer all but queries, keys and values: 6 FLOPs a weight and token.
    weights = hidden_size * (VOCAB_SIZE + hidden_size + inner_size + inner_size // 2)
    assert saved >= 6 * weights * (input_ids.numel() - positions.numel())


def test_activation_checkpointing_gives_the_same_gradients(tiny_config):
    torch.manual_seed(0)
    model = CrammedBertForMaskedLM(tiny_config).train()
    input_ids, labels, positions = masked_batch()

    def gradients():
        model.zero_grad()
        model(input_ids=input_ids, labels=labels, masked_positions=positions).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.activation_checkpointing_enable()
    for expected, actual in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("kind", "backend"), [("scaled_sinusoidal", "eager"), ("rotary", "aot_eager")])
def test_compiles_without_graph_breaks(tiny_config, kind, backend):
    model = CrammedBertForMaskedLM(changed(tiny_config, position_embedding_type=kind)).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    input_ids, labels, positions = masked_batch()
    loss = compiled(input_ids=input_ids, labels=labels, masked_positions=positions).loss
    torch.testing.assert_close(loss, model(input_ids=input_ids, labels=labels, masked_positions=positions).loss)
    mask = torch.ones_like(input_ids)
    mask[0, 12:] = 0
    model.eval()
    with torch.no_grad():
        logits = compiled(input_ids=input_ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, model(input_ids=input_ids, attention_mask=mask).logits)


def test_weights_start_as_configured():
    config = CrammedBertConfig.original_bert(
        vocab_size=2000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    for model_class in HEADS[1:]:
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                kept = parameter[1:] if "word_embeddings" in name or name == "decoder.weight" else parameter
                assert kept.std().item() == pytest.approx(0.02, rel=0.2 if kept.numel() < 2000 else 0.05), name
                assert abs(kept.mean().item()) < 0.01, name
            elif "norm" in name and name.endswith("weight"):
                assert torch.equal(parameter, torch.ones_like(parameter)), name
            else:
                assert torch.equal(parameter, torch.zeros_like(parameter)), name
        assert torch.equal(model.model.embeddings.word_embeddings.weight[0], torch.zeros(128))  # padding
    wide = CrammedBertForMaskedLM(CrammedBertConfig(vocab_size=500, hidden_size=64, num_attention_heads=4,
                                                    num_hidden_layers=1, initializer_range=0.1))  # fmt: skip
    assert wide.model.layers[0].mlp.dense_in.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert wide.model.embeddings.position_embeddings.scale_factor.item() == pytest.approx(64**-0.5)


def head_inputs(model_class):
    input_ids = masked_batch()[0]
    return {"input_ids": input_ids.view(1, 3, 16) if "MultipleChoice" in model_class.__name__ else input_ids}


LOAD_AND_COMPARE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
import hf_cram

for folder in sorted(Path(sys.argv[1]).glob("*/*")):
    model = getattr(hf_cram, folder.name).from_pretrained(folder).eval()
    expected = load_file(folder / "expected.safetensors")
    outputs = model(expected["input_ids"])
    assert model.dtype == torch.float32
    for index, tensor in enumerate(outputs.values()):
        assert torch.equal(tensor, expected[str(index)]), (folder.name, index)
    print("equal")
"""


def test_every_head_loads_bit_identically_in_a_fresh_process(tiny_config, tmp_path, python_environment):
    kinds = ("scaled_sinusoidal", "rotary")
    for kind, model_class in itertools.product(kinds, HEADS):
        folder = tmp_path / kind / model_class.__name__
        model = model_class(changed(tiny_config, position_embedding_type=kind)).eval()
        model.save_pretrained(folder)
        inputs = head_inputs(model_class)
        outputs = {str(index): value.contiguous() for index, value in enumerate(model(**inputs).values())}
        save_file({**outputs, **inputs}, folder / "expected.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", LOAD_AND_COMPARE, str(tmp_path)],
        capture_output=True,
        text=True,
        env=python_environment,
        check=False,
    )
    assert result.stdout.split() == ["equal"] * len(kinds) * len(HEADS), result.stderr


def test_auto_classes_know_the_model(tiny_config, tmp_path):
    CrammedBertForMaskedLM(tiny_config).save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert isinstance(model, CrammedBertForMaskedLM)
    assert model.decoder.weight is model.model.embeddings.word_embeddings.weight
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(
        body.embeddings.position_embeddings.table, hf_cram.modeling_crammed_bert.sinusoidal_table(64, 32)
    )
    assert set(CrammedBertConfig().auto_map) >= {"AutoConfig", "AutoModel", "AutoModelForMaskedLM"}
    own = {"AutoModelForSequenceClassification": "mine.MyClassifier"}
    moved = {"AutoModel": "someone/else--modeling_x.X"}  # whose code would not travel along
    again = CrammedBertConfig.from_dict(CrammedBertConfig(auto_map={**own, **moved}).to_dict())
    assert again.auto_map == {**CrammedBertConfig().auto_map, **own}
    assert (tmp_path / "modeling_crammed_bert.py").is_file()  # the code travels with the checkpoint


def test_fine_tuning_heads_give_losses(tiny_config):
    input_ids = masked_batch()[0]
    labels = {
        CrammedBertForSequenceClassification: {"labels": torch.tensor([0, 1, 0])},
        CrammedBertForTokenClassification: {"labels": input_ids % 2},
        CrammedBertForQuestionAnswering: {"start_positions": torch.tensor([1, 2, 3]),
                                          "end_positions": torch.tensor([4, 5, 6])},
        CrammedBertForMultipleChoice: {"labels": torch.tensor([2])},
    }  # fmt: skip
    for model_class, targets in labels.items():
        for pooling in ("cls", "mean", "segments"):
            model = model_class(changed(tiny_config, classifier_pooling=pooling))
            loss = model(**head_inputs(model_class), **targets).loss
            loss.backward()
            assert torch.isfinite(loss), model_class
            assert all(p.grad is not None for p in model.parameters()), model_class
    answers = CrammedBertForQuestionAnswering(tiny_config).eval()
    starts, ends = labels[CrammedBertForQuestionAnswering].values()
    outputs = answers(input_ids, start_positions=starts, end_positions=ends)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(outputs.start_logits, starts) + cross_entropy(outputs.end_logits, ends)) / 2
    torch.testing.assert_close(outputs.loss, expected)
    tokens = CrammedBertForTokenClassification(tiny_config).eval()
    outputs = tokens(input_ids, labels=input_ids % 2)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits.flatten(0, 1), (input_ids % 2).flatten()))
    regression = CrammedBertForSequenceClassification(changed(tiny_config, num_labels=1))
    values = torch.tensor([0.5, 1.5, 2.5])
    logits = regression.eval()(input_ids=input_ids).logits
    loss = regression(input_ids=input_ids, labels=values).loss
    torch.testing.assert_close(loss, ((logits[:, 0] - values) ** 2).mean())


@pytest.mark.parametrize("kind", ["choice", "class", "classes", "value"])
def test_losses_of_parts_of_a_batch_add_up_to_its_mean(tiny_config, kind):
    """As the Trainer's accumulated steps need it, which give every part the number of all items."""
    torch.manual_seed(0)
    input_ids = torch.randint(5, VOCAB_SIZE, (6, 16))
    labels = {"choice": torch.tensor([0, 1, 1]), "class": torch.tensor([0, 1, 2, 0, 1, 2]),
              "classes": torch.rand(6, 3).round(), "value": torch.rand(6)}[kind]  # fmt: skip
    model_class = CrammedBertForMultipleChoice if kind == "choice" else CrammedBertForSequenceClassification
    model = model_class(changed(tiny_config, num_labels=1 if kind == "value" else 3)).eval()
    inputs = input_ids.view(3, 2, 16) if kind == "choice" else input_ids
    whole = model(inputs, labels=labels).loss
    parts = [
        model(inputs[part], labels=labels[part], num_items_in_batch=labels.numel()).loss
        for part in (slice(0, 1), slice(1, None))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_segments_are_pooled_apart(tiny_config):
    config = changed(tiny_config, classifier_pooling="segments")
    model = CrammedBertForSequenceClassification(config).eval()
    input_ids = masked_batch(rows=2, length=10)[0]
    attention_mask, token_type_ids = torch.ones_like(input_ids), torch.zeros_like(input_ids)
    token_type_ids[:, 6:] = 1
    attention_mask[1, 8:] = 0
    states = model.model(input_ids, attention_mask=attention_mask).last_hidden_state
    for row, end in ((0, 10), (1, 8)):
        first, second = states[row, :6].mean(0), states[row, 6:end].mean(0)
        expected = model.classifier(torch.cat([first, second, (first - second).abs(), first * second]))
        logits = model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits[row]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)
    # A single text has no second segment, which is nothing but zeros.
    first = model.model(input_ids[:1]).last_hidden_state[0].mean(0)
    zeros = torch.zeros_like(first)
    expected = model.classifier(torch.cat([first, zeros, first.abs(), zeros]))
    torch.testing.assert_close(model(input_ids[:1]).logits[0], expected, rtol=1e-4, atol=1e-6)


def test_mean_pooling_leaves_padding_out(tiny_config):
    model = CrammedBertForSequenceClassification(changed(tiny_config, classifier_pooling="mean")).eval()
    input_ids = masked_batch(rows=1)[0]
    padded = torch.nn.functional.pad(input_ids, (0, 8))
    mask = torch.nn.functional.pad(torch.ones_like(input_ids), (0, 8))
    torch.testing.assert_close(
        model(input_ids=padded, attention_mask=mask).logits, model(input_ids=input_ids).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("pooling", ["mean", "segments"])
def test_a_mask_that_cannot_be_pooled_by_is_a_clear_error(tiny_config, pooling):
    model = CrammedBertForSequenceClassification(changed(tiny_config, classifier_pooling=pooling))
    with pytest.raises(ValueError, match=rf"'{pooling}' needs an attention mask of shape .* got \(1, 1, 8, 8\)"):
        model(torch.full((1, 8), 9), attention_mask=torch.ones(1, 1, 8, 8))


def test_an_adapter_is_saved_with_its_whole_classifier(tiny_config, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    CrammedBertForMaskedLM(tiny_config).save_pretrained(tmp_path / "pretrained")

    def fresh():
        return CrammedBertForSequenceClassification.from_pretrained(tmp_path / "pretrained", num_labels=3)

    adapter = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query_key_value"], init_lora_weights=False)
    model = peft.get_peft_model(fresh(), adapter).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
    input_ids = masked_batch()[0]
    torch.testing.assert_close(again(input_ids=input_ids).logits, model(input_ids=input_ids).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "multiple of num_attention_heads"),
        ({"intermediate_size": 63}, "must be even"),
        ({"position_embedding_type": "fourier"}, "position_embedding_type"),
        ({"initializer_range": -0.02}, "initializer_range must not be negative"),
        ({"norm_eps": -1.0}, "norm_eps must not be negative"),
        ({"type_vocab_size": -1}, "type_vocab_size must not be negative"),
        ({"rotary_base": 0}, "rotary_base must be above 0"),
        (
            {"hidden_size": 12, "num_attention_heads": 4, "position_embedding_type": "rotary"},
            "must be even for rotary",
        ),
    ],
)
def test_impossible_configurations_are_refused(tiny_config, fields, message):
    with pytest.raises(Exception, match=message):
        changed(tiny_config, **fields)
