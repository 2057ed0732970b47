"""The file: its text, its sections, its options, and how their values are interpolated.

It is read with the standard library's parser, on which PasteDeploy's own is built, because that one
reads in the locale's encoding and takes a lone ``%`` for an error.
"""

from __future__ import annotations

import configparser
import difflib
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from postoffice.config.values import Fault
from postoffice.exceptions import ConfigurationError

__all__ = ["CONTROLS", "MAIN_SECTION", "POSTFIX_SECTION", "QUEUE_PREFIX", "ConfigFile", "nearest"]

MAIN_SECTION = "post office"
QUEUE_PREFIX = "queue:"
POSTFIX_SECTION = "postfix"

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PERCENT = re.compile(r"%%|%\(([^()]*)\)s|%")
_MAX_INTERPOLATION_DEPTH = 10


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
            raise Fault("its %(name)s go round in a circle", "write the value itself")

        def replacement(found: re.Match[str]) -> str:
            name = found[1]
            if name is None:
                return "%"
            inner = defaults.get(name.lower(), defaults.get(name))
            if inner is None:
                raise Fault(
                    f"no option is named {name!r}",
                    f"define it in [DEFAULT], or write %%({name})s for that very text",
                )
            return self._replaced(option, inner, defaults, depth + 1)

        return _PERCENT.sub(replacement, value)


class ConfigFile:
    """The parsed file, and what its readers find there.

    :ivar path: the file, absolute.
    :ivar here: its folder.
    :ivar parser: its sections, interpolated.
    :ivar warnings: what is allowed and yet hardly meant, a line each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.here = str(path.parent)
        # The values of ConfigParser's own defaults would be interpolated, and a path may hold a %.
        defaults = {"here": self.here, "__file__": str(path)}
        self.parser = configparser.ConfigParser(
            {name: value.replace("%", "%%") for name, value in defaults.items()},
            interpolation=_Interpolation(),
        )
        # typeshed takes the method for one that cannot be replaced; configparser documents it.
        self.parser.optionxform = str  # type: ignore[assignment,method-assign]
        self.warnings: list[str] = []
        self._digest = hashlib.sha256()
        self._parse(self._text())

    def fail(self, section: str | None, option: str | None, fault: str, mend: str) -> NoReturn:
        """Say what is wrong, and where."""
        raise ConfigurationError(str(self.path), section, option, fault, mend)

    def take(self, *texts: str) -> None:
        """Let these count in the fingerprint."""
        for text in texts:
            data = text.encode("utf-8", "surrogateescape")
            self._digest.update(b"%d:%b" % (len(data), data))

    def warn(self, section: str, option: str | None, text: str) -> None:
        """Note what is hardly meant."""
        place = f"{self.path}: [{section}]" + (f" {option}" if option else "")
        self.warnings.append(" ".join(f"{place}: {text}".split()))

    def refuse_unknown(self, section: str, known: Sequence[str]) -> None:
        """Fail where the section has an option that is not *known*."""
        for option in self.options(section):
            if option not in known:
                self.fail(section, option, "unknown option", nearest(option, known))

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that was taken."""
        return self._digest.hexdigest()

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
            # Python before 3.13 gives the line's repr.
            quoted = shown if shown[:1] in ("'", '"') else repr(shown)
            self.fail(
                None,
                None,
                f"line {line}: {quoted} is neither a section nor an option",
                "write [SECTION] or NAME = VALUE, and indent lines that go on",
            )

        self._lower_names()

    def _lower_names(self) -> None:
        """Make the names of our own options lower case; an application's may differ in case."""
        defaults: Any = self.parser.defaults()
        for name in list(defaults):
            defaults[name.lower()] = defaults.pop(name)
        for section in self.parser.sections():
            ours = (MAIN_SECTION, POSTFIX_SECTION)
            if section not in ours and not section.startswith(QUEUE_PREFIX):
                continue
            for name in self.options(section):
                if name == name.lower():
                    continue
                if name.lower() in self.options(section):
                    self.fail(
                        section, name, "the option stands there a second time", "keep one of them"
                    )
                value = self.parser.get(section, name, raw=True)
                self.parser.remove_option(section, name)
                self.parser.set(section, name.lower(), value)

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
        except Fault as error:
            self.fail(section, option, error.fault, error.mend)

    def written(self, section: str, option: str) -> str:
        """Return an option's value as it stands in the file."""
        return self.parser.get(section, option, raw=True).strip()


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a mend for a name that is not known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    there_are = ", ".join(known)
    return (
        f"did you mean {near[0]!r}? There are: {there_are}" if near else f"there are: {there_are}"
    )
