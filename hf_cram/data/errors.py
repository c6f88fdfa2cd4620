"""What is wrong with a text: the error for all of it, the count of the documents left out."""

import difflib
import logging
from collections import Counter
from collections.abc import Collection, Iterable

from ..hub_errors import first_line as first_line  # of any error, and safe for the Hub's

logger = logging.getLogger(__name__)

NAME_CHARACTERS = 60
REPEAT_TEXT = (
    "repeat every setting of the text, max_train_tokens included (installed-docs are another text whenever packages are "
    "installed or removed, and so is any behind another version of hf_cram or tokenizers), or start a new run"
)


class DataError(ValueError):
    """The text cannot be used; the message names the file or data set, the cause and the way out."""


class TextChangedError(DataError):
    """A file is another one than when its content was hashed: what was read of it goes by a wrong key."""


class SkipReport:
    """Counts documents left out, by reason, and remembers the first place of each; a `total` counts them too."""

    def __init__(self, total: "SkipReport | None" = None) -> None:
        self.counts: Counter[str] = Counter()
        self.first_places: dict[str, str] = {}
        self.total = total

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        self.first_places.setdefault(reason, place)
        if self.total is not None:
            self.total.add(reason, place)

    def describe(self) -> str:
        """The reasons in one line."""
        return ", ".join(f"{reason} ({count})" for reason, count in sorted(self.counts.items()))

    def warn(self) -> None:
        """Log one line for each reason."""
        for reason, count in sorted(self.counts.items()):
            place = self.first_places.get(reason)  # unknown where the counts come from a cache
            logger.warning("%d documents skipped: %s%s", count, reason, f" (first: {place})" if place else "")


def system_cause(error: BaseException) -> str:
    """What the system says of a failed operation, in one line, without the file's name."""
    return getattr(error, "strerror", None) or first_line(error)


def shortened(name: str) -> str:
    """A name from elsewhere in one line of bounded length."""
    line = " ".join(name.split())
    return line if len(line) <= NAME_CHARACTERS else f"{line[:NAME_CHARACTERS]}..."


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'text'?` for the valid name most like `name`, or nothing."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def did_you_mean(name: str, valid: Collection[str]) -> str:
    """[`nearest`] with all valid names behind it: `; did you mean 'text'? (valid: text, texts)`."""
    return f"{nearest(name, valid)} (valid: {', '.join(valid)})"
