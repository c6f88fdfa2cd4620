"""
A zero-shot probe: how often a masked language model prefers the good sentence of a minimal pair.

    python -m hf_cram.minimal_pairs MODEL --pairs FILE_OR_FOLDER_OR_HUB ... [--output_dir DIR]

The pairs are in BLiMP's format ([`minimal_pair_sources`]), a sentence's score is its pseudo-log-likelihood
([`pseudo_likelihood`]).
"""

import argparse
import copy
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .data.errors import DataError, first_line
from .data.tokenization import read_tokenizer
from .files import MINIMAL_PAIRS_RESULTS, read_json, read_object, write_json_atomically
from .hardware import NO_COMPILER, can_compile
from .minimal_pair_sources import MinimalPair, MinimalPairsError, read_pairs
from .model_card import ModelCardError, update_model_card
from .model_files import LOADING_ERRORS, loading_cause, name_model
from .out_of_memory import is_out_of_memory
from .output_folder import first_free
from .programs import ending_in_one_line
from .pseudo_likelihood import BATCH_TOKENS, compile_encoder, pseudo_log_likelihoods

logger = logging.getLogger(__name__)

PROGRAM = "python -m hf_cram.minimal_pairs"
COMPILED_PAIRS = 10_000  # as many pay for the compiling
MEASURED_PAIRS = 16


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


def bf16_scores_faster(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[MinimalPair],
    batch_tokens: int = BATCH_TOKENS,
    rounds: int = 3,
) -> bool:
    """
    Whether the first pairs are scored sooner in bf16 than in fp32: in turn, best of each. Raises [`MinimalPairsError`] as
    [`pseudo_log_likelihoods`] does.
    """
    sentences = [pair.good for pair in pairs[:MEASURED_PAIRS]]
    places = [pair.place for pair in pairs[:MEASURED_PAIRS]]
    models = {False: model, True: copy.deepcopy(model).bfloat16()}
    best = {False: float("inf"), True: float("inf")}
    for _ in range(rounds):
        for bf16, candidate in models.items():
            started = time.perf_counter()
            pseudo_log_likelihoods(candidate, tokenizer, sentences, batch_tokens, places=places)
            best[bf16] = min(best[bf16], time.perf_counter() - started)
    return best[True] < best[False]


