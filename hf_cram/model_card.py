"""The model card of a run, from plain values."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CardData,
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from .files import write_atomically
from .markup import table_cell
from .paper_results import GLUE_COLUMNS, HEADLINE_METRICS, PAPER_GLUE_ROWS, TASK_TITLES, examples_note

TEMPLATE = Path(__file__).with_name("model_card_template.md")
FINE_TUNED_TEMPLATE = Path(__file__).with_name("fine_tuned_card_template.md")
CARD_NAME = "README.md"
EVAL_FOLDER = ".eval_results"
GLUE_DATASET = "nyu-mll/glue"
MINIMAL_PAIRS_DATASET = "minimal-pairs"
ENGLISH_AND_FREE = {"language": "en", "license": "apache-2.0"}
MLM_METRIC = "MLM loss at 15 % fixed masks (nats)"
# Data set configuration and split of the columns that are not a configuration's only validation split.
MNLI_SPLITS = {"mnli": ("mnli", "validation_matched"), "mnli_mismatched": ("mnli", "validation_mismatched")}
# The paper's rows that bound what pretraining can bring, and its two versions at a day on one GPU.
COMPARED_ROWS = (
    "BERT-base, fully trained",
    "BERT-base, no pretraining",
    "crammed v1, RTX A6000",
    "crammed v2, RTX A6000, best checkpoint",
)
# Sections stand between marks, so that a later evaluation replaces its own and leaves what a person has written.
GLUE_SECTION = "glue"
OWN_DATA_SECTION = "own-data"
MINIMAL_PAIRS_SECTION = "minimal-pairs"


class ModelCardError(ValueError):
    """A card that cannot be updated, in one line that names it and the way out."""


def build_model_card(
    model_name: str,
    results: Mapping[str, Any],
    recipe: Mapping[str, Any],
    hardware: str,
    text_name: str,
    fills: Sequence[Mapping[str, Any]],
    num_parameters: int,
    sequence_length: int,
    dataset_names: Sequence[str] = (),
    held_out_of: str | None = None,
    metadata: Mapping[str, Any] = ENGLISH_AND_FREE,
    glue_results: Mapping[str, Any] | None = None,
    minimal_pairs: Mapping[str, Any] | None = None,
) -> ModelCard:
    """
    A card with budget, hardware, results, recipe and how to load.

    Args:
        model_name: title of the card.
        results: the content of `all_results.json`.
        recipe: what differs from the defaults, written out as YAML.
        hardware: one line about the machine.
        text_name: the text trained on, in words.
        fills: `{"sentence": str, "fills": [str, ...]}` each.
        num_parameters: parameters of the model.
        sequence_length: tokens of a training row.
        dataset_names: the text's data sets on the Hub.
        held_out_of: the one of them that is the whole text, and whose rows were held out; `None` where there is more.
        metadata: `language` of the text and `license` of the model, in the Hub's terms; `None` leaves one out.
        glue_results: the content of `glue_results.json`, of GLUE or of own data.
        minimal_pairs: the content of `minimal_pairs_results.json`, in per cent.
    """
    budget = results.get("time_budget_seconds")
    eval_loss = results.get("eval_loss")
    data = ModelCardData(
        **metadata,
        library_name="transformers",
        pipeline_tag="fill-mask",
        datasets=list(dataset_names) or None,
        tags=["hf_cram", "crammed-bert", "masked-lm"],
        model_name=model_name,
        eval_results=[] if eval_loss is None else [_mlm_result(eval_loss, text_name, held_out_of)],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=model_name,
        budget="no time budget (step limit)" if budget is None else f"{budget:,.0f} s",
        train_seconds=f"{results['train_seconds']:,.1f}",
        preprocessing_seconds=f"{results['preprocessing_seconds']:,.1f}",
        hardware=table_cell(hardware),
        text_name=table_cell(text_name),
        num_parameters=_parameters(num_parameters, results.get("neighbour_table_bytes")),
        sequence_length=sequence_length,
        tokens_seen=f"{results['tokens_seen']:,}",
        tokens_per_second=f"{results['tokens_per_second']:,.0f}",
        eval_loss="not evaluated"
        if eval_loss is None
        else f"{eval_loss:.3f} nats at 15 % fixed masks, perplexity {results['eval_perplexity']:.1f}",
        skipped_steps=results["skipped_steps"],
        fills=[{"sentence": fill["sentence"], "fills": table_cell(", ".join(fill["fills"]))} for fill in fills],
        recipe=yaml.safe_dump(dict(recipe), sort_keys=True).strip(),
        empty_glue=_marked(GLUE_SECTION, ""),
        empty_minimal_pairs=_marked(MINIMAL_PAIRS_SECTION, ""),
    )
    return _with_evaluations(card, glue_results, minimal_pairs)


def _parameters(num_parameters: int, table_bytes: int | None) -> str:
    table = "" if table_bytes is None else f", and a table of {table_bytes:,} bytes, counted from the text"
    return f"{num_parameters:,}{table}"


def build_fine_tuned_card(
    model_name: str,
    start: str,
    results: Mapping[str, Any] | None = None,
    *,
    base_model: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ModelCard:
    """
    A card of a classifier, or of a regression, with its scores and how to load it.

    Args:
        model_name: title of the card.
        start: what was fine-tuned, in words.
        results: the content of `glue_results.json`, of own data.
        base_model: what was fine-tuned, where it is a model of the Hub.
        metadata: as of [`build_model_card`]; default: neither.
    """
    data = ModelCardData(
        **(metadata or {}),
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["hf_cram"],
        model_name=model_name,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(FINE_TUNED_TEMPLATE),
        title=model_name,
        start=start,
        empty_section=_marked(OWN_DATA_SECTION, ""),
    )
    return _with_evaluations(card, results, None)


def save_model_card(card: ModelCard, folder: Path) -> None:
    """Write README.md and `.eval_results/*.yaml`, each in one step, into a model's folder."""
    contents = {CARD_NAME: str(card)}
    for name, entries in _eval_entries(card.data).items():
        contents[f"{EVAL_FOLDER}/{name}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    write_atomically(folder, {name: content.encode() for name, content in contents.items()})


def update_model_card(
    folder: str | Path,
    glue_results: Mapping[str, Any] | None = None,
    minimal_pairs: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bool:
    """
    Put evaluations into the card of the model in `folder`, in the place of earlier ones of the same kind, and `metadata`
    (as of [`build_model_card`]) in the place of what it says of these.

    The rest of the text, and keys of the front matter that are not results of these evaluations, stay as they are.
    Returns False where there is no card. Raises [`ModelCardError`] for a card whose front matter cannot be read.
    """
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        return False
    card = _read_card(path)
    for name, value in (metadata or {}).items():
        card.data[name] = value
    card.data["model_name"] = card.data.get("model_name", Path(folder).resolve().name)
    save_model_card(_with_evaluations(card, glue_results, minimal_pairs), Path(folder))
    return True


def forget_scores(folder: Path) -> None:
    """Take all scores between their marks out of the card in `folder`, if it can be read: they are of other weights."""
    try:
        card = _read_card(folder / CARD_NAME)
    except ModelCardError:
        return
    card.data["eval_results"] = None
    for name in (OWN_DATA_SECTION, GLUE_SECTION, MINIMAL_PAIRS_SECTION):
        if all(mark in card.text for mark in _marked(name, "").splitlines()):
            card.text = _replace_section(card.text, name, "")
    save_model_card(card, folder)


def read_card_metadata(folder: str | Path) -> dict[str, str | None]:
    """`language` and `license` by the card in a model's folder; empty where there is none that can be read."""
    try:
        data = _read_card(Path(folder) / CARD_NAME).data
    except (OSError, ModelCardError):
        return {}
    told = {name: data.get(name) for name in ("language", "license")}
    return {name: value for name, value in told.items() if value is not None}


def _read_card(path: Path) -> ModelCard:
    try:
        card = ModelCard(path.read_text(encoding="utf-8-sig"))
    except (TypeError, ValueError, yaml.YAMLError) as error:  # the first for a key that is no word
        cause = " ".join(str(error).split())
        raise ModelCardError(f"the front matter of {path} cannot be read ({cause}): mend it, or delete it") from error
    # A bare `no`, Norwegian, is false in YAML.
    language = card.data.get("language")
    if language is False:
        card.data["language"] = "no"
    elif isinstance(language, list):
        card.data["language"] = ["no" if code is False else code for code in language]
    return card


def _with_evaluations(
    card: ModelCard, glue_results: Mapping[str, Any] | None, minimal_pairs: Mapping[str, Any] | None
) -> ModelCard:
    results = list(card.data.get("eval_results", []))
    if glue_results is not None:
        new = _glue_eval_results(glue_results)
        replaced = {result.dataset_type for result in new}
        results = [result for result in results if result.dataset_type not in replaced] + new
        section, text = (
            (GLUE_SECTION, glue_section(glue_results))
            if GLUE_DATASET in replaced
            else (OWN_DATA_SECTION, own_data_section(glue_results))
        )
        card.text = _replace_section(card.text, section, text)
    if minimal_pairs is not None:
        results = [result for result in results if result.dataset_type != MINIMAL_PAIRS_DATASET]
        results.append(_minimal_pairs_result(minimal_pairs))
        card.text = _replace_section(card.text, MINIMAL_PAIRS_SECTION, minimal_pairs_section(minimal_pairs))
    # In one order, whichever evaluation came last.
    results.sort(key=lambda result: result.dataset_type == MINIMAL_PAIRS_DATASET)
    card.data["eval_results"] = results or None
    return card


# ---- Sections ----


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _marked(name: str, text: str) -> str:
    return f"<!-- hf_cram: {name} -->\n{text}<!-- hf_cram: end of {name} -->"


def _replace_section(body: str, name: str, text: str) -> str:
    """`body` with the section of that name replaced, or appended where its marks are not there."""
    opening, closing = _marked(name, "").splitlines()
    before, opened, rest = body.rpartition(opening)  # the last: a person may have lost one mark of an earlier one
    _, closed, after = rest.partition(closing)
    if not (opened and closed):
        return f"{body.rstrip()}\n\n{_marked(name, text)}\n"
    return f"{before}{_marked(name, text)}{after}"


def glue_section(results: Mapping[str, Any]) -> str:
    """GLUE beside the paper's rows, and every metric with its seeds, as markdown."""
    scores = _headline_scores(results)
    limit = _limit(results)
    seeds = len(results["seeds"])
    note = f"Development sets, per cent, medians of {seeds} seed{'s' if seeds > 1 else ''}; WNLI is not averaged."
    shared = [column for column in GLUE_COLUMNS if column in scores]
    if not shared:  # WNLI alone
        trained = f" Fine-tuned on {limit}." if limit else ""
        return f"## GLUE\n\n{note}{trained}\n\n{_metrics_table(results)}\n"
    rows = {
        "this model" + (f", {limit}" if limit else ""): scores,
        **{name: PAPER_GLUE_ROWS[name] for name in COMPARED_ROWS},
    }
    is_whole = len(shared) == len(GLUE_COLUMNS) and not limit
    averages = ["GLUE"] if is_whole else ["GLUE", f"mean of {len(shared)}"]
    lines = []
    for name, row in rows.items():
        cells = [f"{row[column]:.1f}" if column in row else "" for column in GLUE_COLUMNS]
        mean = f"{statistics.fmean(row[column] for column in shared):.1f}"
        # The recorded averages of the paper, over all nine columns.
        whole = f"{row['average']:.1f}" if "average" in row else mean if is_whole else ""
        lines.append([name, *cells, whole, *([] if is_whole else [mean])])
    missing = ", ".join(title for column, title in GLUE_COLUMNS.items() if column not in scores)
    notes = [note]
    if missing:
        notes.append(f"Not run: {missing}; the last column is every row's mean over the columns that were.")
    notes.append("The other rows are the paper's (arXiv 2212.14034), medians of 5.")
    if limit:
        notes.append(f"This model was fine-tuned on {limit}, theirs on all: the rows do not compare like with like.")
    comparison = _table(["model", *GLUE_COLUMNS.values(), *averages], lines)
    return f"## GLUE\n\n{' '.join(notes)}\n\n{comparison}\n\n{_metrics_table(results)}\n"


def own_data_section(results: Mapping[str, Any]) -> str:
    """Scores on data that is not GLUE's, as markdown."""
    limit = _limit(results)
    note = f"Fine-tuned on {limit}.\n\n" if limit else ""
    return f"## Fine-tuned on other data\n\n{note}{_metrics_table(results)}\n"


def _limit(results: Mapping[str, Any]) -> str:
    """In words, on how many examples the model was fine-tuned; empty for all."""
    return examples_note(results.get("setting", {}).get("max_train_samples"))


def _metrics_table(results: Mapping[str, Any]) -> str:
    rows = [
        [table_cell(TASK_TITLES.get(column, column)), table_cell(metric.replace("_", " ")), f"{entry['median']:.1f}",
         ", ".join(f"{value:.1f}" for value in entry["values"])]
        for column, entries in results["tasks"].items()
        for metric, entry in entries.items()
    ]  # fmt: skip
    return _table(["task", "metric", "median", "seeds"], rows)


def _headline_scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Median of each GLUE column's metric, in per cent, of the columns that were run."""
    return {
        column: results["tasks"][column][HEADLINE_METRICS[column]]["median"]
        for column in GLUE_COLUMNS
        if HEADLINE_METRICS[column] in results["tasks"].get(column, {})
    }


def minimal_pairs_section(results: Mapping[str, Any]) -> str:
    """Share of minimal pairs that come out right, as markdown."""
    rows = [
        [table_cell(name), f"{entry['accuracy']:.1f}", f"{entry['pairs']:,}"]
        for name, entry in results["phenomena"].items()
    ]
    return (
        f"## Minimal pairs\n\nThe good sentence has the higher pseudo-log-likelihood in {results['accuracy']:.1f} % of "
        f"{results['pairs']:,} pairs (chance: 50 %).\n\n{_table(['phenomenon', 'per cent right', 'pairs'], rows)}\n"
    )


# ---- Results that programs read ----


def _mlm_result(eval_loss: float, text_name: str, held_out_of: str | None) -> EvalResult:
    return EvalResult(
        task_type="fill-mask",
        task_name="Masked language modeling",
        dataset_type=held_out_of or "held-out",
        dataset_name=f"held-out part of {text_name}",
        metric_type="loss",
        metric_name=MLM_METRIC,
        metric_value=round(eval_loss, 4),
    )


def _glue_eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """Every metric of every task; `metric_name` says how it came about."""
    seeds = len(results["seeds"])
    facts = ["per cent", f"median of {seeds} seed{'s' if seeds > 1 else ''}", *filter(None, [_limit(results)])]
    entries = []
    for column, metrics in results["tasks"].items():
        config, split = MNLI_SPLITS.get(column, (column, "validation"))
        for metric, entry in metrics.items():
            entries.append(
                EvalResult(
                    task_type="text-classification",
                    task_name="Text classification",
                    dataset_type=GLUE_DATASET if column in TASK_TITLES else column,
                    dataset_name=f"GLUE {TASK_TITLES[column]}" if column in TASK_TITLES else column,
                    dataset_config=config if column in TASK_TITLES else None,
                    dataset_split=split,
                    metric_type=metric,
                    metric_name=f"{metric} ({', '.join(facts)})",
                    metric_value=round(entry["median"], 2),
                )
            )
    return entries


def _minimal_pairs_result(results: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="fill-mask",
        task_name="Masked language modeling",
        dataset_type=MINIMAL_PAIRS_DATASET,
        dataset_name=f"{results['pairs']:,} minimal pairs",
        metric_type="accuracy",
        metric_name="accuracy by pseudo-log-likelihood (per cent)",
        metric_value=round(results["accuracy"], 2),
    )


def _eval_entries(data: CardData) -> dict[str, list[EvalResultEntry]]:
    """
    The results on data sets of the Hub as entries of `.eval_results/*.yaml`, by name of the file.

    An entry has one value for a task: of GLUE, the metric that enters the average.
    """
    files: dict[str, list[EvalResultEntry]] = {}
    columns = {place: column for column, place in MNLI_SPLITS.items()}
    for result in data.get("eval_results", []):
        if result.dataset_type == GLUE_DATASET:
            column = columns.get((result.dataset_config, result.dataset_split), result.dataset_config)
            if result.metric_type == HEADLINE_METRICS.get(column):
                entry = EvalResultEntry(GLUE_DATASET, column, result.metric_value, notes=result.metric_name)
                files.setdefault("glue", []).append(entry)
        elif result.metric_name == MLM_METRIC and result.dataset_type in data.get("datasets", []):
            entry = EvalResultEntry(result.dataset_type, "fill-mask", result.metric_value, notes=MLM_METRIC)
            files.setdefault("masked_language_modeling", []).append(entry)
    return files
