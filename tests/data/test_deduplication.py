"""What is removed as a repeat, against slow references that are obviously right."""

import hashlib
import itertools
import random
import string
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cram.data import deduplication, repeated_windows
from hf_cram.data.deduplication import DeduplicationArguments, choose_bands, find_near_duplicates, shingle_hashes
from hf_cram.data.errors import DataError
from hf_cram.data.substring_deduplication import SubstringReport, remove_repeated_substrings

DOCUMENTATION = SHARED / "data" / "documentation.parquet"
WORDS = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3)]


def remove(documents, min_bytes, folder, **options):
    report = SubstringReport()
    return list(remove_repeated_substrings(documents, min_bytes, folder, report, **options)), report


def remove_slowly(documents, min_bytes):
    """The definition, word by word: every window is looked up among all before it."""
    first_place = {}
    result = []
    for number, document in enumerate(documents):
        content = document.encode()
        goes = [False] * len(content)
        for place in range(len(content) - min_bytes + 1):
            window = content[place : place + min_bytes]
            first_number, first = first_place.setdefault(window, (number, place))
            if first_number != number or place - first >= min_bytes:
                goes[place : place + min_bytes] = [True] * min_bytes
        rest, place = "", 0
        for character in document:
            size = len(character.encode())
            if not all(goes[place : place + size]):
                rest += character
            place += size
        if rest == document or rest.strip():
            result.append((number, rest))
    return result


