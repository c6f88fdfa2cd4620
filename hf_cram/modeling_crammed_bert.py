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
"""
The crammed BERT ("Cramming", arXiv 2212.14034): embeddings, attention, feed-forward, layer, model, heads.

Shapes in comments: B sequences, L tokens, H hidden size, N heads, D head size, K masked positions, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_crammed_bert import CrammedBertConfig

# Where the neighbours stand by which the neighbour table is looked up: between two, behind two, before two.
NEIGHBOURS = ((-1, 1), (-2, -1), (1, 2))
NEIGHBOUR_STEP = 1 / 320  # of what the table holds in a byte: 32 is 0.1
ADDED_TOKENS = 3  # of no content, to those that an entry is the mean of
OUTSIDE = -1  # in the place of a token id where there is no neighbour
NO_TOKEN = -2  # in the place of a token id that is not known
# Of a universal hash (Carter and Wegman 1979): a factor for each of the neighbours and a constant for each way of looking
# them up, modulo a prime. A token id times a factor fits into 64 bits.
HASH_PRIME = 2**31 - 1
HASH_FACTORS = (1_436_972_519, 842_502_087)
HASH_CONSTANTS = (271_828_183, 1_618_033_988, 314_159_265)

# Each branch below is one finding of the paper against the original BERT's choice, tested side by side.
# trf-ignore: TRF041 config.position_embedding_type, config.type_vocab_size, config.neighbour_table_entries, config.embedding_norm, config.norm_type, config.norm_scheme, config.final_norm, config.prediction_head, config.gated_linear_unit, config.classifier_pooling


def sinusoidal_table(num_positions: int, hidden_size: int) -> torch.Tensor:
    """Sinusoidal positions (Vaswani et al. 2017), fp32, shape (num_positions, hidden_size): even columns sin, odd cos."""
    positions = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1)
    frequencies = torch.exp(torch.arange(0, hidden_size, 2, dtype=torch.float32) * (-math.log(10000.0) / hidden_size))
    angles = positions * frequencies  # (num_positions, H / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # (num_positions, H)


def rotary_table(num_positions: int, head_size: int, base: float) -> torch.Tensor:
    """Rotary positions (Su et al. 2021), fp32, shape (2, num_positions, head_size): cos and sin, halves repeated."""
    frequencies = 1.0 / base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)  # (num_positions, D / 2)
    angles = torch.cat((angles, angles), dim=-1)  # (num_positions, D)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn `states` (B, N, L, D) by the angles of their positions; `cos` and `sin` are (B or 1, 1, L, D)."""
    first_half, second_half = states.chunk(2, dim=-1)
    turned = torch.cat((-second_half, first_half), dim=-1)
    return (states * cos + turned * sin).to(states.dtype)


