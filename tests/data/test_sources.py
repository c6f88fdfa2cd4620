"""Text from files of every kind, and what happens to bad ones."""

import csv
import gzip
import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import REPOSITORY
from datasets import Dataset, IterableDataset
from httpx2 import TimeoutException

from hf_cram.data import steps
from hf_cram.data.errors import DataError, SkipReport
from hf_cram.data.hub_datasets import fingerprint_folder, load_hub_dataset, read_hub_dataset
from hf_cram.data.input_files import expand_files, fingerprint_files
from hf_cram.data.pipeline import DataArguments
from hf_cram.data.source_arguments import SourceArguments
from hf_cram.data.sources import TextSource
from hf_cram.data.text_files import read_files
from hf_cram.recipes import RecipeParser

TEXT_RECIPES = sorted((REPOSITORY / "training_args" / "text").glob("*.yaml"))
DCLM_FOLDER = "filtered/OH_eli5_vs_rw_v2_bigram_200k_train/fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train/processed_data"
COSMOPEDIA = (
    "auto_math_text",
    "khanacademy",
    "openstax",
    "stanford",
    "stories",
    "web_samples_v1",
    "web_samples_v2",
    "wikihow",
)
DOCUMENTS = ["The first document.", "The second, with an é and a “quote”.", "The third."]


def read(path, report=None, **options):
    return list(read_files(expand_files([str(path)]), report or SkipReport(), **options))


def readme(configurations):
    """The card of a data set whose configurations each have a pattern of training files."""
    lines = ["---", "license: other", *(["configs:"] if configurations else [])]
    for name, pattern in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {pattern}"]
    return "\n".join([*lines, "---", "# Card", ""])


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


def test_a_whole_file_is_a_document(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name}, first line\n\nsecond\n", encoding="utf-8")
    assert read(tmp_path, text_file_documents="file") == [
        f"{name}, first line\n\nsecond\n" for name in ("a.txt", "b.txt")
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.csv", "a.jsonl"])
def test_the_mark_of_utf_8_is_no_text(tmp_path, name):
    content = {".csv": "text\nA text.", ".jsonl": '{"text": "A text."}'}.get(Path(name).suffix, "A text.")
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(content.encode("utf-8-sig")))
    assert read(tmp_path / name) == ["A text."]


def test_rows_of_a_csv_file_that_lack_quotes_are_counted(tmp_path):
    path, report = tmp_path / "a.csv", SkipReport()
    path.write_text("id,text\n1,Hello, world\n2,plain\n3,with a comma behind it,\n")
    assert list(read_files([path], report)) == ["plain", "with a comma behind it"]
    assert report.counts == {"more fields than the header names: quote texts that hold commas": 1}


