"""Layers of the published U-Nets (arXiv:2206.00364 as parametrised there): resampling convolution, residual block."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysyn.nets.norm import GroupNorm
from raysyn.nets.spade import Conditioning, Spade, num_groups


class ResampleConv(nn.Module):
    """3x3 or 1x1 convolution, or none (kernel 0), with 2x up- or downsampling by outer(f, f)/(Σf)².

    Down: the filter with stride 2, then the convolution. Up: the transposed filter with gain 4, then the convolution.
    `fused` down: the convolution padded for both, then the unpadded filter (NCSN++'s image pyramid).
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        taps: tuple[int, ...] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.kernel, self.up, self.down, self.fused = in_channels, kernel, up, down, fused
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        self.pad = (len(taps) - 1) // 2
        filter_1d = torch.tensor(taps, dtype=torch.float32)
        filter_2d = filter_1d.outer(filter_1d) / filter_1d.sum().square()
        self.register_buffer("resample_filter", filter_2d[None, None], persistent=False)

    def _filter(self, x: Tensor, *, up: bool, pad: int) -> Tensor:
        if self.pad == 0:  # [1, 1] is nearest neighbour and average pooling, which are 8 % of a step faster on a CPU
            return F.interpolate(x, scale_factor=2, mode="nearest") if up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        if up:
            taps = self.resample_filter.mul(4).tile([channels, 1, 1, 1]).to(x.dtype)
            return F.conv_transpose2d(x, taps, groups=channels, stride=2, padding=pad)
        taps = self.resample_filter.tile([channels, 1, 1, 1]).to(x.dtype)
        return F.conv2d(x, taps, groups=channels, stride=2, padding=pad)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and self.down:
            x = F.conv2d(x, self.weight, self.bias, padding=self.kernel // 2 + self.pad)  # type: ignore[arg-type]
            return self._filter(x, up=False, pad=0)
        if self.up:
            x = self._filter(x, up=True, pad=self.pad)
        if self.down:
            x = self._filter(x, up=False, pad=self.pad)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.kernel // 2)


class PlainNorm(GroupNorm):
    """GroupNorm with the published groups; takes and ignores the conditioning, as the encoder sees no mask."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(num_groups(channels), channels, eps=eps)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        conditioning: Conditioning | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        return super().forward(x, scale, shift)


class Block(nn.Module):
    """Residual block, with attention where `num_heads` > 0 (REFERENCE: "The U-Net to the letter")."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding: int,
        norm: object,
        up: bool = False,
        down: bool = False,
        num_heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        taps: tuple[int, ...] = (1, 1),
        scale_shift: bool = True,
        resample_proj: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.skip_scale, self.scale_shift = num_heads, dropout, skip_scale, scale_shift
        self.norm0 = norm(in_channels)  # type: ignore[operator]
        self.conv0 = ResampleConv(in_channels, out_channels, 3, up=up, down=down, taps=taps)
        self.affine = nn.Linear(embedding, out_channels * (2 if scale_shift else 1))
        self.norm1 = norm(out_channels)  # type: ignore[operator]
        self.conv1 = ResampleConv(out_channels, out_channels, 3)
        resamples = up or down
        self.skip: nn.Module | None = None
        if in_channels != out_channels or resamples:
            kernel = 1 if in_channels != out_channels or resample_proj else 0
            self.skip = ResampleConv(in_channels, out_channels, kernel, up=up, down=down, taps=taps)
        if num_heads:
            self.norm2 = norm(out_channels)  # type: ignore[operator]
            self.qkv = ResampleConv(out_channels, 3 * out_channels, 1)
            self.proj = ResampleConv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, conditioning: Conditioning) -> Tensor:
        skip = x
        h = self.conv0(F.silu(self.norm0(x, conditioning)))
        p = self.affine(embedding)[:, :, None, None].to(h.dtype)
        if self.scale_shift:
            scale, shift = p.chunk(2, dim=1)
            h = F.silu(self.norm1(h, conditioning, scale + 1, shift))
        else:
            h = F.silu(self.norm1(h + p, conditioning))
        h = self.conv1(conditioning.dropout(h, self.dropout) if self.training else h)
        h = self._scaled(h + (skip if self.skip is None else self.skip(skip)))
        return h if not self.num_heads else self._attend(h, conditioning)

    def _attend(self, h: Tensor, conditioning: Conditioning) -> Tensor:
        batch, channels, height, width = h.shape
        qkv = self.qkv(self.norm2(h, conditioning))
        qkv = qkv.reshape(batch, self.num_heads, channels // self.num_heads, 3, height * width)
        # Contiguous: with channels apart in memory the fused kernels refuse, on CPUs and GPUs, and a 40 % slower path runs.
        q, k, v = (t.transpose(2, 3).contiguous() for t in qkv.unbind(3))
        attended = attend(q, k, v).transpose(2, 3).reshape(h.shape)
        return self._scaled(self.proj(attended) + h)

    def _scaled(self, h: Tensor) -> Tensor:
        return h if self.skip_scale == 1 else h * self.skip_scale  # ADM's times 1 would read and write all maps again


FEW_PLACES = 256  # up to which products of whole matrices take less than half of the fused kernel's time


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(qkᵀ/√d) v for q, k, v [B, heads, places, d], the same.

    Sampling on a CPU in bf16, torch's fused kernel multiplies in fp32: few places go through plain matrix products.
    """
    if torch.is_grad_enabled() or q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[2] > FEW_PLACES:
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3) @ v


class PositionalEmbedding(nn.Module):
    """[cos, sin] of c·(1/10000)^(i/(n/2)) (ADM), with endpoint ^(i/(n/2−1)) (DDPM++), i < n/2. [B] -> [B, n]."""

    def __init__(self, width: int, endpoint: bool) -> None:
        super().__init__()
        half = width // 2
        exponent = torch.arange(half, dtype=torch.float32) / (half - (1 if endpoint else 0))
        self.register_buffer("frequencies", (1 / 10000) ** exponent, persistent=False)

    def forward(self, c: Tensor) -> Tensor:
        angle = c.float().outer(self.frequencies)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """[cos, sin] of 2π·c·f, f ~ N(0, 16²) drawn once and kept with the weights (NCSN++). [B] -> [B, n]."""

    freqs: Tensor

    def __init__(self, width: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * scale)

    def forward(self, c: Tensor) -> Tensor:
        angle = c.float().outer(2 * math.pi * self.freqs.float())
        return torch.cat([angle.cos(), angle.sin()], dim=1)


@torch.no_grad()
def initialise(module: nn.Module, *, xavier: bool) -> None:
    """Xavier uniform with zero biases (DDPM++, NCSN++) or Kaiming uniform √⅓ = U(±1/√fan_in) (ADM), SPADE excepted."""
    inside_spade = {m for s in module.modules() if isinstance(s, Spade) for m in s.modules()}
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if layer in inside_spade or weight is None or not isinstance(layer, (ResampleConv, nn.Linear)):
            continue
        area = weight[0, 0].numel() if weight.dim() == 4 else 1
        fan_in, fan_out = weight.shape[1] * area, weight.shape[0] * area
        bound = math.sqrt(6 / (fan_in + fan_out)) if xavier else 1 / math.sqrt(fan_in)
        weight.uniform_(-bound, bound)
        if layer.bias is not None:
            layer.bias.zero_() if xavier else layer.bias.uniform_(-bound, bound)
    for layer in module.modules():
        if isinstance(layer, Block):
            _scale_last(layer, xavier)


def _scale_last(block: Block, xavier: bool) -> None:
    last = [block.conv1, *([block.proj] if block.num_heads else [])]
    for conv in last:
        conv.weight.mul_(1e-5 if xavier else 0)  # type: ignore[union-attr]
        conv.bias.zero_()  # type: ignore[union-attr]
    if block.num_heads and xavier:
        block.qkv.weight.mul_(math.sqrt(0.2))  # type: ignore[union-attr]
