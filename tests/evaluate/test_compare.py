"""Two folders of results compared: what flipped, what is refused, what cannot be compared; exit codes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_folders import answer, run_of, write_folder

from mobilevlm_ros.errors import EvaluationError, SettingsError
from mobilevlm_ros.evaluate.compare import Limits, compare_runs
from mobilevlm_ros.evaluate.compare_command import add_compare_arguments, run_compare


def folder(path: Path, right: Sequence[bool | None], **changes: Any) -> Path:
    """A run with one question a frame, answered rightly or not."""
    rows = [answer('a', frame, correct=hit, answer=f'{hit}', **changes) for frame, hit in enumerate(right)]
    rows += [answer('a', frame, blind=True) for frame in range(len(right))]
    return write_folder(path, rows)


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_compare_arguments(parser)
    return run_compare(parser.parse_args([str(argument) for argument in arguments]))


def test_flips_are_named_both_ways(tmp_path: Path) -> None:
    first = folder(tmp_path / 'a', [True, True, False, False])
    second = folder(tmp_path / 'b', [True, False, True, False], timing={'total_s': 0.28})
    found = compare_runs(first, second, Limits())
    assert [(flip.frame_index, flip.gained, flip.first, flip.second) for flip in found.flips] == [
        (1, False, 'True', 'False'),
        (2, True, 'False', 'True'),
    ]
    assert found.accuracies == (0.5, 0.5) and found.accepted
    assert found.median_s == (0.56, 0.28)
    assert (found.overall.n, found.overall.p) == (4, 1.0)


def test_a_significantly_worse_run_is_refused_and_the_other_way_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = folder(tmp_path / 'a', [True] * 20), folder(tmp_path / 'b', [False] * 6 + [True] * 14)
    assert run(good, bad) == 1
    assert 'refused: significantly worse: accuracy falls by 30.0%, p = 0.031 < 0.05' in capsys.readouterr().out
    assert run(bad, good) == 0
    assert run(good, bad, '--alpha', 0.01) == 0


def test_a_run_is_as_good_as_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = folder(tmp_path / 'a', [True, False, True])
    assert run(same, same, '--json') == 0
    record = json.loads(capsys.readouterr().out)
    assert record['accepted'] and record['flips'] == [] and record['overall']['p'] == 1.0


def test_many_flips_in_one_second_of_a_recording_are_no_proof(tmp_path: Path) -> None:
    first = folder(tmp_path / 'a', [True] * 20, received_ns=5)
    second = folder(tmp_path / 'b', [False] * 20, received_ns=5)
    found = compare_runs(first, second, Limits())
    assert found.overall.p_answers < 1e-4 and found.overall.p == 1.0 and found.accepted
    assert not compare_runs(first, second, Limits(), block_s=0.0).accepted


def test_a_large_drop_can_be_refused_without_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = folder(tmp_path / 'a', [True] * 4), folder(tmp_path / 'b', [True, True, False, False])
    assert run(first, second) == 0
    assert run(first, second, '--max-drop', 0.25) == 1
    assert 'accuracy falls by 50.0%, more than 25.0%' in capsys.readouterr().out
    assert run(first, second, '--max-drop', 0.5) == 0


def test_one_kind_that_is_worse_is_refused_if_asked_for(tmp_path: Path) -> None:
    def rows(doors: bool) -> list[dict[str, Any]]:
        return [answer('a', frame, correct=doors) for frame in range(8)] + [
            answer('b', frame, kind='count', correct=not doors) for frame in range(8, 16)
        ]

    first, second = write_folder(tmp_path / 'a', rows(True)), write_folder(tmp_path / 'b', rows(False))
    assert compare_runs(first, second, Limits()).accepted
    found = compare_runs(first, second, Limits(each_kind=True))
    assert len(found.reasons) == 1 and 'worse in door' in found.reasons[0]
    assert found.kind_p['door'] == pytest.approx(2 * 2 / 2**8)


def test_different_questions_are_named(tmp_path: Path) -> None:
    first = folder(tmp_path / 'a', [True] * 3)
    second = folder(tmp_path / 'b', [True] * 3, question='Is there a cat?')
    with pytest.raises(EvaluationError, match=r'3 questions are not the same .* a "Is there a door\?" \(/camera, fr'):
        compare_runs(first, second, Limits())


@pytest.mark.parametrize('changes', [{'truth': 'no'}, {'received_ns': 7}, {'choices': ['x']}, {'format': 'TEXT'}])
def test_whatever_makes_it_another_question_is_found(tmp_path: Path, changes: dict[str, Any]) -> None:
    first, second = folder(tmp_path / 'a', [True]), folder(tmp_path / 'b', [True], **changes)
    with pytest.raises(EvaluationError, match='1 questions are not the same'):
        compare_runs(first, second, Limits(), common=True)


def test_questions_of_one_run_only_are_named_or_left_out(tmp_path: Path) -> None:
    first, second = folder(tmp_path / 'a', [True] * 9), folder(tmp_path / 'b', [True, False])
    with pytest.raises(EvaluationError, match=r'7 questions were asked in the first run only: .*; and 2 more'):
        compare_runs(first, second, Limits())
    with pytest.raises(EvaluationError, match='in the second run only'):
        compare_runs(second, first, Limits())
    found = compare_runs(first, second, Limits(), common=True)
    assert (found.overall.n, found.n_left_out, len(found.flips)) == (2, 7, 1)


def test_an_unfinished_run_is_compared_only_if_asked_for(tmp_path: Path) -> None:
    first = folder(tmp_path / 'a', [True] * 3)
    second = write_folder(tmp_path / 'b', [answer('a', 0)], run_of(finished=False))
    with pytest.raises(EvaluationError, match='not finished'):
        compare_runs(first, second, Limits())
    assert compare_runs(first, second, Limits(), common=True).overall.n == 1


def test_runs_without_truths_cannot_be_compared(tmp_path: Path) -> None:
    nothing = folder(tmp_path / 'a', [None, None])
    with pytest.raises(EvaluationError, match='none of 2 compared questions has a truth'):
        compare_runs(nothing, nothing, Limits())


def test_no_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match='holds no evaluation'):
        compare_runs(tmp_path, tmp_path, Limits())


@pytest.mark.parametrize('values', [{'alpha': 0.0}, {'alpha': 1.0}, {'max_drop': -0.1}, {'max_drop': float('nan')}])
def test_limits_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        Limits(**values)  # type: ignore[arg-type]


def test_only_some_flips_are_printed_lost_ones_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = folder(tmp_path / 'a', [False] * 3 + [True]), folder(tmp_path / 'b', [True] * 3 + [False])
    assert run(first, second, '--show', 2) == 0
    out = capsys.readouterr().out
    assert out.index('lost   Is there a door?') < out.index('gained Is there a door?')
    assert 'and 2 flipped answers more' in out
