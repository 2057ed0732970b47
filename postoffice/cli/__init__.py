"""The command ``postoffice``: each command parses its line, calls, prints, and ends with a status.

A command's module is imported when the command runs, and the database with it: help, a mistyped
command and completion wait for neither.
"""

from __future__ import annotations

from postoffice.cli.group import postoffice

__all__ = ["main"]


def main() -> None:
    """Run the command of the process's arguments, and end the process with its status."""
    postoffice(prog_name="postoffice")
