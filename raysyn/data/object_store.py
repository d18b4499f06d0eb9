"""S3 for `Storage`: how a file system is opened, which faults pass by themselves, and which the user can mend."""

from __future__ import annotations

import functools
import os
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import pyarrow.fs as pafs

from raysyn.types import UserError

_FAULTS = {  # what pyarrow's message says -> what the user reads
    "NO_SUCH_BUCKET": "there is no such bucket; create it or correct storage=",
    "ACCESS_DENIED": "access denied; check the credentials and what they may do",
    "INVALID_ACCESS_KEY_ID": "the access key is unknown there; check the credentials",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong; check the credentials",
    "STORAGEFULL": "no space left there; free some or choose another storage=",
}

_PASSING = (
    "INTERNAL_FAILURE",
    "SLOW_DOWN",
    "SERVICE_UNAVAILABLE",
    "THROTTLING",
    "REQUEST_TIMEOUT",
    "NETWORK_CONNECTION",
)


def open_s3(query: str) -> Any:
    """The `pyarrow.fs.S3FileSystem` of a URI's query and the environment's AWS_* variables, opened once a process."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    return _filesystem(query, endpoint, region)


@functools.lru_cache(maxsize=16)
def _filesystem(query: str, endpoint: str, region: str) -> Any:
    given = {key: values[-1] for key, values in urllib.parse.parse_qs(query).items()}
    unknown = sorted(set(given) - {"endpoint_override", "scheme", "region"})
    if unknown:
        raise UserError(f"storage: {unknown[0]}: not known in an s3:// URI; endpoint_override, scheme and region are")
    endpoint = given.get("endpoint_override", endpoint)
    scheme, separator, host = endpoint.rpartition("://")
    options: dict[str, Any] = {"scheme": given.get("scheme") or (scheme if separator else "https")}
    if endpoint:
        options["endpoint_override"] = host.rstrip("/")
    region = given.get("region", region) or ("us-east-1" if endpoint else "")
    if region:
        options["region"] = region
    return pafs.S3FileSystem(
        **options,
        connect_timeout=10,
        request_timeout=120,
        allow_delayed_open=True,  # what fits into one part is one put
        background_writes=False,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=8),
    )


def retried(read: Callable[[], bytes]) -> bytes:
    """`read()` again after a passing fault of the object store, at most 6 times over some 6 s.

    The SDK below pyarrow retries by itself, but not a GET whose error body is longer than the object: pyarrow gives it
    a buffer of the object's size, and the overflow comes up as INTERNAL_FAILURE.
    """
    for pause in (0.2, 0.4, 0.8, 1.6, 3.2):
        try:
            return read()
        except OSError as error:
            if "AWS Error" not in str(error) or not any(fault in str(error) for fault in _PASSING):
                raise
            time.sleep(pause)
    return read()


def unchanged(read: Callable[[], bytes], size: Callable[[], int]) -> bytes:
    """`read()` of an object, again, 5 times at most, if it was put anew with another size meanwhile.

    pyarrow asks for the size, then for so many bytes, and gives that many whatever came: of a longer object the
    beginning, of a shorter one all of it and then what was in its buffer. Raises OSError if the object never holds still.
    """
    for _ in range(5):
        data = read()
        if len(data) == size():
            return data
    raise OSError("the object is put anew each time that it is read; is another run at work there?")


def explain_fault(message: str) -> str | None:
    """What the user can do about a fault that pyarrow reports with `message`; None where it is not theirs."""
    words = message.upper().replace(" ", "_")
    return next((said for key, said in _FAULTS.items() if key in words), None)
