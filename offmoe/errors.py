"""The exceptions that a user can meet. Every message says what happened and what to do about it.

OffmoeError                  base of all errors below                          exit status 1
├── ConfigError              an option or its value cannot be used             exit status 2
├── CheckpointError          the model's files are damaged or contradictory
│   ├── MissingTensorError   a tensor or shard that the model needs is absent
│   ├── UnsupportedModelError the architecture or format is not one offmoe runs
│   └── ShardChangedError    a shard was replaced or truncated while in use
├── CapacityError            the model does not fit: memory, slots or context
├── TransferError            moving an expert failed (disk, pinning, copy)
└── TraceError               a routing trace cannot be read, or does not fit

Bugs of offmoe itself show as assertions instead.
"""

CLOSED = "the model was closed; load it again with from_pretrained."
"""What a model that was closed says when it is asked for more."""


class OffmoeError(Exception):
    """Base of all errors that offmoe raises on purpose. `exit_status` is the exit status of the command line.

    A message is one line, also where it quotes a library whose messages are not.
    """

    exit_status = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(line.strip() for line in str(message).splitlines()))


class ConfigError(OffmoeError):
    """An option or its value cannot be used; the message names the option and what would work."""

    exit_status = 2


class CheckpointError(OffmoeError):
    """The checkpoint's files are damaged or contradict each other."""


class MissingTensorError(CheckpointError):
    """A tensor or a shard that the model needs is absent."""


class UnsupportedModelError(CheckpointError):
    """The architecture, file format or quantization is not one that offmoe runs."""


class ShardChangedError(CheckpointError):
    """A shard is no longer the file that was opened."""


class CapacityError(OffmoeError):
    """The model does not fit. The message has the sizes and the smallest that would work."""


class TransferError(OffmoeError):
    """Moving an expert failed. Raised when the expert is needed."""


class TraceError(OffmoeError):
    """A routing trace is unreadable, or of another model than it is used with."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out.

    That is Python's MemoryError, torch's OutOfMemoryError (told by its name, since torch may not be imported), or a
    RuntimeError with the text of torch's CPU allocator or of Python's thread start.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    texts = ("can't allocate memory", "can't start new thread")
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
