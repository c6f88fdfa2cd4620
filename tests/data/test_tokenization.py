"""The trained tokenizer: the paper's normaliser, the same in every run, loadable anywhere."""

import random

import pytest

from hf_cram.data.errors import DataError
from hf_cram.data.tokenization import SMALLEST_VOCABULARY, load_tokenizer, read_tokenizer, train_tokenizer

TEXT = [
    f"The {adjective} {noun} number {index} was seen by {name}, who said: “{verb} it!”"
    for index, (adjective, noun, name, verb) in enumerate(
        (a, n, m, v)
        for a in ("quick", "brown", "lazy", "unbelievable")
        for n in ("fox", "dog", "elephant", "tokenizer")
        for m in ("Ann", "José", "Müller")
        for v in ("take", "leave", "tokenize")
    )
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(iter(TEXT), 160, show_progress=False)


def test_normaliser_is_the_papers(trained):
    tokens = trained.tokenize("The  QUICK José,\tsaid “Müller”\x00 → lazily!")
    assert trained.convert_tokens_to_string(tokens).replace(" ", "") == "thequickjose,saidmullerlazily!"
    assert "[UNK]" not in tokens


def test_size_and_special_tokens(trained):
    assert len(trained) == 160
    assert trained.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert trained.decode(trained("the fox", "the dog")["input_ids"]) == "[CLS] the fox [SEP] the dog [SEP]"
    assert "[MASK]" in trained.tokenize("the [MASK] fox")
    assert sorted(trained.all_special_ids) == [0, 1, 2, 3, 4]


def test_a_text_too_small_for_the_vocabulary_warns(caplog):
    small = train_tokenizer(["a few words"], 5000, show_progress=False)
    assert len(small) < 200
    assert "fewer than 5000" in caplog.text
    assert "[UNK]" not in small.tokenize("completely different words 123 #!?")


def test_letters_that_are_lost_are_told(caplog):
    times = 100
    with pytest.raises(DataError, match="^100.0% of the text's letters are not ASCII, .*tokenizer_name"):
        train_tokenizer(["Привет, мир 2024!"] * times, 160, show_progress=False)
    train_tokenizer(["Straße und Größe"] * times, 160, show_progress=False)
    assert "14.3% of the text's letters are not ASCII" in caplog.text
    caplog.clear()
    german = ["Am Abend ging sie noch einmal in die Stadt, um für den Besuch ein paar Blumen zu kaufen."] * 4
    train_tokenizer([*german, "Die Straße war leer."] * times, 160, show_progress=False)
    assert "0.3% of the text's letters are not ASCII" in caplog.text
    caplog.clear()
    for harmless in (["El niño comió después"] * times, ["12 34 56"] * times, []):
        train_tokenizer(harmless, 160, show_progress=False)
        assert "ASCII" not in caplog.text


def test_words_that_no_tokenizer_learns_cost_nothing():
    """By the library's trainer a word takes time by the square of its length: this one more than a test may last."""
    blob = random.Random(0).randbytes(1_000_000).hex()
    trained = train_tokenizer([*TEXT, f"{TEXT[0]} {blob} {TEXT[1]}"], 160, show_progress=False)
    assert trained.get_vocab() == train_tokenizer([*TEXT, *TEXT[:2]], 160, show_progress=False).get_vocab()


def test_a_vocabulary_below_the_alphabet_is_refused():
    with pytest.raises(DataError, match=str(SMALLEST_VOCABULARY)):
        train_tokenizer(TEXT, 50)


def test_existing_tokenizers(trained, tokenizer, tmp_path):
    trained.save_pretrained(tmp_path / "good")
    assert load_tokenizer(tmp_path / "good").get_vocab() == trained.get_vocab()
    maskless = train_tokenizer(TEXT, 160, show_progress=False)
    maskless.mask_token = None
    maskless.save_pretrained(tmp_path / "maskless")
    with pytest.raises(DataError, match="has no mask_token"):
        load_tokenizer(tmp_path / "maskless")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": None}, "neither a tokenizer.json nor another vocabulary"),
        ({"tokenizer.json": '{"version": "1.0", "mod'}, "cannot be loaded: Unterminated string"),
        ({"tokenizer.json": "[1, 2]"}, "its files are damaged"),
        ({"tokenizer.json": '{"version": "1.0"}'}, "its files are damaged"),
        ({"tokenizer_config.json": "[]"}, "its files are damaged"),
        # transformers would make a tokenizer of the special tokens alone
        (
            {"tokenizer.json": None, "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'},
            "vocabulary is empty",
        ),
    ],
)
def test_damaged_tokenizers_are_one_line(trained, tmp_path, files, message):
    folder = tmp_path / "broken"
    trained.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
    for load in (read_tokenizer, load_tokenizer):
        with pytest.raises(
            DataError, match=f"tokenizer '.*broken' cannot be loaded: .*{message.split(': ')[-1]}"
        ) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
