"""The Trainer that obeys a clock."""

import contextlib
import functools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import HubStrategy, PredictionOutput, SaveStrategy, TrainOutput

from .budget import (
    BudgetClock,
    BudgetFollower,
    BudgetLRScheduler,
    Interval,
    build_lr_schedule,
    format_duration,
    ramped_batch_size,
)
from .callbacks import BudgetProgress, BudgetProgressCallback
from .checkpointing import (
    STAGING_NAME,
    CheckpointError,
    Heartbeat,
    RunState,
    clear_staging,
    last_checkpoint,
    load_errors,
    publish_checkpoint,
    publish_files,
    read_clock,
    rotate,
    save_errors,
)
from .data.collator import DataCollatorForFixedCountMasking
from .embedding_initialization import initialize_embeddings_from_text, neighbour_tables, own_occurrences_left_out
from .hardware import forget_peak_memory, peak_memory_bytes, training_flops
from .hardware_choices import HardwareChoices
from .hub import HubPusher, HubTarget
from .kept_state import keep_buffers, keep_random_state
from .optimization import MuonWithAdamW, decayed_parameter_names, muon_parameter_groups
from .out_of_memory import memory_errors
from .output_folder import holds_model, lock_run, move_earlier_run_aside, set_later_checkpoints_aside
from .resuming import load_run_state
from .row_stream import (
    RowStream,
    StepBatches,
    StepSampler,
    leave_signals_to_the_trainer,
    unchanged,
    with_shielded_workers,
)
from .training_args import CramTrainingArguments, resume_choice

logger = logging.getLogger(__name__)

UNLIMITED_STEPS = 2**31 - 1
ENDLESS_EPOCHS = 2**53  # the stream of rows has no end
# A forward pass over a held-out row against a training step over a row, with the logits of all its tokens: a guess on
# the safe side, used until the first evaluation has been timed.
EVALUATION_SHARE = 0.7
SAVING_BYTES_PER_SECOND = 100e6
MEASURED_ROWS = 2  # one value alone has no variance for a norm over the batch
TRIED_ROWS = 32
# Of an optimiser's groups, what follows from the arguments, which a resumed run may change; the rest is its state.
OPTIMIZER_OPTIONS = ("lr", "initial_lr", "weight_decay", "betas", "eps", "momentum")


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


def forget_preparation(model: nn.Module) -> None:
    """
    Take back what accelerate has done to `model`, or to one within it: it prepares none twice, so that the precision of
    another trainer would stay, and neither compiling nor data parallelism come.
    """
    for module in model.modules():
        vars(module).pop("_is_accelerate_prepared", None)
        forward = vars(module).pop("_original_forward", None)
        if getattr(forward, "__self__", None) is module:  # not of a compiled one, which shares that of its own model
            module.forward = forward


