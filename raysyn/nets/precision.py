"""What networks compute in: the `amp` that a config asks for, on devices that have arithmetic in it."""

from __future__ import annotations

from functools import cache

import torch

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Names of `torch.cpu.get_capabilities`: x86 with AMX or AVX-512, then 64-bit ARM.
CPU_ARITHMETIC = {"bf16": ("amx_bf16", "avx512_bf16", "bf16"), "fp16": ("amx_fp16", "avx512_fp16")}


@cache
def computes_in(amp: str, device_type: str) -> bool:
    """Whether devices of this kind multiply in `amp` (bf16, fp16) themselves.

    A CPU that does not converts number by number, 4 to 50 times slower than fp32 (benchmarks/README.md). GPUs before
    Ampere (V100, T4) have fp16 but no bf16.
    """
    if device_type == "cuda":
        return amp == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities() if device_type == "cpu" else {}
    return torch.backends.mkldnn.is_available() and any(has.get(name, False) for name in CPU_ARITHMETIC[amp])


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of convolutions and matrix products under `amp` (none, bf16, fp16) on `device`; None where that is fp32:
    for none, and on a device without arithmetic in `amp`."""
    return AMP_DTYPES[amp] if amp in AMP_DTYPES and computes_in(amp, device.type) else None


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """Mixed precision for the block, in `amp_dtype`."""
    dtype = amp_dtype(amp, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def precision(amp: str, device: torch.device) -> str:
    """What `amp` comes to on `device`: fp32, bf16 or fp16."""
    return amp if amp_dtype(amp, device) is not None else "fp32"
