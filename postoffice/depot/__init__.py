"""The data format: every persistent class, and nothing else.

The path of each class is part of the format and never moves.  Stock BTrees and ``BTrees.Length``
are used throughout, so that a ZEO server resolves conflicts without having postoffice installed.
"""
