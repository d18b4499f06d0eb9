"""What a disk refuses: full, closed, a file where a folder should be, a name that none can have."""

import errno
import multiprocessing
import os

import pytest

from raysyn.data import local_files
from raysyn.data.storage import Storage
from raysyn.types import UserError


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
    for touch in (lambda: storage.exists("b"), lambda: storage.write_atomic("b", b"1"), storage.check_writable):
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
