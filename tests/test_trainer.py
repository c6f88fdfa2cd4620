"""The Trainer under its clock: stopping, following, resuming, skipping - with any model."""

import contextlib
import copy
import dataclasses
import errno
import functools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from conftest import VOCAB_SIZE, Rows, make_tiny_config
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_cram import CrammedBertForMaskedLM, hardware_choices
from hf_cram import trainer as trainer_module
from hf_cram.callbacks import LossCurveCallback
from hf_cram.checkpointing import (
    CheckpointError,
    Heartbeat,
    RunState,
    clear_staging,
    last_checkpoint,
    publish_checkpoint,
    rotate,
)
from hf_cram.data.collator import DataCollatorForFixedCountMasking, masked_tokens
from hf_cram.hardware import RESET_PEAK, training_flops
from hf_cram.modeling_crammed_bert import eager_attention_forward
from hf_cram.out_of_memory import MicroBatchMemoryError
from hf_cram.output_folder import move_earlier_run_aside
from hf_cram.row_stream import RowStream
from hf_cram.trainer import CramTrainer, NonFiniteError, forget_preparation
from hf_cram.training_args import CramTrainingArguments, check_given


class FakeClock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Pass(TrainerCallback):
    """Lets a step take a second of fake time."""

    def __init__(self, clock, seconds=1.0):
        self.clock, self.seconds = clock, seconds

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.clock.now += self.seconds


class Advance(Pass):
    """Notes what it saw at each step, too."""

    def __init__(self, clock, seconds=1.0):
        super().__init__(clock, seconds)
        self.trainer = None
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        lr = self.trainer.optimizer.param_groups[0]["lr"]
        self.seen.append((lr, self.trainer.data_collator.mlm_probability))


def make_arguments(output_dir, **values):
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "torch_compile": False,
        "use_cpu": True,
    }
    return CramTrainingArguments(**{**defaults, **values})


def make_trainer(config, tokenizer, output_dir, *, rate="0.25", callbacks=(), dataset=None, held_out=None, model=None,
                 clock=None, **values):  # fmt: skip
    set_seed(0)
    arguments = make_arguments(output_dir, **values)
    collator = DataCollatorForFixedCountMasking(tokenizer, rate)
    options = {} if clock is None else {"time_function": clock}
    return CramTrainer(
        model or CrammedBertForMaskedLM(config),
        arguments,
        eval_data_collator=DataCollatorForFixedCountMasking(tokenizer, 0.15, seed=7),
        train_dataset=dataset or Rows(64),
        eval_dataset=held_out or Rows(16, seed=1),
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **options,
    )


@pytest.fixture
def own_accelerator():
    """The process shares one state of precision and compiling; others must not find this test's."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def run_with_fake_clock(config, tokenizer, output_dir, seconds=1.0, **values):
    clock = FakeClock()
    advance = Advance(clock, seconds)
    trainer = make_trainer(config, tokenizer, output_dir, callbacks=[advance], clock=clock, **values)
    advance.trainer = trainer
    trainer.train()
    return trainer, advance


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first, second):
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_schedules_follow_the_clock_and_the_run_stops_at_the_budget(tiny_config, tokenizer, tmp_path):
    trainer, advance = run_with_fake_clock(
        tiny_config, tokenizer, tmp_path, time_budget="20s", lr_schedule="triangle2", rate="0:0.5,0.5:0.25",
        train_batch_rows=16, batch_ramp_until=0.5, logging_interval="5%",
    )  # fmt: skip
    assert trainer.state.global_step == 20
    assert trainer.budget_metrics()["train_seconds"] == 20.0
    rates = [lr for lr, _ in advance.seen]
    expected = [1e-2 * (0.25 + 0.75 * (s / 15) if s <= 15 else (20 - s) / 5) for s in range(20)]
    assert rates == pytest.approx(expected)
    assert [rate for _, rate in advance.seen] == [0.5] * 10 + [0.25] * 10
    batches = [entry["batch_rows"] for entry in trainer.state.log_history if "batch_rows" in entry]
    assert batches == sorted(batches)
    assert batches[-1] == 16
    steps = [4 * round(1 + 3 * min(s / 10, 1)) for s in range(20)]
    assert trainer.run_state.rows_seen == sum(steps)
    assert trainer.run_state.tokens_seen == 16 * sum(steps)


def test_both_learning_rates_of_muon_follow_the_clock(tiny_config, tokenizer, tmp_path):
    trainer, _ = run_with_fake_clock(
        tiny_config, tokenizer, tmp_path, time_budget="5s", lr_schedule="linear",
        lr_scheduler_kwargs={"final_factor": 0.5}, muon_learning_rate=0.04,
    )  # fmt: skip
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == pytest.approx([5e-3, 0.02])


def test_stop_is_at_most_one_step_late(tiny_config, tokenizer, tmp_path):
    trainer, _ = run_with_fake_clock(tiny_config, tokenizer, tmp_path, seconds=3.0, time_budget="10s")
    assert trainer.state.global_step == 4
    assert trainer.budget_metrics()["train_seconds"] == 12.0


def test_max_steps_is_an_upper_limit(tiny_config, tokenizer, tmp_path):
    trainer, advance = run_with_fake_clock(
        tiny_config, tokenizer, tmp_path, time_budget="1000s", max_steps=4, lr_schedule="linear"
    )
    assert trainer.state.global_step == 4
    assert [lr for lr, _ in advance.seen] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_real_seconds(tiny_config, tokenizer, tmp_path):
    first = make_trainer(tiny_config, tokenizer, tmp_path / "first", max_steps=1)
    first.train()
    seconds = 1 + 3 * first.run_state.elapsed_seconds  # of a busy machine, starting may take one
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path / "second", time_budget=f"{seconds}s", logging_interval="20%"
    )
    trainer.train()
    metrics = trainer.budget_metrics()
    assert metrics["train_seconds"] >= seconds
    assert metrics["tokens_seen"] == metrics["samples_seen"] * 16
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged
    for key in ("elapsed_seconds", "tokens_seen", "tokens_per_second", "model_flops_per_second", "matmul_peak_share",
                "learning_rate", "batch_rows", "mlm_probability"):  # fmt: skip
        assert math.isfinite(logged[-1][key]), key


def test_speeds_are_counts_over_the_clocks_seconds(tiny_config, tokenizer, tmp_path):
    """Steps of half a second with 4 rows of 16 tokens."""
    trainer, _ = run_with_fake_clock(
        tiny_config, tokenizer, tmp_path, seconds=0.5, time_budget="10s", logging_interval="20%"
    )
    metrics = trainer.budget_metrics()
    flops, peak = metrics["training_flops"] / 10, metrics["matmul_peak_flops_per_second"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["tokens_seen"] for entry in logged] == [256, 512, 768, 1024, 1280]
    for figures in (*logged, metrics):
        assert (figures["tokens_per_second"], figures["samples_per_second"]) == (128.0, 8.0)
    for entry in logged:
        assert entry["model_flops_per_second"] == pytest.approx(flops)
        assert entry["matmul_peak_share"] == pytest.approx(flops / peak)


class Look(TrainerCallback):
    """Asks the trainer at a step where the run stands."""

    def __init__(self, step):
        self.step, self.trainer, self.seen = step, None, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.seen = self.trainer.progress()


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_progress_bar_is_told_where_the_run_stands(tiny_config, tokenizer, tmp_path, capsys, share):
    clock, look = FakeClock(), Look(round(20 * share))
    advance = Advance(clock)
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path, callbacks=[advance], clock=clock, time_budget="20s", disable_tqdm=False
    )
    trainer.add_callback(look)  # behind the one that reads the clock
    advance.trainer = look.trainer = trainer
    trainer.train()
    seen = look.seen
    assert (seen.elapsed_seconds, seen.time_budget_seconds, seen.fraction) == (20 * share, 20.0, share)
    assert (seen.unit, seen.units_seen, seen.units_per_second) == ("tokens", 1280 * share, 64.0)
    assert seen.estimated_units == pytest.approx(1280)
    assert "64 tokens/s, 0.00M of about 0.00M tokens" in capsys.readouterr().err


def test_the_trainers_own_speed_follows_the_ramp_too(tiny_config, tokenizer, tmp_path):
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=8, train_batch_rows=16, batch_ramp_until=1.0)
    metrics = trainer.train().metrics
    assert trainer.run_state.rows_seen < 8 * 16
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(
        trainer.run_state.rows_seen, rel=0.01
    )


@pytest.mark.skipif(not os.access(RESET_PEAK, os.W_OK), reason="the system cannot count the peak anew")
def test_peak_memory_is_that_of_the_training(tiny_config, tokenizer, tmp_path):
    before = np.ones(50_000_000)  # 400 MB, as a preparation may have held
    del before
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1)
    trainer.train()
    resident = psutil.Process().memory_info().rss
    assert resident / 2 < trainer.budget_metrics()["peak_memory_bytes"] < resident + 200_000_000


def test_every_parameter_learns(tiny_config, tokenizer, tmp_path):
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=3, lr_schedule="constant")
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    unchanged = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert unchanged == []


def test_accumulation_equals_one_large_micro_batch(tiny_config, tokenizer, tmp_path):
    results = []
    for micro_batch in (2, 8):
        trainer = make_trainer(
            tiny_config, tokenizer, tmp_path / str(micro_batch), max_steps=5, train_batch_rows=8,
            per_device_train_batch_size=micro_batch,
        )  # fmt: skip
        trainer.train()
        results.append(weights(trainer))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=2e-6, msg=name)


class ToldCollator(DataCollatorForFixedCountMasking):
    """Notes what it is told of the budget."""

    def __init__(self, *args):
        super().__init__(*args)
        self.told = []

    def follow_budget(self, fraction):
        self.told.append(fraction)
        return super().follow_budget(fraction)


@pytest.mark.parametrize("is_named", [False, True])
def test_a_collator_is_told_of_the_budget_once_whether_named_or_not(tiny_config, tokenizer, tmp_path, is_named):
    collator = ToldCollator(tokenizer, "0:0.4,0.5:0.2")
    trainer = CramTrainer(
        CrammedBertForMaskedLM(tiny_config), make_arguments(tmp_path, max_steps=4), train_dataset=Rows(16),
        data_collator=collator, followers=[collator] if is_named else [],
    )  # fmt: skip
    trainer._measure_row_flops = lambda: {}
    trainer.train()
    assert collator.told == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert collator.mlm_probability == 0.2


def test_rows_without_keys_are_masked_anew_in_each_pass(tiny_config, tokenizer, tmp_path):
    seen = []

    class Noting(DataCollatorForFixedCountMasking):
        def __call__(self, features):
            batch = super().__call__(features)
            originals = [tuple(feature["input_ids"]) for feature in features]
            seen.extend(zip(originals, map(tuple, batch["masked_positions"].tolist()), strict=True))
            return batch

    trainer = CramTrainer(
        CrammedBertForMaskedLM(tiny_config), make_arguments(tmp_path, max_steps=12), train_dataset=Rows(16),
        data_collator=Noting(tokenizer, 0.25),
    )  # fmt: skip
    trainer._measure_row_flops = lambda: {}
    trainer._knows_loss = True  # which is tried on a batch as well
    trainer.train()
    assert len(seen) == 48
    masks = {}
    for row, positions in seen:
        masks.setdefault(row, set()).add(positions)
    assert all(len(of_row) > 1 for of_row in masks.values())


def first_loss_of_bert(output_dir, collator, dataset=None, dropout=0.0, **values):
    """The loss logged of the first step of a BERT with random weights: that of a guess, where it is divided as it should be."""
    config = BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    set_seed(0)
    values = {"train_batch_rows": 32, **values}
    arguments = make_arguments(output_dir, max_steps=1, logging_strategy="steps", logging_steps=1, **values)
    trainer = CramTrainer(
        BertForMaskedLM(config), arguments, train_dataset=dataset or Rows(64), data_collator=collator
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


GUESS = np.log(VOCAB_SIZE)


@pytest.mark.parametrize("rows", [8, 32])
def test_accumulation_is_a_mean_for_models_that_do_not_divide_by_the_items_too(tokenizer, tmp_path, rows):
    """BERT takes `num_items_in_batch` like any keyword, and returns the mean of the micro-batch."""
    collator = DataCollatorForFixedCountMasking(tokenizer, 0.25, return_masked_positions=False)
    assert first_loss_of_bert(tmp_path, collator, train_batch_rows=rows) == pytest.approx(GUESS, rel=0.05)


def test_a_collator_with_masks_of_its_own_generator_does_not_pass_for_a_loss_that_is_divided(tokenizer, tmp_path):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25, seed=0)
    assert first_loss_of_bert(tmp_path, collator) == pytest.approx(GUESS, rel=0.1)


def test_a_model_that_another_trainer_has_trained_is_prepared_anew(tiny_config, tokenizer, tmp_path, own_accelerator):
    """accelerate prepares a model once: the precision of the first would stay, and the second would not be compiled."""
    model = CrammedBertForMaskedLM(tiny_config)
    make_trainer(None, tokenizer, tmp_path / "first", model=model, max_steps=1, bf16=True).train()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    second = make_trainer(None, tokenizer, tmp_path / "second", model=model, max_steps=1, **compiled)
    second.evaluate()
    seen = []
    model.model.layers[0].attention.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    second.train()
    assert isinstance(second.model_wrapped, torch._dynamo.OptimizedModule)
    assert True not in seen


def test_what_accelerate_has_marked_within_a_model_is_taken_back(tiny_config):
    """Data-parallel, its wrapper has one mark and the model the other; in an adapter the base has both."""
    model = CrammedBertForMaskedLM(tiny_config)
    within = model.model
    within._is_accelerate_prepared, within._original_forward = True, within.forward
    within.forward = lambda **_: pytest.fail("of another trainer")
    model._original_forward, model.forward = model.forward, None
    forget_preparation(model)
    ids = torch.full((1, 8), 9)
    assert model(input_ids=ids, labels=ids).loss > 0
    assert not hasattr(within, "_is_accelerate_prepared")


def test_arguments_made_before_another_trainer_count(tiny_config, tokenizer, tmp_path, own_accelerator):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    arguments = [make_arguments(tmp_path / str(n), max_steps=1, **values) for n, values in enumerate((compiled, {}))]
    collator = DataCollatorForFixedCountMasking(tokenizer, 0.25)
    trainers = [
        CramTrainer(CrammedBertForMaskedLM(tiny_config), args, train_dataset=Rows(8), data_collator=collator)
        for args in arguments
    ]
    trainers[0].evaluate(Rows(8))
    assert isinstance(trainers[0].model_wrapped, torch._dynamo.OptimizedModule)
    for trainer in trainers:
        trainer.train()
    assert [isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule) for trainer in trainers] == [True, False]


def test_a_configuration_that_an_earlier_trainer_has_completed_is_taken_again(tiny_config, tokenizer, tmp_path):
    shared = {"gradient_accumulation_kwargs": {"sync_each_batch": False}}
    for name in ("first", "second"):
        make_trainer(tiny_config, tokenizer, tmp_path / name, max_steps=1, accelerator_config=shared)


def test_an_optimiser_of_ones_own_belongs_to_the_accelerator_of_each_run(tiny_config, tokenizer, tmp_path):
    """Whose scaler of fp16 it has to share."""
    model = CrammedBertForMaskedLM(tiny_config)
    collator, own = DataCollatorForFixedCountMasking(tokenizer, 0.25), torch.optim.SGD(model.parameters(), 1e-3)
    trainer = CramTrainer(model, make_arguments(tmp_path, max_steps=1), train_dataset=Rows(8), data_collator=collator,
                          optimizers=(own, None))  # fmt: skip
    prepared = []
    for _ in range(2):
        trainer.train()
        prepared.append(trainer.optimizer)
    assert [wrapper.optimizer for wrapper in prepared] == [own, own]
    assert prepared[0] is not prepared[1]


def test_what_is_no_model_and_no_arguments_of_ours_is_refused(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="CramTrainer needs a model: it calls no model_init"):
        CramTrainer(None, make_arguments(tmp_path, max_steps=1), train_dataset=Rows(8), model_init=lambda: None)
    plain = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="needs CramTrainingArguments, got TrainingArguments"):
        CramTrainer(CrammedBertForMaskedLM(tiny_config), plain, train_dataset=Rows(8))


def test_dropout_does_not_pass_for_a_loss_that_is_divided(tokenizer, tmp_path, monkeypatch):
    """On a device whose random state is not put back, as Apple's."""
    monkeypatch.setattr(trainer_module, "keep_random_state", contextlib.nullcontext)
    collator = DataCollatorForFixedCountMasking(tokenizer, 0.25, return_masked_positions=False)
    assert first_loss_of_bert(tmp_path, collator, dropout=0.1) == pytest.approx(GUESS, rel=0.1)


