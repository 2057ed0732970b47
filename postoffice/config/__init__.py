"""The configuration: ``postoffice.ini`` read into frozen settings, and nobody else reads it.

The file is one of PasteDeploy's: ``[post office]`` and a ``[queue:NAME]`` for each queue stand
beside whatever sections an application keeps there.  It is read with the standard library's
parser, on which PasteDeploy's own is built, because that one reads in the locale's encoding and
takes a lone ``%`` for an error.

Whatever is wrong is a :exc:`postoffice.exceptions.ConfigurationError`: one line with the file, the
section, the option, the fault and the mend.  Reading changes nothing and opens no database.
"""

from __future__ import annotations

import configparser
import difflib
import enum
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

from postoffice.exceptions import ConfigurationError
from postoffice.filters import FACTORIES, FilterError, ToHostnameFilter
from postoffice.interfaces import IFilter
from postoffice.loops import LoopRule
from postoffice.routing import QueueRule, Routing

__all__ = [
    "IN_MAILDIR",
    "MAIN_SECTION",
    "QUEUE_PREFIX",
    "ArchivePlace",
    "Settings",
    "find",
    "load",
    "set_up_logging",
    "uri_fault",
]

MAIN_SECTION = "post office"
QUEUE_PREFIX = "queue:"

MAIN_OPTIONS = (
    "zodb_uri",
    "zodb_path",
    "maildir",
    "reject_filters",
    "max_message_size",
    "ooo_loop_frequency",
    "ooo_loop_headers",
    "ooo_throttle_period",
    "archive",
    "archive_keep",
)
QUEUE_OPTIONS = ("filters",)
_FILE_FILTERS = frozenset({"header_regexp_file", "body_regexp_file"})
_NUMBERS = frozenset(
    {"max_message_size", "ooo_loop_frequency", "ooo_throttle_period", "archive_keep"}
)

DEFAULT_ZODB_PATH = "/postoffice"
DEFAULT_THROTTLE_PERIOD = 300

_SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

_SIZE = re.compile(r"([0-9]{1,15})\s*(b|[kmg]b?|)", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]{1,12})\s*([smhdw]?)", re.IGNORECASE)
_FREQUENCY = re.compile(
    r"(?:[0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})(?:e[+-]?[0-9]{1,3})?", re.I
)
_HEADER_NAME = re.compile(r"[!-9;-~]+")
_LIKE_QUEUE = re.compile(r"\s*queues?\s*(?::.*)?", re.IGNORECASE)
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# ConfigParser took what follows white space and a semicolon for a comment until Python 3.2.
_SEMICOLON_COMMENT = re.compile(r"\s;.*", re.DOTALL)
_NUMBER_COMMENT = re.compile(r"(?:^|\s)[#;].*", re.DOTALL)
_PERCENT = re.compile(r"%%|%\(([^()]*)\)s|%")
_MAX_INTERPOLATION_DEPTH = 10

_T = TypeVar("_T")


class ArchivePlace(enum.Enum):
    """Where the archive is when it is no folder of its own."""

    IN_MAILDIR = "a folder a day within the Maildir"


IN_MAILDIR: Literal[ArchivePlace.IN_MAILDIR] = ArchivePlace.IN_MAILDIR
"""The default archive of :class:`Settings`: a folder a day within the Maildir."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``postoffice.ini`` says.

    :ivar path: the file, absolute.
    :ivar zodb_uri: where the database is, for zodburi.
    :ivar zodb_path: the names of the folders from the database's root to the depot; one at least.
    :ivar maildir: the Maildir, absolute; it may not exist yet, but its parent does.
    :ivar routing: the rules, with the queues in the file's order.
    :ivar loop: when senders are throttled; ``None``: never.
    :ivar archive: where originals go: a folder, absolute; :data:`IN_MAILDIR`; or ``None``: nowhere.
    :ivar archive_keep: seconds for which originals are kept; ``None``: for ever.
    :ivar has_logging: whether the file configures logging; see :func:`set_up_logging`.
    :ivar warnings: what is allowed and yet hardly meant, a line each.
    :ivar fingerprint: SHA-256, in hex, of all that decides what becomes of a message, the contents
        of the files of expressions included.  When it differs, mail that was set aside may fare
        better than last time.
    """

    path: Path
    zodb_uri: str
    zodb_path: tuple[str, ...]
    maildir: Path
    routing: Routing
    loop: LoopRule | None
    archive: Path | Literal[ArchivePlace.IN_MAILDIR] | None
    archive_keep: int | None
    has_logging: bool
    warnings: tuple[str, ...]
    fingerprint: str

    @property
    def folder(self) -> Path:
        """The file's folder: ``%(here)s``, and what relative paths are relative to."""
        return self.path.parent

    @property
    def zodb_path_text(self) -> str:
        """The path of the depot as it is written: ``/postoffice``."""
        return "/" + "/".join(self.zodb_path)

    @property
    def max_message_size(self) -> int | None:
        """Bytes above which a message counts as oversize; ``None``: no limit."""
        return self.routing.max_message_size

    @property
    def queue_names(self) -> tuple[str, ...]:
        """The queues' names, in the file's order."""
        return tuple(queue.name for queue in self.routing.queues)


