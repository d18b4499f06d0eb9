"""The scheduler's benchmark on a cluster of two logical nodes, the stage's own code."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scheduler import Pace, make_masks, scheduling


def test_efficiency_is_the_ideal_time_over_the_time_taken() -> None:
    pace = Pace(shards=8, sleep=3.0, seconds=15.0, spent=26.0, drawn={("a", "1"): 5, ("b", "2"): 3}, actors_mib=1.0)
    assert pace.efficiency == pytest.approx(0.8)


@pytest.mark.cluster
def test_each_of_two_nodes_draws_its_share_and_each_shard_is_drawn_once(tmp_path: Path) -> None:
    """That frames and actors are where they should be, `pace` itself looks at."""
    make_masks(str(tmp_path))
    rows = {name: value for name, value, _, _ in scheduling(str(tmp_path), nodes=2, rounds=3, sleep=0.5)}
    assert rows["2_nodes_fewest"] + rows["2_nodes_most"] == 6
    assert rows["2_nodes_fewest"] >= 2, "both nodes were given work as they finished it"
    assert 0 < rows["2_nodes_efficiency"] <= 100
    assert 50 < rows["2_nodes_memory_actors"] < 1000
