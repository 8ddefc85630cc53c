"""The errors a user can cause or meet. Each message is one sentence and says what to do.

Every error derives from `DualLoraEdgeError`, which the command line prints without a traceback (exit code 1).
"""


class DualLoraEdgeError(Exception):
    """Base of all errors that carry a remedy for the user."""


class DataError(DualLoraEdgeError):
    """The images, labels or folders given cannot be learned from or evaluated on."""


class ConfigError(DualLoraEdgeError):
    """The configuration is wrong; the message lists every problem at once."""


class BackboneError(DualLoraEdgeError):
    """The backbone or its weights are unknown, unsupported or do not fit."""


class RunError(DualLoraEdgeError):
    """A run directory is missing, locked, damaged or does not fit the request."""


class BundleError(DualLoraEdgeError):
    """A bundle is missing, altered, incomplete or of an unknown schema."""


class BackendError(DualLoraEdgeError):
    """No inference backend can run the model as asked."""


class SwapError(DualLoraEdgeError):
    """A bundle cannot take the place of the one that answers."""


class ExportError(DualLoraEdgeError):
    """The model cannot be exported for the target, or the exported graph failed its parity check."""


class ProfileError(DualLoraEdgeError):
    """A device profile is unknown or invalid."""


class BudgetError(DualLoraEdgeError):
    """A measured latency or memory exceeds the budget that was asked for."""


class SourceError(DualLoraEdgeError):
    """A camera, stream or video cannot be opened or read as asked."""


class ReportError(DualLoraEdgeError):
    """A report of a benchmark is missing, damaged or of an unknown schema."""


class StoreError(DualLoraEdgeError):
    """A store of a device is missing or damaged, or a bundle is not wanted there."""


class UpdateError(DualLoraEdgeError):
    """A channel of updates cannot be reached, or what it offers is not to be trusted."""
