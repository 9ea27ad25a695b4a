"""A real HTTP server that speaks the format, and what becomes of one that does not."""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mobilevlm_ros.errors import ServerError, SettingsError
from mobilevlm_ros.evaluate import server as module
from mobilevlm_ros.evaluate.benchmarks.command import add_arguments, run
from mobilevlm_ros.evaluate.server import ServerAnswerer
from mobilevlm_ros.types import AnswerFormat, Frame, Question, ResultCode

Response = tuple[int, Any]


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of these tests."""


class TinyServer:
    """Answers requests with what ``respond`` returns: a status, and JSON or bytes."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.models = ['tiny']
        self.headers: dict[str, str] = {}
        self.respond: Callable[[dict[str, Any]], Response] = lambda body: (200, said('a red cup'))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, None, dict(self.headers)))
                self._send(200, {'data': [{'id': name} for name in outer.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                outer.requests.append((self.path, body, dict(self.headers)))
                self._send(*outer.respond(body))

            def _send(self, status: int, value: Any) -> None:
                if status == 0:  # hang up
                    self.close_connection = True
                    return
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in outer.headers.items():
                    self.send_header(name, text)
                self.send_header('Content-Length', str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _QuietServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self._server.server_address[1]}'
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def bodies(self) -> list[Any]:
        return [body for path, body, _ in self.requests if path == '/v1/chat/completions']


def said(text: str | None, **choice: Any) -> dict[str, Any]:
    return {
        'choices': [{'message': {'role': 'assistant', 'content': text}, 'finish_reason': 'stop'} | choice],
        'usage': {'prompt_tokens': 12, 'completion_tokens': 3},
    }


@pytest.fixture
def server() -> Iterator[TinyServer]:
    tiny = TinyServer()
    yield tiny
    tiny.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'MAX_WAIT_S', 0.01)


def ask(answerer: ServerAnswerer, photo: NDArray[np.uint8], question: Question | None = None) -> Any:
    return answerer.answer(Frame(photo), question or Question('What is it?', max_tokens=7))


def test_the_request_holds_the_exact_pixels_and_asks_greedily(server: TinyServer, photo: NDArray[np.uint8]) -> None:
    answerer = ServerAnswerer(server.url)
    reply = ask(answerer, photo)
    assert (reply.text, reply.result_code, reply.confidence) == ('a red cup', ResultCode.OK, None)
    assert (reply.timing.prompt_tokens, reply.timing.generated_tokens) == (12, 3) and reply.timing.total_s > 0
    (body,) = server.bodies
    assert (body['model'], body['temperature'], body['max_tokens']) == ('tiny', 0.0, 7)
    image, text = body['messages'][0]['content']
    assert text == {'type': 'text', 'text': 'What is it?'}
    data = base64.b64decode(image['image_url']['url'].removeprefix('data:image/png;base64,'))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), photo)
    assert answerer.model_id == f'tiny@{server.url.removeprefix("http://")}'


@pytest.mark.parametrize('ending', ['', '/', '/v1', '/v1/'])
def test_the_url_may_end_as_people_write_it(server: TinyServer, photo: NDArray[np.uint8], ending: str) -> None:
    assert ask(ServerAnswerer(server.url + ending), photo).text == 'a red cup'


def test_the_confidence_is_the_mean_probability_of_the_tokens(server: TinyServer, photo: NDArray[np.uint8]) -> None:
    logprobs = {'content': [{'token': 'a', 'logprob': math.log(0.5)}, {'token': 'b', 'logprob': 0.0}]}
    server.respond = lambda body: (200, said('ab', logprobs=logprobs))
    assert ask(ServerAnswerer(server.url), photo).confidence == pytest.approx(0.75)


def test_a_server_that_tells_no_probabilities_is_asked_without(server: TinyServer, photo: NDArray[np.uint8]) -> None:
    refusal = {'error': {'message': 'logprobs is not supported'}}
    server.respond = lambda body: (400, refusal) if 'logprobs' in body else (200, said('yes'))
    answerer = ServerAnswerer(server.url)
    assert [ask(answerer, photo).text for _ in range(2)] == ['yes', 'yes']
    assert len(server.bodies) == 3  # the first time twice


@pytest.mark.parametrize(('spelled', 'text'), [('No.', 'no'), (' YES', 'yes'), ('maybe', 'maybe')])
def test_a_closed_question_gets_an_option_where_the_reply_spells_one(
    server: TinyServer, photo: NDArray[np.uint8], spelled: str, text: str
) -> None:
    server.respond = lambda body: (200, said(spelled))
    reply = ask(ServerAnswerer(server.url), photo, Question('Is it?', AnswerFormat.YES_NO))
    assert reply.text == text and reply.options == ('yes', 'no')
    assert server.bodies[0]['messages'][0]['content'][1]['text'].endswith('single word or phrase.')


def test_json_is_asked_for_by_schema_and_checked(server: TinyServer, photo: NDArray[np.uint8]) -> None:
    schema = {'type': 'object', 'properties': {'n': {'type': 'integer'}}, 'required': ['n']}
    answerer = ServerAnswerer(server.url)
    codes = []
    for text in ('{"n": 3}', '{"n": "three"}', '{'):
        server.respond = lambda body, text=text: (200, said(text))
        reply = ask(answerer, photo, Question('How many?', AnswerFormat.JSON, json_schema=json.dumps(schema)))
        codes.append(reply.result_code)
    assert codes == [ResultCode.OK, ResultCode.INCOMPLETE, ResultCode.INCOMPLETE]
    assert server.bodies[0]['response_format']['json_schema']['schema'] == schema


