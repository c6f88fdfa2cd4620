"""Muon against torch's own and AdamW against torch's own; which parameter is whose."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from hf_cram import CrammedBertForMaskedLM
from hf_cram.optimization import MuonWithAdamW, muon_parameter_groups, orthogonalize


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)], ids=str)
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    values = torch.linalg.svdvals(orthogonalize(matrices, 5).float())
    assert values.max() < 1.3
    assert values.median() > 0.6
    torch.testing.assert_close(orthogonalize(matrices[1:2], 5)[0], orthogonalize(matrices, 5)[1], rtol=0.05, atol=0.01)


def test_a_gradient_of_zeros_moves_nothing():
    weight = nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.zeros(4, 4)
    MuonWithAdamW([{"params": [weight], "parts": 1}], lr=0.1).step()
    assert torch.equal(weight, torch.ones(4, 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own Muon since 2.9")
@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)], ids=str)
def test_matrices_step_like_torchs_muon(shape):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = (
        MuonWithAdamW([{"params": [ours], "parts": 1}], lr=0.1, weight_decay=1.0),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=1.0),
    )
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=5e-3)


def test_a_fused_projection_steps_like_its_parts():
    torch.manual_seed(0)
    gradient = torch.randn(48, 16)
    fused = nn.Parameter(torch.zeros(48, 16))
    fused.grad = gradient
    parts = [nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]
    for part, part_gradient in zip(parts, gradient.chunk(3), strict=True):
        part.grad = part_gradient
    MuonWithAdamW([{"params": [fused], "parts": 3}], lr=0.1).step()
    MuonWithAdamW([{"params": parts, "parts": 1}], lr=0.1).step()
    torch.testing.assert_close(fused, torch.cat(parts), rtol=0, atol=0)


def test_everything_else_steps_like_torchs_adamw():
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(7))] for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01}
    optimizers = MuonWithAdamW(ours, **settings), torch.optim.AdamW(theirs, fused=True, **settings)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_a_loaded_state_goes_on_as_the_saved_one():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.ones(6, 3)), nn.Parameter(torch.ones(7))]

    def build(weights):
        return MuonWithAdamW([{"params": weights[:1], "parts": 1}, {"params": weights[1:]}], lr=0.1)

    def step(optimizer, weights, seed):
        for parameter in weights:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    optimizer = build(parameters)
    step(optimizer, parameters, 1)
    state = copy.deepcopy(optimizer.state_dict())
    assert all(group["fused"] for group in state["param_groups"])  # moves the count of steps to the device
    clones = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = build(clones)
    resumed.load_state_dict(state)
    step(optimizer, parameters, 2)
    step(resumed, clones, 2)
    for parameter, clone in zip(parameters, clones, strict=True):
        assert torch.equal(parameter, clone)


def test_a_state_moves_to_the_device_of_the_parameters():
    def build(device):
        parameters = [nn.Parameter(torch.ones(6, 3, device=device)), nn.Parameter(torch.ones(7, device=device))]
        return parameters, MuonWithAdamW([{"params": parameters[:1], "parts": 1}, {"params": parameters[1:]}])

    parameters, optimizer = build("cpu")
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    _, elsewhere = build("meta")
    elsewhere.load_state_dict(optimizer.state_dict())
    tensors = [tensor for state in elsewhere.state.values() for tensor in state.values()]
    assert len(tensors) == 4
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_scaled_loss_gives_the_same_step_and_an_overflow_none():
    """fp16 training scales the loss; the scaler must not leave the unscaling to this optimiser, fused as it says it is."""
    torch.manual_seed(0)
    gradients = [torch.randn(6, 3), torch.randn(7)]

    def stepped(scale):
        weights = [nn.Parameter(torch.ones(6, 3)), nn.Parameter(torch.ones(7))]
        optimizer = MuonWithAdamW([{"params": weights[:1], "parts": 1}, {"params": weights[1:]}], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for factor in (1.0, torch.inf):
            loss = sum((weight * gradient).sum() for weight, gradient in zip(weights, gradients, strict=True))
            scaler.scale(loss * factor if scale > 1 else loss).backward()
            if scale > 1 or factor == 1:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        return weights

    for scaled, plain in zip(stepped(1024.0), stepped(1.0), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=0, atol=0)


def test_muon_takes_the_matrices_of_the_layers_and_nothing_else(tiny_config):
    tiny_config.tie_word_embeddings = False
    model = CrammedBertForMaskedLM(tiny_config)
    groups = muon_parameter_groups(model, 1e-3, 0.02, weight_decay=0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names) == sorted(id(parameter) for group in groups for parameter in group["params"])
    for group in groups:
        assert group["lr"] == (0.02 if group["parts"] else 1e-3)
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert bool(group["parts"]) == (".layers." in name and "norm" not in name), name
            assert group["weight_decay"] == (0.01 if parameter.ndim == 2 else 0.0), name
            if group["parts"]:
                assert group["parts"] == {"query_key_value": 3, "dense_in": 2}.get(name.split(".")[-2], 1), name


def test_muon_knows_the_layers_of_transformers_own_models():
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = BertForMaskedLM(config)
    matrices = [
        parameter
        for group in muon_parameter_groups(model, 1e-3, 0.02, 0.0)
        if group["parts"]
        for parameter in group["params"]
    ]
    assert len(matrices) == 2 * 6  # query, key, value, attention output, two of the feed-forward block


def test_muon_needs_layers(tiny_config):
    tiny_config.num_hidden_layers = 0
    with pytest.raises(ValueError, match="inside a model's layers .*, and CrammedBertForMaskedLM has none"):
        muon_parameter_groups(CrammedBertForMaskedLM(tiny_config), 1e-3, 0.02, 0.0)
