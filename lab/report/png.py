"""A figure as a PNG, for sharing: drawn by Pillow three times as large and scaled down, so that edges are smooth."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFont

from lab.report.figure import Area, Figure, Line, Marks, Text

FINER = 3
PAPER = "#fcfcfa"
INK = {"tick": "#5d6169", "label": "#24272c", "title": "#16181c", "told": "#4a4e56"}
COLOURS = {"grid": "#e7e7e3", "axis": "#9a9da3", "band": "#dcefe7", "best": "#0b7a5b", "kept": "#0b7a5b",
           "stem": "#b9bcc2", "discard": "#a3a7ae", "far": "#a3a7ae", "near": "#b36b00", "replay": "#3b5bdb",
           "crash": "#c4321f"}  # fmt: skip
HUES = ("#0b7a5b", "#3b5bdb", "#b36b00", "#a02c7d", "#56606b", "#c4321f")  # as in page.css
WIDTHS = {"best": 2.2, "axis": 1.2}


def png(figure: Figure) -> bytes:
    """The file."""
    image = Image.new("RGB", (round(figure.width * FINER), round(figure.height * FINER)), PAPER)
    draw = ImageDraw.Draw(image)
    for shape in figure.shapes:
        if isinstance(shape, Text):
            font = ImageFont.load_default(shape.size * FINER)
            draw.text(
                (shape.x * FINER, shape.y * FINER),
                shape.text,
                INK[shape.name],
                font,
                {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor],
            )
        elif isinstance(shape, Marks):
            _marks(draw, shape)
        else:
            points = [(x * FINER, y * FINER) for x, y in shape.points]
            if isinstance(shape, Area):
                draw.polygon(points, _colour(shape.name))
            elif isinstance(shape, Line):
                wide = WIDTHS.get(shape.name.split()[0], 1.0)
                draw.line(points, _colour(shape.name), round(wide * FINER), "curve")
    out = io.BytesIO()
    image.resize((round(figure.width), round(figure.height)), Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
    return out.getvalue()


def _colour(name: str) -> str:
    kind, _, hue = name.partition(" hue")
    return HUES[int(hue)] if hue else COLOURS[kind]


def _marks(draw: ImageDraw.ImageDraw, shape: Marks) -> None:
    colour, r, pen = _colour(shape.name), shape.radius * FINER, round(1.4 * FINER)
    for x, y in ((x * FINER, y * FINER) for x, y in shape.points):
        box = (x - r, y - r, x + r, y + r)
        if shape.sign == "dot":
            draw.ellipse(box, colour)
        elif shape.sign == "ring":
            draw.ellipse(box, outline=colour, width=pen)
        elif shape.sign == "cross":
            draw.line(box, colour, pen)
            draw.line((x - r, y + r, x + r, y - r), colour, pen)
        else:
            draw.polygon([(x - r, y + r), (x, y - r), (x + r, y + r)], colour)
