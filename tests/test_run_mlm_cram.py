"""The main job as a user runs it, killed and resumed."""

import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import REPOSITORY, VOCAB_SIZE, Rows
from forked_calls import forked_calls
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_trainer import PARALLEL_SETTINGS, make_trainer
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
from transformers.trainer_utils import SaveStrategy

from hf_cram.checkpointing import CheckpointError, RunState, last_checkpoint
from hf_cram.data.errors import DataError
from hf_cram.data.pipeline import DataArguments
from hf_cram.data.workers import available_workers
from hf_cram.hardware import describe_hardware
from hf_cram.launching import (
    MPI_PREFIXES,
    end_with_launcher,
    missing_processes,
    start_missing_processes,
    use_all_cores,
)
from hf_cram.output_folder import holds_result, state_of_the_resumed
from hf_cram.recipes import ModelArguments, RecipeParser
from hf_cram.script_args import MaskingArguments, shareable
from hf_cram.training_args import CramTrainingArguments
from run_mlm_cram import check_same_rows, tell_of, train_and_save

WORDS = ["the", "old", "man", "saw", "a", "boat", "near", "house", "and", "went", "home", "by", "night", "with", "his"]
SMALL = [
    "--vocab_size", "200", "--max_seq_length", "32", "--eval_rows", "16", "--hidden_size", "32",
    "--num_hidden_layers", "2", "--num_attention_heads", "2", "--intermediate_size", "64",
    "--max_position_embeddings", "64",
    "--per_device_train_batch_size", "8", "--learning_rate", "5e-3", "--bf16", "false", "--torch_compile", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, rng.integers(5, 30))) + "." for _ in range(2000)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def arguments(text, out, *more):
    files = ["--train_files", str(text / "text.txt"), "--cache_dir", str(text / "cache"), "--output_dir", str(out)]
    return [str(REPOSITORY / "run_mlm_cram.py"), *files, *SMALL, *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a job of forked_runs: (exit status, what it wrote)."""
    paths = [REPOSITORY, REPOSITORY / "tests", *(path for path in sys.path if path not in ("", str(REPOSITORY)))]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }  # fmt: skip
    with forked_calls("from forked_runs import run\n", environment, tmp_path_factory.mktemp("logs")) as call_forked:

        def run_job(kind, arguments, **options):
            status, log = call_forked(kind=kind, arguments=[str(argument) for argument in arguments], **options)
            return status, log.read_text()

        yield run_job


OF_EARLIER_WEIGHTS = {"glue_results.json", "minimal_pairs_results.json", "README.md", "recipe.yaml"}


@pytest.fixture(scope="module")
def finished(text, run, tmp_path_factory):
    """One run from raw text to its end, stopped by SIGTERM on the way."""
    out = tmp_path_factory.mktemp("run") / "out"

    def stop(pid):
        while not (out / "clock.json").is_file() and psutil.pid_exists(pid):
            time.sleep(0.1)
        time.sleep(1)
        with contextlib.suppress(ProcessLookupError):  # it has failed, and says why
            os.kill(pid, signal.SIGTERM)

    command = arguments(text, out, "--time_budget", "60s", "--logging_interval", "1s")
    status, told = run("program", command, on_start=stop)
    assert last_checkpoint(out), told
    stopped = RunState.load(last_checkpoint(out))
    for name in OF_EARLIER_WEIGHTS:
        (out / name).write_text("mine")
    more = ["--time_budget", f"{2 * stopped.elapsed_seconds + 1.5}s", "--logging_interval", "0.5s",
            "--eval_interval", "50%", "--resume_from_checkpoint", "true"]  # fmt: skip
    return status, told, stopped, run("program", arguments(text, out, *more)), out


def test_sigterm_saves_and_says_so(finished):
    code, told, stopped, _, _ = finished
    assert code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM with a checkpoint: continue with --resume_from_checkpoint true" in told
    assert stopped.rows_seen > 0


def test_resumed_run_ends_with_everything_in_the_output_folder(finished):
    _, _, stopped, (status, told), out = finished
    assert status == 0, told[-2000:]
    names = {path.name for path in out.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "trainer_state.json", "all_results.json",
                     "loss_curve.png", "README.md", "modeling_crammed_bert.py"}  # fmt: skip
    results = json.loads((out / "all_results.json").read_text())
    for key in ("eval_loss", "eval_perplexity", "tokens_seen", "tokens_per_second", "train_seconds",
                "preprocessing_seconds", "time_budget_seconds", "skipped_steps"):  # fmt: skip
        assert key in results, key
    assert results["train_seconds"] >= results["time_budget_seconds"] > stopped.elapsed_seconds
    assert AutoTokenizer.from_pretrained(out).model_max_length == 64  # what the model takes
    assert results["tokens_seen"] > stopped.tokens_seen
    assert results["eval_perplexity"] == pytest.approx(np.exp(results["eval_loss"]))
    assert results["eval_loss"] < np.log(200)
    assert len([line for line in told.splitlines() if "[MASK]" in line]) == 5


def test_scores_of_earlier_weights_are_set_aside(finished):
    """Of a run that goes on: what was scored were other weights."""
    *_, (_, told), out = finished
    moved = {path.name for path in (out / "set-aside-1").iterdir()}
    assert moved == OF_EARLIER_WEIGHTS
    assert {(out / "set-aside-1" / name).read_text() for name in moved} == {"mine"}
    assert not (out / "glue_results.json").exists()
    assert f"were moved to {out / 'set-aside-1'}" in told


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_keeps_its_result(finished, text, run, tmp_path):
    """Its last checkpoint is of an earlier step, and others have written into its folder since."""
    out = tmp_path / "out"
    shutil.copytree(finished[-1], out)
    (out / "glue_results.json").write_text("{}")
    (out / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    status, told = run("program", arguments(text, out, "--time_budget", "1s", "--resume_from_checkpoint", "true"))
    assert status == 0, told[-2000:]
    assert "This run was finished: its result in" in told
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert {name for name in before if after[name] != before[name]} <= {"clock.json", "loss_curve.png"}
    # A result of fewer steps than the checkpoint's is that of an earlier, shorter run.
    assert holds_result(out, RunState.load(last_checkpoint(out)).rows_seen // 8)
    results = json.loads((out / "all_results.json").read_text())
    assert not holds_result(out, results["optimizer_steps"] + 1)
    assert not holds_result(out / "absent", 0)


@pytest.mark.slow
def test_stopping_the_launcher_stops_the_run_with_a_checkpoint(text, tmp_path):
    """`accelerate launch` ends without a word to the one process it has started."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    launched = subprocess.Popen([*launcher, *arguments(text, out, "--time_budget", "100s")], env=environment)
    while not (out / "clock.json").is_file() and launched.poll() is None:
        time.sleep(0.2)
    (training,) = psutil.Process(launched.pid).children()
    launched.terminate()
    launched.wait()
    _, left = psutil.wait_procs([training], timeout=60)
    assert {process.status() for process in left} <= {psutil.STATUS_ZOMBIE}  # where nobody is there to bury it
    assert RunState.load(last_checkpoint(out)).rows_seen > 0


def test_result_works_everywhere(finished):
    out = finished[-1]
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForMaskedLM.from_pretrained(out)
    (best, *_) = pipeline("fill-mask", model=model, tokenizer=tokenizer)("the old [MASK] saw a boat")
    assert best["token_str"] in tokenizer.get_vocab()
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert card.data.eval_results[0].metric_value == pytest.approx(
        json.loads((out / "all_results.json").read_text())["eval_loss"], abs=1e-3
    )
    assert "hidden_size: 32" in card.text
    assert str(out.parent) not in (out / "README.md").read_text()


def test_recipe_beside_the_model_can_be_shared_and_run_again(finished):
    out = finished[-1]
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["learning_rate"] == 5e-3
    assert not {"train_files", "cache_dir", "output_dir", "resume_from_checkpoint"} & set(recipe)
    parser = RecipeParser((ModelArguments, DataArguments, MaskingArguments, CramTrainingArguments))
    model_args, data_args, _, training_args = parser.parse([str(out / "recipe.yaml"), "--output_dir", str(out)])
    assert (model_args.hidden_size, data_args.vocab_size, training_args.learning_rate) == (32, 200, 5e-3)
    given = {
        "hub_model_id": "me/x",
        "push_to_hub": True,
        "save_strategy": SaveStrategy.STEPS,
        "dataset_name": str(out),
    }
    assert shareable(given | {"seed": 3}) == {"save_strategy": "steps", "seed": 3}
    assert shareable({"tokenizer_name": "owner/tokenizer"}) == {"tokenizer_name": "owner/tokenizer"}
    assert shareable({"tokenizer_name": str(out)}) == {}
    hub_mix = {"wikipedia": {"dataset_name": "wikimedia/wikipedia"}}
    assert shareable({"sources": hub_mix}) == {"sources": hub_mix}
    assert shareable({"sources": json.dumps(hub_mix)}) == {"sources": json.dumps(hub_mix)}
    for local in ({"dataset_name": str(out)}, {"train_files": ["text.txt"]}):
        assert shareable({"sources": json.dumps(hub_mix | {"mine": local})}) == {}
    results = json.loads((out / "all_results.json").read_text())
    assert results["text_name"] == "text.txt"
    assert results["hardware"].startswith("1 x ")
    assert results["num_parameters"] == AutoModelForMaskedLM.from_pretrained(out).num_parameters()


def test_held_out_loss_is_that_of_the_saved_model(finished, text):
    from hf_cram.data.collator import held_out_collator
    from hf_cram.data.pipeline import DataArguments, prepare_corpus

    corpus = prepare_corpus(
        DataArguments(train_files=[str(text / "text.txt")], cache_dir=str(text / "cache"), vocab_size=200,
                      max_seq_length=32, eval_rows=16)
    )  # fmt: skip
    assert corpus.from_cache
    collator = held_out_collator(corpus.tokenizer)
    model = AutoModelForMaskedLM.from_pretrained(finished[-1])
    with torch.no_grad():
        loss = model(**collator([corpus.eval_dataset[index] for index in range(16)])).loss.item()
    recorded = json.loads((finished[-1] / "all_results.json").read_text())["eval_loss"]
    assert loss == pytest.approx(recorded, abs=1e-4)


@pytest.mark.slow
def test_accelerate_launches_two_processes(text, tmp_path, python_environment):
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    environment = {**python_environment, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = arguments(text, out, "--time_budget", "2s", "--save_interval", "0.5s")
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (last_checkpoint(out) / "rng_state_1.pth").is_file()


def test_processes_that_accelerate_has_not_started_are(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` starts one, which becomes the launcher of two."""
    started = []
    monkeypatch.setattr(
        "hf_cram.launching._parent_command", lambda: ["accelerate", "launch", "--cpu", "-n", "2", "a.py"]
    )
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["a.py", "recipe.yaml"])
    for name in [name for name in os.environ if name == "RANK" or name.startswith(MPI_PREFIXES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    start_missing_processes()
    ((program, *words),) = started
    assert program == sys.executable
    assert words == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "a.py", "recipe.yaml"]


def test_two_processes_run_the_main_job(text, run, tmp_path):
    out = tmp_path / "out"
    command = arguments(
        text, out, "--time_budget", "4s", "--save_interval", "1s", "--eval_interval", "50%",
        "--text_for_budget", "true", "--row_order", "sentence_length",
    )  # fmt: skip
    status, told = run("program", command, ranks=2)
    assert status == 0, told[-3000:]
    results = json.loads((out / "all_results.json").read_text())
    assert results["train_seconds"] >= 4
    assert (last_checkpoint(out) / "rng_state_1.pth").is_file()
    assert told.count("The budget can consume about") == 1
    assert told.count("Training reads the rows in their order (sentence_length)") == 1
    state = RunState.load(last_checkpoint(out))
    assert (state.row_order, state.max_train_tokens) == ("sequential", results["max_train_tokens"])
    assert told.count("What preparing took") == 1
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recipe["text_for_budget"], recipe["row_order"]) == (True, "sentence_length")
    assert not {"max_train_tokens", "train_sampling_strategy"} & set(recipe)
    assert results["max_train_tokens"] > 0


def test_processes_that_found_another_text_do_not_train(monkeypatch):
    corpus = SimpleNamespace(train_dataset=SimpleNamespace(dataset_id="mine"))
    check_same_rows(corpus)
    monkeypatch.setattr("run_mlm_cram.gather_object", lambda values: [*values, "another's"])
    with pytest.raises(DataError, match="the text has changed"):
        check_same_rows(corpus)


def test_a_resumed_run_reads_its_text_for_the_same_tokens(tmp_path):
    """Another budget or machine would ask for another number, and so for other rows."""
    (tmp_path / "checkpoint-7").mkdir()
    RunState(max_train_tokens=5000).save(tmp_path / "checkpoint-7")

    def state(**values):
        args = CramTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, **values)
        return state_of_the_resumed(tmp_path, args.resume_from_checkpoint)

    assert state(resume_from_checkpoint="true").max_train_tokens == 5000
    assert state(resume_from_checkpoint=str(tmp_path / "checkpoint-7")).max_train_tokens == 5000
    assert state() is None
    (tmp_path / ".saving").mkdir()
    (tmp_path / "checkpoint-7").rename(tmp_path / ".saving" / "replaced-checkpoint-7")
    assert state(resume_from_checkpoint="true").max_train_tokens == 5000
    with pytest.raises(CheckpointError, match="no checkpoint folder .*checkpoint-8"):
        state(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_another_text_than_that_of_the_resumed_run_is_not_prepared(text, tmp_path, monkeypatch):
    import run_mlm_cram

    (tmp_path / "checkpoint-7").mkdir()
    RunState(dataset_id="another").save(tmp_path / "checkpoint-7")
    command = arguments(text, tmp_path, "--max_steps", "9", "--use_cpu", "true", "--resume_from_checkpoint", "true")
    monkeypatch.setattr(sys, "argv", [*command, "--cache_dir", str(tmp_path / "cache")])
    monkeypatch.setattr("hf_cram.data.stages.write_token_shards", lambda *_, **__: pytest.fail("prepared"))
    with pytest.raises(DataError, match="the run to resume has seen rows of the dataset another, and these would be"):
        run_mlm_cram.main()


def test_a_text_that_is_read_several_times_is_told(caplog):
    caplog.set_level("INFO", "hf_cram")
    rows = Rows(10, length=100)
    rows.max_seq_length = 100
    corpus = SimpleNamespace(train_dataset=rows, from_cache=True)
    for consumed in (None, 1400.0):
        tell_of(corpus, consumed)
        assert "The text has 1,000 tokens" not in caplog.text
    tell_of(corpus, 3000.0)
    assert "The text has 1,000 tokens: the run reads it about 3.0 times" in caplog.text


def test_ctrl_c_before_training_is_one_line(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_cram.launching.end_with_launcher", interrupt)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "run_mlm_cram.py"), run_name="__main__")
    assert caught.value.code == 130
    assert capsys.readouterr().err == "run_mlm_cram.py: stopped; what was prepared and saved before is kept\n"


@pytest.mark.parametrize(("step_of_result", "is_kept"), [(7, True), (6, False)])
def test_the_result_of_a_finished_run_is_kept(tmp_path, monkeypatch, step_of_result, is_kept):
    """Resumed, a run whose budget is used up has its last checkpoint, and a result that may be later."""
    (tmp_path / "all_results.json").write_text(json.dumps({"optimizer_steps": step_of_result}))
    saved = []
    monkeypatch.setattr("run_mlm_cram.save_results", lambda *_: saved.append(1))
    trainer = SimpleNamespace(
        args=SimpleNamespace(resume_from_checkpoint=True, push_to_hub=False), train=lambda **_: None,
        interrupted_by=None, was_used_up=True, output_dir=tmp_path, state=SimpleNamespace(global_step=7),
        is_world_process_zero=lambda: False,
    )  # fmt: skip
    assert train_and_save(trainer, None, {}, 0.0, None, None) == 0
    assert bool(saved) != is_kept


def test_an_accelerator_without_a_name_is_no_cpu():
    assert describe_hardware(torch.device("mps"), 1).startswith("1 x MPS (")


def test_a_recipe_may_say_none_to_its_sources():
    assert shareable({"sources": "none", "vocab_size": 99}) == {"sources": "none", "vocab_size": 99}


def test_accelerate_on_a_cpu_is_held_to_the_number_asked_for():
    several = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "0"}
    command = ["accelerate", "launch", "--cpu", "--num_processes", "3", "run.py"]
    assert missing_processes(several, command) == 3
    assert missing_processes(several, ["accelerate", "launch", "--num_processes=4", "run.py"]) == 4
    assert missing_processes({**several, "RANK": "0"}, command) is None
    assert missing_processes({**several, "OMPI_COMM_WORLD_SIZE": "3"}, command) is None
    assert missing_processes({"ACCELERATE_USE_CPU": "True"}, command) is None
    with pytest.raises(ValueError, match="name --num_processes"):
        missing_processes(several, ["accelerate", "launch", "run.py"])


def test_a_parent_that_may_not_be_read_is_no_launcher(monkeypatch):
    def refuse(process):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "parent", refuse)
    start_missing_processes()
    end_with_launcher()


def test_a_launchers_single_thread_becomes_all_cores():
    threads = torch.get_num_threads()
    cores = available_workers(None)
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
    try:
        for environment, expected in (
            ({"OMP_NUM_THREADS": "1"}, 7),  # the user's own choice
            ({**launched, "OMP_NUM_THREADS": "3"}, 7),
            (launched, cores),
            ({}, min(7, cores)),
            ({**launched, "LOCAL_WORLD_SIZE": str(cores)}, 1),
        ):
            torch.set_num_threads(7)
            use_all_cores(environment)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_files", "/missing/file.txt"], "/missing/file.txt: no such file or folder"),
        pytest.param(["--output_dir", "/proc/out"], "No such file or directory: '/proc/out'", marks=pytest.mark.slow),
    ],
)
def test_a_users_mistake_is_one_line(text, tmp_path, run, options, message):
    status, told = run("program", arguments(text, tmp_path / "out", "--max_steps", "2", *options))
    assert status == 1
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("run_mlm_cram.py: error: ")
    assert message in told.strip().splitlines()[-1]


def test_rows_that_cannot_be_published_do_not_stop_the_training(monkeypatch, caplog):
    import run_mlm_cram

    def fail(*_):
        raise DataError("the Hub is away")

    monkeypatch.setattr(run_mlm_cram, "publish_if_asked", fail)
    run_mlm_cram.publish(None, None, None)
    assert "The rows are not published: the Hub is away. Later: python -m hf_cram.data.pipeline" in caplog.text


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--fp16", "true"], "needs a GPU"), (["--max_position_embeddings", "16"], "raise the latter")],
)
def test_what_cannot_train_is_told_before_the_text_is_prepared(text, tmp_path, monkeypatch, options, told):
    import run_mlm_cram

    monkeypatch.setattr(sys, "argv", arguments(text, tmp_path, "--max_steps", "2", "--use_cpu", "true", *options))
    monkeypatch.setattr(run_mlm_cram, "prepare_corpus", lambda *_: pytest.fail("prepared"))
    with pytest.raises(ValueError, match=told):
        run_mlm_cram.main()


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_resumes_to_the_same_weights(tiny_config, tokenizer, tmp_path, run, kills):
    """SIGKILL at any moment, saving included; what comes out in the end is the uninterrupted run, bit for bit."""
    tiny_config.hidden_dropout_prob = 0.1
    tiny_config.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def run_once(out, kill_after):
        def kill(pid):
            if kill_after is not None:
                time.sleep(kill_after)
                with contextlib.suppress(ProcessLookupError):  # it was quicker
                    os.kill(pid, signal.SIGKILL)

        return run("to_be_killed", [tmp_path / "base", out], on_start=kill)[0]

    rng = random.Random(0)
    started = time.monotonic()
    assert run_once(tmp_path / "whole", None) == 0
    whole_seconds = time.monotonic() - started
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    killed, number, finished = 0, 0, 0
    while killed < kills or not finished:
        out = tmp_path / f"run-{number}"
        before = last_checkpoint(out)
        elapsed = RunState.load(before).elapsed_seconds if before else 0.0
        status = run_once(out, None if killed >= kills else rng.uniform(0.1, 0.8) * whole_seconds)
        if status == 0:
            finished += 1
            number += 1
            result = load_file(out / "model.safetensors")
            assert all(torch.equal(tensor, result[name]) for name, tensor in expected.items())
            continue
        assert status == -signal.SIGKILL
        killed += 1
        if (after := last_checkpoint(out)) is not None:
            state = RunState.load(after)
            load_file(after / "model.safetensors")
            assert state.elapsed_seconds >= elapsed
            assert json.loads((after / "trainer_state.json").read_text())["global_step"] > 0


def test_two_processes_train_as_one(tiny_config, tokenizer, tmp_path, run):
    """With equal steps as one process does, stopped and resumed too; by the clock, which they share, both alike."""
    tiny_config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    status, told = run("parallel", [tmp_path], ranks=2)
    assert status == 0, told[-3000:]
    assert json.loads((tmp_path / "bert.rank0").read_text()) == pytest.approx(np.log(VOCAB_SIZE), rel=0.05)
    one = make_trainer(tiny_config, tokenizer, tmp_path / "one", max_steps=6, dataset=Rows(50), **PARALLEL_SETTINGS)
    one.train()
    for kind in ("steps", "parts"):
        two = load_file(tmp_path / kind / "model.safetensors")
        for name, tensor in two.items():
            assert (one.model.state_dict()[name] - tensor).abs().max() < 1e-5, (kind, name)
        counts = json.loads((tmp_path / f"{kind}.rank0").read_text())
        assert (counts["step"], counts["rows"], counts["tokens"]) == (
            6, one.run_state.rows_seen, one.run_state.tokens_seen
        )  # fmt: skip
        assert counts["flops"] == pytest.approx(one.run_state.training_flops)
    for kind in ("steps", "parts", "clock"):
        assert (tmp_path / f"{kind}.rank0").read_text() == (tmp_path / f"{kind}.rank1").read_text()
    assert RunState.load(last_checkpoint(tmp_path / "clock")).elapsed_seconds >= 4.0
