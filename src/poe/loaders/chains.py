"""Open what a user names: a base, or a stage with its parents and its base; add saved stages to an open base."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from poe.errors import StageError
from poe.loaders.base import Base, open_base
from poe.loaders.options import read_options
from poe.loaders.repository import embedded_folders, locate
from poe.modeling.access import Access, read_config
from poe.modeling.lineage import BaseSource, Lineage, find_base, is_stage, resolve_lineage, warn_unverified
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM
from poe.modeling.modeling_poe_stage import PoEStageConfig, PoEStageForCausalLM
from poe.modeling.opening import load_stages
from poe.modeling.stage import Stage
from poe.modeling.stage_config import check_stage_name

AutoConfig.register("poe", PoEConfig, exist_ok=True)
AutoModelForCausalLM.register(PoEConfig, PoEForCausalLM, exist_ok=True)
AutoConfig.register("poe_stage", PoEStageConfig, exist_ok=True)
AutoModelForCausalLM.register(PoEStageConfig, PoEStageForCausalLM, exist_ok=True)


def open_repository(
    repo: str | os.PathLike[str],
    *,
    revision: str | None,
    base: str | os.PathLike[str] | None,
    verify: bool,
    access: Access,
    dtype: Any,
    options: Mapping[str, Any],
    **placement: Any,
) -> tuple[Base, Lineage | None]:
    """Open a base, or the base of a stage; return it with the stage's lineage, None for a base.

    `options` are what a user gives for transformers (`poe.loaders.options`), and `placement` other keywords for it.
    """
    location, options = read_options(locate(repo), dtype, options, placement.get("device_map"))
    config, _ = read_config(location, access, revision)
    given = {"verify": verify, "tokenizer_repo": location, **placement, **options}
    if not is_stage(config):
        source, config = find_base(location, access, revision)
        return open_base(source, config, tokenizer_revision=source.revision, **given), None
    lineage = find_lineage(location, access, revision, verify=verify, base=base)
    stage_revision = lineage.stages[-1].revision
    return open_base(lineage.base, lineage.base_config, tokenizer_revision=stage_revision, **given), lineage


def find_lineage(
    location: str,
    access: Access,
    revision: str | None,
    *,
    verify: bool,
    base: str | os.PathLike[str] | None = None,
    known_base: BaseSource | None = None,
) -> Lineage:
    """Find the parents and the base of a stage, and verify them all by fingerprint, or warn with `verify=False`."""
    base_location = None if base is None else locate(base)
    options: dict[str, Any] = {"embedded": embedded_folders()} if known_base is None else {"known_base": known_base}
    lineage = resolve_lineage(location, access, revision=revision, base=base_location, **options)
    if verify:
        lineage.verify()
    else:
        warn_unverified(location)
    return lineage


def load_chain(
    base: PreTrainedModel, stages: Mapping[str, Stage], lineage: Lineage, name: str | None, *, verify: bool
) -> list[Stage]:
    """Return the stages of a lineage from the base upwards. Those that are among `stages` already are not loaded again.

    The last one is called `name` (default: as in its files). A name changes nothing in a stage. Raises `StageError`,
    before weights are read, for a name that another stage has.
    """
    if name is not None:
        check_stage_name(name)
    loaded = {str(s.source["fingerprint"]): s for s in stages.values() if s.source is not None}
    for files in lineage.stages:
        is_last, fingerprint = files is lineage.stages[-1], files.header.self_fingerprint
        own_name = name if is_last and name else files.name
        namesake = stages.get(own_name)
        if namesake is not None and namesake.source is not None and namesake.source["fingerprint"] == fingerprint:
            loaded[fingerprint] = namesake  # of several copies
        if namesake is None or loaded.get(fingerprint) is namesake or (fingerprint in loaded and own_name != name):
            continue
        load = "this one" if is_last else "that parent before its child,"
        raise StageError(
            f"Two stages are called {own_name!r}: one is here already, another comes from {files.repo}. Load {load} "
            f"under another name: load_stage({files.repo!r}, name='...')."
        )
    if name in {files.name for files in lineage.stages[:-1]}:
        raise StageError(f"A parent of {lineage.stages[-1].repo} is called {name!r}: load it under another name.")
    return load_stages(base, lineage, loaded, name=name, verify=verify)
