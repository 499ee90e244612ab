"""The devices that a night uses, and their state as its head reports it: two small files beside the journal."""

from __future__ import annotations

import time

import storage
from lab.session.session import FLEET, Session

STATUS = "status.json"
STALE = 30.0  # seconds after which a status says nothing


def choose(session: Session, devices: list[str]) -> None:
    """Stores the devices of this machine that take part; none if only the session's own is used, and no others are
    invited."""
    _note(session, devices=devices)


def listen(session: Session, address: str | None) -> None:
    """Notes at which address workers of other machines are listened for; None: they are no more."""
    _note(session, listen=address)


def _note(session: Session, **changes) -> None:
    known = {"devices": [], **(session.fleet or {}), **changes}
    known = {name: value for name, value in known.items() if value is not None}
    if known["devices"] or len(known) > 1:
        storage.write_json(session.folder / FLEET, known)
    else:
        (session.folder / FLEET).unlink(missing_ok=True)


def is_pooled(session: Session) -> bool:
    """Whether workers make the runs. Where others are only invited, a night waits for them, and a command does not."""
    known = session.fleet
    return known is not None and bool(known["devices"] or known.get("elsewhere") or session.owned_by_night)


def status(session: Session) -> list[dict]:
    """The devices, as the head has last told: name, doing, usable, tokens_per_second, heat. [] if it is not at work."""
    known = storage.read_json(session.folder / "fleet" / STATUS)
    return known["devices"] if known and time.time() < known["time"] + STALE else []
