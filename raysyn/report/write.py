"""Everything a study leaves for people: tables, figures, pictures and the page, in one folder."""

from __future__ import annotations

import datetime
import io
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from raysyn.report.figures import (
    FigureOf,
    cost_bars,
    cost_figure,
    curve_figure,
    realism_figure,
    save_figure,
    trials_figure,
)
from raysyn.report.grids import colour_key, hero_picture, sample_grid
from raysyn.report.html import page_html
from raysyn.report.table import Row, frechet_keys, number, row_kind, write_tables
from raysyn.types import FrameArrays

COST_PARTS = {
    "cost/autoencoder_{}_seconds": "autoencoder",
    "cost/fit_{}_seconds": "diffusion model",
    "cost/sample_{}_seconds": "sampling",
    "cost/decode_{}_seconds": "decoding",
    "cost/rejected_{}_seconds": "rejected attempts",
}
CURVES = {
    "learning": ("Learning curves", "images seen", "validation loss of the averaged weights", False),
    "num_synthetic": ("Dice against the number of synthetic frames", "synthetic frames", "mean Dice", True),
    "real_fraction": ("Dice against the share of {} frames", "share of {} frames", "mean Dice", False),
}
CURVE_CAPTIONS = {
    "learning": "Compare a curve with itself: losses in pixels and in latents, or weighted differently, share no scale.",
    "num_synthetic": "Random parts of each model's last set; one training a point, 95 % intervals over the test patients.",
    "real_fraction": "At 0 the synthetic set alone, at 1 the {} frames alone, between as many as both allow: their number "
    "differs from point to point. One training a point, 95 % intervals over the test patients.",
}
CONTROLS = {
    "control reconstruction": "training frames as the autoencoder gives them back, with their label maps",
    "control prior": "what the autoencoder makes of draws from its prior; no frame and no map went in but the sector",
}


@dataclass
class Samples:
    """What the pictures are made of.

    `source` is the set that masks came from (name, frames); `sets` maps a name to (a part of) its synthetic frames;
    `pairs` maps a name to the picture (PNG bytes) of its frames most like a training frame, `grids.worst_pairs`'.
    """

    source: tuple[str, FrameArrays] | None = None
    sets: Mapping[str, FrameArrays] = field(default_factory=dict)
    pairs: Mapping[str, bytes] = field(default_factory=dict)


def write_report(
    folder: str | Path,
    rows: Sequence[Row],
    *,
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    trials: Sequence[Mapping[str, Any]] = (),
    samples: Samples | None = None,
    failures: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
    title: str = "Synthetic echocardiograms: cost, realism, task performance",
) -> list[Path]:
    """Write the whole report into a local `folder`; `index.html` holds everything and is written last.

    `curves` maps a name of `CURVES` to points {series, x, y, low?, high?}, `trials` are a search's {score, cost,
    complete}. `failures` maps a stage to its error line.
    Returns every file written, index.html first.
    """
    folder = Path(folder)
    written = write_tables(folder, rows)
    figures = []
    for made in study_figures(rows, curves or {}, trials):
        picture, numbers = save_figure(made, folder / "figures")
        figures.append((picture, made.title, made.caption))
        written += [picture, numbers]
    pictures = write_pictures(folder / "pictures", samples or Samples())
    written += [path for path, _ in pictures]
    facts = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "machine": machine()}
    lead = f"{len(rows)} training sets, each tested on the same held-out frames. " + _legend_line(rows)
    page = page_html(title, lead, rows, figures, pictures, failures or {}, {**facts, **(info or {})})
    index = folder / "index.html"
    index.write_text(page, encoding="utf-8")
    return [index, *written]


def publish(folder: str | Path, storage_uri: str) -> None:
    """Copy a report from a local folder to a storage place (`s3://...`), the page last."""
    from raysyn.data.storage import Storage

    folder = Path(folder)
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name == "index.html")
    for path in files:
        place = Storage.at(storage_uri).join(*path.relative_to(folder).parts[:-1])
        place.write_atomic(path.name, path.read_bytes())


