"""The contract that every mixer passes: small models, and checks that raise AssertionError.

In the tests of a package that brings a mixer of its own:

    import pytest
    from megarec.testing.contract import CHECKS, Case, small_model

    import my_package.my_mixer  # importing it registers it

    MIXER = {"type": "my_mixer", "num_heads": 2}

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_mixer(check: str) -> None:
        CHECKS[check](Case(small_model(MIXER)))

Choose sizes that are small but not 1, chunks of 4 to 16 tokens (powers of 2), and a case for each
option that changes what is computed. A case takes about a second.
"""

from collections.abc import Callable

from megarec.testing import claims, numerics
from megarec.testing.case import Case, random_model, small_model

__all__ = ["CHECKS", "Case", "random_model", "small_model"]

CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        numerics.steps,
        numerics.chunks,
        numerics.packed,
        numerics.isolation,
        numerics.padding,
        numerics.causality,
        numerics.gradients,
        numerics.recomputation,
        numerics.bfloat16,
        claims.sizes,
        claims.flops,
        claims.activations,
        claims.declarations,
        claims.division,
        claims.seeds,
        claims.checkpoint,
        claims.export,
    )
}
"""Every check by name, in the order in which to mend a new mixer."""
