"""What this machine can do: matrix-product speed, bf16 or not, compile or not, and the work of one row."""

import contextlib
import copy
import ctypes
import functools
import importlib.util
import inspect
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from .data.collator import masked_tokens

# What torch.compile is taken to bring to an encoder's training step, and what compiling may cost with a cold cache: on
# the safe side of what was seen on 2 CPU cores (1.25 to 1.35 times; 20 to 25 s for 17 linear layers).
COMPILE_SPEEDUP = 1.25
# What it brings besides where attention changes with it (see `eager_attention_is_faster`): 1.2 to 1.31 times was seen.
EAGER_ATTENTION_SPEEDUP = 1.2
COMPILE_SECONDS = 20.0
COMPILE_SECONDS_PER_LINEAR = 1.5
MATMUL_ROWS = 4096
PROCESS_STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def largest_linear_shape(model: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of the model's largest linear layer; (1024, 1024) for a model without one."""
    return max(linear_shapes(model), key=lambda shape: shape[0] * shape[1], default=(1024, 1024))


def describe_hardware(device: torch.device, world_size: int) -> str:
    """The machine of `world_size` processes in one line: `2 x NVIDIA H100`, `1 x 8 CPU threads (x86_64)`."""
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return f"{world_size} x {device.type.upper()} ({platform.machine()})"
    return f"{world_size} x {torch.get_num_threads()} CPU threads ({platform.machine()})"


def linear_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """How many linear layers of each (out_features, in_features) the model has."""
    return Counter(
        (module.out_features, module.in_features) for module in model.modules() if isinstance(module, nn.Linear)
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()  # of the current device


def forget_peak_memory(device: torch.device) -> None:
    """Give back what was measured with, and count [`peak_memory_bytes`] anew where that is possible: GPUs and Linux."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            RESET_PEAK.write_text("5")  # by the kernel's manual: the peak is the present from now on


def peak_memory_bytes(device: torch.device) -> int:
    """
    Most memory since [`forget_peak_memory`]: what the allocator reserved on a GPU, this process's resident set on a CPU
    (without Linux's /proc: since the process began).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with contextlib.suppress(OSError):
        peak = re.search(r"VmHWM:\s+(\d+) kB", PROCESS_STATUS.read_text())
        if peak is not None:
            return 1024 * int(peak[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], seconds: float = 0.5
) -> float:
    """
    Best FLOP/s of a product of (4096, in) with a weight of `shape` (out, in) on `device`, tried for `seconds`, once at
    least.
    """
    inputs = torch.randn(MATMUL_ROWS, shape[1], device=device).to(dtype)
    weight = torch.randn(shape, device=device).to(dtype)
    # Into one place: new memory for each product takes a CPU as long as a third of it.
    outputs = torch.empty(MATMUL_ROWS, shape[0], device=device, dtype=dtype)
    torch.mm(inputs, weight.T, out=outputs)
    synchronize(device)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.mm(inputs, weight.T, out=outputs)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * MATMUL_ROWS * shape[0] * shape[1] / best


def measure_peak_flops(
    model: nn.Module, device: torch.device, dtype: torch.dtype, seconds: float = 0.5, predicted_share: float = 1.0
) -> float:
    """
    FLOP/s at which `device` would do nothing but the products of the model's linear layers, each of its shapes as fast as
    [`measure_matmul_flops`] in a part of the `seconds`; logits are computed for `predicted_share` of the tokens.
    """
    work: dict[tuple[int, int], float] = {
        shape: count * shape[0] * shape[1] for shape, count in linear_shapes(model).items()
    }
    decoder = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(decoder, nn.Linear):
        shape = decoder.out_features, decoder.in_features
        work[shape] -= (1 - predicted_share) * shape[0] * shape[1]
    work = work or {largest_linear_shape(model): 1.0}
    speeds = {shape: measure_matmul_flops(device, dtype, shape, seconds / len(work)) for shape in work}
    return sum(work.values()) / sum(amount / speeds[shape] for shape, amount in work.items())


def bf16_is_faster(device: torch.device, shape: tuple[int, int], seconds: float = 2.0) -> bool:
    """
    Whether bf16 autocast beats fp32 on this device: forward and backward of one layer, in turn, best of each.

    A GPU that emulates bf16 only is not measured.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    layer = nn.Linear(shape[1], shape[0], bias=False, device=device)
    inputs = torch.randn(MATMUL_ROWS, shape[1], device=device, requires_grad=True)
    return _bf16_wins(device, lambda: layer(inputs).sum(), seconds)


def bf16_trains_faster(model: nn.Module, batch: Mapping[str, Any], rounds: int = 5) -> bool:
    """
    Whether bf16 autocast beats fp32 on forward and backward of `batch`, with labels: in turn, best of each.

    For small models and short batches, whose time is not in the matrix products that [`bf16_is_faster`] measures.
    """
    probe = copy.deepcopy(model).train()

    def loss() -> torch.Tensor:
        probe.zero_grad()
        return probe(**batch)[0]

    return _bf16_wins(next(probe.parameters()).device, loss, rounds=rounds)


def _bf16_wins(device: torch.device, loss: Callable[[], torch.Tensor], seconds: float = 0.0, rounds: int = 1) -> bool:
    """Forward and backward of `loss` with and without bf16, in turn, for `seconds` and at least `rounds` times."""
    best = {True: float("inf"), False: float("inf")}
    number, deadline = 0, time.perf_counter() + seconds
    while number <= rounds or time.perf_counter() < deadline:  # the first round warms up
        for enabled in (False, True):
            started = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                value = loss()
            value.backward()
            synchronize(device)
            if number:
                best[enabled] = min(best[enabled], time.perf_counter() - started)
        number += 1
    return best[True] < best[False]


NO_COMPILER = (
    "torch.compile needs Python's headers, on a CPU a C++ compiler that knows C++20 and a folder for temporary files that "
    "may hold programs, on a GPU a C compiler and Triton: install what is missing, or do not compile"
)


def can_compile(device: torch.device) -> bool:
    """
    Whether torch.compile's default backend has what it needs: Python's headers, and on a CPU a C++ compiler whose
    libraries can be loaded, on a GPU Triton and the C compiler that it builds its launchers with.
    """
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return False
    if device.type == "cpu":
        default = "clang++" if sys.platform == "darwin" else "g++"  # as torch chooses
        return builds_libraries(os.environ.get("CXX", default), os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))


@functools.cache
def builds_libraries(compiler: str, folder: str | None) -> bool:
    """
    Whether `compiler` builds what torch's kernels are, a C++20 library, and this process can load it from `folder`
    (default: that of temporary files).
    """
    try:
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            source, library = Path(place) / "empty.cpp", Path(place) / "empty.so"
            source.touch()
            command = [compiler, "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
            ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def compile_pays_off(
    model: nn.Module, device: torch.device, seconds_left: float | None, changes_attention: bool = False
) -> bool:
    """
    Whether a compiled model gets further in `seconds_left` of the clock, compiling included; not known: no.
    `changes_attention`: the faster one comes with it (see [`eager_attention_is_faster`]).
    """
    if seconds_left is None or not can_compile(device):
        return False
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    compile_seconds = COMPILE_SECONDS + COMPILE_SECONDS_PER_LINEAR * linears
    speedup = COMPILE_SPEEDUP * (EAGER_ATTENTION_SPEEDUP if changes_attention else 1.0)
    return (seconds_left - compile_seconds) * speedup > seconds_left


def eager_attention_is_faster(model: Any, device: torch.device, bf16: bool, compiled: bool) -> bool:
    """
    Whether `model` trains faster with plain matrix products than with torch's fused attention.

    On a CPU the fused kernel takes a quarter of a training step for 3 % of its FLOPs in bf16 (torch 2.13, rows of 128;
    benchmarks/LOG.md). Compiled without it a step is 1.2 to 1.4 times as fast. With dropout of the weights, or in fp32,
    it is not.
    """
    names = ("attention_probs_dropout_prob", "attention_dropout")
    drops_weights = any(getattr(model.config, name, 0.0) for name in names)
    return device.type == "cpu" and bf16 and compiled and not drops_weights


def takes_masked_positions(model: nn.Module) -> bool:
    """Whether the model computes logits where it is told to only, at `masked_positions` (B, K)."""
    return "masked_positions" in inspect.signature(model.forward).parameters


def random_batch(
    model: nn.Module, vocab_size: int, batch: tuple[int, int], mlm_probability: float, device: torch.device
) -> dict[str, torch.Tensor]:
    """Rows as the collator makes them, of any tokens: `input_ids` and `labels` (B, L), `masked_positions` (B, K)."""
    rows, length = batch
    input_ids = torch.randint(0, vocab_size, (rows, length), device=device)
    count = masked_tokens(mlm_probability, length)
    positions = torch.arange(count, device=device).expand(rows, count) * (length // count)  # (B, K)
    labels = torch.full_like(input_ids, -100).scatter(1, positions, input_ids.gather(1, positions))
    inputs = {"input_ids": input_ids, "labels": labels}
    if takes_masked_positions(model):
        inputs["masked_positions"] = positions
    return inputs


def training_flops(
    model: nn.Module,
    batch: Mapping[str, Any],
    compute_loss: Callable[[nn.Module, Any], Any] = lambda model, batch: model(**batch)[0],
) -> int:
    """FLOPs of the matrix products in one forward and backward pass over `batch`, counted on a copy of the model."""
    probe = copy.deepcopy(model).train()
    # The fused CPU attention, flash and flex attention have no formula in the counter; the plain one does the same
    # products.
    is_fused = re.compile("flash|flex").search
    if isinstance(probe, PreTrainedModel) and is_fused(str(probe.config._attn_implementation)):
        probe.set_attn_implementation("sdpa")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute_loss(probe, batch).backward()
    return counter.get_total_flops()
