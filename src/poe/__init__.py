"""PoE: stack specialists on a frozen language model, ship each as a small delta."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poe.cascade import Cascade
    from poe.errors import PoEError
    from poe.modeling.stage_config import StageConfig
    from poe.tools.agent import Agent
    from poe.training.trainer import train_stage

try:
    __version__ = version("poe-cascade")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["Agent", "Cascade", "PoEError", "StageConfig", "__version__", "train_stage"]

_HOMES = {
    "Agent": "poe.tools.agent",
    "Cascade": "poe.cascade",
    "PoEError": "poe.errors",
    "StageConfig": "poe.modeling.stage_config",
    "train_stage": "poe.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'poe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
