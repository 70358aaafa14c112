"""Named errors: each message says what was given, what was expected and what to do."""

from collections.abc import Sequence


class DmmError(Exception):
    """Base of every error that dmmlib raises on purpose."""


class DataError(DmmError, ValueError):
    """Images, labels or margins that cannot be used."""


class ChecksumError(DataError):
    """A file whose content is not what its checksum promises."""


class ForgetSetError(DmmError, ValueError):
    """Forget indices that name no valid, proper, non-empty part of the training set."""


class PresetError(DmmError, ValueError):
    """An unknown preset, key or value."""


class MethodError(DmmError, KeyError):
    """A method, model or data set asked for by a name that is not registered."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0])


class ModelError(DmmError, ValueError):
    """A model that cannot be trained beside others, because of what its module does."""


class OptionError(DmmError, ValueError):
    """A method's option with a value that the method does not allow."""


class StoreError(DmmError, OSError):
    """A store on disk that is foreign, truncated, damaged or cannot be written."""


class DamageError(StoreError):
    """A file, or shards of a store, that is not what was written; `shards` holds their numbers."""

    def __init__(self, message: str, shards: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.shards = shards


class SchedulerError(DmmError, RuntimeError):
    """A scheduler that cannot be reached, or workers that keep dying."""


class DeviceError(DmmError, RuntimeError):
    """A device that this machine does not have."""


class ExtraError(DmmError, ImportError):
    """A package of an optional extra that is not installed."""
