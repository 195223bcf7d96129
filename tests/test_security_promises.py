"""SECURITY.md: each promise names tests that exist, and readers find the page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promises = re.findall(r"^\*\*.*?(?=\n\n|\Z)", text.split("## What PoE does not promise")[0], flags=re.S | re.M)
    assert len(promises) >= 9
    known = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for promise in promises:
        named = re.findall(r"`(test_\w+)`", promise)
        assert named, promise
        for name in named:
            assert f"def {name}(" in known, name


def test_the_page_is_linked() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "](SECURITY.md)" in (ROOT / page).read_text(encoding="utf-8")
    assert (ROOT / "docs" / "security.md").read_bytes() == (ROOT / "SECURITY.md").read_bytes()
    assert "](security.md)" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
