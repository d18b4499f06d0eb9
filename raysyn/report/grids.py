"""Pictures of frames: sample grids with their masks, the hero picture, and the worst memorisation pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raysyn.labels import COLOURS, STRUCTURES
from raysyn.types import PHASES, VIEWS, FrameArrays

GAP, MARGIN, HEAD = 4, 10, 20  # pixels; HEAD is the height of the columns' names
NAMES = {
    "outside": "outside the sector",
    "lv_cavity": "LV cavity",
    "tissue": "other tissue",
    "myocardium": "LV myocardium",
}
PAPER, INK, SOFT = (255, 255, 255), (34, 34, 34), (110, 110, 110)


def colour_map(label_map: np.ndarray) -> np.ndarray:
    """Label map uint8 [..., H, W] with values 0 to 4 as colours uint8 [..., H, W, 3]."""
    return COLOURS[label_map]


def _font(size: int) -> ImageFont.FreeTypeFont:
    from pathlib import Path

    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _tile(array: np.ndarray, cell: int) -> Image.Image:
    """uint8 [H, W] or [H, W, 3] as a square RGB tile; masks (colour) keep hard edges, images are smoothed."""
    soft = array.ndim == 2
    image = Image.fromarray(array).convert("RGB")
    return image.resize((cell, cell), Image.Resampling.BICUBIC if soft else Image.Resampling.NEAREST)


def tile_rows(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], cell: int = 128, heads: Sequence[str] = ()
) -> Image.Image:
    """Rows of tiles, each row's name at its left and `heads` above the columns.

    A row is (name, arrays uint8 [H, W] grey or [H, W, 3] colour).
    """
    font = _font(14)
    lines = {name: name.split("\n") for name, _ in rows}
    label = max((int(font.getlength(part)) for parts in lines.values() for part in parts), default=0)
    left = MARGIN + (label + 12 if label else 0)
    top = MARGIN + (HEAD if heads else 0)
    columns = max((len(arrays) for _, arrays in rows), default=0)
    size = (left + columns * (cell + GAP) - GAP + MARGIN, top + len(rows) * (cell + GAP) - GAP + MARGIN)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for c, head in enumerate(heads):
        draw.text((left + c * (cell + GAP) + cell // 2, MARGIN), head, fill=SOFT, font=_font(12), anchor="ma")
    for r, (name, arrays) in enumerate(rows):
        y = top + r * (cell + GAP)
        for k, part in enumerate(lines[name]):
            height = y + cell // 2 + int((k - len(lines[name]) / 2) * 19)
            draw.text((MARGIN, height), part, fill=INK if k == 0 else SOFT, font=font)
        for c, array in enumerate(arrays):
            picture.paste(_tile(array, cell), (left + c * (cell + GAP), y))
    return picture


def sample_grid(frames: FrameArrays, count: int = 8, cell: int = 128) -> Image.Image:
    """Frames with their label map above each: `count` of them, spread over the set's views and phases."""
    shown = frames.take(spread_over_views(frames, count))
    rows = [("label map", list(colour_map(shown.label_map))), ("image", list(shown.image_u8))]
    return tile_rows(rows, cell, view_names(shown))


def view_names(frames: FrameArrays) -> list[str]:
    """View and phase of each frame in words: `2CH ED`."""
    return [f"{VIEWS[view]} {PHASES[phase]}" for view, phase in zip(frames.view, frames.phase)]


def spread_over_views(frames: FrameArrays, count: int) -> list[int]:
    """`count` indices (or fewer), an equal share of each view and phase, in that order.

    Sets hold a patient's frames one after another: equal steps over them could meet the same view each time.
    """
    order = np.lexsort((frames.phase, frames.view))
    return [int(order[i]) for i in spread(len(order), count)]


def spread(total: int, count: int) -> list[int]:
    """`count` indices (or fewer) evenly over `total` items, each once."""
    count = min(total, count)
    return [int((i + 0.5) * total / count) for i in range(count)]


