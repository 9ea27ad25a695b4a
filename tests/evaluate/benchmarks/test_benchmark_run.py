"""Whole runs from the command line: a tiny bundle or a tiny server answers small benchmarks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_benchmarks import LETTER, SHORT, write_gqa, write_lines, write_mmbench, write_mme, write_pope, write_scienceqa

from mobilevlm_ros.errors import BadImageError, BenchmarkError, EngineError, ServerError, SettingsError
from mobilevlm_ros.evaluate import server as server_module
from mobilevlm_ros.evaluate.answerer import BundleAnswerer, Reply
from mobilevlm_ros.evaluate.benchmarks import asking
from mobilevlm_ros.evaluate.benchmarks.asking import Source, Task, ask_all, grouped
from mobilevlm_ros.evaluate.benchmarks.catalogue import BENCHMARKS
from mobilevlm_ros.evaluate.benchmarks.command import add_arguments, run
from mobilevlm_ros.evaluate.benchmarks.items import FileImage, Item
from mobilevlm_ros.evaluate.benchmarks.paper import LANGUAGE_TABLE, VISION_TABLE, row_of
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.types import Frame, Question, ResultCode


class Oracle:
    """Answers by a function of the question; notes how it was asked."""

    model_id = 'oracle'

    def __init__(self, reply: Callable[[str], Reply | str]) -> None:
        self.asked: list[list[str]] = []
        self.closed = False
        self._reply = reply

    def answer(self, frame: Frame, question: Question) -> Reply:
        reply = self._reply(question.text)
        return Reply(reply, 0.5) if isinstance(reply, str) else reply

    def answer_many(self, frame: Frame, questions: Sequence[Question]) -> list[Reply]:
        assert frame.rgb_hwc.ndim == 3
        self.asked.append([question.text for question in questions])
        return [self.answer(frame, question) for question in questions]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], Reply | str]], Oracle]]:
    """Makes whoever is asked an oracle."""

    def make(reply: Callable[[str], Reply | str]) -> Oracle:
        made = Oracle(reply)
        monkeypatch.setattr(Source, 'open', lambda self, aspect=None: made)
        monkeypatch.setattr(Source, 'model_id', lambda self: made.model_id)
        return made

    yield make


def evaluate(name: str, *arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.set_defaults(benchmark=name)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_written_as_published_and_scored(
    oracle: Callable[..., Oracle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = oracle(lambda text: 'No' if 'm 1' in text or 'r 0' in text or 'l 0' in text else 'Yes')
    out = tmp_path / 'out'
    assert evaluate('pope', '--data', write_pope(tmp_path), '--out', out, '--paper', 'mobilevlm-1.7b') == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ('F1, mean of parts', '84.5', 'mobilevlm-1.7b (paper)', 'oracle'))
    (record, *_) = lines(out / 'predictions.jsonl')
    metadata = record.pop('metadata')
    prompt = f'Is there a random 0?{SHORT}'
    assert record == {
        'question_id': 0, 'prompt': prompt, 'text': 'Yes', 'answer_id': '0', 'model_id': 'oracle'
    }  # fmt: skip
    assert metadata['confidence'] == 0.5 and metadata['number'] == 0 and metadata['result'] == 'OK'
    scores = json.loads((out / 'scores.json').read_text())
    assert scores['paper'] == {'mobilevlm-1.7b': 84.5} and scores['n_answers'] == 8
    # random: y/n/y/n answered y/n/y/y; the others all right.
    assert scores['figures']['random precision'] == pytest.approx(200 / 3)
    assert scores['figures']['popular f1'] == scores['figures']['adversarial f1'] == 100.0
    assert one.closed and (out / 'coco_pope_random_answers.json').exists()


def test_questions_about_one_image_are_asked_together(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    one = oracle(lambda text: 'yes')
    evaluate('gqa', '--data', write_gqa(tmp_path), '--out', tmp_path / 'out')
    assert [len(texts) for texts in one.asked] == [2, 2]


def test_groups_are_not_endless() -> None:
    images = [FileImage(Path(name)) for name in 'aaaaabba']
    items = [Item(number, number, image, '', '', 1) for number, image in enumerate(images)]
    assert [[item.number for item in group] for group in grouped(items, 3)] == [[0, 1, 2], [3, 4], [5, 6], [7]]


def test_a_run_goes_on_where_it_stopped(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    data, out = write_gqa(tmp_path), tmp_path / 'out'

    def fails(text: str) -> Reply | str:
        return Reply('', result_code=ResultCode.ENGINE_ERROR, message='out of order') if 'Left' in text else 'yes'

    oracle(fails)
    with pytest.raises(EngineError, match='question 004 got no answer: out of order'):
        evaluate('gqa', '--data', data, '--out', out)
    path = out / 'predictions.jsonl'
    assert [record['question_id'] for record in lines(path)] == ['001', '002']
    path.write_bytes(path.read_bytes() + b'{"question_id": "003", "pro')  # the power went
    one = oracle(lambda text: 'man')
    with pytest.raises(SettingsError, match='--resume'):
        evaluate('gqa', '--data', data, '--out', out)
    assert evaluate('gqa', '--data', data, '--out', out, '--resume') == 0
    assert one.asked == [[f'Who is there?{SHORT}', f'Left or right?{SHORT}']]
    assert [record['text'] for record in lines(path)] == ['yes', 'yes', 'man', 'man']
    assert json.loads((out / 'scores.json').read_text())['figures']['Accuracy'] == 50.0
    assert evaluate('gqa', '--data', data, '--out', out, '--resume') == 0
    assert len(one.asked) == 1  # there was nothing left to ask


def test_only_the_same_run_goes_on(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    data, out = write_gqa(tmp_path), tmp_path / 'out'
    oracle(lambda text: 'yes')
    evaluate('gqa', '--data', data, '--out', out)
    oracle(lambda text: 'yes').model_id = 'another'
    with pytest.raises(SettingsError, match=r"'oracle'.*'another'"):
        evaluate('gqa', '--data', data, '--out', out, '--resume')
    oracle(lambda text: 'yes')
    path = data / 'llava_gqa_testdev_balanced.jsonl'
    path.write_text(path.read_text().replace('Is it red', 'Is it blue'))
    with pytest.raises(SettingsError, match='another question 0'):
        evaluate('gqa', '--data', data, '--out', out, '--resume')


def test_the_first_few_can_be_asked_and_the_rest_later(
    oracle: Callable[..., Oracle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_gqa(tmp_path), tmp_path / 'out'
    oracle(lambda text: 'yes')
    evaluate('gqa', '--data', data, '--out', out, '--limit', '1')
    assert 'nothing to compare with the paper' in capsys.readouterr().out
    assert json.loads((out / 'scores.json').read_text())['figures']['Accuracy'] == 100.0
    evaluate('gqa', '--data', data, '--out', out, '--resume', '--json')
    assert json.loads(capsys.readouterr().out)['figures']['Accuracy'] == 25.0
    evaluate('gqa', '--data', data, '--out', out, '--resume', '--limit', '1')
    assert json.loads((out / 'scores.json').read_text())['figures']['Accuracy'] == 100.0


def test_a_question_that_cannot_be_asked_counts_as_wrong(
    oracle: Callable[..., Oracle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    too_long = Reply('', result_code=ResultCode.TOO_LONG, message='a prompt of 9999 tokens')
    oracle(lambda text: too_long if 'red' in text else 'café')
    evaluate('gqa', '--data', write_gqa(tmp_path), '--out', tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'scores.json').read_text())['figures']['Accuracy'] == 25.0
    assert 'count as wrong: 1; the first: question 001: a prompt of 9999 tokens' in capsys.readouterr().out


def test_answers_of_published_scripts_are_scored_without_asking(tmp_path: Path) -> None:
    data, out = write_scienceqa(tmp_path), tmp_path / 'out'
    answers = tmp_path / 'answers.jsonl'
    write_lines(answers, [{'question_id': '4', 'prompt': '<image>', 'text': 'B', 'answer_id': 'x', 'metadata': {}}])
    assert evaluate('sqa', '--data', data, '--answers', answers, '--out', out) == 0
    figures = json.loads((out / 'scores.json').read_text())['figures']
    assert figures == {'IMG-Accuracy': 100.0, 'Accuracy of all, missing ones wrong': pytest.approx(100 / 3)}


def test_our_own_predictions_can_be_scored_again(oracle: Callable[..., Oracle], tmp_path: Path) -> None:
    data, out, again = write_mme(tmp_path, ('existence',)), tmp_path / 'out', tmp_path / 'again'
    oracle(lambda text: 'yes' if 'existence' in text else 'no')
    evaluate('mme', '--data', data, '--out', out, '--limit', '100')
    evaluate('mme', '--data', data, '--answers', out / 'predictions.jsonl', '--out', again, '--limit', '100')
    first, second = (json.loads((folder / 'scores.json').read_text()) for folder in (out, again))
    assert first['figures'] == second['figures'] and first['figures']['existence'] == 200.0


@pytest.mark.parametrize(
    'arguments', ['--answers x --server http://h', '--bundle x --server http://h', '--answers x --resume']
)
def test_arguments_that_contradict_each_other_are_refused(tmp_path: Path, arguments: str) -> None:
    with pytest.raises(SettingsError):
        evaluate('pope', '--data', tmp_path, *arguments.split())


def test_a_key_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('A_KEY', raising=False)
    with pytest.raises(SettingsError, match='A_KEY'):
        evaluate('pope', '--data', tmp_path, '--server', 'http://127.0.0.1:1', '--server-key-env', 'A_KEY')


def test_bad_data_is_found_before_a_model_is_loaded(tmp_path: Path, tiny_bundle: Path) -> None:
    data = write_gqa(tmp_path)
    (data / 'images' / 'n2.jpg').unlink()
    with pytest.raises(BenchmarkError, match=r'line 3: the image .*n2\.jpg is not there'):
        evaluate('gqa', '--data', data, '--bundle', tiny_bundle, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out' / 'predictions.jsonl').exists()
    (data / 'llava_gqa_testdev_balanced.jsonl').write_text('')
    with pytest.raises(BenchmarkError, match='no questions'):
        evaluate('gqa', '--data', data, '--bundle', tiny_bundle, '--out', tmp_path / 'out')


# -- a tiny bundle ----------------------------------------------------------------------------------------------------


def test_a_bundle_answers_as_its_assistant_does(tiny_bundle: Path, tiny_assistant: Assistant, tmp_path: Path) -> None:
    data, out = write_mmbench(tmp_path), tmp_path / 'out'
    assert evaluate('mmbench', '--data', data, '--bundle', tiny_bundle, '--out', out, '--limit', '2') == 0
    (item, *_) = BENCHMARKS['mmbench'].items(data)
    assert item.text.endswith(LETTER)
    answer = tiny_assistant.ask(Question(item.text, max_tokens=1024), Frame(item.image.read()))
    (record, _) = lines(out / 'predictions.jsonl')
    assert record['text'] == answer.text and record['metadata']['prompt_hash'] == answer.prompt_hash
    assert record['option_char'] == ['A', 'B'] and record['model_id'] == tiny_assistant.model_id


def test_scienceqa_crops_where_the_bundle_pads(tiny_bundle: Path, photo: Any) -> None:
    seen = []
    for aspect in (None, BENCHMARKS['sqa'].aspect):
        answerer = BundleAnswerer.open(tiny_bundle, aspect=aspect)
        try:
            seen.append(answerer.answer(Frame(photo), Question('What?', max_tokens=4)))
        finally:
            answerer.close()
    assert seen[0].prompt_hash != seen[1].prompt_hash and seen[0].confidence != seen[1].confidence


@pytest.mark.slow
def test_several_processes_give_the_answers_of_one(tiny_bundle: Path, tmp_path: Path) -> None:
    data = write_pope(tmp_path)
    common = ('--data', data, '--bundle', tiny_bundle)
    evaluate('pope', *common, '--out', tmp_path / 'one', '--threads', '1')
    evaluate('pope', *common, '--out', tmp_path / 'two', '--processes', '2')
    one, two = (lines(tmp_path / name / 'predictions.jsonl') for name in ('one', 'two'))
    assert [record['answer_id'] for record in one] == [str(number) for number in range(8)]
    texts = [{record['answer_id']: record['text'] for record in records} for records in (one, two)]
    assert texts[0] == texts[1] and len(two) == 8


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_is_raised_here(tiny_bundle: Path, tmp_path: Path) -> None:
    data = write_gqa(tmp_path)
    (data / 'images' / 'n2.jpg').write_bytes(b'no image')
    done: list[int] = []
    with pytest.raises(BadImageError, match=r'n2\.jpg'):
        for replies in ask_all(Task('gqa', data), Source(tiny_bundle), 2):
            done += [item.number for item, _ in replies]
    assert done in ([], [0, 1])


@pytest.mark.slow
def test_a_process_that_dies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, '_POLL_S', 0.05)
    monkeypatch.setattr(asking, '_work', _die)
    with pytest.raises(EngineError, match='ended with code 3'):
        list(ask_all(Task('gqa', write_gqa(tmp_path)), Source(tmp_path), 2))


def _die(*_: Any) -> None:
    import os

    os._exit(3)


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, 'MAX_WAIT_S', 0.0)
    with pytest.raises(ServerError, match='no answer from'):
        evaluate('pope', '--data', write_pope(tmp_path), '--server', 'http://127.0.0.1:9', '--out', tmp_path / 'out')


# -- the paper --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('model', 'row'),
    [
        ('mobilevlm-1.7b-cpu@0123', 'mobilevlm-1.7b'),
        ('mtgv/MobileVLM_V2-1.7B', 'mobilevlm_v2-1.7b'),
        ('mobilevlm-3b-lora-cpu@0', 'mobilevlm-3b-lora'),
        ('nano-cpu@0', ''),
    ],
)
def test_models_are_found_in_the_papers_table(model: str, row: str) -> None:
    assert row_of(model, VISION_TABLE) == row


def test_averages_are_those_that_the_paper_prints() -> None:
    """README's averages: MME counts a twentieth."""
    averages = {
        'mobilevlm_v2-1.7b': 64.2, 'mobilevlm_v2-3b': 68.1, 'mobilevlm_v2-7b': 72.1
    }  # fmt: skip
    for model, average in averages.items():
        row = VISION_TABLE[model]
        assert (sum(row.values()) - row['mme'] * 19 / 20) / 6 == pytest.approx(average, abs=0.065)
    row = LANGUAGE_TABLE['mobilellama-1.4b']
    assert sum(row.values()) / len(row) == pytest.approx(0.4490, abs=0.0001)
