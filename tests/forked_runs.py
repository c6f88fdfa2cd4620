"""What tests run in forks of one process (see forked_calls): programs, trainers to be killed, data-parallel ranks."""

import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
from conftest import Rows
from test_trainer import PARALLEL_SETTINGS, StopAt, make_arguments, make_trainer
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

import run_mlm_cram  # noqa: F401 (imported before the forks)
from hf_cram import CrammedBertConfig, hardware_choices
from hf_cram.data.collator import DataCollatorForFixedCountMasking
from hf_cram.trainer import CramTrainer

hardware_choices.PEAK_SECONDS = 0.0


def run(job):
    """
    A job's `kind` of run, in so many `ranks` of one data-parallel run where it names them; its exit status.
    """
    kinds = {"program": run_program, "to_be_killed": train_to_be_killed, "parallel": train_in_parallel}
    kind, arguments = kinds[job["kind"]], job["arguments"]
    if "ranks" not in job:
        return kind(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [fork_rank(kind, arguments, rank, job["ranks"], port) for rank in range(job["ranks"])]
    status = 0
    while pids:
        pid, ended = os.wait()
        pids.remove(pid)
        if ended and not status:  # the others would wait for it
            status = 1
            for other in pids:
                os.kill(other, signal.SIGKILL)
    return status


def fork_rank(kind, arguments, rank, ranks, port):
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(590)  # of its parent, which a rank that waits for another would outlive
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    status = kind(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_program(command):
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    return 0


def base_of(folder):
    return CrammedBertConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def train_to_be_killed(arguments):
    base, out = arguments
    trainer = make_trainer(
        *base_of(base), out, max_steps=40, save_interval="10%", train_batch_rows=8, batch_ramp_until=0.5,
        rate="0:0.4,0.5:0.2", dataset=Rows(50),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return 0


def train_in_parallel(arguments):
    """Leaves in the folder what each rank has come to."""
    folder = Path(arguments[0])
    config, tokenizer = base_of(folder)
    clock = {"time_budget": "4s", "logging_interval": "10%", "eval_interval": "25%", "save_interval": "25%"}
    # A loss that is a mean is not multiplied by the processes, before training as after it.
    bert = BertForMaskedLM(BertConfig(vocab_size=config.vocab_size, hidden_size=32, num_hidden_layers=1,
                                      num_attention_heads=2, intermediate_size=64))  # fmt: skip
    collator = DataCollatorForFixedCountMasking(tokenizer, 0.25, return_masked_positions=False)
    trainer = CramTrainer(bert, make_arguments(folder / "bert", max_steps=1), train_dataset=Rows(16),
                          eval_dataset=Rows(16), data_collator=collator)  # fmt: skip
    (folder / f"bert.rank{trainer.args.process_index}").write_text(json.dumps(trainer.evaluate()["eval_loss"]))
    trainer.train()  # after an evaluation, in parallel all the same
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    for kind, sessions, settings in (
        ("steps", ([],), {"max_steps": 6}),
        ("parts", ([StopAt(3)], []), {"max_steps": 6, "save_interval": "50%"}),
        ("clock", ([],), clock),
    ):
        for number, callbacks in enumerate(sessions):
            # The clock of the second process runs a hundred times too fast, and does not count.
            is_fast = kind == "clock" and os.environ["RANK"] == "1"
            fast = {"clock": lambda: 100 * time.monotonic()} if is_fast else {}
            trainer = make_trainer(config, tokenizer, folder / kind, per_device_train_batch_size=2, dataset=Rows(50),
                                   callbacks=callbacks, **PARALLEL_SETTINGS, **settings, **fast)  # fmt: skip
            trainer.train(resume_from_checkpoint=number > 0)
            if callbacks:
                assert [path.name for path in (folder / kind).glob("checkpoint-*")] == ["checkpoint-3"]
        trainer.save_model()
        state = {
            "step": trainer.state.global_step, "rows": trainer.run_state.rows_seen,
            "tokens": trainer.run_state.tokens_seen, "flops": trainer.run_state.training_flops,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "weights": sum(p.double().sum().item() for p in trainer.model.parameters()),
        }  # fmt: skip
        (folder / f"{kind}.rank{trainer.args.process_index}").write_text(json.dumps(state))
    return 0
