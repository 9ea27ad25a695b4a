"""An OpenAI-compatible server (vLLM, llama-server) as the one who answers.

Every wait, retry and response has a bound. What is wrong with one question is that question's result code; a server
that is not there, refuses us or speaks another language ends the evaluation with ``ServerError``. The wire format:
https://platform.openai.com/docs/api-reference/chat, as vLLM and llama.cpp's server implement it.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm_ros.errors import AnswerFormatError, BadQuestionError, ServerError, SettingsError
from mobilevlm_ros.evaluate.answerer import Reply
from mobilevlm_ros.runtime.formats import PreparedQuestion, parse_json_answer, prepare
from mobilevlm_ros.runtime.prompt import prompt_hash
from mobilevlm_ros.types import Frame, Question, ResultCode, Timing

__all__ = ['ServerAnswerer']

MAX_RESPONSE_BYTES = 8 << 20
MAX_WAIT_S = 30.0
"""Longest pause between two tries, also if the server asks for more."""
_FIRST_WAIT_S = 0.5
_MAX_TOKENS = 128
_OF_THE_QUESTION = (400, 413, 422)
_COME_BACK_LATER = (408, 409, 425, 429, 500, 502, 503, 504)
_LOOPBACK = ('localhost', '127.0.0.1', '::1')


class ServerAnswerer:
    """Asks a server; one image and one question a request, greedily.

    :param url: of the server, with or without ``/v1``.
    :param model: as the server calls it; empty: the only one that it serves.
    :param timeout_s: for one request.
    :param n_retries: how often a request is repeated that failed through no fault of its own.
    :param api_key: sent as a bearer token; empty: none is.
    :raise SettingsError: if the URL is none.
    :raise ServerError: if no model was named and the server does not serve exactly one.
    """

    def __init__(
        self, url: str, model: str = '', *, timeout_s: float = 120.0, n_retries: int = 4, api_key: str = ''
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ('http', 'https') or not parts.hostname:
            raise SettingsError(f'{url!r} is no URL of a server: expected http://HOST:PORT or https://HOST')
        self._base = url.rstrip('/').removesuffix('/v1') + '/v1'
        self._host = parts.netloc.rpartition('@')[2]
        self._timeout_s, self._n_retries = timeout_s, n_retries
        self._headers = {'Content-Type': 'application/json', 'Accept': 'application/json'}
        if api_key:
            self._headers['Authorization'] = f'Bearer {api_key}'
        # A proxy of the environment cannot reach this machine's own ports.
        handlers = [urllib.request.ProxyHandler({})] if parts.hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(*handlers)
        self._tells_probabilities = True
        self._model = model or self._only_model()

    @property
    def model_id(self) -> str:
        """Model and host."""
        return f'{self._model}@{self._host}'

    def answer(self, frame: Frame, question: Question) -> Reply:
        """See ``Answerer``.

        The answer to a closed question is the option that the reply spells, or else the reply as it is.

        :raise ServerError: if the server cannot be reached, refuses us, or answers in another format.
        """
        started_s = time.monotonic()
        try:
            prepared = prepare(question)
        except (AnswerFormatError, BadQuestionError) as error:
            return Reply('', result_code=error.code, message=str(error))
        body = self._body(frame.rgb_hwc, prepared, question.max_tokens or _MAX_TOKENS)
        hash_ = prompt_hash(prepared.text, repr((self.model_id, prepared.options, prepared.schema)))
        status, response = self._post(body)
        timing = Timing(total_s=time.monotonic() - started_s)
        if status in _OF_THE_QUESTION:
            message = f'the server refuses the question ({status}): {_shown(response)}'
            return Reply('', None, timing, ResultCode.BAD_QUESTION, message, prompt_hash=hash_)
        return self._read(response, prepared, timing, hash_)

    def answer_many(self, frame: Frame, questions: Sequence[Question]) -> list[Reply]:
        """See ``Answerer``; one request after the other."""
        return [self.answer(frame, question) for question in questions]

    def close(self) -> None:
        """Nothing is held between requests."""

    def _only_model(self) -> str:
        status, response = self._request('/models', None)
        try:
            names = [entry['id'] for entry in json.loads(response)['data']]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ServerError(f'{self._base}/models says {_shown(response)}, expected a list of models') from error
        if status != 200 or len(names) != 1:
            raise ServerError(f'{self._base} serves {names}: name one of them with --model')
        return str(names[0])

    def _body(self, rgb_hwc: NDArray[np.uint8], prepared: PreparedQuestion, max_tokens: int) -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(rgb_hwc)).save(file, 'PNG', compress_level=1)
        image = 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()
        content = [{'type': 'image_url', 'image_url': {'url': image}}, {'type': 'text', 'text': prepared.text}]
        body: dict[str, Any] = {
            'model': self._model,
            'messages': [{'role': 'user', 'content': content}],
            'max_tokens': max_tokens,
            'temperature': 0.0,
            'seed': 0,
            'stream': False,
        }
        if prepared.schema:
            schema = {'name': 'answer', 'strict': True, 'schema': json.loads(prepared.schema)}
            body['response_format'] = {'type': 'json_schema', 'json_schema': schema}
        return body

    def _post(self, body: dict[str, Any]) -> tuple[int, bytes]:
        path = '/chat/completions'
        if self._tells_probabilities:
            status, response = self._request(path, body | {'logprobs': True})
            if status != 400 or b'logprob' not in response.lower():
                return status, response
            self._tells_probabilities = False  # this server refuses to; ask it no more
        return self._request(path, body)

    def _request(self, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        """Status and text of a response that is worth reading; anything else is tried again, then raised."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, self._headers)
        problem = ''
        for attempt in range(self._n_retries + 1):
            wait_s = _FIRST_WAIT_S * 2**attempt
            try:
                with self._opener.open(request, timeout=self._timeout_s) as response:
                    return int(response.status), self._read_all(response)
            except urllib.error.HTTPError as error:
                with error:
                    text = self._read_all(error)
                if error.code in _OF_THE_QUESTION and body is not None:
                    return error.code, text
                problem = f'status {error.code}: {_shown(text)}'
                if error.code not in _COME_BACK_LATER:
                    raise ServerError(f'{self._base + path} refuses: {problem}. {_advice(error.code)}') from error
                wait_s = max(wait_s, _seconds(error.headers.get('Retry-After', '')))
            except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
                problem = str(getattr(error, 'reason', '') or error or type(error).__name__)
            if attempt < self._n_retries:
                time.sleep(min(wait_s, MAX_WAIT_S))
        raise ServerError(
            f'no answer from {self._base + path} in {self._n_retries + 1} tries ({problem}). Is the server running? '
            'What is answered already is kept: start it, and go on with --resume.'
        )

    def _read_all(self, response: Any) -> bytes:
        text: bytes = response.read(MAX_RESPONSE_BYTES + 1)
        if len(text) > MAX_RESPONSE_BYTES:
            raise ServerError(f'{self._base} sent more than {MAX_RESPONSE_BYTES >> 20} MiB: that is no answer')
        return text

    def _read(self, response: bytes, prepared: PreparedQuestion, timing: Timing, hash_: str) -> Reply:
        try:
            record = json.loads(response)
            choice = record['choices'][0]
            text = choice['message']['content'] or ''
            if not isinstance(text, str):
                raise TypeError('the content is no text')
            usage = record.get('usage') or {}
            timing.prompt_tokens = int(usage.get('prompt_tokens', 0))
            timing.generated_tokens = int(usage.get('completion_tokens', 0))
            confidence = _confidence(choice)
            truncated = choice.get('finish_reason') == 'length'
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ServerError(
                f'{self._base} says {_shown(response)}, expected a chat completion with choices[0].message.content: '
                'is it OpenAI-compatible?'
            ) from error
        text = text.strip()
        code, message = ResultCode.OK, ''
        if not text:
            code, message = ResultCode.UNKNOWN, 'the model had nothing to say'
        elif prepared.schema and (found := parse_json_answer(text, prepared.schema)) is not None:
            code, message = ResultCode.INCOMPLETE, found
        elif prepared.options:
            text = _option(text, prepared.options)
        return Reply(text, confidence, timing, code, message, truncated, prepared.options, prompt_hash=hash_)


def _option(text: str, options: Sequence[str]) -> str:
    """The option that a reply spells, whatever its case and closing punctuation; else the reply."""
    spelled = text.strip(' .!"\'*').casefold()
    return next((option for option in options if option.casefold() == spelled), text)


def _confidence(choice: dict[str, Any]) -> float | None:
    """Mean probability of the tokens; None if the server does not tell."""
    tokens = (choice.get('logprobs') or {}).get('content') or []
    probabilities = [math.exp(min(float(token['logprob']), 0.0)) for token in tokens]
    return sum(probabilities) / len(probabilities) if probabilities else None


def _seconds(text: str) -> float:
    try:
        return max(float(text), 0.0)
    except ValueError:
        return 0.0


def _advice(status: int) -> str:
    if status in (401, 403):
        return 'Name the environment variable that holds the key with --server-key-env.'
    return 'Check the URL (without /chat/completions) and the name of the model.'


def _shown(text: bytes) -> str:
    return repr(text[:300].decode(errors='replace'))
