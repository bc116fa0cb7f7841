"""What the scripts share: the DARTS search space, its bases, gradients, images, the run.

Sections: exceptions and processes; operations; supernet; architecture; bases; gradients; images;
command line; run. Each opens with what lives there and what a change to it may touch.
Sources: DARTS (Liu et al. 2019, arXiv 1806.09055) for the search space and the one-step gradient;
the bases' papers beside BASES; the methods' equations are in lpt.py, il.py and lease.py.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import shlex
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont  # Pillow comes with torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from genotypes import PRIMITIVES, BadInput, Genotype, search_svg, to_json, to_svg

try:
    import resource
except ImportError:                                               # Windows
    resource = None

# ---------------------------------------------------------------------- exceptions and processes
# How a run ends early, and what several processes share. They stay one search only if whatever
# they must agree on goes through reduce.


class NotFinite(Exception):
    """A loss, gradient or weight is NaN or infinite."""


class Gone(Exception):
    """Another process of the run has ended."""


def rank() -> int:
    """Return this process's number among those that share the run; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def together():
    """Do what all processes do at once. Raises Gone where one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        raise Gone(f"rank {rank()}: another process of this run is gone ({error})") from None


def barrier():
    """Wait until every process is here. Raises Gone."""
    if world_size() > 1:
        with together():
            dist.barrier()


def reduce(tensors: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """Return the sums of tensors over all processes, times scale. Raises Gone."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    with together():
        dist.all_reduce(flat)
    parts = flat.mul_(scale).split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors)]


def global_sum(x: Tensor) -> Tensor:
    """Return the sum of x over all processes, whose gradient, averaged by grad, is the sum's."""
    if world_size() == 1:
        return x
    mine = world_size() * x
    return mine + (reduce([x])[0] - mine).detach()


# ------------------------------------------------------------------------------------- operations
# The candidate operations (DARTS §3.1.1), merged over edges for the supernet and one by one for the
# evaluated network. A change here changes both; the tests hold each to its per-edge form.


def memory_format(device):
    """Return the one layout of all maps on a device. On the CPU channels_last halves the time of a
    step; elsewhere it is not mixed in: some mps versions differentiate BatchNorm wrongly in it."""
    return torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    return memory_format(x.device) == torch.channels_last


def place(module: nn.Module, device) -> nn.Module:
    """Return the module on its device, in the device's layout."""
    return module.to(device, memory_format=memory_format(device))


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that takes its weight at the call: alpha * BN(x) is BN(x) with weight alpha."""

    def forward(self, x, weight=None):
        weight, kept = self.weight if weight is None else weight, (None, None)
        if self.track_running_stats or not self.training:
            kept = self.running_mean, self.running_var
        return F.batch_norm(x, *kept, weight, self.bias, self.training, self.momentum, self.eps)


class SeparableConv(nn.Module):
    """Depthwise k x k, pointwise, BN; `edges` of them side by side along the channels."""

    def __init__(self, C, kernel, stride=1, dilation=1, edges=1, affine=False):
        super().__init__()
        wide, self.dilation = edges * C, dilation
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        self.pointwise = nn.Conv2d(wide, wide, 1, groups=edges, bias=False)
        self.norm = BatchNorm(wide, affine=affine)

    def forward(self, x, weight=None, dilation=None):
        d, dilation = self.depthwise, dilation or self.dilation
        x = F.conv2d(x, d.weight, None, d.stride, dilation * d.padding[0], dilation, d.groups)
        return self.norm(self.pointwise(x), weight)


class FactorizedReduce(nn.Module):
    """Two 1 x 1 convolutions of stride 2, one shifted by a pixel, side by side; `edges` of them.

    The stride is taken by slicing: on the CPU the backward pass of a strided one writes beyond its
    memory at some shapes (8 channels, 56 x 56, channels_last; torch 2.6 and 2.15).
    """

    def __init__(self, C_in, C_out, edges=1, affine=False):
        super().__init__()
        self.edges = edges
        self.conv1 = nn.Conv2d(C_in, edges * (C_out // 2), 1, bias=False)
        self.conv2 = nn.Conv2d(C_in, edges * (C_out - C_out // 2), 1, bias=False)
        self.norm = BatchNorm(edges * C_out, affine=affine)

    def forward(self, x, weight=None):
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))      # an odd map is padded to even
        halves = zip(self.conv1(x[:, :, ::2, ::2]).chunk(self.edges, 1),
                     self.conv2(x[:, :, 1::2, 1::2]).chunk(self.edges, 1))
        return self.norm(torch.cat([half for pair in halves for half in pair], 1), weight)


def preprocess(C_in, C_out, reduce=False, affine=False):
    """Return what brings a cell's input to its width and size. The ReLU in front of it is taken
    once, where the input is made: two cells share it."""
    return (FactorizedReduce(C_in, C_out, affine=affine) if reduce else
            nn.Sequential(nn.Conv2d(C_in, C_out, 1, bias=False), BatchNorm(C_out, affine=affine)))


def stem(C, imagenet):
    """Return the layers before the first cell and their last width: two modules, of which the
    second makes the second input of the first cell from the first. imagenet: stride 8 in all."""
    def conv(a, b, stride=2):
        return nn.Conv2d(a, b, 3, stride, 1, bias=False), BatchNorm(b), nn.ReLU()
    if imagenet:
        return nn.Sequential(*conv(3, C // 2), *conv(C // 2, C)), nn.Sequential(*conv(C, C)), C
    return nn.Sequential(*conv(3, 3 * C, 1)), nn.Identity(), 3 * C


# --------------------------------------------------------------------------------------- supernet
# The search network, whose outputs and gradients are those of one mixed operation per edge (DARTS
# Eq. 2; tested to 1e-10). Its parameters are the weights alone; the architecture comes with a call.

NODES = 4
EDGES = sum(2 + i for i in range(NODES))                          # 14
# the rows of alpha that belong to state j's outgoing edges, in the order of the nodes they lead to
OUTGOING = [[sum(2 + n for n in range(i)) + j for i in range(max(0, j - 1), NODES)]
            for j in range(NODES + 1)]
ALL = [[list(PRIMITIVES)] * EDGES] * 2                            # every candidate on every edge


@dataclass
class Knobs:
    """What a base changes in its supernets while they train."""
    auxiliary: float = 0.0              # DARTS-: weight of the auxiliary skip
    skip_dropout: float = 0.0           # P-DARTS: rate
    generator: torch.Generator | None = None                      # of the dropped values


def nhwc(x):
    """Return (N, C, H, W) as (N, H, W, C): a view, whole in memory where x is channels_last."""
    return x.permute(0, 2, 3, 1)


def nchw(x):
    return x.permute(0, 3, 1, 2)


def phases(x):
    """Return the four stride-2 phases of x along the batch, (4N, C, H/2, W/2). A convolution of
    dilation 2 is a plain one on each phase, whose gradients cost far less on a CPU."""
    return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])


def merge_phases(x):                                              # the inverse of phases
    x = nhwc(x).unflatten(0, (2, 2, -1))                          # (2, 2, N, H/2, W/2, C)
    return nchw(x.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2))


def avg_pool(x, size, stride, padding):
    return F.avg_pool2d(x, size, stride, padding, count_include_pad=False)


class MixedEdges(nn.Module):
    """The mixed operations (DARTS Eq. 2) on all outgoing edges of one state at once.

    The convolutions of one type are merged over the edges into one grouped convolution; what has no
    weights (pooling with its BN, identity) is computed once; `none` adds zero and is left out.
    kept: per edge, the names of its candidates. partial: the operations see C / partial channels,
    the others pass by, and all are shuffled (PC-DARTS §3.2). auxiliary: DARTS-'s skip beside them.
    """

    def __init__(self, C, kept, stride, knobs, partial=1, auxiliary=False):
        super().__init__()
        self.edges, self.stride, self.partial, self.knobs = len(kept), stride, partial, knobs
        self.kept = {name: edges for name in PRIMITIVES
                     if (edges := [e for e, names in enumerate(kept) if name in names])}
        c = C // partial
        for name, edges in self.kept.items():
            n = len(edges)
            if name.startswith("sep"):
                self.add_module(name + "_a", SeparableConv(c, int(name[-1]), stride, edges=n))
                self.add_module(name + "_b", SeparableConv(c, int(name[-1]), edges=n))
            elif name.startswith("dil"):
                self.add_module(name, SeparableConv(c, int(name[-1]), edges=n))
            elif name.endswith("pool_3x3"):
                self.add_module(name, BatchNorm(c, affine=False))
            elif name == "skip_connect" and stride == 2:
                self.skip_connect = FactorizedReduce(c, c, n)
        self.auxiliary = FactorizedReduce(c, c, len(kept)) if auxiliary and stride == 2 else None

    def forward(self, x, p, q=None):
        """x (N, C, H, W), p (edges, 8) the weights of the operations, q (edges,) those of the
        bypass -> (N, edges * C, H', W'), one edge beside the other."""
        C, bypass = x.shape[1] // self.partial, None
        if self.partial > 1:
            x, bypass = x.split([C, x.shape[1] - C], 1)
        r, wide = F.relu(x), p.t().repeat_interleave(C, 1)        # (8, edges * C): p per channel
        repeated = functools.cache(lambda x, n: torch.cat([x] * n, 1))       # two may share a copy
        terms = [*self.separable(r, wide, repeated), *self.dilated(r, wide, repeated),
                 *self.reduced_skips(r, wide), *self.weightless(x, p, wide)]
        out = functools.reduce(Tensor.add_, terms)
        return out if bypass is None else self.shuffled(out, bypass, q)

    def weight(self, wide, name):
        """Return an operation's weight per channel, on the edges that have it."""
        row, edges = wide[PRIMITIVES.index(name)], self.kept[name]
        if len(edges) == self.edges:
            return row
        return torch.cat([part for e, part in enumerate(row.chunk(self.edges)) if e in edges])

    def on_all(self, term, edges):
        """Return term (N, len(edges) * C, H, W) with zeros for the edges that are without it."""
        if len(edges) == self.edges:
            return term
        parts = dict(zip(edges, term.chunk(len(edges), 1)))
        zero = torch.zeros_like(parts[edges[0]])
        return torch.cat([parts.get(e, zero) for e in range(self.edges)], 1)

    def separable(self, r, wide, repeated):
        for name in ("sep_conv_3x3", "sep_conv_5x5"):
            if edges := self.kept.get(name):
                once = F.relu_(self.get_submodule(name + "_a")(repeated(r, len(edges))))
                term = self.get_submodule(name + "_b")(once, self.weight(wide, name))
                yield self.on_all(term, edges)

    def dilated(self, r, wide, repeated):
        dilation, by_phase = 2, False
        if self.stride == 2:                                      # dilation 2 reads one phase only
            r, dilation = r[:, :, ::2, ::2], 1
        elif is_channels_last(r) and r.shape[2] % 2 == r.shape[3] % 2 == 0:
            r, dilation, by_phase = phases(r), 1, True
        terms = []
        for name in ("dil_conv_3x3", "dil_conv_5x5"):
            if edges := self.kept.get(name):
                many = repeated(r, len(edges))
                term = self.get_submodule(name)(many, self.weight(wide, name), dilation)
                terms.append(self.on_all(term, edges))
        if terms:
            yield merge_phases(sum(terms)) if by_phase else sum(terms)

    def reduced_skips(self, r, wide):
        """Yield the skip connections of stride 2, which have weights."""
        if self.stride == 2 and (edges := self.kept.get("skip_connect")):
            yield self.on_all(self.skip_connect(r, self.weight(wide, "skip_connect")), edges)
        if self.auxiliary is not None:
            yield self.auxiliary(r, torch.full_like(wide[0], self.knobs.auxiliary))

    def weightless(self, x, p, wide):
        """Yield what has no weights: pooling with its BN and, at stride 1, x itself, the same on
        all edges but for a factor; x under P-DARTS' dropout (§3.3) has a mask per edge."""
        column, columns, maps = p.unbind(1), [], []
        for name, pool in (("max_pool_3x3", F.max_pool2d), ("avg_pool_3x3", avg_pool)):
            if name in self.kept:
                maps.append(self.get_submodule(name)(pool(x, 3, self.stride, 1)))
                columns.append(column[PRIMITIVES.index(name)])
        if self.stride == 1:
            direct, rate = torch.full_like(column[0], self.knobs.auxiliary), self.knobs.skip_dropout
            if (edges := self.kept.get("skip_connect")) and rate and self.training:
                many = torch.cat([x] * len(edges), 1)
                stay = torch.empty_like(many).bernoulli_(1 - rate, generator=self.knobs.generator)
                scale = self.weight(wide, "skip_connect").view(1, -1, 1, 1) / (1 - rate)
                yield self.on_all(many * stay * scale, edges)
            elif edges:
                direct = direct + column[PRIMITIVES.index("skip_connect")]
            maps.append(x)
            columns.append(direct)
        if maps:                                                  # their sums are one product
            last = is_channels_last(x)
            maps = torch.stack([nhwc(m) for m in maps] if last else maps)
            mixed = (torch.stack(columns, 1) @ maps.flatten(1)).unflatten(1, maps.shape[1:])
            yield (nchw(mixed.movedim(0, 3).flatten(3)) if last else
                   mixed.movedim(0, 1).flatten(1, 2))

    def shuffled(self, out, bypass, q):
        """Return out (N, edges * C, H, W) with the bypass beside each edge, channels shuffled."""
        if self.stride == 2:
            bypass = F.max_pool2d(bypass, 2, ceil_mode=True)
        last = is_channels_last(out)
        at = 3 if last else 1                                     # where the channels are
        out, bypass, q = (nhwc(out), nhwc(bypass), q[:, None]) if last else (
            out, bypass, q[:, None, None, None])
        out = out.unflatten(at, (self.edges, -1))
        out = torch.cat([out, q * bypass.unsqueeze(at)], at + 1)
        out = out.unflatten(at + 1, (self.partial, -1)).transpose(at + 1, at + 2)
        out = out.flatten(at, at + 2)
        return nchw(out) if last else out


