"""
Word embeddings that start from the text's own statistics instead of noise, and a table of what stands between neighbours.

Which tokens stand near each other says a good part of what the embeddings have to learn, and counting it over millions
of tokens takes seconds. Not of the paper; the counting is that of Levy et al. (2015, "Improving Distributional
Similarity with Lessons Learned from Word Embeddings").
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from .modeling_crammed_bert import ADDED_TOKENS, NEIGHBOUR_STEP, CrammedBertNeighbourTable

MOST_TOKENS = 5_000_000  # that are counted for the embeddings
MOST_TABLE_TOKENS = 50_000_000  # and for the neighbour table
WINDOW = 4  # tokens to either side
CONTEXTS = 2048  # most frequent tokens that are counted as neighbours
SMOOTHING = 0.75  # exponent of the neighbours' frequencies
POWER_ITERATIONS = 2
EMBEDDING_STD = 0.1
ROWS_AT_ONCE = 2048  # for the neighbour table


def cooccurrence_embeddings(
    rows: NDArray[np.integer], vocab_size: int, hidden_size: int, window: int = WINDOW, seed: int = 0
) -> torch.Tensor:
    """
    Embeddings (vocab_size, hidden_size) of mean square 1 from which tokens stand near each other in `rows` (N, L).

    The positive pointwise mutual information of tokens and their neighbours up to `window` to the left and, apart, to
    the right, weighted by 1 / distance, is factorised by a randomised SVD, whose singular values enter with their
    square root. A token that does not occur has zeros, as have columns beyond the rank. Takes about 80 kB of memory
    for each entry of the vocabulary.
    """
    frequencies = np.bincount(rows.reshape(-1), minlength=vocab_size)
    contexts = np.argsort(-frequencies, kind="stable")[:CONTEXTS]
    width = len(contexts) + 1  # the last column takes all other neighbours, and is dropped
    column_of = np.full(vocab_size, width - 1)
    column_of[contexts] = np.arange(len(contexts))
    sides = []
    for is_left in (True, False):
        side = np.zeros(vocab_size * width, dtype=np.float32)
        for distance in range(1, min(window, rows.shape[1] - 1) + 1):
            first, second = rows[:, :-distance], rows[:, distance:]
            tokens, neighbours = (second, first) if is_left else (first, second)
            cells = tokens.astype(np.int64) * width + column_of[neighbours]
            side += np.bincount(cells.reshape(-1), minlength=len(side)) / distance
        sides.append(side.reshape(vocab_size, width)[:, :-1])
    counts = torch.from_numpy(np.concatenate(sides, axis=1))  # (V, 2 C)
    column_shares = counts.sum(0).pow(SMOOTHING)
    expected = counts.sum(1, keepdim=True) * (column_shares / column_shares.sum())
    information = (counts / expected.clamp(min=1e-9)).clamp(min=1).log()
    rank = min(hidden_size, *information.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, singular_values, _ = torch.svd_lowrank(information, q=rank, niter=POWER_ITERATIONS)
    embeddings = torch.zeros(vocab_size, hidden_size)
    embeddings[:, :rank] = left * singular_values.sqrt()
    embeddings[frequencies == 0] = 0
    # Of those that occur: a vocabulary of another text has many that do not.
    return embeddings / embeddings[frequencies > 0].square().mean().sqrt().clamp(min=1e-9)


@torch.no_grad()
def initialize_embeddings_from_text(model: nn.Module, dataset: Dataset, seed: int = 0) -> None:
    """
    Overwrite the input embeddings of `model` with [`cooccurrence_embeddings`] of `dataset`, of standard deviation 0.1, and
    fill its neighbour table, if it has one.

    Rows are taken evenly from the whole data set, up to 5 million tokens (50 million for the table); tokens that do not
    occur in them keep their embedding. Raises ValueError where the rows have no `input_ids` or differ in length.
    """
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    vocab_size, hidden_size = embeddings.shape
    rows = _token_ids(dataset, _evenly(dataset, MOST_TOKENS))
    table = cooccurrence_embeddings(rows, vocab_size, hidden_size, seed=seed)
    occurs = table.any(1, keepdim=True)
    embeddings.copy_(torch.where(occurs, table * EMBEDDING_STD, embeddings.cpu()))
    for module in neighbour_tables(model):
        fill_neighbour_table(module, dataset, table)


@contextmanager
def own_occurrences_left_out(model: nn.Module, dataset: Dataset) -> Iterator[None]:
    """
    For training on the `dataset` that was counted: from a neighbour table each token gets what the others in its place
    were. Where the table is of a part of the text, most tokens have nothing to leave out, and nothing is.
    """
    is_counted = len(_evenly(dataset, MOST_TABLE_TOKENS)) == len(dataset)  # type: ignore[arg-type]
    modules = neighbour_tables(model)
    for module in modules:
        module.leaves_out = is_counted
    try:
        yield
    finally:
        for module in modules:
            module.leaves_out = False


def neighbour_tables(model: nn.Module) -> list[CrammedBertNeighbourTable]:
    """The neighbour table of a model, if it has one."""
    return [module for module in model.modules() if isinstance(module, CrammedBertNeighbourTable)]


@torch.no_grad()
def fill_neighbour_table(module: CrammedBertNeighbourTable, dataset: Dataset, embeddings: torch.Tensor) -> None:
    """
    Fill the table of `module` from up to 50 million tokens of `dataset`: each entry becomes the mean of the `embeddings`
    (vocab_size, hidden_size) of the tokens whose neighbours lead to it, as many of their columns as it is wide (the
    first of a singular value decomposition say most). An entry that few tokens lead to is nearer zero. The module
    starts by adding the mean of the three entries to the embeddings, in these columns, and nothing to the last states.
    """
    entries, size = module.table.shape
    sums, counts = torch.zeros(entries, size), torch.zeros(entries)
    positions = torch.arange(_token_ids(dataset, [0]).shape[1]).unsqueeze(0)
    chosen = _evenly(dataset, MOST_TABLE_TOKENS)
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        ids = torch.from_numpy(_token_ids(dataset, chosen[start : start + ROWS_AT_ONCE]).astype(np.int64))  # (rows, L)
        targets = embeddings[:, :size][ids.flatten()]  # (tokens, size)
        for places in module.look_up(ids, positions).flatten(0, 1).unbind(1):
            sums.index_add_(0, places, targets)
            counts.index_add_(0, places, torch.ones(len(targets)))
    means = sums.div_((counts + ADDED_TOKENS).unsqueeze(1))
    means[0] = counts[0] = 0  # beside a mask token
    scale = EMBEDDING_STD / means[counts > 0].square().mean().sqrt().clamp(min=1e-9)
    module.table.copy_((means * (scale / NEIGHBOUR_STEP)).round().clamp(-127, 127))
    module.counts.copy_(counts)
    module.parts.copy_(embeddings[:, :size] * scale)
    module.to_states.weight.zero_()
    to_embeddings = module.to_embeddings.weight.zero_()
    for part in to_embeddings.split(size, dim=1):
        part[:size].fill_diagonal_(size / to_embeddings.shape[1])


def _evenly(dataset: Dataset, most_tokens: int) -> list[int]:
    """Indices of rows from the whole data set, of up to so many tokens."""
    num_rows = len(dataset)  # type: ignore[arg-type]
    count = min(num_rows, most_tokens // _token_ids(dataset, [0]).shape[1] or 1)
    return np.unique(np.linspace(0, num_rows - 1, count).astype(int)).tolist()


def _token_ids(dataset: Dataset, indices: list[int]) -> NDArray[np.integer]:
    fetch = getattr(dataset, "__getitems__", lambda chosen: [dataset[index] for index in chosen])
    rows = [np.asarray(row.get("input_ids", ())) for row in fetch(indices)]
    if not len(rows[0]) or len({len(row) for row in rows}) > 1:
        raise ValueError("embeddings from the text need rows of token ids of one length: pack them first")
    return np.stack(rows)
