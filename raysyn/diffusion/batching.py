"""Batches that fit the device: the largest by a probe, and halves of one that does not fit after all."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
# What a full device is called by a graph's launch, cuBLAS, cuDNN and the CPU, none of which raises OutOfMemoryError.
FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the device's memory is full."""
    named = isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)
    return named or isinstance(error, torch.OutOfMemoryError)


def probe_batch(attempt: Callable[[int], object], *, start: int = 8, limit: int = 1024) -> int:
    """The largest of start, 2·start, … up to `limit` for which `attempt(batch)` does not run out of memory.

    Where `start` itself does not fit it is halved until it does. Raises torch.OutOfMemoryError when not even 1 fits.
    """

    def fits(batch: int) -> bool:
        try:
            attempt(batch)
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free_memory()  # outside the except clause: the traceback holds the tensors that filled the device
        return False

    batch = min(start, limit)
    if fits(batch):
        while 2 * batch <= limit and fits(2 * batch):
            batch *= 2
        return batch
    while batch > 1:
        batch //= 2
        if fits(batch):
            return batch
    raise torch.OutOfMemoryError("a batch of 1 does not fit the device")


def in_halves(work: Callable[[slice], T], count: int) -> list[T]:
    """`work` over slices of range(count) in order: the whole, or halves of what does not fit the device, with a warning.

    Raises what the device says (torch.OutOfMemoryError, or a RuntimeError of its libraries) when not even one fits.
    """

    def run(part: slice) -> list[T]:
        try:
            return [work(part)]
        except RuntimeError as error:
            if part.stop - part.start == 1 or not is_out_of_memory(error):
                raise
        logging.getLogger("raysyn").warning(
            "a batch of %d does not fit the device; drawing it in halves", part.stop - part.start
        )
        free_memory()
        middle = (part.start + part.stop) // 2
        return run(slice(part.start, middle)) + run(slice(middle, part.stop))

    return run(slice(0, count))


def keep_freed_memory() -> bool:
    """Let this process reuse what it frees (up to 32 MB a piece) instead of giving it back to the system; Linux alone.

    Each evaluation frees and asks for the same large tensors, and new pages cost more than what is computed in them:
    at 128 px sampling a batch of 16 took 17 % less time on a CPU. Returns whether it could be done.
    """
    trim_threshold, mmap_threshold = -1, -3  # of <malloc.h>
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, (1 << 31) - 1))


def free_memory() -> None:
    """Hand cached memory back to the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
