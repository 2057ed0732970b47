"""``postoffice check``: whether configuration, Maildir, listener and database can be used."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import stat
import time
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import count, say
from postoffice.exceptions import (
    EX_TEMPFAIL,
    DepotFormatError,
    DepotUnavailable,
    FolderMissing,
    PostofficeError,
)

if TYPE_CHECKING:
    from postoffice.api import PostOffice
    from postoffice.config import Settings, TCPPlace, UnixPlace

__all__ = ["check_command"]

# Seconds that a listener has for its greeting, and the octets that a reply may have (RFC 5321,
# 4.5.3.1.5).
_PATIENCE = 2.0
_LONGEST_GREETING = 512


class _Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


class _Finding(NamedTuple):
    """One line of the check; an error has the exit status that it leads to."""

    level: _Level
    subject: str
    text: str
    status: int = 0


def _ok(subject: str, text: str) -> _Finding:
    return _Finding(_Level.OK, subject, text)


def _warning(subject: str, text: str) -> _Finding:
    return _Finding(_Level.WARNING, subject, text)


def _error(subject: str, text: str, status: int = EX_TEMPFAIL) -> _Finding:
    return _Finding(_Level.ERROR, subject, text, status)


@click.command("check", short_help="Check configuration, Maildir and database.")
@shared_options
@pass_invocation
def check_command(invocation: Invocation) -> int:
    """Check the configuration, its filters, Maildir, archive, LMTP listener and database.

    Makes and changes nothing.  A line for each finding: ok, warning or error.
    """
    from postoffice.api import PostOffice

    worst = 0
    found: Counter[_Level] = Counter()
    with PostOffice(invocation.settings()) as post_office:
        for finding in _findings(post_office):
            first, *others = finding.text.split("\n")
            say(f"{finding.level:<8} {finding.subject}: {first}")
            for line in others:
                say(line)
            worst = max(worst, finding.status)
            found[finding.level] += 1
    if found.total() != found[_Level.OK]:
        errors, warnings = found[_Level.ERROR], found[_Level.WARNING]
        say(f"{count(errors, 'error')}, {count(warnings, 'warning')}")
    return worst


def _findings(post_office: PostOffice) -> Iterator[_Finding]:
    settings = post_office.settings
    yield from _of_settings(settings)
    for subject, findings in (
        ("maildir", _of_maildir(settings.maildir)),
        ("archive", _of_archive(post_office)),
        ("lmtp", _of_listener(settings.lmtp)),
        ("database", _of_database(post_office)),
    ):
        try:
            yield from findings
        except OSError as error:
            yield _error(subject, f"{error.filename}: {error.strerror}")


def _of_settings(settings: Settings) -> Iterator[_Finding]:
    routing = settings.routing
    yield _ok("configuration", str(settings.path))
    if routing.reject_filters:
        yield _ok("reject_filters", count(len(routing.reject_filters), "filter"))
    for queue in routing.queues:
        yield _ok(f"queue {queue.name}", count(len(queue.filters), "filter"))
    for warning in settings.warnings:
        yield _warning("configuration", warning)


def _of_maildir(maildir: Path) -> Iterator[_Finding]:
    if not maildir.exists():
        if os.access(maildir.parent, os.W_OK | os.X_OK, effective_ids=True):
            yield _ok("maildir", f"{maildir} is not there yet; made when it is needed")
        else:
            yield _error("maildir", f"{maildir} is not there, and {maildir.parent} not writable")
        return
    waiting = 0
    for name in ("new", "cur", "tmp"):
        folder = maildir / name
        if not folder.exists():
            if not os.access(maildir, os.W_OK | os.X_OK, effective_ids=True):
                yield _error("maildir", f"{folder} is not there, and {maildir} not writable")
                return
            continue
        if not folder.is_dir():
            yield _error("maildir", f"{folder} is no folder")
            return
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            yield _error("maildir", f"{folder} cannot be read and written by {_user(os.geteuid())}")
            return
        if name != "tmp":
            with os.scandir(folder) as entries:
                waiting += sum(
                    not entry.name.startswith(".") and entry.is_file(follow_symlinks=False)
                    for entry in entries
                )
    yield _ok("maildir", f"{maildir}; {count(waiting, 'message')} waiting to be imported")
    yield from _of_owner("maildir", maildir)


def _of_archive(post_office: PostOffice) -> Iterator[_Finding]:
    settings, archive = post_office.settings, post_office.archive()
    place = settings.archive
    if place is None:
        yield _ok("archive", "none: originals are not kept")
    elif not isinstance(place, Path):
        yield _ok("archive", f"a folder a day in {settings.maildir}")
    elif not place.exists():
        if os.access(place.parent, os.W_OK | os.X_OK, effective_ids=True):
            yield _ok("archive", f"{place} is not there yet; made when it is needed")
        else:
            yield _error("archive", f"{place} is not there, and {place.parent} not writable")
    elif not os.access(place, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        yield _error("archive", f"{place} cannot be written by {_user(os.geteuid())}")
    elif settings.maildir.exists() and place.stat().st_dev != settings.maildir.stat().st_dev:
        yield _warning(
            "archive", f"{place} is on another file system than the Maildir: originals are copied"
        )
    else:
        yield _ok("archive", str(place))
    failures = sum(1 for _ in archive.failures())
    if failures:
        are = "is" if failures == 1 else "are"
        yield _warning(
            "archive",
            f"{count(failures, 'message')} {are} set aside in {archive.failed}; "
            "`postoffice import --failed` tries again",
        )


def _of_listener(place: UnixPlace | TCPPlace | None) -> Iterator[_Finding]:
    from postoffice.config import UnixPlace

    if place is None:
        return
    if isinstance(place, UnixPlace):
        yield from _of_socket(place)
    else:
        yield _ok("lmtp", str(place))
    try:
        greeting = _greeting(place)
    except (FileNotFoundError, ConnectionRefusedError):
        yield _warning("lmtp", f"nobody listens at {place} now")
    except (BlockingIOError, TimeoutError):
        yield _warning("lmtp", f"a listener at {place} does not answer within {_PATIENCE:g} s")
    except OSError as error:
        yield _error("lmtp", f"{place} cannot be reached: {error.strerror}")
    else:
        # Whether it has room for another session or not (RFC 5321, 4.3.2).
        if greeting.startswith((b"220", b"421")):
            yield _ok("lmtp", f"a listener answers at {place}")
        else:
            yield _error("lmtp", f"what answers at {place} is no mail server")


def _of_socket(place: UnixPlace) -> Iterator[_Finding]:
    folder, user = place.path.parent, _user(os.geteuid())
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        yield _error("lmtp", f"{folder}, where the socket goes, cannot be written by {user}")
        return
    found = folder.stat()
    # In a folder with the setgid bit the socket gets the folder's group by itself.
    given = found.st_gid if found.st_mode & stat.S_ISGID else os.getegid()
    group = given if place.group is None else place.group
    name = _group(group)
    if os.geteuid() != 0 and group not in (given, *os.getgroups()):
        yield _error("lmtp", f"{user} is not in the group {name}, and cannot give the socket to it")
        return
    yield _ok("lmtp", f"{place.path}, mode {place.mode:04o}, group {name}")
    if not found.st_mode & (stat.S_IXGRP if found.st_gid == group else stat.S_IXOTH):
        yield _warning("lmtp", f"{folder} does not let the group {name} reach the socket")


def _greeting(place: UnixPlace | TCPPlace) -> bytes:
    """Return the first line, or its beginning, that a listener says; ``b""``: it hangs up.

    :raises TimeoutError: it takes longer than it may.
    :raises OSError: nobody can be reached there.
    """
    from postoffice.config import UnixPlace

    deadline = time.monotonic() + _PATIENCE
    address: str | tuple[str, int]
    if isinstance(place, UnixPlace):
        family, address = socket.AF_UNIX, str(place.path)
    else:
        family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
        address = (place.host, place.port)
    said = b""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PATIENCE)
        probe.connect(address)
        while b"\n" not in said and len(said) < _LONGEST_GREETING:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            probe.settimeout(left)
            more = probe.recv(_LONGEST_GREETING)
            if not more:
                break
            said += more
    return said


def _of_database(post_office: PostOffice) -> Iterator[_Finding]:
    from postoffice.database import (
        DatabaseMissing,
        blob_folder,
        database_file,
        open_for_inspection,
    )

    settings = post_office.settings
    path = database_file(settings.zodb_uri)
    try:
        database = open_for_inspection(settings.zodb_uri)
    except DatabaseMissing as error:
        folder = None if path is None else os.path.dirname(path)
        if folder is None or os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            yield _ok("database", f"{error}; the first intake of mail makes it")
        else:
            yield _error("database", f"{error}, and {folder} is not there or not writable")
        return
    except DepotUnavailable as error:
        yield _error("database", str(error).removeprefix("database "), error.exit_status)
        return
    try:
        yield _ok("database", path or "can be opened")
        if path is not None:
            yield from _of_owner("database", Path(path))
            beside = (os.path.dirname(path), f"{path}.lock", blob_folder(settings.zodb_uri))
            for one in (path, *beside):
                if one and os.path.exists(one) and not os.access(one, os.W_OK, effective_ids=True):
                    yield _error("database", f"{one} is not writable by {_user(os.geteuid())}")
        yield from _of_depot(post_office, database)
    finally:
        database.close()


def _of_depot(post_office: PostOffice, database: Any) -> Iterator[_Finding]:
    from transaction import TransactionManager

    from postoffice.depot.folder import find_folder

    settings = post_office.settings
    connection = database.open(TransactionManager())
    try:
        folder = find_folder(connection.root(), settings.zodb_path)
    except FolderMissing:
        yield _ok("depot", f"{settings.zodb_path_text} will be made by the first intake of mail")
        return
    except DepotFormatError as error:
        yield _error("depot", str(error), error.exit_status)
        return
    except PostofficeError as error:
        yield _error("depot", str(error))
        return
    else:
        names = folder.names()
        yield _ok(
            "depot",
            f"{settings.zodb_path_text}, format {folder.format_version}, "
            f"{count(len(names), 'queue')}",
        )
        for name in settings.queue_names:
            if name not in names:
                yield _ok(f"queue {name}", "will be made by the next intake of mail")
        for name in names:
            if name not in settings.queue_names:
                yield _warning(
                    f"queue {name}",
                    "is in the depot and not in the configuration; "
                    "`postoffice queues remove` removes it",
                )
    finally:
        connection.close()


def _of_owner(subject: str, path: Path) -> Iterator[_Finding]:
    """Warn root: what it makes beside another user's files, that user could not write."""
    owner = path.stat().st_uid
    if os.geteuid() == 0 and owner != 0:
        yield _warning(
            subject,
            f"{path} belongs to {_user(owner)}; take mail as {_user(owner)} and not as root",
        )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"number {gid}"
