"""The semantic U-Net: DDPM++, NCSN++ and ADM by its settings, SPADE in the decoder (REFERENCE §2).

Parameter names are those of the published layout, so a published checkpoint loads by name.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from raysyn.config import NetConfig
from raysyn.labels import NUM_CHANNELS
from raysyn.nets.blocks import Block, FourierEmbedding, PlainNorm, PositionalEmbedding, ResampleConv, initialise
from raysyn.nets.spade import Conditioning, Kept, Neighbourhoods, Plan, Spade, affordable
from raysyn.types import UserError


class Arch(NamedTuple):
    """What tells the three architectures apart."""

    taps: tuple[int, ...]
    skip_scale: float
    eps: float
    scale_shift: bool
    fourier: bool
    pyramid: bool


ARCHES = {
    #                taps          skip scale      eps   scale-shift fourier pyramid
    "ddpmpp": Arch((1, 1), math.sqrt(0.5), 1e-6, False, False, False),
    "ncsnpp": Arch((1, 3, 3, 1), math.sqrt(0.5), 1e-6, False, True, True),
    "adm": Arch((1, 1), 1.0, 1e-5, True, False, False),
}

OVERHEAD = 1_000_000  # operations that the mere calls of a SPADE layer's convolutions cost the time of


class SemanticUNet(ModelMixin, ConfigMixin):
    """F(c_in·x; c_noise, map): x [B, in, H, W], c_noise [B] or [1], one_hot [B, label_channels, ·, ·] -> [B, out, H, W].

    `resolution` is the height and width of x. With `patch_size` p the net works on p x p patches moved to channels.
    With `learned_variance` the output has twice the channels: (F, variance interpolation). The last three settings are
    for imported nets: widths of the noise embedding, and the heads of every block with attention ("enc.32x32_block0").
    """

    @register_to_config
    def __init__(
        self,
        resolution: int,
        in_channels: int = 1,
        out_channels: int = 1,
        label_channels: int = NUM_CHANNELS,
        arch: str = "adm",
        base_channels: int = 192,
        channel_multipliers: tuple[int, ...] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.1,
        spade_hidden: int = 128,
        spade_kernel: int = 3,
        patch_size: int = 1,
        learned_variance: bool = False,
        noise_channels: int | None = None,
        embedding_channels: int | None = None,
        block_heads: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.arch, self.stride = ARCHES[arch], patch_size * 2 ** (len(channel_multipliers) - 1)
        if resolution % self.stride:
            raise UserError(f"resolution: {resolution} is not a multiple of the net's stride {self.stride}")
        self.attention_at, self.block_heads = set(attention_resolutions), block_heads
        self.channels_per_head = channels_per_head if self.arch.scale_shift else None
        self.base, self.num_spades = base_channels, 0
        self.dropout_seeds: Tensor | None = None  # of a training batch's samples, set before its forward
        width = embedding_channels or 4 * base_channels
        self._embeddings(noise_channels or base_channels * (2 if self.arch.fourier else 1), width)
        self.block = partial(
            Block,
            embedding=width,
            dropout=dropout,
            skip_scale=self.arch.skip_scale,
            taps=self.arch.taps,
            scale_shift=self.arch.scale_shift,
            resample_proj=arch != "adm",
        )
        size, widths = resolution // patch_size, [base_channels * m for m in channel_multipliers]
        channels_in = in_channels * patch_size**2
        channels_out = out_channels * patch_size**2 * (2 if learned_variance else 1)
        skips = self._encoder(size, channels_in, widths, num_blocks)
        self._decoder(size, widths, num_blocks, skips, (label_channels, spade_hidden, spade_kernel))
        self._head(size, widths[0], channels_out)
        initialise(self, xavier=arch != "adm")
        self._scale_head(arch)

    @classmethod
    def from_net_config(cls, net: NetConfig, resolution: int, channels: int = 1) -> SemanticUNet:
        """The net of a model's config for x of `channels` x `resolution` x `resolution`."""
        keys = ("arch", "base_channels", "num_blocks", "channels_per_head", "dropout", "spade_hidden", "spade_kernel")
        return cls(
            resolution=resolution,
            in_channels=channels,
            out_channels=channels,
            channel_multipliers=tuple(net.channel_multipliers),
            attention_resolutions=tuple(net.attention_resolutions),
            patch_size=net.patch_size,
            learned_variance=net.learned_variance,
            **{key: getattr(net, key) for key in keys},
        )

    def _heads(self, block: str, channels: int, attends: bool) -> int:
        """Attention heads of a block, 0 for none."""
        if self.block_heads is not None:
            return self.block_heads.get(block, 0)
        if not attends:
            return 0
        return 1 if self.channels_per_head is None else max(1, channels // self.channels_per_head)

    def _embeddings(self, noise: int, width: int) -> None:
        if self.arch.fourier:
            self.map_noise: nn.Module = FourierEmbedding(noise)
        else:
            self.map_noise = PositionalEmbedding(noise, endpoint=not self.arch.scale_shift)
        self.map_layer0 = nn.Linear(noise, width)
        self.map_layer1 = nn.Linear(width, width)

    def _encoder(self, size: int, channels_in: int, widths: list[int], num_blocks: int) -> list[int]:
        norm, block, taps = partial(PlainNorm, eps=self.arch.eps), self.block, self.arch.taps
        self.enc, skips, pyramid = nn.ModuleDict(), [], channels_in
        channels = widths[0] if self.arch.scale_shift else self.base
        for level, width in enumerate(widths):
            side = size >> level
            name = f"{side}x{side}"
            if level == 0:
                self.enc[f"{name}_conv"] = ResampleConv(channels_in, channels, 3)
            else:
                self.enc[f"{name}_down"] = block(channels, channels, down=True, norm=norm)
                if self.arch.pyramid:
                    conv = ResampleConv(pyramid, channels, 3, down=True, taps=taps, fused=True)
                    self.enc[f"{name}_aux_residual"] = conv
                    pyramid = channels
            skips.append(channels)
            for i in range(num_blocks):
                heads = self._heads(f"enc.{name}_block{i}", width, side in self.attention_at)
                self.enc[f"{name}_block{i}"] = block(channels, width, num_heads=heads, norm=norm)
                channels = width
                skips.append(channels)
        return skips

    def _decoder(
        self, size: int, widths: list[int], num_blocks: int, skips: list[int], spade: tuple[int, int, int]
    ) -> None:
        self.dec, channels, block = nn.ModuleDict(), widths[-1], self.block

        def norm(width: int) -> Spade:
            self.num_spades += 1
            return Spade(width, *spade, index=self.num_spades - 1)

        for level, width in reversed(list(enumerate(widths))):
            side = size >> level
            name = f"{side}x{side}"
            if level == len(widths) - 1:
                heads = self._heads(f"dec.{name}_in0", channels, True)
                self.dec[f"{name}_in0"] = block(channels, channels, num_heads=heads, norm=norm)
                self.dec[f"{name}_in1"] = block(channels, channels, norm=norm)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, up=True, norm=norm)
            for i in range(num_blocks + 1):
                attends = side in self.attention_at and (self.arch.scale_shift or i == num_blocks)
                heads = self._heads(f"dec.{name}_block{i}", width, attends)
                self.dec[f"{name}_block{i}"] = block(channels + skips.pop(), width, num_heads=heads, norm=norm)
                channels = width

    def _head(self, size: int, channels: int, channels_out: int) -> None:
        norm, conv = PlainNorm(channels, self.arch.eps), ResampleConv(channels, channels_out, 3)
        if self.arch.scale_shift:
            self.out_norm, self.out_conv = norm, conv
        else:
            self.dec[f"{size}x{size}_aux_norm"], self.dec[f"{size}x{size}_aux_conv"] = norm, conv

    @torch.no_grad()
    def _scale_head(self, arch: str) -> None:
        conv = self._out_layers()[1]
        conv.weight.mul_(0 if arch == "adm" else 1e-5)  # type: ignore[union-attr]
        conv.bias.zero_()  # type: ignore[union-attr]

    def _out_layers(self) -> tuple[nn.Module, ResampleConv]:
        if self.arch.scale_shift:
            return self.out_norm, self.out_conv
        side = self.config.resolution // self.config.patch_size  # type: ignore[attr-defined]
        return self.dec[f"{side}x{side}_aux_norm"], self.dec[f"{side}x{side}_aux_conv"]  # type: ignore[return-value]

    def _embed(self, c_noise: Tensor) -> Tensor:
        emb = self.map_noise(c_noise.flatten())
        if not self.arch.scale_shift:  # DDPM++ and NCSN++ swap the halves: [sin, cos]
            emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def spade_sizes(self) -> list[tuple[Spade, int]]:
        """Every SPADE layer in the order of its index, with the height of the features that it normalises."""
        found = []
        for name, module in self.dec.items():
            side = int(name.split("x")[0])
            for key, layer in module.named_children():
                if isinstance(layer, Spade):
                    below = side // 2 if name.endswith("_up") and key == "norm0" else side
                    found.append((layer, below))
        return sorted(found, key=lambda pair: pair[0].index)

    def modulations(self, one_hot: Tensor, budget_bytes: float | None = None, *, tables: bool = True) -> list[Kept]:
        """(1+γ, β) of the SPADE layers for these maps [B, L, H, W], for all steps to share; None for what is left out.

        Where not all fits into the budget, a layer whose map has few distinct neighbourhoods is kept as a table of them
        (2 to 7 times slower to use than maps, many times faster than convolutions) unless `tables` is false, and the
        layers that save most work a byte are kept first; what is left then makes maps of tables. No bit of an output
        changes.
        """
        batch, device = one_hot.shape[0], one_hot.device.type
        layers = self.spade_sizes()
        low = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        item = torch.get_autocast_dtype(device).itemsize if low else layers[0][0].norm.weight.element_size()
        # Cast once, as autocast would for each layer.
        conditioning = Conditioning(one_hot.to(torch.get_autocast_dtype(device)) if low else one_hot)
        maps = [2 * item * batch * layer.norm.num_channels * side * side for layer, side in layers]
        if budget_bytes is None or sum(maps) <= budget_bytes:
            return [layer.modulation(conditioning.at((side, side))) for layer, side in layers]
        found: dict[tuple[int, int], Neighbourhoods] = {}
        plans = []
        for (layer, side), size in zip(layers, maps, strict=True):
            key = side, 1 + layer.mlp_gamma.kernel_size[0] // 2
            if tables and key not in found:
                found[key] = Neighbourhoods(conditioning.at((side, side)), key[1])
            places, small = found.get(key), size + 1
            if places is not None and places.index is not None:
                small = 2 * item * layer.norm.num_channels * len(places.first) + 4 * places.index.numel()
            gain = layer.cost(batch * side * side) + OVERHEAD
            plans.append(Plan(layer, side, gain, size, min(size, small), places if small < size else None))
        kept: list[Kept] = [None] * len(layers)
        chosen, spare = affordable(plans, budget_bytes)
        for plan in chosen:
            full = plan.layer.modulation(conditioning.at((plan.side, plan.side)))
            kept[plan.layer.index] = full if plan.places is None else plan.layer.tabled(full, plan.places)
            if kept[plan.layer.index] is None:
                spare += plan.bytes
                if plan.maps <= spare:
                    kept[plan.layer.index] = full
                    spare -= plan.maps
        return kept

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        one_hot: Tensor | None = None,
        modulations: list[Kept] | None = None,
    ) -> Tensor:
        height, width = x.shape[2:]
        if height % self.stride or width % self.stride:
            raise UserError(f"x: {height}x{width} is not a multiple of the net's stride {self.stride}")
        if one_hot is None:  # the null mask
            shape = (x.shape[0], self.config.label_channels, *x.shape[2:])  # type: ignore[attr-defined]
            one_hot = x.new_zeros(shape)
        patch = self.config.patch_size  # type: ignore[attr-defined]
        conditioning = Conditioning(one_hot, modulations, self.dropout_seeds)
        x = F.pixel_unshuffle(x, patch) if patch > 1 else x
        emb = self._embed(c_noise)
        skips: list[Tensor] = []
        pyramid = x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                x = skips[-1] = pyramid = (x + layer(pyramid)) / math.sqrt(2)
            else:
                x = layer(x, emb, conditioning) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, Block):
                if x.shape[1] != layer.conv0.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb, conditioning)
        norm, conv = self._out_layers()
        out = conv(F.silu(norm(x)))
        return F.pixel_shuffle(out, patch) if patch > 1 else out
