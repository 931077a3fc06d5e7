"""The exceptions of the library. Every message says what was found and what the user can do about it."""

import errno

# Names of the errors of a disk, a network or a machine short of resources after which a second try may succeed.
_PASSING_NAMES = (
    *("EAGAIN", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EINTR"),
    *("EMFILE", "ENETDOWN", "ENETUNREACH", "ENFILE", "ENOMEM", "ESTALE", "ETIMEDOUT"),
)
_PASSING = {getattr(errno, name) for name in _PASSING_NAMES if hasattr(errno, name)}


class DQError(Exception):
    """Base of all errors that dq_lightning raises on purpose.

    Example:
        >>> from dq_lightning import DQError, SelectionConfig
        >>> try:
        ...     SelectionConfig(keep_ratio=1.5)
        ... except DQError as error:
        ...     print(error)
        SelectionConfig.keep_ratio must be in (0, 1], got 1.5; 1.5 % is 0.015
    """


class ConfigError(DQError, ValueError):
    """A setting is out of range, unknown, or contradicts another one."""


class SourceError(DQError):
    """A dataset cannot be read as it is: the message names the sample and the way out."""


class ChangedError(SourceError):
    """Data changed while they were read."""


class FeatureError(DQError):
    """An encoder cannot be found or run, or features are not finite."""


class PatchError(DQError):
    """A classifier or reconstructor cannot be found or run, or patches and images do not fit together."""


class CacheError(DQError):
    """A cache entry is missing, damaged or belongs to something else."""


class StoreError(DQError):
    """A packed store cannot be written or read."""


class DistributedError(DQError):
    """The processes of one run disagree, or the one that prepared the data failed."""


def may_pass(error: BaseException) -> bool:
    """Whether an error has a temporary cause (disk, network, memory), so that the same sample may be readable later.

    If the error has a `__cause__`, the cause is looked at instead.
    """
    cause = error.__cause__ or error
    return isinstance(cause, ChangedError | MemoryError | TimeoutError | ConnectionError) or (
        isinstance(cause, OSError) and cause.errno in _PASSING
    )
