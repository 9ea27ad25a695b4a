"""Every error that this package raises on purpose.

Each message says what was found, what was expected, and what to do about it. Errors about a question carry the result
code that the asker gets; errors about a set-up (bundle, dependency) end a start instead.
"""

from __future__ import annotations

from mobilevlm_ros.types import Frame, ResultCode

__all__ = [
    'AnswerFormatError',
    'BadImageError',
    'BadQuestionError',
    'BagDamagedError',
    'BagError',
    'BagFormatError',
    'BagMissingError',
    'BagRangeError',
    'BagTopicError',
    'BenchmarkError',
    'BuildError',
    'BundleError',
    'BundleHashError',
    'BundleIncompleteError',
    'BundleMissingError',
    'BundleVersionError',
    'BusyError',
    'CheckpointDamagedError',
    'CheckpointError',
    'CheckpointKindError',
    'CheckpointMissingError',
    'CheckpointShapeError',
    'DatasetError',
    'DatasetMissingError',
    'DatasetSyntaxError',
    'DependencyError',
    'DeviceMemoryError',
    'DiskSpaceError',
    'DivergedError',
    'EngineError',
    'EvaluationError',
    'FetchError',
    'InterruptedAnswerError',
    'MobileVLMError',
    'NoFrameError',
    'NotActiveError',
    'ParityError',
    'PlanMismatchError',
    'QuestionFileError',
    'QuestionTooLongError',
    'RecordError',
    'ServerError',
    'SettingsError',
    'StaleFrameError',
    'TrainingError',
    'UnknownCameraError',
]


class MobileVLMError(Exception):
    """Base of all errors of this package; ``code`` is what an asker is told."""

    code: ResultCode = ResultCode.ENGINE_ERROR


class SettingsError(MobileVLMError, ValueError):
    """A parameter or a configuration value cannot be used."""


class DependencyError(MobileVLMError, ImportError):
    """A library that is needed here is not installed, or is of an unusable version."""


class BuildError(MobileVLMError):
    """A bundle cannot be built: an ingredient is missing, damaged or does not fit, or there is no room."""


class DiskSpaceError(MobileVLMError):
    """There is not enough room on the disk for what is to be written."""


# -- checkpoints --------------------------------------------------------------------------------------------------


class CheckpointError(MobileVLMError):
    """A checkpoint cannot be used, or not be written."""


class CheckpointMissingError(CheckpointError):
    """A checkpoint, or one of its files, is not there."""


class CheckpointDamagedError(CheckpointError):
    """A file of a checkpoint is truncated, malformed, or not what its name says."""


class CheckpointKindError(CheckpointError):
    """A checkpoint is of another kind than was asked for: a language model alone, an adapter, quantised weights."""


class CheckpointShapeError(CheckpointError):
    """A tensor is missing, or has another shape or type than the configuration says."""


class FetchError(CheckpointError):
    """A checkpoint cannot be downloaded, or what came is not what was pinned."""


class ParityError(BuildError):
    """A bundle was built, but its engines compute something else than the model that it was built from."""


# -- training -----------------------------------------------------------------------------------------------------


class TrainingError(MobileVLMError):
    """A training run cannot start, go on or be resumed."""


class DivergedError(TrainingError):
    """The loss is no number any more."""


class DatasetError(TrainingError):
    """Training data cannot be used as it is."""


class DatasetMissingError(DatasetError):
    """A file of training data, or the folder of its images, is not there."""


class DatasetSyntaxError(DatasetError):
    """A file of training data is no JSON from some place on, so that what follows cannot be read."""


class RecordError(DatasetError):
    """One record cannot be trained on; ``kind`` is the short name of what is wrong, which reports count by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f'{kind}: {message}')
        self.kind = kind
        self.detail = message


# -- bags ---------------------------------------------------------------------------------------------------------


class BagError(MobileVLMError):
    """A recorded bag cannot be used."""


class BagMissingError(BagError):
    """There is no bag at the given place, or a file of it is not there."""


class BagFormatError(BagError):
    """A bag, or what is recorded in it, is of a kind that is not read."""


class BagDamagedError(BagError):
    """A bag is truncated, damaged, or not what its name says."""


class BagTopicError(BagError):
    """A topic is not in the bag, or holds no images."""


class BagRangeError(BagError):
    """A stretch of time makes no sense, or the bag has no frame in it."""


# -- evaluation ---------------------------------------------------------------------------------------------------


class EvaluationError(MobileVLMError):
    """An evaluation cannot start or go on, or its results cannot be read."""


class QuestionFileError(EvaluationError):
    """A file of questions has an error; the message names line, column and key."""


class BenchmarkError(MobileVLMError):
    """A file of a benchmark, or of answers to it, is missing, damaged or not in its published format."""


class ServerError(MobileVLMError):
    """A server that should answer does not, or says what no OpenAI-compatible server says."""


# -- bundles ------------------------------------------------------------------------------------------------------


class BundleError(MobileVLMError):
    """A bundle cannot be used."""


class BundleMissingError(BundleError):
    """There is no bundle at the given place."""


class BundleIncompleteError(BundleError):
    """A bundle is half-written: its description or one of its files is missing, short or malformed."""


class BundleVersionError(BundleError):
    """A bundle was written in a format that this version does not read."""


class BundleHashError(BundleError):
    """A file of a bundle is not the one that was built."""


# -- frames -------------------------------------------------------------------------------------------------------


class NoFrameError(MobileVLMError):
    """No image of the camera has arrived yet."""

    code = ResultCode.NO_FRAME


class StaleFrameError(MobileVLMError):
    """The newest image is older than the asker allows; ``frame`` is that image."""

    code = ResultCode.STALE

    def __init__(self, message: str, frame: Frame) -> None:
        super().__init__(message)
        self.frame = frame


class UnknownCameraError(MobileVLMError):
    """The camera is not configured, or none was named while there are several."""

    code = ResultCode.UNKNOWN_CAMERA


class BadImageError(MobileVLMError, ValueError):
    """An image cannot be decoded: wrong step, size or encoding, or corrupt data."""

    code = ResultCode.BAD_IMAGE


# -- questions ----------------------------------------------------------------------------------------------------


class BadQuestionError(MobileVLMError, ValueError):
    """A question is empty, or holds control characters."""

    code = ResultCode.BAD_QUESTION


class QuestionTooLongError(MobileVLMError, ValueError):
    """A prompt and the room for its answer do not fit the context of the model."""

    code = ResultCode.TOO_LONG


class AnswerFormatError(MobileVLMError, ValueError):
    """The wanted answer format is unknown, lacks its choices, or its schema is no JSON Schema."""

    code = ResultCode.BAD_FORMAT


# -- the service --------------------------------------------------------------------------------------------------


class BusyError(MobileVLMError):
    """The queue of questions is full."""

    code = ResultCode.BUSY


class NotActiveError(MobileVLMError):
    """Whoever answers is not running, or stopped while the question was open."""

    code = ResultCode.NOT_ACTIVE


class EngineError(MobileVLMError):
    """The vision or the language engine failed."""

    code = ResultCode.ENGINE_ERROR


class DeviceMemoryError(EngineError):
    """The GPU has too little free memory."""


class PlanMismatchError(EngineError):
    """A TensorRT plan was built for another TensorRT, another GPU or another graph."""


class InterruptedAnswerError(MobileVLMError):
    """Work was stopped from outside; ``code`` says by whom (CANCELED, TIMEOUT or NOT_ACTIVE)."""

    def __init__(self, code: ResultCode, message: str) -> None:
        super().__init__(message)
        self.code = code
