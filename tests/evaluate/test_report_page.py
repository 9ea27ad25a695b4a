"""The report: what it says, what it leaves out, what it lets through; and opened in a real browser."""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Element, opened, parse
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from run_folders import answer, question, read_json, run_of, write_folder

from mobilevlm_ros.errors import EvaluationError, SettingsError
from mobilevlm_ros.evaluate.answers_csv import COLUMNS
from mobilevlm_ros.evaluate.report import Bounds, write_report
from mobilevlm_ros.evaluate.report_command import add_report_arguments, run_report

EVIL = '<script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'
"""Changes the title of a page that takes it for more than text."""


def rows() -> list[dict[str, Any]]:
    """Two kinds of questions over six frames; the outcome and the confidence follow from the frame."""
    found = []
    for frame in range(6):
        right = frame % 2 == 0
        sure = 0.5 + frame / 20
        found.append(answer('door', frame, correct=right, answer='yes' if right else 'no', confidence=sure))
        found.append(answer('door', frame, blind=True, correct=False, answer='no'))
    found.append(
        answer(
            'count', 0, kind='count', question='How many cats?', correct=False, answer='9', truth='3', confidence=0.4
        )
    )
    found.append(answer('count', 1, kind='count', question='How many cats?', correct=False, result_code='TIMEOUT'))
    found.append(answer('what', 2, kind='free', question='What is there?', correct=None, confidence=None, truth=''))
    return found


def page_of(folder: Path, **options: Any) -> tuple[str, Element]:
    text = write_report(folder, **options).html.read_text(encoding='utf-8')
    return text, parse(text)


def cards(page: Element) -> list[Element]:
    return page.all('ol', id='cards')[0].all('li')


def shown(page: Element) -> list[tuple[str, str]]:
    """Outcome and question of the cards in view."""
    return [
        (card.attributes['data-outcome'], card.all('h3')[0].text)
        for card in cards(page)
        if 'hidden' not in card.attributes
    ]


# -- what it says ---------------------------------------------------------------------------------------------------


def test_failures_come_first_the_surest_on_top(tmp_path: Path) -> None:
    _, page = page_of(write_folder(tmp_path, rows()))
    order = [(card.attributes['data-outcome'], card.attributes['data-confidence']) for card in cards(page)]
    assert order == [
        *(('wrong', '0.75'), ('wrong', '0.65'), ('wrong', '0.55'), ('wrong', '0.4'), ('failed', '0.9')),
        *(('unscored', '-1'), ('right', '0.5'), ('right', '0.6'), ('right', '0.7')),
    ]


def test_a_card_has_question_answer_truth_confidence_and_the_blind_answer(tmp_path: Path) -> None:
    _, page = page_of(write_folder(tmp_path, rows()))
    card = cards(page)[0]
    texts = {term.text: value.text.strip() for term, value in zip(card.all('dt'), card.all('dd'), strict=True)}
    assert texts == {'answer': 'no', 'truth': 'yes', 'confidence': '0.75', 'unseen': 'no'}
    assert card.all('h3')[0].text == 'Is there a door?'
    assert card.all('div', role='img')[0].attributes['aria-label'] == 'Frame 5 of /camera, 0:05.0 into the recording'


def test_a_question_without_an_answer_says_why(tmp_path: Path) -> None:
    failed = answer(answer='', correct=False, result_code='STALE', message='the frame is 3 s old')
    _, page = page_of(write_folder(tmp_path, [failed]))
    assert cards(page)[0].all('dd')[0].text == 'the frame is 3 s old'


def test_json_and_csv_have_the_same_figures(tmp_path: Path) -> None:
    report = write_report(write_folder(tmp_path, rows(), run_of([question('door'), question('count', 'count', (3,))])))
    summary = read_json(report.json)
    overall = summary['scores']['overall']
    assert (overall['seen']['n_right'], overall['seen']['n'], overall['blind']['n_right']) == (3, 8, 0)
    assert summary['scores']['kinds']['door']['majority']['accuracy'] == 1.0
    assert summary['bundle']['model_id'] == 'tiny' and summary['scores']['without_truth'] == 1
    with report.csv.open(encoding='utf-8', newline='') as stream:
        lines = list(csv.DictReader(stream))
    assert tuple(lines[0]) == COLUMNS and len(lines) == len(rows())
    seen = [line for line in lines if line['pass'] == 'seen']
    assert sum(line['outcome'] == 'right' for line in seen) == overall['seen']['n_right']


