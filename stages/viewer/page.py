"""The page as one file: its scripts, styles and data in one HTML text that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from cache.plain import plain

STATIC = Path(__file__).resolve().parent / "static"
_STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
_SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')
_MARKS = re.compile(r'content="CSP"|>TITLE<|>DATA<')
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render(data: dict[str, Any]) -> str:
    """The page that shows `data` (`gather.page_data`). Only its own scripts may run, by their hashes."""
    scripts: list[str] = []

    def script(found: re.Match[str]) -> str:
        scripts.append((STATIC / found[1]).read_text(encoding="utf-8"))
        return f"<script>{scripts[-1]}</script>"

    def style(found: re.Match[str]) -> str:
        return f"<style>{(STATIC / found[1]).read_text(encoding='utf-8')}</style>"

    names = plain(", ".join(run["name"] for run in data["runs"]))
    start, rest = (STATIC / "page.html").read_text(encoding="utf-8").split(">DATA<")
    start, rest = (_SCRIPT.sub(script, _STYLE.sub(style, part)) for part in (start, rest))
    policy = html.escape(policy_of(scripts, bool(data["serve"])))
    known = {'content="CSP"': f'content="{policy}"', ">TITLE<": f">{html.escape(f'DualKL · {names}')}<"}
    return f"{_MARKS.sub(lambda found: known[found[0]], start)}>{embedded(data)}<{rest}"


def policy_of(scripts: list[str], serve: bool) -> str:
    """The page's Content-Security-Policy: no request, in serve mode to its own server alone."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    sources = " ".join(f"'sha256-{digest}'" for digest in hashes)
    connect = "; connect-src 'self'" if serve else ""
    return f"{_POLICY}; script-src {sources}{connect}"


def embedded(data: dict[str, Any]) -> str:
    """JSON that ends no script element: model text may hold `</script>`, `<!--` and line separators."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
