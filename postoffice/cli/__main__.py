"""``python -m postoffice.cli`` is ``postoffice``."""

from postoffice.cli import main

main()