def test_an_unfinished_run_is_reported_and_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, rows(), run_of(finished=False, n_expected=99))
    path = folder / 'results.jsonl'
    path.write_bytes(path.read_bytes()[:-9])
    _, page = page_of(folder)
    assert 'not finished' in page.all('ul', class_='warnings')[0].text
    assert len(cards(page)) == 8


def test_half_a_play_is_not_said_to_go_on(tmp_path: Path) -> None:
    settings = {'stamp': 'header', 'realtime': True, 'blind': False}
    text, _ = page_of(write_folder(tmp_path, rows(), run_of(finished=False, settings=settings)))
    assert 'in real time cannot go on in the middle' in text and 'The same command goes on' not in text


def test_nothing_answered_is_a_page_too(tmp_path: Path) -> None:
    _, page = page_of(write_folder(tmp_path, []))
    assert cards(page) == [] and 'no question has a truth' in page.text


def test_real_time_counts_are_shown(tmp_path: Path) -> None:
    first = ('n_frames_played', 'n_frames_used', 'n_frames_dropped', 'n_reused', 'n_stale')
    names = (*first, 'n_asked', 'n_deadline', 'n_met', 'n_busy')
    realtime = {name: 100 + number for number, name in enumerate(names)}
    _, page = page_of(write_folder(tmp_path, rows(), run_of(realtime=realtime)))
    assert '100: 101 asked about, 102 dropped' in page.text and '107 of 106 met' in page.text


def test_the_same_results_give_the_same_page(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, rows())
    assert page_of(folder)[0] == page_of(folder)[0]


def test_the_command_prints_scores_and_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_report_arguments(parser)
    folder = write_folder(tmp_path, rows())
    assert run_report(parser.parse_args([str(folder), '--frames', '1', '--answers', '2'])) == 0
    out = capsys.readouterr().out
    assert re.search(r'all +3 of 8 +0.38', out) and str(folder / 'report.html') in out
    assert len(cards(parse((folder / 'report.html').read_text()))) == 2


# -- what it lets through -------------------------------------------------------------------------------------------


