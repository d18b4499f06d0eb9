"""The request plan: arithmetic, the same for everybody, and cheap at any size."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysyn.config import SynthesizeConfig
from raysyn.data.requests import RequestPlan, stable_seed, synthetic_frame_id
from raysyn.types import UserError


def plan(train: int = 7, validation: int = 3, **options) -> RequestPlan:
    config = SynthesizeConfig(**{"num_warps": 2, "num_noise_seeds": 3, "batch_size": 4, "shard_size": 8, **options})
    masks = {"train": [f"t{i}" for i in range(train)], "validation": [f"v{i}" for i in range(validation)]}
    return RequestPlan.of(config, masks)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_every_mask_warp_and_seed_comes_exactly_once(masks: int, warps: int, seeds: int, batches: int) -> None:
    made = plan(masks, masks, num_warps=warps, num_noise_seeds=seeds, shard_size=4 * batches)
    shards = list(made.shards())
    drawn = [r for s in shards if s.split == "train" for batch in made.batches(s) for r in batch]
    assert len(drawn) == made.num_requests("train") == masks * warps * seeds
    assert len({(r.mask_frame_id, r.warp_seed, r.noise_seed) for r in drawn}) == len(drawn)
    assert all(sum(r.mask_frame_id == f"t{i}" for r in drawn) == warps * seeds for i in range(masks))
    assert sum(s.stop - s.start for s in shards) == made.num_requests()
    assert len({s.name for s in shards} | {s.record for s in shards}) == 2 * len(shards)


def test_a_batch_of_open_size_is_what_fits_or_the_whole_shard() -> None:
    made = plan(batch_size=0)
    shard = next(made.shards())
    assert [len(b) for b in made.batches(shard)] == [8]
    assert [len(b) for b in made.batches(shard, 3)] == [3, 3, 2]
    assert [len(b) for b in plan().batches(shard, 3)] == [4, 4]


def test_noise_seeds_of_one_warp_share_its_mask() -> None:
    made = plan()
    by_warp: dict = {}
    for i in range(made.num_requests("train")):
        request = made.request("train", i)
        by_warp.setdefault((request.mask_frame_id, request.warp_seed), []).append(request.noise_seed)
    assert {len(v) for v in by_warp.values()} == {3}


def test_the_plan_depends_on_its_seed_and_nothing_else() -> None:
    assert plan().request("train", 5) == plan().request("train", 5)
    assert plan().request("train", 5) == plan(shard_size=16).request("train", 5)
    assert plan().request("train", 5).noise_seed != plan(seed=1).request("train", 5).noise_seed


def test_seeds_fit_a_signed_column_and_retries_differ() -> None:
    seeds = [stable_seed("x", i) for i in range(1000)]
    assert all(0 <= s < 2**63 for s in seeds)
    assert len(set(seeds)) == 1000
    request = plan().request("train", 0)
    assert request.retry(0) == request.noise_seed
    assert len({request.retry(a) for a in range(5)}) == 5


def test_a_frame_id_names_all_that_determines_the_image() -> None:
    settings = {"checkpoint_sha256": "a", "sampler": {"solver": "heun"}}
    label_map = np.arange(16, dtype=np.uint8).reshape(4, 4)
    one = synthetic_frame_id(settings, "m", 1, 2, label_map, "2CH")
    assert one == synthetic_frame_id(dict(reversed(settings.items())), "m", 1, 2, label_map.copy(), "2CH")
    assert one != synthetic_frame_id(settings, "m", 1, 2, label_map, "4CH")
    others = [
        (settings, "n", 1, 2),
        (settings, "m", 2, 2),
        (settings, "m", 1, 3),
        ({**settings, "amp": "bf16"}, "m", 1, 2),
    ]
    corrected = [synthetic_frame_id(settings, "m", 1, 2, m, "2CH") for m in (label_map + 1, label_map.reshape(2, 8))]
    assert len({one, *corrected, *(synthetic_frame_id(*other, label_map, "2CH") for other in others)}) == 7


def test_test_patients_and_no_masks_are_refused() -> None:
    with pytest.raises(UserError, match="may not be used"):
        SynthesizeConfig(mask_splits=["test"])
    with pytest.raises(UserError, match="mask_splits: is empty"):
        SynthesizeConfig(mask_splits=[])
    with pytest.raises(UserError, match="no masks"):
        RequestPlan.of(SynthesizeConfig(), {"train": [], "validation": []})


def test_a_million_requests_are_planned_in_seconds_and_little_memory() -> None:
    masks = {"train": [f"patient{i:04d}_4CH_ED" for i in range(2000)]}
    config = SynthesizeConfig(mask_splits=["train"], num_warps=500, batch_size=16, shard_size=256)
    tracemalloc.start()
    started = time.process_time()
    made = RequestPlan.of(config, masks)
    num_shards = sum(1 for _ in made.shards())
    made.request("train", 999_999)
    assert made.num_requests() == 1_000_000
    assert num_shards == -(-1_000_000 // 256)
    assert time.process_time() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
