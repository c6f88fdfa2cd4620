"""Several sources as one stream: shares at every prefix, limits, ends, and mistakes in their description."""

import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cram.data.errors import DataError
from hf_cram.data.mixing import MixedStream, mix_streams
from hf_cram.data.source_arguments import SourceArguments
from hf_cram.data.sources import TextSource
from hf_cram.recipes import RecipeParser


def write_source(folder, name, documents=400, seed=0, longest=60):
    """A file of documents that begin with the source's name, of unequal lengths; returns its path."""
    lengths = np.random.default_rng(seed).integers(1, longest, documents)
    lines = (f"{name} {number} " + "x" * length for number, length in enumerate(lengths))
    path = folder / f"{name}.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def three(tmp_path):
    return {name: {"train_files": [write_source(tmp_path, name, seed=seed)]} for seed, name in enumerate("abc")}


def source_of(sources, tmp_path, **arguments):
    return TextSource(SourceArguments(sources=sources, **arguments), tmp_path / "cache")


def characters_by_source(documents):
    counts = dict.fromkeys("abc", 0)
    for document in documents:
        counts[document[0]] += len(document)
    return counts


def test_every_prefix_has_the_shares(three, tmp_path):
    for name, weight in zip("abc", (6, 3, 1), strict=True):
        three[name]["weight"] = weight
    source = source_of(three, tmp_path)
    documents = list(source.documents())
    first_end = max(index for index, document in enumerate(documents) if document.startswith("a 399 "))
    for stop in range(1, first_end):
        counts = characters_by_source(documents[:stop])
        total = sum(counts.values())
        for name, share in zip("abc", (0.6, 0.3, 0.1), strict=True):
            assert abs(counts[name] - share * total) < 3 * 80, (stop, counts)  # documents have 80 characters at most
    # Nothing is lost, nothing comes twice, and each source keeps its order.
    for name in "abc":
        own = [document for document in documents if document[0] == name]
        assert [int(document.split()[1]) for document in own] == list(range(400))
    assert source.counts == {
        name: {"documents": 400, "characters": characters}
        for name, characters in characters_by_source(documents).items()
    }


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=1, max_size=4),
    st.data(),
)
def test_the_next_document_is_of_the_source_furthest_behind(lengths, data):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)))
    streams = [
        MixedStream(str(number), iter([str(number) * length for length in own]), weight)
        for number, (own, weight) in enumerate(zip(lengths, weights, strict=True))
    ]
    drawn = [0] * len(lengths)
    left = [list(own) for own in lengths]
    for document in mix_streams(streams, lambda stream, num_left: None):
        number = int(document[0])
        running = [index for index, own in enumerate(left) if own]
        assert drawn[number] * weights[number] ** -1 <= min(drawn[i] / weights[i] for i in running) + 1e-9
        assert len(document) == left[number].pop(0)
        drawn[number] += len(document)
    assert not any(left)


def test_leaving_a_source_out_does_not_reorder_the_others(three, tmp_path):
    mixed = list(source_of(three, tmp_path).documents())
    without = list(source_of({name: three[name] for name in "ac"}, tmp_path).documents())
    assert [document for document in mixed if document[0] != "b"] == without


def test_a_source_that_ends_leaves_the_others_their_relative_shares_and_is_told_once(three, tmp_path, caplog):
    short = write_source(tmp_path, "b", documents=10)
    three["a"]["weight"], three["b"] = 3, {"train_files": [short]}
    source = source_of(three, tmp_path)
    with caplog.at_level(logging.WARNING):
        documents = list(source.documents())
        assert list(source.documents()) == documents  # the same again, without a second warning
    ended = [record.getMessage() for record in caplog.records]
    assert ended[0].startswith("Source 'b' has ended after 10 documents: the others go on")
    assert len(ended) == 2  # b, then a: c is alone then and ends the text
    end_of_a = max(index for index, document in enumerate(documents) if document[0] == "a")
    counts = characters_by_source(documents[: end_of_a + 1])
    assert counts["a"] / counts["c"] == pytest.approx(3, rel=0.05)


def test_passes_repeat_a_source_and_count_its_skips_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a 0"}\n{oops\n{"text": "a 1"}\n')
    source = source_of({"a": {"train_files": [str(path)], "max_passes": 3}}, tmp_path)
    assert list(source.documents()) == ["a 0", "a 1"] * 3
    assert source.report.counts == {"not valid JSON": 1}
    assert source.counts == {"a": {"documents": 6, "characters": 18}}
    limited = {"a": {"train_files": [str(path)], "max_passes": 2, "max_documents": 1}}
    assert list(source_of(limited, tmp_path).documents()) == ["a 0", "a 0"]


