"""
Pseudo-log-likelihoods of sentences under a masked language model (Salazar et al. 2020).

Each token is masked in turn, and the log-probabilities of the true tokens are summed.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .hardware import takes_masked_positions
from .minimal_pair_sources import MinimalPairsError
from .modeling_crammed_bert import CrammedBertForMaskedLM

BATCH_TOKENS = 1024  # small enough for a CPU's cache, which is worth more than larger matrices


@torch.inference_mode()
def pseudo_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    batch_tokens: int = BATCH_TOKENS,
    show_progress: bool = False,
    places: Sequence[str] | None = None,
) -> np.ndarray:
    """
    Sum of the log-probabilities (nats) of each sentence's own tokens, each masked in turn: (sentences,) float64.

    A batch holds masked sentences of one length, at most `batch_tokens` tokens: nothing is padded. Raises
    [`MinimalPairsError`], naming the place, for a sentence that is too long for the model, has no token, or one that the
    model does not know.
    """
    before, after = surrounding_tokens(model, tokenizer)
    encoded = tokenizer(list(sentences), add_special_tokens=False, verbose=False)["input_ids"]
    rows = [before + ids + after for ids in encoded]
    _check_tokens(model, tokenizer, encoded, len(before + after), places or [repr(text) for text in sentences])
    lengths = np.array([len(row) for row in rows])
    scores = np.zeros(len(rows))
    was_training = model.training
    model.eval()
    with tqdm(total=sum(map(len, encoded)), unit=" tokens", disable=not show_progress, dynamic_ncols=True) as bar:
        for length in np.unique(lengths)[::-1]:  # the longest first: a batch too large for the memory shows at once
            chosen = np.flatnonzero(lengths == length)
            tokens = np.array([rows[index] for index in chosen])  # (S, L)
            columns = np.arange(len(before), length - len(after))  # the T tokens to be scored
            log_probabilities = _score_tokens(model, tokenizer.mask_token_id, tokens, columns, batch_tokens, bar)
            scores[chosen] = log_probabilities.sum(axis=1)
    model.train(was_training)
    return scores


def surrounding_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """
    The ids before and after a sentence, as in pretraining.

    The crammed BERT's rows have a separator between documents and no `[CLS]`; of other models the tokenizer knows.
    """
    if isinstance(model, CrammedBertForMaskedLM):
        return [tokenizer.sep_token_id], [tokenizer.sep_token_id]
    example = tokenizer("a", return_special_tokens_mask=True)
    own = np.flatnonzero(np.array(example["special_tokens_mask"]) == 0)
    return example["input_ids"][: own[0]], example["input_ids"][own[-1] + 1 :]


def _check_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    num_surrounding: int,
    places: Sequence[str],
) -> None:
    config = model.config.to_dict()
    longest = min(config.get("max_position_embeddings", sys.maxsize), tokenizer.model_max_length)
    vocab_size = config.get("vocab_size", sys.maxsize)
    for ids, place in zip(encoded, places, strict=True):
        largest = max(tokenizer.mask_token_id, *ids, 0)
        if largest >= vocab_size:
            raise MinimalPairsError(
                f"{place}: token {largest} of the tokenizer is beyond the model's {vocab_size} embeddings: give the model "
                "its own tokenizer"
            )
        if not ids:
            raise MinimalPairsError(f"{place}: the tokenizer leaves nothing of a sentence, leave the pair out")
        if len(ids) + num_surrounding > longest:
            raise MinimalPairsError(
                f"{place}: a sentence of {len(ids) + num_surrounding} tokens is longer than the model's {longest} "
                "positions, leave the pair out"
            )


def _score_tokens(
    model: PreTrainedModel, mask_token_id: int, tokens: np.ndarray, columns: np.ndarray, batch_tokens: int, bar: tqdm
) -> np.ndarray:
    """Log-probability of each token in `columns` (T,) of the sentences (S, L), masked alone: (S, T)."""
    inputs, positions, input_of_token = _mask_each(tokens, columns, mask_token_id)
    targets = tokens[:, columns].reshape(-1)  # (S * T,)
    log_probabilities = np.empty(len(targets))
    order = np.argsort(input_of_token, kind="stable")
    batch_size = max(1, batch_tokens // tokens.shape[1])
    for start in range(0, len(inputs), batch_size):
        batch = slice(start, start + batch_size)
        first, last = np.searchsorted(input_of_token[order], (batch.start, batch.stop))
        of_batch = order[first:last]
        logits = _logits_at(
            model,
            torch.tensor(inputs[batch], device=model.device),
            torch.tensor(positions[batch], device=model.device),
        )
        all_log_probabilities = logits.float().log_softmax(dim=-1).cpu().numpy()  # (B, V)
        log_probabilities[of_batch] = all_log_probabilities[input_of_token[of_batch] - start, targets[of_batch]]
        bar.update(len(of_batch))
    return log_probabilities.reshape(len(tokens), len(columns))


def _mask_each(
    tokens: np.ndarray, columns: np.ndarray, mask_token_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The different inputs (Q, L), the masked position of each (Q,), and for each of the S * T tokens which one is its.

    Sentences that differ in one token share the input in which that token is masked.
    """
    count = len(columns)
    masked = np.repeat(tokens[:, None], count, axis=1)  # (S, T, L)
    masked[:, np.arange(count), columns] = mask_token_id
    positions = np.broadcast_to(columns[None, :, None], (*masked.shape[:2], 1))
    keys = np.concatenate((masked, positions), axis=2).reshape(-1, tokens.shape[1] + 1)  # (S * T, L + 1)
    different, input_of_token = np.unique(keys, axis=0, return_inverse=True)
    return different[:, :-1], different[:, -1], input_of_token.reshape(-1)


def _logits_at(model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) at one position (B,) of each row of `input_ids` (B, L)."""
    if takes_masked_positions(model):
        return model(input_ids=input_ids, masked_positions=positions.unsqueeze(1), return_dict=True).logits.squeeze(1)
    rows = torch.arange(len(input_ids), device=input_ids.device)

    def keep_position(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        """Between encoder and head, whatever the architecture: the head, vocabulary included, sees one token a row."""
        outputs.last_hidden_state = outputs.last_hidden_state[rows, positions].unsqueeze(1)  # (B, 1, H)
        return outputs

    hook = model.base_model.register_forward_hook(keep_position)
    try:
        return model(input_ids=input_ids, return_dict=True).logits.squeeze(1)
    finally:
        hook.remove()


def compile_encoder(model: PreTrainedModel) -> None:
    """Compile everything below the head, in place, for all lengths at once; weights must not change afterwards."""
    encoder: Any = model.base_model
    encoder.forward = torch.compile(encoder.forward, dynamic=True, options={"freezing": True})
