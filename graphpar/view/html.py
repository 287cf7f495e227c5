"""One HTML page that needs nothing else: no network, no other file, no script but its own.

Its content-security policy allows the page's own style and script by their hash and nothing more.
Names come from models and clusters and may be anything: they travel as JSON whose special
characters are escaped, and the script shows them as text only.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from graphpar.plans.diff import PlanDiff
from graphpar.view.detail import ViewDetail, pack_detail
from graphpar.view.model import ViewData
from graphpar.view.packed import pack
from graphpar.view.palette import (
    ACTION_COLOURS,
    ACTION_NAMES,
    DARK_TEXT,
    LIGHT_TEXT,
    OKABE_ITO,
    text_on,
)

_TEMPLATES = Path(__file__).with_name("templates")
_SCRIPTS = (
    "base.js",
    "overview.js",
    "model.js",
    "lanes.js",
    "timeline.js",
    "memory.js",
    "why.js",
    "errors.js",
    "certificate.js",
    "compare.js",
    "main.js",
)
_PLACE = re.compile(r"@@([a-z]+)@@")
_PACKED = ("predicted", "measured", "routes")
_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


def render_html(
    view: ViewData,
    other: ViewData | None = None,
    diff: PlanDiff | None = None,
    detail: ViewDetail | None = None,
) -> bytes:
    """The page of a plan; with `other` and the difference between them, also a comparison.

    With `detail` the blocks of the model open down to their operations.
    """
    packed, left_out = pack_detail(detail) if detail is not None else (None, 0)
    style = _template("page.css")
    body = "\n".join(_template(name) for name in _SCRIPTS)
    script = f'"use strict";\n(() => {{\n{body}}})();\n'
    data = {
        "plans": [_plan_data(v) for v in (view, other) if v is not None],
        "diff": diff,
        "detail": packed,
        "left_out_ops": left_out,
        "palette": {
            "actions": {
                kind: {"name": ACTION_NAMES[kind], "fill": fill, "text": text_on(fill)}
                for kind, fill in ACTION_COLOURS.items()
            },
            "stages": [{"fill": fill, "text": text_on(fill)} for fill in OKABE_ITO],
            "dark": DARK_TEXT,
            "light": LIGHT_TEXT,
        },
    }
    return _filled(
        _template("page.html"),
        {
            "policy": _policy(script, style),
            "title": escape(view.headline),
            "style": style,
            "data": script_json(data),
            "script": script,
        },
    ).encode()


def script_json(data: object) -> str:
    """JSON that may stand in a script element: no character of it can end the element.

    >>> script_json({"name": "</script>"})
    '{"name":"\\\\u003c/script\\\\u003e"}'
    """
    text = msgspec.json.encode(data).decode()
    return re.sub("[<>&\u2028\u2029]", lambda match: _ESCAPES[match[0]], text)


def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """All places filled in one pass, so that nothing filled in is searched for places again."""
    return _PLACE.sub(lambda match: parts[match[1]], template)


def _policy(script: str, style: str) -> str:
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    """The source expression of an inline element, https://www.w3.org/TR/CSP3/#grammardef-hash-source."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _plan_data(view: ViewData) -> dict[str, Any]:
    plain = {f.name: getattr(view, f.name) for f in fields(view) if f.name not in _PACKED}
    stages = [device.stages for device in view.devices]
    plain["predicted"] = pack(view.predicted, stages)
    plain["measured"] = pack(view.measured, stages) if view.measured is not None else None
    plain["headline"] = view.headline
    plain["splits_backward"] = view.splits_backward
    return plain
