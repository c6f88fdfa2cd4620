"""Run GLUE: every task with every seed, by one setting, going on where an earlier run was stopped."""

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .files import write_json_atomically
from .fine_tuning import (
    EncodedTask,
    EncoderArguments,
    FineTuner,
    FineTuningArguments,
    encode_task,
    fingerprint,
    load_tokenizer,
)
from .glue import (
    GlueError,
    Task,
    TaskData,
    aggregate,
    choose_tasks,
    headline_metrics,
    load_glue_task,
    load_metric,
    load_own_task,
)
from .glue_outputs import (
    CHART_NAME,
    PAIRS_NAME,
    RESULTS_NAME,
    SUBMISSION_NAME,
    PairLog,
    draw_chart,
    headline_entry,
    median_seed,
    prediction_path,
    write_predictions,
    write_submission,
)
from .model_card import update_model_card

logger = logging.getLogger(__name__)

DEFAULT_OUTPUT_DIR = "trainer_output"  # the Trainer's own default


@dataclass
class GlueArguments:
    """What is scored, and how often."""

    tasks: str | None = field(
        default=None, metadata={"help": "Comma-separated GLUE tasks; default: all that glue_data holds, or all nine."}
    )
    glue_data: str | None = field(
        default=None, metadata={"help": "Folder laid out like the data set nyu-mll/glue; default: that data set."}
    )
    seeds: str = field(
        default="5", metadata={"help": "Number of seeds (1, 2, ...), or a comma-separated list of them: '3,7,'."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random part of each task."})
    metric: str | None = field(
        default=None, metadata={"help": "Another metric of the evaluate library, by name or path; reported as it is."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Own data instead of GLUE: csv, json(l), parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Own data to score on."})
    test_file: str | None = field(default=None, metadata={"help": "Own data to predict, with or without labels."})
    text_columns: list[str] = field(
        default_factory=list, metadata={"help": "One or two columns of text; default: those of text in train_file."}
    )
    label_column: str = field(default="label", metadata={"help": "Classes, or floats for a regression."})
    task_name: str | None = field(default=None, metadata={"help": "Name of the own task; default: train_file's."})
    save_models: bool | None = field(
        default=None, metadata={"help": "Keep the first seed's fine-tuned model; default: for own data only."}
    )
    search_learning_rate: list[float] = field(
        default_factory=list, metadata={"help": "Learning rates to search for the one setting of all tasks."}
    )
    search_batch_size: list[int] = field(default_factory=list, metadata={"help": "Batch sizes to search."})
    search_num_train_epochs: list[float] = field(default_factory=list, metadata={"help": "Epochs to search."})
    search_seeds: str = field(default="1", metadata={"help": "Seeds of the search, as in seeds."})

    @property
    def uses_own_data(self) -> bool:
        """Whether files were named instead of GLUE."""
        return self.train_file is not None


def parse_seeds(name: str, text: str) -> list[int]:
    """`5` as seeds 1 to 5, `3,7` as these."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or ("," not in text and numbers[0] < 1):
        raise GlueError(f"{name} must be a number of seeds or a comma-separated list of them, got {text!r}")
    return numbers if "," in text else list(range(1, numbers[0] + 1))


def output_folder(encoder: EncoderArguments, output_dir: str | None) -> Path:
    """
    Where the results go: `output_dir`, or the model's own folder where it is a local one, else `out/glue/<model>`.

    Results from scratch never go into the folder of the pretrained model: `<folder>-from-scratch`.
    """
    if output_dir and output_dir != DEFAULT_OUTPUT_DIR:
        return Path(output_dir)
    folder = Path(encoder.model_name_or_path)
    if not folder.is_dir():
        folder = Path("out", "glue", folder.name)
    return folder.with_name(f"{folder.name}-from-scratch") if encoder.from_scratch else folder


def fill_up(bar: tqdm, end: float, share: float) -> None:
    """Move the bar by `share`, not beyond `end`: shares that are rounded add up to a little more than one."""
    bar.update(min(share, end - bar.n))


class GlueRun:
    """All (task, seed) pairs of one encoder, with one setting after the other."""

    def __init__(self, encoder: EncoderArguments, glue: GlueArguments, args: FineTuningArguments):
        self.encoder, self.glue = encoder, glue
        self.output_dir = output_folder(encoder, args.output_dir)
        self.is_main = args.process_index == 0
        self.tokenizer = load_tokenizer(encoder)
        self.own_data = self._load_own_data() if glue.uses_own_data else None
        self.tasks = [self.own_data.task] if self.own_data else choose_tasks(glue.tasks, glue.glue_data)
        self.encoder_id = fingerprint(encoder)
        self._encoded: tuple[str, EncodedTask] | None = None

    def _load_own_data(self) -> TaskData:
        glue = self.glue
        if glue.validation_file is None:
            raise GlueError("train_file needs a validation_file to score on")
        return load_own_task(
            str(glue.train_file),
            glue.validation_file,
            glue.test_file,
            glue.text_columns,
            glue.label_column,
            glue.task_name,
        )

    def encoded(self, task: Task) -> EncodedTask:
        """The task in token ids; the last one is kept, since its seeds follow each other."""
        if self._encoded is None or self._encoded[0] != task.name:
            data = self.own_data or load_glue_task(task, self.glue.glue_data)
            max_length = min(self.encoder.max_seq_length, self.tokenizer.model_max_length)
            self._encoded = task.name, encode_task(data, self.tokenizer, max_length, self.glue.max_train_samples)
        return self._encoded[1]

    def setting_id(self, args: FineTuningArguments) -> str:
        """Names everything that decides the scores."""
        glue = self.glue
        files = {
            path: hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for path in (glue.train_file, glue.validation_file, glue.test_file)
            if path is not None
        }
        decisive = [self.encoder_id, args.setting, files, glue.glue_data, glue.max_train_samples, glue.metric,
                    glue.text_columns, glue.label_column]  # fmt: skip
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]

    def run(self, args: FineTuningArguments, seeds: Sequence[int], title: str = "") -> dict[str, Any]:
        """Score every pair that is not yet in the log, and aggregate all of them."""
        setting_id = self.setting_id(args)
        log = PairLog(self.output_dir / PAIRS_NAME, setting_id, self.is_main)
        tuner = FineTuner(self.encoder, args, self.tokenizer)
        pairs = list(itertools.product(self.tasks, seeds))
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=len(pairs), bar_format=layout, disable=not self.is_main, dynamic_ncols=True) as bar:
            for number, (task, seed) in enumerate(pairs):
                bar.set_description_str(f"{title}{task.name} seed {seed} ({number + 1}/{len(pairs)})")
                if log.find(task.name, seed) is None:
                    log.add(self._run_pair(tuner, task, seed, setting_id, partial(fill_up, bar, number + 1)))
                bar.update(number + 1 - bar.n)
        scores: dict[str, dict[int, dict[str, float]]] = {}
        for task, seed in pairs:
            for column, metrics in (log.find(task.name, seed) or {})["scores"].items():
                scores.setdefault(column, {})[seed] = metrics
        results = aggregate(scores, headline_metrics(self.tasks))
        return {
            "model": self.encoder.model_name_or_path,
            **results,
            "from_scratch": self.encoder.from_scratch,
            "setting": args.setting,
            "setting_id": setting_id,
            "examples_per_second": {
                task.name: (log.find(task.name, seeds[0]) or {})["examples_per_second"] for task in self.tasks
            },
        }

    def _run_pair(
        self, tuner: FineTuner, task: Task, seed: int, setting_id: str, advance: Callable[[float], None]
    ) -> dict[str, Any]:
        encoded = self.encoded(task)
        metric, factor = load_metric(self.glue.metric, task)

        def score(predictions: Any, references: Any) -> dict[str, float]:
            values = metric.compute(predictions=predictions, references=references) or {}
            return {name: factor * float(value) for name, value in values.items()}

        saves = self.glue.uses_own_data if self.glue.save_models is None else self.glue.save_models
        folder = self.output_dir / task.name
        save_to = folder if saves and seed == parse_seeds("seeds", self.glue.seeds)[0] else None
        result = tuner.run(encoded, seed, score, advance, save_to)
        if self.is_main:
            for name, outputs in result.test_outputs.items():
                write_predictions(prediction_path(self.output_dir, setting_id, name, seed), encoded.data.task, outputs)
        return {
            "task": task.name,
            "seed": seed,
            "scores": result.scores,
            "train_seconds": round(result.train_seconds, 2),
            "examples_per_second": round(result.examples_per_second, 1),
            "setting": tuner.args.setting,
        }

    def search(self, args: FineTuningArguments) -> FineTuningArguments:
        """The one setting, for all tasks, with the best average on the grid."""
        glue = self.glue
        grid = list(
            itertools.product(
                glue.search_learning_rate or [args.learning_rate],
                glue.search_batch_size or [args.per_device_train_batch_size],
                glue.search_num_train_epochs or [args.num_train_epochs],
            )
        )
        if len(grid) == 1:
            return args
        seeds = parse_seeds("search_seeds", glue.search_seeds)
        tried = []
        for number, (learning_rate, batch_size, epochs) in enumerate(grid):
            candidate = args.with_setting(learning_rate, batch_size, epochs)
            average = self.run(candidate, seeds, f"setting {number + 1}/{len(grid)}, ")["average"]
            if average is None:
                raise GlueError("A search needs a task that enters the average")
            tried.append((average, candidate))
            logger.info(
                "learning rate %g, batch size %d, %g epochs: average %.2f", learning_rate, batch_size, epochs, average
            )
        return max(tried, key=lambda entry: entry[0])[1]

    def write(self, results: dict[str, Any]) -> None:
        """Write `glue_results.json`, the chart and, where there are test splits, the submission."""
        folder = self.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(folder / RESULTS_NAME, results)
        name = Path(self.encoder.model_name_or_path).name + (" from scratch" if self.encoder.from_scratch else "")
        draw_chart(results, self.tasks, name, folder / CHART_NAME)
        headlines = headline_metrics(self.tasks)
        files = {}
        for task in self.tasks:
            column = next(iter(task.validation_splits))
            values = headline_entry(results, column, headlines[column])["values"]
            seed = median_seed(dict(zip(results["seeds"], values, strict=True)))
            for file_name in task.test_splits:
                path = prediction_path(folder, results["setting_id"], file_name, seed)
                if path.exists():
                    files[file_name] = path
        if files:
            write_submission(folder / SUBMISSION_NAME, files)
        self._share_with_model(results)

    def _share_with_model(self, results: dict[str, Any]) -> None:
        """Put the results beside a local model, and into its card: they are pushed with it."""
        model_folder = Path(self.encoder.model_name_or_path)
        if self.encoder.from_scratch or not model_folder.is_dir() or not update_model_card(model_folder, results):
            return
        if model_folder.resolve() != self.output_dir.resolve():
            for name in (RESULTS_NAME, CHART_NAME):
                shutil.copyfile(self.output_dir / name, model_folder / name)
