"""The report: the page that one opens in the morning, and a picture of it for sharing."""

from __future__ import annotations

from pathlib import Path

import storage
from lab.session.record import Record
from lab.errors import LabError

PNG = b"\x89PNG\r\n\x1a\n"


def write(records: list[Record], page: Path, picture: Path | None = None) -> list[Path]:
    """Writes the page about these sessions, and their progress as a PNG if there is a path for it. A report that is
    there already is replaced, whole or not at all.

    Returns:
        What was written.

    Raises:
        LabError: something else is there, or there is nothing to draw.
        DataError: it can't be written; the reason says why.
    """
    from lab.compare.analysis import Analysis  # here, as commands that write no report shall start fast
    from lab.report import charts, page as pages

    if picture and picture.absolute() == page.absolute():
        raise LabError(f"{page} can't be both the page and the picture: name two files")
    analyses = [Analysis(record) for record in records]
    files = {page: (pages.written(analyses), pages.MARK.encode())}
    if picture:
        if (card := charts.card(analyses, pages.subtitle(analyses))) is None:
            raise LabError("there is nothing to draw, no score yet or replays alone: leave --png out")
        files[picture] = card, PNG
    for path, (_, begins) in files.items():
        if path.is_dir():
            raise LabError(f"{path} is a folder; name a file in it")
        if path.exists():
            with open(path, "rb") as file:
                if file.read(len(begins)) != begins:
                    raise LabError(f"{path} exists, and is no earlier report: remove it, or name another file")
    for path, (content, _) in files.items():
        with storage.atomic(path) as file:
            file.write(content)
    return list(files)