def test_stray_nul_characters_do_no_harm(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One line with a single NUL\0 in it.\n" + "T\0w\0o\0\n")
    assert read(path) == ["One line with a single NUL\0 in it."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: it is empty"),
        ("utf16.txt", ("Привет, мир\n" * 50).encode("utf-16"), "utf16.txt: it is UTF-16: convert it to UTF-8"),
        ("utf16.csv", "text\nПривет\n".encode("utf-16"), "utf16.csv: it is UTF-16: convert it to UTF-8"),
        ("le.txt", ("Привет, мир\n" * 50).encode("utf-16-le"), "le.txt: none of its 51 documents .*NUL characters"),
        ("b.csv", b"text;label\nHello, world;1\n", "b.csv: its fields are separated by ';': write it with commas"),
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

    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read \(No such file"):
        read(tmp_path)
    for name in ("x" * 300, "~nobody-of-this-name/a.txt"):
        with pytest.raises(DataError, match="cannot be read") as caught:
            expand_files([name])
        assert "\n" not in str(caught.value)


@pytest.fixture
def closed_folder():
    """A folder that a user without rights can enter, with one inside that it cannot; as root the test is that user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "open.txt").write_text("x")
        (folder / "closed").mkdir()
        (folder / "closed" / "secret.txt").write_text("x")
        (folder / "secret.txt").write_text("x")
        for path in (folder / "closed", folder / "secret.txt"):
            path.chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield folder
        if is_root:
            os.seteuid(0)
        (folder / "closed").chmod(0o700)


def test_what_is_closed_to_us_is_one_line_and_not_left_out(closed_folder):
    for path, fault in (
        (closed_folder / "secret.txt", r"secret\.txt"),
        (closed_folder / "closed" / "secret.txt", "secret.txt"),
        (closed_folder, "closed"),
        (closed_folder / "**" / "*.txt", "closed"),
        (closed_folder / "**", "closed"),
        (closed_folder / "*" / "*.txt", "closed"),
        (closed_folder / "*" / "secret.txt", "closed/secret.txt"),
    ):
        with pytest.raises(DataError, match=rf"{fault}: cannot be read \(Permission denied\)"):
            read(path)
    with pytest.raises(DataError, match=r"closed: cannot be read \(Permission denied\)"):
        fingerprint_folder(closed_folder)


@pytest.mark.parametrize("files", [[], [""], "", ["a.txt", " "]])
def test_no_files_are_not_the_documentation_and_an_empty_name_is_not_this_folder(files):
    with pytest.raises(DataError, match="train_files is empty or holds an empty name"):
        SourceArguments(train_files=files)
    with pytest.raises(DataError, match="source 'a': .*train_files"):
        SourceArguments(sources={"a": {"train_files": files}})


def test_one_file_may_be_named_without_a_list():
    assert SourceArguments(train_files="a.txt").train_files == ["a.txt"]


def test_names_that_cannot_be(tmp_path):
    with pytest.raises(DataError, match="dataset_name is empty"):
        SourceArguments(dataset_name=" ")
    arguments = SourceArguments(dataset_name="x" * 300)
    assert arguments.hub_names == []
    with pytest.raises(DataError, match="cannot be loaded"):
        TextSource(arguments, tmp_path)


def test_norwegian_is_what_yaml_takes_for_false(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: some/set\ndataset_config_name: no\n")
    (arguments,) = RecipeParser((DataArguments,)).parse([str(tmp_path / "recipe.yaml")])
    assert arguments.dataset_config_name == "no"
    with pytest.raises(DataError, match="dataset_config_name must be text .in quotes, since YAML"):
        SourceArguments(sources={"a": {"dataset_name": "some/set", "dataset_config_name": False}})


def test_hashing_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_bytes(b"x" * 3_000_000)
    fingerprint_files([tmp_path / "a.txt"])
    assert "hashing" not in capsys.readouterr().err  # done at once
    monkeypatch.setattr(steps, "SECONDS_WITHOUT_BAR", 0)
    fingerprint_files([tmp_path / "a.txt"])
    assert re.search(r"hashing files: 100%.*3\.00M/3\.00M", capsys.readouterr().err)


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


def test_the_same_bytes_read_otherwise_are_another_text(tmp_path):
    plain, compressed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    for path in (plain, compressed):
        path.write_bytes(gzip.compress(b"text"))
    assert fingerprint_files([plain]) != fingerprint_files([compressed])


def test_what_a_folder_holds_besides_is_said(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("A text.\n")
    assert expand_files([str(tmp_path)]) == [tmp_path / "a.txt"]
    assert not caplog.messages
    for name in ("b.jsonl.bz2", "c.txt.bz2", "d.pdf", "NOTES", "e.tar.gz", "f.jsonl.gz"):
        (tmp_path / name).touch()
    assert expand_files([str(tmp_path)]) == [tmp_path / "a.txt", tmp_path / "f.jsonl.gz"]
    assert caplog.messages == [f"{tmp_path}: 5 files of no known format are passed over (.bz2, .gz, .pdf, NOTES)"]
    (tmp_path / ".trash").mkdir()
    for name in (".trash/b.txt", "._a.txt"):
        (tmp_path / name).write_text("Thrown away.\n")
    caplog.clear()
    assert expand_files([str(tmp_path)]) == [tmp_path / "a.txt", tmp_path / "f.jsonl.gz"]
    (tmp_path / ".closed").mkdir(mode=0)
    caplog.clear()
    assert expand_files([str(tmp_path)]) == [tmp_path / "a.txt", tmp_path / "f.jsonl.gz"]
    assert caplog.messages[1:] == [f"{tmp_path}: 3 hidden files and folders are passed over"]
    (tmp_path / "e.parquet.gz").touch()
    with pytest.raises(DataError, match=r"e.parquet.gz: parquet is compressed within: unpack the file"):
        expand_files([str(tmp_path)])


def test_all_empty_files_are_told_at_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "d.txt").write_text("A text.\n")
    with pytest.raises(DataError, match=r"^3 files are empty: .*a\.txt, .*b\.txt, .*c\.jsonl: remove them"):
        expand_files([str(tmp_path)])


def test_the_name_of_many_files_is_short_and_can_be_written():
    name = SourceArguments(
        train_files=["texts/Gr\udcfc\udcdfe.txt", *(f"{index}.txt" for index in range(500))]
    ).source_name
    assert name == r"Gr\udcfc\udcdfe.txt, 0.txt and 499 more"


def test_a_text_in_the_current_folder_is_named_after_that(tmp_path, monkeypatch):
    (tmp_path / "letters").mkdir()
    monkeypatch.chdir(tmp_path / "letters")
    assert SourceArguments(train_files=["."]).source_name == "letters"


def test_folders_are_followed_through_links_and_not_in_circles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("by a link")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("here")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert read(folder) == ["here", "by a link"]
    before = fingerprint_folder(folder)
    (tmp_path / "elsewhere" / "b.txt").write_text("another text")
    assert fingerprint_folder(folder) != before


def test_a_folder_with_the_name_of_a_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "train.txt").write_text("of the current folder")
    with pytest.raises(DataError, match="dataset_name: 'text' is a format, not a data set"):
        load_hub_dataset("text", None, "train", None, "text", True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("of the folder")
    dataset = load_hub_dataset("text", None, "train", None, "text", True)
    assert list(read_hub_dataset(dataset, "text", SkipReport(), "text", 1000)) == ["of the folder"]


def test_a_card_that_is_no_yaml_is_one_line(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs: a: b\n---\n")
    (tmp_path / "train.txt").write_text("text")
    with pytest.raises(DataError, match="cannot be loaded: "):
        load_hub_dataset(str(tmp_path), None, "train", None, "text", True)


def test_a_data_set_written_by_save_to_disk_names_the_way_out(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="cannot be loaded: it was written by save_to_disk; write it by to_parquet"):
        load_hub_dataset(str(tmp_path / "saved"), None, "train", None, "text", False)


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


@pytest.mark.parametrize("streaming", [False, True])
def test_other_text_in_a_folder_of_that_name_is_read_anew(tmp_path, streaming):
    """The card and the folder's name are the same: `datasets` keeps its copy by these."""
    for place, texts in (("first", ["One."]), ("second", ["Two."]), ("second", ["Two.", "Three."])):
        folder = tmp_path / place / "corpus"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": texts}), folder / "data" / f"train-{len(texts)}.parquet")
        (folder / "README.md").write_text(readme({"default": "data/train-*"}))
        source = TextSource(SourceArguments(dataset_name=str(folder), streaming=streaming), tmp_path)
        assert set(source.documents()) == set(texts)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_inside_a_data_set(tmp_path, streaming):
    folder = tmp_path / "corpus"
    for name, texts in (("english", DOCUMENTS), ("german", ["Anders."])):
        (folder / name / "partial-train").mkdir(parents=True)
        pq.write_table(pa.table({"text": texts}), folder / name / "partial-train" / "0000.parquet")
    dataset = load_hub_dataset(str(folder), None, "train", None, "text", streaming, data_dir="english")
    assert list(read_hub_dataset(dataset, "corpus", SkipReport(), "text", 1000)) == DOCUMENTS
    with pytest.raises(DataError, match="cannot be loaded"):
        load_hub_dataset(str(folder), None, "train", None, "text", streaming, data_dir="french")


def test_configuration_and_folder_are_part_of_the_identity(tmp_path):
    folder = tmp_path / "corpus"
    for name in ("english", "german"):
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.table({"text": [name]}), folder / name / "train-0.parquet")
    (folder / "README.md").write_text(readme({name: f"{name}/train-*" for name in ("english", "german")}))
    choices = [{"dataset_config_name": "english"}, {"dataset_config_name": "german"}, {"dataset_data_dir": "german"}]
    sources = [
        TextSource(SourceArguments(dataset_name=str(folder), streaming=True, **choice), tmp_path) for choice in choices
    ]
    assert [list(source.documents()) for source in sources] == [["english"], ["german"], ["german"]]
    assert len({source.identity for source in sources}) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_data_set_is_one_clear_line(tmp_path, streaming):
    folder = tmp_path / "corpus"
    folder.mkdir()
    content = b"".join(b'{"text": "%d %s"}\n' % (number, os.urandom(99).hex().encode()) for number in range(999))
    (folder / "train-0.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "train-1.jsonl.gz").write_bytes(gzip.compress(content)[:-2000])
    with pytest.raises(DataError, match="data set .*corpus.*(reading it failed|cannot be loaded)") as caught:  # noqa: PT012
        source = TextSource(SourceArguments(dataset_name=str(folder), streaming=streaming), tmp_path)
        list(source.documents())
    assert "\n" not in str(caught.value)


def test_a_stream_that_shows_its_columns_late():
    dataset = IterableDataset.from_generator(lambda: iter([{"text": "one"}, {"body": "two"}]))
    documents = read_hub_dataset(dataset, "corpus", SkipReport(), "text", 1000)
    assert next(documents) == "one"
    with pytest.raises(DataError, match="data set 'corpus': no column 'text': set text_column"):
        next(documents)


def test_a_data_set_that_needs_code_names_the_way_out(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "corpus.py").write_text("raise SystemExit('this code has run')\n")
    with pytest.raises(DataError, match="scripts are no longer supported.*dataset_revision: refs/convert/parquet"):
        load_hub_dataset(str(folder), None, "train", None, "text", True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_without_text_is_an_error(tmp_path, streaming):
    folder = tmp_path / "corpus"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["", None, " "]}), folder / "train.parquet")
    source = TextSource(SourceArguments(dataset_name=str(folder), streaming=streaming), tmp_path)
    with pytest.raises(DataError, match=r"gives no document \(no text \(1\)\)"):
        list(source.documents())


# How the Hub's data sets look: the files of the text that a recipe reads, others beside them that it must not read, and
# the configurations of their card.
HUB_LAYOUTS = {
    "allenai/c4": (
        {"en": "en/c4-train.*.json.gz", "realnewslike": "realnewslike/c4-train.*.json.gz"},
        ["en/c4-train.00000-of-01024.json.gz", "en/c4-train.00001-of-01024.json.gz"],
        ["en/c4-validation.00000-of-00008.json.gz", "realnewslike/c4-train.00000-of-00512.json.gz"],
    ),
    "wikimedia/wikipedia": (
        {"20231101.ab": "20231101.ab/train-*", "20231101.en": "20231101.en/train-*"},
        ["20231101.en/train-00000-of-00041.parquet", "20231101.en/train-00001-of-00041.parquet"],
        ["20231101.ab/train-00000-of-00001.parquet"],
    ),
    "lucadiliello/bookcorpusopen": ({}, ["data/train-00000-of-00014-0123456789abcdef.parquet"], []),
    "monology/pile-uncopyrighted": (
        {}, ["train/00.jsonl.zst", "train/01.jsonl.zst"], ["val.jsonl.zst", "test.jsonl.zst"]
    ),
    "EleutherAI/the_pile_deduplicated": ({}, ["data/train-00000-of-01650-f70471ee3deb09c0.parquet"], []),
    "oscar-corpus/oscar": (
        {},
        ["unshuffled_deduplicated_en/partial-train/0000.parquet", "unshuffled_deduplicated_en/partial-train/0001.parquet"],
        ["unshuffled_deduplicated_af/train/0000.parquet", "unshuffled_original_en/partial-train/0000.parquet"],
    ),
    "vietgpt/openwebtext_en": ({}, ["data/train-00000-of-00080-0123456789abcdef.parquet"], []),
    "HuggingFaceFW/fineweb-edu": (
        {"default": "data/*/*", "sample-10BT": "sample/10BT/*", "sample-100BT": "sample/100BT/*"},
        ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"],
        ["data/CC-MAIN-2013-20/train-00000-of-00014.parquet", "sample/100BT/000_00000.parquet"],
    ),
    "mlfoundations/dclm-baseline-1.0-parquet": (
        {},
        [f"{DCLM_FOLDER}/global-shard_01_of_10/local-shard_0_of_10/shard_0000000{number}_processed.parquet"
         for number in range(2)],
        [f"{DCLM_FOLDER}/global-shard_01_of_10/local-shard_1_of_10/shard_00000000_processed.parquet"],
    ),
    "HuggingFaceTB/cosmopedia": (
        {name: f"data/{name}/train-*" for name in COSMOPEDIA},
        [f"data/{name}/train-00000-of-00001.parquet" for name in COSMOPEDIA],
        [],
    ),
}  # fmt: skip


def write_hub_layout(folder, name):
    configurations, wanted, others = HUB_LAYOUTS[name]
    for path in [*wanted, *others]:
        rows = [{"text": f"{'Wanted' if path in wanted else 'Unwanted'} {path} {row}", "url": "x"} for row in range(3)]
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if path.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), folder / path)
        else:
            (folder / path).write_bytes(gzip.compress(lines) if path.endswith(".gz") else zstandard.compress(lines))
    (folder / "README.md").write_text(readme(configurations))
    return {f"Wanted {path} {row}" for path in wanted for row in range(3)}


