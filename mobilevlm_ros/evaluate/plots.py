"""The figures of the report, as SVG that stands in the page itself and takes its colours from the page's style.

Plain text is all that is written: no library, no fonts, no scripts. What a figure shows stands in a table beside it,
too; its title and description are read out by screen readers. Units of drawing are pixels of a narrow phone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from mobilevlm_ros.evaluate.calibration import Bin, Threshold
from mobilevlm_ros.evaluate.latency import Spread
from mobilevlm_ros.evaluate.scores import Abstention, KindScore

__all__ = ['accuracy_figure', 'coverage_figure', 'in_seconds', 'latency_figure', 'reliability_figure']

_WIDTH = 400.0
_LEFT, _RIGHT = 44.0, 12.0
_MOST_LETTERS = 36


class _Figure:
    """Elements of one drawing, top down."""

    def __init__(self, title: str, description: str) -> None:
        self._title, self._description = title, description
        self._parts: list[Markup] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self._add('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>', x1, y1, x2, y2, style)

    def bar(self, x: float, y: float, width: float, height: float, style: str) -> None:
        self._add(
            '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2" class="{}"/>',
            *(x, y, max(0.0, width), height, style),
        )

    def dot(self, x: float, y: float, radius: float, style: str, hint: str = '') -> None:
        self._add(
            '<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" class="{}"><title>{}</title></circle>',
            *(x, y, radius, style, hint),
        )

    def diamond(self, x: float, y: float, style: str, hint: str) -> None:
        self._add('<path d="M{:.1f} {:.1f}l5 6l-5 6l-5 -6z" class="{}"><title>{}</title></path>', x, y - 6, style, hint)

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        self._add('<polyline points="{}" class="{}"/>', ' '.join(f'{x:.1f},{y:.1f}' for x, y in points), style)

    def text(self, x: float, y: float, text: str, style: str = '') -> None:
        self._add('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>', x, y, style, text)

    def finish(self, height: float) -> Markup:
        """The whole drawing."""
        head = Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" class="figure">').format(_WIDTH, height)
        described = Markup('<title>{}</title><desc>{}</desc>').format(self._title, self._description)
        return head + described + Markup('').join(self._parts) + Markup('</svg>')

    def _add(self, pattern: str, *values: object) -> None:
        self._parts.append(Markup(pattern).format(*values))


def accuracy_figure(kinds: Mapping[str, KindScore]) -> Markup:
    """Bars of accuracy by kind with their intervals; a diamond is the blind answer, a line the majority's."""
    names = ', '.join(f'{kind} {score.seen.value:.0%}' for kind, score in kinds.items())
    figure = _Figure('Accuracy by kind of question', f'Accuracy: {names}. The table has intervals and baselines.')
    left, right = 6.0, _WIDTH - 44

    def across(share: float) -> float:
        return left + share * (right - left)

    y = 8.0
    for kind, score in kinds.items():
        seen = score.seen
        figure.text(left, y + 11, f'{_short(kind)} ({seen.n})')
        figure.bar(left, y + 17, right - left, 16, 'track')
        figure.bar(left, y + 17, (right - left) * seen.value, 16, 'seen')
        figure.line(across(seen.low), y + 25, across(seen.high), y + 25, 'interval')
        for end in (seen.low, seen.high):
            figure.line(across(end), y + 21, across(end), y + 29, 'interval')
        if score.majority is not None:
            x = across(score.majority.value)
            figure.line(x, y + 13, x, y + 37, 'majority')
        if score.blind is not None:
            figure.diamond(across(score.blind.value), y + 25, 'blind', f'without seeing {score.blind.value:.0%}')
        figure.text(right + 6, y + 30, f'{seen.value:.0%}')
        y += 46
    for share in (0.0, 0.5, 1.0):
        figure.text(across(share), y + 8, f'{share:.0%}', 'small middle' if share else 'small')
    return figure.finish(y + 14)


