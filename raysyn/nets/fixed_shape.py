"""A semantic U-Net for sampling at fixed shapes: compiled, then replayed as a CUDA graph, or plain with the reason why."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raysyn.diffusion.batching import is_out_of_memory
from raysyn.nets.spade import Kept, Table

WITH_GRAPHS = ("cuda",)
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
    first. Where something cannot be had the plain net runs, and `fallbacks` says why: no error is raised for it but
    torch.OutOfMemoryError, for a batch that does not fit as a graph.
    """

    def __init__(self, net: nn.Module, *, compile: bool = True, graphs: bool = True, backend: str = "inductor") -> None:
        super().__init__()
        self.net, self.graphs = net, graphs
        self.fallbacks: list[str] = []
        self.run: Callable[..., Tensor] = torch.compile(net, backend=backend, dynamic=False) if compile else net
        self._compiled = compile
        self._ready: dict[tuple, Callable[..., Tensor]] = {}  # by shape
        self._too_large: set[tuple] = set()

    def modulations(self, one_hot: Tensor, budget_bytes: float | None = None) -> list[Kept]:
        """Those of the net, none as a table, whose size is each batch's own: see `SemanticUNet.modulations`."""
        return self.net.modulations(one_hot, budget_bytes, tables=False)  # type: ignore[operator]

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
        inputs = (x, c_noise, one_hot, modulations)
        leaves = pytree.tree_leaves(inputs)  # with a None for what is left out, so they tell the structure too
        known = tuple((t.shape, t.dtype) if isinstance(t, Tensor) else t for t in leaves)
        key = (known, torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None)
        if key not in self._ready:
            if len(self._ready) >= MAX_SHAPES:  # of images drawn again there is any number: each would take minutes
                self._fall_back(f"more than {MAX_SHAPES} shapes: only the first are made ready")
                return self.net(*inputs)
            self._ready[key] = self._made_ready(key, inputs)
        return self._ready[key](*inputs)

    def guarded(self, *inputs: Any) -> Tensor:
        """The compiled net; where it cannot be compiled the plain one, from then on."""
        try:
            return self.run(*inputs)
        except Exception as error:
            if not self._compiled or is_out_of_memory(error):
                raise
            self._fall_back(f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            self.run, self._compiled = self.net, False
            return self.net(*inputs)

    def _made_ready(self, key: tuple, inputs: tuple) -> Callable[..., Tensor]:
        """What evaluates this shape: a graph, or the net with the reason why there is none."""
        device = inputs[0].device.type
        if self.graphs and device not in WITH_GRAPHS:
            self._fall_back(f"no CUDA graphs on {device}")
        elif self.graphs:
            if key in self._too_large:
                raise torch.OutOfMemoryError("this batch did not fit as a CUDA graph before")
            # One pool for all graphs: no output outlives its replay uncopied, so they may work in the same memory.
            pool = next((made.graph.pool() for made in self._ready.values() if isinstance(made, _Graph)), None)
            try:
                return _Graph(self, inputs, pool)
            except Exception as error:
                if is_out_of_memory(error):
                    self._too_large.add(key)  # so that each further batch of it is halved at once
                    raise
                self._fall_back(f"not captured: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                self.graphs = False
        return self.guarded

    def _fall_back(self, reason: str) -> None:
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)
            logging.getLogger("raysyn").warning("sampling is slower than it could be: %s", reason)


class _Graph:
    """One captured evaluation. Maps and modulations are copied into their places when other ones come, x every time."""

    def __init__(self, net: FixedShapeNet, inputs: tuple, pool: Any) -> None:
        self.held = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)
        self.loaded: list[Any] = []
        self.graph = torch.cuda.CUDAGraph()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        # No cache for autocast: weights that it casts during the capture must not be freed before the graph is. Nor in
        # the warm-up: what is compiled with a cache would be compiled anew without, which a capture does not allow.
        device = inputs[0].device.type
        low = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # A capture that fails may leave its own stream current; the outer context brings ours back.
        with torch.autocast(device, *low, cache_enabled=False), torch.cuda.stream(current):
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(3):  # compilation and the choice of kernels must be over before the capture
                    net.guarded(*self.held)
            current.wait_stream(side)
            # What other threads ask of the device in the meantime does not spoil the capture.
            with torch.cuda.graph(self.graph, pool, capture_error_mode="thread_local"):
                self.output = net.run(*self.held)

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
