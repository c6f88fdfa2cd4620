"""Run GLUE: every task with every seed, by one setting, going on where an earlier run was stopped."""

import itertools
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard
from tqdm import tqdm

from .classifier import check_pairs, fingerprint, load_tokenizer, longest_example, pin
from .data.sources import check_stamps, stamps_of
from .files import GLUE_RESULTS, can_make, flush_to_disk, read_object, write_json_atomically
from .fine_tuning import FineTuner
from .fine_tuning_args import EncoderArguments, FineTuningArguments
from .glue import (
    COLUMNS,
    TASKS,
    GlueError,
    Task,
    aggregate,
    choose_tasks,
    headline_metrics,
    load_metric,
    numbers_of,
)
from .glue_args import GlueArguments, parse_seeds
from .glue_data import DIAGNOSTIC, GLUE_DATASET, TaskData, load_glue_task, load_own_task
from .glue_encoding import EncodedTask, encode_task
from .glue_folder import DEFAULT_OUTPUT_DIR, KEPT_NAME, check_replaceable, output_folder
from .glue_outputs import (
    CHART_NAME,
    PAIRS_NAME,
    SUBMISSION_NAME,
    PairLog,
    draw_chart,
    headline_entry,
    is_fuller,
    is_larger,
    median_seed,
    prediction_path,
    write_predictions,
    write_submission,
)
from .hub import name_of_run
from .model_card import (
    CARD_NAME,
    EVAL_FOLDER,
    ModelCardError,
    build_fine_tuned_card,
    forget_scores,
    read_card_metadata,
    save_model_card,
    update_model_card,
)
from .model_files import content_of, hash_of, name_model
from .output_folder import first_free

logger = logging.getLogger(__name__)


def fill_up(bar: tqdm, end: float, share: float) -> None:
    """Move the bar by `share`, not beyond `end`: shares that are rounded add up to a little more than one."""
    bar.update(min(share, end - bar.n))


