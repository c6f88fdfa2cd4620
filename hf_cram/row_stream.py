"""Which rows an optimiser step sees: an endless stream over a dataset, cut into steps and processes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler


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

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])[0]

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


class BudgetBatchSampler(Sampler[list[int]]):
    """
    Yields this process's positions of one optimiser step after the other, without end.

    The step's rows are a contiguous stretch of the stream, cut into one part a process: which rows a step sees does
    not depend on the number of processes.
    """

    def __init__(self, batch_rows: Callable[[], int], first_position: int, process_index: int, num_processes: int):
        self.batch_rows = batch_rows
        self.first_position = first_position
        self.process_index = process_index
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[list[int]]:
        position = self.first_position
        while True:
            rows = self.batch_rows()
            share = rows // self.num_processes
            start = position + self.process_index * share
            yield list(range(start, start + share))
            position += rows