def find(argv0: str) -> Path | None:
    """Return the first of the usual places that holds the file, absolute, or ``None``.

    They are ``./postoffice.ini``, ``./etc/postoffice.ini``, ``postoffice.ini`` in the ``etc``
    beside the script's ``bin`` (as called, then with symbolic links followed), and
    ``/etc/postoffice.ini``.

    :param argv0: the script's path: ``sys.argv[0]``.
    """
    script = os.path.abspath(argv0)
    beside = [os.path.dirname(os.path.dirname(path)) for path in (script, os.path.realpath(script))]
    for folder in (".", "etc", *(os.path.join(base, "etc") for base in beside), "/etc"):
        path = os.path.join(folder, "postoffice.ini")
        if os.path.exists(path):
            return Path(os.path.abspath(path))
    return None


def load(path: str | os.PathLike[str]) -> Settings:
    """Read the file.

    Takes milliseconds; nothing is created or opened, but that the folders which the file names
    are looked for, and the files of expressions read.

    :raises postoffice.exceptions.ConfigurationError: it cannot be used as it stands.
    """
    file = _File(Path(os.path.abspath(path)))
    return _Reader(file).settings()


def set_up_logging(settings: Settings) -> bool:
    """Configure logging as ``[loggers]`` and its kin say, and tell whether they are there.

    ``%(here)s`` is known in them.  Loggers that exist already are left alone.

    :raises postoffice.exceptions.ConfigurationError: they cannot be used.
    """
    if not settings.has_logging:
        return False
    # It takes longer to import than the file to read, and few files configure logging.
    import logging.config

    file = _File(settings.path)
    try:
        logging.config.fileConfig(file.parser, disable_existing_loggers=False)
    except _Fault as error:
        file.fail("loggers", None, error.fault, error.mend)
    # What the sections name is called, so that anything may be raised; each is a wrong section.
    except Exception as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())
        file.fail("loggers", None, f"logging cannot be set up: {fault}", "see logging.config")
    return True


# -- the file --------------------------------------------------------------------------------------


class _Fault(Exception):
    """What is wrong with a value, and what would be right."""

    def __init__(self, fault: str, mend: str) -> None:
        super().__init__(fault, mend)
        self.fault = fault
        self.mend = mend


class _Interpolation(configparser.Interpolation):
    """``%(name)s`` is an option's value; ``%%`` and a lone ``%`` are a percent sign."""

    def before_get(
        self,
        parser: object,
        section: str,
        option: str,
        value: str,
        defaults: Mapping[str, str],
    ) -> str:
        return self._replaced(option, value, defaults, 0)

    def _replaced(self, option: str, value: str, defaults: Mapping[str, str], depth: int) -> str:
        if depth > _MAX_INTERPOLATION_DEPTH:
            raise _Fault("its %(name)s go round in a circle", "write the value itself")

        def replacement(found: re.Match[str]) -> str:
            name = found[1]
            if name is None:
                return "%"
            inner = defaults.get(name.lower())
            if inner is None:
                raise _Fault(
                    f"no option is named {name!r}",
                    f"define it in [DEFAULT], or write %%({name})s for that very text",
                )
            return self._replaced(option, inner, defaults, depth + 1)

        return _PERCENT.sub(replacement, value)


