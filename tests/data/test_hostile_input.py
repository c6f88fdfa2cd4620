"""Text as it really comes: broken bytes, cut archives, special tokens in prose, tokenizers with settings of their own."""

import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer

from hf_cram.data import stages, tokenizing
from hf_cram.data.cache import cached_entry, hash_of
from hf_cram.data.errors import DataError, SkipReport
from hf_cram.data.filtering import FilterArguments
from hf_cram.data.input_files import expand_files
from hf_cram.data.pipeline import DataArguments, prepare_corpus
from hf_cram.data.sources import TextSource
from hf_cram.data.text_files import read_files
from hf_cram.data.tokenization import train_tokenizer
from hf_cram.data.tokenizing import (
    DocumentTokenizer,
    TokenizingSettings,
    has_independent_words,
    plain_text_tokenizer,
)

DOCUMENTS = [f"The quick brown fox number {index} jumps over the lazy dog." for index in range(400)]


def read(path: Path, **settings) -> tuple[list[str], dict[str, int]]:
    report = SkipReport()
    return list(read_files([path], report, **settings)), dict(report.counts)


def tokenize(documents: list[str], backend: Tokenizer, separator_id: int = 3) -> tuple[list[int], list[int]]:
    tokenizer = DocumentTokenizer(TokenizingSettings(backend, np.dtype(np.uint32), separator_id, FilterArguments()))
    result = tokenizer(documents)
    return result.tokens.tolist(), result.lengths.tolist()


def arguments(tmp_path: Path, **settings) -> DataArguments:
    return DataArguments(**{"max_seq_length": 16, "vocab_size": 200, "cache_dir": str(tmp_path / "cache"), **settings})


@pytest.fixture(scope="module")
def word_pieces():
    return train_tokenizer(DOCUMENTS, 200, show_progress=False)


def test_invalid_utf8_in_parquet_skips_one_document(tmp_path):
    offsets, content = np.array([0, 2, 6], np.int32), b"\xff\xfegood"
    column = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(content)])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (["good"], {"not valid UTF-8": 1})


def test_half_a_surrogate_pair_skips_one_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert read(tmp_path / "a.jsonl") == (["whole \U0001f600"], {"not valid UTF-8": 1})


def test_brackets_without_end_skip_one_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": ' + "[" * 100_000 + '\n{"text": "better"}\n')
    assert read(tmp_path / "a.jsonl") == (["good", "better"], {"not valid JSON": 1})


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_damaged_parquet_is_one_line_or_is_read(tmp_path, compression):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"document {index} of some" for index in range(99)], "n": list(range(99))})
    pq.write_table(table, path, compression=compression, store_schema=False)
    content, rng = path.read_bytes(), np.random.default_rng(2)
    errors = []
    for place in rng.integers(len(content) - 600, len(content), 400):
        damaged = bytearray(content)
        damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read(path)
        except DataError as error:
            errors.append(str(error))
    assert errors
    assert "\n" not in "".join(errors)
    path.write_bytes(content.replace(b"text", b"te\xfft"))
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        read(path)


def test_column_names_in_an_error_are_one_short_line(tmp_path):
    (tmp_path / "a.csv").write_text('"my\ntexts",' + ",".join(f"column{index}" for index in range(900)) + "\nx\n")
    with pytest.raises(DataError, match=r"columns: my texts, column0, .*, column18, \.\.\.\)") as caught:
        read(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)
    (tmp_path / "a.jsonl").write_text(json.dumps({"key" * 10_000: 1}) + "\n")
    with pytest.raises(DataError, match="no column 'text'") as caught:
        read(tmp_path / "a.jsonl")
    assert len(str(caught.value)) < 300


def test_a_small_file_that_is_large_when_decompressed_is_read_in_bounded_memory(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"a" * 150_000_000 + b"\nlast\n"))
    tracemalloc.start()
    documents, skipped = read(tmp_path / "a.txt.zst", max_document_characters=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert documents == ["last"]
    assert skipped == {"longer than the limit (max_document_characters)": 1}
    assert peak < 100e6


def test_escapes_do_not_make_a_document_too_long(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "\U0001f600" * 90}) + "\n")
    assert read(tmp_path / "a.jsonl", max_document_characters=100) == (["\U0001f600" * 90], {})


