"""Every error this package raises on purpose; each message says what was given, what was expected and what to do."""


class MasterKeysError(Exception):
    """Base class of all errors of this package."""


class BankError(MasterKeysError, ValueError):
    """A bank that is unknown, unreadable, or has no key for a kernel size."""


class ProjectionError(MasterKeysError, ValueError):
    """Kernels that cannot be projected: wrong shape, wrong type, NaN or Inf."""


class ConversionError(MasterKeysError, ValueError):
    """A model that cannot be converted as asked; it is left as it was."""


class CalibrationError(MasterKeysError, ValueError):
    """A model that cannot be calibrated with what was given; it is left as it was."""


class CheckpointError(MasterKeysError, RuntimeError):
    """A checkpoint or a published model that does not fit; nothing is loaded from it."""


class HubError(MasterKeysError, RuntimeError):
    """A publication that did not happen, or could not be confirmed; the message says which."""


class ZooError(MasterKeysError, ValueError):
    """A zoo that cannot be made as asked, or of which some models could not be made; those that were stay."""
