"""Random generators for data: each depends on its key alone, never on global state."""

from hashlib import blake2b

import numpy as np


def generator(*key: str | int | float) -> np.random.Generator:
    """Return a numpy generator seeded by a hash of the key's parts."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
