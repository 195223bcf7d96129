"""The training methods that the benchmarks compare (arms), and the FLOPs of each.

An arm takes one optimizer step per batch. Every arm creates the same base and gets the same `Batch`. Stages and
forks are compared with full fine-tuning, PEFT's LoRA on all linear layers, and training the last layers with the head.
These other methods use torch's fused AdamW and the loss of transformers. With `chunked` they use the chunked loss of
this package, so that only the method differs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from poe import Cascade, StageConfig
from poe.data.packing import Batch
from poe.modeling.answer_boundary import AnswerBoundary
from poe.modeling.boundary import Boundary
from poe.modeling.families import family_of, logits_of
from poe.training.hidden_states.disk_cache import row_digests
from poe.training.hidden_states.sources import AboveBoundary, AnswerTokens, PackedReads
from poe.training.loss import cross_entropy_sum
from poe.training.optim import build_optimizer

LORA_RANK = 16


@dataclass(frozen=True)
class Settings:
    """The options of an arm: sizes, learning rates, loss, device and precision."""

    stage_layers: int = 2
    head_rank: int = 64
    last_layers: int = 2
    attach_at: int | str = "auto"  # first layer of a fork
    chunked: bool = False  # the other methods also use the chunked loss
    lr: float = 1e-4  # AdamW of the other methods
    matrix_lr: float = 0.002  # Muon of a stage
    head_lr: float = 1e-4
    adamw: bool = False  # train a stage with torch's AdamW at `lr`
    max_grad_norm: float | None = None
    device: str = "cpu"
    bf16: bool = False  # frozen weights in bf16, trained ones in fp32 under autocast
    compile: str | None = None  # a backend of torch.compile, such as "inductor"
    checkpointing: bool = False  # recompute activations
    rows_per_pass: int | None = None  # of a step, which accumulates gradients over its passes
    cut_padding: bool = False  # drop what follows the last label of a pass
    seed: int = 0  # of a stage's first weights


@dataclass
class Arm:
    """A model and its optimizer. `step(batch)` updates both and returns the earlier loss in nats per label."""

    model: PreTrainedModel  # its forward pass returns the trained logits
    parameters: list[nn.Parameter]
    published: int  # parameters in the published file: all weights, an adapter, or a delta
    flops_per_token: float
    optimizer: torch.optim.Optimizer
    step: Callable[[Batch], Tensor]
    hidden: Callable[[Batch], Tensor]  # (B, T) tokens -> input of the head (B, T, D)
    base_rates: list[float] = field(default_factory=list)  # learning rates of the optimizer's groups
    adapter: Any = None  # PEFT's model

    def __post_init__(self) -> None:
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def trained(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def sizes(self) -> dict[str, Any]:
        return {"trained": self.trained, "published": self.published, "flops_per_token": self.flops_per_token}

    def scale_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor


MakeBase = Callable[[], PreTrainedModel]


def qwen3(layers: int, width: int, vocab: int, seed: int = 0, **fields: Any) -> Qwen3ForCausalLM:
    """Return a random Qwen3 model. By default its head is untied and its feed-forward layers are 3 x `width` wide."""
    torch.manual_seed(seed)
    sizes = {
        "intermediate_size": 3 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "head_dim": 64,
        "tie_word_embeddings": False,
        **fields,
    }
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, **sizes))


def random_batch(vocab: int, rows: int, length: int, seed: int = 1) -> Batch:
    """Return a batch of random tokens; the label of every position is the next token."""
    ids = torch.randint(0, vocab, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.arange(length).expand(rows, -1).contiguous())


def full(make_base: MakeBase, length: int, s: Settings) -> Arm:
    """Return an arm that trains all weights."""
    base = make_base().to(s.device)
    return _native(base, base, list(base.parameters()), Cost(base, length).full(), _size(base), s)


def lora(make_base: MakeBase, length: int, s: Settings, first: int = 0) -> Arm:
    """Return an arm that trains PEFT's LoRA of rank 16 on all linear layers except the head, from layer `first` up.

    The FLOPs are those of an adapter on all layers.
    """
    from peft import get_peft_model

    base = _frozen(make_base, s)
    cost = Cost(base, length)
    wrapped = get_peft_model(base, lora_config(linear_layers(base, first) if first else "all-linear"))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    arm = _native(wrapped, base, trained, cost.lora(numbers), numbers, s)
    arm.adapter = wrapped
    return arm


def lora_config(targets: str | list[str] = "all-linear") -> Any:
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, task_type="CAUSAL_LM")


def linear_layers(base: PreTrainedModel, first: int) -> list[str]:
    """Return the names of all linear modules in the layers of a base from `first` up."""
    inside = {m for layer in family_of(base).layers_of(base)[first:] for m in layer.modules()}
    return [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module in inside]


def last_layers(make_base: MakeBase, length: int, s: Settings) -> Arm:
    """Return an arm that trains the last layers, the final norm and the head; its artifact is the whole model."""
    base = _frozen(make_base, s)
    family = family_of(base)
    backbone = family.backbone_of(base)
    parts = [*family.layers_of(base)[-s.last_layers :], *([backbone.norm] if hasattr(backbone, "norm") else [])]
    if base.config.tie_word_embeddings:  # copy the head, so that the embedding is not trained
        tied = base.get_output_embeddings()
        head = nn.Linear(tied.in_features, tied.out_features, bias=False, device=s.device)
        head.weight = nn.Parameter(tied.weight.detach().clone())
        base.set_output_embeddings(head)
    parts.append(base.get_output_embeddings())
    trained = [p.requires_grad_(True) for part in parts for p in part.parameters()]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return _native(base, base, trained, Cost(base, length).last(s.last_layers), _size(base), s)


def stage(
    make_base: MakeBase,
    length: int,
    s: Settings,
    head: str = "dense",
    cached: bool = False,
    *,
    copied: bool = False,
    cascade: Cascade | None = None,
    name: str = "s",
    parent: str | None = None,
) -> Arm:
    """Return an arm that trains a stage. With `cached`, later steps reuse the base's hidden states, kept in bf16.

    With `copied` its layers are copies of the base's last ones, with outputs of zero, instead of random ones. `cascade`
    gets the stage, on its stage `parent` if that is given; by default it is a new one on the base of `make_base`.
    """
    cascade = cascade or Cascade(_frozen(make_base, s))
    cost = Cost(cascade.base, length)
    config = StageConfig(name, s.stage_layers, head=head, head_rank=s.head_rank)
    cascade.add_stage(config, parent=parent, seed=s.seed)
    own, model = cascade.stages[name].requires_grad_(True), cascade.model(name).train()
    if copied:
        copy_last_layers(cascade.base, own.layers)
    if s.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = list(own.parameters())
    optimizer: torch.optim.Optimizer
    if s.adamw:
        optimizer = torch.optim.AdamW(trained, lr=s.lr, fused=True)
    else:
        rates = {"matrix_lr": s.matrix_lr, "head_lr": s.head_lr}
        optimizer = build_optimizer(own.named_parameters(), model.config.hidden_size, **rates)
    backbone = family_of(model).backbone_of(model)
    boundary = Boundary(cascade.base, own)
    forward = AboveBoundary(model, boundary, RowMemory(boundary)) if cached else hidden_states(backbone, s)
    numbers = own.num_parameters()
    flops = cost.stage(own, s.stage_layers, head, cached)
    # no autocast: the optimizer keeps fp32 master copies of bf16 weights
    step = chunked_step(model, forward, optimizer, trained, nullcontext, s)
    return Arm(model, trained, numbers, flops, optimizer, step, forward)


@torch.no_grad()
def copy_last_layers(base: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Give new layers the weights of the base's last ones, except the outputs, so that they still change nothing."""
    family = family_of(base)
    outputs = tuple(f"{path}." for path in family.outputs)
    for layer, original in zip(layers, family.layers_of(base)[-len(layers) :], strict=True):
        weights = {name: weight for name, weight in original.state_dict().items() if not name.startswith(outputs)}
        layer.load_state_dict(weights, strict=False)


