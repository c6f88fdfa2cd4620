"""What a measurement, or an evaluation, leaves as it was."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def keep_buffers(model: nn.Module) -> Iterator[None]:
    """Put the buffers of `model` back afterwards: running statistics follow whatever goes through it in training."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Leave Python's, numpy's and torch's random states as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Of the GPUs this process draws on one.
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
