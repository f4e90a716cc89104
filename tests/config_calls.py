"""Asking for a configuration, and for the message it is refused with."""

from __future__ import annotations

import pytest

from utils.config import config_from, parse_config
from utils.errors import UserError
from utils.settings import Config


def parse(*argv: str) -> Config:
    return parse_config(list(argv), prog="train.py", description="Train.")


def fails(*argv: str) -> str:
    """The message that a command line ends in."""
    with pytest.raises(UserError) as caught:
        parse(*argv)
    return str(caught.value)


def refused(**values: object) -> str:
    """The message that a mapping ends in."""
    with pytest.raises(UserError) as caught:
        config_from(values)
    return str(caught.value)
