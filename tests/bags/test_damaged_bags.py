"""A bag comes from elsewhere: whatever its bytes are, there are frames or a named error, and nothing else."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import bag_writing as writing
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilevlm_ros.bags import open_bag
from mobilevlm_ros.errors import BadImageError, BagError

FORMS = [('mcap', ''), ('mcap', 'storage'), ('mcap', 'message'), ('sqlite3', ''), ('sqlite3', 'file'), ('mcap', 'file')]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(path: Path) -> int:
    """How many frames decode; anything but a ``BagError`` on the way is a bug."""
    n_good = 0
    try:
        with open_bag(path) as bag:
            for frame in bag.frames():
                with suppress(BadImageError):
                    n_good += frame.decode().ndim == 3
    except BagError as error:
        assert str(path) in str(error), 'the error names the bag'
    return n_good


@pytest.fixture(scope='module')
def bags(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp('bags')
    pictures = writing.pictures(3, (12, 8))
    messages = [*writing.stream('/a', pictures), *writing.stream('/b', pictures, compressed=True)]
    made = {}
    for storage, compression in FORMS:
        path = folder / f'{storage}{compression}'
        made[storage, compression] = writing.write_bag(
            path,
            messages,
            storage=storage,
            compression=compression,  # type: ignore[arg-type]
        )
    return made


def damaged(bags: dict[Any, Path], form: Any, tmp_path: Path, data: bytes) -> Path:
    """The file alone, with other bytes."""
    path = tmp_path / writing.storage_file(bags[form]).name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize('form', FORMS)
def test_the_undamaged_file_gives_all_frames(bags: dict[Any, Path], form: Any, tmp_path: Path) -> None:
    whole = writing.storage_file(bags[form]).read_bytes()
    assert read_all(damaged(bags, form, tmp_path, whole)) == 6


@pytest.mark.parametrize('form', FORMS)
@quick
@given(share=st.floats(0, 1))
def test_cut_files(bags: dict[Any, Path], form: Any, tmp_path: Path, share: float) -> None:
    whole = writing.storage_file(bags[form]).read_bytes()
    assert read_all(damaged(bags, form, tmp_path, whole[: int(len(whole) * share)])) <= 6


@pytest.mark.parametrize('form', FORMS)
@quick
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=20))
def test_flipped_bytes(bags: dict[Any, Path], form: Any, tmp_path: Path, flips: list[tuple[float, int]]) -> None:
    data = bytearray(writing.storage_file(bags[form]).read_bytes())
    for where, mask in flips:
        data[int(where * len(data))] ^= mask
    read_all(damaged(bags, form, tmp_path, bytes(data)))


@quick
@given(text=st.binary(max_size=200))
def test_metadata_of_any_bytes(bags: dict[Any, Path], tmp_path: Path, text: bytes) -> None:
    (tmp_path / 'metadata.yaml').write_bytes(text)
    assert read_all(tmp_path) == 0


@quick
@given(message=st.binary(max_size=300), is_raw=st.booleans())
def test_messages_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, message: bytes, is_raw: bool) -> None:
    type_name = 'sensor_msgs/msg/Image' if is_raw else 'sensor_msgs/msg/CompressedImage'
    path = tmp_path_factory.mktemp('any') / 'b'
    writing.write_bag(path, [writing.Message('/a', writing.START_NS, message, type_name)])
    assert read_all(path) == 0
