"""Asking for a configuration, and for the message it is refused with."""

from __future__ import annotations

import pytest

from utils.config.parse import config_from, parse_config
from utils.config.settings import Config
from utils.errors import UserError


def parse(*argv: str, prog: str = "train.py") -> Config:
    return parse_config(list(argv), prog=prog, description="For a test.")


def fails(*argv: str, prog: str = "train.py") -> str:
    """The message that a command line ends in."""
    with pytest.raises(UserError) as caught:
        parse(*argv, prog=prog)
    return str(caught.value)


def refused(**values: object) -> str:
    """The message that a mapping ends in."""
    with pytest.raises(UserError) as caught:
        config_from(values)
    return str(caught.value)
