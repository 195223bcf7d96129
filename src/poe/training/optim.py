"""MuonAdamW: one optimizer with Muon for the matrices of the layers and AdamW for all other parameters.

Every parameter group has a `kind`, muon or adamw. The Muon update is Nesterov momentum, orthogonalized by the Polar
Express iteration (arXiv 2505.16932), rescaled by NorMuon's factored second moment (arXiv 2510.05491), with cautious
weight decay (arXiv 2510.12402). The combination follows nanochat (karpathy/nanochat). With a process group the work and
the state are divided among its processes (see `poe.training.parallel.zero`).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from einops import reduce
from torch import Tensor
from torch.optim.adamw import adamw

from poe.errors import TrainingError
from poe.training.parallel.zero import Shards
from poe.training.precision import choose_dtype

__all__ = ["MuonAdamW", "build_optimizer", "orthogonalize", "width_scale"]

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
# The most elements of a stack of matrices: the temporary tensors of a step take about 5 x 32 MiB in fp32.
MAX_STACKED_ELEMENTS = 1 << 23


class _Update(NamedTuple):
    """A parameter with its gradient and state. `weight` is the fp32 master if there is one, otherwise `param`.

    With a process group the tensors are the shard that this process owns.
    """

    param: Tensor
    grad: Tensor
    weight: Tensor
    state: dict[str, Any]


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `matrices` (n, rows, cols) with singular values near 1, an approximation of `U V^T`, in `dtype`.

    The method is Polar Express with five steps (arXiv 2505.16932), on the smaller Gram matrix. Singular values of at
    least 0.001 of the Frobenius norm end between 0.86 and 1.14. Smaller ones grow but end below, and zero stays zero.
    """
    # (n, 1, 1); the tiny lower bound keeps a zero matrix zero, and normalizes very small gradients
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

    `initial_lr` defaults to the group's `lr`; schedules multiply it. Muon orthogonalizes in `iteration_dtype`
    (bfloat16, float32 or float64). The default, None, is bfloat16 if the hardware is fast at it, otherwise float32. It
    is not part of the state, so a run may continue on other hardware.

    A half-precision parameter gets an fp32 master copy in the state at its first step. Every update changes the master,
    which is then copied into the parameter. Parameters without a gradient are skipped. A run that is saved, loaded and
    continued is bit-identical to an uninterrupted run.

    `process_group` turns on ZeRO-2 over its processes. They hold the same parameters, each with its own gradients, and
    the step uses the sum of the gradients, so divide the loss by the count over all processes. A process keeps the
    state of its shard only: Muon's matrices are assigned whole, AdamW's tensors are cut. Every process must call
    `step`, and `clip_grad_norm_` if any process does. A missing gradient counts as zero. `state_dict` returns the state
    of the shard.

    Raises `ValueError` for a group without `kind` or `lr`, a Muon parameter that is not 2-D, another
    `iteration_dtype`, or a group added to a sharded optimizer; `TrainingError` from `load_state_dict` when the state
    belongs to another model or another shard.
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
        """Add a parameter group; missing options get the defaults of its kind (see the class)."""
        if self.shards is not None:
            raise ValueError(
                "A sharded optimizer is divided when it is created: pass every parameter group to its constructor."
            )
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
        """Take one step and return the result of `closure`, which runs with gradients enabled, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.shards is not None:
            self.shards.reduce_gradients()
        for group in self.param_groups:
            update = self._update_muon if group["kind"] == "muon" else self._update_adamw
            for batch in self._batches(group):
                update(batch, group)
                half_precision = [u for u in batch if u.weight is not u.param]
                if half_precision:
                    torch._foreach_copy_([u.param for u in half_precision], [u.weight for u in half_precision])
        if self.shards is not None:
            self.shards.gather_parameters()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear every gradient, and the sum over the processes if no step has used it."""
        super().zero_grad(set_to_none)
        if self.shards is not None:
            self.shards.clear_gradients()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float | None = None) -> Tensor:
        """Return the L2 norm of all gradients, a scalar in fp32 or wider, and scale them down to `max_norm` if given.

        Call it between the backward pass and `step`. With a process group it is the norm of the summed gradients, equal
        in every process. It then scales the sum that `step` will use, not the `grad` of each parameter. A norm that is
        not finite scales nothing.
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
            total = self.shards.global_norm(total)
        if max_norm is not None:
            factor = (max_norm / (total + 1e-6)).clamp_(max=1.0)
            # a norm that is not finite leaves the gradients unchanged, so that the bad tensor can be found
            factor = torch.where(total.isfinite(), factor, 1.0)
            for grad in grads:
                grad.mul_(factor.to(grad.device))
        return total

    def _batches(self, group: Group) -> Iterator[list[_Update]]:
        """Yield the parameters of a group that have a gradient, in batches of bounded size for one update call."""
        buckets: dict[tuple[Any, ...], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError("MuonAdamW takes dense gradients: build the embedding with sparse=False.")
            if self._owned(p) is None:
                continue
            shape = p.shape if group["kind"] == "muon" else None  # Muon stacks parameters of equal shapes
            buckets.setdefault((shape, p.dtype, p.device), []).append(p)
        for params in buckets.values():
            batch: list[_Update] = []
            elements = 0
            for p in params:
                if batch and elements + p.numel() > MAX_STACKED_ELEMENTS:
                    yield batch
                    batch, elements = [], 0
                batch.append(self._make_update(p))
                elements += p.numel()
            yield batch

    def _owned(self, param: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the part of a parameter that this process updates, and its gradient; None without a gradient."""
        if self.shards is not None:
            return self.shards.own_part(param)
        return None if param.grad is None else (param, param.grad)

    def _make_update(self, param: Tensor) -> _Update:
        state = self.state[param]
        owned = self._owned(param)
        assert owned is not None
        part, grad = owned
        if part.dtype not in (torch.bfloat16, torch.float16):
            return _Update(part, grad, part, state)
        if "master" not in state:
            state["master"] = part.detach().to(torch.float32, copy=True)
        return _Update(part, grad.float(), state["master"], state)

    def _update_adamw(self, batch: list[_Update], group: Group) -> None:
        for u in batch:
            if "step" not in u.state:
                u.state["step"] = torch.zeros((), dtype=torch.float32, device=u.param.device)
                u.state["exp_avg"] = torch.zeros_like(u.weight)
                u.state["exp_avg_sq"] = torch.zeros_like(u.weight)
        beta1, beta2 = group["betas"]
        adamw(
            [u.weight for u in batch],
            [u.grad for u in batch],
            [u.state["exp_avg"] for u in batch],
            [u.state["exp_avg_sq"] for u in batch],
            [],
            [u.state["step"] for u in batch],
            fused=batch[0].param.device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        # The fused kernel does not increment the tensors' versions, which the cache of the folded head compares.
        torch.autograd.graph.increment_version([u.weight for u in batch])

    def _update_muon(self, batch: list[_Update], group: Group) -> None:
        rows, cols = batch[0].param.shape
        # the shape of NorMuon's second moment: one number per row of a tall matrix, per column of a wide one
        variance_shape, pattern = ((rows, 1), "n rows 1") if rows >= cols else ((1, cols), "n 1 cols")
        for u in batch:
            if "momentum" not in u.state:
                u.state["momentum"] = torch.zeros_like(u.weight)
                u.state["variance"] = u.weight.new_zeros(variance_shape)
        weights = [u.weight for u in batch]
        momenta = [u.state["momentum"] for u in batch]
        variances = [u.state["variance"] for u in batch]

        update = torch.stack([u.grad for u in batch])  # (n, rows, cols)
        torch._foreach_lerp_(momenta, list(update.unbind()), 1 - group["momentum"])
        torch._foreach_lerp_(list(update.unbind()), momenta, group["momentum"])  # Nesterov momentum
        dtype = self.iteration_dtype or choose_dtype("auto", update.device)
        update = orthogonalize(update, dtype).to(weights[0].dtype)

        # NorMuon: divide by the running root mean square of each row or column, keep the Frobenius norm of each matrix.
        mean_sq = reduce(update.square(), f"n rows cols -> {pattern}", "mean")
        torch._foreach_lerp_(variances, list(mean_sq.unbind()), 1 - group["beta2"])
        scale = torch.stack(variances).clamp_min_(1e-10).rsqrt_()
        before = reduce(mean_sq, "n rows cols -> n 1 1", "sum")
        after = reduce(mean_sq * scale.square(), "n rows cols -> n 1 1", "sum")
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
        """Restore the result of `state_dict()`. Tensors keep their dtypes; torch would round fp32 masters to bf16."""
        try:
            super().load_state_dict({**state_dict, "state": {}})
        except ValueError as error:
            raise TrainingError(
                f"The optimizer state belongs to another model: {error}. Start again, or correct --out."
            ) from error
        saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = [p for g in self.param_groups for p in g["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(saved_id, {})
            if saved and self.shards is not None and self.shards.piece(param) is None:
                raise TrainingError(
                    f"The optimizer state belongs to another shard: this one has no parameter {saved_id}."
                )
            for key in ("master", "momentum", "exp_avg", "exp_avg_sq"):
                own = param if self.shards is None or not saved else self.shards.cut(param, param.detach())
                if key in saved and saved[key].shape != own.shape:
                    raise TrainingError(
                        f"The optimizer state belongs to another model: {key} of parameter {saved_id} has shape "
                        f"{tuple(saved[key].shape)}, the parameter {tuple(own.shape)}."
                    )
            if saved:
                self.state[param] = {
                    k: v.to(param.device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.items()
                }


def width_scale(hidden_size: int) -> float:
    """Return the factor of AdamW learning rates, which are tuned at width 768: `(hidden_size / 768) ** -0.5`."""
    return (hidden_size / 768) ** -0.5


def _group_name(name: str, param: Tensor) -> str:
    """Return the group of a parameter, from its name and its number of dimensions."""
    parts = name.split(".")
    if param.ndim < 2:
        return "scalars"
    if parts[0] in ("head", "heads") or "deltas" in parts:  # dense or low-rank deltas
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
    """Sort the parameters that require a gradient into groups, and return an optimizer for them.

    The parameters are those of a stage (`layers.0.self_attn.q_proj.weight`, `head.weight`, `head.a`, `norm.weight`) or
    of a whole base (`model.embed_tokens.weight`, `model.layers.0...`, `lm_head.weight`). Each group has its `name`:

    - `matrices`: 2-D inside `layers`, a fork's changes among them; Muon at `matrix_lr`, with weight decay;
    - `head`: head deltas (`head.`, `heads.`, `lm_head.deltas.`); `head_lr`, with weight decay, so that an unused delta
      shrinks back to the base's head;
    - `other`: all remaining matrices; `head_lr`, with weight decay;
    - `embeddings` (`embed_lr`), `unembedding` (`lm_head`, `unembed_lr`), `scalars` (fewer than 2 dimensions: norms,
      biases; `scalar_lr`): without weight decay.

    All groups but `matrices` use AdamW, with rates multiplied by `width_scale(hidden_size)`. With
    `matrix_optimizer="adamw"` the matrices do so as well: `matrix_lr` is then an AdamW rate at width 768, for which
    good values are smaller than for Muon, and `momentum` is not used. `process_group`: see `MuonAdamW`. A tied
    parameter counts once, under its first name.

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
    members: dict[str, list[tuple[str, Tensor]]] = {group: [] for group in groups}
    seen: set[int] = set()
    for name, param in named_parameters:
        if param.requires_grad and id(param) not in seen:
            seen.add(id(param))
            members[_group_name(name, param)].append((name, param))
    if not seen:
        raise ValueError("Nothing to optimize: no parameter requires a gradient.")
    chosen = [{**groups[group], "name": group, "params": params} for group, params in members.items() if params]
    return MuonAdamW(chosen, iteration_dtype=iteration_dtype, process_group=process_group)
