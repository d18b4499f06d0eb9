"""One page that holds the study: no network, no frameworks, pictures inside it. It opens from a file as it is."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysyn.report.table import (
    COLUMNS,
    HEADINGS,
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    Row,
    best_rows,
    display_cell,
    full_columns,
    interval_text,
    number,
    row_kind,
    row_name,
)

STYLE = """
:root { --ink:#1d2430; --soft:#5d6675; --line:#e2e6ec; --paper:#ffffff; --wash:#f6f8fa; --accent:#0072b2; }
* { box-sizing:border-box }
body { margin:0; background:var(--wash); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif }
main { max-width:1280px; margin:0 auto; padding:28px 20px 60px }
h1 { font-size:26px; margin:0 0 2px } h2 { font-size:18px; margin:0 0 12px }
.lead { color:var(--soft); margin:0 0 22px }
section { background:var(--paper); border:1px solid var(--line); border-radius:8px; padding:20px; margin:0 0 18px }
.scroll { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:13.5px; font-variant-numeric:tabular-nums }
th,td { padding:6px 7px; border-bottom:1px solid var(--line); text-align:right; white-space:nowrap }
th { color:var(--soft); font-weight:600; cursor:pointer; user-select:none; vertical-align:bottom }
th:hover { color:var(--accent) } th.up::after { content:" \\25B2" } th.down::after { content:" \\25BC" }
.text { text-align:left } td small { display:block; color:var(--soft); font-size:11px; font-weight:400 }
td.best { font-weight:700; color:var(--accent) }
tr.ceiling td { background:#f1f6ea } tr.control td { color:var(--soft) }
figure { margin:0 0 22px } figure:last-child { margin-bottom:0 } img { max-width:100%; height:auto; display:block }
figcaption { color:var(--soft); font-size:13px; margin-top:6px } figcaption b { color:var(--ink) }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(460px,1fr)); gap:22px; align-items:start }
dl { display:grid; grid-template-columns:max-content 1fr; gap:4px 18px; margin:0; font-size:13.5px }
dt { color:var(--soft) } dd { margin:0; overflow-wrap:anywhere } code { font-size:12.5px }
.failed { border-color:#d8a08f; background:#fff7f4 } .failed li { margin:4px 0 } .none { color:var(--soft); margin:0 }
details summary { cursor:pointer; color:var(--accent) }
"""
# Sorting by a click on a heading: numbers by value, texts by text, empty cells last either way.
SCRIPT = """
document.querySelectorAll('table.sortable th').forEach(function (th, column) {
  th.addEventListener('click', function () {
    var table = th.closest('table'), body = table.tBodies[0];
    var at = Array.prototype.indexOf.call(th.parentNode.children, th);
    var down = !th.classList.contains('down');
    table.querySelectorAll('th').forEach(function (other) { other.classList.remove('up', 'down'); });
    th.classList.add(down ? 'down' : 'up');
    var value = function (row) { return row.cells[at].dataset.value; };
    Array.from(body.rows).sort(function (a, b) {
      var x = value(a), y = value(b);
      if (x === '' || y === '') return (x === '') - (y === '');
      var order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""


def page_html(
    title: str,
    lead: str,
    rows: Sequence[Row],
    figures: Sequence[tuple[Path, str, str]],
    pictures: Sequence[tuple[Path, str]],
    failures: Mapping[str, str],
    info: Mapping[str, Any],
) -> str:
    """The page. `figures` are (png, title, caption), `pictures` (png, caption), `info` what was measured and where."""
    failed = _section("Failures", _failures(failures), "failed" if failures else "")
    sections = [failed] if failures else []
    sections.append(_section("Results", _table(rows, COLUMNS) + _everything(rows)))
    if against := _against_ceiling(rows):
        sections.append(_section("Against the ceiling, patient by patient", against))
    if figures:
        drawn = "".join(_figure(path, f"<b>{_text(name)}.</b> {_text(caption)}") for path, name, caption in figures)
        sections.append(_section("Figures", f'<div class="pair">{drawn}</div>'))
    if pictures:
        sections.append(
            _section("Frames", "".join(_figure(path, _text(caption), photo=True) for path, caption in pictures))
        )
    sections += [] if failures else [failed]
    sections.append(_section("What was measured, and where", _info(info)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{_text(title)}</h1><p class="lead">{_text(lead)}</p>{"".join(sections)}</main>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(heading: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{heading}</h2>{body}</section>'


def _table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    texts = {"trained_on", "model", "space", "solver"}
    best = {column: best_rows(rows, column) for column in columns}
    heads = "".join(
        f'<th class="{"text" if c in texts else ""}" title="{_text(c)}">{_text(HEADINGS.get(c, c))}</th>'
        for c in columns
    )
    body = []
    for i, row in enumerate(rows):
        cells = []
        for column in columns:
            kind = "text" if column in texts else "best" if i in best[column] else ""
            interval = interval_text(row, column) if column in HIGHER_IS_BETTER else ""
            cells.append(
                f'<td class="{kind}" data-value="{_text(_sort_value(row, column))}">{_text(_shown(row, column))}'
                f"{f'<small>{interval}</small>' if interval else ''}</td>"
            )
        body.append(f'<tr class="{row_kind(row)}">{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _sort_value(row: Row, column: str) -> str:
    value = number(row, column)
    text = row.get(column)
    return repr(value) if value is not None else text if isinstance(text, str) else ""


def _shown(row: Row, column: str) -> str:
    value = number(row, column)
    if value is None or column in HIGHER_IS_BETTER or column in LOWER_IS_BETTER or isinstance(row.get(column), int):
        return display_cell(row, column)
    return f"{value:.4g}"


def _everything(rows: Sequence[Row]) -> str:
    further = [c for c in full_columns(rows) if c not in COLUMNS and not c.endswith(("_low", "_high"))]
    if not further:
        return ""
    columns = ["model", "solver", "num_steps", *further]
    return f"<details><summary>every measure ({len(further)} more)</summary>{_table(rows, columns)}</details>"


def _against_ceiling(rows: Sequence[Row]) -> str:
    """A table of the paired differences; nothing where no row has one."""
    heads = {"mean_dice": "mean Dice", "view_accuracy": "view accuracy"}
    lines = []
    for row in rows:
        texts = [_difference(row, f"task/{score}_less_ceiling") for score in heads]
        if any(texts):
            cells = "".join(f"<td>{text or '–'}</td>" for text in texts)
            lines.append(f'<tr class="{row_kind(row)}"><td class="text">{_text(row_name(row))}</td>{cells}</tr>')
    if not lines:
        return ""
    ceiling = next((str(r["trained_on"]) for r in rows if row_kind(r) == "ceiling"), "real")
    note = (
        f"The score of a set less that of {ceiling} frames on the same test frames, with the 95 % interval over the test "
        "patients. An interval that holds 0: these patients do not tell the two apart, which is no proof that they are "
        "equal; how far apart they may be is what the interval says. Another training is not in it."
    )
    head = "".join(f"<th>{text}</th>" for text in heads.values())
    table = (
        f'<table><thead><tr><th class="text">trained on</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )
    return f'<p class="none">{_text(note)}</p><div class="scroll">{table}</div>'


def _difference(row: Row, key: str) -> str:
    value, low, high = (number(row, key + end) for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return f"{value:+.3f}" + ("" if low is None or high is None else f"<small>{low:+.3f} to {high:+.3f}</small>")


def _figure(path: Path, caption: str, photo: bool = False) -> str:
    data = base64.b64encode(_as_jpeg(path) if photo else path.read_bytes()).decode()
    kind = "jpeg" if photo else "png"
    image = f'<img alt="{_text(path.stem)}" src="data:image/{kind};base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _as_jpeg(path: Path) -> bytes:
    """Pictures of frames go into the page as JPEG, a fifth of their size; the PNG files lie beside it."""
    import io

    from PIL import Image

    out = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(out, "JPEG", quality=88, subsampling=0)
    return out.getvalue()


def _failures(failures: Mapping[str, str]) -> str:
    if not failures:
        return '<p class="none">None: every stage of the study finished.</p>'
    lines = "".join(f"<li><code>{_text(key)}</code>: {_text(line)}</li>" for key, line in failures.items())
    return f"<ul>{lines}</ul>"


def _info(info: Mapping[str, Any]) -> str:
    lines = []
    for key, value in info.items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        lines.append(f"<dt>{_text(str(key).replace('_', ' '))}</dt><dd>{_text(shown)}</dd>")
    return f"<dl>{''.join(lines)}</dl>"
