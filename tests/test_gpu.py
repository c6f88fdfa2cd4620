"""What only a CUDA device can show: `make test-gpu`. The other tests run on the CPU, with or without one."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, VOCAB_SIZE, Rows
from transformers import TrainerCallback, set_seed

from hf_cram import CrammedBertConfig, CrammedBertForMaskedLM
from hf_cram.checkpointing import last_checkpoint
from hf_cram.data.collator import DataCollatorForFixedCountMasking
from hf_cram.hardware import bf16_is_faster, measure_matmul_flops
from hf_cram.trainer import CramTrainer
from hf_cram.training_args import CramTrainingArguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device is visible: make test-gpu shows the first one"
    ),
]
ROTARY = {"position_embedding_type": "rotary"}


def changed(config, **values):
    return CrammedBertConfig(**{**config.to_dict(), **values})


def make_trainer(config, tokenizer, output_dir, callbacks=(), **values):
    set_seed(0)
    defaults = {
        "output_dir": str(output_dir), "per_device_train_batch_size": 16, "learning_rate": 1e-2, "report_to": "none",
        "disable_tqdm": True, "bf16": False, "torch_compile": False,
    }  # fmt: skip
    collator = DataCollatorForFixedCountMasking(tokenizer, "0.25")
    return CramTrainer(
        CrammedBertForMaskedLM(config),
        CramTrainingArguments(**{**defaults, **values}),
        train_dataset=Rows(256),
        eval_dataset=Rows(32, seed=1),
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", [{}, ROTARY], ids=["default", "rotary"])
def test_the_gpu_computes_what_the_cpu_computes(tiny_config, implementation, fields):
    set_seed(0)
    model = CrammedBertForMaskedLM(changed(tiny_config, **fields)).eval()
    ids = torch.randint(5, VOCAB_SIZE, (4, 24))
    mask = torch.ones_like(ids)
    mask[1, 10:] = mask[3, 3:] = 0
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation(implementation)
        actual = model.cuda()(input_ids=ids.cuda(), attention_mask=mask.cuda()).logits.cpu()
    kept = mask.bool()
    torch.testing.assert_close(actual[kept], expected[kept], atol=1e-4, rtol=1e-4)


def test_the_whole_step_compiles_into_one_graph(tiny_config):
    set_seed(0)
    model = CrammedBertForMaskedLM(changed(tiny_config, **ROTARY)).cuda()
    ids = torch.randint(5, VOCAB_SIZE, (8, 32), device="cuda")
    positions = torch.arange(8, device="cuda").expand(8, 8)
    labels = torch.full_like(ids, -100)
    labels[:, :8] = ids[:, :8]
    batch = {"input_ids": ids, "labels": labels, "masked_positions": positions}
    expected = model(**batch).loss
    actual = torch.compile(model, fullgraph=True)(**batch).loss
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("muon", [None, 0.02], ids=["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_model_learns_in_every_precision(tiny_config, tokenizer, tmp_path, precision, muon):
    precisions = {} if precision == "fp32" else {precision: True}
    trainer = make_trainer(
        tiny_config, tokenizer, tmp_path, max_steps=150, lr_schedule="constant", max_grad_norm=0.5,
        muon_learning_rate=muon, **precisions,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    metrics = trainer.budget_metrics()
    assert trainer.evaluate()["eval_loss"] < before - 1
    assert metrics["skipped_steps"] <= 10  # the fp16 scaler finds its scale by overflows
    assert metrics["peak_memory_bytes"] >= sum(p.numel() * 4 for p in trainer.model.parameters())


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}], ids=["bf16", "fp16"])
@pytest.mark.parametrize("muon", [None, 0.02], ids=["adamw", "muon"])
def test_a_stopped_and_resumed_run_goes_on_as_the_uninterrupted_one(tiny_config, tokenizer, tmp_path, precision, muon):
    values = {**precision, "muon_learning_rate": muon, "max_steps": 12, "learning_rate": 1e-3}
    whole = make_trainer(tiny_config, tokenizer, tmp_path / "whole", **values)
    whole.train()
    make_trainer(tiny_config, tokenizer, tmp_path / "parts", [StopAt(6)], **values).train()
    assert last_checkpoint(tmp_path / "parts").name == "checkpoint-6"
    resumed = make_trainer(tiny_config, tokenizer, tmp_path / "parts", **values)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-2, msg=name)


def test_the_budget_stops_a_compiled_run(tiny_config, tokenizer, tmp_path):
    trainer = make_trainer(tiny_config, tokenizer, tmp_path, time_budget="15s", bf16=True, torch_compile=True)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.budget_metrics()["train_seconds"] >= 15
    assert trainer.evaluate()["eval_loss"] < before


def test_the_hardware_is_measured():
    device = torch.device("cuda")
    assert bf16_is_faster(device, (3072, 768), seconds=0.5)
    assert measure_matmul_flops(device, torch.bfloat16, (3072, 768)) > measure_matmul_flops(
        device, torch.float32, (3072, 768)
    )


def test_the_main_job(tmp_path, python_environment):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"The number {n} comes before the number {n + 1}, and after {n - 1}." for n in range(9999))
    )
    out = tmp_path / "out"
    command = [
        sys.executable, str(REPOSITORY / "run_mlm_cram.py"), str(REPOSITORY / "training_args/debug.yaml"),
        "--train_files", str(text), "--vocab_size", "400", "--eval_rows", "16", "--time_budget", "20s",
        "--output_dir", str(out), "--cache_dir", str(tmp_path / "cache"),
    ]  # fmt: skip
    finished = subprocess.run(command, env=python_environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_loss"] < 5
    assert results["peak_memory_bytes"] > 0
    assert torch.cuda.get_device_name() in (out / "README.md").read_text()
