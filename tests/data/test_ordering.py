"""Scores of rows on hand-made text, and the file that follows them."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_cram.data import ordering
from hf_cram.data.errors import DataError
from hf_cram.data.ordering import ROW_ORDERS, OrderingArguments, order_rows, score_rows, sort_scores
from hf_cram.data.tokenization import train_tokenizer

LENGTH = 8
TEXT = ["One old man was running, swimming, walking. Was he? He was! The walker is unbelievably old."] * 3


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer(TEXT, 150, show_progress=False)


def as_rows(texts, tokenizer, length=LENGTH):
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert {len(row) for row in rows} == {length}
    return np.array(rows, dtype=np.uint16)


def random_rows(tokenizer, count=300, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    return np.minimum(rng.zipf(1.3, (count, length)), len(tokenizer) - 1).astype(np.uint16)


def write(rows, path, target, tokenizer, **arguments):
    rows.tofile(path)
    return order_rows(path, target, rows.dtype, rows.shape[1], tokenizer, OrderingArguments(**arguments))


def test_sentence_length_puts_many_sentence_ends_first(wordpiece):
    rows = as_rows(["he was he was he was he .", "he . he ? he ! he .", "he was he was he was he was"], wordpiece)
    scores = score_rows(rows, wordpiece, OrderingArguments("sentence_length"))
    assert scores.tolist() == [8 / 2, 8 / 5, 8 / 1]
    assert sort_scores(scores, OrderingArguments("sentence_length")).tolist() == [1, 0, 2]
    assert sort_scores(scores, OrderingArguments("sentence_length", True)).tolist() == [2, 0, 1]


def test_word_length_counts_pieces_as_parts_of_their_word(wordpiece):
    pieces = wordpiece.tokenize("he unbelievably . ( zz")
    assert any(piece.startswith("##") for piece in pieces)
    rows = np.array([wordpiece.convert_tokens_to_ids(pieces)])
    score = score_rows(rows, wordpiece, OrderingArguments("word_length"))[0]
    assert score == (len("he") + len("unbelievably") + len("zz")) / 3
    # A row that starts inside a word.
    second = next(place for place, piece in enumerate(pieces) if piece.startswith("##"))
    ids = wordpiece.convert_tokens_to_ids(pieces[second : second + 1] + wordpiece.tokenize("he"))
    length = len(pieces[second]) - 2
    assert score_rows(np.array([ids]), wordpiece, OrderingArguments("word_length"))[0] == (length + 2) / 2


def test_separators_and_signs_are_no_words(wordpiece):
    sep = wordpiece.sep_token_id
    stop = wordpiece.convert_tokens_to_ids(".")
    he, running = wordpiece.convert_tokens_to_ids(["he", "running"])
    rows = np.array([[he, sep, stop, running], [sep, sep, stop, stop]])
    assert score_rows(rows, wordpiece, OrderingArguments("word_length")).tolist() == [4.5, 0]


def test_unigram_puts_likely_rows_first_as_the_text_of_the_paper_says(tokenizer):
    rows = np.array([[5, 6, 7, 8], [5, 5, 5, 5], [5, 5, 6, 6], [9, 9, 5, 5]])
    scores = score_rows(rows, tokenizer, OrderingArguments("unigram"))
    share = np.bincount(rows.ravel()) / rows.size
    assert scores == pytest.approx(-np.log2(share[rows]).mean(axis=1), abs=1e-4)
    assert sort_scores(scores, OrderingArguments("unigram")).tolist() == [1, 2, 3, 0]


def test_rare_tokens_are_the_rarer_half_of_those_that_occur(tokenizer):
    rows = np.array([[5, 5, 6, 6], [5, 6, 7, 8], [5, 5, 6, 7]])
    # 5 five times, 6 four, 7 twice, 8 once; other tokens of the vocabulary never
    assert score_rows(rows, tokenizer, OrderingArguments("rare_tokens")).tolist() == [0, 0.5, 0.25]


def test_random_follows_its_seed(tokenizer):
    rows = random_rows(tokenizer, 1000)
    orders = []
    for seed in (0, 0, 1, 2**63 - 1):
        arguments = OrderingArguments("random", row_order_seed=seed)
        orders.append(sort_scores(score_rows(rows, tokenizer, arguments), arguments))
        assert sorted(orders[-1]) == list(range(1000))
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[3])
    assert abs(np.corrcoef(orders[0], np.arange(1000))[0, 1]) < 0.1
    # Pinned: an order that changes between versions of a library would change what training sees.
    assert orders[0][:5].tolist() == [529, 995, 131, 754, 646]


def test_scores_do_not_depend_on_the_mathematics_library():
    values = np.array([1, 2, 3, 5, 1000, 10**9, 2**40 + 1])
    assert ordering._log2(values) / 2**16 == pytest.approx(np.log2(values), abs=1e-4)
    assert ordering._log2(values).tolist() == [0, 65536, 103872, 152169, 653117, 1959352, 2621440]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("row_order", ROW_ORDERS[2:])
def test_equal_scores_stay_in_reading_order(wordpiece, row_order, reverse):
    rows = np.repeat(random_rows(wordpiece, 40), 5, axis=0)
    arguments = OrderingArguments(row_order, reverse)
    scores = score_rows(rows, wordpiece, arguments)
    order = sort_scores(scores, arguments)
    steps = np.diff(scores[order])
    assert (steps <= 0).all() if reverse else (steps >= 0).all()
    assert (np.diff(order)[steps == 0] > 0).all()
    assert (steps != 0).any()


@pytest.mark.parametrize("row_order", ROW_ORDERS)
def test_the_file_holds_every_row_where_the_order_says(wordpiece, tmp_path, row_order):
    rows = random_rows(wordpiece)
    order, scores = write(rows, tmp_path / "a.bin", tmp_path / "b.bin", wordpiece, row_order=row_order)
    written = np.fromfile(tmp_path / "b.bin", np.uint16).reshape(rows.shape)
    restored = np.empty_like(rows)
    restored[order] = written
    assert np.array_equal(restored, rows)
    assert np.array_equal(scores, score_rows(rows, wordpiece, OrderingArguments(row_order)))
    assert (np.diff(scores[order]) >= 0).all()
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "b.bin"}


@pytest.mark.parametrize("row_order", ROW_ORDERS)
def test_bytes_do_not_depend_on_the_size_of_the_chunks(wordpiece, tmp_path, monkeypatch, row_order):
    rows = random_rows(wordpiece)
    results = []
    for chunk_tokens in (1, 7 * LENGTH * 2, 10**6):
        monkeypatch.setattr(ordering, "CHUNK_TOKENS", chunk_tokens)
        _, scores = write(rows, tmp_path / "a.bin", tmp_path / "b.bin", wordpiece, row_order=row_order)
        results.append((scores.tobytes(), (tmp_path / "b.bin").read_bytes()))
    assert len(set(results)) == 1


@pytest.mark.parametrize(("part_rows", "most_parts"), [(1, 1024), (7, 1024), (1, 3), (299, 1024), (300, 1024)])
def test_parts_of_any_size_give_the_same_file_and_are_read_in_sequence(
    wordpiece, tmp_path, monkeypatch, part_rows, most_parts
):
    rows, reads = random_rows(wordpiece), []
    read_rows = ordering._read_rows

    def note(stream, start, count, row_bytes):
        reads.append((start, count))
        return read_rows(stream, start, count, row_bytes)

    monkeypatch.setattr(ordering, "PART_BYTES", part_rows * LENGTH * 2 + 1)
    monkeypatch.setattr(ordering, "MOST_PARTS", most_parts)
    monkeypatch.setattr(ordering, "_read_rows", note)
    progress = []
    rows.tofile(tmp_path / "a.bin")
    order, _ = order_rows(
        tmp_path / "a.bin", tmp_path / "b.bin", rows.dtype, LENGTH, wordpiece, OrderingArguments("unigram", True),
        lambda part, count, total: progress.append((part, count, total)),
    )  # fmt: skip
    assert (tmp_path / "b.bin").read_bytes() == rows[order].tobytes()
    parts = -(-300 // max(part_rows, -(-300 // most_parts)))
    assert len(reads) == 2 * parts
    assert [start for start, _ in reads[:parts]] == sorted(start for start, _ in reads[parts:])
    for part in ("counting", "scoring", "dealing", "placing"):
        assert sum(count for name, count, total in progress if name == part) == 300
    assert {total for *_, total in progress} == {300}


def test_a_file_may_be_ordered_in_its_place_and_a_failure_leaves_it_alone(wordpiece, tmp_path, monkeypatch):
    rows = random_rows(wordpiece)
    path = tmp_path / "train.bin"
    order, _ = write(rows, path, path, wordpiece, row_order="unigram")
    ordered = path.read_bytes()
    assert ordered == rows[order].tobytes()

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(ordering, "_copy_in_order", full_disk)
    with pytest.raises(OSError, match="No space"):
        order_rows(path, path, rows.dtype, LENGTH, wordpiece, OrderingArguments("word_length"))
    assert path.read_bytes() == ordered
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.bin"]


def test_wide_ids_and_no_rows_at_all(wordpiece, tmp_path):
    rows = random_rows(wordpiece).astype(np.uint32)
    order, _ = write(rows, tmp_path / "a.bin", tmp_path / "b.bin", wordpiece, row_order="sentence_length")
    assert (tmp_path / "b.bin").read_bytes() == rows[order].tobytes()
    for row_order in ROW_ORDERS:
        order, scores = write(rows[:0], tmp_path / "a.bin", tmp_path / "b.bin", wordpiece, row_order=row_order)
        assert order.shape == scores.shape == (0,)
        assert (tmp_path / "b.bin").read_bytes() == b""


def test_a_file_of_other_rows_is_refused(wordpiece, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"123")
    with pytest.raises(DataError, match="bytes more: prepare it anew"):
        order_rows(tmp_path / "a.bin", tmp_path / "b.bin", np.dtype(np.uint16), 8, wordpiece, OrderingArguments())
    assert not (tmp_path / "b.bin").exists()


def test_byte_level_vocabularies_mark_what_begins_a_word():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["the café was walking, he said. “Was he?” Ok", 'he said "no!"']
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    byte_level = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    ids = byte_level(" the café was walking, he")["input_ids"]
    score = score_rows(np.array([ids]), byte_level, OrderingArguments("word_length"))[0]
    tokens = byte_level.convert_ids_to_tokens(ids)
    assert len(tokens) > 5
    # Bytes that are half a character are no letters, whole tokens with é are.
    assert len("thecafwaswalkinghe") / 5 <= score <= len("thecaféwaswalkinghe") / 5
    ends = score_rows(
        np.array([byte_level(" the. the? the!")["input_ids"]]), byte_level, OrderingArguments("sentence_length")
    )
    assert ends[0] == len(byte_level(" the. the? the!")["input_ids"]) / 4


def test_a_vocabulary_without_marks_has_a_word_a_token(tokenizer):
    rows = np.array([tokenizer.convert_tokens_to_ids(["w1", "w22", "w33", "[SEP]"])])
    assert score_rows(rows, tokenizer, OrderingArguments("word_length")).tolist() == [8 / 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row_order": "alphabetical"}, "row_order must be one of none, random, unigram"),
        ({"reverse_row_order": True}, "set both or neither"),
        ({"row_order": "random", "row_order_seed": -1}, "row_order_seed must be at least 0"),
    ],
)
def test_a_bad_setting_is_one_clear_line(arguments, message):
    with pytest.raises(DataError, match=message):
        OrderingArguments(**arguments)
