"""Who may connect: an authority that the head makes for its session, and certificates of it, in invitations.

Both ends prove that they have a certificate of this authority (mutual TLS), the head one for servers and workers one
for clients: an invitation, which is one file with all that a worker needs, makes nobody a head. Whoever holds it can be
a worker, and sees what workers see, until it expires.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

import storage
from lab.errors import LabError
from lab.fleet.wire import Keys, host_and_port, try_to_listen
from lab.fleet.worker import digests_of
from lab.session.session import Session

DAYS = 30.0  # that an invitation is good for
AUTHORITY_DAYS = 3650.0
HEAD = "head"
SECRET = 0o600  # mode of a file that its owner alone can read


def authority_of(session: Session) -> tuple[str, str]:
    """(certificate, key) of the session's authority, each a PEM text; made when first asked for."""
    path = session.folder / "fleet" / "authority.json"
    if not path.exists():
        certificate, key = _signed(f"autoresearch {session.name}", AUTHORITY_DAYS, None)
        storage.write_json(path, {"certificate": certificate, "key": key}, mode=SECRET)
    known = json.loads(path.read_text())
    return known["certificate"], known["key"]


def keys(session: Session, name: str, days: float = DAYS) -> Keys:
    """A new certificate of the session's authority: for the head, if its name is that, else for a worker."""
    authority = authority_of(session)
    return Keys(authority[0], *_signed(name, days, authority), time.time() + 86400 * days)


@dataclass(frozen=True)
class Invitation:
    """What a worker needs to join. `judge`, `data`: digests of what it will be given (fleet/worker.py), None where the
    head is this machine's own."""

    address: str
    session: str
    keys: Keys
    judge: str | None = None
    data: str | None = None

    def write(self, path: Path) -> None:
        storage.write_json(path, asdict(self), mode=SECRET)

    @classmethod
    def read(cls, path: Path) -> Invitation:
        """LabError if the file is not an invitation."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise LabError(
                f"{path} is not an invitation ({error}); make one on the head: python -m lab invite"
            ) from error


def invite(session: Session, path: Path, address: str, listen: str | None, days: float) -> str:
    """Writes an invitation; where the head has to listen.

    Args:
        address: HOST:PORT at which others reach the head. listen: HOST:PORT of this machine; by default all its
            addresses, of IPv6 if `address` is one, and that port.

    Raises:
        LabError: the session has no sandbox, an address is not HOST:PORT, or this machine can't listen there.
    """
    if session.started.sandbox is None:
        raise LabError("this session was begun with --unsandboxed: its runs may not be made on other machines")
    for text in filter(None, (address, listen)):
        with suppress(LabError):
            if host_and_port(f"tls://{text}")[1]:
                continue
        raise LabError(
            f"{text} is not HOST:PORT: write a port above 0, and an IPv6 address in brackets, as in head.local:8786 "
            "and [fd00::1]:8786"
        )
    everywhere = "[::]" if address.startswith("[") else "0.0.0.0"
    listen = f"tls://{listen or everywhere + ':' + address.rpartition(':')[2]}"
    certified = keys(session, "worker", days)
    if not session.supervised:  # else its head may listen there
        try_to_listen(listen)
    manifest = (session.dataset / "manifest.json").read_text(encoding="utf-8")
    digests = digests_of(session.local.judge, manifest)
    Invitation(f"tls://{address}", session.name, certified, **digests).write(path)
    return listen


def require() -> None:
    """LabError if what makes certificates is not installed."""
    if importlib.util.find_spec("cryptography") is None:
        raise LabError("several devices need the package cryptography: pip install -c constraints.txt '.[fleet]'")


def _signed(name: str, days: float, authority: tuple[str, str] | None) -> tuple[str, str]:
    """(certificate, key) in PEM; signed by the authority, or by itself, which makes it one."""
    require()
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    issuer, signer = subject, key
    if authority:
        issuer = x509.load_pem_x509_certificate(authority[0].encode()).subject
        signer = serialization.load_pem_private_key(authority[1].encode(), None)
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1 + max(0.0, -days)))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
    )
    if authority:
        role = ExtendedKeyUsageOID.SERVER_AUTH if name == HEAD else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([role]), critical=True)
    certificate = builder.sign(signer, hashes.SHA256())  # pyright: ignore
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return (
        certificate.public_bytes(pem).decode(),
        key.private_bytes(pem, private, serialization.NoEncryption()).decode(),
    )
