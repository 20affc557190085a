"""Every format, read back against what was written into small files; every bad file by name."""

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from etils.epath.backend import fsspec_backend
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from jflow.data.sources import open_source


def png(color=(10, 20, 30), size=(20, 16)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def write_tar(path, members, mode="w") -> str:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Six pictures with two captions each; a question, and a conversation."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        turn = {"from": tfds.features.Text(), "value": tfds.features.Text()}
        features = {
            "picture": tfds.features.Image(shape=(None, None, 3)),
            "meta": {"words": tfds.features.Sequence(tfds.features.Text())},
            "question": tfds.features.Text(),
            "turns": tfds.features.Sequence(turn),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            yield (
                i,
                {
                    "picture": io.BytesIO(png((i, 0, 0))),
                    "meta": {"words": [f"first {i}", f"ヤ {i}"]},
                    "question": f"question {i}",
                    "turns": [
                        {"from": "human", "value": f"hello {i}"},
                        {"from": "gpt", "value": f"reply {i}"},
                    ],
                },
            )


# Of a builder in a package, TFDS 4.9.10 looks for its code with a module it does not install.
Pictures.__module__ = "pictures"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    builder = Pictures(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def test_tfds_through_a_field_map(pictures):
    fields = {"image": "picture", "caption": "meta/words", "conversations": "turns"}
    source = open_source("tfds", pictures, fields=fields)
    assert len(source) == 6
    found = {record["question"]: record for record in (source[i] for i in range(6))}
    assert found == {
        f"question {i}": {
            "images": [png((i, 0, 0))],
            "caption": [f"first {i}", f"ヤ {i}"],
            "question": f"question {i}",
            "conversations": [
                {"from": "human", "value": f"hello {i}"},
                {"from": "gpt", "value": f"reply {i}"},
            ],
        }
        for i in range(6)
    }
    assert pickle.loads(pickle.dumps(source))[3] == source[3]
    assert len(open_source("tfds", pictures, "train[:50%]", fields)) == 3


def test_jsonl_with_its_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png((1, 1, 1)))
    (tmp_path / "b.png").write_bytes(png((2, 2, 2)))
    turns = [{"from": "human", "value": "<image><image> which?"}, {"from": "gpt", "value": "é 中"}]
    records = [
        {"image": "a.png", "caption": ["one", "two"]},
        {"text": "no\nimage"},
        {"image": ["a.png", "b.png"], "conversations": turns, "id": 7},
    ]
    path = write_lines(tmp_path / "data.jsonl", records)
    with open(path, "a") as more:
        more.write("\n  \n" + json.dumps({"text": "after blank lines"}))
    source = open_source("jsonl", path)
    assert len(source) == 4
    assert source[0] == {"caption": ["one", "two"], "images": [png((1, 1, 1))]}
    assert source[1] == {"text": "no\nimage"}
    assert source[2] == {"conversations": turns, "images": [png((1, 1, 1)), png((2, 2, 2))]}
    assert source[3] == {"text": "after blank lines"}
    assert source.name(3) == f"{path} line 6"
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_is_one_array(tmp_path, indent):
    """As LLaVA's own files are; entries of any spelling are found by their bytes."""
    (tmp_path / "a.png").write_bytes(png((1, 1, 1)))
    records = [
        {"image": "a.png", "caption": 'é 中 "[{,]}" \\'},
        ["no object"],
        {"text": "last", "nested": [[], {"a": [1, 2]}]},
    ]
    path = tmp_path / "data.json"
    text = json.dumps(records, indent=indent, ensure_ascii=indent is None)
    path.write_bytes(b"\n " + text.encode() + b"\r\n")
    source = open_source("jsonl", str(path))
    assert len(source) == 3
    assert source[0] == {"caption": records[0]["caption"], "images": [png((1, 1, 1))]}
    assert source[2] == {"text": "last"} and source.name(2) == f"{path} entry 3"
    with pytest.raises(ValueError, match="the entry is valid JSON but not an object"):
        source[1]
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    write_lines(tmp_path / "data.jsonl", [{"text": "a line"}])
    both = open_source("jsonl", str(tmp_path / "data.json*"))
    assert [both.name(i)[len(str(path)) :] for i in (0, 2, 3)] == [
        " entry 1",
        " entry 3",
        "l line 1",
    ]


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"text": "a line"}', "something else stands at byte 0"),
        ('[{"text": "a"} {"text": "b"}]', "something else stands at byte 15"),
        ('[{"text": "a"}', "something else stands at byte 14"),
        ('[{"text": "a"},]', "Expecting value"),
        ('[{"text": "cut', "Unterminated string"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "something else stands at byte 14"),
    ],
)
def test_a_json_file_that_is_no_array(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json is not one JSON array .{reason}.*name it .jsonl"):
        open_source("jsonl", str(tmp_path / "a.json"))


def test_jsonl_folder_with_images_elsewhere(tmp_path):
    images, lines = tmp_path / "images", tmp_path / "lines"
    images.mkdir()
    lines.mkdir()
    (images / "a.png").write_bytes(png())
    write_lines(lines / "2.jsonl", [{"picture": "a.png", "caption": "second"}])
    write_lines(lines / "1.jsonl", [{"picture": "a.png", "caption": "first"}])
    for path in (str(lines), str(lines / "*.jsonl")):
        source = open_source("jsonl", path, fields={"image": "picture"}, image_folder=str(images))
        assert [source[i]["caption"] for i in range(2)] == ["first", "second"]
        assert source[1]["images"] == [png()]


def test_parquet_row_groups_bytes_and_structs(tmp_path):
    rows = [
        {
            "image": {"bytes": png((i, 0, 0)), "path": None},
            "raw": png((0, i, 0)),
            "caption": f"caption {i}",
            "nested": {"captions": [f"x{i}", f"y{i}"]},
        }
        for i in range(7)
    ]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    source = open_source("parquet", str(path))
    assert len(source) == 7
    for i in (6, 0, 3, 2):
        assert source[i] == {"images": [png((i, 0, 0))], "caption": f"caption {i}"}
    assert source.name(4) == f"{path} row 1 of group 1"
    mapped = open_source(
        "parquet", str(path), fields={"image": "raw", "caption": "nested/captions"}
    )
    mapped[0]
    mapped = pickle.loads(pickle.dumps(mapped))
    assert mapped[5] == {"images": [png((0, 5, 0))], "caption": ["x5", "y5"]}


def test_webdataset_groups_members_by_key(tmp_path):
    first = {
        "s/0001.jpg": png((1, 0, 0)),
        "s/0001.txt": "eine Blüte".encode(),
        "s/0002.json": json.dumps({"caption": "from json", "width": 3}).encode(),
        "s/0002.png": png((2, 0, 0)),
        # LLaVA's: the name of the image beside it is no image of its own.
        "s/0003.jpg": png((4, 0, 0)),
        "s/0003.json": json.dumps({"image": "0003.jpg", "images": ["0003.jpg"]}).encode(),
    }
    write_tar(tmp_path / "0.tar", first)
    write_tar(tmp_path / "1.tar", {"s/0001.png": png((3, 0, 0)), "s/0001.txt": b"other shard"})
    source = open_source("webdataset", str(tmp_path / "*.tar"))
    assert [source[i] for i in range(len(source))] == [
        {"caption": "eine Blüte", "images": [png((1, 0, 0))]},
        {"caption": "from json", "images": [png((2, 0, 0))]},
        {"images": [png((4, 0, 0))]},
        {"caption": "other shard", "images": [png((3, 0, 0))]},
    ]
    assert source.name(3) == f"{tmp_path / '1.tar'} s/0001"
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


def test_gs_paths_through_fsspec(monkeypatch, tmp_path):
    """Records are fetched by their bytes: an open file would read a block ahead for each."""
    fetched = []

    class Bucket(MemoryFileSystem):
        protocol = ("gcs", "gs")
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

        def cat_file(self, path, start=None, end=None, **kwargs):
            fetched.append((path, start, end))
            return super().cat_file(path, start, end, **kwargs)

    bucket = Bucket()
    monkeypatch.setattr(type(fsspec_backend), "fs", lambda self, path: bucket)
    monkeypatch.setattr(fsspec, "url_to_fs", lambda url: (bucket, url.removeprefix("gs:/")))
    bucket.pipe("/bucket/a.png", png())
    line = b'{"image": "a.png", "caption": "in a bucket"}\n'
    bucket.pipe("/bucket/data.jsonl", b"\n" + line + line)
    source = open_source("jsonl", "gs://bucket/data.jsonl")
    assert source[0] == source[1] == {"caption": "in a bucket", "images": [png()]}
    assert source.name(0) == "gs://bucket/data.jsonl line 2"
    first, second = 1 + len(line), 1 + 2 * len(line)
    assert fetched == [("/bucket/data.jsonl", 1, first), ("/bucket/data.jsonl", first, second)]

    tar = write_tar(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"a caption", "b.txt": b""})
    bucket.pipe("/bucket/a.tar", Path(tar).read_bytes())
    source, fetched[:] = open_source("webdataset", "gs://bucket/a.tar"), []
    assert source[0] == {"caption": "a caption", "images": [png()]}
    assert [end - start for _, start, end in fetched] == [len(png()), len(b"a caption")]
    assert pickle.loads(pickle.dumps(source))[0] == source[0]
    bucket.rm("/bucket/a.tar")
    with pytest.raises(OSError, match="gs://bucket/a.tar was there and is gone") as caught:
        source[0]
    assert caught.type is OSError


