"""The error tree. Foreign exceptions are translated into it once, at the edge, with ``from``.

HiredError
├── ConfigurationError     the caller asked for something that cannot be done; stops a job at once
│   └── ModelError         a checkpoint that is missing, incomplete or of an unsupported family
├── ImageError             one image cannot be used; the row becomes a dead letter, the job goes on
│   ├── UnreadableImageError   the bytes are not a picture that can be decoded
│   └── ImageTooLargeError     the header announces more pixels than the limit allows
├── GenerationError        one prompt could not be answered; the row becomes a dead letter
│   ├── PromptError        the prompt cannot be written as the model was trained to read it
│   └── CapacityError      the prompt does not fit the model's context or the memory at hand
└── EngineDeadError        the engine failed as a whole; its process must end and start again
"""

from __future__ import annotations


class HiredError(Exception):
    """The root of every error that this project raises on purpose.

    ``retryable`` says whether the same input may succeed on another attempt; dead letters record it.
    """

    retryable: bool = False


class ConfigurationError(HiredError):
    """Wrong options, arguments or files; the message names the thing and the mend."""


class ModelError(ConfigurationError):
    """A checkpoint that is missing, incomplete, or of a family that is not supported."""


class ImageError(HiredError):
    """One image cannot be used; its neighbours can."""


class UnreadableImageError(ImageError):
    """The bytes are empty, truncated, of an unknown format, or refused by the decoder."""


class ImageTooLargeError(ImageError):
    """The header announces more pixels than the limit; nothing was decoded."""


class GenerationError(HiredError):
    """One prompt could not be answered; its neighbours can."""


class PromptError(GenerationError):
    """The prompt holds what it must not, or the checkpoint's chat template cannot write it."""


class CapacityError(GenerationError):
    """The prompt does not fit the model's context or the memory at hand."""


class EngineDeadError(HiredError):
    """The engine failed as a whole and answers nothing any more; another one may be asked the same."""

    retryable = True
