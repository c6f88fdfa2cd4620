"""What is measured and decided before training."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB_SIZE

from hf_cram import CrammedBertConfig, CrammedBertForMaskedLM
from hf_cram.hardware import (
    bf16_is_faster,
    bf16_trains_faster,
    builds_libraries,
    can_compile,
    compile_pays_off,
    largest_linear_shape,
    measure_matmul_flops,
    measure_peak_flops,
    training_flops,
)
from hf_cram.out_of_memory import is_out_of_memory

CPU = torch.device("cpu")


def fake_counter(monkeypatch):
    """A list of the time that passes for what is measured: only when told to."""
    now = [0.0]
    monkeypatch.setattr("hf_cram.hardware.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_flops_of_a_row_are_those_of_its_matrix_products(tiny_config):
    model = CrammedBertForMaskedLM(tiny_config)
    input_ids = torch.full((2, 16), 9)
    positions = torch.tensor([[1, 2, 3, 4]] * 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counted = training_flops(model, {"input_ids": input_ids, "labels": input_ids, "masked_positions": positions})
    H, I = 32, 64  # noqa: E741
    tokens, masked = 32, 8
    query_key_value = 3 * H * H
    rest = (
        2 * 16 * H + H * H + H * I + I // 2 * H
    )  # scores and sums over 16 positions, output projection, feed-forward
    first_layer = tokens * (query_key_value + rest)
    last_layer = tokens * 2 * H * H + masked * (H * H + rest)  # keys and values of all
    # forward once, backward twice; two operations a product
    assert counted == 6 * (first_layer + last_layer + masked * H * VOCAB_SIZE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_peak_is_measured():
    assert measure_matmul_flops(CPU, torch.float32, (64, 64), seconds=0.0) > 1e6


@pytest.mark.parametrize("predicted_share", [1.0, 0.25])
def test_the_peak_of_a_model_is_that_of_its_products(tiny_config, monkeypatch, predicted_share):
    """Of the logits, here ten times as slow, only those that are computed count."""
    decoder = (VOCAB_SIZE, 32)
    monkeypatch.setattr(
        "hf_cram.hardware.measure_matmul_flops", lambda device, dtype, shape, _: 1e9 if shape == decoder else 1e10
    )
    layer = 3 * 32 * 32 + 32 * 32 + 32 * 64 + 32 * 32
    layers, logits = 2 * layer, predicted_share * VOCAB_SIZE * 32
    peak = measure_peak_flops(CrammedBertForMaskedLM(tiny_config), CPU, torch.float32, predicted_share=predicted_share)
    assert peak == pytest.approx((layers + logits) / (layers / 1e10 + logits / 1e9))


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_precision_is_found(faster, monkeypatch):
    now = fake_counter(monkeypatch)

    class Uneven(torch.nn.Module):
        """Slow in one precision."""

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, inputs):
            if torch.is_autocast_enabled("cpu") != faster:
                now[0] += 1
            return (self.layer(inputs).sum(),)

    assert bf16_trains_faster(Uneven(), {"inputs": torch.ones(1, 4)}) is faster


def test_largest_linear_layer(tiny_config):
    assert largest_linear_shape(CrammedBertForMaskedLM(tiny_config)) == (VOCAB_SIZE, 32)
    assert largest_linear_shape(torch.nn.Conv1d(1, 1, 1)) == (1024, 1024)


def test_compiling_is_for_budgets_that_repay_it(tiny_config, monkeypatch):
    model = CrammedBertForMaskedLM(tiny_config)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not can_compile(CPU)
    assert not compile_pays_off(model, CPU, 86400.0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # Triton is there, and builds with C
    monkeypatch.setenv("CC", sys.executable)
    assert can_compile(torch.device("cuda"))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not can_compile(torch.device("cuda"))
    monkeypatch.setattr("hf_cram.hardware.can_compile", lambda device: True)
    assert compile_pays_off(model, CPU, 86400.0)
    assert not compile_pays_off(model, CPU, 30.0)
    assert not compile_pays_off(model, CPU, None)
    with torch.device("meta"):
        deep = CrammedBertForMaskedLM(CrammedBertConfig(num_hidden_layers=48))
    assert not compile_pays_off(deep, CPU, 600.0)


@pytest.mark.parametrize(("body", "works"), [("exit 1", False), ("exit 0", False), ('exec g++ "$@"', True)])
def test_a_compiler_that_builds_nothing_is_none(tmp_path, monkeypatch, body, works):
    """As of an old one, which does not know the language, or where a library cannot be loaded."""
    if works and not can_compile(CPU):
        pytest.skip(
            "this machine does not compile: a C++ compiler, Python's headers or a place for programs is missing"
        )
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    builds_libraries.cache_clear()
    assert can_compile(CPU) == works


def test_a_change_of_attention_lets_shorter_budgets_pay_for_compiling(monkeypatch):
    monkeypatch.setattr("hf_cram.hardware.can_compile", lambda device: True)
    with torch.device("meta"):
        model = CrammedBertForMaskedLM(CrammedBertConfig(num_hidden_layers=4))
    budgets = (60.0, 180.0, 600.0)
    assert [compile_pays_off(model, CPU, seconds) for seconds in budgets] == [False, False, True]
    assert [compile_pays_off(model, CPU, seconds, True) for seconds in budgets] == [False, True, True]


def test_running_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**16)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(caught.value)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_faster_precision_of_a_layer_is_taken(monkeypatch, bf16):
    forward, now = torch.nn.Linear.forward, fake_counter(monkeypatch)

    def slower_in_the_other(self, inputs):
        if torch.is_autocast_enabled("cpu") != bf16:
            now[0] += 1
        return forward(self, inputs)

    monkeypatch.setattr(torch.nn.Linear, "forward", slower_in_the_other)
    assert bf16_is_faster(torch.device("cpu"), (8, 8), seconds=0.0) is bf16
