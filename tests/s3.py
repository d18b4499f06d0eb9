"""An S3 server on loopback, in a thread of the test's process. Its keys are whatever the environment holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """host:port of a server without a bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@contextlib.contextmanager
def s3_storage() -> Iterator[str]:
    """The URI of a storage in a bucket on a server of its own; for the block the keys are set."""
    import boto3

    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for key, value in KEYS.items():
            patch.setenv(key, value)
        boto3.client("s3", endpoint_url=f"http://{server}", region_name="us-east-1").create_bucket(Bucket="runs")
        yield f"s3://runs/a?scheme=http&endpoint_override={server}&region=us-east-1"