def hero_picture(
    source_name: str, source: FrameArrays, sets: Mapping[str, FrameArrays], count: int = 6, cell: int = 144
) -> Image.Image:
    """A column a condition: the frame that gave the mask, the (warped) label map, and what each set made of it.

    `source` holds the frames that masks were taken from, `sets` maps a name to its synthetic frames. A set whose label
    maps differ from the first set's shows its own above its images.
    """
    names = list(sets)
    first = sets[names[0]]
    place = {frame_id: i for i, frame_id in enumerate(source.frame_id)}
    known = [i for i, mask in enumerate(first.mask_frame_id) if mask in place] or list(range(len(first)))
    index = [known[i] for i in spread_over_views(first.take(known), count)]
    masks = [first.mask_frame_id[i] for i in index]
    shown = first.label_map[index]
    rows: list[tuple[str, Sequence[np.ndarray]]] = []
    if all(mask in place for mask in masks):
        rows.append((source_name, list(source.image_u8[[place[mask] for mask in masks]])))
    rows.append(("label map,\nwarped", list(colour_map(shown))))
    for name in names:
        own = _same_condition(sets[name], masks, shown)
        frames = sets[name].take(own if own is not None else spread(len(sets[name]), count))
        if own is None:
            rows.append((f"{name}\nits label map", list(colour_map(frames.label_map))))
        rows.append((name, list(frames.image_u8)))
    return tile_rows(rows, cell, view_names(first.take(index)))


def _same_condition(frames: FrameArrays, masks: Sequence[str], label_map: np.ndarray) -> list[int] | None:
    """For each mask the frame made from it with that very label map; None when one is missing."""
    found = []
    for mask, wanted in zip(masks, label_map):
        own = [
            i for i, m in enumerate(frames.mask_frame_id) if m == mask and np.array_equal(frames.label_map[i], wanted)
        ]
        if not own:
            return None
        found.append(own[0])
    return found


def worst_pairs(
    synthetic: np.ndarray, nearest: np.ndarray, similarity: Sequence[float], cell: int = 112, count: int = 16
) -> Image.Image:
    """The most similar (synthetic, nearest training) pairs, worst first. Arrays are uint8 [N, H, W], similarity [N]."""
    order = np.argsort(-np.asarray(similarity, dtype=np.float64), kind="stable")[:count]
    font = _font(12)
    across = min(8, max(len(order), 1))
    down = -(-len(order) // across)
    block = 2 * cell + GAP + 24
    picture = Image.new("RGB", (2 * MARGIN + 76 + across * (cell + GAP), 2 * MARGIN + down * (block + 10)), PAPER)
    draw = ImageDraw.Draw(picture)
    for k, i in enumerate(order):
        x, y = MARGIN + 76 + (k % across) * (cell + GAP), MARGIN + (k // across) * (block + 10)
        if k % across == 0:
            draw.text((MARGIN, y + cell // 2 - 8), "synthetic", fill=INK, font=font)
            draw.text((MARGIN, y + cell + GAP + cell // 2 - 16), "nearest in\ntraining", fill=INK, font=font)
        picture.paste(_tile(synthetic[i], cell), (x, y))
        picture.paste(_tile(nearest[i], cell), (x, y + cell + GAP))
        draw.text((x + 2, y + 2 * cell + GAP + 3), f"{float(similarity[i]):.3f}", fill=SOFT, font=font)
    return picture


def colour_key(cell: int = 14) -> Image.Image:
    """The structures' colours with their names."""
    font = _font(13)
    names = [NAMES.get(name, name.replace("_", " ")) for name in STRUCTURES]
    widths = [cell + 6 + int(font.getlength(name)) + 18 for name in names]
    picture = Image.new("RGB", (sum(widths) + 2 * MARGIN, cell + 12), PAPER)
    draw, x = ImageDraw.Draw(picture), MARGIN
    for name, colour, width in zip(names, COLOURS, widths):
        draw.rectangle((x, 6, x + cell, 6 + cell), fill=tuple(int(v) for v in colour))
        draw.text((x + cell + 6, 4), name, fill=INK, font=font)
        x += width
    return picture