class SearchCell(nn.Module):
    """A cell of mixed edges. kept: per edge, its candidates; what follows is MixedEdges'."""

    def __init__(self, C_prev_prev, C_prev, C, reduction, reduction_prev, kept, *options):
        super().__init__()
        self.reduction = reduction
        self.preprocess0 = preprocess(C_prev_prev, C, reduction_prev)
        self.preprocess1 = preprocess(C_prev, C)
        self.states = nn.ModuleList(
            MixedEdges(C, [kept[row] for row in rows], 2 if reduction and j < 2 else 1, *options)
            for j, rows in enumerate(OUTGOING))

    def forward(self, s0, s1, p, q):
        """p (14, 8), q (14,) or None: the weights of the edges' operations and bypasses, in the
        order of OUTGOING."""
        states, counts = [self.preprocess0(s0), self.preprocess1(s1)], [len(r) for r in OUTGOING]
        C, nodes = states[1].shape[1], 0                          # nodes: those not complete
        q = [None] * len(counts) if q is None else q.split(counts)
        for j, (edges, *weights) in enumerate(zip(self.states, p.split(counts), q)):
            nodes = nodes + edges(states[j], *weights)            # (N, their number * C, H', W')
            if 0 < j < NODES:                                     # node j - 1 has all its inputs
                done, nodes = nodes.split([C, nodes.shape[1] - C], 1)
                states.append(done)
        return torch.cat([*states[2:], nodes], 1)                 # (N, 4C, H', W')


