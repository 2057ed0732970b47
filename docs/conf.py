"""Sphinx's settings for these documents, and the directive that shows a contract."""

import builtins
import importlib
import inspect
import re
import sys
from importlib.metadata import version as installed_version

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from zope.interface.interface import Method

project = "postoffice"
author = "the postoffice contributors"
copyright = f"2026, {author}"
release = version = installed_version("postoffice")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.doctest"]
autodoc_member_order = "bysource"
# An interface is no class; unless it is named here its repr would stand in signatures.
autodoc_type_aliases = {
    name: f"postoffice.interfaces.{name}" for name in ("IEventSink", "IFilter", "IQueue", "Send")
}
html_theme = "alabaster"
html_theme_options = {"description": "A queue of mail for each application"}
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
    # What a module imports for its signatures alone stands there without its module.
    (
        r"py:class",
        r"(BinaryIO|Blob|Buffer|Path|StdlibMessage|TracebackType|email\.message\.Message)",
    ),
    # Beside such a name Sphinx takes the text of a signature apart at its commas.
    (r"py:class", r"Callable\[\[\]"),
]


class AutoInterface(SphinxDirective):
    """Shows an interface of zope.interface: ``.. autointerface:: postoffice.interfaces.IQueue``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module_name, _, name = self.arguments[0].rpartition(".")
        interface = getattr(importlib.import_module(module_name), name)
        lines = [f".. py:class:: {name}()", f"   :module: {module_name}", ""]
        lines += _indented(inspect.cleandoc(interface.__doc__), 3)
        for member in interface.names():
            described = interface[member]
            if isinstance(described, Method):
                lines.append(f"   .. py:method:: {member}{described.getSignatureString()}")
            else:
                lines.append(f"   .. py:attribute:: {member}")
            lines += ["", *_indented(inspect.cleandoc(described.__doc__), 6)]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, self.arguments[0]), 0, node)
        return node.children


def _indented(text: str, columns: int) -> list[str]:
    return [" " * columns + line if line else "" for line in text.splitlines()] + [""]


def _by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Resolve a name that is written without its module, where only one object has it."""
    if node.get("refdomain") != "py" or "reftarget" not in node:
        return None
    domain = env.domains.python_domain
    target = "." + node["reftarget"].lstrip("~.")
    found = [name for name in domain.objects if name.endswith(target)]
    if len(found) != 1:
        return None
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], found[0], node, content
    )


def _readable_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Undo what autodoc makes of type aliases and of the defaults of dataclasses."""
    if signature is not None:
        signature = re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1", signature)
        signature = signature.replace("<factory>", "...")
    return signature, returns


def setup(app: Sphinx) -> None:
    """Add what is defined here."""
    app.connect("autodoc-process-signature", _readable_signature)
    app.add_directive("autointerface", AutoInterface)
    app.connect("missing-reference", _by_last_name)
