"""The limit of confidence that an exam proposes: its rule by hand, and what is written about it."""

from __future__ import annotations

import pytest
import yaml

from mobilevlm_ros.evaluate.calibration import falls_in_first_half
from mobilevlm_ros.evaluate.temperature import tempered
from mobilevlm_ros.train.exam import ExamReport, Given, Score
from mobilevlm_ros.train.exam_limits import LEAST, beliefs_of, manifest_lines, threshold_text
from mobilevlm_ros.train.exam_report import as_markdown

FIRST = [name for name in (f'{n}.jpg' for n in range(400)) if falls_in_first_half(name)]
OTHER = [name for name in (f'{n}.jpg' for n in range(400)) if not falls_in_first_half(name)]


def answers(pictures: list[str], confidence: float, n: int, n_wrong: int = 0, form: str = 'yes_no') -> list[Given]:
    """So many answers of one confidence, each about a picture of its own."""
    return [
        Given(f'{form}{confidence}{picture}', picture, form, 'yes', index >= n_wrong, confidence, format=form)
        for index, picture in enumerate(pictures[:n])
    ]


SURE = [*answers(FIRST, 0.9, 30, 1), *answers(OTHER, 0.9, 30, 2)]
UNSURE = [*answers(FIRST[30:], 0.6, 20, 9), *answers(OTHER[30:], 0.6, 20, 8)]


def test_the_lowest_confidence_that_keeps_the_risk_is_proposed() -> None:
    found = beliefs_of([*SURE, *UNSURE], 0.1)
    threshold = found['yes_no'].threshold

    assert threshold.value == 0.9 and threshold.n_answered == 30
    assert (threshold.coverage, threshold.risk) == (30 / 50, pytest.approx(2 / 30))
    assert yaml.safe_load(manifest_lines(found)) == {'answers': {'min_confidence': {'yes_no': 0.9}}}
    assert '"unknown" below 0.900' in threshold_text(threshold)
    assert '60% are answered, and of these 30 93% (79% to 98%) are right' in threshold_text(threshold)


def test_a_few_right_answers_are_no_reason() -> None:
    few = [*answers(FIRST, 0.9, LEAST - 1), *answers(FIRST[30:], 0.6, 20, 9), *answers(OTHER, 0.9, 30)]
    found = beliefs_of(few, 0.1)

    assert found['yes_no'].threshold.value is None
    assert manifest_lines(found) == ''
    assert f'of at least {LEAST}' in threshold_text(found['yes_no'].threshold)


def test_what_the_other_half_speaks_against_is_not_proposed() -> None:
    found = beliefs_of([*answers(FIRST, 0.9, 30), *answers(OTHER, 0.9, 30, 15)], 0.1)

    assert found['yes_no'].threshold.value == 0.9
    assert manifest_lines(found) == ''
    assert threshold_text(found['yes_no'].threshold).endswith('so the limit is not proposed')


def test_each_closed_format_has_its_own() -> None:
    choices = [*answers(FIRST, 0.4, 30, form='choice'), *answers(OTHER, 0.4, 30, form='choice')]
    texts = answers(FIRST, 0.3, 30, 30, form='text')
    found = beliefs_of([*SURE, *choices, *texts], 0.1)

    assert set(found) == {'yes_no', 'choice'}
    assert yaml.safe_load(manifest_lines(found))['answers']['min_confidence'] == {'yes_no': 0.9, 'choice': 0.4}


TOO_SURE = [
    *answers(FIRST, 0.99, 60, 12),
    *answers(OTHER, 0.99, 60, 12),
    *answers(FIRST[60:], 0.999, 60, 3),
    *answers(OTHER[60:], 0.999, 60, 3),
]


def test_a_model_that_is_too_sure_gets_a_temperature_and_a_limit_at_it() -> None:
    found = beliefs_of(TOO_SURE, 0.1)
    proposed = yaml.safe_load(manifest_lines(found))['answers']

    temperature = proposed['temperature']['yes_no']
    assert 2 < temperature < 4
    # Only what was said with 0.999 is right often enough.
    believed = tempered([0.99, 0.999], temperature)
    assert believed[0] < proposed['min_confidence']['yes_no'] <= believed[1]
    assert found['yes_no'].measured.mean_confidence > 0.99  # the figures beside it are of what was answered


def test_a_temperature_that_the_bundle_has_is_multiplied() -> None:
    found = beliefs_of(TOO_SURE, 0.1)
    once = yaml.safe_load(manifest_lines(found))['answers']['temperature']['yes_no']

    twice = yaml.safe_load(manifest_lines(found, {'yes_no': 2.0}))['answers']['temperature']['yes_no']
    assert twice == pytest.approx(2 * once, abs=0.02)
    kept = yaml.safe_load(manifest_lines(beliefs_of([*SURE, *UNSURE], 0.1), {'yes_no': 2.0}))['answers']
    assert kept['temperature'] == {'yes_no': 2.0}


def test_the_card_says_what_the_temperature_is_worth() -> None:
    report = ExamReport('nano-cpu@0', TOO_SURE, {'yes_no': ('yes', Score(5, 100)), 'all': ('', Score(5, 100))})
    text = as_markdown(report, beliefs_of(TOO_SURE, 0.1))

    assert 'found on one half of the pictures, the other half (120 answers) has ECE' in text
    assert 'temperature: {yes_no: ' in text


def test_the_card_has_every_column_and_says_what_it_means() -> None:
    given = [*SURE, *UNSURE]
    report = ExamReport('nano-cpu@0', given, {'yes_no': ('yes', Score(5, 100)), 'all': ('', Score(5, 100))})
    report.blind = given
    text = as_markdown(report, beliefs_of(given, 0.1))

    assert '| kind | questions | accuracy (95 %) | blind | majority |' in text
    assert '| yes_no | 100 | 0.80 (0.71 to 0.87) | 0.80 | 0.05 |' in text
    assert text.count('grey picture') == 1 and 'random weights' not in text
    assert 'min_confidence: {yes_no: 0.9}' in text
    rows = [line for line in text.splitlines() if line.startswith('|')]
    assert len({line.count('|') for line in rows}) == 1