class GlueRun:
    """All (task, seed) pairs of one encoder, with one setting after the other."""

    def __init__(
        self,
        encoder: EncoderArguments,
        glue: GlueArguments,
        args: FineTuningArguments,
        card_metadata: Mapping[str, str | None] | None = None,
    ):
        self.encoder = encoder = broadcast_object_list([pin(encoder)])[0]  # it may change between two processes
        self.glue, self.card_metadata = glue, dict(card_metadata or {})
        self.is_main = args.process_index == 0
        self.tokenizer = load_tokenizer(encoder)
        self._model_files = stamps_of(content_of(encoder.model_name_or_path, encoder.model_revision)[1])
        self.own_data = self._load_own_data() if glue.uses_own_data else None
        endings = [self.own_data.task.name] if self.own_data else []
        endings += [Path(glue.metric).stem] if glue.metric else []
        self.output_dir = output_folder(encoder, args.output_dir, endings)
        self.model_id = name_model(encoder.model_name_or_path, encoder.from_scratch, encoder.model_revision)
        self._check_output_dir(endings, args.output_dir in (None, "", DEFAULT_OUTPUT_DIR))
        self.tasks = [self.own_data.task] if self.own_data else choose_tasks(glue.tasks, glue.glue_data)
        if any(len(task.text_columns) > 1 for task in self.tasks):
            check_pairs(encoder, self.tokenizer)
        # What is wrong with the last task shall be known before the first is trained.
        # Once: a file that changes while the run goes on is other data than what was read.
        self.data_ids = {task.name: self.data_id(task) for task in self.tasks}
        self.trained_on = self._own_data_id(glue.train_file, glue.validation_file) if glue.uses_own_data else None
        self.data = {task.name: self.own_data or load_glue_task(task, glue.glue_data) for task in self.tasks}
        self.metrics = {task.name: load_metric(glue.metric, task) for task in self.tasks}
        regression = next((task.name for task in self.tasks if not task.label_names), None)
        if args.label_smoothing_factor and regression:
            raise GlueError(f"label_smoothing_factor: {regression} has no classes; leave it out, or the task")
        if glue.keeps_models:
            for task in self.tasks:
                check_replaceable(self.output_dir / task.name, self._is_of_this_model)
        self.max_length = longest_example(encoder, self.tokenizer)
        if self.max_length < encoder.max_seq_length:
            logger.warning(
                "max_seq_length %d is more than %s takes: examples are cut at %d",
                encoder.max_seq_length, self.model_name, self.max_length,
            )  # fmt: skip
        self.encoder_id = fingerprint(encoder)
        if self.is_main and not can_make(self.output_dir):
            raise GlueError(f"output_dir: {self.output_dir} cannot be written to: choose another folder")
        self.log = PairLog(self.output_dir / PAIRS_NAME, self.is_main)
        # Ranks that saw different pairs would wait for each other for ever.
        self.log.lines = broadcast_object_list([self.log.lines])[0]
        self._encoded: tuple[str, EncodedTask] | None = None
        self._choose_precision(args)

    def _check_output_dir(self, endings: Sequence[str], is_default: bool) -> None:
        """Scores in a model's folder count as that model's, and are pushed with it."""
        model_folder = Path(self.encoder.model_name_or_path)
        is_own = self.output_dir.resolve() == model_folder.resolve()
        if (self.output_dir / "config.json").is_file() and (not is_own or endings or self.encoder.from_scratch):
            raise GlueError(
                f"output_dir: {self.output_dir} holds a model, and these would not be the scores of it: choose another "
                "folder"
            )
        # The model's own folder and those named after it are its own whatever it has been trained to since.
        self._is_own_place = is_own or (is_default and model_folder.is_dir())
        path = self.output_dir / GLUE_RESULTS
        if not self._is_of_this_model(read_object(path)):
            raise GlueError(f"output_dir: {path} holds the scores of another model: choose another folder")

    def _is_of_this_model(self, told: dict[str, Any]) -> bool:
        """Whether results, or what stands beside a kept model, are this model's: by content, else by name."""
        if self._is_own_place:
            return True
        own = {"model": self.model_name, "from_scratch": self.encoder.from_scratch}
        own = {"model_id": self.model_id} if "model_id" in told else own
        return all(told.get(name, value) == value for name, value in own.items())

    @property
    def model_name(self) -> str:
        """Name on the Hub, or of the folder alone: results travel with the model, the rest of the path is private."""
        folder = Path(self.encoder.model_name_or_path)
        return folder.resolve().name if folder.is_dir() else self.encoder.model_name_or_path

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
            glue.regression,
        )

    def _choose_precision(self, args: FineTuningArguments) -> None:
        """Decide `args.bf16` where it is open: as in an earlier run of this encoder, else by measuring."""
        args.fp16 = args.fp16 or args.mixed_precision == "fp16"  # of the launcher
        bf16 = bool(args.bf16) or args.mixed_precision == "bf16"
        if args.bf16 is None and not bf16 and not args.fp16:
            earlier = self.log.find(encoder_id=self.encoder_id)
            task = self.encoded(self.tasks[0])
            decision = (
                earlier["setting"]["bf16"]
                if earlier and not earlier["setting"]["fp16"]
                else FineTuner(self.encoder, args, self.tokenizer).prefers_bf16(task)
            )
            bf16 = broadcast_object_list([decision])[0]
        args.set_precision(bf16)

    def encoded(self, task: Task) -> EncodedTask:
        """The task in token ids; the last one is kept, since its seeds follow each other."""
        if self._encoded is None or self._encoded[0] != task.name:
            encoded = encode_task(self.data[task.name], self.tokenizer, self.max_length, self.glue.max_train_samples)
            self._encoded = task.name, encoded
        return self._encoded[1]

    def setting_id(self, args: FineTuningArguments) -> str:
        """Names what decides the scores of every task."""
        settings = [self.encoder_id, args.setting, self.glue.max_train_samples, self.glue.metric]
        return hash_of(settings, self._metric_files())

    def _metric_files(self) -> list[Path]:
        """The script of another metric, with those beside it where it was named by its folder."""
        if self.glue.metric is None:
            return []
        path = Path(self.glue.metric)
        return [path] if path.is_file() else sorted(path.glob("*.py"))

    def data_id(self, task: Task) -> str:
        """Names the data of a task: by content, where it lies in files."""
        glue = self.glue
        if glue.uses_own_data:
            return self._own_data_id(glue.train_file, glue.validation_file, glue.test_file)
        if glue.glue_data is None:
            return GLUE_DATASET
        folders = [task.name, *([DIAGNOSTIC] if task.name == "mnli" else [])]
        files = [path for name in folders for path in sorted(Path(glue.glue_data, name).glob("*.parquet"))]
        return hash_of(task.name, files)

    def _own_data_id(self, *files: str | None) -> str:
        glue = self.glue
        paths = [Path(path) for path in files if path is not None]
        return hash_of([glue.text_columns, glue.label_column, glue.regression], paths)

    def run(
        self, args: FineTuningArguments, seeds: Sequence[int], title: str = "", keep_model: bool = False
    ) -> dict[str, Any]:
        """Score every pair that is not yet in the log, and aggregate all; `keep_model` saves the first seed's."""
        setting_id = self.setting_id(args)
        tuner = FineTuner(self.encoder, args, self.tokenizer)
        pairs = list(itertools.product(self.tasks, seeds))
        finished: dict[tuple[str, int], dict[str, Any]] = {}
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=len(pairs), bar_format=layout, disable=not self.is_main, dynamic_ncols=True) as bar:
            for number, (task, seed) in enumerate(pairs):
                bar.set_description_str(f"{title}{task.name} seed {seed} ({number + 1}/{len(pairs)})")
                key = {"setting_id": setting_id, "task": task.name, "seed": seed, "data_id": self.data_ids[task.name]}
                is_kept = keep_model and seed == seeds[0]
                line = self.log.find(**key)
                if line is None or (is_kept and not self._holds_model(task, key)):
                    advance = partial(fill_up, bar, number + 1)
                    line = {**key, **self._run_pair(tuner, task, seed, setting_id, advance, key if is_kept else None)}
                    self.log.add(line)
                finished[task.name, seed] = line
                bar.update(number + 1 - bar.n)
        scores: dict[str, dict[int, dict[str, float]]] = {}
        for (_, seed), line in finished.items():
            for column, metrics in line["scores"].items():
                scores.setdefault(column, {})[seed] = metrics
        # The unit of somebody else's metric is not known: it is reported, not averaged.
        headlines = headline_metrics(self.tasks) if self.glue.metric is None else {}
        return {
            "model": self.model_name,
            "model_id": self.model_id,
            **aggregate(scores, headlines),
            "from_scratch": self.encoder.from_scratch,
            "setting": {
                **args.setting,
                **{name: getattr(self.encoder, name) for name in ("dropout", "pooling")},
                "max_seq_length": self.max_length,
                "max_train_samples": self._binding_limit(),
                "metric": Path(self.glue.metric).name if self.glue.metric else None,
            },
            "setting_id": setting_id,
            "examples_per_second": {
                task.name: finished[task.name, seeds[0]]["examples_per_second"] for task in self.tasks
            },
        }

    def _binding_limit(self) -> int | None:
        """`max_train_samples`, where a task has more examples."""
        limit = self.glue.max_train_samples
        return limit if limit is not None and any(limit < len(data.train) for data in self.data.values()) else None

    def _run_pair(
        self,
        tuner: FineTuner,
        task: Task,
        seed: int,
        setting_id: str,
        advance: Callable[[float], None],
        kept_as: dict[str, Any] | None,
    ) -> dict[str, Any]:
        encoded = self.encoded(task)
        metric, factor = self.metrics[task.name]

        def score(predictions: Any, references: Any) -> dict[str, float]:
            scores = numbers_of(metric.compute(predictions=predictions, references=references))
            return {name: factor * value for name, value in scores.items()}

        staging = self.output_dir / f".{task.name}.saving"
        working_folder = self.output_dir
        if tuner.args.save_strategy != "no":  # with room to delete them, away from a pretraining run's
            working_folder = self.output_dir / "checkpoints" / setting_id / f"{task.name}.seed-{seed}"
        result = tuner.run(encoded, seed, score, advance, staging if kept_as else None, working_folder)
        check_stamps(self._model_files)  # else these are not the scores of the model that they would go by
        if self.is_main:
            if kept_as is not None:
                self._keep_model(staging, self.output_dir / task.name, kept_as)
            for name, outputs in result.test_outputs.items():
                path = self._prediction_path(setting_id, task, name, seed)
                write_predictions(path, encoded.data.task, outputs)
        return {
            "encoder_id": self.encoder_id,
            "scores": result.scores,
            "train_seconds": round(result.train_seconds, 2),
            "examples_per_second": round(result.examples_per_second, 1),
            "setting": tuner.args.setting,
        }

    def _keep_model(self, staging: Path, folder: Path, kept_as: dict[str, Any]) -> None:
        """Move the fine-tuned model from `staging` to `folder`, where one of other files is moved aside."""
        # A file to be predicted changes the pair, not the model.
        trained_on = self.trained_on or kept_as["data_id"]
        write_json_atomically(
            staging / KEPT_NAME, {"model_id": self.model_id, "trained_on": trained_on, **kept_as}
        )  # fmt: skip
        flush_to_disk(staging)
        check_replaceable(folder, self._is_of_this_model)  # a training later
        kept = read_object(folder / KEPT_NAME)
        if kept and kept.get("trained_on", kept.get("data_id")) != trained_on:
            aside = first_free(folder)
            folder.rename(aside)
            logger.warning("The model in %s is of other files, and was moved to %s", folder, aside)
        elif folder.exists():
            if (folder / CARD_NAME).is_file():  # which a person may have written in
                shutil.copyfile(folder / CARD_NAME, staging / CARD_NAME)
                forget_scores(staging)
            names, new_names = ({path.name for path in place.iterdir()} for place in (folder, staging))
            ours = re.compile(r"glue_results(-\d+)?\.json").fullmatch
            others = sorted(n for n in names - new_names - {CHART_NAME, EVAL_FOLDER} if not ours(n))
            if others:
                aside = first_free(folder)
                folder.rename(aside)
                logger.warning("Beside the model, %s holds %s: it was moved to %s", folder, ", ".join(others), aside)
            else:
                shutil.rmtree(folder)
        staging.rename(folder)

    def _holds_model(self, task: Task, key: dict[str, Any]) -> bool:
        """Whether the folder of the task's model holds the one of this pair; rank 0's answer counts."""
        kept = read_object(self.output_dir / task.name / KEPT_NAME)
        held = kept.items() >= key.items()
        return broadcast_object_list([held])[0]

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
            return args.with_setting(*grid[0])
        if glue.metric is not None or all(task.name in TASKS and task.name not in COLUMNS for task in self.tasks):
            raise GlueError("A search needs a task that enters the average, and its own metric")
        seeds = parse_seeds("search_seeds", glue.search_seeds)
        tried = []
        for number, (learning_rate, batch_size, epochs) in enumerate(grid):
            candidate = args.with_setting(learning_rate, batch_size, epochs)
            average = self.run(candidate, seeds, f"setting {number + 1}/{len(grid)}, ")["average"]
            tried.append((average, candidate))
            logger.info(
                "learning rate %g, batch size %d, %g epochs: average %.2f", learning_rate, batch_size, epochs, average
            )
        return max(tried, key=lambda entry: entry[0])[1]

    def write(self, results: dict[str, Any]) -> None:
        """Write `glue_results.json`, the chart and, where there are test splits, the submission."""
        folder = self.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        self._make_way(folder, results)
        write_json_atomically(folder / GLUE_RESULTS, results)
        name = self.model_name + (" from scratch" if self.encoder.from_scratch else "")
        if self.glue.metric is None:
            draw_chart(results, self.tasks, name, folder / CHART_NAME)
        elif (earlier := folder / CHART_NAME).exists():  # of other scores
            earlier.rename(first_free(earlier))
        headlines = headline_metrics(self.tasks)
        files = {}
        for task in self.tasks:
            column = next(iter(task.validation_splits))
            values = headline_entry(results, column, headlines[column])["values"]
            seed = median_seed(dict(zip(results["seeds"], values, strict=True)))
            for file_name in self.data[task.name].test:
                path = self._prediction_path(results["setting_id"], task, file_name, seed)
                if path.exists():
                    files[file_name] = path
                else:
                    logger.warning(
                        "%s is not in the submission, since %s is gone: name another --output_dir to have it predicted",
                        file_name, path,
                    )  # fmt: skip
        if files:
            write_submission(folder / SUBMISSION_NAME, files)
        elif (earlier := folder / SUBMISSION_NAME).exists():  # of other data, or other tasks
            earlier.rename(first_free(earlier))
        self._share_with_model(results)

    def _make_way(self, folder: Path, results: dict[str, Any]) -> None:
        """Move earlier results aside that tell of something which the new ones do not."""
        if is_fuller(read_object(folder / GLUE_RESULTS), results):
            earlier = first_free(folder / GLUE_RESULTS)
            (folder / GLUE_RESULTS).rename(earlier)
            logger.warning(
                "The earlier results in %s, of other tasks, seeds or examples too, were moved to %s",
                folder,
                earlier.name,
            )

    def _prediction_path(self, setting_id: str, task: Task, file_name: str, seed: int) -> Path:
        return prediction_path(self.output_dir, setting_id, self.data_ids[task.name], file_name, seed)

    @property
    def shared_folder(self) -> Path | None:
        """The local folder whose model these results belong to: the encoder's, or of own data the kept model's."""
        if self.own_data is not None:
            return self.output_dir / self.own_data.task.name if self.glue.keeps_models else None
        folder = Path(self.encoder.model_name_or_path)
        is_ours = folder.is_dir() and not self.encoder.from_scratch and self.glue.metric is None
        return folder if is_ours else None

    @property
    def shared_name(self) -> str:
        """
        What the model of `shared_folder` is called on the Hub: after its folder (a checkpoint after its run too, whose
        finished model it does not replace), or of own data after the results'.
        """
        folder = (self.shared_folder if self.own_data is None else None) or self.output_dir
        folder, run = folder.resolve(), name_of_run(folder.resolve())
        return folder.name if run == folder.name else f"{run}-{folder.name}"

    def _share_with_model(self, results: dict[str, Any]) -> None:
        """Put the results beside a local model, and into its card: they are pushed with it."""
        folder = self.shared_folder
        if folder is None:
            return
        if is_larger(read_object(folder / GLUE_RESULTS), results):
            logger.warning(
                "The results are in %s alone: those in %s are of more scores or training examples, and stay",
                self.output_dir, folder,
            )  # fmt: skip
            return
        told = results if self.glue.metric is None else None  # the unit of another metric is not known
        try:
            if not update_model_card(folder, told, metadata=self.card_metadata):
                if self.own_data is not None:
                    save_model_card(self._build_card(told), folder)
                else:
                    logger.warning("No card tells of the results: there is no %s in %s", CARD_NAME, folder)
            if folder.resolve() != self.output_dir.resolve():
                self._make_way(folder, results)
                for name in (GLUE_RESULTS, *([] if told is None else [CHART_NAME])):
                    shutil.copyfile(self.output_dir / name, folder / name)
        except (OSError, ModelCardError) as error:
            logger.warning("The results are in %s, but not in the folder of their model: %s", self.output_dir, error)

    def _build_card(self, results: dict[str, Any] | None) -> ModelCard:
        """The first card of a model fine-tuned on own data."""
        name = self.encoder.model_name_or_path
        is_of_hub = not self.encoder.from_scratch and not Path(name).exists()
        return build_fine_tuned_card(
            self.shared_name,
            "random weights" if self.encoder.from_scratch else self.model_name,
            results,
            base_model=name if is_of_hub else None,
            metadata={**read_card_metadata(name), **self.card_metadata},
        )
