"""A prepared corpus as a folder and on a Hub on the loopback interface, and training rows out of both."""

import errno
import hashlib
import json
import math
import re
import shlex
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import REPOSITORY
from datasets import Dataset, load_dataset
from forked_calls import forked_calls, logged_in_environment
from hub_server import CUT, TOKEN, Fault, Repository, running_hub
from huggingface_hub import DatasetCard

from hf_cram.data import export, publish
from hf_cram.data.cache import cached_entry
from hf_cram.data.data_card import build_data_card, size_category
from hf_cram.data.errors import DataError
from hf_cram.data.export import export_corpus
from hf_cram.data.pipeline import DataArguments, open_corpus, prepare_corpus
from hf_cram.data.publish import PublishArguments, publish_if_asked
from hf_cram.data.published import find_published_corpus, row_settings, without_folders
from hf_cram.recipes import RecipeParser
from hf_cram.script_args import RECIPE_PARTS, check_row_length
from hf_cram.training_args import CramTrainingArguments

LENGTH = 16
WORDS = [
    "the",
    "old",
    "man",
    "saw",
    "a",
    "boat",
    "near",
    "house",
    "and",
    "went",
    "home.",
    "by",
    "night",
    "with",
    "his",
]

# The waits between attempts are cut short.
DRIVER = """
import huggingface_hub.constants, huggingface_hub.utils._http as client
import datasets, matplotlib.figure, matplotlib.backends.backend_agg
from pathlib import Path
from hf_cram import hub_errors
from hf_cram.data import publish, published
from hf_cram.data.errors import DataError
from hf_cram.data.pipeline import DataArguments, open_corpus
hub_errors.RETRY_SECONDS, hub_errors.SILENCE_SECONDS = (0.05, 0.1), 2.0
client.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.01))})

def push_as_asked(directory, length, given, data_given):
    asked = publish.PublishArguments(**given)
    return publish.publish_if_asked(open_corpus(Path(directory), length, True), asked, DataArguments(**data_given))

def push(directory, length, repo_id, **options):
    return publish.publish_corpus(open_corpus(Path(directory), length, True), repo_id, **options)

def load(name, target, revision=None):
    corpus = published.find_published_corpus(name, revision=revision)
    if corpus is None:
        return "no corpus"
    Path(target).mkdir()
    corpus.write(Path(target))
    return corpus.max_seq_length

def download_none(name):
    published._download = lambda *_: exit("all of it is downloaded")
    return published.find_published_corpus(name)

def rows(name, target):
    import numpy
    for split, dataset in datasets.load_dataset(name).items():
        numpy.array(dataset["input_ids"], dtype=numpy.uint16).tofile(f"{target}.{split}")
    return str(dataset.features)

def run(job):
    for module in (huggingface_hub.constants, datasets.config):
        setattr(module, "ENDPOINT" if module is huggingface_hub.constants else "HF_ENDPOINT", job["endpoint"])
    huggingface_hub.constants.HF_HUB_OFFLINE = job["offline"]
    try:
        result = {"value": globals()[job["call"]](*job["values"], **job["options"])}
    except DataError as error:
        result = {"error": str(error)}
    Path(job["log"] + ".json").write_text(json.dumps(result))
    return 0
"""


