"""Masking for masked language modeling: a fixed count a row, reproducible whatever process draws it."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
# Held-out loss is always measured with these masks, whatever the training's rate and seed.
HELD_OUT_MLM_PROBABILITY, HELD_OUT_MASK_SEED = 0.15, 2212


def mix64(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of splitmix64, Steele et al. 2014), element by element."""
    values = values.astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def parse_phases(text: str) -> list[tuple[float, float]]:
    """
    Read a mask rate (`"0.25"`) or its phases: `"0:0.30,0.5:0.15"` is 30 % from the start, 15 % from half the budget.

    Returns (start, rate) pairs in order. Raises `ValueError` unless the first start is 0, starts rise below 1 and
    rates lie in (0, 1).
    """
    try:
        pairs = [part.split(":") for part in (text if ":" in text else f"0:{text}").split(",")]
        phases = [(float(start), float(rate)) for start, rate in pairs]
    except ValueError:
        raise ValueError(
            f"a mask rate is a share like '0.25', or phases like '0:0.30,0.5:0.15' (from fraction of the budget:rate); "
            f"got {text!r}"
        ) from None
    starts = [start for start, _ in phases]
    if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1:
        raise ValueError(f"mask rate phases must start at 0 and rise below 1, got {text!r}")
    if any(not 0 < rate < 1 for _, rate in phases):
        raise ValueError(f"mask rates must lie between 0 and 1, got {text!r}")
    return phases


def masked_tokens(mlm_probability: float, length: int) -> int:
    """Tokens of a row of `length` that are predicted: one at least."""
    return max(1, round(mlm_probability * length))


def check_replacement(mask_replace_prob: float, random_replace_prob: float) -> None:
    """Raises ValueError for shares of the predicted tokens below 0, or above 1 together."""
    if not (min(mask_replace_prob, random_replace_prob) >= 0 and mask_replace_prob + random_replace_prob <= 1):
        raise ValueError(
            "mask_replace_prob and random_replace_prob must be at least 0 and together at most 1, got "
            f"{mask_replace_prob} and {random_replace_prob}"
        )


