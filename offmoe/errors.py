"""The exceptions a user can meet; every message says what happened and what to do about it.

OffmoeError                  anything offmoe raises on purpose                 exit status 1
├── ConfigError              an option or its value cannot be used             exit status 2
├── CheckpointError          the files of the model are not what they claim
│   ├── MissingTensorError   a tensor or shard that the model needs is absent
│   ├── UnsupportedModelError the architecture or format is not one offmoe runs
│   └── ShardChangedError    a shard was replaced or truncated while in use
├── CapacityError            it does not fit: memory, slots or context
├── TransferError            moving an expert failed (disk, pinning, copy)
└── TraceError               a routing trace cannot be read, or does not fit

Asserts are for offmoe's own bugs, these for the user's world.
"""


class OffmoeError(Exception):
    """Base of all errors raised on purpose. `exit_status` is what the command line ends with."""

    exit_status = 1


class ConfigError(OffmoeError):
    """An option or its value cannot be used; the message names the option and what would work."""

    exit_status = 2


class CheckpointError(OffmoeError):
    """The checkpoint's files are damaged or contradict each other."""


class MissingTensorError(CheckpointError):
    """A tensor or a shard that the model needs is not there."""


class UnsupportedModelError(CheckpointError):
    """The architecture, file format or quantization is not one that offmoe runs."""


class ShardChangedError(CheckpointError):
    """A shard is no longer the file that was opened."""


class CapacityError(OffmoeError):
    """It does not fit; the message carries the numbers and the smallest that would work."""


class TransferError(OffmoeError):
    """Moving an expert failed; raised where the expert is needed."""


class TraceError(OffmoeError):
    """A routing trace is unreadable or does not match what it is used with."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own, torch's on a device (by name: torch may not be loaded),
    or a RuntimeError, which is what torch raises on a CPU and Python for a thread.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    said = ("can't allocate memory", "can't start new thread")
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    )
