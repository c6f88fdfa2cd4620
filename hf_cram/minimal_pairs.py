"""
A zero-shot probe: how often a masked language model prefers the good sentence of a minimal pair.

    python -m hf_cram.minimal_pairs MODEL --pairs FILE_OR_FOLDER_OR_HUB ... [--output_dir DIR]

The pairs are in BLiMP's format (Warstadt et al. 2020). A sentence's score is its pseudo-log-likelihood (Salazar et al.
2020): each token is masked in turn, and the log-probabilities of the true tokens are summed.
"""

import argparse
import copy
import gzip
import json
import logging
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .data.errors import DataError, first_line
from .data.tokenization import read_tokenizer
from .files import write_json_atomically
from .hardware import can_compile, is_out_of_memory
from .model_card import ModelCardError, update_model_card
from .modeling_crammed_bert import CrammedBertForMaskedLM

logger = logging.getLogger(__name__)

RESULTS_NAME = "minimal_pairs_results.json"
SENTENCE_KEYS = ("sentence_good", "sentence_bad")
PHENOMENON_KEYS = ("linguistics_term", "UID", "field")  # the first one that a pair has names its phenomenon
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write it, no tokenizer reads it
FILE_PATTERNS = ("*.jsonl", "*.jsonl.gz")
COMPILED_PAIRS = 10_000  # as many pay for the compiling
MEASURED_PAIRS = 16
BATCH_TOKENS = 1024  # small enough for a CPU's cache, which is worth more than larger matrices


class MinimalPairsError(ValueError):
    """Pairs or a model that cannot be used, in one line that names the place and the way out."""


class MinimalPair(NamedTuple):
    """Two sentences that differ in what makes the second one bad. `place` is where they stand, for errors."""

    good: str
    bad: str
    phenomenon: str = "all"
    place: str = "a pair"


# ---- Reading ----


def read_pairs(sources: Sequence[str], limit: int | None = None) -> list[MinimalPair]:
    """
    The pairs of files (`.jsonl`, `.jsonl.gz`), of folders of them, and of data sets on the Hub or laid out like one.

    `limit` takes that many pairs from the start of each file or configuration. Pairs of equal sentences are left out,
    with a warning that counts them. Raises [`MinimalPairsError`].
    """
    pairs = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = sorted(file for pattern in FILE_PATTERNS for file in path.rglob(pattern) if file.is_file())
        elif source.endswith((".jsonl", ".gz")) or source.count("/") != 1:
            raise MinimalPairsError(f"{source}: no such file or folder, and not the name of a data set (owner/name)")
        else:
            files = []
        for file in files:
            pairs += _first(_read_file(file), limit, str(file))
        if not files:
            for name, rows in _hub_configurations(source):
                pairs += _first(rows, limit, name)
    different = [pair for pair in pairs if pair.good != pair.bad]
    if len(different) < len(pairs):
        place = next(pair.place for pair in pairs if pair.good == pair.bad)
        logger.warning("%d pairs of equal sentences are left out, the first: %s", len(pairs) - len(different), place)
    if not different:
        raise MinimalPairsError("there are no pairs to score: both sentences of each are equal")
    return different


def _first(pairs: Iterator[MinimalPair], limit: int | None, source: str) -> list[MinimalPair]:
    """At most `limit` pairs of one source, at least one."""
    taken = [pair for _, pair in zip(range(sys.maxsize if limit is None else limit), pairs, strict=False)]
    if not taken:
        raise MinimalPairsError(f"{source}: it holds no pairs, leave it out")
    return taken


def _read_file(file: Path) -> Iterator[MinimalPair]:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{file}, line {number}"
                    try:
                        values = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise MinimalPairsError(f"{place}: not valid JSON ({error}): one object a line") from error
                    yield _to_pair(values, file.name.split(".")[0], place)
    except UnicodeDecodeError as error:
        raise MinimalPairsError(f"{file}: not UTF-8, save it as such") from error
    except (OSError, EOFError, zlib.error) as error:
        raise MinimalPairsError(f"{file}: cannot be read ({error})") from error


