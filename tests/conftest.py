"""Small things that every test may share: a configuration, a tokenizer trained in-process, rows."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

# The libraries are imported where they are used: the process that hands tests out to others needs none of them.

# No test reaches a network or the user's own cache, whatever the machine's settings: read at import by the libraries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_cram-tests-")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
VOCAB_SIZE = 105

# By the process that made it alone: forked ones end too.
atexit.register(lambda home, pid: os.getpid() == pid and shutil.rmtree(home, True), os.environ["HF_HOME"], os.getpid())


@pytest.fixture(scope="session", autouse=True)
def share_of_the_machine():
    """Several processes of tests share the cores; a hundred trainers measure matrix products, each once."""
    import torch

    from hf_cram import hardware_choices
    from hf_cram.data.workers import available_workers

    # Each training begins by collecting garbage, and there is none in what was imported and collected up to here.
    gc.collect()
    gc.freeze()
    hardware_choices.PEAK_SECONDS = 0.0
    torch.set_num_threads(max(1, available_workers(None) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True)
def progress_bars():
    """A program that a test has run in this process may have turned them off."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_progress_bar()


@contextmanager
def kept_estimates(*modules):
    """Searches ask `estimate_training_memory` for the same again and again: within the block `modules` ask once."""
    kept, estimate = {}, modules[0].estimate_training_memory

    def estimate_once(config, setup, rows):
        key = config.to_json_string(use_diff=False), config._attn_implementation, setup, rows
        if key not in kept:
            kept[key] = estimate(config, setup, rows)
        return kept[key]

    with pytest.MonkeyPatch.context() as patched:
        for module in modules:
            patched.setattr(module, "estimate_training_memory", estimate_once)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="module")
def one_thread():
    """Models this small are slower on two threads, in this process and in those that it starts."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tiny_config():
    """A crammed BERT that is built in a moment."""
    from hf_cram import CrammedBertConfig

    return CrammedBertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        classifier_hidden_size=24,
    )


@pytest.fixture
def tiny_config():
    return make_tiny_config()


@pytest.fixture(scope="session")
def tokenizer():
    """A word is a token: `w0`, `w1`, ..., behind the special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    words = [*special.values(), *(f"w{index}" for index in range(VOCAB_SIZE - len(special)))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


class Rows:
    """Packed rows in memory: the shape of a prepared corpus."""

    def __init__(self, count: int, length: int = 16, seed: int = 0):
        rng = np.random.default_rng(seed)
        # Each row walks in steps of one through the words, so that there is something to learn.
        starts = rng.integers(0, VOCAB_SIZE - 5, (count, 1))
        self.rows = (starts + np.arange(length)) % (VOCAB_SIZE - 5) + 5

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.rows[index]}


@pytest.fixture(scope="session")
def rows() -> Rows:
    return Rows(64)


@pytest.fixture
def python_environment() -> dict[str, str]:
    """Environment of a fresh Python process that imports the package from this checkout."""
    import torch

    path = os.pathsep.join([str(REPOSITORY), *sys.path[1:]])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "TOKENIZERS_PARALLELISM": "false",
    }
