"""The place of a process among others: variables that make no sense, and processes that do not come."""

from __future__ import annotations

import os
import subprocess
import sys

import processes
import pytest
from test_distributed import no_launcher  # noqa: F401 -- a fixture

from utils.errors import UserError
from utils.run.launcher import Place, find_place

pytestmark = pytest.mark.slow

MAIN = """
import sys; sys.path.insert(0, {root!r})
from utils.errors import UserError, run_script
def main(argv):
    raise UserError("some setting is wrong")
run_script(main)
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK='' is not a whole number"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK='first' is not a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a whole number from 0"),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK='1.0' is not a whole number"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, "is not a whole number from 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below 2"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 is not below 1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is not below 0"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "5"}, "LOCAL_RANK=5 is not below 2"),
        ({"RANK": "1"}, "RANK='1' is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' is set without RANK"),
    ],
)
def test_a_place_that_does_not_exist_is_named_in_every_process(no_launcher, variables, expected):  # noqa: F811
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    with pytest.raises(UserError, match=expected) as caught:
        find_place()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": ""}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x"}])
def test_the_message_is_shown_where_no_other_process_would_show_it(variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", MAIN.format(root=str(processes.ROOT))],
        capture_output=True,
        text=True,
        env=environment | variables,
    )
    assert done.returncode == 2
    assert ": error: " in done.stderr


@pytest.mark.parametrize("variables", [{"RANK": "0"}, {"WORLD_SIZE": "1"}])
def test_what_says_that_there_is_one_process_is_left_alone(no_launcher, variables):  # noqa: F811
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    assert find_place() == Place(0, 1, 0, 1)


def meet(patience: float, give_up: float) -> None:
    """Find the other processes, or end as a script does."""
    from utils.run import launcher

    launcher._PATIENCE, launcher._JOIN_TIMEOUT = patience, give_up
    processes.script(lambda argv: 0 if launcher.join(find_place()) else 1, [])


def test_whoever_waits_says_for_whom(tmp_path):
    first, _, third = processes.ranks(3)
    children = [processes.start(meet, 0.2, 1.5, env=env, cwd=tmp_path) for env in (first, third)]
    assert processes.finish(*children) == [2, 2]
    text = (tmp_path / "output.txt").read_text()
    assert "rank 0 of 3 processes: 1 of 3 are missing: rank 1; are they started" in text
    assert "s 1 of 3 are missing: rank 1; start them with torchrun" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_first_process_that_does_not_answer_is_named_with_its_address(tmp_path, host):
    _, second = processes.ranks(2)
    child = processes.start(meet, 0.2, 1.0, env=second | {"MASTER_ADDR": host}, cwd=tmp_path)
    assert processes.finish(child) == [2]
    text = (tmp_path / "output.txt").read_text()
    assert f"rank 1 of 2 processes: rank 0 does not answer at MASTER_ADDR {host}, MASTER_PORT" in text
    assert "rank 1 cannot join the 2 processes" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "change", [{"MASTER_ADDR": ""}, {"MASTER_PORT": ""}, {"MASTER_PORT": "x"}, {"MASTER_PORT": "70000"}]
)
def test_an_address_that_is_none_is_named(tmp_path, change):
    first, _ = processes.ranks(2)
    child = processes.start(meet, 0.2, 1.0, env=first | change, cwd=tmp_path)
    assert processes.finish(child) == [2]
    text = (tmp_path / "output.txt").read_text()
    assert next(iter(change)) in text
    assert "Traceback" not in text
