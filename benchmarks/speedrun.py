"""
Recipes against each other at one budget: time to the same held-out loss, and loss at the same time.

    python benchmarks/speedrun.py --time_budget 60s --arms paper_v2,ours --seeds 1 --text FILE --output_dir D

Every run is a process of its own; the arms take turns, on the same rows, tokenizer and held-out masks (15 %). An arm
is an entry of benchmarks/speedrun_arms.yaml, or a recipe file. The clock stands still while torch compiles and while
the held-out loss is measured (on a GPU, kernels that Triton tunes at their first call count); `--count_compile` counts
compiling, from an empty cache. `--sweep` tries a grid on each arm, say
--sweep learning_rate=1e-3,2e-3 per_device_train_batch_size=16,32. `--probe GLUE_FOLDER` asks of every model, and of each arm's
network from scratch, what it is worth downstream (benchmarks/transfer_probe.py), behind the clock. Results: D/results.json,
curves: D/curves.png; those of an earlier comparison in D are kept under numbered names.
"""

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import yaml

ARMS_FILE = Path(__file__).with_name("speedrun_arms.yaml")
PROBE = Path(__file__).with_name("transfer_probe.py")
NUMBER = re.compile(r"[\d.]+e-?\d+")
SPLIT_VALUES = re.compile(r",(?![^{]*})")  # not inside {...}
# Shares of the budget at which the held-out loss is measured: close together where the curve is steep.
POINTS = [0.01 * 1.3**power for power in range(18)]
END = 1.0


# ---- One run, in a process of its own ----


class PausedClock:
    """Seconds that stand still inside `paused`, which may be nested."""

    def __init__(self):
        self.depth, self.paused_at, self.paused_seconds = 0, 0.0, 0.0

    def __call__(self) -> float:
        now = self.paused_at if self.depth else time.monotonic()
        return now - self.paused_seconds

    def pause(self, *_):
        if self.depth == 0:
            self.paused_at = time.monotonic()
        self.depth += 1

    def go_on(self, *_):
        self.depth -= 1
        if self.depth == 0:
            self.paused_seconds += time.monotonic() - self.paused_at

    @contextmanager
    def paused(self):
        self.pause()
        try:
            yield
        finally:
            self.go_on()


