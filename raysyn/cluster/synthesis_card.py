"""The data card of a synthetic frame set: README.md in the hub's form, with a sample grid beside it."""

from __future__ import annotations

import io
from typing import Any

from raysyn.cluster.sampler_actor import SynthesisSpec
from raysyn.cluster.stage import StageDir
from raysyn.data.frames import read_arrays


def write_card(stage: StageDir, spec: SynthesisSpec, manifest: dict[str, Any], data: str) -> None:
    """Write README.md and samples.png of the data set that `manifest` describes; `data` is where its masks are from."""
    from raysyn.report.grids import sample_grid

    splits = [s for s in spec.plan.masks if spec.plan.num_requests(s)]
    picture = io.BytesIO()
    sample_grid(read_arrays(stage.path, splits[0], limit=64), count=8).save(picture, format="PNG")
    stage.storage.write_atomic("samples.png", picture.getvalue())
    files = "\n".join(f"      - split: {s}\n        path: {s}/*.parquet" for s in splits)
    counts = ", ".join(f"{spec.plan.num_requests(s)} {s}" for s in splits)
    card = f"""---
license: {"apache-2.0" if data == "phantom" else "other"}
tags: [echocardiography, synthetic]
configs:
  - config_name: default
    data_files:
{files}
---
# {manifest["num_frames"]} synthetic echocardiogram frames by {spec.model}

![frames with the label maps that they were drawn from](samples.png)

Frames: {counts}. Drawn with {spec.solver}, {spec.num_steps} steps ({spec.num_function_evals} network evaluations) from
warped label maps of {", ".join(splits)} patients of `{data}`; a frame inherits patient and split of its mask. Checkpoint
sha256 `{spec.settings["checkpoint_sha256"]}`. Each row holds the image, the label map that it was drawn from (0 outside
the sector, 1 LV cavity, 2 other tissue, 3 LV myocardium, 4 left atrium) and what determines it, seeds included.
{_judged(spec, manifest)}
For training models, research only: the frames show no patient and are not for diagnosis.{_terms(data)}

```python
datasets.load_dataset("this folder")  # images decoded
pyarrow.dataset.dataset("{splits[0]}"), polars.read_parquet("{splits[0]}/*.parquet")
duckdb.sql("select view, count(*) from '*/*.parquet' group by view")
```
"""
    stage.storage.write_atomic("README.md", card.encode())


def _judged(spec: SynthesisSpec, manifest: dict[str, Any]) -> str:
    """What the quality gate did, as a paragraph; "" where nobody judged."""
    if not spec.config.segmenter_dir:
        return ""
    rejected, below = manifest["num_rejected"], manifest["below_min_faithfulness"]
    return (
        "\n`faithfulness` is the Dice of a real-trained segmenter's reading with the requested map. At a threshold of "
        f"{spec.config.min_faithfulness:g}, {rejected} images were drawn anew and {below} kept below it.\n"
    )


def _terms(data: str) -> str:
    if data == "phantom":
        return ""
    terms = f"The label maps were made from those of `{data}`, whose terms apply to them"
    return f"\n{terms}; the model may have seen its images."
