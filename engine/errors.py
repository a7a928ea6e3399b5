"""What the engine raises beyond ``ValueError`` and ``TypeError``; the command line prints these without a traceback."""


class MeerkatError(Exception):
    """Base of the engine's own errors."""


class ConfigError(MeerkatError, ValueError):
    """A setting is unknown, out of range, or does not go with another."""


class DataError(MeerkatError, ValueError):
    """A data set, calibration text or partition cannot be used."""


class MaskError(MeerkatError, ValueError):
    """A mask cannot be built, is damaged, or belongs to another model."""


class DeltaError(MeerkatError, ValueError):
    """A delta is damaged, belongs to another base model, or does not lead where it says."""


class ModelError(MeerkatError, ValueError):
    """A model or tokenizer cannot be loaded or does not fit the task."""


class ModelChangedError(MeerkatError, RuntimeError):
    """The model was moved, cast or rebuilt after its masked weights had been located."""


class NonFiniteLossError(MeerkatError, ArithmeticError):
    """A loss is NaN or infinite; the weights have been restored."""


class LedgerError(MeerkatError, ValueError):
    """A ledger is damaged or does not belong to this model and mask."""


class MessageError(MeerkatError, ValueError):
    """A federated message is malformed, or says what it may not."""


class RunError(MeerkatError, OSError):
    """A run directory or a file cannot be made, written or read."""


class TransportError(MeerkatError, RuntimeError):
    """Whoever carries messages to the clients cannot."""


class WorkerError(MeerkatError, RuntimeError):
    """The worker that holds a client's model cannot be started or reached, or ended."""


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
