"""
Word embeddings that start from the text's own statistics instead of noise.

Which tokens stand near each other says a good part of what the embeddings have to learn, and counting it over millions
of tokens takes seconds. Not of the paper; the counting is that of Levy et al. (2015, "Improving Distributional
Similarity with Lessons Learned from Word Embeddings").
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

MOST_TOKENS = 5_000_000  # that are counted
WINDOW = 4  # tokens to either side
CONTEXTS = 2048  # most frequent tokens that are counted as neighbours
SMOOTHING = 0.75  # exponent of the neighbours' frequencies
POWER_ITERATIONS = 2
EMBEDDING_STD = 0.1


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
    Overwrite the input embeddings of `model` with [`cooccurrence_embeddings`] of `dataset`, of standard deviation 0.1.

    Rows are taken evenly from the whole data set, up to 5 million tokens; tokens that do not occur in them keep their
    embedding. Raises ValueError where the rows have no `input_ids` or differ in length.
    """
    num_rows = len(dataset)  # type: ignore[arg-type]
    first = _token_ids(dataset, [0])
    chosen = np.unique(np.linspace(0, num_rows - 1, min(num_rows, MOST_TOKENS // first.shape[1] or 1)).astype(int))
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    vocab_size, hidden_size = embeddings.shape
    table = cooccurrence_embeddings(_token_ids(dataset, chosen.tolist()), vocab_size, hidden_size, seed=seed)
    occurs = table.any(1, keepdim=True)
    embeddings.copy_(torch.where(occurs, table * EMBEDDING_STD, embeddings.cpu()))


def _token_ids(dataset: Dataset, indices: list[int]) -> NDArray[np.integer]:
    fetch = getattr(dataset, "__getitems__", lambda chosen: [dataset[index] for index in chosen])
    rows = [np.asarray(row.get("input_ids", ())) for row in fetch(indices)]
    if not len(rows[0]) or len({len(row) for row in rows}) > 1:
        raise ValueError("embeddings from the text need rows of token ids of one length: pack them first")
    return np.stack(rows)