def fork(
    make_base: MakeBase,
    length: int,
    s: Settings,
    rank: int | None = LORA_RANK,
    active: str = "answer",
    cached: bool = False,
    *,
    head: str = "none",
    cascade: Cascade | None = None,
    name: str = "s",
    parent: str | None = None,
) -> Arm:
    """Return an arm that trains a fork of the layers from `s.attach_at` up with AdamW at `s.lr`.

    With `cached`, later steps reuse the states that the base computed, kept in bf16. `cascade` gets the fork, on its
    stage `parent` if that is given; by default it is a new one on the base of `make_base`.
    """
    cascade = cascade or Cascade(_frozen(make_base, s))
    shape = {"layers": "fork", "attach_at": s.attach_at, "rank": rank, "active": active, "head": head}
    if head == "low_rank":
        shape["head_rank"] = s.head_rank
    cascade.add_stage(name=name, parent=parent, seed=s.seed, **shape)
    own, model = cascade.stages[name].requires_grad_(True), cascade.model(name).train()
    trained = list(own.parameters())
    rates = {"matrix_lr": s.lr, "head_lr": s.head_lr, "matrix_optimizer": "adamw", "weight_decay": 0.0}
    # width 768: build_optimizer does not scale the rates
    optimizer = build_optimizer(own.named_parameters(), 768, betas=(0.9, 0.999), **rates)
    if active == "answer":
        boundary = AnswerBoundary(cascade.base, own)
        if s.compile:
            boundary.compile(backend=s.compile)
        packed = PackedReads(boundary, random_batch(8, 1, 4))
        read = RowMemory(packed) if cached else lambda batch: packed.below(batch.input_ids, batch.position_ids)
        forward: Any = AnswerTokens(model, boundary, lambda batch: packed.unpack(read(batch)), cached)
    else:
        forward = hidden_states(family_of(model).backbone_of(model), s)
    cost = Cost(cascade.base, length)
    flops = cost.fork(own.below, own.num_parameters(), rank is None)
    step = chunked_step(model, forward, optimizer, trained, nullcontext, s)
    return Arm(model, trained, own.num_parameters(), flops, optimizer, step, forward)


