"""The data card of a synthetic frame set: README.md in the hub's form, with a sample grid beside it."""

from __future__ import annotations

import io
from typing import Any

from raysyn.cluster.sampler_actor import SynthesisSpec
from raysyn.cluster.stage import StageDir
from raysyn.data.frames import read_arrays


def write_card(stage: StageDir, spec: SynthesisSpec, manifest: dict[str, Any]) -> None:
    """Write README.md and samples.png of the data set that `manifest` describes."""
    from raysyn.report.grids import sample_grid

    split = next(s for s in spec.plan.masks if spec.plan.num_requests(s))
    picture = io.BytesIO()
    sample_grid(read_arrays(stage.path, split, limit=8), count=8).save(picture, format="PNG")
    stage.storage.write_atomic("samples.png", picture.getvalue())
    files = "\n".join(
        f"      - split: {s}\n        path: {s}/*.parquet" for s in spec.plan.masks if spec.plan.num_requests(s)
    )
    card = f"""---
license: apache-2.0
tags: [echocardiography, synthetic]
configs:
  - config_name: default
    data_files:
{files}
---
# {manifest["num_frames"]} synthetic echocardiogram frames by {spec.model}

![frames with the label maps that they were drawn from](samples.png)

Drawn with {spec.solver}, {spec.num_steps} steps ({spec.num_function_evals} network evaluations) from warped label maps
of {", ".join(spec.plan.masks)} patients; a frame inherits patient and split of its mask. Checkpoint sha256
`{spec.settings["checkpoint_sha256"]}`. Each row holds the image, the label map that it was drawn from (0 outside the
sector, 1 LV cavity, 2 other tissue, 3 LV myocardium, 4 left atrium) and what determines it, seeds included.

For training models, research only: the frames show no patient and are not for diagnosis.

```python
datasets.load_dataset("parquet", data_files={{"train": "train/*.parquet"}})
```
"""
    stage.storage.write_atomic("README.md", card.encode())
