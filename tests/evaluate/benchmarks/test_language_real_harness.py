"""The paper's language tasks in the real lm-evaluation-harness, on the runtime's own engine.

Real are the harness, its tasks (prompts, options, metrics, groups) and the engine; the questions are a handful in the
published columns, since the data sets are not fetched here, and the language model is tiny with random weights. What
is right follows from its own log probabilities, asked for the prompts that the tasks are known to write.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from mobilevlm_ros.evaluate.benchmarks.harness import add_language_arguments, run_language
from mobilevlm_ros.evaluate.benchmarks.language import LanguageScorer
from mobilevlm_ros.evaluate.benchmarks.paper import LANGUAGE_TASKS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
datasets = pytest.importorskip('datasets', reason='lm-evaluation-harness is not installed: make venv-dev')
pytest.importorskip('lm_eval', reason='lm-evaluation-harness is not installed: make venv-dev')

WORDS = ['red', 'blue', 'green', 'car', 'table', 'cup']
N_CTX = 1024
Rows = list[dict[str, Any]]


@pytest.fixture(scope='module')
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('gguf') / 'mobilellama-1.4b-tiny.gguf'
    tiny_models.write_gguf(path)
    return path


@pytest.fixture(scope='module')
def scorer(model_file: Path) -> Iterator[LanguageScorer]:
    made = LanguageScorer.open(model_file, n_ctx=N_CTX, n_threads=1)
    yield made
    made.close()


def likeliest(scorer: LanguageScorer, prompt: str, options: list[str]) -> int:
    scores = [value for value, _ in scorer.log_likelihoods([(prompt, f' {option}') for option in options])]
    return scores.index(max(scores))


def other(label: int, n: int) -> int:
    return (label + 1) % n


def questions(scorer: LanguageScorer) -> dict[tuple[str, str | None], Rows]:
    """By data set: four rows, of which the model is right about the first three (of mmlu's, half of all)."""
    rows: dict[tuple[str, str | None], Rows] = {}

    def label(i: int, prompt: str, options: list[str]) -> int:
        said = likeliest(scorer, prompt, options)
        return said if i < 3 else other(said, len(options))

    for name in ('ARC-Easy', 'ARC-Challenge'):
        rows['allenai/ai2_arc', name] = [
            {
                'question': f'what is the {word}',
                'choices': {'text': ['car', 'table', 'cup'], 'label': ['A', 'B', 'C']},
                'answerKey': 'ABC'[label(i, f'Question: what is the {word}\nAnswer:', ['car', 'table', 'cup'])],
            }
            for i, word in enumerate(WORDS[:4])
        ]
    rows['aps/super_glue', 'boolq'] = [
        {
            'passage': f'a {word} car',
            'question': 'is it a car',
            'label': label(i, f'a {word} car\nQuestion: is it a car?\nAnswer:', ['no', 'yes']),
        }
        for i, word in enumerate(WORDS[:4])
    ]
    rows['nyu-mll/glue', 'rte'] = [
        {
            'sentence1': f'the {word} car',
            'sentence2': 'the car',
            'label': label(i, f'the {word} car\nQuestion: the car True or False?\nAnswer:', ['True', 'False']),
        }
        for i, word in enumerate(WORDS[:4])
    ]
    rows['baber/piqa', None] = [
        {
            'goal': f'the {word} cup',
            'sol1': 'a table',
            'sol2': 'a car',
            'label': label(i, f'Question: the {word} cup\nAnswer:', ['a table', 'a car']),
        }
        for i, word in enumerate(WORDS[:4])
    ]
    rows['Rowan/hellaswag', None] = [
        {
            'activity_label': 'Table',
            'ctx_a': f'the {word} car',
            'ctx_b': 'is',
            'endings': ['red', 'blue', 'green', 'a cup'],
            'label': str(label(i, f'Table: the {word} car Is', ['red', 'blue', 'green', 'a cup'])),
        }
        for i, word in enumerate(WORDS[:4])
    ]
    rows['allenai/winogrande', 'winogrande_xl'] = []
    for i, word in enumerate(WORDS[:4]):
        options = ['car', 'table']
        ends = [(f'the {option}', f' is {word}') for option in options]  # the end is scored after either option
        scores = [value for value, _ in scorer.log_likelihoods(ends)]
        said = scores.index(max(scores))
        right = said if i < 3 else other(said, 2)
        row = {'sentence': f'the _ is {word}', 'option1': 'car', 'option2': 'table', 'answer': str(right + 1)}
        rows['allenai/winogrande', 'winogrande_xl'].append(row)
    rows['truthfulqa/truthful_qa', 'multiple_choice'] = [
        {
            'question': f'what is {word}',
            'mc1_targets': {'choices': ['a car', 'a cup'], 'labels': [1, 0]},
            'mc2_targets': {'choices': ['a car', 'a cup', 'a table'], 'labels': [1, 1, 0]},
        }
        for word in WORDS[:4]
    ]
    return rows


def subject(scorer: LanguageScorer, name: str) -> Any:
    """One of mmlu's: two questions, of which the first is answered rightly after the five examples."""
    spoken = name.replace('_', ' ')
    options = WORDS[:4]
    listed = '\n'.join(f'{letter}. {word}' for letter, word in zip('ABCD', options, strict=True))
    shown = ''.join(f'what {i}\n{listed}\nAnswer: {"ABCD"[i % 4]}\n\n' for i in range(5))
    head = f'The following are multiple choice questions (with answers) about {spoken}.\n\n'
    rows = []
    for i in range(2):
        said = likeliest(scorer, f'{head}{shown}the {WORDS[i]}\n{listed}\nAnswer:', list('ABCD'))
        rows.append({'question': f'the {WORDS[i]}', 'choices': options, 'answer': said if i == 0 else other(said, 4)})
    examples = [{'question': f'what {i}', 'choices': options, 'answer': i % 4} for i in range(5)]
    return splits(test=rows, dev=examples)


def splits(**rows: Rows) -> Any:
    return datasets.DatasetDict({name: datasets.Dataset.from_list(some) for name, some in rows.items()})


@pytest.fixture
def data(scorer: LanguageScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the hub."""
    known = questions(scorer)

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        if path == 'cais/mmlu':
            assert name is not None
            return subject(scorer, name)
        rows = known[path, name]
        return splits(train=rows, validation=rows, test=rows)

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)


def test_the_papers_tasks_are_scored_by_the_harness_itself(
    data: None, scorer: LanguageScorer, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_language_arguments(parser)
    out = tmp_path / 'out.json'
    arguments = [str(model_file), '--threads', '1', '--n-ctx', str(N_CTX), '--out', str(out)]
    assert run_language(parser.parse_args(arguments)) == 0
    found = json.loads(out.read_text())['accuracy']
    assert list(found) == list(LANGUAGE_TASKS)
    told = {task for task in LANGUAGE_TASKS if not task.startswith('truthfulqa')} - {'mmlu'}
    assert {task: found[task] for task in told} == dict.fromkeys(told, 0.75)
    assert found['mmlu'] == 0.5
    assert found['truthfulqa_mc1'] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert 0 < found['truthfulqa_mc2'] < 1
    assert 'mobilellama-1.4b (paper)' in capsys.readouterr().out