def test_a_busy_server_is_asked_again(server: TinyServer, photo: NDArray[np.uint8]) -> None:
    answers: list[Response] = [(503, {}), (429, {}), (0, b''), (200, said('at last'))]
    server.headers['Retry-After'] = '1e9'  # no wait without a bound
    server.respond = lambda body: answers.pop(0)
    assert ask(ServerAnswerer(server.url), photo).text == 'at last'


def test_patience_ends(server: TinyServer, photo: NDArray[np.uint8]) -> None:
    server.respond = lambda body: (503, b'overloaded')
    answerer = ServerAnswerer(server.url, n_retries=2)
    with pytest.raises(ServerError, match=r"3 tries \(status 503: 'overloaded'\)"):
        ask(answerer, photo)
    assert len(server.bodies) == 3


def test_a_server_that_is_slow_is_not_waited_for(server: TinyServer, photo: NDArray[np.uint8]) -> None:
    released = threading.Event()

    def respond(body: dict[str, Any]) -> Response:
        released.wait(10)
        return 200, said('late')

    answerer = ServerAnswerer(server.url, timeout_s=0.05, n_retries=1)
    server.respond = respond
    try:
        with pytest.raises(ServerError, match=r'2 tries .*timed out'):
            ask(answerer, photo)
    finally:
        released.set()


def test_a_refused_question_is_its_own_problem(server: TinyServer, photo: NDArray[np.uint8]) -> None:
    answerer = ServerAnswerer(server.url)
    server.respond = lambda body: (400, {'error': {'message': 'the prompt is too long'}})
    reply = ask(answerer, photo)
    assert reply.result_code is ResultCode.BAD_QUESTION and 'too long' in reply.message and not reply.text
    assert ask(answerer, photo, Question(' ')).result_code is ResultCode.BAD_QUESTION
    server.respond = lambda body: (200, said(None))
    assert ask(answerer, photo).result_code is ResultCode.UNKNOWN


def test_a_cut_answer_says_so(server: TinyServer, photo: NDArray[np.uint8]) -> None:
    server.respond = lambda body: (200, said('a very lo', finish_reason='length'))
    assert ask(ServerAnswerer(server.url), photo).truncated


@pytest.mark.parametrize(
    'response', [b'<html>', {'choices': []}, {'choices': [{'message': None}]}, ['no'], b'[' * 100_000, said([1])]
)
def test_another_language_is_named(server: TinyServer, photo: NDArray[np.uint8], response: Any) -> None:
    server.respond = lambda body: (200, response)
    with pytest.raises(ServerError, match='OpenAI-compatible'):
        ask(ServerAnswerer(server.url), photo)


def test_a_response_without_end_is_not_read(
    server: TinyServer, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, 'MAX_RESPONSE_BYTES', 1000)
    answerer = ServerAnswerer(server.url)
    server.respond = lambda body: (200, said('x' * 2000))
    with pytest.raises(ServerError, match='no answer'):
        ask(answerer, photo)


def test_a_key_is_sent_and_its_refusal_explained(server: TinyServer, photo: NDArray[np.uint8]) -> None:
    answerer = ServerAnswerer(server.url, 'tiny', api_key='secret')
    server.respond = lambda body: (401, {'error': 'who are you?'})
    with pytest.raises(ServerError, match='server-key-env') as caught:
        ask(answerer, photo)
    assert server.requests[0][2]['Authorization'] == 'Bearer secret' and 'secret' not in str(caught.value)


def test_a_model_must_be_named_where_there_are_several(server: TinyServer) -> None:
    server.models = ['small', 'large']
    with pytest.raises(ServerError, match=r"'small', 'large'.*--model"):
        ServerAnswerer(server.url)
    assert ServerAnswerer(server.url, 'large').model_id.startswith('large@')


def test_a_benchmark_is_asked_of_a_server(server: TinyServer, tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    (tmp_path / 'images').mkdir()
    Image.fromarray(photo).save(tmp_path / 'images' / 'a.png')
    question = {'question_id': '1', 'image': 'a.png', 'text': 'What is it?'}
    (tmp_path / 'llava_gqa_testdev_balanced.jsonl').write_text(json.dumps(question))
    truth = {'answer': 'a red cup', 'isBalanced': True, 'types': {'structural': 'query', 'semantic': 'obj'}}
    (tmp_path / 'testdev_balanced_questions.json').write_text(json.dumps({'1': truth}))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.set_defaults(benchmark='gqa')
    arguments = ['--data', str(tmp_path), '--out', str(tmp_path / 'out'), '--server', server.url, '--timeout', '9']
    assert run(parser.parse_args(arguments)) == 0
    scores = json.loads((tmp_path / 'out' / 'scores.json').read_text())
    assert scores['figures']['Accuracy'] == 100.0 and scores['model_id'].startswith('tiny@')
    assert server.bodies[0]['max_tokens'] == 128


@pytest.mark.parametrize('url', ['localhost:8000', 'file:///etc/passwd', 'http://', ''])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match='URL'):
        ServerAnswerer(url, 'm')
