import errno
import gc
import http.client
import http.server
import io
import multiprocessing
import os
import pickle
import threading
from collections import Counter

import numpy as np
import pytest

from raysyn.data import local_files
from raysyn.data.frames import read_frames, write_frames
from raysyn.data.storage import TEMPORARY, Storage
from raysyn.types import Frame, UserError
from tests.s3 import KEYS, s3_server


def test_local_round_trip_listing_and_removal(tmp_path) -> None:
    storage = Storage.at(tmp_path / "set")
    assert storage.list() == []
    assert not storage.exists()
    storage.write_atomic("train/b.bin", b"two")
    storage.write_atomic("a.bin", b"one")
    storage.write_json("m.json", {"σ": [1, 2]})
    assert storage.list() == ["a.bin", "m.json", "train/b.bin"]
    assert storage.list("train") == ["train/b.bin"]
    assert storage.list(suffix=".json") == ["m.json"]
    assert storage.read_json("m.json") == {"σ": [1, 2]}
    assert storage.size("a.bin") == 3
    assert storage.join("train", "b.bin").name == "b.bin"
    assert storage.join("train").read_bytes("b.bin") == b"two"
    storage.write_atomic("a.bin", b"again")
    assert storage.read_bytes("a.bin") == b"again"
    storage.remove("a.bin")
    storage.remove("a.bin")
    assert not storage.exists("a.bin")
    storage.remove_tree()
    storage.remove_tree()
    assert not (tmp_path / "set").exists()


def test_missing_files_are_not_found(tmp_path) -> None:
    storage = Storage.at(tmp_path)
    for read in (storage.read_bytes, storage.read_json, storage.size):
        with pytest.raises(FileNotFoundError):
            read("absent.json")


@pytest.mark.parametrize(
    ("uri", "seen", "path"),
    [
        ("/a/b/", "/a/b", "/a/b"),
        ("file:///a/b%20c", "/a/b c", "/a/b c"),
        ("s3://bucket/prefix/", "s3://bucket/prefix", "bucket/prefix"),
        ("s3://bucket/p?region=eu-west-1", "s3://bucket/p?region=eu-west-1", "bucket/p"),
    ],
)
def test_uris(uri: str, seen: str, path: str) -> None:
    storage = Storage.at(uri)
    assert (storage.uri, storage.path) == (seen, path)
    assert Storage.at(storage.uri) == storage
    assert storage.join("x", "y").path == f"{path}/x/y"
    assert storage.join("x").uri.partition("?")[2] == seen.partition("?")[2]


def test_relative_paths_become_absolute(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage.at("runs/demo").uri == str(tmp_path / "runs/demo")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "is empty"),
        ("gs://b/x", "gs:// is not"),
        ("s3://", "no bucket"),
        ("/a\0b", "zero byte"),
        (os.fsdecode(b"/a/\xff"), "is not UTF-8"),
    ],
)
def test_bad_uris(uri: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Storage.at(uri)


def test_unknown_uri_keys_are_refused() -> None:
    with pytest.raises(UserError, match="endpoint: not known"):
        Storage.at("s3://bucket/p?endpoint=x").exists("a")


def test_pickles_as_its_uri(tmp_path) -> None:
    storage = Storage.at(tmp_path)
    storage.write_atomic("a", b"1")
    data = pickle.dumps(storage)
    assert len(data) < 300
    assert pickle.loads(data).read_bytes("a") == b"1"


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EACCES, "no permission")],
)
def test_a_failed_write_leaves_nothing_and_says_why(tmp_path, monkeypatch, number: int, says: str) -> None:
    storage = Storage.at(tmp_path)
    storage.write_atomic("a.bin", b"old")

    def fail(file, data) -> None:
        file.write(data[:2])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local_files, "_write_and_sync", fail)
    with pytest.raises(UserError, match=f"a.bin: {says}"):
        storage.write_atomic("a.bin", b"new")
    assert os.listdir(tmp_path) == ["a.bin"]
    assert storage.read_bytes("a.bin") == b"old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_kernel_says_no_space(tmp_path, monkeypatch) -> None:
    real_open = open

    def full(path, mode):
        real_open(path, mode).close()
        return real_open("/dev/full", "wb")

    monkeypatch.setattr(local_files, "open", full, raising=False)
    with pytest.raises(UserError, match="no space left"):
        Storage.at(tmp_path).write_atomic("a.bin", b"x" * 10)
    assert os.listdir(tmp_path) == []


def test_other_faults_stay_faults(tmp_path, monkeypatch) -> None:
    def fail(file, data) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(local_files, "_write_and_sync", fail)
    with pytest.raises(OSError, match="I/O error"):
        Storage.at(tmp_path).write_atomic("a.bin", b"new")
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path) -> None:
    (tmp_path / "runs").write_text("oops")
    with pytest.raises(UserError, match="a file stands where a folder should be"):
        Storage.at(tmp_path / "runs").write_atomic("a/b.bin", b"1")


def test_a_folder_where_a_file_should_be(tmp_path) -> None:
    (tmp_path / "a.json").mkdir()
    storage = Storage.at(tmp_path)
    for touch in (
        lambda: storage.read_json("a.json"),
        lambda: storage.write_json("a.json", {}),
        lambda: storage.remove("a.json"),
    ):
        with pytest.raises(UserError, match=r"a\.json: a folder stands where a file should be"):
            touch()
    assert os.listdir(tmp_path) == ["a.json"]


