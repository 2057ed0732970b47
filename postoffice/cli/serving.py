"""``postoffice serve``: the depot as one daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options

if TYPE_CHECKING:
    from postoffice.config import Settings

__all__ = ["serve_command"]


@click.command("serve", short_help="Be all that the depot needs, until told to stop.")
@shared_options
@pass_invocation
def serve_command(invocation: Invocation) -> None:
    """Import what comes to the Maildir, take mail by LMTP, and serve the database file.

    LMTP where the configuration has lmtp; the database where it is a file, to every process that is
    given its URI.  On SIGHUP the configuration is read again; SIGTERM has everything finish what is
    in hand.
    """
    from postoffice import config
    from postoffice.daemon.supervisor import Daemon

    settings = invocation.settings()

    def load() -> Settings:
        fresh = config.load(settings.path)
        config.set_up_logging(fresh)
        return fresh

    with invocation.logs_of_daemon(settings):
        Daemon(settings, load).run()
