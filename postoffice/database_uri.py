"""The database's URI: what zodburi and RelStorage would find wrong with it.

Only the URI is looked at: no file, and no server.  No password of it is shown.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import SplitResult, parse_qsl, urlsplit

__all__ = [
    "blob_folder_fault",
    "blob_folder_named",
    "database_file",
    "shown",
    "split_uri",
    "uri_fault",
]

# For each scheme of RelStorage's the drivers of which it needs one, and what brings the usual one.
_DRIVERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "postgres": (("psycopg2", "psycopg2cffi", "pg8000"), "postoffice[relstorage]"),
    "mysql": (("MySQLdb", "pymysql", "mysql"), "RelStorage[mysql]"),
    "oracle": (("cx_Oracle",), "RelStorage[oracle]"),
    "sqlite": (("sqlite3",), "postoffice[relstorage]"),
}
_MISSPELT = {"postgresql": "postgres", "mysql2": "mysql", "sqlite3": "sqlite", "fs": "file"}
_BLOB_OPTIONS = {
    "file": "blobstorage_dir",
    "zeo": "blob_dir",
    "postgres": "blob_dir",
    "mysql": "blob_dir",
    "oracle": "blob_dir",
    "sqlite": "blob_dir",
}
# A user's name, and what stands between it and the last @: a password may hold any character.
_PASSWORD = re.compile(r"(//[^/:@?]*):(?!\d+(?:[/?#]|$)).*@")
_PASSWORD_OPTION = re.compile(r"([?&]password=)[^&]*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_POSTGRES_PARTS = "postgres://USER:PASSWORD@HOST:5432/DATABASE"
_DSN = "name the database in a file with a dsn, and that file by zconfig://"


def shown(uri: str) -> str:
    """Return the URI without its passwords."""
    place, mark, query = uri.partition("?")
    if "@" in place:
        uri = _PASSWORD.sub(r"\1:***@", place) + mark + query
    else:
        uri = _PASSWORD.sub(r"\1:***@", uri)
    return _PASSWORD_OPTION.sub(r"\1***", uri)


def split_uri(uri: str) -> SplitResult:
    """Take a URI apart; unlike the original, for schemes that :mod:`urllib` does not know too."""
    _, _, rest = uri.partition("://")
    return urlsplit(f"http://{rest}")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def uri_fault(
    uri: str,
    resolvers: Iterable[str] | None = None,
    is_installed: Callable[[str], bool] = _is_installed,
) -> tuple[str, str] | None:
    """Return what is wrong with a database's URI and what would be right, or ``None``.

    :param resolvers: the schemes that zodburi can resolve; ``None``: those that are installed.
    :param is_installed: says whether a module can be imported.
    """
    found = _SCHEME.match(uri)
    if resolvers is None:
        resolvers = importlib.metadata.entry_points(group="zodburi.resolvers").names
    schemes = sorted(resolvers)
    if found is None:
        return f"{shown(uri)!r} has no scheme", f"begin with one of: {', '.join(schemes)}"
    scheme, rest = found[1], shown(uri)[found.end() :]
    if scheme not in schemes:
        return _unknown_scheme(scheme, rest, schemes)
    if scheme in _DRIVERS:
        modules, requirement = _DRIVERS[scheme]
        if not any(is_installed(module) for module in modules):
            return (
                f"{scheme}:// needs the module {' or '.join(modules)}, which is not installed",
                f"run pip install '{requirement}'",
            )
    if scheme != "demo" and not rest.startswith("//"):
        return (
            f"{shown(uri)!r} lacks the // after {scheme}:",
            f"write {scheme}://{rest.lstrip('/')}",
        )
    if scheme == "postgres":
        return _postgres_fault(uri)
    if scheme == "sqlite" and not _options(uri).get("data_dir"):
        return "it names no folder for the data", "write sqlite:///?data_dir=FOLDER&blob_dir=FOLDER"
    return None


def _unknown_scheme(scheme: str, rest: str, schemes: Sequence[str]) -> tuple[str, str]:
    right = scheme.lower() if scheme.lower() in schemes else _MISSPELT.get(scheme.lower())
    if right is not None and (right in schemes or right not in _DRIVERS):
        return f"there is no scheme {scheme!r}", f"write {right}:{rest}"
    if (right or scheme) in _DRIVERS:
        return (
            f"{scheme}:// needs RelStorage, which is not installed",
            f"run pip install '{_DRIVERS[right or scheme][1]}'",
        )
    return f"there is no scheme {scheme!r}", f"use one of: {', '.join(schemes)}"


def _postgres_fault(uri: str) -> tuple[str, str] | None:
    """Return what RelStorage cannot make a connection string of.

    It puts the parts into quotes as they stand, and the word "None" for each that is missing.
    """
    parts = split_uri(uri)
    if (
        "@" not in parts.netloc
        and "@" in uri.partition("://")[2].partition("/")[2].partition("?")[0]
    ):
        return "its user or password holds a / or #, which ends them", _DSN
    try:
        port = parts.port
    except ValueError:
        return "its port is no number up to 65535", f"write {_POSTGRES_PARTS}"
    texts = {
        "user": parts.username,
        "host": parts.hostname,
        "port": port,
        "database": parts.path.strip("/"),
    }
    missing = [name for name, text in texts.items() if not text]
    if missing:
        return (
            f"it names no {missing[0]}, without which RelStorage fails",
            f"write {_POSTGRES_PARTS}",
        )
    if re.search(r"['\\\s]", f"{parts.username}{parts.password}{parts.path}"):
        return "its user, password or database holds a quote, backslash or blank", _DSN
    return None


def database_file(uri: str) -> str | None:
    """Return the path of the file of a ``file://`` URI; ``None`` for any other."""
    if not uri.startswith("file://"):
        return None
    return os.path.abspath(uri.removeprefix("file://").partition("?")[0])


def blob_folder_named(uri: str) -> str | None:
    """Return the folder that a URI names for blobs; ``None`` where it names none."""
    option = _BLOB_OPTIONS.get(uri.partition(":")[0], "")
    return _options(uri).get(option) or None


def _options(uri: str) -> dict[str, str]:
    return dict(parse_qsl(uri.partition("?")[2]))


def blob_folder_fault(uri: str) -> tuple[str, str] | None:
    """Return that a URI names no folder for blobs and what would be right, or ``None``."""
    scheme = uri.partition(":")[0]
    option = _BLOB_OPTIONS.get(scheme)
    if option is None or blob_folder_named(uri):
        return None
    place, _, query = shown(uri).partition("?")
    if scheme == "file":
        folder = os.path.dirname(place.removeprefix("file://"))
        blobs = os.path.join(folder, "blobs")
    elif scheme == "sqlite":
        blobs = os.path.join(_options(uri).get("data_dir") or "/var/lib/postoffice", "blobs")
    else:
        blobs = "/var/lib/postoffice/blobs"
    kept = "&".join(part for part in query.split("&") if part and part != f"{option}=")
    right = f"{place}?{kept}&{option}={blobs}" if kept else f"{place}?{option}={blobs}"
    return "it names no folder for blobs, in which large messages are kept", f"write {right}"
