"""What can go wrong while files become a model.

These live beside the network and not in `poe.errors`, because this folder travels with every published delta and
must import nothing of ours: a stranger who loads a stage through `trust_remote_code` meets the same messages.
`poe.errors` re-exports them, so users of the package import from there.
"""


class PoEError(Exception):
    """Base of every error that this project raises on purpose. The message says: expected, got, what to do."""


class FamilyError(PoEError, ValueError):
    """The base is not of a family that can be grown."""


class StageError(PoEError, ValueError):
    """A stage is unknown, exists already, or cannot be used in this way."""


class DeltaError(PoEError, ValueError):
    """A stage folder or its `delta.safetensors` is missing, truncated, tampered with or of another shape."""


class FingerprintError(PoEError, ValueError):
    """The weights found are not the weights that were named."""


class LineageError(PoEError, ValueError):
    """The chain from a stage to its base is broken, cyclic or too long."""


class SourceError(PoEError, OSError):
    """A repository or folder could not be reached: no network, no permission, no such name."""
