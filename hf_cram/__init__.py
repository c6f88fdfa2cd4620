"""
hf_cram: train a BERT-class encoder from scratch under a wall-clock budget, as a Hugging Face extension.

Importing the package registers the crammed BERT with the Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from .configuration_crammed_bert import CrammedBertConfig
from .modeling_crammed_bert import (
    CrammedBertForMaskedLM,
    CrammedBertForMultipleChoice,
    CrammedBertForQuestionAnswering,
    CrammedBertForSequenceClassification,
    CrammedBertForTokenClassification,
    CrammedBertModel,
    CrammedBertPreTrainedModel,
)
from .version import __version__

AutoConfig.register("crammed_bert", CrammedBertConfig)
CrammedBertConfig.register_for_auto_class()
AutoModelForTextEncoding.register(CrammedBertConfig, CrammedBertModel)
AutoModelForPreTraining.register(CrammedBertConfig, CrammedBertForMaskedLM)
for auto_class, model_class in (
    (AutoModel, CrammedBertModel),
    (AutoModelForMaskedLM, CrammedBertForMaskedLM),
    (AutoModelForSequenceClassification, CrammedBertForSequenceClassification),
    (AutoModelForTokenClassification, CrammedBertForTokenClassification),
    (AutoModelForQuestionAnswering, CrammedBertForQuestionAnswering),
    (AutoModelForMultipleChoice, CrammedBertForMultipleChoice),
):
    auto_class.register(CrammedBertConfig, model_class)
    # Code travels with every checkpoint, so that it loads with trust_remote_code where hf_cram is not installed.
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "CrammedBertConfig",
    "CrammedBertForMaskedLM",
    "CrammedBertForMultipleChoice",
    "CrammedBertForQuestionAnswering",
    "CrammedBertForSequenceClassification",
    "CrammedBertForTokenClassification",
    "CrammedBertModel",
    "CrammedBertPreTrainedModel",
    "__version__",
]
