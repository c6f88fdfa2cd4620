"""Which documents the rules keep and drop, on hand-made and real text."""

import json
import pickle
import subprocess
import sys

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cram.data.errors import DataError
from hf_cram.data.filtering import (
    PIECE_BYTES,
    DocumentFilter,
    DroppedSamples,
    FilterArguments,
    repeated_line_share,
    repeated_ngram_share,
    url_share,
)
from hf_cram.data.languages import FREQUENT_WORDS, LANGUAGES, SCRIPTS, count_characters, is_in_language

ENGLISH = (
    "It was a bright cold day in April, and the clocks were striking. The old man went down to the harbour, as he had "
    "done every morning for years, to see which of the boats had come back from the sea and who was on them."
)
OTHERS = {
    "de": "Der alte Mann ging an jedem Morgen zum Hafen hinunter, um zu sehen, welche Schiffe aus dem Sturm nach Hause "
    "gekommen waren, und er wartete lange, aber sein Sohn war nicht auf einem von ihnen.",
    "fr": "Le vieil homme descendait chaque matin vers le port pour voir quels bateaux étaient revenus de la mer, et il "
    "attendait longtemps avec les autres, mais son fils ne revenait pas sur une de ces barques.",
    "es": "El viejo bajaba cada mañana hasta el puerto para ver cuáles de los barcos habían vuelto del mar, y esperaba "
    "mucho tiempo con las mujeres, pero su hijo no estaba en ninguno de ellos.",
    "it": "Il vecchio scendeva ogni mattina al porto per vedere quali delle barche erano tornate dal mare, e aspettava "
    "nella piazza con gli altri, anche se suo figlio non era più tra di loro.",
    "pt": "O velho descia todas as manhãs ao porto para ver os barcos que voltavam pelo rio, e ele esperava muito com as "
    "mulheres, mas o seu filho não estava em um dos barcos, e também já não voltava.",
    "nl": "De oude man liep elke ochtend naar de haven om te zien welke van de schepen door de storm waren gekomen, en hij "
    "wachtte lang met het volk op de kade, maar zijn zoon was ook dit keer niet aan boord.",
    "da": "Den gamle mand gik hver morgen ned til havnen og så, om der var kommet skibe ind fra havet, og han blev længe "
    "på kajen, men det var ikke hans søn, der kom hjem, og jeg havde meget ondt af ham.",
    "sv": "Den gamle mannen gick varje morgon ner till hamnen för att se om det hade kommit ett skepp från havet, och han "
    "väntade länge med de andra, som var lika trötta, men hans son var inte med.",
    "cyrillic": "Старик каждое утро спускался в гавань, чтобы посмотреть, какие лодки вернулись с моря, и долго ждал.",
    "cjk": "老人每天早上都到港口去看哪些船从海上回来了，他和别人一起等了很久，可是他的儿子不在船上。",
    "greek": "Ο γέρος κατέβαινε κάθε πρωί στο λιμάνι για να δει ποιες βάρκες είχαν γυρίσει από τη θάλασσα.",
    "arabic": "كان الرجل العجوز ينزل كل صباح إلى الميناء ليرى أي القوارب عادت من البحر.",
    "devanagari": "बूढ़ा आदमी हर सुबह बंदरगाह पर जाता था और देखता था कि कौन सी नावें लौट आई हैं।",
}
EVERY_RULE = FilterArguments(
    max_tokens_per_character=0.3,
    drop_below_characters=20,
    drop_above_characters=100_000,
    min_letter_share=0.7,
    max_repeated_line_share=0.2,
    max_repeated_ngram_share=0.15,
    max_url_share=0.2,
    keep_language="en",
)


def check(document, **rules):
    return DocumentFilter(FilterArguments(**rules)).check_text(document)


def read_texts(name):
    path = SHARED / "data" / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside this checkout")
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["text"])["text"].to_pylist()


def test_no_rule_is_on_by_default():
    nothing = DocumentFilter(FilterArguments())
    assert nothing.describe() == {}
    assert nothing.check_text("") is None
    assert nothing.check_tokens(1000, 1) is None


def test_a_filter_describes_its_rules_and_travels_to_workers():
    copy = pickle.loads(pickle.dumps(DocumentFilter(FilterArguments(keep_language="en", min_letter_share=0.0))))
    assert copy.describe() == {"min_letter_share": 0.0, "keep_language": "en"}
    assert copy.check_text(OTHERS["de"]) == "another language"


def test_compressibility_follows_the_paper():
    rule = DocumentFilter(FilterArguments(max_tokens_per_character=0.25))
    assert rule.check_tokens(24, 100) is None
    assert rule.check_tokens(25, 100) == "too many tokens per character"
    assert rule.check_text("x" * 10) is None