class _File:
    """The parsed file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.here = str(path.parent)
        # The values of ConfigParser's own defaults would be interpolated, and a path may hold a %.
        defaults = {"here": self.here, "__file__": str(path)}
        self.parser = configparser.ConfigParser(
            {name: value.replace("%", "%%") for name, value in defaults.items()},
            interpolation=_Interpolation(),
        )
        self._parse(self._text())

    def fail(self, section: str | None, option: str | None, fault: str, mend: str) -> NoReturn:
        raise ConfigurationError(str(self.path), section, option, fault, mend)

    def _text(self) -> str:
        try:
            # A FIFO would make the open wait for ever.
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                self.fail(None, None, "it is no regular file", "name the configuration's file")
            data = self.path.read_bytes()
        except OSError as error:
            self.fail(
                None, None, error.strerror or str(error), "name a file that exists and is readable"
            )
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self.fail(
                None,
                None,
                f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8",
                "save the file as UTF-8",
            )

    def _parse(self, text: str) -> None:
        try:
            self.parser.read_string(text, str(self.path))
        except configparser.DuplicateSectionError as error:
            self.fail(
                error.section,
                None,
                f"line {error.lineno}: the section stands there a second time",
                "make one section of both",
            )
        except configparser.DuplicateOptionError as error:
            self.fail(
                error.section,
                error.option,
                f"line {error.lineno}: the option stands there a second time",
                "keep one of them",
            )
        except configparser.MissingSectionHeaderError as error:
            self.fail(
                None,
                None,
                f"line {error.lineno}: {error.line.strip()!r} stands before any section",
                f"begin with [{MAIN_SECTION}]",
            )
        except configparser.ParsingError as error:
            line, shown = error.errors[0]
            self.fail(
                None,
                None,
                f"line {line}: {shown} is neither a section nor an option",
                "write [SECTION] or NAME = VALUE, and indent lines that go on",
            )

    def options(self, section: str) -> list[str]:
        """Return the names of the section's own options, those of [DEFAULT] left out."""
        inherited = self.parser.defaults()
        return [name for name in self.parser.options(section) if name not in inherited]

    def value(self, section: str, option: str) -> str | None:
        """Return an option's value, stripped, or ``None``."""
        if not self.parser.has_option(section, option):
            return None
        try:
            return self.parser.get(section, option).strip()
        except _Fault as error:
            self.fail(section, option, error.fault, error.mend)

    def written(self, section: str, option: str) -> str:
        """Return an option's value as it stands in the file."""
        return self.parser.get(section, option, raw=True).strip()


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a mend for a name that is not known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    there_are = ", ".join(known)
    return (
        f"did you mean {near[0]!r}? There are: {there_are}" if near else f"there are: {there_are}"
    )


# -- values ----------------------------------------------------------------------------------------


def _size(text: str) -> int | None:
    found = _SIZE.fullmatch(text)
    if found is None:
        raise _Fault(f"{text!r} is no size", "write bytes, or 500k, 10m, 1g")
    return int(found[1]) * _SIZE_UNITS[found[2].lower().removesuffix("b") or ""] or None


def _duration(text: str) -> int:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise _Fault(f"{text!r} is no duration", "write seconds, or 5m, 2h, 7d, 4w")
    return int(found[1]) * _SECONDS[found[2].lower()]


def _frequency(text: str) -> float:
    found = _FREQUENCY.fullmatch(text)
    frequency = float(text) if found else math.inf
    if not math.isfinite(frequency):
        raise _Fault(
            f"{text!r} is no frequency", "write messages a minute, such as 60 or 0.5; 0 is off"
        )
    return frequency


def _header_names(text: str) -> tuple[str, ...]:
    names = tuple(name for item in text.split(",") if (name := item.strip()))
    for name in names:
        if not _HEADER_NAME.fullmatch(name):
            raise _Fault(f"{name!r} is no name of a header", "write names like To,Subject")
    return names


