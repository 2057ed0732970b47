"""Sphinx's settings for these documents."""

import builtins
import sys
from importlib.metadata import version as installed_version

project = "postoffice"
author = "the postoffice contributors"
copyright = f"2026, {author}"
release = version = installed_version("postoffice")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.doctest"]
autodoc_member_order = "bysource"
html_theme = "alabaster"
html_show_sourcelink = False

# References lead to what is documented here; Python and the packages depended on are elsewhere,
# and no inventory of theirs is fetched, so that a build needs no network.
_elsewhere = [
    *sys.stdlib_module_names,
    *("BTrees", "ZEO", "ZODB", "click", "paste", "persistent", "repoze", "rich", "transaction"),
    *("zodburi", "zope"),
]
nitpick_ignore_regex = [
    (r"py:.*", rf"({'|'.join(dir(builtins))})"),
    (r"py:.*", rf"({'|'.join(_elsewhere)})(\..+)?"),
    # A private base shows in a public class's line, and has no entry of its own.
    (r"py:class", r"(.+\.)?_[^.]+"),
]