class RowMemory:
    """A cache in memory of the states that the layers below a stage compute for each row, in bf16."""

    def __init__(self, boundary: Boundary | PackedReads) -> None:
        self.boundary = boundary
        self.states: dict[bytes, Tensor] = {}  # a row's tokens and positions -> (K, T, D)

    def __call__(self, batch: Batch) -> Tensor:
        rows = row_digests(batch)
        if not all(row in self.states for row in rows):
            states = self.boundary.below(batch.input_ids, batch.position_ids).to(torch.bfloat16)
            self.states |= zip(rows, states.unbind(), strict=True)
        return torch.stack([self.states[row] for row in rows])


def hidden_states(backbone: nn.Module, s: Settings) -> Callable[[Batch], Tensor]:
    """Return a function from tokens (B, T) to normalized hidden states (B, T, D).

    Tokens do not attend to other documents in their row.
    """
    run = torch.compile(backbone, backend=s.compile, dynamic=False) if s.compile else backbone

    def hidden(batch: Batch) -> Tensor:
        return run(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state

    return hidden


def chunked_step(
    model: PreTrainedModel,
    hidden: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    precision: Callable[[], AbstractContextManager[Any]],
    s: Settings,
) -> Callable[[Batch], Tensor]:
    """Return the training step of this package, which computes the loss and its gradient in chunks."""
    logits = logits_of(model.config)

    def step(batch: Batch) -> Tensor:
        labels = (batch.labels != -100).sum().clamp(min=1)
        mean = torch.zeros((), device=batch.labels.device)
        for part in zip(*(t.split(s.rows_per_pass or len(t)) for t in batch), strict=True):
            part = cut_padding(Batch(*part)) if s.cut_padding else part
            head: Any = model.get_output_embeddings()
            with precision():
                states = hidden(Batch(*part))
            weight = head.weight
            loss = cross_entropy_sum(states.to(weight.dtype), weight, part[1], logits, head.bias) / labels
            loss.backward()
            mean += loss.detach()
        _update(optimizer, trained, s)
        return mean

    return step


def cut_padding(batch: Batch, block: int = 64) -> Batch:
    """Return rows without what follows their last label, in whole blocks of tokens. The loss does not depend on it."""
    labeled = (batch.labels != -100).any(0).nonzero()
    last = 1 + int(labeled.max()) if len(labeled) else 1
    return Batch(*(t[:, : last + -last % block].contiguous() for t in batch))


def _native(
    model: nn.Module, base: PreTrainedModel, trained: list[nn.Parameter], flops: float, published: int, s: Settings
) -> Arm:
    """Return an arm that uses AdamW and the loss of transformers, or the chunked loss with `s.chunked`."""
    model.train()
    if s.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    optimizer = torch.optim.AdamW(trained, lr=s.lr, fused=True)
    backbone = family_of(base).backbone_of(base)
    hidden = hidden_states(backbone, s)

    def precision() -> AbstractContextManager[Any]:
        return torch.autocast(s.device, torch.bfloat16) if s.bf16 else nullcontext()

    if s.chunked:
        step = chunked_step(base, hidden, optimizer, trained, precision, s)
        return Arm(base, trained, published, flops, optimizer, step, hidden)
    run = torch.compile(model, backend=s.compile, dynamic=False) if s.compile else model

    def native(batch: Batch) -> Tensor:
        with precision():
            loss = run(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                labels=batch.labels,
                shift_labels=batch.labels,
                use_cache=False,
            ).loss
        loss.backward()
        _update(optimizer, trained, s)
        return loss.detach()

    return Arm(base, trained, published, flops, optimizer, native, hidden)


def _update(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], s: Settings) -> None:
    if s.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(trained, s.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _frozen(make_base: MakeBase, s: Settings) -> PreTrainedModel:
    base = make_base().requires_grad_(False)
    return base.to(s.device, torch.bfloat16) if s.bf16 else base.to(s.device)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Cost:
    """The FLOPs per token that each training method needs on a base with layers of equal shape.

    A matrix of N parameters costs 2 N forward, 2 N for the gradient of its input and 2 N for its own gradient. Causal
    attention over T tokens costs 2 T D forward (half of the square) and twice that backward. Only matrix products and
    attention count: embeddings, norms, optimizers and the folding of heads do not.
    """

    def __init__(self, base: PreTrainedModel, length: int) -> None:
        config = base.config
        layers = family_of(base).layers_of(base)
        self.depth = len(layers)
        per_layer = [
            p.numel() for layer in layers for n, p in layer.named_parameters() if p.ndim == 2 and "embed" not in n
        ]
        self.layer = sum(per_layer) / self.depth
        heads = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size)
        width = heads if getattr(config, "head_dim", None) else config.hidden_size
        self.attention = 2 * length * width
        self.head = config.vocab_size * config.hidden_size

    def forward(self, layers: int) -> float:
        return layers * (2 * self.layer + self.attention)

    def full(self) -> float:
        return 3 * self.forward(self.depth) + 6 * self.head

    def lora(self, numbers: int) -> float:
        return self.depth * (4 * self.layer + 3 * self.attention) + 6 * numbers + 4 * self.head

    def last(self, count: int) -> float:
        return self.forward(self.depth - count) + 3 * self.forward(count) + 6 * self.head

    def fork(self, below: int, numbers: int, full: bool) -> float:
        """Return the FLOPs of a fork that is active on all tokens.

        The layers below the fork need no gradient. The layers above need the gradient of their input, and with `full`
        also the gradient of their weights.
        """
        above = self.depth - below
        products = (6 if full else 4) * self.layer
        return self.forward(below) + above * (products + 3 * self.attention) + 6 * numbers + 4 * self.head

    def stage(self, own: nn.Module, count: int, head: str, cached: bool) -> float:
        below = 0.0 if cached else self.forward(self.depth)
        return below + 3 * self.forward(count) + (4 if head == "none" else 6) * self.head
