"""The two bases of every config class: a strict model, and one that is chosen by its `type`."""

from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    model_validator,
)
from pydantic_core import PydanticCustomError

T = TypeVar("T")
Member: TypeAlias = "type[Registered]"


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# YAML has lists only; frozen configs hold tuples.
Tuple = BeforeValidator(_list_to_tuple)
Pair = Annotated[tuple[float, float], Tuple]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class StrictModel(BaseModel):
    """A frozen config: unknown keys are errors, and nothing is coerced (a bool is not an int)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Registered(StrictModel):
    """A config whose class is chosen by its `type` tag.

    A direct subclass of ``Registered`` is a family (mixers, say); it names itself in ``kind``, and
    its own subclasses register under their ``type``. A field annotated with the family accepts
    the mapping of any member, and errors keep their full path.
    """

    type: str
    kind: ClassVar[str]
    members: ClassVar[dict[str, "Member"]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Open a new family, or register a member under the default of its `type`."""
        super().__pydantic_init_subclass__(**kwargs)
        if Registered in cls.__bases__:
            cls.members = {}
            return
        tag = cls.model_fields["type"].default
        if not isinstance(tag, str):
            return  # A base that members share, not a member.
        other = cls.members.get(tag)
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise TypeError(f"two {cls.kind}s are registered as '{tag}': {other} and {cls}")
        cls.members[tag] = cls

    @classmethod
    def discover(cls) -> None:
        """Import the modules that define members; families with plug-ins override it."""

    @classmethod
    def member(cls, tag: object) -> "Member | None":
        """Return the class registered under a tag, or None."""
        cls.discover()
        return cls.members.get(tag) if isinstance(tag, str) else None

    @model_validator(mode="wrap")
    @classmethod
    def _dispatch(cls, value: Any, handler: ModelWrapValidatorHandler[T]) -> Any:
        if Registered not in cls.__bases__ or isinstance(value, cls):
            return handler(value)
        tag = value.get("type") if isinstance(value, dict) else None
        member = cls.member(tag)
        if member is None:
            problem = f"unknown {cls.kind} type '{tag}'" if tag else f"no {cls.kind} type"
            raise PydanticCustomError(
                "unknown_type",
                "{problem}; expected one of: {known}",
                {"problem": problem, "known": ", ".join(sorted(cls.members))},
            )
        return member.model_validate(value)
