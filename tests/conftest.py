"""Fixtures of several test files."""

import pytest


@pytest.fixture
def written(tmp_path):
    """Write text to a YAML file and return its path."""

    def write(text):
        path = tmp_path / "a.yml"
        path.write_text(text)
        return str(path)

    return write
