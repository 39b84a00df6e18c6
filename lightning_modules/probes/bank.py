"""All masked linear probes of a run as one parameter, trained side by side without multiplying by masks.

The subsets of one ordering nest, so the neurons between one subset and the next larger one serve all the larger
probes: they are multiplied once, with the weights of all those probes stacked. A weight that a mask would hide is
not stored at all, so neither momentum nor weight decay can touch it.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.subsets.plan import Probe, probe_groups


class Block(NamedTuple):
    """The weights of one run of neurons, for all probes that see them."""

    start: int  # First place in the orderings
    stop: int  # One past the last place
    probe: int  # The first probe, by size, that sees these neurons; all larger ones do too
    weights: slice  # Where the weights lie in the flat parameter


class Stack:
    """G orderings with the same m subset sizes, ascending, computed together.

    `probes`, shape (G, m), are places in the bank; the weights start at `offset` in the flat parameter.
    """

    def __init__(self, probes: Tensor, sizes: Sequence[int], classes: int, offset: int) -> None:
        self.probes = probes
        self.sizes = sizes
        self.classes = classes
        groups, count = probes.shape
        self.blocks: list[Block] = []
        start = 0
        for probe, stop in enumerate(sizes):
            length = groups * (count - probe) * classes * (stop - start)
            if stop > start:
                self.blocks.append(Block(start, stop, probe, slice(offset, offset + length)))
            offset += length
            start = stop
        self.end = offset

    def view(self, flat: Tensor, block: Block) -> Tensor:
        """Return a block's weights, shape (G, probes that see it, C, neurons)."""
        groups, count = self.probes.shape
        return flat[block.weights].view(groups, count - block.probe, self.classes, block.stop - block.start)


