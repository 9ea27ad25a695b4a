"""``sheet.html``: all frames on a page, each with its line of the labels, to look at while writing answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = ['Card', 'sheet']

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1em; background: #fafafa; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 12px }
figure { margin: 0; background: #fff; border: 1px solid #ddd }
img { width: 100%; display: block }
figcaption { padding: 6px 8px }
b { float: right }
p { margin: 2px 0 }
i { color: #06c }
"""


@dataclass(frozen=True)
class Card:
    """One frame of the page.

    :ivar line: in ``labels.jsonl``.
    :ivar image: as the labels name it.
    :ivar questions: its entries.
    """

    line: int
    image: str
    time_s: float
    questions: Sequence[dict[str, Any]]


def sheet(title: str, cards: Sequence[Card]) -> str:
    """The page; its pictures are beside it, and nothing is loaded from anywhere else."""
    body = '\n'.join(_figure(card) for card in cards)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<main>\n{body}\n</main></body></html>\n'
    )


def _figure(card: Card) -> str:
    asked = ''.join(f'<p>{escape(one["question"])} <i>{escape(str(one["answer"]))}</i></p>' for one in card.questions)
    source = escape(card.image)
    return (
        f'<figure id="line-{card.line}"><a href="{source}"><img src="{source}" loading="lazy" alt="{source}"></a>'
        f'<figcaption><b>line {card.line}</b>{source}, {card.time_s:.1f} s{asked}</figcaption></figure>'
    )
