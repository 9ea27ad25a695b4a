"""The record of what PyTorch computes: written, read back, and not trusted."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilevlm_ros.build.reference import Reference, ReferenceAnswer, ReferenceImage, read_reference, write_reference
from mobilevlm_ros.errors import BuildError


def make() -> Reference:
    random = np.random.default_rng(0)

    def half(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float16).astype(np.float32)

    answer = ReferenceAnswer('what is it', (1, 2), (3,), (4, 5), half(2, 11))
    pixels = random.integers(0, 255, (4, 6, 3), dtype=np.uint8)
    resized = random.integers(0, 255, (3, 8, 8), dtype=np.uint8)
    first = ReferenceImage(pixels, resized, half(4, 3), half(2, 5), (answer, answer))
    return Reference('torch', 'torch bf16', (first, ReferenceImage(pixels, resized, None, half(2, 5), ())))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    reference = make()
    write_reference(tmp_path / 'r.npz', reference)
    found = read_reference(tmp_path / 'r.npz')
    assert (found.made_by, found.language_made_by) == ('torch', 'torch bf16')
    for ours, theirs in zip(reference.images, found.images, strict=True):
        np.testing.assert_array_equal(ours.rgb_hwc, theirs.rgb_hwc)
        np.testing.assert_array_equal(ours.resized_chw, theirs.resized_chw)
        np.testing.assert_array_equal(ours.visual_tokens, theirs.visual_tokens)
        assert (ours.features is None) == (theirs.features is None)
        for a, b in zip(ours.answers, theirs.answers, strict=True):
            assert (a.question, a.before_ids, a.after_ids, a.greedy_ids) == (
                b.question,
                b.before_ids,
                b.after_ids,
                b.greedy_ids,
            )
            np.testing.assert_array_equal(a.logits, b.logits)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match='build the bundle again'):
        read_reference(tmp_path / 'none.npz')


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.floats(0, 1), value=st.integers(0, 255), cut=st.floats(0, 1))
def test_damage_is_an_error_or_harmless(tmp_path: Path, at: float, value: int, cut: float) -> None:
    write_reference(tmp_path / 'r.npz', make())
    data = bytearray((tmp_path / 'r.npz').read_bytes())
    data[int(at * (len(data) - 1))] = value
    (tmp_path / 'r.npz').write_bytes(data[: int(cut * len(data)) if cut < 0.5 else None])
    with contextlib.suppress(BuildError):
        read_reference(tmp_path / 'r.npz')
