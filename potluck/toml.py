"""Values as TOML writes them; nothing that reads TOML writes it."""

from __future__ import annotations

import json


def toml_value(value: object) -> str:
    """A text, number, boolean, or list of them. JSON's are TOML's, but for DEL, which TOML takes only escaped."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    return json.dumps(value)
