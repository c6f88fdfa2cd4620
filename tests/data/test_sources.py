"""Text from files of every kind, and what happens to bad ones."""

import csv
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from hf_cram.data.sources import (
    DataError,
    SkipReport,
    expand_files,
    fingerprint_files,
    load_hub_dataset,
    read_files,
    read_hub_dataset,
)

DOCUMENTS = ["The first document.", "The second, with an é and a “quote”.", "The third."]


def read(path, report=None, **options):
    return list(read_files(expand_files([str(path)]), report or SkipReport(), **options))


def write_all_kinds(folder):
    lines = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(DOCUMENTS)) + "\n"
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "d.txt").write_text("\n".join(DOCUMENTS), encoding="utf-8")
    (folder / "e.txt.gz").write_bytes(gzip.compress("\n\n".join(DOCUMENTS).encode()))
    with open(folder / "f.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([["text", "id"], *([text, i] for i, text in enumerate(DOCUMENTS))])
    pq.write_table(pa.table({"id": [0, 1, 2], "text": DOCUMENTS}), folder / "g.parquet")
    pq.write_table(pa.table({"text": pa.array(DOCUMENTS, pa.large_string())}), folder / "h.parquet")


def test_every_format_gives_the_same_documents(tmp_path):
    write_all_kinds(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == DOCUMENTS, path.name
    assert read(tmp_path) == DOCUMENTS * 8
    assert read(f"{tmp_path}/*.jsonl*") == DOCUMENTS * 3


def test_documents_between_blank_lines(tmp_path):
    path = tmp_path / "poems.txt"
    path.write_text("one\ntwo\n\n\nthree\n \nfour", encoding="utf-8")
    documents = read(path, text_file_documents="blank_line")
    assert [document.split() for document in documents] == [["one", "two"], ["three"], ["four"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: it is empty"),
        ("blank.txt", b"\n \n\n", "blank.txt: it is empty"),
        ("latin.txt", "Übergrößenträger\nÄrger\n".encode("latin-1"), "latin.txt: none of its 2 documents .*UTF-8"),
        ("a.jsonl", b'{"txt": "x"}\n', r"a.jsonl: no column 'text'; did you mean 'txt'\? \(columns: txt\)"),
        ("list.json", b'["a", "b"]', "list.json: none of its 1 documents .*JSON object"),
        ("broken.jsonl", b"{oops\n", "broken.jsonl: none of its 1 documents .*not valid JSON"),
        ("a.csv", b"body,id\nx,1\n", "a.csv: no column 'text'.*body, id"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-20], "cut.jsonl.gz: cannot be read"),
        ("bad.jsonl.zst", b"no zstd at all", "bad.jsonl.zst: cannot be read"),
        ("bad.parquet", b"no parquet at all", "bad.parquet: cannot be read"),
        ("picture.png", b"x", "picture.png: unknown format"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_parquet_without_the_column_or_with_numbers(tmp_path):
    pq.write_table(pa.table({"texts": ["a"], "number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text'; did you mean 'texts'\?"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'number' is int64, not text"):
        read(tmp_path / "a.parquet", text_column="number")


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        expand_files([str(tmp_path / "missing.txt")])
    with pytest.raises(DataError, match="holds no text file"):
        expand_files([str(tmp_path)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(DataError, match=r"secret\.txt: cannot be read \(Permission denied\)"):
        read(path)


def test_a_folder_in_place_of_a_file_that_vanishes(tmp_path):
    path = tmp_path / "gone.txt"
    path.write_text("x")
    files = expand_files([str(path)])
    path.unlink()
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read \(No such file"):
        list(read_files(files, SkipReport()))


def test_single_bad_documents_are_skipped_and_counted(tmp_path):
    path = tmp_path / "mixed.jsonl"
    lines = [b'{"text": "good"}', b'{"text": 5}', b"{oops", b'{"text": "\xff"}', b'{"text": "too long a text"}', b"[]"]
    path.write_bytes(b"\n".join(lines))
    report = SkipReport()
    assert read(path, report, max_document_characters=10) == ["good"]
    assert report.counts.total() == 5
    assert report.first_places["not valid JSON"] == f"{path}:3"
    assert report.first_places["not valid UTF-8"] == f"{path}:4"


def test_one_line_of_50_megabytes_is_skipped_without_being_held(tmp_path):
    import tracemalloc

    path = tmp_path / "long.txt"
    with open(path, "wb") as stream:
        stream.write(b"before\n")
        for _ in range(50):
            stream.write(b"word " * 200_000)
        stream.write(b"\nafter\n")
    report = SkipReport()
    tracemalloc.start()
    assert read(path, report, max_document_characters=1_000_000) == ["before", "after"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.counts.total() == 1
    assert report.first_places == {"longer than the limit (max_document_characters)": f"{path}:2"}
    assert peak < 20e6


def test_fingerprint_is_of_content_alone(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("same")
    second.write_text("same")
    before = fingerprint_files([first])
    os.utime(first, (0, 0))
    assert fingerprint_files([first]) == before == fingerprint_files([second])
    first.write_text("else")
    assert fingerprint_files([first]) != before
    assert fingerprint_files([first, second]) != fingerprint_files([second, first])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_laid_out_like_a_hub_data_set(tmp_path, streaming, monkeypatch):
    folder = tmp_path / "corpus"
    (folder / "english").mkdir(parents=True)
    pq.write_table(pa.table({"text": DOCUMENTS}), folder / "english" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: english\n  data_files:\n  - split: train\n    path: english/train-*\n---\n"
    )
    dataset = load_hub_dataset(str(folder), "english", "train", None, "text", streaming)
    assert list(read_hub_dataset(dataset, "corpus", SkipReport(), "text", 1000)) == DOCUMENTS
    with pytest.raises(DataError, match="no column 'body'"):
        load_hub_dataset(str(folder), "english", "train", None, "body", streaming)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_hub_dataset(str(folder), "german", "train", None, "text", streaming)


def test_a_data_set_that_cannot_be_had():
    with pytest.raises(DataError, match="'nobody/nothing'.*cannot be loaded"):
        load_hub_dataset("nobody/nothing", None, "train", None, "text", False)
