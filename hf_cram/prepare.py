"""The program behind `python -m hf_cram.data.pipeline`: prepare the text of a recipe, or predict what that takes."""

import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from .data.errors import DataError
from .data.pipeline import DataArguments, open_cache, prepare_corpus, published_corpus
from .data.publish import publish_if_asked
from .data.sources import TextSource
from .launching import threads_of_a_process
from .recipes import RecipeParser
from .script_args import RECIPE_PARTS
from .text_budget import is_limit_wanted, limit_text_to_budget
from .training_args import CramTrainingArguments

logger = logging.getLogger(__name__)

PROGRAM = "python -m hf_cram.data.pipeline"


@dataclass
class PrepareArguments:
    """Prepare, or predict."""

    dry_run: bool = field(
        default=False, metadata={"help": "Prepare the first documents in a temporary folder and predict the totals."}
    )
    dry_run_documents: int = field(default=10_000, metadata={"help": "Documents of a dry run."})
    num_processes: int = field(
        default=1, metadata={"help": "Processes that will train, for a text that the budget limits (text_for_budget)."}
    )

    def __post_init__(self) -> None:
        for name in ("dry_run_documents", "num_processes"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")


class TrainingFields(CramTrainingArguments):
    """The fields of training without their checks: a recipe may ask for what this machine does not have."""

    def __post_init__(self) -> None:
        pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status. A mistake is one line on standard error."""
    parser = RecipeParser((*RECIPE_PARTS, TrainingFields, PrepareArguments), prog=PROGRAM)
    model_args, data_args, text_args, publish_args, masking_args, _, training_fields, prepare_args = parser.parse(
        sys.argv[1:] if arguments is None else arguments
    )
    if "dry_run_documents" in parser.given and not prepare_args.dry_run:
        parser.error("dry_run_documents is for a dry run: set dry_run with it, or leave it out")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("hf_cram").setLevel(logging.INFO)
    try:
        if is_limit_wanted(data_args, text_args) and published_corpus(data_args) is None:
            try:
                training_args = _training_args(training_fields)
                with threads_of_a_process(prepare_args.num_processes, training_args.device):
                    limit_text_to_budget(
                        data_args, model_args, masking_args, training_args, text_args, prepare_args.num_processes
                    )
            except DataError as error:
                if not prepare_args.dry_run:
                    raise
                logger.warning("All of the text is predicted, not what a run would read: %s", error)
        if prepare_args.dry_run:
            print(predict(data_args, prepare_args.dry_run_documents))
            return 0
        corpus = prepare_corpus(data_args, parser.given)
        print(f"{corpus.summary}\nin {corpus.directory}{' (was there before)' if corpus.from_cache else ''}")
        address = publish_if_asked(corpus, publish_args, data_args)
        if address is not None:
            print(f"published at {address}")
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped; what was finished is kept", file=sys.stderr)
        return 130
    except (MemoryError, OSError, ValueError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split()) or 'memory ran out'}", file=sys.stderr)
        return 1
    return 0


def _training_args(training_fields: TrainingFields) -> CramTrainingArguments:
    """Raises [`DataError`] where the budget cannot be told from here: its text depends on the machine that trains."""
    if training_fields.time_budget is None and training_fields.max_steps <= 0:
        raise DataError(
            "nothing limits the text: put a training recipe first, or set max_train_tokens, or text_for_budget: false"
        )
    asked_for = "fp16" if training_fields.fp16 else "bf16" if training_fields.bf16 else None
    if asked_for and not torch.accelerator.is_available() and not (asked_for == "bf16" and training_fields.use_cpu):
        raise DataError(
            f"the recipe trains in {asked_for}, on a GPU that is not here, and its text follows from that one's speed: "
            "set max_train_tokens (a run logs the number it takes), and set the same for the run; or text_for_budget: "
            "false; or use_cpu: true with bf16 where a CPU trains it"
        )
    given = {spec.name: getattr(training_fields, spec.name) for spec in fields(training_fields) if spec.init}
    return CramTrainingArguments(**given)


def predict(arguments: DataArguments, num_documents: int) -> str:
    """
    Totals of the whole text, from its first documents: prepared in a temporary folder, and multiplied by the share of
    the text that they are, or of what its limit leaves of it. "unknown" where neither is known.
    """
    if published_corpus(arguments) is not None:
        raise DataError(f"data set {arguments.dataset_name!r} holds prepared rows: there is nothing to predict")
    documents, characters, total = _measure(arguments, num_documents)
    folder = Path(tempfile.mkdtemp(prefix="hf_cram-dry-run-"))
    texts = open_cache(arguments).absolute() / "texts"
    try:
        if texts.exists():  # the documentation of installed packages, extracted by now
            (folder / "texts").symlink_to(texts)
        corpus = prepare_corpus(
            replace(
                arguments, max_documents=documents, max_train_tokens=None, cache_dir=str(folder), overwrite_cache=False
            )
        )
        fixed, growing = _bytes_on_disk(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = [corpus.summary, f"of the first {documents:,} documents. The whole text is predicted to have:"]
    statistics = corpus.statistics
    scales = [] if total is None else [total / characters]
    if arguments.token_limit is not None:
        scales.append(arguments.token_limit / statistics["tokens"])
    if not scales:
        return "\n".join([*lines, "unknown: a source does not tell its size"])
    scale = min(scales)
    totals = {
        "documents read": f"{documents * scale:,.0f}",
        "characters read": f"{characters * scale:,.0f}",
        "documents kept": f"{statistics['documents'] * scale:,.0f}",
        "tokens kept": f"{statistics['tokens'] * scale:,.0f}",
        "rows": f"{statistics['tokens'] * scale / arguments.max_seq_length:,.0f}",
        "hours": f"{_predict_seconds(statistics['steps'], scale, arguments) / 3600:,.2f}",
        "GB on disk": f"{(fixed + growing * scale) / 1e9:,.2f}",
    }
    return "\n".join([*lines, *(f"{name:<16}{value:>20}" for name, value in totals.items())])


def _bytes_on_disk(folder: Path) -> tuple[int, int]:
    """Bytes of a cache that are about the same for any text, of tokenizers and counts, and bytes that grow with it."""
    sizes = [0, 0]
    for name in ("tokenizers", "tokens", "corpora", "near_duplicates", "deduplicated"):
        for path in (folder / name).rglob("*"):
            sizes[path.suffix != ".json"] += path.stat().st_size if path.is_file() else 0
    return sizes[0], sizes[1]


def _predict_seconds(steps: list[dict[str, Any]], scale: float, arguments: DataArguments) -> float:
    """Seconds of `scale` times the text; a tokenizer is trained on no more of it than its limit."""
    seconds = 0.0
    for step in steps:
        limit = arguments.tokenizer_training_characters / max(1, step["characters_in"] or 1)
        seconds += step["seconds"] * (min(scale, max(1.0, limit)) if step["step"] == "tokenizer" else scale)
    return seconds


def _measure(arguments: DataArguments, num_documents: int) -> tuple[int, int, int | None]:
    """Documents and characters of the beginning of the text, and characters of all of it where that can be told."""
    source = TextSource(arguments, open_cache(arguments), workers=arguments.preprocessing_workers)
    documents = characters = 0
    for document in source.documents():
        documents, characters = documents + 1, characters + len(document)
        if documents >= num_documents:
            break
    if documents == 0:
        raise DataError("the text holds no document")
    return documents, characters, source.estimated_characters
