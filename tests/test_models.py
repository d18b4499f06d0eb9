"""What the model presets say of themselves is what the nets are; loading a model needs neither Ray nor MLflow."""

import re
import subprocess
import sys

import pytest

from raysyn.compose import CONFIGS, load_model
from raysyn.diffusion.noise import sigma_grid
from raysyn.diffusion.precondition import PRECONDITIONINGS, iddpm_table
from raysyn.diffusion.solvers import num_function_evals
from raysyn.models import MODELS, describe


def header(name: str) -> str:
    lines = (CONFIGS / "model" / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_opens_with_its_true_cost(name: str) -> None:
    text, cost = header(name), describe(load_model(name), 256)
    found = re.search(r"([\d.]+) M parameters; (\d+) GFLOPs an evaluation of one image, (\d+) of them", text)
    assert found is not None
    millions, gflops, modulations = map(float, found.groups())
    assert millions == round(cost["parameters"] / 1e6, 1)
    assert gflops == round(cost["gflops_per_evaluation"])
    assert modulations == round(cost["gflops_modulations"])
    assert f"{cost['network_evaluations']:.0f} network evaluations an image" in text
    if MODELS[name].space == "latent":
        stated = re.search(r"Autoencoder: ([\d.]+) M parameters, (\d+) GFLOPs to decode", text)
        assert stated is not None
        assert float(stated[1]) == round(cost["vae_parameters"] / 1e6, 1)
        assert float(stated[2]) == round(cost["gflops_decode"])
    assert "Should reach" in text


@pytest.mark.parametrize("name", MODELS)
def test_the_sampler_of_record_has_its_grid_at_its_own_number_of_steps(name: str) -> None:
    config = load_model(name)
    grid = sigma_grid(config.sampler, PRECONDITIONINGS[config.precondition]())
    assert len(grid) == config.sampler.num_steps + 1
    assert (grid.diff() < 0).all()
    assert num_function_evals(config.sampler.solver, config.sampler.num_steps) >= config.sampler.num_steps


def test_sdm_of_record_visits_every_level_of_the_chain() -> None:
    sampler = load_model("sdm").sampler
    assert sampler.num_steps == 1000
    assert (sigma_grid(sampler, PRECONDITIONINGS["iddpm"]()) - iddpm_table()).abs().max() == 0


def test_a_model_folder_is_read_without_ray_and_mlflow() -> None:
    code = "import sys, raysyn.pipeline, raysyn.models; print({'ray', 'mlflow', 'timm', 'monai'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
