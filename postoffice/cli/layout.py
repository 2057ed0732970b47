"""``postoffice init``: a folder with all that a depot needs."""

from __future__ import annotations

import importlib.resources
import os
import shlex
from pathlib import Path

import click

from postoffice.cli.invocation import shared_options
from postoffice.cli.output import Failure, complain, say

__all__ = ["init_command"]

_EX_CANTCREAT = 73
# What an address of a unix socket holds (unix(7)), less its final NUL.
_LONGEST_SOCKET = 107

_ZEO_CONF = """\
# The ZEO server that lets several processes share the database:
#
#     runzeo -C {folder}/zeo.conf
#
# With it, zodb_uri in postoffice.ini, and the URI that an application opens, is
#
#     zeo://{folder}/var/zeo.sock?blob_dir={folder}/var/blobs&shared_blob_dir=true
#
# Whoever can open the socket can read and change everything: the permissions of var protect it.

<zeo>
  address {zconfig}/var/zeo.sock
</zeo>

<filestorage 1>
  path {zconfig}/var/depot.fs
  blob-dir {zconfig}/var/blobs
</filestorage>

<eventlog>
  level info
  <logfile>
    path STDERR
  </logfile>
</eventlog>
"""


@click.command("init", short_help="Lay out a folder: configuration, Maildir, database.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@shared_options
def init_command(folder: Path) -> None:
    """Lay out DIR: postoffice.ini, a Maildir, var for the database, and zeo.conf to share it.

    What exists is never overwritten.
    """
    folder = Path(os.path.abspath(folder))
    path = str(folder)
    if not path.isprintable() or any(char in path for char in "?#&%"):
        raise Failure(
            f"{path}: a path with ?, #, &, % or a control character has no place in a URI; "
            "choose another",
            _EX_CANTCREAT,
        )
    names = ("postoffice.ini", "zeo.conf", "Maildir", "var")
    for name in names:
        if os.path.lexists(folder / name):
            raise Failure(f"{folder / name} exists already; nothing was made", _EX_CANTCREAT)
    sample = importlib.resources.files("postoffice") / "data" / "postoffice.ini.sample"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in ("Maildir", "Maildir/new", "Maildir/cur", "Maildir/tmp", "var"):
            (folder / place).mkdir(mode=0o700)
        _write(folder / "postoffice.ini", sample.read_text(encoding="utf-8"))
        server = _ZEO_CONF.format(folder=folder, zconfig=path.replace("$", "$$"))
        _write(folder / "zeo.conf", server)
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}", _EX_CANTCREAT) from error
    _tell(folder)


def _write(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def _tell(folder: Path) -> None:
    command = f"postoffice -C {shlex.quote(str(folder / 'postoffice.ini'))}"
    say(f"{folder} has now:")
    say("  postoffice.ini   the configuration, commented; two queues to start from")
    say("  Maildir          where mail can be delivered, and the archive")
    say("  var              for the database, made by the first intake of mail")
    say("  zeo.conf         to share the database among machines")
    say("Next:")
    say("  1. write your queues into postoffice.ini, and have mail come by one of the ways:")
    say("     Maildir  the mail server delivers there")
    say("     LMTP     it delivers to the place that lmtp = ... names")
    say("     pipe     it runs postoffice-deliver for each message")
    say(f"  2. {command} check")
    say(f"  3. {command} serve   does all the rest, as a service;")
    say(f"     {command} import  for who prefers cron, and a Maildir")
    if len(os.fsencode(f"{folder}/var/zeo.sock")) > _LONGEST_SOCKET:
        complain(
            f"{folder}/var/zeo.sock is too long for a socket's address; write a shorter one into "
            "zeo.conf"
        )