def take_positions(hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The tokens at `positions` (B, K) of each row: (B, L, H) -> (B, K, H)."""
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device).unsqueeze(1)  # (B, 1)
    return hidden_states[rows, positions.to(hidden_states.device)]


def take_table_rows(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The angles at `positions` (B, K): (B or 1, 1, L, D) -> (B, 1, K, D)."""
    table = table.expand(positions.shape[0], -1, -1, -1)
    return table.gather(2, positions[:, None, :, None].expand(-1, -1, -1, table.shape[-1]))


def build_norm(config: CrammedBertConfig) -> nn.Module:
    """LayerNorm or RMSNorm over the hidden size, as configured."""
    norm_class = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return norm_class(config.hidden_size, eps=config.norm_eps)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the weight is all there is to `module`: no adapter or quantised layer in its place, no hook on it."""
    has_hooks = bool(module._forward_pre_hooks or module._forward_hooks) or hasattr(module, "_hf_hook")
    return type(module) is nn.Linear and not has_hooks


class CrammedBertSinusoidalPositions(nn.Module):
    """Sinusoids, times one learnable scale where configured (paper, section 4.2)."""

    def __init__(self, config: CrammedBertConfig):
        super().__init__()
        self.num_positions, self.hidden_size = config.max_position_embeddings, config.hidden_size
        self.table = nn.Buffer(sinusoidal_table(self.num_positions, self.hidden_size), persistent=False)
        scaled = config.position_embedding_type == "scaled_sinusoidal"
        self.scale_factor = nn.Parameter(torch.full((1,), self.hidden_size**-0.5)) if scaled else None

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        positions = self.table[position_ids]  # (B or 1, L, H)
        return positions if self.scale_factor is None else positions * self.scale_factor


class CrammedBertRotaryTable(nn.Module):
    """cos and sin of the rotary angles, for every position and head dimension."""

    def __init__(self, config: CrammedBertConfig):
        super().__init__()
        self.num_positions, self.base = config.max_position_embeddings, config.rotary_base
        self.head_size = config.hidden_size // config.num_attention_heads
        self.table = nn.Buffer(rotary_table(self.num_positions, self.head_size, self.base), persistent=False)

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.table[:, position_ids].unsqueeze(2).unbind(0)  # each (B or 1, 1, L, D)
        return cos, sin


def shift_tokens(ids: torch.Tensor, offset: int, fill: int) -> torch.Tensor:
    """What stands `offset` places further on in each row, `fill` beyond its ends: (B, L) -> (B, L)."""
    padded = nn.functional.pad(ids, (max(-offset, 0), max(offset, 0)), value=fill)
    return padded[:, max(offset, 0) :][:, : ids.shape[1]]


class CrammedBertNeighbourTable(nn.Module):
    """
    What the text held between, behind and before the same neighbours (hf_cram.embedding_initialization counts it).

    One table of one-byte vectors, looked up by hashes of a token's neighbours; no gradient reaches it. Padding, and what
    has not its place in the same sequence, counts as no neighbour. Beside a mask token a look-up finds the first
    entry, which stays zeros. Projections of what is found are added to the embedding of a mask token, and to the last
    states before they are decoded: an encoder that reads text without mask tokens has no use for the table.

    In training on the text that was counted (`leaves_out`) each token's own occurrence is taken out of what its
    neighbours lead to, where it would tell the answer.
    """

    def __init__(self, config: CrammedBertConfig):
        super().__init__()
        self.entries = config.neighbour_table_entries
        self.pad_token_id = config.pad_token_id
        self.mask_token_id = NO_TOKEN if config.mask_token_id is None else config.mask_token_id
        size = config.neighbour_table_size
        self.table = nn.Buffer(torch.zeros(self.entries, size, dtype=torch.int8))
        self.counts = nn.Buffer(torch.zeros(self.entries, dtype=torch.int32))  # tokens that an entry is the mean of
        self.parts = nn.Buffer(torch.zeros(config.vocab_size, size))  # what each token adds to the sum of an entry
        self.leaves_out = False
        self.to_embeddings = nn.Linear(len(NEIGHBOURS) * size, config.hidden_size, bias=False)
        self.to_states = nn.Linear(len(NEIGHBOURS) * size, config.hidden_size, bias=False)

    def resize(self, num_tokens: int) -> None:
        """For another number of tokens in the vocabulary; new ones have nothing in the table."""
        parts = self.parts.new_zeros(num_tokens, self.parts.shape[1])
        kept = min(num_tokens, len(self.parts))
        parts[:kept] = self.parts[:kept]
        self.parts = parts

    def neighbours(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Both token ids, (B, L) each, by which each token is looked up, for each of `NEIGHBOURS`."""
        if self.pad_token_id is not None:
            input_ids = input_ids.masked_fill(input_ids == self.pad_token_id, OUTSIDE)
        ids = {}
        for offset in sorted({offset for places in NEIGHBOURS for offset in places}):
            is_near = shift_tokens(position_ids, offset, OUTSIDE) == position_ids + offset
            ids[offset] = shift_tokens(input_ids, offset, OUTSIDE).masked_fill(~is_near, OUTSIDE)
        return [(ids[first], ids[second]) for first, second in NEIGHBOURS]

    def look_up(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The entries of each token, one for each of `NEIGHBOURS`: (B, L), (B or 1, L) -> (B, L, 3)."""
        found = []
        for (first, second), constant in zip(self.neighbours(input_ids, position_ids), HASH_CONSTANTS, strict=True):
            hashed = first * HASH_FACTORS[0] + second * HASH_FACTORS[1] + constant
            entries = hashed % HASH_PRIME % (self.entries - 1) + 1
            is_masked = (first == self.mask_token_id) | (second == self.mask_token_id)
            found.append(entries.masked_fill(is_masked, 0))
        return torch.stack(found, dim=-1)

    def find(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        positions: torch.Tensor,
        original_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        What the entries say of the tokens at `positions` (B, K), (B, K, 3, size), without a token's own occurrence if
        that is left out.
        """
        entries = take_positions(self.look_up(input_ids, position_ids), positions)  # (B, K, 3)
        means = nn.functional.embedding(entries, self.table).to(self.parts.dtype) * NEIGHBOUR_STEP
        if original_ids is None or not self.leaves_out:
            return means
        own = self.parts[take_positions(original_ids, positions)].unsqueeze(2)  # (B, K, 1, size)
        counts = (self.counts[entries] + ADDED_TOKENS).unsqueeze(-1).to(means.dtype)
        shown, true = (self.neighbours(ids, position_ids) for ids in (input_ids, original_ids))
        # Beside a token that random masking has replaced, an entry has nothing of this occurrence.
        is_own = torch.stack([(a == b) & (c == d) for (a, c), (b, d) in zip(shown, true, strict=True)], dim=-1)
        is_own = take_positions(is_own, positions).unsqueeze(-1)  # (B, K, 3, 1)
        return torch.where(is_own, (means * counts - own) / (counts - 1), means)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        positions: torch.Tensor | None = None,
        original_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What is added to the embeddings, (B, L, H), and to the last states, (B, K, H), at `positions` (B, K) alone, which
        are all tokens if they are not given.
        """
        every = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)  # (1, L)
        positions = every.expand_as(input_ids) if positions is None else positions
        position_ids = every if position_ids is None else position_ids.reshape(-1, input_ids.shape[1])
        found = self.find(input_ids, position_ids, positions, original_ids)
        found = found.flatten(2).to(self.to_embeddings.weight.dtype)  # (B, K, 3 size)
        is_mask = take_positions(input_ids, positions) == self.mask_token_id
        at_masks = self.to_embeddings(found).masked_fill(~is_mask.unsqueeze(-1), 0)
        to_add = at_masks.new_zeros(*input_ids.shape, at_masks.shape[-1])  # (B, L, H)
        return to_add.scatter(1, positions.unsqueeze(-1).expand_as(at_masks), at_masks), self.to_states(found)


class CrammedBertEmbeddings(nn.Module):
    """Words, positions and (where configured) token types, summed, normalised, dropped out."""

    def __init__(self, config: CrammedBertConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        if config.position_embedding_type in ("scaled_sinusoidal", "sinusoidal"):
            self.position_embeddings: nn.Module | None = CrammedBertSinusoidalPositions(config)
        elif config.position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.position_embeddings = None  # rotary positions enter in the attention
        self.token_type_embeddings = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size > 0 else None
        )
        self.norm = build_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.embedding_dropout_prob)

    def forward(
        self,
        input_ids: torch.LongTensor | None,
        token_type_ids: torch.LongTensor | None,
        position_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None,
    ) -> torch.Tensor:
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (B, L, H)
        if self.position_embeddings is not None:
            # The sinusoids stay in fp32 where weights are loaded in less.
            hidden_states = hidden_states + self.position_embeddings(position_ids).to(hidden_states.dtype)
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
            hidden_states = hidden_states + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.norm(hidden_states))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention with weights. query, key, value (B, N, L, D) -> output (B, L, N, D), weights (B, N, L, L)."""
    scores = query @ key.transpose(2, 3) * scaling  # (B, N, L, L)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    # Softmax in at least fp32: bf16 sums lose the small weights, and float64 must stay float64.
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, scores.dtype))
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CrammedBertAttention(nn.Module):
    """Bidirectional multi-head self-attention with one fused query-key-value projection."""

    def __init__(self, config: CrammedBertConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = False
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.linear_bias)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, H) -> (B, N, L, D)"""
        return states.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def project(
        self, hidden_states: torch.Tensor, output_positions: torch.LongTensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, N, L or K, D), keys and values (B, N, L, D)."""
        if output_positions is not None and is_plain_linear(self.query_key_value):
            # One matrix, but the queries of the other tokens are not wanted.
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            size = weight.shape[0] // 3  # not the hidden size where heads were pruned
            biases = (None, None) if bias is None else (bias[:size], bias[size:])
            query = nn.functional.linear(take_positions(hidden_states, output_positions), weight[:size], biases[0])
            key, value = nn.functional.linear(hidden_states, weight[size:], biases[1]).chunk(2, dim=-1)
        else:
            query, key, value = self.query_key_value(hidden_states).chunk(3, dim=-1)
            if output_positions is not None:
                query = take_positions(query, output_positions)
        return self.split_heads(query), self.split_heads(key), self.split_heads(value)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_positions: tuple[torch.Tensor, torch.Tensor] | None = None,
        output_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.project(hidden_states, output_positions)
        if rotary_positions is not None:
            key = rotate(key, *rotary_positions)
            if output_positions is not None:
                rotary_positions = tuple(take_table_rows(table, output_positions) for table in rotary_positions)
            query = rotate(query, *rotary_positions)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dense(context.flatten(2)), weights  # (B, L or K, H)


