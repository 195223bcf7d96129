"""Errors of loading a model from files.

They are defined here and re-exported by `poe.errors`, because the files of this folder are published with every delta
and import nothing of ours. Loading through `trust_remote_code` therefore raises the same errors as the package.
"""


class PoEError(Exception):
    """Base class of every error of this project. Messages contain what was expected, what came, and what to do."""


class FamilyError(PoEError, ValueError):
    """The base is not of a family to which stages can be added."""


class StageError(PoEError, ValueError):
    """A stage is unknown, exists already, or cannot be used in this way."""


class DeltaError(PoEError, ValueError):
    """A file of a stage or base is missing, truncated, changed, or does not fit."""


class FingerprintError(PoEError, ValueError):
    """The weights are not those that the fingerprint names."""


class LineageError(PoEError, ValueError):
    """The chain of a stage, its parents and its base is broken, cyclic or too long."""


class SourceError(PoEError, OSError):
    """A repository or folder cannot be reached: no network, no permission, or no such name."""