def test_a_first_row_without_a_label_does_not_mislead(tokenizer, tmp_path):
    """Its loss tells nothing of what the model divides by."""

    def collate(rows):
        ids = torch.tensor(np.stack([row["input_ids"] for row in rows]))
        return {"input_ids": ids, "labels": torch.where(ids[:, :1] == 5, -100, ids)}

    rows = Rows(33)
    rows.rows[0], rows.rows[1:, 0] = 5, 6
    settings = {"train_sampling_strategy": "sequential", "learning_rate": 1e-9}
    assert first_loss_of_bert(tmp_path, collate, rows, **settings) == pytest.approx(GUESS, rel=0.1)


class Distilled(CramTrainer):
    """A loss of one's own, which the model does not know: a mean over the micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


def sum_over_all(outputs, labels, num_items_in_batch):
    return outputs[0].square().mean(-1).sum() / num_items_in_batch


@pytest.mark.parametrize("own", ["method", "function"])
def test_a_loss_of_ones_own_is_trained_and_its_flops_counted(tiny_config, tmp_path, own):
    """The same in one micro-batch and in four."""
    logged = []
    for rows in (4, 16):
        set_seed(0)
        trainer = (Distilled if own == "method" else CramTrainer)(
            CrammedBertForMaskedLM(tiny_config),
            make_arguments(
                tmp_path / str(rows), max_steps=8, per_device_train_batch_size=rows, train_batch_rows=16,
                logging_strategy="steps", logging_steps=1,
            ),
            train_dataset=Rows(64),
            data_collator=lambda rows: {
                name: torch.tensor(np.stack([row["input_ids"] for row in rows])) for name in ("input_ids", "labels")
            },
            compute_loss_func=sum_over_all if own == "function" else None,
        )  # fmt: skip
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.budget_metrics()["training_flops"] > 0
    assert logged[0][-1] < logged[0][0]
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)


def test_flops_follow_the_mask_rate(tiny_config, tokenizer, tmp_path):
    flops = []
    for number, rate in enumerate(("0.4", "0.2", "0:0.4,0.5:0.2")):
        trainer = make_trainer(tiny_config, tokenizer, tmp_path / str(number), max_steps=4, rate=rate)
        trainer.train()
        flops.append(trainer.budget_metrics()["training_flops"])
    assert flops[0] > flops[1]
    assert flops[2] == pytest.approx((flops[0] + flops[1]) / 2)


@pytest.mark.usefixtures("own_accelerator")
def test_an_attention_that_takes_half_precision_only_can_train(tiny_config, tokenizer, tmp_path, monkeypatch):
    """As flash attention does."""

    def attend(module, query, *rest, **kwargs):
        if query.dtype == torch.float32:
            raise RuntimeError("half precision only")
        return eager_attention_forward(module, query, *rest, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "half", attend)
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=2, bf16=True, attn_implementation="half")
    trainer.train()
    assert trainer.state.global_step == 2


class StopAt(TrainerCallback):
    def __init__(self, step, saves=False):
        self.step, self.saves = step, saves

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
            control.should_save |= self.saves


def test_a_callback_that_saves_and_stops_leaves_a_checkpoint(tiny_config, tokenizer, tmp_path):
    for saves, expected in ((False, []), (True, ["checkpoint-3"])):
        folder = tmp_path / str(saves)
        make_trainer(tiny_config, tokenizer, folder, max_steps=5, callbacks=[StopAt(3, saves)]).train()
        assert [path.name for path in folder.glob("checkpoint-*")] == expected


def test_flops_are_counted_whatever_the_attention(tiny_config):
    flops = []
    for attention in ("eager", "flex_attention"):
        model = CrammedBertForMaskedLM._from_config(tiny_config, attn_implementation=attention)
        batch = {"input_ids": torch.ones(2, 16, dtype=torch.long), "labels": torch.ones(2, 16, dtype=torch.long)}
        flops.append(training_flops(model, batch))
    assert flops[0] == flops[1] > 0


def test_predictions_are_made_on_the_rows_of_an_evaluation(tiny_config, tokenizer, tmp_path):
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1)
    held_out = Rows(16, seed=1)
    assert trainer.predict(held_out).metrics["test_loss"] == pytest.approx(
        trainer.evaluate(held_out)["eval_loss"], rel=1e-5
    )


def test_an_evaluation_computes_what_is_wanted_of_it(tiny_config, tokenizer, tmp_path):
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1)
    length = len(trainer.eval_dataset[0]["input_ids"])
    decoded = []
    trainer.model.decoder.register_forward_hook(lambda module, inputs, logits: decoded.append(logits.shape[1]))
    trainer.evaluate()
    assert masked_tokens(0.15, length) in decoded
    assert length not in decoded
    trainer.compute_metrics = lambda prediction: {"tokens": prediction.predictions.shape[1]}
    assert trainer.evaluate()["eval_tokens"] == length
    assert trainer.predict(trainer.eval_dataset).predictions.shape[1] == length


class Averaging(torch.optim.AdamW):
    """As schedule-free optimisers do, it has other weights to train than to use."""

    is_training = False

    def _shift(self, trains):
        if trains != self.is_training:
            self.is_training = trains
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(1.0 if trains else -1.0)

    def train(self):
        self._shift(True)

    def eval(self):
        self._shift(False)


def test_the_weights_that_are_saved_are_those_that_are_evaluated(tiny_config, tokenizer, tmp_path):
    set_seed(0)
    model = CrammedBertForMaskedLM(tiny_config)
    trainer = CramTrainer(
        model, make_arguments(tmp_path, max_steps=2), train_dataset=Rows(16), eval_dataset=Rows(8),
        data_collator=DataCollatorForFixedCountMasking(tokenizer, 0.25), processing_class=tokenizer,
        optimizers=(Averaging(model.parameters(), lr=1e-3), None),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    trainer.evaluate()
    for name, tensor in saved.items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


@pytest.mark.parametrize(("dropout", "muon"), [(0.1, None), (0.1, 0.02)])
def test_stop_and_resume_equals_the_uninterrupted_run(tiny_config, tokenizer, tmp_path, dropout, muon):
    """Bit for bit: weights, optimiser, random state, rows (over a pass's end), batch ramp, mask phases."""
    tiny_config.hidden_dropout_prob = dropout
    settings = {
        "max_steps": 10, "train_batch_rows": 16, "batch_ramp_until": 0.6, "rate": "0:0.4,0.5:0.2",
        "save_interval": "100%", "eval_interval": "20%", "dataset": Rows(30), "muon_learning_rate": muon,
    }  # fmt: skip
    whole = make_trainer(tiny_config, tokenizer, tmp_path / "whole", **settings)
    whole.train()
    first = make_trainer(tiny_config, tokenizer, tmp_path / "parts", callbacks=[StopAt(5)], **settings)
    first.train()
    assert first.state.global_step == 5
    second = make_trainer(tiny_config, tokenizer, tmp_path / "parts", **settings)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 10
    assert second.run_state.rows_seen == whole.run_state.rows_seen > 60
    assert_same(weights(whole), weights(second))
    assert second.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    assert second.run_state.elapsed_seconds > first.run_state.elapsed_seconds


class NoisyRows(Rows):
    """Rows whose words are replaced at random while they are read."""

    def __getitem__(self, index):
        row = self.rows[index].copy()
        row[np.random.randint(len(row))] = 5 + int(torch.randint(VOCAB_SIZE - 5, ()))
        return {"input_ids": row}


@pytest.mark.parametrize("kind", [Rows, NoisyRows])
def test_resuming_with_loader_workers_equals_the_uninterrupted_run(tiny_config, tokenizer, tmp_path, kind):
    """Bit for bit, over a batch ramp and phases of the mask rate, which the workers read ahead of."""
    settings = {
        "max_steps": 10, "train_batch_rows": 16, "batch_ramp_until": 0.8, "rate": "0:0.4,0.6:0.2",
        "save_interval": "100%", "dataset": kind(30),
    }  # fmt: skip
    workers = 0 if kind is Rows else 2  # what is drawn while reading differs between none and some
    whole = make_trainer(tiny_config, tokenizer, tmp_path / "whole", dataloader_num_workers=workers, **settings)
    whole.train()
    settings["dataloader_num_workers"] = 2
    make_trainer(tiny_config, tokenizer, tmp_path / "parts", callbacks=[StopAt(5)], **settings).train()
    resumed = make_trainer(tiny_config, tokenizer, tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.run_state.rows_seen == whole.run_state.rows_seen
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize("muon", [None, 0.02])
def test_a_resumed_run_takes_its_rates_from_its_own_arguments(tiny_config, tokenizer, tmp_path, muon):
    settings = {"max_steps": 4, "lr_schedule": "constant", "save_interval": "50%"}
    first = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta2": 0.98, "muon_learning_rate": muon}
    make_trainer(tiny_config, tokenizer, tmp_path, callbacks=[StopAt(2)], **settings, **first).train()
    now = {"learning_rate": 3e-3, "weight_decay": 0.0, "adam_beta2": 0.95, "muon_learning_rate": muon and 0.05}
    second = make_trainer(tiny_config, tokenizer, tmp_path, **settings, **now)
    second.train(resume_from_checkpoint=True)
    groups = second.optimizer.param_groups
    assert {group["lr"] for group in groups} == {3e-3} | ({0.05} if muon else set())
    assert {(group["weight_decay"], group["betas"]) for group in groups} == {(0.0, (0.9, 0.95))}
    assert second.state.log_history[-1]["step"] == 4


@pytest.mark.parametrize("first", [True, False])
def test_what_was_measured_at_the_start_holds_when_resuming(tiny_config, tokenizer, tmp_path, monkeypatch, first):
    """Another load on the machine must not change what a run computes."""
    monkeypatch.setattr("hf_cram.hardware_choices.can_compile", lambda device: True)
    settings = {"max_steps": 4, "save_interval": "50%", "torch_compile": None, "time_budget": "1h"}

    def session(measured, **options):
        monkeypatch.setattr("hf_cram.hardware_choices.bf16_is_faster", lambda *_: measured)
        monkeypatch.setattr("hf_cram.hardware_choices.compile_pays_off", lambda *_: False)
        return make_trainer(tiny_config, tokenizer, tmp_path, **{**settings, "bf16": None, **options})

    session(first, callbacks=[StopAt(2)]).train()
    resumed = session(not first)
    monkeypatch.setattr("hf_cram.hardware_choices.compile_pays_off", lambda *_: True)
    logits = []
    resumed.model.decoder.register_forward_hook(lambda module, inputs, output: logits.append(output.dtype))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.args.bf16 is first
    assert resumed.args.torch_compile is False
    assert logits[-1] == (torch.bfloat16 if first else torch.float32)
    told = session(first, bf16=not first, callbacks=[StopAt(3)])
    told.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert told.args.bf16 is (not first)


def test_resumed_clock_goes_on_where_it_was(tiny_config, tokenizer, tmp_path):
    first, _ = run_with_fake_clock(
        tiny_config, tokenizer, tmp_path, time_budget="100s", max_steps=6, save_interval="5s", seconds=10.0
    )
    assert RunState.load(last_checkpoint(tmp_path)).elapsed_seconds == 60.0
    # What was used between the last checkpoint and a kill stands in the heartbeat.
    clock_file = tmp_path / "clock.json"
    beat = json.loads(clock_file.read_text())
    clock_file.write_text(json.dumps({**beat, "elapsed_seconds": 75.0}))
    clock = FakeClock()
    advance = Advance(clock, 10.0)
    second = make_trainer(
        tiny_config, tokenizer, tmp_path, clock=clock, callbacks=[advance], time_budget="100s", lr_schedule="linear"
    )
    advance.trainer = second
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 9  # 85, 95 and 105 seconds
    assert [lr for lr, _ in advance.seen] == pytest.approx([0.25e-2, 0.15e-2, 0.05e-2])
    third = make_trainer(tiny_config, tokenizer, tmp_path, clock=clock, time_budget="100s", save_interval="5s")
    third.train(resume_from_checkpoint=True)  # the budget is used up
    assert third.state.global_step == 6


def test_the_clock_is_written_while_a_step_lasts(tmp_path):
    """A step of minutes, or a long evaluation, and then a kill: the time since the last checkpoint is not lost."""
    beats = iter(range(1000))
    with Heartbeat(tmp_path, lambda: {"beat": next(beats)}):
        first = (tmp_path / "clock.json").read_text()
        deadline = time.monotonic() + 30
        while (tmp_path / "clock.json").read_text() == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_clock_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / "clock.json").mkdir()
    with Heartbeat(tmp_path, dict):
        pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"The clock could not be written to {tmp_path / 'clock.json'}" in caplog.text


def test_training_works_in_a_thread(tiny_config, tokenizer, tmp_path):
    """As of a notebook or a server, where no signal can be caught."""
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(trainer.train).result()
    assert trainer.state.global_step == 1


def test_the_trainers_own_evaluation_at_the_end_is_the_callers(tiny_config, tokenizer, tmp_path):
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2]


