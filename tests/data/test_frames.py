import dataclasses
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from raysyn.data.frames import (
    ROW_GROUP_ROWS,
    decode_png,
    encode_png,
    frames_to_table,
    read_arrays,
    read_frames,
    table_to_bytes,
    table_to_frames,
    write_frames,
)
from raysyn.data.masks import MaskFrames
from raysyn.data.schema import COLUMNS, SCHEMA, VERSION_KEY
from raysyn.data.storage import Storage
from raysyn.types import PHASES, VIEWS, Frame, Provenance, UserError


def frame(number: int, split: str = "train", size: int = 16, **changes) -> Frame:
    draw = np.random.default_rng(number)
    values = {
        "frame_id": f"f{number:04d}",
        "image": draw.integers(0, 256, (size, size), dtype=np.uint8),
        "label_map": draw.integers(0, 5, (size, size), dtype=np.uint8),
        "view": VIEWS[number % 2],
        "phase": PHASES[number // 2 % 2],
        "patient_id": f"patient{number // 4:04d}",
        "split": split,
        "source": "real",
        "spacing_mm": None if number % 3 == 0 else (0.25, 0.5 + number),
    }
    return Frame(**{**values, **changes})


def synthetic(number: int) -> Frame:
    provenance = Provenance("edm", "ab" * 32, "f0001", 2**40, 7, "heun", 5, 9, 0.9, None, 1.5)
    return frame(number, source="synthetic", provenance=provenance)


def same(a: Frame, b: Frame) -> bool:
    plain = [dataclasses.replace(f, image=None, label_map=None) for f in (a, b)]
    return plain[0] == plain[1] and (a.image == b.image).all() and (a.label_map == b.label_map).all()


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
@settings(max_examples=40)
def test_png_round_trip(grey: np.ndarray) -> None:
    data = encode_png(grey)
    assert data == encode_png(grey.copy())
    assert (decode_png(data) == grey).all()


@given(
    st.text(min_size=1, max_size=20),
    st.sampled_from(VIEWS),
    st.none() | st.tuples(st.floats(1e-3, 10), st.floats(1e-3, 10)),
    st.integers(0, 2**62),
    st.none() | st.floats(0, 1),
)
@settings(max_examples=40)
def test_frames_survive_the_table(frame_id, view, spacing, seed, faithfulness) -> None:
    provenance = Provenance("edm", "c" * 64, "m", seed, seed, "heun", 5, 9, faithfulness)
    before = frame(1, frame_id=frame_id, view=view, spacing_mm=spacing, source="synthetic", provenance=provenance)
    (after,) = table_to_frames(frames_to_table([before]))
    assert same(before, after)


def test_real_frames_have_no_provenance() -> None:
    table = frames_to_table([frame(0)])
    assert table["model"].null_count == 1
    assert table_to_frames(table)[0].provenance is None


def test_the_same_rows_give_the_same_bytes_and_stream() -> None:
    frames = [frame(i) for i in range(150)]
    data = table_to_bytes(frames_to_table(frames, {"checkpoint": "abc"}))
    assert data == table_to_bytes(frames_to_table([frame(i) for i in range(150)], {"checkpoint": "abc"}))
    file = pq.ParquetFile(io.BytesIO(data))
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 22]
    assert file.schema_arrow.metadata[b"checkpoint"] == b"abc"
    assert file.schema_arrow.remove_metadata() == SCHEMA.remove_metadata()


@pytest.fixture
def frame_set(tmp_path):
    """Two train shards (70 + 30 frames) and one of validation."""
    storage = Storage.at(tmp_path)
    write_frames(storage, "train/shard-00000.parquet", [frame(i) for i in range(70)])
    entry = write_frames(storage, "train/shard-00001.parquet", [frame(i) for i in range(72, 102)])
    write_frames(storage, "validation/shard-00000.parquet", [frame(i, "validation") for i in range(200, 204)])
    assert entry["rows"] == 30
    assert entry["bytes"] == storage.size("train/shard-00001.parquet")
    return storage


