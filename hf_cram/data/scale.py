"""
The recipe of one machine on many: tasks that datatrove's executors run, on this machine, a Ray cluster or Slurm.

    python -m hf_cram.data.scale RECIPE --executor ray --tasks 512 --workers 128 --cache_dir SHARED_FOLDER

The rows are those of `hf_cram.data.pipeline`, to the byte, and training finds them in `cache_dir`, of text that streams
with `--text_for_budget false`.
"""

import logging
import sys
from pathlib import Path

from .cache import is_complete
from .errors import DataError
from .pipeline import DataArguments, PreparedCorpus, open_corpus
from .publish import PublishArguments, publish_if_asked
from .scale_arguments import ScaleArguments
from .scale_estimate import format_estimates
from .scale_plan import ScalePlan, make_plan
from .scale_shards import remove_unfinished

logger = logging.getLogger(__name__)

PROGRAM = "python -m hf_cram.data.scale"
DAY_SECONDS = 24 * 3600
FEW_DOCUMENTS = 1000  # for a task


def rows_folder(plan: ScalePlan) -> Path:
    """Where the rows are when all is done."""
    return plan.cache / "corpora" / plan.rows_stage().key


def run_plan(plan: ScalePlan, scale: ScaleArguments) -> PreparedCorpus | None:
    """
    Run what is not yet done of a plan: run again after a failure, it goes on with the tasks that have not finished.

    Returns the rows, `None` where Slurm has yet to run. Raises [`DataError`].
    """
    rows = rows_folder(plan)
    if not is_complete(rows):
        _run_stages(plan, scale)
        if scale.executor == "slurm":
            return None
        if not is_complete(rows):
            raise DataError(f"the rows have not come about, see {plan.folder / 'logs'}")
    for folder in (plan.folder, plan.folder / "tokens"):
        remove_unfinished(folder, DAY_SECONDS)  # another recipe may be at work on the same text
    names = list(plan.arguments.named_sources())
    corpus = open_corpus(rows, plan.arguments.max_seq_length, from_cache=False, source_names=names)
    documents = sum(source["documents"] for source in corpus.statistics["sources"].values())
    if documents < FEW_DOCUMENTS * plan.tasks:
        logger.warning(
            "%s documents are few for %d tasks, each of which takes seconds to start: fewer --tasks are faster",
            f"{documents:,}", plan.tasks,
        )  # fmt: skip
    return corpus


def _run_stages(plan: ScalePlan, scale: ScaleArguments) -> None:
    try:
        if scale.executor == "ray":
            import ray  # noqa: F401
        from .scale_executors import RUN
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise DataError(f"{missing} is missing: pip install '.[scale]' in a checkout of hf_cram") from error
    RUN[scale.executor](plan, scale)


def main(data: DataArguments, scale: ScaleArguments, publish: PublishArguments) -> int:
    """Run the program on its parsed arguments; returns its exit status. A mistake is one line on standard error."""
    try:
        if scale.estimate is not None:
            print(format_estimates(scale, data.max_seq_length))
            return 0
        plan = make_plan(data, scale.tasks)
        corpus = run_plan(plan, scale)
        if corpus is None:
            print(f"submitted; the rows will be in {rows_folder(plan)}")
            return 0
        print(f"{corpus.summary}\nin {corpus.directory}")
        address = publish_if_asked(corpus, publish, data)
        if address is not None:
            print(f"published at {address}")
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped; what was finished is kept", file=sys.stderr)
        return 130
    except (MemoryError, OSError, ValueError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split()) or 'memory ran out'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # The program reads recipes, which belong to a higher layer.
    from ..prepare import RECIPE_PARTS, RecipeParser, TrainingFields, is_limit_wanted

    parser = RecipeParser((*RECIPE_PARTS, TrainingFields, ScaleArguments), prog=PROGRAM)
    _, data_args, text_args, publish_args, *_, scale_args = parser.parse(sys.argv[1:])
    if text_args.text_for_budget:
        parser.error(
            "text_for_budget stops reading where so many tokens are there, which tasks side by side cannot tell: leave it out"
        )
    if is_limit_wanted(data_args, text_args):
        logger.warning("The text streams: to train from these rows, and not from as much as the budget can consume, set "
                       "--text_for_budget false")  # fmt: skip
    sys.exit(main(data_args, scale_args, publish_args))