def test_a_model_is_whole_before_it_takes_the_place_of_another(tiny_config, tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1)
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="Saving .* failed"):
            trainer.save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (replaced.append(Path(paths[1]).name), replace(*paths)))
    trainer.save_model()
    assert replaced[-1] == "model.safetensors"


def test_the_clock_of_a_run_that_was_moved_aside_goes_on_too(tiny_config, tokenizer, tmp_path):
    run_with_fake_clock(
        tiny_config, tokenizer, tmp_path / "moved", time_budget="100s", max_steps=6, save_interval="3s"
    )
    clock_file = tmp_path / "moved" / "clock.json"
    beat = json.loads(clock_file.read_text())
    clock_file.write_text(json.dumps({**beat, "elapsed_seconds": 75.0}))
    checkpoint = tmp_path / "moved" / "checkpoint-3"
    resumed = make_trainer(
        tiny_config, tokenizer, tmp_path / "out", clock=FakeClock(), time_budget="100s", max_steps=4
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.run_state.elapsed_seconds >= 75.0


def test_resuming_without_a_checkpoint_leaves_a_finished_model(tiny_config, tokenizer, tmp_path):
    first, _ = run_with_fake_clock(tiny_config, tokenizer, tmp_path, time_budget="5s")
    first.save_model()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = make_trainer(tiny_config, tokenizer, tmp_path, clock=FakeClock(), time_budget="10s")
    with pytest.raises(
        CheckpointError, match="holds a finished model and no checkpoint.*leave out --resume"
    ) as caught:
        again.train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_without_a_step_is_no_result(tiny_config, tokenizer, tmp_path):
    """Killed in its first step, with a clock that has run out meanwhile: there is nothing to save as a model."""
    run_with_fake_clock(tiny_config, tokenizer, tmp_path, time_budget="10s", seconds=20.0)
    assert last_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="all of time_budget .0:00:10. was used before the first step: raise it"):
        make_trainer(tiny_config, tokenizer, tmp_path, time_budget="10s").train(resume_from_checkpoint=True)
    more = make_trainer(tiny_config, tokenizer, tmp_path, time_budget="1h", max_steps=1)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 1
    assert more.run_state.elapsed_seconds > 20


