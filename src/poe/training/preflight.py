"""The preflight: everything that could fail at the end of a run is tried before its first step."""

from collections.abc import Callable
from typing import TypeVar

from poe.errors import PoEError, TrainingError

T = TypeVar("T")
# Called with the name of every check and its problem, None for a check that passed.
Report = Callable[[str, str | None], None]


class Preflight:
    """Runs the checks of a run by name.

    Without `report` the first problem is raised. With it (a dry run) every result is reported, the checks go on after a
    problem, and `failed` has their names.
    """

    def __init__(self, report: Report | None = None) -> None:
        self._report = report
        self.is_dry_run = report is not None
        self.failed: list[str] = []

    def check(self, name: str, action: Callable[[], T]) -> T | None:
        """Run a check and return its result, None after a problem that was reported.

        An error of a library becomes a `TrainingError` with the name of the check.
        """
        try:
            result = action()
        except Exception as error:
            problem = (
                error if isinstance(error, PoEError) else TrainingError(f"{name}: {type(error).__name__}: {error}")
            )
            if self._report is None:
                raise problem from error
            self.failed.append(name)
            self._report(name, str(problem))
            return None
        if self._report is not None:
            self._report(name, None)
        return result
