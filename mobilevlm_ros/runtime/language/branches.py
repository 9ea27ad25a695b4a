"""Which tokens are computed, in which sequences, to look at many continuations of one text at once.

Pure planning. The paths form trees: a token that several of them begin with is computed once, and belongs to the
sequences of all of them. A path that only begins another needs no sequence of its own. What does not fit into one tree
goes into the next, where it begins again at the text that they all continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mobilevlm_ros.errors import QuestionTooLongError

__all__ = ['Tree', 'plan_trees']


@dataclass
class Tree:
    """Continuations to compute together; the lists have one entry for each token, parents before children.

    :ivar depths: how many tokens of the same path come before.
    :ivar sequences: numbers of the sequences that the token is in, from 0.
    :ivar ends: the paths (by index) whose last token it is.
    :ivar n_sequences: how many sequences there are.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)
    n_sequences: int = 0


def plan_trees(paths: Sequence[Sequence[int]], *, max_sequences: int, max_tokens: int) -> list[Tree]:
    """The fewest tokens that cover all ``paths``, in trees that keep to both limits.

    :raise ValueError: if a path is empty.
    :raise QuestionTooLongError: if a path alone has more than ``max_tokens`` tokens.
    """
    trees: list[Tree] = []
    tree = Tree()
    line: list[int] = []  # the tokens of the tree, by index, that the path before consists of
    before: tuple[int, ...] = ()
    # In lexical order, what a path shares with any earlier one it shares with the one before it.
    for path, index in sorted((tuple(path), index) for index, path in enumerate(paths)):
        if not path:
            raise ValueError('a path needs at least one token')
        if len(path) > max_tokens:
            raise QuestionTooLongError(
                f'a continuation of {len(path)} tokens does not fit the context, which has room for {max_tokens}: '
                'ask a shorter question'
            )
        shared = _n_common(before, path)
        goes_on = bool(tree.tokens) and shared == len(before)
        is_full = tree.n_sequences + (not goes_on) > max_sequences or len(tree.tokens) + len(path) - shared > max_tokens
        if tree.tokens and is_full:
            trees.append(tree)
            tree, line, shared, goes_on = Tree(), [], 0, False
        if not goes_on:
            for at in line[:shared]:
                tree.sequences[at].append(tree.n_sequences)
            tree.n_sequences += 1
        del line[shared:]
        for depth in range(shared, len(path)):
            line.append(len(tree.tokens))
            tree.tokens.append(path[depth])
            tree.depths.append(depth)
            tree.sequences.append([tree.n_sequences - 1])
            tree.ends.append([])
        tree.ends[line[-1]].append(index)
        before = path
    return [*trees, tree] if tree.tokens else trees


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    n = 0
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    return n
