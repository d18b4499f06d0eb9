import os
import sys
import time

import pytest
from ray import cloudpickle

from raysyn.cluster.graph import Node, run_graph
from raysyn.cluster.session import ray_session
from raysyn.config import RayConfig

pytestmark = pytest.mark.cluster


def constant() -> int:
    return 20


def double(x: int) -> int:
    return 2 * x


def add(x: int, y: int) -> int:
    return x + y


def fail(x: int) -> int:
    raise ValueError(f"bad {x}")


class Meet:
    """Finishes only if the other one is running at the same time."""

    def __init__(self, folder, me: str, other: str) -> None:
        self.mine, self.other = str(folder / me), str(folder / other)

    def __call__(self) -> bool:
        open(self.mine, "w").close()
        deadline = time.time() + 60
        while not os.path.exists(self.other) and time.time() < deadline:
            time.sleep(0.05)
        return os.path.exists(self.other)


def die_once(path: str) -> int:
    if not os.path.exists(path):
        with open(path, "w") as file:
            file.write("died")
        os._exit(1)
    return 7


class DieOnce:
    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> int:
        return die_once(self.path)


@pytest.fixture(scope="module", autouse=True)
def session():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with ray_session(RayConfig(num_cpus=2, object_store_mb=100)):
        yield


def test_results_flow_along_the_edges() -> None:
    nodes = [Node("a", constant), Node("b", double, ("a",)), Node("c", add, ("a", "b"))]
    outcome = run_graph(nodes, max_parallel=2)
    assert outcome.results == {"a": 20, "b": 40, "c": 60}
    assert not outcome.failures


def test_a_failure_stops_only_its_heirs() -> None:
    nodes = [Node("a", constant), Node("bad", fail, ("a",)), Node("heir", double, ("bad",)), Node("b", double, ("a",))]
    outcome = run_graph(nodes, max_parallel=1)
    assert outcome.results == {"a": 20, "b": 40}
    assert outcome.failures["bad"].endswith("bad 20")
    assert set(outcome.failures) == {"bad", "heir"}


def test_independent_nodes_run_side_by_side(tmp_path) -> None:
    nodes = [Node("x", Meet(tmp_path, "x", "y")), Node("y", Meet(tmp_path, "y", "x"))]
    assert run_graph(nodes, max_parallel=2).results == {"x": True, "y": True}


def test_a_node_whose_process_dies_is_run_again(tmp_path) -> None:
    outcome = run_graph([Node("phoenix", DieOnce(str(tmp_path / "died")))], max_parallel=1)
    assert outcome.results == {"phoenix": 7}