class CrammedBertMLP(nn.Module):
    """Feed-forward block, gated (GEGLU, Shazeer 2020) or plain."""

    def __init__(self, config: CrammedBertConfig):
        super().__init__()
        self.gated = config.gated_linear_unit
        self.act = ACT2FN[config.hidden_act]
        inner_size = config.intermediate_size // 2 if self.gated else config.intermediate_size
        self.dense_in = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.linear_bias)
        self.dense_out = nn.Linear(inner_size, config.hidden_size, bias=config.linear_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dense_in(hidden_states)  # (B, L, I)
        if self.gated:
            hidden_states, gate = hidden_states.chunk(2, dim=-1)  # each (B, L, I / 2)
            return self.dense_out(hidden_states * self.act(gate))
        return self.dense_out(self.act(hidden_states))


class CrammedBertLayer(GradientCheckpointingLayer):
    """
    Attention and feed-forward block, each with a residual and a norm before (paper) or after (BERT) it.

    With `output_positions` (B, K) only those tokens are computed, from the keys and values of all: (B, K, H).
    """

    def __init__(self, config: CrammedBertConfig, layer_idx: int):
        super().__init__()
        self.pre_norm = config.norm_scheme == "pre"
        self.attention_norm = build_norm(config)
        self.attention = CrammedBertAttention(config, layer_idx)
        self.mlp_norm = build_norm(config)
        self.mlp = CrammedBertMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_positions: tuple[torch.Tensor, torch.Tensor] | None = None,
        output_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_input = self.attention_norm(hidden_states) if self.pre_norm else hidden_states
        attention_output, _ = self.attention(
            attention_input, attention_mask, rotary_positions, output_positions, **kwargs
        )
        if output_positions is not None:
            hidden_states = take_positions(hidden_states, output_positions)
        hidden_states = hidden_states + self.dropout(attention_output)
        if self.pre_norm:
            return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        hidden_states = self.attention_norm(hidden_states)
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


@auto_docstring
class CrammedBertPreTrainedModel(PreTrainedModel):
    config: CrammedBertConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrammedBertEmbeddings", "CrammedBertLayer"]
    _keys_to_ignore_on_load_unexpected = [r"^neighbour_table\."]  # the masked language model's alone
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": CrammedBertLayer, "attentions": CrammedBertAttention}

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, CrammedBertNeighbourTable):
                module.resize(embeddings.num_embeddings)
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Matrices, embeddings and norms (normal with initializer_range, ones, zeros) are the base class's.
        super()._init_weights(module)
        # Loading builds the model without memory and leaves non-persistent tables unfilled: fill them here.
        if isinstance(module, CrammedBertSinusoidalPositions):
            init.copy_(module.table, sinusoidal_table(module.num_positions, module.hidden_size))
            if module.scale_factor is not None:
                init.constant_(module.scale_factor, module.hidden_size**-0.5)
        elif isinstance(module, CrammedBertRotaryTable):
            init.copy_(module.table, rotary_table(module.num_positions, module.head_size, module.base))
        elif isinstance(module, CrammedBertNeighbourTable):
            init.zeros_(module.table)
            init.zeros_(module.counts)
            init.zeros_(module.parts)


