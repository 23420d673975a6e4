"""Single values of a spec, the range of each, and the mapping that all others are."""

import keyword
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from hsgen.errors import ArgumentError

Path = tuple[str | int, ...]  # fields from the Spec down: ("levels", 0, "score", "form")


MAX_COUNT = 1 << 24


MAX_FORCED = 1 << 20


MAX_LEVELS = 16


MAX_BRANCHES = 16


MAX_SPANS = 256


MAX_TIERS = 8


MAX_AXES = 3


MAX_WAYS = 256
MAX_CALLS = 1024


LANGUAGE = 1


def _no_keyword(name: str) -> str:
    """Names become parts of emitted names, so Python's own words are not among them."""
    if keyword.iskeyword(name):
        msg = "a word of Python"
        raise ValueError(msg)
    return name


def _one_line(text: str) -> str:
    if not text.isprintable():
        msg = "not one printable line"
        raise ValueError(msg)
    return text


# a JSON Schema learns of no validator, so each is said once more in its words
_NO_KEYWORD: JsonDict = {"not": {"enum": [*keyword.kwlist]}}


# about printable: the rest of it are classes of Unicode that not every editor's patterns know
_ONE_LINE: JsonDict = {"pattern": r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"}


Identifier = Annotated[
    str,
    Field(pattern=r"^[a-z][a-z0-9_]{0,47}$", json_schema_extra=_NO_KEYWORD),
    AfterValidator(_no_keyword),
]


Text = Annotated[str, Field(max_length=200, json_schema_extra=_ONE_LINE), AfterValidator(_one_line)]


Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]


Forced = Annotated[int, Field(strict=True, ge=0, le=MAX_FORCED)]


# scores are float32: outside this range they all become 0 or infinite
Scale = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]


Bound = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]


Cosine = Annotated[float, Field(ge=-1.0, le=1.0, allow_inf_nan=False)]


# parts of a whole are counted in units of 2^-30; the smallest part is far above one unit
Part = Annotated[float, Field(ge=1e-6, le=1.0, allow_inf_nan=False)]


# times what is needed where all are alike: no less, or there is not room for all
Slack = Annotated[float, Field(ge=1.0, le=1024.0, allow_inf_nan=False)]


Power = Annotated[int, Field(strict=True, ge=2, le=6)]


Growth = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


# an axis of the tokens: so many steps, or as many as a later binding says; the first may stay open
Axis = Count | Literal["any"]


# one number an axis of the tokens; how many there must be is for the rules to say
PerAxis = Annotated[tuple[Count, ...], Field(max_length=MAX_AXES)]


class Node(BaseModel):
    """A frozen mapping of the spec; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)
    renamed: ClassVar[Mapping[str, str]] = {}  # YAML key -> field, where they differ


def count(name: str, value: int) -> int:
    """A number that pydantic would take for a Count, or an error in our own form."""
    if isinstance(value, bool) or not 1 <= value <= MAX_COUNT:
        msg = f"{name}: expected a whole number from 1 to {MAX_COUNT}, got {value!r}"
        raise ArgumentError(msg)
    return value
