"""The form of what a file from outside holds: one schema for each kind of file, and one message where it does not fit.

The schemas are Pydantic's, because its errors know the field and its value. Each lies beside the reader of its file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.types import Strict

from utils.errors import UserError, one_line, shortened
from utils.files import read_text

T = TypeVar("T")

MOST = 10**12  # more than any file here counts, and far below the end of 64 bits

# A number is a number: not its text, and 1 is not true.
Count = Annotated[int, Strict(), Field(ge=0, le=MOST)]
Finite = Annotated[float, Strict(), AllowInfNan(False)]
Text = Annotated[str, Strict()]


class Record(BaseModel):
    """A base class of schemas: fields that it does not name are left alone."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)


def checked(schema: type[T], content: Any, where: str, remedy: str) -> T:
    """`content` as `schema` describes it.

    Args:
        where: the file, for the message.
        remedy: what to do, for the message.

    Raises:
        UserError: it is of another form; the message names the first field, its value and what is valid.
    """
    try:
        return TypeAdapter(schema).validate_python(content)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        field = ".".join(map(str, first["loc"])) or "its content"
        what = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        what = what[:1].lower() + what[1:]
        value = "" if first["type"] == "missing" else f" is {shortened(first['input'])}"
        more = f" ({len(others)} more)" if others else ""
        raise UserError(f"{where}: {one_line(field)}{value}: {what}{more}; {remedy}") from error
    except RecursionError as error:
        raise UserError(f"{where}: its content is nested too deep; {remedy}") from error


def read_json(schema: type[T], path: Path, what: str, remedy: str) -> T:
    """The content of a JSON file as `schema` describes it; `what` begins the message, usually with the path.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, is no JSON, or of another form.
    """
    try:
        content = json.loads(read_text(path), object_pairs_hook=_each_once)
        # An escape such as \\udcff alone is no character, and no report could be written with it.
        json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"{what} is damaged or no JSON ({one_line(reason)}); {remedy}") from error
    return checked(schema, content, what, remedy)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of a JSON object; of two entries with one name, one would have no effect."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice in one object")
    return content
