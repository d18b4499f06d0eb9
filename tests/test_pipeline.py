"""Model folders and the diffusers pipeline: what is saved is what draws, and bad input is one clear line."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch

from raysyn.compose import load_model
from raysyn.labels import semantic_index
from raysyn.models import MODELS, build_denoiser, build_vae
from raysyn.nets.codecs import LatentCodec, PixelCodec
from raysyn.nets.fixed_shape import FixedShapeNet
from raysyn.pipeline import (
    SemanticDiffusionPipeline,
    decode_images,
    load_model_dir,
    save_model,
    synthesize_images,
    weights_sha256,
)
from raysyn.tracking.model import ConditionalSampler
from raysyn.types import UserError

SIZE = 32


def fresh(name: str):
    torch.manual_seed(0)
    config = load_model(name, "demo")
    denoiser = build_denoiser(config, SIZE)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.05 * torch.randn_like(p))
    codec = LatentCodec(build_vae(config)) if config.space == "latent" else PixelCodec()
    return config, denoiser, codec


@pytest.fixture(scope="module", params=["edm_l128", "edm"])
def folder(request, tmp_path_factory):
    config, denoiser, codec = fresh(request.param)
    path = tmp_path_factory.mktemp("model")
    save_model(path, denoiser.net, denoiser.net, codec, config, SIZE, {"images seen": 5})
    return path


@pytest.fixture
def maps() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 5, (4, SIZE, SIZE)).astype(np.uint8)


def test_the_folder_is_a_diffusers_users(folder, maps) -> None:
    pipeline = SemanticDiffusionPipeline.from_pretrained(folder)
    views = ["2CH", "4CH", "2CH", "4CH"]
    images = pipeline(maps, views, seeds=[1, 2, 3, 4], num_inference_steps=3)
    assert images.shape == maps.shape
    assert images.dtype == np.uint8
    assert (images[maps == 0] == 0).all()
    alone = pipeline(maps[1:2], views[1:2], seeds=[2], num_inference_steps=3)
    assert np.abs(alone[0].astype(int) - images[1]).max() <= 1  # an image belongs to its seed, not to its batch
    assert pipeline(maps[0], ["2CH"], seeds=[1], num_inference_steps=2, output_type="pil")[0].size == (SIZE, SIZE)


def test_a_map_may_say_its_view_itself(folder, maps) -> None:
    pipeline = SemanticDiffusionPipeline.from_pretrained(folder)
    both = maps[[0, 0]]
    named = pipeline(both, ["2CH", "4CH"], seeds=[1, 1], num_inference_steps=2)
    told = np.stack([maps[0], np.where(maps[0] > 0, maps[0] + 5, 0).astype(np.uint8)])
    assert np.array_equal(named, pipeline(told, seeds=[1, 1], num_inference_steps=2))
    assert np.array_equal(named[:1], pipeline(maps[:1], "2CH", seeds=[1], num_inference_steps=2))
    for wrong, says in (
        (np.where(maps[:1] == 4, 9, maps[:1]), "values of both views"),
        (np.where(maps[:1] == 4, 10, maps[:1]), r"label values \[10\] are outside the set 0 to 9"),
    ):
        with pytest.raises(UserError, match=says):
            pipeline(wrong.astype(np.uint8))
    with pytest.raises(UserError, match="output_type"):
        pipeline(maps, output_type="pt")


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"push_to_hub": True}, {"variant": "fp16"}])
def test_options_that_a_model_folder_cannot_have_are_refused(folder, tmp_path, options: dict) -> None:
    pipeline = SemanticDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match=next(iter(options))):
        pipeline.save_pretrained(tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()


def test_what_is_saved_again_draws_the_same_bits(folder, maps, tmp_path) -> None:
    pipeline = SemanticDiffusionPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "again", dice="0.9")
    again = SemanticDiffusionPipeline.from_pretrained(tmp_path / "again")
    views = ["4CH"] * 4
    assert np.array_equal(pipeline(maps, views, num_inference_steps=2), again(maps, views, num_inference_steps=2))
    assert "dice: 0.9" in (tmp_path / "again" / "README.md").read_text()


def test_the_folder_holds_both_weights_config_and_card(folder) -> None:
    model = load_model_dir(folder)
    assert model.checkpoint_sha256 == weights_sha256(folder)
    assert (folder / "unet_raw" / "diffusion_pytorch_model.safetensors").is_file()
    card = (folder / "README.md").read_text()
    assert "Intended use" in card
    assert "images seen: 5" in card
    assert model.image_size == SIZE


def test_what_a_model_folder_says_is_json_to_every_reader_and_the_older_form_is_read(folder, tmp_path) -> None:
    import shutil

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for name in ("model.json", "model_index.json"):
        json.loads((folder / name).read_text(), parse_constant=refuse)
    older = shutil.copytree(folder, tmp_path / "older")
    for name in ("model.json", "model_index.json"):
        text = (older / name).read_text()
        assert text.count('"inf"') == 1
        (older / name).write_text(text.replace('"inf"', "Infinity"))
    read = [load_model_dir(place).config.sampler for place in (folder, older)]
    assert read[0] == read[1]
    assert read[0].guidance_sigma_max == float("inf")
    assert SemanticDiffusionPipeline.from_pretrained(older).model.config.sampler == read[0]


def test_the_view_reaches_the_image(folder, maps) -> None:
    model = load_model_dir(folder)
    views = np.array([0, 1], np.uint8)
    same = maps[[0, 0]]
    a, b = synthesize_images(model, same, views, [7, 7])
    assert not np.array_equal(a, b)
    assert semantic_index(same, views).max() > 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: np.where(m == 4, 9, m).astype(np.uint8), r"label map \d: label values \[9\]"),
        (lambda m: m[:, :16, :16], "label map 0: is 16x16, but this model draws 32x32"),
        (lambda m: m.astype(np.float32), "expected a uint8 array"),
    ],
)
def test_bad_maps_are_one_clear_error(folder, maps, change, says: str) -> None:
    pipeline = SemanticDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match=says):
        pipeline(change(maps), ["2CH"] * 4)
    with pytest.raises(UserError, match="views: 1 for 4"):
        pipeline(maps, ["2CH"])
    with pytest.raises(UserError, match="3CH"):
        pipeline(maps, ["3CH"] * 4)


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_made_ready_for_fixed_shapes_a_model_draws_the_same_bits(folder, maps, monkeypatch, amp: str) -> None:
    monkeypatch.setattr("raysyn.pipeline.FixedShapeNet", partial(FixedShapeNet, backend="eager"))
    monkeypatch.setattr("raysyn.nets.precision.computes_in", lambda amp, kind: True)
    model, views = load_model_dir(folder), np.array([0, 1, 0, 1], np.uint8)
    sampler = dataclasses.replace(model.config.sampler, num_steps=2)
    before = synthesize_images(model, maps, views, [1, 2, 3, 4], sampler, amp=amp)
    fixed = model.fix_shapes(amp)
    assert np.array_equal(before, synthesize_images(model, maps, views, [1, 2, 3, 4], sampler, amp=amp))
    assert fixed.fallbacks == ["no CUDA graphs on cpu"]
    torch._dynamo.reset()


def test_missing_foreign_and_damaged_folders_are_refused(folder, tmp_path) -> None:
    with pytest.raises(UserError, match=r"no model\.json"):
        load_model_dir(tmp_path)
    (tmp_path / "model.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="not a model of this version"):
        load_model_dir(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_model_dir(tmp_path)
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    saved = json.loads((tmp_path / "copy" / "model.json").read_text())
    (tmp_path / "copy" / "model.json").write_text(json.dumps({**saved, "checkpoint_sha256": "0"}))
    with pytest.raises(UserError, match="altered or is damaged"):
        load_model_dir(tmp_path / "copy")
    (tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    for read in (load_model_dir, SemanticDiffusionPipeline.from_pretrained):
        with pytest.raises(UserError, match="altered or is damaged"):
            read(tmp_path / "copy")
        with pytest.raises(UserError, match=r"no model\.json"):
            read(tmp_path / "absent")
    for key in ("config", "image_size", "checkpoint_sha256"):
        less = {k: v for k, v in saved.items() if k != key}
        (tmp_path / "copy" / "model.json").write_text(json.dumps(less))
        with pytest.raises(UserError, match=f"has no {key}"):
            load_model_dir(tmp_path / "copy")


@pytest.mark.parametrize(("other", "says"), [("vp", "arch 'ddpmpp'"), ("sdm", "learned_variance True")])
def test_the_nets_of_another_model_are_refused(tmp_path, other: str, says: str) -> None:
    """Though their sha256 is right: the folder was put together from two."""
    config, denoiser, codec = fresh("edm")
    save_model(tmp_path, fresh(other)[1].net, denoiser.net, codec, config, SIZE)
    for read in (load_model_dir, SemanticDiffusionPipeline.from_pretrained):
        with pytest.raises(UserError, match=f"unet: is another model's \\({says}, where edm has"):
            read(tmp_path)
    foreign = dataclasses.replace(config, precondition="vp")
    save_model(tmp_path, denoiser.net, denoiser.net, codec, foreign, SIZE)
    with pytest.raises(UserError, match=r"model\.precondition: 'vp' is not edm's"):
        load_model_dir(tmp_path)


def test_wrong_calls_are_one_clear_error(folder, maps) -> None:
    for key in ("dtype", "torch_dtype"):
        with pytest.raises(UserError, match="dtype: weights are kept in fp32"):
            SemanticDiffusionPipeline.from_pretrained(folder, **{key: torch.float16})
    pipeline = SemanticDiffusionPipeline.from_pretrained(folder)
    for moved in ({"dtype": torch.bfloat16}, {"device": "cpu", "dtype": torch.float16}):
        with pytest.raises(UserError, match="dtype: weights are kept in fp32"):
            pipeline.to(*moved.values())
    assert pipeline.to("cpu", dtype=torch.float32) is pipeline
    for label_maps, more, says in (
        ([maps[0], maps[1][:16]], {}, "label_maps: are of different sizes"),
        (maps[:0], {}, "with at least one map"),
        (maps[:1], {"seeds": 3}, "seeds: give a whole number a map"),
        (maps[:1], {"num_inference_steps": 2.5}, "num_inference_steps: give one whole number"),
        (maps[:1], {"amp": "fp8"}, "amp: 'fp8' is not one of none, bf16, fp16"),
    ):
        with pytest.raises(UserError, match=says):
            pipeline(label_maps, "2CH", **more)
    with pytest.warns(UserWarning, match=r"guidance_scale 2: edm\w* was fitted without label_dropout"):
        pipeline(maps[:1], "2CH", num_inference_steps=2, guidance_scale=2.0, amp="bf16")


def test_maps_that_mlflow_is_asked_with_are_checked(folder, maps) -> None:
    sampler = ConditionalSampler(str(folder))
    views = np.array([0, 1, 0, 1], np.uint8)
    drawn = sampler.predict(semantic_index(maps, views), {"num_steps": 2, "seed": 5})
    chosen = dataclasses.replace(sampler.fitted.config.sampler, num_steps=2)
    assert np.array_equal(drawn, synthesize_images(sampler.fitted, maps, views, [5, 6, 7, 8], chosen))
    for wrong, says in (
        (maps + np.uint8(9), r"label values \[10, 11, 12, 13\] are outside the set 0 to 9"),
        (maps[:, :16, :16], "is 16x16, but this model draws 32x32"),
        (maps.astype(np.float64), "expected a uint8 array"),
    ):
        with pytest.raises(UserError, match=says):
            sampler.predict(wrong)


def test_images_that_are_no_numbers_are_not_drawn_black(folder, maps) -> None:
    model = load_model_dir(folder)
    x = torch.zeros(4, *model.codec.shape(SIZE))
    assert decode_images(model, x, maps).shape == maps.shape
    x[1, 0, 0, 0], x[2] = float("inf"), float("nan")
    with pytest.raises(UserError, match=r"edm\w*: 2 of 4 images are not finite numbers .* amp=bf16"):
        decode_images(model, x, maps)


def test_models_are_the_six_and_know_their_own_config() -> None:
    assert list(MODELS) == ["sdm", "vp", "ve", "edm", "edm_l128", "edm_l64"]
    for name, spec in MODELS.items():
        config = load_model(name)
        assert (config.space, config.net.arch, config.precondition) == (spec.space, spec.arch, spec.precondition)
        assert config.sampler.solver == spec.solver
        assert config.latent_downscale == spec.latent_downscale
    with pytest.raises(UserError, match=r"model\.net\.arch: 'adm' is not vp's"):
        MODELS["vp"].build(load_model("edm", "demo"), 64)
    with pytest.raises(UserError, match="image_size: 30 is not a multiple"):
        build_denoiser(load_model("edm_l64"), 30)
