"""Continue the pattern of a base's layers in the layers of a stage: sliding windows, layers without positions.

A config describes such a pattern in lists with one entry per layer (`layer_types`, `no_rope_layers`). A new layer has
the entry that the family gives to a layer of its index, because other programs count on it: some read the lists, others
compute the pattern from the index alone. The entries of a layer are a mapping from the names of the lists to values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .failures import DeltaError
from .families import Family, family_of, lists_per_layer, window_layers

Entries = dict[str, Any]


def continue_pattern(base: PreTrainedModel, below: int, count: int) -> list[Entries]:
    """Return the entries of `count` new layers above `below` layers.

    Within the base's depth they are the base's own at that index. Above it the family's config class continues the
    lists if it gives the base's own lists for the base's depth; otherwise the shortest period of each list does. A
    declared entry (`Family.per_layer`) comes first. A base of several kinds of layers, which differ in more than the
    config, and a recurrent one have no pattern to continue: there every entry is that of `uniform_pattern`.
    """
    config, family = base.config, family_of(base)
    uniform = uniform_pattern(config, family, count)
    if family.recurrent or len({_structure(layer) for layer in family.layers_of(base)}) > 1:
        return uniform
    continued = dict(uniform[0]) if uniform else {}
    lists = {
        name: _continue_list(config, name, list(values)[: config.num_hidden_layers], below + count)
        for name, values in lists_per_layer(config, family).items()
        if name not in family.per_layer
    }
    return [
        continued | {name: values[index] for name, values in lists.items()} for index in range(below, below + count)
    ]


def uniform_pattern(config: PreTrainedConfig, family: Family, count: int) -> list[Entries]:
    """Return the entries of `count` new layers that are all like the base's last layer of full attention.

    Files of stages that name no entries mean these, with positions in every layer.
    """
    template = family.template_layer(config)
    declared = {"no_rope_layers": 1, **family.per_layer}  # 1 means rotary positions, 0 none
    entries = {name: declared.get(name, values[template]) for name, values in lists_per_layer(config, family).items()}
    return [dict(entries) for _ in range(count)]


def pattern_fields(base: PreTrainedModel, entries: Sequence[Entries]) -> dict[str, Any]:
    """Return the fields of a stage's config.json for the entries of its layers: none if they are the uniform ones."""
    if not entries or list(entries) == uniform_pattern(base.config, family_of(base), len(entries)):
        return {}
    return {"per_layer": {name: [layer[name] for layer in entries] for name in entries[0]}}


def read_pattern(base: PreTrainedModel, fields: Mapping[str, Any], below: int) -> list[Entries]:
    """Return the entries of a saved stage's layers from the `stage` fields of its config.json.

    Raises `DeltaError` for entries that do not fit the base.
    """
    count, stored = fields["num_layers"], fields.get("per_layer")
    uniform = uniform_pattern(base.config, family_of(base), count)
    if stored is None:
        return uniform
    lists = lists_per_layer(base.config, family_of(base))
    known = [*continue_pattern(base, below, count), *uniform]
    for name, values in lists.items():
        entries = stored.get(name) if isinstance(stored, dict) and stored.keys() == lists.keys() else None
        allowed = [*values, *(layer[name] for layer in known)]
        if not isinstance(entries, list) or len(entries) != count or any(entry not in allowed for entry in entries):
            raise DeltaError(
                f"config.json of stage {fields['name']!r} describes its layers by {stored!r}, which does not fit its "
                f"base: expected {count} entries, as the base's config has them, in each of {', '.join(lists)}. "
                "Fetch it again."
            )
    return [{name: stored[name][index] for name in lists} for index in range(count)]


def _continue_list(config: PreTrainedConfig, name: str, values: Sequence[Any], total: int) -> list[Any]:
    """Return a list of at least `total` entries that begins with the base's own."""
    family_values = _compute_lists(config, max(total, len(values))).get(name)
    if isinstance(family_values, (list, tuple)) and list(family_values[: len(values)]) == list(values):
        return list(family_values)
    period = next(p for p in range(1, len(values) + 1) if all(a == b for a, b in zip(values, values[p:], strict=False)))
    return [*values, *(values[index % period] for index in range(len(values), total))]


def _compute_lists(config: PreTrainedConfig, depth: int) -> dict[str, Any]:
    """Return the fields of a config of the same class whose lists the class itself computes for another depth."""
    fields = config.to_dict()
    for name in [name for name, value in fields.items() if isinstance(value, (list, tuple))]:
        if len(fields[name]) == config.num_hidden_layers:
            del fields[name]
    fields |= {"num_hidden_layers": depth} | window_layers(config, depth)
    try:
        return vars(type(config).from_dict(fields))
    except Exception:  # the config of an unknown network may need its lists
        return {}


def _structure(layer: Any) -> tuple[Any, ...]:
    return (type(layer), *sorted(name for name, _ in layer.named_parameters()))
