"""Reading shards: ours and foreign ones, whole and damaged, from threads and processes."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import re
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spectralar.training.data import ShardError, ShardSet
from spectralar.training.data import shard_set as shard_set_module
from spectralar.training.data.tar_index import Component, read_index, scan_tar, write_index


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def copy(shards_dir, tmp_path) -> Path:
    return Path(shutil.copytree(shards_dir, tmp_path / "copy"))


def everything(shards: ShardSet) -> list[tuple[bytes, int, str]]:
    return [shards.read(i) for i in range(len(shards))]


def test_an_error_of_the_disk_names_shard_and_key(shards_dir, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    shards = ShardSet.open(shards_dir)
    monkeypatch.setattr("os.pread", fail)
    with pytest.raises(ShardError, match=r"^shard .*\.tar, key 00000003: \[Errno 5\] Input/output error"):
        shards.read(3)


def test_folder_pattern_and_single_tar_agree(shards_dir, tmp_path):
    ours = ShardSet.open(shards_dir)
    pattern = ShardSet.open(str(shards_dir / "train-*.tar"))
    assert everything(pattern) == everything(ours)
    assert pattern.class_names == ("0", "1", "2") and pattern.manifest == {}
    single = ShardSet.open(shards_dir / "train-000001.tar", classes=3)
    assert everything(single) == everything(ours)[5:10]
    for path in shards_dir.glob("*.tar"):
        shutil.copy(path, tmp_path)
    assert ShardSet.open(tmp_path).digest == pattern.digest != ours.digest


def test_foreign_names(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("d/a.JPEG", b"A"),
            ("d/a.cls", b" 1\n"),
            ("d/a.json", b"{}"),
            ("b.seg.png", b"no"),
            ("b.png", b"B"),
            ("b.cls", b"0"),
            ("c" * 120 + ".webp", b"C"),
            ("c" * 120 + ".cls", b"2"),
        ],
    )
    shards = ShardSet.open(path)
    assert everything(shards) == [(b"A", 1, "d/a"), (b"B", 0, "b"), (b"C", 2, "c" * 120)]


@pytest.mark.parametrize(
    "files, message",
    [
        ([("a.jpg", b"A")], r"key a: has no class"),
        ([("a.cls", b"1")], r"key a: needs exactly one image .* but has cls"),
        ([("a.jpg", b"A"), ("a.png", b"A"), ("a.cls", b"1")], r"key a: needs exactly one image .* has jpg, png, cls"),
        ([("a.jpg", b"A"), ("a.cls", b"cat")], r"key a: class b'cat' is not an integer"),
        ([("a.jpg", b"A"), ("a.cls", b"-1")], r"key a: label -1 is not in"),
        ([("a.jpg", b"A"), ("a.jpg", b"A"), ("a.cls", b"1")], r"key a: component jpg comes twice"),
        ([], "no samples in 1 shards"),
    ],
)
def test_foreign_samples_that_cannot_be_used(tmp_path, files, message):
    with pytest.raises(ShardError, match=rf"x\.tar.*{message}|{message}.*x\.tar"):
        ShardSet.open(write_tar(tmp_path / "x.tar", files))


def test_label_of_classes_or_more_names_shard_and_key(tmp_path, shards_dir):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A"), ("a.cls", b"4"), ("b.jpg", b"A"), ("b.cls", b"5")])
    with pytest.raises(ShardError, match=r"shard .*x\.tar, key b: label 5 is not in 0\.\.4"):
        ShardSet.open(path, classes=5)
    with pytest.raises(ValueError, match="classes must be positive, not 0"):
        ShardSet.open(path, classes=0)
    with pytest.raises(ValueError, match="classes is 5, but the manifest names 3"):
        ShardSet.open(shards_dir, classes=5)


def test_nothing_there(tmp_path):
    for path in (tmp_path, tmp_path / "none.tar", tmp_path / "*.tar"):
        with pytest.raises(ValueError, match="is no folder with tars, no tar and no pattern that matches any"):
            ShardSet.open(path)


def test_foreign_tar_cut_at_every_place_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A" * 700), ("a.cls", b"1")])
    whole = path.read_bytes()
    end = 512 + 1024 + 512 + 512
    for length in [*range(0, end, 256), end - 1, end, end + 511]:
        path.write_bytes(whole[:length])
        with pytest.raises(ShardError, match=r"x\.tar is cut short"):
            ShardSet.open(path)
    path.write_bytes(whole[: end + 512])
    assert everything(ShardSet.open(path)) == [(b"A" * 700, 1, "a")]


def test_compressed_tar_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A"), ("a.cls", b"1")], "w:gz")
    with pytest.raises(ShardError, match=r"x\.tar is .*not an uncompressed tar"):
        ShardSet.open(path)


def test_damage_to_our_shards_names_the_shard(copy):
    shard, index = copy / "train-000003.tar", copy / "train-000003.idx"
    data, lines = shard.read_bytes(), index.read_text()
    shard.write_bytes(data[:-1])
    with pytest.raises(
        ShardError, match=rf"train-000003.tar has {len(data) - 1} bytes, but its manifest says {len(data)}"
    ):
        ShardSet.open(copy)
    shard.unlink()
    with pytest.raises(ShardError, match=r"train-000003.tar is missing"):
        ShardSet.open(copy)
    shard.write_bytes(data)
    for text, message in [
        (lines.replace("v1.2", "v1.1"), "the first line must be 'v1.2 3'"),
        ("", "the first line must be"),
        ("v1.2 0\n", "its index has 0 samples, its manifest 3"),
        (lines.replace(" i32", " i32 x", 1), "line 2: expected groups"),
        (lines.replace("cls 512", "cls x12", 1), "line 2: invalid literal"),
        (lines.replace("cls 512", "cls 99999999", 1), "line 2: data outside the shard"),
    ]:
        index.write_text(text)
        with pytest.raises(ShardError, match=rf"shard .*train-000003.tar.*{re.escape(message)}"):
            ShardSet.open(copy)
    index.unlink()
    with pytest.raises(ShardError, match=r"train-000003.tar has no index train-000003.idx"):
        ShardSet.open(copy)


def test_index_with_a_key_twice(copy):
    index = copy / "train-000000.idx"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([*lines[:-1], lines[1]]) + "\n")
    with pytest.raises(ShardError, match="1 keys come twice"):
        read_index(index, copy / "train-000000.tar")


@pytest.mark.parametrize("name", ["a b.jpg", "a.b.jpg", "a"])
def test_names_that_an_index_cannot_hold(tmp_path, name):
    with pytest.raises(ShardError, match="needs exactly one dot and no spaces"):
        write_index(tmp_path / "x.idx", {"a": [Component("jpg", 512, 1, name)]})


def test_bad_manifests(copy):
    manifest = copy / "manifest.json"
    values = json.loads(manifest.read_text())
    for text, message in [
        ("{", "is not JSON"),
        ("[]", "is of format None"),
        (
            json.dumps({**values, "format": "spectralar-shards 9"}),
            "is of format 'spectralar-shards 9'; this version reads",
        ),
    ]:
        manifest.write_text(text)
        with pytest.raises(ShardError, match=message):
            ShardSet.open(copy)
    values["shards"][1]["labels"][3] = 3
    manifest.write_text(json.dumps(values))
    with pytest.raises(ShardError, match=r"train-000001.tar, key 00000008: label 3 is not in 0\.\.2"):
        ShardSet.open(copy)


def test_verify_finds_one_changed_byte(copy):
    shards = ShardSet.open(copy)
    shards.verify()
    path = copy / "train-000003.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"train-000003.tar has changed"):
        ShardSet.open(copy).verify()
    with pytest.raises(ValueError, match="no digests to compare with"):
        ShardSet.open(str(copy / "*.tar")).verify()


def test_shard_cut_while_open(copy):
    shards = ShardSet.open(copy)
    (copy / "train-000003.tar").write_bytes(b"x" * 600)
    with pytest.raises(ShardError, match=r"train-000003.tar, key 00000017: the shard is cut short, 0 of \d+ bytes"):
        shards.read(17)


@pytest.mark.parametrize("index", [-1, 18])
def test_index_out_of_range(shards_dir, index):
    with pytest.raises(IndexError, match=rf"index must be 0\.\.17, not {index}"):
        ShardSet.open(shards_dir).read(index)


@pytest.mark.parametrize("limit", [256, 1])
def test_threads_and_processes_read_the_same(shards_dir, monkeypatch, limit):
    monkeypatch.setattr(shard_set_module, "_OPEN_FILES", limit)
    shards = ShardSet.open(shards_dir)
    expected = everything(ShardSet.open(shards_dir))
    order = list(range(18)) * 20
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shards.read, order)) == [expected[i] for i in order]
    assert everything(pickle.loads(pickle.dumps(shards))) == expected
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as processes:
            assert processes.map(shards.read, range(18)) == expected
    shards.close()
    assert shards.read(3) == expected[3]
    shards.close()


def test_scan_ignores_folders(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert scan_tar(path) == {}
