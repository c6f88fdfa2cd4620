"""Shards of tokens: filters, workers, interruptions, limits."""

import json
import tracemalloc

import numpy as np
import pytest

from hf_cram.data import token_shards
from hf_cram.data.filtering import MANY_TOKENS, TOO_SHORT, FilterArguments
from hf_cram.data.token_shards import TokenShards, write_token_shards
from hf_cram.data.tokenization import train_tokenizer
from hf_cram.data.tokenizing import TokenizingSettings, content_key

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer([" ".join(WORDS)] * 3, 150, show_progress=False)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(token_shards, "SHARD_CHARACTERS", 4000)
    monkeypatch.setattr(token_shards, "BATCH_CHARACTERS", 900)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    made = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(300)]
    return [f"{text} qxjz{index}qzxj" if index % 3 == 0 else text for index, text in enumerate(made)]


def settings(tokenizer, **rules):
    return TokenizingSettings(tokenizer.backend_tokenizer, np.dtype("u2"), 3, FilterArguments(**rules))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Source:
    """Counts what is drawn from it, and stops with an error where it is told to."""

    def __init__(self, documents, fail_at=None):
        self.remaining = iter(documents)
        self.fail_at = fail_at
        self.drawn = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.drawn == self.fail_at:
            raise ConnectionError("the line is dead")
        document = next(self.remaining)
        self.drawn += 1
        return document

    def position(self):
        return {"skipped": {}, "sources": {"only": {"documents": self.drawn}}}


def write(documents, settings, folder, **options):
    source = documents if isinstance(documents, Source) else Source(documents)
    return write_token_shards(source, settings, folder, source.position, **options)


RULES = {"drop_below_characters": 40, "max_tokens_per_character": 0.3, "sample_dropped": 2}


def test_documents_are_filtered_and_tokenized_once(wordpiece, documents, tmp_path):
    shards = write(documents, settings(wordpiece, **RULES), tmp_path)
    tokenize = wordpiece.backend_tokenizer
    kept, reasons = [], []
    for document in documents:
        ids = tokenize.encode(document, add_special_tokens=False).ids
        if len(document) < 40:
            reasons.append(TOO_SHORT)
        elif len(ids) >= 0.3 * len(document):
            reasons.append(MANY_TOKENS)
        else:
            kept.append((document, [*ids, 3]))
    assert min(reasons.count(TOO_SHORT), reasons.count(MANY_TOKENS), len(kept)) > 10
    assert shards.dropped() == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    lengths, keys = shards.documents()
    assert lengths.tolist() == [len(ids) for _, ids in kept]
    assert keys.tolist() == [content_key(np.array(ids[:-1], dtype=np.uint16).tobytes()) for _, ids in kept]
    assert np.concatenate([*shards.read(0, shards.num_tokens)]).tolist() == sum((ids for _, ids in kept), [])
    assert shards.total("documents_in") == 300
    assert shards.total("characters_in") == sum(map(len, documents))
    assert shards.total("characters") == sum(len(document) for document, _ in kept)
    assert {reason: len(records) for reason, records in shards.samples(2).by_reason.items()} == {
        TOO_SHORT: 2, MANY_TOKENS: 2,
    }  # fmt: skip


def test_samples_of_many_shards_are_not_held_in_memory(wordpiece, tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "SHARD_CHARACTERS", 40_000)
    documents = [f"{index} " + "alpha " * 350 for index in range(1200)]
    rules = {"drop_above_characters": 100, "sample_dropped": 20}
    shards = write(documents, settings(wordpiece, **rules), tmp_path)
    assert len(shards.summaries) > 50
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.json"))
    tracemalloc.start()
    samples = TokenShards(tmp_path, shards.dtype).samples(20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < on_disk / 3
    keys = {key: len(record["text"]) for key, record in samples.by_reason["too many characters"].items()}
    assert list(keys.values()) == [2000] * 20
    assert samples.by_reason == shards.samples(20).by_reason
    assert shards.samples(0).by_reason == {}


@pytest.mark.parametrize("workers", [2, 3])
def test_shards_do_not_depend_on_the_workers(wordpiece, documents, tmp_path, workers):
    write(documents, settings(wordpiece, **RULES), tmp_path / "one")
    write(documents, settings(wordpiece, **RULES), tmp_path / "more", workers=workers)
    assert len(contents(tmp_path / "one")) >= 15
    assert contents(tmp_path / "more") == contents(tmp_path / "one")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_goes_on_behind_its_last_shard(wordpiece, documents, tmp_path, workers):
    write(documents, settings(wordpiece, **RULES), tmp_path / "whole")
    with pytest.raises(ConnectionError):
        write(Source(documents, fail_at=170), settings(wordpiece, **RULES), tmp_path / "cut", workers=workers)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.json")}
    assert finished
    write(documents, settings(wordpiece, **RULES), tmp_path / "cut", workers=workers)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    source = Source(documents)
    write(source, settings(wordpiece, **RULES), tmp_path / "cut")
    assert source.drawn == 0


def test_a_damaged_shard_is_written_anew_with_all_behind_it(wordpiece, documents, tmp_path):
    shards = write(documents, settings(wordpiece), tmp_path)
    expected = contents(tmp_path)
    damaged = tmp_path / "shard-00001.tokens"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    assert len(TokenShards(tmp_path, shards.dtype).summaries) == 1
    (tmp_path / "shard-00002.json").write_text("{")
    write(documents, settings(wordpiece), tmp_path)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_reading_stops_when_there_are_enough_tokens(wordpiece, documents, tmp_path, workers):
    source = Source(documents)
    shards = write(source, settings(wordpiece), tmp_path / "few", workers=workers, token_limit=1500)
    largest = 900 + max(map(len, documents))  # characters of a batch, and tokens are fewer
    assert 1500 <= shards.num_tokens < 1500 + largest
    assert source.drawn < 200
    assert shards.is_finished
    assert shards.summaries[-1].position["sources"] == {"only": {"documents": shards.total("documents_in")}}
    again = Source(documents)
    write(again, settings(wordpiece), tmp_path / "few", token_limit=1500)
    assert again.drawn == 0
    expected = write(documents, settings(wordpiece), tmp_path / "expected", token_limit=1500)
    assert contents(tmp_path / "few") == contents(tmp_path / "expected")
    assert expected.total("documents_in") < 300


def test_what_is_skipped_behind_the_last_document_counts(wordpiece, tmp_path):
    skipped = {}

    def documents():
        yield "alpha beta"
        skipped["no text"] = 3

    shards = write_token_shards(documents(), settings(wordpiece), tmp_path, lambda: {"skipped": dict(skipped)})
    assert shards.left_out() == {"no text": 3}
    assert json.loads((tmp_path / "shard-00000.json").read_text())["documents"] == 1


def test_spans_across_shards(wordpiece, documents, tmp_path):
    shards = write(documents, settings(wordpiece), tmp_path)
    everything = np.concatenate([*shards.read(0, shards.num_tokens)])
    edge = shards.summaries[0].tokens
    for start, end in ((0, edge), (edge - 1, edge + 1), (edge, edge + 5), (5, shards.num_tokens - 5), (7, 7)):
        parts = [np.zeros(0, "u2"), *shards.read(start, end)]
        np.testing.assert_array_equal(np.concatenate(parts), everything[start:end])