def test_whatever_people_and_models_write_is_text(tmp_path: Path) -> None:
    row = answer(question=EVIL, answer=EVIL, truth=EVIL, kind=EVIL, camera=EVIL, image='', options=[EVIL] * 3)
    row |= {'probabilities': [0.5, 0.3, 0.2]}
    failed = answer('f', 1, result_code='TIMEOUT', message=EVIL, correct=False)
    run = run_of(
        [question(kind=EVIL, accepted=(EVIL,))], broken_frames=[{'camera': EVIL, 'frame_index': 0, 'message': EVIL}]
    )
    run['bundle'] |= {'model_id': EVIL, 'warning': EVIL}
    run['bag']['notes'] = [EVIL]
    run['bag']['path'] = run['questions_file']['path'] = EVIL
    _, page = page_of(write_folder(tmp_path, [row, answer(EVIL, 3), failed], run))
    assert len(page.all('script')) == 1 and page.all('img') == []
    assert [element.tag for element in page.all() if any(name.startswith('on') for name in element.attributes)] == []
    assert page.text.count(EVIL) >= 13


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(exclude_categories=('Cs', 'Cc')), min_size=1, max_size=40))
def test_any_text_is_shown_as_it_is(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_folder(tmp_path_factory.mktemp('run'), [answer(question=text, answer=text, kind=text, image='')])
    _, page = page_of(folder)
    card = cards(page)[0]
    assert card.all('h3')[0].text == card.all('dd')[0].text == card.attributes['data-kind'] == text


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    text, page = page_of(write_folder(tmp_path, rows()))
    assert re.findall(r'(?:https?:)?//[a-z]', re.sub(r'base64,[A-Za-z0-9+/=]+', '', text)) == []
    assert set(re.findall(r'url\((.{11})', text)) == {'data:image/'}
    policy = page.all('meta', **{'http-equiv': 'Content-Security-Policy'})[0].attributes['content']
    assert policy.startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize('text', ['=1+1', '+1', '-1', '@SUM(A1)', '\t=1', ' =1', '＝1', "=cmd|' /C calc'!A0"])
def test_a_spreadsheet_runs_no_formula(tmp_path: Path, text: str) -> None:
    report = write_report(write_folder(tmp_path, [answer(question=text, answer=text, kind=text, truth=text)]))
    with report.csv.open(encoding='utf-8', newline='') as stream:
        (line,) = csv.DictReader(stream)
    assert {line[name] for name in ('question', 'answer', 'kind', 'truth')} == {"'" + text}
    assert float(line['total_s']) == 0.56


# -- what it leaves out ---------------------------------------------------------------------------------------------


def test_no_more_frames_than_asked_for_the_others_are_named(tmp_path: Path) -> None:
    text, page = page_of(write_folder(tmp_path, rows()), bounds=Bounds(frames=2))
    assert text.count('data:image/jpeg') == 2
    assert len(page.all('div', class_='frame absent')) == len(cards(page)) - len(page.all('div', role='img'))
    assert 'frames/3.jpg' not in page.all('ol', id='cards')[0].text  # the second failure's is embedded
    assert 'frames/1.jpg' in page.all('ol', id='cards')[0].text


def test_a_frame_that_was_asked_about_twice_is_embedded_once(tmp_path: Path) -> None:
    text, page = page_of(write_folder(tmp_path, [answer('a'), answer('b'), answer('c')]))
    assert text.count('data:image/jpeg') == 1 and len(page.all('div', role='img')) == 3


def test_no_more_answers_than_asked_for_failures_first(tmp_path: Path) -> None:
    _, page = page_of(write_folder(tmp_path, rows()), bounds=Bounds(answers=3))
    assert [outcome for outcome, _ in shown(page)] == ['wrong'] * 3
    assert 'Of 9 answers the first 3' in page.text


@pytest.mark.parametrize('bounds', [{'frames': -1}, {'answers': -1}])
def test_bounds_below_nothing_are_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match='0 or more'):
        Bounds(**bounds)


@pytest.mark.parametrize('damage', ['missing', 'cut', 'no image'])
def test_a_frame_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    folder = write_folder(tmp_path, [answer('a', 0), answer('a', 1)])
    path = folder / 'frames' / '0.jpg'
    content = {'cut': path.read_bytes()[:400], 'no image': b'GIF89a or so', 'missing': b''}[damage]
    path.unlink() if damage == 'missing' else path.write_bytes(content)
    text, page = page_of(folder)
    assert text.count('data:image/jpeg') == 1
    assert 'frames/0.jpg' in cards(page)[0].text


def test_no_file_outside_the_folder_is_read(tmp_path: Path) -> None:
    Image.new('RGB', (8, 8)).save(tmp_path / 'secret.jpg')
    rows_ = [answer('a', 0, image='../secret.jpg'), answer('a', 1, image=str(tmp_path / 'secret.jpg'))]
    text, _ = page_of(write_folder(tmp_path / 'run', rows_))
    assert 'data:image' not in text


@pytest.mark.parametrize('name', ['report.html', 'summary.json', 'answers.csv'])
def test_a_file_that_cannot_be_written_is_named_and_leaves_no_half(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, rows())
    (folder / name).mkdir()
    with pytest.raises(EvaluationError, match=f'{name} cannot be written'):
        write_report(folder)
    assert list(folder.glob('.*')) == []


# -- how it is built ------------------------------------------------------------------------------------------------


