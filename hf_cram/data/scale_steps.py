"""The steps of the pipeline as datatrove's: the same code, on the part of the text that is a task's."""

import contextlib
import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.word_tokenizers import WordTokenizer
from transformers.utils.logging import disable_progress_bar

from .errors import DataError, SkipReport
from .scale_plan import ScalePlan, read_position, write_position
from .scale_shards import write_once
from .sources import TextSource
from .steps import StepRecord, measured_step, write_steps
from .texts import SourceText, write_documents
from .token_shards import TokenShards, write_token_shards


def prepare_process() -> None:
    """A task has one core, and its log is no terminal."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bar()


class AfterStage(PipelineStep):
    """
    Lets a task begin only when every task of the stage before has finished: of several job arrays Slurm asks the last alone
    whether it has succeeded, and datatrove takes what is missing for nothing to do.
    """

    type = "hf_cram"
    name = "after the stage before"

    def __init__(self, logs: Path, tasks: int):
        super().__init__()
        self.logs = logs
        self.tasks = tasks

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> None:
        unfinished = self.tasks - sum(1 for _ in (self.logs / "completions").glob("*"))
        if unfinished > 0:
            raise DataError(f"{unfinished} tasks of {self.logs.name} have not finished: run the command again")


class OpenManyFiles(PipelineStep):
    """As many open files as the machine allows: of every task datatrove's buckets read one at once, its clusters write one."""

    type = "hf_cram"
    name = "open many files"

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):  # a system that takes no such number
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class PrepareText(PipelineStep):
    """Train the tokenizer, and deal the text into blocks where the tasks cannot read it themselves; one task."""

    type = "hf_cram"
    name = "prepare the text"

    def __init__(self, plan: ScalePlan):
        super().__init__()
        self.plan = plan

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> None:
        disable_progress_bar()
        with self.track_time("task"):
            if self.plan.files is not None:
                _ = self.plan.tokens_stage().tokenizer.tokenizer
                return
            text = SourceText(TextSource(self.plan.arguments, self.plan.cache))
            if text.identity != self.plan.identity:
                raise DataError("the text has changed since the tasks were planned: start again")
            stage = self.plan.tokens_stage(text)
            _ = stage.tokenizer.tokenizer
            if not _is_dealt(self.plan.blocks):
                documents = text.documents(stage.token_counter)
                write_once(self.plan.blocks, lambda folder: self._deal(text, documents, folder), _is_dealt)

    def _deal(self, text: SourceText, documents: Iterator[str], folder: Path) -> None:
        write_documents(documents, folder)
        text.check_unchanged()  # a limit may have ended the text before its own look
        text.report.warn()
        write_position(folder, dict(text.report.counts), text.counts)


def _is_dealt(blocks: Path) -> bool:
    return read_position(blocks) is not None


class ReadDocuments(PipelineStep):
    """The documents of a task, in their order in the text."""

    type = "hf_cram"
    name = "read documents"

    def __init__(self, plan: ScalePlan):
        super().__init__()
        self.plan = plan
        self.report = SkipReport()
        self.num_documents = self.num_characters = 0

    @property
    def position(self) -> dict[str, dict[str, int]]:
        """What was read and left out so far."""
        return {
            "skipped": dict(self.report.counts),
            "read": {"documents": self.num_documents, "characters": self.num_characters},
        }

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.report, self.num_documents, self.num_characters = SkipReport(), 0, 0
        for number, text in enumerate(self.plan.documents([rank], self.report)):
            self.stat_update("documents")
            self.num_documents += 1
            self.num_characters += len(text)
            yield Document(text=text, id=f"{rank}/{number}")


class FilterAndTokenize(PipelineStep):
    """Filter and tokenize the documents of a task into shards, by the code of one machine."""

    type = "hf_cram"
    name = "filter and tokenize"

    def __init__(self, plan: ScalePlan, reader: ReadDocuments):
        super().__init__()
        self.plan = plan
        self.reader = reader

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        prepare_process()
        settings = self.plan.tokens_stage().settings
        texts = (document.text for document in data)

        def write(folder: Path) -> None:
            record = StepRecord("filter and tokenize")
            with self.track_time("task"), measured_step(record):
                shards = write_token_shards(texts, settings, folder, lambda: self.reader.position)
            record.documents_in, record.documents_out = shards.total("documents_in"), shards.total("documents")
            record.characters_in, record.characters_out = shards.total("characters_in"), shards.total("characters")
            record.tokens_out = shards.num_tokens
            write_steps(folder, [record])
            for reason, count in shards.left_out().items():
                self.stat_update(f"left out: {reason}", value=count)

        write_once(self.plan.task_tokens(rank), write, lambda folder: TokenShards(folder, settings.dtype).is_finished)
        self.reader.report.warn()


class WriteRows(PipelineStep):
    """Join the tokens of all tasks, hold documents out, pack and order, by the code of one machine; one task."""

    type = "hf_cram"
    name = "pack and order"

    def __init__(self, plan: ScalePlan):
        super().__init__()
        self.plan = plan

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> None:
        prepare_process()
        with self.track_time("task"):
            self.plan.rows_stage().open()


class SpacedWords(WordTokenizer):
    """Words between white space; datatrove's own tokenizers need spaCy, and it has taken the signs out before."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]
