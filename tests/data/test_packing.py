"""Rows against a plain reference, the held-out split, keys."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cram.data import token_shards
from hf_cram.data.errors import DataError
from hf_cram.data.filtering import FilterArguments
from hf_cram.data.packing import PackedRows, choose_eval_documents, pack_rows, token_dtype
from hf_cram.data.token_shards import write_token_shards
from hf_cram.data.tokenization import train_tokenizer
from hf_cram.data.tokenizing import TokenizingSettings

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer([" ".join(WORDS)] * 3, 150, show_progress=False)


def pack(documents, tokenizer, folder, length=8, eval_rows=2):
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(len(tokenizer))
    settings = TokenizingSettings(tokenizer.backend_tokenizer, dtype, tokenizer.sep_token_id, FilterArguments())
    shards = write_token_shards(documents, settings, folder / "shards", dict)
    statistics = pack_rows(shards, length, eval_rows, folder)
    rows = {name: PackedRows(folder / f"{name}.bin", dtype, length) for name in ("train", "eval")}
    return {**statistics, "tokens": shards.num_tokens}, rows["train"].rows, rows["eval"].rows, shards


def make_documents(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) + f" {index}" for index in range(count)]


def encode(document, tokenizer):
    return [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(3, 60), length=st.integers(8, 24), eval_rows=st.integers(1, 4))
def test_rows_equal_a_plain_reference(wordpiece, tmp_path_factory, seed, count, length, eval_rows):
    documents = make_documents(count, seed)
    encoded = [encode(document, wordpiece) for document in documents]
    try:
        statistics, train, held_out, _ = pack(documents, wordpiece, tmp_path_factory.mktemp("p"), length, eval_rows)
    except DataError:
        assert sum(map(len, encoded)) < 10 * length
        return
    assert statistics["tokens"] == sum(map(len, encoded))
    # Which documents are held out is the split's choice; that they are whole documents, and the rest in order, is not.
    flat_train = train.ravel().tolist()
    for held in _subsets_that_fit(encoded, statistics["eval_documents"], held_out):
        rest = [token for index, tokens in enumerate(encoded) if index not in held for token in tokens]
        if rest[: len(rest) // length * length] == flat_train:
            break
    else:
        pytest.fail("training rows are not the documents left over, in order")


def _subsets_that_fit(encoded, count, held_out):
    """Held-out documents in order of appearance in the held-out rows: the one chain that spells the rows."""
    flat = held_out.ravel().tolist()

    def search(position, chosen):
        if len(chosen) == count:
            yield set(chosen)
            return
        for index, tokens in enumerate(encoded):
            rest = flat[position:]
            if index not in chosen and tokens[: len(rest)] == rest[: len(tokens)]:
                yield from search(position + len(tokens), [*chosen, index])

    yield from search(0, [])


def test_long_documents_are_cut_for_the_threads_without_a_trace(wordpiece, tmp_path):
    long = " ".join(np.random.default_rng(0).choice(WORDS, 30_000))
    documents = [*make_documents(40), long]
    _, train, _, _ = pack(documents, wordpiece, tmp_path, length=16)
    expected = encode(long, wordpiece)
    flat = train.ravel().tolist()
    start = len(flat) - len(flat) % 16 - len(expected)
    assert any(flat[s : s + 29_000] == expected[:29_000] for s in range(start - 40, start + 40))


def test_held_out_documents_never_stand_in_training(wordpiece, tmp_path):
    documents = [f"{a} {b} {c} {a}" for a in WORDS for b in WORDS for c in WORDS[:4]]
    statistics, train, held_out, _ = pack(documents, wordpiece, tmp_path, length=8, eval_rows=3)
    as_documents = lambda rows: set(bytes(rows.ravel().astype(np.uint16)).split(b"\x03\x00"))  # noqa: E731
    assert len(held_out) == 3
    whole = {bytes(np.array(encode(document, wordpiece)[:-1], np.uint16)) for document in documents}
    held = as_documents(held_out) & whole
    assert len(held) >= 3
    assert not held & as_documents(train)
    assert statistics["train_rows"] == len(train)


def test_equal_documents_land_on_one_side(wordpiece, tmp_path):
    lengths = np.full(100, 10)
    keys = np.repeat(np.arange(50, dtype=np.uint64) * np.uint64(7919), 2)
    is_eval, order = choose_eval_documents(lengths, keys, 8, 2)
    assert 0 < is_eval.sum() < 20
    assert not set(keys[is_eval]) & set(keys[~is_eval])
    assert sorted(order) == np.flatnonzero(is_eval)[::2].tolist()  # of both copies the first


def test_copies_of_a_held_out_document_are_read_once_and_never_trained_on(wordpiece, tmp_path):
    kinds = make_documents(400)
    documents = [*kinds, *kinds[::-1], *kinds]
    statistics, train, held_out, _ = pack(documents, wordpiece, tmp_path, length=8, eval_rows=20)
    flat, chosen = held_out.ravel().tolist(), []
    encoded = [encode(kind, wordpiece) for kind in kinds]
    while len(chosen) < statistics["eval_documents"]:
        position = sum(len(encoded[index]) for index in chosen)
        rest = flat[position:]
        (found,) = [
            i for i, tokens in enumerate(encoded) if i not in chosen and tokens[: len(rest)] == rest[: len(tokens)]
        ]
        chosen.append(found)
    left = [token for text in documents if kinds.index(text) not in chosen for token in encode(text, wordpiece)]
    assert train.ravel().tolist() == left[: train.size]
    assert len(left) - train.size < 8
    assert len(held_out) == 20


def test_documents_of_equal_tokens_are_copies(wordpiece, tmp_path):
    kinds = make_documents(200)
    texts = [*kinds, *(f"{kind.upper()}  \n" for kind in kinds)]
    encoded = {tuple(encode(text, wordpiece)) for text in texts}
    assert len(encoded) <= len(kinds)
    _, train, held_out, _ = pack(texts, wordpiece, tmp_path, length=8, eval_rows=20)
    _, same_train, same_held_out, _ = pack(kinds * 2, wordpiece, tmp_path / "same", length=8, eval_rows=20)
    np.testing.assert_array_equal(held_out, same_held_out)
    np.testing.assert_array_equal(train, same_train)


def test_a_corpus_of_copies_keeps_nearly_all_of_its_text_for_training(wordpiece, tmp_path):
    kinds = make_documents(200)
    statistics, train, held_out, _ = pack(kinds * 10, wordpiece, tmp_path / "a", length=8, eval_rows=10_000)
    assert train.size > 0.93 * statistics["tokens"]
    assert len(held_out) >= 1
    often = make_documents(1, seed=9)[0]
    _, train, _, _ = pack([*kinds, *[often] * 1000], wordpiece, tmp_path / "b", length=8, eval_rows=2)
    assert train.size > 1000 * len(encode(often, wordpiece))  # half the text, and held out it would be one document


def test_copies_of_one_document_are_no_different_documents(wordpiece, tmp_path):
    with pytest.raises(DataError, match="has 1 different documents, too few to hold some out"):
        pack(["alpha beta gamma"] * 50, wordpiece, tmp_path)


def test_split_does_not_depend_on_the_order_of_documents(wordpiece, tmp_path):
    documents = make_documents(200)
    _, _, first, _ = pack(documents, wordpiece, tmp_path / "a", eval_rows=4)
    _, _, second, _ = pack(documents[::-1], wordpiece, tmp_path / "b", eval_rows=4)
    assert np.array_equal(first, second)


def test_one_huge_document_stays_in_training(wordpiece, tmp_path):
    huge = " ".join(np.random.default_rng(1).choice(WORDS, 5000))
    _, train, held_out, _ = pack([*make_documents(50), huge], wordpiece, tmp_path)
    assert train.size > 5000
    assert held_out.size <= 0.06 * train.size


def test_documents_without_tokens_are_counted(wordpiece, tmp_path):
    _, _, _, shards = pack([*make_documents(50), "语言", "→"], wordpiece, tmp_path)
    assert shards.total("documents") == 50
    assert shards.dropped() == {"no token of the vocabulary": 2}


@pytest.mark.parametrize("documents", [["alpha beta"], ["alpha beta gamma delta " * 20]])
def test_a_text_too_small_is_a_clear_error(wordpiece, tmp_path, documents):
    with pytest.raises(DataError, match="too few to hold some out|fewer than one training row"):
        pack(documents, wordpiece, tmp_path)


def test_rows_do_not_depend_on_the_shards(wordpiece, tmp_path, monkeypatch):
    documents = make_documents(300)
    _, *one, shards = pack(documents, wordpiece, tmp_path / "one", eval_rows=4)
    assert len(shards.summaries) == 1
    monkeypatch.setattr(token_shards, "SHARD_CHARACTERS", 700)
    _, *many, shards = pack(documents, wordpiece, tmp_path / "many", eval_rows=4)
    assert len(shards.summaries) > 20
    for rows, expected in zip(many, one, strict=True):
        np.testing.assert_array_equal(rows, expected)


def test_ids_are_stored_small():
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32


def test_mask_keys_name_row_and_pass(wordpiece, tmp_path):
    pack(make_documents(50), wordpiece, tmp_path)
    rows = PackedRows(tmp_path / "train.bin", np.dtype(np.uint16), 8)
    keys = [int(item["mask_key"]) for item in rows.__getitems__([3, 0, 5])]
    assert len(set(keys)) == 3
    assert int(rows[3]["mask_key"]) == keys[0]
    rows.set_epoch(1)
    assert int(rows[3]["mask_key"]) not in keys
    copy = pickle.loads(pickle.dumps(rows))
    assert copy[3]["mask_key"] == rows[3]["mask_key"]
    assert np.array_equal(copy[4]["input_ids"], rows[4]["input_ids"])
    assert len(pickle.dumps(rows)) < 2000