class _BankLogits(torch.autograd.Function):
    """Logits of all stacks, one after the other, shape (P, C, B), from the flat weights and each stack's inputs.

    Inputs are features, shape (G, k, B). Autograd would keep and add one full-size gradient per block.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, stacks: Sequence[Stack], *inputs: Tensor) -> Tensor:
        total = sum(stack.probes.numel() for stack in stacks)
        results = flat.new_empty(total, stacks[0].classes, inputs[0].shape[-1])
        first = 0
        for stack, columns in zip(stacks, inputs, strict=True):
            groups, count = stack.probes.shape
            logits = results[first : first + groups * count].view(groups, count * stack.classes, columns.shape[-1])
            first += groups * count
            for number, block in enumerate(stack.blocks):
                weights, rows = stack.view(flat, block).flatten(1, 2), columns[:, block.start : block.stop]
                if number == 0:  # all probes see it
                    torch.bmm(weights, rows, out=logits)
                else:
                    logits[:, block.probe * stack.classes :].baddbmm_(weights, rows)
        ctx.save_for_backward(flat, *inputs)
        ctx.stacks = stacks
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        flat, *inputs = ctx.saved_tensors
        # Empty, as the blocks cover all.
        of_flat, _, *of_inputs = (
            torch.empty_like(each) if wanted else None
            for each, wanted in zip((flat, flat, *inputs), ctx.needs_input_grad, strict=True)
        )
        first = 0
        for stack, columns, of_columns in zip(ctx.stacks, inputs, of_inputs, strict=True):
            groups, count = stack.probes.shape
            of_stack = gradient[first : first + groups * count].view(groups, count * stack.classes, -1)
            first += groups * count
            for block in stack.blocks:
                seen, rows = of_stack[:, block.probe * stack.classes :], slice(block.start, block.stop)
                if of_flat is not None:
                    weights = stack.view(of_flat, block).flatten(1, 2)
                    torch.bmm(seen, columns[:, rows].transpose(1, 2), out=weights)
                if of_columns is not None:  # of an attack on the images
                    of_columns[:, rows] = stack.view(flat, block).flatten(1, 2).transpose(1, 2) @ seen
        return of_flat, None, *of_inputs


class ProbeBank(nn.Module):
    """All P probes of a run: linear classifiers with C classes, each on its own subset of coordinates.

    Each starts as `nn.Linear(k, C)` does by default, from random numbers seeded by its selection, size and seed, so
    that it does not depend on its company. Logits are computed in float32, whatever the Trainer's precision.
    """

    place: Tensor

    def __init__(self, probes: Sequence[Probe], classes: int) -> None:
        super().__init__()
        self.probes = list(probes)
        self.classes = classes
        self.stacks: list[Stack] = []
        offset = 0
        for alike in probe_groups(self.probes):
            members = torch.tensor([group.probes for group in alike])
            self.stacks.append(Stack(members, alike[0].sizes, classes, offset))
            offset = self.stacks[-1].end
        self.weight = nn.Parameter(torch.empty(offset))
        self.bias = nn.Parameter(torch.empty(len(self.probes), classes))
        place = torch.cat([stack.probes.flatten() for stack in self.stacks]).argsort()
        self._in_order = torch.equal(place, torch.arange(len(place)))  # no rearrangement to pay for
        self.register_buffer("place", place, persistent=False)
        self._homes = {
            index: (stack, group, rank)
            for stack in self.stacks
            for group, members in enumerate(stack.probes.tolist())
            for rank, index in enumerate(members)
        }
        for index, probe in enumerate(self.probes):
            seed = zlib.crc32(f"{probe.selection}/{probe.neurons}/{probe.seed}".encode())
            generator = torch.Generator().manual_seed(seed)
            bound = probe.neurons**-0.5
            weight = torch.empty(self.classes, probe.neurons).uniform_(-bound, bound, generator=generator)
            bias = torch.empty(self.classes).uniform_(-bound, bound, generator=generator)
            self.set_probe(index, weight, bias)

    def forward(self, coordinates: Tensor) -> Tensor:
        """Return the logits of every probe, shape (P, C, B), for coordinates as `Coordinates` gathers them."""
        with torch.autocast(coordinates.device.type, enabled=False):
            columns = coordinates.to(self.weight.dtype)
            sizes = [(len(stack.probes), max(stack.sizes)) for stack in self.stacks]
            parts = columns.split([groups * size for groups, size in sizes])
            inputs = [part.view(*size, -1) for part, size in zip(parts, sizes, strict=True)]
            logits = _BankLogits.apply(self.weight, self.stacks, *inputs)
            if not self._in_order:
                logits = logits.index_select(0, self.place)
            return logits.add_(self.bias.unsqueeze(-1))

    @torch.no_grad()
    def set_probe(self, index: int, weight: Tensor, bias: Tensor) -> None:
        """Set one probe's weights, shape (C, k) in the order of its subset, and bias, shape (C,)."""
        for piece, columns in self.pieces(self.weight, index):
            piece.copy_(weight[:, columns])
        self.bias[index] = bias

    def get_probe(self, index: int) -> tuple[Tensor, Tensor]:
        """Return copies of one probe's weights, shape (C, k) in the order of its subset, and bias, shape (C,)."""
        pieces = [piece for piece, _ in self.pieces(self.weight.detach(), index)]
        return torch.cat(pieces, dim=1), self.bias[index].detach().clone()

    @torch.no_grad()
    def copy_probes(self, source: "ProbeBank", which: Tensor) -> None:
        """Take the weights of the probes where `which`, shape (P,), is true from a bank of the same probes."""
        for stack in self.stacks:
            chosen = which.to(self.weight.device)[stack.probes.to(self.weight.device)]
            for block in stack.blocks:
                mine, theirs = stack.view(self.weight, block), stack.view(source.weight, block)
                mine.copy_(torch.where(chosen[:, block.probe :, None, None], theirs, mine))
        self.bias.copy_(torch.where(which.to(self.bias.device)[:, None], source.bias, self.bias))

    def pieces(self, flat: Tensor, index: int) -> Iterator[tuple[Tensor, slice]]:
        """Yield a probe's parts of the flat parameter, shape (C, neurons), with their columns."""
        stack, group, rank = self._homes[index]
        for block in stack.blocks:
            if block.probe <= rank:
                yield stack.view(flat, block)[group, rank - block.probe], slice(block.start, block.stop)
