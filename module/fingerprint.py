"""Fingerprints of functions, by which code that relies on how another function is written sees that it was edited."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any


@functools.cache
def fingerprint(function: Any) -> str:
    """Of the syntax tree of a function: comments, docstring and layout do not count. Empty where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def found(name: str) -> tuple[Any, str]:
    """The class or module that holds the function `package.module:Class.function`, and the function's name."""
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), attribute


def edited(known: Mapping[str, str]) -> list[str]:
    """The functions `package.module:Class.function` -> known fingerprint that differ from it."""
    return [name for name, value in known.items() if fingerprint(getattr(*found(name))) != value]
