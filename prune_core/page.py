"""Reports as pages to look at, which share one frame and one style."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from prune_core.storage import StrPath, atomic_write

_HERE = Path(__file__).parent


def write_page(path: StrPath, template: Path, **values: Any) -> None:
    """Write one self-contained page, of a template that extends `page.html.j2` and what it shows.

    A `report.css` beside the template is added to `page.css`.   values: of the template, `title`
    among them.
    The page loads nothing from anywhere, runs no script, and appears only when it is complete.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    sheets = (_HERE / "page.css", template.with_name("report.css"))
    css = "".join(sheet.read_text(encoding="utf-8") for sheet in sheets if sheet.exists())
    environment = Environment(
        loader=FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template.name).generate(
        **values,
        style=Markup(css),
        style_hash=f"sha256-{b64encode(sha256(css.encode()).digest()).decode()}",
    )
    with atomic_write(path, "wb") as file:
        # What was read from JSON may hold lone surrogates, which are no characters.
        file.writelines(part.encode("utf-8", "replace") for part in page)
