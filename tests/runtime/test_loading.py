"""From a bundle to an assistant: both engines or neither."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_models

from mobilevlm_ros.errors import BundleMissingError, EngineError
from mobilevlm_ros.runtime import loading
from mobilevlm_ros.runtime.bundle import file_entry, open_bundle, write_description
from mobilevlm_ros.runtime.loading import (
    check_memory,
    fake_assistant,
    load_assistant,
    load_assistant_from,
    warm_up,
)
from mobilevlm_ros.runtime.vision.opening import open_engine
from mobilevlm_ros.types import Frame, Question, ResultCode

FRAME = Frame(np.full((8, 8, 3), 128, np.uint8))


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / 'bundle'))


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Put other content where the description says that it belongs."""
    description = open_bundle(path).description
    (path / name).write_bytes(content)
    description['files'][name] = file_entry(path / name)
    write_description(path, description)


def test_a_bundle_becomes_an_assistant(tiny_bundle: Path) -> None:
    assistant = load_assistant_from(tiny_bundle)

    assert assistant.ask(Question('what?', max_tokens=3), FRAME).success
    assert assistant.model_id == open_bundle(tiny_bundle).model_id
    assistant.close()


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleMissingError):
        load_assistant_from(tmp_path / 'nothing')


def test_options_of_the_start_win_over_the_bundle(tiny_bundle: Path) -> None:
    assistant = load_assistant(open_bundle(tiny_bundle), n_threads=2, frame_cache=0)

    options = assistant.language._options  # type: ignore[attr-defined]
    assert (options.n_threads, options.n_threads_batch, options.frame_cache) == (2, 2, 0)
    assert '2 threads' in assistant._vision.description
    assistant.close()


class VisionWatch:
    """Remembers every vision engine that was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        self.alive: list[weakref.ref[Any]] = []

        def make(*args: Any, **options: Any) -> Any:
            engine: Any = open_engine(*args, **options)
            self.made.append(engine)
            self.alive.append(weakref.ref(engine._session))
            return engine

        monkeypatch.setattr(loading, 'open_engine', make)

    def all_closed(self) -> bool:
        gc.collect()
        return all(session() is None for session in self.alive)


def test_a_bad_language_model_frees_the_vision_engine(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = VisionWatch(monkeypatch)
    replace_file(bundle_copy, 'language.gguf', b'no model')

    with pytest.raises(EngineError, match=r'language\.gguf'):
        load_assistant_from(bundle_copy)

    assert len(watch.made) == 1
    assert watch.all_closed()


def test_a_bad_vision_engine_is_an_error(bundle_copy: Path) -> None:
    replace_file(bundle_copy, 'vision.onnx', b'no model')

    with pytest.raises(EngineError, match=r'vision\.onnx'):
        load_assistant_from(bundle_copy)


def test_a_bad_adapter_frees_the_vision_engine(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = VisionWatch(monkeypatch)
    description = open_bundle(bundle_copy).description
    (bundle_copy / 'adapter.gguf').write_bytes(b'no adapter')
    description['language']['adapter'] = 'adapter.gguf'
    description['files']['adapter.gguf'] = file_entry(bundle_copy / 'adapter.gguf')
    write_description(bundle_copy, description)

    with pytest.raises(EngineError, match=r'LoRA adapter .*adapter\.gguf'):
        load_assistant_from(bundle_copy)

    assert watch.all_closed()


def test_a_mixed_bundle_is_refused_and_freed(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = VisionWatch(monkeypatch)
    tiny_models.write_gguf(bundle_copy / 'other.gguf', tiny_models.TinyLlama(n_embd=32, n_heads=2))
    replace_file(bundle_copy, 'language.gguf', (bundle_copy / 'other.gguf').read_bytes())

    with pytest.raises(EngineError, match='64 wide, the language model takes 32'):
        load_assistant_from(bundle_copy)

    assert watch.all_closed()


@pytest.mark.parametrize(('key', 'value'), [('image_size', 64), ('n_tokens', 9)])
def test_a_vision_engine_that_is_not_the_described_one_is_refused(bundle_copy: Path, key: str, value: int) -> None:
    description = open_bundle(bundle_copy).description
    description['vision'][key] = value
    write_description(bundle_copy, description)

    with pytest.raises(EngineError, match=f'says .*{value}'):
        load_assistant_from(bundle_copy)


def test_too_little_memory_is_told_before_anything_loads(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = VisionWatch(monkeypatch)
    memory = psutil.virtual_memory()._replace(available=100 << 20)
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: memory)

    with pytest.raises(EngineError, match='needs about 256 MiB of memory, 100 MiB are free'):
        load_assistant_from(tiny_bundle)

    assert watch.made == []


def test_enough_memory_is_enough(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=260 << 20)
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: memory)

    check_memory(open_bundle(tiny_bundle))


def test_warming_up_leaves_nothing_behind(tiny_bundle: Path) -> None:
    assistant = load_assistant_from(tiny_bundle)

    warm_up(assistant)

    assert assistant.language.n_past == 0
    assert not assistant.ask(Question('what?', max_tokens=1), FRAME).timing.vision_reused
    assistant.close()


def test_warming_up_a_broken_engine_is_an_error(tiny_bundle: Path) -> None:
    assistant = load_assistant_from(tiny_bundle)
    assistant._vision.close()

    with pytest.raises(EngineError, match='failed its warm-up: the vision engine is closed'):
        warm_up(assistant)

    assistant.close()


def test_the_fake_says_that_it_is_fake() -> None:
    answer = fake_assistant(token_s=0.0).ask(Question('what?'), FRAME)

    assert answer.result_code is ResultCode.OK
    assert answer.text.startswith('fake answer')
    assert answer.model_id == 'fake'
