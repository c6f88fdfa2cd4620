"""
Minimal pairs/s of `hf_cram.minimal_pairs` for a finished model, the quickstart's by default.

    python benchmarks/minimal_pairs.py [--model out/quickstart] [--pairs 20000] [--rounds 1]

The pairs are made from templates: sentences of about 8 words with BLiMP's mix of differences (one word changed, or two
swapped). Choosing the precision, compiling, tokenizing, masking and scoring count, loading the model does not. The
plain way, a forward of the whole model for one masked token at a time, is timed beside it on a few pairs.
"""

import argparse
import random
import statistics
import time

import torch
from command_line import run_main, verdict

from hf_cram.minimal_pair_sources import MinimalPair
from hf_cram.minimal_pairs import load_model, make_fast, score_pairs
from hf_cram.pseudo_likelihood import BATCH_TOKENS, surrounding_tokens

BAR = 100
NOUNS = ("teacher", "doctor", "student", "friend", "writer", "driver", "farmer", "singer", "lawyer", "king", "brother",
         "sister", "father", "mother", "captain", "master", "servant", "soldier", "lady", "boy", "girl", "son",
         "daughter", "lord", "judge", "guest", "stranger", "prisoner", "leader", "neighbour")  # fmt: skip
THINGS = ("book", "table", "letter", "house", "picture", "song", "window", "car", "garden", "box")
PAST = ("found", "sold", "liked", "saw", "moved", "painted", "forgot", "wanted", "needed", "bought")
ADJECTIVES = ("old", "young", "small", "big", "good", "new", "poor", "rich", "quiet", "happy", "tall", "short", "strong",
              "weak", "wise", "proud", "brave", "kind", "angry", "tired")  # fmt: skip
PLACES = ("in the city", "near the river", "at the station", "behind the house", "before the war", "after the show")


def subject_verb_agreement(draw: random.Random) -> tuple[str, str]:
    subject, other, adjective = draw.choice(NOUNS), draw.choice(NOUNS), draw.choice(ADJECTIVES)
    start, end = f"The {subject}s of the {other}", f"very {adjective}."
    return f"{start} are {end}", f"{start} is {end}"


def determiner_noun_agreement(draw: random.Random) -> tuple[str, str]:
    start = f"The {draw.choice(NOUNS)} {draw.choice(PAST)}"
    thing, end = draw.choice(THINGS), draw.choice(PLACES)
    return f"{start} these {thing}s {end}.", f"{start} this {thing}s {end}."


def anaphor_agreement(draw: random.Random) -> tuple[str, str]:
    start, end = f"The {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}s {draw.choice(PAST)}", draw.choice(PLACES)
    return f"{start} themselves {end}.", f"{start} himself {end}."


def word_order(draw: random.Random) -> tuple[str, str]:
    adjective, noun = draw.choice(ADJECTIVES), draw.choice(NOUNS)
    end = f"{draw.choice(PAST)} the {draw.choice(THINGS)} and the {draw.choice(THINGS)}."
    return f"The {adjective} {noun} {end}", f"The {noun} {adjective} {end}"


MOST_PAIRS = 70_000  # in turn from each template, the smallest of which makes 18,000
TEMPLATES = (subject_verb_agreement, determiner_noun_agreement, anaphor_agreement, word_order)


def build_pairs(count: int) -> list[MinimalPair]:
    """Different pairs, in turn from each template."""
    draw = random.Random(0)
    pairs: dict[MinimalPair, None] = {}
    while len(pairs) < count:
        template = TEMPLATES[len(pairs) % len(TEMPLATES)]
        pairs[MinimalPair(*template(draw), template.__name__)] = None
    return list(pairs)


@torch.inference_mode()
def score_plainly(model, tokenizer, pairs: list[MinimalPair]) -> None:
    """The obvious loop, for comparison."""
    before, after = surrounding_tokens(model, tokenizer)
    for sentence in (sentence for pair in pairs for sentence in pair[:2]):
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        for position, target in enumerate(ids, start=len(before)):
            row = torch.tensor([before + ids + after])
            row[0, position] = tokenizer.mask_token_id
            model(row).logits[0, position].log_softmax(-1)[target].item()


def pairs_per_second(score, pairs: list[MinimalPair]) -> float:
    started = time.perf_counter()
    score(pairs)
    return len(pairs) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/quickstart", help="folder or name on the Hub")
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch_tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: as measured")
    parser.add_argument(
        "--torch_compile", action=argparse.BooleanOptionalAction, help="default: by the number of pairs"
    )
    options = parser.parse_args()

    if options.pairs > MOST_PAIRS:
        parser.error(f"--pairs: the words make {MOST_PAIRS:,} different ones")
    pairs = build_pairs(options.pairs)
    words = statistics.mean(len(sentence.split()) for pair in pairs for sentence in pair[:2])
    rates = []
    for number in range(options.rounds):
        model, tokenizer = load_model(options.model, torch.device("cpu"))
        if number == 0:
            plain = pairs_per_second(lambda pairs: score_plainly(model, tokenizer, pairs), pairs[:20])  # noqa: B023
            print(f"{len(pairs)} pairs, {words:.1f} words a sentence, {torch.get_num_threads()} threads")
            print(f"  one token at a time {plain:>8.1f} pairs/s")
        started = time.perf_counter()
        make_fast(model, tokenizer, pairs, options.bf16, options.torch_compile)
        results = score_pairs(model, tokenizer, pairs, options.batch_tokens)
        rates.append(len(pairs) / (time.perf_counter() - started))
    rate = statistics.median(rates)
    print(
        f"  batched, {'bf16' if model.dtype == torch.bfloat16 else 'fp32'} {rate:>8.1f} pairs/s "
        f"({min(rates):.1f} to {max(rates):.1f}), bar {BAR}: {verdict(rate >= BAR)}"
    )
    print(f"  accuracy {results['accuracy']:.1f} %")


if __name__ == "__main__":
    run_main(main)