def _to_pair(values: Any, default_phenomenon: str, place: str) -> MinimalPair:
    if not isinstance(values, dict):
        raise MinimalPairsError(f"{place}: not an object with the keys {' and '.join(SENTENCE_KEYS)}")
    for key in SENTENCE_KEYS:
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise MinimalPairsError(f"{place}: no sentence under the key {key!r} (keys: {', '.join(values)})")
        if LONE_SURROGATE.search(values[key]):
            raise MinimalPairsError(f"{place}: the sentence under {key!r} has half a character, leave the pair out")
    names = [values[key] for key in PHENOMENON_KEYS if values.get(key)]
    good, bad = (values[key] for key in SENTENCE_KEYS)
    return MinimalPair(good, bad, " ".join(str(names[0] if names else default_phenomenon).split()), place)


def _hub_configurations(name: str) -> Iterator[tuple[str, Iterator[MinimalPair]]]:
    """Name and pairs of each configuration and split: BLiMP on the Hub has a configuration a paradigm."""
    from datasets import get_dataset_config_names, load_dataset  # seconds of import that local files do not need

    try:
        for configuration in get_dataset_config_names(name):
            for split, rows in load_dataset(name, configuration).items():
                place = f"{name}, {configuration}, {split}"
                numbered = enumerate(rows, start=1)
                yield place, (_to_pair(row, configuration, f"{place}, row {number}") for number, row in numbered)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, MinimalPairsError):
            raise
        cause = first_line(error)
        raise MinimalPairsError(f"data set {name!r} cannot be loaded: {cause}") from error


# ---- Scoring ----


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[MinimalPair],
    batch_tokens: int = BATCH_TOKENS,
    show_progress: bool = False,
) -> dict[str, Any]:
    """
    Share of the pairs whose good sentence has the higher pseudo-log-likelihood, in per cent; a tie counts half.

    Returns `{"accuracy", "pairs", "phenomena": {name: {"accuracy", "pairs"}}}`; the first is the mean over all pairs.
    Raises [`MinimalPairsError`] as [`pseudo_log_likelihoods`] does.
    """
    if not pairs:
        raise MinimalPairsError("There are no pairs to score")
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    places = [pair.place for pair in pairs for _ in (pair.good, pair.bad)]
    scores = pseudo_log_likelihoods(model, tokenizer, sentences, batch_tokens, show_progress, places)
    right = (np.sign(scores[::2] - scores[1::2]) + 1) / 2  # 1, or 0.5 for a tie
    by_phenomenon: dict[str, list[float]] = {}
    for pair, value in zip(pairs, right.tolist(), strict=True):
        by_phenomenon.setdefault(pair.phenomenon, []).append(value)
    phenomena = {name: _accuracy(values) for name, values in sorted(by_phenomenon.items())}
    return {**_accuracy(right.tolist()), "phenomena": phenomena}


def _accuracy(values: Sequence[float]) -> dict[str, Any]:
    return {"accuracy": 100 * sum(values) / len(values), "pairs": len(values)}


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
    if isinstance(model, CrammedBertForMaskedLM):
        hidden_states = model.model(input_ids, output_positions=positions.unsqueeze(1)).last_hidden_state  # (B, 1, H)
        return model.decoder(model.head(hidden_states)).squeeze(1)
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


def bf16_scores_faster(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[MinimalPair], rounds: int = 3
) -> bool:
    """Whether the first pairs are scored sooner in bf16 than in fp32: in turn, best of each."""
    sentences = [pair.good for pair in pairs[:MEASURED_PAIRS]]
    models = {False: model, True: copy.deepcopy(model).bfloat16()}
    best = {False: float("inf"), True: float("inf")}
    for _ in range(rounds):
        for bf16, candidate in models.items():
            started = time.perf_counter()
            pseudo_log_likelihoods(candidate, tokenizer, sentences)
            best[bf16] = min(best[bf16], time.perf_counter() - started)
    return best[True] < best[False]


def make_fast(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[MinimalPair],
    bf16: bool | None = None,
    torch_compile: bool | None = None,
) -> None:
    """Cast to bf16 and compile, in place, where told to; `None` leaves it to a measurement and to the number of pairs."""
    if bf16_scores_faster(model, tokenizer, pairs) if bf16 is None else bf16:
        model.bfloat16()
    if torch_compile is None:
        torch_compile = len(pairs) >= COMPILED_PAIRS and can_compile(model.device)
    if torch_compile:
        compile_encoder(model)


