"""Figures in a page, between two marks."""

from __future__ import annotations

import re
from pathlib import Path


def insert(page: Path, name: str, text: str) -> None:
    """Replace what is between the two marks of a name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    changed, count = re.subn(
        f"{begin}.*?{end}",
        lambda _: f"{begin}\n\n{text}\n\n{end}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{page} needs the marks {begin} and {end}, once")
    page.write_text(changed)
