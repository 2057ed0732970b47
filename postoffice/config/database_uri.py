"""The database's URI: what zodburi, RelStorage and the file system would find wrong with it.

Only the URI is looked at, and the file that it names: nothing is opened.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import parse_qsl, quote, urlsplit

from postoffice.config.file import MAIN_SECTION, ConfigFile

__all__ = ["check_uri", "uri_fault"]

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
_PASSWORD = re.compile(r"(//[^/:@?]*):.*@")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def uri_fault(
    uri: str,
    resolvers: Iterable[str] | None = None,
    is_installed: Callable[[str], bool] = _is_installed,
) -> tuple[str, str] | None:
    """Return what is wrong with a database's URI and what would be right, or ``None``.

    Only the URI is looked at: no file, and no server.  A password in it is not shown.

    :param resolvers: the schemes that zodburi can resolve; ``None``: those that are installed.
    :param is_installed: says whether a module can be imported.
    """
    uri = _PASSWORD.sub(r"\1:***@", uri)
    found = _SCHEME.match(uri)
    if resolvers is None:
        resolvers = importlib.metadata.entry_points(group="zodburi.resolvers").names
    schemes = sorted(resolvers)
    if found is None:
        return f"{uri!r} has no scheme", f"begin with one of: {', '.join(schemes)}"
    scheme, rest = found[1], uri[found.end() :]
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
        return f"{uri!r} lacks the // after {scheme}:", f"write {scheme}://{rest.lstrip('/')}"
    return _missing_blob_folder(scheme, uri)


def _unknown_scheme(scheme: str, rest: str, schemes: Sequence[str]) -> tuple[str, str]:
    right = scheme.lower() if scheme.lower() in schemes else _MISSPELT.get(scheme.lower())
    if right is not None:
        return f"there is no scheme {scheme!r}", f"write {right}:{rest}"
    if scheme in _DRIVERS:
        return (
            f"{scheme}:// needs RelStorage, which is not installed",
            f"run pip install '{_DRIVERS[scheme][1]}'",
        )
    return f"there is no scheme {scheme!r}", f"use one of: {', '.join(schemes)}"


def _missing_blob_folder(scheme: str, uri: str) -> tuple[str, str] | None:
    option = _BLOB_OPTIONS.get(scheme)
    if option is None:
        return None
    place, _, query = uri.partition("?")
    values = dict(parse_qsl(query))
    if values.get(option):
        return None
    if scheme == "file":
        folder = os.path.dirname(place.removeprefix("file://"))
        blobs = os.path.join(folder, "blobs")
    elif scheme == "sqlite":
        blobs = os.path.join(values.get("data_dir") or "/var/lib/postoffice", "blobs")
    else:
        blobs = "/var/lib/postoffice/blobs"
    kept = "&".join(part for part in query.split("&") if part and part != f"{option}=")
    right = f"{place}?{kept}&{option}={blobs}" if kept else f"{place}?{option}={blobs}"
    return "it names no folder for blobs, in which large messages are kept", f"write {right}"


def check_uri(file: ConfigFile, option: str, uri: str) -> None:
    """Fail, or warn, where an option's value is no URI of a database that keeps mail.

    :raises postoffice.exceptions.ConfigurationError: it cannot be used.
    """
    here = file.here
    if uri.startswith("file:") and "?" in here and here in uri:
        file.fail(
            MAIN_SECTION,
            option,
            f"the folder's path {here} holds a question mark, which ends a path in a URI",
            "rename the folder, or use zconfig://",
        )
    fault = uri_fault(uri)
    if fault is not None:
        # A mend of the value as it is written keeps its %(here)s.
        written = file.written(MAIN_SECTION, option)
        as_written = uri_fault(written) if written.startswith("file:") else None
        file.fail(MAIN_SECTION, option, *(as_written or fault))
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        _check_file_uri(file, option, rest)
    elif scheme == "zconfig":
        path = urlsplit(uri).path
        if not os.path.isfile(path):
            file.fail(
                MAIN_SECTION,
                option,
                f"there is no file {path}",
                "name one with an absolute path: zconfig://%(here)s/zodb.conf#main",
            )
    elif scheme == "memory":
        file.warn(MAIN_SECTION, option, "memory:// loses all messages when the process ends")


def _check_file_uri(file: ConfigFile, option: str, rest: str) -> None:
    path, _, query = rest.partition("?")
    here = file.here
    blobs = dict(parse_qsl(query)).get("blobstorage_dir", "")
    if here in query and here not in blobs:
        file.fail(
            MAIN_SECTION,
            option,
            f"the folder's path {here} reads otherwise behind a URI's question mark",
            f"write {quote(here)} there instead of it",
        )
    if not (os.path.isabs(path) and os.path.isabs(blobs)):
        file.warn(
            MAIN_SECTION,
            option,
            "a path in it is relative, to the working directory of whoever opens it; "
            "write file://%(here)s/...",
        )
