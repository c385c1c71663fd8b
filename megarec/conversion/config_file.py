"""What the files of several architectures share: old names of keys, RoPE, lists of layers."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from megarec.config.base import PositiveFloat, PositiveInt, StrictModel, Tuple
from megarec.models.rotary import RotaryConfig

# Type of scaling -> own field -> key of rope_parameters.
SCALINGS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_seq_len": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "original_max_seq_len": "original_max_position_embeddings",
    },
}
NO_LIMIT = (0.0, math.inf)
INFINITY = {"__float__": "Infinity"}
"""How transformers writes what JSON does not have."""


class ConfigFile(StrictModel):
    """The keys of a config.json that shape the model, with transformers' defaults.

    A Literal is all that megarec can represent; keys that are no field change nothing. `old_keys`
    has the names of fields in older files.
    """

    model_config = ConfigDict(extra="ignore")
    old_keys: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _take_old_keys(cls, hf: Any) -> Any:
        for new, old in cls.old_keys.items():
            if hf.get(new) is None:
                hf = {**hf, new: hf[old]} if old in hf else hf
            elif hf.get(old) not in (None, hf[new]):
                raise ValueError(f"{new}={hf[new]} and {old}={hf[old]} differ; keep one of them")
        return hf


class RotaryFile(ConfigFile):
    """The keys of rope_parameters; only those that belong to its rope_type are read."""

    rope_type: Literal["default", "linear", "llama3", "yarn"]
    rope_theta: PositiveFloat
    # The classes that are targets turn all of a head.
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    factor: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    attention_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None
    truncate: Literal[True] = True
    mscale: None = None
    mscale_all_dim: None = None

    def tree(self) -> dict[str, Any]:
        """Return the mapping of a RotaryConfig."""
        if self.rope_type == "default":
            return {"base": self.rope_theta}
        values = {own: getattr(self, key) for own, key in SCALINGS[self.rope_type].items()}
        given = {own: value for own, value in values.items() if value is not None}
        return {"base": self.rope_theta, "scaling": {"type": self.rope_type} | given}


class RotaryKeys(ConfigFile):
    """A file with RoPE: rope_parameters, or as before 5.0 rope_theta and rope_scaling."""

    max_position_embeddings: PositiveInt = 2048
    rope_parameters: RotaryFile

    @model_validator(mode="before")
    @classmethod
    def _gather_rope(cls, hf: Any) -> Any:
        rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
        nested = [key for key, value in rope.items() if isinstance(value, dict)]
        if nested:
            raise ValueError(f"rope_parameters of {', '.join(nested)}: expected one for all layers")
        # What is missing is looked for outside, in this order.
        elsewhere = {
            "rope_type": [rope.get("type"), "default"],
            "rope_theta": [hf.get("rope_theta"), 10_000.0],
            "partial_rotary_factor": [hf.get("partial_rotary_factor"), 1.0],
            "original_max_position_embeddings": [
                hf.get("original_max_position_embeddings"),
                hf.get("max_position_embeddings"),
            ],
        }
        for key, values in elsewhere.items():
            found = [value for value in (rope.get(key), *values) if value is not None]
            rope[key] = found[0] if found else None
        return {**hf, "rope_parameters": rope}


def rope_keys(rope: RotaryConfig) -> dict[str, Any]:
    """Return RoPE's keys of config.json, in today's spelling and in that before 5.0."""
    kind: dict[str, Any] = {"rope_type": "default"}
    if rope.scaling is not None:
        keys = SCALINGS[rope.scaling.type]
        values = {key: getattr(rope.scaling, own) for own, key in keys.items()}
        kind = {"rope_type": rope.scaling.type}
        kind |= {key: value for key, value in values.items() if value is not None}
    return {
        "rope_parameters": {"rope_theta": rope.base} | kind,
        "rope_theta": rope.base,
        "rope_scaling": None if rope.scaling is None else kind,
    }


def rope_obstacles(rope: RotaryConfig) -> list[str]:
    """Name what transformers' Llama-like classes lack of a RoPE."""
    problems = []
    if rope.interleaved:
        problems.append("interleaved=true: the architecture turns the two halves of a head")
    if rope.fraction != 1:
        problems.append(f"fraction={rope.fraction}: the architecture turns all of a head")
    if rope.scaling is not None and rope.scaling.type not in SCALINGS:
        problems.append(
            f"scaling.type={rope.scaling.type}: the architecture has {', '.join(SCALINGS)} only"
        )
    return problems


def layer_names(own: Mapping[str, str]) -> BeforeValidator:
    """Make a validator that turns a list (or string) of layers into a tuple of own names."""

    def rename(value: Any) -> Any:
        if not isinstance(value, list | str):
            return value
        unknown = sorted({str(name) for name in value} - own.keys())
        if unknown:
            raise ValueError(f"unknown layers {', '.join(unknown)}; known: {', '.join(own)}")
        return tuple(own[name] for name in value)

    return BeforeValidator(rename)


def limit_to_json(limit: tuple[float, float]) -> list[Any]:
    """Return a range as transformers writes it."""
    return [INFINITY if math.isinf(bound) else bound for bound in limit]


Bound = Annotated[float, BeforeValidator(lambda value: math.inf if value == INFINITY else value)]
Limit = Annotated[tuple[Bound, Bound], Tuple]
"""A range in config.json, as transformers writes it or with plain numbers."""