@auto_docstring
class CrammedBertModel(CrammedBertPreTrainedModel):
    def __init__(self, config: CrammedBertConfig):
        super().__init__(config)
        self.embeddings = CrammedBertEmbeddings(config)
        self.rotary_table = CrammedBertRotaryTable(config) if config.position_embedding_type == "rotary" else None
        self.layers = nn.ModuleList([CrammedBertLayer(config, index) for index in range(config.num_hidden_layers)])
        self.final_norm = build_norm(config) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        output_positions (`torch.LongTensor` of shape `(batch_size, num_positions)`, *optional*):
            Only these tokens of each row come out. Where no attention mask stands in the way, the last layer computes
            no others.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        length = tokens.shape[1]
        # Flash attention finds the borders of packed sequences in these.
        is_packed = position_ids is not None or kwargs.get("cu_seq_lens_q") is not None
        if position_ids is None:
            if length > self.config.max_position_embeddings:
                is_learned = self.config.position_embedding_type == "learned"
                other = (
                    "" if is_learned else ", or load the model with from_pretrained(..., max_position_embeddings=...)"
                )
                raise ValueError(
                    f"A sequence of {length} tokens is longer than max_position_embeddings "
                    f"({self.config.max_position_embeddings}): truncate it{other}"
                )
            position_ids = torch.arange(length, device=tokens.device).unsqueeze(0)  # (1, L)
        else:
            position_ids = position_ids.reshape(-1, length)
            kwargs["position_ids"] = position_ids

        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)  # (B, L, H)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        rotary_positions = None if self.rotary_table is None else self.rotary_table(position_ids)
        # A mask would have to be cut to the positions, in each attention implementation's own form.
        narrows_last_layer = (
            output_positions is not None and output_positions.shape[1] > 0 and attention_mask is None and not is_packed
        )
        for index, layer in enumerate(self.layers):
            is_narrow = narrows_last_layer and index == len(self.layers) - 1
            hidden_states = layer(
                hidden_states, attention_mask, rotary_positions, output_positions if is_narrow else None, **kwargs
            )
        if output_positions is not None and not narrows_last_layer:
            hidden_states = take_positions(hidden_states, output_positions)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))