def test_everything_has_a_name_for_those_who_cannot_see(tmp_path: Path) -> None:
    _, page = page_of(write_folder(tmp_path, rows()))
    assert page.all('html')[0].attributes['lang'] == 'en'
    fields = [field for tag in ('select', 'input') for field in page.all(tag)]
    assert len(fields) == 5 and all(field.parent is not None and field.parent.tag == 'label' for field in fields)
    for drawing in page.all('svg'):
        assert drawing.attributes['role'] == 'img' and drawing.all('title')[0].text and drawing.all('desc')[0].text
    ids = [element.attributes['id'] for element in page.all() if 'id' in element.attributes]
    assert len(ids) == len(set(ids))
    named = {element.attributes['aria-labelledby'] for element in page.all() if 'aria-labelledby' in element.attributes}
    assert named <= set(ids)
    jumps = {link.attributes['href'][1:] for link in page.all('a') if '=' not in link.attributes['href']}
    assert jumps <= set(ids)


def test_every_figure_stays_inside_its_frame(tmp_path: Path) -> None:
    _, page = page_of(write_folder(tmp_path, rows()))
    assert len(page.all('svg')) == 4
    for drawing in page.all('svg'):
        _, _, width, height = map(float, drawing.attributes['viewbox'].split())
        for element in drawing.all():
            across = [element.attributes.get(name) for name in ('x', 'x1', 'x2', 'cx')]
            down = [element.attributes.get(name) for name in ('y', 'y1', 'y2', 'cy')]
            assert all(0 <= float(value) <= width for value in across if value is not None)
            assert all(0 <= float(value) <= height for value in down if value is not None)


# -- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    evil = answer('evil', 3, kind='evil & co', question=EVIL, answer=EVIL, correct=False, confidence=0.99)
    yield write_report(write_folder(tmp_path_factory.mktemp('run'), [*rows(), evil])).html


@pytest.mark.slow
@pytest.mark.parametrize(
    ('fragment', 'expected'),
    [
        ('outcome=wrong&kind=door', [('wrong', 'Is there a door?')] * 3),
        ('q=cats+9', [('wrong', 'How many cats?')]),
        ('kind=evil+%26+co', [('wrong', EVIL)]),
        ('outcome=failed', [('failed', 'How many cats?')]),
        (
            'q=cats&sort=sure',
            [('failed', 'How many cats?'), ('wrong', 'How many cats?')],
        ),
        ('outcome=right&sort=no+such+order&kind=', [('right', 'Is there a door?')] * 3),
    ],
)
def test_the_browser_shows_what_the_address_asks_for(
    page: Path, tmp_path: Path, fragment: str, expected: list[tuple[str, str]]
) -> None:
    seen = opened(page, fragment, tmp_path)
    assert shown(seen) == expected
    assert seen.all('output')[0].text == f'{len(expected)} of 10 answers'
    assert 'hidden' not in seen.all('form')[0].attributes


@pytest.mark.slow
def test_in_the_browser_all_is_shown_in_order_and_no_text_is_run(page: Path, tmp_path: Path) -> None:
    seen = opened(page, 'sort=time', tmp_path, width=400)
    times = [float(card.attributes['data-time']) for card in cards(seen)]
    assert times == sorted(times) and len(shown(seen)) == 10
    assert seen.all('title')[0].text == 'tiny: evaluation'


@pytest.mark.slow
@pytest.mark.parametrize('width', [500, 1300])
def test_in_the_browser_nothing_is_squeezed_or_sticks_out(page: Path, tmp_path: Path, width: int) -> None:
    """A narrow window scrolls its tables; once it broke their first column into letters."""
    measure = """
      const rows = [...document.querySelectorAll('tbody tr')].map(row => row.offsetHeight);
      document.body.dataset.tallest = Math.max(...rows);
      document.body.dataset.outside = document.documentElement.scrollWidth - innerWidth;
    """
    text = page.read_text()
    policy = text[text.index('<meta http-equiv="Content-Security-Policy"') : text.index('<title>')]
    measured = tmp_path / 'measured.html'
    measured.write_text(text.replace(policy, '').replace('</body>', f'<script>{measure}</script></body>'))
    (body,) = opened(measured, '', tmp_path / 'profile', width=width).all('body')
    assert 20 <= int(body.attributes['data-tallest']) <= 70, 'two lines of text at most'
    assert int(body.attributes['data-outside']) <= 0
