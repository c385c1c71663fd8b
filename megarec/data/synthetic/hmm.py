"""A language emitted by a hidden Markov model, whose exact next-token distribution is known."""

from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megarec.config.base import Fraction, NonNegativeInt, PositiveInt
from megarec.data.rng import generator
from megarec.data.synthetic.task import Task, TaskSample

Floats = npt.NDArray[np.float64]
UNIFORM_SHARE = 0.01


class Matrices(NamedTuple):
    """Transitions (S, S), emissions (S, V) and the stationary distribution (S,), float64."""

    transitions: Floats
    emissions: Floats
    stationary: Floats


class HMM(Task):
    """Next-token prediction of the observations of a hidden Markov model, whole rows labelled.

    The states form a random cycle: the next one follows with probability ``advance``, one other
    random state with the rest. A state emits ``support`` random symbols with Dirichlet(1) weights.
    Both matrices are mixed with 1% uniform. ``matrix_seed`` names the language: all seeds and
    splits share its matrices.
    """

    type: Literal["hmm"] = "hmm"
    num_states: PositiveInt = 16
    vocab_size: PositiveInt = 8
    support: PositiveInt = 2
    advance: Fraction = 0.9
    matrix_seed: NonNegativeInt = 0

    @property
    def num_ids(self) -> int:
        """The observable symbols."""
        return self.vocab_size

    @property
    def chance(self) -> float:
        """One symbol out of all."""
        return 1 / self.vocab_size

    def problems(self, length: int) -> list[str]:
        """States need another successor, symbols a support."""
        problems = []
        if self.num_states < 3:
            problems.append(f"num_states={self.num_states}: expected at least 3")
        if self.support > self.vocab_size:
            problems.append(f"support={self.support} exceeds vocab_size={self.vocab_size}")
        return problems

    @property
    def matrices(self) -> Matrices:
        """The matrices of this language."""
        return _matrices(
            self.num_states, self.vocab_size, self.support, self.advance, self.matrix_seed
        )

    def draw(self, rng: np.random.Generator, length: int) -> TaskSample:
        """Draw length + 1 symbols, from a stationary start; labels are the next symbols."""
        transitions, emissions, stationary = self.matrices
        next_states = transitions.cumsum(axis=1)
        symbols = emissions.cumsum(axis=1)
        state = _pick(stationary.cumsum(), rng.random())
        observations = np.empty(length + 1, dtype=np.int64)
        for t, (u, v) in enumerate(rng.random((length + 1, 2))):
            observations[t] = _pick(symbols[state], u)
            state = _pick(next_states[state], v)
        input_ids, labels = observations[:-1], observations[1:]
        return TaskSample(input_ids=input_ids, labels=labels, meta={"input_ids": input_ids})

    def oracle(self, meta: dict[str, Any]) -> Floats:
        """Return log P(next symbol | symbols so far), float64 (T, V), by the forward filter."""
        transitions, emissions, belief_S = self.matrices
        log_probs_TV = np.empty((len(meta["input_ids"]), self.vocab_size))
        for t, symbol in enumerate(meta["input_ids"]):
            belief_S = belief_S * emissions[:, symbol]
            belief_S = belief_S / belief_S.sum() @ transitions
            log_probs_TV[t] = np.log(belief_S @ emissions)
        return log_probs_TV


def _pick(cumulative: Floats, u: float) -> int:
    # The last sum may round to just below 1.
    return min(int(np.searchsorted(cumulative, u, side="right")), len(cumulative) - 1)


@cache
def _matrices(states: int, vocab_size: int, support: int, advance: float, seed: int) -> Matrices:
    rng = generator("hmm matrices", states, vocab_size, support, advance, seed)
    cycle = rng.permutation(states)
    transitions = np.zeros((states, states))
    emissions = np.zeros((states, vocab_size))
    for state, successor in zip(cycle, np.roll(cycle, -1), strict=True):
        others = [other for other in range(states) if other not in (state, successor)]
        transitions[state, successor] = advance
        transitions[state, rng.choice(others)] = 1 - advance
        symbols = rng.choice(vocab_size, size=support, replace=False)
        emissions[state, symbols] = rng.dirichlet(np.ones(support))
    transitions = (1 - UNIFORM_SHARE) * transitions + UNIFORM_SHARE / states
    emissions = (1 - UNIFORM_SHARE) * emissions + UNIFORM_SHARE / vocab_size
    # The stationary distribution solves pi (A - I) = 0 with sum(pi) = 1.
    system = np.vstack([transitions.T - np.eye(states), np.ones(states)])
    stationary = np.linalg.lstsq(system, np.append(np.zeros(states), 1.0), rcond=None)[0]
    return Matrices(transitions, emissions, stationary)
