"""Writing shards: layout, labels, bad pictures, interruption, and what other readers make of the result."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from spectralar.training.data import ShardError, ShardSet, shards_command, write_shards
from spectralar.training.data.shards import JOURNAL, ShardProgress
from spectralar.training.data.tar_index import read_index, scan_tar


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_layout_and_manifest(tree, shards_dir):
    manifest = json.loads((shards_dir / "manifest.json").read_text())
    assert manifest["samples"] == 18 and manifest["classes"] == 3
    assert manifest["class_names"] == ["ant", "bee", "cat"] and manifest["samples_per_class"] == [5, 6, 7]
    assert manifest["skipped"] == [] and manifest["converted"] == {}
    assert [s["samples"] for s in manifest["shards"]] == [5, 5, 5, 3]
    names = [f"train-{i:06d}.{e}" for i in range(4) for e in ("idx", "tar")]
    assert sorted(contents(shards_dir)) == ["manifest.json", *names]
    for shard in manifest["shards"]:
        data = (shards_dir / shard["name"]).read_bytes()
        assert shard["bytes"] == len(data) and shard["sha256"] == hashlib.sha256(data).hexdigest()


def test_samples_are_the_files_untouched(tree, shards_dir):
    shards = ShardSet.open(shards_dir)
    stored = sorted((label, data) for data, label, _ in map(shards.read, range(len(shards))))
    files = sorted((i, p.read_bytes()) for i, c in enumerate(("ant", "bee", "cat")) for p in (tree / c).iterdir())
    assert stored == files
    assert [shards.key(i) for i in range(3)] == ["00000000", "00000001", "00000002"]


def test_tars_are_plain_and_indexed_exactly(shards_dir):
    number = 0
    for path in sorted(shards_dir.glob("*.tar")):
        data = path.read_bytes()
        index = path.with_suffix(".idx").read_text().splitlines()
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert not any(m.pax_headers or m.mtime for m in members)
        offset, groups = 0, []
        for m in members:  # no hidden long-name or PAX records between the members
            assert m.offset == offset and m.offset_data == offset + 512
            offset = m.offset_data + -(-m.size // 512) * 512
            groups.append(f"{m.name.partition('.')[2]} {m.offset_data} {m.size} {m.name}")
        assert index[0] == f"v1.2 {len(members) // 3}"
        assert index[1:] == [" ".join(groups[i : i + 3]) for i in range(0, len(groups), 3)]
        for m in members[0::3]:
            sample = [o for o in members if o.name.startswith(f"{number:08d}.")]
            values = {o.name.partition(".")[2]: data[o.offset_data : o.offset_data + o.size] for o in sample}
            assert m.name == f"{number:08d}.cls"
            assert int(values["cls"]) == int.from_bytes(values["i32"], "little") and len(values["i32"]) == 4
            number += 1
    assert number == 18


def test_webdataset_reads_the_shards(shards_dir):
    shards = ShardSet.open(shards_dir)
    stream = webdataset.WebDataset([str(p) for p in shards.paths], shardshuffle=False).decode("rgb8")
    count = 0
    for i, sample in enumerate(stream):
        data, label, key = shards.read(i)
        assert sample["__key__"] == key and sample["cls"] == label
        image = next(sample[e] for e in ("jpg", "png", "webp") if e in sample)
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        count += 1
    assert count == len(shards)


def test_same_input_gives_the_same_bytes_and_seed_another_order(tree, shards_dir, tmp_path):
    write_shards(tree, tmp_path / "again", samples_per_shard=5, workers=3)
    assert contents(tmp_path / "again") == contents(shards_dir)
    other = write_shards(tree, tmp_path / "other", samples_per_shard=5, seed=1)
    assert other.digest != ShardSet.open(shards_dir).digest
    assert sorted(other.labels) == sorted(ShardSet.open(shards_dir).labels)


def test_the_order_is_shuffled(shards_dir):
    labels = ShardSet.open(shards_dir).labels
    assert labels.tolist() != sorted(labels.tolist())


def test_max_bytes_per_shard(tree, tmp_path):
    shards = write_shards(tree, tmp_path / "small", max_bytes_per_shard=20480)
    sizes = [p.stat().st_size for p in shards.paths]
    assert max(sizes) <= 20480 and len(sizes) > 1 and len(shards) == 18
    singles = write_shards(tree, tmp_path / "single", max_bytes_per_shard=1)
    assert len(singles.paths) == len(singles) == 18


def test_resize_bounds_the_short_side(tree, tmp_path):
    shards = write_shards(tree, tmp_path / "out", resize=16)
    for i in range(len(shards)):
        assert min(Image.open(io.BytesIO(shards.read(i)[0])).size) == 16
    assert shards.manifest["converted"] == {"resize": 18}


@pytest.fixture
def messy(tmp_path, encode, picture) -> Path:
    root = tmp_path / "messy"
    (root / "b").mkdir(parents=True)
    (root / "a" / "deep").mkdir(parents=True)
    good = encode(picture(20, 20), "JPEG")
    (root / "a" / "good one.v2.jpg").write_bytes(good)
    (root / "a" / "deep" / "ünïcode.png").write_bytes(encode(picture(9, 9)))
    (root / "a" / "empty.jpg").write_bytes(b"")
    (root / "a" / "cut.jpg").write_bytes(good[: len(good) - 60])
    (root / "b" / "text.png").write_bytes(b"no picture")
    (root / "b" / "clear.png").write_bytes(encode(picture(9, 9).convert("RGBA")))
    (root / "b" / "notes.txt").write_text("notes")
    (root / "b" / ".hidden.jpg").write_bytes(b"")
    return root


def test_bad_pictures_are_listed(messy, tmp_path):
    shards = write_shards(messy, tmp_path / "out")
    assert len(shards) == 3
    skipped = {entry["file"]: entry["reason"] for entry in shards.manifest["skipped"]}
    assert set(skipped) == {"a/empty.jpg", "a/cut.jpg", "b/text.png"}
    assert skipped["a/empty.jpg"] == "empty file" and "truncated" in skipped["a/cut.jpg"]
    assert shards.manifest["ignored"] == 1 and shards.manifest["converted"] == {"transparency": 1}
    assert shards.manifest["samples_per_class"] == [2, 1]
    assert [shards.key(i) for i in range(3)] == ["00000000", "00000001", "00000002"]


def test_files_that_are_not_there_are_listed(messy, tmp_path):
    (messy / "a" / "dangling.jpg").symlink_to(messy / "nowhere.jpg")
    out = tmp_path / "out"
    vanishing = messy / "a" / "good one.v2.jpg"

    def vanish(_):
        vanishing.unlink(missing_ok=True)

    shards = write_shards(messy, out, samples_per_shard=1, workers=1, seed=3, progress=vanish)
    skipped = {entry["file"]: entry["reason"] for entry in shards.manifest["skipped"]}
    assert "No such file" in skipped["a/dangling.jpg"]
    assert len(shards) + len(skipped) == 7
    for name in ("empty.jpg", "cut.jpg"):
        (messy / "a" / name).unlink()
    (messy / "b" / "text.png").unlink()
    with pytest.raises(ShardError, match=r"a/dangling\.jpg: .*No such file"):
        write_shards(messy, tmp_path / "other", strict=True)


def test_a_link_to_a_folder_above_is_not_followed(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "in")
    (tmp_path / "in" / "ant" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "ant" / "self").symlink_to(tmp_path / "in" / "ant")
    (tmp_path / "in" / "cow").symlink_to(tree / "cat")  # another place's pictures are
    assert len(write_shards(tmp_path / "in", tmp_path / "out")) == 18 + 7


def test_strict_stops_at_a_bad_picture(messy, tmp_path):
    with pytest.raises(ShardError, match=r"(a/empty.jpg: empty|a/cut.jpg: truncated|b/text.png: not an image)"):
        write_shards(messy, tmp_path / "out", strict=True)
    write_shards(messy, tmp_path / "out")
    with pytest.raises(ShardError, match="3 such images so far"):
        write_shards(messy, tmp_path / "out", strict=True)


def test_no_usable_picture_leaves_the_folder_free(tmp_path, encode, picture):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.jpg").write_bytes(b"")
    with pytest.raises(ShardError, match=r"none of the 1 images of .* is usable; a/x.jpg: empty file"):
        write_shards(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    (tmp_path / "in" / "a" / "x.jpg").write_bytes(encode(picture(4, 4), "JPEG"))
    assert len(write_shards(tmp_path / "in", tmp_path / "out")) == 1


class Killed(Exception):
    pass


def kill_after(samples: int):
    def progress(p: ShardProgress) -> None:
        if p.written == samples:
            raise Killed

    return progress


@pytest.mark.parametrize("samples", [1, 5, 6, 11, 18])
def test_an_interrupted_run_continues_to_the_same_bytes(tree, shards_dir, tmp_path, samples):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        write_shards(tree, out, samples_per_shard=5, progress=kill_after(samples))
    assert not (out / "manifest.json").exists()
    complete = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert len(complete) == (samples - 1) // 5
    seen: list[int] = []
    write_shards(tree, out, samples_per_shard=5, progress=lambda p: seen.append(p.done))
    assert seen[0] == 5 * len(complete) + 1, "complete shards must not be decoded again"
    assert all((out / name).stat().st_mtime_ns == time for name, time in complete.items())
    assert contents(out) == contents(shards_dir)


def test_a_kill_between_shard_and_journal_repeats_that_shard(tree, shards_dir, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        write_shards(tree, out, samples_per_shard=5, progress=kill_after(11))
    journal = out / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][:20])  # the last line was being written
    write_shards(tree, out, samples_per_shard=5)
    assert contents(out) == contents(shards_dir)


def test_interruption_among_skipped_pictures(messy, tmp_path):
    whole = write_shards(messy, tmp_path / "whole", samples_per_shard=1)
    for done in range(1, 7):

        def progress(p: ShardProgress, done: int = done) -> None:
            if p.done == done:
                raise Killed

        out = tmp_path / f"out{done}"
        with pytest.raises(Killed):
            write_shards(messy, out, samples_per_shard=1, progress=progress)
        assert write_shards(messy, out, samples_per_shard=1).digest == whole.digest
        assert contents(out) == contents(tmp_path / "whole")


def test_other_settings_or_files_do_not_mix(tree, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        write_shards(tree, out, samples_per_shard=5, progress=kill_after(7))
    with pytest.raises(ValueError, match="was written from other files or with other settings"):
        write_shards(tree, out, samples_per_shard=6)
    (out / "train-000000.tar").write_bytes(b"changed")
    with pytest.raises(ShardError, match=r"train-000000.tar is missing or has changed"):
        write_shards(tree, out, samples_per_shard=5)


def test_complete_and_foreign_folders(tree, shards_dir, tmp_path):
    called: list[ShardProgress] = []
    again = write_shards(tree, shards_dir, samples_per_shard=5, progress=called.append)
    assert len(again) == 18 and not called
    with pytest.raises(ValueError, match="was written from other files or with other settings"):
        write_shards(tree, shards_dir, samples_per_shard=4)
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="holds tars that were not written here"):
        write_shards(tree, tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prefix": "a b"}, "prefix must be"),
        ({"prefix": ""}, "prefix must be"),
        ({"samples_per_shard": 0}, "samples_per_shard must be positive, not 0"),
        ({"max_bytes_per_shard": 0}, "max_bytes_per_shard must be positive, not 0"),
        ({"resize": 0}, "resize must be positive, not 0"),
        ({"quality": 101}, r"quality must be 1..100, not 101"),
        ({"seed": -1}, "seed must not be negative, not -1"),
        ({"workers": 0}, "workers must be positive, not 0"),
    ],
)
def test_arguments_are_checked_before_any_work(tree, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_shards(tree, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_source_folder_errors(tmp_path, encode, picture):
    with pytest.raises(ValueError, match="is not a folder"):
        write_shards(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        write_shards(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "x.png").write_bytes(encode(picture(4, 4)))
    with pytest.raises(ValueError, match=r"1 images outside a class folder, such as x.png"):
        write_shards(tmp_path / "in", tmp_path / "out")


@pytest.fixture
def flat(tmp_path, encode, picture) -> Path:
    root = tmp_path / "flat"
    root.mkdir()
    for i in range(3):
        (root / f"{i}.png").write_bytes(encode(picture(4, 4, i)))
    return root


def table(root: Path, text: str, suffix: str = ".csv") -> Path:
    path = root.parent / f"labels{suffix}"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "suffix, text, names, labels",
    [
        (".csv", "file,label\n0.png,2\n1.png,0\n2.png,2\n", ["0", "1", "2"], [2, 0, 2]),
        (".csv", "label,note,file\ndog,x,0.png\ncat,y,1.png\ndog,z,2.png\n", ["cat", "dog"], [1, 0, 1]),
        (".json", '{"0.png": 1, "1.png": 0, "2.png": 1}', ["0", "1"], [1, 0, 1]),
        (".json", '{"0.png": "b", "1.png": "a", "2.png": "b"}', ["a", "b"], [1, 0, 1]),
    ],
)
def test_flat_folder_with_labels(flat, tmp_path, suffix, text, names, labels):
    shards = write_shards(flat, tmp_path / "out", labels=table(flat, text, suffix))
    assert list(shards.class_names) == names
    stored = {data: label for data, label, _ in map(shards.read, range(3))}
    assert [stored[(flat / f"{i}.png").read_bytes()] for i in range(3)] == labels


@pytest.mark.parametrize(
    "suffix, text, message",
    [
        (".csv", "name,label\n0.png,1\n", "must name the columns file and label"),
        (".csv", "", "must name the columns file and label"),
        (".csv", "file,label\n0.png\n", "row 2 has no file or no label"),
        (".csv", "file,label\n0.png,1\n0.png,1\n", "file 0.png comes twice"),
        (".csv", "file,label\n0.png,1\n1.png,1\n", r"lack 1 files of .*, such as 2.png"),
        (".csv", "file,label\n0.png,0\n1.png,-1\n2.png,1\n", r"1.png is of class -1, but classes are 0\.\.1"),
        (".json", '{"0.png": 1, "0.png": 1}', "file 0.png comes twice"),
        (".json", '{"0.png": 1, "1.png": "a", "2.png": 0}', "all class numbers or all class names"),
        (".json", '{"0.png": 1.5}', "label of 0.png must be a number or a word, not 1.5"),
        (".json", '{"0.png": true}', "must be a number or a word, not True"),
        (".json", "[1]", "expected an object"),
        (".json", "{", "not JSON"),
        (".txt", "x", r"must be a .csv or .json file"),
    ],
)
def test_unusable_labels(flat, tmp_path, suffix, text, message):
    with pytest.raises(ValueError, match=message):
        write_shards(flat, tmp_path / "out", labels=table(flat, text, suffix))
    assert not (tmp_path / "out").exists()


def test_missing_label_file_and_labels_of_missing_files(flat, tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        write_shards(flat, tmp_path / "out", labels=tmp_path / "none.csv")
    labels = table(flat, '{"0.png": 0, "1.png": 0, "2.png": 0, "gone.png": 0}', ".json")
    with pytest.raises(ShardError, match=r"1 missing files, such as gone.png"):
        write_shards(flat, tmp_path / "out", labels=labels, strict=True)
    assert write_shards(flat, tmp_path / "out", labels=labels).manifest["missing"] == ["gone.png"]


def test_classes_from_another_set(tree, shards_dir, tmp_path):
    shutil.copytree(tree / "cat", tmp_path / "val" / "cat")
    val = write_shards(tmp_path / "val", tmp_path / "out", classes_from=shards_dir, prefix="val")
    assert val.class_names == ("ant", "bee", "cat") and set(val.labels.tolist()) == {2}
    assert val.paths[0].name == "val-000000.tar"
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "dog")
    with pytest.raises(ValueError, match=r"is of class 'dog', but classes are one of the known class names"):
        write_shards(tmp_path / "val", tmp_path / "out2", classes_from=shards_dir)


def test_command_prints_a_table(messy, tmp_path, capsys):
    shards_command(messy, tmp_path / "out")
    text = capsys.readouterr().out
    assert "samples" in text and "skipped a/empty.jpg: empty file" in text.replace("\n", " ")
    assert "1 transparency" in text


def test_index_round_trip(shards_dir):
    for path in shards_dir.glob("*.tar"):
        assert read_index(path.with_suffix(".idx"), path) == scan_tar(path)
