"""Recognize the family of a base that is not declared: find its parts by structure, then try them.

The backbone is found by `base_model_prefix`, then its one list of decoder layers and the output embeddings. A small
forward pass shows, by the order of calls, the final norm and the modules that write into the residual stream. The trial
grows the base by one layer and checks everything that a stage needs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .failures import FamilyError
from .families import FAMILIES, Family, family_of, grown_config, logits_of
from .growth import build_layers, build_shell
from .heads import FoldedHead
from .layer_pattern import continue_pattern
from .placement import device_of, quantization_of


def recognize_family(base: PreTrainedModel) -> Family:
    """Return a base's family: the declared one, or for another model type the recognized one after its trial.

    The trial runs nine forward passes over two rows of at most six tokens, once per base object. Raises `FamilyError`
    with the reason if it fails; the base is then unchanged.
    """
    if base.config.model_type in FAMILIES or "_poe_family" in vars(base):
        return family_of(base)
    training = [module for module in base.modules() if module.training]
    try:
        base.eval()
        with torch.no_grad():
            _run_trial(base)
    except FamilyError:
        vars(base).pop("_poe_family", None)
        raise
    except Exception as error:  # an unknown network can raise any error
        vars(base).pop("_poe_family", None)
        raise _family_error(base, f"the trial ended with {type(error).__name__}: {error}") from error
    finally:
        for module in training:
            module.training = True
    return family_of(base)


def check_structure(repo: str, model_type: str, *, trust_remote_code: bool = False, **access: Any) -> None:
    """Raise `FamilyError` if the structure of an undeclared base rules it out. Reads no weights.

    The model is built and run on the meta device, where tensors have shapes without values. `recognize_family` checks
    what this cannot show. `access` are keywords of `AutoConfig.from_pretrained`.
    """
    try:
        config = AutoConfig.from_pretrained(repo, trust_remote_code=trust_remote_code, **access)
        config._attn_implementation = "eager"  # other implementations need values to choose a kernel
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval()
    except ValueError as error:
        raise FamilyError(
            f"{repo} is of model type {model_type!r}, which AutoModelForCausalLM does not open: {error}"
        ) from error
    except OSError:
        raise
    except Exception:  # the model cannot be built without values: leave it to the trial
        return
    backbone, layers, head = _find_parts(model)
    family = Family(model_type, backbone=backbone, layers=layers, head=head)
    try:
        with torch.no_grad(), _record(model, family) as trace:
            _run_with_cache(model, torch.zeros(1, 2, dtype=torch.long, device="meta"))
        trace.outputs(model)
        trace.check(model)
    except FamilyError:
        raise
    except Exception:  # the model, or a comparison in `check`, needs values
        return


def _run_trial(base: PreTrainedModel) -> None:
    """Find a base's family, store it on the base and check it. Raises `FamilyError`, or any error of the model."""
    backbone, layers, head = _find_parts(base)
    family = Family(str(base.config.model_type), backbone=backbone, layers=layers, head=head)
    ids = _trial_ids(base)
    with _record(base, family) as trace:
        expected = _run_in_two_steps(base, ids)
    trace.check(base)
    base._poe_family = Family(  # type: ignore[assignment]
        family.model_type, backbone, layers, trace.norm(base), head, outputs=trace.outputs(base)
    )
    depth = len(family.layers_of(base))
    new = build_layers(base, depth, continue_pattern(base, depth, 1))
    grown = build_shell(base, list(new), FoldedHead(family.head_of(base), [])).eval()
    if not torch.equal(_run_in_two_steps(grown, ids), expected):
        raise _family_error(
            base,
            f"a new layer with {' and '.join(family_of(base).outputs)} at zero changes the "
            "logits (as where experts or other modules write into the residual stream too)",
        )
    generator = torch.Generator().manual_seed(0)
    for parameter in new.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * base.config.hidden_size**-0.5
        parameter.add_(noise.to(parameter))
    changed = _run_in_two_steps(grown, ids)
    effect = (changed - expected).abs().amax(dim=(0, 2))
    if not (effect > 0).all():
        raise _family_error(base, "a new layer with random weights does not change the logits")
    uncached = grown(ids, use_cache=False).logits.float()
    tolerance = 0.1 * effect.max()
    if quantization_of(base):  # the rounding of 8-bit activations depends on the batch, also without new layers
        tolerance += 2 * (expected - base(ids, use_cache=False).logits.float()).abs().max()
    if (changed - uncached).abs().max() > tolerance:
        raise _family_error(base, "with a new layer, the key-value cache gives other logits than none")
    _check_packing(base, ids)


