"""The option that names the database: what would be wrong with it when it is opened.

Only the URI is looked at, and the file that it names: nothing is opened.
"""

from __future__ import annotations

import os
from urllib.parse import parse_qsl, quote, urlsplit

from postoffice.config.file import MAIN_SECTION, ConfigFile
from postoffice.database_uri import blob_folder_fault, uri_fault

__all__ = ["check_uri"]


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
    fault = _fault(uri)
    if fault is not None:
        # A mend of the value as it is written keeps its %(here)s.
        written = file.written(MAIN_SECTION, option)
        as_written = _fault(written) if written.startswith("file:") else None
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


def _fault(uri: str) -> tuple[str, str] | None:
    return uri_fault(uri) or blob_folder_fault(uri)


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
