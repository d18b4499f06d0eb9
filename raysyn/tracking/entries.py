"""What MLflow takes: flat params with short texts, names of few characters; and which of its errors are final."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from raysyn.types import UserError

MAX_KEY, MAX_VALUE = 250, 500


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested containers as MLflow params: dotted keys of at most 250 characters, texts of at most 500."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            value = {str(v.get("name", i) if isinstance(v, Mapping) else i): v for i, v in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        flat[safe_key(name)] = text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"
    return flat


def safe_key(name: str) -> str:
    """A name that MLflow takes: its characters only, at most 250; longer ones keep a hash of the whole at their end."""
    name = re.sub(r"[^\w\-./ :]", "_", name, flags=re.ASCII)
    if len(name) <= MAX_KEY:
        return name
    return f"{name[: MAX_KEY - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def first_line(error: BaseException) -> str:
    """An error as one short line for a log."""
    text = str(error).strip().split("\n")[0]
    if "Max retries exceeded" in text or "Connection refused" in text:
        return "no answer"
    return f"{type(error).__name__}: {text}"[:200]


def is_final(error: Exception) -> bool:
    """Trying again cannot help: a request that the server refuses (HTTP 4xx), a missing file, a wrong type."""
    status = getattr(error, "get_http_status_code", None)
    if status is not None:
        code = int(status())
        return 400 <= code < 500 and code not in (408, 429)
    return isinstance(error, (FileNotFoundError, PermissionError, TypeError, ValueError, UserError))
