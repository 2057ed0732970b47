"""The queues of the file: their filters and policies, and which of them can get nothing."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from typing import TypeVar

from postoffice.config import values
from postoffice.config.file import CONTROLS, MAIN_SECTION, QUEUE_PREFIX, ConfigFile, nearest
from postoffice.config.values import Fault
from postoffice.depot.policy import Policy
from postoffice.filters import FACTORIES, FilterError, ToHostnameFilter
from postoffice.interfaces import IFilter
from postoffice.routing import QueueRule, Routing

__all__ = ["QUEUE_OPTIONS", "RuleReader"]

QUEUE_OPTIONS = ("filters", "max_attempts", "retry_delay", "lease")
_FILE_FILTERS = frozenset({"header_regexp_file", "body_regexp_file"})

_LIKE_QUEUE = re.compile(r"\s*queues?\s*(?::.*)?", re.IGNORECASE)

_T = TypeVar("_T")


class RuleReader:
    """Makes rules of a parsed file's lines, and has it take what they depend on."""

    def __init__(self, file: ConfigFile) -> None:
        self._file = file

    def queues(self) -> tuple[QueueRule, ...]:
        """Return the queues, in the file's order."""
        queues = []
        for section in self._file.parser.sections():
            if section.startswith(QUEUE_PREFIX):
                queues.append(self._queue(section, section.removeprefix(QUEUE_PREFIX)))
            elif _LIKE_QUEUE.fullmatch(section):
                self._file.warn(section, None, "this is no queue's section; write [queue:NAME]")
        if not queues:
            self._file.warn(MAIN_SECTION, None, "there is no queue; write a section [queue:NAME]")
        return tuple(queues)

    def _queue(self, section: str, name: str) -> QueueRule:
        if not name.strip() or CONTROLS.search(name):
            fault = "has no name" if not name.strip() else "has a control character in its name"
            self._file.fail(section, None, f"the queue {fault}", "write [queue:NAME]")
        if name != name.strip():
            self._file.warn(section, None, f"white space belongs to the queue's name: {name!r}")
        self._file.refuse_unknown(section, QUEUE_OPTIONS)
        self._file.take(section)
        filters = self.filters(section, "filters")
        if not filters:
            self._file.warn(section, None, "a queue without filters gets no messages")
        return QueueRule(name, filters)

    def policies(self) -> dict[str, Policy]:
        """Return how consumers deal with failures, by the name of the queue.

        It moves no message elsewhere, and so does not count in the fingerprint.
        """
        default = Policy()
        found = {}
        for section in self._file.parser.sections():
            if section.startswith(QUEUE_PREFIX):
                found[section.removeprefix(QUEUE_PREFIX)] = Policy(
                    self._number(section, "max_attempts", values.attempts, default.max_attempts),
                    self._number(section, "retry_delay", values.retry_delay, default.retry_delay),
                    self._number(section, "lease", values.lease, default.lease),
                )
        return found

    def _number(self, section: str, option: str, convert: Callable[[str], _T], default: _T) -> _T:
        written = self._file.value(section, option)
        if written is None:
            return default
        text = values.NUMBER_COMMENT.sub("", written)
        try:
            if not text:
                raise Fault("the option has no value", "write one, or leave the option out")
            if CONTROLS.search(text):
                raise Fault("the value holds a control character", "remove it")
            return convert(text)
        except Fault as error:
            self._file.fail(section, option, error.fault, error.mend)

    def filters(self, section: str, option: str) -> tuple[IFilter, ...]:
        """Return the filters of an option, one a line."""
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
            self._file.warn(
                section, option, f"{line}: the file holds no expression, so nothing matches"
            )
        self._file.take(option, line, str(len(sources)), *sources)
        return made

    def _factory(self, section: str, option: str, name: str) -> Callable[[str, str], IFilter]:
        own = FACTORIES.get(name)
        if own is not None:
            return own
        points = importlib.metadata.entry_points(group="postoffice.filters")
        found = {point.value: point for point in points.select(name=name)}
        if not found:
            known = [*FACTORIES, *sorted(points.names - FACTORIES.keys())]
            self._file.fail(section, option, f"unknown filter {name!r}", nearest(name, known))
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

    def warn_of_unreachable(self, routing: Routing) -> None:
        """Warn of each queue that can get nothing because a rule before it takes it all."""
        for number, queue in enumerate(routing.queues):
            section = QUEUE_PREFIX + queue.name
            for one in routing.reject_filters:
                if any(_covers(one, other) for other in queue.filters):
                    self._file.warn(
                        section,
                        None,
                        f"the queue gets no messages: {one.description} in reject_filters "
                        "rejects all that it could get",
                    )
            for earlier in routing.queues[:number]:
                if earlier.filters and all(
                    any(_covers(one, other) for other in queue.filters) for one in earlier.filters
                ):
                    self._file.warn(
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
