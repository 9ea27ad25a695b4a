"""``mobilevlm ask``: one question about one image file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from mobilevlm_ros.cli.arguments import Commands, positive
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.types import Answer, AnswerFormat, Question

__all__ = ['add_ask']


def add_ask(commands: Commands) -> None:
    """Add the command."""
    ask = commands.add('ask', _ask, 'Ask a question about an image file.')
    ask.add_argument('image', type=Path, metavar='IMAGE', help='JPEG, PNG or WebP')
    ask.add_argument('question', metavar='QUESTION')
    formats = [member.name.lower() for member in AnswerFormat]
    ask.add_argument('--format', choices=formats, default='text', help='default: text')
    ask.add_argument('--choices', metavar='A,B,C', default='', help='for --format choice, separated by commas')
    ask.add_argument('--schema', metavar='FILE', type=Path, help='for --format json: a file with a JSON Schema')
    ask.add_argument('--max-tokens', metavar='N', type=positive, help='longest answer')
    ask.add_argument('--min-confidence', metavar='P', type=float, help='default: as the bundle says')
    ask.add_argument('--threads', metavar='N', type=positive, default=0, help='default: as the bundle says')
    ask.add_argument('--bundle', metavar='DIR', type=Path, help='default: the embedded default, nano')
    ask.add_argument('--json', action='store_true', help='print the whole answer as one JSON object')


def _ask(options: argparse.Namespace) -> int:
    from mobilevlm_ros.runtime.assistant import AssistantSettings, Progress
    from mobilevlm_ros.runtime.bundle import open_bundle
    from mobilevlm_ros.runtime.images import read_image
    from mobilevlm_ros.runtime.loading import load_assistant
    from mobilevlm_ros.types import Frame

    question = Question(
        options.question,
        format=AnswerFormat[options.format.upper()],
        choices=tuple(choice for choice in options.choices.split(',') if choice.strip()),
        json_schema=_read_schema(options.schema) if options.schema else '',
        max_tokens=options.max_tokens,
    )
    frame = Frame(read_image(options.image), camera=str(options.image))
    bundle = open_bundle(options.bundle or bundle_dir('nano', 'cpu'))
    if bundle.warning:
        print(f'note: {bundle.warning.strip()}', file=sys.stderr)
    settings = AssistantSettings(min_confidence=options.min_confidence)
    assistant = load_assistant(bundle, settings, n_threads=options.threads)
    streams = not options.json and question.format in (AnswerFormat.TEXT, AnswerFormat.JSON)
    printed = 0

    def on_progress(progress: Progress) -> None:
        nonlocal printed
        if streams:
            print(progress.text[printed:], end='', flush=True)
            printed = max(printed, len(progress.text))

    try:
        answer = assistant.ask(question, frame, on_progress=on_progress)
    finally:
        assistant.close()
    if options.json:
        print(json.dumps(_as_json(answer), ensure_ascii=False))
    else:
        _print_answer(answer, answer.text[printed:])
    return 0 if answer.success else 1


def _read_schema(path: Path) -> str:
    from mobilevlm_ros.errors import SettingsError

    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f'the schema {path} cannot be read: {error}') from error


def _as_json(answer: Answer) -> dict[str, object]:
    record = dataclasses.asdict(answer)
    record['result_code'] = answer.result_code.name
    record['question'] = {**record['question'], 'format': answer.question.format.name}
    return record


def _print_answer(answer: Answer, rest: str) -> None:
    print(rest)
    if not answer.success:
        print(f'{answer.result_code.name}: {answer.message}', file=sys.stderr)
    for option, probability in zip(answer.options, answer.probabilities, strict=False):
        print(f'  {probability:6.1%}  {option}')
    timing = answer.timing
    stages = {'preprocess': timing.preprocess_s, 'vision': timing.vision_s, 'prefill': timing.prefill_s}
    stages |= {'decode': timing.decode_s, 'total': timing.total_s}
    shown = ', '.join(f'{name} {seconds:.2f} s' for name, seconds in stages.items())
    print(f'confidence {answer.confidence:.2f}; {shown}; {answer.model_id}', file=sys.stderr)
