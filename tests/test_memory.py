"""The memory of a training step, calculated without taking any."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY, VOCAB_SIZE, kept_estimates
from transformers import BertConfig

from hf_cram import CrammedBertConfig, CrammedBertForMaskedLM, memory, training_memory
from hf_cram.data.pipeline import DataArguments
from hf_cram.memory import recipe_setup
from hf_cram.optimization import muon_parameter_groups
from hf_cram.script_args import MaskingArguments
from hf_cram.training_args import CramTrainingArguments
from hf_cram.training_memory import (
    StorageLedger,
    TrainingSetup,
    estimate_training_memory,
    largest_micro_batch,
    measure_tensor_memory,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# In fp32, one micro-batch a step: the plainest case.
PLAIN = TrainingSetup(max_seq_length=16, autocast_dtype=None, accumulates_gradients=False)


@pytest.fixture(scope="module", autouse=True)
def estimates():
    with kept_estimates(training_memory, memory):
        yield


def weight_bytes(config):
    model = CrammedBertForMaskedLM(config)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return sum(parameter.nbytes for parameter in model.parameters()), buffers, len(list(model.parameters()))


def test_ledger_counts_storages_from_birth_to_death():
    with StorageLedger() as ledger:
        weight = ledger.mark(torch.ones(8, 4), "weights")  # 128 bytes
        half = weight.bfloat16()  # 64 bytes
        view = weight.T[1:]
        product = view @ torch.ones(8, 16)  # 512 bytes for the ones, 192 for the product
        assert ledger.live == {"weights": 128, "autocast_copies": 64, "temporaries": 192}
        product.mul_(2)
        del half, view
        assert ledger.live.total() == 128 + 192
    assert ledger.peak.total() == 128 + 64 + 512 + 192


def test_checkpointing_one_of_two_layers_lies_between_all_and_none(tiny_config):
    tiny_config.num_hidden_layers = 6
    none, half, all_of_them = (
        estimate_training_memory(tiny_config, replace(PLAIN, **changes), 256).total_bytes
        for changes in (
            {}, {"gradient_checkpointing": True, "checkpointed_every": 2}, {"gradient_checkpointing": True},
        )
    )  # fmt: skip
    assert none > 1.05 * half > 1.05**2 * all_of_them


def test_what_a_recipe_says_of_checkpointing_counts(tmp_path):
    def setup(**kwargs):
        training_args = CramTrainingArguments(
            output_dir=str(tmp_path), max_steps=1, use_cpu=True, activation_checkpointing=True,
            activation_checkpointing_kwargs=kwargs,
        )  # fmt: skip
        return recipe_setup(DataArguments(), MaskingArguments(), training_args)

    assert setup(every_n_layers=4).checkpointed_every == 4
    with pytest.raises(
        ValueError, match="activation_checkpointing_kwargs: what offload leaves on the GPU is not known"
    ):
        setup(offload=True)


def test_lasting_parts_are_those_of_the_parameters(tiny_config):
    parameters, buffers, count = weight_bytes(tiny_config)
    # Many rows: the peak is in backward, where the gradients of earlier micro-batches are there.
    counted = estimate_training_memory(tiny_config, replace(PLAIN, accumulates_gradients=True), 512)
    assert counted.weights == parameters + buffers
    assert counted.gradients == parameters
    assert counted.optimizer_states == 2 * parameters + 4 * count  # two moments and a step each
    assert counted.autocast_copies == 0


def test_logits_and_their_gradient_are_temporaries_of_the_peak(tiny_config):
    tiny_config.vocab_size = 20_000
    counted = estimate_training_memory(tiny_config, PLAIN, 64)
    logits = 64 * 4 * 20_000 * 4  # 4 of 16 tokens are predicted
    assert counted.gradients == 0
    # Log-probabilities are kept for backward; two gradients of the same size come at the peak.
    assert logits <= counted.activations <= 1.2 * logits
    assert logits <= counted.temporaries <= 2.2 * logits


def test_muon_keeps_one_state_for_the_matrices_of_the_layers(tiny_config):
    groups = muon_parameter_groups(CrammedBertForMaskedLM(tiny_config), 1.0, 1.0, 0.0)
    matrices = [parameter for group in groups if group["parts"] for parameter in group["params"]]
    adamw, muon = (
        estimate_training_memory(tiny_config, replace(PLAIN, optimizer=name), 512)
        for name in training_memory.OPTIMIZERS
    )
    expected = sum(parameter.nbytes for parameter in matrices) + 4 * len(matrices)
    assert adamw.optimizer_states - muon.optimizer_states == expected


@pytest.mark.parametrize(
    "setup",
    [
        PLAIN,
        TrainingSetup(16, 0.25, torch.float16),
        TrainingSetup(16, 0.25, torch.bfloat16, "muon", gradient_checkpointing=True),
    ],
    ids=["fp32", "fp16", "bf16-muon-checkpointing"],
)
def test_the_calculation_is_what_real_tensors_take(tiny_config, setup):
    assert estimate_training_memory(tiny_config, setup, 8) == measure_tensor_memory(tiny_config, setup, 8)


def test_other_choices_of_the_configuration_are_counted_alike(tiny_config):
    config = CrammedBertConfig.original_bert(**{
        name: getattr(tiny_config, name)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    })  # fmt: skip
    assert estimate_training_memory(config, PLAIN, 8) == measure_tensor_memory(config, PLAIN, 8)


def test_saved_bytes_are_the_storages_that_autograd_keeps(tiny_config):
    model = CrammedBertForMaskedLM(tiny_config).train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
    ids = torch.randint(5, VOCAB_SIZE, (8, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        output = model(input_ids=ids, labels=ids, masked_positions=ids[:, :4] % 16)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    kept = sum(size for pointer, size in storages.items() if pointer not in parameters)
    assert output.loss is not None
    assert estimate_training_memory(tiny_config, PLAIN, 8).saved_bytes == kept


def test_activations_grow_with_the_rows(tiny_config):
    eight, sixteen, thirty_two = (
        estimate_training_memory(tiny_config, PLAIN, rows).saved_bytes for rows in (8, 16, 32)
    )
    assert thirty_two - sixteen == 2 * (sixteen - eight) > 0


def test_checkpointing_and_half_precision_save_memory(tiny_config):
    def total(**changes):
        return estimate_training_memory(tiny_config, replace(PLAIN, **changes), 64).total_bytes

    assert total(gradient_checkpointing=True) < 0.8 * total()
    assert total(autocast_dtype=torch.bfloat16) < 0.9 * total()
    assert total(accumulates_gradients=True) > total()


def test_models_without_masked_positions_predict_every_token():
    config = BertConfig(
        vocab_size=20_000, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    assert estimate_training_memory(config, PLAIN, 8).total_bytes > 3 * 8 * 16 * 20_000 * 4


def test_the_papers_model_is_counted_without_taking_its_memory():
    counted = estimate_training_memory(CrammedBertConfig(), TrainingSetup(autocast_dtype=torch.float16), 2048)
    assert counted.total_bytes > 100 * 2**30
    layer = 768 * (3 * 768 + 768 + 3072 + 3072 // 2) + 4 * 768  # matrices, and two norms with weight and bias
    parameters = 16 * layer + 32768 * 768 + 4 * 768 + 1  # embeddings, two norms more, the scale of the positions
    assert counted.gradients == 4 * parameters


@pytest.mark.parametrize("memory_bytes", [3e6, 7.7e6, 50e6])
def test_largest_micro_batch_is_the_largest_that_fits(tiny_config, memory_bytes):
    rows = largest_micro_batch(tiny_config, PLAIN, memory_bytes, reserve_bytes=1e6, reserve_share=0.1)
    assert rows > 0
    assert rows % 8 == 0

    def needed(rows):
        return 1.1 * estimate_training_memory(tiny_config, PLAIN, rows).total_bytes + 1e6

    assert needed(rows) <= memory_bytes < needed(rows + 8)


def test_no_micro_batch_fits_into_nothing(tiny_config):
    assert largest_micro_batch(tiny_config, PLAIN, 1e5, reserve_bytes=0) == 0
    assert largest_micro_batch(tiny_config, PLAIN, 1e9) == 0  # all of it is reserve


def test_wrong_setups_are_refused():
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'sgd'"):
        TrainingSetup(optimizer="sgd")
    with pytest.raises(ValueError, match="mlm_probability must lie between 0 and 1"):
        TrainingSetup(mlm_probability=25)


def test_command_prints_the_largest_micro_batch_of_a_recipe(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "vocab_size: 4096\nhidden_size: 32\nnum_hidden_layers: 1\nnum_attention_heads: 4\nintermediate_size: 64\n"
        "output_dir: out\ntime_budget: 1h\nmlm_probability: 0:0.5,0.5:0.25\nmax_seq_length: 16\nbf16: false\n"
        "per_device_train_batch_size: 4\ntrain_batch_rows: 16\nmuon_learning_rate: 0.02\n"
    )
    monkeypatch.setattr(sys, "argv", ["memory", str(recipe), "--gpu_memory_gb", "0.9357", "1.25", "2"])
    memory.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 layers x 32, vocabulary 4096, rows of 16 tokens, 8 masked, float32, muon")
    assert lines[1].startswith("micro-batch 4: 0.00 GB: weights 0.00, gradients 0.00")
    tiny, small, large = (int(line.split()[-1]) for line in lines[2:])
    assert lines[3].startswith("1.25 GB: largest micro-batch ")
    assert 0 < tiny < 8 <= small < large


@pytest.fixture
def largest(tmp_path, monkeypatch, capsys):
    """The largest micro-batch that the command prints for a small model in `memory_gb`."""

    def run(memory_gb, *options):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            "vocab_size: 512\nhidden_size: 32\nnum_hidden_layers: 1\nnum_attention_heads: 4\nintermediate_size: 64\n"
            "output_dir: out\ntime_budget: 1h\nmax_seq_length: 128\nbf16: false\n"
        )
        monkeypatch.setattr(sys, "argv", ["memory", str(recipe), "--gpu_memory_gb", memory_gb, *options])
        memory.main()
        return int(capsys.readouterr().out.split()[-1])

    return run


def test_a_card_that_holds_less_than_the_recipes_batch_accumulates_gradients(largest):
    shape = ("--vocab_size", "65536", "--hidden_size", "512", "--max_seq_length", "16")
    whole = largest("3", *shape, "--per_device_train_batch_size", "8")
    split = largest("3", *shape, "--per_device_train_batch_size", "4096")
    assert 8 < split < whole < 4096
    assert split == largest("3", *shape, "--per_device_train_batch_size", "4096", "--train_batch_rows", "8192")


def test_command_heeds_attention_and_refuses_what_it_does_not_know(largest, capsys):
    assert largest("1.25", "--attn_implementation", "eager") < largest("1.25")  # keeps the weights of the attention
    with pytest.raises(ValueError, match="optim: the states of sgd are not known here"):
        largest("1.25", "--optim", "sgd")
    with pytest.raises(SystemExit):
        largest("inf")
    assert "gpu_memory_gb must be numbers above 0, got inf" in capsys.readouterr().err


@pytest.mark.slow
def test_measured_memory_is_within_15_percent_of_the_calculation(python_environment):
    command = [sys.executable, str(REPOSITORY / "benchmarks/memory.py"), "--cases", "small-64-accumulating"]
    result = subprocess.run(command, capture_output=True, text=True, env=python_environment, check=True)
    assert result.stdout.rstrip().splitlines()[-1].split()[4] == "PASS", result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", sorted((REPOSITORY / "training_args").glob("*24h*.yaml")), ids=lambda path: path.stem
)
def test_a_days_recipe_tells_what_fits_which_card_as_calculated(recipe, monkeypatch, capsys):
    said = " ".join(re.sub(r"^# ?", "", line) for line in recipe.read_text().splitlines() if line.startswith("#"))
    size, *rows = re.search(
        r"takes ([\d.]+) GB; the largest that fit 11, 16, 48 and 80 GB are (\d+), (\d+), (\d+) and (\d+) rows", said
    ).groups()
    monkeypatch.setattr(sys, "argv", ["memory", str(recipe)])
    memory.main()
    printed = capsys.readouterr().out
    assert re.search(r"^micro-batch \d+: ([\d.]+) GB", printed, re.MULTILINE)[1] == size
    assert re.findall(r"largest micro-batch (\d+)", printed) == rows
