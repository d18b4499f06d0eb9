"""A database made once a file; warnings heard."""

import logging

import pytest

from raysyn.tracking import tracking_uri
from raysyn.tracking.places import open_client
from tests.tracking.runs import ON


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("runs") / "study")
    open_client(tracking_uri(ON, folder))
    return folder


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="raysyn.tracking")