@pytest.mark.parametrize("recipe", TEXT_RECIPES, ids=lambda path: path.stem)
def test_a_hub_recipe_reads_a_folder_that_looks_like_its_data_set(tmp_path, recipe):
    (arguments,) = RecipeParser((DataArguments,)).parse([str(recipe)])
    wanted = set()
    folders = {}
    for name in arguments.hub_names:
        folders[name] = tmp_path / name
        wanted |= write_hub_layout(folders[name], name)
    if arguments.sources is None:
        local = replace(arguments, dataset_name=str(folders[arguments.dataset_name]))
    else:
        sources = {
            name: {**values, "dataset_name": str(folders[values["dataset_name"]])}
            for name, values in arguments.sources.items()
        }
        local = replace(arguments, sources=sources)
    source = TextSource(local, tmp_path / "cache")
    documents = list(source.documents())
    assert set(documents) == wanted
    assert len(documents) == len(wanted)
    assert not source.report.counts


@pytest.mark.parametrize("recipe", TEXT_RECIPES, ids=lambda path: path.stem)
def test_a_hub_recipe_streams_and_has_no_network_here(tmp_path, recipe):
    (arguments,) = RecipeParser((DataArguments,)).parse([str(recipe)])
    assert all(source.streaming for source in arguments.named_sources().values())
    with pytest.raises(DataError, match="cannot be loaded"):
        TextSource(arguments, tmp_path)


