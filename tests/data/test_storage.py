import os
import pickle

import numpy as np
import pytest

from raysyn.data.storage import TEMPORARY, Storage
from raysyn.types import UserError


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