@pytest.fixture(scope="module")
def server():
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def call(server, tmp_path_factory):
    """Calls a function of the driver in a process that is logged in at the server; returns its value or its error."""
    environment = logged_in_environment(server.url, TOKEN, tmp_path_factory.mktemp("home"))
    with forked_calls(DRIVER, environment, tmp_path_factory.mktemp("logs")) as call_forked:

        def call_function(name, *values, endpoint=server.url, offline=False, **options):
            values = [str(value) if isinstance(value, Path) else value for value in values]
            _, log = call_forked(call=name, values=values, options=options, endpoint=endpoint, offline=offline)
            text = log.read_text()
            assert TOKEN not in text
            assert log.with_suffix(".log.json").exists(), text[-3000:]
            result = json.loads(log.with_suffix(".log.json").read_text())
            return result.get("value", result.get("error"))

        yield call_function


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private_place")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, rng.integers(5, 40))) + f" {index}" for index in range(600)]
    lines += ["short one"] * 7
    (folder / "text.txt").write_text("\n".join(lines))
    return DataArguments(
        train_files=[str(folder / "text.txt")], vocab_size=150, max_seq_length=LENGTH, eval_rows=20,
        drop_below_characters=12, row_order="sentence_length", cache_dir=str(folder / "cache"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(arguments):
    return prepare_corpus(arguments)


@pytest.fixture(scope="module")
def options(arguments):
    return {"settings": row_settings(arguments), "language": "en", "license_name": "cc0-1.0"}


@pytest.fixture(scope="module")
def folder(corpus, options, tmp_path_factory):
    """The corpus exported."""
    folder = tmp_path_factory.mktemp("export") / "corpus"
    export_corpus(corpus, folder, **options)
    return folder


@pytest.fixture(scope="module")
def pushed(call, corpus, options):
    """The address of the corpus on the server."""
    return call("push", corpus.directory, LENGTH, "me/rows", private=True, **options)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the exported corpus to damage."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def heal(server):
    yield
    server.faults.clear()


def load(name, cache):
    """What prepare_corpus does with a published corpus."""
    published = find_published_corpus(str(name))
    directory, from_cache = cached_entry(cache / published.identity, published.write, False)
    return open_corpus(directory, published.max_seq_length, from_cache)


def assert_same(corpus, other):
    assert np.array_equal(corpus.train_dataset.rows, other.train_dataset.rows)
    assert np.array_equal(corpus.eval_dataset.rows, other.eval_dataset.rows)
    assert corpus.train_dataset.rows.dtype == other.train_dataset.rows.dtype
    assert corpus.tokenizer.backend_tokenizer.to_str() == other.tokenizer.backend_tokenizer.to_str()
    assert corpus.tokenizer.special_tokens_map == other.tokenizer.special_tokens_map
    assert corpus.statistics["tokens"] == other.statistics["tokens"]


def test_the_exported_folder_loads_with_the_library_and_trains(corpus, folder, tmp_path):
    splits = load_dataset(str(folder), cache_dir=str(tmp_path / "library"))
    assert np.array_equal(np.array(splits["train"]["input_ids"]), corpus.train_dataset.rows)
    assert np.array_equal(np.array(splits["validation"]["input_ids"]), corpus.eval_dataset.rows)
    assert splits["train"].features["input_ids"].feature.dtype == "uint16"
    assert splits["train"].features["input_ids"].length == LENGTH
    loaded = load(folder, tmp_path)
    assert_same(loaded, corpus)
    assert not loaded.from_cache
    assert load(folder, tmp_path).from_cache


def test_rows_in_many_files_keep_their_order(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 100 * LENGTH * 2)
    monkeypatch.setattr(export, "GROUP_TOKENS", 30 * LENGTH)
    export_corpus(corpus, tmp_path / "many")
    files = sorted((tmp_path / "many" / "data").glob("train-*"))
    assert len(files) == math.ceil(len(corpus.train_dataset) / 100) > 3
    assert pq.ParquetFile(files[0]).num_row_groups == 4
    assert_same(load(tmp_path / "many", tmp_path / "cache"), corpus)


def test_exporting_again_gives_the_same_bytes(corpus, folder, options, tmp_path):
    export_corpus(corpus, tmp_path / "again", **options)
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    with pytest.raises(DataError, match="is there already: name a new folder"):
        export_corpus(corpus, tmp_path / "again")


def test_what_a_killed_export_has_left_goes(corpus, tmp_path):
    leftover = tmp_path / ".out.unfinished"
    (leftover / "data").mkdir(parents=True)
    export_corpus(corpus, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_that_push_the_same_rows_do_not_take_them_from_each_other(corpus, options, monkeypatch):
    ready, written, uploaded = threading.Event(), [], []
    write_files = publish.write_files

    def write(*arguments):
        written.append(arguments[3])
        write_files(*arguments)

    def upload(folder, name):
        ready.set()
        time.sleep(0.3)
        assert written[-1] == name  # the other one has not begun
        assert (folder / "corpus.json").is_file()
        uploaded.append(name)

    monkeypatch.setattr(publish, "write_files", write)
    monkeypatch.setattr(publish, "with_retries", lambda action, *_: action())
    monkeypatch.setattr(publish.HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(publish, "_is_foreign", lambda name: False)
    monkeypatch.setattr(publish, "_upload", upload)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(publish.publish_corpus, corpus, "me/first", **options)
        assert ready.wait(60)
        publish.publish_corpus(corpus, "me/second", **options)
        first.result()
    assert uploaded == ["me/first", "me/second"]


def test_a_failed_export_leaves_nothing(corpus, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "draw_histogram", full)
    with pytest.raises(DataError, match="cannot be written .No space left on device.: name another folder"):
        export_corpus(corpus, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_card_tells_where_the_rows_come_from(corpus, folder, arguments):
    text = (folder / "README.md").read_text()
    card = DatasetCard(text)
    assert card.data.language == "en"
    assert card.data.license == "cc0-1.0"
    assert card.data.size_categories == ["n<1K" if len(corpus.train_dataset) < 980 else "1K<n<10K"]
    assert [split["split"] for split in card.data.configs[0]["data_files"]] == ["train", "validation"]
    assert {split["name"]: split["num_examples"] for split in card.data.dataset_info["splits"]} == {
        "train": len(corpus.train_dataset), "validation": len(corpus.eval_dataset)
    }  # fmt: skip
    assert f"{len(corpus.train_dataset):,} | {corpus.train_dataset.num_tokens:,}" in text
    assert "too few characters | 7" in text
    assert "row_scores.png" in text
    assert f"--dataset_name PATH_OR_REPOSITORY \\\n    --max_seq_length {LENGTH} --output_dir" in text
    settings = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert settings == {"train_files": ["text.txt"], "vocab_size": 150, "max_seq_length": LENGTH, "eval_rows": 20,
                        "drop_below_characters": 12, "row_order": "sentence_length"}  # fmt: skip
    assert not re.search(r"\{[{%]|None|\n\n\n", text.partition("---\n\n")[2])
    assert (folder / "row_scores.png").read_bytes().startswith(b"\x89PNG")


def test_published_hashes_are_those_of_the_rows(corpus, folder):
    splits = json.loads((folder / "corpus.json").read_text())["splits"]
    for split, rows in (("train", corpus.train_dataset.rows), ("validation", corpus.eval_dataset.rows)):
        column = pq.read_table(sorted((folder / "data").glob(f"{split}-*")))["input_ids"].to_pylist()
        digest = hashlib.sha256(np.array(column, dtype="<u2").tobytes()).hexdigest()
        assert splits[split] == {"rows": len(rows), "sha256": digest}


def test_no_folder_of_this_machine_is_told(folder, arguments):
    private = Path(arguments.train_files[0]).parent
    for path in folder.rglob("*"):
        if path.is_file():
            assert private.name.encode() not in path.read_bytes(), path
            assert b"/tmp/" not in path.read_bytes()
    assert without_folders({"/a/\udcff.txt": 1}) == {"\\udcff.txt": 1}
    told = {"/a/b/text.txt": {"from": "file ~/secret/x.jsonl: bad", "n": 3}, "owner/name": ["a/b", "http://x.y/z/w"]}
    assert without_folders(told) == {
        "text.txt": {"from": "file x.jsonl: bad", "n": 3}, "owner/name": ["a/b", "http://x.y/z/w"]
    }  # fmt: skip


def test_what_is_pushed_is_what_is_exported_and_no_more(pushed, server, folder, corpus):
    assert pushed == f"{server.url}/datasets/me/rows"
    repository = server.repositories["datasets/me/rows"]
    assert repository.private
    assert len(repository.commits) == 2
    exported = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(repository.files) == set(exported)
    for name, path in exported.items():
        content = (
            repository.files[name]
            .replace(b"me/rows", b"PATH_OR_REPOSITORY")
            .replace(b"# rows", b"# PATH_OR_REPOSITORY")
        )
        assert content == path.read_bytes(), name
    for content in [*server.received, *repository.files.values()]:
        assert TOKEN.encode() not in content
    assert not list(corpus.directory.parent.glob("*.export"))


def test_it_loads_from_the_hub_in_another_process(pushed, call, corpus, tmp_path):
    call("rows", "me/rows", tmp_path / "library")
    assert (tmp_path / "library.train").read_bytes() == (corpus.directory / "train.bin").read_bytes()
    assert (tmp_path / "library.validation").read_bytes() == (corpus.directory / "eval.bin").read_bytes()
    assert call("load", "me/rows", tmp_path / "loaded") == LENGTH
    assert_same(open_corpus(tmp_path / "loaded", LENGTH, False), corpus)
    assert call("load", "me/rows", tmp_path / "offline", offline=True) == LENGTH
    assert_same(open_corpus(tmp_path / "offline", LENGTH, False), corpus)


def test_pushing_again_changes_nothing_and_another_corpus_replaces_all(
    pushed, call, server, corpus, options, tmp_path
):
    repository = server.repositories["datasets/me/rows"]
    first, head = dict(repository.files), repository.head
    assert call("push", corpus.directory, LENGTH, "rows", **options) == pushed  # the account's own name is left out
    assert call("push", corpus.directory, LENGTH, "me/rows", **options) == pushed
    assert repository.files == first
    assert repository.head == head
    repository.commit(
        {**first, "data/train-00001-of-00002.parquet": b"of an earlier corpus", "mine.txt": b"x"}, "by hand"
    )
    assert call("push", corpus.directory, LENGTH, "me/rows", **options) == pushed
    assert repository.files == {**first, "mine.txt": b"x"}
    assert call("load", "me/rows", tmp_path / "old", revision=head) == LENGTH


FOREIGN = {
    "texts": {"README.md": b"# Mine", "data/train-00000.parquet": b"x", "tokenizer/tokenizer.json": b"{}"},
    "same name": {"corpus.json": b'{"language": "en"}', "README.md": b"# Mine"},
    "no json": {"corpus.json": b"\xff not json"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_data_set_that_is_not_ours_stays_as_it_is(call, server, corpus, name):
    repository = server.repositories["datasets/me/foreign"] = Repository()
    repository.commit(FOREIGN[name], "by its owner")
    error = call("push", corpus.directory, LENGTH, "me/foreign")
    assert error == (
        "the corpus is not pushed to me/foreign: that is a data set which hf_cram has not made, and it stays as it is: "
        "name another push_corpus_to_hub"
    )
    assert list(repository.commits.values()) == [FOREIGN[name]]
    assert not list(corpus.directory.parent.glob("*.export"))


def test_an_empty_data_set_made_by_hand_is_filled(call, server, corpus):
    repository = server.repositories["datasets/me/empty"] = Repository()
    repository.commit({".gitattributes": b"*.parquet filter=lfs\n"}, "initial commit")
    assert call("push", corpus.directory, LENGTH, "me/empty") == f"{server.url}/datasets/me/empty"
    assert "corpus.json" in repository.files


def test_a_folder_takes_the_same_files_and_training_reads_them(corpus, folder, arguments, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new" / "corpus", tmp_path / "empty"):
        asked = PublishArguments(export_corpus_to=str(target), corpus_language="en", corpus_license="cc0-1.0")
        assert publish_if_asked(corpus, asked, arguments) is None
        assert {path.relative_to(target): path.read_bytes() for path in target.rglob("*") if path.is_file()} == {
            path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
    trained_from = prepare_corpus(DataArguments(dataset_name=str(target), cache_dir=str(tmp_path / "cache")))
    assert_same(trained_from, corpus)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "empty", "new"]
    handed_on = tmp_path / "handed on"  # what the rows were made with goes with them
    publish_if_asked(trained_from, PublishArguments(export_corpus_to=str(handed_on)), DataArguments(dataset_name="x"))
    told, first = (json.loads((place / "corpus.json").read_text()) for place in (handed_on, folder))
    assert told["settings"] == first["settings"]
    shutil.rmtree(handed_on)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    again = PublishArguments(export_corpus_to=str(target))  # a run that goes on has exported already
    assert publish_if_asked(corpus, again, arguments) is None
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_a_folder_that_holds_anything_else_stays_as_it_is(corpus, arguments, copy, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file", "file/below"):
        with pytest.raises(
            DataError, match="is there already: name a new folder|file/below cannot be made in .*/file: name"
        ):
            PublishArguments(export_corpus_to=str(tmp_path / name))
    for name in ("", "x" * 300, "~nobody-of-this-name/rows"):
        with pytest.raises(DataError, match="export_corpus_to|cannot be used"):
            PublishArguments(export_corpus_to=name)
    splits = json.loads((copy / "corpus.json").read_text())
    splits["splits"]["train"]["sha256"] = "0" * 64
    (copy / "corpus.json").write_text(json.dumps(splits))
    asked = PublishArguments(export_corpus_to=str(copy))  # which corpus it holds shows when the rows are there
    with pytest.raises(DataError, match="copy is there already"):
        publish_if_asked(corpus, asked, arguments)
    assert json.loads((copy / "corpus.json").read_text()) == splits


@pytest.mark.parametrize("field", ["dataset_config_name", "dataset_data_dir"])
def test_a_recipe_trains_from_its_own_corpus_whatever_part_its_text_was(corpus, folder, tmp_path, field):
    values = {"dataset_name": str(folder), "cache_dir": str(tmp_path / "cache"), field: "en"}
    assert_same(prepare_corpus(DataArguments(**values)), corpus)


@pytest.mark.parametrize("length", [LENGTH, 1024])
def test_the_command_of_the_card_is_one_that_trains(folder, length):
    """It names a recipe, with positions enough for the rows."""
    description = {**json.loads((folder / "corpus.json").read_text()), "max_seq_length": length}
    card = build_data_card(str(folder), description, {}, "words", None, None)
    (command,) = re.findall(r"python run_mlm_cram\.py (.*?)\n```", card.text, re.DOTALL)
    recipe, *options = shlex.split(command.replace("\\\n", ""))
    parser = RecipeParser((*RECIPE_PARTS, CramTrainingArguments))
    model_args, data_args, *_ = parser.parse([str(REPOSITORY / recipe), *options])
    check_row_length(data_args.max_seq_length, model_args.max_position_embeddings)
    if length == LENGTH:
        find_published_corpus(str(folder)).check_arguments(data_args, parser.given)


def test_norwegian_text_needs_no_quotes():
    assert PublishArguments(corpus_language="False").corpus_language == "no"  # what YAML makes of a bare `no`


def test_the_arguments_of_a_program_push_the_same(pushed, call, server, corpus, arguments):
    given = {
        "push_corpus_to_hub": "asked",
        "private_corpus": True,
        "corpus_language": "en",
        "corpus_license": "cc0-1.0",
    }
    data_given = {name: getattr(arguments, name) for name in row_settings(arguments)}
    assert call("push_as_asked", corpus.directory, LENGTH, given, data_given) == f"{server.url}/datasets/me/asked"
    repository = server.repositories["datasets/me/asked"]
    assert repository.private
    assert repository.files["corpus.json"] == server.repositories["datasets/me/rows"].files["corpus.json"]
    assert call("push_as_asked", corpus.directory, LENGTH, {}, data_given) is None


FAULTS = {
    "token": (Fault("/api/repos/create", 401), "the token is not valid (401): set HF_TOKEN"),
    "forbidden": (Fault("/commit/", 403), "the token may not write to me/faulty (403"),
    "missing": (Fault("/preupload/", 404), "there is no me/faulty at main that the token can see (404)"),
    "busy": (Fault("/commit/", 429), "the Hub asks for fewer requests (429)"),
    "broken": (Fault("/preupload/", 500), "the Hub answers 500"),
    "cut": (Fault("/storage/", CUT), "the Hub cannot be reached ("),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("missing", "broken") else []) for name in FAULTS]
)
def test_a_push_that_fails_is_one_line(call, server, corpus, heal, name):
    fault, message = FAULTS[name]
    server.large.clear()
    server.repositories.pop("datasets/me/faulty", None)
    server.faults.append(fault)
    error = call("push", corpus.directory, LENGTH, "me/faulty")
    assert error.startswith("the corpus is not pushed to me/faulty: ")
    assert message in error
    assert "\n" not in error
    assert not list(corpus.directory.parent.glob("*.export"))


def test_a_passing_fault_is_waited_out(call, server, corpus, heal):
    fault = Fault("/commit/", 429, times=1, headers={"Retry-After": "0"})
    server.faults.append(fault)
    assert call("push", corpus.directory, LENGTH, "me/patient") == f"{server.url}/datasets/me/patient"
    assert fault.times == 0


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [("/data/", 403, "the token may not read me/rows (403): ask for access"), ("/data/", 500, "the Hub answers 500")],
)
def test_a_download_that_fails_is_one_line(pushed, call, server, heal, tmp_path, path, status, message):
    repository = server.repositories["datasets/me/rows"]
    repository.commit({**repository.files, "mine.txt": str(tmp_path).encode()}, "a commit that no cache has")
    for name, content in repository.files.items():
        repository.files[name] = content + (b" " if name.endswith(".parquet") else b"")
    server.faults.append(Fault(path, status))
    error = call("load", "me/rows", tmp_path / "target")
    assert error.startswith("data set 'me/rows' cannot be downloaded: ")
    assert message in error
    assert "\n" not in error


def test_without_a_hub_it_says_so(call, corpus):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        error = call("push", corpus.directory, LENGTH, "me/nowhere", endpoint=endpoint)
    assert f"the Hub cannot be reached ([Errno {errno.ECONNREFUSED}] Connection refused)" in error


def test_text_is_no_corpus(call, server, tmp_path):
    (tmp_path / "text").mkdir()
    Dataset.from_dict({"text": ["a boat"], "input_ids": [[1, 2]]}).to_parquet(tmp_path / "text" / "train.parquet")
    assert find_published_corpus(str(tmp_path / "text")) is None
    assert find_published_corpus(str(tmp_path / "nothing there")) is None
    assert call("load", "me/absent", tmp_path / "target") == "no corpus"


def test_rows_without_a_tokenizer_are_refused_before_they_are_downloaded(call, server, tmp_path):
    Dataset.from_dict({"input_ids": [[1, 2]]}).to_parquet(tmp_path / "train.parquet")
    repository = server.repositories["datasets/me/tokenized"] = Repository()
    repository.commit({"train.parquet": (tmp_path / "train.parquet").read_bytes()}, "rows")
    error = call("download_none", "me/tokenized")
    assert (
        error
        == "data set 'me/tokenized': its rows have no tokenizer beside them (tokenizer/tokenizer.json): add that of the rows"
    )


@pytest.mark.parametrize("content", ['{"id": 1}\n{"id": 2}\n', "[]", '{"documents": []}'])
def test_a_text_may_have_a_corpus_json_of_its_own(tmp_path, content):
    Dataset.from_dict({"text": ["a boat"]}).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "corpus.json").write_text(content)
    assert find_published_corpus(str(tmp_path)) is None


def write_foreign(folder, rows, corpus, splits=("train", "validation")):
    folder.mkdir()
    for split in splits:
        Dataset.from_dict({"input_ids": rows}).to_parquet(folder / f"{split}.parquet")
    corpus.tokenizer.save_pretrained(folder)


def test_rows_of_other_tools_are_used_with_the_tokenizer_beside_them(corpus, tmp_path):
    rows = corpus.train_dataset.rows[:50].tolist()
    write_foreign(tmp_path / "foreign", rows, corpus)
    loaded = load(tmp_path / "foreign", tmp_path / "cache")
    assert loaded.train_dataset.rows.tolist() == rows
    assert loaded.train_dataset.rows.dtype == np.uint16
    assert loaded.statistics["train_rows"] == 50


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[5] * LENGTH, [5] * 9], "not all have 16 tokens, as the first row"),
        ([[5] * LENGTH, [500] * LENGTH], "ids from 5 to 500, beyond the .* tokens of its tokenizer"),
        ([[5] * LENGTH, [-1] * LENGTH], "ids from -1 to 5"),
        ([[5] * LENGTH, [5.5] * LENGTH], "must hold token ids, got double"),
        ([[5] * LENGTH, [None] * LENGTH], "must hold token ids, got int32 with 16 empty"),
        ([[5] * LENGTH, None], "not all have 16 tokens"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_one_line(corpus, tmp_path, rows, message):
    write_foreign(tmp_path / "foreign", rows, corpus)
    with pytest.raises(DataError, match=rf"^data set '.*foreign': split train, rows 0 to 1: .*{message}"):
        load(tmp_path / "foreign", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def replace_rows(copy, change):
    (path,) = (copy / "data").glob("train-*")
    table = pq.read_table(path)
    ids = np.array(table["input_ids"].to_pylist(), dtype=np.uint16)
    ids = change(ids)
    column = pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), ids.shape[1])
    pq.write_table(pa.table({"input_ids": column}, schema=table.schema), path)


def swap_two(ids):
    ids[[3, 4]] = ids[[4, 3]]
    return ids


DAMAGES = {
    "no tokenizer": (lambda copy: shutil.rmtree(copy / "tokenizer"), "have no tokenizer beside them"),
    "another tokenizer": (
        lambda copy: (copy / "tokenizer" / "tokenizer.json").write_text(
            (copy / "tokenizer" / "tokenizer.json").read_text().replace('"boat"', '"boot"')
        ),
        "its tokenizer is not the one that was published with it",
    ),
    "broken tokenizer": (
        lambda copy: (copy / "tokenizer" / "tokenizer.json").write_text("{"),
        "its tokenizer is not the one that was published with it .tokenizer.json.",
    ),
    "other special tokens": (
        lambda copy: (copy / "tokenizer" / "tokenizer_config.json").write_text(
            (copy / "tokenizer" / "tokenizer_config.json").read_text().replace('"[MASK]"', '"[PAD]"')
        ),
        "its tokenizer is not the one that was published with it .tokenizer_config.json.",
    ),
    "changed rows": (lambda copy: replace_rows(copy, swap_two), "rows of split train are not the"),
    "fewer rows": (lambda copy: replace_rows(copy, lambda ids: ids[:-1]), "rows of split train are not the"),
    "cut file": (
        lambda copy: next((copy / "data").glob("train-*")).write_bytes(b"PAR1 and no more"),
        "its split train cannot be read",
    ),
    "no validation": (
        lambda copy: next((copy / "data").glob("validation-*")).unlink(),
        "cannot be read",
    ),
    "cut description": (lambda copy: (copy / "corpus.json").write_text('{"hf_cram'), "corpus.json cannot be read"),
    "deep description": (
        lambda copy: (copy / "corpus.json").write_text("[" * 100_000),
        "corpus.json cannot be read",
    ),
    "odd description": (
        lambda copy: (copy / "corpus.json").write_text('{"hf_cram_corpus": 1, "splits": {"train": 5}}'),
        "corpus.json is not as hf_cram writes it: publish it again",
    ),
    "newer": (lambda copy: (copy / "corpus.json").write_text('{"hf_cram_corpus": 9}'), "another hf_cram .format 9."),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_corpus_is_one_line(copy, tmp_path, name):
    damage, message = DAMAGES[name]
    damage(copy)
    with pytest.raises(DataError, match=f"^data set '.*copy': .*{message}") as caught:
        load(copy, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_settings_that_ask_for_other_rows_are_one_line(folder, arguments, corpus, tmp_path):
    published = find_published_corpus(str(folder))
    same = {**row_settings(arguments), "train_files": None, "dataset_name": str(folder)}
    published.check_arguments(DataArguments(**same, cache_dir="elsewhere", preprocessing_workers=1))
    published.check_arguments(DataArguments(dataset_name=str(folder)))
    corpus.tokenizer.save_pretrained(tmp_path / "tokenizer")
    published.check_arguments(DataArguments(dataset_name=str(folder), tokenizer_name=str(tmp_path / "tokenizer")))
    for name, value, message in (
        ("max_seq_length", 32, "max_seq_length 32 .there 16."),
        ("vocab_size", 4000, "vocab_size 4000 .there "),
        ("row_order", "random", "row_order 'random' .there sentence_length."),
        ("drop_below_characters", 50, "drop_below_characters 50 .there 12."),
        ("max_documents", 5, "max_documents 5 .there not set."),
        ("max_train_tokens", 10_000, "max_train_tokens 10000 .there not set."),
    ):
        with pytest.raises(DataError, match=message) as caught:
            published.check_arguments(DataArguments(**{**same, name: value}))
        assert "\n" not in str(caught.value)
    defaults = DataArguments(dataset_name=str(folder))
    published.check_arguments(defaults, ["vocab_size", "eval_rows"])
    for name, message in (
        ("max_seq_length", "max_seq_length 128 .there 16."),
        ("row_order", "row_order 'none' .there "),
    ):
        with pytest.raises(DataError, match=message):
            prepare_corpus(replace(defaults, cache_dir=str(tmp_path / "cache")), [name])
    other = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    other["normalizer"] = None
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="tokenizer_name"):
        published.check_arguments(DataArguments(dataset_name=str(folder), tokenizer_name=str(tmp_path / "tokenizer")))


def test_an_order_asked_for_is_the_whole_of_it(arguments, tmp_path):
    for made, asked, told in (
        (
            {"reverse_row_order": True},
            {"row_order": "sentence_length"},
            "reverse_row_order False .there True.",
        ),
        (
            {"row_order": "random", "row_order_seed": 7},
            {"row_order": "random", "row_order_seed": 0},
            "row_order_seed 0 .there 7.",
        ),
    ):
        folder = tmp_path / told[:5]
        ordered = replace(arguments, **made)
        export_corpus(prepare_corpus(ordered), folder, settings=row_settings(ordered))
        published = find_published_corpus(str(folder))
        published.check_arguments(DataArguments(dataset_name=str(folder)))
        published.check_arguments(DataArguments(dataset_name=str(folder), **{**asked, **made}), list(asked))
        with pytest.raises(DataError, match=told):
            published.check_arguments(DataArguments(dataset_name=str(folder), **asked), list(asked))
        if "row_order_seed" in asked:
            with pytest.raises(DataError, match=told):
                published.check_arguments(DataArguments(dataset_name=str(folder)), ["row_order_seed"])
    for row_order in ("none", "unigram"):
        idle = replace(arguments, row_order=row_order, row_order_seed=7)  # the seed of an order that draws nothing
        corpus = prepare_corpus(idle)
        assert prepare_corpus(replace(idle, row_order_seed=0)).directory == corpus.directory
        folder = tmp_path / row_order
        export_corpus(corpus, folder, settings=row_settings(idle))
        same = replace(idle, train_files=None, dataset_name=str(folder))
        find_published_corpus(str(folder)).check_arguments(same)


def test_a_name_that_cannot_be_is_known_before_the_work():
    PublishArguments(push_corpus_to_hub="me/rows")
    with pytest.raises(DataError, match="push_corpus_to_hub: .*'a b'"):
        PublishArguments(push_corpus_to_hub="a b")


@pytest.mark.parametrize(
    ("num_rows", "name"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**9, "1B<n<10B"), (10**12, "n>1T"), (10**12 - 1, "100B<n<1T")],
)
def test_size_categories(num_rows, name):
    assert size_category(num_rows) == name
