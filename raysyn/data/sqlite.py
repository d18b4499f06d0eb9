"""SQLite databases by the URLs that MLflow and Optuna hand to SQLAlchemy, which decodes the path in them."""

from __future__ import annotations

import urllib.parse
from pathlib import Path

PREFIX = "sqlite:///"


def sqlite_url(file: str | Path) -> str:
    """The URL of a database file; only what would end the path or be decoded there is encoded."""
    return PREFIX + str(file).replace("%", "%25").replace("?", "%3F")


def sqlite_file(url: str) -> Path | None:
    """The file of a database's URL; None for another kind of database."""
    return Path(urllib.parse.unquote(url.removeprefix(PREFIX))) if url.startswith(PREFIX) else None