def test_a_data_set_that_cannot_be_had():
    with pytest.raises(DataError, match="'nobody/nothing'.*cannot be loaded"):
        load_hub_dataset("nobody/nothing", None, "train", None, "text", False)


def test_settings_that_a_source_has_no_use_for_are_told(tmp_path, monkeypatch, caplog):
    by_blank_line = {"dataset_name": "some/set", "text_file_documents": "blank_line"}
    for values in (by_blank_line, {"sources": {"a": by_blank_line}}):
        with pytest.raises(
            DataError, match="text_file_documents: .*'some/set' are read by lines: name them by train_f"
        ):
            TextSource(SourceArguments(**values), tmp_path)
    monkeypatch.setattr("hf_cram.data.sources.fingerprint_installed", lambda: "0" * 24)
    monkeypatch.setattr("hf_cram.data.sources.read_installed_docs", lambda **_: iter(["A document."]))
    TextSource(SourceArguments(dataset_config_name="en", dataset_revision="v1"), tmp_path)
    assert "No data set is named, and dataset_config_name, dataset_revision does nothing" in caplog.text
    # What a mix says for all counts where it can.
    sources = {"a": {"dataset_name": "b/c"}, "d": {"train_files": ["e.txt"]}}
    mixed = SourceArguments(sources=sources, text_file_documents="blank_line").named_sources()
    assert [source.text_file_documents for source in mixed.values()] == ["line", "blank_line"]