# ---- Command line ----


def load_model(name_or_path: str, device: torch.device) -> tuple[Any, PreTrainedTokenizerBase]:
    """A masked language model with all its weights, in fp32, and its tokenizer; safetensors only."""
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            name_or_path,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = read_tokenizer(name_or_path)
    except DataError as error:
        raise MinimalPairsError(str(error)) from error
    except (LookupError, OSError, RuntimeError, TypeError, ValueError, SafetensorError, StrictDataclassError) as error:
        if is_out_of_memory(error):
            raise
        cause = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        raise MinimalPairsError(f"{name_or_path} does not load as a masked language model: {cause}") from error
    if info["missing_keys"]:
        raise MinimalPairsError(
            f"{name_or_path} is no masked language model: it lacks {len(info['missing_keys'])} weights, "
            f"{min(info['missing_keys'])} among them"
        )
    if tokenizer.mask_token_id is None:
        raise MinimalPairsError(f"{name_or_path}: its tokenizer has no mask token")
    return model.to(device), tokenizer


def results_table(results: dict[str, Any]) -> str:
    """Accuracy and number of pairs of each phenomenon and of all, for the terminal."""
    rows = [*results["phenomena"].items(), ("all", results)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'phenomenon':<{width}}  per cent   pairs"]
    return "\n".join(
        [*lines, *(f"{name:<{width}}  {row['accuracy']:>8.1f}  {row['pairs']:>6,}" for name, row in rows)]
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hf_cram.minimal_pairs",
        description="How often a masked language model prefers the good sentence of a minimal pair.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or name on the Hub of a masked language model")
    parser.add_argument(
        "--pairs",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help=".jsonl(.gz) files in BLiMP's format, folders of them, or data sets on the Hub such as nyu-mll/blimp",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="default: the model's folder, or the current one for a model of the Hub"
    )
    parser.add_argument("--limit", type=int, help="pairs to take from each file or configuration")
    parser.add_argument("--batch_tokens", type=int, default=BATCH_TOKENS, help="tokens of a batch")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="score in bf16, whose rounding can turn a close pair; default: where a short measurement finds it faster",
    )
    parser.add_argument(
        "--torch_compile",
        action=argparse.BooleanOptionalAction,
        help=f"faster after half a minute of compiling; default: from {COMPILED_PAIRS:,} pairs",
    )
    return parser


def choose_device(name: str | None) -> torch.device:
    """The named device, or a GPU where there is one. Raises [`MinimalPairsError`] for one that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # a build without CUDA asserts
        cause = str(error).strip().splitlines()[0]
        raise MinimalPairsError(f"--device {name} cannot be used ({cause}): leave it out, or name cpu") from error
    return device


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the pairs, print a table, write `minimal_pairs_results.json`, and put the result into the model's card."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    for name in ("limit", "batch_tokens"):
        if vars(options)[name] is not None and vars(options)[name] < 1:
            parser.error(f"--{name} must be at least 1")
    model_folder = Path(options.model)
    output_dir = options.output_dir or (model_folder if model_folder.is_dir() else Path("."))
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        pairs = read_pairs(options.pairs, options.limit)
        transformers_logging.disable_progress_bar()  # one bar, over the tokens
        model, tokenizer = load_model(options.model, choose_device(options.device))
        make_fast(model, tokenizer, pairs, options.bf16, options.torch_compile)
        results = {
            "bf16": model.dtype == torch.bfloat16,
            # A folder's name only: the file travels with the checkpoint, and the rest of the path is nobody's business.
            "model": model_folder.resolve().name if model_folder.is_dir() else options.model,
            **score_pairs(model, tokenizer, pairs, options.batch_tokens, show_progress=True),
        }
        print(results_table(results))
        write_json_atomically(output_dir / RESULTS_NAME, results)
        if model_folder.is_dir():  # the figure is pushed with the model
            write_json_atomically(model_folder / RESULTS_NAME, results)
            update_model_card(model_folder, minimal_pairs=results)
    except (MinimalPairsError, ModelCardError, OSError) as error:
        sys.exit(f"hf_cram.minimal_pairs: error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"hf_cram.minimal_pairs: error: out of memory: lower --batch_tokens ({options.batch_tokens})")


if __name__ == "__main__":
    main()
