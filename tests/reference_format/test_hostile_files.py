"""Files that are damaged, or made to run code or to ask for endless work: each ends in a clear error, nothing is run."""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import re
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysyn.checkpoint import import_reference
from raysyn.types import UserError
from tests.reference_format.writer import Persistent, modules_of_the_reference, small_net, write_checkpoint


class Evil:
    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Evil(__import__("os").system, "touch pwned"), "posix.system"),
        (Evil(eval, "1+1"), "builtins.eval"),
        (Evil(getattr, {}, "get"), "builtins.getattr"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (Evil(torch.load, "x"), "torch.serialization.load"),
        (Path("x"), "pathlib"),
        ({(1, 2): 3}, "dict key"),
        ({(1, 2)}, "a set of something else"),
        (frozenset({1}), "pickle instruction"),
        (bytearray(b"x"), "pickle instruction|bytearray"),
        ({"ema": 3}, "neither a network"),
        ([1, 2], "neither a network"),
    ],
)
def test_what_is_not_the_format_is_refused_by_name(value, says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"ema": value} if says != "neither a network" else value, 5))
    with pytest.raises(UserError, match=says) as caught:
        import_reference(tmp_path / "evil.pkl")
    assert "evil.pkl" in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_tensors_cannot_claim_more_than_their_storage(tmp_path: Path) -> None:
    class Claim:
        def __init__(self, size, stride, offset=0) -> None:
            self.args = (
                torch.storage.TypedStorage(
                    wrap_storage=torch.tensor([1.0, 2.0]).untyped_storage(), dtype=torch.float32, _internal=True
                ),
                offset,
                size,
                stride,
                False,
                OrderedDict(),
            )

        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, self.args

    for size, stride, offset in (((10**6, 10**6), (0, 0), 0), ((2,), (5,), 0), ((2,), (1,), 7), ((-1,), (1,), 0)):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": Claim(size, stride, offset)}))
        with pytest.raises(UserError, match="refused: a tensor"):
            import_reference(tmp_path / "x.pkl")


def test_cycles_and_depth_end_in_an_error(tmp_path: Path) -> None:
    state: dict = dict(_parameters={}, _buffers={})
    loop = Persistent("EDMPrecond", state)
    state["_modules"] = {"model": Persistent("DhariwalUNet", dict(_modules={"enc": torch.nn.ReLU()}))}
    inner = torch.nn.Sequential()
    inner.__dict__["_modules"] = {"again": inner}
    state["_modules"]["loop"] = inner
    (tmp_path / "loop.pkl").write_bytes(pickle.dumps({"ema": loop}))
    with pytest.raises(UserError, match="nested without end"):
        import_reference(tmp_path / "loop.pkl")
    (tmp_path / "deep.pkl").write_bytes(b"\x80\x04" + b"(" * 100_000 + b".")
    with pytest.raises(UserError):
        import_reference(tmp_path / "deep.pkl")


def stored(numbers: int) -> bytes:
    """What torch's storages give as their pickled bytes."""
    raw = torch.storage.TypedStorage(
        wrap_storage=torch.zeros(numbers).untyped_storage(), dtype=torch.float32, _internal=True
    )
    return raw.__reduce__()[1][0]


