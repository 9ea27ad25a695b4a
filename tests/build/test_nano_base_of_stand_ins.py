"""What nano's training starts from, made of the stand-ins for its packages: the same conversation as nano's bundle."""

from __future__ import annotations

import pytest
from tiny_nano import NanoWorkshop

from mobilevlm_ros.build.published import CheckpointTokenizer, load_source
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.runtime.loading import load_assistant
from mobilevlm_ros.runtime.prompt import described_template
from mobilevlm_ros.train.nano_base import write_nano_base


@pytest.mark.parametrize('system', ['', 'Be brief.'])
def test_the_base_names_the_conversation_of_the_manifest(nano_workshop: NanoWorkshop, system: str) -> None:
    """Built into a bundle, it would be asked with the tokens that nano is asked with."""
    nano_workshop.change_manifest(prompt={'template': 'chatml', 'system': system})
    base = write_nano_base(nano_workshop.root / 'base', packages=nano_workshop.packages)
    source = load_source(str(base), nano_workshop)

    with open_checkpoint(base) as opened:
        assert (opened.config.template, opened.config.system) == ('chatml', system)
    template = described_template(source.prompt)
    found = template.chunks('What is it?', CheckpointTokenizer(base / 'tokenizer.json'))
    if not system:
        nano = nano_workshop.build()
        assistant = load_assistant(nano)
        try:
            assert found == nano.template().chunks('What is it?', assistant.language)
        finally:
            assistant.close()
