"""A real browser without a window: what becomes of a page in it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

_NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
_QUIET = (
    *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--hide-scrollbars'),
    *('--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-extensions'),
)
_VOID = {'meta', 'link', 'img', 'input', 'br', 'hr', 'base'}


@dataclass
class Element:
    """One element of a page."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text in it, in one piece."""
        return ''.join(self.words)

    def all(self, tag: str = '', **attributes: str) -> list[Element]:
        """Elements below it, in the order of the page."""
        found = []
        for child in self.children:
            fits = not tag or child.tag == tag
            if fits and all(child.attributes.get(name.rstrip('_')) == value for name, value in attributes.items()):
                found.append(child)
            found += child.all(tag, **attributes)
        return found


def parse(page: str) -> Element:
    """The elements of a page."""
    parser = _Parser()
    parser.feed(page)
    return parser.root


def opened(page: Path, fragment: str, profile: Path, width: int = 1000) -> Element:
    """The page after its script has run, opened with what follows the ``#``; skips the test without a browser."""
    browser = next((found for found in map(shutil.which, _NAMES) if found), None)
    if browser is None:
        pytest.skip(f'no browser is installed: looked for {", ".join(_NAMES)}')
    arguments = [f'--user-data-dir={profile}', f'--window-size={width},900', '--virtual-time-budget=4000', '--dump-dom']
    url = page.resolve().as_uri() + (f'#{fragment}' if fragment else '')
    done = subprocess.run([browser, *_QUIET, *arguments, url], capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return parse(done.stdout.decode())


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element('', {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or '' for name, value in attrs}, self._open[-1])
        self._open[-1].children.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in {element.tag for element in self._open[1:]}:
            while self._open.pop().tag != tag:
                pass

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.words.append(data)