def build_model(arm: dict, tokenizer):
    """The arm's masked language model: a crammed one, or one of transformers' own by `model_type`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForMaskedLM

    import hf_cram  # noqa: F401 (registers the crammed BERT)

    fields = dict(arm.get("model", {}))
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "mask_token_id", "cls_token_id")}
    special |= {"bos_token_id": tokenizer.cls_token_id}
    special |= {"sep_token_id": tokenizer.sep_token_id, "eos_token_id": tokenizer.sep_token_id}
    model_type = fields.pop("model_type", "crammed_bert")
    known = AutoConfig.for_model(model_type)
    unknown = sorted(name for name in fields if not hasattr(known, name))
    if unknown:  # a configuration keeps any name, and the run would be another one's copy
        raise ValueError(f"no field of {model_type} or of training: {unknown}")
    try:
        return AutoModelForMaskedLM.from_config(
            AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **special, **fields)
        )
    except (LookupError, StrictDataclassError) as error:  # an activation that is not there, sizes that do not fit
        raise ValueError(f"no such {model_type}: {' '.join(str(error).split())}") from error


def training_arguments(job: dict, output_dir: str):
    """What the trainer of a job is told."""
    from hf_cram.training_args import CramTrainingArguments

    limit = {"max_steps": job["max_steps"]} if job["max_steps"] else {"time_budget": str(job["time_budget_seconds"])}
    return CramTrainingArguments(
        output_dir=output_dir, bf16=True, torch_compile=job.get("torch_compile", True), use_cpu=job["use_cpu"],
        report_to="none", disable_tqdm=True, seed=job["seed"], **limit, **job["arm"]["training"],
    )  # fmt: skip


def run_here(job: dict) -> dict:
    """Train one arm once; returns its curve and speed."""

    import numpy as np
    from torch._dynamo.callback import callback_handler
    from transformers import set_seed

    from hf_cram.data.collator import DataCollatorForFixedCountMasking
    from hf_cram.data.packing import PackedRows, token_dtype
    from hf_cram.data.tokenization import load_tokenizer
    from hf_cram.hardware import takes_masked_positions
    from hf_cram.trainer import CramTrainer

    clock = PausedClock()
    if not job["count_compile"]:
        callback_handler.register_start_callback(clock.pause)
        callback_handler.register_end_callback(clock.go_on)
    arm, corpus = job["arm"], Path(job["corpus"])
    set_seed(job["seed"])
    tokenizer = load_tokenizer(corpus / "tokenizer")
    dtype = token_dtype(len(tokenizer))
    held_out_file = Path(job.get("eval_file") or corpus / "eval.bin")
    train, held_out = (PackedRows(path, dtype, job["length"]) for path in (corpus / "train.bin", held_out_file))
    model = build_model(arm, tokenizer)
    collator = DataCollatorForFixedCountMasking(
        tokenizer, **arm["masking"], seed=job["seed"], return_masked_positions=takes_masked_positions(model)
    )
    eval_batches = build_eval_batches(held_out, tokenizer, job["eval_rows"])
    arguments = training_arguments(job, tempfile.mkdtemp(prefix="speedrun-"))
    curve: list[list[float]] = []
    points: list[float] = []  # of each entry of the curve

    def measure(point: float) -> None:
        with clock.paused():
            curve.append([trainer.clock.elapsed_seconds, held_out_loss(trainer.model, eval_batches)])
            points.append(point)

    trainer = CramTrainer(
        model, arguments, time_function=clock, train_dataset=train,
        data_collator=collator, processing_class=tokenizer,
    )  # fmt: skip
    trainer.add_callback(at_points(lambda: trainer.budget_fraction, measure))
    trainer.train()
    if trainer.interrupted_by is not None:
        raise SystemExit(128 + trainer.interrupted_by)  # not a run of the budget
    measure(END)
    seconds, final_loss = curve[-1]
    if job.get("save_to"):
        model.save_pretrained(job["save_to"])
        tokenizer.save_pretrained(job["save_to"])
    return {
        "final_loss": final_loss,
        "seconds": seconds,
        "num_parameters": model.num_parameters(),
        "curve": curve,
        "points": points,
        "is_finite": bool(np.isfinite(curve).all()),
        **figures_of(trainer.budget_metrics(), seconds),
    }


def figures_of(metrics: dict, seconds: float) -> dict:
    """What the table tells of a run's speed and memory."""
    return {
        "tokens": metrics["tokens_seen"],
        "steps": metrics["optimizer_steps"],
        "matmul_peak_share": metrics["training_flops"] / seconds / metrics["matmul_peak_flops_per_second"],
        "peak_memory_bytes": metrics["peak_memory_bytes"],
    }


def at_points(fraction_used, measure):
    """A callback that measures when a run passes each of `POINTS`, after the step that does."""
    from transformers import TrainerCallback

    class AtPoints(TrainerCallback):
        def __init__(self):
            self.points = iter(POINTS)
            self.due = next(self.points)

        def on_step_end(self, args, state, control, **kwargs):
            fraction = fraction_used()
            if fraction >= self.due:
                measure(self.due)
                while self.due <= fraction:
                    self.due = next(self.points, math.inf)

    return AtPoints()


def build_eval_batches(held_out, tokenizer, rows: int) -> list[dict]:
    """Held-out rows with masks drawn once, whatever the training's rate and seed."""
    from hf_cram.data.collator import held_out_collator

    collator = held_out_collator(tokenizer)
    count = min(rows, len(held_out))
    return [collator(held_out.__getitems__(range(start, min(start + 64, count)))) for start in range(0, count, 64)]


def held_out_loss(model, batches: list[dict]) -> float:
    """Mean loss of the masked tokens in nats, in fp32 and without compiling."""
    # accelerate has put its autocast around the model's own forward.
    forward = getattr(model, "_original_forward", model)
    import torch

    was_training = model.training
    model.eval()
    positions = None

    def at_masked_tokens(_, inputs):
        return (inputs[0].gather(1, positions[..., None].expand(-1, -1, inputs[0].shape[-1])),)

    # Logits of the other tokens would take most of the time and are not read.
    hook = model.get_output_embeddings().register_forward_pre_hook(at_masked_tokens)
    total, count = 0.0, 0
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in batches:
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                positions = batch["masked_positions"]
                logits = forward(input_ids=batch["input_ids"]).logits.float()
                labels = batch["labels"].gather(1, positions)
                total += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="sum"
                ).item()
                count += labels.ne(-100).sum().item()
    finally:
        hook.remove()
        model.train(was_training)
    return total / count