def test_where_nothing_can_be_written_is_known_without_writing(tmp_path) -> None:
    Storage.at(tmp_path / "not" / "there yet").check_writable()
    (tmp_path / "file").write_text("oops")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, says in (("file", "a file stands"), ("file/a/b", "a file stands"), ("link/a", "a file stands")):
        with pytest.raises(UserError, match=f"{place}: {says}"):
            Storage.at(tmp_path / place).check_writable()
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_name_that_no_folder_can_have(tmp_path) -> None:
    storage = Storage.at(tmp_path / ("a" * 300))
    for touch in (lambda: storage.exists("b"), lambda: storage.write_atomic("b", b"1")):
        with pytest.raises(UserError, match="a name in it is too long"):
            touch()


def as_nobody(function, *args):
    """Run `function` in a child without root's rights; returns what it returned."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        os.setgid(65534)
        os.setuid(65534)
        send.send(function(*args))

    child = context.Process(target=run)
    child.start()
    child.join(timeout=60)
    return receive.recv() if receive.poll() else None


def outcome_of(name: str, *args):
    storage, *rest = args
    try:
        getattr(storage, name)(*rest)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="drops root's rights")
def test_no_permission_for_real(open_tmp_path) -> None:
    tmp_path = open_tmp_path
    storage = Storage.at(tmp_path)
    storage.write_atomic("a.bin", b"secret")
    (tmp_path / "a.bin").chmod(0o600)
    assert "a.bin: no permission" in as_nobody(outcome_of, "read_bytes", storage, "a.bin")
    assert "b.bin: no permission" in as_nobody(outcome_of, "write_atomic", storage, "b.bin", b"x")
    assert "c/d: no permission" in as_nobody(outcome_of, "check_writable", storage.join("c", "d"))
    assert sorted(os.listdir(tmp_path)) == ["a.bin"]


def test_leftovers_of_killed_writers(tmp_path) -> None:
    storage = Storage.at(tmp_path)
    storage.write_atomic("train/a.bin", b"1")
    (tmp_path / "train" / f"{TEMPORARY}0123-b.bin").write_bytes(b"half")
    assert storage.list() == ["train/a.bin"]
    assert storage.clean_temporaries(older_than_s=60) == []
    assert storage.clean_temporaries(older_than_s=0) == [f"train/{TEMPORARY}0123-b.bin"]
    assert os.listdir(tmp_path / "train") == ["a.bin"]


def test_json_holds_what_json_can(tmp_path) -> None:
    storage = Storage.at(tmp_path)
    storage.write_json("m.json", {"a": [float("inf"), 1.5], "b": {"c": float("nan")}, "d": (np.float64("-inf"), "x")})
    assert storage.read_json("m.json") == {"a": [None, 1.5], "b": {"c": None}, "d": [None, "x"]}
    storage.write_json("m.json", {"skipped": (name := os.fsdecode(b"\xff a.png"))})
    assert storage.read_json("m.json") == {"skipped": name}, "a file's name need not be UTF-8"


def test_json_that_was_cut_off(tmp_path) -> None:
    (tmp_path / "m.json").write_text('{"a": 1')
    with pytest.raises(UserError, match=r"m\.json: not readable as JSON"):
        Storage.at(tmp_path).read_json("m.json")


def test_trees_up_and_down(tmp_path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_bytes(b"a")
    (tmp_path / "in" / "sub" / "b.txt").write_bytes(b"b")
    storage = Storage.at(tmp_path / "store")
    storage.upload_tree(tmp_path / "in", "model")
    assert storage.list() == ["model/a.txt", "model/sub/b.txt"]
    storage.download_tree(tmp_path / "out", "model")
    assert (tmp_path / "out" / "sub" / "b.txt").read_bytes() == b"b"


def test_a_write_survives_that_another_run_cleans_up(tmp_path, monkeypatch) -> None:
    storage, replace, calls = Storage.at(tmp_path), os.replace, []

    def after_cleaning(source, target) -> None:
        if not calls:
            storage.clean_temporaries(older_than_s=0)
        calls.append(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", after_cleaning)
    storage.write_atomic("train/a.bin", b"12345")
    assert storage.read_bytes("train/a.bin") == b"12345"
    assert len(calls) == 2


class FlakyProxy(http.server.ThreadingHTTPServer):
    """Passes requests on to an S3 server, after answering 503 to the first `num_faults` of each (method, path).

    The part `refused_part` of an upload in parts is answered 403; the first `num_damaged` objects fetched come as zeros.
    """

    daemon_threads = True
    refused_part = 0
    num_damaged = 0

    def __init__(self, target: str, num_faults: int) -> None:
        self.target, self.num_faults, self.seen = target, num_faults, Counter()
        super().__init__(("127.0.0.1", 0), FlakyHandler)


class FlakyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyProxy

    def answer(self) -> None:
        body = self.body()
        key = (self.command, self.path)
        self.server.seen[key] += 1
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
def test_s3_no_such_bucket(s3) -> None:
    with pytest.raises(UserError, match="no such bucket"):
        Storage.at("s3://nowhere/x").write_atomic("a", b"1")


@pytest.mark.s3
def test_s3_large_objects_are_whole(s3) -> None:
    data = io.BytesIO(os.urandom(1 << 20)).getvalue() * 12
    storage = Storage.at("s3://frames/big")
    storage.write_atomic("a.bin", data)
    assert storage.read_bytes("a.bin") == data
