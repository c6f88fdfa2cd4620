"""The model and the training that a budget calls for."""

import math
import subprocess
import sys

import psutil
import pytest
import torch
import yaml
from conftest import REPOSITORY, kept_estimates
from transformers import AutoModelForMaskedLM

from hf_cram import CrammedBertForMaskedLM, plan
from hf_cram.hardware import random_batch, training_flops
from hf_cram.plan import choose, describe, describe_ratio, main, nearest_first, plan_training
from hf_cram.recipes import RecipeParser
from hf_cram.script_args import RECIPE_PARTS, planned_config
from hf_cram.shapes import (
    NEIGHBOUR_TABLE,
    SHAPES,
    Machine,
    best_tokens_per_parameter,
    count_work,
    evaluate_shape,
    main_memory_bytes,
)
from hf_cram.training_args import CramTrainingArguments
from hf_cram.training_memory import BYTES_PER_GB, RESERVE_BYTES

# Matrix products in bf16, a second: those that 2 CPU cores reached, and a large GPU's.
CPU = Machine(lambda shape: 5e11, "bf16", 24 * BYTES_PER_GB, is_cpu=True)
GPU = Machine(lambda shape: 1e14, "bf16", 48 * BYTES_PER_GB)


@pytest.fixture(scope="module", autouse=True)
def estimates():
    with kept_estimates(plan):
        yield


@pytest.fixture(scope="module")
def day():
    """The plan for a day on the GPU."""
    return plan_training("24h", GPU)[0]


def parse(path):
    parts = RecipeParser((*RECIPE_PARTS, CramTrainingArguments)).parse([str(path), "--output_dir", "out"])
    return planned_config(parts[0], parts[1]), parts[1], parts[-1]


def test_parameters_and_flops_are_those_of_the_real_model():
    for sees_few_tokens, share in ((True, 0.4), (False, 0.3)):
        model = CrammedBertForMaskedLM(SHAPES[0].config(32, sees_few_tokens))
        batch = random_batch(model, SHAPES[0].vocab_size, (8, 32), share, torch.device("cpu"))
        counted = model.num_parameters(), training_flops(model, batch) / (8 * 32)
        assert count_work(SHAPES[0], 32, sees_few_tokens) == counted


def test_more_time_never_plans_a_smaller_model_and_each_shape_has_its_time():
    sizes = []
    for power in range(26):  # of two, from a tenth of a second to a month
        candidates = [evaluate_shape(shape, 0.1 * 2**power, GPU, 128) for shape in SHAPES]
        sizes.append(SHAPES.index(nearest_first(candidates)[0].shape))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(SHAPES)


def test_a_machine_ten_times_as_fast_plans_in_a_tenth_of_the_time_alike():
    fast = Machine(lambda shape: 5e12, "bf16", CPU.memory_bytes, is_cpu=True)
    assert plan_training("1h", CPU)[0].recipe("1h") == plan_training("6m", fast)[0].recipe("1h")


def test_larger_budgets_call_for_more_tokens_a_parameter_within_what_is_known():
    ratios = [best_tokens_per_parameter(10.0**power) for power in range(10, 24)]
    assert ratios == sorted(ratios)
    assert ratios[0] == ratios[1] < ratios[-1]
    assert ratios[-1] == ratios[-2] == pytest.approx(20 / 0.3)


def test_the_micro_batch_fits_the_memory_and_the_batch_does_not_depend_on_it():
    candidates = [evaluate_shape(SHAPES[2], 3600, GPU, 128)]
    large = choose(candidates, GPU, 128)
    small = choose(candidates, Machine(GPU.matmul_flops, "bf16", 2 * BYTES_PER_GB), 128)
    assert small.batch_rows == large.batch_rows
    assert small.micro_batch_rows < large.micro_batch_rows <= large.batch_rows
    assert small.batch_rows % small.micro_batch_rows == 0


def test_a_model_that_does_not_fit_gives_way_to_one_that_does():
    candidates = [evaluate_shape(shape, 600, CPU, 128) for shape in SHAPES[:2]]
    table = math.prod(NEIGHBOUR_TABLE.values())
    tight = Machine(CPU.matmul_flops, "bf16", RESERVE_BYTES + 1.1 * table + 100e6, is_cpu=True)
    assert choose(candidates, CPU, 128).candidate.shape == SHAPES[1]
    smaller = choose(candidates, tight, 128)
    assert smaller.candidate.shape == SHAPES[0]
    assert f"the nearest that fits the memory (4 x {SHAPES[1].hidden_size} does not) to" in describe(
        smaller, candidates, "10m"
    )
    with pytest.raises(ValueError, match="0.9 GB hold of no shape 8 rows of 128 tokens"):
        choose(candidates, Machine(CPU.matmul_flops, "bf16", RESERVE_BYTES + 1e6, is_cpu=True), 128)


def test_batches_of_longer_rows_have_as_many_tokens_but_never_too_few_rows():
    candidates = [evaluate_shape(SHAPES[1], 3600, GPU, length) for length in (128, 512)]
    assert choose(candidates[:1], GPU, 128).batch_tokens == choose(candidates[1:], GPU, 512).batch_tokens
    assert plan_training("10m", CPU, max_seq_length=512)[0].batch_rows == 8


