"""Memory that ran out: how to tell it from other errors, and what to say of it."""

import contextlib
from collections.abc import Iterator

import torch

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
# What torch says of it in a plain RuntimeError: the allocator of CPUs, cuBLAS and the driver of GPUs.
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: one of [`OUT_OF_MEMORY`], or a RuntimeError of torch's that says so."""
    messages = OUT_OF_MEMORY_MESSAGES if isinstance(error, RuntimeError) else ()
    return isinstance(error, OUT_OF_MEMORY) or any(message in str(error) for message in messages)


class MicroBatchMemoryError(MemoryError):
    """Memory ran out over a micro-batch; the message names the argument to lower."""


@contextlib.contextmanager
def memory_errors(argument: str, rows: int) -> Iterator[None]:
    """Turn running out of memory with `rows` rows a micro-batch, set by `argument`, into a [`MicroBatchMemoryError`]."""
    is_training = argument == "per_device_train_batch_size"
    way_out = " (python -m hf_cram.memory RECIPE calculates what fits)" if is_training else ""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MicroBatchMemoryError) or not is_out_of_memory(error):
            raise
        raise MicroBatchMemoryError(f"memory ran out with {argument} {rows}: lower it{way_out}") from error
