"""The perceptual term: off with its reason, or a distance of features with a gradient; bad weights by name."""

import pytest
import torch

from raysyn.nets.perceptual import build_perceptual, perceptual_distance
from raysyn.types import UserError


def test_the_perceptual_term_says_why_it_is_off() -> None:
    net, status = build_perceptual("", "")
    assert net is None
    assert "no weights" in status


@pytest.mark.slow
def test_the_perceptual_term_takes_a_timm_backbone_with_its_weights(tmp_path) -> None:
    import timm

    file = tmp_path / "weights.pt"
    torch.save(timm.create_model("resnet10t", pretrained=False).state_dict(), file)
    net, status = build_perceptual("resnet10t", str(file))
    assert net is not None
    assert "resnet10t" in status
    image = torch.rand(2, 1, 64, 64, requires_grad=True)
    assert perceptual_distance(net, image, image).abs().max() == 0
    distance = perceptual_distance(net, image, torch.rand(2, 1, 64, 64))
    assert (distance > 0).all()
    (gradient,) = torch.autograd.grad(distance.sum(), image)
    assert torch.isfinite(gradient).all()
    for backbone, weights, says in (
        ("resnet10t", str(tmp_path / "absent.pt"), "is no file"),
        ("no_such_net", str(file), "timm has no 'no_such_net'"),
        ("resnet18", str(file), "not weights of timm's resnet18"),
    ):
        with pytest.raises(UserError, match=says):
            build_perceptual(backbone, weights)
    file.write_bytes(b"not weights")
    with pytest.raises(UserError, match="not weights of"):
        build_perceptual("resnet10t", str(file))
