"""What nano's manifest says of its answers is in its bundle."""

from __future__ import annotations

from typing import Any

from tiny_nano import NanoWorkshop

from mobilevlm_ros.types import AnswerFormat


def test_limits_and_temperatures_of_confidence_reach_the_bundle(nano_workshop: NanoWorkshop) -> None:
    assert 'answers' not in nano_workshop.build().description
    manifest: dict[str, Any] = {'min_confidence': {'yes_no': 0.7}, 'temperature': {'yes_no': 1.5}}
    nano_workshop.manifest_path.write_text(nano_workshop.manifest_path.read_text() + f'answers: {manifest}\n')

    built = nano_workshop.build()
    assert built.min_confidence() == {AnswerFormat.YES_NO: 0.7}
    assert built.temperature() == {AnswerFormat.YES_NO: 1.5}