class DataCollatorForFixedCountMasking:
    """
    Masks exactly `max(1, round(rate * L))` tokens in each row of L tokens, so that every batch has the same shape
    (paper, section 4.3), 80 % as `[MASK]`, 10 % as a random token, 10 % unchanged (BERT).

    The draw is a function of `seed`, the row's `mask_key` and nothing else: two processes, a resumed run and a run
    with loader workers mask alike. Rows without a `mask_key` (any dataset of `input_ids`) are keyed by their content
    and their pass over the dataset, which [`CramTrainer`] gives as `mask_pass`; without it they get the same mask always.

    Args:
        tokenizer: gives the mask token, the vocabulary and the special tokens, which are never masked.
        mlm_probability: share of the tokens to predict, or phases of the budget as in [`parse_phases`].
        mask_replace_prob, random_replace_prob: shares of the predicted tokens shown as `[MASK]` or as a random token.
        seed: changes every draw.
        return_masked_positions: also hand over where the labels stand, for models that accept `masked_positions`. Their
            logits are then of these tokens alone: metrics that compare them with the labels of all need `False` in a
            plain `Trainer`, [`CramTrainer`] sees to it itself.

    Returns a dict of int64 tensors: `input_ids` and `labels` (B, L), -100 where nothing is predicted, and
    `masked_positions` (B, K), rising in each row. Rows of unequal length are refused: pack them first.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float | str = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        seed: int = 0,
        return_masked_positions: bool = True,
    ):
        if tokenizer.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token, which masked language modeling needs")
        check_replacement(mask_replace_prob, random_replace_prob)
        self.phases = parse_phases(str(mlm_probability))
        self.mask_replace_prob = mask_replace_prob
        self.random_replace_prob = random_replace_prob
        self.seed = seed
        self.return_masked_positions = return_masked_positions
        self.mask_token_id = tokenizer.mask_token_id
        self.vocab_size = len(tokenizer)
        self.is_special = np.zeros(self.vocab_size, dtype=bool)
        self.is_special[tokenizer.all_special_ids] = True
        self.ordinary_ids = np.flatnonzero(~self.is_special)
        # In shared memory, so that loader workers follow the phases too.
        self._mlm_probability = torch.tensor(self.phases[0][1], dtype=torch.float64)
        with contextlib.suppress(RuntimeError):  # a system without it has no such workers
            self._mlm_probability.share_memory_()

    @property
    def mlm_probability(self) -> float:
        """Share of the tokens predicted in the current phase."""
        return self._mlm_probability.item()

    def follow_budget(self, fraction: float) -> dict[str, float]:
        """Enter the phase of `fraction` (0 to 1) of the budget; returns what to log."""
        self._mlm_probability.fill_(next(rate for start, rate in reversed(self.phases) if start <= fraction))
        return {"mlm_probability": self.mlm_probability}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [np.asarray(feature["input_ids"]) for feature in features]
        masks = (np.asarray(feature["attention_mask"]) for feature in features if "attention_mask" in feature)
        if not all(mask.all() for mask in masks):
            raise ValueError("rows must not be padded: pack them first")
        lengths = {len(row) for row in rows}
        if len(lengths) > 1:
            raise ValueError(
                f"rows must have one length, got lengths {min(lengths)} to {max(lengths)}: pack them first"
            )
        input_ids = np.stack(rows).astype(np.int64)  # (B, L)
        draws = self._draws(features, input_ids)
        count = masked_tokens(self.mlm_probability, input_ids.shape[1])

        special = self.is_special[input_ids]
        scores = np.where(special, np.iinfo(np.uint64).max, draws)
        positions = np.sort(np.argpartition(scores, count - 1, axis=1)[:, :count], axis=1)  # (B, K)
        originals = np.take_along_axis(input_ids, positions, axis=1)
        # A row may hold fewer ordinary tokens than the fixed count: its surplus positions carry no label.
        predicted = ~np.take_along_axis(special, positions, axis=1)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        np.put_along_axis(labels, positions, np.where(predicted, originals, IGNORED_LABEL), axis=1)

        choices = mix64(np.take_along_axis(draws, positions, axis=1) + np.uint64(1))
        shares = choices / 2.0**64  # uniform in [0, 1)
        random_ids = self.ordinary_ids[mix64(choices) % np.uint64(len(self.ordinary_ids))]
        shown = np.where(shares < self.mask_replace_prob, self.mask_token_id, originals)
        is_random = (shares >= self.mask_replace_prob) & (shares < self.mask_replace_prob + self.random_replace_prob)
        shown = np.where(is_random, random_ids, shown)
        np.put_along_axis(input_ids, positions, np.where(predicted, shown, originals), axis=1)

        batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if self.return_masked_positions:
            batch["masked_positions"] = torch.from_numpy(positions)
        return batch

    def _draws(self, features: Sequence[Mapping[str, Any]], input_ids: np.ndarray) -> np.ndarray:
        """One 64-bit random number for each token, (B, L), from the seed, the row's key and the position."""
        positions = np.arange(1, input_ids.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        if all("mask_key" in feature for feature in features):
            keys = np.array([feature["mask_key"] for feature in features], dtype=np.uint64)
        else:
            passes = np.array([feature.get("mask_pass", 0) for feature in features], dtype=np.uint64)
            keys = mix64(input_ids.astype(np.uint64) + positions).sum(axis=1, dtype=np.uint64) + passes
        keys = mix64(keys + mix64(np.array([self.seed + 1], dtype=np.uint64)))
        return mix64(keys[:, None] + positions)


def held_out_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForFixedCountMasking:
    """The masks of held-out rows, the same for every model that reads them with this tokenizer."""
    return DataCollatorForFixedCountMasking(tokenizer, HELD_OUT_MLM_PROBABILITY, seed=HELD_OUT_MASK_SEED)
