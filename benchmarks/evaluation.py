"""What evaluating a recording costs beside the answers themselves: questions a second, and memory.

    .venv/bin/python benchmarks/evaluation.py                        # tiny model: what the evaluation adds; memory
    .venv/bin/python benchmarks/evaluation.py --part speed --nano --questions 60 --rounds 3

The same questions about the same frames go through ``mobilevlm evaluate bag``'s own code and straight to the runtime,
in one process, with one assistant, in turn; who begins changes from round to round. The bare runtime gets frames that
are decoded already and writes nothing. Memory is that of a process of its own. Results are printed and written, as one
JSON line with the machine, to benchmarks/results/.

The tiny model's answers mean nothing and take next to no time, so that its figures show the evaluation alone. It and
the frames come from the tests.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from node_figures import machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tests'))

import bag_writing as writing  # noqa: E402
import tiny_models  # noqa: E402

from mobilevlm_ros.bags import open_bag  # noqa: E402
from mobilevlm_ros.build.nano import build_nano  # noqa: E402
from mobilevlm_ros.evaluate.answerer import BundleAnswerer  # noqa: E402
from mobilevlm_ros.evaluate.plan import Plan  # noqa: E402
from mobilevlm_ros.evaluate.questions import BagQuestion  # noqa: E402
from mobilevlm_ros.evaluate.record import RunRecord  # noqa: E402
from mobilevlm_ros.evaluate.report import write_report  # noqa: E402
from mobilevlm_ros.evaluate.runner import run_offline  # noqa: E402
from mobilevlm_ros.paths import bundle_dir  # noqa: E402
from mobilevlm_ros.runtime.assistant import AssistantSettings  # noqa: E402
from mobilevlm_ros.types import Frame  # noqa: E402

RESULTS = ROOT / 'benchmarks' / 'results'
RECORDING = ROOT / 'tests' / 'data' / 'bag_mcap'
WIDTH, HEIGHT = 640, 480
EARLY = 200
"""Answers after which memory is read first: by then everything has been used once."""
QUESTIONS = [
    BagQuestion.model_validate({'id': id_, 'when': 'each_frame', 'text': text, **more})
    for id_, text, more in (
        ('person', 'Is there a person in the picture?', {'format': 'yes_no', 'truth': 'yes'}),
        ('car', 'Is there a car in the picture?', {'format': 'yes_no', 'truth': 'no'}),
        ('place', 'What place is this?', {'format': 'choice', 'choices': ['street', 'room'], 'truth': 'street'}),
        ('seen', 'What can be seen?', {'short': True, 'max_tokens': 8, 'truth': 'a car'}),
    )
]


def write_bag(path: Path, n_frames: int) -> Path:
    """A recording of different frames: the committed ones, shifted by some pixels more each time; JPEG, 10 a second."""
    with open_bag(RECORDING) as bag:
        scenes = [cv2.resize(frame.decode(), (WIDTH, HEIGHT)) for frame in bag.frames()]
    shifted = (np.roll(scenes[n % len(scenes)], 7 * (n // len(scenes)), axis=1) for n in range(n_frames))
    messages = []
    for number, rgb_hwc in enumerate(shifted):
        stamp_ns = writing.START_NS + number * 100_000_000
        messages.append(writing.Message('/camera', stamp_ns, writing.compressed_image(rgb_hwc, stamp_ns, 'jpeg')))
    return writing.write_bag(path, messages)


def evaluate(bag_path: Path, answerer: BundleAnswerer, out: Path, *, blind: bool, on_progress: Any) -> None:
    """What ``mobilevlm evaluate bag`` does between loading the model and writing the report."""
    with open_bag(bag_path) as bag:
        plan = Plan(bag, QUESTIONS)
        record = RunRecord(
            out,
            bag,
            plan,
            answerer={'model_id': answerer.model_id, 'path': '', 'hash': '', 'warning': ''},
            questions_file={'path': '', 'sha256': ''},
            settings={'blind': blind},
        )
        run_offline(bag, plan, answerer, out, record, blind=blind, on_progress=on_progress)


def speed(bundle: Path, n_questions: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Questions a second of both ways, and what the evaluation adds to a question."""
    n_frames = n_questions // len(QUESTIONS)
    n_questions = n_frames * len(QUESTIONS)
    bag_path = write_bag(folder / 'bag', n_frames)
    with open_bag(bag_path) as bag:
        frames = [frame.frame() for frame in bag.frames()]
    asked = [question.asked() for question in QUESTIONS]
    times: dict[str, list[float]] = {'evaluation': [], 'bare': []}
    report_s = []
    with closing(BundleAnswerer.open(bundle)) as answerer:
        assistant = answerer.assistant

        def bare(frames: list[Frame]) -> None:
            for frame in frames:
                assistant.ask_many(asked, frame, settings=AssistantSettings(min_confidence=0.0))

        bare(frames[:2])
        for number in range(rounds):
            out = folder / f'out{number}'
            for way in ('evaluation', 'bare') if number % 2 else ('bare', 'evaluation'):
                assistant.forget()
                started_s = time.perf_counter()
                if way == 'bare':
                    bare(frames)
                else:
                    evaluate(bag_path, answerer, out, blind=False, on_progress=lambda *_: None)
                times[way].append(time.perf_counter() - started_s)
                print(f'  round {number}, {way}: {times[way][-1]:.2f} s', file=sys.stderr, flush=True)
            started_s = time.perf_counter()
            write_report(out)
            report_s.append(time.perf_counter() - started_s)
    of_evaluation, of_bare = times['evaluation'], times['bare']
    ratios = [bare_s / evaluation_s for bare_s, evaluation_s in zip(of_bare, of_evaluation, strict=True)]
    added = [(ours - theirs) / n_questions for ours, theirs in zip(of_evaluation, of_bare, strict=True)]
    return {
        'questions': n_questions,
        'frames': n_frames,
        'rounds': rounds,
        'bare_questions_per_s': n_questions / statistics.median(of_bare),
        'evaluation_questions_per_s': n_questions / statistics.median(of_evaluation),
        'speed_ratio_median': statistics.median(ratios),
        'speed_ratio_min': min(ratios),
        'speed_ratio_max': max(ratios),
        'added_ms_per_question': 1000 * statistics.median(added),
        'report_s': statistics.median(report_s),
    }


