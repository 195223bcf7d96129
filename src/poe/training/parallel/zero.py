"""ZeRO-2: every process keeps the summed gradients and the optimizer state of its own shard only.

This is stage 2 of ZeRO (arXiv 1910.02054): gradients are reduce-scattered, each process updates its shard, and the
updated parameters are all-gathered. The data travels in flat buckets, in the dtype of the parameters, with collectives
that gloo and NCCL both have.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

__all__ = ["Piece", "Shards", "divide_parameters"]

# Elements of a bucket over all ranks: 128 MiB in fp32 for any number of processes.
BUCKET_ELEMENTS = 1 << 25


class Piece(NamedTuple):
    """Elements `start` to `stop` of the flattened parameter with index `parameter`."""

    parameter: int
    start: int
    stop: int


class _PlacedPiece(NamedTuple):
    """A piece, and the position of its first element in the segment of its rank."""

    piece: Piece
    offset: int

    def overlap(self, start: int, stop: int) -> tuple[slice, slice] | None:
        """Return the elements between `start` and `stop` of the segment, in the parameter and relative to `start`."""
        low, high = max(start, self.offset), min(stop, self.offset + self.piece.stop - self.piece.start)
        if low >= high:
            return None
        shift = self.piece.start - self.offset
        return slice(low + shift, high + shift), slice(low - start, high - start)


class _Buffer(NamedTuple):
    """The parameters of one dtype and device: a segment for every rank, at most `length` elements long."""

    dtype: torch.dtype
    device: torch.device
    segments: list[list[_PlacedPiece]]
    length: int


def divide_parameters(sizes: Sequence[int], whole: Sequence[bool], world_size: int) -> list[list[Piece]]:
    """Return each rank's pieces of parameters with `sizes` elements; `whole` marks those that must not be cut.

    Whole parameters, the largest first, go to the rank with the fewest elements. The others are laid end to end and cut
    into `world_size` equal parts. Every element belongs to one rank, and a rank has at most one piece of a parameter.
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
    """The shards of `params` in the processes of a group, and the collectives that keep the parameters equal.

    Where `whole[i]` is true, parameter i is not cut. Every process must pass the same parameters in the same order. A
    step calls `reduce_gradients`, then updates `own_part` of every parameter in place, then `gather_parameters`.

    Raises `ValueError` for a parameter that is not contiguous in memory.
    """

    def __init__(self, params: Sequence[Tensor], whole: Sequence[bool], process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.params = list(params)
        for param in self.params:
            if not param.is_contiguous():
                raise ValueError(f"A sharded parameter must be contiguous, got strides {param.stride()}.")
        self._buffers = list(self._make_buffers(whole))
        own_pieces = [placed.piece for buffer in self._buffers for placed in buffer.segments[self.rank]]
        self._own = {self.params[piece.parameter]: piece for piece in own_pieces}
        self._grads: dict[Tensor, Tensor] | None = None  # of this rank's shard, summed over all ranks
        self._has_gradient: list[int] = []  # for each parameter, 1 if any rank has a gradient

    def _make_buffers(self, whole: Sequence[bool]) -> Iterator[_Buffer]:
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, param in enumerate(self.params):
            groups.setdefault((param.dtype, param.device), []).append(index)
        for (dtype, device), indices in groups.items():
            sizes = [self.params[i].numel() for i in indices]
            segments: list[list[_PlacedPiece]] = []
            length = 0
            for pieces in divide_parameters(sizes, [whole[i] for i in indices], self.world_size):
                segment, offset = [], 0
                for piece in pieces:
                    segment.append(_PlacedPiece(piece._replace(parameter=indices[piece.parameter]), offset))
                    offset += piece.stop - piece.start
                segments.append(segment)
                length = max(length, offset)
            yield _Buffer(dtype, device, segments, length)

    def piece(self, param: Tensor) -> Piece | None:
        """Return the piece of a parameter that this process owns, or None."""
        return self._own.get(param)

    def cut(self, param: Tensor, whole: Tensor) -> Tensor:
        """Return a view of this process's part of `whole`, a tensor of the parameter's shape; a cut part is flat."""
        piece = self._own[param]
        if piece.stop - piece.start == param.numel():
            return whole.view(param.shape)
        return whole.view(-1)[piece.start : piece.stop]

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of this shard, summed over all ranks. Scaling them in place scales the step."""
        self.reduce_gradients()
        assert self._grads is not None
        return list(self._grads.values())

    def own_part(self, param: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return this process's part of a parameter and its gradient; None if no rank has a gradient.

        Call it after `reduce_gradients`.
        """
        assert self._grads is not None
        if param not in self._grads:
            return None
        part = self.cut(param, param.detach())
        return part, self._grads[param].view(part.shape)

    def global_norm(self, own: Tensor) -> Tensor:
        """Return the L2 norm over all shards, a scalar, from the norm `own` of this shard."""
        squared = own.double().square()  # the same dtype on every rank
        dist.all_reduce(squared, group=self.process_group)
        return squared.sqrt_().to(own.dtype)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum the gradients over all ranks and keep those of this shard. Further calls in the same step do nothing.

        A gradient that only some ranks have counts as zero on the others.
        """
        if self._grads is not None:
            return
        has_gradient = torch.tensor(
            [int(p.grad is not None) for p in self.params], dtype=torch.int32, device=self.params[0].device
        )
        dist.all_reduce(has_gradient, op=dist.ReduceOp.MAX, group=self.process_group)
        self._has_gradient = has_gradient.tolist()
        self._grads = {}
        for buffer in self._buffers:
            shard = torch.empty(buffer.length, dtype=buffer.dtype, device=buffer.device)
            for start, stop in self._buckets(buffer):
                # the padding of a row is never read
                sent = torch.empty(self.world_size, stop - start, dtype=buffer.dtype, device=buffer.device)
                for row, segment in zip(sent, buffer.segments, strict=True):
                    for index, part, where in _parts(segment, start, stop):
                        grad = self.params[index].grad
                        row[where] = 0 if grad is None else grad.reshape(-1)[part]
                _reduce_scatter(shard[start:stop], sent.view(-1), self.process_group)
            for (index, begin, end), offset in buffer.segments[self.rank]:
                if self._has_gradient[index]:
                    self._grads[self.params[index]] = shard[offset : offset + end - begin]

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Copy the updated parts of the parameters from every rank to all ranks, and end the step."""
        for buffer in self._buffers:
            for start, stop in self._buckets(buffer):
                own = torch.empty(stop - start, dtype=buffer.dtype, device=buffer.device)
                for index, part, where in _parts(buffer.segments[self.rank], start, stop):
                    own[where] = self.params[index].detach().view(-1)[part]
                received = torch.empty(self.world_size * (stop - start), dtype=buffer.dtype, device=buffer.device)
                _all_gather(received, own, self.process_group)
                rows = rearrange(received, "(rank n) -> rank n", rank=self.world_size)
                for rank, segment in enumerate(buffer.segments):
                    for index, part, where in _parts(segment, start, stop) if rank != self.rank else ():
                        if self._has_gradient[index]:  # an unchanged parameter keeps its version
                            self.params[index].detach().view(-1)[part] = rows[rank, where]
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Drop the summed gradients; the next `reduce_gradients` sums again."""
        self._grads = None

    def _buckets(self, buffer: _Buffer) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the segments that one collective moves."""
        size = max(1, BUCKET_ELEMENTS // self.world_size)
        for start in range(0, buffer.length, size):
            yield start, min(start + size, buffer.length)


def _parts(segment: list[_PlacedPiece], start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield for every parameter in a range of a segment: its index, its elements, and their place in the range."""
    for placed in segment:
        overlap = placed.overlap(start, stop)
        if overlap is not None:
            yield placed.piece.parameter, *overlap


# torch 2.13 renamed the two functions, and warns about the names that torch 2.9 has.


def _reduce_scatter(output: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    call(output, sent, group=group)


def _all_gather(output: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(output, sent, group=group)
