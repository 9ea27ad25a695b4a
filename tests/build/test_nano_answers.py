"""What nano's manifest says of its answers is in its bundle."""

from __future__ import annotations

from typing import Any

from tiny_nano import NanoWorkshop

from mobilevlm_ros.types import AnswerFormat


def test_limits_of_confidence_reach_the_bundle(nano_workshop: NanoWorkshop) -> None:
    assert 'answers' not in nano_workshop.build().description
    manifest: dict[str, Any] = {'min_confidence': {'yes_no': 0.7}}
    nano_workshop.manifest_path.write_text(nano_workshop.manifest_path.read_text() + f'answers: {manifest}\n')

    assert nano_workshop.build().min_confidence() == {AnswerFormat.YES_NO: 0.7}
