"""How probable each option of a closed question is, read from the logits instead of from generated text.

The options' token sequences form a tree. At each branching the model's probabilities are normalised over the branches
that exist; an option's probability is the product along its path. That is the distribution of decoding constrained to
the options, so length is no advantage, and it needs no decoding at all where options differ in their first token:
only a shared prefix that branches later costs a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import LanguageEngine
from mobilevlm_ros.runtime.sampling import log_softmax

__all__ = ['OptionScores', 'score_options']


@dataclass(frozen=True)
class OptionScores:
    """Result of ``score_options``.

    :ivar probabilities: one for each option, summing to 1.
    :ivar mass: probability that the unconstrained model would have started with any of them.
    :ivar n_steps: how many times the model had to be run.
    """

    probabilities: tuple[float, ...]
    mass: float
    n_steps: int

    @property
    def best(self) -> int:
        """Index of the most probable option; the first of equals."""
        return int(np.argmax(self.probabilities))


@dataclass
class _Node:
    children: dict[int, _Node] = field(default_factory=dict)
    ends: int | None = None


def score_options(engine: LanguageEngine, options: Sequence[str], cancel: CancelToken) -> OptionScores:
    """Score ``options`` as continuations of what the engine holds; the sequence is left as it was found.

    Spellings that differ only in case or in a leading space count for the same option.
    """
    root = _Node()
    for index, option in enumerate(options):
        for spelling in _spellings(option, engine):
            _insert(root, engine.tokenize(spelling), index)
    log_probabilities = np.full(len(options), -np.inf)
    first = log_softmax(engine.logits())
    mass = float(np.exp(_branch_logits(root, first, engine).astype(np.float64)).sum())
    n_steps = _descend(root, first, 0.0, log_probabilities, engine, cancel)
    probabilities = np.exp(log_probabilities - log_probabilities.max())
    probabilities /= probabilities.sum()
    return OptionScores(tuple(float(p) for p in probabilities), min(mass, 1.0), n_steps)


def _spellings(option: str, engine: LanguageEngine) -> list[str]:
    spellings = {option, option.lower(), option[:1].upper() + option[1:]}
    # SentencePiece adds the space of a word's start by itself; byte-level BPE has a second token for it.
    if not engine.piece(engine.tokenize('a')[0]).startswith(b' '):
        spellings |= {f' {spelling}' for spelling in spellings}
    return sorted(spellings)


def _insert(root: _Node, tokens: Sequence[int], index: int) -> None:
    node = root
    for token in tokens:
        node = node.children.setdefault(token, _Node())
    node.ends = index if node.ends is None else node.ends


def _branch_logits(node: _Node, log_probabilities: NDArray[np.float32], engine: LanguageEngine) -> NDArray[np.float32]:
    """Log probabilities of the branches: the children in order, then the end of an option if one ends here."""
    tokens = list(node.children)
    if node.ends is not None:
        tokens.append(engine.end_token)
    return log_probabilities[tokens]


def _descend(
    node: _Node,
    next_token: NDArray[np.float32],
    so_far: float,
    result: NDArray[np.float64],
    engine: LanguageEngine,
    cancel: CancelToken,
) -> int:
    """Add the options below ``node``, where ``next_token`` are its log probabilities; returns model runs."""
    branches = _branch_logits(node, next_token, engine).astype(np.float64)
    branches = so_far + branches - np.logaddexp.reduce(branches)
    if node.ends is not None:
        result[node.ends] = np.logaddexp(result[node.ends], branches[-1])
    n_steps = 0
    n_here = engine.n_past
    for (token, child), log_probability in zip(node.children.items(), branches, strict=False):
        path = [token]
        while len(child.children) == 1 and child.ends is None:
            (step, child), *_ = child.children.items()
            path.append(step)
        if not child.children:
            assert child.ends is not None
            result[child.ends] = np.logaddexp(result[child.ends], log_probability)
            continue
        engine.append(path, cancel)
        after = log_softmax(engine.logits())
        n_steps += 1 + _descend(child, after, float(log_probability), result, engine, cancel)
        engine.rewind(n_here)
    return n_steps
