"""The documents of the command, the README's example and the demonstration are true."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from postoffice.cli.group import postoffice

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ROOT / "docs" / "commands.rst"
SHARED = {"--config", "--verbose", "--help", "--version"}


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yield the command and all below it, by their full names."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from commands(found, f"{name} {child}")


def options(command: click.Command) -> dict[str, set[str]]:
    """Return the forms of each option of a command, by its long form."""
    context = click.Context(command, help_option_names=["-h", "--help"])
    found = {}
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            forms = {*parameter.opts, *parameter.secondary_opts}
            found[max(forms, key=len)] = forms
    return found


def documented() -> dict[str, dict[str, set[str]]]:
    """Return the options that the document has for each command, by their long forms."""
    found: dict[str, dict[str, set[str]]] = {}
    section: dict[str, set[str]] = {}
    for line in COMMANDS.read_text(encoding="utf-8").splitlines():
        if line.startswith(".. program:: "):
            section = found.setdefault(line.removeprefix(".. program:: "), {})
        elif line.startswith(".. option:: "):
            forms = {part.split()[0] for part in line.removeprefix(".. option:: ").split(",")}
            section[max(forms, key=len)] = forms
    return found


def test_every_command_and_option_is_documented() -> None:
    """The document has each command with exactly its options, in all their forms."""
    actual = {}
    for name, command in commands(postoffice, "postoffice"):
        found = options(command)
        if name != "postoffice":
            found = {long: forms for long, forms in found.items() if long not in SHARED}
        actual[name] = found
    assert documented() == actual


def test_every_command_shares_the_options() -> None:
    """The configuration, more words and help can be asked for behind every subcommand."""
    for name, command in commands(postoffice, "postoffice"):
        assert SHARED - {"--version"} <= options(command).keys(), name


def test_every_command_and_option_has_help() -> None:
    """Each command and option explains itself in the command's own help."""
    for name, command in commands(postoffice, "postoffice"):
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def test_every_exit_status_is_documented() -> None:
    """The document's table has the statuses that the command ends with."""
    table = re.findall(r"^(\d+) +\S", COMMANDS.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(status) for status in table] == [0, 1, 2, 65, 66, 67, 69, 73, 75, 77, 130]


def test_demonstration() -> None:
    """The demonstration goes through, and its output is short and has what it promises."""
    done = subprocess.run(
        [sys.executable, ROOT / "demo" / "run.py"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) <= 130
    for line in (
        "           its next messages, a second apart (5)  [Throttled]",
        "           a message of 300 KB                    [Maximum Message Size Exceeded]",
        "bill 1042:   990.00 EUR from bo@steel.example",
        "last error:  ValueError: could not convert string to float: 'twelve'",
        "1 message requeued in billing",
    ):
        assert line in lines
    (summary,) = [line for line in lines if line.startswith("36 messages in ")]
    assert summary.endswith(": 8 discarded, 26 queued, 2 rejected")
    (scratch,) = re.findall(r"wait in (.*)/po/Maildir/new", done.stdout)
    assert not Path(scratch).exists()
