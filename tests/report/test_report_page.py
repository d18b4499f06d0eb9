"""The page, on rows made up for it."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from raysyn.report import Samples, publish, write_report
from raysyn.report.grids import (
    worst_pairs,
)
from tests.report.studies import frames, study


class Page(HTMLParser):
    """What a page refers to outside itself, and its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.images = 0
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        for key, value in attrs:
            if key in ("src", "href", "action", "data") and not (value or "").startswith("data:"):
                self.outside.append(value)
        self.images += tag == "img"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_whole_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    source = frames(9)
    synthetic = frames(9, "synthetic", source.frame_id, shift=1)
    pairs = io.BytesIO()
    worst_pairs(synthetic.image_u8, source.image_u8, np.linspace(0, 1, 9)).save(pairs, format="PNG")
    trials = [{"score": 0.1 * i, "cost": 5.0 - i, "complete": i != 2, "params": {"lr": 0.1}} for i in range(4)]
    written = write_report(
        tmp_path / "report",
        study(),
        curves={"learning": [{"series": "edm", "x": i, "y": 1 / (i + 1)} for i in range(9)], "num_synthetic": []},
        samples=Samples(("phantom", source), {"edm_l128 heun 5": synthetic}, {"edm_l128 heun 5": pairs.getvalue()}),
        trials=trials,
        failures={"fit vp": "loss <is> not finite"},
        info={"fingerprints": {"compare": "ab12"}, "data": "phantom"},
    )
    assert all(path.is_file() for path in written)
    assert written[0].name == "index.html"
    text = written[0].read_text()
    page = Page(text)
    assert page.outside == []
    assert page.open == []
    assert not re.search(r"https?://|@import|url\(", text)
    names = {path.name for path in written}
    expected = {
        f"{n}.{e}"
        for n in ("cost_dice", "realism_dice", "total_cost_dice", "cost_bars", "learning", "trials")
        for e in ("png", "csv")
    }
    expected |= {
        "table.csv",
        "table_full.csv",
        "hero.png",
        "phantom.png",
        "edm_l128_heun_5.png",
        "edm_l128_heun_5_nearest.png",
    }
    assert expected | {"index.html", "colours.png"} == names
    assert page.images == sum(name.endswith(".png") for name in names)
    assert "loss &lt;is&gt; not finite" in text
    assert "ab12" in text
    assert "cores" in text
    assert "Compare a curve with itself" in text
    assert "intervals over the test patients (what another training would give is not in them)" in text
    first = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", text)[1])
    assert first == (tmp_path / "report" / "figures" / "cost_dice.png").read_bytes()


def test_a_study_without_generated_rows_still_has_its_page(tmp_path: Path) -> None:
    written = write_report(tmp_path, study()[:1])
    assert {path.name for path in written} == {"index.html", "table.csv", "table_full.csv"}
    assert "None: every stage of the study finished." in written[0].read_text()


def test_the_page_sets_each_set_against_the_ceiling(tmp_path: Path) -> None:
    rows = study()
    write_report(tmp_path, rows)
    assert "patient by patient" not in (tmp_path / "index.html").read_text()
    less = "task/mean_dice_less_ceiling"
    rows[1] |= {less: -0.0071, f"{less}_low": -0.009, f"{less}_high": -0.005, "task/view_accuracy_less_ceiling": 0.0}
    write_report(tmp_path, rows)
    page = (tmp_path / "index.html").read_text()
    assert "less that of phantom frames" in page
    cells = "<td>-0.007<small>-0.009 to -0.005</small></td><td>+0.000</td>"
    assert f'<td class="text">edm heun 5</td>{cells}</tr></tbody>' in page, "the one row that has a difference"


def test_a_report_is_published_to_storage(tmp_path: Path) -> None:
    write_report(tmp_path / "here", study())
    publish(tmp_path / "here", str(tmp_path / "there"))
    assert {p.relative_to(tmp_path / "here") for p in (tmp_path / "here").rglob("*.*")} == {
        p.relative_to(tmp_path / "there") for p in (tmp_path / "there").rglob("*.*")
    }
