"""
The memory of one training step, by calculation: no weight is allocated, and 16 layers x 768 take seconds.

The step is run on fake tensors (shapes without memory) of the CPU, and every storage it makes is counted from its
first operation to its last. The count is of the eager step: on a CPU a compiled one saves less for backward and has fewer
temporaries (benchmarks/memory.py). A GPU's allocator reserves more than the tensors need: 42.1 GB in the one compiled run,
where about 37 were calculated (34.4 times 2^30 bytes), so leave room for it. With dropout it is too large for a GPU,
whose kernels keep smaller masks than a CPU's and no attention weights.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForMaskedLM, PreTrainedConfig

from .data.collator import masked_tokens
from .hardware import takes_masked_positions
from .optimization import MuonWithAdamW, muon_parameter_groups

# What a process needs beside its tensors (the driver's context, the libraries' kernels and workspaces), and what the
# allocator loses to fragmentation, as a share of the tensors.
RESERVE_BYTES = 10**9
RESERVE_SHARE = 0.05
# A card of "11 GB" has about so many times 2^30 bytes.
BYTES_PER_GB = 2**30
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainingSetup:
    """
    What the memory of a step depends on beside the model.

    Args:
        max_seq_length: tokens of a row.
        mlm_probability: share of them predicted.
        autocast_dtype: dtype of autocast, `None` trains in fp32.
        optimizer: `"adamw"` or `"muon"` ([`MuonWithAdamW`]).
        gradient_checkpointing: keep the inputs of the layers only, and compute the rest again in backward.
        checkpointed_every: of so many layers one.
        accumulates_gradients: an optimiser step has several micro-batches, so that the gradients of the earlier ones
            are there at the peak.
    """

    max_seq_length: int = 128
    mlm_probability: float = 0.25
    autocast_dtype: torch.dtype | None = torch.bfloat16
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    checkpointed_every: int = 1
    accumulates_gradients: bool = True

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must lie between 0 and 1, got {self.mlm_probability}")

    @property
    def masked_tokens(self) -> int:
        """Predicted tokens of a row."""
        return masked_tokens(self.mlm_probability, self.max_seq_length)


@dataclass(frozen=True)
class TrainingMemory:
    """
    Bytes of a training step at its peak, by what they hold. `saved_bytes` is no part of the peak: it is what the
    forward pass leaves for backward, before the peak has consumed some of it.
    """

    weights: int
    gradients: int
    optimizer_states: int
    autocast_copies: int
    activations: int
    temporaries: int
    saved_bytes: int

    @property
    def total_bytes(self) -> int:
        """All that lives at the peak."""
        return sum(getattr(self, name) for name in PARTS)


PARTS = tuple(spec.name for spec in fields(TrainingMemory) if spec.name != "saved_bytes")


class StorageLedger(TorchDispatchMode):
    """
    Counts the bytes of the storages that operations inside the context make, from birth to death, and keeps the peak.

    A storage is a temporary until it is marked as something else; a copy of a weight in another dtype is autocast's.
    Works on real tensors as on fake ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kind_of: dict[int, str] = {}  # by the address of the storage
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default
        is_weight_copy = is_cast and self._kind_of.get(args[0].untyped_storage()._cdata) == "weights"
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, "autocast_copies" if is_weight_copy else "temporaries")
        return output

    def _add(self, tensor: torch.Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._kind_of:
            return  # a view, or written in place
        self._kind_of[storage._cdata] = kind
        self.live[kind] += storage.nbytes()
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes()).atexit = False
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _remove(self, address: int, size: int) -> None:
        self.live[self._kind_of.pop(address)] -= size

    def mark(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        """Count the storage of `tensor` as `kind`, unless it is something else than a temporary. Returns `tensor`."""
        self._add(tensor, kind)
        storage = tensor.untyped_storage()
        if self._kind_of[storage._cdata] == "temporaries":
            self._kind_of[storage._cdata] = kind
            self.live["temporaries"] -= storage.nbytes()
            self.live[kind] += storage.nbytes()
        return tensor

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live.copy()


class CountedTraining:
    """A model in training whose memory a [`StorageLedger`] counts; to be built and used inside of the ledger."""

    def __init__(self, ledger: StorageLedger, config: PreTrainedConfig, setup: TrainingSetup, micro_batch: int):
        self.ledger, self.setup, self.micro_batch = ledger, setup, micro_batch
        self.saved_bytes = 0
        self.model = AutoModelForMaskedLM.from_config(config).train()
        if setup.gradient_checkpointing:
            choices = {"every_n_layers": setup.checkpointed_every} if setup.checkpointed_every > 1 else {}
            self.model.activation_checkpointing_enable(**choices)
        for weight in (*self.model.parameters(), *self.model.buffers()):
            ledger.mark(weight, "weights")
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(self._count_gradient)
        if setup.optimizer == "muon":
            self.optimizer: torch.optim.Optimizer = MuonWithAdamW(muon_parameter_groups(self.model, 1e-3, 1e-2, 0.0))
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def _count_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.mark(parameter.grad, "gradients")

    def train_step(self) -> None:
        """One optimiser step, of two micro-batches where gradients accumulate."""
        for _ in range(2 if self.setup.accumulates_gradients else 1):
            self._forward().backward()
        self.optimizer.step()
        for state in self.optimizer.state.values():
            for tensor in state.values():
                self.ledger.mark(tensor, "optimizer_states")
        self.optimizer.zero_grad()

    def _forward(self) -> torch.Tensor:
        """The loss of one micro-batch, with what backward needs marked as activations."""
        dtype = self.setup.autocast_dtype
        autocast = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)
        batch = self._batch()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: self.ledger.mark(tensor, "activations"), lambda tensor: tensor
        )
        with autocast, hooks:
            loss = self.model(**batch)[0]
        self.saved_bytes = self.ledger.live["activations"]
        return loss

    def _batch(self) -> dict[str, torch.Tensor]:
        ids = torch.zeros(self.micro_batch, self.setup.max_seq_length, dtype=torch.long)  # (B, L)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if takes_masked_positions(self.model):
            batch["masked_positions"] = ids[:, : self.setup.masked_tokens].clone()  # (B, K)
        return batch


