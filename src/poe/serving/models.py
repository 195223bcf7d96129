"""The models that a server offers: the base and its stages, each with its name, its chat template and its call form."""

import copy
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from poe.cascade import Cascade
from poe.chat import plan_reply, read_call_threshold
from poe.data.render import Renderer
from poe.data.templates import complete_template
from poe.errors import DataError, DecodingError, StageError
from poe.loaders.repository import locate
from poe.loaders.tokenizer import check_tokenizer, load_tokenizer
from poe.modeling.access import Access, read_config
from poe.modeling.lineage import is_stage

REPLY_TOKENS = 256  # of a request that has no max_tokens, as in `cascade.chat`


@dataclass(frozen=True)
class ServedModel:
    """One model of a server: `stage` (None: the base), and how its prompts are written and its replies read.

    `threshold` decides between a call and text, as in `Cascade.chat`; None if the stage has none.
    """

    name: str
    stage: str | None
    tokenizer: Any
    renderer: Renderer
    vocab_size: int
    threshold: float | None


def load_models(cascade: Cascade, repos: Sequence[str], names: Sequence[str] = ()) -> dict[str, ServedModel]:
    """Load the stages `repos[1:]` beside `repos[0]`, which the cascade was opened from; return the models by name.

    The base comes first. `names` are for `repos` in order. Without one a stage is called as in its files, or as its
    folder if another stage has that name; the base is called as its folder or repository, or "base". Raises
    `StageError` if two models have one name.
    """
    if len(names) > len(repos):
        raise DataError(f"Expected at most one name for each of {len(repos)} models, got {len(names)}: {names}.")
    given: dict[str | None, str] = {}
    tokenizers: dict[str | None, Any] = {cascade.active: cascade.tokenizer}
    if names:
        given[cascade.active] = names[0]
    for position, repo in enumerate(repos[1:], start=1):
        name = names[position] if position < len(names) else _free_name(cascade, repo)
        cascade.load_stage(repo, name=name)
        if cascade.active in tokenizers:
            raise StageError(f"{repo} is given twice: give each stage once.")
        tokenizers[cascade.active] = load_tokenizer(locate(repo))
    if None not in tokenizers:
        source = cascade.base_source
        tokenizers[None] = None if source.repo is None else load_tokenizer(source.repo, source.revision, source.access)
    fallback = next((tokenizer for tokenizer in tokenizers.values() if tokenizer is not None), None)
    served: dict[str, ServedModel] = {}
    for stage in sorted(tokenizers, key=lambda stage: stage is not None):
        name = given.get(stage) or stage or _base_name(cascade, {given.get(key) or key for key in tokenizers})
        if name in served:
            raise StageError(
                f"Two models are called {name!r}: give every model a name of its own, with --name for each in order."
            )
        served[name] = _describe(cascade, name, stage, tokenizers[stage] or fallback)
    return served


def _free_name(cascade: Cascade, repo: str) -> str | None:
    """Return the name of a stage's folder if the stage has the name of another one, else None."""
    config, _ = read_config(locate(repo), Access())
    name = config["stage"]["name"] if is_stage(config) else None
    return PurePath(repo).name if name in cascade.stages else None


def _describe(cascade: Cascade, name: str, stage: str | None, tokenizer: Any) -> ServedModel:
    vocab_size = cascade.config.vocab_size
    check_tokenizer(tokenizer, vocab_size)
    tokenizer = copy.deepcopy(tokenizer)  # the template of one model is completed, not that of another
    complete_template(tokenizer)
    renderer = Renderer(tokenizer, vocab_size=vocab_size)
    with suppress(DecodingError):  # replies cannot be constrained: a request that needs it is refused
        plan = plan_reply(tokenizer, vocab_size, renderer.stop_token_ids, [], response_format={"type": "json_object"})
        plan.make_constraint(REPLY_TOKENS)  # the tables that the first request would wait for
    threshold = None if stage is None else read_call_threshold(cascade.stages[stage].prompt)
    return ServedModel(name, stage, tokenizer, renderer, vocab_size, threshold)


def _base_name(cascade: Cascade, taken: Collection[str | None]) -> str:
    """Return the name of the base: its Hub name, or the last part of its folder; "base" if a stage is called that."""
    repo = cascade.base_source.repo or "base"
    name = PurePath(repo).name if PurePath(repo).is_absolute() else repo
    return "base" if name in taken else name


def context_length(config: Any) -> int | None:
    """Return the most tokens that a base was made for, None if its config has no such number."""
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