def test_lengths_are_kept_at_the_thresholds():
    rules = {"drop_below_characters": 3, "drop_above_characters": 5}
    assert [check("x" * length, **rules) for length in range(2, 7)] == [
        "too few characters",
        None,
        None,
        None,
        "too many characters",
    ]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("abc def\n", 1.0),
        ("ab 12", 0.5),
        ("{[@`", 0.0),
        ("", 0.0),
        (" \n", 0.0),
        ("é1", 0.5),
        ("語\u3000言", 1.0),
        ("की", 1.0),
        ("“a”", 1 / 3),
        ("\ud800z", 0.5),
    ],
)
def test_letter_share(text, share):
    assert count_characters(text).letter_share == share


def test_code_has_too_few_letters():
    code = "for (i = 0; i < n; i++) { a[i] += b[i] * c[i]; } // {0: 1, 2: 3}"
    assert check(code, min_letter_share=0.7) == "too few letters"
    assert check(ENGLISH, min_letter_share=0.9) is None


def test_url_share():
    assert url_share("see https://a.org/b now") == pytest.approx(15 / 23)
    assert url_share("www.a.org") == 1.0
    assert url_share("a://b and www") == 0.0
    assert check("http://a.org/x http://b.org/y", max_url_share=0.2) == "too many URLs"
    assert check(ENGLISH + " https://a.org", max_url_share=0.2) is None


def test_repeated_lines_count_by_their_characters():
    assert repeated_line_share("ab\n\n\n ab \ncd") == pytest.approx(2 / 6)
    assert repeated_line_share("one line") == 0.0
    assert repeated_line_share("\n\n") == 0.0
    assert check("menu\nhome\nmenu\nhome", max_repeated_line_share=0.2) == "repeated lines"


def reference_ngram_share(document):
    words = document.split()
    grams = [tuple(words[start : start + 5]) for start in range(len(words) - 4)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "ab", "é", "語言"]), max_size=60), st.sampled_from([" ", "\n", "\t"]))
def test_repeated_ngrams_equal_a_plain_reference(words, space):
    document = space.join(words)
    assert repeated_ngram_share(document) == pytest.approx(reference_ngram_share(document))


def test_repeated_ngrams_are_found_across_line_breaks_and_pieces():
    sentence = "the boat was far out at sea"
    assert repeated_ngram_share(f"{sentence} and {sentence.replace(' ', chr(10))}") == pytest.approx(3 / 11)
    long = " ".join(f"word{number}" for number in range(PIECE_BYTES // 4))
    assert repeated_ngram_share(long) == 0.0
    assert repeated_ngram_share(long + " " + long) == pytest.approx(0.5, abs=0.01)
    assert check(sentence + " " + sentence, max_repeated_ngram_share=0.15) == "repeated n-grams"


def test_real_books_have_the_shares_of_a_plain_reference():
    for document in read_texts("classic_books")[::1000]:
        if len(document.encode()) < PIECE_BYTES:
            assert repeated_ngram_share(document) == pytest.approx(reference_ngram_share(document), abs=2e-3)


@pytest.mark.parametrize("language", OTHERS)
def test_another_language_is_dropped(language):
    assert check(OTHERS[language], keep_language="en") == "another language"
    assert check(OTHERS[language] * 50, keep_language="en") == "another language"


@pytest.mark.parametrize("language", OTHERS)
def test_each_language_and_script_keeps_its_own(language):
    assert check(OTHERS[language], keep_language=language) is None
    assert check(ENGLISH, keep_language=language) == "another language"


def test_a_relative_that_shares_the_script_passes_as_the_help_says():
    ukrainian = "Старий щоранку спускався до гавані, щоб побачити, які човни повернулися з моря."
    assert check(ukrainian, keep_language="cyrillic") is None


def test_a_foreign_quotation_leaves_english_english():
    assert check(f"{ENGLISH} {OTHERS['greek'][:40]} {ENGLISH}", keep_language="en") is None
    assert check(f"{ENGLISH} {OTHERS['cjk'] * 20}", keep_language="en") == "another language"


def test_foreign_middle_of_a_long_document_is_seen():
    document = "1 2 3 4 5 6 7 8 9 " * 20 + (OTHERS["de"] + " ") * 20 + "1 2 3 4 5 6 7 8 9 " * 20
    assert check(document, keep_language="en") == "another language"
    assert check(document.replace(OTHERS["de"], ENGLISH), keep_language="en") is None


def test_each_frequent_word_speaks_for_one_language():
    words = [word for words in FREQUENT_WORDS.values() for word in words.split()]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(("name", "share"), [("classic_books", 0.001), ("modern_prose", 0.001)])
def test_real_english_prose_is_kept(name, share):
    texts = read_texts(name)[::4]
    rules = DocumentFilter(EVERY_RULE)
    assert sum(rules.check_text(text) is not None for text in texts) <= share * len(texts)


def test_real_documentation_strings_lose_their_noise():
    texts = read_texts("documentation")[::10]
    rules = DocumentFilter(EVERY_RULE)
    reasons = {rules.check_text(text) for text in texts}
    assert {None, "repeated lines", "repeated n-grams", "too few letters"} <= reasons


@pytest.mark.parametrize(
    "document", ["", " \n\t ", "word", "\ud800", "a\udfff b", "x" * 3_000_000, "\n" * 100_000, "a " * 200_000, "\x00"]
)
def test_no_document_raises(document):
    for language in (*LANGUAGES, *SCRIPTS):
        assert is_in_language(document, count_characters(document), language) in (True, False)
    for measure in (url_share, repeated_line_share, repeated_ngram_share):
        assert 0 <= measure(document) <= 1
    assert 0 <= count_characters(document).letter_share <= 1


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=300))
def test_any_characters_give_a_reason_or_none(document):
    rules = DocumentFilter(EVERY_RULE)
    assert rules.check_text(document) is None or isinstance(rules.check_text(document), str)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"min_letter_share": 1.5}, "min_letter_share is a share from 0 to 1"),
        ({"max_url_share": float("nan")}, "max_url_share is a share"),
        ({"max_tokens_per_character": 0.0}, "max_tokens_per_character must be above 0"),
        ({"drop_below_characters": 10, "drop_above_characters": 5}, "leave no document"),
        ({"drop_below_characters": -1}, "leave no document"),
        ({"drop_above_characters": 0}, "leave no document"),
        ({"keep_language": "False"}, "got 'no'"),
        ({"keep_language": "ru"}, "or a script .*cyrillic"),
        ({"sample_dropped": -1}, "sample_dropped must be at least 0"),
    ],
)
def test_a_bad_threshold_is_one_clear_line(rules, message):
    with pytest.raises(DataError, match=message) as error:
        FilterArguments(**rules)
    assert "\n" not in str(error.value)


