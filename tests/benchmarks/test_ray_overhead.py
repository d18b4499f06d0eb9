"""Seconds a step and an image from the times of files whose times are known."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.ray_overhead import SHARD_SIZE, seconds_per_image, seconds_per_step


def touch(path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (1e9 + seconds, 1e9 + seconds))


def test_a_step_is_timed_after_the_first_two_checkpoints(tmp_path: Path) -> None:
    for i, seconds in enumerate([0, 90, 100, 120, 140]):  # a slow start, then 20 s a checkpoint
        mark = tmp_path / "checkpoints" / f"step-{i:09d}" / "checkpoint.json"
        touch(mark, 0)
        mark.write_text(json.dumps({"step": 10 * i, "progress": {"cpu_seconds": 7.0 * i}}))
        touch(mark, seconds)
    assert seconds_per_step(tmp_path) == pytest.approx((2.0, 0.7))


@pytest.mark.parametrize("actors", [1, 2])
def test_an_image_is_timed_while_every_actor_has_work(tmp_path: Path, actors: int) -> None:
    for actor in range(actors):  # each writes a shard in 8 s, the second begins 3 s later
        for i in range(6):
            touch(tmp_path / "train" / f"shard-{actor}-{i}.parquet", 3 * actor + 8 * i)
    assert seconds_per_image(tmp_path, actors) * SHARD_SIZE == pytest.approx(8 / actors, rel=0.1)