def test_long_csv_field_skips_one_document(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\nfirst\n{'x' * 500}\nlast\n")
    documents, skipped = read(tmp_path / "a.csv", max_document_characters=100)
    assert documents == ["first", "last"]
    assert skipped == {"longer than the limit (max_document_characters)": 1}


def test_all_frames_of_a_zst_file_are_read(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one\n") + zstandard.compress(b"two\n"))
    assert read(tmp_path / "a.txt.zst")[0] == ["one", "two"]


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_archive_cut_short_is_an_error(tmp_path, suffix, compress):
    content = np.random.default_rng(0).integers(97, 123, 400_000).astype(np.uint8).tobytes()  # beyond one block
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(compress(b"\n".join(content[i : i + 50] for i in range(0, len(content), 50)))[:-1000])
    with pytest.raises(DataError, match=rf"a\.txt\.{suffix}: cannot be read .*end"):
        read(path)


def test_reasons_are_those_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('nonsense\n{"text": "good"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\n")
    with pytest.raises(DataError, match=r"b\.txt: none of its 1 documents can be used \(not valid UTF-8 \(1\)\)"):
        list(read_files([tmp_path / "a.jsonl", tmp_path / "b.txt"], SkipReport()))


def test_file_named_twice_is_read_once(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    files = expand_files([str(tmp_path / "b.txt"), str(tmp_path)])
    assert [file.name for file in files] == ["b.txt", "a.txt"]


def test_special_tokens_in_prose_are_text(tmp_path, word_pieces):
    documents = [f"{document} Replace [MASK] by [SEP] here." for document in DOCUMENTS]
    (tmp_path / "text.txt").write_text("\n".join(documents))
    word_pieces.save_pretrained(tmp_path / "tokenizer")
    files = {"train_files": [str(tmp_path / "text.txt")], "tokenizer_name": str(tmp_path / "tokenizer")}
    corpus = prepare_corpus(arguments(tmp_path, eval_rows=4, **files))
    train, held_out = corpus.train_dataset.rows, corpus.eval_dataset.rows
    assert word_pieces.mask_token_id not in np.concatenate([train, held_out])
    assert (train == 3).sum() <= len(documents)  # a separator a document and none from its text
    assert word_pieces("a [MASK] b")["input_ids"].count(word_pieces.mask_token_id) == 1  # its owner's is left alone


def test_saved_truncation_and_padding_do_not_cut_documents(tmp_path, word_pieces):
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    word_pieces.save_pretrained(tmp_path / "tokenizer")
    plain = prepare_corpus(
        arguments(tmp_path, train_files=[str(tmp_path / "text.txt")], tokenizer_name=str(tmp_path / "tokenizer"))
    )
    saved = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(saved))
    cut = prepare_corpus(
        arguments(tmp_path, train_files=[str(tmp_path / "text.txt")], tokenizer_name=str(tmp_path / "tokenizer"))
    )
    assert not cut.from_cache
    assert cut.statistics["tokens"] == plain.statistics["tokens"]
    np.testing.assert_array_equal(cut.train_dataset.rows, plain.train_dataset.rows)


def test_local_dataset_is_known_by_its_content(tmp_path):
    (tmp_path / "set").mkdir()
    path = tmp_path / "set/train.parquet"
    pq.write_table(pa.table({"text": DOCUMENTS}), path)
    settings = arguments(tmp_path, dataset_name=str(tmp_path / "set"))
    assert not prepare_corpus(settings).from_cache
    os.utime(path, (1, 1))
    assert prepare_corpus(settings).from_cache
    pq.write_table(pa.table({"text": DOCUMENTS[1:]}), path)
    assert not prepare_corpus(settings).from_cache


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(DOCUMENTS))
    settings = arguments(tmp_path, train_files=[str(path)])
    documents = TextSource(settings, tmp_path).documents()
    next(documents)
    with open(path, "a") as stream:
        stream.write("\none more\n")
    with pytest.raises(DataError, match=r"text\.txt: it has changed since this run began"):
        list(documents)
    source = TextSource(settings, tmp_path)
    path.write_text("replaced")
    with pytest.raises(DataError, match="has changed"):
        next(source.documents())


def test_a_folder_that_is_still_being_filled_is_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "set/train-00000-of-00002.parquet")
    settings = arguments(tmp_path, dataset_name=str(tmp_path / "set"), streaming=True)
    source = TextSource(settings, tmp_path)
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "set/train-00001-of-00002.parquet")
    with pytest.raises(DataError, match="set: its files have changed since this run began"):
        next(source.documents())


def test_a_home_that_nobody_has_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cache_dir ~nobody-of-this-name/cache cannot be used: "):
        prepare_corpus(arguments(tmp_path, train_files=["a.txt"], cache_dir="~nobody-of-this-name/cache"))


