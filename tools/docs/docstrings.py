"""Extension of mkdocstrings: rewrite the reStructuredText in our docstrings to Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_REWRITTEN = (
    (re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(?:~[\w.]*\.)?([^`]+)`"), r"`\1`"),  # Sphinx roles
    (re.compile(r"``"), "`"),
    (re.compile(r"^( *)Example:$", re.MULTILINE), r"\1Examples:"),  # only this one is read as code
    (re.compile(r"(?<=\w)::$", re.MULTILINE), ":"),  # before a block of code
)


class Docstrings(griffe.Extension):
    """Rewrite reStructuredText to Markdown, and let a package's function hide the module of that name."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            for pattern, replacement in _REWRITTEN:
                obj.docstring.value = pattern.sub(replacement, obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for package in [pkg, *pkg.modules.values()]:
            for name in map(str, package.exports or ()):
                module = package.members.get(name)
                if isinstance(module, griffe.Module):  # blocks.classify is a function, in blocks/classify.py
                    package.members[name] = griffe.Alias(name, module.members[name], parent=package)
