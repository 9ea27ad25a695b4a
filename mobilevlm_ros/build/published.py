"""A checkpoint in the published layout as a source of bundles: any MobileVLM or LLaVA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.profile import Profile
from mobilevlm_ros.build.record import n_language_parameters, record_reference
from mobilevlm_ros.build.reference import write_reference
from mobilevlm_ros.build.stages import Reporter, Workshop
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import ProjectorConfig, VisionConfig
from mobilevlm_ros.model.conversation import taught_by
from mobilevlm_ros.runtime.bundle import sha256_of
from mobilevlm_ros.runtime.preprocess import Aspect
from mobilevlm_ros.runtime.prompt import described_template

if TYPE_CHECKING:
    from mobilevlm_ros.model.checkpoint import Checkpoint

__all__ = ['CheckpointSource', 'CheckpointTokenizer', 'load_source']

_F16 = 'language-f16.gguf'
_EXACT = 'F32'
"""Nothing that llama.cpp quantises to, but what compares with PyTorch to the last digit."""
_HASHED = ('.bin', '.safetensors', '.json', '.model')


class CheckpointSource:
    """See the module; implements ``bundle_build.Source``.

    :param adapter: folder of a LoRA adapter as peft saves it; None: none.
    :raise BuildError: if the checkpoint holds a language model alone.
    :raise CheckpointError: if the adapter names a conversation that there is not.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: Path | None = None) -> None:
        config = checkpoint.config if adapter is None else taught_by(adapter, checkpoint.config)
        if config.vision is None or config.projector is None:
            raise BuildError(
                f'{checkpoint.path} holds a language model alone; a bundle needs a vision tower and a projector, too. '
                'Give the folder of a MobileVLM.'
            )
        self._checkpoint = checkpoint
        self._config = config
        self._adapter = adapter
        self.name = config.name
        self.warning = config.warning
        self.vision: VisionConfig = config.vision
        self.projector: ProjectorConfig = config.projector
        self.n_embd = config.language.n_embd
        self.n_ctx = config.language.n_ctx
        self.aspect: Aspect = config.aspect
        self.prompt: dict[str, str] = {'template': config.template}
        self.answers: dict[str, Any] = {}
        if config.system:
            self.prompt['system'] = config.system

    def identity(self) -> list[str]:
        """Names and hashes of all that goes in.

        :raise BuildError: if there is no such adapter.
        """
        files = sorted(path for path in self._checkpoint.path.iterdir() if path.suffix in _HASHED and path.is_file())
        if self._adapter is not None:
            if not self._adapter.is_dir():
                raise BuildError(f'there is no folder {self._adapter}: expected one that peft saved an adapter in')
            files += sorted(
                path for path in self._adapter.iterdir() if path.suffix in ('.bin', '.safetensors', '.json')
            )
        return [f'{path.name} {sha256_of(path)[:16]}' for path in files]

    def vision_weights(self) -> Mapping[str, NDArray[np.float32]]:
        """Tensors of tower and projector."""
        return self._checkpoint.vision_weights

    def room_bytes(self, profile: Profile) -> int:
        """What the language model takes on disk while it is made, and the bundle's own file.

        :raise BuildError: if there is no such quantisation.
        """
        from mobilevlm_ros.build.quantize import check_quantization, predicted_bytes

        language = self._config.language
        if profile.quantization == _EXACT:
            return 2 * predicted_bytes(language, 'F16')
        check_quantization(profile.quantization)
        return predicted_bytes(language, 'F16') + predicted_bytes(language, profile.quantization)

    def memory_bytes(self) -> int:
        """PyTorch's copy of the language model in its smallest form, or of the tower and its graph."""
        language = 2 * n_language_parameters(self._config.language)
        vision = 12 * (
            self.vision.n_blocks * (4 * self.vision.width**2 + 2 * self.vision.width * self.vision.mlp_width)
        )
        return max(language, vision) + (1 << 30)

    def kv_bytes(self, n_ctx: int) -> int:
        """Keys and values in float16."""
        language = self._config.language
        return 4 * language.n_layers * language.n_kv_heads * language.head_width * n_ctx

    def build_language(self, workshop: Workshop, profile: Profile, inputs: Sequence[object]) -> dict[str, Any]:
        """Make ``language.gguf``, and ``adapter.gguf`` if there is one."""
        from mobilevlm_ros.build.language_gguf import write_language_gguf
        from mobilevlm_ros.build.quantize import quantize_gguf

        language, reporter = self._config.language, workshop.reporter

        def write(path: Path, dtype: Literal['f16', 'f32']) -> None:
            write_language_gguf(
                self._checkpoint.language_weights,
                language,
                self._checkpoint.tokenizer,
                path,
                dtype=dtype,
                name=self.name,
                on_progress=reporter.progress,
            )

        def quantize(folder: Path) -> None:
            if profile.quantization == _EXACT:
                write(folder / 'language.gguf', 'f32')
                return
            workshop.stage(
                'language-f16', 'language model in float16', inputs, [_F16], lambda f: write(f / _F16, 'f16')
            )
            workshop.reporter.step(f'language model in {profile.quantization}')
            made = quantize_gguf(
                workshop.path(_F16), folder / 'language.gguf', profile.quantization, on_progress=reporter.progress
            )
            if made.warning:
                reporter.step(f'note: {made.warning}')

        title = f'language model in {profile.quantization}'
        workshop.stage('language', title, [*inputs, profile.quantization], ['language.gguf'], quantize)
        workshop.discard('language-f16')
        part = {'file': 'language.gguf', 'quantization': profile.quantization}
        if self._adapter is not None:
            from mobilevlm_ros.build.adapter_gguf import write_adapter_gguf

            adapter = self._adapter
            workshop.stage(
                'adapter',
                'LoRA adapter',
                inputs,
                ['adapter.gguf'],
                lambda folder: write_adapter_gguf(adapter, folder / 'adapter.gguf', language),
            )
            part['adapter'] = 'adapter.gguf'
        return part

    def build_reference(
        self, workshop: Workshop, images: Sequence[NDArray[np.uint8]], inputs: Sequence[object]
    ) -> None:
        """Make ``reference.npz`` with PyTorch."""

        def record(folder: Path) -> None:
            from mobilevlm_ros.build.adapter_gguf import AdaptedWeights

            weights: Mapping[str, NDArray[np.float32]] = self._checkpoint.language_weights
            reference = record_reference(
                self._config,
                self._checkpoint.vision_weights,
                AdaptedWeights(weights, self._adapter) if self._adapter else weights,
                CheckpointTokenizer(self._checkpoint.tokenizer),
                described_template(self.prompt),
                images,
                workshop.reporter,
            )
            write_reference(folder / 'reference.npz', reference)

        title = f'PyTorch answers about {len(images)} images, to compare with'
        workshop.stage('reference', title, [*inputs, *(image.tobytes() for image in images)], ['reference.npz'], record)


