"""A recipe cut into tasks that know nothing of each other, and what they wrote joined as one machine would have it."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .cache import hash_of
from .deduplication import choose_bands
from .errors import DataError, SkipReport, first_line
from .input_files import expand_files
from .pipeline import DataArguments, open_cache
from .scale_shards import JoinedShards, sum_of_steps, task_seconds
from .source_arguments import INSTALLED_DOCS, MixedSource
from .sources import TextSource, check_stamps, stamps_of
from .stages import RowsStage, TokenizerStage, TokensStage
from .steps import StepRecord, read_steps
from .text_files import read_files
from .texts import NO_LIMIT, Place, Text
from .token_shards import TokenShards

POSITION_NAME = "position.json"
BLOCKS = "*.jsonl.zst"
# datatrove takes every pair that agrees in one band for duplicates and compares no further, so that less similar ones go
# as well; with 0.9 and at 0.8 there are 16 bands of 8 minima, where FineWeb used 14 of 8.
MINHASH_RECALL = 0.9


@dataclass(frozen=True)
class ScalePlan:
    """
    All that a task needs: the same in every process on every machine.

    Args:
        arguments: the recipe; its `cache_dir` is seen by all machines and gets everything that is written.
        identity: of the text, see [`TextSource`].
        files: the tasks read them, each a run of neighbours; `None` where one process deals the text into blocks first.
        stamps: of each of them what shows that it is still the one that was planned for.
    """

    arguments: DataArguments
    identity: str
    files: tuple[Path, ...] | None
    tasks: int
    stamps: tuple[tuple[int, int] | None, ...] = ()

    @property
    def cache(self) -> Path:
        return Path(str(self.arguments.cache_dir))

    @cached_property
    def folder(self) -> Path:
        """Of the work of the tasks: another one for every setting that changes it."""
        return self.cache / "scale" / hash_of(self.tokens_stage().key, self.tasks)

    @property
    def blocks(self) -> Path:
        return self.folder / "blocks"

    def task_tokens(self, rank: int) -> Path:
        """Folder of the token shards of a task."""
        return self.folder / "tokens" / f"{rank:05d}"

    def tokens_stage(self, text: Text | None = None) -> "JoinedTokensStage":
        """The tokens of all tasks; `text` is read where the tokenizer has yet to be trained."""
        return JoinedTokensStage(self, text or PlannedText(self))

    def rows_stage(self) -> RowsStage:
        return RowsStage(self.tokens_stage(), self.arguments, self.arguments)

    def documents(self, ranks: Iterable[int], report: SkipReport) -> Iterator[str]:
        """The documents of some tasks. Raises [`DataError`] for a file as [`read_files`] does, and for blocks that are gone."""
        if not self.files and read_position(self.blocks) is None:
            raise DataError(
                f"{self.blocks}: the dealt text is missing or damaged: run the command again, which deals it anew"
            )
        stamps = self._stamps if self.files else stamps_of(sorted(self.blocks.glob(BLOCKS)))
        files = list(stamps)
        # By the sizes that were planned: what one task reads must not hang on when it looks.
        parts = cut_by_size([stamp[0] if stamp else 0 for stamp in stamps.values()], self.tasks)
        (source, *_) = self.arguments.named_sources().values() if self.files else [MixedSource()]
        longest = source.max_document_characters if self.files else NO_LIMIT  # blocks hold what was checked
        for rank in ranks:
            part = files[parts[rank]]
            of_part = {file: stamps[file] for file in part}
            check_stamps(of_part)
            yield from read_files(part, report, source.text_column, source.text_file_documents, longest)
            check_stamps(of_part)

    @property
    def _stamps(self) -> dict[Path, tuple[int, int] | None]:
        return dict(zip(self.files or (), self.stamps, strict=True))

    def check_unchanged(self) -> None:
        """Raises [`DataError`] where one of the files is another one than was planned for."""
        check_stamps(self._stamps)


def make_plan(arguments: DataArguments, tasks: int) -> ScalePlan:
    """
    How the tasks share the text of a recipe.

    One source of at least as many local files as tasks is read by the tasks; any other text (a mix, a Hub data set,
    a few large files, the first documents only) is dealt into blocks by one process, since its order is known to a
    reader of all of it only. Raises [`DataError`] for what needs the whole text in one place.
    """
    if arguments.dedup_substring_bytes is not None:
        raise DataError(
            "dedup_substring_bytes compares the whole text in one place: leave it out here (near_dedup_similarity runs "
            "side by side), or prepare on one machine"
        )
    if arguments.cache_dir is None:
        raise DataError("set cache_dir: a folder that every machine sees")
    if arguments.max_train_tokens is not None:
        raise DataError(
            "max_train_tokens stops reading where so many tokens are there, which tasks side by side cannot tell: "
            "limit the text by max_documents, or by max_characters of its sources"
        )
    if arguments.overwrite_cache:
        raise DataError("overwrite_cache would be heard by every task: delete cache_dir, or name another one")
    arguments = _with_absolute_places(arguments)
    sources = list(arguments.named_sources().values())
    files = stamps_of(expand_files(sources[0].train_files) if sources[0].train_files else [])
    identity = TextSource(arguments, open_cache(arguments), workers=arguments.preprocessing_workers).identity
    limits = (sources[0].max_documents, sources[0].max_characters, sources[0].max_tokens, arguments.max_documents)
    is_read_whole = len(sources) == 1 and sources[0].max_passes == 1 and not any(limits)
    if is_read_whole and len(files) >= tasks:
        return ScalePlan(arguments, identity, tuple(files), tasks, tuple(files.values()))
    return ScalePlan(arguments, identity, None, tasks)


def _with_absolute_places(arguments: DataArguments) -> DataArguments:
    """The same recipe for processes that start in other folders."""

    def absolute(name: str) -> str:
        try:
            return str(Path(name).expanduser().absolute())
        except RuntimeError as error:  # an unknown user's home
            raise DataError(f"{name}: cannot be used ({first_line(error)})") from error

    def with_absolute(places: dict[str, Any]) -> dict[str, Any]:
        files, dataset = places.get("train_files"), places.get("dataset_name")
        is_folder = dataset not in (None, INSTALLED_DOCS) and Path(str(dataset)).is_dir()
        return {
            **places,
            "train_files": None if files is None else [absolute(file) for file in files],
            "dataset_name": absolute(str(dataset)) if is_folder else dataset,
        }

    sources = arguments.sources
    if isinstance(sources, dict):
        sources = {name: with_absolute(source) for name, source in sources.items()}
    own = with_absolute({name: getattr(arguments, name) for name in ("train_files", "dataset_name")})
    tokenizer = arguments.tokenizer_name
    if tokenizer is not None and Path(tokenizer).exists():
        tokenizer = absolute(tokenizer)
    cache = absolute(str(arguments.cache_dir))
    return replace(arguments, cache_dir=cache, sources=sources, tokenizer_name=tokenizer, **own)


def cut_by_size(sizes: list[int], parts: int) -> list[slice]:
    """Runs of neighbours, `parts` of them and of about equal size; some may be empty."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(sizes) else 0
    # Each to the part in which its middle lies.
    part_of = [
        min(parts - 1, (2 * int(end) - size) * parts // (2 * total or 1))
        for end, size in zip(ends, sizes, strict=True)
    ]
    bounds = np.searchsorted(part_of, np.arange(parts + 1))
    return [slice(int(first), int(end)) for first, end in itertools.pairwise(bounds)]


def write_position(blocks: Path, skipped: dict[str, int], sources: dict[str, dict[str, int]]) -> None:
    """Write beside the blocks what was read and left out, and how large they are."""
    position = {"skipped": skipped, "sources": sources, "blocks": _sizes(blocks)}
    (blocks / POSITION_NAME).write_text(json.dumps(position) + "\n", encoding="utf-8")


def read_position(blocks: Path) -> dict[str, Any] | None:
    """What [`write_position`] has written; `None` where the text is not dealt, or a block is missing or damaged."""
    try:
        position = json.loads((blocks / POSITION_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sizes = _sizes(blocks)
    return position if sizes and position.get("blocks", sizes) == sizes else None


def _sizes(blocks: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(blocks.glob(BLOCKS))}


class PlannedText:
    """The text as the tasks see it; what was done to its documents is known when their tokens are joined."""

    def __init__(self, plan: ScalePlan):
        self.plan = plan
        self.identity = plan.identity
        self.report = SkipReport()
        self.counts: dict[str, dict[str, int]] = {}
        self.estimated_characters: int | None = None
        self.steps: list[StepRecord] = []
        self.removed: dict[str, Any] = {}

    def documents(self, count_tokens: Callable[[str], int] | None = None) -> Iterator[str]:
        return self.plan.documents(range(self.plan.tasks), self.report)

    def check_unchanged(self) -> None:
        self.plan.check_unchanged()


class JoinedTokensStage(TokensStage):
    """[`TokensStage`] whose shards the tasks have written: the same tokens, cut elsewhere."""

    def __init__(self, plan: ScalePlan, text: Text):
        arguments = plan.arguments
        super().__init__(TokenizerStage(text, arguments, Place(plan.cache, False, 1)), arguments, arguments)
        self.plan = plan

    @cached_property
    def key(self) -> str:
        """That of the tokens of one machine where they are the same; which near-duplicate stays is up to datatrove."""
        similarity = self.plan.arguments.near_dedup_similarity
        if similarity is None:
            return super().key
        bands = choose_bands(similarity, MINHASH_RECALL)
        return hash_of(super().key, "datatrove minhash, numbers and accents kept", bands, self.plan.tasks)

    def open(self) -> tuple[TokenShards, list[StepRecord]]:
        folders = [self.plan.task_tokens(rank) for rank in range(self.plan.tasks)]
        shards = JoinedShards(folders, self.settings.dtype)
        record = sum_of_steps([record for folder in folders for record in read_steps(folder)])
        position = shards.summaries[-1].position
        if self.plan.arguments.near_dedup_similarity is not None:
            read = position["read"]
            self.text.steps.append(
                StepRecord(
                    "near duplicates", read["documents"], record.documents_in, read["characters"],
                    record.characters_in, seconds=task_seconds(self.plan.folder / "logs", "minhash-*"),
                )
            )  # fmt: skip
            self.text.removed["near_duplicates"] = read["documents"] - (record.documents_in or 0)
        if self.plan.files is None:
            dealt = read_position(self.plan.blocks)
            if dealt is None:
                raise DataError(f"{self.plan.blocks}: the dealt text is missing or damaged: run the command again")
            position.update({name: dealt[name] for name in ("skipped", "sources")})
        else:
            position["sources"] = dict.fromkeys(self.plan.arguments.named_sources(), position["read"])
        return shards, [record]
