"""
GLUE's metrics as an `evaluate.Metric`, over scikit-learn and scipy.

Loaded by its path, so that nothing is downloaded: `evaluate.load(hf_cram.glue.METRIC_PATH, "mrpc")`. Every score is a
fraction (accuracy, F1) or a coefficient from -1 to 1.
"""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

REGRESSION = ("stsb", "regression")
WITH_F1 = ("mrpc", "qqp")
ACCURACY_ALONE = ("sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "ax", "hans")
CONFIGURATIONS = ("cola", *REGRESSION, *WITH_F1, *ACCURACY_ALONE, "classification")


def correlation(coefficient, predictions, references):
    """A correlation, 0.0 where none is defined: one side is constant or not finite (nothing learned, or diverged)."""
    if len(set(predictions)) < 2 or len(set(references)) < 2 or not np.isfinite(predictions).all():
        return 0.0
    return float(coefficient(predictions, references)[0])


class Glue(evaluate.Metric):
    """
    One configuration for each task (Wang et al. 2018), and `classification` and `regression` for any other data.

    cola: matthews_correlation; stsb, regression: pearson, spearmanr; mrpc, qqp: accuracy, f1; classification:
    accuracy, f1 (macro average over the classes); all others: accuracy.
    """

    def _info(self):
        if self.config_name not in CONFIGURATIONS:
            raise ValueError(f"Unknown configuration {self.config_name!r} (valid: {', '.join(CONFIGURATIONS)})")
        value = datasets.Value("float32" if self.config_name in REGRESSION else "int64")
        return evaluate.MetricInfo(
            description="Metrics of the GLUE benchmark",
            citation="Wang et al. 2018, arXiv 1804.07461",
            inputs_description="predictions and references: classes, or values for stsb and regression",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references):
        if self.config_name == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        if self.config_name in REGRESSION:
            return {
                "pearson": correlation(pearsonr, predictions, references),
                "spearmanr": correlation(spearmanr, predictions, references),
            }
        scores = {"accuracy": float(accuracy_score(references, predictions))}
        if self.config_name in WITH_F1:
            scores["f1"] = float(f1_score(references, predictions))
        if self.config_name == "classification":
            scores["f1"] = float(f1_score(references, predictions, average="macro"))
        return scores
