"""
GLUE results of the paper (Geiping & Goldstein, arXiv 2212.14034), in per cent: plain data for tables and charts.

All are scores on the development sets, each the median of 5 fine-tunings. The average counts the nine columns of
`GLUE_COLUMNS` once each, so MNLI twice, and leaves WNLI out. A row's `source` is "V" where its figures were read in
the paper's text, repository or model card, and "R" where they are recalled and their average recomputed. Budgets are
seconds of pretraining; `None` stands for what does not apply.
"""

# Column titles in the paper's order. A score in a column is that of the task's metric in HEADLINE_METRICS.
GLUE_COLUMNS = {
    "mnli": "MNLI-m",
    "mnli_mismatched": "MNLI-mm",
    "sst2": "SST-2",
    "stsb": "STS-B",
    "rte": "RTE",
    "qnli": "QNLI",
    "qqp": "QQP",
    "mrpc": "MRPC",
    "cola": "CoLA",
}
# Titles of all tasks: WNLI is reported as well.
TASK_TITLES = {**GLUE_COLUMNS, "wnli": "WNLI"}
# WNLI has a metric, but no column: it is reported, never averaged.
HEADLINE_METRICS = {
    "mnli": "accuracy",
    "mnli_mismatched": "accuracy",
    "sst2": "accuracy",
    "stsb": "pearson",
    "rte": "accuracy",
    "qnli": "accuracy",
    "qqp": "f1",
    "mrpc": "f1",
    "cola": "matthews_correlation",
    "wnli": "accuracy",
}


def examples_note(max_train_samples: float | None) -> str:
    """What sets scores apart from the paper's, which come of training on all examples; empty where nothing does."""
    return "" if max_train_samples is None else f"at most {max_train_samples:,} training examples a task"


PAPER_GLUE_ROWS: dict[str, dict] = {
    # Hardware, budget and size from Devlin et al. 2018, appendix A.2 and section 3.
    "BERT-base, fully trained": {
        "mnli": 83.2, "mnli_mismatched": 83.4, "sst2": 91.9, "stsb": 86.7, "rte": 59.2, "qnli": 90.6, "qqp": 87.7,
        "mrpc": 89.3, "cola": 56.5, "average": 80.9,
        "hardware": "16 TPU chips", "budget": "4 days", "time_budget_seconds": 345_600,
        "num_parameters": 110_000_000, "source": "V",
    },
    "BERT-base, no pretraining": {
        "mnli": 34.1, "mnli_mismatched": 34.1, "sst2": 79.9, "stsb": 17.8, "rte": 47.3, "qnli": 50.0, "qqp": 68.6,
        "mrpc": 77.9, "cola": 0.0, "average": 45.5,
        "hardware": None, "budget": None, "time_budget_seconds": None,
        "num_parameters": 110_000_000, "source": "V",
    },
    "crammed v1, RTX A6000": {
        "mnli": 83.9, "mnli_mismatched": 84.1, "sst2": 92.2, "stsb": 84.6, "rte": 53.8, "qnli": 89.5, "qqp": 87.3,
        "mrpc": 87.5, "cola": 44.5, "average": 78.6,
        "hardware": "1 x RTX A6000", "budget": "1 day", "time_budget_seconds": 86_400,
        "num_parameters": 119_500_000, "source": "V",
    },
    "crammed v1, RTX 2080 Ti": {
        "mnli": 82.8, "mnli_mismatched": 83.4, "sst2": 91.5, "stsb": 83.1, "rte": 54.0, "qnli": 89.0, "qqp": 87.2,
        "mrpc": 86.2, "cola": 47.2, "average": 78.3,
        "hardware": "1 x RTX 2080 Ti", "budget": "1 day", "time_budget_seconds": 86_400,
        "num_parameters": 119_500_000, "source": "R",
    },
    "crammed v1, RTX A4000": {
        "mnli": 83.0, "mnli_mismatched": 83.2, "sst2": 91.6, "stsb": 84.8, "rte": 54.7, "qnli": 88.5, "qqp": 86.9,
        "mrpc": 86.4, "cola": 43.7, "average": 78.1,
        "hardware": "1 x RTX A4000", "budget": "1 day", "time_budget_seconds": 86_400,
        "num_parameters": 119_500_000, "source": "R",
    },
    "crammed v1, 8 x RTX A6000": {
        "mnli": 86.5, "mnli_mismatched": 86.7, "sst2": 93.8, "stsb": 86.8, "rte": 53.4, "qnli": 91.6, "qqp": 88.0,
        "mrpc": 88.2, "cola": 42.9, "average": 79.8,
        "hardware": "8 x RTX A6000", "budget": "2 days", "time_budget_seconds": 172_800,
        "num_parameters": 119_500_000, "source": "R",
    },
    "crammed v2, RTX A6000, best checkpoint": {  # the median is 80.4, at second hand
        "mnli": 84.1, "mnli_mismatched": 84.6, "sst2": 92.0, "stsb": 87.4, "rte": 58.5, "qnli": 90.2, "qqp": 87.5,
        "mrpc": 88.9, "cola": 53.3, "average": 80.7,
        "hardware": "1 x RTX A6000", "budget": "1 day", "time_budget_seconds": 86_400,
        "num_parameters": 119_500_000, "source": "V",
    },
}  # fmt: skip
