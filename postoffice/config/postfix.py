"""``[postfix]``: how Postfix's own queue is reached."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from typing import TypeVar

from postoffice.config import values
from postoffice.config.file import CONTROLS, POSTFIX_SECTION, ConfigFile
from postoffice.config.values import NUMBER_COMMENT, Fault
from postoffice.postfix.settings import PostfixSettings

__all__ = ["POSTFIX_OPTIONS", "postfix_settings"]

POSTFIX_OPTIONS = (
    "list_queue",
    "cat_message",
    "control",
    "spool_path",
    "config_directory",
    "sudo",
    "timeout",
)
_SEMICOLON_COMMENT = re.compile(r"(?:^|\s);.*", re.DOTALL)
_SWITCHES = frozenset({"yes", "no", "true", "false", "on", "off", "1", "0"})

_T = TypeVar("_T")


def postfix_settings(file: ConfigFile) -> PostfixSettings:
    """Read the section; without it, Postfix is where a distribution puts it.

    :raises postoffice.exceptions.ConfigurationError: it cannot be used.
    """
    default = PostfixSettings()
    if not file.parser.has_section(POSTFIX_SECTION):
        return default
    file.refuse_unknown(POSTFIX_SECTION, POSTFIX_OPTIONS)

    def path(text: str) -> str:
        return os.path.normpath(os.path.join(file.here, text))

    def read(option: str, convert: Callable[[str], _T], otherwise: _T) -> _T:
        return _converted(file, option, convert, otherwise)

    settings = PostfixSettings(
        list_queue=read("list_queue", _command, default.list_queue),
        cat_message=read("cat_message", _command, default.cat_message),
        control=read("control", _command, default.control),
        spool_path=read("spool_path", path, default.spool_path),
        config_directory=read("config_directory", path, default.config_directory),
        sudo=read("sudo", _sudo, default.sudo),
        timeout=read("timeout", _timeout, default.timeout),
    )
    if settings.config_directory is not None and not file.value(POSTFIX_SECTION, "spool_path"):
        file.warn(
            POSTFIX_SECTION,
            "config_directory",
            f"spool_path is left at {settings.spool_path}; write that instance's queue_directory",
        )
    return settings


def _converted(file: ConfigFile, option: str, convert: Callable[[str], _T], otherwise: _T) -> _T:
    value = file.value(POSTFIX_SECTION, option)
    if value is None:
        return otherwise
    comment = NUMBER_COMMENT if option == "timeout" else _SEMICOLON_COMMENT
    value = comment.sub("", value).strip()
    try:
        if not value:
            raise Fault("the option has no value", "write one, or leave the option out")
        if CONTROLS.search(value):
            raise Fault("the value holds a line break or control character", "write it in one line")
        return convert(value)
    except Fault as error:
        file.fail(POSTFIX_SECTION, option, error.fault, error.mend)


def _command(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise Fault(
            f"{text!r} cannot be split into words: {error}", "close the quotation marks"
        ) from error


def _sudo(text: str) -> tuple[str, ...]:
    if text.lower() in _SWITCHES:
        raise Fault(f"{text!r} is no command", "write sudo -n, or leave the option out")
    return _command(text)


def _timeout(text: str) -> float:
    seconds = values.duration(text)
    if not 1 <= seconds <= 3600:
        raise Fault(f"{text!r} is no time to wait for a command", "write 1s to 1h")
    return float(seconds)