def coverage_figure(abstention: Abstention, threshold: Threshold | None) -> Markup:
    """Accuracy of the answers that are given, against how many are given if unsure ones are held back."""
    figure = _Figure(
        'Accuracy against coverage',
        f'If only the surest answers are given: {_ends(abstention)}. Mean over all coverages '
        f'{abstention.mean_accuracy:.0%}.',
    )
    square = _Square(figure, 'share of questions answered', 'accuracy of these')
    overall = abstention.accuracies[-1]
    figure.line(*square.at(0, overall), *square.at(1, overall), 'dashed')
    points = list(zip(abstention.coverages, abstention.accuracies, strict=True))
    # A limit that lets in one more answer jumps to the next point: a line between them is what mixing two limits gives.
    figure.path([square.at(*point) for point in points], 'curve')
    if len(points) < 40:
        for (coverage, accuracy), limit in zip(points, abstention.limits, strict=True):
            hint = f'from {limit:.2f} on: {coverage:.0%} answered, {accuracy:.0%} right'
            figure.dot(*square.at(coverage, accuracy), 2.5, 'seen', hint)
    if threshold is not None and threshold.value is not None:
        hint = f'limit {threshold.value:.2f}, on the half it was not chosen on'
        figure.diamond(*square.at(threshold.coverage, 1 - threshold.risk), 'blind', hint)
    return figure.finish(square.height)


def reliability_figure(bins: Sequence[Bin]) -> Markup:
    """Accuracy of answers of about the same confidence; on the diagonal a model knows how sure it may be."""
    named = '; '.join(f'confidence {one.confidence:.2f}: {one.accuracy:.0%} of {one.n} right' for one in bins)
    figure = _Figure('Confidence and accuracy', named)
    square = _Square(figure, 'confidence', 'accuracy')
    figure.line(*square.at(0, 0), *square.at(1, 1), 'dashed')
    figure.path([square.at(one.confidence, one.accuracy) for one in bins], 'curve')
    most = max(one.n for one in bins)
    for one in bins:
        x, y = square.at(one.confidence, one.accuracy)
        hint = f'{one.low:.1f} to {one.high:.1f}: {one.n} answers, {one.accuracy:.0%} right'
        figure.dot(x, y, 3 + 5 * (one.n / most) ** 0.5, 'seen', hint)
    return figure.finish(square.height)


def latency_figure(title: str, stages: Mapping[str, Spread]) -> Markup:
    """Bars of the median by stage; a thin line goes on to the 95th percentile."""
    named = ', '.join(f'{stage} {in_seconds(spread.percentiles[50])}' for stage, spread in stages.items())
    figure = _Figure(title, f'Medians: {named}.')
    longest = max((spread.percentiles[95] for spread in stages.values()), default=0.0) or 1.0
    left, right = 84.0, _WIDTH - 122
    y = 4.0
    for stage, spread in stages.items():
        median, late = spread.percentiles[50], spread.percentiles[95]
        figure.text(left - 6, y + 13, stage, 'end')
        figure.bar(left, y + 2, (right - left) * median / longest, 14, 'seen')
        figure.line(left, y + 9, left + (right - left) * late / longest, y + 9, 'interval')
        figure.text(right + 8, y + 13, f'{in_seconds(median)}, p95 {in_seconds(late)}', 'small')
        y += 22
    return figure.finish(y + 2)


class _Square:
    """Axes from 0 to 1 both ways, and places on them."""

    def __init__(self, figure: _Figure, across: str, up: str) -> None:
        self._bottom, self._top = 232.0, 22.0
        self.height = self._bottom + 36
        for tenths in (0, 5, 10):
            share = tenths / 10
            figure.line(*self.at(0, share), *self.at(1, share), 'grid')
            figure.text(_LEFT - 6, self.at(0, share)[1] + 4, f'{share:.0%}', 'small end')
            figure.text(self.at(share, 0)[0], self._bottom + 15, f'{share:.0%}', 'small middle')
        figure.text((_LEFT + _WIDTH - _RIGHT) / 2, self._bottom + 31, across, 'small middle')
        figure.text(_LEFT, self._top - 9, up, 'small')

    def at(self, across: float, up: float) -> tuple[float, float]:
        """Where a pair of shares is."""
        x = _LEFT + across * (_WIDTH - _LEFT - _RIGHT - 8)
        return x, self._bottom - up * (self._bottom - self._top)


def _ends(abstention: Abstention) -> str:
    first, last = abstention.coverages[0], abstention.coverages[-1]
    return (
        f'{abstention.accuracies[0]:.0%} right of the surest {first:.0%}, {abstention.accuracies[-1]:.0%} of {last:.0%}'
    )


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + '…'


def in_seconds(value: float) -> str:
    """A duration for people: ``1.25 s``, ``80 ms``."""
    if value >= 1:
        return f'{value:.2f}\u00a0s'
    return f'{1e3 * value:.0f}\u00a0ms' if value >= 0.01 else f'{1e3 * value:.1f}\u00a0ms'
