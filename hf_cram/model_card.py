"""The model card of a run, from plain values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("model_card_template.md")


def build_model_card(
    model_name: str,
    results: Mapping[str, float],
    recipe: Mapping[str, Any],
    hardware: str,
    text_name: str,
    fills: Sequence[Mapping[str, Any]],
    num_parameters: int,
    sequence_length: int,
) -> ModelCard:
    """
    A card with budget, hardware, result, recipe and how to load.

    Args:
        model_name: title of the card.
        results: the content of `all_results.json`.
        recipe: what differs from the defaults, written out as YAML.
        hardware: one line about the machine.
        text_name: the text trained on, in words.
        fills: `{"sentence": str, "fills": [str, ...]}` each.
        num_parameters: parameters of the model.
        sequence_length: tokens of a training row.
    """
    budget = results.get("time_budget_seconds")
    eval_loss = results.get("eval_loss")
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["hf_cram", "crammed-bert", "masked-lm"],
        model_name=model_name,
        eval_results=None
        if eval_loss is None
        else [
            EvalResult(
                task_type="fill-mask",
                task_name="Masked language modeling",
                dataset_type="held-out",
                dataset_name=f"held-out part of {text_name}",
                metric_type="loss",
                metric_name="MLM loss at 15 % fixed masks (nats)",
                metric_value=round(eval_loss, 4),
            )
        ],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=model_name,
        budget="no time budget (step limit)" if budget is None else f"{budget:,.0f} s",
        train_seconds=f"{results['train_seconds']:,.1f}",
        preprocessing_seconds=f"{results['preprocessing_seconds']:,.1f}",
        hardware=hardware,
        text_name=text_name,
        num_parameters=f"{num_parameters:,}",
        sequence_length=sequence_length,
        tokens_seen=f"{results['tokens_seen']:,}",
        tokens_per_second=f"{results['tokens_per_second']:,.0f}",
        eval_loss="not evaluated" if eval_loss is None else f"{eval_loss:.3f}",
        eval_perplexity="" if eval_loss is None else f"{results['eval_perplexity']:.1f}",
        skipped_steps=results["skipped_steps"],
        fills=[{"sentence": fill["sentence"], "fills": ", ".join(fill["fills"])} for fill in fills],
        recipe=yaml.safe_dump(dict(recipe), sort_keys=True).strip(),
    )