# ---- All runs ----


def read_arm(name: str) -> dict:
    """The fields of an arm of benchmarks/speedrun_arms.yaml, which may build on a recipe or on another arm."""
    arms = yaml.safe_load(ARMS_FILE.read_text())
    if Path(name).suffix == ".yaml":
        if not Path(name).is_file():
            raise ValueError(f"no recipe {name}")
        try:
            fields = yaml.safe_load(Path(name).read_text())
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            cause = " ".join(str(error).split())
            raise ValueError(f"{name} is not valid YAML: {cause}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{name} holds no fields of a recipe")
        return fields
    if name not in arms:
        raise ValueError(f"no arm {name!r}: choose from {', '.join(arms)}, or a recipe")
    arm = dict(arms[name])
    base = arm.pop("base", None)
    if base is None:
        return arm
    return {**(read_arm(str(ARMS_FILE.parents[1] / base)) if base.endswith(".yaml") else read_arm(base)), **arm}


def parse_overrides(words: list[str]) -> list[dict]:
    """`a=1,2 b=3` as the grid [{a: 1, b: 3}, {a: 2, b: 3}]."""
    choices = []
    for word in words:
        name, _, values = word.partition("=")
        if not values:
            raise ValueError(f"{word!r} is not name=value[,value]")
        if "{" not in values and (" " in values or "=" in values):
            raise ValueError(f"{word!r} holds several fields: give each as a word, unquoted")
        choices.append([(name, yaml.safe_load(value)) for value in SPLIT_VALUES.split(values)])
    return [dict(point) for point in itertools.product(*choices)]


def left_out_fields() -> set[str]:
    """Fields of a recipe that the harness decides for every arm alike, or that belong to text and output."""
    from dataclasses import fields as fields_of

    from hf_cram.recipes import ModelArguments
    from hf_cram.script_args import RECIPE_PARTS, MaskingArguments

    ours = {
        "output_dir", "time_budget", "max_steps", "logging_interval", "eval_interval", "save_interval", "bf16", "fp16",
        "torch_compile", "use_cpu", "seed", "report_to", "disable_tqdm", "train_sampling_strategy", "push_to_hub",
    }  # fmt: skip
    others = [part for part in RECIPE_PARTS if part not in (ModelArguments, MaskingArguments)]
    return ours | {spec.name for part in others for spec in fields_of(part)}


def split_fields(fields: dict) -> dict:
    """A flat recipe as what the collator, the model and the trainer take, without the [`left_out_fields`]."""
    from dataclasses import fields as fields_of

    from hf_cram.script_args import MaskingArguments
    from hf_cram.training_args import CramTrainingArguments

    training_names = {spec.name for spec in fields_of(CramTrainingArguments)}
    left_out = left_out_fields()
    arm: dict = {
        "training": {},
        "model": {},
        "masking": {spec.name: spec.default for spec in fields_of(MaskingArguments)},
    }
    for name, value in fields.items():
        if name in left_out:
            continue
        if isinstance(value, str) and NUMBER.fullmatch(value):
            value = float(value)  # YAML takes 1e-3 for a word
        part = "masking" if name in arm["masking"] else "training" if name in training_names else "model"
        arm[part][name] = value
    return arm


def check_arms(jobs: dict[str, dict], tokenizer) -> None:
    """A mistake in an arm is to show before the first run. Raises `ValueError`."""
    import torch

    from hf_cram.data.collator import DataCollatorForFixedCountMasking
    from hf_cram.training_args import CramTrainingArguments

    for name, job in jobs.items():
        with torch.device("meta"):
            model = build_model(job["arm"], tokenizer)
        positions = getattr(model.config, "max_position_embeddings", job["length"])
        if positions < job["length"]:
            raise ValueError(f"--length {job['length']}: {name} has {positions} positions (max_position_embeddings)")
        DataCollatorForFixedCountMasking(tokenizer, **job["arm"]["masking"])
        for field, value in job["arm"]["training"].items():
            if isinstance(value, str) and isinstance(getattr(CramTrainingArguments, field, None), int | float):
                raise ValueError(f"{name}: {field} must be a number, got {value!r}")
        try:
            training_arguments({**job, "seed": 0}, job["output_dir"])
        except TypeError as error:  # words where a number is none by default
            raise ValueError(f"{name}: a field of training has a value of another kind: {error}") from error