def test_read_arrays(frame_set) -> None:
    arrays = read_arrays(frame_set.uri, "train")
    wanted = [frame(i) for i in (*range(70), *range(72, 102))]
    assert arrays.frame_id == [f.frame_id for f in wanted]
    assert (arrays.image_u8 == np.stack([f.image for f in wanted])).all()
    assert (arrays.label_map == np.stack([f.label_map for f in wanted])).all()
    assert [VIEWS[v] for v in arrays.view] == [f.view for f in wanted]
    assert [PHASES[p] for p in arrays.phase] == [f.phase for f in wanted]
    spacing = np.array([f.spacing_mm or (np.nan, np.nan) for f in wanted], dtype=np.float32)
    np.testing.assert_array_equal(arrays.spacing_mm, spacing)
    assert set(arrays.mask_frame_id) == {""}
    assert len(read_arrays(frame_set.uri)) == 104
    assert len(read_arrays(frame_set.uri, "train", limit=75)) == 75
    one_file = read_arrays(f"{frame_set.uri}/train/shard-00001.parquet")
    assert one_file.frame_id == arrays.frame_id[70:]


def test_a_flat_folder_is_split_by_its_column(tmp_path) -> None:
    mixed = [frame(0), frame(4, "test"), frame(5, "test")]
    write_frames(Storage.at(tmp_path), "all.parquet", mixed)
    assert read_arrays(tmp_path, "test").frame_id == ["f0004", "f0005"]
    assert [f.frame_id for f in read_frames(tmp_path, "train")] == ["f0000"]
    with pytest.raises(UserError, match="holds no validation frames"):
        read_arrays(tmp_path, "validation")


def test_read_frames_streams_in_order(frame_set) -> None:
    found = list(read_frames(frame_set.uri, "train", limit=72))
    assert [f.frame_id for f in found[:70]] == [f"f{i:04d}" for i in range(70)]
    assert len(found) == 72
    assert same(found[5], frame(5))


def test_synthetic_frames_name_their_mask(tmp_path) -> None:
    write_frames(Storage.at(tmp_path), "train/a.parquet", [synthetic(1), frame(0)])
    assert read_arrays(tmp_path).mask_frame_id == ["f0001", ""]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"view": "3CH"}, "view '3CH' is not one of"),
        ({"split": "training"}, "split 'training'"),
        ({"source": "made up"}, "source"),
        ({"patient_id": ""}, "may not be empty"),
        ({"label_map": np.full((16, 16), 7, np.uint8)}, r"label values \[7\]"),
        ({"label_map": np.zeros((8, 8), np.uint8)}, "one size"),
        ({"image": np.zeros((16, 16), np.float32)}, "uint8"),
    ],
)
def test_frames_that_are_none_are_not_written(tmp_path, changes, says) -> None:
    with pytest.raises(UserError, match=says):
        write_frames(Storage.at(tmp_path), "a.parquet", [frame(0), frame(1, **changes)])
    assert list(tmp_path.iterdir()) == []


def write_table(folder, table) -> str:
    path = str(folder / "foreign.parquet")
    pq.write_table(table, path)
    return path


def test_foreign_parquet_is_refused_by_name(tmp_path) -> None:
    table = frames_to_table([frame(0), frame(1)])
    other_version = table.replace_schema_metadata({**table.schema.metadata, VERSION_KEY: b"99"})
    no_split = table.set_column(table.column_names.index("split"), "split", pa.array([None, "train"]))
    odd_split = table.set_column(table.column_names.index("split"), "split", pa.array(["train", "dev"]))
    wrong_type = table.set_column(table.column_names.index("view"), "view", pa.array([1, 2]))
    spacing = table.set_column(table.column_names.index("spacing_mm"), "spacing_mm", pa.array([[1.0], [1.0, 2.0]]))
    for bad, says in [
        (table.drop_columns(["label_map"]), "column label_map is missing"),
        (other_version, "frame schema version 99, this is version 1; prepare it again"),
        (no_split, "column split has 1 empty values"),
        (odd_split, "column split holds 'dev'"),
        (wrong_type, "column view is int64"),
        (spacing, r"spacing_mm must hold \(row, column\), got 1"),
    ]:
        path = write_table(tmp_path, bad)
        with pytest.raises(UserError, match=f"foreign.parquet: .*{says}") as caught:
            read_arrays(path)
        assert "\n" not in str(caught.value)


