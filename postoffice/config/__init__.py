"""The configuration: ``postoffice.ini`` read into frozen settings, and nobody else reads it.

The file is one of PasteDeploy's: ``[post office]`` and a ``[queue:NAME]`` for each queue stand
beside whatever sections an application keeps there.

Whatever is wrong is a :exc:`postoffice.exceptions.ConfigurationError`: one line with the file, the
section, the option, the fault and the mend.  Reading changes nothing and opens no database.
"""

from __future__ import annotations

import difflib
import enum
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from postoffice.config import listening, values
from postoffice.config.database_uri import check_uri
from postoffice.config.file import CONTROLS, MAIN_SECTION, ConfigFile
from postoffice.config.listening import DEFAULT_MODE, TCPPlace, UnixPlace
from postoffice.config.postfix import POSTFIX_OPTIONS, postfix_settings
from postoffice.config.rules import RuleReader
from postoffice.config.values import Fault
from postoffice.database_uri import database_file
from postoffice.depot.policy import Policy
from postoffice.loops import LoopRule
from postoffice.postfix.settings import PostfixSettings
from postoffice.routing import Routing
from postoffice.storage_socket import name_beside

__all__ = [
    "IN_MAILDIR",
    "POSTFIX_OPTIONS",
    "ArchivePlace",
    "PostfixSettings",
    "Settings",
    "TCPPlace",
    "UnixPlace",
    "find",
    "load",
    "load_postfix",
    "set_up_logging",
]

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
    "lmtp",
    "lmtp_mode",
    "lmtp_group",
    "zeo_listen",
    "zeo_mode",
    "zeo_group",
    "unrouted",
    "deliver_timeout",
)
_NUMBERS = frozenset(
    {
        *("max_message_size", "ooo_loop_frequency", "ooo_throttle_period", "archive_keep"),
        *("lmtp_mode", "zeo_mode", "deliver_timeout"),
    }
)

DEFAULT_ZODB_PATH = "/postoffice"
DEFAULT_THROTTLE_PERIOD = 300
DEFAULT_DELIVER_TIMEOUT = 100.0

# ConfigParser took what follows white space and a semicolon for a comment until Python 3.2.
_SEMICOLON_COMMENT = re.compile(r"\s;.*", re.DOTALL)

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
    :ivar policies: how consumers deal with failures, by the name of the queue, for each of them.
    :ivar loop: when senders are throttled; ``None``: never.
    :ivar archive: where originals go: a folder, absolute; :data:`IN_MAILDIR`; or ``None``: nowhere.
    :ivar archive_keep: seconds for which originals are kept; ``None``: for ever.
    :ivar lmtp: where the LMTP listener is; ``None``: there is none.
    :ivar zeo_listen: where ``postoffice serve`` lets others use the file of a ``file://`` database;
        ``None``: it does not, or the database is no such file.
    :ivar rejects_unrouted: whether mail that comes by LMTP or by ``postoffice deliver``, and that
        no queue takes, is refused, so that the mail server tells its sender; else it is discarded.
    :ivar deliver_timeout: seconds after which ``postoffice deliver`` gives up, temporarily.
    :ivar postfix: how Postfix's own queue is reached.
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
    policies: Mapping[str, Policy] = field(hash=False)
    loop: LoopRule | None
    archive: Path | Literal[ArchivePlace.IN_MAILDIR] | None
    archive_keep: int | None
    lmtp: UnixPlace | TCPPlace | None
    zeo_listen: UnixPlace | None
    rejects_unrouted: bool
    deliver_timeout: float
    postfix: PostfixSettings
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
    file = ConfigFile(Path(os.path.abspath(path)))
    return _Reader(file).settings()


def load_postfix(path: str | os.PathLike[str]) -> PostfixSettings:
    """Read how Postfix's own queue is reached, and nothing else of the file.

    :raises postoffice.exceptions.ConfigurationError: that section, or the file, cannot be used.
    """
    return postfix_settings(ConfigFile(Path(os.path.abspath(path))))


def set_up_logging(settings: Settings) -> bool:
    """Configure logging as ``[loggers]`` and its kin say, and tell whether they are there.

    ``%(here)s`` is known in them.  Loggers that exist already are left alone.

    :raises postoffice.exceptions.ConfigurationError: they cannot be used.
    """
    if not settings.has_logging:
        return False
    # It takes longer to import than the file to read, and few files configure logging.
    import logging.config

    file = ConfigFile(settings.path)
    try:
        logging.config.fileConfig(file.parser, disable_existing_loggers=False)
    except Fault as error:
        file.fail("loggers", None, error.fault, error.mend)
    # What the sections name is called, so that anything may be raised; each is a wrong section.
    except Exception as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())
        file.fail("loggers", None, f"logging cannot be set up: {fault}", "see logging.config")
    return True