def test_files_of_git_and_of_the_hubs_client_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    before = fingerprint_folder(tmp_path)
    for name in (".git/FETCH_HEAD", ".cache/huggingface/download/a.txt.metadata", "data/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("another moment")
        assert fingerprint_folder(tmp_path) == before
    (tmp_path / ".hidden.txt").write_text("text")  # which a card may name
    assert fingerprint_folder(tmp_path) != before


def test_a_folder_of_several_formats_says_so(tmp_path, caplog):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("A document.\n")
    TextSource(SourceArguments(dataset_name=str(folder)), tmp_path)
    assert "several formats" not in caplog.text
    (folder / "c.jsonl").write_text('{"text": "Another one."}\n')
    source = TextSource(SourceArguments(dataset_name=str(folder)), tmp_path)
    assert "holds files of several formats (.jsonl, .txt)" in caplog.text
    assert list(source.documents()) == 2 * ["A document."]  # as the warning says


def test_a_damaged_archive_is_one_line(tmp_path):
    (tmp_path / "corpus.zip").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match="cannot be loaded: ") as caught:
        TextSource(SourceArguments(dataset_name=str(tmp_path)), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_copy_of_text_that_changed_while_it_was_copied_is_not_kept(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text(readme({"all": "a.txt"}))
    (folder / "a.txt").write_text("The first text.\n")
    fingerprint = fingerprint_folder(folder)

    def load_changed(*arguments, **options):
        (folder / "a.txt").write_text("Quite another text.\n")
        return load_hub_dataset(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("hf_cram.data.sources.load_hub_dataset", load_changed)
        with pytest.raises(DataError, match="a.txt: it has changed since this run began"):
            TextSource(SourceArguments(dataset_name=str(folder)), tmp_path)
    (folder / "a.txt").write_text("The first text.\n")
    assert fingerprint_folder(folder) == fingerprint
    source = TextSource(SourceArguments(dataset_name=str(folder)), tmp_path)
    assert list(source.documents()) == ["The first text."]


def test_text_of_the_hub_is_known_by_its_revision(monkeypatch):
    """Streamed: by the commit, asked for before and after it is opened. Another revision or data set is another text."""
    stream = IterableDataset.from_generator(lambda: iter([{"text": "A document."}]))
    opened, asked = [], []

    def load(name, config, **options):
        opened.append((name, config, options["revision"]))
        return stream

    def look_up(self, name, revision=None, timeout=None):
        asked.append(name)
        if len(asked) == 1:
            raise TimeoutException("no answer")
        return SimpleNamespace(sha=f"{name} at {revision}")

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", look_up)
    monkeypatch.setattr("hf_cram.hub_errors.RETRY_SECONDS", (0.01,))
    identities = {
        TextSource(
            SourceArguments(dataset_name=name, dataset_revision=revision, streaming=True), Path("unused")
        ).identity
        for name, revision in (("a/b", None), ("a/b", "v1"), ("a/c", None))
    }
    assert opened == [("a/b", None, None), ("a/b", None, "v1"), ("a/c", None, None)]
    assert len(identities) == 3
    assert asked == ["a/b"] * 3 + ["a/b"] * 2 + ["a/c"] * 2  # before and after, and once in vain
    answers = iter(("one commit", "another"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: SimpleNamespace(sha=next(answers)))
    with pytest.raises(DataError, match="data set 'a/b': it has changed since this run began"):
        TextSource(SourceArguments(dataset_name="a/b", streaming=True), Path("unused"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: never_answered())
    with pytest.raises(DataError, match="data set 'a/b' cannot be loaded: the Hub cannot be reached"):
        TextSource(SourceArguments(dataset_name="a/b", streaming=True), Path("unused"))


def never_answered():
    raise TimeoutException("no answer")


def test_what_is_of_a_data_set_does_not_change_the_text_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("A document.")
    alone = {"train_files": [str(tmp_path / "a.txt")]}
    left_over = {
        "dataset_config_name": "en",
        "dataset_split": "all",
        "dataset_revision": "v1",
        "dataset_data_dir": "x",
    }
    identities = {TextSource(SourceArguments(**alone, **more), tmp_path).identity for more in ({}, left_over)}
    assert len(identities) == 1
