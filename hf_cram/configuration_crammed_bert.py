# Copyright 2026 The hf_cram authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of the crammed BERT: every architectural choice of the paper is one field."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import auto_docstring

AUTO_MAP = {
    "AutoConfig": "configuration_crammed_bert.CrammedBertConfig",
    "AutoModel": "modeling_crammed_bert.CrammedBertModel",
    "AutoModelForTextEncoding": "modeling_crammed_bert.CrammedBertModel",
    "AutoModelForPreTraining": "modeling_crammed_bert.CrammedBertForMaskedLM",
    "AutoModelForMaskedLM": "modeling_crammed_bert.CrammedBertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_crammed_bert.CrammedBertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_crammed_bert.CrammedBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_crammed_bert.CrammedBertForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_crammed_bert.CrammedBertForMultipleChoice",
}

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "neighbour_table_size",
    "classifier_hidden_size",
)


@auto_docstring(
    custom_intro="""
    Configuration of [`CrammedBertModel`] and its heads.

    The defaults are the final model of "Cramming" (arXiv 2212.14034, ICML version): 16 layers, hidden size 768, no
    biases, scaled sinusoidal positions, pre-LayerNorm, gated GELU, a linear prediction head. Each finding is one field
    that can be turned back alone; [`CrammedBertConfig.original_bert`] turns all of them back.
    """
)
@strict
class CrammedBertConfig(PreTrainedConfig):
    """
    Args:
        vocab_size (`int`): rows of the embedding table.
        hidden_size (`int`): width H of the hidden states.
        num_hidden_layers (`int`): number of transformer layers.
        num_attention_heads (`int`): attention heads; must divide `hidden_size`.
        intermediate_size (`int`): width I of the first feed-forward matrix (H, I). With `gated_linear_unit` half of it
            gates the other half, so the second matrix is (I / 2, H), as in the paper (3072 -> 1536).
        gated_linear_unit (`bool`): gated feed-forward block, `act(gate) * x`; `False` is BERT's `act(x)`.
        hidden_act (`str`): activation of the feed-forward block and of the nonlinear prediction head.
        max_position_embeddings (`int`): longest sequence in tokens. The paper trains at 128; sinusoids reach further
            without parameters.
        position_embedding_type (`str`): `"scaled_sinusoidal"` (one learnable scale), `"sinusoidal"`, `"learned"` (BERT)
            or `"rotary"`.
        rotary_base (`float`): base of the rotary wavelengths.
        type_vocab_size (`int`): rows of the token type table; 0 accepts `token_type_ids` and ignores them.
        pad_token_id (`int`): id of the padding token, whose embedding gets no gradient as an input.
        neighbour_table_entries (`int`): entries of a table that is looked up by hashes of a token's neighbours, and holds
            the embedding that stood on average between, behind or before the same two in the text. It helps the masked
            language model to fill masks; other heads and the encoder alone have none. It is counted
            (`embeddings_from_text`), not trained; 0 has none. The first entry is zeros, for tokens beside a masked one.
        neighbour_table_size (`int`): width of an entry, one byte each.
        mask_token_id (`int`): id of the mask token, by which the neighbour table knows what to help.
        qkv_bias (`bool`): biases of the query, key and value projections.
        linear_bias (`bool`): biases of the attention output and feed-forward matrices.
        decoder_bias (`bool`): bias of the output vocabulary.
        norm_scheme (`str`): `"pre"` (before each block) or `"post"` (BERT: after each residual sum).
        final_norm (`bool`): a norm after the last layer.
        embedding_norm (`bool`): a norm after the sum of the embeddings.
        norm_type (`str`): `"layer_norm"` or `"rms_norm"`.
        norm_eps (`float`): epsilon of every norm.
        prediction_head (`bool`): BERT's nonlinear head (dense, activation, norm) before the decoder.
        tie_word_embeddings (`bool`): decoder shares the word embeddings.
        embedding_dropout_prob (`float`): dropout of the embeddings; 0 in pretraining, 0.1 in fine-tuning (paper,
            section 4), like the two that follow.
        hidden_dropout_prob (`float`): dropout of each block's output.
        attention_probs_dropout_prob (`float`): dropout of the attention weights.
        initializer_range (`float`): standard deviation of every matrix at the start.
        classifier_hidden_size (`int`): width of the layer before the classifier (paper: 1024).
        classifier_activation (`str`): its activation.
        classifier_pooling (`str`): what a sequence classifier reads: `"cls"` (first token), `"mean"` (all tokens) or
            `"segments"` (the means of both texts of a pair, told apart by `token_type_ids`, their absolute difference
            and their product; Conneau et al. 2017).
        classifier_dropout (`float`): dropout before the classifier.
    """

    model_type = "crammed_bert"

    vocab_size: int = 32768
    hidden_size: int = 768
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    gated_linear_unit: bool = True
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    position_embedding_type: Literal["scaled_sinusoidal", "sinusoidal", "learned", "rotary"] = "scaled_sinusoidal"
    rotary_base: float | int = 10000.0
    type_vocab_size: int = 0
    pad_token_id: int | None = 0
    neighbour_table_entries: int = 0
    neighbour_table_size: int = 64
    mask_token_id: int | None = None

    qkv_bias: bool = False
    linear_bias: bool = False
    decoder_bias: bool = False

    norm_scheme: Literal["pre", "post"] = "pre"
    final_norm: bool = True
    embedding_norm: bool = True
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-12

    prediction_head: bool = False
    tie_word_embeddings: bool = True

    embedding_dropout_prob: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02

    classifier_hidden_size: int = 1024
    classifier_activation: str = "tanh"
    classifier_pooling: Literal["cls", "mean", "segments"] = "cls"
    classifier_dropout: float | int = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        # The whole map, so that a masked-LM checkpoint loads into every head where this package is not installed.
        # What a class of one's own has registered beside it stays; code of another repository would not travel along.
        given = kwargs.pop("auto_map", None) or {}
        own = {name: value for name, value in given.items() if "--" not in str(value)}
        self.auto_map = {**AUTO_MAP, **own}
        super().__post_init__(**kwargs)

    def validate_sizes(self) -> None:
        """Refuse shapes that cannot be built."""
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("type_vocab_size", "norm_eps", "initializer_range"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.neighbour_table_entries < 0 or self.neighbour_table_entries == 1:
            raise ValueError(f"neighbour_table_entries must be 0 or at least 2, got {self.neighbour_table_entries}")
        if self.neighbour_table_entries and self.neighbour_table_size > self.hidden_size:
            raise ValueError(
                f"neighbour_table_size ({self.neighbour_table_size}) must not be above hidden_size ({self.hidden_size})"
            )
        if not self.rotary_base > 0:
            raise ValueError(f"rotary_base must be above 0, got {self.rotary_base}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.gated_linear_unit and self.intermediate_size % 2:
            raise ValueError(
                f"intermediate_size ({self.intermediate_size}) must be even with gated_linear_unit: half of it is gate"
            )
        if self.position_embedding_type != "learned" and self.hidden_size % 2:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be even for sinusoidal or rotary positions")
        if self.position_embedding_type == "rotary" and (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"head size ({self.hidden_size // self.num_attention_heads}) must be even for rotary positions"
            )

    @classmethod
    def original_bert(cls, **overrides: Any) -> "CrammedBertConfig":
        """BERT-base (Devlin et al. 2018): every choice of the paper turned back. `overrides` are config fields."""
        fields: dict[str, Any] = {
            "vocab_size": 30522,
            "num_hidden_layers": 12,
            "gated_linear_unit": False,
            "position_embedding_type": "learned",
            "type_vocab_size": 2,
            "qkv_bias": True,
            "linear_bias": True,
            "decoder_bias": True,
            "norm_scheme": "post",
            "final_norm": False,
            "prediction_head": True,
            "embedding_dropout_prob": 0.1,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "classifier_hidden_size": 768,
        }
        return cls(**{**fields, **overrides})


__all__ = ["CrammedBertConfig"]