def named(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def packed_storage() -> bytes:
    """A deflated archive of a large storage whose first bytes also read as empty pickles."""
    data = io.BytesIO()
    key = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(zipfile.ZipInfo(f"a/{name}"), content)
        archive.writestr("a/data.pkl", b"\x80\x02" + key + struct.pack("<i", 10**7) + b"tQ.")
        archive.writestr("a/data/0", bytes(4 * 10**7), compresslevel=9)
    made = bytearray(data.getvalue())
    made[4:9] = b"\n...."
    return bytes(made)


def again_and_again() -> dict[str, bytes]:
    """Small files whose naive reading would take forever or fill the memory, and an instruction a byte to do so."""
    bytes_of = stored(100_000)
    storage = pickle.BINBYTES + struct.pack("<I", len(bytes_of)) + bytes_of + b"q\x000"
    pairs = b"](" + b"".join(b"J" + struct.pack("<i", i) + b"K\x00\x86" for i in range(50_000)) + b"eq\x000"
    nest = b"]\x94" + b"".join(b"0]\x94(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)) + b"0"
    many = b"(" + b"K\x00" * 50_000 + b"tq\x000"
    claims = bytes_of.replace(struct.pack("<i", 100_000), struct.pack("<i", 2**31 - 1))
    ends = io.BytesIO(stored(1))
    for _ in range(4):
        list(pickletools.genops(ends))
    head = ends.getvalue()[: ends.tell()]
    array = (
        pickle.PROTO
        + b"\x02"
        + named("builtins", "bytearray")
        + b"\x8a\x05"
        + (2 * 10**9).to_bytes(5, "little")
        + b"\x85R."
    )
    alike = [b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") for k in range(1, 50_000)]

    def one(storage: bytes) -> bytes:
        length = struct.pack("<I", len(storage))
        return named("torch.storage", "_load_from_bytes") + pickle.BINBYTES + length + storage + b"\x85R."

    calls = stored(1).replace(b".", b"R.")
    return {
        "one storage, often": storage
        + b"]("
        + (named("torch.storage", "_load_from_bytes") + b"h\x00\x85R") * 2000
        + b"e.",
        "one list, often": pairs + b"](" + (named("collections", "OrderedDict") + b"h\x00\x85R") * 20_000 + b"e.",
        "many arguments, often": many + b"](" + (named("collections", "OrderedDict") + b"h\x00R") * 20_000 + b"e.",
        "a list of twice the list before": nest + named("numpy", "dtype") + b"h\x3c\x85R.",
        "a storage that claims more": pickle.BINBYTES
        + struct.pack("<I", len(claims))
        + claims
        + b"q\x000"
        + named("torch.storage", "_load_from_bytes")
        + b"h\x00\x85R.",
        "a storage that calls": one(calls),
        "a storage whose keys are a call": one(head + array),
        "a storage without a key": one(head + pickle.PROTO + b"\x02]." + bytes(5000)),
        "a storage that is an archive": one(packed_storage()),
        "numbers that hash alike": b"}(" + b"".join(key + b"N" for key in alike) + b"u.",
        "a set of numbers that hash alike": pickle.EMPTY_SET + b"(" + b"".join(alike) + b"\x90.",
        "a storage in a storage": one(b"\x80\x02" + one(stored(1)) + b"."),
        "a call of an object": named("torch.nn.modules.container", "Sequential") + b")\x81)R.",
    }


def peak_kib() -> int:
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("which", again_and_again())
def test_small_files_cannot_ask_for_endless_work_or_memory(which: str, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + again_and_again()[which])
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, whatever ran before in this process
    started, before = time.process_time(), peak_kib()
    with pytest.raises(UserError, match="refused"):
        import_reference(tmp_path / "x.pkl")
    assert time.process_time() - started < 10
    assert peak_kib() - before < 50_000


def test_few_names_cannot_describe_a_net_of_millions_of_layers(tmp_path: Path) -> None:
    one, sides = torch.zeros(1, 1, 1, 1), [2**i for i in range(280, 0, -1)]
    top, low = (f"{s}x{s}" for s in (sides[0], sides[-1]))
    weights = {f"enc.{s}x{s}_block0.conv0.weight": one for s in sides}
    weights |= {f"enc.{top}_block{k}.x": one for k in range(3000)}
    weights |= {f"enc.{top}_conv.weight": one, "map_layer0.weight": one[0, 0], "out_conv.weight": one}
    weights |= {f"dec.{low}_in0.norm0.{k}.weight": one for k in ("mlp_shared.0", "mlp_gamma")}
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(UserError, match="280 levels of 3000 blocks"):
        import_reference(tmp_path / "x.pt")


def test_modules_named_again_and_again_end_in_an_error(tmp_path: Path) -> None:
    module = torch.nn.Sequential()
    for _ in range(12):
        outer = torch.nn.Sequential()
        outer.__dict__["_modules"] = {str(i): module for i in range(10)}
        module = outer
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": module}))
    with pytest.raises(UserError, match="nested without end"):
        import_reference(tmp_path / "x.pkl")


def test_archives_hold_what_they_say_and_no_more(tmp_path: Path) -> None:
    def saved(content) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    packed = io.BytesIO()
    plain = zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(10**6)})))
    with plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as to:
        for entry in plain.namelist():
            to.writestr(entry, plain.read(entry))
    shared = torch.zeros(10**6)
    old = io.BytesIO()
    torch.save({"a": shared}, old, _use_new_zipfile_serialization=False)
    more = old.getvalue().replace(struct.pack("<i", 10**6), struct.pack("<i", 2**31 - 1))
    for data, says in (
        (packed.getvalue(), "unpacks to more"),
        (saved({"a": torch.zeros(1).expand(10**9)}), "larger than its storage"),
        (saved({str(i): shared for i in range(100)}), "share their data"),
        (saved({"a": Evil(__import__("os").system, "touch pwned")}), "posix.system"),
        (more, "another size"),
        (old.getvalue()[:-8], "another size"),
    ):
        (tmp_path / "x.pt").write_bytes(data)
        with pytest.raises(UserError, match=says):
            import_reference(tmp_path / "x.pt")
    with pytest.raises(UserError, match="is no file"):
        import_reference(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        import_reference(tmp_path / "absent.pkl")


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("reference") / "network.pkl"
    with modules_of_the_reference():
        write_checkpoint(path, small_net("adm", num_blocks=1))
    return path.read_bytes()


def outcome(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with contextlib.suppress(UserError):  # anything else fails the test; an intact file may be read
        import_reference(path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_end_in_a_clear_error(data, whole_file: bytes, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "network.pkl"
    how = data.draw(st.sampled_from(["cut", "flip", "insert", "opcode"]))
    place = data.draw(st.integers(0, len(whole_file) - 1) | st.integers(0, 4000))
    if how == "cut":
        changed = whole_file[:place]
    elif how == "flip":
        changed = whole_file[:place] + bytes([data.draw(st.integers(0, 255))]) + whole_file[place + 1 :]
    elif how == "insert":
        changed = whole_file[:place] + data.draw(st.binary(min_size=1, max_size=12)) + whole_file[place:]
    else:
        codes = [getattr(pickle, k)[:1] for k in dir(pickle) if k.isupper() and isinstance(getattr(pickle, k), bytes)]
        changed = whole_file[:place] + data.draw(st.sampled_from([c for c in codes if c])) + whole_file[place:]
    outcome(changed, path)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300))
def test_noise_is_no_checkpoint(data: bytes, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("noise") / "x.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError):
        import_reference(path)


def test_huge_lengths_do_not_allocate(tmp_path: Path) -> None:
    for code in (pickle.BINBYTES8, pickle.BINUNICODE8, pickle.FRAME, pickle.BYTEARRAY8):
        (tmp_path / "x.pkl").write_bytes(b"\x80\x05" + code + struct.pack("<Q", 1 << 40) + b"xx.")
        with pytest.raises(UserError):
            import_reference(tmp_path / "x.pkl")