def watch_memory(bundle: Path, folder: Path) -> dict[str, Any]:
    """The memory of this process over a run; in a process of its own."""
    process = psutil.Process()
    seen: list[tuple[int, int]] = []

    def on_progress(n_done: int, _: int) -> None:
        seen.append((n_done, process.memory_info().rss))

    with closing(BundleAnswerer.open(bundle)) as answerer:
        loaded = process.memory_info().rss
        evaluate(folder / 'bag', answerer, folder / 'out', blind=False, on_progress=on_progress)
    early = next(rss for n_done, rss in seen if n_done >= EARLY)
    before_report = process.memory_info().rss
    write_report(folder / 'out')
    return {
        'memory_questions': seen[-1][0],
        'rss_loaded_mib': loaded / 2**20,
        f'rss_after_{EARLY}_mib': early / 2**20,
        'rss_at_the_end_mib': seen[-1][1] / 2**20,
        'rss_growth_mib': (seen[-1][1] - early) / 2**20,
        'rss_peak_of_the_run_mib': max(rss for _, rss in seen) / 2**20,
        'rss_growth_of_the_report_mib': (process.memory_info().rss - before_report) / 2**20,
    }


def memory(bundle: Path, n_questions: int, folder: Path) -> dict[str, Any]:
    """Resident memory while a recording is evaluated."""
    write_bag(folder / 'bag', n_questions // len(QUESTIONS))
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as alone:
        return alone.submit(watch_memory, bundle, folder).result()


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--part', choices=['all', 'speed', 'memory'], default='all')
    parser.add_argument('--nano', action='store_true', help='ask nano instead of a tiny model with random weights')
    parser.add_argument('--questions', type=int, default=1000, help='default: 1000')
    parser.add_argument('--rounds', type=int, default=5, help='of each way, for the speed; default: 5')
    options = parser.parse_args()
    if options.questions < 2 * EARLY and options.part != 'speed':
        parser.error(f'memory takes at least {2 * EARLY} --questions')
    figures: dict[str, Any] = {'model': 'nano' if options.nano else 'tiny'}
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.nano:
            bundle = bundle_dir('nano', 'cpu')
            build_nano(bundle)
        else:
            bundle = tiny_models.write_bundle(folder / 'tiny')
        for part, measure in (
            ('memory', lambda place: memory(bundle, options.questions, place)),
            ('speed', lambda place: speed(bundle, options.questions, options.rounds, place)),
        ):
            if options.part in ('all', part):
                (folder / part).mkdir()
                figures |= measure(folder / part)
    for key, value in figures.items():
        print(f'{key:34} {value:.4f}' if isinstance(value, float) else f'{key:34} {value}')
    where = machine() | {'load_average_before': busy}
    record = {'date': datetime.now(timezone.utc).isoformat(timespec='seconds'), 'machine': where, **figures}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / 'evaluation.jsonl').open('a') as file:
        file.write(json.dumps(record) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
