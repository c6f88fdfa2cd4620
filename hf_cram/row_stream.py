"""Which rows an optimiser step sees: an endless stream over a dataset, cut into steps and processes."""

import copy
import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from transformers import set_seed

from .data.collator import DataCollatorForFixedCountMasking


class RowStream(Dataset):
    """
    An endless stream of rows: position p is row p % n of pass p // n over a dataset of n rows, each pass in an order
    of its own (or in the dataset's, with `shuffle=False`). A dataset with `set_epoch` is told the pass.
    """

    def __init__(self, dataset: Dataset, shuffle: bool, seed: int):
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.num_rows = len(dataset)  # type: ignore[arg-type]
        self._order: np.ndarray | None = None
        self._order_epoch = -1

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        rows: list[Any] = []
        for epoch in range(positions[0] // self.num_rows, positions[-1] // self.num_rows + 1):
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            indices = [p % self.num_rows for p in positions if p // self.num_rows == epoch]
            if self.shuffle:
                indices = self._shuffled(epoch)[indices].tolist()
            if hasattr(self.dataset, "__getitems__"):
                rows.extend(self.dataset.__getitems__(indices))
            else:
                rows.extend(self.dataset[index] for index in indices)
        return rows

    def _shuffled(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order_epoch != epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
            self._order_epoch = epoch
        return self._order


class StepPlan(NamedTuple):
    """What this process reads for one optimiser step: `rows` rows of the stream, at a used `fraction` of the budget."""

    step: int
    fraction: float
    first_position: int
    rows: int


class StepBatches(Dataset):
    """
    The collated batch of a [`StepPlan`].

    A loader worker reads steps ahead of the training, and knows neither its random state nor its clock. So there, what
    the dataset and the collator draw follows from `seed`, the process and the step, and a collator that follows the
    budget is told the plan's fraction: a resumed run goes on with the same batches.

    Rows that the masking collator would know by their content alone get the number of their pass (`mask_pass`).
    """

    def __init__(self, stream: RowStream, collator: Callable[[list[Any]], Any], seed: int, rank: int):
        self.stream = stream
        self.collator = collator
        self.is_follower = hasattr(collator, "follow_budget")
        self.seed = seed
        self.rank = rank
        self._worker_collator: Any = None

    def __getitem__(self, plan: StepPlan) -> Any:
        collator = self.collator if get_worker_info() is None else self._worker_collator_at(plan)
        positions = range(plan.first_position, plan.first_position + plan.rows)
        rows = self.stream.__getitems__(positions)
        if isinstance(collator, DataCollatorForFixedCountMasking) and not all("mask_key" in row for row in rows):
            passes = (position // self.stream.num_rows for position in positions)
            rows = [{**row, "mask_pass": number} for row, number in zip(rows, passes, strict=True)]
        return collator(rows)

    def _worker_collator_at(self, plan: StepPlan) -> Any:
        set_seed(int(np.random.SeedSequence((self.seed, self.rank, plan.step)).generate_state(1)[0]))
        if self._worker_collator is None:  # a copy: what it shares with other processes is at another step there
            self._worker_collator = copy.deepcopy(self.collator) if self.is_follower else self.collator
        if self.is_follower:
            self._worker_collator.follow_budget(plan.fraction)
        return self._worker_collator


class StepSampler(Sampler[StepPlan]):
    """
    Yields this process's plan of one optimiser step after the other, without end.

    The step's rows are a contiguous stretch of the stream, cut into one part a process: which rows a step sees does
    not depend on the number of processes.

    Args:
        next_step: number of the step to begin with, asked when reading begins.
        fraction_at: the share of the budget that will be used when a step begins.
        batch_rows: rows of a step over all processes, at a used share of the budget.
    """

    def __init__(
        self,
        next_step: Callable[[], int],
        fraction_at: Callable[[int], float],
        batch_rows: Callable[[float], int],
        first_position: int,
        process_index: int,
        num_processes: int,
    ):
        self.next_step = next_step
        self.fraction_at = fraction_at
        self.batch_rows = batch_rows
        self.first_position = first_position
        self.process_index = process_index
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[StepPlan]:
        position = self.first_position
        for step in itertools.count(self.next_step()):
            fraction = self.fraction_at(step)
            rows = self.batch_rows(fraction)
            share = rows // self.num_processes
            yield StepPlan(step, fraction, position + self.process_index * share, share)
            position += rows


def unchanged(batch: Any) -> Any:
    """The collating of a loader whose items are whole steps."""
    return batch


def with_shielded_workers(loader: DataLoader) -> DataLoader:
    """`loader`, whose workers [`leave_signals_to_the_trainer`]."""
    getattr(loader, "base_dataloader", loader).worker_init_fn = leave_signals_to_the_trainer
    return loader


def leave_signals_to_the_trainer(_: int) -> None:
    """In a loader worker: what stops a run reaches all its processes, and the last step still needs its rows."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
