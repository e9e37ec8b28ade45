"""A study's results as JSON, and the page whose tables are made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(document: dict[str, Any], path: Path) -> None:
    """JSON with one line per setting and per run; ``runs`` is the document's last entry."""
    head = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in document.items()]
    runs = ",\n".join(json.dumps(run) for run in document["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join([*head[:-1], f'"runs": [\n{runs}\n]']) + "\n}\n", "utf-8")


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table into its block, between <!-- name --> and <!-- end name -->.

    Raises:
        ValueError: a table without a block, or with two.
    """
    text = page.read_text("utf-8")
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        escaped = table.replace("\\", r"\\")
        text, count = re.subn(pattern, rf"\g<1>{escaped}\n\g<2>", text, flags=re.S)
        if count != 1:
            raise ValueError(f"{page}: expected one block {name!r}, found {count}")
    page.write_text(text, "utf-8")
