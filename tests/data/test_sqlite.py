from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from raysyn.data.sqlite import sqlite_file, sqlite_url


@pytest.mark.parametrize("path", ["/runs/a.db", "/a%20b/c?d#e/ü +&=.db", "/100%/%25.db", "a.db"])
def test_a_path_is_the_same_to_whoever_opens_it(path: str) -> None:
    url = sqlite_url(path)
    assert make_url(url).database == path
    assert not make_url(url).query
    assert sqlite_file(url) == Path(path)


def test_a_plain_path_is_spelled_as_usual_and_another_database_is_no_file() -> None:
    assert sqlite_url("/runs/mlflow.db") == "sqlite:////runs/mlflow.db"
    assert sqlite_file("postgresql://host/base") is None
