"""The embedded model's pictures: which emoji, their classes and split; drawn here with letters of Pillow's own font."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from spectralar.training.data import emoji, evaluation_batches
from spectralar.training.data.emoji import draw_emoji, emoji_command, open_font, read_emoji, write_emoji_shards

LIST = """\
# emoji-test.txt
# group: Smileys & Emotion
# subgroup: face-smiling
0041                                       ; fully-qualified     # A E1.0 grinning face
0042                                       ; unqualified         # B E1.0 no face
# subgroup: face-hand
0043 0044                                  ; fully-qualified     # CD E1.0 two points
# group: Flags
# subgroup: flag
"""


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """Twenty-two emoji, letters that a font without emoji has."""
    letters = [f"{ord('E') + i:04X} ; fully-qualified # letter\n" for i in range(20)]
    path = tmp_path / "emoji-test.txt"
    path.write_text(LIST + "".join(letters), encoding="utf-8")
    return path


@pytest.fixture
def face(monkeypatch: pytest.MonkeyPatch) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(48)
    assert isinstance(font, ImageFont.FreeTypeFont)
    monkeypatch.setattr(emoji, "open_font", lambda path: font)
    return font


def test_fully_qualified_emoji_and_their_classes(names: Path) -> None:
    found = read_emoji(names)
    assert found[:2] == [("A", "Smileys & Emotion / face-smiling"), ("CD", "Smileys & Emotion / face-hand")]
    assert len(found) == 22 and {label for _, label in found[2:]} == {"Flags / flag"}


def test_the_picture_is_whole_and_on_white(face: ImageFont.FreeTypeFont) -> None:
    pixels = np.asarray(draw_emoji("A", face))
    assert pixels.shape == (128, 128, 3) and (pixels[-8:] == 255).all() and pixels.min() < 50


@pytest.mark.usefixtures("face")
def test_train_and_val_are_all_of_them_once(names: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    emoji_command(Path("font"), names, out)
    assert capsys.readouterr().out == f"20 pictures, 3 classes: {out / 'train'}\n2 pictures, 3 classes: {out / 'val'}\n"
    train, val = write_emoji_shards(Path("font"), names, out)  # complete, thus only opened
    assert train.class_names == val.class_names
    assert train.class_names == ("Flags / flag", "Smileys & Emotion / face-hand", "Smileys & Emotion / face-smiling")
    pictures = [
        image
        for shards in (train, val)
        for batch in evaluation_batches(shards.paths[0].parent, batch=8, size=128)
        for image in batch.images
    ]
    assert len({image.numpy().tobytes() for image in pictures}) == 22
    assert sorted(np.bincount(np.concatenate([train.labels, val.labels]))) == [1, 1, 20]


def test_what_cannot_be_drawn(
    names: Path, face: ImageFont.FreeTypeFont, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no single picture for 'WWWW' \(U\+0057 U\+0057"):
        draw_emoji("WWWW", face)
    with pytest.raises(ValueError, match="lists no fully-qualified emoji"):
        empty = tmp_path / "empty.txt"
        empty.write_text("# group: none\n")
        read_emoji(empty)
    with pytest.raises(ValueError, match="cannot be read, or has no bitmaps of 109 points"):
        open_font(names)
    monkeypatch.setattr(emoji.features, "check", lambda name: False)
    with pytest.raises(ValueError, match="without libraqm"):
        open_font(names)
    assert isinstance(draw_emoji("B", face), Image.Image)
