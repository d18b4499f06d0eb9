"""A study is a graph of stages: each node is one Ray task, and a node's inputs are the results of other nodes.

Ray starts a node when its inputs are there and retries one whose process dies; a stage is resumable, a retry goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raysyn.cluster.board import reporter, watch


@dataclass(frozen=True)
class Node:
    """`run(*inputs)` with the results of `needs`. `num_cpus`: what it computes with itself (0: it delegates)."""

    key: str
    run: Callable[..., Any]
    needs: tuple[str, ...] = ()
    num_cpus: float = 0.0
    num_gpus: float = 0.0


@dataclass
class GraphResult:
    """Results by node key, and for nodes that failed one line each (heirs of a failed node as well)."""

    results: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)


def _run_node(key: str, run: Callable[..., Any], *inputs: Any) -> Any:
    report = reporter(key)
    report({"note": "running", "done": 0})
    result = run(*inputs)
    report({"done": 1, "total": 1})
    return result


def run_graph(nodes: list[Node], max_parallel: int) -> GraphResult:
    """Run `nodes` (topologically ordered), at most `max_parallel` at a time. A failure stops only its heirs."""
    import ray

    task = ray.remote(max_retries=2)(_run_node)
    outcome = GraphResult()
    refs: dict[str, Any] = {}
    key_of: dict[Any, str] = {}

    def collect(block: bool) -> None:
        pending = [r for k, r in refs.items() if k not in outcome.results and k not in outcome.failures]
        ready, _ = ray.wait(pending, num_returns=1, timeout=None if block else 0)
        for ref in ready:
            key = key_of[ref]
            try:
                outcome.results[key] = ray.get(ref)
            except ray.exceptions.RayError as error:
                _note_failure(outcome, key, error)

    def header() -> str:
        return f"{len(outcome.results)}/{len(nodes)} stages done"

    with watch(header):
        for node in nodes:
            broken = [n for n in node.needs if n in outcome.failures]
            if broken:
                outcome.failures[node.key] = f"not run: needs {', '.join(broken)}"
                continue
            options = task.options(name=node.key, num_cpus=node.num_cpus, num_gpus=node.num_gpus)
            refs[node.key] = options.remote(node.key, node.run, *[refs[n] for n in node.needs])
            key_of[refs[node.key]] = node.key
            while len(refs) - len(outcome.results) - sum(k in refs for k in outcome.failures) >= max_parallel:
                collect(block=True)
        while any(k not in outcome.results and k not in outcome.failures for k in refs):
            collect(block=True)
    return outcome


def _note_failure(outcome: GraphResult, key: str, error: BaseException) -> None:
    cause = getattr(error, "cause", None) or error
    last = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
    outcome.failures[key] = last
    outcome.errors[key] = error
