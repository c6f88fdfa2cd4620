"""The card of a published corpus: what it holds, what it was made of, how its rows score."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from ..markup import table_cell
from .errors import DataError
from .languages import language_code

RECIPE_POSITIONS = 512  # of the model in the recipe that the card names
TEMPLATE = Path(__file__).with_name("data_card_template.md")
# What the Hub takes in the front matter of a card.
HUB_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
HUB_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# The Hub's names for sizes: a name for each bound, up to a thousand billion rows.
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
# What a step cost says something about the machine, not about the corpus.
COSTS = ("seconds", "peak_memory_bytes")
SCORE_WORDS = {
    "none": "number of the row",
    "random": "random number",
    "unigram": "bits per token under the corpus's token frequencies",
    "sentence_length": "tokens per sentence",
    "word_length": "characters per word",
    "rare_tokens": "share of rare tokens",
}


def check_for_card(name: str, value: str | None, form: re.Pattern[str], such_as: str) -> str | None:
    """
    A language or licence in lower case, `None` where nothing is told. Raises [`DataError`] where the Hub would not take it.
    """
    told = (language_code(value) or "").strip().lower()
    if told not in ("", "none") and not form.fullmatch(told):
        raise DataError(f"{name} must be {such_as}, or none, which leaves it out; got {value!r}")
    return told or None


def check_language(name: str, value: str | None) -> str | None:
    return check_for_card(name, value, HUB_LANGUAGE, "a code of two or three letters such as de, or multilingual")


def check_license(name: str, value: str | None) -> str | None:
    return check_for_card(name, value, HUB_LICENSE, "an identifier of the Hub such as mit or cc-by-4.0")


def build_data_card(
    repository: str,
    description: Mapping[str, Any],
    dataset_info: Mapping[str, Any],
    score_words: str,
    language: str | None,
    license_name: str | None,
) -> DatasetCard:
    """
    A card with the Hub's metadata, sources, steps, counts, settings and hashes.

    Args:
        repository: of the Hub, which is named in the examples.
        description: the content of `corpus.json`.
        dataset_info: features and splits, in the form of the Hub's metadata.
        score_words: the paragraph below the histogram.
        language: of the text, a code of the Hub; `None` leaves it out.
        license_name: an identifier of the Hub; `None` leaves it out.
    """
    length = description["max_seq_length"]
    splits = description["splits"]
    num_rows = sum(split["rows"] for split in splits.values())
    data_files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    data = DatasetCardData(
        language=language,
        license=license_name,
        task_categories=["fill-mask"],
        size_categories=[size_category(num_rows)],
        tags=["hf_cram", "masked-lm", "tokenized"],
        configs=[{"config_name": "default", "data_files": data_files}],
        dataset_info=dict(dataset_info),
    )
    return DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=repository.rpartition("/")[2],
        repository=repository,
        num_rows=f"{num_rows:,}",
        sequence_length=length,
        vocab_size=f"{description['vocab_size']:,}",
        dtype=description["dtype"],
        splits=[
            {
                "name": name,
                "rows": f"{split['rows']:,}",
                "tokens": f"{split['rows'] * length:,}",
                "sha256": split["sha256"],
            }
            for name, split in splits.items()
        ],
        positions=f" --max_position_embeddings {length}" if length > RECIPE_POSITIONS else "",
        tables=statistics_tables(description["statistics"]),
        settings=yaml.safe_dump(dict(description["settings"]), sort_keys=True, allow_unicode=True).strip(),
        score_words=score_words,
    )


def size_category(num_rows: int) -> str:
    """The Hub's name for a number of rows: `n<1K`, `1K<n<10K`, ..., `n>1T`."""
    number = sum(num_rows >= 10 ** (3 + power) for power in range(len(SIZES)))
    if number == 0:
        return f"n<{SIZES[0]}"
    return f"n>{SIZES[-1]}" if number == len(SIZES) else f"{SIZES[number - 1]}<n<{SIZES[number]}"


def statistics_tables(statistics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    The counts of a prepared corpus as tables (`title`, `header`, `rows` of text): its numbers together, then one table
    for each group of numbers or of records.
    """
    numbers = [[_words(name), _cell(value)] for name, value in statistics.items() if _is_plain(value)]
    tables = [{"title": "Counts", "header": ["", "count"], "rows": numbers}]
    for name, value in statistics.items():
        if name in ("row_scores", *COSTS) or _is_plain(value) or not value:
            continue
        records = value.items() if isinstance(value, Mapping) else [("", record) for record in value]
        records = [(key, record if isinstance(record, Mapping) else {"": record}) for key, record in records]
        columns = list(dict.fromkeys(key for _, record in records for key in record if key not in COSTS))
        is_list = not isinstance(value, Mapping)
        header = [_words(column) for column in columns]
        rows = [[_cell(record.get(column)) for column in columns] for _, record in records]
        if not is_list:
            header = ["", *header]
            rows = [[_cell(key), *row] for (key, _), row in zip(records, rows, strict=True)]
        tables.append({"title": _words(name).capitalize(), "header": header, "rows": rows})
    return tables


def _is_plain(value: Any) -> bool:
    return not isinstance(value, Mapping | list)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    """A value in a cell of a table, which no sign of it may break."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return "; ".join(f"{_cell(key)}: {_cell(content)}" for key, content in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return table_cell(value)


def draw_histogram(counts: Sequence[int], edges: Sequence[float], row_order: str) -> bytes:
    """The histogram of the rows' scores in a PNG; `edges` bounds the bins of `counts`."""
    from matplotlib.figure import Figure  # a second of start-up that only this needs

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge")
    axes.set_xlabel(SCORE_WORDS[row_order])
    axes.set_ylabel("rows")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    return image.getvalue()