class _Reader:
    """Makes settings of a parsed file."""

    def __init__(self, file: ConfigFile) -> None:
        self._file = file

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
        file.refuse_unknown(MAIN_SECTION, MAIN_OPTIONS)
        zodb_uri = self._zodb_uri()
        zodb_path = values.path_names(DEFAULT_ZODB_PATH)
        zodb_path = self._converted("zodb_path", values.path_names, zodb_path)
        maildir = self._folder("maildir", self._required("maildir"))
        archive = self._archive(maildir)
        rules = RuleReader(file)
        routing = Routing(
            rules.filters(MAIN_SECTION, "reject_filters"),
            rules.queues(),
            self._converted("max_message_size", values.size, None),
        )
        policies = rules.policies()
        rules.warn_of_unreachable(routing)
        loop = self._loop()
        lmtp = self._lmtp()
        zeo_listen = self._zeo_listen(zodb_uri)
        keep = self._converted("archive_keep", values.duration, None)
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
            file.take(repr(value))
        return Settings(
            path=file.path,
            zodb_uri=zodb_uri,
            zodb_path=zodb_path,
            maildir=maildir,
            routing=routing,
            policies=policies,
            loop=loop,
            archive=archive,
            archive_keep=keep,
            lmtp=lmtp,
            zeo_listen=zeo_listen,
            rejects_unrouted=self._converted("unrouted", values.rejects_unrouted, False),
            deliver_timeout=self._converted(
                "deliver_timeout", values.deliver_timeout, DEFAULT_DELIVER_TIMEOUT
            ),
            postfix=postfix_settings(file),
            has_logging=file.parser.has_section("loggers"),
            warnings=tuple(file.warnings),
            fingerprint=file.fingerprint,
        )

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
        comment = values.NUMBER_COMMENT if option in _NUMBERS else _SEMICOLON_COMMENT
        value = comment.sub("", value)
        if CONTROLS.search(value):
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
                raise Fault("the option has no value", "write one, or leave the option out")
            return convert(value)
        except Fault as error:
            self._file.fail(MAIN_SECTION, option, error.fault, error.mend)

    def _zodb_uri(self) -> str:
        option = "zodb_uri"
        uri = self._required(option)
        check_uri(self._file, option, uri)
        return uri

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
        frequency = self._converted("ooo_loop_frequency", values.frequency, 0.0)
        headers: tuple[str, ...] = ()
        if self._text("ooo_loop_headers"):
            headers = self._converted("ooo_loop_headers", values.header_names, headers)
        period = self._converted("ooo_throttle_period", values.duration, DEFAULT_THROTTLE_PERIOD)
        return LoopRule(frequency, headers, float(period)) if frequency else None

    def _lmtp(self) -> UnixPlace | TCPPlace | None:
        file = self._file

        def convert(text: str) -> UnixPlace | TCPPlace:
            return listening.place(text, file.here)

        place = self._converted("lmtp", convert, None)
        if not isinstance(place, UnixPlace):
            for option in ("lmtp_mode", "lmtp_group"):
                if file.parser.has_option(MAIN_SECTION, option):
                    file.fail(
                        MAIN_SECTION,
                        option,
                        "there is no unix socket for it",
                        f"write lmtp = unix:PATH, or leave {option} out",
                    )
            return place
        mode = self._converted("lmtp_mode", listening.mode, DEFAULT_MODE)
        if mode & stat.S_IWOTH:
            file.warn(
                MAIN_SECTION,
                "lmtp_mode",
                "every user of this machine who can reach the socket may deliver mail by it",
            )
        return replace(place, mode=mode, group=self._converted("lmtp_group", listening.group, None))

    def _zeo_listen(self, zodb_uri: str) -> UnixPlace | None:
        file = self._file
        path = database_file(zodb_uri)
        if path is None:
            for option in ("zeo_listen", "zeo_mode", "zeo_group"):
                if file.parser.has_option(MAIN_SECTION, option):
                    file.fail(
                        MAIN_SECTION,
                        option,
                        "only the file of a file:// database is served",
                        f"leave {option} out: others reach the database by zodb_uri already",
                    )
            return None

        def convert(text: str) -> UnixPlace | None:
            return None if text.lower() == "none" else listening.socket_place(text, file.here)

        beside: UnixPlace | None = UnixPlace(Path(name_beside(path)))
        place = self._converted("zeo_listen", convert, beside)
        mode = self._converted("zeo_mode", listening.mode, DEFAULT_MODE)
        group = self._converted("zeo_group", listening.group, None)
        if mode & stat.S_IWOTH:
            file.warn(
                MAIN_SECTION,
                "zeo_mode",
                "every user of this machine who can reach the socket may read and change all "
                "messages, and run code as the users of the processes that open the database",
            )
        return None if place is None else replace(place, mode=mode, group=group)
