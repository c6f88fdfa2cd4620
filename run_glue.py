"""
Fine-tune and score a checkpoint on GLUE by the paper's rules, or on your own csv, json or parquet files.

    python run_glue.py training_args/glue.yaml --model_name_or_path MODEL [--glue_data DIR] [--tasks cola,rte]
    python run_glue.py --model_name_or_path MODEL --train_file train.csv --validation_file dev.csv

The recipe is a YAML file of the fields below; the command line overrides it.
"""

import logging
import os
import sys
from dataclasses import fields
from pathlib import Path

import datasets

import hf_cram  # noqa: F401 registers the crammed BERT with the Auto classes
from hf_cram.data.errors import first_line
from hf_cram.files import GLUE_RESULTS
from hf_cram.fine_tuning_args import EncoderArguments, FineTuningArguments, check_given
from hf_cram.glue import GlueError
from hf_cram.glue_args import GlueArguments, parse_seeds
from hf_cram.glue_outputs import results_table
from hf_cram.glue_run import GlueRun
from hf_cram.hardware_choices import check_device
from hf_cram.hub import HubTarget, push_or_warn
from hf_cram.launching import end_process, end_with_launcher, start_missing_processes, use_all_cores
from hf_cram.out_of_memory import is_out_of_memory
from hf_cram.recipes import RecipeParser
from hf_cram.script_args import FineTunedCardArguments

logger = logging.getLogger("hf_cram")


def main() -> None:
    parser = RecipeParser((EncoderArguments, GlueArguments, FineTuningArguments, FineTunedCardArguments))
    encoder, glue, training_args, card = parser.parse(sys.argv[1:])
    of_card = [spec.name for spec in fields(card) if spec.name in parser.given]
    if of_card and not (glue.uses_own_data and glue.keeps_models):
        parser.error(f"{of_card[0]} is for the card of a model of your own data that is kept: leave it out")
    if "search_seeds" in parser.given and not glue.searches:
        parser.error(
            "search_seeds is for a search: give search_learning_rate or the like several values, or leave it out"
        )
    check_given(parser.given, training_args)
    check_device(training_args)
    is_main = training_args.process_index == 0
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    datasets.disable_progress_bars()  # one bar, over tasks and seeds
    if training_args.device.type == "cpu":
        use_all_cores(os.environ)

    run = GlueRun(encoder, glue, training_args, card.metadata)
    shared_folder = run.shared_folder
    if training_args.push_to_hub and shared_folder is None:
        raise GlueError(
            f"push_to_hub: the results in {run.output_dir} belong to no model of a local folder, and nothing could be "
            "pushed: leave it out, or keep the model of your own data by save_models"
        )
    chosen = run.search(training_args)
    results = run.run(chosen, parse_seeds("seeds", glue.seeds), keep_model=glue.keeps_models)
    if is_main:
        run.write(results)
        print(results_table(results, run.tasks))
        print(run.output_dir / GLUE_RESULTS)
        if training_args.push_to_hub and shared_folder is not None:
            push(run, shared_folder, training_args)


def push(run: GlueRun, folder: Path, training_args: FineTuningArguments) -> None:
    """Push the model with its results and its card, or of own data the fine-tuned model."""
    model_id = training_args.hub_model_id or run.shared_name
    target = HubTarget(model_id, training_args.hub_private_repo, training_args.hub_revision)
    push_or_warn(folder, target, "Add GLUE results" if run.own_data is None else "Fine-tuned model")


def explain(error: BaseException) -> str:
    """What ended the run, in one line."""
    if is_out_of_memory(error):
        return (
            "out of memory: lower --per_device_train_batch_size (of a search --search_batch_size) or --max_seq_length, and "
            "--per_device_eval_batch_size"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return first_line(error)


if __name__ == "__main__":
    try:
        end_with_launcher()
        start_missing_processes()
        main()
        end_process()
    except KeyboardInterrupt:
        print(
            "run_glue.py: stopped; finished pairs are kept: the same command goes on with the others", file=sys.stderr
        )
        sys.exit(130)
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        sys.exit(f"run_glue.py: error: {explain(error)}")
