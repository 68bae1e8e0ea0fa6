"""Reports as pages to look at."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from prune_core.storage import StrPath, atomic_write


def write_page(path: StrPath, template: str, **values: Any) -> None:
    """Write one self-contained page, of a template beside this file and what it shows.

    It loads nothing from anywhere, runs no script, and appears only when it is complete.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, text = (
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("report.css", template)
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(text).generate(
        **values,
        style=Markup(style),
        style_hash=f"sha256-{b64encode(sha256(style.encode()).digest()).decode()}",
    )
    with atomic_write(path) as file:
        file.writelines(page)
