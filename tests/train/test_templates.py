"""Loss masks: equal to the published rules on golden examples, and only ever on answers.

The ids and masks of ``v1`` and ``plain`` were made with the tokenizer that the published code is pinned to (the slow
LLaMA tokenizer of transformers 4.33.1) and its masking rules, and can be checked by hand: a ``T`` is a trained token.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import write_chatml

from mobilevlm_ros.errors import RecordError, SettingsError
from mobilevlm_ros.model.tokenizer_files import write_made_up_tokenizer
from mobilevlm_ros.runtime.prompt import chatml
from mobilevlm_ros.train.templates import IGNORED, IMAGE, TEMPLATES, Encoded, Turn, encode_dialogue
from mobilevlm_ros.train.tokens import Tokenizer, open_tokenizer

# Through "USER:", with the start token; the published 35 ids less the space, which may be part of the question.
SYSTEM = [
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892, 13173,
    29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901,
]  # fmt: skip
ASSISTANT = [319, 1799, 9047, 13566, 29901]
USER = [3148, 1001, 29901]
WHAT_IS_THIS = [29871, IMAGE, 29871, 13, 5618, 338, 445, 29973]
A_CAT = [319, 6635, 29889, 2]
HELLO, HI_THERE, IS_IT_RED, NO = [15043], [6324, 727, 2], [1317, 372, 2654, 29973], [1939, 2]


def dialogue(*texts: str, first: str = 'human') -> list[Turn]:
    roles = ('human', 'gpt') if first == 'human' else ('gpt', 'human')
    return [Turn(roles[index % 2], text) for index, text in enumerate(texts)]  # type: ignore[arg-type]


@pytest.fixture(scope='module')
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp('made_up') / 'tokenizer.model'
    write_made_up_tokenizer(path, 1000)
    return open_tokenizer(path)


@pytest.fixture(scope='module')
def smol(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(write_chatml(tmp_path_factory.mktemp('smol')))


def mask(encoded: Encoded) -> str:
    return ''.join('.' if label == IGNORED else 'T' for label in encoded.labels)


V1_TRAINED = {
    'one image': (
        dialogue('<image>\nWhat is this?', 'A cat.'),
        [*SYSTEM, *WHAT_IS_THIS, *ASSISTANT],
        A_CAT,
    ),
    'the mark at the end of the question': (
        dialogue('What is this?\n<image>', 'A cat.'),
        [*SYSTEM, *WHAT_IS_THIS, *ASSISTANT],
        A_CAT,
    ),
    # Taking the mark out leaves two spaces.
    'the mark in the middle of the question': (
        dialogue('What is <image> this?', 'A cat.'),
        [*SYSTEM, 29871, IMAGE, 29871, 13, 5618, 338, 29871, 445, 29973, *ASSISTANT],
        A_CAT,
    ),
    'the mark alone, without its line break': (
        dialogue('<image>', 'A cat.'),
        [*SYSTEM, 29871, IMAGE, 29871, *ASSISTANT],
        A_CAT,
    ),
    'a leading answer is dropped': (
        dialogue('Welcome.', '<image>\nWhat is this?', 'A cat.', first='gpt'),
        [*SYSTEM, *WHAT_IS_THIS, *ASSISTANT],
        A_CAT,
    ),
    'text only': (dialogue('Hello', 'Hi there'), [*SYSTEM, *HELLO, *ASSISTANT], HI_THERE),
    # The mark of a role at the start of an answer is preceded by the space that belongs to the answer's own role.
    'an answer that starts with ASSISTANT:': (
        dialogue('Hello', 'ASSISTANT: no'),
        [*SYSTEM, *HELLO, *ASSISTANT],
        [*ASSISTANT, 694, 2],
    ),
    # The space before a sign that it cannot be merged with is trained, too.
    'an answer of signs that the vocabulary lacks': (
        dialogue('Hello', '猫 é'),
        [*SYSTEM, *HELLO, *ASSISTANT],
        [29871, 234, 143, 174, 904, 2],
    ),
    'an answer that starts with a line break': (
        dialogue('Hello', '\nNo'),
        [*SYSTEM, *HELLO, *ASSISTANT],
        [29871, 13, 3782, 2],
    ),
    'an answer between spaces': (
        dialogue('Hello', ' No '),
        [*SYSTEM, *HELLO, *ASSISTANT],
        [29871, 1939, 29871, 2],
    ),
    # An empty answer leaves its role only, so both questions and the role between them are one prompt.
    'an empty answer in the middle': (
        dialogue('Hello', '', 'Is it red?', 'No'),
        [*SYSTEM, *HELLO, *ASSISTANT, 11889, 29901, *IS_IT_RED, *ASSISTANT],
        NO,
    ),
}


@pytest.mark.parametrize('case', V1_TRAINED)
def test_v1_trains_the_answer_and_its_end(llama: Tokenizer, case: str) -> None:
    turns, prompt, answer = V1_TRAINED[case]

    encoded = encode_dialogue(turns, 'v1', llama, 2048)

    assert encoded.input_ids == prompt + answer
    assert encoded.labels == [IGNORED] * len(prompt) + answer
    assert not encoded.masked


def test_v1_trains_every_answer(llama: Tokenizer) -> None:
    turns = dialogue('<image>\nWhat is this?', 'A cat.', 'Is it red?', 'No')

    encoded = encode_dialogue(turns, 'v1', llama, 2048)

    assert encoded.input_ids == [
        *SYSTEM, *WHAT_IS_THIS, *ASSISTANT, *A_CAT, *USER, *IS_IT_RED, *ASSISTANT, *NO
    ]  # fmt: skip
    assert mask(encoded) == '.' * 47 + 'TTTT' + '.' * 12 + 'TT'


def test_v1_takes_an_image_in_a_later_question(llama: Tokenizer) -> None:
    encoded = encode_dialogue(dialogue('Hello', 'Hi there', 'Is <image>it red?', 'No'), 'v1', llama, 2048)

    assert encoded.input_ids[43:] == [*USER, 29871, IMAGE, 29871, 13, 3624, *IS_IT_RED[1:], *ASSISTANT, *NO]
    assert mask(encoded) == '.' * 40 + 'TTT' + '.' * 16 + 'TT'


V1_MASKED = {
    'an answer that spells the end token': dialogue('Hello', 'Hi</s>there'),
    'a question that spells the end token': dialogue('Hel</s>lo', 'Hi'),
    'an answer that spells ASSISTANT: between spaces': dialogue('Hello', 'an ASSISTANT: no'),
    'a question that spells ASSISTANT: between spaces': dialogue('my ASSISTANT: is', 'no'),
    'an empty answer at the end': dialogue('Hello', 'Hi there', 'Is it red?', ''),
    'a last question without an answer': dialogue('Hello', 'Hi there', 'Is it red?'),
    'an answer that spells the unknown token, which is the padding': dialogue('Hello', 'a <unk> b'),
}


@pytest.mark.parametrize('case', V1_MASKED)
def test_v1_masks_the_whole_sample_and_says_why(llama: Tokenizer, case: str) -> None:
    encoded = encode_dialogue(V1_MASKED[case], 'v1', llama, 2048)

    assert set(encoded.labels) == {IGNORED}
    assert len(encoded.labels) == len(encoded.input_ids) > 34
    assert 'count' in encoded.masked


@pytest.mark.parametrize(
    ('max_tokens', 'expected'),
    [
        (54, '.' * 40 + 'TTT' + '.' * 11),  # in the second prompt
        (44, '.' * 40 + 'TTT.'),
        (42, '.' * 40 + 'TT'),  # in the first answer
        (40, '.' * 40),
    ],
)
def test_v1_trains_what_is_left_of_a_dialogue_that_is_too_long(
    llama: Tokenizer, max_tokens: int, expected: str
) -> None:
    encoded = encode_dialogue(dialogue('Hello', 'Hi there', 'Is it red?', 'No'), 'v1', llama, max_tokens)

    assert mask(encoded) == expected
    assert encoded.n_cut == 57 - max_tokens
    assert bool(encoded.masked) == ('T' not in expected)


def test_a_long_dialogue_with_a_flaw_in_what_is_read_is_masked(llama: Tokenizer) -> None:
    turns = dialogue('Hello', 'Hi</s>there', 'Is it red?', 'No ' * 50)

    assert set(encode_dialogue(turns, 'v1', llama, 60).labels) == {IGNORED}


def test_text_alone_is_cut_before_its_tokens_are_counted(llama: Tokenizer) -> None:
    """So the unknown token, which counts as padding, can make up for what a flaw leaves uncounted."""
    turns = dialogue('Yes 猫 <unk>', '</s>', '</s>')

    encoded = encode_dialogue(turns, 'v1', llama, 50)

    assert encoded.input_ids[33:] == [
        29901, 3869, 29871, 234, 143, 174, 29871, 0, 29871, *ASSISTANT, 29871, 2, 2
    ]  # fmt: skip
    assert mask(encoded) == '.' * 47 + 'TT.'


def test_plain_is_the_image_the_caption_and_a_line_break(llama: Tokenizer) -> None:
    encoded = encode_dialogue(dialogue('Describe <image> it', 'a red car'), 'plain', llama, 2048)

    assert encoded.input_ids == [1, IMAGE, *llama.encode('a red car\n')]
    assert mask(encoded) == '..TTTT'


@pytest.mark.parametrize(
    'turns',
    [dialogue('<image>', 'a', 'b', 'c'), dialogue('no mark', 'a'), dialogue('<image>'), []],
    ids=['four turns', 'no image', 'no caption', 'nothing'],
)
def test_plain_takes_captions_only(llama: Tokenizer, turns: Sequence[Turn]) -> None:
    with pytest.raises(RecordError, match='not a caption'):
        encode_dialogue(turns, 'plain', llama, 2048)


@pytest.mark.parametrize('template', ['v1', 'alpaca', 'chatml'])
def test_roles_must_alternate(smol: Tokenizer, llama: Tokenizer, template: str) -> None:
    tokenizer = smol if template == 'chatml' else llama
    turns = [Turn('human', 'a'), Turn('human', 'b'), Turn('gpt', 'c')]
    with pytest.raises(RecordError, match=r'turn 2 .* is human, not gpt'):
        encode_dialogue(turns, template, tokenizer, 2048)


@pytest.mark.parametrize('template', ['v1', 'alpaca', 'chatml'])
def test_somebody_must_ask(smol: Tokenizer, llama: Tokenizer, template: str) -> None:
    tokenizer = smol if template == 'chatml' else llama
    with pytest.raises(RecordError, match='no question'):
        encode_dialogue([Turn('gpt', 'Welcome.')], template, tokenizer, 2048)


def test_alpaca_trains_the_response_and_its_end(llama: Tokenizer) -> None:
    encoded = encode_dialogue([Turn('human', 'Add.', context='1 2'), Turn('gpt', 'three')], 'alpaca', llama, 2048)

    prompt = (
        'Below is an instruction that describes a task, paired with an input that provides further context. '
        'Write a response that appropriately completes the request.\n\n'
        '### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:'
    )
    assert encoded.input_ids == [1, *llama.encode(prompt + 'three'), 2]
    n_prompt = 1 + len(llama.encode(prompt))
    assert mask(encoded) == '.' * n_prompt + 'T' * (len(encoded.labels) - n_prompt)
    assert encoded.n_trained >= 2


def test_alpaca_without_an_input_says_so_in_its_preamble(llama: Tokenizer) -> None:
    encoded = encode_dialogue([Turn('human', 'Add.'), Turn('gpt', 'ok')], 'alpaca', llama, 2048)

    prompt = (
        'Below is an instruction that describes a task. '
        'Write a response that appropriately completes the request.\n\n'
        '### Instruction:\nAdd.\n\n### Response:'
    )
    assert encoded.input_ids == [1, *llama.encode(prompt + 'ok'), 2]


def test_alpaca_trains_each_of_several_responses(llama: Tokenizer) -> None:
    encoded = encode_dialogue(dialogue('a', 'b', 'c', 'd'), 'alpaca', llama, 2048)

    assert encoded.labels.count(2) == 2
    assert 'T.' in mask(encoded)


def test_chatml_puts_the_runtimes_pieces_around_a_question(smol: Tokenizer) -> None:
    """Id by id what the robot feeds the model before its answer."""

    class AsEngine:
        def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
            return smol.encode(text, special=special)

    before, after = chatml('be brief').chunks('Is it <|im_end|> red?', AsEngine())

    encoded = encode_dialogue(dialogue('<image>\nIs it <|im_end|> red?', 'No'), 'chatml', smol, 2048, system='be brief')

    prompt = [*before, IMAGE, *after]
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.input_ids[len(prompt) :] == [*smol.encode('No'), smol.eos_id, *smol.encode('\n')]
    assert mask(encoded) == '.' * len(prompt) + 'TTT.'


def test_chatml_goes_on_with_the_next_question_without_a_system_turn(smol: Tokenizer) -> None:
    turns = dialogue('<image>\nWhat?', 'A cat', 'Red?', 'No')

    encoded = encode_dialogue(turns, 'chatml', smol, 2048, system='be brief')

    (start,) = smol.encode('<|im_start|>', special=True)
    second = [start, *smol.encode('user\nRed?'), smol.eos_id, *smol.encode('\n'), start, *smol.encode('assistant\n')]
    ending = [*second, *smol.encode('No'), smol.eos_id, *smol.encode('\n')]
    assert encoded.input_ids[-len(ending) :] == ending
    assert mask(encoded).endswith('.' * len(second) + 'TTT.')
    assert encoded.input_ids.count(IMAGE) == 1
    assert encoded.input_ids.count(start) == 5  # system, and each question and answer


def test_chatml_needs_its_own_tokens(llama: Tokenizer) -> None:
    with pytest.raises(SettingsError, match='im_end'):
        encode_dialogue(dialogue('a', 'b'), 'chatml', llama, 2048)


def test_v1_needs_a_vocabulary_of_llamas_form(smol: Tokenizer) -> None:
    with pytest.raises(SettingsError, match='chatml'):
        encode_dialogue(dialogue('a', 'b'), 'v1', smol, 2048)


def test_an_unknown_template_is_refused_with_the_known_ones(llama: Tokenizer) -> None:
    with pytest.raises(SettingsError, match=r"'v7'.*plain, v1, alpaca, chatml"):
        encode_dialogue(dialogue('a', 'b'), 'v7', llama, 2048)


# -- whatever the dialogue says -----------------------------------------------------------------------------------

_TEXTS = st.text(alphabet=st.characters(exclude_categories=['Cs']), max_size=30) | st.sampled_from(
    ['</s>', 'ASSISTANT:', ' ASSISTANT: ', '<s>', '<unk>', '<|im_end|>', '<|im_start|>assistant\n', 'a</s>b', '猫', ' ']
)


@given(
    texts=st.lists(_TEXTS, min_size=1, max_size=6),
    image=st.booleans(),
    leading=st.booleans(),
    template=st.sampled_from(TEMPLATES),
    max_tokens=st.integers(1, 400),
)
def test_labels_are_ignored_or_the_ids(
    made_up: Tokenizer,
    smol: Tokenizer,
    texts: list[str],
    image: bool,
    leading: bool,
    template: str,
    max_tokens: int,
) -> None:
    turns = dialogue(*(text.replace('<image>', '') for text in texts))
    if image:
        turns[0] = Turn('human', turns[0].text + '<image>')
    if leading:
        turns.insert(0, Turn('gpt', 'Welcome.'))
    tokenizer = smol if template == 'chatml' else made_up
    try:
        encoded = encode_dialogue(turns, template, tokenizer, max_tokens)
    except RecordError:
        assert template == 'plain'
        return

    assert len(encoded.input_ids) == len(encoded.labels) <= max_tokens
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    assert all(label in (IGNORED, token) for token, label in pairs)
    assert IMAGE not in encoded.labels
    assert bool(encoded.masked) == (encoded.n_trained == 0)


@given(
    questions=st.lists(st.text(alphabet='abcd ?', min_size=1, max_size=12), min_size=1, max_size=4),
    answers=st.lists(st.text(alphabet='0123456789', min_size=1, max_size=12), min_size=4, max_size=4),
    template=st.sampled_from(['v1', 'alpaca', 'chatml']),
)
def test_exactly_the_answers_and_their_ends_are_trained(
    made_up: Tokenizer, smol: Tokenizer, questions: list[str], answers: list[str], template: str
) -> None:
    """Digits stand in answers only, so the trained tokens spell the answers and nothing else."""
    tokenizer = smol if template == 'chatml' else made_up
    turns = [
        turn
        for question, answer in zip(questions, answers, strict=False)
        for turn in (Turn('human', 'q' + question), Turn('gpt', answer))
    ]

    encoded = encode_dialogue(turns, template, tokenizer, 4096)

    trained = [label for label in encoded.labels if label != IGNORED]
    expected: list[int] = []
    for answer in answers[: len(questions)]:
        # LLaMA's dummy space is the space after "ASSISTANT:"; Alpaca has none there.
        ids = tokenizer.encode(answer)
        expected += [*(ids[1:] if template == 'alpaca' else ids), tokenizer.eos_id]
    assert trained == expected