def test_resuming_before_the_last_checkpoint_sets_the_later_ones_aside(tiny_config, tokenizer, tmp_path, caplog):
    settings = {"max_steps": 8, "save_interval": "25%", "save_total_limit": 5}
    first = make_trainer(tiny_config, tokenizer, tmp_path, **settings)
    first.train()
    settings = {"max_steps": 8, "save_interval": "100%", "save_total_limit": 1}
    second = make_trainer(tiny_config, tokenizer, tmp_path, callbacks=[StopAt(5)], **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    # What the run has just saved is its newest, and what it left stands where it is out of the way.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert sorted(path.name for path in (tmp_path / "set-aside-1").iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert "set-aside-1" in caplog.text
    kept = CrammedBertForMaskedLM.from_pretrained(tmp_path / "set-aside-1" / "checkpoint-8")
    assert_same(weights(first), kept.state_dict())


def test_resuming_from_another_folder_leaves_the_run_that_is_here(tiny_config, tokenizer, tmp_path):
    settings = {"save_interval": "50%", "max_steps": 4}
    for name in ("here", "there"):
        make_trainer(tiny_config, tokenizer, tmp_path / name, **settings).train()
    clock_file = tmp_path / "here" / "clock.json"  # of the run that is here, and of no other
    clock_file.write_text(json.dumps({**json.loads(clock_file.read_text()), "elapsed_seconds": 1e6}))
    resumed = make_trainer(tiny_config, tokenizer, tmp_path / "here", time_budget="1h", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "there" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name in ("here", "here.previous-1", "there"):
        assert last_checkpoint(tmp_path / name).name == "checkpoint-4"
    ids = {RunState.load(last_checkpoint(tmp_path / name)).run_id for name in ("here", "there")}
    assert len(ids) == 1


def test_a_folder_that_is_no_checkpoint_does_not_count_as_one(tiny_config, tokenizer, tmp_path):
    (tmp_path / "checkpoint-999").mkdir()
    make_trainer(tiny_config, tokenizer, tmp_path, max_steps=4, save_interval="50%", save_total_limit=1).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-999"]


def test_a_kill_while_a_checkpoint_is_replaced_loses_none(tmp_path, monkeypatch):
    def write(folder, text):
        folder.mkdir(parents=True)
        (folder / "cram_state.json").write_text(text)
        return folder

    write(tmp_path / "checkpoint-3", "old")
    staged = write(tmp_path / ".saving" / "checkpoint-3", "new")
    rename = os.rename

    def rename_or_die(source, target):
        if source == staged:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("os.rename", rename_or_die)
    with pytest.raises(KeyboardInterrupt):
        publish_checkpoint(staged, tmp_path)
    monkeypatch.undo()
    clear_staging(tmp_path)  # as the resumed run does
    assert (last_checkpoint(tmp_path) / "cram_state.json").read_text() == "old"
    publish_checkpoint(write(tmp_path / ".saving" / "checkpoint-3", "newer"), tmp_path)
    clear_staging(tmp_path)
    assert (last_checkpoint(tmp_path) / "cram_state.json").read_text() == "newer"


@pytest.fixture(scope="module")
def copy_stopped_run(tokenizer, tmp_path_factory):
    """Copies the folder of a run that was stopped half-way; returns its settings."""
    folder, settings = tmp_path_factory.mktemp("stopped"), {"max_steps": 4, "save_interval": "50%"}
    make_trainer(make_tiny_config(), tokenizer, folder, callbacks=[StopAt(2)], **settings).train()

    def copy_to(target):
        shutil.copytree(folder, target, dirs_exist_ok=True)
        return settings

    return copy_to


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", 100), ("optimizer.pt", 100), ("optimizer.pt", b""), ("optimizer.pt", b"version https://git"),
     ("optimizer.pt", None), ("scheduler.pt", None), ("rng_state.pth", 100), ("trainer_state.json", b"[]"),
     ("cram_state.json", b"[]"), ("../clock.json", b"[]")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_line(tiny_config, tokenizer, tmp_path, copy_stopped_run, name, content):
    settings = copy_stopped_run(tmp_path)
    path = last_checkpoint(tmp_path) / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(CheckpointError, match="checkpoint-2|clock.json") as caught:
        make_trainer(tiny_config, tokenizer, tmp_path, **settings).train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_saves_and_logs_as_often_as_it_is_told_now(tiny_config, tokenizer, tmp_path):
    settings = {"max_steps": 8, "save_total_limit": 9}
    first = make_trainer(tiny_config, tokenizer, tmp_path, callbacks=[StopAt(3)], save_interval="25%", **settings)
    first.train()
    steps = {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    resumed = make_trainer(tiny_config, tokenizer, tmp_path, **settings, **steps)
    resumed.train(resume_from_checkpoint=True)
    assert {4, 6, 8} <= {int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")}
    assert {5, 6, 7} <= {entry["step"] for entry in resumed.state.log_history if "loss" in entry}


def test_an_fp16_run_goes_on_without_fp16(tiny_config, tokenizer, tmp_path, copy_stopped_run):
    settings = copy_stopped_run(tmp_path)
    torch.save(torch.amp.GradScaler("cpu").state_dict(), last_checkpoint(tmp_path) / "scaler.pt")
    resumed = make_trainer(tiny_config, tokenizer, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_a_checkpoint_of_something_else_is_one_line(tiny_config, tokenizer, tmp_path, copy_stopped_run):
    settings = copy_stopped_run(tmp_path)
    for other in ({"muon_learning_rate": 0.02}, {"optim": "adafactor"}):
        with pytest.raises(CheckpointError, match="holds the state of AdamW, and the optimiser now is (Muon|Adaf)"):
            make_trainer(tiny_config, tokenizer, tmp_path, **settings, **other).train(resume_from_checkpoint=True)
    for field, value, was in (("intermediate_size", 128, "64"), ("norm_scheme", "post", "'pre'")):
        other = copy.deepcopy(tiny_config)
        setattr(other, field, value)
        with pytest.raises(CheckpointError, match=f"is of another model: set {field} {was} as") as caught:
            make_trainer(other, tokenizer, tmp_path, **settings).train(resume_from_checkpoint=True)
        assert "\n" not in str(caught.value)


def test_resuming_in_another_order_of_rows_is_refused(tiny_config, tokenizer, tmp_path, copy_stopped_run):
    """The next unseen row of one order is a seen one of another."""
    settings = copy_stopped_run(tmp_path)
    for other in ({"data_seed": 7}, {"train_sampling_strategy": "sequential"}):
        with pytest.raises(CheckpointError, match="in the order 'random, seed 42'"):
            make_trainer(tiny_config, tokenizer, tmp_path, **settings, **other).train(resume_from_checkpoint=True)


class TerminateOnce(TrainerCallback):
    def __init__(self):
        self.is_done = False

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.is_done:
            self.is_done = True
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_trainer_trains_again(tiny_config, tokenizer, tmp_path, monkeypatch):
    """As in a notebook: stopped and resumed, then for another run from the weights that are there."""
    started = []
    monkeypatch.setattr("hf_cram.trainer.initialize_embeddings_from_text", lambda *_: started.append(1))
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path / "out", max_steps=5, save_interval="100%", embeddings_from_text=True,
        callbacks=[TerminateOnce()],
    )  # fmt: skip
    trainer.train()
    assert (trainer.interrupted_by, trainer.state.global_step) == (signal.SIGTERM, 3)
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.interrupted_by, trainer.state.global_step) == (None, 5)
    learned = weights(trainer)
    trainer.train()
    assert (trainer.state.global_step, trainer.run_state.rows_seen) == (5, 20)
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-5"
    assert started == [1]
    earlier = CrammedBertForMaskedLM.from_pretrained(last_checkpoint(tmp_path / "out.previous-1"))
    assert_same(learned, earlier.state_dict())
    assert trainer.run_state.run_id != RunState.load(last_checkpoint(tmp_path / "out.previous-1")).run_id


def test_a_folder_belongs_to_one_run_at_a_time(tiny_config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_cram.output_folder.LOCK_SECONDS", 0.1)
    errors = []

    class StartAnother(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                for resume in (None, True):
                    with pytest.raises(CheckpointError, match="Another run is at work in .*output_dir") as caught:
                        other.train(resume_from_checkpoint=resume)
                    errors.append(caught.value)

    other = make_trainer(tiny_config, tokenizer, tmp_path / "out", max_steps=1)
    first = make_trainer(
        tiny_config, tokenizer, tmp_path / "out", max_steps=4, save_interval="50%", callbacks=[StartAnother()]
    )
    first.train()
    assert len(errors) == 2
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-4"
    assert not (tmp_path / "out.previous-1").exists()
    other.train()  # the first has ended
    assert (tmp_path / "out.previous-1").exists()


def test_a_new_run_moves_the_earlier_one_aside(tiny_config, tokenizer, tmp_path, caplog):
    out = tmp_path / "out"
    first = make_trainer(tiny_config, tokenizer, out, max_steps=2, save_interval="50%")
    first.train()
    kept = weights(first)
    second = make_trainer(tiny_config, tokenizer, out, max_steps=3, save_interval="100%", seed=5)
    second.train()
    assert last_checkpoint(out).name == "checkpoint-3"
    assert last_checkpoint(tmp_path / "out.previous-1").name == "checkpoint-2"
    model = CrammedBertForMaskedLM.from_pretrained(last_checkpoint(tmp_path / "out.previous-1"))
    assert_same(kept, model.state_dict())
    assert "was moved to" in caplog.text


def test_another_programs_checkpoints_are_moved_aside(tiny_config, tokenizer, tmp_path):
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").write_text("theirs")
    make_trainer(tiny_config, tokenizer, tmp_path / "out", max_steps=2, save_interval="100%").train()
    assert (tmp_path / "out.previous-1" / "checkpoint-2" / "optimizer.pt").read_text() == "theirs"
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_another_programs_checkpoint_is_set_aside_on_resuming(tiny_config, tokenizer, tmp_path, copy_stopped_run):
    settings = copy_stopped_run(tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_text("theirs")
    make_trainer(tiny_config, tokenizer, tmp_path, **settings).train(resume_from_checkpoint=True)
    assert (tmp_path / "set-aside-1" / "checkpoint-4" / "optimizer.pt").read_text() == "theirs"
    assert last_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_file_system_whose_folders_cannot_be_flushed_will_do(tiny_config, tokenizer, tmp_path, monkeypatch):
    flush = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    make_trainer(tiny_config, tokenizer, tmp_path, max_steps=2, save_interval="100%").train()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_linked_output_folder_stays_a_link(tiny_config, tmp_path):
    (tmp_path / "disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk")
    CrammedBertForMaskedLM(tiny_config).save_pretrained(out)
    moved = move_earlier_run_aside(out)
    assert moved == tmp_path / "disk.previous-1"
    assert (moved / "config.json").exists()
    assert out.is_symlink()
    assert list(out.iterdir()) == []


def test_an_evaluation_before_the_first_step_stands_where_the_clock_does(tiny_config, tokenizer, tmp_path):
    settings = {"max_steps": 2, "save_interval": "50%", "eval_on_start": True, "eval_interval": "50%"}
    first = make_trainer(tiny_config, tokenizer, tmp_path / "out", **settings)
    first.train()
    settings["max_steps"] = 4
    resumed = make_trainer(tiny_config, tokenizer, tmp_path / "out", **settings)
    resumed.train(resume_from_checkpoint=True)
    clock = [entry["elapsed_seconds"] for entry in resumed.state.log_history if "eval_loss" in entry]
    assert clock[0] > 0
    assert clock == sorted(clock)


def test_a_model_that_no_run_has_left_is_moved_aside_too(tiny_config, tokenizer, tmp_path):
    out = tmp_path / "out"
    CrammedBertForMaskedLM(tiny_config).save_pretrained(out)
    (out / "README.md").write_text("mine")
    make_trainer(tiny_config, tokenizer, out, max_steps=2, save_interval="50%").train(resume_from_checkpoint=True)
    moved = {path.name for path in (tmp_path / "out.previous-1").iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= moved
    assert not (out / "README.md").exists()
    (out / "clock.json").unlink()  # checkpoints of nobody knows what
    make_trainer(tiny_config, tokenizer, out, max_steps=1).train()
    assert last_checkpoint(tmp_path / "out.previous-2").name == "checkpoint-2"
    assert last_checkpoint(out) is None


def test_resuming_on_other_rows_is_refused(tiny_config, tokenizer, tmp_path):
    rows = Rows(64)
    rows.dataset_id = "first"
    settings = {"max_steps": 4, "save_interval": "50%", "dataset": rows}
    make_trainer(tiny_config, tokenizer, tmp_path, **settings).train()
    rows.dataset_id = "second"
    with pytest.raises(CheckpointError, match="has seen rows of the dataset first, and the one given now is second"):
        make_trainer(tiny_config, tokenizer, tmp_path, **settings).train(resume_from_checkpoint=True)


def test_the_working_folder_is_not_moved(tiny_config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(tiny_config, tokenizer, ".", max_steps=1, save_interval="100%").train()
    with pytest.raises(CheckpointError, match="holds an earlier run or a model, and is .* the working folder"):
        make_trainer(tiny_config, tokenizer, ".", max_steps=1).train()
    assert last_checkpoint(tmp_path).name == "checkpoint-1"


def test_a_run_that_has_no_budget_left_takes_no_step(tiny_config, tokenizer, tmp_path, caplog):
    first, _ = run_with_fake_clock(tiny_config, tokenizer, tmp_path, time_budget="5s", save_interval="20%")
    assert not first.was_used_up
    again = make_trainer(tiny_config, tokenizer, tmp_path, clock=FakeClock(), time_budget="5s", save_interval="20%")
    again.train(resume_from_checkpoint=True)
    assert again.was_used_up
    assert again.state.global_step == 5
    assert_same(weights(first), weights(again))
    assert "The budget of this run is used up" in caplog.text


class Signal(TrainerCallback):
    """A signal to this process and its loader workers: `timeout`, Slurm and a closed terminal send SIGTERM, Ctrl-C SIGINT."""

    def __init__(self, number, times=1):
        self.number, self.times = number, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for _ in range(self.times):
                for process in (*multiprocessing.active_children(), None):
                    os.kill(process.pid if process else os.getpid(), self.number)
                time.sleep(0.5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_loader_workers_too_saves_a_checkpoint(tiny_config, tokenizer, tmp_path, number):
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path, max_steps=50, dataloader_num_workers=2, callbacks=[Signal(number)]
    )
    before = signal.getsignal(number)
    trainer.train()
    assert trainer.interrupted_by == number
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_the_run_at_once(tiny_config, tokenizer, tmp_path):
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=50, callbacks=[Signal(signal.SIGINT, times=2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    assert last_checkpoint(tmp_path) is None


class TerminateWhileEvaluating(TrainerCallback):
    """SIGTERM to the workers that load held-out rows, too."""

    def on_prediction_step(self, args, state, control, **kwargs):
        workers = multiprocessing.active_children()
        assert workers
        for process in (*workers, None):
            os.kill(process.pid if process else os.getpid(), signal.SIGTERM)
        time.sleep(0.5)


@pytest.mark.slow
def test_a_signal_while_evaluating_saves_a_checkpoint(tiny_config, tokenizer, tmp_path):
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path, max_steps=50, dataloader_num_workers=2, eval_interval="20%",
        callbacks=[TerminateWhileEvaluating()],
    )  # fmt: skip
    trainer.train()
    assert trainer.interrupted_by == signal.SIGTERM
    assert last_checkpoint(tmp_path) is not None


def test_resuming_needs_a_complete_checkpoint(tiny_config, tokenizer, tmp_path):
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=2, save_interval="50%", save_total_limit=5)
    trainer.train()
    (tmp_path / "checkpoint-9").mkdir()  # as a foreign program would leave it
    (tmp_path / ".saving").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    again = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=3)
    with pytest.raises(CheckpointError, match="checkpoint-9 is not a complete checkpoint"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-77"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 3
    assert not (tmp_path / ".saving").exists()


def test_the_newest_checkpoint_is_the_one_of_the_latest_step(tmp_path):
    for step in (8, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "cram_state.json").write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    rotate(tmp_path, 2)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-10"}


def test_only_the_newest_checkpoints_are_kept(tiny_config, tokenizer, tmp_path):
    make_trainer(tiny_config, tokenizer, tmp_path, max_steps=6, save_interval="16%", save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


class Poison(TrainerCallback):
    """Puts a NaN into the gradients of chosen steps, after the backward pass."""

    def __init__(self, steps):
        self.steps = steps
        self.handle = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        self.count = getattr(self, "count", 0) + 1
        if self.count in self.steps:
            parameter = model.model.layers[0].mlp.dense_in.weight
            self.handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_config, tokenizer, tmp_path):
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path, max_steps=6, callbacks=[Poison({1, 3, 4})], max_nonfinite_steps=3
    )
    trainer.train()
    assert trainer.run_state.skipped_steps == 3
    assert trainer.budget_metrics()["skipped_steps"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer).values())


def test_too_many_in_a_row_stop_the_run_with_the_good_weights(tiny_config, tokenizer, tmp_path):
    good = make_trainer(tiny_config, tokenizer, tmp_path / "good", max_steps=9, callbacks=[StopAt(2)])
    good.train()
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path / "bad", max_steps=9, max_nonfinite_steps=3,
        callbacks=[Poison(set(range(3, 99)))],
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="3 steps in a row.*checkpoint-4.*learning_rate"):
        trainer.train()
    saved = CrammedBertForMaskedLM.from_pretrained(last_checkpoint(tmp_path / "bad"))
    assert_same(weights(good), saved.state_dict())


def test_an_evaluation_that_would_overrun_is_not_started(tiny_config, tokenizer, tmp_path):
    trainer, _ = run_with_fake_clock(
        tiny_config,
        tokenizer,
        tmp_path,
        time_budget="1000s",
        eval_interval="300s",
        save_interval="300s",
        seconds=100.0,
    )
    evaluations = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations == [3, 6, 9]
    clock = FakeClock()
    advance = Advance(clock, 100.0)
    slow = make_trainer(
        tiny_config, tokenizer, tmp_path / "slow", clock=clock, callbacks=[advance], time_budget="1000s",
        eval_interval="300s", save_interval="300s",
    )  # fmt: skip
    advance.trainer = slow
    slow._eval_seconds = slow._save_seconds = 500.0
    slow.train()
    assert [entry["step"] for entry in slow.state.log_history if "eval_loss" in entry] == [3]
    # After that evaluation no save would have fitted; the end is always saved, after the clock.
    assert [path.name for path in (tmp_path / "slow").glob("checkpoint-*")] == ["checkpoint-10"]


def test_what_was_not_measured_yet_is_foreseen(tiny_config, tokenizer, tmp_path, monkeypatch):
    """A first evaluation by the speed of training, a first checkpoint by its size."""
    monkeypatch.setattr("hf_cram.trainer.SAVING_BYTES_PER_SECOND", 1.0)
    settings = {"time_budget": "1000s", "eval_interval": "300s", "save_interval": "300s"}
    trainer, _ = run_with_fake_clock(tiny_config, tokenizer, tmp_path / "slow", seconds=300.0, **settings)
    assert not [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [path.name for path in (tmp_path / "slow").glob("checkpoint-*")] == ["checkpoint-4"]  # the end's
    trainer, _ = run_with_fake_clock(tiny_config, tokenizer, tmp_path / "fast", seconds=100.0, **settings)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [3, 6, 9]


class Stream(IterableDataset):
    """Rows that tell no number."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows[index] for index in range(len(self.rows)))


@pytest.mark.parametrize(
    ("held_out", "evaluations"),
    [({"a": Rows(4, seed=1), "b": Rows(4, seed=2)}, []), (Stream(Rows(16, seed=1)), [2])],
    ids=["several", "stream"],
)
def test_the_first_evaluation_of_several_parts_and_of_a_stream(
    tiny_config, tokenizer, tmp_path, held_out, evaluations
):
    """With 4 seconds left, one part of 4 rows would take 2.8 and both 5.6; of a stream nothing is foreseen."""
    clock = FakeClock()
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path, clock=clock, callbacks=[Pass(clock, 4.0)], held_out=held_out,
        time_budget="12s", eval_interval="5s",
    )  # fmt: skip
    trainer.train()
    logged = {
        entry["step"] for entry in trainer.state.log_history if any("loss" in key and "eval" in key for key in entry)
    }
    assert sorted(logged) == evaluations


class Spend(TrainerCallback):
    """Evaluating and saving take their fake time."""

    def __init__(self, clock):
        self.clock = clock

    def on_evaluate(self, args, state, control, **kwargs):
        self.clock.now += 2.0

    def on_save(self, args, state, control, **kwargs):
        self.clock.now += 1.0


def test_the_clock_counts_measuring_evaluating_and_saving(tiny_config, tokenizer, tmp_path, monkeypatch):
    clock = FakeClock()
    measure = hardware_choices.measure_peak_flops

    def slowly(*args, **kwargs):
        clock.now += 4.0
        return measure(*args, **kwargs)

    monkeypatch.setattr("hf_cram.hardware_choices.measure_peak_flops", slowly)
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path, clock=clock, callbacks=[Pass(clock), Spend(clock)], time_budget="20s",
        eval_interval="50%", save_interval="50%",
    )  # fmt: skip
    trainer.train()
    # 4 to measure the machine, 6 steps, 2 for the evaluation at half of the budget, 1 for the checkpoint, 7 steps.
    assert trainer.budget_metrics()["train_seconds"] == 20.0
    assert trainer.state.global_step == 13


def test_the_clock_counts_the_embeddings_and_not_the_last_save(tiny_config, tokenizer, tmp_path, monkeypatch):
    clock = FakeClock()
    save, initialize = CramTrainer._save_checkpoint, trainer_module.initialize_embeddings_from_text

    def save_slowly(self, *arguments, **options):
        clock.now += 3.0
        return save(self, *arguments, **options)

    def initialize_slowly(*arguments, **options):
        clock.now += 4.0
        return initialize(*arguments, **options)

    monkeypatch.setattr(CramTrainer, "_save_checkpoint", save_slowly)
    monkeypatch.setattr(trainer_module, "initialize_embeddings_from_text", initialize_slowly)
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path, clock=clock, callbacks=[Pass(clock)], time_budget="20s",
        embeddings_from_text=True, save_interval="90%",
    )  # fmt: skip
    trainer.train()
    # 4 to count, 14 steps to 90 %, 3 to save, and the step that ends beyond; the last checkpoint is behind the clock.
    assert trainer.state.global_step == 15
    assert trainer.budget_metrics()["train_seconds"] == 22.0
    assert RunState.load(last_checkpoint(tmp_path)).elapsed_seconds == 22.0


def test_evaluating_does_not_change_the_training(tiny_config, tokenizer, tmp_path):
    tiny_config.hidden_dropout_prob = 0.2
    quiet = make_trainer(tiny_config, tokenizer, tmp_path / "a", max_steps=6)
    quiet.train()
    watched = make_trainer(tiny_config, tokenizer, tmp_path / "b", max_steps=6, eval_interval="10%")
    watched.train()
    assert_same(weights(quiet), weights(watched))
    assert watched.evaluate()["eval_loss"] == watched.evaluate()["eval_loss"]


def test_transformers_own_bert_can_be_crammed(tokenizer, tmp_path):
    config = BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    set_seed(0)
    collator = DataCollatorForFixedCountMasking(tokenizer, 0.25, return_masked_positions=False)
    clock = FakeClock()
    advance = Advance(clock)
    trainer = advance.trainer = CramTrainer(
        BertForMaskedLM(config),
        make_arguments(tmp_path, time_budget="40s", logging_interval="10%", eval_interval="50%", save_interval="50%"),
        train_dataset=Rows(64),
        eval_dataset=Rows(16, seed=1),
        data_collator=collator,
        callbacks=[advance],
        time_function=clock,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [20]
    assert trainer.budget_metrics()["tokens_seen"] == 40 * 4 * 16


def test_a_classifier_whose_configuration_training_has_filled_in_goes_on(tokenizer, tmp_path):
    """The first forward with labels writes `problem_type`, and the tokenizer its special tokens."""

    def classifier(**options):
        config = BertConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            pad_token_id=3,
        )  # fmt: skip
        return CramTrainer(
            BertForSequenceClassification(config),
            make_arguments(tmp_path, max_steps=4, save_interval="50%"),
            train_dataset=[{"input_ids": [5, 6, 7], "labels": index % 2} for index in range(16)],
            data_collator=default_data_collator,
            processing_class=tokenizer,
            **options,
        )

    classifier(callbacks=[StopAt(2)]).train()
    assert json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())["problem_type"] is not None
    resumed = classifier()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_images_can_be_crammed(tmp_path):
    from sklearn.datasets import load_digits
    from torch.utils.data import Dataset

    digits = load_digits()

    class Digits(Dataset):
        def __len__(self):
            return len(digits.target)

        def __getitem__(self, index):
            image = torch.tensor(digits.images[index] / 16.0, dtype=torch.float32).unsqueeze(0)
            return {"pixel_values": image, "labels": int(digits.target[index])}

    set_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    clock = FakeClock()
    trainer = CramTrainer(
        ViTForImageClassification(config),
        make_arguments(tmp_path, time_budget="200s", per_device_train_batch_size=32, learning_rate=3e-3,
                       lr_schedule="one_cycle", logging_interval="10%", save_interval="50%"),
        callbacks=[Pass(clock)],
        time_function=clock,
        train_dataset=Digits(),
        eval_dataset=Digits(),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    trainer.train()
    assert "tokens_seen" not in trainer.budget_metrics()
    assert trainer.budget_metrics()["samples_seen"] == 200 * 32
    assert trainer.evaluate()["eval_accuracy"] > 0.5


def test_norms_over_the_batch_can_be_crammed(tmp_path):
    """One row alone has no variance there, and what is measured beforehand leaves the running statistics alone."""
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    rows = [{"pixel_values": torch.randn(1, 4, 4), "labels": index % 2} for index in range(32)]
    trainer = CramTrainer(
        ResNetForImageClassification(config), make_arguments(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=rows,
    )  # fmt: skip
    statistics = [norm for norm in trainer.model.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    trainer.train()
    assert {int(norm.num_batches_tracked) for norm in statistics} == {1}
    assert trainer.budget_metrics()["training_flops"] > 0


def test_loss_curve_and_tensorboard(tiny_config, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path / "out", max_steps=10, logging_interval="10%", eval_interval="50%",
        report_to="tensorboard", callbacks=[LossCurveCallback()],
    )  # fmt: skip
    trainer.train()
    assert (tmp_path / "out" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "board").rglob("events*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert {"train/loss", "train/tokens_seen", "train/mlm_probability", "eval/loss"} <= set(
        accumulator.Tags()["scalars"]
    )


def test_a_curve_that_cannot_be_drawn_does_not_end_the_run(tiny_config, tokenizer, tmp_path, caplog):
    (tmp_path / "loss_curve.png").mkdir()
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1, callbacks=[LossCurveCallback()])
    trainer.train()
    assert "loss_curve.png could not be drawn" in caplog.text


def test_wrong_arguments_are_one_line(tmp_path):
    for values, message in (
        ({}, "set time_budget"),
        ({"time_budget": "soon"}, "not a duration"),
        ({"time_budget": "5s", "lr_schedule": "trianglez"}, "did you mean 'triangle2'"),
        ({"time_budget": "5s", "train_batch_rows": 6}, "multiple of 4"),
        ({"time_budget": "5s", "train_batch_rows": -4}, "multiple of 4"),
        ({"time_budget": "5s", "learning_rate": float("nan")}, "learning_rate must be a number, got nan"),
        ({"time_budget": "5s", "per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"time_budget": "5s", "save_strategy": "epoch"}, "save_strategy: epoch .* set save_interval"),
        ({"time_budget": "5s", "gradient_accumulation_steps": 2}, "set train_batch_rows"),
        ({"time_budget": "5s", "num_train_epochs": 5}, "num_train_epochs .* set time_budget or max_steps"),
        ({"time_budget": "5s", "warmup_steps": 0.1}, "set the rise in lr_scheduler_kwargs"),
        ({"time_budget": "5s", "lr_scheduler_type": "cosine"}, "lr_scheduler_type .* set lr_schedule"),
        ({"time_budget": "5s", "save_steps": 100}, "set save_interval instead, or save_strategy: steps"),
        (
            {"time_budget": "5s", "save_strategy": "steps", "save_steps": 0.1},
            "save_steps below 1 is a share of max_steps, which is not set: set save_interval",
        ),
        ({"time_budget": "5s", "bf16_full_eval": True}, "bf16_full_eval has no place here"),
        ({"time_budget": "5s", "remove_unused_columns": True}, "drop the columns from the data set"),
        ({"time_budget": "5s", "metric_for_best_model": "loss"}, "the last model is the result"),
        ({"time_budget": "5s", "save_strategy": "best"}, "set save_interval"),
        ({"time_budget": "5s", "save_only_model": True}, "no run can continue from"),
        ({"time_budget": "5s", "train_sampling_strategy": "group_by_length"}, "must be random or sequential"),
        ({"time_budget": "5s", "batch_ramp_until": 2.0}, "fraction of the budget"),
        ({"time_budget": "5s", "batch_ramp_until": 0.5}, "set train_batch_rows with it"),
        ({"time_budget": "5s", "label_smoothing_factor": 0.1}, "would change the held-out loss as well"),
        ({"time_budget": "5s", "dataloader_drop_last": True}, "would leave held-out rows out"),
        ({"time_budget": "5s", "dataloader_persistent_workers": True}, "set dataloader_num_workers"),
        (
            {"time_budget": "5s", "dataloader_multiprocessing_context": "spawn"},
            "no workers: set dataloader_num_workers",
        ),
        (
            {"time_budget": "5s", "torch_compile": True, "torch_compile_mode": "max_autotune"},
            "torch_compile_mode must be .*max-autotune",
        ),
        (
            {"time_budget": "5s", "torch_compile": True, "torch_compile_backend": "induktor"},
            "torch_compile_backend must be .*inductor",
        ),
        ({"time_budget": "5s", "optim": "sgd", "optim_args": "momentum"}, "optim_args must be name=value"),
        ({"time_budget": "5s", "optim": "adagrad", "optim_args": "lr_decay=high"}, "optim_args: could not convert"),
        ({"time_budget": "5s", "optim_args": "amsgrad=True"}, "optim_args: optim .* takes none"),
        ({"time_budget": "5s", "per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1"),
        ({"time_budget": "5s", "save_interval": "now and then"}, "not an interval"),
        ({"time_budget": "5s", "hub_token": "secret"}, "HF_TOKEN"),
        ({"time_budget": "5s", "max_nonfinite_steps": 0}, "at least 1"),
        (
            {"time_budget": "5s", "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            "num_steps .* follows from train_batch_rows here",
        ),
        ({"time_budget": "5s", "fp16_full_eval": True}, "fp16_full_eval has no place here"),
        ({"time_budget": "5s", "load_best_model_at_end": True}, "the last model is the result"),
        ({"time_budget": "5s", "hub_strategy": "all_checkpoints"}, "use every_save or end"),
        ({"time_budget": "5s", "dataloader_in_order": False, "dataloader_num_workers": 1}, "would change which rows"),
        ({"time_budget": "5s", "hub_always_push": True}, "the newest checkpoint waits"),
        ({"time_budget": "5s", "auto_find_batch_size": True}, "set per_device_train_batch_size"),
        ({"time_budget": "5s", "muon_learning_rate": 0.0}, "muon_learning_rate must be above 0"),
        ({"time_budget": "5s", "muon_learning_rate": 0.02, "optim": "adafactor"}, "leave out optim and optim_args"),
        ({"time_budget": "5s", "optim": "galore_adamw_layerwise"}, "takes its steps within the backward pass"),
        ({"time_budget": "5s", "optim": "lomo"}, "takes its steps within the backward pass"),
        ({"time_budget": "5s", "fsdp": True}, "fsdp: every process holds the whole model here"),
        ({"time_budget": "5s", "deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed: every process holds"),
        ({"time_budget": "5s", "muon_learning_rate": 0.02, "optim_args": "k=1"}, "leave out optim and optim_args"),
        ({"time_budget": "5s", "lr_scheduler_kwargs": "peak_at=0.5"}, "lr_scheduler_kwargs must be numbers by name"),
        (
            {"time_budget": "5s", "lr_scheduler_kwargs": "{peak_at: 0.5}"},
            "lr_scheduler_kwargs must be numbers by name",
        ),
        ({"time_budget": "5s", "lr_scheduler_kwargs": '{"peak_at": "late"}'}, "lr_scheduler_kwargs must be numbers"),
        ({"time_budget": "5s", "lr_scheduler_kwargs": {"peak": 0.5}}, "no parameter 'peak'; did you mean 'peak_at'"),
        ({"time_budget": "5s", "lr_scheduler_kwargs": {"peak_at": True}}, "a number from 0 to 1, got True"),
        ({"time_budget": "5s", "lr_scheduler_kwargs": {"peak_at": [0.5]}}, "a number from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            make_arguments(tmp_path, **values)
        assert "secret" not in str(caught.value)


def test_packages_that_are_not_here_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_cram.training_args.get_available_reporting_integrations", list)
    monkeypatch.setattr("hf_cram.training_args.is_liger_kernel_available", lambda: False)
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    for values, message in (
        ({"report_to": "clearml"}, "report_to: clearml is not installed"),
        ({"use_liger_kernel": True}, "use_liger_kernel: liger-kernel is not installed"),
        ({"optim": "adamw_bnb_8bit"}, "optim: .*bitsandbytes"),
    ):
        with pytest.raises(ValueError, match=message):
            make_arguments(tmp_path, time_budget="5s", **values)


def test_a_default_that_was_asked_for_is_refused_like_any_other_value(tmp_path):
    args = make_arguments(tmp_path, time_budget="5s", logging_strategy="steps")
    check_given({"learning_rate", "logging_steps", "logging_strategy"}, args)
    for name, instead in (("lr_scheduler_type", "lr_schedule"), ("save_steps", "save_interval")):
        with pytest.raises(ValueError, match=f"{name} .* set {instead}"):
            check_given({name}, args)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "PARALLELISM_CONFIG"])
def test_a_launcher_that_cuts_the_model_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match="every process holds the whole model here: leave it out"):
        make_arguments(tmp_path, max_steps=1)


def test_a_process_uses_one_of_several_gpus(tmp_path, monkeypatch, caplog):
    def two_gpus(arguments):
        device = TrainingArguments.__dict__["_setup_devices"].func(arguments)
        arguments._n_gpu = 2
        return device

    setup = functools.cached_property(two_gpus)
    setup.__set_name__(CramTrainingArguments, "_setup_devices")
    monkeypatch.setattr(CramTrainingArguments, "_setup_devices", setup, raising=False)
    arguments = make_arguments(tmp_path, max_steps=1)
    assert "start one each by accelerate launch --num_processes 2" in caplog.text
    assert arguments.n_gpu == 1


@pytest.mark.parametrize(
    "given", ['{"final_factor": "1e-2", "peak_at": "0.5"}', {"final_factor": "1e-2", "peak_at": 0.5}]
)
def test_numbers_of_the_schedule_may_be_quoted(tmp_path, given):
    """YAML takes 1e-2 for text."""
    arguments = make_arguments(tmp_path, time_budget="5s", lr_scheduler_kwargs=given)
    assert arguments.lr_schedule_shape == {"final_factor": 0.01, "peak_at": 0.5}


@pytest.mark.parametrize(
    ("given", "expected"), [("false", None), ("True", True), ("out/checkpoint-3",) * 2, (None, None)]
)
def test_resuming_can_be_said_in_words(tmp_path, given, expected):
    assert make_arguments(tmp_path, max_steps=1, resume_from_checkpoint=given).resume_from_checkpoint == expected


def test_false_is_no_checkpoint(tiny_config, tokenizer, tmp_path):
    out = tmp_path / "out"
    make_trainer(tiny_config, tokenizer, out, max_steps=2, save_interval="50%", callbacks=[StopAt(1)]).train()
    trainer = make_trainer(tiny_config, tokenizer, out, max_steps=2)
    trainer.train(resume_from_checkpoint="false")
    assert trainer.run_state.rows_seen == 2 * 4
    assert (tmp_path / "out.previous-1" / "checkpoint-1").is_dir()


def test_embeddings_start_from_the_text_once(tiny_config, tokenizer, tmp_path):
    values = {"max_steps": 4, "embeddings_from_text": True, "learning_rate": 1e-4}
    whole = make_trainer(tiny_config, tokenizer, tmp_path / "whole", **values)
    words = whole.model.get_input_embeddings().weight[5:]
    random_std = words.std().item()
    whole.train()
    assert words.std().item() > 2 * random_std
    make_trainer(
        tiny_config, tokenizer, tmp_path / "parts", callbacks=[StopAt(2)], save_interval="25%", **values
    ).train()
    resumed = make_trainer(tiny_config, tokenizer, tmp_path / "parts", **values)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("values", "dropout", "expected"),
    [
        ({}, 0.0, "eager"),
        ({}, 0.1, "sdpa"),
        ({"bf16": False}, 0.0, "sdpa"),
        ({"torch_compile": False, "torch_compile_backend": None}, 0.0, "sdpa"),
        ({"attn_implementation": "sdpa"}, 0.0, "sdpa"),
    ],
)
@pytest.mark.usefixtures("own_accelerator")
def test_attention_is_the_one_that_trains_faster(tiny_config, tokenizer, tmp_path, values, dropout, expected):
    """Fused attention is slow in compiled bf16 on a CPU; what is told counts more, and loading is not concerned."""
    tiny_config.attention_probs_dropout_prob = dropout
    values = {"bf16": True, "torch_compile": True, "torch_compile_backend": "eager", **values}
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1, **values)
    assert trainer.model.config._attn_implementation == expected
    trainer.model.save_pretrained(tmp_path)
    assert CrammedBertForMaskedLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("own_accelerator")
def test_a_compiled_run_trains_and_resumes_as_a_plain_one(tiny_config, tokenizer, tmp_path):
    """Over a batch ramp and an evaluation, whose rows have other shapes."""
    settings = {"max_steps": 6, "train_batch_rows": 8, "batch_ramp_until": 0.5, "eval_interval": "50%"}
    plain = make_trainer(tiny_config, tokenizer, tmp_path / "plain", **settings)
    plain.train()
    settings.update(torch_compile=True, torch_compile_backend="eager", save_interval="50%")
    AcceleratorState._reset_state()
    make_trainer(tiny_config, tokenizer, tmp_path / "compiled", callbacks=[StopAt(3)], **settings).train()
    compiled = make_trainer(tiny_config, tokenizer, tmp_path / "compiled", **settings)
    compiled.train(resume_from_checkpoint=True)
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(compiled.model.state_dict()[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def test_an_unknown_attention_is_one_line(tiny_config, tokenizer, tmp_path):
    with pytest.raises(ValueError, match='^attn_implementation: .*"fast"') as caught:
        make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1, attn_implementation="fast")
    assert "\n" not in str(caught.value)


def test_evaluating_needs_rows(tiny_config, tmp_path):
    arguments = make_arguments(tmp_path, max_steps=1, eval_interval="50%")
    with pytest.raises(ValueError, match="there is no eval_dataset"):
        CramTrainer(CrammedBertForMaskedLM(tiny_config), arguments, train_dataset=Rows(8))


def test_the_launchers_cpu_counts_as_told(tmp_path, monkeypatch):
    """`accelerate launch --cpu` moves the model there, whatever else the machine has."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    arguments = make_arguments(tmp_path, max_steps=1, use_cpu=False)
    assert (arguments.use_cpu, arguments.device.type) == (True, "cpu")


def test_the_launchers_fp8_is_refused(tiny_config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match=r"mixed_precision fp8 \(of accelerate launch\) is not known here: use bf16"):
        make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1, bf16=None)


def test_the_launchers_fp16_counts_as_told(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    arguments = make_arguments(tmp_path, max_steps=1, bf16=None)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):  # not trained in fp32 in silence
        CramTrainer(CrammedBertForMaskedLM(tiny_config), arguments, train_dataset=Rows(8))


@pytest.mark.parametrize(
    ("bf16", "torch_compile", "precision", "backend"),
    [(None, None, "bf16", "EAGER"), (False, False, "no", "NO"), (True, None, "bf16", "EAGER")],
)
def test_the_launchers_choices_count_where_nothing_else_is_told(
    tiny_config, tokenizer, tmp_path, monkeypatch, own_accelerator, bf16, torch_compile, precision, backend
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1, bf16=bf16, torch_compile=torch_compile)
    assert trainer.accelerator.mixed_precision == precision
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend(backend)
    assert (trainer.args.bf16, trainer.args.torch_compile) == (precision == "bf16", backend != "NO")


@pytest.mark.parametrize(
    "values",
    [{"torch_compile": False, "torch_compile_mode": "max-autotune"}, {"torch_compile_backend": "no"},
     {"torch_compile": True, "torch_compile_backend": "NO"},
     {"torch_compile": False, "torch_compile_backend": "aot_eager"}],
)  # fmt: skip
def test_no_compiling_is_none_whatever_else_a_recipe_says(tmp_path, monkeypatch, values):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    arguments = make_arguments(tmp_path, max_steps=1, **{"torch_compile": None, **values})
    assert (arguments.torch_compile, arguments.torch_compile_backend) == (False, "no")


def test_arguments_that_were_measured_can_be_copied(tiny_config, tokenizer, tmp_path):
    first = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1, torch_compile=False).args
    copied = dataclasses.replace(first, output_dir=str(tmp_path / "second"))
    assert (copied.torch_compile, copied.torch_compile_backend) == (False, "no")


def test_torch_compile_without_a_compiler_is_one_line(tiny_config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_cram.hardware_choices.can_compile", lambda device: False)
    with pytest.raises(ValueError, match="^torch_compile: torch.compile needs .* C\\+\\+ compiler"):
        make_trainer(tiny_config, tokenizer, tmp_path, max_steps=1, torch_compile=True)


def test_a_scheduler_of_ones_own_is_refused(tiny_config, tmp_path):
    model = CrammedBertForMaskedLM(tiny_config)
    optimizer = torch.optim.SGD(model.parameters())
    schedulers = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    with pytest.raises(ValueError, match="set lr_schedule, and give no scheduler"):
        CramTrainer(model, make_arguments(tmp_path, max_steps=1), train_dataset=Rows(8), optimizers=schedulers)


def test_an_optimiser_of_ones_own_goes_without_muon(tiny_config, tokenizer, tmp_path):
    model = CrammedBertForMaskedLM(tiny_config)
    arguments = make_arguments(tmp_path, max_steps=1, muon_learning_rate=0.02)
    with pytest.raises(ValueError, match="muon_learning_rate brings its own optimiser"):
        CramTrainer(model, arguments, train_dataset=Rows(8), optimizers=(torch.optim.SGD(model.parameters()), None))


def test_running_out_of_memory_names_what_to_lower(tiny_config, tokenizer, tmp_path):
    def fail(module, inputs):
        is_training = name == "per_device_train_batch_size 4"
        if module.training == is_training and (is_training or trainer.state.global_step):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: ...")

    for name in ("per_device_train_batch_size 4", "per_device_eval_batch_size 8"):
        trainer = make_trainer(tiny_config, tokenizer, tmp_path / name, max_steps=2, eval_interval="50%")
        trainer.model.register_forward_pre_hook(fail)
        with pytest.raises(MicroBatchMemoryError, match=f"memory ran out with {name}: lower it") as caught:
            trainer.train()
        assert "\n" not in str(caught.value)
    with pytest.raises(MicroBatchMemoryError, match=name):
        trainer.predict(Rows(8))


def test_datasets_that_cannot_resume_are_refused(tiny_config, tokenizer, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {}

    for dataset, message in ((Stream(), "map-style"), (Rows(0), "empty")):
        with pytest.raises(ValueError, match=message):
            CramTrainer(
                CrammedBertForMaskedLM(tiny_config), make_arguments(tmp_path, max_steps=1), train_dataset=dataset
            )


def test_a_full_disk_leaves_the_earlier_checkpoint_good(tiny_config, tokenizer, tmp_path):
    """Files beyond a size cannot be written any more: the second save fails as on a full disk."""
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=8, save_interval="25%", callbacks=[Fill(3)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(CheckpointError, match="checkpoint-4 failed.*Earlier checkpoints are untouched") as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert not (tmp_path / ".saving").exists()
    again = make_trainer(tiny_config, tokenizer, tmp_path, max_steps=8, save_interval="25%")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


class Fill(TrainerCallback):
    """From a step on, no file may grow beyond 20 kB."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class Keyed(Rows):
    """Rows whose masks go by the pass, as those of a prepared corpus do."""

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return {**super().__getitem__(index), "mask_key": self.epoch}


def test_rows_of_a_pass_are_each_seen_once_and_reshuffled():
    rows = Rows(20)
    stream = RowStream(rows, shuffle=True, seed=0)
    known = {row.tobytes(): index for index, row in enumerate(rows.rows)}
    passes = [
        [known[item["input_ids"].tobytes()] for item in stream.__getitems__(list(range(start, start + 20)))]
        for start in (0, 20)
    ]
    distinct = sorted(known.values())
    assert sorted(set(passes[0])) == sorted(set(passes[1])) == distinct
    assert passes[0] != passes[1]
    straddling = [known[item["input_ids"].tobytes()] for item in stream.__getitems__(list(range(15, 25)))]
    assert straddling == passes[0][15:] + passes[1][:5]
    keyed = Keyed(20)
    told = [item["mask_key"] for item in RowStream(keyed, shuffle=True, seed=0).__getitems__(list(range(15, 25)))]
    assert told == [0] * 5 + [1] * 5  # each pass has its masks
    first = RowStream(rows, shuffle=False, seed=0).__getitems__([0, 1, 2])
    assert all(np.array_equal(item["input_ids"], rows.rows[i]) for i, item in enumerate(first))


PARALLEL_SETTINGS = {"train_batch_rows": 16, "batch_ramp_until": 0.5}
