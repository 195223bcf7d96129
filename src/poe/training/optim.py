"""MuonAdamW: one optimizer, Muon for the matrices of the layers and AdamW for everything else.

Every parameter group names its rule (`kind`). The Muon rule is Nesterov momentum, orthogonalized by the Polar Express
iteration (arXiv 2505.16932), rescaled by NorMuon's factored second moment (arXiv 2510.05491), with cautious weight
decay (arXiv 2510.12402). The recipe of the two together follows nanochat (karpathy/nanochat). With a process group
the work and the state are divided among its processes (see `poe.training.parallel.zero`).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from poe.errors import TrainingError
from poe.training.parallel.zero import Shards

__all__ = ["MuonAdamW", "build_optimizer", "default_iteration_dtype", "orthogonalize", "width_scale"]

Group = dict[str, Any]

# Five odd polynomials a*s + b*s^3 + c*s^5 of the singular values (paper's algorithm, safety factor 0.02, cushion 2).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MUON_DEFAULTS: Group = {"momentum": 0.95, "beta2": 0.95, "weight_decay": 0.0, "cautious": True}
ADAMW_DEFAULTS: Group = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
# Matrices are stacked up to this many elements: the temporaries of a step stay near 5 x 32 MiB in fp32.
MAX_STACKED_ELEMENTS = 1 << 23


class _Entry(NamedTuple):
    """One parameter as a rule sees it: `weight` is the fp32 master where there is one, else `param` itself.

    With a process group, all four are of the shard that this process owns.
    """

    param: Tensor
    grad: Tensor
    weight: Tensor
    state: dict[str, Any]


def default_iteration_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype in which orthogonalizing is fastest: bf16 where the hardware multiplies bf16 matrices, else fp32."""
    kind = torch.device(device).type
    # where a CPU only emulates bf16, the same step takes several times as long as in fp32
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if kind == "cuda" or (kind == "cpu" and native) else torch.float32


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace the singular values of each of `matrices` (n, rows, cols) by about 1, as `U V^T` would exactly.

    Polar Express, five steps (arXiv 2505.16932), on the smaller Gram matrix, in `dtype`, which is the result's too.
    Singular values from 0.001 of the Frobenius norm upwards end in 0.86 to 1.14; smaller ones are raised, but not all
    the way, and zeros stay zero.
    """
    # (n, 1, 1); a zero matrix stays zero, and no gradient is too small to have a direction
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices / (norms * 1.02).clamp_min_(1e-30)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)  # (n, k, k), k = min(rows, cols)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer, chosen per parameter group.

    `params`: group dicts, each with `kind` and `lr`, and optionally:

    - `kind="muon"` (2-D parameters only): `momentum` 0.95, `beta2` 0.95 (of NorMuon's second moment), `weight_decay` 0,
      `cautious` True (decay only the entries that the update shrinks). The step of a (rows, cols) matrix, decay
      included, is scaled by `max(1, rows / cols) ** 0.5`.
    - `kind="adamw"`: `betas` (0.8, 0.95), `eps` 1e-10, `weight_decay` 0 (decoupled, on every entry), bias-corrected.

    `initial_lr` is set to the group's `lr` unless given; schedules multiply it. `iteration_dtype` (bfloat16, float32 or
    float64; None: by hardware, see `default_iteration_dtype`) is what Muon orthogonalizes in; it is not part of the
    state, so a run may continue on other hardware.

    Half-precision parameters get an fp32 master copy in the state at their first step; every update goes to the master
    and is copied into the parameter. Parameters without a gradient are skipped. Saving, loading and continuing is
    bit-identical to not having stopped.

    `process_group`: ZeRO-2 over its processes, which hold the same parameters, each with gradients of its own; the
    step is that of their sum (so divide the loss by what all of them count). A process keeps the state of its shard
    only: Muon's matrices are dealt out whole, AdamW's tensors are cut. Every process must call `step`, and
    `clip_grad_norm_` if any does; a gradient that some lack counts as zero there. `state_dict` is the shard's.

    Raises `ValueError` for a group without `kind` or `lr`, a Muon parameter that is not 2-D, another
    `iteration_dtype`, or a group added to a sharded optimizer; `TrainingError` from `load_state_dict` when the state is
    another model's or another shard's.
    """

    def __init__(
        self,
        params: Iterable[Group],
        *,
        iteration_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if iteration_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"iteration_dtype: expected bfloat16, float32, float64 or None, got {iteration_dtype}.")
        self.iteration_dtype = iteration_dtype
        self.shards: Shards | None = None
        super().__init__(params, defaults={})
        if process_group is not None:
            kinds = [(p, g["kind"]) for g in self.param_groups for p in g["params"]]
            self.shards = Shards([p for p, _ in kinds], [kind == "muon" for _, kind in kinds], process_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "iteration_dtype": self.iteration_dtype, "shards": self.shards}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group (see the class): missing options are filled in by its kind."""
        if self.shards is not None:
            raise ValueError("A sharded optimizer is divided when it is made: give it every parameter group then.")
        kind = param_group.get("kind") if isinstance(param_group, dict) else None
        if kind not in ("muon", "adamw"):
            raise ValueError(f"Every parameter group needs kind='muon' or kind='adamw', got {kind!r}.")
        if "lr" not in param_group:
            raise ValueError(f"The {kind} parameter group needs a learning rate: lr=...")
        param_group = (MUON_DEFAULTS if kind == "muon" else ADAMW_DEFAULTS) | param_group
        param_group.setdefault("initial_lr", param_group["lr"])
        super().add_param_group(param_group)
        wrong = [tuple(p.shape) for p in param_group["params"] if p.ndim != 2]
        if kind == "muon" and wrong:
            self.param_groups.pop()
            raise ValueError(f"Muon takes 2-D matrices, got shape {wrong[0]}; put it in an 'adamw' group.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; returns what `closure` (run with gradients) returned, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.shards is not None:
            self.shards.reduce()
        for group in self.param_groups:
            rule = self._muon if group["kind"] == "muon" else self._adamw
            for entries in self._batches(group):
                rule(entries, group)
                halves = [e for e in entries if e.weight is not e.param]
                if halves:
                    torch._foreach_copy_([e.param for e in halves], [e.weight for e in halves])
        if self.shards is not None:
            self.shards.gather()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear every gradient, and the sum over the processes, should no step have used it."""
        super().zero_grad(set_to_none)
        if self.shards is not None:
            self.shards.forget()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float | None = None) -> Tensor:
        """Return the L2 norm of all gradients, a scalar in fp32 or wider; scale them down to `max_norm` if given.

        Call it between the backward pass and `step`. With a process group it is the norm of the summed gradients, the
        same on every process, and what is scaled is the sum that `step` will use, not each parameter's `grad`. Where
        the norm is not finite nothing is scaled.
        """
        if self.shards is not None:
            grads = self.shards.grads
        else:
            grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        device = self.param_groups[0]["params"][0].device
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        total = torch.zeros((), device=device)
        if norms:
            total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
        if self.shards is not None:
            total = self.shards.norm(total)
        if max_norm is not None:
            factor = (max_norm / (total + 1e-6)).clamp_(max=1.0)
            factor = torch.where(total.isfinite(), factor, 1.0)  # or the tensor at fault could not be told from others
            for grad in grads:
                grad.mul_(factor.to(grad.device))
        return total

    def _batches(self, group: Group) -> Iterator[list[_Entry]]:
        """The group's parameters that have a gradient, in batches a rule can handle in one call, of bounded size."""
        buckets: dict[tuple[Any, ...], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError("MuonAdamW takes dense gradients: build the embedding with sparse=False.")
            if self._share(p) is None:
                continue
            shape = p.shape if group["kind"] == "muon" else None  # only Muon stacks
            buckets.setdefault((shape, p.dtype, p.device), []).append(p)
        for params in buckets.values():
            batch: list[_Entry] = []
            elements = 0
            for p in params:
                if batch and elements + p.numel() > MAX_STACKED_ELEMENTS:
                    yield batch
                    batch, elements = [], 0
                batch.append(self._entry(p))
                elements += p.numel()
            yield batch

    def _share(self, param: Tensor) -> tuple[Tensor, Tensor] | None:
        """What this process updates of a parameter, and its gradient; None where there is nothing to do."""
        if self.shards is not None:
            return self.shards.share(param)
        return None if param.grad is None else (param, param.grad)

    def _entry(self, param: Tensor) -> _Entry:
        state = self.state[param]
        share = self._share(param)
        assert share is not None
        part, grad = share
        if part.dtype not in (torch.bfloat16, torch.float16):
            return _Entry(part, grad, part, state)
        if "master" not in state:
            state["master"] = part.detach().to(torch.float32, copy=True)
        return _Entry(part, grad.float(), state["master"], state)

    def _adamw(self, entries: list[_Entry], group: Group) -> None:
        for e in entries:
            if "step" not in e.state:
                e.state["step"] = torch.zeros((), dtype=torch.float32, device=e.param.device)
                e.state["exp_avg"] = torch.zeros_like(e.weight)
                e.state["exp_avg_sq"] = torch.zeros_like(e.weight)
        beta1, beta2 = group["betas"]
        adamw(
            [e.weight for e in entries],
            [e.grad for e in entries],
            [e.state["exp_avg"] for e in entries],
            [e.state["exp_avg_sq"] for e in entries],
            [],
            [e.state["step"] for e in entries],
            fused=entries[0].param.device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        # the fused kernel writes without telling autograd, but a folded head is cached by its parts' versions
        torch.autograd.graph.increment_version([e.weight for e in entries])

    def _muon(self, entries: list[_Entry], group: Group) -> None:
        rows, cols = entries[0].param.shape
        dim = -1 if rows >= cols else -2  # one variance per row of a tall matrix, per column of a wide one
        for e in entries:
            if "momentum" not in e.state:
                e.state["momentum"] = torch.zeros_like(e.weight)
                e.state["variance"] = e.weight.new_zeros((rows, 1) if dim == -1 else (1, cols))
        weights = [e.weight for e in entries]
        momenta = [e.state["momentum"] for e in entries]
        variances = [e.state["variance"] for e in entries]

        update = torch.stack([e.grad for e in entries])  # (n, rows, cols), through to the end
        torch._foreach_lerp_(momenta, list(update.unbind()), 1 - group["momentum"])
        torch._foreach_lerp_(list(update.unbind()), momenta, group["momentum"])  # Nesterov's look ahead
        dtype = self.iteration_dtype or default_iteration_dtype(update.device)
        update = orthogonalize(update, dtype).to(weights[0].dtype)

        # NorMuon: divide by the running root mean square of each row or column, keep each matrix's Frobenius norm.
        mean_sq = update.square().mean(dim=dim, keepdim=True)  # (n, rows, 1) or (n, 1, cols)
        torch._foreach_lerp_(variances, list(mean_sq.unbind()), 1 - group["beta2"])
        scale = torch.stack(variances).clamp_min_(1e-10).rsqrt_()
        before = mean_sq.sum(dim=(-2, -1), keepdim=True)
        after = (mean_sq * scale.square()).sum(dim=(-2, -1), keepdim=True)
        scale.mul_(before.div_(after.clamp_min_(1e-20)).sqrt_())
        lr = group["lr"] * math.sqrt(max(1.0, rows / cols))
        update.mul_(scale.mul_(lr))

        if group["weight_decay"]:
            stacked = torch.stack(weights)
            if group["cautious"]:
                stacked.mul_((stacked * update).ge_(0))
            update.add_(stacked, alpha=lr * group["weight_decay"])
        torch._foreach_sub_(weights, list(update.unbind()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict()` gave; every tensor keeps its dtype (torch would round fp32 masters to bf16)."""
        try:
            super().load_state_dict({**state_dict, "state": {}})
        except ValueError as error:
            raise TrainingError(f"The optimizer state is another model's: {error}. Start anew or fix --out.") from error
        saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = [p for g in self.param_groups for p in g["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(saved_id, {})
            if saved and self.shards is not None and self.shards.piece(param) is None:
                raise TrainingError(f"The optimizer state is another shard's: this one has no parameter {saved_id}.")
            for key in ("master", "momentum", "exp_avg", "exp_avg_sq"):
                own = param if self.shards is None or not saved else self.shards.cut(param, param.detach())
                if key in saved and saved[key].shape != own.shape:
                    raise TrainingError(
                        f"The optimizer state is another model's: {key} of parameter {saved_id} has shape "
                        f"{tuple(saved[key].shape)}, the parameter {tuple(own.shape)}."
                    )
            if saved:
                self.state[param] = {
                    k: v.to(param.device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.items()
                }


def width_scale(hidden_size: int) -> float:
    """What AdamW learning rates, tuned at width 768, are multiplied by at another width: `(d / 768) ** -0.5`."""
    return (hidden_size / 768) ** -0.5


def _role(name: str, param: Tensor) -> str:
    """The group a parameter belongs to, by its name and its number of dimensions; the first match holds."""
    parts = name.split(".")
    if param.ndim < 2:
        return "scalars"
    if parts[0] in ("head", "heads") or "deltas" in parts or parts[-1] in ("a", "b"):  # dense or low-rank deltas
        return "head"
    if parts[0] in ("lm_head", "lm_head_stages"):
        return "unembedding"
    if any("embed" in part for part in parts):
        return "embeddings"
    if param.ndim == 2 and "layers" in parts:
        return "matrices"
    return "other"


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    hidden_size: int,
    *,
    matrix_lr: float = 0.002,
    head_lr: float = 1e-4,
    embed_lr: float = 0.004,
    unembed_lr: float = 0.004,
    scalar_lr: float = 0.005,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.8, 0.95),
    matrix_optimizer: str = "muon",
    iteration_dtype: torch.dtype | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> MuonAdamW:
    """Sort the parameters that require a gradient into groups and return the optimizer over them.

    Works for a stage (`layers.0.self_attn.q_proj.weight`, `head.weight`, `head.a`, `head.b`, `norm.weight`) and for a
    whole base (`model.embed_tokens.weight`, `model.layers.0...`, `lm_head.weight`). Each group carries its `name`:

    - `matrices`: 2-D inside `layers`, Muon at `matrix_lr`, decayed;
    - `head`: head deltas (`head.`, `heads.`, `lm_head.deltas.`) and low-rank factors (`.a`, `.b`) at `head_lr`,
      decayed, so that an unused delta shrinks back to the base's head; `other`: any remaining matrix, likewise;
    - `embeddings` (`embed_lr`), `unembedding` (`lm_head`, `unembed_lr`), `scalars` (fewer than 2 dimensions: norms,
      biases; `scalar_lr`): not decayed.

    All but `matrices` are AdamW, their rates multiplied by `width_scale(hidden_size)`. With `matrix_optimizer="adamw"`
    so are the matrices: `matrix_lr` is then an AdamW rate at width 768, scaled like the others (good ones are smaller
    than Muon's), and `momentum` is not used. `process_group`: see `MuonAdamW`. A parameter seen twice under two names
    (tied) counts once, under the first.

    Raises `ValueError` when nothing requires a gradient, or for another `matrix_optimizer`.
    """
    if matrix_optimizer not in ("muon", "adamw"):
        raise ValueError(f"matrix_optimizer: expected 'muon' or 'adamw', got {matrix_optimizer!r}.")
    width = width_scale(hidden_size)
    adam: Group = {"kind": "adamw", "betas": betas}
    matrices: Group = {"kind": "muon", "lr": matrix_lr, "momentum": momentum}
    if matrix_optimizer == "adamw":
        matrices = {**adam, "lr": matrix_lr * width}
    groups: dict[str, Group] = {
        "matrices": {**matrices, "weight_decay": weight_decay},
        "head": {**adam, "lr": head_lr * width, "weight_decay": weight_decay},
        "other": {**adam, "lr": head_lr * width, "weight_decay": weight_decay},
        "embeddings": {**adam, "lr": embed_lr * width},
        "unembedding": {**adam, "lr": unembed_lr * width},
        "scalars": {**adam, "lr": scalar_lr * width},
    }
    members: dict[str, list[tuple[str, Tensor]]] = {role: [] for role in groups}
    seen: set[int] = set()
    for name, param in named_parameters:
        if param.requires_grad and id(param) not in seen:
            seen.add(id(param))
            members[_role(name, param)].append((name, param))
    if not seen:
        raise ValueError("Nothing to optimize: no parameter requires a gradient.")
    chosen = [{**groups[role], "name": role, "params": params} for role, params in members.items() if params]
    return MuonAdamW(chosen, iteration_dtype=iteration_dtype, process_group=process_group)
