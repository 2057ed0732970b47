"""The daemon: all that a depot needs to go on by itself, as one process with a few below it.

The process that is started opens no database and reads no mail.  It starts its parts, each a
process of its own, and starts again whatever part dies or hangs; it says how they are, to systemd
and in a file; and it listens for LMTP clients, who wait while the part that talks to them is
another one by now.
"""
