"""The tokenizer that lies beside a model."""

from typing import Any

from transformers import AutoTokenizer

from poe.modeling.access import Access


def load_tokenizer(
    repo: str, revision: str | None = None, access: Access | None = None, trust_remote_code: bool = False
) -> Any:
    """Return a folder's or Hub repository's tokenizer, None if it has none."""
    access = access or Access()
    try:
        # Said explicitly, because left unsaid transformers asks on the terminal for models it does not know.
        return AutoTokenizer.from_pretrained(
            repo, revision=revision or "main", trust_remote_code=trust_remote_code, **access.kwargs(repo)
        )
    except (OSError, ValueError, KeyError):
        return None
