"""report.json -> report.html: one file that opens from a disk, with its plots and sheets inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

from megaflux.evaluate import plots

STYLE = """body{font:14px/1.45 sans-serif;max-width:1100px;margin:24px auto;padding:0 16px;color:#222}
table{border-collapse:collapse;margin:8px 0 20px}td,th{border-bottom:1px solid #ddd;padding:3px 12px 3px 0;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%;border:1px solid #ccc}h2{margin-top:32px}
.note{color:#666}"""
SECTIONS = {
    "loss": "Loss by t",
    "pictures": "Variations",
    "held_out_cells": "Held-out cells",
    "held_out_contents": "Held-out contents",
    "words": "Words alone",
    "outside": "CLIP and DINO",
}


def page(report: Mapping[str, Any], sheets: Mapping[str, Tensor]) -> str:
    """The whole file. sheets: caption -> uint8 (3, H, W)."""
    parts = [f"<h1>{escape(report['checkpoint']['path'])}</h1>", _settings(report)]
    for name, title in SECTIONS.items():
        if section := report.get(name):
            other = report.get("against", {}).get(name)
            parts.append(f"<h2>{title}</h2>")
            parts.append(_plots(name, section, other))
            parts.append(_table(section, other, report.get("differences", {}).get(name)))
    for caption, sheet in sheets.items():
        parts.append(f"<h2>{escape(caption.split(':')[0])}</h2><p class=note>{escape(caption)}</p>{_image(sheet)}")
    body = "\n".join(parts)
    title = escape(f"Evaluation of {report['checkpoint']['path']}")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def leaves(section: Any, name: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """(dotted name, {"value", ...}) of every figure in a section."""
    if not isinstance(section, Mapping):
        return []
    if "value" in section:
        return [(name, section)]
    return [leaf for key, value in section.items() for leaf in leaves(value, f"{name}.{key}" if name else key)]


def _settings(report: Mapping[str, Any]) -> str:
    facts = {"checkpoint": report["checkpoint"], "data": report["data"], **report["settings"]}
    if "against" in report:
        facts["against"] = report["against"]["checkpoint"]
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(_short(v))}</td></tr>" for k, v in facts.items())
    return f"<details><summary>Settings, weights and data</summary><table>{rows}</table></details>"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_short(one)}" for key, one in value.items())
    return str(value)


def _plots(name: str, section: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    if name == "loss":
        drawn = []
        for times in ("ours", "mlperf"):
            rows = {k: v for k, v in section[times].items() if k != "t"}
            if other:
                rows |= {f"{k} (against)": v for k, v in other[times].items() if k in ("matched", "empty")}
            drawn.append(plots.lines(section[times]["t"], rows, f"t ({times})"))
        return "<p>" + " ".join(drawn) + "</p>"
    if name in ("held_out_cells", "held_out_contents", "words"):
        return f"<p>{plots.bars(dict(leaves(section)))}</p>"
    return ""


def _table(section: Mapping[str, Any], other: Mapping[str, Any] | None, differences: Mapping[str, Any] | None) -> str:
    others, changes = dict(leaves(other)), dict(leaves(differences))
    head = ["", "value", "95% interval", "n"] + (
        ["against", "its interval", "difference", "its interval"] if other else []
    )
    rows = ["".join(f"<th>{cell}</th>" for cell in head)]
    for name, figure in leaves(section):
        cells = [*_cells(figure), str(figure.get("n", ""))]
        if other:
            cells += [*_cells(others.get(name, {})), *_cells(changes.get(name, {}))]
        rows.append(f"<td>{escape(name)}</td>" + "".join(f"<td class=n>{cell}</td>" for cell in cells))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _cells(figure: Mapping[str, Any]) -> Sequence[str]:
    value, interval = figure.get("value"), figure.get("interval")
    return (
        "" if value is None else f"{value:.4g}",
        "" if interval is None else f"{interval[0]:.4g} .. {interval[1]:.4g}",
    )


def _image(picture: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
