"""The set of pictures that the embedded model was trained on, drawn from a font: anyone can make it again.

Noto Color Emoji holds every emoji as a bitmap of 136 x 128 pixels. Unicode's `emoji-test.txt` lists them with their
group and subgroup, which is the class. With font 2.042 and Emoji 15.0 the pictures differ from those of the embedded
model by 0.09 of 255 on average, and the split into 3,290 for training and 365 held out is the same.
"""

from __future__ import annotations

import csv
import random
import tempfile
from pathlib import Path
from typing import Annotated

from PIL import Image, ImageDraw, ImageFont, features
from tyro.conf import Positional, arg

from spectralar.training.data.shard_set import ShardSet
from spectralar.training.data.shards import write_shards

_POINTS, _WIDTH, _HEIGHT = 109, 136, 128  # of the font's bitmaps
_SIDE, _QUALITY = 128, 88
_HELD_OUT = 10  # one of so many


def read_emoji(names: Path) -> list[tuple[str, str]]:
    """Every fully qualified emoji of Unicode's `emoji-test.txt`, and its class, "group / subgroup", in its order.

    Raises:
        ValueError: the file lists none.
    """
    found, group, subgroup = [], "", ""
    for line in names.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif "; fully-qualified" in line:
            points = line.partition(";")[0].split()
            found.append(("".join(chr(int(point, 16)) for point in points), f"{group} / {subgroup}"))
    if not found:
        raise ValueError(f"names {names} lists no fully-qualified emoji: give Unicode's emoji-test.txt")
    return found


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """A font with the bitmaps of Noto Color Emoji.

    Raises:
        ValueError: it has none of that size, or Pillow cannot join code points to one picture.
    """
    if not features.check("raqm"):
        raise ValueError("Pillow was built without libraqm, which joins the code points of an emoji")
    try:
        return ImageFont.truetype(str(path), _POINTS, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(f"font {path} cannot be read, or has no bitmaps of {_POINTS} points: {error}") from error


def draw_emoji(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji on white, 128 x 128.

    Raises:
        ValueError: the font has no picture of its own for it.
    """
    left, top, right, bottom = font.getbbox(text)
    if right - left > _WIDTH or bottom - top > _HEIGHT or not right - left:
        raise ValueError(f"font has no single picture for {text!r} (U+{' U+'.join(f'{ord(c):04X}' for c in text)})")
    square = Image.new("RGB", (_WIDTH, _WIDTH), "white")
    ImageDraw.Draw(square).text((0, (_WIDTH - _HEIGHT) // 2), text, "black", font, embedded_color=True)
    return square.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)


def write_emoji_shards(font: Path, names: Path, out: Path) -> tuple[ShardSet, ShardSet]:
    """Draws all emoji and packs them into shards below `out`: `train`, and `val` with a tenth of them.

    Args:
        font: file of Noto Color Emoji with bitmaps.
        names: Unicode's `emoji-test.txt`.
        out: a folder, made if need be.

    Raises:
        ValueError: see `read_emoji`, `open_font`, `draw_emoji` and `write_shards`.
    """
    emoji, face = read_emoji(names), open_font(font)
    order = list(range(len(emoji)))
    random.Random(0).shuffle(order)
    held_out = len(order) // _HELD_OUT
    sets: list[ShardSet] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, chosen in (("train", order[held_out:]), ("val", order[:held_out])):
            pictures = Path(folder) / name
            pictures.mkdir()
            with (pictures / "labels.csv").open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(("file", "label"))
                for place, index in enumerate(chosen):
                    text, label = emoji[index]
                    picture = f"{place:05d}.jpg"
                    draw_emoji(text, face).save(pictures / picture, quality=_QUALITY, subsampling=0)
                    table.writerow((picture, label))
            classes = out / "train" if name == "val" else None
            labels = pictures / "labels.csv"
            sets.append(write_shards(pictures, out / name, labels=labels, classes_from=classes, prefix=name))
    return sets[0], sets[1]


def emoji_command(
    font: Annotated[Positional[Path], arg(metavar="FONT")],
    names: Annotated[Positional[Path], arg(metavar="NAMES")],
    out: Annotated[Positional[Path], arg(metavar="OUT_DIR")],
) -> None:
    """Draw the emoji of a font and pack them into shards: the pictures of the embedded model, as train and val.

    On Debian 12, apt install fonts-noto-color-emoji unicode-data brings the font (2.042) as
    /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf and the list (15.0) as /usr/share/unicode/emoji/emoji-test.txt.

    Args:
        font: file of Noto Color Emoji, as bitmaps.
        names: Unicode's list of emoji with their groups, emoji-test.txt.
        out: folder for the shards.
    """
    for shards in write_emoji_shards(font, names, out):
        print(f"{len(shards):,} pictures, {shards.classes} classes: {shards.paths[0].parent}")