def collect(documents, limit=3, parts=1):
    whole = DroppedSamples(limit)
    for part in range(parts):
        samples = DroppedSamples(limit)
        for document in documents[part::parts]:
            samples.add("repeated lines", document)
        whole.merge(samples)
    return whole


def test_samples_do_not_depend_on_order_or_workers(tmp_path):
    documents = [f"document {number}" for number in range(50)]
    expected = collect(documents)
    assert len(expected.by_reason["repeated lines"]) == 3
    for other in (collect(documents[::-1]), collect(documents, parts=7), collect([*documents, *documents[:20]])):
        assert other.by_reason == expected.by_reason
    expected.write(tmp_path / "a")
    collect(documents[::-1], parts=3).write(tmp_path / "b")
    first, second = ((tmp_path / name / "repeated_lines.jsonl").read_bytes() for name in "ab")
    assert first == second


def test_samples_are_files_for_a_person_to_read(tmp_path):
    samples = DroppedSamples(2)
    samples.add("repeated n-grams", "x" * 5000)
    samples.add("too short: a/b", "half \ud800 pair")
    samples.write(tmp_path / "dropped")
    assert {path.name for path in (tmp_path / "dropped").iterdir()} == {
        "repeated_n_grams.jsonl",
        "too_short_a_b.jsonl",
    }
    record = json.loads((tmp_path / "dropped" / "repeated_n_grams.jsonl").read_text())
    assert record == {"reason": "repeated n-grams", "characters": 5000, "text": "x" * 2000}


def test_samples_go_on_from_json():
    documents = [f"document {number}" for number in range(20)]
    begun = collect(documents[:10])
    resumed = DroppedSamples(3, json.loads(json.dumps(begun.by_reason)))
    resumed.merge(collect(documents[10:]))
    assert resumed.by_reason == collect(documents).by_reason


def test_without_a_limit_nothing_is_kept(tmp_path):
    samples = DroppedSamples(0)
    samples.add("repeated lines", "x")
    samples.write(tmp_path)
    assert samples.by_reason == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_answers_do_not_depend_on_the_hash_seed(python_environment):
    program = (
        "import sys; from hf_cram.data.filtering import *; from hf_cram.data.languages import *\n"
        "text = sys.stdin.buffer.read().decode(); samples = DroppedSamples(1)\n"
        "[samples.add('x', text[start:]) for start in range(9)]\n"
        "print(repeated_line_share(text), repeated_ngram_share(text), count_characters(text), samples.by_reason)\n"
        "print([is_in_language(text, count_characters(text), language) for language in LANGUAGES])"
    )
    text = "\n".join([*OTHERS.values(), ENGLISH, ENGLISH])
    outputs = set()
    for seed in ("1", "2"):
        environment = {**python_environment, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        outputs.add(subprocess.run(command, input=text.encode(), env=environment, capture_output=True).stdout)
    assert len(outputs) == 1
    assert len(outputs.pop()) > 500
