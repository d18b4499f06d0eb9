"""Put a finished study's table and picture into README, between the markers of its block.

`python -m benchmarks.readme_demo demo runs/demo "note on the run"`, and `all runs/demo_all` for that of the six models.
"""

from __future__ import annotations

import csv
import datetime
import shutil
import sys
from pathlib import Path

from raysyn.report.table import table_csv
from raysyn.report.write import machine

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {
    "trained_on": "trained on",
    "model": "model",
    "solver": "solver",
    "num_function_evals": "evaluations",
    "seconds_per_image": "s/image",
    "fd_lite0": "FD lite0",
    "lv_endo_dice": "LV endo",
    "lv_epi_dice": "LV epi",
    "la_dice": "LA",
    "mean_dice": "mean Dice",
    "view_accuracy": "view accuracy",
}
COLUMNS = (
    "FD lite0 is the Fréchet distance to their frames in EfficientNet-Lite0's features; evaluations are those of the "
    "network that an image takes."
)
LESS_CEILING = [
    *("trained_on", "model", "solver", "num_steps"),
    *(f"task/{score}_less_ceiling{end}" for score in ("mean_dice", "view_accuracy") for end in ("", "_low", "_high")),
]


def table(path: Path) -> str:
    """The CSV as a Markdown table."""
    rows = [[_cell(row[c]) for c in SHOWN] for row in csv.DictReader(path.open())]
    lines = [list(SHOWN.values()), ["---"] * len(SHOWN), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    return text if value == int(value) and "." not in text else f"{value:.3f}" if value < 10 else f"{value:.0f}"


def main(block: str, folder: str, note: str) -> None:
    """Rewrite the part of README between the block's markers, and keep the CSV and the picture with it."""
    report, kept = Path(folder) / "report", ROOT / "benchmarks" / "results"
    kept.mkdir(exist_ok=True)
    for name in ("table.csv", "controls.csv"):
        shutil.copy(report / name, kept / f"{block}_{name}")
    with (report / "table_full.csv").open() as file:
        (kept / f"{block}_less_ceiling.csv").write_text(table_csv(list(csv.DictReader(file)), LESS_CEILING))
    picture = f"benchmarks/pictures/{block}.png"
    shutil.copy(report / "pictures" / "hero.png", ROOT / picture)
    text = (
        f"{table(report / 'table.csv')}\n\nTested on held-out phantom patients; {COLUMNS} {machine()}, "
        f"{datetime.date.today().isoformat()}. {note}\n\n"
        f"![phantom frames, warped label maps, and what each model drew]({picture})"
    )
    readme = ROOT / "README.md"
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    before, _, rest = readme.read_text().partition(begin)
    readme.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