def run_job(job: dict, name: str) -> dict:
    """Run a job in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "job.json").write_text(json.dumps(job))
        environment = dict(os.environ, HF_CRAM_JOB=str(path / "job.json"))
        if job.get("one_thread"):
            environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        if job["count_compile"]:
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(path / "inductor")
        log = Path(job["output_dir"]) / f"{name}.log"
        with open(log, "w") as stream:
            code = subprocess.run([sys.executable, __file__], env=environment, stdout=stream, stderr=stream).returncode
        if code:
            raise ValueError(f"run {name} failed, see {log}")
        return json.loads((path / "result.json").read_text())


def run_all(
    jobs: dict[str, dict],
    seeds: int,
    output_dir: Path,
    first_seed: int = 0,
    save_models: bool = False,
    at_once: int = 1,
) -> dict[str, list[dict]]:
    """
    Run every job with every seed, in turn or `at_once`; each result is a line of `runs.jsonl` as soon as it is there.
    """

    def run(name: str, seed: int) -> dict:
        saved = {"save_to": str(model_folder(output_dir, name, seed))} if save_models else {}
        result = run_job({**jobs[name], **saved, "seed": seed}, model_folder(output_dir, name, seed).name)
        with open(output_dir / "runs.jsonl", "a") as stream:
            stream.write(json.dumps({"arm": name, "seed": seed, **result}) + "\n")
        print(
            f"{name} seed {seed}: loss {result['final_loss']:.3f}, {result['steps']} steps, "
            f"{result['tokens'] / result['seconds']:,.0f} tokens/s, {result['seconds']:.1f} s",
            flush=True,
        )
        return result

    # There and back, so that no arm always has the quiet machine.
    order = [
        (name, seed)
        for seed in range(first_seed, first_seed + seeds)
        for name in (jobs if seed % 2 == 0 else reversed(jobs))
    ]
    with ThreadPoolExecutor(at_once) as pool:
        # A run that fails ends it all, before the next one begins.
        outcomes = (map if at_once == 1 else pool.map)(lambda turn: run(*turn), order)
        results = dict(zip(order, outcomes, strict=True))
    return {name: [results[name, seed] for seed in range(first_seed, first_seed + seeds)] for name in jobs}


def model_folder(output_dir: Path, name: str, seed: int) -> Path:
    """Where the model of an arm and a seed is kept."""
    return output_dir / "models" / f"{name}-{seed}".replace("/", "_").replace(" ", "_")


def run_probes(
    runs: dict[str, list[dict]], output_dir: Path, first_seed: int, glue_data: str, probe_seeds: str
) -> None:
    """Put the probe's scores into every run, and those of the same network from scratch into an arm's first."""
    for name, results in runs.items():
        for number, result in enumerate(results):
            folder = model_folder(output_dir, name, first_seed + number)
            choices: dict[str, list[str]] = {"probe": []}
            if number == 0:
                choices["probe_from_scratch"] = ["--from_scratch"]
            for key, flags in choices.items():
                scores = folder / f"{key}.json"
                command = [
                    sys.executable, str(PROBE), "--model", str(folder), "--glue_data", glue_data,
                    "--seeds", probe_seeds, "--output", str(scores), *flags,
                ]  # fmt: skip
                with open(output_dir / f"{folder.name}-{key}.log", "w") as stream:
                    if subprocess.run(command, stdout=stream, stderr=stream).returncode:
                        raise ValueError(f"probe failed, see {stream.name}")
                result[key] = json.loads(scores.read_text())
                print_probe(f"{name} seed {first_seed + number} {key.removeprefix('probe_')}", result[key])


def print_probe(title: str, scores: dict) -> None:
    tasks = ", ".join(
        f"{task} {frozen:.1f} frozen, {statistics.median(scores['short'][task]):.1f} fine-tuned"
        for task, frozen in scores["frozen"].items()
    )
    print(f"{title}: {tasks}", flush=True)


def set_earlier_aside(output_dir: Path) -> None:
    """Number what an earlier comparison in the folder has found, alike: `results-1.json`, `runs-1.jsonl`."""
    paths = [output_dir / name for name in ("results.json", "runs.jsonl", "curves.png")]
    number = 1
    while any(path.with_stem(f"{path.stem}-{number}").exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            path.rename(path.with_stem(f"{path.stem}-{number}"))


def report(runs: dict[str, list[dict]], output_dir: Path, timed: bool = True) -> dict:
    """Print the table, write `results.json` and `curves.png`; returns the summary."""
    summary = summarize(runs, timed)
    (output_dir / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(summary, output_dir / "curves.png")
    print_table(summary)
    return summary


def time_to_loss(curve: list[list[float]], loss: float) -> float | None:
    """Seconds at which the curve first passes `loss`, interpolated; `None` where it does not."""
    earlier = None
    for seconds, value in curve:
        if value <= loss:
            if earlier is None:
                return seconds
            share = (earlier[1] - loss) / (earlier[1] - value)
            return earlier[0] + share * (seconds - earlier[0])
        earlier = (seconds, value)
    return None


def median_curve(results: list[dict]) -> list[list[float]]:
    """Medians of seconds and loss at the points that all runs have; a run of slow steps leaves some out."""
    by_point = [dict(zip(result["points"], result["curve"], strict=True)) for result in results]
    shared = [point for point in by_point[0] if all(point in points for points in by_point)]
    return [[statistics.median(points[point][i] for points in by_point) for i in (0, 1)] for point in shared]


def summarize(runs: dict[str, list[dict]], timed: bool = True) -> dict:
    """
    Medians over the seeds, and for each arm how much sooner it passes the final loss of the first arm; no times of runs
    that shared the machine.
    """
    rival = next(iter(runs))
    summary: dict = {"arms": {}, "time_ratio": {}, "rival": rival}
    for name, results in runs.items():
        middle = median_curve(results)
        summary["arms"][name] = {
            "final_loss": [result["final_loss"] for result in results],
            "tokens_per_second": statistics.median(r["tokens"] / r["seconds"] for r in results) if timed else None,
            "curve": middle,
            "runs": results,
        }
        ratios = [
            time_to_loss(other["curve"], other["final_loss"]) / seconds
            for result, other in zip(results, runs[rival], strict=True)
            if (seconds := time_to_loss(result["curve"], other["final_loss"])) is not None
        ]
        passes = timed and len(ratios) == len(results)
        summary["time_ratio"][name] = statistics.median(ratios) if passes else None
    return summary


def print_table(summary: dict) -> None:
    print(f"{'arm':<24}{'final loss':>12}{'spread':>8}{'tokens/s':>10}{'of peak':>9}{'MB':>7}{'sooner':>8}")
    for name, arm in summary["arms"].items():
        losses, runs = arm["final_loss"], arm["runs"]
        ratio, speed = summary["time_ratio"][name], f"{'-':>10}{'-':>9}"
        if arm["tokens_per_second"] is not None:
            share = statistics.median(run["matmul_peak_share"] for run in runs)
            speed = f"{arm['tokens_per_second']:>10,.0f}{share:>9.1%}"
        print(
            f"{name:<24}{statistics.median(losses):>12.3f}{max(losses) - min(losses):>8.3f}{speed}"
            f"{max(run['peak_memory_bytes'] for run in runs) / 1e6:>7.0f}"
            + (f"{ratio:>7.1f}x" if ratio else f"{'-':>8}")
        )
    print(f"sooner: time of {summary['rival']} to its final loss over the arm's time to the same loss")


def draw(summary: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for index, (name, arm) in enumerate(summary["arms"].items()):
        for number, run in enumerate(arm["runs"]):
            seconds, losses = zip(*run["curve"], strict=True)
            axes.plot(seconds, losses, color=f"C{index}", alpha=0.8, label=name if number == 0 else None)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of the clock")
    axes.set_ylabel("held-out loss in nats (15 % masked)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What would be lost, or mean nothing, after hours of running ends the program now."""
    if options.at_once > 1 and not options.max_steps:
        parser.error("--at_once: runs beside each other share a clock's machine; compare equal steps with --max_steps")
    for name in ("seeds", "eval_rows", "at_once"):
        if vars(options)[name] < 1:
            parser.error(f"--{name} must be at least 1, got {vars(options)[name]}")
    if options.probe is None and options.probe_seeds != parser.get_default("probe_seeds"):
        parser.error("--probe_seeds is for a probe: name a folder with --probe, or leave it out")
    if options.probe is not None:
        from hf_cram.glue_args import parse_seeds

        parse_seeds("--probe_seeds", options.probe_seeds)
        for task in ("sst2", "cola", "stsb"):
            if not (Path(options.probe) / task).is_dir():
                parser.error(f"--probe: {options.probe} has no {task}: name a folder laid out like nyu-mll/glue")
    if unmoved := {name for point in parse_overrides(options.sweep) for name in point} & left_out_fields():
        parser.error(f"--sweep: {min(unmoved)} is the same for every arm here, and a sweep of it would change nothing")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time_budget", default="60s", help="of every run")
    parser.add_argument("--max_steps", type=int, default=0, help="equal steps instead of equal time")
    parser.add_argument("--arms", default="paper_v2,ours", help="comma-separated; the first is the rival")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--text", nargs="+", required=True, help="files of text to train on")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--eval_rows", type=int, default=512)
    parser.add_argument("--sweep", nargs="+", default=[], help="name=value[,value] ...: a grid on every arm")
    parser.add_argument("--count_compile", action="store_true", help="compiling counts, from an empty cache")
    parser.add_argument("--save_models", action="store_true", help="keep the trained models in the output folder")
    parser.add_argument("--probe", metavar="GLUE_FOLDER", help="score every model downstream too")
    parser.add_argument(
        "--probe_seeds",
        default="1",
        help="of the probe's fine-tuning, a number or a list; one takes two minutes a model",
    )
    parser.add_argument("--at_once", type=int, default=1, help="runs beside each other; with --max_steps only")
    parser.add_argument("--no_compile", action="store_true", help="for short runs of equal steps")
    parser.add_argument("--cache_dir", help="of the prepared text")
    parser.add_argument("--output_dir", required=True)
    return parser


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    check_options(parser, options)

    import torch

    from hf_cram.budget import parse_duration
    from hf_cram.data.pipeline import DataArguments, prepare_corpus

    arms = {}
    for arm, point in itertools.product(options.arms.split(","), parse_overrides(options.sweep)):
        name = " ".join([arm, *(f"{key}={value}" for key, value in point.items())])
        arms[name] = split_fields({**read_arm(arm), **point})
    time_budget_seconds = parse_duration(options.time_budget)
    corpus = prepare_corpus(
        DataArguments(
            train_files=options.text, text_column=options.text_column, vocab_size=options.vocab_size,
            max_seq_length=options.length, eval_rows=options.eval_rows, cache_dir=options.cache_dir,
        )
    )  # fmt: skip
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    job = {
        "corpus": str(corpus.directory), "length": options.length, "eval_rows": options.eval_rows,
        "max_steps": options.max_steps, "time_budget_seconds": time_budget_seconds,
        "count_compile": options.count_compile, "output_dir": str(output_dir),
        "use_cpu": not torch.cuda.is_available(), "torch_compile": not options.no_compile,
        "one_thread": options.at_once > 1,
    }  # fmt: skip
    jobs = {name: {**job, "arm": arm} for name, arm in arms.items()}
    check_arms(jobs, corpus.tokenizer)
    set_earlier_aside(output_dir)
    save_models = options.save_models or options.probe is not None
    runs = run_all(jobs, options.seeds, output_dir, options.first_seed, save_models, options.at_once)
    timed = options.at_once == 1
    report(runs, output_dir, timed)
    if options.probe is not None:
        try:
            run_probes(runs, output_dir, options.first_seed, options.probe, options.probe_seeds)
        finally:  # the scores that there are
            report(runs, output_dir, timed)


if __name__ == "__main__":
    from command_line import run_main  # before hf_cram, of which it chooses the copy

    if "HF_CRAM_JOB" in os.environ:
        job_file = Path(os.environ["HF_CRAM_JOB"])
        job_file.with_name("result.json").write_text(json.dumps(run_here(json.loads(job_file.read_text()))))
        sys.exit()
    run_main(main, "finished runs are lines of runs.jsonl")
