"""Small benchmarks in the published files' own formats, made by hand."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mobilevlm_ros.evaluate.benchmarks.items import Given

SHORT = '\nAnswer the question using a single word or phrase.'
LETTER = "\nAnswer with the option's letter from the given choices directly."


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def write_image(path: Path, colour: str = 'red') -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (40, 24), colour).save(path)


def png(colour: str = 'red') -> str:
    file = io.BytesIO()
    Image.new('RGB', (24, 16), colour).save(file, 'PNG')
    return base64.b64encode(file.getvalue()).decode()


def given(*texts: str, prompt: str = '', first: int = 0) -> list[Given]:
    """Answers to the questions 0, 1 and so on."""
    return [Given(number, prompt, text) for number, text in enumerate(texts, start=first)]


GQA_QUESTIONS = {
    '001': ('Is it red?', 'yes', 'verify', 'attr'),
    '002': ('What is it?', 'café', 'query', 'cat'),
    '003': ('Who is there?', 'man', 'query', 'rel'),
    '004': ('Left or right?', 'left', 'choose', 'rel'),
}


def write_gqa(folder: Path) -> Path:
    for name in ('n1.jpg', 'n2.jpg'):
        write_image(folder / 'images' / name)
    write_lines(
        folder / 'llava_gqa_testdev_balanced.jsonl',
        [
            {'question_id': key, 'image': 'n1.jpg' if key < '003' else 'n2.jpg', 'text': text + SHORT, 'category': 'd'}
            for key, (text, *_) in GQA_QUESTIONS.items()
        ],
    )
    truth = {
        key: {'question': text, 'answer': answer, 'isBalanced': True, 'types': {'structural': kind, 'semantic': about}}
        for key, (text, answer, kind, about) in GQA_QUESTIONS.items()
    }
    truth['005'] = truth['001'] | {'isBalanced': False}
    (folder / 'testdev_balanced_questions.json').write_text(json.dumps(truth))
    return folder


def write_scienceqa(folder: Path) -> Path:
    problems = {
        '4': {'choices': ['mm', 'cm'], 'answer': 1},
        '5': {'choices': ['x', 'y', 'z'], 'answer': 0},
        '6': {'choices': ['p', 'q'], 'answer': 0},
        '9': {'choices': ['not', 'tested'], 'answer': 0},
    }
    (folder / 'pid_splits.json').write_text(json.dumps({'test': ['4', '5', '6'], 'train': ['9']}))
    (folder / 'problems.json').write_text(json.dumps(problems))
    write_image(folder / 'images' / 'test' / '4' / 'image.png')
    write_image(folder / 'images' / 'test' / '5' / 'image.png', 'blue')
    asked: list[dict[str, Any]] = [
        {'id': '4', 'image': '4/image.png', 'value': 'How long?\nA. mm\nB. cm\n<image>'},
        {'id': '6', 'value': 'Without an image\nA. p\nB. q'},
        {'id': '5', 'image': '5/image.png', 'value': 'Which?\nA. x\nB. y\nC. z\n<image>'},
    ]
    for record in asked:
        record['conversations'] = [{'from': 'human', 'value': record.pop('value')}, {'from': 'gpt', 'value': '?'}]
    (folder / 'llava_test_CQM-A.json').write_text(json.dumps(asked))
    return folder


PEOPLE = {
    'What is the brand?': ['Nokia'] * 3 + ['nokia.'] + ['samsung'] * 2 + ['LG', 'lg', 'sony', 'no idea'],
    'How many?': ['2'] * 10,
    'Says what?': ['stop'] * 9 + ['go'],
}


def write_textvqa(folder: Path) -> Path:
    write_image(folder / 'train_images' / 'i1.jpg')
    write_image(folder / 'train_images' / 'i2.jpg', 'green')
    about = {'What is the brand?': 'i1', 'How many?': 'i1', 'Says what?': 'i2'}
    write_lines(
        folder / 'llava_textvqa_val_v051_ocr.jsonl',
        [
            {'question_id': i, 'image': f'{i}.jpg', 'text': f'{q}\nReference OCR token: A, B{SHORT}', 'category': 'd'}
            for q, i in about.items()
        ],
    )
    data = [
        {'question_id': 34602 + number, 'image_id': i, 'question': q.upper(), 'answers': PEOPLE[q]}
        for number, (q, i) in enumerate(about.items())
    ]
    (folder / 'TextVQA_0.5.1_val.json').write_text(json.dumps({'dataset_type': 'val', 'data': data}))
    return folder


POPE_LABELS = {'random': ['yes', 'no', 'yes', 'no'], 'popular': ['no', 'yes'], 'adversarial': ['no', 'yes']}


def write_pope(folder: Path) -> Path:
    write_image(folder / 'val2014' / 'a.jpg')
    write_image(folder / 'val2014' / 'b.jpg', 'blue')
    questions: list[dict[str, Any]] = []
    for category, labels in POPE_LABELS.items():
        asked = [
            {'question_id': n + 1, 'image': 'a.jpg' if n < 2 else 'b.jpg', 'text': f'Is there a {category} {n}?'}
            for n in range(len(labels))
        ]
        write_lines(
            folder / 'coco' / f'coco_pope_{category}.json',
            [one | {'label': label} for one, label in zip(asked, labels, strict=True)],
        )
        for one in asked:
            questions.append(one | {'question_id': len(questions), 'text': one['text'] + SHORT, 'category': category})
    write_lines(folder / 'llava_pope_test.jsonl', questions)
    return folder


def write_mme(folder: Path, categories: Sequence[str]) -> Path:
    """Two images a category, whose right answers are Yes, No; every second category in folders of its own."""
    questions = []
    for number, category in enumerate(categories):
        inner = number % 2
        for name in ('0001', '0002'):
            place = folder / 'images' / category
            image = f'{category}/images/{name}.png' if inner else f'{category}/{name}.png'
            write_image(folder / 'images' / image)
            truth = place / ('questions_answers_YN' if inner else '') / f'{name}.txt'
            truth.parent.mkdir(exist_ok=True)
            truth.write_text(
                f'Is it {category}? Please answer yes or no.\tYes\nIs it not?  Please answer yes or no.\tNo\n\n'
            )
            for text in (f'Is it {category}?', 'Is it not?'):
                record = {'question_id': f'{category}/{name}.png', 'image': image, 'text': text + SHORT}
                questions.append(record | {'category': category})
    write_lines(folder / 'llava_mme.jsonl', questions)
    return folder


def write_mmbench(folder: Path, rows: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Two questions of two and three options, in all rotations, unless rows are given."""
    if rows is None:
        rows = [
            {'index': 7, 'question': 'Which\tone?', 'A': 'cat', 'B': 'dog', 'answer': 'A'},
            {'index': 1000007, 'question': 'Which\tone?', 'A': 'dog', 'B': 'cat', 'answer': 'B'},
            {'index': 8, 'question': 'Say "hi"', 'hint': 'Look.\nWell.', 'A': 'é', 'B': '2', 'C': '3', 'answer': 'C'},
            {'index': 1000008, 'question': 'Say "hi"', 'A': '2', 'B': '3', 'C': 'é', 'answer': 'B'},
            {'index': 2000008, 'question': 'Say "hi"', 'A': '3', 'B': 'é', 'C': '2', 'answer': 'A'},
        ]
    names = ['index', 'question', 'hint', 'A', 'B', 'C', 'D', 'answer', 'category', 'image', 'source', 'l2-category']
    names += ['comment', 'split']
    lines = ['\t'.join(names)]
    for row in rows:
        filled = {'category': f'c{str(row["index"])[-1]}', 'l2-category': 'l', 'image': png(), 'split': 'dev'} | row
        lines.append('\t'.join(_cell(str(filled.get(name, ''))) for name in names))
    (folder / 'mmbench_dev_en_20231003.tsv').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return folder


def _cell(text: str) -> str:
    """As pandas writes it."""
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in '\t\n"') else text
