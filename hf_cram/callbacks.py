"""What a person sees of a run: a bar over the budget, the curve, a few filled-in sentences."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .budget import format_duration

logger = logging.getLogger(__name__)

LOSS_CURVE_NAME = "loss_curve.png"
FILL_SENTENCES = (
    "The capital of France is [MASK].",
    "She opened the door and walked into the [MASK].",
    "He did not [MASK] what to say.",
    "The function returns a [MASK] of values.",
    "It was one of the [MASK] days of his life.",
)


@dataclass
class BudgetProgress:
    """Where a run stands. `unit` is "tokens" for text and "samples" for everything else."""

    elapsed_seconds: float
    time_budget_seconds: float | None
    fraction: float
    unit: str
    units_seen: int
    units_per_second: float
    estimated_units: float | None


class BudgetProgressCallback(TrainerCallback):
    """A bar of the used budget with loss, rate and where the run will end, in place of the Trainer's bar of steps."""

    def __init__(self, progress: Callable[[], BudgetProgress]):
        self.progress = progress
        self.bar: tqdm | None = None
        self.loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            layout = "{percentage:3.0f}%|{bar}| {desc}{postfix}"
            self.bar = tqdm(total=1.0, bar_format=layout, dynamic_ncols=True, mininterval=0.5)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is None:
            return
        now = self.progress()
        budget = "" if now.time_budget_seconds is None else f"/{format_duration(now.time_budget_seconds)}"
        self.bar.set_description_str(f"{format_duration(now.elapsed_seconds)}{budget}", refresh=False)
        loss = [] if self.loss is None else [f"loss {self.loss:.3f}"]  # known from the first log on
        parts = [*loss, f"{now.units_per_second:,.0f} {now.unit}/s"]
        if now.estimated_units is not None:
            parts.append(f"{now.units_seen / 1e6:.2f}M of about {now.estimated_units / 1e6:.2f}M {now.unit}")
        self.bar.set_postfix_str(", ".join(parts), refresh=False)
        self.bar.update(min(now.fraction, 1.0) - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()
            self.bar = None


class LossCurveCallback(TrainerCallback):
    """Draws `loss_curve.png` in the output folder at the end: loss against time and against tokens."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = Path(str(args.output_dir)) / LOSS_CURVE_NAME
        if state.is_world_process_zero:
            try:
                draw_loss_curve(state.log_history, path)
            except OSError as error:  # the model is still to be saved
                logger.warning("%s could not be drawn: %s", path, error)


def draw_loss_curve(log_history: Sequence[dict[str, float]], path: Path) -> None:
    """Loss against minutes of the clock and against tokens (or samples) seen, training and held-out, as a PNG."""
    from matplotlib.figure import Figure  # a second of start-up that only this needs

    unit = "tokens_seen" if any("tokens_seen" in entry for entry in log_history) else "samples_seen"
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, scale, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("elapsed_seconds", unit),
        (60.0, 1e6),
        ("minutes on the clock", f"million {unit.removesuffix('_seen')}"),
        strict=True,
    ):
        for loss, style, name in (("loss", "-", "training"), ("eval_loss", "o--", "held out")):
            points = [(entry[key] / scale, entry[loss]) for entry in log_history if loss in entry and key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss (nats)")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def fill_sentences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str] = FILL_SENTENCES,
    top_k: int = 3,
) -> list[dict[str, Any]]:
    """
    The `top_k` likeliest fills of each sentence's `[MASK]`: a list of `{"sentence": str, "fills": [str, ...]}`.

    The sentences are encoded like the rows of training: no `[CLS]`, a `[SEP]` at the end. One that is longer than the
    model's positions is left out.
    """
    was_training = model.training
    model.eval()
    results = []
    for sentence in sentences:
        text = sentence.replace("[MASK]", tokenizer.mask_token)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id]
        if len(ids) > getattr(model.config, "max_position_embeddings", len(ids)):
            continue
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[
            0, ids.index(tokenizer.mask_token_id)
        ]
        logits[tokenizer.all_special_ids] = -torch.inf
        top = logits.topk(top_k).indices.tolist()
        results.append({"sentence": sentence, "fills": [tokenizer.decode([token]) for token in top]})
    model.train(was_training)
    return results
