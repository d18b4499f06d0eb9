"""Storage on S3: one put, retries, parts refused, objects that came damaged."""

import gc
import http.client
import http.server
import io
import itertools
import os
import pickle
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from raysyn.data.frames import read_frames, write_frames
from raysyn.data.storage import TEMPORARY, Storage
from raysyn.types import Frame, UserError
from tests.s3 import KEYS, s3_server


class FlakyProxy(http.server.ThreadingHTTPServer):
    """Passes requests on to an S3 server, after answering 503 to the first `num_faults` of each (method, path).

    The part `refused_part` of an upload in parts is answered 403; the first `num_damaged` objects fetched come as zeros.
    `before` is called ahead of each request with its method and path.
    """

    daemon_threads = True
    refused_part = 0
    num_damaged = 0

    def __init__(self, target: str, num_faults: int) -> None:
        self.target, self.num_faults, self.seen = target, num_faults, Counter()
        self.before: Callable[[str, str], None] = lambda method, path: None
        super().__init__(("127.0.0.1", 0), FlakyHandler)


class FlakyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyProxy

    def answer(self) -> None:
        body = self.body()
        key = (self.command, self.path)
        self.server.seen[key] += 1
        self.server.before(*key)
        if f"partNumber={self.server.refused_part}&" in f"{self.path}&":
            self.reply(403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>", {})
            return
        if self.server.seen[key] <= self.server.num_faults:
            self.reply(503, b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>", {})
            return
        connection = http.client.HTTPConnection(self.server.target, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        data = response.read()
        if self.server.num_damaged and self.command == "GET" and response.status == 206:
            self.server.num_damaged -= 1
            data = bytes(len(data))
        self.reply(response.status, data, dict(response.getheaders()))

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        kept = {
            k: v for k, v in headers.items() if k.lower() not in ("connection", "transfer-encoding", "date", "server")
        }
        for key, value in ({"Content-Length": str(len(data))} | kept).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(server, monkeypatch):
    """An empty bucket on a loopback S3 server, reached through AWS_ENDPOINT_URL."""
    import boto3

    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    endpoint = f"http://{server}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="frames")
    yield client
    for item in client.list_objects_v2(Bucket="frames").get("Contents", []):
        client.delete_object(Bucket="frames", Key=item["Key"])
    client.delete_bucket(Bucket="frames")


@pytest.mark.s3
def test_s3_round_trip(s3) -> None:
    storage = Storage.at("s3://frames/runs/a")
    assert storage.list() == []
    assert not storage.exists("x.bin")
    storage.write_atomic("train/x.bin", b"12345")
    storage.write_json("manifest.json", {"a": 1})
    assert storage.list() == ["manifest.json", "train/x.bin"]
    assert storage.size("train/x.bin") == 5
    assert storage.read_json("manifest.json") == {"a": 1}
    assert pickle.loads(pickle.dumps(storage)).join("train").read_bytes("x.bin") == b"12345"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("absent")
    storage.remove("train/x.bin")
    storage.remove("train/x.bin")
    assert not storage.exists("train/x.bin")
    storage.remove_tree()
    storage.remove_tree()
    assert storage.list() == []
    assert storage.clean_temporaries() == []


@pytest.mark.s3
def test_s3_objects_are_one_put(s3, server) -> None:
    proxy = FlakyProxy(server, num_faults=0)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    uri = f"s3://frames/p?scheme=http&endpoint_override=127.0.0.1:{proxy.server_address[1]}"
    Storage.at(uri).write_atomic("shard.parquet", b"x" * 3_000_000)
    proxy.shutdown()
    assert [method for method, _ in proxy.seen] == ["PUT"]
    assert s3.head_object(Bucket="frames", Key="p/shard.parquet")["ContentLength"] == 3_000_000


@pytest.mark.s3
def test_s3_a_large_object_of_which_a_part_is_refused_is_not_there(s3, server) -> None:
    proxy = FlakyProxy(server, num_faults=0)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    storage = Storage.at(f"s3://frames/p?scheme=http&endpoint_override=127.0.0.1:{proxy.server_address[1]}")
    storage.write_atomic("models/a.bin", b"old")
    proxy.refused_part = 2
    with pytest.raises(UserError, match="access denied"):
        storage.write_atomic("models/a.bin", b"x" * (25 << 20))
    gc.collect()
    assert storage.read_bytes("models/a.bin") == b"old"
    proxy.refused_part = 0
    storage.write_atomic("models/a.bin", b"x" * (25 << 20))
    assert storage.size("models/a.bin") == 25 << 20
    storage.write_atomic(f"models/{TEMPORARY}0123-b.bin", b"left by a killed writer")
    assert storage.list() == ["models/a.bin"]
    assert storage.clean_temporaries(older_than_s=60) == []
    storage.clean_temporaries(older_than_s=-5)
    keys = [o["Key"] for o in s3.list_objects_v2(Bucket="frames")["Contents"]]
    assert [k for k in keys if not k.endswith("/")] == ["p/models/a.bin"]
    proxy.shutdown()


@pytest.mark.s3
def test_s3_retries_on_503(s3, server) -> None:
    proxy = FlakyProxy(server, num_faults=2)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    storage = Storage.at(f"s3://frames/p?scheme=http&endpoint_override=127.0.0.1:{proxy.server_address[1]}")
    storage.write_atomic("a.bin", b"payload")
    assert storage.read_bytes("a.bin") == b"payload"
    assert storage.list() == ["a.bin"]
    proxy.shutdown()
    assert proxy.seen["PUT", "/frames/p/a.bin"] == 3
    assert max(proxy.seen.values()) >= 3


@pytest.mark.s3
def test_s3_a_shard_that_came_damaged_is_fetched_again(s3, server) -> None:
    proxy = FlakyProxy(server, num_faults=0)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    storage = Storage.at(f"s3://frames/p?scheme=http&endpoint_override=127.0.0.1:{proxy.server_address[1]}")
    pixels = np.zeros((8, 8), np.uint8)
    written = Frame("a", pixels, pixels, "2CH", "ED", "patient0", "train", "real")
    write_frames(storage, "a.parquet", [written])
    proxy.num_damaged = 1
    assert [f.frame_id for f in read_frames(storage)] == [written.frame_id]
    proxy.num_damaged = 2
    with pytest.raises(UserError, match=r"a\.parquet: not a whole Parquet file \(\d+ bytes that end in b'\\x00"):
        list(read_frames(storage))
    proxy.shutdown()


@pytest.mark.s3
@pytest.mark.parametrize("length", [60, 140])
def test_s3_an_object_that_is_put_anew_amid_a_read_comes_whole(s3, server, length: int) -> None:
    """pyarrow asks for its size, then for that many bytes: of another size it would give a part, or filled up with any."""
    old, new = b"a" * 100, b"b" * length
    proxy = FlakyProxy(server, num_faults=0)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    storage = Storage.at(f"s3://frames/p?scheme=http&endpoint_override=127.0.0.1:{proxy.server_address[1]}")
    storage.write_atomic("a.json", old)
    proxy.before = lambda method, path: method == "GET" and s3.put_object(Bucket="frames", Key="p/a.json", Body=new)
    assert storage.read_bytes("a.json") == new
    sizes = itertools.count(1)  # never still
    proxy.before = lambda method, path: s3.put_object(Bucket="frames", Key="p/a.json", Body=b"c" * next(sizes))
    with pytest.raises(OSError, match="put anew each time"):
        storage.read_bytes("a.json")
    proxy.shutdown()


@pytest.mark.s3
def test_s3_a_large_write_survives_that_another_run_cleans_up(s3, server) -> None:
    proxy, removed = FlakyProxy(server, num_faults=0), []
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    storage, data = (
        Storage.at(f"s3://frames/p?scheme=http&endpoint_override=127.0.0.1:{proxy.server_address[1]}"),
        b"x" * (11 << 20),
    )

    def clean(method: str, path: str) -> None:
        if (method, path) == ("PUT", "/frames/p/a.bin") and not removed:
            removed.extend(Storage.at("s3://frames/p").clean_temporaries(older_than_s=-5))

    proxy.before = clean
    storage.write_atomic("a.bin", data)
    assert len(removed) == 1
    assert storage.read_bytes("a.bin") == data
    assert [k for k in storage._list("") if TEMPORARY in k] == []
    proxy.shutdown()


@pytest.mark.s3
def test_s3_no_such_bucket(s3) -> None:
    with pytest.raises(UserError, match="no such bucket"):
        Storage.at("s3://nowhere/x").write_atomic("a", b"1")


@pytest.mark.s3
def test_s3_large_objects_are_whole(s3) -> None:
    data = io.BytesIO(os.urandom(1 << 20)).getvalue() * 12
    storage = Storage.at("s3://frames/big")
    storage.write_atomic("a.bin", data)
    assert storage.read_bytes("a.bin") == data
