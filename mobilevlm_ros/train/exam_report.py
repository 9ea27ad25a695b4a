"""An exam on paper: the table as Markdown for a model's card, everything as JSON, and the plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.train.calibration_plot import plot_calibration
from mobilevlm_ros.train.exam import ExamReport
from mobilevlm_ros.train.exam_limits import Belief, manifest_lines, temperature_text, threshold_text

__all__ = ['as_markdown', 'as_record', 'belief_text', 'plot_scores', 'write_report']

_COLUMNS = {
    'blind': '"Blind" is the same bundle shown a grey picture.',
    'majority': '"Majority" always gives the answer that is right most often for a question of this kind.',
    'untrained': '"Untrained" is a bundle whose projector has random weights; tower, language model and adapter are '
    'those of the bundle, unless another bundle was given.',
}


def as_record(report: ExamReport, found: Mapping[str, Belief]) -> dict[str, Any]:
    """For JSON."""
    return report.as_record() | {
        'calibration': {name: belief.as_record() for name, belief in found.items()},
        'proposed': manifest_lines(found, report.temperature),
    }


def belief_text(belief: Belief) -> str:
    """What was found about temperature and limit."""
    limit = threshold_text(belief.threshold)
    temperature = belief.temperature
    if temperature is None:
        return limit
    return f'{temperature_text(temperature)}; {"then " if temperature.is_kept else ""}{limit}'


def as_markdown(report: ExamReport, found: Mapping[str, Belief]) -> str:
    """The table, what its columns mean, and what the confidence is worth."""
    columns = report.columns()
    others = [name for name in columns if name != 'accuracy']
    lines = [
        f'`{report.model_id}`, {len(report.given)} questions on {len({one.picture for one in report.given})} pictures:',
        '',
        '| ' + ' | '.join(['kind', 'questions', 'accuracy (95 %)', *others]) + ' |',
        '| --- | --- | --- ' + '| --- ' * len(others) + '|',
    ]
    for kind, score in columns['accuracy'].items():
        low, high = score.interval
        cells = [kind, str(score.n), f'{score.accuracy:.2f} ({low:.2f} to {high:.2f})']
        lines.append('| ' + ' | '.join(cells + [f'{columns[name][kind].accuracy:.2f}' for name in others]) + ' |')
    lines += ['', *(_COLUMNS[name] for name in others)]
    details = '; '.join(f'{name}: {score.n_right} of {score.n}' for name, score in report.details().items())
    lines += ['', f'Of the yes/no questions, right where the {details}.'] if details else []
    for name, belief in found.items():
        measured = belief.measured
        lines += [
            '',
            f'Confidence of {name}: mean {measured.mean_confidence:.2f} at accuracy {measured.accuracy:.2f}, '
            f'ECE {measured.ece:.3f}, Brier {measured.brier:.3f} ({measured.n} answers); {belief_text(belief)}.',
        ]
    proposed = manifest_lines(found, report.temperature)
    lines += ['', '```yaml', proposed.rstrip(), '```'] if proposed else []
    return '\n'.join(lines) + '\n'


def write_report(folder: Path, report: ExamReport, found: Mapping[str, Belief]) -> None:
    """Write ``exam.json``, ``exam.md``, ``exam.png``, and ``calibration-FORMAT.png`` for each closed format.

    :raise SettingsError: if the folder cannot be written.
    """
    try:
        record = json.dumps(as_record(report, found), indent=1, ensure_ascii=False)
        (folder / 'exam.json').write_text(record + '\n', encoding='utf-8')
        (folder / 'exam.md').write_text(as_markdown(report, found), encoding='utf-8')
        plot_scores(report, folder / 'exam.png')
        for name, belief in found.items():
            answers = [one for one in report.given if one.format == name]
            plot_calibration(
                belief.measured,
                belief.threshold,
                [one.confidence for one in answers],
                [one.right for one in answers],
                folder / f'calibration-{name}.png',
                f'{report.model_id}, {name}',
            )
    except OSError as error:
        raise SettingsError(f'{folder} cannot be written: {error}') from error


def plot_scores(report: ExamReport, path: Path) -> None:
    """Draw all columns by kind into a PNG file; the lines are 95 % intervals."""
    from matplotlib.figure import Figure

    columns = report.columns()
    kinds = list(columns['accuracy'])
    figure = Figure(figsize=(9, 4.2), layout='constrained')
    axes = figure.subplots()
    width = 0.8 / len(columns)
    for number, (name, column) in enumerate(columns.items()):
        found = [column[kind] for kind in kinds]
        values = [score.accuracy for score in found]
        below = [score.accuracy - score.interval[0] for score in found]
        above = [score.interval[1] - score.accuracy for score in found]
        places = [place + (number - (len(columns) - 1) / 2) * width for place in range(len(kinds))]
        axes.bar(places, values, width, yerr=[below, above], label=name, error_kw={'linewidth': 0.8})
    axes.set_xticks(range(len(kinds)), [f'{kind}\n{columns["accuracy"][kind].n}' for kind in kinds])
    axes.set(ylabel='accuracy', ylim=(0, 1), title=report.model_id)
    axes.legend()
    figure.savefig(path, dpi=110)
