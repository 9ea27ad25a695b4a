"""How probable each option of a closed question is, read from the logits instead of from generated text.

The options' token sequences form a tree. At each branching the model's probabilities are normalised over the branches
that exist; an option's probability is the product along its path. That is the distribution of decoding constrained to
the options, so length is no advantage, and it needs no decoding at all where options differ in their first token. Where
they branch later, all branchings are known beforehand, so that one batch computes them all; and those of several
questions, with the questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import LanguageEngine
from mobilevlm_ros.runtime.sampling import log_softmax

__all__ = ['OptionScores', 'OptionTree', 'score_options']


@dataclass(frozen=True)
class OptionScores:
    """How probable the options of one question are.

    :ivar probabilities: one for each option, summing to 1.
    :ivar mass: probability that the unconstrained model would have started with any of them.
    :ivar n_steps: how many branchings after the first the model was asked about.
    """

    probabilities: tuple[float, ...]
    mass: float
    n_steps: int

    @property
    def best(self) -> int:
        """Index of the most probable option; the first of equals."""
        return int(np.argmax(self.probabilities))

    def at(self, temperature: float) -> OptionScores:
        """The same options in the same order, less sure of above 1: log probabilities divided by the temperature."""
        if temperature == 1.0:
            return self
        with np.errstate(divide='ignore'):
            scaled = np.log(self.probabilities) / temperature
        weights = np.exp(scaled - scaled.max())
        return replace(self, probabilities=tuple((weights / weights.sum()).tolist()))


@dataclass
class _Node:
    children: dict[int, _Node] = field(default_factory=dict)
    ends: int | None = None


class OptionTree:
    """The options of one question as token sequences, and where they branch.

    Spellings that differ only in case or in a leading space count for the same option.

    :ivar branchings: the tokens before each branching after the first; their logits are needed to score.
    """

    def __init__(self, options: Sequence[str], engine: LanguageEngine) -> None:
        self._n_options = len(options)
        self._end_token = engine.end_token
        self._root = _Node()
        for index, option in enumerate(options):
            for spelling in _spellings(option, engine):
                _insert(self._root, engine.tokenize(spelling), index)
        self.branchings: list[tuple[int, ...]] = [path for path, _ in _branchings(self._root)]

    def score(self, first: NDArray[np.float32], later: NDArray[np.float32]) -> OptionScores:
        """Probabilities of the options.

        :param first: logits where an option would begin, ``[n_vocab]``.
        :param later: logits after each of ``branchings``, ``[len(branchings), n_vocab]``.
        """
        logits: dict[tuple[int, ...], NDArray[np.float32]] = {
            (): first,
            **dict(zip(self.branchings, later, strict=True)),
        }
        result = np.full(self._n_options, -np.inf)
        mass = 0.0
        so_far: dict[tuple[int, ...], float] = {(): 0.0}
        for path, node in [((), self._root), *_branchings(self._root)]:
            tokens = [*node.children, *([self._end_token] if node.ends is not None else [])]
            branches = log_softmax(logits[path])[tokens].astype(np.float64)
            if not path:
                mass = float(np.exp(branches).sum())
            branches += so_far[path] - np.logaddexp.reduce(branches)
            if node.ends is not None:
                result[node.ends] = np.logaddexp(result[node.ends], branches[-1])
            for (token, child), log_probability in zip(node.children.items(), branches, strict=False):
                steps, last = _follow(child)
                if last.children:
                    so_far[(*path, token, *steps)] = float(log_probability)
                else:
                    assert last.ends is not None
                    result[last.ends] = np.logaddexp(result[last.ends], log_probability)
        probabilities = np.exp(result - result.max())
        probabilities /= probabilities.sum()
        return OptionScores(tuple(float(p) for p in probabilities), min(mass, 1.0), len(self.branchings))


def score_options(engine: LanguageEngine, options: Sequence[str], cancel: CancelToken) -> OptionScores:
    """Score ``options`` as continuations of what the engine holds; the sequence is left as it was found."""
    tree = OptionTree(options, engine)
    first = engine.logits().copy()
    return tree.score(first, engine.branch(tree.branchings, cancel))


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


def _follow(node: _Node) -> tuple[list[int], _Node]:
    """The tokens after ``node`` up to the next branching or the last end, and the node there."""
    steps = []
    while len(node.children) == 1 and node.ends is None:
        ((token, node),) = node.children.items()
        steps.append(token)
    return steps, node


def _branchings(node: _Node, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], _Node]]:
    """Every branching below ``node`` with the tokens before it, parents first."""
    for token, child in node.children.items():
        steps, last = _follow(child)
        if last.children:
            here = (*path, token, *steps)
            yield here, last
            yield from _branchings(last, here)
