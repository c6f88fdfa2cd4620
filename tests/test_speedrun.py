"""The harness that compares recipes: its clock, its arms, its ratios, and a real run."""

import importlib.util
import json
import subprocess
import sys

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, SHARED

SCRIPT = REPOSITORY / "benchmarks" / "speedrun.py"
spec = importlib.util.spec_from_file_location("speedrun", SCRIPT)
speedrun = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speedrun)


def test_the_clock_stands_still_while_paused(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(speedrun.time, "monotonic", lambda: now[0])
    clock = speedrun.PausedClock()
    start = clock()
    now[0] += 5
    with clock.paused():
        now[0] += 10
        with clock.paused():
            now[0] += 20
        assert clock() - start == 5
        now[0] += 40
    now[0] += 1
    assert clock() - start == 6


def test_time_to_a_loss_is_interpolated():
    curve = [[10.0, 6.0], [20.0, 5.0], [30.0, 5.5], [40.0, 4.0]]
    assert speedrun.time_to_loss(curve, 5.5) == 15.0
    assert speedrun.time_to_loss(curve, 6.5) == 10.0
    assert speedrun.time_to_loss(curve, 3.9) is None


def result(loss, curve):
    points = [0.5, 1.0][-len(curve) :]
    return {"final_loss": loss, "seconds": curve[-1][0], "tokens": 1000, "curve": curve, "points": points}


def test_ratios_compare_times_to_the_rivals_final_loss():
    runs = {
        "rival": [result(5.0, [[50.0, 6.0], [100.0, 5.0]]), result(5.2, [[50.0, 6.0], [100.0, 5.2]])],
        "fast": [result(4.0, [[10.0, 5.0], [100.0, 4.0]]), result(4.1, [[20.0, 5.2], [100.0, 4.1]])],
        "slow": [result(5.5, [[50.0, 6.0], [100.0, 5.5]]), result(5.1, [[50.0, 6.0], [100.0, 5.1]])],
    }
    summary = speedrun.summarize(runs)
    assert summary["arms"]["rival"]["final_loss"] == [5.0, 5.2]
    assert summary["arms"]["fast"]["curve"][0] == [15.0, 5.1]
    assert summary["time_ratio"]["rival"] == 1.0
    assert summary["time_ratio"]["fast"] == pytest.approx((100 / 10 + 100 / 20) / 2)
    assert summary["time_ratio"]["slow"] is None  # one seed never gets there


def test_a_rival_that_stands_still_counts_from_when_it_had_its_loss():
    runs = {
        "rival": [result(5.8, [[50.0, 5.8], [600.0, 5.8]])],
        "fast": [result(4.0, [[10.0, 5.8], [600.0, 4.0]])],
    }
    assert speedrun.summarize(runs)["time_ratio"] == {"rival": 1.0, "fast": 5.0}


def test_the_curve_of_several_seeds_leaves_out_what_one_run_lacks():
    runs = {"rival": [result(5.0, [[50.0, 6.0], [100.0, 5.0]]), result(5.2, [[110.0, 5.2]])]}
    assert speedrun.summarize(runs)["arms"]["rival"]["curve"] == [[105.0, 5.1]]


def test_a_misspelt_field_is_one_line(tokenizer):
    arm = speedrun.split_fields({**speedrun.read_arm("paper_v2"), "hiden_size": 32})
    with pytest.raises(ValueError, match="no field of crammed_bert or of training: .*hiden_size"):
        speedrun.build_model(arm, tokenizer)


def test_a_recipe_masks_as_in_the_main_job():
    arm = speedrun.split_fields({"mask_replace_prob": 0.5, "random_replace_prob": 0.3, "text_for_budget": True})
    assert arm["masking"] == {"mlm_probability": "0.25", "mask_replace_prob": 0.5, "random_replace_prob": 0.3}
    assert (arm["training"], arm["model"]) == ({}, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "seed=1,2"], "--sweep: seed is the same for every arm here"),
        (["--sweep", "vocab_size=99,999"], "--sweep: vocab_size is the same for every arm here"),
        (["--probe", "no-such-folder"], "--probe: no-such-folder has no sst2"),
    ],
)
def test_what_would_be_lost_is_told_before_the_first_run(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "--text", "a", "--output_dir", "b", *options])
    with pytest.raises(SystemExit):
        speedrun.main()
    assert message in capsys.readouterr().err


