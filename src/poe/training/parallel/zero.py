"""ZeRO-2: every process keeps the summed gradients and the optimizer state of its own shard only.

After stage 2 of ZeRO (arXiv 1910.02054): gradients are reduce-scattered, each process updates its shard, the updated
parameters are all-gathered. Traffic goes in flat buckets, in the parameters' own dtype; the calls are those that gloo
and NCCL both have.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Piece", "Shards", "divide"]

# A bucket holds this many elements over all ranks: 128 MiB in fp32, whatever the number of processes.
BUCKET_ELEMENTS = 1 << 25


class Piece(NamedTuple):
    """Elements `start` to `stop` of the flattened parameter number `parameter`."""

    parameter: int
    start: int
    stop: int


class _Placed(NamedTuple):
    """A piece and the position of its first element in its owner's segment."""

    piece: Piece
    offset: int

    def within(self, start: int, stop: int) -> tuple[slice, slice] | None:
        """The part between `start` and `stop` of the segment: where in the parameter, and where from `start` on."""
        low, high = max(start, self.offset), min(stop, self.offset + self.piece.stop - self.piece.start)
        if low >= high:
            return None
        shift = self.piece.start - self.offset
        return slice(low + shift, high + shift), slice(low - start, high - start)


class _Space(NamedTuple):
    """The parameters that travel together (one dtype, one device): a segment per rank, the longest `length` long."""

    dtype: torch.dtype
    device: torch.device
    segments: list[list[_Placed]]
    length: int