class CrammedBertPredictionHead(nn.Module):
    """BERT's nonlinear prediction head: dense, activation, norm."""

    def __init__(self, config: CrammedBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.linear_bias)
        self.act = ACT2FN[config.hidden_act]
        self.norm = build_norm(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act(self.dense(hidden_states)))


def cross_entropy_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """
    Cross-entropy in nats over the labels that are not -100: their mean, or their sum over `num_items_in_batch`.

    The library's own loss casts to fp32; this one casts up to it, and leaves float64 as it is.
    """
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten().to(logits.device), reduction=reduction)
    return loss if num_items_in_batch is None else over_items(loss, num_items_in_batch)


def over_items(total: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """A sum over some items of a batch as their part of its mean; the count may lie on another device."""
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


@auto_docstring(
    custom_intro="""
    The crammed BERT with a masked language modeling head.

    With `masked_positions` the logits are computed at those positions only; while training, none are returned.
    """
)
class CrammedBertForMaskedLM(CrammedBertPreTrainedModel):
    _tied_weights_keys = {"decoder.weight": "model.embeddings.word_embeddings.weight"}

    def __init__(self, config: CrammedBertConfig):
        super().__init__(config)
        self.model = CrammedBertModel(config)
        self.head = CrammedBertPredictionHead(config) if config.prediction_head else nn.Identity()
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self.neighbour_table = CrammedBertNeighbourTable(config) if config.neighbour_table_entries > 0 else None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder = new_embeddings

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        masked_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | MaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Token ids to predict; -100 is ignored.
        masked_positions (`torch.LongTensor` of shape `(batch_size, masked_tokens)`, *optional*):
            Where in each row a label stands, or a prediction is wanted: the loss and the logits are of these tokens alone.
            While training with labels no logits are returned.
        """
        known: torch.Tensor | None = None
        if self.neighbour_table is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("The neighbour table is looked up by input_ids: inputs_embeds will not do")
            if self.training and labels is not None:
                original_ids = torch.where(labels == -100, input_ids, labels)
                of_masks, known = self.neighbour_table(input_ids, position_ids, masked_positions, original_ids)
            else:
                of_masks, known = self.neighbour_table(input_ids, position_ids)
                known = known if masked_positions is None else take_positions(known, masked_positions)
            inputs_embeds, input_ids = self.get_input_embeddings()(input_ids) + of_masks, None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_positions=masked_positions,
            return_dict=True,
            **kwargs,
        )
        if masked_positions is not None and labels is not None:
            labels = labels.gather(1, masked_positions)  # (B, K)
        hidden_states = outputs.last_hidden_state  # (B, K, H) or (B, L, H)
        if known is not None:
            hidden_states = hidden_states + known
        logits = self.decoder(self.head(hidden_states))  # (B, K, V) or (B, L, V)
        loss = None
        if labels is not None:
            loss = cross_entropy_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return MaskedLMOutput(
            loss=loss,
            logits=None if self.training and masked_positions is not None and labels is not None else logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CrammedBertLabelProjection(nn.Linear):
    """
    A linear layer whose single output, if it has but one, does not depend on where its weight lies in memory.

    The matrix-vector kernels sum in an order that follows the alignment of the weight, which a loaded checkpoint
    does not share with the model that was saved: scores would differ in the last bit.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.out_features == 1 and type(self.weight) is nn.Parameter:  # and not quantised
            return (hidden_states * self.weight).sum(-1, keepdim=True) + self.bias
        return super().forward(hidden_states)


class CrammedBertClassificationHead(nn.Module):
    """Dense layer, activation and dropout (paper: H -> 1024, tanh), and a linear layer to the labels."""

    def __init__(self, config: CrammedBertConfig, num_labels: int):
        super().__init__()
        vectors = 4 if config.classifier_pooling == "segments" else 1
        self.dense = nn.Linear(vectors * config.hidden_size, config.classifier_hidden_size)
        self.act = ACT2FN[config.classifier_activation]
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = CrammedBertLabelProjection(config.classifier_hidden_size, num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(self.act(self.dense(pooled))))  # (B, labels)


def mean_of(hidden_states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that `kept` (B, L) marks with 1; zeros where there is none. (B, L, H) -> (B, H)"""
    kept = kept.unsqueeze(-1).to(hidden_states.dtype)  # (B, L, 1)
    return (hidden_states * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


def pool(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    classifier_pooling: str,
) -> torch.Tensor:
    """
    What a classifier reads of a sequence (B, L, H): its first token or the mean over the tokens that are not padding,
    (B, H); or of a pair both means, their absolute difference and their product, (B, 4 H).
    """
    if classifier_pooling == "cls":
        return hidden_states[:, 0]
    if attention_mask is not None and len(attention_mask.shape) != 2:
        raise ValueError(
            f"classifier_pooling {classifier_pooling!r} needs an attention mask of shape (batch_size, sequence_length), "
            f"got {tuple(attention_mask.shape)}"
        )
    ones = torch.ones_like(hidden_states[..., 0])  # (B, L)
    kept = ones if attention_mask is None else attention_mask.to(ones)
    if classifier_pooling == "mean":
        return mean_of(hidden_states, kept)
    is_second = torch.zeros_like(ones) if token_type_ids is None else token_type_ids.to(ones)
    first, second = mean_of(hidden_states, kept * (1 - is_second)), mean_of(hidden_states, kept * is_second)
    return torch.cat((first, second, (first - second).abs(), first * second), dim=-1)


@auto_docstring(
    custom_intro="""
    The crammed BERT with a classification or regression head on top of the pooled sequence.
    """
)
class CrammedBertForSequenceClassification(CrammedBertPreTrainedModel):
    def __init__(self, config: CrammedBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = CrammedBertModel(config)
        self.classifier = CrammedBertClassificationHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | SequenceClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Classes (long), several classes at once (float matrix), or with one label the values of a regression.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        pooled = pool(outputs.last_hidden_state, attention_mask, token_type_ids, self.config.classifier_pooling)
        logits = self.classifier(pooled)  # (B, num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            num_items = kwargs.get("num_items_in_batch")
            if num_items is not None and self.config.problem_type != "single_label_classification":
                loss = over_items(loss * labels.numel(), num_items)  # the library's is a mean over these labels
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring(
    custom_intro="""
    The crammed BERT with a classifier on every token, e.g. for named entity recognition.
    """
)
class CrammedBertForTokenClassification(CrammedBertPreTrainedModel):
    def __init__(self, config: CrammedBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = CrammedBertModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | TokenClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Class of each token; -100 is ignored.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))  # (B, L, num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring(
    custom_intro="""
    The crammed BERT with a span head for extractive question answering.
    """
)
class CrammedBertForQuestionAnswering(CrammedBertPreTrainedModel):
    def __init__(self, config: CrammedBertConfig):
        super().__init__(config)
        self.model = CrammedBertModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | QuestionAnsweringModelOutput:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.qa_outputs(self.dropout(outputs.last_hidden_state))  # (B, L, 2)
        start_logits, end_logits = (part.contiguous() for part in logits.unbind(dim=-1))  # each (B, L)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def flatten_choices(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """(B, choices, ...) -> (B * choices, ...)"""
    return None if tensor is None else tensor.flatten(0, 1)


@auto_docstring(
    custom_intro="""
    The crammed BERT with a multiple choice head: one score for each choice, a softmax over them.
    """
)
class CrammedBertForMultipleChoice(CrammedBertPreTrainedModel):
    def __init__(self, config: CrammedBertConfig):
        super().__init__(config)
        self.model = CrammedBertModel(config)
        self.classifier = CrammedBertClassificationHead(config, 1)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | MultipleChoiceModelOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`):
            Every other input has the same two leading dimensions.
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Index of the right choice.
        """
        num_choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        attention_mask, token_type_ids = flatten_choices(attention_mask), flatten_choices(token_type_ids)
        outputs = self.model(
            input_ids=flatten_choices(input_ids),
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=flatten_choices(position_ids),
            inputs_embeds=flatten_choices(inputs_embeds),
            return_dict=True,
            **kwargs,
        )
        pooled = pool(outputs.last_hidden_state, attention_mask, token_type_ids, self.config.classifier_pooling)
        logits = self.classifier(pooled).view(-1, num_choices)  # (B, choices)
        loss = None
        if labels is not None:
            loss = cross_entropy_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "CrammedBertForMaskedLM",
    "CrammedBertForMultipleChoice",
    "CrammedBertForQuestionAnswering",
    "CrammedBertForSequenceClassification",
    "CrammedBertForTokenClassification",
    "CrammedBertModel",
    "CrammedBertPreTrainedModel",
]