class Supernet(nn.Module):
    """The search network: cells of mixed operations; reduction cells at 1/3 and 2/3.

    kept: of the normal and the reduction cell, the candidates per edge; partial, auxiliary:
    MixedEdges'; imagenet: the stem of stride 8.
    """

    def __init__(self, C, num_classes, layers, kept=ALL, partial=1, auxiliary=False,
                 imagenet=False):
        super().__init__()
        self.knobs = Knobs()
        self.stem0, self.stem1, C_prev = stem(C, imagenet)
        self.cells, C_prev_prev, reduction = nn.ModuleList(), C_prev, imagenet
        for i in range(layers):
            reduction_prev, reduction = reduction, i in (layers // 3, 2 * layers // 3)
            C *= 2 if reduction else 1
            self.cells.append(SearchCell(C_prev_prev, C_prev, C, reduction, reduction_prev,
                                         kept[reduction], self.knobs, partial, auxiliary))
            C_prev_prev, C_prev = C_prev, NODES * C
        self.classifier = nn.Linear(C_prev, num_classes)
        self.register_buffer("order", torch.tensor(sum(OUTGOING, [])), persistent=False)

    def forward(self, x, alphas):
        """x (N, 3, H, W), alphas: initial_alphas' -> logits (N, num_classes)."""
        if self.knobs.skip_dropout and self.training:             # one mask in all passes of a step
            self.knobs.generator = torch.Generator(x.device).manual_seed(torch.initial_seed())
        p = [weights[self.order] for weights in operation_weights(alphas)]
        q = [edge_weights(beta)[self.order] for beta in alphas[2:]] or [None, None]
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        for cell in self.cells:
            out = cell(s0, s1, p[cell.reduction], q[cell.reduction])
            s0, s1 = s1, F.relu(out)
        return self.classifier(out.mean((2, 3)))


# ----------------------------------------------------------------------------------- architecture
# The architecture A: its parameters, the weights they give the supernet, the cell they stand for.

DROPPED = -1e9                  # alpha of a candidate no longer there: its softmax is exactly zero


def initial_alphas(device, kept=ALL, partial=1) -> list[Tensor]:
    """Return A: alpha of the normal and of the reduction cell, each (14, 8); with partial channels
    also their edges' beta, each (14,)."""
    alphas = [1e-3 * torch.randn(EDGES, len(PRIMITIVES)) for _ in range(2)]
    for alpha, edges in zip(alphas, kept):
        gone = [[name not in names for name in PRIMITIVES] for names in edges]
        alpha[torch.tensor(gone)] = DROPPED
    if partial > 1:
        alphas += [1e-3 * torch.randn(EDGES) for _ in range(2)]
    return [nn.Parameter(a.to(device)) for a in alphas]


def edge_weights(beta: Tensor) -> Tensor:
    """Return beta (14,), softmaxed over the edges into each node (PC-DARTS Eq. 3)."""
    return torch.cat([F.softmax(b, 0) for b in beta.split([2 + n for n in range(NODES)])])


def operation_weights(alphas: list[Tensor]) -> list[Tensor]:
    """Return the weights of all operations in the normal and the reduction cell, each (14, 8)."""
    weights = [F.softmax(alpha, -1) for alpha in alphas[:2]]                       # DARTS Eq. 2
    return [w * edge_weights(beta)[:, None] for w, beta in zip(weights, alphas[2:])] or weights


def decode(alphas: list[Tensor], max_skips: int = 8) -> Genotype:
    """Return the cell that alphas stand for (DARTS §2.4): per node the two incoming edges whose
    strongest operation other than `none` is strongest, with that operation; ties go to the lower
    index. Of more than max_skips skip connections in the normal cell the weakest go, one by one,
    and the cell is decoded again (P-DARTS §3.3)."""
    def cell(p):                                                  # (14, 7) -> [(row, state, op)]
        edges, first = [], 0
        for n in range(2, 2 + NODES):
            rows = p[first:first + n]
            edges += [(first + state, state, rows[state].index(max(rows[state])))
                      for state in sorted(range(n), key=lambda s: -max(rows[s]))[:2]]
            first += n
        return edges

    normal, reduce = (w[:, 1:].detach().float().cpu().tolist() for w in operation_weights(alphas))
    skip = PRIMITIVES.index("skip_connect") - 1
    while len(skips := [row for row, _, op in cell(normal) if op == skip]) > max_skips:
        normal[min(skips, key=lambda row: normal[row][skip])][skip] = 0.0
    concat = list(range(2, 2 + NODES))
    named = [[(PRIMITIVES[1 + op], state) for _, state, op in cell(p)] for p in (normal, reduce)]
    return Genotype(named[0], concat, named[1], concat)


def prune(alphas: list[Tensor], keep: int) -> list:
    """Return the `keep` strongest candidates of every edge, in their order (P-DARTS §3.2); of equal
    ones the lower index goes first."""
    strongest = [alpha.detach().cpu().argsort(stable=True)[:, -keep:].sort().values
                 for alpha in alphas[:2]]
    return [[[PRIMITIVES[o] for o in row] for row in cell.tolist()] for cell in strongest]


def architecture_report(alphas: list[Tensor]) -> dict:
    """Return the mean entropy of softmax(alpha) in nats, and the skip connections in the normal
    cell, decoded without a limit on them."""
    p = F.softmax(torch.cat([a.detach().cpu() for a in alphas[:2]]), -1)
    return {"alpha_entropy": torch.special.entr(p).sum(-1).mean().item(),
            "skip_connections": sum(op == "skip_connect" for op, _ in decode(alphas).normal)}


def mean_weights(alphas: list[Tensor]) -> dict:
    """Return the operations' weights in both cells, means over the edges, in PRIMITIVES' order."""
    return {kind: F.softmax(alpha.detach(), -1).mean(0).tolist()
            for kind, alpha in zip(("normal", "reduce"), alphas)}


# ------------------------------------------------------------------------------------------ bases
# The base searches as data, and what they do in a search: its stages, what changes from epoch to
# epoch, when it ends. A seventh base is a line in BASES and what it does differently here.

# A base search: the defaults it gives the command line. layers, candidates and skip_dropout have an
# entry per stage (weights and A start anew in each), epochs and warm_up count within a stage.
DARTS = dict(order=1, layers=[8], epochs=50, batch_size=64, lr=0.025, lr_min=0.001, alpha_lr=3e-4,
             warm_up=0, candidates=[8], skip_dropout=[0.0], max_skips=8, stop_at_skips=0, partial=1,
             auxiliary_skip=False)
BASES = {
    "darts-1st": DARTS,                                           # arXiv 1806.09055, §A.1
    "darts-2nd": DARTS | dict(order=2),
    "darts-": DARTS | dict(auxiliary_skip=True),                  # arXiv 2009.01027
    "darts+": DARTS | dict(stop_at_skips=2),                      # arXiv 1909.06035
    "pcdarts": DARTS | dict(batch_size=256, lr=0.1, lr_min=0.0, alpha_lr=6e-4, warm_up=15,
                            partial=4),                           # arXiv 1907.05737
    "pdarts": DARTS | dict(layers=[5, 11, 17], epochs=25, batch_size=96, lr_min=0.0, alpha_lr=6e-4,
                           warm_up=10, candidates=[8, 5, 3], skip_dropout=[0.1, 0.4, 0.7],
                           max_skips=2),                          # arXiv 1904.12760
}
IMAGENET = dict(image_size=224, subsets=[0.1, 0.025])
IMAGENET_BASES = {"pcdarts": dict(batch_size=1024, lr=0.5, alpha_lr=6e-3, warm_up=35)}


def stages(run):
    """Yield the stages that are left of a search; between two of them the weakest candidates of
    every edge go (P-DARTS §3.2)."""
    args, state = run.args, run.state
    state.setdefault("kept", ALL)
    while state["stage"] < len(args.layers) and not state["stopped"]:
        yield state["stage"]
        state["stage"] += 1
        if state["stage"] < len(args.layers):
            state["kept"] = prune(run.parts["outer"][:2], args.candidates[state["stage"]])


def new_stage(run, classes: list[int], device):
    """Make what starts anew in a stage of the search, from (seed, stage): a supernet for each entry
    of classes with its SGD, and the architecture A with its Adam.

    Returns (supernets, their optimizers, alphas, optimizer of alphas).
    """
    args, stage, kept = run.args, run.state["stage"], run.state["kept"]
    seed_all(args.seed, stage)
    nets = [place(Supernet(args.channels, n, args.layers[stage], kept, args.partial,
                           args.auxiliary_skip, "imagenet" in task_names(args)), device)
            for n in classes]
    opts = [torch.optim.SGD(net.parameters(), args.lr, args.momentum,
                            weight_decay=args.weight_decay) for net in nets]
    alphas = initial_alphas(device, kept, args.partial)
    alpha_opt = torch.optim.Adam(alphas, args.alpha_lr, (0.5, 0.999),
                                 weight_decay=args.alpha_weight_decay)
    kinds = {len(names) for cell in kept for names in cell}
    print(f"stage {stage + 1} of {len(args.layers)}: {args.layers[stage]} cells, "
          f"{'/'.join(map(str, sorted(kinds)))} candidates an edge")
    return nets, opts, alphas, alpha_opt


def schedule(args, stage: int, epoch: int, nets, opts, other_opt=None, other_lr=0.0) -> bool:
    """Set what changes from epoch to epoch of a stage: the learning rates, DARTS-'s auxiliary skip,
    P-DARTS' skip dropout. Returns whether A learns in this epoch.

    other_opt: of a learner that has no stages (LPT's tester, LeaSE's audience); its rate falls from
    other_lr to 0 over all of them.
    """
    learns, last = epoch >= args.warm_up, args.epochs - 1
    rate = args.skip_dropout[stage] * (math.exp(-0.2 * (epoch - args.warm_up)) if learns else
                                       (args.epochs - epoch - 1) / args.epochs)
    for net, opt in zip(nets, opts):
        opt.param_groups[0]["lr"] = cosine(args.lr, args.lr_min, epoch, args.epochs)
        net.knobs.skip_dropout = rate
        net.knobs.auxiliary = args.auxiliary_skip * (1 - epoch / last if args.epochs > 1 else 0)
    if other_opt:
        other_opt.param_groups[0]["lr"] = cosine(other_lr, 0, stage * args.epochs + epoch,
                                                 len(args.layers) * args.epochs)
    return learns


def end_epoch(run, alphas: list[Tensor], **figures: float):
    """Write what an epoch of a search leaves behind: its line in the log, the cell and drawings;
    end the search where its cell has too many skip connections (DARTS+)."""
    args, report = run.args, architecture_report(alphas)
    if 0 < args.stop_at_skips <= report["skip_connections"]:
        run.state["stopped"] = (f"the normal cell has {report['skip_connections']} skip "
                                f"connections, --stop-at-skips is {args.stop_at_skips}")
    history = run.end_epoch(report | figures, {"mean_weights": mean_weights(alphas)})
    cell, title = decode(alphas, args.max_skips), f"{args.out.name}, epoch {len(history)}"
    write(args.out / "genotype.json", to_json(cell))
    write(args.out / "cells.svg", to_svg(cell, title))
    write(args.out / "search.svg", search_svg(history, title))


# -------------------------------------------------------------------------------------- gradients
# What the methods' equations are computed by. Nothing here changes a weight, a buffer or a .grad,
# but for descend; a change here changes every method's gradient, and the oracles say how.


def grad(loss: Tensor, *groups: list[Tensor], shared: bool = True):
    """Return d loss / d each tensor of each group, a list per group (the list itself where there is
    one); touches no .grad.

    Every gradient of the algorithms is taken here, and averaged over the processes, each of which
    has its part of the batch; shared=False: the tensors are this process's own, as LeaSE's delta.
    """
    grads = list(torch.autograd.grad(loss, [t for group in groups for t in group]))
    if shared and world_size() > 1:
        grads = reduce(grads, 1 / world_size())
    grads = iter(grads)
    parts = [list(itertools.islice(grads, len(group))) for group in groups]
    return parts if len(parts) > 1 else parts[0]


@contextlib.contextmanager
def batch_statistics(module: nn.Module):
    """Let every BatchNorm of a module in training see its batch alone: its running statistics stay
    as they are. (Copies of them would serve as well, at a third more operator calls a pass.)"""
    norms = [part for part in module.modules()
             if isinstance(part, nn.BatchNorm2d) and part.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def call(module: nn.Module, weights: list[Tensor], *inputs):
    """Return module(*inputs) at other weights, in the order of its parameters; changes nothing."""
    state = dict(zip((name for name, _ in module.named_parameters()), weights, strict=True))
    with batch_statistics(module):
        return torch.func.functional_call(module, state, inputs)


def detached(weights: list[Tensor]) -> list[Tensor]:
    """Return the same weights as constants."""
    return [w.detach() for w in weights]


def sgd_step(optimizer: torch.optim.SGD, grads: list[Tensor]) -> list[Tensor]:
    """Return an optimizer's weights after one step along grads, w' = w - xi (mu buffer + grad + wd
    w) (DARTS Eq. 7, with the momentum and weight decay of its reference code); nothing changes."""
    group = optimizer.param_groups[0]
    weights = group["params"]
    step = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
    buffers = [optimizer.state[w].get("momentum_buffer") for w in weights if w in optimizer.state]
    if buffers and buffers[0] is not None:
        torch._foreach_add_(step, buffers, alpha=group["momentum"])
    return list(torch._foreach_add(weights, step, alpha=-group["lr"]))


@torch.no_grad()
def virtual_weights(optimizer: torch.optim.SGD, grads: list[Tensor]) -> list[Tensor]:
    """Return sgd_step's weights as leaves: dJ/dw' is taken by itself."""
    return [w.requires_grad_() for w in sgd_step(optimizer, grads)]


def central_difference(grad_at, w: list[Tensor], v: list[Tensor], radius: float = 1e-2,
                       shared: bool = True) -> list[Tensor]:
    """Return (d2 L / da dw) v for every tensor a that grad_at differentiates by; zeros where v is
    zero.

    grad_at(w) returns dL/da at weights w. The step is eps = radius / |v|, with the norm over all
    of v (DARTS Eq. 8; LPT Eq. 17; LeaSE Eq. 11); shared=False: v is spread over the processes.
    """
    norm = nn.utils.get_total_norm(v)
    if not shared and world_size() > 1:
        norm = reduce([norm.square()])[0].sqrt()
    eps = torch.where(norm > 0, radius / norm, radius)
    w, step = detached(w), torch._foreach_mul(v, eps)
    plus = grad_at(torch._foreach_add(w, step))
    minus = grad_at(torch._foreach_sub(w, step))
    return [(p - n) / (2 * eps) for p, n in zip(plus, minus)]


class Stage(NamedTuple):
    """A learning stage k of the general form, Skillearn Eq. 1 (and its Table 1)."""
    name: str
    parameters: list[Tensor]            # W_k, the active learnable parameters
    loss: Callable                      # (W_k, learned) -> L_k + gamma_k I_k (IL's I_k is in step)
    step: Callable                      # (W_k, its gradient, learned) -> W'_k


def skillearn(stages: list[Stage], validation: Callable, remaining: list[list], exact=True):
    """Differentiate exactly what an iteration of Skillearn's Algorithm 1 minimises (Eq. 1 prints a
    maximum, §2.3 a minimum); no parameter moves.

    Every stage takes one step on its loss, given `learned`, the W'_j of the stages before it by
    their names; validation(learned) is the objective and whatever else is to be returned;
    remaining: groups of the parameters that no stage learns. Returns (what validation returns, a
    list of gradients per group). exact=False: the objective alone, without the gradients.
    """
    learned = {}
    for name, parameters, loss, step in stages:
        gradients = torch.autograd.grad(loss(parameters, learned), parameters, create_graph=exact)
        with torch.set_grad_enabled(exact):
            learned[name] = step(parameters, gradients, learned)           # Skillearn Eq. 3, 4
    with torch.set_grad_enabled(exact):
        objective, *more = validation(learned)                             # Skillearn Eq. 5
    return (objective, *more), grad(objective, *remaining) if exact else None


@contextlib.contextmanager
def foresight(run, formulation, alphas: list[Tensor], g_alpha: list[Tensor]):
    """Around A's step: in the last one of an epoch, note by how much A's gradient said that this
    step would change the objective, and by how much it did, on the same batches. The log then tells
    whether the gradient means anything to a search. Of one process; formulation: skillearn's
    arguments."""
    if not run.last_step() or world_size() > 1:
        yield
        return
    old, before = [a.detach().clone() for a in alphas], skillearn(*formulation, exact=False)[0][0]
    yield
    after = skillearn(*formulation, exact=False)[0][0]
    predicted = sum((g * (a.detach() - o)).sum() for g, a, o in zip(g_alpha, alphas, old))
    run.noted = dict(zip(("predicted_change", "realised_change"),
                         torch.stack([predicted, (after - before).detach()]).tolist()))


def descend(optimizer, grads: list[Tensor], learner: str = "a learner",
            loss: Tensor | None = None, clip: float | None = None):
    """Take an optimizer's step along given gradients, their total norm clipped at `clip`.

    Raises NotFinite, before the step where the loss or a gradient is NaN or infinite. (By the
    2-norm: a maximum may drop NaN on mps.)
    """
    weights = optimizer.param_groups[0]["params"]
    norm = nn.utils.get_total_norm([g.to_dense() for g in grads])  # of sparse ones 2.6 has no norm
    if not math.isfinite(norm if loss is None else norm + loss.detach()):
        raise NotFinite(f"the loss or a gradient of {learner} is not finite")
    for w, g in zip(weights, grads, strict=True):
        w.grad = g
    if clip:
        nn.utils.clip_grads_with_norm_(weights, clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(nn.utils.get_total_norm(weights)):
        raise NotFinite(f"a weight of {learner} is not finite after its step")


def cosine(start: float, end: float, epoch: int, epochs: int) -> float:
    """Return the learning rate of an epoch, annealed from start towards end (SGDR, Eq. 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def mixed_seed(*keys: int) -> int:
    """Return a 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]) >> 1


def seed_all(*keys: int):
    """Set torch's generators as a pure function of `keys`, each GPU's to another state: the
    replicas of DataParallel must not drop the same paths."""
    torch.manual_seed(mixed_seed(*keys))
    for i, generator in enumerate(torch.cuda.default_generators):
        generator.manual_seed(mixed_seed(*keys, i))


@contextlib.contextmanager
def evaluating(*modules: nn.Module):
    """Have modules in evaluation, with rank 0's BatchNorm statistics in all processes."""
    for module in modules:
        module.eval()
        statistics = [b for b in module.buffers() if b.is_floating_point()]
        if world_size() > 1 and statistics:
            sums = reduce([torch.zeros_like(b) if rank() else b for b in statistics])
            torch._foreach_copy_(statistics, sums)
    yield
    for module in modules:
        module.train()


def autocast(device, on: bool):
    """bfloat16 where torch finds it safe; nothing is cached between passes at several weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=False)


# ------------------------------------------------------------------------------------- the images
# Data sets, their augmentation and their mini-batches. A batch is a pure function of (seed, stream,
# step); a change here must leave it one, or --resume no longer repeats a run.


class Request(NamedTuple):
    """A mini-batch to be read."""
    rows: np.ndarray                    # of the whole batch
    key: tuple | None = None            # of the generator of its augmentation; None: as it is
    part: slice = slice(None)           # the rows that are this process's
    cutout: int = 0                     # side of the square cut out, in pixels


class Images:
    """Labelled images: labels (n,) int64, classes, size (H, W), device, mean and std (3, 1, 1) in
    units of 0 to 1, and reader(), a function from requests to batches x (N, 3, H, W) float32,
    y (N,), rows (N,)."""

    @functools.cached_property
    def plain(self):
        """A reader of the images as they are; kept, since a reader may hold processes."""
        return self.reader()


def normalised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return images x (N, 3, H, W) uint8 as a network sees them, float32."""
    x = (x.float() / 255 - mean.to(x.device)) / std.to(x.device)
    return x.contiguous(memory_format=memory_format(x.device))


@dataclass(eq=False)
class ImageSet(Images):
    """Images in memory, whole, on the device."""
    images: Tensor          # (n, 3, H, W) uint8
    labels: Tensor
    classes: list[str]
    mean: Tensor
    std: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.images.shape[2:])

    @property
    def device(self) -> torch.device:
        return self.images.device

    def pixels(self, rows) -> Tensor:
        """Return the images `rows` as they are, (N, 3, H, W) uint8."""
        return self.images[rows]

    def reader(self):
        return self.read

    def read(self, requests):
        for request in requests:
            rows = torch.from_numpy(request.rows[request.part]).to(self.device)
            x = self.images[rows]
            plain = request.key is None
            x = normalised(x, self.mean, self.std) if plain else self.augmented(x, request)
            yield x, self.labels[rows], rows

    def augmented(self, x: Tensor, request: Request) -> Tensor:
        """Return images x, each cropped out of its zero-padded self (by 1/8: 4 pixels at 32),
        flipped by even odds, normalised and, if asked, without a square."""
        rng, (H, W), N = np.random.default_rng(request.key), self.size, len(request.rows)

        def draw(high):                                           # for the whole batch; (n, 1)
            return torch.from_numpy(rng.integers(high, size=(N, 1))[request.part]).to(self.device)

        pad = H // 8
        x = crop(F.pad(x, (pad,) * 4), draw(2 * pad + 1), draw(2 * pad + 1), (H, W))
        x = torch.where(draw(2)[:, :, None, None] == 1, x.flip(3), x)
        x = normalised(x, self.mean, self.std)
        return cut_out(x, draw(H), draw(W), request.cutout) if request.cutout else x


