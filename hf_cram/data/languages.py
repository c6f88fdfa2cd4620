"""What characters and frequent words tell of a language: small constants, no model."""

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WINDOWS, WINDOW_CHARACTERS = 3, 300
MIN_SCRIPT_SHARE = 0.8
MIN_FREQUENT_WORD_SHARE = 0.15
MIN_WORDS_TO_TELL = 10

# Scripts as Unicode names them; Chinese characters are "cjk".
SCRIPTS = ("latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "cjk", "hangul", "thai")
# Frequent words, each with the language that uses it most; what several use alike ("de", "la", "a") would tell little.
FREQUENT_WORDS = {
    "en": "the of and to in is was that with for it as on or an so we his but they which this from are be not by have "
    "you at were their she her my would there what who if when has been said can our its them these than could him upon "
    "shall should some such into only any other may must your also known used thou thy unto hath",
    "de": "der die das und ist nicht ein eine den dem von zu mit sich auf für im auch sie ich wir ihr wird sind bei aus "
    "nach einer einem einen eines wie als oder aber wenn nur über noch kann haben werden wurde durch zum zur vom",
    "fr": "le les et est une du dans qui ne pas pour sur par avec ce cette ces sont où nous vous ils au aux leur leurs "
    "été ses être avait lui comme tout je elle c'est d'un d'une qu'il fait même",
    "es": "el los las del y su sus pero más está fue muy también cuando sin hasta donde había ella él porque como este",
    "it": "di che è non gli della dei delle nel nella alla sono anche più questo dal dalla degli suo essere perché loro "
    "ed ai tra un'altra c'è quando",
    "pt": "os em um uma não é com na ao aos pelo pela foi são seu ele ela você isso também já muito às até nas pelos",
    "nl": "het een van zijn dat niet met op voor aan ook door naar maar om bij uit nog hij ze worden wordt deze heeft ik "
    "wij kan dan wat werd",
    "da": "og ikke af jeg det på til var havde blev han hun fra meget deres mig efter hans skal vil",
    "sv": "och att inte som är för med ett av hade så jag till skulle detta från ut honom hennes sina",
}
LANGUAGES = tuple(FREQUENT_WORDS)
LANGUAGE_OF_WORD = {word: language for language, words in FREQUENT_WORDS.items() for word in words.split()}


def language_code(value: str | None) -> str | None:
    """A code as it was meant: YAML reads a bare `no`, Norwegian, as False."""
    return "no" if str(value) == "False" else value


@dataclass
class CharacterCounts:
    """A text's characters: how many, its ASCII letters and white space, and each of the others with its count."""

    characters: int
    ascii_letters: int
    ascii_blanks: int
    others: Counter[str]

    @property
    def letter_share(self) -> float:
        """Letters and their marks among the characters that are not white space; 0 where there is none."""
        letters, blanks = self.ascii_letters, self.ascii_blanks
        for character, count in self.others.items():
            letters += count * (unicodedata.category(character)[0] in "LM")
            blanks += count * character.isspace()
        return letters / max(1, self.characters - blanks)

    def script_share(self, script: str) -> float:
        """Letters of a script among all letters; 0 where there is none."""
        scripts = Counter(latin=self.ascii_letters)
        for character, count in self.others.items():
            if character.isalpha():
                scripts[_script(character)] += count
        return scripts[script] / max(1, scripts.total())


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """The first word of a letter's Unicode name: "latin", "cyrillic", "cjk"."""
    return unicodedata.name(letter, "").partition(" ")[0].lower()


def count_characters(text: str) -> CharacterCounts:
    """Count on the bytes of UTF-8: all but the characters beyond ASCII costs less than a nanosecond a byte."""
    encoded = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    letters = int(np.count_nonzero(((encoded | 32) - 97) < 26))  # unsigned: what lies before "a" becomes large
    blanks = int(np.count_nonzero(encoded <= 32))
    beyond = "" if text.isascii() else encoded[encoded > 127].tobytes().decode("utf-8", "surrogatepass")
    return CharacterCounts(len(text), letters, blanks, Counter(beyond))


def is_in_language(document: str, counts: CharacterCounts, language: str) -> bool:
    """
    Whether a document looks like a language or script: at least 0.8 of its letters are of the script.

    For a language three windows (beginning, middle, end) are read: no other one may have more of its frequent words
    there, and of ten or more words 0.15 must be its own (English prose has 0.19 to 0.75).
    """
    if counts.script_share("latin" if language in LANGUAGES else language) < MIN_SCRIPT_SHARE:
        return False
    if language in SCRIPTS:
        return True
    words = _windows(document).lower().split()
    hits = Counter(map(LANGUAGE_OF_WORD.get, words))
    num_words = sum(map(str.isalpha, words))  # without numbers, signs and what a comma follows
    if num_words >= MIN_WORDS_TO_TELL and hits[language] < MIN_FREQUENT_WORD_SHARE * num_words:
        return False
    return hits[language] >= max(hits[other] for other in LANGUAGES)


def _windows(document: str) -> str:
    gap = (len(document) - WINDOW_CHARACTERS) // (WINDOWS - 1)
    if gap <= WINDOW_CHARACTERS:
        return document[: WINDOWS * WINDOW_CHARACTERS]
    starts = [window * gap for window in range(WINDOWS)]
    return " ".join([document[start : start + WINDOW_CHARACTERS] for start in starts])