def make_fast(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[MinimalPair],
    bf16: bool | None = None,
    torch_compile: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> None:
    """
    Cast to bf16 and compile, in place, where told to; `None` leaves it to a measurement and to the number of pairs.
    Raises [`MinimalPairsError`] for compiling without a compiler, and for pairs that cannot be scored.
    """
    if bf16_scores_faster(model, tokenizer, pairs, batch_tokens) if bf16 is None else bf16:
        model.bfloat16()
    if torch_compile is None:
        torch_compile = len(pairs) >= COMPILED_PAIRS and can_compile(model.device)
    elif torch_compile and not can_compile(model.device):
        raise MinimalPairsError(f"--torch_compile: {NO_COMPILER}")
    if torch_compile:
        compile_encoder(model)


# ---- Command line ----


def load_model(
    name_or_path: str, device: torch.device, trust_remote_code: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A masked language model with all its weights, in fp32, and its tokenizer; safetensors only."""
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            name_or_path,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = read_tokenizer(name_or_path, trust_remote_code)
    except DataError as error:
        raise MinimalPairsError(str(error)) from error
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise MinimalPairsError(
            f"{name_or_path} does not load as a masked language model: {loading_cause(error)}"
        ) from error
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
        prog=PROGRAM,
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
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that comes with a model of the Hub"
    )
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
        raise MinimalPairsError(
            f"--device {name} cannot be used ({first_line(error)}): leave it out, or name cpu"
        ) from error
    return device


def check_output_dir(output_dir: Path, model_folder: Path) -> None:
    """Raise [`MinimalPairsError`] for a folder with another model."""
    if output_dir.resolve() != model_folder.resolve() and (output_dir / "config.json").is_file():
        raise MinimalPairsError(
            f"--output_dir: {output_dir} holds a model, and these would not be the scores of it: name another folder"
        )


def check_scores(output_dir: Path, model_folder: Path, model: dict[str, str]) -> None:
    """
    Raise [`MinimalPairsError`] for a folder with the scores of another model than `model`: the name and the hash
    ([`name_model`]) that results tell.
    """
    if output_dir.resolve() == model_folder.resolve():
        return
    path = output_dir / MINIMAL_PAIRS_RESULTS
    scored = read_object(path)
    if any(scored.get(name, value) != value for name, value in model.items()):
        raise MinimalPairsError(f"--output_dir: {path} holds the scores of another model: name another folder")


def has_more(folder: Path, results: dict[str, Any]) -> bool:
    """Whether the results in a folder are of more pairs than these."""
    try:
        return read_json(folder / MINIMAL_PAIRS_RESULTS, "pairs")["pairs"] > results["pairs"]
    except (OSError, TypeError, ValueError):
        return False


def share_with_model(results: dict[str, Any], model_folder: Path, output_dir: Path) -> None:
    """Put the results beside the model and into its card: they are pushed with it."""
    try:
        write_json_atomically(model_folder / MINIMAL_PAIRS_RESULTS, results)
        update_model_card(model_folder, minimal_pairs=results)
    except (OSError, ModelCardError) as error:
        logger.warning("The results are in %s, but not all of them with their model: %s", output_dir, error)


def score_and_share(options: argparse.Namespace) -> None:
    """The program's work. Raises [`MinimalPairsError`] and `OSError`."""
    model_folder = Path(options.model)
    output_dir = options.output_dir or (model_folder if model_folder.is_dir() else Path("."))
    # A folder's name only: the file travels with the checkpoint, and the rest of the path is nobody's business.
    model_name = model_folder.resolve().name if model_folder.is_dir() else options.model
    check_output_dir(output_dir, model_folder)
    output_dir.mkdir(parents=True, exist_ok=True)
    pairs = read_pairs(options.pairs, options.limit)
    transformers_logging.disable_progress_bar()  # one bar, over the tokens
    model, tokenizer = load_model(options.model, choose_device(options.device), options.trust_remote_code)
    told = {"model": model_name, "model_id": name_model(options.model)}
    check_scores(output_dir, model_folder, told)
    make_fast(model, tokenizer, pairs, options.bf16, options.torch_compile, options.batch_tokens)
    results = {
        "bf16": model.dtype == torch.bfloat16,
        **told,
        **score_pairs(model, tokenizer, pairs, options.batch_tokens, show_progress=True),
    }
    print(results_table(results))
    if has_more(output_dir, results):
        earlier = (output_dir / MINIMAL_PAIRS_RESULTS).rename(first_free(output_dir / MINIMAL_PAIRS_RESULTS))
        logger.warning("The results of more pairs in %s were moved to %s", output_dir, earlier.name)
    write_json_atomically(output_dir / MINIMAL_PAIRS_RESULTS, results)
    if has_more(model_folder, results):  # of another folder than the output's
        logger.warning(
            "The results are in %s alone: those in %s are of more pairs, and stay", output_dir, model_folder
        )
    elif model_folder.is_dir():
        share_with_model(results, model_folder, output_dir)


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the pairs, print a table, write `minimal_pairs_results.json`, and put the result into the model's card."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    for name in ("limit", "batch_tokens"):
        if vars(options)[name] is not None and vars(options)[name] < 1:
            parser.error(f"--{name} must be at least 1")
    with ending_in_one_line(PROGRAM, MinimalPairsError, OSError, stopped="stopped; nothing was written"):
        try:
            score_and_share(options)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MinimalPairsError(f"out of memory: lower --batch_tokens ({options.batch_tokens})") from error


if __name__ == "__main__":
    main()
