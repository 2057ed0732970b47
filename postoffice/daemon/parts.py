"""The parts: what the processes of the daemon do, as the configuration has it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from postoffice.api import PostOffice
from postoffice.config import Settings, UnixPlace
from postoffice.daemon.spool import SpoolPart
from postoffice.database import database_file, is_served, open_soon
from postoffice.exceptions import ConfigurationError, DepotUnavailable
from postoffice.health import Health
from postoffice.storage_server import serve_storage
from postoffice.storage_socket import Presence, look, name_beside

__all__ = ["LMTP", "SPOOL", "STORAGE", "Part", "parts_of", "refuse_unserved"]

STORAGE, LMTP, SPOOL = "storage", "lmtp", "spool"

_OPENING_SECONDS = 5.0
_STEP_SECONDS = 0.02
_PROBE_SECONDS = 2.0
# One message may keep the import's reader for five minutes, twice.
_SPOOL_PATIENCE = 900.0
_PATIENCE = 300.0
_STORAGE_PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Part:
    """What one process of the daemon does.

    :ivar name: ``storage``, ``lmtp`` or ``spool``.
    :ivar work: is called in it, and returns after SIGTERM, when what is in hand is done.
    :ivar patience: seconds without a sign of life after which it counts as hung.
    :ivar key: two parts of one name with the same key do the same.
    """

    name: str
    work: Callable[[Health, socket.socket | None], None] = field(compare=False)
    patience: float
    key: object = None


def parts_of(settings: Settings) -> list[Part]:
    """Return the parts of a configuration, in the order in which they are started."""
    found = []
    file, place = database_file(settings.zodb_uri), settings.zeo_listen
    if file is not None and place is not None:
        name = name_beside(file)
        found.append(
            Part(
                STORAGE,
                lambda health, _: _serve_storage(settings.zodb_uri, place, name, health),
                _STORAGE_PATIENCE,
                (settings.zodb_uri, place),
            )
        )
    if settings.lmtp is not None:
        found.append(Part(LMTP, lambda *told: _serve_lmtp(settings, *told), _PATIENCE, object()))
    found.append(
        Part(SPOOL, lambda health, _: _import_spool(settings, health), _SPOOL_PATIENCE, object())
    )
    return found


def refuse_unserved(settings: Settings) -> None:
    """Raise an error where the parts could not use the database side by side.

    :raises ConfigurationError: they could not.
    """
    PostOffice(settings).refuse_without_queues()
    uri = settings.zodb_uri
    if uri.startswith(("memory:", "demo:")):
        raise ConfigurationError(
            str(settings.path),
            "post office",
            "zodb_uri",
            "a database in one process's memory is of no use to the others",
            "write file://... or another that keeps mail",
        )
    if settings.lmtp is not None and database_file(uri) is not None and settings.zeo_listen is None:
        raise ConfigurationError(
            str(settings.path),
            "post office",
            "zeo_listen",
            "without it, only one of lmtp and the import could open the file",
            "leave zeo_listen out, so that the file is served",
        )


def _post_office(settings: Settings) -> PostOffice:
    file = database_file(settings.zodb_uri)
    if file is None or settings.zeo_listen is None:
        return PostOffice(settings, open_soon)
    return PostOffice(settings, lambda uri: _open_served(uri, file))


def _open_served(uri: str, path: str) -> Any:
    """Open a database file by its server, and never by itself: the storage's part has it.

    :raises DepotUnavailable: the server is not there.
    """
    name = name_beside(path)
    until = time.monotonic() + _OPENING_SECONDS
    while look(name) is not Presence.LISTENING:
        if time.monotonic() >= until:
            # Without its index a large file takes a while.
            raise DepotUnavailable(f"database {path}: its server is still opening it, or is away")
        time.sleep(_STEP_SECONDS)
    database = open_soon(uri)
    if not is_served(database):
        # The server died this instant.
        database.close()
        raise DepotUnavailable(f"database {path}: its server does not run")
    return database


# -- what they do ----------------------------------------------------------------------------------


def _import_spool(settings: Settings, health: Health) -> None:
    post_office = _post_office(settings)
    SpoolPart(lambda: post_office, str(settings.maildir), health).run()


def _serve_lmtp(settings: Settings, health: Health, listening: socket.socket | None) -> None:
    with _post_office(settings) as post_office:
        post_office.serve_lmtp(listening=listening, health=health)


def _serve_storage(uri: str, place: UnixPlace, name: str, health: Health) -> None:
    def ready() -> None:
        health.well()
        threading.Thread(target=_probe, args=(name, health), daemon=True).start()

    serve_storage(uri, place, ready)


def _probe(name: str, health: Health) -> None:
    """Give a sign of life whenever the server greets a client, which it does by itself."""
    while True:
        # Without an answer there is no sign.
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PROBE_SECONDS)
            probe.connect(os.path.realpath(name))
            if probe.recv(1):
                health.alive()
        time.sleep(_PROBE_SECONDS)
