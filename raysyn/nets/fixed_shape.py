"""A semantic U-Net for sampling at fixed shapes: compiled, then replayed as a CUDA graph, or plain with the reason why."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raysyn.nets.spade import Kept, Table

MAX_SHAPES = 4  # a full and a last batch, each with and without the map (guidance)


def store_weights(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep weights of convolutions and linear layers in `dtype`, as autocast would make them at every evaluation; in place.

    Under autocast of that dtype no bit of an output changes. Normalisations stay fp32. Returns the net.
    """
    for layer in net.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1:
            layer.to(dtype)
    return net


class FixedShapeNet(nn.Module):
    """Stands in for `net` in a `Denoiser`; same arguments, same output.

    On a CUDA device each shape's first evaluation is captured as a graph whose inputs keep their place in memory, so
    that an evaluation is one launch and the modulations of a batch are copied once. `compile` runs torch.compile
    first. Where something cannot be had the plain net runs, and `fallbacks` says why: no error is raised for it.
    """

    def __init__(self, net: nn.Module, *, compile: bool = True, graphs: bool = True, backend: str = "inductor") -> None:
        super().__init__()
        self.net, self.graphs = net, graphs
        self.fallbacks: list[str] = []
        self._run: Callable[..., Tensor] = torch.compile(net, backend=backend, dynamic=False) if compile else net
        self._compiled = compile
        self._captured: dict[tuple, _Graph] = {}

    def modulations(self, one_hot: Tensor, budget_bytes: float | None = None) -> list[Kept]:
        """Those of the net: see `SemanticUNet.modulations`."""
        return self.net.modulations(one_hot, budget_bytes)  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        one_hot: Tensor | None = None,
        modulations: list[Kept] | None = None,
    ) -> Tensor:
        if modulations is not None and any(isinstance(kept, Table) for kept in modulations):
            self._fall_back("modulations are kept as tables, whose size is each batch's own")
            return self.net(x, c_noise, one_hot, modulations)
        if self.graphs and x.device.type != "cuda":
            self._fall_back(f"no CUDA graphs on {x.device.type}")
        elif self.graphs:
            graph = self._graph_for(x, c_noise, one_hot, modulations)
            if graph is not None:
                return graph(x, c_noise, one_hot, modulations)
        return self._guarded(x, c_noise, one_hot, modulations)

    def _guarded(self, *inputs: Any) -> Tensor:
        """The compiled net; where it cannot be compiled the plain one, from then on."""
        try:
            return self._run(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not self._compiled:
                raise
            self._fall_back(f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            self._run, self._compiled = self.net, False
            return self.net(*inputs)

    def _graph_for(self, *inputs: Any) -> _Graph | None:
        leaves = pytree.tree_leaves(inputs)  # with a None for what is left out, so they tell the structure too
        known = tuple((t.shape, t.dtype) if isinstance(t, Tensor) else t for t in leaves)
        key = (known, torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None)
        if key not in self._captured:
            if len(self._captured) >= MAX_SHAPES:
                self._fall_back(f"more than {MAX_SHAPES} shapes: only the first are graphs")
                return None
            try:
                self._captured[key] = _Graph(self._guarded, inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._fall_back(f"not captured: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                self.graphs = False
                return None
        return self._captured[key]

    def _fall_back(self, reason: str) -> None:
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)


class _Graph:
    """One captured evaluation. Maps and modulations are copied into their places when other ones come, x every time."""

    def __init__(self, run: Callable[..., Tensor], inputs: tuple) -> None:
        self.held = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)
        self.loaded: list[Any] = []
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compilation and the choice of kernels must be over before the capture
                run(*self.held)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # No cache for autocast: weights that it casts during the capture must not be freed before the graph is.
        low = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", *low, cache_enabled=False), torch.cuda.graph(self.graph):
            self.output = run(*self.held)

    def __call__(self, x: Tensor, c_noise: Tensor, *maps: Any) -> Tensor:
        self.held[0].copy_(x)
        self.held[1].copy_(c_noise)
        coming = [t for t in pytree.tree_leaves(maps) if isinstance(t, Tensor)]
        if not self.loaded or any(new is not old() for new, old in zip(coming, self.loaded)):
            for place, new in zip((t for t in pytree.tree_leaves(self.held[2:]) if isinstance(t, Tensor)), coming):
                place.copy_(new)
            self.loaded = [weakref.ref(t) for t in coming]  # weak: a batch's own modulations are not kept alive
        self.graph.replay()
        return self.output.clone()
