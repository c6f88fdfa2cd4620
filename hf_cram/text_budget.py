"""How much text a run can consume: the measured speed of its model times its budget."""

import hashlib
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from transformers import AutoModelForMaskedLM, PreTrainedConfig

from .data.collator import parse_phases
from .data.errors import DataError, system_cause
from .data.pipeline import DataArguments, open_cache, published_corpus
from .data.workers import available_workers
from .files import write_json_atomically
from .hardware import bf16_is_faster, largest_linear_shape, random_batch, synchronize
from .kept_state import keep_random_state
from .out_of_memory import memory_errors
from .script_args import MaskingArguments, TextBudgetArguments, planned_config
from .training_args import CramTrainingArguments
from .version import __version__

logger = logging.getLogger(__name__)

# What is measured are plain steps, and compiled ones are faster. A text that ends early would be repeated, while one that
# is too long costs some preprocessing only.
RESERVE = 2.0
WARM_UP_STEPS = 2
TIMED_STEPS = 5
LONGEST_SECONDS = 10.0


def is_limit_wanted(data_args: DataArguments, text_args: TextBudgetArguments) -> bool:
    """Whether the run's budget is to limit the text: where that is asked for, or not said and the text streams."""
    if data_args.max_train_tokens is not None or text_args.text_for_budget is not None:
        return data_args.max_train_tokens is None and bool(text_args.text_for_budget)
    return any(source.streaming and not source.train_files for source in data_args.named_sources().values())


def limit_text_to_budget(
    data_args: DataArguments,
    model_args: Any,
    masking_args: MaskingArguments,
    training_args: CramTrainingArguments,
    text_args: TextBudgetArguments,
    num_processes: int | None = None,
) -> float | None:
    """
    Set `data_args.max_train_tokens` to what the run can consume, where that is wanted and not set, in `num_processes` like
    this one (default: as many as there are). Returns the tokens that it is expected to consume, without the reserve; `None`
    where nothing was set.

    The speed is measured once for each model, micro-batch and machine, and kept with the prepared text: the same run
    finds the same rows again. Every process gets the number of the first one.
    """
    if not is_limit_wanted(data_args, text_args):
        return None
    # Rank 0's answer counts: the Hub may refuse one rank, and the others would wait for it.
    is_published = [training_args.process_index == 0 and published_corpus(data_args) is not None]
    if broadcast_object_list(is_published)[0]:  # its rows are made
        return None
    row_tokens, processes = data_args.max_seq_length, num_processes or training_args.world_size
    limits, consumed, why = [], [], f"{training_args.max_steps} steps"
    if training_args.max_steps > 0:
        batch_rows = training_args.train_batch_rows or training_args.per_device_train_batch_size * processes
        limits.append(training_args.max_steps * batch_rows * row_tokens)
        consumed.append(float(limits[-1]))
    if training_args.time_budget_seconds is not None:
        speed = [0.0]
        if training_args.process_index == 0:
            speed = [_tokens_per_second(data_args, model_args, masking_args, training_args, processes)]
        tokens_per_second = processes * broadcast_object_list(speed)[0]
        limits.append(round_up(tokens_per_second * training_args.time_budget_seconds * RESERVE))
        consumed.append(limits[-1] / RESERVE)
        why = f"about {consumed[-1]:,.0f} tokens at {tokens_per_second:,.0f} tokens/s"
    data_args.max_train_tokens = max(row_tokens, min(limits))
    logger.info(
        "The budget can consume %s: text is read for %s (the same elsewhere: --max_train_tokens %d)",
        why, f"{data_args.max_train_tokens:,}", data_args.max_train_tokens,
    )  # fmt: skip
    return min(consumed)


def round_up(number: float) -> int:
    """The next whole number with two significant digits."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def _tokens_per_second(
    data_args: DataArguments,
    model_args: Any,
    masking_args: MaskingArguments,
    training_args: CramTrainingArguments,
    processes: int,
) -> float:
    """The speed of one process: remembered, or measured now."""
    config = planned_config(model_args, data_args)
    rate = parse_phases(masking_args.mlm_probability)[0][1]
    batch = (training_args.per_device_train_batch_size, data_args.max_seq_length)
    machine = [_device_name(training_args.device, processes), available_workers(None), processes]
    versions = [torch.__version__, transformers.__version__, __version__]
    memory = [training_args.activation_checkpointing, training_args.activation_checkpointing_kwargs]
    setting = [config.to_diff_dict(), batch, rate, _precision(training_args), memory, machine, versions]
    key = hashlib.blake2b(json.dumps(setting, default=str, sort_keys=True).encode(), digest_size=12).hexdigest()
    path = open_cache(data_args) / "speeds" / f"{key}.json"
    speed = None if data_args.overwrite_cache else _read_speed(path)
    if speed is None:
        try:
            path.parent.mkdir(exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                # Runs that begin together are to read the same text.
                speed = None if data_args.overwrite_cache else _read_speed(path)
                if speed is None:
                    with memory_errors("per_device_train_batch_size", batch[0]):
                        speed = measure_tokens_per_second(config, training_args, batch, rate)
                    write_json_atomically(path, {"tokens_per_second": speed})
        except OSError as error:
            raise DataError(
                f"the cache {path.parent} cannot be written ({system_cause(error)}): set cache_dir, or "
                "max_train_tokens, which needs no measuring"
            ) from error
    return speed


def _read_speed(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["tokens_per_second"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _precision(training_args: CramTrainingArguments) -> tuple[bool, bool | None]:
    """Whether fp16 and bf16 were asked for, by the arguments or the launcher; `None` leaves bf16 to a measurement."""
    asked_for = training_args.mixed_precision
    return training_args.fp16 or asked_for == "fp16", True if asked_for == "bf16" else training_args.bf16


def _device_name(device: torch.device, processes: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    # One a core or one for each of its two hardware threads: programs and launchers differ in this.
    has_all = 2 * threads * processes >= available_workers(None)
    return f"{device.type} with {'all' if has_all else threads} threads"


def measure_tokens_per_second(
    config: PreTrainedConfig, training_args: CramTrainingArguments, batch: tuple[int, int], mlm_probability: float
) -> float:
    """
    Tokens a second of one process: the fastest of some forward and backward passes of a fresh model over a micro-batch
    of `batch` = (rows, tokens a row), not compiled, without the optimiser. Random states are left as they were.
    """
    device = training_args.device
    with keep_random_state():
        model = AutoModelForMaskedLM.from_config(config).to(device).train()
        if training_args.activation_checkpointing:  # as in Trainer.train
            kwargs: dict[str, Any] = dict(training_args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]
            choices = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs or None, **choices)
        inputs = random_batch(model, config.vocab_size, batch, mlm_probability, device)
        fp16, bf16 = _precision(training_args)
        if bf16 is None and not fp16:
            bf16 = bf16_is_faster(device, largest_linear_shape(model))
        dtype = torch.float16 if fp16 else torch.bfloat16
        best, started = math.inf, time.perf_counter()
        for number in range(WARM_UP_STEPS + TIMED_STEPS):
            begin = time.perf_counter()
            with torch.autocast(device.type, dtype=dtype, enabled=bool(fp16 or bf16)):
                loss = model(**inputs).loss
            loss.backward()
            model.zero_grad()
            synchronize(device)
            if number >= WARM_UP_STEPS or time.perf_counter() - started > LONGEST_SECONDS:
                best = min(best, time.perf_counter() - begin)
            if time.perf_counter() - started > LONGEST_SECONDS:
                break
    del model, inputs, loss
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return batch[0] * batch[1] / best