def _legend_line(rows: Sequence[Row]) -> str:
    scores = "LV endo, LV epi and LA are Dice, view is the accuracy of telling 2CH from 4CH"
    spread = ", with 95 % intervals over the test patients (what another training would give is not in them)"
    interval = spread if any(number(r, "mean_dice_low") is not None for r in rows) else ""
    best = "the best generated set of a column by value alone in blue"
    return f"{scores}{interval}; {best}. For research only, not for diagnosis."


def study_figures(
    rows: Sequence[Row], curves: Mapping[str, Sequence[Mapping[str, Any]]], trials: Sequence[Mapping[str, Any]] = ()
) -> list[FigureOf]:
    """Every figure that the rows, curves and trials have the numbers for."""
    device = "gpu" if any(number(r, "cost/fit_gpu_seconds") for r in rows) else "cpu"
    parts = {key.format(device): label for key, label in COST_PARTS.items()}
    unit = f"{device.upper()}-seconds"
    made = [
        cost_figure(rows, "seconds_per_image", "Sampling cost (seconds an image)", "cost_dice"),
        *(realism_figure(rows, key, num_measures=len(frechet_keys(rows))) for key in frechet_keys(rows)),
        cost_figure(rows, f"cost/total_{device}_seconds", f"Whole cost of a set ({unit})", "total_cost_dice"),
        cost_bars(rows, parts, unit),
    ]
    real = next((str(r["trained_on"]) for r in rows if row_kind(r) == "ceiling"), "real")
    for name, points in curves.items():
        heading, xlabel, ylabel, log_x = CURVES.get(name, (name, "x", "y", False))
        curve = curve_figure(name, heading.format(real), xlabel.format(real), ylabel, points, log_x)
        if curve is not None:
            curve.caption = CURVE_CAPTIONS.get(name, "").format(real)
        made.append(curve)
    made.append(trials_figure(trials))
    return [figure for figure in made if figure is not None]


def write_pictures(folder: Path, samples: Samples) -> list[tuple[Path, str]]:
    """Save the pictures of frames as PNG; (path, caption) of each."""
    made: list[tuple[Any, str, str]] = []
    if samples.source is not None and samples.sets:
        caption = "Frames that gave the masks, the masks after warping, and what each model made of them."
        made.append((hero_picture(*samples.source, _one_a_model(samples.sets)), "hero", caption))
    if samples.source is not None:
        name, frames = samples.source
        made.append((sample_grid(frames), _file_name(name), f"{name}: training frames with their label maps."))
    for name, frames in samples.sets.items():
        what = CONTROLS.get(name, "synthetic frames with the maps asked for")
        made.append((sample_grid(frames), _file_name(name), f"{name}: {what}."))
    for name, data in samples.pairs.items():
        caption = f"{name}: the synthetic frames most like a training frame, that frame below each, their correlation."
        made.append((Image.open(io.BytesIO(data)), f"{_file_name(name)}_nearest", caption))
    if made:
        made.insert(1, (colour_key(), "colours", "Colours of the label maps."))
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture, name, caption in made:
        path = folder / f"{name}.png"
        picture.save(path, optimize=True)
        written.append((path, caption))
    return written


def _one_a_model(sets: Mapping[str, FrameArrays]) -> dict[str, FrameArrays]:
    """The last set of each model (a set is named model solver steps), controls left out unless there is nothing else."""
    chosen = {name.split()[0]: name for name in sets if not name.startswith("control")}
    return {name: sets[name] for name in chosen.values()} or dict(sets)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def machine() -> str:
    """The machine in words: processor, cores, whether it multiplies in bf16, and graphics cards that the driver names."""
    from raysyn.nets.precision import computes_in

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = named[0].partition(":")[2].strip() if named else name
    cards = _graphics_cards()
    name += f", {len(os.sched_getaffinity(0))} cores, {'bf16' if computes_in('bf16', 'cpu') else 'no bf16'}"
    return f"{name}, {cards}" if cards else name


def _graphics_cards() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ""  # no driver: no card
    try:
        names = [
            pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())
        ]
    finally:
        pynvml.nvmlShutdown()
    return ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))