def crop(x: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a window of each image x (n, 3, H, W), at its own top and left (n, 1)."""
    i, c, y, z = (torch.arange(k, device=x.device) for k in (*x.shape[:2], *size))
    return x[i[:, None, None, None], c[:, None, None], (top + y)[:, None, :, None],
             (left + z)[:, None, None, :]]


def cut_out(x: Tensor, y: Tensor, z: Tensor, side: int) -> Tensor:
    """Return the images x (n, 3, H, W) with zeros in a square around (y, z), each (n, 1)."""
    inside = [(torch.arange(length, device=x.device) - centre + side // 2).div(
        side, rounding_mode="floor") == 0 for length, centre in zip(x.shape[2:], (y, z))]
    return x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


@dataclass(eq=False)
class ImageFiles(Images):
    """Images in files, read when they are asked for, by `workers` processes: ImageNet."""
    folder: torchvision.datasets.ImageFolder
    labels: Tensor          # on the CPU
    classes: list[str]
    side: int               # of the square images, in pixels
    device: torch.device    # where the batches go
    workers: int
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)      # ImageNet's
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def pixels(self, rows) -> Tensor:
        """Return the images `rows` as they are, (N, 3, H, W) uint8 on the CPU."""
        return Reading(self.folder, self.side).read(Request(torch.as_tensor(rows).cpu().numpy()))

    def reader(self):
        sampler, labels, device, scale = Sampler(), self.labels, self.device, (self.mean, self.std)
        loader = DataLoader(
            Reading(self.folder, self.side), batch_size=None, sampler=sampler,
            num_workers=self.workers, persistent_workers=self.workers > 0,
            pin_memory=device.type == "cuda", generator=torch.Generator(),
            worker_init_fn=own_group)

        # without self: in a cycle of references the processes would not end with the reader
        def read(these):
            sampler.requests = these
            for x, rows, error in loader:                         # rows are a tensor by now
                if error:
                    raise BadInput(error)
                x = normalised(x.to(device, non_blocking=True), *scale)
                yield x, labels[rows].to(device), rows.to(device)
        return read


class Sampler:
    """What a loader that is kept reads next."""

    def __iter__(self):
        return iter(self.requests)


@dataclass
class Reading(Dataset):
    """What a reading process does, with nothing else of a run in it."""
    folder: torchvision.datasets.ImageFolder
    side: int

    def __getitem__(self, request: Request):
        try:
            return self.read(request), request.rows[request.part], ""
        except BadInput as error:                                 # its class would not arrive
            return None, None, str(error)

    def read(self, request: Request) -> Tensor:
        """Return the images of a request, (N, 3, H, W) uint8. With a key each is a random resized
        crop, flipped by even odds, its colours jittered; else the centre of the image."""
        side, (rows, key, part, _) = self.side, request
        if key is None:
            change = v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)])
            seeds = itertools.repeat(0)
        else:
            change = v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(),
                                 v2.ColorJitter(0.4, 0.4, 0.4, 0.2)])
            seeds = np.random.default_rng(key).integers(2 ** 63, size=len(rows))[part]
        images, state = [], torch.get_rng_state()
        for row, seed in zip(rows[part], seeds):
            image = read_image(self.folder, row)
            torch.default_generator.manual_seed(int(seed))        # v2 draws from this generator
            images.append(v2.functional.pil_to_tensor(change(image)))
        torch.set_rng_state(state)
        return torch.stack(images)


def own_group(_):
    """Put a reading process in a group of its own: a signal to the run's group is not for it."""
    if hasattr(os, "setpgrp"):                                    # not on Windows
        os.setpgrp()


def read_image(folder, row) -> Image.Image:
    """Return an image of an ImageFolder, RGB. Raises BadInput, which names its file."""
    file = folder.samples[row][0]
    try:
        return folder.loader(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read the image {file}: {error}") from None


def image_set(images: Tensor, labels, classes, device) -> ImageSet:
    """Return an ImageSet on the device, with the channel statistics of its own images."""
    sums = [(x.double().sum((0, 2, 3)), x.double().square().sum((0, 2, 3)))
            for x in images.split(256)]                           # on the CPU, as the images are
    pixels = images[:, 0].numel()
    mean = sum(s for s, _ in sums) / pixels
    std = (sum(q for _, q in sums) / pixels - mean ** 2).clamp_min(0).sqrt().clamp_min(1)
    mean, std = ((s / 255).float().view(3, 1, 1).to(device) for s in (mean, std))
    labels = torch.as_tensor(labels).long().to(device)
    return ImageSet(images.to(device), labels, classes, mean, std)


def load_images(dataset: str, data: Path, device, image_size: int | None = None,
                test: bool = False, workers: int = 0) -> Images:
    """Return the training (or test) images of a data set.

    dataset: cifar10, cifar100, folder or folder:DIR (an ImageFolder tree: train/, and test/ or
    val/), imagenet (the same, read from its files), synthetic or synthetic:CLASSES. Raises
    BadInput where they cannot be had.
    """
    name, _, option = dataset.partition(":")
    if name == "synthetic":
        return synthetic(int(option or 10), image_size or 32, device, test)
    if name not in ("folder", "imagenet"):
        if image_size not in (None, 32):
            raise BadInput(f"--image-size {image_size}: the images of {dataset} have 32 pixels")
        return load_cifar(dataset, data, device, test)
    data = Path(option or data)
    parts = [data / part for part in (("test", "val") if test else ("train",))]
    path = next((p for p in parts if p.is_dir()), None)
    if path is None:
        raise BadInput(f"no folder {' or '.join(map(str, parts))}: --data must hold train/, "
                       "and test/ or val/, with one folder of images per class")
    try:
        folder = torchvision.datasets.ImageFolder(path)
    except (FileNotFoundError, PermissionError) as error:
        raise BadInput(f"no images in {path}: {error}") from None
    if name == "folder":
        return read_folder(folder, image_size, device)
    return ImageFiles(folder, torch.tensor(folder.targets), folder.classes, image_size or 224,
                      torch.device(device), workers)


def load_cifar(dataset: str, data: Path, device, test: bool) -> ImageSet:
    """Return CIFAR from `data`, downloaded to it by one process, its checksums compared."""
    source = getattr(torchvision.datasets, dataset.upper())
    try:
        if rank():
            barrier()                                             # until rank 0 has it
        cifar = source(data, train=not test, download=True)
        if not rank():
            barrier()
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{dataset} is not in {data} and cannot be downloaded ({error}): put "
                       f"{source.filename} there, or use --dataset folder --data DIR") from None
    return image_set(torch.from_numpy(cifar.data).permute(0, 3, 1, 2), cifar.targets,
                     cifar.classes, device)


def read_folder(folder, image_size: int | None, device) -> ImageSet:
    """Return all images of an ImageFolder, resized and centre-cropped to image_size if given."""
    images = []
    for row, (file, _) in enumerate(folder.samples):
        image = read_image(folder, row)
        if image_size:
            image = v2.functional.resize(image, [image_size])
            image = v2.functional.center_crop(image, [image_size])
        images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            raise BadInput(f"{file} is {image.width} x {image.height} pixels and the images before "
                           "it are not: give --image-size")
    return image_set(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
                     folder.targets, folder.classes, device)


def synthetic(num_classes: int, image_size: int, device, test: bool = False) -> ImageSet:
    """Return small procedural images that a network can learn: a class is a colour and a shape, on
    noise of another colour. 4% of the training labels are wrong on purpose, none of the test's."""
    rng = np.random.default_rng([num_classes, image_size, test])
    n = 400 if test else 2000
    labels = rng.integers(num_classes, size=n)

    def of(*shape, low=0.0, high=1.0):
        return rng.uniform(low, high, size=(n, *shape)).astype(np.float32)

    grid = np.linspace(-1, 1, image_size, dtype=np.float32)
    u = (grid[None, None, :] - of(1, 1, low=-0.3, high=0.3)) / of(1, 1, low=0.4, high=0.8)
    v = (grid[None, :, None] - of(1, 1, low=-0.3, high=0.3)) / of(1, 1, low=0.4, high=0.8)
    power = np.array([0.6, 1, 2, 8], np.float32)[labels % 4, None, None]    # star, ..., square
    radius = np.abs(u) ** power + np.abs(v) ** power
    ring = ((labels // 4 % 2 == 1)[:, None, None]) & (radius < 0.3)
    mask = ((radius < 1) & ~ring)[:, None]
    hue = (labels / num_classes + rng.normal(0, 0.03, n)).astype(np.float32)[:, None]
    colour = 0.5 + 0.4 * np.cos(2 * np.pi * (hue + np.array([[0, 1 / 3, 2 / 3]], np.float32)))
    image = np.where(mask, colour[:, :, None, None], of(3, 1, 1)) + rng.normal(
        0, 0.12, (n, 3, image_size, image_size)).astype(np.float32)
    if not test:
        wrong = rng.random(n) < 0.04
        labels = np.where(wrong, (labels + rng.integers(1, num_classes, n)) % num_classes, labels)
    pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    names = [f"{s}{k}" for k, s in zip(range(num_classes), ["star", "diamond", "disc", "square"]
                                       * num_classes)]
    return image_set(torch.from_numpy(pixels), labels, names, device)


def split_rows(labels, seed: int, hold_out: int = 0, subsets=None):
    """Return the rows of the training half, the validation half and the held-out images: a random
    partition. The held-out ones are the same for every seed, so that another script can test on
    them. subsets: instead of halves, these two shares of every class (PC-DARTS §4.3)."""
    n = len(labels)
    order = np.random.default_rng(0).permutation(n)
    held, rest = np.sort(order[:hold_out]), np.sort(order[hold_out:])
    rest = np.random.default_rng([seed, 0]).permutation(rest)
    if not subsets:
        return rest[:len(rest) // 2], rest[len(rest) // 2:], held
    halves, labels = ([], []), np.asarray(torch.as_tensor(labels).cpu())
    for k in range(labels.max() + 1):
        rows = rest[labels[rest] == k]
        a, b = (max(1, round(share * len(rows))) for share in subsets)
        halves[0].append(rows[:a])
        halves[1].append(rows[a:a + b])
    return *map(np.concatenate, halves), held


class Stream:
    """Endless mini-batches of some rows of the images, shuffled without replacement and augmented.

    stream(step) is a pure function of (seed, name, step): x (N, 3, H, W), y (N,), rows (N,); of
    several processes each has its own part of the batch. Raises BadInput.
    """

    def __init__(self, data: Images, rows, batch_size: int, seed: int, name: str, cutout=0):
        n = batch_size // world_size()
        if batch_size > len(rows):
            raise BadInput(f"--batch-size {batch_size}: the {name} stream has {len(rows)} images; "
                           "a search halves the training images; give that or less")
        if batch_size % world_size() or n < 2:
            raise BadInput(f"--batch-size {batch_size}: not a multiple of {world_size()} processes "
                           "with two images or more for each")
        self.rows, self.batch_size = rows, batch_size
        self.key, self.cutout = (seed, zlib.crc32(name.encode())), cutout
        self.part = slice(rank() * n, (rank() + 1) * n)
        self.read, self.next = data.reader(), -1

    def epoch_steps(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __call__(self, step: int):
        if step != self.next:                                     # the first, or not in order
            self.batches = self.read(requests(self.rows, self.batch_size, self.key, self.part,
                                              self.cutout, step))
        self.next = step + 1
        return next(self.batches)


def requests(rows, batch_size: int, key: tuple, part: slice, cutout: int, step: int):
    """Yield a stream's requests from a step on; each lap over the rows has its own order."""
    lap = order = None
    for now in itertools.count(step):
        picked = []
        for position in range(now * batch_size, (now + 1) * batch_size):
            if lap != position // len(rows):
                lap = position // len(rows)
                order = np.random.default_rng([*key, 0, lap]).permutation(rows)
            picked.append(order[position % len(rows)])
        yield Request(np.array(picked), (*key, 1, now), part, cutout)


def batches(data: Images, rows, batch_size: int):
    """Yield x, y of each image of `rows` once, in order and as it is."""
    # the last image alone joins the batch before it: BatchNorm in training refuses one
    parts = np.split(np.asarray(rows), range(batch_size, len(rows) - 1, batch_size))
    for x, y, _ in data.plain(map(Request, parts)):
        yield x, y


@torch.no_grad()
def accuracies(predict, data: Images, rows, batch_size: int, top=(1,)) -> list[float]:
    """Return the shares of images `rows` whose label is among the k largest logits of predict(x),
    for each k in top."""
    hits = torch.zeros(len(top), device=data.device)
    for x, y in batches(data, np.asarray(rows)[rank()::world_size()], batch_size):
        found = predict(x).topk(min(max(top), len(data.classes)), 1).indices == y[:, None]
        hits += torch.stack([found[:, :k].sum() for k in top])
    if world_size() > 1:
        hits = reduce([hits])[0]
    return [count / len(rows) for count in hits.tolist()]


# ------------------------------------------------------------------------------------ command line
# Arguments, their defaults by base and data set, and what --resume may change. A new argument is
# part of what makes a run what it is, unless MAY_CHANGE names it.


def number(kind, low, high=math.inf):
    """Return an argparse type: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} from {low}" + (f" to {high}" if high < math.inf else "")
    return parse


def dataset_name(text: str) -> str:
    """Check a data set's name as an argparse type; the names are those of load_images."""
    name, colon, option = text.partition(":")
    known = name in ("cifar10", "cifar100", "imagenet", "folder", "synthetic") and not colon
    classes = name == "synthetic" and option.isascii() and option.isdigit()
    if known or (name == "folder" and option) or (classes and 2 <= int(option) <= 1000):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no data set: cifar10, cifar100, imagenet, "
                                     "folder[:DIR] or synthetic[:CLASSES]")


real, flag = number(float, 0), argparse.BooleanOptionalAction


def new_parser(description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=f"{description} Example: {example}", usage=argparse.SUPPRESS,
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def reading_processes() -> int:
    """Return how many processes read images by default: one for each core that this process may
    use, shared with the others on the machine under torchrun; at most 8, as each holds batches."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def data_arguments(parser):
    add = parser.add_argument_group("the images").add_argument
    add("--data", type=Path, default=Path("data"),
        help="where CIFAR is or goes; the root of a folder or of ImageNet")
    add("--image-size", type=number(int, 8, 512), default=None,
        help="resize a folder's images to this many pixels; size of synthetic ones; else as they "
             "are, ImageNet's 224")
    add("--hold-out", type=number(int, 0), default=0,
        help="training images kept for evaluate.py to test on; Skillearn's lambda study has 5000 "
             "(§3.2.4)")
    add("--workers", type=number(int, 0), default=reading_processes(),
        help="processes that read ImageNet's files for a stream; here by the cores")


def search_arguments(parser):
    """Add the arguments of every search: its images, its base and the supernets' training."""
    data_arguments(parser)
    add = parser.add_argument_group(
        "the base search; the defaults are its paper's (BASES), or the method's").add_argument
    add("--base", choices=BASES, default="darts-2nd", help="whose recipe and supernet to take")
    add("--order", type=int, choices=(1, 2), help="1: A's gradient does not go through "
        "the steps ahead (xi = 0, DARTS §2.3; LeaSE explains by E, IL validates one step ahead)")
    add("--layers", type=number(int, 3), nargs="+", help="cells, per stage")
    add("--epochs", type=number(int, 1), help="of a stage, over the training half")
    add("--warm-up", type=number(int, 0), help="first epochs of a stage that train weights only")
    add("--batch-size", type=number(int, 2), help="of each stream, over all processes")
    add("--lr", type=real, help="of the searched networks' weights, SGD, cosine")
    add("--lr-min", type=real, help="where the cosine ends")
    add("--alpha-lr", type=real, help="of A, Adam (0.5, 0.999)")
    add("--candidates", type=number(int, 2, len(PRIMITIVES)), nargs="+",
        help="operations of an edge, per stage (P-DARTS §3.2)")
    add("--skip-dropout", type=number(float, 0, 0.99), nargs="+",
        help="initial rate on skip connections, per stage (P-DARTS §3.3)")
    add("--max-skips", type=number(int, 0, 8),
        help="most skip connections in the normal cell (P-DARTS §3.3)")
    add("--stop-at-skips", type=number(int, 0, 8),
        help="end the search at so many skip connections in the normal cell (DARTS+); 0: do not")
    add("--partial", type=number(int, 1),
        help="operations see 1/partial of the channels, edges have weights (PC-DARTS)")
    add("--auxiliary-skip", action=flag, help="a skip beside every edge, weight 1 to 0 (DARTS-)")
    add = parser.add_argument_group("the searched networks (DARTS §A.1)").add_argument
    add("--channels", type=number(int, 2), default=16, help="C of the first cell")
    add("--momentum", type=number(float, 0, 0.999), default=0.9, help="of every SGD")
    add("--weight-decay", type=real, default=3e-4, help="of every SGD")
    add("--grad-clip", type=real, default=5.0,
        help="largest gradient norm of a searched network; 0: any")
    add("--alpha-weight-decay", type=real, default=1e-3, help="of A")
    add("--radius", type=number(float, 1e-12), default=1e-2,
        help="of the central differences: eps = radius / |v| (DARTS Eq. 8, LPT Eq. 17)")
    add("--gradient", choices=("difference", "exact"), default="difference",
        help="A's: by the papers' finite differences, or by exact differentiation (one process)")
    add("--subsets", type=number(float, 0, 1), nargs=2, default=None,
        help="shares of every class that train weights and A, else halves; ImageNet's 0.1 0.025 "
             "(PC-DARTS §4.3)")
    run_arguments(parser, 10, "off, bf16 (the passes that train weights) or bf16-all (A's too)",
                  ("off", "bf16", "bf16-all"))


def run_arguments(parser, log_every: int, amp: str, levels: tuple):
    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=number(int, 0), default=1,
        help="of everything random; LPT and LeaSE have 1 to 10")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--amp", choices=levels, default="off", help=amp)
    add("--tf32", action=flag, default=False, help="let NVIDIA's matrix units round to TF32")
    add("--deterministic", action=flag, default=False,
        help="only algorithms that repeat their bits on a GPU too; slower")
    add("--out", type=Path, default=None, help="run folder; else one in runs/")
    add("--resume", action=flag, default=False, help="go on from the run folder's checkpoint")
    add("--checkpoint-minutes", type=real, default=10, help="between checkpoints within an epoch")
    add("--log-every", type=number(int, 1), default=log_every, help="steps between printed lines")
    add("--tensorboard", action=flag, default=False,
        help="write the figures and pictures for tensorboard too, which must be installed")
    add("--quick", action=flag, default=False,
        help="one to three minutes on synthetic images of 16 pixels; sets few cells, channels and "
             "epochs, high learning rates, a search's order 1")


def search_recipe(chosen, changes: dict) -> dict:
    """Return a base's defaults for chosen.dataset (IL has tasks), with a method's own: base (or
    "all") -> defaults."""
    recipe = BASES[chosen.base] | changes.get("all", {}) | changes.get(chosen.base, {})
    if task_names(chosen) == ["imagenet"]:
        recipe = recipe | IMAGENET | IMAGENET_BASES.get(chosen.base, {})
    if chosen.quick:
        images = ({"tasks": ["synthetic:10", "synthetic:5"]} if hasattr(chosen, "tasks") else
                  {"dataset": "synthetic"})
        recipe = recipe | images | dict(
            image_size=16, channels=4 * min(2, recipe["partial"]), batch_size=50, order=1, lr=0.1,
            alpha_lr=0.1, log_every=10)
        if len(recipe["layers"]) > 1:
            recipe = recipe | dict(epochs=1, warm_up=0)
        else:
            recipe = recipe | dict(epochs=3, warm_up=min(1, recipe["warm_up"]), layers=[3])
    return recipe


def check_search(args):
    """Raise BadInput where a search's arguments do not go together."""
    lengths = {len(args.layers), len(args.candidates), len(args.skip_dropout)}
    if len(lengths) > 1:
        raise BadInput("--layers, --candidates and --skip-dropout: give each one value per stage")
    if sorted(args.candidates, reverse=True) != args.candidates:
        raise BadInput(f"--candidates {' '.join(map(str, args.candidates))}: cannot grow")
    if args.warm_up >= args.epochs:
        raise BadInput(f"--warm-up {args.warm_up}: A would learn in none of a stage's "
                       f"{args.epochs} epochs")
    if args.channels % (2 * args.partial):
        raise BadInput(f"--channels {args.channels}: not a multiple of {2 * args.partial}")
    if args.gradient == "exact" and (args.amp == "bf16-all" or "RANK" in os.environ):
        raise BadInput("--gradient exact: of one process, and not with --amp bf16-all")
    if args.subsets and (sum(args.subsets) > 1 or not min(args.subsets) > 0):
        raise BadInput("--subsets: two shares above 0, together at most 1")


def parse(parser, argv, method: str, recipe):
    """Return the parsed arguments and, with --resume, the checkpoint to go on from.

    recipe(chosen) gives the defaults that hang on other arguments, from a first parsing. --resume
    takes the saved run's arguments, and an argument given with it must agree. Raises BadInput.
    """
    argv = sys.argv[1:] if argv is None else argv
    chosen = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    parser.set_defaults(**recipe(chosen))
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / run_name(method, args)
    if not args.resume:
        return args, None
    checkpoint, out = read_checkpoint(args.out), args.out
    if checkpoint["method"] != method:
        raise BadInput(f"--resume: {out} is a run of {checkpoint['method']}.py, not {method}.py")
    parser.set_defaults(**checkpoint["args"])
    args = parser.parse_args(argv)
    args.out = out
    saved = checkpoint["args"] | {"world_size": checkpoint["world_size"]}
    here = plain(args) | {"world_size": int(os.environ.get("WORLD_SIZE", 1))}
    for name, value in here.items():
        if saved.get(name) != value and name not in MAY_CHANGE:
            raise BadInput(f"--resume: the run in {out} has {name} = {saved.get(name)!r}, not "
                           f"{value!r}")
    return args, checkpoint


def parse_search(parser, argv, method: str, changes: dict):
    """Parse for a search whose method changes its bases' defaults: base (or "all") -> defaults."""
    args, checkpoint = parse(parser, argv, method, lambda chosen: search_recipe(chosen, changes))
    check_search(args)
    return args, checkpoint


def task_names(args) -> list[str]:
    return getattr(args, "tasks", None) or [args.dataset]


def run_name(method: str, args) -> str:
    """Return the default name of a run's folder: the method, what differs from it, the seed."""
    arch = Path(getattr(args, "arch", None) or "")
    cell = arch.parent.name or arch.stem if arch.suffix == ".json" else arch.name
    base = "" if getattr(args, "base", "") == "darts-2nd" else getattr(args, "base", "")
    words = (method, base, cell, *task_names(args), str(args.seed))
    return "-".join(word for word in words if word).replace(":", "").replace("/", "_")


MAY_CHANGE = ("data", "workers", "checkpoint_minutes", "tensorboard")      # with --resume


def plain(args) -> dict:
    """Return the arguments that make a run what it is, and where its data is, as plain values."""
    here = ("out", "device", "resume", "quick", "log_every")
    return {k: str(v) if k == "data" else v for k, v in vars(args).items() if k not in here}


# -------------------------------------------------------------------------------------------- run
# A run's process group, folder and place in its schedule; it knows no architecture. A change here
# is held by the tests that kill a run at random times and compare every bit of what it ends with.


def start(args) -> torch.device:
    """Return the device to compute on; under torchrun join the other processes, of which rank 0
    alone speaks and writes. Raises BadInput, where the run's folder is in use too."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = args.device
    if name == "auto":
        name = "cuda" if has["cuda"] else "mps" if has["mps"] else "cpu"
    if not has[name]:
        raise BadInput(f"--device {name}: torch sees no such device here")
    device, several = torch.device(name), "RANK" in os.environ    # torchrun sets it
    if several and name == "mps":
        raise BadInput("--device mps: one process has it; several need cpu or cuda")
    if several and name == "cuda":
        device = torch.device(name, int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise BadInput(f"--nproc-per-node: here are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if name == "cuda" and args.amp != "off" and not torch.cuda.is_bf16_supported(False):
        raise BadInput(f"--amp {args.amp}: this GPU only emulates bfloat16")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if several:                                                   # an hour: CIFAR may be downloaded
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=1),
                                device_id=device if name == "cuda" else None)
    if not args.resume and args.out.exists() and (not args.out.is_dir() or any(
            path.suffix != ".tmp" for path in args.out.iterdir())):
        raise BadInput(f"{args.out} is not an empty folder: give another --out, or --resume to go "
                       "on from its checkpoint")
    barrier()                                                     # all have seen the folder as is
    if rank():
        sys.stdout = open(os.devnull, "w")                        # noqa: SIM115
    return device


def write(path: Path, content: str | bytes):
    """Replace a file whole, or not at all, so that it survives a kill and a power cut. Of several
    processes only rank 0 writes."""
    if rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):                                # not on Windows
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


DAMAGE = (OSError, RuntimeError, ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error,
          pickle.UnpicklingError)       # what reading a damaged checkpoint may raise


def verify(path: Path):
    """Compare the checksums of the zip archive that torch.save makes. Raises one of DAMAGE."""
    if zipfile.ZipFile(path).testzip():
        raise ValueError("its checksum is wrong")


def write_checkpoint(folder: Path, content: dict):
    """Write checkpoint.pt; the one before it stays as checkpoint.previous.pt."""
    if rank():
        return
    path, buffer = folder / "checkpoint.pt", io.BytesIO()
    torch.save(content, buffer)
    with contextlib.suppress(*DAMAGE):                            # a damaged one takes no place
        verify(path)
        os.replace(path, folder / "checkpoint.previous.pt")
    write(path, buffer.getvalue())


def read_checkpoint(folder: Path) -> dict:
    """Return the newest good checkpoint of a run folder: weights and plain values, nothing else is
    read. Raises BadInput."""
    problems = []
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = folder / name
        try:
            verify(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or not {"method", "args", "run"} <= content.keys():
                raise ValueError("it is no checkpoint of a run")
        except FileNotFoundError:
            problems += [f"there is no {path}"] if name == "checkpoint.pt" else []
        except DAMAGE as error:
            problems.append(f"{path} is damaged: {error}")
        else:
            if problems:
                sys.stderr.write(f"{problems[0]}; going on from {path}\n")
            return content
    raise BadInput("; ".join(problems))


def fingerprint(data: Images) -> str:
    """Return what tells one data set from another: its sizes, classes, labels, some images."""
    rows = np.linspace(0, len(data.labels) - 1, 16).astype(int)
    seen = [str((len(data.labels), data.size, data.classes)).encode(),
            data.labels.cpu().numpy().tobytes(), data.pixels(rows).cpu().numpy().tobytes()]
    return hashlib.sha256(b"".join(seen)).hexdigest()[:16]


class Signals:
    """SIGTERM and SIGINT end a run after its step, with a checkpoint; a second one ends it at once.
    Outside the steps there is nothing to save."""
    number, stepping = 0, False

    @classmethod
    def receive(cls, number, frame):
        if cls.number:
            os._exit(128 + number)
        if not cls.stepping:
            sys.exit(128 + number)
        cls.number = number

    @classmethod
    @contextlib.contextmanager
    def caught(cls):
        numbers = signal.SIGTERM, signal.SIGINT
        before = [signal.signal(number, cls.receive) for number in numbers]
        cls.number, cls.stepping = 0, False
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)


class Run:
    """A run's folder and its place in the schedule: all that --resume needs beside the learners.

    state: the stage; the step of the run that comes next; the sums of this epoch's figures and the
    seconds spent on it; the lines of the epochs before; why the run ended early, if it did.
    more: plain values that the checkpoint is to hold for others.
    """

    def __init__(self, method: str, args, checkpoint: dict | None, sets: list[Images], more=None):
        self.method, self.args, self.checkpoint = method, args, checkpoint
        self.data, self.more = [fingerprint(data) for data in sets], more or {}
        self.state = dict(stage=0, step=0, sums={}, seconds=0.0, history=[], stopped=None)
        if checkpoint:
            if checkpoint["data"] != self.data:
                raise BadInput(f"--resume: the data is not that of the run in {args.out}")
            self.state = checkpoint["run"]
        try:
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out {args.out}: {error}") from None
        except ImportError:
            raise BadInput("--tensorboard: pip install tensorboard") from None
        self.board = None
        if args.tensorboard and not rank():
            self.board = SummaryWriter(args.out, purge_step=self.state["step"])
        self.new, self.noted = True, {}

    def load(self, parts: dict):
        """Take the learners and optimizers of a stage; a checkpoint's states go into them."""
        self.parts = parts
        if self.checkpoint:
            try:
                for name, part in parts.items():
                    part.load_state_dict(self.checkpoint["parts"][name])
            except (RuntimeError, ValueError, LookupError) as error:
                raise BadInput(f"--resume: the checkpoint in {self.args.out} does not fit: "
                               f"{error}") from None
            self.checkpoint = None
        elif not self.state["step"]:                              # so that --resume always can
            self.save()

    def save(self):
        write_checkpoint(self.args.out, {
            "method": self.method, "args": plain(self.args), "data": self.data,
            "world_size": world_size(), "run": self.state, **self.more,
            "parts": {name: part.state_dict() for name, part in self.parts.items()}})
        self.saved = time.time()

    def epochs(self, epoch_steps: int):
        """Yield the epochs that are left of the present stage; after each the run is saved."""
        args, state, self.epoch_steps, self.done = self.args, self.state, epoch_steps, 0
        self.begin = self.lap = self.saved = time.time()
        Signals.stepping, end = True, (state["stage"] + 1) * args.epochs * epoch_steps
        try:
            while state["step"] < end and not state["stopped"]:
                yield state["step"] // epoch_steps - state["stage"] * args.epochs
                self.pause(save=True)
        finally:
            Signals.stepping = False

    def steps(self):
        """Yield the steps of the run that are left of the present epoch. Within it the run is saved
        every --checkpoint-minutes; what is drawn in a step is a function of (seed, step, rank)."""
        state = self.state
        end = (state["step"] // self.epoch_steps + 1) * self.epoch_steps
        while state["step"] < end:
            seed_all(self.args.seed, state["step"], rank())
            yield state["step"]
            state["step"] += 1
            state["seconds"] += time.time() - self.lap
            self.lap = time.time()
            if state["step"] < end:                               # else the validation comes first
                self.pause(self.lap - self.saved > 60 * self.args.checkpoint_minutes)

    def pause(self, save: bool):
        """Save, if it is time or a signal came; end the run if one came."""
        stop = Signals.number and not rank()
        if save or stop:
            self.save()
        if stop:
            sys.stderr.write(f"stopped after step {self.state['step']}; --resume goes on\n")
            sys.exit(128 + Signals.number)

    def last_step(self) -> bool:
        """Return whether the present step is the last one of its epoch."""
        return (self.state["step"] + 1) % self.epoch_steps == 0

    def at(self, learner: str) -> str:
        """Return where the run is, for an error message."""
        return f"{learner} (stage {self.state['stage'] + 1}, step {self.state['step'] + 1})"

    def log(self, **figures: Tensor):
        """Add a step's figures to the epoch's sums and print them now and then."""
        args, state, i = self.args, self.state, self.state["step"] % self.epoch_steps + 1
        values = torch.stack([value.detach().float() for value in figures.values()])
        if world_size() > 1:
            values = reduce([values], 1 / world_size())[0]
        device, values = values.device, values.tolist()
        for name, value in zip(figures, values):
            state["sums"][name] = state["sums"].get(name, 0.0) + value
            if self.board:
                self.board.add_scalar(f"step/{name}", value, state["step"])
        self.done += 1
        if self.new and (peak := peak_memory(device)):
            print(f"peak memory {peak:.0f} MiB after the first step")
        self.new = False
        if i % args.log_every == 0 or i == self.epoch_steps:
            spent = (time.time() - self.begin) / self.done
            epochs = args.epochs * len(getattr(args, "candidates", [0]))
            left = epochs * self.epoch_steps - state["step"] - 1
            words = "  ".join(f"{name.replace('_', ' ')} {value:.3f}"
                              for name, value in zip(figures, values))
            print(f"epoch {state['step'] // self.epoch_steps + 1}/{epochs} "
                  f"step {i}/{self.epoch_steps}  {words}  {args.batch_size / spent:.1f} images/s  "
                  f"left {timedelta(seconds=round(spent * left))}", flush=True)

    def end_epoch(self, figures: dict | None = None, more: dict | None = None) -> list[dict]:
        """Write an epoch's line to the log: the means of its steps, figures, and more that is not
        printed. Returns the lines so far. The checkpoint comes after it, so that an interruption
        repeats what is done here."""
        args, state = self.args, self.state
        line = {"epoch": len(state["history"]) + 1}
        line |= {name: value / self.epoch_steps for name, value in state["sums"].items()}
        line |= self.noted | (figures or {})
        self.noted = {}
        for name, value in line.items():
            if not math.isfinite(value):
                raise NotFinite(f"{name} is {value} after epoch {line['epoch']}")
        line["seconds"] = state["seconds"] + time.time() - self.lap
        print(" ".join(f"{k} {v:.4g}" for k, v in line.items()), flush=True)
        for name, value in line.items() if self.board else ():
            self.board.add_scalar(f"epoch/{name}", value, state["step"] - 1)
        if state["stopped"]:
            line["stopped"] = state["stopped"]
            print("the search ends here:", state["stopped"])
        line |= more or {}
        self.lap = time.time()
        state |= dict(sums={}, seconds=0.0, history=[*state["history"], line])
        write(args.out / "log.jsonl", "".join(json.dumps(each) + "\n" for each in
                                              state["history"]))
        return state["history"]

    def picture(self, name: str, rows: dict, size: int = 96, keep: bool = False):
        """Write NAME.png, or to keep all epochs' NAME-EPOCH.png; rows, size: draw_pictures'."""
        canvas, content = draw_pictures(rows, size), io.BytesIO()
        canvas.save(content, "PNG")
        epoch = f"-{len(self.state['history'])}" if keep else ""
        write(self.args.out / f"{name}{epoch}.png", content.getvalue())
        if self.board:
            self.board.add_image(f"{name}.png", np.asarray(canvas), self.state["step"] - 1,
                                 dataformats="HWC")


def peak_memory(device) -> float:
    """Return the largest memory so far, in MiB: a GPU's by torch, else the process's; 0 where the
    system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20 if resource else 0.0


def print_next(run):
    """Print where a search's cell is, how decided, and the commands that evaluate it."""
    args, entropy = run.args, run.state["history"][-1]["alpha_entropy"]
    if entropy > 0.98 * math.log(args.candidates[-1]):
        print(f"alpha_entropy {entropy:.3f} of ln {args.candidates[-1]} = "
              f"{math.log(args.candidates[-1]):.3f}: the operations of an edge are nearly tied; "
              "more epochs or a larger --alpha-lr decide more")
    print(f"The cell is in {args.out}/genotype.json, drawn in cells.svg. Train it:")
    for dataset in task_names(args):
        parts = ["python evaluate.py --arch", shlex.quote(f"{args.out}/genotype.json"),
                 "--dataset", shlex.quote(dataset)]
        if dataset in ("cifar10", "cifar100", "folder", "imagenet"):  # the others name their place
            parts.append(f"--data {shlex.quote(str(args.data))}")
        if args.base in ("pdarts", "pcdarts") and dataset != "imagenet":
            parts.append("--drop-path 0.3")                       # as their papers have it
        parts += [f"--image-size {args.image_size}"] if args.image_size else []
        parts += [f"--hold-out {args.hold_out}"] if args.hold_out else []
        print(*parts, *["--quick"] if args.quick else [])


def draw_pictures(rows: dict, size: int) -> Image.Image:
    """Return a picture of rows of images, `size` pixels each, under their titles and over their
    captions.

    rows: title -> list of (image (3, H, W) uint8, caption).
    """
    gap, columns = 10, max(map(len, rows.values()))
    heights = [size + (78 if any(caption for _, caption in row) else 40) for row in rows.values()]
    width, y = gap + columns * (size + gap), gap
    canvas = Image.new("RGB", (width, gap + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for (title, row), height in zip(rows.items(), heights):
        draw.text((gap, y), title, "black", ImageFont.load_default(15))
        for c, (pixels, caption) in enumerate(row):
            x = gap + c * (size + gap)
            image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
            canvas.paste(image.resize((size, size), Image.Resampling.NEAREST), (x, y + 24))
            draw.text((x, y + 27 + size), caption, "black", ImageFont.load_default(13))
        y += height
    return canvas


def run(main, argv=None):
    """Run main(argv), where bad input ends in one line and exit code 2, and what goes wrong later
    in one line and exit code 1."""
    def end(code, message):
        # what all processes refuse alike, rank 0 says; what happens in a run, whoever met it
        if code == 1 or dist.is_initialized() or os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
        sys.exit(Signals.number + 128 if Signals.number else code)

    with Signals.caught():
        try:
            main(argv)
        except BadInput as error:
            end(2, error)
        except (NotFinite, Gone, OSError) as error:
            end(1, error)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and (
                    "allocate memory" not in str(error)):
                raise
            end(1, f"out of memory: lower --batch-size, --channels or --layers ({error})")
    if dist.is_initialized():
        dist.destroy_process_group()
