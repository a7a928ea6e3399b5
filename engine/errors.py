"""The engine's own errors. The command line prints them without a traceback."""


class MeerkatError(Exception):
    """Base class of the engine's errors."""


class ConfigError(MeerkatError, ValueError):
    """A setting is unknown, out of range, or incompatible with another setting."""


class DataError(MeerkatError, ValueError):
    """A data set, calibration text or partition cannot be used."""


class MaskError(MeerkatError, ValueError):
    """A mask cannot be built, is damaged, or was made for another model."""


class DeltaError(MeerkatError, ValueError):
    """A delta is damaged, belongs to another base model, or does not produce the weights it states."""


class ModelError(MeerkatError, ValueError):
    """A model or tokenizer cannot be loaded or does not fit the task."""


class ModelChangedError(MeerkatError, RuntimeError):
    """The model or its masked weights are not as the optimizer left them."""


class NonFiniteLossError(MeerkatError, ArithmeticError):
    """A loss is NaN or infinite."""


class LedgerError(MeerkatError, ValueError):
    """A ledger or a log of updates is damaged, or does not belong to this model and mask."""


class MessageError(MeerkatError, ValueError):
    """A federated message is malformed or has content that is not allowed."""


class RunError(MeerkatError, OSError):
    """A run directory or a file cannot be created, written or read."""


class TransportError(MeerkatError, RuntimeError):
    """The transport cannot carry messages to the clients."""


class WorkerError(MeerkatError, RuntimeError):
    """The worker process with a client's model cannot be started or reached, or has ended."""


__all__ = [
    "ConfigError",
    "DataError",
    "DeltaError",
    "LedgerError",
    "MaskError",
    "MeerkatError",
    "MessageError",
    "ModelChangedError",
    "ModelError",
    "NonFiniteLossError",
    "RunError",
    "TransportError",
    "WorkerError",
]