def test_muon_comes_with_large_batches_and_the_rate_falls_with_the_width(day):
    assert "muon_learning_rate" not in plan_training("10m", CPU)[0].recipe("10m")
    assert day.recipe("24h")["muon_learning_rate"] == 0.02
    assert (day.candidate.shape.hidden_size, day.learning_rate) == (768, 1.2e-3)


def test_the_plan_for_ten_minutes_on_two_cores_is_the_quickstart():
    quickstart = yaml.safe_load((REPOSITORY / "training_args/quickstart.yaml").read_text())
    recipe = yaml.safe_load(yaml.safe_dump(plan_training("10m", CPU)[0].recipe("10m")))
    # The batch of one micro-batch and the rows' usual length are its defaults.
    assert recipe.pop("train_batch_rows") == recipe["per_device_train_batch_size"]
    assert (recipe.pop("max_seq_length"), recipe.pop("max_position_embeddings")) == (128, 512)
    for key, value in recipe.items():
        given = quickstart[key]
        assert float(given) == value if isinstance(value, float) else given == value, key


@pytest.mark.parametrize("name", ["speedrun_10m_cpu", "speedrun_1h_cpu", "speedrun_24h"])
def test_the_speedrun_recipes_are_plans(name, day):
    recipe = yaml.safe_load((REPOSITORY / "training_args" / f"{name}.yaml").read_text())
    budget = recipe["time_budget"]
    planned = (day if name == "speedrun_24h" else plan_training(budget, CPU)[0]).recipe(budget)
    assert recipe == yaml.safe_load(yaml.safe_dump({"output_dir": f"out/{name}", **planned}))


@pytest.mark.parametrize("max_seq_length", [128, 1024])
def test_every_recipe_is_one_that_the_main_job_takes(tmp_path, max_seq_length):
    for precision in ("bf16", "fp32"):
        plan, _ = plan_training("3h", Machine(CPU.matmul_flops, precision, CPU.memory_bytes, True), max_seq_length)
        path = tmp_path / f"{precision}.yaml"
        path.write_text(yaml.safe_dump(plan.recipe("3h")))
        config, data_args, training_args = parse(path)
        with torch.device("meta"):
            model = AutoModelForMaskedLM.from_config(config)
        assert model.num_parameters() == plan.candidate.num_parameters
        assert data_args.max_seq_length == max_seq_length <= config.max_position_embeddings
        assert training_args.largest_batch_rows == plan.batch_rows
        assert training_args.bf16 is None  # the run measures


def test_ratios_of_the_table():
    assert [describe_ratio(number) for number in (0.0412, 9.96, 150, 2048)] == ["0.041", "10", "150", "2,048"]


def test_the_program_prints_its_reasons_and_writes_a_recipe_once(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    arguments = ["--time_budget", "2h", "--matmul_tflops", "1", "--memory_gb", "24", "--output_recipe", str(path)]
    main(arguments)
    table, _, recipe = capsys.readouterr().out.partition("\n\n")
    assert all(f"\n{reason}: " in table for reason in ("Speed", "Size", "Batch", "Masked", "Rate"))
    assert yaml.safe_load(recipe) == yaml.safe_load(path.read_text())
    (chosen,) = [line for line in table.splitlines() if line.endswith("<-")]
    config, _, _ = parse(path)
    assert chosen.startswith(f"{config.num_hidden_layers} x {config.hidden_size} ")
    with pytest.raises(SystemExit):
        main(arguments)
    assert "output_recipe must name a new .yaml file" in capsys.readouterr().err


def test_a_budget_beyond_the_shapes_says_so(capsys):
    main(["--time_budget", "1s", "--matmul_tflops", "0.001", "--memory_gb", "8"])
    assert "The shapes end here" in capsys.readouterr().out


def test_a_budget_between_two_shapes_is_not_beyond_them(capsys):
    main(["--time_budget", "5m", "--matmul_tflops", "0.7", "--memory_gb", "8"])
    table = capsys.readouterr().out
    assert not table.splitlines()[1].endswith("<-")
    assert "The shapes end here" not in table


def test_the_memory_of_a_container_is_its_limit(tmp_path, monkeypatch):
    machine = psutil.virtual_memory().total
    for text, expected in (("1000000000\n", 10**9), ("max\n", machine), (str(2**63), machine)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr("hf_cram.shapes.CGROUP_MEMORY_LIMITS", (tmp_path / "absent", tmp_path / "memory.max"))
        assert main_memory_bytes() == expected


@pytest.mark.slow
def test_this_machine_is_measured():
    command = [sys.executable, "-m", "hf_cram.plan", "--time_budget", "1m"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.count("<-") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --time_budget"),
        (["--time_budget", "soon"], "'soon' is not a duration"),
        (["--time_budget", "10m", "--matmul_tflops", "0"], "matmul_tflops must be a number above 0"),
        (["--time_budget", "10m", "--memory_gb", "nan"], "memory_gb must be a number above 0"),
        (["--time_budget", "10m", "--memory_gb", "8"], "give both or neither"),
        (["--time_budget", "10m", "--max_seq_length", "4"], "max_seq_length must be at least 8"),
        (["--time_budget", "10m", "--output_recipe", "."], "output_recipe must name a new .yaml file"),
        (["--time_budget", "10m", "--output_recipe", "absent/a.yaml"], "in a folder that is there"),
        (["--time_budget", "10m", "--tflops", "4"], "unknown option --tflops; did you mean 'matmul_tflops'?"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
