"""Batches against a device that holds only so many images."""

import logging
import platform
import subprocess
import sys

import pytest
import torch

from raysyn.diffusion.batching import in_halves, probe_batch


def device_of(room: int):
    """A piece of work that runs out of memory above `room` images, and the batches that it was given."""
    given = []

    def work(batch: int) -> None:
        given.append(batch)
        if batch > room:
            raise torch.OutOfMemoryError("full")

    return work, given


@pytest.mark.parametrize(("room", "limit", "found"), [(1000, 64, 64), (40, 64, 32), (3, 64, 2), (1, 64, 1), (9, 4, 4)])
def test_the_probe_finds_the_largest_that_fits(room: int, limit: int, found: int) -> None:
    work, given = device_of(room)
    assert probe_batch(work, start=8, limit=limit) == found
    assert max(given) <= limit
    assert len(given) <= 8


def test_a_device_too_small_for_one_image_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="batch of 1"):
        probe_batch(device_of(0)[0])
    with pytest.raises(torch.OutOfMemoryError):
        in_halves(lambda part: device_of(0)[0](1), 4)


def test_what_does_not_fit_is_done_in_halves_in_order(caplog) -> None:
    work, given = device_of(3)

    def part(rows: slice) -> list[int]:
        work(rows.stop - rows.start)
        return list(range(rows.start, rows.stop))

    with caplog.at_level(logging.WARNING, "raysyn"):
        done = in_halves(part, 10)
    assert [i for rows in done for i in rows] == list(range(10))
    assert given[0] == 10
    assert "does not fit" in caplog.text


@pytest.mark.parametrize(
    "says",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 70368744177664 bytes",
    ],
)
def test_a_full_device_is_known_by_its_libraries_words(says: str) -> None:
    def work(batch: int) -> int:
        if batch > 2:
            raise RuntimeError(says)
        return batch

    assert probe_batch(work, start=4, limit=4) == 2
    assert in_halves(lambda part: work(part.stop - part.start), 4) == [2, 2]


def test_other_errors_are_not_taken_for_a_full_device() -> None:
    with pytest.raises(ValueError, match="wrong"):
        in_halves(lambda part: (_ for _ in ()).throw(ValueError("wrong")), 4)
    with pytest.raises(RuntimeError, match="mat1"):
        probe_batch(lambda batch: (_ for _ in ()).throw(RuntimeError("mat1 and mat2")))


def test_on_linux_freed_memory_is_kept() -> None:
    code = "from raysyn.diffusion.batching import keep_freed_memory; print(keep_freed_memory())"  # for a process's life
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
