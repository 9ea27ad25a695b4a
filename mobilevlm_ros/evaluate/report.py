"""The report of a run: one HTML file that needs nothing else, and the same as JSON and CSV beside it.

Reads the results of a run, finished or not, and writes ``report.html``, ``summary.json`` and ``answers.csv`` into the
same folder. Each file appears whole or not at all. Every text of the recording, the questions and the model is escaped
where it enters the page, and the page forbids itself the network and every script but its own.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from jinja2 import Environment, PackageLoader, StrictUndefined

import mobilevlm_ros
from mobilevlm_ros.errors import DiskSpaceError, EvaluationError, SettingsError
from mobilevlm_ros.evaluate import plots
from mobilevlm_ros.evaluate.answers_csv import write_answers
from mobilevlm_ros.evaluate.gallery import Thumbnails, choose_cards, with_blind
from mobilevlm_ros.evaluate.results import read_run
from mobilevlm_ros.evaluate.scored import BLOCK_S, answers_in
from mobilevlm_ros.evaluate.scores import Scores, score

__all__ = ['Bounds', 'Report', 'write_report']

_STAGE_NAMES = {
    'queue_s': 'queue',
    'image_s': 'image',
    'preprocess_s': 'preprocess',
    'vision_s': 'vision',
    'prefill_s': 'prompt',
    'decode_s': 'decode',
    'first_text_s': 'first text',
    'total_s': 'total',
}
_MOST_NAMED = 20
"""So many broken frames are named in the page."""


@dataclass(frozen=True)
class Bounds:
    """How large a page may become, however long the run was.

    :ivar frames: so many frames are embedded, at about 12 kB each; the answers about others name their file.
    :ivar answers: so many answers are shown, failures first; all are in the CSV file.
    :raise SettingsError: if one is negative.
    """

    frames: int = 200
    answers: int = 2000

    def __post_init__(self) -> None:
        if min(self.frames, self.answers) < 0:
            raise SettingsError(f'a report shows 0 or more frames and answers, found {self.frames} and {self.answers}')


@dataclass(frozen=True)
class Report:
    """What was written."""

    html: Path
    json: Path
    csv: Path
    scores: Scores


def write_report(
    folder: Path, *, block_s: float = BLOCK_S, max_risk: float = 0.1, bounds: Bounds | None = None
) -> Report:
    """Score the results in a folder, and write the report beside them.

    :param block_s: seconds of the recording that count as one group (see ``scored.py``).
    :param max_risk: share of wrong answers to allow, from which a limit of confidence follows.
    :raise DiskSpaceError: if there is no room.
    :raise EvaluationError: if the results cannot be read, or a file cannot be written.
    :raise SettingsError: if a setting is out of its range.
    """
    bounds = bounds or Bounds()
    run = read_run(folder)
    scores = score(answers_in(folder), run['questions'], block_s=block_s, max_risk=max_risk)
    report = Report(folder / 'report.html', folder / 'summary.json', folder / 'answers.csv', scores)
    summary = {name: value for name, value in run.items() if name != 'questions'} | {'scores': scores.as_record()}
    with _whole(report.json) as stream:
        json.dump(summary, stream, indent=1, ensure_ascii=False, allow_nan=False)
        stream.write('\n')
    with _whole(report.csv) as stream:
        write_answers(answers_in(folder), stream)
    with _whole(report.html) as stream:
        for part in _page(folder, run, scores, bounds):
            stream.write(part)
    return report


def _page(folder: Path, run: Mapping[str, Any], scores: Scores, bounds: Bounds) -> Iterator[str]:
    """The page, piece by piece: with its frames it is larger than what is held of it."""
    cards = choose_cards(answers_in(folder), bounds.answers, run['bag']['start_ns'])
    if scores.overall.blind is not None:
        cards = with_blind(cards, answers_in(folder))
    environment = Environment(
        loader=PackageLoader('mobilevlm_ros.evaluate'),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {'seconds': plots.in_seconds, 'clock': _clock, 'percent': _percent}
    style, script = (_resource(name) for name in ('report.css', 'report.js'))
    return environment.get_template('report.html').generate(
        run=run,
        scores=scores,
        cards=cards,
        kinds=sorted({card.kind for card in cards}),
        cameras=sorted({card.camera for card in cards}),
        thumbnails=Thumbnails(folder, cards, bounds.frames),
        broken=list(islice(run['broken_frames'], _MOST_NAMED)),
        figures=_figures(scores),
        stage_names=_STAGE_NAMES,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii'),
        version=mobilevlm_ros.__version__,
    )


def _figures(scores: Scores) -> list[tuple[str, str]]:
    """Captions and drawings."""
    figures: list[tuple[str, str]] = []
    if scores.kinds:
        caption = 'Accuracy by kind of question, with its 95 % interval'
        figures.append((caption, plots.accuracy_figure({**scores.kinds, 'all': scores.overall})))
    if scores.abstention is not None and scores.calibration is not None:
        caption = 'Accuracy, if unsure answers are held back'
        figures.append((caption, plots.coverage_figure(scores.abstention, scores.calibration.threshold)))
        caption = 'Is it right as often as it is sure?'
        figures.append((caption, plots.reliability_figure(scores.calibration.bins)))
    for known, stages in scores.latency.stages.items():
        caption = f'Time of an answer about a {known} frame: median, and 95th percentile'
        named = {_STAGE_NAMES[stage]: spread for stage, spread in stages.items() if spread.longest > 0}
        figures.append((caption, plots.latency_figure(caption, named)))
    return figures


def _resource(name: str) -> str:
    return (files('mobilevlm_ros.evaluate') / 'templates' / name).read_text(encoding='utf-8')


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of the old one when all of it is written.

    :raise DiskSpaceError: if there is no room.
    :raise EvaluationError: if it cannot be written.
    """
    partial = path.with_name(f'.{path.name}.partial')
    try:
        with partial.open('w', encoding='utf-8', errors='backslashreplace', newline='') as stream:
            yield stream
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskSpaceError(f'there is no room for {path} ({error.strerror}): the answers are kept') from error
        raise EvaluationError(f'{path} cannot be written: {error.strerror or error}') from error
    finally:
        partial.unlink(missing_ok=True)


def _clock(value: float) -> str:
    minutes, seconds = divmod(max(0.0, value), 60)
    return f'{int(minutes)}:{seconds:04.1f}'


def _percent(value: float, sign: bool = False) -> str:
    return f'{100 * value:+.1f}\u00a0%' if sign else f'{100 * value:.1f}\u00a0%'
