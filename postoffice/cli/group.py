"""The command itself: its subcommands, and how errors end it."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from postoffice.cli.invocation import Invocation, shared_options
from postoffice.cli.output import Failure, complain
from postoffice.display import one_line
from postoffice.exceptions import EX_TEMPFAIL, PostofficeError

__all__ = ["postoffice"]

# The module that has each command, by the command's name; the order is that of the help.
_MODULES = {
    "import": "importing",
    "deliver": "delivering",
    "serve": "serving",
    "lmtp": "receiving",
    "route": "routing",
    "check": "checking",
    "init": "layout",
    "queues": "queues",
    "mailq": "mailq",
    "messages": "messages",
    "show": "messages",
    "requeue": "quarantine",
    "discard": "quarantine",
    "release": "releasing",
    "consume": "consuming",
    "pack": "packing",
    "debug": "debugging",
}
_EX_INTERRUPTED = 130


def _command(name: str) -> click.Command:
    module = importlib.import_module(f"postoffice.cli.{_MODULES[name]}")
    command: click.Command = getattr(module, f"{name}_command")
    return command


class _Postoffice(click.Group):
    """The group of commands; turns whatever ends one into a line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command when it is asked for."""
        return _command(cmd_name) if cmd_name in _MODULES else None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run, and end the process with the status that the outcome has."""
        for stream in (sys.stdout, sys.stderr):
            # A character that the terminal's encoding does not have is no reason to fail.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        invocation = Invocation()
        try:
            status = super().main(
                args, prog_name, complete_var, standalone_mode=False, obj=invocation, **extra
            )
            sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            status = error.exit_code
        except click.Abort as error:
            # A prompt makes one of an interrupt and of the end of its input, alike.
            interrupted = isinstance(error.__cause__ or error.__context__, KeyboardInterrupt)
            complain("interrupted" if interrupted else "no answer; nothing was done")
            status = _EX_INTERRUPTED if interrupted else 1
        except Failure as error:
            complain(str(error))
            status = error.status
        except PostofficeError as error:
            complain(*str(error).split("\n"))
            status = error.exit_status
        except OSError as error:
            status = _after(error)
        except Exception as error:
            if invocation.verbose:
                traceback.print_exception(error)
            complain(
                f"unexpected {type(error).__name__}: {one_line(error)}; "
                "with -v it shows where, and a report of that is welcome"
            )
            status = EX_TEMPFAIL
        sys.exit(status if isinstance(status, int) else 0)


def _after(error: OSError) -> int:
    if error.errno == errno.EPIPE:
        # Whoever read the output has seen enough.  The interpreter flushes once more at its end.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open until the end
        return 1
    place = f"{error.filename}: " if error.filename is not None else ""
    complain(f"{place}{error.strerror or one_line(error)}")
    return EX_TEMPFAIL


@click.group(
    cls=_Postoffice,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Without a command: import.",
)
@click.version_option(package_name="postoffice", message="%(prog)s %(version)s")
@shared_options
@click.pass_context
def postoffice(ctx: click.Context) -> None:
    """Sort delivered mail from a Maildir into a queue for each application."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(_command("import"))
