"""How Postfix is reached: its commands, its spool and its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SPOOL_PATH", "PostfixSettings", "Role"]

#: Where Postfix keeps its queue unless its ``main.cf`` says otherwise.
SPOOL_PATH = "/var/spool/postfix"

#: What a command is for: the names of the settings, and of pymailq's, that hold one.
Role = Literal["list_queue", "cat_message", "control"]


@dataclass(frozen=True, slots=True)
class PostfixSettings:
    """The commands of one Postfix instance, as tuples of arguments, and where it keeps its queue.

    The commands are named without the options of any action: :meth:`command` adds these.

    :ivar list_queue: the command that lists the queue, postqueue(1).
    :ivar cat_message: the command that shows a queued message, postcat(1).
    :ivar control: the command that changes the queue, postsuper(1).
    :ivar spool_path: the folder of the queue directories, Postfix's ``queue_directory``.
    :ivar config_directory: the folder of the instance's ``main.cf``; ``None`` is the default
        instance.
    :ivar sudo: what comes before each command, as ``("sudo", "-n")``; empty where none is needed.
    :ivar timeout: a command that says nothing for so many seconds is ended.
    """

    list_queue: tuple[str, ...] = ("postqueue",)
    cat_message: tuple[str, ...] = ("postcat",)
    control: tuple[str, ...] = ("postsuper",)
    spool_path: str = SPOOL_PATH
    config_directory: str | None = None
    sudo: tuple[str, ...] = ()
    timeout: float = 60.0

    def command(self, role: Role, *options: str) -> list[str]:
        """Return the arguments that run a command with these options, for this instance.

        :param role: the name of the setting that holds the command.
        :param options: what follows, as ``"-j"``.
        """
        words: tuple[str, ...] = getattr(self, role)
        instance = () if self.config_directory is None else ("-c", self.config_directory)
        return [*self.sudo, *words, *instance, *options]
