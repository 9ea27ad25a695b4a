"""The command ``mobilevlm``: reads arguments, calls the room that does the work, prints.

Exit codes: 0 it worked; 1 the question was not answered, or the doctor found something; 2 wrong arguments or set-up.
Rooms are imported when their command runs, so that each command needs only its own libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mobilevlm_ros
from mobilevlm_ros.errors import MobileVLMError
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.types import Answer, AnswerFormat, Question

__all__ = ['main']


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except MobileVLMError as error:
        print(f'mobilevlm: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('mobilevlm: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='mobilevlm', description=mobilevlm_ros.__doc__)
    parser.add_argument('--version', action='version', version=f'mobilevlm_ros {mobilevlm_ros.__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        return sub

    ask = command('ask', _ask, 'Ask a question about an image file.')
    ask.add_argument('image', type=Path, metavar='IMAGE', help='JPEG, PNG or WebP')
    ask.add_argument('question', metavar='QUESTION')
    formats = [member.name.lower() for member in AnswerFormat]
    ask.add_argument('--format', choices=formats, default='text', help='default: text')
    ask.add_argument('--choices', metavar='A,B,C', default='', help='for --format choice, separated by commas')
    ask.add_argument('--schema', metavar='FILE', type=Path, help='for --format json: a file with a JSON Schema')
    ask.add_argument('--max-tokens', metavar='N', type=_positive, help='longest answer')
    ask.add_argument('--min-confidence', metavar='P', type=float, default=0.5, help='default: 0.5')
    ask.add_argument('--threads', metavar='N', type=_positive, default=0, help='default: as the bundle says')
    ask.add_argument('--bundle', metavar='DIR', type=Path, help='default: the embedded default, nano')
    ask.add_argument('--json', action='store_true', help='print the whole answer as one JSON object')

    build = command('build', _build, 'Build a bundle: everything that answers with one model on one kind of device.')
    build.add_argument('model', choices=['nano'], help='nano: the embedded default, from two packages, without torch')
    build.add_argument('--profile', default='cpu', help='kind of device, a file of engines/; default: cpu')
    build.add_argument('--out', metavar='DIR', type=Path, help='default: in the cache folder')
    build.add_argument('--packages', metavar='DIR', type=Path, help='folder with the wheels, instead of downloading')

    doctor = command('doctor', _doctor, 'Look at this machine and the ROS graph, and say what to do next.')
    doctor.add_argument('--bundle', metavar='DIR', type=Path, help='default: the embedded default, nano')
    doctor.add_argument('--seconds', type=float, default=2.0, help='how long to look at the graph; default: 2')
    doctor.add_argument('--json', action='store_true', help='print the findings as one JSON object')

    demo = command('demo', _demo, 'Start the node, play camera footage into it, and ask.')
    demo.add_argument('--bundle', metavar='DIR', type=Path, help='default: the embedded default, built if it is not')
    demo.add_argument('--out', metavar='DIR', type=Path, default=Path('demo_output'), help='default: demo_output')
    demo.add_argument('--packages', metavar='DIR', type=Path, help='folder with the wheels, instead of downloading')
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, found {value}')
    return value


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


def _build(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mobilevlm_ros.build.nano import build_nano

    console = Console(stderr=True)
    out = options.out or bundle_dir(options.model, options.profile)
    with console.status('starting') as status:

        def on_step(text: str) -> None:
            status.update(text)
            console.print(f'· {text}', highlight=False)

        bundle = build_nano(out, profile=options.profile, packages=options.packages, on_step=on_step)
    console.print(f'{bundle.model_id}, {bundle.size_bytes >> 20} MiB', highlight=False)
    print(bundle.path)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from mobilevlm_ros.doctor import examine, print_report

    report = examine(options.bundle or bundle_dir('nano', 'cpu'), graph_s=options.seconds)
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print_report(report)
    return 0 if report.healthy else 1


def _demo(options: argparse.Namespace) -> int:
    from mobilevlm_ros.errors import DependencyError

    for module in ('rclpy', 'mobilevlm_msgs'):
        if importlib.util.find_spec(module) is None:
            raise DependencyError(
                f'the demo needs ROS 2, but {module} is not installed: run `make demo`, or source your workspace first'
            )
    from mobilevlm_ros.node.demo.run import run_demo

    return run_demo(options.bundle, options.out, options.packages)


if __name__ == '__main__':
    sys.exit(main())