def divide(sizes: Sequence[int], whole: Sequence[bool], world_size: int) -> list[list[Piece]]:
    """Return each rank's pieces of parameters with `sizes` elements, of which those in `whole` must not be cut.

    Whole ones go, the largest first, to the rank that has least; the others, end to end, are cut into `world_size`
    equal parts. Every element belongs to one rank, and a rank has at most one piece of a parameter.
    """
    ranks: list[list[Piece]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for index in sorted((i for i, keep in enumerate(whole) if keep), key=lambda i: (-sizes[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[index]
        ranks[rank].append(Piece(index, 0, sizes[index]))
    total = sum(size for size, keep in zip(sizes, whole, strict=True) if not keep)
    bounds = [rank * total // world_size for rank in range(world_size + 1)]
    begin = 0
    for index, (size, keep) in enumerate(zip(sizes, whole, strict=True)):
        if keep:
            continue
        for rank in range(world_size):
            start, stop = max(bounds[rank] - begin, 0), min(bounds[rank + 1] - begin, size)
            if start < stop:
                ranks[rank].append(Piece(index, start, stop))
        begin += size
    return ranks


class Shards:
    """What each process of a group owns of `params`, and the traffic that makes their copies agree.

    `whole[i]`: parameter i may not be cut. Every process must give the same parameters in the same order. One step is
    `reduce`, then `share` of every parameter, updated in place, then `gather`.

    Raises `ValueError` for a parameter that is not contiguous in memory.
    """

    def __init__(self, params: Sequence[Tensor], whole: Sequence[bool], process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.params = list(params)
        for param in self.params:
            if not param.is_contiguous():
                raise ValueError(f"A sharded parameter must be contiguous, got strides {param.stride()}.")
        self._spaces = list(self._make_spaces(whole))
        own = [placed.piece for space in self._spaces for placed in space.segments[self.rank]]
        self._own = {self.params[piece.parameter]: piece for piece in own}
        self._grads: dict[Tensor, Tensor] | None = None  # of the own shard, summed over all ranks
        self._present: list[int] = []  # by parameter, 1 where any rank has a gradient

    def _make_spaces(self, whole: Sequence[bool]) -> Iterator[_Space]:
        together: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, param in enumerate(self.params):
            together.setdefault((param.dtype, param.device), []).append(index)
        for (dtype, device), indices in together.items():
            sizes = [self.params[i].numel() for i in indices]
            segments: list[list[_Placed]] = []
            length = 0
            for pieces in divide(sizes, [whole[i] for i in indices], self.world_size):
                segment, offset = [], 0
                for piece in pieces:
                    segment.append(_Placed(piece._replace(parameter=indices[piece.parameter]), offset))
                    offset += piece.stop - piece.start
                segments.append(segment)
                length = max(length, offset)
            yield _Space(dtype, device, segments, length)

    def piece(self, param: Tensor) -> Piece | None:
        """The part of a parameter that this process owns; None where that is nothing."""
        return self._own.get(param)

    def cut(self, param: Tensor, whole: Tensor) -> Tensor:
        """The own part of a tensor (the parameter's shape, kept where all of it is owned, else flat); not a copy."""
        piece = self._own[param]
        if piece.stop - piece.start == param.numel():
            return whole.view(param.shape)
        return whole.view(-1)[piece.start : piece.stop]

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of the own shard, summed over all ranks; scaling them in place scales the step."""
        self.reduce()
        assert self._grads is not None
        return list(self._grads.values())

    def share(self, param: Tensor) -> tuple[Tensor, Tensor] | None:
        """The own part of a parameter and its gradient, after `reduce`; None where no rank has a gradient."""
        assert self._grads is not None
        if param not in self._grads:
            return None
        part = self.cut(param, param.detach())
        return part, self._grads[param].view(part.shape)

    def norm(self, own: Tensor) -> Tensor:
        """The global L2 norm (a scalar) from that of the own shard."""
        squared = own.double().square()  # one dtype, whatever this rank's gradients have
        dist.all_reduce(squared, group=self.process_group)
        return squared.sqrt_().to(own.dtype)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over all ranks and keep the own shard's; once per step, so it may be called again.

        A gradient that only some ranks have counts as zero on the others.
        """
        if self._grads is not None:
            return
        have = [int(p.grad is not None) for p in self.params]
        present = torch.tensor(have, dtype=torch.int32, device=self.params[0].device)
        dist.all_reduce(present, op=dist.ReduceOp.MAX, group=self.process_group)
        self._present = present.tolist()
        self._grads = {}
        for space in self._spaces:
            shard = torch.empty(space.length, dtype=space.dtype, device=space.device)
            for start, stop in self._buckets(space):
                # what pads a row is never read
                sent = torch.empty(self.world_size, stop - start, dtype=space.dtype, device=space.device)
                for row, segment in zip(sent, space.segments, strict=True):
                    for index, part, where in _parts(segment, start, stop):
                        grad = self.params[index].grad
                        row[where] = 0 if grad is None else grad.reshape(-1)[part]
                _reduce_scatter(shard[start:stop], sent.view(-1), self.process_group)
            for (index, begin, end), offset in space.segments[self.rank]:
                if self._present[index]:
                    self._grads[self.params[index]] = shard[offset : offset + end - begin]

    @torch.no_grad()
    def gather(self) -> None:
        """Give every rank the parts of the parameters that the others own; ends the step."""
        for space in self._spaces:
            for start, stop in self._buckets(space):
                mine = torch.empty(stop - start, dtype=space.dtype, device=space.device)
                for index, part, where in _parts(space.segments[self.rank], start, stop):
                    mine[where] = self.params[index].detach().view(-1)[part]
                received = torch.empty(self.world_size * (stop - start), dtype=space.dtype, device=space.device)
                _all_gather(received, mine, self.process_group)
                rows = received.view(self.world_size, -1)
                for rank, segment in enumerate(space.segments):
                    for index, part, where in _parts(segment, start, stop) if rank != self.rank else ():
                        if self._present[index]:  # what nobody changed keeps its version
                            self.params[index].detach().view(-1)[part] = rows[rank, where]
        self.forget()

    def forget(self) -> None:
        """Drop the summed gradients: the next `reduce` sums anew."""
        self._grads = None

    def _buckets(self, space: _Space) -> Iterator[tuple[int, int]]:
        """The stretches of the segments that travel in one call."""
        size = max(1, BUCKET_ELEMENTS // self.world_size)
        for start in range(0, space.length, size):
            yield start, min(start + size, space.length)


def _parts(segment: list[_Placed], start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
    """Of every parameter with elements in a stretch of a segment: its index, the elements, their place in it."""
    for placed in segment:
        overlap = placed.within(start, stop)
        if overlap is not None:
            yield placed.piece.parameter, *overlap


# torch 2.13 renames the two calls, and warns about the names that torch 2.9 has.


def _reduce_scatter(output: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    call(output, sent, group=group)


def _all_gather(output: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(output, sent, group=group)
