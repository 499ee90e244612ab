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
    known = {**(session.fleet or {}), "devices": devices}
    if devices or len(known) > 1:
        storage.write_json(session.folder / FLEET, known)
    else:
        (session.folder / FLEET).unlink(missing_ok=True)


def listen(session: Session, address: str) -> None:
    """Notes at which address workers of other machines are listened for."""
    storage.write_json(session.folder / FLEET, {**(session.fleet or {"devices": []}), "listen": address})


def is_pooled(session: Session) -> bool:
    """Whether workers make the runs. Where others are only invited, a night waits for them, and a command does not."""
    known = session.fleet
    return known is not None and bool(known["devices"] or known.get("elsewhere") or session.owned_by_night)


def status(session: Session) -> list[dict]:
    """The devices, as the head has last told: name, doing, usable, tokens_per_second, heat. [] if it is not at work."""
    known = storage.read_json(session.folder / "fleet" / STATUS)
    return known["devices"] if known and time.time() < known["time"] + STALE else []