def _find_parts(base: PreTrainedModel) -> tuple[str, str, str]:
    """Return the names of the backbone, of its list of layers, and of the head."""
    config = base.config
    if getattr(config, "is_encoder_decoder", False):
        raise _family_error(base, "it has an encoder")
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise _family_error(base, "its config has no num_hidden_layers")
    backbone = dict(base.named_children()).get(base.base_model_prefix)
    if backbone is None:
        raise _family_error(base, f"it has no child {base.base_model_prefix!r}, which base_model_prefix names")
    lists = [n for n, child in backbone.named_children() if isinstance(child, nn.ModuleList) and len(child) == depth]
    if len(lists) != 1:
        raise _family_error(base, f"{base.base_model_prefix!r} holds {len(lists)} lists of {depth} layers, not one")
    output = base.get_output_embeddings()
    heads = [name for name, child in base.named_children() if child is output]
    if output is None or not heads:
        raise _family_error(base, "it has no output embeddings of its own")
    return base.base_model_prefix, lists[0], heads[0]


@dataclass
class _Trace:
    """A record of one forward pass: module names in the order of calls, and the inputs and outputs of the parts."""

    family: Family
    in_backbone: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    writers: dict[str, str] = field(default_factory=dict)  # block of a layer -> its last module, a path in the layer
    last_output: tuple[str, torch.Tensor] | None = None  # the block that ran last, and its last module's output
    tensors: bool = True
    hidden: torch.Tensor | None = None
    head_input: torch.Tensor | None = None
    head_output: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def norm(self, base: PreTrainedModel) -> str:
        """Return the name of the module that runs after the last layer."""
        if self.in_backbone[-1] == self.family.layers:
            raise _family_error(base, "no norm runs after its last layer")
        return self.in_backbone[-1]

    def outputs(self, base: PreTrainedModel) -> tuple[str, ...]:
        """Return the module that was called last in each block of a layer (attention, MLP)."""
        if not self.writers:
            raise _family_error(base, "its layers have no nn.Linear that writes into the residual stream")
        return tuple(self.writers.values())

    def record_linear(self, name: str, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Record a projection. The last one of a block writes, unless a norm follows it."""
        block = name.rpartition(".")[0].partition(".")[0]
        self.writers[block], self.last_output = name, (block, output)

    def record_norm(self, name: str, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Record a norm of a layer. It ends a block if its input is the output of the block's last projection."""
        if self.last_output is not None and args and args[0].data_ptr() == self.last_output[1].data_ptr():
            self.writers[self.last_output[0]] = name

    def check(self, base: PreTrainedModel) -> None:
        """Raise `FamilyError` unless each layer ran once, in order, and the logits follow from the head."""
        depth = base.config.num_hidden_layers
        if self.layers != list(range(depth)):
            raise _family_error(base, f"its {depth} layers do not run once each, in order: {self.layers[:8]}")
        if not self.tensors:
            raise _family_error(base, "its layers do not take the hidden states first and return them alone")
        if self.hidden is None or self.head_input is None or not torch.equal(self.hidden, self.head_input):
            raise _family_error(base, "its head does not read the backbone's last_hidden_state")
        assert self.head_output is not None
        assert self.logits is not None
        expected, logits = logits_of(base.config)(self.head_output), self.logits
        if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=1e-2, atol=1e-3):
            raise _family_error(
                base,
                "its logits are not its head's output, scaled and capped as logit_scale, logits_scaling and "
                "final_logit_softcapping in its config say",
            )