# Files that cannot be opened: one sentence, at once.


def test_missing_files(tmp_path):
    for kind, suffix in (("jsonl", ".jsonl"), ("parquet", ".parquet"), ("webdataset", ".tar")):
        for path in (tmp_path / f"none{suffix}", tmp_path, tmp_path / f"*{suffix}"):
            with pytest.raises(FileNotFoundError, match=f"There is no {suffix} file at"):
                open_source(kind, str(path))
    for name in ("no_such_dataset", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="neither the folder of a prepared dataset"):
            open_source("tfds", name)


def test_empty_files(tmp_path):
    for kind in ("jsonl", "parquet", "webdataset"):
        path = tmp_path / "empty"
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="is empty: remove it"):
            open_source(kind, str(path))
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="is empty: write one JSON object a line"):
        open_source("jsonl", str(tmp_path / "blank.jsonl"))
    for text in ("[]", " [ \n] "):
        (tmp_path / "none.json").write_text(text)
        with pytest.raises(ValueError, match="is empty: write one JSON object a line"):
            open_source("jsonl", str(tmp_path / "none.json"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="holds no row"):
        open_source("parquet", str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match="holds no file"):
        open_source("webdataset", write_tar(tmp_path / "none.tar", {}))


def test_files_of_another_format(tmp_path, pictures):
    path = tmp_path / "x"
    path.write_bytes(b"hello, this is neither of them" * 40)
    with pytest.raises(ValueError, match="is not a parquet file"):
        open_source("parquet", str(path))
    with pytest.raises(ValueError, match="is not an uncompressed tar file"):
        open_source("webdataset", str(path))
    with pytest.raises(ValueError, match="is not an uncompressed tar file"):
        open_source("webdataset", write_tar(tmp_path / "z.tar.gz", {"a.txt": b"a"}, "w:gz"))
    with pytest.raises(ValueError, match="no format 'csv': use tfds, jsonl, parquet or web"):
        open_source("csv", str(path))
    with pytest.raises(ValueError, match="cannot be read as split 'test'"):
        open_source("tfds", pictures, "test")


def test_tfds_without_random_access(tmp_path, pictures):
    folder = tmp_path / "pictures" / "1.0.0"
    shutil.copytree(pictures, folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="stored as tfrecord, which allows no random access"):
        open_source("tfds", str(folder))


def test_unknown_fields(tmp_path, pictures):
    with pytest.raises(ValueError, match="no field 'captoin' to map to: did you mean caption"):
        open_source("jsonl", "x", fields={"captoin": "text"})
    with pytest.raises(ValueError, match="no field 'img': it has meta, picture, question, turns"):
        open_source("tfds", pictures, fields={"image": "img"})
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no field 'words': it has text"):
        open_source("parquet", str(tmp_path / "a.parquet"), fields={"caption": "words"})


# Records that cannot be used: ValueError or FileNotFoundError, for the pipeline to count.


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "cut', "the line is not valid JSON"),
        (b'["text"]', "not an object"),
        (b'{"text": "\xff\xfe"}', "not valid JSON"),
        (b'{"text": "half \\ud83d"}', "not UTF-8"),
        (b'{"image": 5}', "its image is int"),
        (b'{"conversations": {"id": 5}}', "its conversations are no list of turns"),
    ],
)
def test_broken_lines(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    source = open_source("jsonl", str(tmp_path / "a.jsonl"))
    assert source[0] == {"text": "good"}
    with pytest.raises(ValueError, match=reason):
        source[1]


def test_brackets_in_a_folder_are_no_pattern(tmp_path):
    folder = tmp_path / "photos [2024]"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [{"text": "x"}])
    for path in (folder, folder / "*.jsonl", folder / "a.jsonl"):
        assert open_source("jsonl", str(path))[0] == {"text": "x"}
    with pytest.raises(ValueError, match=r"a.jsonl has a \*\*: name the folders one by one"):
        open_source("jsonl", str(tmp_path / "**" / "a.jsonl"))
    # Of a folder that is not there they are one, as ever.
    assert open_source("jsonl", str(tmp_path / "[o-q]hotos*" / "*.jsonl"))[0] == {"text": "x"}