def _path_names(text: str) -> tuple[str, ...]:
    names = tuple(name for item in text.split("/") if (name := item.strip()))
    if not names:
        raise _Fault(f"{text!r} names no folder", f"write a path such as {DEFAULT_ZODB_PATH}")
    return names


# -- URIs ------------------------------------------------------------------------------------------

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


# -- from the file to settings ---------------------------------------------------------------------


class _Reader:
    """Makes settings of a parsed file."""

    def __init__(self, file: _File) -> None:
        self._file = file
        self._warnings: list[str] = []
        self._digest = hashlib.sha256()

    def settings(self) -> Settings:
        file = self._file
        if not file.parser.has_section(MAIN_SECTION):
            near = difflib.get_close_matches(MAIN_SECTION, file.parser.sections(), 1)
            instead = f" and not [{near[0]}]" if near else ""
            file.fail(
                None,
                None,
                f"there is no section [{MAIN_SECTION}]",
                f"write [{MAIN_SECTION}]{instead}, with zodb_uri and maildir",
            )
        self._refuse_unknown(MAIN_SECTION, MAIN_OPTIONS)
        zodb_uri = self._zodb_uri()
        zodb_path = _path_names(DEFAULT_ZODB_PATH)
        zodb_path = self._converted("zodb_path", _path_names, zodb_path)
        maildir = self._folder("maildir", self._required("maildir"))
        archive = self._archive(maildir)
        routing = Routing(
            self._filters(MAIN_SECTION, "reject_filters"),
            self._queues(),
            self._converted("max_message_size", _size, None),
        )
        self._warn_of_unreachable(routing)
        loop = self._loop()
        keep = self._converted("archive_keep", _duration, None)
        if keep == 0:
            file.fail(
                MAIN_SECTION,
                "archive_keep",
                "0 would delete originals at once",
                "write archive = none to keep none, or leave archive_keep out to keep them all",
            )
        for value in (
            zodb_uri,
            zodb_path,
            str(maildir),
            str(archive),
            routing.max_message_size,
            loop,
        ):
            self._take(repr(value))
        return Settings(
            path=file.path,
            zodb_uri=zodb_uri,
            zodb_path=zodb_path,
            maildir=maildir,
            routing=routing,
            loop=loop,
            archive=archive,
            archive_keep=keep,
            has_logging=file.parser.has_section("loggers"),
            warnings=tuple(self._warnings),
            fingerprint=self._digest.hexdigest(),
        )

    def _take(self, *texts: str) -> None:
        """Let these count in the fingerprint."""
        for text in texts:
            data = text.encode("utf-8", "surrogateescape")
            self._digest.update(b"%d:%b" % (len(data), data))

    def _warn(self, section: str, option: str | None, text: str) -> None:
        place = f"{self._file.path}: [{section}]" + (f" {option}" if option else "")
        self._warnings.append(" ".join(f"{place}: {text}".split()))

    def _refuse_unknown(self, section: str, known: Sequence[str]) -> None:
        for option in self._file.options(section):
            if option not in known:
                self._file.fail(section, option, "unknown option", _nearest(option, known))

    # Options of one line.

    def _text(self, option: str) -> str:
        """Return the value of an option of the main section without its comment; ``""``: none."""
        value = self._file.value(MAIN_SECTION, option) or ""
        if option == "ooo_loop_headers":
            # A list may go on in further lines, as it always could.
            value = " ".join(value.split())
        if "\n" in value:
            self._file.fail(
                MAIN_SECTION,
                option,
                f"the value goes on in another line: {value.splitlines()[1].strip()!r}",
                "write it in one line; a line that is not indented begins the next option",
            )
        comment = _NUMBER_COMMENT if option in _NUMBERS else _SEMICOLON_COMMENT
        value = comment.sub("", value)
        if _CONTROLS.search(value):
            self._file.fail(
                MAIN_SECTION, option, "the value holds a control character", "remove it"
            )
        return value

    def _required(self, option: str) -> str:
        value = self._text(option)
        if not value:
            self._file.fail(MAIN_SECTION, option, "the option is missing", "it is required")
        return value

    def _converted(self, option: str, convert: Callable[[str], _T], default: _T) -> _T:
        if not self._file.parser.has_option(MAIN_SECTION, option):
            return default
        value = self._text(option)
        try:
            if not value:
                raise _Fault("the option has no value", "write one, or leave the option out")
            return convert(value)
        except _Fault as error:
            self._file.fail(MAIN_SECTION, option, error.fault, error.mend)

    def _zodb_uri(self) -> str:
        option = "zodb_uri"
        uri = self._required(option)
        here = self._file.here
        if uri.startswith("file:") and "?" in here and here in uri:
            self._file.fail(
                MAIN_SECTION,
                option,
                f"the folder's path {here} holds a question mark, which ends a path in a URI",
                "rename the folder, or use zconfig://",
            )
        fault = uri_fault(uri)
        if fault is not None:
            # A mend of the value as it is written keeps its %(here)s.
            written = self._file.written(MAIN_SECTION, option)
            as_written = uri_fault(written) if written.startswith("file:") else None
            self._file.fail(MAIN_SECTION, option, *(as_written or fault))
        scheme, _, rest = uri.partition("://")
        if scheme == "file":
            self._check_file_uri(rest)
        elif scheme == "zconfig":
            path = urlsplit(uri).path
            if not os.path.isfile(path):
                self._file.fail(
                    MAIN_SECTION,
                    option,
                    f"there is no file {path}",
                    "name one with an absolute path: zconfig://%(here)s/zodb.conf#main",
                )
        elif scheme == "memory":
            self._warn(MAIN_SECTION, option, "memory:// loses all messages when the process ends")
        return uri

    def _check_file_uri(self, rest: str) -> None:
        path, _, query = rest.partition("?")
        here = self._file.here
        blobs = dict(parse_qsl(query)).get("blobstorage_dir", "")
        if here in query and here not in blobs:
            self._file.fail(
                MAIN_SECTION,
                "zodb_uri",
                f"the folder's path {here} reads otherwise behind a URI's question mark",
                f"write {quote(here)} there instead of it",
            )
        if not (os.path.isabs(path) and os.path.isabs(blobs)):
            self._warn(
                MAIN_SECTION,
                "zodb_uri",
                "a path in it is relative, to the working directory of whoever opens it; "
                "write file://%(here)s/...",
            )

    def _folder(self, option: str, value: str) -> Path:
        """Return a folder's absolute path.

        It need not exist, but its parent must, so that a misspelt path is not made.
        """
        path = Path(os.path.normpath(os.path.join(self._file.here, value)))
        if not path.parent.is_dir():
            self._file.fail(
                MAIN_SECTION,
                option,
                f"there is no folder {path.parent}",
                f"make it, or correct the path; {path.name!r} itself is made when needed",
            )
        if path.exists() and not path.is_dir():
            self._file.fail(MAIN_SECTION, option, f"{path} is no folder", "name a folder")
        return path

    def _archive(self, maildir: Path) -> Path | Literal[ArchivePlace.IN_MAILDIR] | None:
        option = "archive"
        value = self._converted(option, str, "")
        if not value:
            return IN_MAILDIR
        if value.lower() == "none":
            return None
        path = self._folder(option, value)
        taken = [maildir / name for name in ("new", "cur", "tmp")]
        if path == maildir or any(path.is_relative_to(folder) for folder in taken):
            self._file.fail(
                MAIN_SECTION,
                option,
                f"what went to {path} would be imported again",
                "name a folder outside of the Maildir's new, cur and tmp",
            )
        return path

    def _loop(self) -> LoopRule | None:
        frequency = self._converted("ooo_loop_frequency", _frequency, 0.0)
        headers: tuple[str, ...] = ()
        if self._text("ooo_loop_headers"):
            headers = self._converted("ooo_loop_headers", _header_names, headers)
        period = self._converted("ooo_throttle_period", _duration, DEFAULT_THROTTLE_PERIOD)
        return LoopRule(frequency, headers, float(period)) if frequency else None

    # Filters and queues.

    def _queues(self) -> tuple[QueueRule, ...]:
        queues = []
        for section in self._file.parser.sections():
            if section.startswith(QUEUE_PREFIX):
                queues.append(self._queue(section, section.removeprefix(QUEUE_PREFIX)))
            elif _LIKE_QUEUE.fullmatch(section):
                self._warn(section, None, "this is no queue's section; write [queue:NAME]")
        if not queues:
            self._warn(MAIN_SECTION, None, "there is no queue; write a section [queue:NAME]")
        return tuple(queues)

    def _queue(self, section: str, name: str) -> QueueRule:
        if not name.strip() or _CONTROLS.search(name):
            fault = "has no name" if not name.strip() else "has a control character in its name"
            self._file.fail(section, None, f"the queue {fault}", "write [queue:NAME]")
        if name != name.strip():
            self._warn(section, None, f"white space belongs to the queue's name: {name!r}")
        self._refuse_unknown(section, QUEUE_OPTIONS)
        self._take(section)
        filters = self._filters(section, "filters")
        if not filters:
            self._warn(section, None, "a queue without filters gets no messages")
        return QueueRule(name, filters)

    def _filters(self, section: str, option: str) -> tuple[IFilter, ...]:
        filters = []
        for line in (self._file.value(section, option) or "").split("\n"):
            line = line.strip()
            if line:
                filters.append(self._filter(section, option, line))
        return tuple(filters)

    def _filter(self, section: str, option: str, line: str) -> IFilter:
        name, colon, value = line.partition(":")
        name = name.strip()
        if not colon:
            self._file.fail(
                section,
                option,
                f"{line!r} is no filter",
                "write one filter a line, like to_hostname: example.com",
            )
        factory = self._factory(section, option, name)
        try:
            made = factory(value.strip(), self._file.here)
        except FilterError as error:
            self._file.fail(section, option, error.fault, error.mend)
        except ValueError as error:
            self._file.fail(section, option, f"{name}: {error}", "see what that filter takes")
        sources = tuple(str(source) for source in getattr(made, "sources", ()))
        if name in _FILE_FILTERS and not sources:
            self._warn(section, option, f"{line}: the file holds no expression, so nothing matches")
        self._take(option, line, str(len(sources)), *sources)
        return made

    def _factory(self, section: str, option: str, name: str) -> Callable[[str, str], IFilter]:
        own = FACTORIES.get(name)
        if own is not None:
            return own
        points = importlib.metadata.entry_points(group="postoffice.filters")
        found = {point.value: point for point in points.select(name=name)}
        if not found:
            known = [*FACTORIES, *sorted(points.names - FACTORIES.keys())]
            self._file.fail(section, option, f"unknown filter {name!r}", _nearest(name, known))
        if len(found) > 1:
            self._file.fail(
                section,
                option,
                f"several packages have a filter {name!r}: {', '.join(sorted(found))}",
                "uninstall all but one",
            )
        (point,) = found.values()
        try:
            factory: Callable[[str, str], IFilter] = point.load()
        except (ImportError, AttributeError) as error:
            self._file.fail(
                section,
                option,
                f"the filter {name!r} cannot be loaded from {point.value}: {error}",
                "mend the package that has it",
            )
        return factory

    def _warn_of_unreachable(self, routing: Routing) -> None:
        """Warn of each queue that can get nothing because a rule before it takes it all."""
        for number, queue in enumerate(routing.queues):
            section = QUEUE_PREFIX + queue.name
            for one in routing.reject_filters:
                if any(_covers(one, other) for other in queue.filters):
                    self._warn(
                        section,
                        None,
                        f"the queue gets no messages: {one.description} in reject_filters "
                        "rejects all that it could get",
                    )
            for earlier in routing.queues[:number]:
                if earlier.filters and all(
                    any(_covers(one, other) for other in queue.filters) for one in earlier.filters
                ):
                    self._warn(
                        section,
                        None,
                        f"the queue gets no messages: [{QUEUE_PREFIX}{earlier.name}] before it "
                        "takes all that it could get",
                    )
                    break


def _covers(wide: IFilter, narrow: IFilter) -> bool:
    """Say whether it is certain that *wide* matches whatever *narrow* does."""
    if isinstance(wide, ToHostnameFilter) and isinstance(narrow, ToHostnameFilter):
        return wide.covers(narrow)
    return _identity(wide) == _identity(narrow)


def _identity(one: IFilter) -> tuple[object, ...]:
    return type(one), one.description, getattr(one, "sources", None)
