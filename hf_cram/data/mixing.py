"""Several sources as one stream: at every prefix each has its share of the characters."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

# Before there is a tokenizer: a vocabulary of 32768 gives 4.8 on books and encyclopedias, less where text is noisier.
CHARACTERS_PER_TOKEN = 4.5
TOKEN_SAMPLE_DOCUMENTS = 16


@dataclass(eq=False)
class MixedStream:
    """
    The documents of one source of a mix, drawn one by one up to its limits, and what has been drawn so far.

    Args:
        weight: share of the mix, relative to those of the other sources.
        max_characters, max_tokens: the stream ends before the document that would pass one of them.
        count_tokens: number of tokens of a text. Every 16th document is counted, the others by their characters;
            without it 4.5 characters are taken for a token.
    """

    name: str
    documents: Iterator[str]
    weight: float = 1.0
    max_characters: int | None = None
    max_tokens: int | None = None
    count_tokens: Callable[[str], int] | None = None
    num_documents: int = field(default=0, init=False)
    num_characters: int = field(default=0, init=False)
    at_limit: bool = field(default=False, init=False)
    sampled_tokens: float = field(default=1, init=False)
    sampled_characters: float = field(default=CHARACTERS_PER_TOKEN, init=False)

    @property
    def progress(self) -> float:
        """Characters drawn for each unit of weight: equal in all streams where the shares are met."""
        return self.num_characters / self.weight

    def draw(self) -> str | None:
        """The next document, `None` where there is none or a limit is reached."""
        document = next(self.documents, None)
        if document is None:
            return None
        sampled = self.max_tokens is not None and self.num_documents % TOKEN_SAMPLE_DOCUMENTS == 0
        if self.count_tokens is not None and sampled:
            self.sampled_tokens += self.count_tokens(document)
            self.sampled_characters += len(document)
        characters = self.num_characters + len(document)
        self.at_limit = (self.max_characters is not None and characters > self.max_characters) or (
            self.max_tokens is not None and self._tokens(characters) > self.max_tokens
        )
        if self.at_limit:
            return None
        self.num_documents += 1
        self.num_characters = characters
        return document

    def estimate(self, share: float | None, max_documents: int | None) -> float | None:
        """Characters of the whole stream, estimated from what has been drawn, which is `share` of its source."""
        if not self.num_documents:
            return None
        bounds = [
            (1 / share if share else None, self.num_characters),
            (max_documents, self.num_characters / self.num_documents),
            (self.max_characters, 1),
            (self.max_tokens, self.sampled_characters / self.sampled_tokens),
        ]
        return min((bound * characters for bound, characters in bounds if bound is not None), default=None)

    def _tokens(self, characters: int) -> int:
        return round(characters * self.sampled_tokens / self.sampled_characters)


def mix_streams(streams: Iterable[MixedStream], on_end: Callable[[MixedStream, int], None]) -> Iterator[str]:
    """
    One stream of documents: the next one always comes from the source furthest behind its share (the first of equals).

    So every prefix has the shares of the weights up to one document a source, nothing is read ahead, and the order
    among some sources does not depend on the others. Where a source ends the others go on with their relative weights;
    `on_end` gets it and how many are left.
    """
    running = list(streams)
    while running:
        behind = min(running, key=lambda stream: stream.progress)
        document = behind.draw()
        if document is None:
            running.remove(behind)
            on_end(behind, len(running))
        else:
            yield document