def test_missing_image_file(tmp_path):
    (tmp_path / "folder.png").mkdir()
    records = [{"image": "none.png"}, {"image": "folder.png"}]
    source = open_source("jsonl", write_lines(tmp_path / "a.jsonl", records))
    for i in range(2):
        with pytest.raises(FileNotFoundError, match="there is no image file .*png"):
            source[i]


def test_broken_members_of_a_tar(tmp_path):
    members = {"a.json": b"{", "b.txt": b"\xff", "c.json": b"[]"}
    source = open_source("webdataset", write_tar(tmp_path / "a.tar", members))
    for i, reason in enumerate(("its .json is not valid JSON", "not UTF-8", "not an object")):
        with pytest.raises(ValueError, match=reason):
            source[i]


def test_numbers_are_no_image(tmp_path):
    table = pa.table({"image": [[0.0, 1.0]]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="its image is float"):
        open_source("parquet", str(tmp_path / "a.parquet"))[0]


@pytest.mark.parametrize("kind, name", [
    ("jsonl", "a.jsonl"), ("parquet", "a.parquet"), ("webdataset", "a.tar"), ("jsonl", "a.png"),
])  # fmt: skip
def test_storage_that_is_gone_is_no_broken_record(tmp_path, kind, name):
    """Which would be skipped, and counted only when thousands are lost: the run ends instead."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    path = write_lines(folder / "a.jsonl", [{"image": "a.png", "caption": "a"}])
    if kind == "parquet":
        path = str(folder / "a.parquet")
        pq.write_table(pa.table({"text": ["a"]}), path)
    elif kind == "webdataset":
        path = write_tar(folder / "a.tar", {"a.txt": b"a"})
    elif name == "a.png":  # The pictures lie elsewhere, and their folder is gone.
        source = open_source(kind, path, image_folder=str(tmp_path / "nowhere"))
        with pytest.raises(OSError, match="The folder of images .*nowhere is not there") as caught:
            source[0]
        assert caught.type is OSError
        return
    source = open_source(kind, path)
    (folder / name).unlink()
    with pytest.raises(OSError, match=f"{name} was there and is gone") as caught:
        source[0]
    assert caught.type is OSError


def test_a_damaged_group_of_a_parquet_file_is_a_broken_record(tmp_path):
    """pyarrow's OSError is no failing disk's: it has no number of one."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    data = bytearray(path.read_bytes())
    data[4:24] = bytes(20)
    path.write_bytes(data)
    source = open_source("parquet", str(path))
    with pytest.raises(ValueError, match="group 0 of .*a.parquet is damaged"):
        source[1]


def test_a_mark_before_utf8_is_passed_over(tmp_path):
    records = [{"text": "é"}, {"text": "two"}]
    for name, text in (
        ("a.json", json.dumps(records)), ("a.jsonl", "\n".join(map(json.dumps, records))),
    ):  # fmt: skip
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        source = open_source("jsonl", str(tmp_path / name))
        assert [source[i]["text"] for i in range(2)] == ["é", "two"]
