"""``postoffice serve`` whose parts count as hung after two seconds.

Called as ``python -m tests.impatient_daemon INI``.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

from postoffice import config
from postoffice.daemon.parts import Part, parts_of
from postoffice.daemon.supervisor import Daemon


def impatient(settings: config.Settings) -> list[Part]:
    """Return the parts of a configuration, each to give a sign of life every two seconds."""
    return [replace(part, patience=2.0) for part in parts_of(settings)]


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    Daemon(config.load(sys.argv[1]), lambda: config.load(sys.argv[1]), impatient).run()
