"""Train a WordPiece tokenizer, or load any other."""

import json
import logging
import re
import string
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import DataError, first_line

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
CONTINUATION = "##"
LOADING_KEYS = ("is_local", "local_files_only", "name_or_path")
NON_ASCII = r"[^\x00-\x7f]"
WORD_CHARACTERS = string.ascii_lowercase + string.digits
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(WORD_CHARACTERS) * 2 + len(string.punctuation)
SMALLEST_ALPHABET = 3  # ordinary tokens of a tokenizer that can read anything
JUDGED_CHARACTERS = 200  # of a document
LOST_LETTERS_TOLD, LOST_LETTERS_REFUSED = 0.001, 0.9
# Such a word is [UNK] to WordPiece, and learning from it takes time by the square of its length.
LONGEST_WORD = 100
LONGER_WORDS = re.compile(rf"[^\W_]{{{LONGEST_WORD + 1},}}")


def _untrained(vocabulary: dict[str, int] | None = None) -> Tokenizer:
    """The paper's pipeline: lower case, no accents, ASCII only, BERT's words, WordPiece (section 4.1)."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.BertNormalizer(
                clean_text=True, handle_chinese_chars=False, strip_accents=True, lowercase=True
            ),
            normalizers.Replace(Regex(NON_ASCII), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int, show_progress: bool = True) -> PreTrainedTokenizerFast:
    """
    A WordPiece tokenizer of `vocab_size` tokens (fewer, with a warning, where the text has fewer) trained on documents.

    The same documents give the same vocabulary. Special tokens are `[PAD]` 0, `[UNK]` 1, `[CLS]` 2, `[SEP]` 3,
    `[MASK]` 4; sequences and pairs are wrapped as BERT's. Letters beyond ASCII are left out (accents only are taken
    off): a text that would lose some gets a warning, and [`DataError`] is raised for one that would lose nearly all.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(f"vocab_size must be at least {SMALLEST_VOCABULARY} (special tokens, letters, digits, signs)")
    trained = _untrained()
    # Word-internal characters get their ids in the order in which words are met, which differs from run to run, and
    # ties between merges follow the ids: fixing these ids first makes training deterministic.
    first_tokens = [*SPECIAL_TOKENS.values(), *(CONTINUATION + character for character in WORD_CHARACTERS)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=first_tokens,
        initial_alphabet=list(WORD_CHARACTERS + string.punctuation),
        continuing_subword_prefix=CONTINUATION,
        show_progress=show_progress,
    )
    trained.train_from_iterator(_for_training(documents, trained.normalizer.normalize_str), trainer)
    vocabulary = trained.get_vocab()
    if len(vocabulary) < vocab_size:
        logger.warning("The text gives a vocabulary of %d tokens, fewer than %d", len(vocabulary), vocab_size)
    # Built anew, since the trainer has made special tokens of all the first ones.
    backend = _untrained(vocabulary)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def _for_training(documents: Iterable[str], normalize: Callable[[str], str]) -> Iterator[str]:
    """
    Pass the documents on without words that no tokenizer learns, and tell at their end what the beginnings of all of
    them lose of their letters.
    """
    letters = kept = 0
    for document in documents:
        beginning = document[:JUDGED_CHARACTERS]
        count = _count_letters(beginning)
        letters += count
        kept += count if beginning.isascii() else _count_letters(normalize(beginning))
        if len(document) > LONGEST_WORD and max(map(len, document.split()), default=0) > LONGEST_WORD:
            document = LONGER_WORDS.sub(" ", document)
        yield document
    lost = (letters - kept) / max(letters, 1)
    told = f"{lost:.1%} of the text's letters are not ASCII, and a tokenizer trained here leaves them out"
    if lost > LOST_LETTERS_REFUSED:
        raise DataError(f"{told}: name an existing one with tokenizer_name")
    if lost > LOST_LETTERS_TOLD:
        logger.warning("%s; tokenizer_name names an existing one", told)


def _count_letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def read_tokenizer(
    name_or_path: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Any tokenizer, of a folder or of the Hub. Raises [`DataError`] where its files are missing or damaged."""
    name = str(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # what tokenizers raises for a damaged file is of no narrower class
        cause = first_line(error)
        if isinstance(error, ImportError):
            cause = " ".join(str(error).split())  # which package, and how to install it
        elif not isinstance(error, OSError | ValueError):
            cause = f"its files are damaged ({type(error).__name__}: {cause})"
        elif cause.startswith("Couldn't instantiate the backend tokenizer"):  # the head of a list of what was tried
            cause = "it has neither a tokenizer.json nor another vocabulary"
        raise DataError(f"tokenizer {name!r} cannot be loaded: {cause}") from error
    # Without the file of the vocabulary, transformers makes a tokenizer of the special tokens alone.
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < SMALLEST_ALPHABET:
        raise DataError(f"tokenizer {name!r} cannot be loaded: its vocabulary is empty, or the file of it is missing")
    return tokenizer


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `save_pretrained` writes of a tokenizer beside its vocabulary, without how it was loaded here."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return saved_settings(Path(folder)) or {}


def saved_settings(folder: Path) -> dict[str, Any] | None:
    """[`tokenizer_settings`] of the tokenizer in a folder, `None` where there is none."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {name: value for name, value in settings.items() if name not in LOADING_KEYS}


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Any fast tokenizer with mask, padding and separator tokens. Raises [`DataError`] where it lacks one."""
    tokenizer = read_tokenizer(name_or_path)
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {str(name_or_path)!r} has no fast version, which packing needs")
    for name in ("mask_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise DataError(f"tokenizer {str(name_or_path)!r} has no {name}: masked language modeling needs one")
    if tokenizer.sep_token is None:
        if tokenizer.eos_token is None:
            raise DataError(f"tokenizer {str(name_or_path)!r} has neither sep_token nor eos_token between documents")
        tokenizer.sep_token = tokenizer.eos_token
    return tokenizer
