"""Say how the tensors of a file differ from those of a model."""

from collections.abc import Mapping, Sequence

MAX_LINES = 10

Shapes = Mapping[str, Sequence[int]]


def mismatches(where: str, found: Shapes, expected: Shapes, *, partial: bool = False) -> list[str]:
    """Return the first ten differences and their number, a line each; [] if all fits.

    Args:
        where: names the origin of `found`.
        found: tensor name -> whole shape, of a file.
        expected: the same of the model.
        partial: tensors that the model does not have are no difference.
    """
    problems = [
        f"{name}: shape {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(found.keys() & expected)
        if list(found[name]) != list(expected[name])
    ]
    problems += [f"{name}: missing" for name in sorted(expected.keys() - found)]
    if not partial:
        problems += [f"{name}: not in this model" for name in sorted(found.keys() - expected)]
    if not problems:
        return []
    lines = [f"{where}: {problem}" for problem in problems[:MAX_LINES]]
    return [*lines, f"{where}: {len(problems)} tensors differ: these are of another model"]