def test_a_file_that_changes_behind_the_limit_of_a_text_is_an_error(tmp_path, monkeypatch):
    """The tokens asked for are there before the file is read to its end."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(DOCUMENTS * 50))
    written = stages.write_token_shards

    def write_and_change_the_file(*values):
        shards = written(*values)
        with open(path, "a") as stream:
            stream.write("\none more\n")
        return shards

    monkeypatch.setattr(stages, "write_token_shards", write_and_change_the_file)
    settings = arguments(tmp_path, train_files=[str(path)], max_train_tokens=500)
    with pytest.raises(DataError, match=r"text\.txt: it has changed since this run began"):
        prepare_corpus(settings)
    assert not list(tmp_path.rglob("*.unfinished"))  # shards of another text than their key says
    monkeypatch.undo()
    assert not prepare_corpus(settings).from_cache


def test_cached_skips_do_not_name_where_the_text_once_was(tmp_path, caplog):
    warnings = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jsonl").write_text(
            "nonsense\n" + "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS)
        )
        files = [str(tmp_path / name / f"{name}.jsonl")]
        caplog.clear()
        prepare_corpus(
            arguments(tmp_path, train_files=files, dedup_substring_bytes=500, drop_below_characters=1 + len(warnings))
        )
        (warning,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
        warnings.append(warning)
    assert warnings[0].startswith("1 documents skipped: not valid JSON (first: ")
    assert warnings[0].endswith("first.jsonl:1)")
    assert warnings[1] == "1 documents skipped: not valid JSON"


def test_text_without_a_usable_document_says_why(tmp_path):
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"text": list(range(50))}), tmp_path / "set/train.parquet")
    with pytest.raises(DataError, match=r"gives no document \(no text \(50\)\)"):
        prepare_corpus(arguments(tmp_path, dataset_name=str(tmp_path / "set")))


def test_leftovers_of_killed_processes_go_whatever_their_key(tmp_path):
    leftover = tmp_path / f".{hash_of('old')}.123"
    leftover.mkdir()
    (leftover / "tokens.tmp").write_bytes(b"x")
    cached_entry(tmp_path / "new", lambda folder: (folder / "a").write_text("a") and None, overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["new"]


def test_work_in_progress_of_another_process_stays(tmp_path):
    def write_outer(folder: Path) -> None:
        (folder / "a").write_text("a")
        cached_entry(tmp_path / "inner", lambda inner: (inner / "b").write_text("b") and None, overwrite=False)
        assert folder.exists()

    cached_entry(tmp_path / "outer", write_outer, overwrite=False)
    assert (tmp_path / "outer/a").read_text() == "a"


def test_vocabulary_below_the_alphabet_is_refused_before_reading():
    with pytest.raises(DataError, match="vocab_size must be at least 109"):
        DataArguments(vocab_size=10)


def test_last_row_by_negative_index(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    rows = prepare_corpus(arguments(tmp_path, train_files=[str(tmp_path / "text.txt")])).train_dataset
    np.testing.assert_array_equal(rows[-1]["input_ids"], rows[len(rows) - 1]["input_ids"])
    assert rows[-1]["mask_key"] == rows[len(rows) - 1]["mask_key"]
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize("kind", ["trained", "bert", "bert_cased"])
def test_words_encoded_once_give_the_tokens_of_the_whole(word_pieces, kind):
    backend = word_pieces.backend_tokenizer
    if kind != "trained":
        backend = BertTokenizer(
            vocab=word_pieces.get_vocab(), do_lower_case=kind == "bert", strip_accents=kind == "bert"
        ).backend_tokenizer
    backend = plain_text_tokenizer(backend)
    assert has_independent_words(backend)
    signs = [
        *"abXY09 .,-'\n\t\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000\u200b\ufeff\u0301éÅİßﬁ中😀\ufffd\x00\x7f#",
        "[MASK]",
        " [SEP] ",
    ]
    rng = random.Random(0)
    documents = ["".join(rng.choices(signs, k=60)) for _ in range(2000)]
    documents += ["a" * 150, "word " + "b" * 101 + "\n"]
    expected = [[*encoding.ids, 3] for encoding in backend.encode_batch(documents, add_special_tokens=False)]
    assert tokenize(["", "  \n ", *documents], backend) == (sum(expected, []), [len(tokens) for tokens in expected])


def test_a_full_word_cache_changes_nothing(word_pieces, monkeypatch):
    backend = plain_text_tokenizer(word_pieces.backend_tokenizer)
    expected, _ = tokenize(DOCUMENTS, backend)
    monkeypatch.setattr(tokenizing, "CACHED_WORDS", 5)
    tokenizer = DocumentTokenizer(TokenizingSettings(backend, np.dtype(np.uint16), 3, FilterArguments()))
    parts = [tokenizer(DOCUMENTS[start : start + 7]).tokens for start in range(0, len(DOCUMENTS), 7)]
    assert np.concatenate(parts).tolist() == expected


def test_other_tokenizers_encode_whole_documents():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "\u2581": 2, "\u2581a": 3}, [("\u2581", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    assert not has_independent_words(backend)
    expected = [[*backend.encode(text).ids, 9] for text in ("a b", "b a")]
    assert tokenize(["a b", "b a"], backend, 9) == (sum(expected, []), [len(ids) for ids in expected])
