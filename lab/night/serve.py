"""The report over the local network, as it is now: read-only, at an address that only this night's terminal shows."""

from __future__ import annotations

import functools
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

import storage
from lab.errors import LabError
from lab.session.session import Session

PATIENCE = 5.0  # seconds, for which a request may stop in its middle
REFRESH = 60  # seconds, after which a browser asks again
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address is the key
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Refresh": f"{REFRESH}",
}


@contextmanager
def served(session: Session, port: int | None, say: Callable[[str], None]) -> Iterator[list[str]]:
    """A context that serves the session's report.

    Args:
        port: 0 takes any that is free; None serves nothing.

    Returns:
        the addresses, which are printed, too. LabError if the port can't be used.
    """
    if port is None:
        yield []
        return
    key, one_at_a_time = secrets.token_urlsafe(16), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout, server_version, sys_version = PATIENCE, "autoresearch", ""

        def do_GET(self):
            known = secrets.compare_digest(self.path.encode(), f"/{key}/".encode())
            content, status = b"", 404
            try:
                if known:
                    with one_at_a_time:
                        content, status = report(session), 200
            except (storage.Stop, Exception) as error:  # the night goes on without
                content, status = f"no report now: {error}".encode(), 503
            self.send_response(status)
            for name, value in (HEADERS if known else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = listening(port, Handler)
    thread = threading.Thread(target=server.serve_forever, name="page", daemon=True)
    thread.start()
    addresses = [f"http://{host}:{server.server_port}/{key}/" for host in hosts()]
    say(f"the report, for any device in this network that is given an address: {'  '.join(addresses)}")
    try:
        yield addresses
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Server(ThreadingHTTPServer):
    """A server that survives clients which disconnect, and that none can hold up."""

    daemon_threads, block_on_close = True, False

    def handle_error(self, request, client_address):
        pass


def listening(port: int, handler: type[BaseHTTPRequestHandler] = BaseHTTPRequestHandler) -> Server:
    """A server on a port. LabError if the port can't be used."""
    try:
        return Server(("", port), handler)
    except (OSError, OverflowError) as error:
        raise LabError(
            f"--page: port {port} can't be used ({error}); give another, or none for any free one"
        ) from error


def report(session: Session) -> bytes:
    """The page as the journal is now."""
    return _written(session.folder, session.journal.path.stat().st_size)


@functools.lru_cache(maxsize=1)
def _written(folder: Path, size: int) -> bytes:
    from lab.compare.analysis import Analysis
    from lab.report import page
    from lab.share import sources

    return page.written([Analysis(sources.read(folder))])


def hosts() -> list[str]:
    """This machine's IPv4 addresses in networks, or the loopback's."""
    stats = psutil.net_if_stats()
    found = [
        address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
        and ((known := stats.get(name)) is None or known.isup)  # an alias, such as eth0:1, has none of its own
        and not address.address.startswith(("127.", "169.254."))
    ]
    return found or ["127.0.0.1"]
