"""Model folders seen from a driver: checked without a weight being read into a net."""

import functools
import hashlib
import json
from pathlib import Path

import pytest
import torch

from raysyn.cluster.model_store import CheckedModel, check_model, local_copy
from raysyn.compose import load_model
from raysyn.models import build_denoiser, build_vae
from raysyn.nets.codecs import LatentCodec, PixelCodec
from raysyn.nets.unet import SemanticUNet
from raysyn.pipeline import save_model, weights_sha256
from raysyn.types import UserError

SIZE = 32


def saved(folder: Path, name: str, nets_of: str = "") -> str:
    config = load_model(name, "tiny")
    codec = LatentCodec(build_vae(config)) if config.space == "latent" else PixelCodec()
    net = build_denoiser(load_model(nets_of or name, "tiny"), SIZE).net
    return save_model(folder, net, net, codec, config, SIZE)


@pytest.mark.parametrize("name", ["edm", "edm_l128"])
def test_a_model_is_checked_and_no_weight_is_loaded(name: str, tmp_path: Path, monkeypatch) -> None:
    sha256 = saved(tmp_path, name)
    made: list[torch.device] = []
    build = SemanticUNet.__init__

    @functools.wraps(build)  # diffusers reads its signature
    def watched(self, *arguments, **options) -> None:
        build(self, *arguments, **options)
        made.append(next(self.parameters()).device)

    monkeypatch.setattr(SemanticUNet, "__init__", watched)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("a published net's file has 1.4 GB"))
    assert check_model(str(tmp_path)) == CheckedModel(load_model(name, "tiny"), SIZE, sha256)
    assert {device.type for device in made} == {"meta"}


def test_the_sum_is_of_names_and_bytes_in_the_order_of_names(tmp_path: Path) -> None:
    digest = hashlib.sha256()
    for name, data in (("a/x.safetensors", b"1" * 300_000), ("b.safetensors", b"2"), ("unet_raw/y.safetensors", b"3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
        if "unet_raw" not in name:
            digest.update(name.encode() + data)
    assert weights_sha256(tmp_path) == digest.hexdigest()


def test_what_is_not_the_model_it_says_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "mixed", "edm", nets_of="vp")
    with pytest.raises(UserError, match="unet: is another model's"):
        check_model(str(tmp_path / "mixed"))
    saved(tmp_path / "less", "edm_l128")
    (tmp_path / "less" / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"less: its nets cannot be made"):
        check_model(str(tmp_path / "less"))
    saved(tmp_path / "altered", "edm")
    config = tmp_path / "altered" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "arch": "none"}))
    with pytest.raises(UserError, match=r"altered: its nets cannot be made"):
        check_model(str(tmp_path / "altered"))
    (tmp_path / "altered" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="do not match the sha256"):
        check_model(str(tmp_path / "altered"))
    local_copy.cache_clear()
