"""
Train a BERT-class encoder from scratch under a wall-clock budget.

    accelerate launch run_mlm_cram.py training_args/quickstart.yaml [--field value ...]

The recipe is a YAML file of the fields below; the command line overrides it.
"""

import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import transformers
import yaml
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoModelForMaskedLM, set_seed

from hf_cram.callbacks import LossCurveCallback, fill_sentences
from hf_cram.checkpointing import CheckpointError
from hf_cram.data.collator import DataCollatorForFixedCountMasking, held_out_collator
from hf_cram.data.errors import DataError
from hf_cram.data.pipeline import DataArguments, PreparedCorpus, prepare_corpus
from hf_cram.data.publish import PublishArguments, publish_if_asked
from hf_cram.data.source_arguments import INSTALLED_DOCS
from hf_cram.embedding_initialization import neighbour_tables
from hf_cram.files import write_atomically
from hf_cram.hardware import describe_hardware, takes_masked_positions
from hf_cram.hardware_choices import check_device
from hf_cram.launching import end_process, end_with_launcher, start_missing_processes, use_all_cores
from hf_cram.model_card import build_model_card, save_model_card
from hf_cram.out_of_memory import is_out_of_memory
from hf_cram.output_folder import holds_result, set_earlier_results_aside, state_of_the_resumed
from hf_cram.recipes import RecipeParser, build_config
from hf_cram.script_args import RECIPE_PARTS, CardArguments, MaskingArguments, check_row_length, shareable
from hf_cram.text_budget import is_limit_wanted, limit_text_to_budget
from hf_cram.trainer import CramTrainer, NonFiniteError
from hf_cram.training_args import CramTrainingArguments, check_given

logger = logging.getLogger("hf_cram")

WORTH_TELLING = 1.5  # passes over a text that a run limits by its budget


def main() -> int:
    parser = RecipeParser((*RECIPE_PARTS, CramTrainingArguments))
    model_args, data_args, text_args, publish_args, masking_args, card_args, training_args = parser.parse(sys.argv[1:])
    check_given(parser.given, training_args)
    recipe = shareable(parser.given)
    is_main = training_args.process_index == 0
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    if not is_main:
        transformers.utils.logging.disable_progress_bar()
    set_seed(training_args.seed)
    if training_args.device.type == "cpu":
        use_all_cores(os.environ)

    check_device(training_args)
    if "max_seq_length" in parser.given or data_args.dataset_name in (None, INSTALLED_DOCS):
        check_row_length(data_args.max_seq_length, model_args.max_position_embeddings)

    started = time.monotonic()
    if not is_main:
        data_args.overwrite_cache = False  # rank 0 has done so when the others look
    folder, choice = Path(str(training_args.output_dir)), training_args.resume_from_checkpoint
    resumed = broadcast_object_list([state_of_the_resumed(folder, choice) if is_main else None])[0]
    if resumed is not None and is_limit_wanted(data_args, text_args):
        data_args.max_train_tokens = resumed.max_train_tokens
    consumed = limit_text_to_budget(data_args, model_args, masking_args, training_args, text_args)
    with training_args.main_process_first(desc="preparing the text"):
        corpus = prepare_corpus(data_args, parser.given, None if resumed is None else resumed.dataset_id)
    corpus.train_dataset.max_train_tokens = data_args.max_train_tokens
    preprocessing_seconds = time.monotonic() - started
    check_same_rows(corpus)
    tell_of(corpus, consumed)
    if is_main:
        publish(corpus, publish_args, data_args)
    row_order = corpus.statistics.get("row_scores", {}).get("row_order", "none")  # of a published corpus, its own
    if row_order != "none" and "train_sampling_strategy" not in parser.given:
        training_args.train_sampling_strategy = "sequential"
        logger.info("Training reads the rows in their order (%s): train_sampling_strategy is sequential", row_order)

    trainer = build_trainer(corpus, model_args, masking_args, training_args)
    with trainer.keep_folder():
        return train_and_save(trainer, corpus, recipe, preprocessing_seconds, data_args, card_args)


def train_and_save(
    trainer: CramTrainer,
    corpus: PreparedCorpus,
    recipe: dict[str, Any],
    preprocessing_seconds: float,
    data_args: DataArguments,
    card_args: CardArguments,
) -> int:
    """Train, and save all that belongs to the result; returns the exit status."""
    training_args = trainer.args
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if trainer.interrupted_by is not None:
        logger.warning(
            "Stopped by %s with a checkpoint: continue with --resume_from_checkpoint true",
            trainer.interrupted_by.name,
        )
        if trainer.pusher is not None:
            trainer.pusher.clear()
        return 128 + trainer.interrupted_by

    if trainer.was_used_up and holds_result(trainer.output_dir, trainer.state.global_step):
        # Its weights may be later than those of the last checkpoint, and others have written into its card.
        logger.warning("This run was finished: its result in %s stays as it is", trainer.output_dir)
    else:
        results = save_results(trainer, preprocessing_seconds, data_args)
        if trainer.is_world_process_zero():
            write_atomically(trainer.output_dir, {"recipe.yaml": yaml.safe_dump(recipe).encode()})
            write_card(trainer, corpus.tokenizer, results, data_args, card_args, recipe)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return 0


def check_same_rows(corpus: PreparedCorpus) -> None:
    """Raises [`DataError`] where the processes have found different texts: it has changed in between."""
    if len(set(gather_object([corpus.train_dataset.dataset_id]))) > 1:
        raise DataError("the text has changed while this run's processes prepared it: start again")


