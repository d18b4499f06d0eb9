"""What `amp` comes to: a device without arithmetic in bf16 works in fp32, bit by bit; one that has it in bf16."""

from types import SimpleNamespace

import pytest
import torch

from raysyn.nets.precision import amp_dtype, autocast, computes_in, precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def asked_anew():
    """What this machine has is remembered: not from one test to another, nor after them."""
    computes_in.cache_clear()
    yield
    computes_in.cache_clear()


@pytest.fixture
def cpu_has(monkeypatch):
    """Give this CPU the capabilities named, and no others."""

    def give(*names: str, mkldnn: bool = True) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **dict.fromkeys(names, True)})
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)

    return give


@pytest.mark.parametrize(
    ("names", "bf16", "fp16"),
    [
        ((), "fp32", "fp32"),
        (("avx512_f", "avx512_vnni"), "fp32", "fp32"),
        (("avx512_f", "avx512_bf16"), "bf16", "fp32"),
        (("amx_bf16", "amx_fp16"), "bf16", "fp16"),
        (("neon", "bf16"), "bf16", "fp32"),
    ],
)
def test_a_cpu_works_in_what_it_has_arithmetic_in(cpu_has, names, bf16: str, fp16: str) -> None:
    cpu_has(*names)
    assert [precision(amp, CPU) for amp in ("none", "bf16", "fp16")] == ["fp32", bf16, fp16]


@pytest.mark.parametrize(("capability", "bf16"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_before_ampere_has_no_bf16(monkeypatch, capability, bf16: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert [precision(amp, GPU) for amp in ("none", "bf16", "fp16")] == ["fp32", bf16, "fp16"]


def test_arithmetic_that_torch_cannot_reach_is_none(cpu_has) -> None:
    cpu_has("bf16", mkldnn=False)
    assert amp_dtype("bf16", CPU) is None


@pytest.mark.parametrize(("names", "dtype"), [((), torch.float32), (("avx512_bf16",), torch.bfloat16)])
def test_the_block_computes_in_it(cpu_has, names, dtype: torch.dtype) -> None:
    cpu_has(*names)
    layer, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
    with autocast("bf16", CPU):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x)) == (dtype == torch.float32)
