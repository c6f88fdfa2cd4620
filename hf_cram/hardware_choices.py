"""What the arguments of a run leave open and its hardware decides: bf16, torch.compile, attention."""

import logging

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from .checkpointing import RunState
from .data.errors import first_line
from .hardware import (
    NO_COMPILER,
    bf16_is_faster,
    can_compile,
    compile_pays_off,
    eager_attention_is_faster,
    largest_linear_shape,
    measure_peak_flops,
)
from .training_args import CramTrainingArguments, OpenPrecisionArguments

logger = logging.getLogger(__name__)

PEAK_SECONDS = 0.5
COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_device(args: OpenPrecisionArguments) -> None:
    """Raises `ValueError` for what the arguments tell and their device cannot do."""
    if args.mixed_precision not in COMPUTE_DTYPES:
        raise ValueError(f"mixed_precision {args.mixed_precision} (of accelerate launch) is not known here: use bf16")
    if (args.fp16 or args.mixed_precision == "fp16") and args.device.type == "cpu":
        raise ValueError("fp16 needs a GPU, and the device is a CPU: use bf16, or neither")
    needs_compiler = args.torch_compile_backend == "inductor" and args.device.type in ("cpu", "cuda")
    if args.torch_compile and needs_compiler and not can_compile(args.device):
        raise ValueError(f"torch_compile: {NO_COMPILER}")


class HardwareChoices:
    """
    Decides the fields of `args` that are open, by measuring, and sets the model's attention.

    `matmul_peak` is the measured rate of the model's matrix products in the precision decided on, in FLOP/s, where logits
    are computed for `predicted_share` of the tokens. Raises `ValueError` as [`check_device`] does, and for an attention
    that the model or the machine does not have.
    """

    def __init__(self, model: PreTrainedModel, args: CramTrainingArguments, predicted_share: float = 1.0):
        check_device(args)
        self.model, self.args, self.predicted_share = model, args, predicted_share
        self._is_bf16_open = args.bf16 is None and not args.fp16 and args.mixed_precision == "no"
        self._is_compile_open = args.torch_compile is None
        self._own_attention = model.config._attn_implementation
        self._choose_precision()
        self.matmul_peak = self._measure_matmul_peak()
        if self._is_compile_open:
            changes_attention = self._prefers_eager_attention(compiled=True)
            self._set_compile(compile_pays_off(model, args.device, args.time_budget_seconds, changes_attention))
            missing = "" if can_compile(args.device) else f" ({NO_COMPILER})"
            logger.info("torch.compile is %s", "used" if args.torch_compile else f"not used{missing}")
        self._choose_attention()

    def keep_first(self, first: RunState) -> None:
        """What the first session of a run has measured holds for those that resume it, whatever they have measured."""
        args = self.args
        before = args.bf16, args.torch_compile
        if self._is_bf16_open and first.bf16 is not None and first.bf16 != args.bf16:
            args.set_precision(first.bf16)
        # Another machine may have no compiler.
        may_compile = not first.torch_compile or can_compile(args.device)
        if self._is_compile_open and first.torch_compile is not None and may_compile:
            self._set_compile(first.torch_compile)
        first.bf16, first.torch_compile = args.bf16, args.torch_compile
        if before == (args.bf16, args.torch_compile):
            return
        self.matmul_peak = self._measure_matmul_peak()
        self._choose_attention()
        logger.info("As the run began: bf16 %s, torch.compile %s", args.bf16, args.torch_compile)

    def _choose_precision(self) -> None:
        """Decide `args.bf16` where it is open; the launcher's `--mixed_precision` counts as told."""
        args = self.args
        args.fp16 = args.fp16 or args.mixed_precision == "fp16"
        if self._is_bf16_open:
            shape = largest_linear_shape(self.model)
            decision = [bf16_is_faster(args.device, shape) if args.process_index == 0 else None]
            args.bf16 = broadcast_object_list(decision)[0]
            logger.info("bf16 autocast is %s than fp32 here", "faster" if args.bf16 else "not faster")
        args.set_precision(bool(args.bf16) or args.mixed_precision == "bf16")

    def _set_compile(self, compiled: bool) -> None:
        self.args.torch_compile = compiled
        self.args.torch_compile_backend = "inductor" if compiled else "no"

    def _prefers_eager_attention(self, compiled: bool) -> bool:
        """Whether attention is open, and a compiled (or not) run is faster with plain products."""
        is_open = self.args.attn_implementation is None and self._own_attention == "sdpa"
        return is_open and eager_attention_is_faster(self.model, self.args.device, bool(self.args.bf16), compiled)

    def _choose_attention(self) -> None:
        args, model = self.args, self.model
        name = args.attn_implementation or self._own_attention
        if self._prefers_eager_attention(bool(args.torch_compile)):
            name = "eager"
        if name == model.config._attn_implementation:
            return
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            raise ValueError(f"attn_implementation: {first_line(error)}") from error

    def _measure_matmul_peak(self) -> float:
        dtype = COMPUTE_DTYPES[self.args.mixed_precision]
        return measure_peak_flops(self.model, self.args.device, dtype, PEAK_SECONDS, self.predicted_share)