def test_limits_end_a_source_and_not_the_mix(three, tmp_path, caplog):
    three["a"]["max_characters"] = "1e3"  # as YAML reads 1e3
    three["b"]["max_documents"] = 7
    with caplog.at_level(logging.WARNING):
        counts = characters_by_source(source_of(three, tmp_path).documents())
    assert 900 < counts["a"] <= 1000
    assert not any("'a'" in record.getMessage() for record in caplog.records)  # its end was asked for
    source = source_of(three, tmp_path, max_documents=50)
    assert len(list(source.documents())) == 50
    assert source.counts["b"]["documents"] == 7
    assert sum(count["documents"] for count in source.counts.values()) == 50


def test_token_limits_follow_the_tokenizer_where_there_is_one(three, tmp_path):
    three["a"] = {"train_files": [write_source(tmp_path, "a", documents=6000)], "max_tokens": 20_000}
    for count_tokens, counted in ((None, lambda text: len(text) / 4.5), (lambda text: len(text) // 2,) * 2):
        source = source_of(three, tmp_path)
        documents = list(source.documents(count_tokens))
        tokens = sum(counted(document) for document in documents if document[0] == "a")
        assert tokens == pytest.approx(20_000, rel=0.02)
        assert source.counts["b"]["documents"] == 400


def test_a_source_that_gives_nothing_is_an_error(three, tmp_path):
    three["b"]["max_characters"] = 2
    with pytest.raises(DataError, match="'b' gives no document: its first one is beyond max_characters"):
        list(source_of(three, tmp_path).documents())


def test_nothing_is_read_ahead():
    drawn = {"a": 0, "b": 0}

    def count(name):
        while True:
            drawn[name] += 1
            yield name * 10

    streams = [MixedStream(name, count(name)) for name in drawn]
    assert len(list(itertools.islice(mix_streams(streams, lambda stream, left: None), 9))) == 9
    assert drawn == {"a": 5, "b": 4}


def test_the_whole_is_estimated_from_a_part(three, tmp_path):
    three["a"] = {"train_files": [write_source(tmp_path, "a", documents=4000)], "max_passes": 2}
    three["b"]["max_characters"] = 5000
    source = source_of(three, tmp_path)
    assert source.estimated_characters is None
    stream = source.documents()
    list(itertools.islice(stream, 450))
    estimated = source.estimated_characters
    list(stream)
    total = sum(count["characters"] for count in source.counts.values())
    assert estimated == pytest.approx(total, rel=0.15)
    assert source.estimated_characters == pytest.approx(total, rel=0.01)


def test_identity_follows_content_and_what_changes_the_documents(three, tmp_path):
    def identity(sources, **arguments):
        return source_of(sources, tmp_path, **arguments).identity

    same = identity(three)
    renamed = {f"other {name}": values for name, values in three.items()}
    assert identity(three) == identity(renamed) == same
    changes = [{"weight": 2}, {"max_tokens": 9}, {"max_characters": 9}, {"max_documents": 2}, {"max_passes": 2},
               {"text_file_documents": "blank_line"}]  # fmt: skip
    seen = {same, identity(three, max_documents=9), identity(dict(reversed(three.items())))}
    for change in changes:
        seen.add(identity({**three, "a": {**three["a"], **change}}))
    with open(three["c"]["train_files"][0], "a") as stream:
        stream.write("one more\n")
    seen.add(identity(three))
    assert len(seen) == len(changes) + 4


def test_settings_of_all_hold_where_a_source_has_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "much too long"}\n')
    (tmp_path / "b.jsonl").write_text('{"title": "two"}\n')
    sources = {
        "a": {"train_files": [str(tmp_path / "a.jsonl")]},
        "b": {"train_files": [str(tmp_path / "b.jsonl")], "text_column": "title"},
    }
    source = source_of(sources, tmp_path, text_column="body", max_document_characters=5)
    assert list(source.documents()) == ["one", "two"]
    assert source.report.counts.total() == 1


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("{a: 1", "sources is not valid JSON"),
        (
            '{"a": {"train_files": ["b"]}, "a": {"train_files": ["c"]}}',
            r"sources is not valid JSON ('a' stands twice",
        ),
        ([], "sources must map names"),
        ({}, "sources must map names"),
        ({"a": "b.txt"}, "source 'a' must be 'field: value' pairs, got 'b.txt'"),
        ({"a": {"train_file": ["b"]}}, "source 'a': unknown key 'train_file'; did you mean 'train_files'?"),
        ({"a": {"sources": {}}}, "source 'a': unknown key 'sources'"),
        ({"a": {"weight": 1}}, "source 'a': set dataset_name or train_files"),
        ({"a": {"dataset_name": "b", "train_files": ["c"]}}, "source 'a': dataset_name and train_files are both set"),
        ({"a": {"dataset_name": "b", "weight": 0}}, "source 'a': weight must be above 0, got 0"),
        ({"a": {"dataset_name": "b", "weight": "much"}}, "source 'a': weight must be a number, got 'much'"),
        ({"a": {"dataset_name": "b", "weight": float("nan")}}, "source 'a': weight must be a number, got nan"),
        ({"a": {"dataset_name": "b", "weight": True}}, "source 'a': weight must be a number, got True"),
        ({"a": {"dataset_name": "b", "max_tokens": 1.5}}, "source 'a': max_tokens must be a whole number, got 1.5"),
        ({"a": {"dataset_name": "b", "max_passes": 0}}, "source 'a': max_passes must be at least 1, got 0"),
        ({"a": {"dataset_name": "b", "streaming": "yes"}}, "source 'a': streaming must be true or false, got 'yes'"),
        ({"a": {"dataset_name": 5}}, "source 'a': dataset_name must be text, got 5"),
        ({"a": {"train_files": "b.txt"}}, "source 'a': train_files must be a list of texts, got 'b.txt'"),
        ({"a": {"dataset_name": "b", "weight": None}}, "source 'a': weight must be a number, got None"),
    ],
)
def test_a_mistake_in_a_mix_is_one_line_that_names_the_source(sources, message):
    with pytest.raises(DataError) as caught:
        SourceArguments(sources=sources)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dataset_name", "dataset_config_name", "dataset_data_dir", "dataset_revision"])
