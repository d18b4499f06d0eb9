import re
from pathlib import Path

import pytest

from raysyn.compose import JOBS, MODEL_NAMES, load_job, load_model
from raysyn.config import NetConfig, VAEConfig, fingerprint
from raysyn.types import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("scale", ["demo", "laptop", "paper"])
def test_every_job_has_defaults_at_every_scale(job: str, scale: str) -> None:
    config = load_job(job, [f"scale={scale}"])
    assert isinstance(config, JOBS[job])
    assert config.scale == scale
    assert config.storage == f"runs/{scale}"


def test_the_later_layer_wins() -> None:
    paper, demo = load_model("edm", "paper"), load_model("edm", "demo")
    assert paper.net.base_channels == 192
    assert demo.net.base_channels == 24
    told = load_job("fit", ["model=edm", "scale=demo", "model.net.base_channels=40", "model.fit.lr=1e-5"]).model
    assert told.net.base_channels == 40
    assert told.fit.lr == 1e-5
    assert told.net.spade_hidden == demo.net.spade_hidden


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_model_name_is_all_that_a_user_changes(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert (model.space == "latent") == name.startswith("edm_l")
    assert model.latent_downscale == {"edm_l128": 2, "edm_l64": 4}.get(name, 1)
    assert load_model(name, "demo").latent_downscale == model.latent_downscale


def test_compare_takes_all_models_or_some() -> None:
    assert [m.name for m in load_job("compare", ["model=all"]).models] == list(MODEL_NAMES)
    assert [m.name for m in load_job("compare", ["model=[vp,sdm]"]).models] == ["vp", "sdm"]
    assert [m.name for m in load_job("compare", ["model=edm"]).models] == ["edm"]


def test_the_gaussian_control_is_one_word_away() -> None:
    assert load_job("fit", ["model=edm_l64", "vae=kl"]).model.vae.kind == "kl"
    both = load_job("compare", ["model=[edm,edm_l128]", "vae=[gamma,kl]"])
    assert [m.label for m in both.models] == ["edm", "edm_l128", "edm_l128_kl"]
    assert [m.label for m in load_job("compare", ["model=all", "vae=kl"]).models][-2:] == ["edm_l128_kl", "edm_l64_kl"]
    for job, overrides, says in (
        ("fit", ["model=edm", "vae=kl"], "edm works on pixels"),
        ("fit", ["model=edm_l64", "vae=vq"], "kind: 'vq' is not one of gamma, kl"),
        ("fit", ["model=edm_l64", "vae=[gamma,kl]"], "takes one kind here"),
        ("fit", ["vae.weight_kl=1"], r"^vae\.weight_kl: of one model it is model\.vae\.weight_kl"),
        ("compare", ["model=all", "vae.weight_kl=1"], r"^vae\.weight_kl: .* from configs/model/"),
        ("prepare", ["vae=kl"], "vae: not a key"),
    ):
        with pytest.raises(UserError, match=says):
            load_job(job, overrides)


def test_all_models_at_once_have_a_folder_of_their_own() -> None:
    assert load_job("compare", ["scale=demo", "model=all"]).storage == "runs/demo_all"
    assert load_job("compare", ["scale=demo", "model=all", "storage=x"]).storage == "x"


@pytest.mark.parametrize(
    ("job", "override", "says"),
    [
        ("fit", "model.net.foo=1", r"model\.net\.foo: unknown key"),
        ("fit", "model.net.dropout=7", r"model\.net\.dropout: 7.0 is outside"),
        ("fit", "model.net.base_channels=abc", r"model\.net\.base_channels: .*abc"),
        ("fit", "model.net.arch=resnet", r"model\.net\.arch: 'resnet' is not one of"),
        ("fit", "model=dit", "model: 'dit' is not one of"),
        ("fit", "scale=huge", "scale: 'huge' is not one of"),
        ("fit", "nonsense", "form key=value"),
        ("prepare", "model=edm", "model: not a key of jobs/prepare.py"),
        ("synthesize", "synthesize.mask_splits=[test]", r"synthesize\.mask_splits: .*test"),
        ("synthesize", "synthesize={batch_size: 16, shard_size: 10}", r"synthesize\.shard_size: 10 is not a multiple"),
        ("tune", "search.objectives=[beauty]", r"search\.objectives"),
        ("compare", "solvers=[rk45]", "'rk45' is not one of"),
        ("compare", "steps=[5,5]", "steps: 5 comes twice"),
        ("compare", "steps=[5,0]", r"steps: 0 is outside \[1, 10000\]"),
        ("compare", "classification.validate_every_epochs=0", r"classification\.validate_every_epochs: 0 is outside"),
        ("tune", "task.seed=-1", r"task\.seed: -1 is outside"),
        ("tune", "cost.usd_per_cpu_hour=-1", r"cost\.usd_per_cpu_hour: -1.0 is outside"),
        ("fit", "model.latent_downscale=3", "latent_downscale: 3 does not match"),
        ("fit", "model.fit.lr=0", r"model\.fit\.lr: 0.0 is outside"),
        ("fit", "model.fit.weight_decay=nan", r"model\.fit\.weight_decay: nan is outside"),
        ("fit", "model.fit.momentum=7", r"model\.fit\.momentum: 7.0 is outside"),
        ("fit", "model.fit.seed=-1", r"model\.fit\.seed: -1 is outside"),
        ("fit", "model.net.channel_multipliers=[]", r"model\.net\.channel_multipliers: is empty"),
        ("fit", "model.net.channel_multipliers=[1,0]", r"model\.net\.channel_multipliers: 0 is outside"),
        ("fit", "model.vae.weight_image=-1", r"model\.vae\.weight_image: -1.0 is outside"),
        ("fit", "model.sampler.s_noise=nan", r"model\.sampler\.s_noise: nan is outside"),
        ("fit", "model.sampler={guidance_sigma_min: 5, guidance_sigma_max: 1}", r"guidance_sigma_min: 5.0 is above"),
        ("fit", "model.sampler.s_max=0.01", r"model\.sampler\.s_min: 0.02 is above s_max 0.01"),
        ("fit", "tracking.uri=foo", r"tracking\.uri: 'foo' is no address"),
        ("fit", "ray.address=foo", r"ray\.address: 'foo' is neither host:port"),
        ("fit", "ray.num_cpus=0", r"ray\.num_cpus: 0 is outside"),
        ("fit", "ray.object_store_mb=-5", r"ray\.object_store_mb: -5 is outside"),
        ("fit", "cost.usd_per_gpu_hour=-1", r"cost\.usd_per_gpu_hour: -1.0 is outside"),
        ("fit", "data=../scale/demo", "data: '../scale/demo' is not one of"),
        ("prepare", "data.root=${x}", r"data\.root: Interpolation key 'x' not found"),
        ("synthesize", "synthesize.warp.scale_min=2", r"synthesize\.warp\.scale_min: 2.0 is above scale_max"),
        ("synthesize", "synthesize.mask_splits=[]", r"synthesize\.mask_splits: is empty"),
        ("tune", "task.weight_decay=-1", r"task\.weight_decay: -1.0 is outside"),
        ("compare", "solvers=[]", "solvers: is empty"),
        ("compare", "model=[edm,edm]", "model: edm comes twice"),
        ("compare", "controls=[foo]", "controls: 'foo' is not one of reconstruction, prior"),
        ("compare", "num_task_seeds=0", "num_task_seeds: 0 is outside"),
        ("compare", "segmentation.kind=classification", r"segmentation\.kind: is 'classification'"),
        ("compare", "models=foo", "models: 'foo' is not a list"),
        ("compare", "model=null", "model: None is no name"),
        ("compare", "steps=3", r"steps: 3 is no list; write steps=\[3\]"),
        ("prepare", "data.seed=???", r"data\.seed: '\?\?\?' is no value"),
        ("fit", "tracking.uri=sqlite:///runs/m.db", r"tracking\.uri: 'sqlite:///runs/m.db' names no absolute path"),
    ],
)
def test_bad_input_names_the_key(job: str, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_job(job, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["/tmp/a #1", "/tmp/a: b", "0123", "a=b 'c' \"d\"", "~", "null", "1e3", "[x", "{y}"])
def test_what_is_text_is_taken_as_it_stands(text: str) -> None:
    assert load_job("prepare", [f"data.root={text}", f"storage={text}"]).data.root == text
    assert load_job("compare", [f"data.root={text}", f"storage={text}"]).storage == text


def test_quotes_around_a_text_and_an_empty_one() -> None:
    assert load_job("prepare", ["data.root='/tmp/x y'", 'storage="s"']).data.root == "/tmp/x y"
    assert load_job("prepare", ["data.root="]).data.root == ""


def test_fingerprint_tells_configs_apart_and_ignores_identity() -> None:
    assert fingerprint(NetConfig(), VAEConfig()) == fingerprint(NetConfig(), VAEConfig())
    assert fingerprint(NetConfig(), VAEConfig()) != fingerprint(NetConfig(dropout=0.2), VAEConfig())
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len(fingerprint("x")) == 16


def test_the_command_lines_and_keys_of_the_pages_are_real() -> None:
    pages = [ROOT / name for name in ("README.md", "infra/README.md", "infra/CAPACITY.md", "benchmarks/README.md")]
    text = "\n".join(page.read_text().replace("\\\n", " ") for page in pages)
    commands = re.findall(r"jobs/(\w+)\.py((?: +[\w.]+=[^\s`]+)*)", text)
    assert len([job for job, given in commands if given]) >= 6
    for job, given in commands:
        load_job(job, given.split())
    keys = set(re.findall(r"`((?:model|vae|synthesize|workers|cost|tracking|data|search)\.[a-z_.]+)", text))
    assert len(keys) >= 8
    for key in keys:
        owner: object = load_job("synthesize" if key.startswith("synthesize") else "fit", [])
        for part in key.split("."):
            owner = getattr(owner, part)
