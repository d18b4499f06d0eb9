"""GroupNorm: torch's values whichever way it is computed, and its very bits where gradients are wanted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from raysyn.nets import norm
from raysyn.nets.norm import GroupNorm

SHAPES = [(3, 48, 16, 16), (2, 24, 32, 32), (2, 12, 8, 4), (1, 8, 1, 2), (2, 64, 40, 40)]


def layer(channels: int) -> GroupNorm:
    torch.manual_seed(channels)
    made = GroupNorm(4, channels, eps=1e-5)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made


def maps(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 3
    return x.to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_values_are_torchs(shape: tuple[int, ...], dtype: torch.dtype, near: float) -> None:
    made, x = layer(shape[1]), maps(shape, dtype)
    expected = F.group_norm(x.float(), 4, made.weight, made.bias, 1e-5).detach()
    with torch.inference_mode():
        got = made(x) if norm._is_slow(x) else made.to(dtype)(x)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.float(), expected, rtol=near, atol=near * float(expected.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_scale_and_shift_come_last(shape: tuple[int, ...]) -> None:
    made, x = layer(shape[1]), maps(shape)
    scale, shift = torch.randn(2, shape[0], shape[1], 1, 1)
    expected = F.group_norm(x, 4, made.weight, made.bias, 1e-5).detach() * scale + shift
    with torch.inference_mode():
        torch.testing.assert_close(made(x, scale, shift), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(made(x, scale, shift), expected, rtol=1e-5, atol=2e-5)


def test_a_flat_map_is_the_bias() -> None:
    made = layer(8)
    with torch.inference_mode():
        x = torch.full((2, 8, 4, 4), 7.3).to(memory_format=torch.channels_last)
        torch.testing.assert_close(made(x), made.bias[:, None, None].expand(2, 8, 4, 4), rtol=0, atol=2e-3)


def test_own_sums_where_torch_is_slow_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = maps((3, 48, 16, 16)), maps((2, 64, 40, 40))
    assert norm._is_slow(small)
    assert norm._is_slow(maps((2, 24, 40, 40), torch.bfloat16))
    assert not norm._is_slow(large)
    assert not norm._is_slow(small.contiguous())
    made = layer(48)
    reference = nn.GroupNorm(4, 48, eps=1e-5)
    reference.load_state_dict(made.state_dict())
    assert torch.equal(made(small), reference(small))  # gradients are wanted: torch's kernel
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda *_: pytest.fail("torch's slow kernel was used"))
    with torch.no_grad():
        made(small)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_what_a_gpu_computes_has_torchs_values(shape: tuple[int, ...], dtype: torch.dtype, near: float) -> None:
    made, x = layer(shape[1]), maps(shape, dtype)
    scale, shift = torch.randn(2, shape[0], shape[1], 1, 1)
    expected = F.group_norm(x.float(), 4, made.weight, made.bias, 1e-5).detach()
    with torch.inference_mode():
        plain, modulated = made._on_gpu(x, None, None), made._on_gpu(x, scale, shift)
    assert (plain.dtype, modulated.dtype) == (dtype, dtype)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain.float(), expected, rtol=near, atol=near * float(expected.abs().max()))
    expected = expected * scale + shift
    torch.testing.assert_close(modulated.float(), expected, rtol=near, atol=near * float(expected.abs().max()))


class Written(TorchDispatchMode):
    """Notes each tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.tensors += [out] if isinstance(out, torch.Tensor) else []
        return out


@pytest.mark.parametrize(("batch", "dtype"), [(32, torch.bfloat16), (1, torch.float32)])
def test_on_a_gpu_no_large_map_is_copied_to_fp32(monkeypatch, batch: int, dtype: torch.dtype) -> None:
    """By tensors without numbers: autocast's own rules for that device, with no device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cuda", torch.bfloat16), Written() as written:
        made = GroupNorm(32, 192, eps=1e-5, device="cuda")
        x = torch.empty(batch, 192, 64, 64, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        y = made(x, *torch.empty(2, batch, 192, 1, 1, device="cuda").unbind())
    wide = [t for t in written.tensors if t.numel() == x.numel() and t.dtype == torch.float32]
    assert (y.dtype, bool(wide)) == (dtype, dtype == torch.float32)  # few values are torch's, in what autocast gives it