class CheckpointTokenizer:
    """The checkpoint's own tokenizer as the published code uses it: each chunk of a prompt by itself.

    :raise BuildError: if the file is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.suffix == '.json':
            from tokenizers import Tokenizer

            try:
                fast = Tokenizer.from_file(str(path))
            except Exception as error:  # tokenizers raises plain Exception
                raise BuildError(f'{path} is no tokenizer.json ({error})') from error
            fast.encode_special_tokens = True  # as text: what somebody asks is no control token
            self._encode = lambda text: list(fast.encode(text, add_special_tokens=False).ids)
            self._id_of: Callable[[str], int | None] = fast.token_to_id
            self._bos = self._id_of('<s>')
            return
        import sentencepiece

        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise BuildError(f'{path} is no SentencePiece model ({error})') from error
        self._encode = lambda text: list(model.encode(text))
        self._id_of = lambda text: None if model.is_unknown(model.piece_to_id(text)) else model.piece_to_id(text)
        self._bos = model.bos_id()

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of one chunk.

        :param special: the chunk is the name of a control token.
        :raise BuildError: if it is, and the vocabulary has no such token.
        """
        start = [self._bos] if bos and self._bos is not None else []
        if not special:
            return start + (self._encode(text) if text else [])
        token = self._id_of(text)
        if token is None:
            raise BuildError(
                f'{self._path} has no token {text!r}, which the conversation of the checkpoint is written with: '
                'model and tokenizer do not belong together'
            )
        return [*start, token]


def load_source(model: str, reporter: Reporter, adapter: Path | None = None) -> CheckpointSource:
    """The source for a folder, or for a published name that was fetched.

    :raise BuildError: if there is no such folder and no such name.
    :raise CheckpointError: if it is damaged.
    """
    from mobilevlm_ros.model.checkpoint import open_checkpoint
    from mobilevlm_ros.model.fetch import fetched_path
    from mobilevlm_ros.model.manifest import known_models

    folder = Path(model)
    if not folder.is_dir():
        if model not in known_models():
            raise BuildError(
                f'{model!r} is neither a folder nor a known model; known are: nano, {", ".join(known_models())}'
            )
        folder = fetched_path(model)
    reporter.step(f'checkpoint {folder}')
    return CheckpointSource(open_checkpoint(folder), adapter)