def test_a_mix_and_one_source_exclude_each_other(name):
    with pytest.raises(DataError, match=f"sources and {name} are both set: .*set {name}: null"):
        SourceArguments(sources={"a": {"dataset_name": "b"}}, **{name: "c"})


def test_a_mix_is_a_mapping_in_a_recipe_and_json_on_the_command_line(three, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    three["a"].update(weight=2.5, max_tokens=None, streaming=True)
    recipe.write_text(f"sources: {json.dumps(three)}\n")
    parse = RecipeParser((SourceArguments,)).parse
    (from_recipe,) = parse([str(recipe)])
    (from_line,) = parse(["--sources", json.dumps(three)])
    assert from_recipe == from_line == SourceArguments(sources=three)
    assert from_recipe.named_sources()["a"].weight == 2.5
    assert from_recipe.source_name == "a, b, c"
    # A parser has read the fields' types before: they must still hold.
    assert replace(from_recipe).named_sources()["a"].max_tokens is None


def test_names_of_data_sets_on_the_hub(tmp_path):
    (tmp_path / "local").mkdir()
    sources = {"a": {"dataset_name": "allenai/c4"}, "b": {"dataset_name": str(tmp_path / "local")},
               "c": {"dataset_name": "installed-docs"}, "d": {"train_files": ["x.txt"]}}  # fmt: skip
    for arguments, names, whole in (
        (SourceArguments(sources=sources), ["allenai/c4"], None),
        (SourceArguments(dataset_name="allenai/c4"), ["allenai/c4"], "allenai/c4"),
        (SourceArguments(), [], None),
    ):
        assert arguments.hub_names == names
        assert arguments.hub_name_of_all == whole


PRINT_MIX = """
import hashlib, json, sys
from pathlib import Path
from hf_cram.data.source_arguments import SourceArguments
from hf_cram.data.sources import TextSource
source = TextSource(SourceArguments(sources=sys.argv[1]), Path("unused"))
print(source.identity, hashlib.sha256("".join(source.documents()).encode()).hexdigest())
"""


@pytest.mark.slow
def test_another_process_gives_the_same_mix(three, tmp_path, python_environment):
    command = [sys.executable, "-c", PRINT_MIX, json.dumps(three)]
    environment = {**python_environment, "PYTHONHASHSEED": "7"}
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    source = source_of(three, tmp_path)
    assert printed == [source.identity, hashlib.sha256("".join(source.documents()).encode()).hexdigest()]


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="shared/data is absent")
def test_real_texts_in_three_quarters_and_one(tmp_path):
    data = SHARED / "data"
    sources = {
        "books": {"train_files": [os.fspath(data / "classic_books.parquet")], "weight": 0.75},
        "modern": {"train_files": [os.fspath(data / "modern_prose.parquet")], "weight": 0.25},
    }
    source = source_of(sources, tmp_path)
    for _ in itertools.islice(source.documents(), 3000):
        pass
    counts = source.counts
    total = sum(count["characters"] for count in counts.values())
    assert counts["books"]["characters"] / total == pytest.approx(0.75, abs=0.02)
    assert 80e6 < source.estimated_characters < 160e6
