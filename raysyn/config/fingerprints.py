"""A config as plain containers, and the name of what it gives."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass config as plain containers."""
    return dataclasses.asdict(config)


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name a result: sha256 of the canonical JSON of `parts` (dataclasses, containers, strings)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=to_dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
