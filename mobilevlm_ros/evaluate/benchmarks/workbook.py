"""Writes a workbook (.xlsx) of one sheet: as much of the format as a table of texts and numbers needs.

Source: ECMA-376, Office Open XML; texts are inline, so that rows are written as they come.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ['MAX_CELL_CHARACTERS', 'write_workbook']

MAX_CELL_CHARACTERS = 32767
"""More no spreadsheet opens."""
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_MAIN = 'http://schemas.openxmlformats.org/spreadsheetml/2006/main'
_RELATIONS = 'http://schemas.openxmlformats.org/officeDocument/2006/relationships'
_PACKAGE = 'http://schemas.openxmlformats.org/package/2006'
_SPREADSHEET = 'application/vnd.openxmlformats-officedocument.spreadsheetml'
_NOT_IN_XML = re.compile('[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]')

_PARTS = {
    '[Content_Types].xml': (
        f'<Types xmlns="{_PACKAGE}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{_SPREADSHEET}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_SPREADSHEET}.worksheet+xml"/></Types>'
    ),
    '_rels/.rels': (
        f'<Relationships xmlns="{_PACKAGE}/relationships">'
        f'<Relationship Id="rId1" Type="{_RELATIONS}/officeDocument" Target="xl/workbook.xml"/></Relationships>'
    ),
    'xl/workbook.xml': (
        f'<workbook xmlns="{_MAIN}" xmlns:r="{_RELATIONS}">'
        '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>'
    ),
    'xl/_rels/workbook.xml.rels': (
        f'<Relationships xmlns="{_PACKAGE}/relationships">'
        f'<Relationship Id="rId1" Type="{_RELATIONS}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>'
    ),
}


def write_workbook(path: Path, rows: Iterable[Sequence[int | str]]) -> None:
    """Write the rows; characters that XML does not have are left out, and too long texts cut."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, text in _PARTS.items():
            archive.writestr(name, _HEAD + text)
        with archive.open('xl/worksheets/sheet1.xml', 'w') as sheet:
            sheet.write(f'{_HEAD}<worksheet xmlns="{_MAIN}"><sheetData>'.encode())
            for number, row in enumerate(rows, start=1):
                cells = ''.join(_cell(f'{_column(index)}{number}', value) for index, value in enumerate(row))
                sheet.write(f'<row r="{number}">{cells}</row>'.encode())
            sheet.write(b'</sheetData></worksheet>')


def _cell(place: str, value: int | str) -> str:
    if isinstance(value, int):
        return f'<c r="{place}"><v>{value}</v></c>'
    text = escape(_NOT_IN_XML.sub('', value)[:MAX_CELL_CHARACTERS])
    return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>' if text else ''


def _column(index: int) -> str:
    """``A`` to ``Z``, then ``AA`` and so on."""
    name = ''
    while index >= 0:
        name = chr(ord('A') + index % 26) + name
        index = index // 26 - 1
    return name
