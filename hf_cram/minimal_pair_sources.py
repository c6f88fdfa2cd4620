"""Minimal pairs in BLiMP's format (Warstadt et al. 2020): from files, folders, and data sets on the Hub."""

import gzip
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .data.errors import DataError, first_line, shortened, system_cause
from .data.hub_datasets import cache_of_folder, fingerprint_folder, place_of, reading_errors
from .data.input_files import files_below

logger = logging.getLogger(__name__)

SENTENCE_KEYS = ("sentence_good", "sentence_bad")
PHENOMENON_KEYS = ("linguistics_term", "UID", "field")  # the first one that a pair has names its phenomenon
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write it, no tokenizer reads it
FILE_ENDINGS = (".jsonl", ".jsonl.gz")


class MinimalPairsError(ValueError):
    """Pairs or a model that cannot be used, in one line that names the place and the way out."""


class MinimalPair(NamedTuple):
    """Two sentences that differ in what makes the second one bad. `place` is where they stand, for errors."""

    good: str
    bad: str
    phenomenon: str = "all"
    place: str = "a pair"


def read_pairs(sources: Sequence[str], limit: int | None = None) -> list[MinimalPair]:
    """
    The pairs of files (`.jsonl`, `.jsonl.gz`), of folders of them, and of data sets on the Hub or laid out like one.

    `limit` takes that many pairs from the start of each file or configuration. Pairs of equal sentences are left out,
    with a warning that counts them. Raises [`MinimalPairsError`].
    """
    pairs = []
    for source in sources:
        path, files = _files_of(source)
        if not files and not path.is_dir() and (source.endswith((".jsonl", ".gz")) or source.count("/") != 1):
            raise MinimalPairsError(f"{source}: no such file or folder, and not the name of a data set (owner/name)")
        for file in files:
            pairs += _first(_read_file(file), limit, str(file))
        if not files:
            for name, rows in _hub_configurations(str(path) if path.is_dir() else source):
                pairs += _first(rows, limit, name)
    different = [pair for pair in pairs if pair.good != pair.bad]
    if len(different) < len(pairs):
        place = next(pair.place for pair in pairs if pair.good == pair.bad)
        logger.warning("%d pairs of equal sentences are left out, the first: %s", len(pairs) - len(different), place)
    if not different:
        raise MinimalPairsError("there are no pairs to score: both sentences of each are equal")
    return different


def _files_of(source: str) -> tuple[Path, list[Path]]:
    """The path that a source is or would be, and the files of pairs there. Raises [`MinimalPairsError`]."""
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return path, [path]
        below = sorted(files_below(path)) if path.is_dir() else []
        return path, [file for file in below if file.name.endswith(FILE_ENDINGS)]
    except (OSError, RuntimeError) as error:  # the latter for an unknown user's home
        place = getattr(error, "filename", None) or source
        raise MinimalPairsError(f"{shortened(str(place))}: cannot be read ({system_cause(error)})") from error


def _first(pairs: Iterator[MinimalPair], limit: int | None, source: str) -> list[MinimalPair]:
    """At most `limit` pairs of one source, at least one."""
    taken = list(itertools.islice(pairs, limit))
    if not taken:
        raise MinimalPairsError(f"{source}: it holds no pairs, leave it out")
    return taken


def _read_file(file: Path) -> Iterator[MinimalPair]:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{file}, line {number}"
                    try:
                        values = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise MinimalPairsError(f"{place}: not valid JSON ({error}): one object a line") from error
                    yield _to_pair(values, file.name.split(".")[0], place)
    except UnicodeDecodeError as error:
        raise MinimalPairsError(f"{file}: not UTF-8, save it as such") from error
    except (OSError, EOFError, zlib.error) as error:
        raise MinimalPairsError(f"{file}: cannot be read ({error})") from error


def _to_pair(values: Any, default_phenomenon: str, place: str) -> MinimalPair:
    if not isinstance(values, dict):
        raise MinimalPairsError(f"{place}: not an object with the keys {' and '.join(SENTENCE_KEYS)}")
    for key in SENTENCE_KEYS:
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise MinimalPairsError(f"{place}: no sentence under the key {key!r} (keys: {', '.join(values)})")
        if LONE_SURROGATE.search(values[key]):
            raise MinimalPairsError(f"{place}: the sentence under {key!r} has half a character, leave the pair out")
    names = [values[key] for key in PHENOMENON_KEYS if values.get(key)]
    good, bad = (values[key] for key in SENTENCE_KEYS)
    return MinimalPair(good, bad, " ".join(str(names[0] if names else default_phenomenon).split()), place)


def _hub_configurations(name: str) -> Iterator[tuple[str, Iterator[MinimalPair]]]:
    """Name and pairs of each configuration and split: BLiMP on the Hub has a configuration a paradigm."""
    from datasets import get_dataset_config_names, load_dataset  # seconds of import that local files do not need

    try:
        place_of_rows = place_of(name)
        folder = Path(place_of_rows)
        cache_dir = cache_of_folder(fingerprint_folder(folder)) if folder.is_dir() else None
        for configuration in get_dataset_config_names(place_of_rows):
            for split, rows in load_dataset(place_of_rows, configuration, cache_dir=cache_dir).items():
                place = f"{name}, {configuration}, {split}"
                numbered = enumerate(rows, start=1)
                yield place, (_to_pair(row, configuration, f"{place}, row {number}") for number, row in numbered)
    except reading_errors() as error:
        if isinstance(error, MinimalPairsError):
            raise
        if isinstance(error, DataError):
            raise MinimalPairsError(str(error)) from error
        cause = first_line(error.__cause__ or error)
        raise MinimalPairsError(f"data set {name!r} cannot be loaded: {cause}") from error
