"""``postoffice lmtp``: mail by LMTP, until it is told to stop."""

from __future__ import annotations

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import complain

__all__ = ["lmtp_command"]


@click.command("lmtp", short_help="Take mail by LMTP, for Postfix.")
@shared_options
@pass_invocation
def lmtp_command(invocation: Invocation) -> None:
    """Listen where the configuration says (lmtp), and store what comes, until SIGTERM.

    A message is acknowledged when it is stored for good.  While the database cannot be reached,
    clients are told to try again.
    """
    from postoffice.database import open_soon

    # Clients that wait for an answer had better try again later.
    with invocation.post_office_by(open_soon) as post_office:
        place = post_office.settings.lmtp
        post_office.serve_lmtp(lambda: complain(f"lmtp: listening at {place}"))
