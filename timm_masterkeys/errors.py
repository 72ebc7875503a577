"""Every error this package raises on purpose; each message says what was given, what was expected and what to do."""


class MasterKeysError(Exception):
    """Base class of all errors of this package."""


class BankError(MasterKeysError, ValueError):
    """A bank that is unknown, unreadable, or has no key for a kernel size."""


class ProjectionError(MasterKeysError, ValueError):
    """Kernels that cannot be projected: wrong shape, wrong type, NaN or Inf."""


class ConversionError(MasterKeysError, ValueError):
    """A model that cannot be converted with the given settings; it is not changed."""


class CalibrationError(MasterKeysError, ValueError):
    """A model that cannot be calibrated with the given images or settings; it is not changed."""


class CheckpointError(MasterKeysError, RuntimeError):
    """A checkpoint or a published model that does not fit; nothing is loaded from it."""


class HubError(MasterKeysError, RuntimeError):
    """A publication that failed or could not be confirmed; the message says which."""


class ZooError(MasterKeysError, ValueError):
    """A zoo that cannot be made with the given settings, or that lacks models which failed; the others are kept."""


def in_short(error: Exception) -> str:
    """The first lines of an error's message, without those of addresses and request ids if there are others."""
    lines = [line.strip() for line in (getattr(error, "server_message", None) or str(error)).splitlines()]
    plain = [line for line in lines if line and "http" not in line and "Request ID" not in line]
    return " ".join((plain or lines)[:3])[:300] or type(error).__name__