@contextmanager
def _record(base: PreTrainedModel, family: Family) -> Iterator[_Trace]:
    """Record the first forward pass of a base."""
    trace, layers = _Trace(family), family.layers_of(base)
    template = family.template_layer(base.config)
    with torch.device("meta"):  # a quantized base has other classes where a new layer has nn.Linear
        config = grown_config(base.config, family, len(layers), [template])
        new = type(layers[template])(config, template)
        linear = [name for name, module in new.named_modules() if isinstance(module, nn.Linear)]
        norms = [name for name, child in new.named_children() if [p.dim() for p in child.parameters()] in ([1], [1, 1])]
    hooks = []

    def on_output(module: nn.Module, record: Any) -> None:
        hooks.append(
            module.register_forward_hook(lambda m, args, out: None if trace.logits is not None else record(args, out))
        )

    def record_layer(index: int, args: tuple[Any, ...], output: Any) -> None:
        trace.in_backbone.append(family.layers)
        trace.layers.append(index)
        trace.tensors &= bool(args) and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor)
        trace.tensors &= trace.tensors and args[0].shape == output.shape

    def record_head(args: tuple[Any, ...], output: Any) -> None:
        trace.head_input, trace.head_output = args[0], output

    for index, layer in enumerate(layers):
        on_output(layer, lambda args, output, index=index: record_layer(index, args, output))
    for name in linear:
        on_output(
            layers[template].get_submodule(name),
            lambda args, output, name=name: trace.record_linear(name, args, output),
        )
    for name in norms:
        on_output(
            layers[template].get_submodule(name), lambda args, output, name=name: trace.record_norm(name, args, output)
        )
    backbone = family.backbone_of(base)
    for name, child in backbone.named_children():
        if name != family.layers:
            on_output(child, lambda args, output, name=name: trace.in_backbone.append(name))
    on_output(backbone, lambda args, output: setattr(trace, "hidden", getattr(output, "last_hidden_state", output[0])))
    on_output(family.head_of(base), record_head)
    on_output(base, lambda args, output: setattr(trace, "logits", output.logits))
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def _check_packing(base: PreTrainedModel, ids: torch.Tensor) -> None:
    """Raise `FamilyError` unless restarted positions separate the documents of a row, which training needs."""
    half = ids.shape[1] // 2
    positions = torch.arange(half, device=ids.device).repeat(2)[None].expand_as(ids)
    packed = base(ids, position_ids=positions, use_cache=False).logits[:, half:].float()
    alone = base(ids[:, half:], use_cache=False).logits.float()
    if (packed - alone).abs().max() > 0.05 * alone.abs().max():
        raise _family_error(base, "documents in one row see each other although their position_ids restart at 0")


def _trial_ids(base: PreTrainedModel) -> torch.Tensor:
    """Return two rows of six tokens, always the same."""
    ids = torch.randint(0, base.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    return ids.to(device_of(base.get_input_embeddings()))


def _run_in_two_steps(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return logits (rows, tokens, vocabulary) in fp32; the last token's use the key-value cache."""
    first = _run_with_cache(model, ids[:, :-1])
    last = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, last.logits], dim=1).float()


def _run_with_cache(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    """Return the output of a forward pass with a key-value cache."""
    output = model(ids, use_cache=True)
    if getattr(output, "past_key_values", None) is None:
        raise _family_error(
            model, "it returns no past_key_values: new layers would have no key-value cache, as in a recurrent network"
        )
    return output


def _family_error(base: PreTrainedModel, reason: str) -> FamilyError:
    return FamilyError(
        f"A base of model type {base.config.model_type!r} cannot be grown: {reason}. Expected one of "
        f"{', '.join(sorted(FAMILIES))}, or a model whose layers run one after the other, each once, between an "
        "embedding and a norm with a head. If it is one, declare it in poe/modeling/families.py."
    )