def check_parts(model: Any, args: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Raises `ValueError` for parts that cannot train together under a budget."""
    if not isinstance(model, nn.Module):
        raise ValueError("CramTrainer needs a model: it calls no model_init, and searches no hyperparameters")
    if not isinstance(args, CramTrainingArguments):
        raise ValueError(f"CramTrainer needs CramTrainingArguments, got {type(args).__name__}")
    if isinstance(train_dataset, IterableDataset) or not hasattr(train_dataset, "__len__"):
        raise ValueError("CramTrainer needs a map-style training dataset with a length, to resume where it was")
    if len(train_dataset) == 0:
        raise ValueError("The training dataset is empty")
    if args.eval_interval is not None and eval_dataset is None:
        raise ValueError("eval_interval is set, and there is no eval_dataset to evaluate on")


class ClockCallback(TrainerCallback):
    """Hands the end of each step to the trainer, after the Trainer's own callbacks have set their flags."""

    def __init__(self, end_step: Callable[[TrainerControl], None]):
        self.end_step = end_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end_step(control)


class CramTrainer(Trainer):
    """
    A [`~transformers.Trainer`] under a wall-clock budget, for any model and any collator.

    The clock starts with [`train`] (what `__init__` measures is added) and counts all until the last step: compiling,
    data, evaluating, saving. Learning rate and batch size follow it, and so does everything in `followers`. The run
    stops at the first step that ends beyond the budget.

    Args beyond the Trainer's:
        followers: objects with `follow_budget(fraction) -> dict`, told the used fraction after every step; what they
            return is logged. A `data_collator` with that method (mask rates in phases) is one of them without being named.
        eval_data_collator: collator of the rows of [`evaluate`] and [`predict`]; default: `data_collator`.
        time_function: seconds from any origin, `time.monotonic` by default.

    The collator returns a dict of tensors whose first dimension is the rows; `per_device_train_batch_size` rows at a
    time go through the model. The training dataset is map-style, so that a resumed run finds its next unseen row.

    Raises [`CheckpointError`] where saving or resuming fails, [`NonFiniteError`] where the loss stays non-finite and
    [`~out_of_memory.MicroBatchMemoryError`] where memory runs out; `interrupted_by` holds the signal after a run that
    SIGTERM or SIGINT stopped, `was_used_up` says that a resumed run had no budget left for a step. With `push_to_hub`
    checkpoints are pushed in the background, safe from what the Hub may do; [`push_to_hub`] at the end pushes what was
    saved.
    """

    args: CramTrainingArguments
    model: PreTrainedModel
    train_dataset: Any
    eval_dataset: Any
    lr_scheduler: Any
    optimizer: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: CramTrainingArguments,
        *,
        followers: Sequence[BudgetFollower] = (),
        eval_data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        time_function: Callable[[], float] = time.monotonic,
        **kwargs: Any,
    ):
        check_parts(model, args, kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        collator: Any = kwargs.get("data_collator")
        is_sparse = isinstance(collator, DataCollatorForFixedCountMasking) and collator.return_masked_positions
        started = time_function()
        self._hardware_choices = HardwareChoices(model, args, collator.mlm_probability if is_sparse else 1.0)
        self._setup_seconds = time_function() - started
        self._started_at = 0.0
        self.pusher: HubPusher | None = None

        if args.ddp_broadcast_buffers is None and neighbour_tables(model):
            args.ddp_broadcast_buffers = False  # the table is large, and no step changes it
        AcceleratorState._reset_state()  # of other arguments
        super().__init__(model=model, args=args, **kwargs)
        if args.muon_learning_rate is not None and (self.optimizer is not None or self.optimizer_cls_and_kwargs):
            raise ValueError("muon_learning_rate brings its own optimiser: leave it out, or the optimiser given")
        if self.lr_scheduler is not None:
            raise ValueError("the learning rate follows the clock: set lr_schedule, and give no scheduler")
        self.clock = BudgetClock(args.time_budget_seconds, time_function)
        self._begin_anew()
        self.followers = list(followers)
        is_follower = any(follower is self.data_collator for follower in self.followers)
        if hasattr(self.data_collator, "follow_budget") and not is_follower:
            self.followers.append(self.data_collator)
        self.eval_data_collator = eval_data_collator
        self._elapsed_seconds = 0.0
        self._follower_logs: dict[str, float] = {}
        self._has_trained = self._is_resumed = self._knows_loss = False
        self._has_own_optimizer = self.optimizer is not None
        self._keeps_folder = False
        self._locks = contextlib.ExitStack()
        self._step_loss = torch.zeros(())
        self._row_flops: dict[float | None, float] = {}
        self._eval_seconds: float | None = None
        self._save_seconds: float | None = None
        self._session_start = (0.0, 0, 0, 0.0)
        self._last_log = (0.0, 0, 0, 0.0)
        self._is_staging = False
        self._intervals = {
            name: Interval(text)
            for name, text in (
                ("should_log", args.logging_interval),
                ("should_evaluate", args.eval_interval),
                ("should_save", args.save_interval),
            )
            if text is not None
        }
        self.add_callback(ClockCallback(self._end_step))
        if self.pop_callback(DEFAULT_PROGRESS_CALLBACK) is not None:  # in a notebook another one
            self.add_callback(BudgetProgressCallback(self.progress))

    def _begin_anew(self) -> None:
        """What is of one run, before it begins."""
        self.run_state = RunState(dataset_id=getattr(self.train_dataset, "dataset_id", None))
        self.interrupted_by: signal.Signals | None = None
        self.was_used_up = False
        self._received_signal = 0  # on this process; all of them agree on `interrupted_by`
        self._clock_fraction = 0.0
        self._nonfinite_in_a_row = 0

    @property
    def output_dir(self) -> Path:
        """Where checkpoints and results go."""
        return Path(str(self.args.output_dir))

    # ---- The clock ----

    @property
    def budget_fraction(self) -> float:
        """Used share of the run, 0 to 1: of the time budget or of `max_steps`, whichever is larger."""
        return self._fraction_at(self.state.global_step)

    def _fraction_at(self, step: int) -> float:
        """Used share of the run when step number `step` begins, as far as the clock can tell now."""
        return min(1.0, max(self._clock_fraction, step / self.args.max_steps if self.args.max_steps > 0 else 0.0))

    def _read_clock(self) -> None:
        """Take over rank 0's clock and signals, on every process alike: local clocks would part the ranks."""
        values = [self.clock.elapsed_seconds, float(self._received_signal)]
        if self.args.world_size > 1:
            shared = torch.tensor(values, dtype=torch.float64, device=self.args.device)
            if self.args.process_index != 0:
                shared[0] = 0.0
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            values = shared.tolist()
        self._elapsed_seconds = values[0]
        self.interrupted_by = signal.Signals(int(values[1])) if values[1] else None
        budget = self.clock.time_budget_seconds
        self._clock_fraction = 0.0 if budget is None else self._elapsed_seconds / budget

    def _follow(self) -> None:
        """Tell everything that follows the clock where it stands."""
        self._follower_logs = {}
        for follower in (self.lr_scheduler, *self.followers):
            self._follower_logs.update(follower.follow_budget(self.budget_fraction))

    def _end_step(self, control: TrainerControl) -> None:
        """After each optimiser step: read the clock, adapt the schedules, decide what comes next."""
        self._read_clock()
        self.run_state.elapsed_seconds = self._elapsed_seconds
        self.state.epoch = self.run_state.rows_seen / len(self.train_dataset)
        self._follow()
        budget = self.clock.time_budget_seconds
        is_over = control.should_training_stop or (budget is not None and self._elapsed_seconds >= budget)
        if is_over or self.interrupted_by is not None:
            self.clock.stop()
            control.should_training_stop = control.should_log = True
            control.should_evaluate = False  # the caller's, after the clock
            # A callback may have asked for one.
            control.should_save |= self._saves_checkpoints or self.interrupted_by is not None
            return
        for flag, interval in self._intervals.items():
            if interval.due(self._elapsed_seconds, self.budget_fraction):
                setattr(control, flag, True)
        self._drop_what_does_not_fit(control)

    @property
    def _saves_checkpoints(self) -> bool:
        return self.args.save_interval is not None or self.args.save_strategy != SaveStrategy.NO

    def _drop_what_does_not_fit(self, control: TrainerControl) -> None:
        """Do not start an evaluation or a save that would end beyond the budget, as far as can be foreseen."""
        if self.clock.time_budget_seconds is None or not (control.should_evaluate or control.should_save):
            return
        seconds_left = self.clock.time_budget_seconds - self._elapsed_seconds
        decisions = [False, False]
        if self.args.process_index == 0:
            eval_seconds = self._expected_eval_seconds() if control.should_evaluate else 0.0
            fits_eval = control.should_evaluate and eval_seconds <= seconds_left
            seconds_left -= eval_seconds if fits_eval else 0.0
            decisions = [bool(fits_eval), control.should_save and self._expected_save_seconds() <= seconds_left]
        control.should_evaluate, control.should_save = broadcast_object_list(decisions)

    def _expected_eval_seconds(self) -> float:
        if self._eval_seconds is not None or self.eval_dataset is None:
            return self._eval_seconds or 0.0
        start_seconds, start_rows, *_ = self._session_start
        seconds_per_row = (self._elapsed_seconds - start_seconds) / max(1, self.run_state.rows_seen - start_rows)
        held_out: Any = self.eval_dataset
        parts = list(held_out.values()) if isinstance(held_out, dict) else [held_out]
        rows = sum(len(part) for part in parts if isinstance(part, Sized))  # what streams tells no length
        return EVALUATION_SHARE * seconds_per_row * rows

    def _expected_save_seconds(self) -> float:
        if self._save_seconds is not None:
            return self._save_seconds
        # Weights and two moments of the optimiser.
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        return 3 * weights / SAVING_BYTES_PER_SECOND

    # ---- Training ----

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """
        Train until the budget is used up.

        `resume_from_checkpoint` is a folder, or `True` for the last complete checkpoint in the output folder; without
        one the run starts over, and what it has used of the clock stays used. A new run in a folder that holds an
        earlier one moves that aside, to `<output_dir>.previous-N`; a run resumed before the last checkpoint moves the
        later ones aside, to `<output_dir>/set-aside-N`.

        A resumed run takes learning rates, weight decay and the like from its own arguments. Whether bf16 and
        torch.compile pay is not measured anew. Called again, the trainer starts another run, from the weights it has and
        with a new optimiser. While it trains, no other run can work in the same output folder; see [`keep_folder`].
        """
        self._begin_anew()
        if self._has_trained and not self._has_own_optimizer:
            self.optimizer = None
        try:
            return self._train(self._open_run(resume_choice(resume_from_checkpoint)), **kwargs)
        finally:
            if not self._keeps_folder:
                self._locks.close()

    @contextlib.contextmanager
    def keep_folder(self) -> Iterator[None]:
        """Keep the output folder for this run from [`train`] on until the end of the block: for what is saved after it."""
        self._keeps_folder = True
        try:
            yield
        finally:
            self._keeps_folder = False
            self._locks.close()

    def _train(self, checkpoint: Path | None, **kwargs: Any) -> TrainOutput:
        self._hardware_choices.keep_first(self.run_state)
        self._claim_accelerator()
        self.run_state.row_order = self._row_order
        self.run_state.max_train_tokens = getattr(self.train_dataset, "max_train_tokens", None)
        torch.set_flush_denormal(True)  # denormal gradients slow a CPU down many times
        self.clock.start(self.run_state.elapsed_seconds + self._setup_seconds)
        self._started_at = time.time() - self._setup_seconds
        if self.args.embeddings_from_text and checkpoint is None and not self._has_trained:
            initialize_embeddings_from_text(self.model, self.train_dataset, self.args.seed)
        elif any(not module.table.any() for module in neighbour_tables(self.model)):
            logger.warning("The model's neighbour table is empty, and does nothing: embeddings_from_text fills it")
        memory = functools.partial(memory_errors, "per_device_train_batch_size", self.args.per_device_train_batch_size)
        with memory():
            self._look_at_loss()
            self._row_flops = self._measure_row_flops()
        self._has_trained, self._setup_seconds = True, 0.0
        forget_peak_memory(self.args.device)
        heartbeat = (
            Heartbeat(self.output_dir, self._heartbeat_values)
            if self.args.process_index == 0
            else contextlib.nullcontext()
        )
        own_text = (
            own_occurrences_left_out(self.model, self.train_dataset)
            if self.args.embeddings_from_text
            else contextlib.nullcontext()
        )
        with heartbeat, self._signals(), memory(), own_text:
            self._read_clock()  # for an evaluation before the first step
            output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
            self._read_clock()
            # A signal after the last step: the caller is told of a checkpoint as after any other.
            if self.interrupted_by is not None and not self._checkpoint_folder.is_dir():
                self._save_checkpoint(self.model, trial=None)
            return output

    def _claim_accelerator(self) -> None:
        """By these arguments: others, made since, share one state of precision and compiling with them."""
        AcceleratorState._reset_state()
        self.create_accelerator_and_postprocess()
        if not self._has_trained:
            forget_preparation(self.model)
            self.model_wrapped = self.model
        if isinstance(self.optimizer, AcceleratedOptimizer):  # one's own, of an earlier run
            self.optimizer = self.optimizer.optimizer

    @property
    def _checkpoint_folder(self) -> Path:
        return self.output_dir / f"checkpoint-{self.state.global_step}"

    def _open_run(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """Lock the output folder, find the checkpoint and the clock to continue from, or make room for a new run."""
        output_dir = self.output_dir
        checkpoint, clock = None, None
        is_main = self.args.process_index == 0
        self._is_resumed = bool(resume_from_checkpoint)
        self._locks.close()
        if is_main:
            self._locks.enter_context(lock_run(output_dir))
            clear_staging(output_dir)
        self.accelerator.wait_for_everyone()  # a run that is at its end may save until then
        if resume_from_checkpoint:
            checkpoint = (
                last_checkpoint(output_dir) if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            )
            clock = read_clock(output_dir)
            if checkpoint is not None:
                self.run_state = load_run_state(checkpoint, self.run_state.dataset_id, self._row_order, self.model)
            elif clock is not None:
                if holds_model(output_dir):
                    raise CheckpointError(
                        f"{output_dir} holds a finished model and no checkpoint to continue from: leave out "
                        "--resume_from_checkpoint for a new run, which moves it aside, or name another --output_dir"
                    )
                self.run_state = RunState(run_id=clock["run_id"], dataset_id=self.run_state.dataset_id)
            if checkpoint is None and is_main:
                logger.warning("There is no complete checkpoint in %s: the run starts at its first step", output_dir)
            # The time between the last checkpoint and a kill was used as well.
            moved = None if checkpoint is None else read_clock(checkpoint.resolve().parent)
            for beat in (clock, moved):
                if beat is not None and beat["run_id"] == self.run_state.run_id:
                    self.run_state.elapsed_seconds = max(self.run_state.elapsed_seconds, beat["elapsed_seconds"])
        self.accelerator.wait_for_everyone()  # all have looked
        if is_main and self._make_room(
            checkpoint, is_new=not resume_from_checkpoint or (checkpoint is None and clock is None)
        ):
            self._locks.close()  # it has moved with its folder
            self._locks.enter_context(lock_run(output_dir))
        self.accelerator.wait_for_everyone()
        return checkpoint

    def _make_room(self, checkpoint: Path | None, is_new: bool) -> bool:
        """
        Move what the output folder holds of another run, or of what came after `checkpoint`, out of the way. Returns
        whether the folder is another one now.
        """
        output_dir = self.output_dir
        if checkpoint is not None and not checkpoint.resolve().is_relative_to(output_dir.resolve()):
            clock = read_clock(output_dir)
            is_new = clock is None or clock["run_id"] != self.run_state.run_id
        if is_new:
            moved = move_earlier_run_aside(output_dir)
            if moved is not None:
                logger.warning("What was in %s, an earlier run or a model, was moved to %s", output_dir, moved)
            return moved is not None
        if checkpoint is not None:
            moved = set_later_checkpoints_aside(checkpoint, output_dir)
            if moved is not None:
                logger.warning("The checkpoints after %s were moved to %s", checkpoint, moved)
        return False

    def _heartbeat_values(self) -> dict[str, Any]:
        return {
            "run_id": self.run_state.run_id,
            "elapsed_seconds": self.clock.elapsed_seconds,
            "time_budget_seconds": self.clock.time_budget_seconds,
            "started_at": self._started_at,  # of this session, seconds since 1970
        }

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """On SIGTERM or Ctrl-C, end after the current step with a checkpoint; a second Ctrl-C ends at once."""

        def remember(number: int, _: Any) -> None:
            self._received_signal = self._received_signal or number  # a launcher that goes may send another
            signal.signal(signal.SIGINT, signal.default_int_handler)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _measure_row_flops(self) -> dict[float | None, float]:
        """FLOPs of one training row at each mask rate, counted on a few rows."""
        compute_loss = functools.partial(self.compute_loss, num_items_in_batch=1)
        collator: Any = self.data_collator
        flops: dict[float | None, float] = {}
        is_phased = isinstance(collator, DataCollatorForFixedCountMasking)
        for start, _ in reversed(collator.phases if is_phased else [(0.0, None)]):
            if is_phased:
                collator.follow_budget(start)
            with keep_random_state(), self.accelerator.autocast():
                flops[self._mask_rate] = training_flops(self.model, self._few_rows(), compute_loss) / MEASURED_ROWS
        return flops

    @property
    def _mask_rate(self) -> float | None:
        """That of the current phase, with which the FLOPs of a row change."""
        collator = self.data_collator
        return collator.mlm_probability if isinstance(collator, DataCollatorForFixedCountMasking) else None

    def _few_rows(self, position: int = 0) -> dict[str, Any]:
        """A training batch of `MEASURED_ROWS` rows, from `position` on."""
        rows = self._row_stream().__getitems__(list(range(position, position + MEASURED_ROWS)))
        return self._prepare_inputs(self.data_collator(rows))

    def _look_at_loss(self) -> None:
        """Once, before the Trainer first scales a loss by what the model accepts."""
        is_told = self.compute_loss_func is not None or self.loss_is_scaled_for_ga is not None
        if not (self._knows_loss or is_told) and self.model_accepts_loss_kwargs:
            self.model_accepts_loss_kwargs = self._loss_follows_item_count()
        self._knows_loss = True

    @torch.no_grad()
    def _loss_follows_item_count(self) -> bool:
        """
        Whether the loss is divided by the `num_items_in_batch` that the model accepts. BERT and others take any keyword
        and return the mean of the micro-batch: the Trainer then has to divide.
        """
        for position in range(TRIED_ROWS):
            losses: list[Any] = []
            with keep_random_state():
                rows = self._few_rows(position)  # once: masks may come of a generator of their own
            for count in (1, 2):
                with keep_random_state(), keep_buffers(self.model), self.accelerator.autocast():  # and no dropout
                    losses.append(self.compute_loss(self.model.eval(), dict(rows), num_items_in_batch=count))
            if all(loss.isfinite() and loss != 0 for loss in losses):  # else no token of the row is masked
                return not torch.equal(*losses)
        return True

    @property
    def _shuffles(self) -> bool:
        return self.args.train_sampling_strategy == "random"

    @property
    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    @property
    def _row_order(self) -> str:
        """In words what decides which row comes when."""
        return f"random, seed {self._data_seed}" if self._shuffles else "sequential"

    def _row_stream(self) -> RowStream:
        return RowStream(self.train_dataset, self._shuffles, self._data_seed)

    def _batch_rows(self, fraction: float) -> int:
        args = self.args
        return ramped_batch_size(fraction, args.smallest_batch_rows, args.largest_batch_rows, args.batch_ramp_until)

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate: the sampler cuts the stream for each process, and one item is one step.
        args = self.args
        sampler = StepSampler(
            lambda: self.state.global_step,
            self._fraction_at,
            self._batch_rows,
            self.run_state.rows_seen,
            args.process_index,
            args.world_size,
        )
        return DataLoader(
            StepBatches(self._row_stream(), self.data_collator, args.seed, args.process_index),
            batch_size=None,
            sampler=sampler,
            collate_fn=unchanged,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context if args.dataloader_num_workers else None,
            # A generator of its own: the loader's draw must not move the restored random state of a resumed run.
            generator=torch.Generator().manual_seed(args.seed),
            worker_init_fn=leave_signals_to_the_trainer,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._evaluating_collator():
            return with_shielded_workers(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with self._evaluating_collator():
            return with_shielded_workers(super().get_test_dataloader(test_dataset))

    @contextlib.contextmanager
    def _evaluating_collator(self) -> Iterator[None]:
        training_collator = self.data_collator
        self.data_collator = self.eval_data_collator or training_collator
        try:
            yield
        finally:
            self.data_collator = training_collator

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        progress = super()._init_training_state(max_steps, *arguments)
        self.state.compute_steps(self.args, max_steps)  # a resumed run's state holds the checkpoint's
        return progress

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        # The loader is endless; without a step limit the clock alone ends the run.
        steps = args.max_steps if args.max_steps > 0 else UNLIMITED_STEPS
        rows = steps * self.args.largest_batch_rows
        return ENDLESS_EPOCHS, steps, rows, rows, self.args.largest_batch_rows, steps, steps

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> BudgetLRScheduler:
        if self.lr_scheduler is None:
            factor = build_lr_schedule(self.args.lr_schedule, self.args.lr_schedule_shape)
            optimizer = self.optimizer if optimizer is None else optimizer
            # accelerate's wrapper is no torch Optimizer
            self.lr_scheduler = BudgetLRScheduler(getattr(optimizer, "optimizer", optimizer), factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        args = self.args
        if self.optimizer is not None or args.muon_learning_rate is None:
            return super().create_optimizer(model)
        groups = muon_parameter_groups(
            self.model if model is None else model, args.learning_rate, args.muon_learning_rate, args.weight_decay
        )
        self.optimizer = MuonWithAdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with load_errors(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimiser's state, but no learning rate, weight decay and the like: they follow the arguments."""
        if checkpoint is None:
            return
        name, groups = self._optimizer_name, self.optimizer.param_groups
        own = [{key: group[key] for key in OPTIMIZER_OPTIONS if key in group} for group in groups]
        if self.run_state.optimizer not in (None, name):
            raise CheckpointError(
                f"{checkpoint} holds the state of {self.run_state.optimizer}, and the optimiser now is {name}: set "
                "optim and muon_learning_rate as they were, or start a new run"
            )
        with load_errors(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:  # else what fp16 has left does not matter
            with load_errors(Path(checkpoint)):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with load_errors(Path(checkpoint)):
                super()._load_rng_state(checkpoint)

    @property
    def _optimizer_name(self) -> str:
        # accelerate's wrapper is no torch Optimizer
        return type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_parameter_names(model)

    def _run_epoch(self, model: nn.Module, **kwargs: Any) -> None:  # type: ignore[override]
        self._read_clock()
        self._follow()
        self._session_start = self._last_log = self._counts()
        for interval in self._intervals.values():
            interval.skip_to(self._elapsed_seconds, self.budget_fraction)
        if self.budget_fraction >= 1:
            if self.state.global_step == 0:
                way_out = ", or start anew without --resume_from_checkpoint" if self._is_resumed else ""
                raise CheckpointError(
                    f"{self.output_dir}: all of time_budget ({format_duration(self.args.time_budget_seconds or 0)}) was "
                    f"used before the first step: raise it{way_out}"
                )
            logger.warning("The budget of this run is used up: no step is taken")
            self.was_used_up = True
            self.clock.stop()
            self.control.should_training_stop = True
            self._load_rng_state(kwargs["resume_from_checkpoint"])
            return
        super()._run_epoch(model=model, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One optimiser step's rows: forward and backward, one micro-batch after the other. Returns the loss."""
        rows = len(next(iter(inputs.values())))
        size = self.args.per_device_train_batch_size
        starts = range(0, rows, size)
        self.current_gradient_accumulation_steps = len(starts)
        loss = torch.zeros((), device=self.args.device)
        for start in starts:
            is_last = start + size >= rows
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                micro_batch = {
                    # Not the Trainer's copy, which waits for all that the GPU has been told to do before.
                    name: tensor[start : start + size].to(self.args.device, non_blocking=True)
                    for name, tensor in inputs.items()
                }
                loss = loss + super().training_step(model, micro_batch, num_items_in_batch)
        self._step_loss = loss
        self.run_state.rows_seen += rows * self.args.world_size
        self.run_state.training_flops += self.floating_point_ops(inputs) * self.args.world_size
        if self._counts_tokens:
            self.run_state.tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        return loss

    @property
    def _counts_tokens(self) -> bool:
        return self.model.main_input_name == "input_ids"

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:  # type: ignore[override]
        return self._row_flops.get(self._mask_rate, 0.0) * len(next(iter(inputs.values())))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        finite = torch.isfinite(torch.as_tensor(grad_norm)).all() & torch.isfinite(self._step_loss).all()
        if self.args.world_size > 1:
            flag = finite.to(self.args.device, torch.int32)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
            finite = flag.bool()
        if finite:
            self._nonfinite_in_a_row = 0
            return grad_norm
        # Without gradients the optimiser leaves weights and moments as they are.
        model.zero_grad(set_to_none=True)
        # The scale of fp16's loss is found by gradients that are too large, down to 1.
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() <= 1:
            self._nonfinite_in_a_row += 1
        self.run_state.skipped_steps += 1
        logger.warning("Step %d skipped: its loss or gradient is not finite", self.state.global_step + 1)
        if self._nonfinite_in_a_row >= self.args.max_nonfinite_steps:
            self._give_up()
        return grad_norm

    def _give_up(self) -> None:
        """The weights are still those of the last good step: save them and stop."""
        self._save_checkpoint(self.model, trial=None)
        raise NonFiniteError(
            f"{self._nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite. The weights before "
            f"them are in {self._checkpoint_folder}: lower learning_rate "
            "or max_grad_norm, or use neither bf16 nor fp16, and continue with --resume_from_checkpoint true"
        )

    # ---- Evaluating, saving, resuming ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started = time.monotonic()
        memory = memory_errors("per_device_eval_batch_size", self.args.per_device_eval_batch_size)
        if not self._has_trained:
            self._claim_accelerator()
        with keep_random_state(), memory:
            self._look_at_loss()
            metrics = super().evaluate(*args, **kwargs)
        self._eval_seconds = max(self._eval_seconds or 0.0, time.monotonic() - started)
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Where the loss alone is wanted, the model computes no other logits; metrics compare those of all tokens."""
        if not prediction_loss_only:
            inputs = {name: value for name, value in inputs.items() if name != "masked_positions"}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        if not self._has_trained:
            self._claim_accelerator()
        with memory_errors("per_device_eval_batch_size", self.args.per_device_eval_batch_size):
            self._look_at_loss()
            return super().predict(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        output_dir = super()._get_output_dir(trial)
        return str(Path(output_dir) / STAGING_NAME) if self._is_staging else output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place and move it there when it is whole."""
        started = time.monotonic()
        output_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._is_staging = True
        try:
            with save_errors(output_dir / name):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.run_state.elapsed_seconds = self.clock.elapsed_seconds
                    self.run_state.optimizer = self._optimizer_name
                    staged = output_dir / STAGING_NAME / name
                    self.run_state.save(staged)
                    publish_checkpoint(staged, output_dir)
                    rotate(output_dir, self.args.save_total_limit)
        finally:
            self._is_staging = False
            if self.args.should_save:
                clear_staging(output_dir)
        self.accelerator.wait_for_everyone()
        self._push_from_checkpoint(str(output_dir / name))
        self._save_seconds = max(self._save_seconds or 0.0, time.monotonic() - started)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # In place of the Trainer's pushing, which stops where the Hub is away, leaves the code files out of
        # intermediate pushes and uploads training_args.bin.
        if self.is_world_process_zero():
            self.pusher = HubPusher(self.output_dir, self._hub_target)

    @property
    def _hub_target(self) -> HubTarget:
        model_id = self.args.hub_model_id or self.output_dir.resolve().name
        return HubTarget(model_id, self.args.hub_private_repo, self.args.hub_revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Never one that is being staged, half-written.
        if self.pusher is not None and not self._is_staging and self.args.hub_strategy != HubStrategy.END:
            self.pusher.push_checkpoint(Path(checkpoint_folder))

    def push_to_hub(self, commit_message: str | None = None, **kwargs: Any) -> bool:  # type: ignore[override]
        """
        Push what can be shared of the output folder: weights, code, tokenizer, card, results, recipe, curve.

        Save before. Where the Hub cannot be had after some retries, warns with the command to push later and returns
        False. To be called at the end, on any process: one pushes.
        """
        if not self.is_world_process_zero():
            return True
        self.pusher = self.pusher or HubPusher(self.output_dir, self._hub_target)
        return self.pusher.finish(self.output_dir, commit_message or "End of training")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and arguments into the output folder; each file is whole or the old one."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        target = Path(output_dir) if output_dir else self.output_dir
        if hasattr(self.optimizer, "eval"):  # schedule-free ones: the weights that are evaluated
            self.optimizer.eval()
        staged = target / STAGING_NAME / "model"
        with save_errors(target):
            super().save_model(str(staged), _internal_call=True)
            if self.args.should_save:
                publish_files(staged, target)
                clear_staging(target)
        self.accelerator.wait_for_everyone()

    # ---- Progress ----

    def _counts(self) -> tuple[float, int, int, float]:
        state = self.run_state
        return self._elapsed_seconds, state.rows_seen, state.tokens_seen, state.training_flops

    def progress(self) -> BudgetProgress:
        """Where the run stands; rates are of this session."""
        seconds, rows, tokens, _ = (now - then for now, then in zip(self._counts(), self._session_start, strict=True))
        units = tokens if self._counts_tokens else rows
        rate = units / seconds if seconds > 0 else 0.0
        seen = self.run_state.tokens_seen if self._counts_tokens else self.run_state.rows_seen
        fraction = self.budget_fraction
        return BudgetProgress(
            elapsed_seconds=self._elapsed_seconds,
            time_budget_seconds=self.clock.time_budget_seconds,
            fraction=fraction,
            unit="tokens" if self._counts_tokens else "samples",
            units_seen=seen,
            units_per_second=rate,
            estimated_units=seen + rate * self._elapsed_seconds * (1 - fraction) / fraction if fraction > 0 else None,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        seconds, rows, tokens, flops = (now - then for now, then in zip(self._counts(), self._last_log, strict=True))
        logs["elapsed_seconds"] = self._elapsed_seconds
        logs["samples_seen"] = self.run_state.rows_seen
        if self._counts_tokens:
            logs["tokens_seen"] = self.run_state.tokens_seen
        if "loss" in logs and seconds > 0:
            if self._counts_tokens:
                logs["tokens_per_second"] = tokens / seconds
            logs["samples_per_second"] = rows / seconds
            logs["model_flops_per_second"] = flops / seconds
            peak = self._hardware_choices.matmul_peak * self.args.world_size
            logs["matmul_peak_share"] = flops / seconds / peak
            logs["batch_rows"] = self._batch_rows(self.budget_fraction)
            logs["skipped_steps"] = self.run_state.skipped_steps
            logs.update(self._follower_logs)
            self._last_log = self._counts()
        if "train_samples_per_second" in logs:  # at the end; the Trainer's own takes every step for one of full size
            rows = self.run_state.rows_seen - self._session_start[1]
            logs["train_samples_per_second"] = round(rows / max(logs["train_runtime"], 1e-9), 3)
        super().log(logs, start_time)

    def budget_metrics(self) -> dict[str, float]:
        """What the run used and saw, over all its sessions, for `all_results.json`."""
        seconds = self.run_state.elapsed_seconds
        metrics: dict[str, float] = {
            "train_seconds": seconds,
            "samples_seen": self.run_state.rows_seen,
            "samples_per_second": self.run_state.rows_seen / seconds if seconds > 0 else 0.0,
            "skipped_steps": self.run_state.skipped_steps,
            "optimizer_steps": self.state.global_step,
            "matmul_peak_flops_per_second": self._hardware_choices.matmul_peak,
            "training_flops": self.run_state.training_flops,
            "peak_memory_bytes": peak_memory_bytes(self.args.device),
        }
        if self._counts_tokens:
            metrics["tokens_seen"] = self.run_state.tokens_seen
            metrics["tokens_per_second"] = self.run_state.tokens_seen / seconds if seconds > 0 else 0.0
        if self.clock.time_budget_seconds is not None:
            metrics["time_budget_seconds"] = self.clock.time_budget_seconds
        return metrics


__all__ = ["CheckpointError", "CramTrainer", "NonFiniteError"]
