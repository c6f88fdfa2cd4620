"""What `run_glue.py` scores, and how often."""

import math
from dataclasses import dataclass, field

from .glue import GlueError

MOST_SEEDS = 10_000  # a larger number is a seed, whose comma is missing


@dataclass
class GlueArguments:
    """What is scored, and how often."""

    tasks: str | None = field(
        default=None, metadata={"help": "Comma-separated GLUE tasks; default: all that glue_data holds, or all nine."}
    )
    glue_data: str | None = field(
        default=None, metadata={"help": "Folder laid out like the data set nyu-mll/glue; default: that data set."}
    )
    seeds: str = field(
        default="5", metadata={"help": "Number of seeds (1, 2, ...), or a comma-separated list of them: '3,7,'."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random part of each task."})
    metric: str | None = field(
        default=None, metadata={"help": "Another metric of the evaluate library, by name or path; reported as it is."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Own data instead of GLUE: csv, json(l), parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Own data to score on."})
    test_file: str | None = field(default=None, metadata={"help": "Own data to predict, with or without labels."})
    text_columns: list[str] = field(
        default_factory=list, metadata={"help": "One or two columns of text; default: those of text in train_file."}
    )
    label_column: str = field(default="label", metadata={"help": "Classes, or floats for a regression."})
    regression: bool = field(default=False, metadata={"help": "Predict the numbers in label_column, whole ones too."})
    task_name: str | None = field(default=None, metadata={"help": "Name of the own task; default: train_file's."})
    save_models: bool | None = field(
        default=None, metadata={"help": "Keep the first seed's fine-tuned model; default: for own data only."}
    )
    search_learning_rate: list[float] = field(
        default_factory=list, metadata={"help": "Learning rates to search for the one setting of all tasks."}
    )
    search_batch_size: list[int] = field(default_factory=list, metadata={"help": "Batch sizes to search."})
    search_num_train_epochs: list[float] = field(default_factory=list, metadata={"help": "Epochs to search."})
    search_seeds: str = field(default="1", metadata={"help": "Seeds of the search, as in seeds."})

    def __post_init__(self) -> None:
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ValueError(
                f"max_train_samples must be at least 1, got {self.max_train_samples}; leave it out for all"
            )
        if any(size < 1 for size in self.search_batch_size):
            raise ValueError(f"search_batch_size must be at least 1, got {min(self.search_batch_size)}")
        for name in ("search_learning_rate", "search_num_train_epochs"):
            for value in getattr(self, name):
                if not 0 < value < math.inf:
                    raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("seeds", "search_seeds"):
            parse_seeds(name, getattr(self, name))
        if self.uses_own_data and (self.tasks or self.glue_data):
            raise ValueError("train_file is data of your own: leave out tasks and glue_data, which are GLUE's")
        own = ("validation_file", "test_file", "text_columns", "regression", "task_name")
        given = [name for name in own if getattr(self, name)]
        given += ["label_column"] if self.label_column != GlueArguments.label_column else []
        if given and not self.uses_own_data:
            raise ValueError(f"{given[0]} belongs to data of your own: name a train_file with it, or leave it out")

    @property
    def keeps_models(self) -> bool:
        """Whether the fine-tuned model of the first seed is kept."""
        return self.uses_own_data if self.save_models is None else self.save_models

    @property
    def searches(self) -> bool:
        """Whether there is a grid of settings to choose from."""
        grids = (self.search_learning_rate, self.search_batch_size, self.search_num_train_epochs)
        return any(len(grid) > 1 for grid in grids)

    @property
    def uses_own_data(self) -> bool:
        """Whether files were named instead of GLUE."""
        return self.train_file is not None


def parse_seeds(name: str, text: str) -> list[int]:
    """`5` as seeds 1 to 5, `3,7` as these."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    is_count = "," not in text
    if not numbers or not (1 if is_count else 0) <= min(numbers) <= max(numbers) < (MOST_SEEDS if is_count else 2**32):
        raise GlueError(f"{name} must be a number of seeds or a comma-separated list of them, got {text!r}")
    return list(range(1, numbers[0] + 1)) if is_count else numbers