def prose(seed, num_words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def change(text, seed, every):
    """The text with about each `every`-th word replaced."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) if rng.random() < 1 / every else word for word in text.split(" "))


def corpus_with_changed_copies():
    texts = [prose(seed, 400) for seed in range(12)]
    copies = [
        change(text, seed, every) for seed, (text, every) in enumerate(zip(texts, itertools.cycle([15, 40, 400])))
    ]
    lines = [f"{word} {'-' * 70} {word}{'-' * 40}" for word in WORDS[:80]]
    return [*texts, *copies, "\n".join(lines), "\n".join(lines[::-1]), texts[0][500:], prose(3, 400) * 3]


@st.composite
def repetitive_documents(draw):
    alphabet = draw(st.sampled_from(["a", "ab", "abc", "aé", "é–a", "a \n", "😀é"]))
    parts = draw(st.lists(st.text(alphabet, max_size=12), min_size=1, max_size=5))
    pieces = st.lists(st.sampled_from(parts), max_size=6)
    return draw(st.lists(pieces.map("".join), max_size=6))


@given(
    documents=repetitive_documents(),
    min_bytes=st.integers(1, 9),
    chunk_bytes=st.sampled_from([1, 7, 65536]),
    suffixes_at_once=st.sampled_from([1, 5, 10**6]),
    suffix_share=st.sampled_from([0, 1 / 24]),
)
@settings(max_examples=120, deadline=None)
def test_removes_what_the_definition_says(
    tmp_path_factory, documents, min_bytes, chunk_bytes, suffixes_at_once, suffix_share
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated_windows, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(repeated_windows, "SUFFIXES_AT_ONCE", suffixes_at_once)
        patch.setattr(repeated_windows, "SUFFIX_MEMORY_SHARE", suffix_share)
        result, _ = remove(documents, min_bytes, tmp_path_factory.getbasetemp())
    assert result == remove_slowly(documents, min_bytes)


@pytest.mark.parametrize("num_hashes", [1, 2])
def test_hashes_that_collide_change_nothing(tmp_path, monkeypatch, num_hashes):
    rng = random.Random(0)
    documents = ["".join(rng.choices("abc", k=30)) for _ in range(3)] + ["abcabcabd" * 3, "zabcabdabz"]
    expected = remove_slowly(documents, 5)
    assert expected != list(enumerate(documents))
    monkeypatch.setattr(repeated_windows, "mix64", lambda hashes: hashes % np.uint64(num_hashes))
    assert remove(documents, 5, tmp_path)[0] == expected
    # One k-gram has more than a suffix array may hold: blocks of it are compared two by two.
    monkeypatch.setattr(repeated_windows, "SUFFIX_MEMORY_SHARE", 0)
    assert remove(documents, 5, tmp_path)[0] == expected


@pytest.mark.parametrize("min_bytes", [75, 100])
def test_one_copy_of_each_planted_passage_stays_and_nothing_else_changes(tmp_path, min_bytes):
    rng = random.Random(min_bytes)
    passages = [prose(1000 + index)[: rng.randint(min_bytes, 200)] for index in range(6)] + ["ſchön – " + prose(2000)]
    documents, expected, planted = [], [], Counter()
    for number in range(40):
        full, rest = [prose(number)], [prose(number)]
        for index in rng.sample(range(len(passages)), 3):
            # Signs that no other copy has beside it, so that the passage is all that is repeated.
            before, after = chr(0x4E00 + 100 * number + index), chr(0x9000 + 100 * number + index)
            full.append(before + passages[index] + after)
            rest.append(before + passages[index] * (not planted[index]) + after)
            planted[index] += 1
        documents.append(" ".join(full))
        expected.append(" ".join(rest))
    assert min(planted[index] for index in range(len(passages))) > 5
    assert remove(documents, min_bytes, tmp_path)[0] == list(enumerate(expected))


def test_shorter_passages_stay(tmp_path):
    passage = prose(0)[:99]
    documents = [f"{prose(1)}A{passage}B{prose(2)}", f"{prose(3)}C{passage}D{prose(4)}"]
    assert [text for _, text in remove(documents, 100, tmp_path)[0]] == documents
    assert [text for _, text in remove(documents, 99, tmp_path)[0]] == [
        documents[0],
        documents[1].replace(passage, ""),
    ]


def test_a_run_of_one_sign_keeps_its_first_bytes(tmp_path):
    result, report = remove(["-" * 1000, "x" + "-" * 80, "é" * 100], 75, tmp_path)
    assert result == [(0, "-" * 75), (1, "x"), (2, "é" * 38)]
    assert report.bytes_removed == 925 + 80 + 2 * 62


def test_the_result_does_not_depend_on_memory_or_chunks(tmp_path, monkeypatch):
    documents = corpus_with_changed_copies()
    expected = remove_slowly(documents, 75)
    assert sum(len(text) for _, text in expected) < 0.75 * sum(map(len, documents))
    monkeypatch.setattr(repeated_windows, "CHUNK_BYTES", 1000)
    for capacity_share in (0, 3e-6, 1e-4):
        monkeypatch.setattr(repeated_windows, "SUFFIX_MEMORY_SHARE", capacity_share)
        monkeypatch.setattr(repeated_windows, "FINGERPRINT_MEMORY_SHARE", max(capacity_share, 1e-4))
        assert remove(documents, 75, tmp_path)[0] == expected
    assert remove(documents, 75, tmp_path, memory_mb=100)[0] == expected


def test_repeated_documents_are_left_out_and_all_is_counted(tmp_path):
    texts = [prose(seed) for seed in range(3)]
    documents = [texts[0], "", "  ", texts[1], texts[0], f" {texts[1]}\n", texts[2]]
    steps = []
    result, report = remove(documents, 75, tmp_path, on_progress=lambda *step: steps.append(step))
    assert result == [(0, texts[0]), (1, ""), (2, "  "), (3, texts[1]), (6, texts[2])]
    assert report == SubstringReport(
        documents_in=7,
        documents_out=5,
        documents_changed=2,
        documents_emptied=2,
        characters_in=sum(map(len, documents)),
        characters_out=sum(len(text) for _, text in result),
        bytes_removed=len(texts[0]) + len(texts[1]),
    )
    total = sum(map(len, documents))
    assert {step for step, _, _ in steps} == {
        "storing the text",
        "looking for repeats",
        "comparing repeats",
        "removing repeats",
    }
    for name in {step for step, _, _ in steps}:
        assert sum(num_bytes for step, num_bytes, _ in steps if step == name) == total
        assert {known for step, _, known in steps if step == name} <= {None, total}


@pytest.mark.parametrize("documents", [[], [""], ["", ""], ["short", "short"], ["\ud800" + "x" * 90] * 2])
def test_odd_text(tmp_path, documents):
    result, _ = remove(documents, 75, tmp_path)
    assert result == list(enumerate(documents[:1] if "\ud800" in "".join(documents) else documents))


def test_nothing_is_left_behind(tmp_path):
    documents = [prose(0), prose(1), prose(0)]
    stream = remove_repeated_substrings(documents, 75, tmp_path, SubstringReport())
    assert next(stream) == (0, prose(0))
    assert list(tmp_path.iterdir())
    stream.close()
    assert not list(tmp_path.iterdir())

    def broken():
        yield prose(0)
        raise DataError("the source fails")

    with pytest.raises(DataError, match="the source fails"):
        remove(broken(), 75, tmp_path)
    with pytest.raises(DataError, match="the source fails"):
        find_near_duplicates(broken(), 0.8, tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_says_how_much_would_do(tmp_path, monkeypatch):
    monkeypatch.setattr(repeated_windows, "FINGERPRINT_MEMORY_SHARE", 1e-8)
    documents = corpus_with_changed_copies()
    with pytest.raises(DataError, match="dedup_memory_mb") as caught:
        remove(documents, 75, tmp_path, memory_mb=100)
    enough = int(str(caught.value).split()[-1])
    assert remove(documents, 75, tmp_path, memory_mb=enough)[0]


@pytest.mark.skipif(not DOCUMENTATION.exists(), reason="needs the shared documentation.parquet")
def test_real_documentation_without_its_repeats(tmp_path):
    texts = pq.read_table(DOCUMENTATION, columns=["text"])["text"].slice(0, 400).to_pylist()
    documents = [text for text in texts if len(text) < 8000][:120]
    result, report = remove(documents, 75, tmp_path)
    assert result == remove_slowly(documents, 75)
    assert report.bytes_removed > 1000
    assert remove([text for _, text in result], 75, tmp_path)[1].bytes_removed < report.bytes_removed / 20


@pytest.mark.parametrize(
    "settings",
    [
        {"dedup_substring_bytes": 5},
        {"dedup_substring_bytes": 10**6},
        {"near_dedup_similarity": 0.0},
        {"near_dedup_similarity": 80},
        {"near_dedup_similarity": float("nan")},
        {"dedup_memory_mb": 1},
    ],
)
def test_wrong_arguments_are_refused_by_name(settings):
    with pytest.raises(DataError, match=next(iter(settings))):
        DeduplicationArguments(**settings)


def test_the_papers_thresholds_are_taken():
    for size in (75, 100):
        assert DeduplicationArguments(dedup_substring_bytes=size, near_dedup_similarity=0.8).dedup_memory_mb == 1000


def jaccard(first, second):
    runs = [
        {tuple(text.split()[place : place + 5]) for place in range(max(1, len(text.split()) - 4))}
        for text in (first, second)
    ]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_near_copies_go_and_the_first_of_them_stays(tmp_path):
    originals = [prose(seed, 300) for seed in range(5)]
    changed = [change(text, 9, 100) for text in originals]
    assert all(text != original for text, original in zip(changed, originals, strict=True))
    shouted = originals[2].upper().replace(" ", ", ")
    documents = [changed[0], *originals, shouted, *changed[1:], prose(99, 300), originals[3]]
    expected = [False, True, *[False] * 4, *[True] * 5, False, True]
    assert find_near_duplicates(documents, 0.8, tmp_path).tolist() == expected
    assert find_near_duplicates(documents, 1.0, tmp_path).tolist() == [*[False] * 6, True, *[False] * 5, True]
    assert not list(tmp_path.iterdir())


def test_similarity_decides_as_comparing_all_runs_of_five_words_does(tmp_path):
    originals = [prose(seed, 200) for seed in range(40)]
    changes = itertools.cycle([8, 25, 60, 150])
    pairs = [
        (text, change(text, seed, every)) for seed, (text, every) in enumerate(zip(originals, changes, strict=False))
    ]
    repeated = find_near_duplicates([text for pair in pairs for text in pair], 0.7, tmp_path).tolist()
    assert not any(repeated[::2])
    clear = 0
    for pair, decision in zip(pairs, repeated[1::2], strict=True):
        similarity = jaccard(*pair)
        if abs(similarity - 0.7) > 0.12:
            clear += 1
            assert decision == (similarity > 0.7)
    assert clear > 20


def test_short_texts_are_alike_only_if_they_say_the_same(tmp_path):
    documents = [
        "Yes!",
        "yes",
        "yes sir",
        "",
        "...",
        "...",
        "sir yes",
        "one two three four five",
        "one two three four",
    ]
    assert find_near_duplicates(documents, 0.8, tmp_path).tolist() == [False, True, *[False] * 7]
    assert find_near_duplicates([], 0.8, tmp_path).tolist() == []
    assert find_near_duplicates(["", "\ud800", "\ud800"], 0.8, tmp_path).tolist() == [False, False, True]


def test_long_documents_are_hashed_in_pieces(tmp_path, monkeypatch):
    texts = [prose(0, 3000), prose(1, 3000), prose(2, 20)]
    documents = [*texts, f"and {texts[0]}", texts[2], change(texts[1], 0, 100)]
    expected = [False, False, False, True, True, True]
    assert find_near_duplicates(documents, 0.8, tmp_path).tolist() == expected
    monkeypatch.setattr(deduplication, "PIECE_BYTES", 1500)
    assert find_near_duplicates(documents, 0.8, tmp_path).tolist() == expected


def test_many_documents_with_one_beginning_are_told_apart(tmp_path, monkeypatch):
    header = prose(0, 60)
    documents = [f"{header} {prose(seed, 60)}" for seed in range(1, 200)]
    documents += documents[5:40]
    expected = list(range(199, 234))
    assert np.flatnonzero(find_near_duplicates(documents, 0.8, tmp_path)).tolist() == expected
    # In one band of one minimum most of them are candidates for each other.
    monkeypatch.setattr(deduplication, "choose_bands", lambda similarity: (1, 1))
    assert np.flatnonzero(find_near_duplicates(documents, 0.8, tmp_path)).tolist() == expected


def test_bands_find_what_is_similar_enough():
    for similarity in (0.1, 0.5, 0.7, 0.8, 0.9, 1.0):
        bands, rows = choose_bands(similarity)
        assert bands * rows <= 128
        assert 1 - (1 - similarity**rows) ** bands >= 0.99
    assert choose_bands(0.8) == (21, 6)


def test_runs_of_words_do_not_cross_texts_and_depend_on_nothing_else():
    texts = [b"One, two three four five six", b"", b"one two three four five", b"one two"]
    hashes, bounds = shingle_hashes(texts)
    assert bounds.tolist() == [0, 2, 2, 3, 4]
    assert hashes[0] == hashes[2]
    assert len(set(hashes.tolist())) == 3
    for number, text in enumerate(texts):
        alone, _ = shingle_hashes([text])
        assert alone.tolist() == hashes[bounds[number] : bounds[number + 1]].tolist()


def test_minima_are_pinned():
    """Another version of the library that hashes otherwise would drop other documents from the same text."""
    [(signatures, has_words, _)] = list(deduplication._signatures([prose(0), prose(1)]))
    assert has_words.all()
    assert hashlib.sha256(signatures.astype("<u4").tobytes()).hexdigest()[:16] == "0c82ce1bd531cf66"


@pytest.mark.skipif(not DOCUMENTATION.exists(), reason="needs the shared documentation.parquet")
def test_real_documentation_has_copies(tmp_path):
    documents = pq.read_table(DOCUMENTATION, columns=["text"])["text"].slice(0, 4000).to_pylist()
    repeated = find_near_duplicates(documents, 0.8, tmp_path)
    seen = set()
    for document, decision in zip(documents, repeated, strict=True):
        assert decision or document not in seen
        seen.add(document)
    exact = len(documents) - len(seen)
    assert exact < repeated.sum() < 0.1 * len(documents)