def tell_of(corpus: PreparedCorpus, consumed: float | None) -> None:
    """
    Log what was prepared, what that took where it was not there before, and how often the run reads it where it is expected
    to have `consumed` more tokens.
    """
    logger.info(
        "%s rows of %d tokens%s", f"{len(corpus.train_dataset):,}", corpus.train_dataset.max_seq_length,
        " (from the cache)" if corpus.from_cache else "",
    )  # fmt: skip
    if not corpus.from_cache:
        logger.info("What preparing took:\n%s", corpus.table)
    tokens = len(corpus.train_dataset) * corpus.train_dataset.max_seq_length
    if consumed is not None and consumed > WORTH_TELLING * tokens:
        logger.info("The text has %s tokens: the run reads it about %.1f times", f"{tokens:,}", consumed / tokens)


def build_trainer(
    corpus: PreparedCorpus, model_args: Any, masking_args: MaskingArguments, training_args: CramTrainingArguments
) -> CramTrainer:
    """A fresh model on the corpus, masked as the recipe says, measured with masks that it does not change."""
    config = build_config(model_args, corpus.tokenizer)
    # A published corpus brings its own length.
    check_row_length(corpus.train_dataset.max_seq_length, config.max_position_embeddings)
    corpus.tokenizer.model_max_length = config.max_position_embeddings  # saved with it: what truncates asks for it
    model = AutoModelForMaskedLM.from_config(config)
    collator = DataCollatorForFixedCountMasking(
        corpus.tokenizer,
        masking_args.mlm_probability,
        masking_args.mask_replace_prob,
        masking_args.random_replace_prob,
        seed=training_args.seed,
        return_masked_positions=takes_masked_positions(model),
    )
    return CramTrainer(
        model,
        training_args,
        eval_data_collator=held_out_collator(corpus.tokenizer),
        train_dataset=corpus.train_dataset,
        eval_dataset=corpus.eval_dataset,
        data_collator=collator,
        processing_class=corpus.tokenizer,
        callbacks=[LossCurveCallback()],
    )


def save_results(trainer: CramTrainer, preprocessing_seconds: float, data_args: DataArguments) -> dict[str, Any]:
    """Save model and results. The clock has stopped: saving and the final evaluation are reported apart."""
    saving_started = time.monotonic()
    if trainer.args.should_save:
        set_earlier_results_aside(trainer.output_dir)
    trainer.save_model()
    trainer.save_state()
    results: dict[str, Any] = {
        **trainer.budget_metrics(),
        "preprocessing_seconds": preprocessing_seconds,
        "final_save_seconds": time.monotonic() - saving_started,
        **trainer.evaluate(),
    }
    results["eval_perplexity"] = math.exp(min(results["eval_loss"], 100.0))
    trainer.log_metrics("all", results)
    results.update(
        hardware=describe_hardware(trainer.args.device, trainer.args.world_size),
        num_parameters=trainer.model.num_parameters(),
        text_name=text_name(data_args),
        dataset_id=trainer.train_dataset.dataset_id,
    )
    if tables := neighbour_tables(trainer.model):
        results["neighbour_table_bytes"] = sum(module.table.nbytes for module in tables)
    if data_args.max_train_tokens is not None:
        results["max_train_tokens"] = data_args.max_train_tokens  # gives the same rows elsewhere
    trainer.save_metrics("all", results, combined=False)
    return results


def publish(corpus: PreparedCorpus, publish_args: PublishArguments, data_args: DataArguments) -> None:
    """Publish the rows where that is asked for; training does not wait for a Hub that cannot be had."""
    try:
        address = publish_if_asked(corpus, publish_args, data_args)
    except DataError as error:
        logger.warning(
            "The rows are not published: %s. Later: python -m hf_cram.data.pipeline with this recipe", error
        )
        return
    if address is not None:
        logger.info("The rows are published at %s", address)


def text_name(data_args: DataArguments) -> str:
    """The text in words, without folders of this machine."""
    if data_args.sources is not None or data_args.hub_names:
        return data_args.source_name
    return Path(os.path.abspath(data_args.source_name)).name


def write_card(
    trainer: CramTrainer,
    tokenizer: Any,
    results: dict[str, Any],
    data_args: DataArguments,
    card_args: CardArguments,
    recipe: dict[str, Any],
) -> None:
    """Print a few filled-in sentences and write README.md into the output folder."""
    fills = fill_sentences(trainer.model, tokenizer)
    for fill in fills:
        print(f"{fill['sentence']}  {', '.join(fill['fills'])}")
    card = build_model_card(
        model_name=trainer.output_dir.resolve().name,
        results=results,
        recipe=recipe,
        hardware=results["hardware"],
        text_name=results["text_name"],
        fills=fills,
        num_parameters=results["num_parameters"],
        sequence_length=trainer.train_dataset.max_seq_length,
        dataset_names=data_args.hub_names,
        held_out_of=data_args.hub_name_of_all,
        metadata=card_args.metadata,
    )
    save_model_card(card, trainer.output_dir)


if __name__ == "__main__":
    try:
        end_with_launcher()
        start_missing_processes()
        end_process(main())
    except KeyboardInterrupt:  # the first one while training ends it with a checkpoint
        print("run_mlm_cram.py: stopped; what was prepared and saved before is kept", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        foreseen = isinstance(error, CheckpointError | NonFiniteError | OSError | ValueError)
        if not foreseen and not is_out_of_memory(error):
            raise
        sys.exit(f"run_mlm_cram.py: error: {' '.join(str(error).split()) or 'memory ran out'}")