def test_a_comparison_that_is_ended_ends_its_run(tmp_path, python_environment):
    """SIGTERM, as of a supervisor: the run beneath would go on for the rest of its budget, beside the next."""
    program = f"import subprocess, sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n" + (
        "from command_line import run_main\n"
        "run_main(lambda: subprocess.run([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=python_environment
    )
    child = psutil.Process(int(process.stdout.readline()))
    process.terminate()
    told = process.communicate(timeout=120)[1].decode()
    assert (process.returncode, told.strip()) == (143, "benchmarks/-c: stopped; nothing is kept")
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()


def test_a_mistake_in_any_arm_shows_before_the_first_run(tmp_path, tokenizer):
    job = {"max_steps": 5, "use_cpu": True, "output_dir": str(tmp_path), "length": 16}
    good = {**job, "arm": speedrun.split_fields(speedrun.read_arm("ours"))}
    speedrun.check_arms({"good": good}, tokenizer)
    for fields, message in (({"hiden_size": 32}, "hiden_size"), ({"lr_schedule": "flat"}, "lr_schedule")):
        bad = {**job, "arm": speedrun.split_fields({**speedrun.read_arm("ours"), **fields})}
        with pytest.raises(ValueError, match=message):
            speedrun.check_arms({"good": good, "bad": bad}, tokenizer)


def test_a_run_that_fails_ends_the_comparison(tmp_path, monkeypatch):
    begun = []

    def fail(job, name):
        begun.append(name)
        raise ValueError("run a-0 failed")

    monkeypatch.setattr(speedrun, "run_job", fail)
    with pytest.raises(ValueError, match="a-0 failed"):
        speedrun.run_all({"a": {}, "b": {}}, 2, tmp_path)
    assert begun == ["a-0"]


def test_runs_that_shared_the_machine_have_no_times(tmp_path, capsys):
    runs = {"rival": [result(5.0, [[50.0, 6.0], [100.0, 5.0]])], "fast": [result(4.0, [[10.0, 5.0], [100.0, 4.0]])]}
    for results in runs.values():
        results[0] |= {"matmul_peak_share": 0.5, "peak_memory_bytes": 1e6}
    summary = speedrun.report(runs, tmp_path, timed=False)
    assert summary["time_ratio"] == {"rival": None, "fast": None}
    assert "50.0%" not in capsys.readouterr().out
    speedrun.report(runs, tmp_path)
    assert "50.0%" in capsys.readouterr().out


def test_a_sweep_is_a_grid():
    grid = speedrun.parse_overrides(["learning_rate=1e-3,2e-3", "fp16=true"])
    assert [(point["learning_rate"], point["fp16"]) for point in grid] == [("1e-3", True), ("2e-3", True)]
    assert speedrun.parse_overrides([]) == [{}]
    with pytest.raises(ValueError, match="'oops' is not name=value"):
        speedrun.parse_overrides(["oops"])
    with pytest.raises(ValueError, match="holds several fields: give each as a word"):
        speedrun.parse_overrides(["learning_rate=1e-3,2e-3 hidden_size=64,128"])
    assert speedrun.parse_overrides(["lr_scheduler_kwargs={warmup: 0.1, decay_from: 0.4},{warmup: 0.2}"]) == [
        {"lr_scheduler_kwargs": {"warmup": 0.1, "decay_from": 0.4}}, {"lr_scheduler_kwargs": {"warmup": 0.2}}
    ]  # fmt: skip


@pytest.mark.parametrize("name", speedrun.yaml.safe_load(speedrun.ARMS_FILE.read_text()))
def test_every_arm_builds(name, tokenizer):
    arm = speedrun.split_fields(speedrun.read_arm(name))
    assert arm["training"]["learning_rate"] > 0
    model = speedrun.build_model(arm, tokenizer)
    assert model.get_output_embeddings().out_features == len(tokenizer)


@pytest.mark.parametrize(
    ("arm", "length", "message"),
    [
        ({"mlm_probability": 40}, 16, "mask rate"),
        ({"mlm_probability": "0.5:0.15"}, 16, "mask rate"),
        ({"max_position_embeddings": 16}, 32, "--length 32: an arm has 16 positions"),
        ({"learning_rate": "fast"}, 16, "an arm: learning_rate must be a number, got 'fast'"),
        ({"muon_learning_rate": "fast"}, 16, "an arm: a field of training has a value of another kind"),
        ({"num_attention_heads": 3}, 16, r"no such crammed_bert: .*hidden_size \(32\) must be a multiple"),
        ({"position_embedding_type": "rotry"}, 16, "no such crammed_bert: .*position_embedding_type"),
        ({"hidden_act": "gelo"}, 16, "no such crammed_bert: .*gelo"),
    ],
)
def test_a_mistake_in_an_arm_shows_before_the_first_run(tokenizer, tmp_path, arm, length, message):
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, **arm}
    job = {"arm": speedrun.split_fields(fields), "length": length, "max_steps": 1, "use_cpu": True}
    with pytest.raises(ValueError, match=message):
        speedrun.check_arms({"an arm": {**job, "output_dir": str(tmp_path)}}, tokenizer)