def estimate_training_memory(config: PreTrainedConfig, setup: TrainingSetup, micro_batch: int) -> TrainingMemory:
    """
    Memory of one optimiser step of a masked language model, any that [`AutoModelForMaskedLM`] knows, at its peak.

    Counted on the second step of a run, when the optimiser has its states. Data-parallel training keeps a second copy
    of the gradients beside this.
    """
    with FakeTensorMode():
        return measure_tensor_memory(config, setup, micro_batch)


def measure_tensor_memory(config: PreTrainedConfig, setup: TrainingSetup, micro_batch: int) -> TrainingMemory:
    """The same count with real tensors: trains for two steps."""
    with StorageLedger() as ledger:
        training = CountedTraining(ledger, config, setup, micro_batch)
        training.train_step()
        ledger.restart_peak()
        training.train_step()
    return TrainingMemory(**{name: ledger.peak[name] for name in PARTS}, saved_bytes=training.saved_bytes)


def usable_bytes(
    memory_bytes: float, reserve_bytes: float = RESERVE_BYTES, reserve_share: float = RESERVE_SHARE
) -> float:
    """
    What a step may take of `memory_bytes`: `reserve_bytes` are left for the framework, and `reserve_share` of the step's
    own bytes for fragmentation.
    """
    return (memory_bytes - reserve_bytes) / (1 + reserve_share)


def largest_micro_batch(
    config: PreTrainedConfig,
    setup: TrainingSetup,
    memory_bytes: float,
    multiple_of: int = 8,
    reserve_bytes: float = RESERVE_BYTES,
    reserve_share: float = RESERVE_SHARE,
) -> int:
    """
    Rows of the largest micro-batch, a multiple of `multiple_of`, whose step fits into the [`usable_bytes`]; 0 if none does.
    """
    usable = usable_bytes(memory_bytes, reserve_bytes, reserve_share)
    one, two = (estimate_training_memory(config, setup, rows) for rows in (multiple_of, 2 * multiple_of))
    if one.total_bytes > usable:
        return 0
    # What the forward pass saves grows evenly with the rows, and is too much alone at the upper end.
    upper = int(usable / (two.saved_bytes - one.saved_bytes)) + 1

    def bytes_at(multiples: int) -> int:
        return estimate_training_memory(config, setup, multiples * multiple_of).total_bytes

    return multiple_of * _last_below(usable, bytes_at, one.total_bytes, upper)


def _last_below(limit: float, bytes_at: Callable[[int], int], bytes_at_one: int, upper: int) -> int:
    """
    The last number from 1 whose `bytes_at` does not pass `limit`, where `upper` passes it: found by interpolation,
    because the bytes are nearly linear.
    """
    low, low_bytes, high, high_bytes = 1, bytes_at_one, upper, bytes_at(upper)
    while high - low > 1:
        guess = low + int((high - low) * (limit - low_bytes) / (high_bytes - low_bytes))
        guess = min(max(guess, low + 1), high - 1)
        guess_bytes = bytes_at(guess)
        if guess_bytes <= limit:
            low, low_bytes = guess, guess_bytes
        else:
            high, high_bytes = guess, guess_bytes
    return low
