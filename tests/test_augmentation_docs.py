"""The examples of docs/how-to/augment.md print what the page shows."""

import doctest
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "docs" / "how-to" / "augment.md"


def test_the_examples_print_what_the_page_shows() -> None:
    failed, tried = doctest.testfile(str(GUIDE), module_relative=False, encoding="utf-8")
    assert failed == 0
    assert tried > 20
