"""Values as JSON and YAML have them, without credentials: what manifests and saved settings hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

CREDENTIAL = re.compile(r"(^|_)(token|password|secret|api_key)$")  # of a field's name
_URL_LOGIN = re.compile(r"://[^/\s@]+@")


def plain(value: Any) -> Any:
    """``value`` in mappings, lists, strings, numbers, booleans and None; mappings lose their credentials."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items() if not is_credential(k)}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def is_credential(name: Any) -> bool:
    """Whether a field of that name holds a credential, by its name."""
    return isinstance(name, str) and CREDENTIAL.search(name) is not None


def without_logins(text: str) -> str:
    """``text`` in which no URL has a user or password."""
    return _URL_LOGIN.sub("://", text)
