"""Group normalisation (Wu 2018, arXiv:1803.08494), with the cases done anew in which torch is slow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEW_PIXELS = 1024  # below them torch's kernel for channels last goes through a group's few channels one by one
FEW_CHANNELS = 32  # below them it does so in 16 bits at any size
MANY_VALUES = 1 << 22  # from which on a GPU the bytes saved are worth a dozen more small kernels, by reckoning


class GroupNorm(nn.GroupNorm):
    """As `nn.GroupNorm`, then optionally times `scale` plus `shift`, each [B, C, 1, 1].

    x [B, C, H, W] of any floating dtype. Sums in fp32 and the variance as E[x²] − E[x]² where that is faster in
    sampling: on a CPU in channels last small maps take a fifth of torch's time. On a GPU torch's kernel knows plain memory
    order alone, and autocast gives it fp32: large maps in 16 bits would be converted to and fro, four times the bytes.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or not _is_slow(x):
            y = super().forward(x)
            return y if scale is None or shift is None else torch.addcmul(shift, y, scale)
        if x.device.type == "cuda":
            return self._on_gpu(x, scale, shift)
        batch, channels, height, width = x.shape
        values = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels).float()
        sums = torch.stack([values.sum(1), values.square().sum(1)])
        gain, bias = self._gain_and_bias(sums, height * width, scale, shift)
        # A row of pixels at once: over one pixel's few channels the kernel would not be vectorised.
        rows = x.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
        gain, bias = (t.reshape(batch, 1, channels).to(x.dtype).repeat(1, 1, width) for t in (gain, bias))
        y = torch.addcmul(bias, rows, gain).unflatten(2, (width, channels))
        return y.permute(0, 3, 1, 2)

    def _on_gpu(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """In x's own dtype and memory order: read for each sum, read and written once more."""
        norm = torch.linalg.vector_norm(x, 2, (2, 3), dtype=torch.float32)
        sums = torch.stack([x.sum((2, 3), dtype=torch.float32), norm.square()])
        gain, bias = self._gain_and_bias(sums, x.shape[2] * x.shape[3], scale, shift)
        return torch.addcmul(bias.to(x.dtype), x, gain.to(x.dtype))

    def _gain_and_bias(
        self, sums: Tensor, pixels: int, scale: Tensor | None, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """fp32 [B, C, 1, 1] each, of sums [2, B, C] over so many pixels of x and x²: the result is x·gain + bias."""
        each = sums.shape[2] // self.num_groups
        mean, square = sums.unflatten(2, (self.num_groups, each)).sum(3) / (pixels * each)
        inverse = (square - mean.square()).clamp(min=0).add(self.eps).rsqrt()
        gain = inverse.repeat_interleave(each, 1) * self.weight
        bias = self.bias - mean.repeat_interleave(each, 1) * gain
        gain, bias = (t.unflatten(1, (-1, 1, 1)) for t in (gain, bias))
        if scale is not None and shift is not None:
            gain, bias = gain * scale, torch.addcmul(shift.float(), bias, scale)
        return gain, bias


def _is_slow(x: Tensor) -> bool:
    if x.device.type == "cuda":
        return x.dim() == 4 and x.element_size() < 4 and x.numel() >= MANY_VALUES
    last = x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not last or x.is_contiguous():
        return False
    return x.shape[2] * x.shape[3] < FEW_PIXELS or (x.element_size() < 4 and x.shape[1] < FEW_CHANNELS)