def test_an_earlier_comparison_in_the_folder_is_kept(tmp_path):
    for content, names in (("stopped", ["runs.jsonl"]), ("whole", ["runs.jsonl", "results.json"])):
        speedrun.set_earlier_aside(tmp_path)
        for name in names:
            (tmp_path / name).write_text(content)
    speedrun.set_earlier_aside(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "runs-1.jsonl": "stopped", "runs-2.jsonl": "whole", "results-2.json": "whole"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--seeds", "0"], "--seeds must be at least 1"), (["--arms", "broken.yaml"], "broken.yaml"),
     (["--arms", "our"], "no arm 'our': choose from paper_v2"), (["--time_budget", "soon"], "soon"),
     (["--probe", "glue", "--probe_seeds", "three"], "--probe_seeds must be a number of seeds"),
     (["--probe_seeds", "3"], "--probe_seeds is for a probe")],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, options, message):
    for task in ("sst2", "cola", "stsb"):
        (tmp_path / "glue" / task).mkdir(parents=True)
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "text.txt").write_text("\n".join(f"river stone house {n} letter window" for n in range(400)))
    arguments = ["--text", "text.txt", "--output_dir", "out", "--vocab_size", "120", "--length", "16", "--eval_rows", "8",
                 "--cache_dir", "cache", *options]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *arguments])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    run_main = importlib.import_module("command_line").run_main
    with pytest.raises(SystemExit) as caught:
        run_main(speedrun.main)
    code = caught.value.code
    told = capsys.readouterr().err if isinstance(code, int) else code
    assert code != 0
    assert message in told.splitlines()[-1]


def test_runs_beside_each_other_have_no_clock(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "--at_once", "2", "--text", "a", "--output_dir", "b"])
    with pytest.raises(SystemExit):
        speedrun.main()
    assert "compare equal steps with --max_steps" in capsys.readouterr().err


def small_glue(folder):
    """The first examples of the probe's real tasks."""
    for task in ("sst2", "cola", "stsb"):
        (folder / task).mkdir(parents=True)
        for file in (SHARED / "data" / "glue" / task).glob("*.parquet"):
            pq.write_table(pq.read_table(file).slice(0, 64), folder / task / file.name)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "data" / "glue").is_dir(), reason="the probe needs real GLUE tasks in ../shared/data"
)
def test_a_real_comparison(tmp_path, python_environment):
    text = tmp_path / "text.txt"
    words = ["river", "stone", "house", "garden", "letter", "window", "winter", "summer", "walked", "looked"]
    lines = (" ".join(words[(i * k) % 10] for k in range(1, 40)) for i in range(400))
    text.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, SCRIPT, "--max_steps", "4", "--arms", "paper_v2,bert", "--text", text, "--vocab_size",
               "120", "--length", "32", "--eval_rows", "8", "--output_dir", tmp_path / "out", "--cache_dir",
               tmp_path / "cache", "--sweep", "hidden_size=32", "intermediate_size=64",
               "per_device_train_batch_size=4", "--probe", small_glue(tmp_path / "glue"),
               "--probe_seeds", "1"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), env=python_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["arms"]) == 2
    assert set(results["arms"]) == set(results["time_ratio"])
    for arm in results["arms"].values():
        assert len(arm["final_loss"]) == 1
        assert arm["tokens_per_second"] > 0
        assert [seconds for seconds, _ in arm["curve"]] == sorted(seconds for seconds, _ in arm["curve"])
        for scores in (arm["runs"][0]["probe"], arm["runs"][0]["probe_from_scratch"]):
            assert set(scores["frozen"]) == {"sst2", "cola", "stsb"}
            assert all(len(values) == 1 for values in scores["short"].values())
        assert arm["runs"][0]["probe"]["frozen"] != arm["runs"][0]["probe_from_scratch"]["frozen"]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