def test_other_writers_types_are_read(tmp_path) -> None:
    table = frames_to_table([frame(i) for i in range(4)]).replace_schema_metadata({})
    for name, kind in (("view", pa.large_string()), ("spacing_mm", pa.list_(pa.float32()))):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    table = table.set_column(table.column_names.index("model"), "model", pa.nulls(4))
    encoded = table["patient_id"].dictionary_encode()
    table = table.set_column(table.column_names.index("patient_id"), "patient_id", encoded)
    arrays = read_arrays(write_table(tmp_path, table))
    assert arrays.patient_id == ["patient0000"] * 4
    assert arrays.view.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("content", "says"), [(b"", "not a whole Parquet"), (b"PAR1 cut", "not a whole Parquet")])
def test_broken_files(tmp_path, content, says) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.parquet: {says}"):
        read_arrays(tmp_path)


def test_a_shard_damaged_where_its_footer_does_not_show_it(tmp_path) -> None:
    """Every page in turn: the reader that comes upon it names the file, and no other error escapes."""
    path = tmp_path / "a.parquet"
    whole = table_to_bytes(frames_to_table([frame(i) for i in range(4)]))
    path.write_bytes(whole)
    refused: dict[str, str] = {}
    for column in range((group := pq.ParquetFile(path).metadata.row_group(0)).num_columns):
        page = group.column(column)
        start = page.dictionary_page_offset or page.data_page_offset
        end = start + page.total_compressed_size
        path.write_bytes(whole[:start] + b"\xff" * (end - start) + whole[end:])
        for read in (read_arrays, lambda uri: list(read_frames(uri)), lambda uri: MaskFrames.read(str(uri), "train")):
            try:
                read(path)
            except UserError as error:
                refused[page.path_in_schema] = str(error)
    assert {"frame_id", "image.bytes", "label_map.bytes"} <= refused.keys()
    assert all("a.parquet: not a whole Parquet file" in said and "\n" not in said for said in refused.values())


def test_missing_sets(tmp_path) -> None:
    for uri in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"no frames \(\*\.parquet\) there"):
            read_arrays(str(uri))
    with pytest.raises(UserError, match="no such file"):
        read_arrays(str(tmp_path / "absent.parquet"))
    with pytest.raises(UserError, match="split 'dev' is not one of"):
        read_arrays(tmp_path, "dev")


def test_mixed_sizes_are_refused(tmp_path) -> None:
    write_frames(Storage.at(tmp_path), "a.parquet", [frame(0), frame(1, size=8)])
    with pytest.raises(UserError, match=r"image sizes \[16, 16\] and \[8, 8\] in one set"):
        read_arrays(tmp_path)


def test_png_that_is_not_grey_or_cut_off() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    with pytest.raises(UserError, match="mode RGB"):
        decode_png(buffer.getvalue(), "a.png")
    whole = encode_png(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for data in (b"", b"text", whole[: len(whole) // 2]):
        with pytest.raises(UserError, match=r"a\.png: not a whole PNG"):
            decode_png(data, "a.png")


def test_opens_in_datasets_with_images_decoded(frame_set, tmp_path_factory) -> None:
    import datasets

    files = f"{frame_set.uri}/train/*.parquet"
    cache = str(tmp_path_factory.mktemp("cache"))
    rows = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)["train"]
    assert isinstance(rows.features["image"], datasets.Image)
    assert isinstance(rows.features["label_map"], datasets.Image)
    assert (np.asarray(rows[71]["image"]) == frame(73).image).all()
    assert (np.asarray(rows[71]["label_map"]) == frame(73).label_map).all()
    streamed = next(iter(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)))
    assert (np.asarray(streamed["image"]) == frame(0).image).all()


def test_opens_in_duckdb_and_polars(frame_set) -> None:
    import duckdb
    import polars

    files = f"{frame_set.uri}/*/*.parquet"
    found = duckdb.sql(
        f"select split, count(*), min(octet_length(image.bytes)) from '{files}' group by split"
    ).fetchall()
    assert sorted((split, count) for split, count, _ in found) == [("train", 100), ("validation", 4)]
    assert all(size > 50 for _, _, size in found)
    lazy = polars.scan_parquet(files)
    assert lazy.collect_schema().names() == list(COLUMNS)
    row = lazy.filter(polars.col("frame_id") == "f0073").collect().to_dicts()[0]
    assert (decode_png(row["image"]["bytes"]) == frame(73).image).all()
    assert row["spacing_mm"] == [0.25, 73.5]
