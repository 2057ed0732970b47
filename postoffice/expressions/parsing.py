"""Python's own parser of regular expressions: a compiled pattern, and the tree behind it."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

__all__ = ["Node", "compiled", "compiler", "parsed", "parser"]

# Private to CPython; without them there is no second engine, and the third has more to do.
parser: Any
compiler: Any
try:
    parser = importlib.import_module("re._parser")
    compiler = importlib.import_module("re._compiler")
except ImportError:
    parser = compiler = None

Node = tuple[Any, Any]
"""An operator and its argument."""

_quiet_lock = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop the warnings of Python's parser: what it warns of is valid all the same."""
    # The filters belong to the process: two threads that set them at once would restore them wrong.
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compiled(source: str, flags: int) -> re.Pattern[str]:
    """Compile *source* without warnings.

    :raises re.error: it is no expression, or one that ``re`` cannot compile.
    """
    try:
        with _quiet():
            return re.compile(source, flags)
    except RecursionError:
        raise re.error("nested too deeply", source) from None
    except (OverflowError, ValueError) as error:
        raise re.error(str(error), source) from None


def parsed(source: str, flags: int) -> Any:
    """Return the tree of *source*, which is valid, or ``None`` where the tree cannot be had."""
    if parser is None:
        return None
    with _quiet(), contextlib.suppress(AttributeError):
        return parser.parse(source, flags)
    return None


os.register_at_fork(
    before=_quiet_lock.acquire,
    after_in_parent=_quiet_lock.release,
    after_in_child=_quiet_lock.release,
)
