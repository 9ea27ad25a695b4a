"""Planning of trees: every path can be followed through the tokens, nothing is computed twice, limits hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.errors import QuestionTooLongError
from mobilevlm_ros.runtime.language.branches import Tree, plan_trees

Path = tuple[int, ...]
PATHS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple), max_size=12)


def followed(tree: Tree) -> dict[int, Path]:
    """For each path (by index) the tokens before its end that share a sequence with it."""
    found = {}
    for end, indices in enumerate(tree.ends):
        sequence = tree.sequences[end][0]
        line = [at for at in range(end + 1) if sequence in tree.sequences[at]]
        assert [tree.depths[at] for at in line] == list(range(len(line)))
        found.update(dict.fromkeys(indices, tuple(tree.tokens[at] for at in line)))
    return found


def prefixes(paths: list[Path]) -> set[Path]:
    return {path[:n] for path in paths for n in range(1, len(path) + 1)}


@given(PATHS, st.integers(1, 5), st.integers(6, 12))
def test_every_path_ends_once_and_limits_hold(paths: list[Path], max_sequences: int, max_tokens: int) -> None:
    trees = plan_trees(paths, max_sequences=max_sequences, max_tokens=max_tokens)

    assert sorted(index for tree in trees for ends in tree.ends for index in ends) == list(range(len(paths)))
    for tree in trees:
        assert all(paths[index] == path for index, path in followed(tree).items())
        assert 1 <= tree.n_sequences <= max_sequences
        assert {number for numbers in tree.sequences for number in numbers} == set(range(tree.n_sequences))
        assert len(tree.tokens) <= max_tokens


@given(PATHS)
def test_with_room_for_all_no_token_is_computed_twice(paths: list[Path]) -> None:
    trees = plan_trees(paths, max_sequences=99, max_tokens=999)

    assert len(trees) == bool(paths)
    assert sum(len(tree.tokens) for tree in trees) == len(prefixes(paths))


@given(PATHS)
def test_a_path_that_only_begins_another_needs_no_sequence(paths: list[Path]) -> None:
    whole = [path for path in set(paths) if not any(path == other[: len(path)] != other for other in paths)]

    assert sum(tree.n_sequences for tree in plan_trees(paths, max_sequences=99, max_tokens=999)) == len(whole)


@given(PATHS)
def test_every_sequence_begins_with_whoever_shares_it(paths: list[Path]) -> None:
    """llama.cpp refuses a token that joins sequences which were apart before."""
    for tree in plan_trees(paths, max_sequences=99, max_tokens=999):
        last: dict[int, set[int]] = {}
        for numbers in tree.sequences:
            for number in numbers:
                assert set(numbers) <= last.get(number, set(range(tree.n_sequences)))
                last[number] = set(numbers)


def test_a_path_longer_than_the_room_is_too_long() -> None:
    with pytest.raises(QuestionTooLongError, match=r'4 tokens does not fit .* room for 3'):
        plan_trees([(1,), (1, 2, 3, 4)], max_sequences=4, max_tokens=3)


def test_an_empty_path_is_a_mistake() -> None:
    with pytest.raises(ValueError, match='at least one token'):
        plan_trees([(1,), ()], max_sequences=4, max_tokens=10)
