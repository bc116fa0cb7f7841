"""Tests: every gradient, network and file against an oracle, then small runs from end to end.

    python -m pytest -q test_smoke.py               # every kind of check once
    RUN_SLOW=1 python -m pytest -q test_smoke.py    # all of them

In the order of the code. docs/companion.md names the test of every equation of the two papers; an
error in one of them is seen (WRONG). What tests the bases':

DARTS Eq. 2; 7, 8; §2.4   test_supernet_is_the_per_edge_one;
                          test_without_their_own_parts_they_are_darts; test_decoding_by_hand
P-DARTS §3.2, 3.3         test_pruning_by_hand, test_at_most_two_skip_connections_by_hand,
                          test_skip_dropout_is_one_mask_a_step
PC-DARTS Eq. 3            test_decoding_with_edge_weights_by_hand

.ci/measure.py measures with the same oracles.
"""

import argparse
import contextlib
import functools
import http.client
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

import darts_ops as ops
import evaluate
import genotypes
import il
import lease
import lpt

HERE = Path(__file__).resolve().parent
slow = pytest.mark.skipif(not os.environ.get("RUN_SLOW"), reason="RUN_SLOW=1 runs it")
MODULES = {"lpt": lpt, "il": il, "lease": lease}
METHODS = tuple(MODULES)
ITERATION = {"lpt": "algorithm_2", "il": "algorithm_3", "lease": "algorithm_1",
             "evaluate": "gradient"}    # the function that takes a step

# --------------------------------------------------------------------------------- shared helpers


def slow_but(always, cases):
    """Mark the cases slow, but for those whose numbers are in `always`."""
    return [case if i in always else
            pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=slow)
            for i, case in enumerate(cases)]


def relative_error(a, b):
    a, b = (torch.cat([t.flatten() for t in part]) for part in (a, b))
    return ((a - b).norm() / b.norm()).item()


def difference(a, b):
    return [x - y for x, y in zip(a, b)]


def cosine(a, b):
    a, b = (torch.cat([t.flatten().double().cpu() for t in part]) for part in (a, b))
    return F.cosine_similarity(a, b, 0).item()


def snapshot(*parts):
    """Every tensor of modules and optimizers, and every .grad, copied."""
    tensors = []
    for part in parts:
        if isinstance(part, nn.Module):
            tensors += [*part.state_dict().values(), *(p.grad for p in part.parameters())]
        elif isinstance(part, torch.optim.Optimizer):
            tensors += [t for s in part.state.values() for t in s.values()]
        else:
            tensors += [*part, *(t.grad for t in part)]
    return [t.detach().clone() if torch.is_tensor(t) else t for t in tensors]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) if torch.is_tensor(x) and torch.is_tensor(y)
                                    else x is y or x == y for x, y in zip(a, b))


def settings(module, **changes):
    """A method's default arguments, some of them changed."""
    return argparse.Namespace(**vars(module.get_args([])[0]) | changes)


# Scripts: they run in this process, on few and small images.

SMALL = ["--image-size", "8", "--layers", "3", "--channels", "2", "--batch-size", "50",
         "--device", "cpu"]
TINY = ["--dataset", "synthetic:3", *SMALL]
LEASE = [*TINY, "--warm-up", 0]
FIRST = ["--order", 1]                  # where a search, and not its gradient, is tested
RUNS = {"lpt": (lpt, TINY), "lease": (lease, LEASE),
        "il": (il, [*SMALL, "--tasks", "synthetic:3", "synthetic:2", "--rounds", 1]),
        "evaluate": (evaluate, [*TINY, "--arch", "random:1"])}
PRUNED = ["--base", "pdarts", "--layers", 3, 4, 3, "--epochs", 1, "--warm-up", 0]


class SmallResNet(nn.Sequential):
    """In place of ResNet-18 and ResNet-50, where a test runs a script."""

    def __init__(self, name, weights=None, num_classes=1000):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, num_classes)


def make_small(replace=setattr):
    """200 synthetic images for training and 100 for testing, and a small ResNet."""
    synthetic = ops.synthetic

    def few(classes, size, device, test=False):
        data = synthetic(classes, size, device, test)
        n = 100 if test else 200
        data.images, data.labels = data.images[:n], data.labels[:n]
        return data

    replace(ops, "synthetic", few)
    replace(torchvision.models, "get_model", SmallResNet)


@pytest.fixture(autouse=True)
def small_runs(request, monkeypatch):
    if os.environ.get("RUN_SLOW") == "only" and slow.mark not in request.node.iter_markers():
        pytest.skip("RUN_SLOW=only: the slow cases, for who has run the others")
    torch.set_num_threads(1)            # networks this small do not gain by a second, which waits
    if "tmp_path" in request.fixturenames:
        make_small(monkeypatch.setattr)


def run_script(module, *argv):
    """The exit code of a script run in this process."""
    try:
        ops.run(module.main, [str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def search(method, *argv):
    module, given = RUNS[method]
    return run_script(module, *given, *argv)


def tree(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def one_line(capsys):
    """The error that was printed, which is one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: "), error
    return error


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def finals(folder):
    """What a run ended with and where that is, its durations left out."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for line in [state["run"], *state["run"]["history"]]:
        line.pop("seconds")
    return flat(state)


def flat(state):
    """Its values and where each of them is."""
    found = {str(path): value for path, value in tree_flatten_with_path(state)[0]}
    return [part for path in sorted(found) for part in (path, found[path])]


def interrupted(module, argv, folder, monkeypatch, n):
    """A run that is stopped by Ctrl-C after its n-th checkpoint."""
    save, done = ops.Run.save, itertools.count(1)

    def interrupt(run):
        save(run)
        if next(done) == n:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ops.Run, "save", interrupt)
        assert run_script(module, *argv, "--out", folder) == 130


# -------------------------------------------------------------------------------- small problems
# A method's learners, with momentum buffers as in the middle of a search, and batches: on smooth
# networks, where the error of the differences is their own, or on supernets of 3 cells.


class SmoothTestee(nn.Module):
    """A small network without kinks whose layers mix two operations by softmaxed alphas."""

    def __init__(self, inputs=6, hidden=5, classes=4):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, hidden), nn.Linear(inputs, hidden)
        self.c = nn.Linear(hidden, classes)

    def forward(self, x, A):
        p, q, x = F.softmax(A.alpha[0], -1), F.softmax(A.alpha[1], -1), x.flatten(1)
        a, b = self.a(x), self.b(x)
        h = p[0] * torch.tanh(a / 2) + p[1] * F.softplus(b / 2) + p[2] * a
        return self.c(q[0] * h + q[1] * torch.tanh(h / 2))


class SmoothTester(nn.Module):
    def __init__(self, inputs=6, hidden=5, classes=4):
        super().__init__()
        self.encoder, self.executor = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        features = torch.tanh(self.encoder(x.flatten(1)))
        return self.executor(features), features


def pruned(keep, seed=0):
    """`keep` candidates of every edge, drawn at random: the candidates of a P-DARTS stage."""
    rng = np.random.default_rng(seed)
    return [[[genotypes.PRIMITIVES[o] for o in sorted(rng.permutation(8)[:keep])]
             for _ in range(14)] for _ in range(2)]


KINDS = {"pdarts": (pruned(3), 1), "pcdarts": (ops.ALL, 4)}        # candidates, 1/partial channels


def batch(supernet=False, classes=4, size=16, draw=False):
    shape = (4, 3, size, size) if supernet else (40, 3, 2, 1)
    return (torch.randn(shape, dtype=torch.float64), torch.randint(classes, shape[:1]),
            torch.randint(20, shape[:1]) if draw else torch.arange(shape[0]) % 20)


def searched(supernet=False, classes=4, base=None):
    """A network whose architecture is searched."""
    if not supernet:
        return SmoothTestee(classes=classes).double()
    kept, partial = KINDS.get(base, (ops.ALL, 1))
    net = ops.place(ops.Supernet(8 if partial > 1 else 4, classes, 3, kept, partial,
                                 base == "darts-"), "cpu").double()
    net.knobs.skip_dropout, net.knobs.auxiliary = 0.3 * (base == "pdarts"), base == "darts-"
    return net


def architecture(supernet=False, base=None):
    """An architecture of large random parameters."""
    with torch.random.fork_rng():
        A = ops.Architecture(*KINDS.get(base, ()))
    if not supernet:                                               # SmoothTestee's
        A.alpha = nn.ParameterList(torch.zeros(shape) for shape in (3, 2))
    A = A.double()
    for parameter in A.parameters():
        nn.init.normal_(parameter)
    return A


def moving(net, lr, logits, y):
    """The SGD of a network that has taken a step."""
    opt = torch.optim.SGD(net.parameters(), lr, 0.9, weight_decay=3e-4)
    ops.descend(opt, ops.grad(F.cross_entropy(logits, y), list(net.parameters())))
    return opt


def lpt_problem(supernet=False, ablation=0, base=None, tester=True, seed=None):
    torch.manual_seed((0 if supernet else 3) if seed is None else seed)
    classes, lr = (5, 0.025) if supernet else (4, 0.1)
    testee = searched(supernet, classes, base)
    asks = (ops.place(lpt.Tester("resnet18", 5), "cpu") if supernet else SmoothTester()).double()
    creator = list(nn.Linear(asks.executor.in_features, 1).double().parameters())
    batches = [batch(supernet, classes, draw=not supernet) for _ in range(3)]
    A, (x, y, _) = architecture(supernet, base), batches[0]
    m = lpt.Learners(testee, moving(testee, lr, testee(x, A), y), A)
    if ablation == 1:
        m.creator = [torch.randn(20, dtype=torch.float64).requires_grad_()]
    elif tester:
        m.tester, m.creator = asks, creator
        m.tester_opt = moving(asks, lr, asks(x)[0], y)
    return m, batches


def il_problem(K=2, M=2, supernet=False, lr=0.025):
    torch.manual_seed(3)
    nets = [searched(supernet, 4 + l % K) for l in range(K * M)]   # tasks differ in classes
    A, train, val = architecture(supernet), [], []
    for l in range(K * M):
        for batches in (train, val)[:2 if l < K else 1]:
            batches.append(batch(supernet, 4 + l % K))
    return il.Learners([il.Learner(net, moving(net, lr, net(x, A), y))
                        for net, (x, y, _) in zip(nets, train)], A), (train, val)


def lease_problem(supernet=False, seed=None):
    torch.manual_seed((1 if supernet else 3) if seed is None else seed)
    classes, lr = (5, 0.025) if supernet else (4, 0.1)
    explainer = searched(supernet, classes)
    audience = (ops.place(torchvision.models.resnet18(num_classes=5), "cpu") if supernet else
                nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))).double()
    A = architecture(supernet)
    train, val = (batch(supernet, classes, 32) for _ in range(2))
    x, y, _ = train
    m = lease.Learners(explainer, moving(explainer, lr, explainer(x, A), y), A, None,
                       audience, moving(audience, lr, audience(x), y))
    return m, (train, val, 0.01 * torch.randn(x.shape, dtype=torch.float64))


PROBLEMS = {"lpt": lpt_problem, "il": il_problem, "lease": lease_problem}

# ============================================================================ PART I: the papers

# --------------------------------------------------------- gradients: exact differentiation oracle

RADII = {1e-2: 1e-4, 1e-3: 1e-6}        # radius: largest relative error, which is O(radius^2)


def stage_gradients(m, train):
    """IL: the gradients that its stages are about to follow."""
    return [ops.grad(F.cross_entropy(ops.at_weights(s.net, s.weights)(x, m.A), y), s.weights)
            for s, (x, y, _) in zip(m.stages, train)]


def gradients(method, m, batches, args, module=None):
    """A's gradient, and LPT's C's, by the papers' differences: a list per group."""
    module = module or MODULES[method]
    if method == "lpt":
        return [g for g in module.outer_gradient(m, batches, args)[:2] if g]
    before = (stage_gradients(m, batches[0]) if method == "il" else
              module.look_ahead(m, batches, args))
    return [module.outer_gradient(m, batches, args, before)[0]]


def exact(method, m, batches, args):
    """The same by automatic differentiation of the one-step problem, and the direct parts by
    themselves: what the stages have learned held constant."""
    module, creator = MODULES[method], getattr(m, "creator", [])
    groups = [m.alphas, creator] if creator else [m.alphas]

    def differentiated():
        J = module.objective(m, batches, args)
        return ops.gradients(J[0] if method == "lpt" else J, *groups)

    total = differentiated()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sgd_step", lambda *step: ops.detached(ops.sgd_step(*step)))
        return total, differentiated()


def errors(method, problem, module=None, **changes):
    """Relative errors of the second-order terms by themselves, one per group; a gradient without
    one must be equal as it is."""
    args, found = settings(MODULES[method], **changes), []
    for got, total, direct in zip(gradients(method, *problem, args, module),
                                  *exact(method, *problem, args), strict=True):
        second = difference(total, direct)
        if max(t.abs().max() for t in second) > 1e-13:
            found.append(relative_error(difference(got, direct), second))
        else:
            found.append(relative_error(got, total))
    return found


@pytest.mark.parametrize("created_test,lam,gamma", [("printed", 1.0, 1.0),
                                                    ("normalized", 0.5, 2.0)])
@pytest.mark.parametrize("ablation", [0, 1, 2])
@pytest.mark.parametrize("order", [1, 2])
def test_lpt_gradients_on_the_smooth_network(order, ablation, created_test, lam, gamma):
    for radius, bound in RADII.items():
        assert max(errors("lpt", lpt_problem(ablation=ablation), radius=radius, order=order,
                          ablation=ablation, lam=lam, gamma=gamma, created_test=created_test)
                   ) < bound


@pytest.mark.parametrize("step", ["proximal", "printed"])
@pytest.mark.parametrize("lam", slow_but({0, 2}, [0.0, 1.0, 10.0, 100.0]))
@pytest.mark.parametrize("M", slow_but({1}, [1, 2, 3]))
@pytest.mark.parametrize("K", slow_but({1}, [1, 2, 3]))
def test_il_gradient_on_the_smooth_network(K, M, lam, step):
    for radius, bound in RADII.items():
        assert max(errors("il", il_problem(K, M), radius=radius, lam=lam, step=step)) < bound


def lease_errors(problem, module=None, **changes):
    """Relative errors of the second-order terms: the explainer's own (Eq. 11), the audience's with
    xi_e = 0 (Eq. 13, 15 and v_A), the audience's whole chain (with Eq. 17), and the total."""
    terms, found = [], []
    for gamma, order in ((0.0, 2), (1.0, 1), (1.0, 2)):
        args = settings(lease, **changes | dict(gamma=gamma, order=order))
        args.delta_radius = changes.get("radius", args.radius)
        (got,), ((total,), (direct,)) = (gradients("lease", *problem, args, module),
                                         exact("lease", *problem, args))
        terms.append((got, total))
        found.append(relative_error(difference(got, direct), difference(total, direct)))
    own, _, both = terms
    return [*found, relative_error(*map(difference, both, own))]


@pytest.mark.parametrize("weighting", ["signed", "magnitude"])
def test_lease_gradient_on_the_smooth_network(weighting):
    """Its bounds are twenty times the others', and O(radius^2) too: what the projection of v_Delta
    leaves is a small difference of large terms."""
    for radius, bound in RADII.items():
        assert max(lease_errors(lease_problem(), radius=radius, weighting=weighting)) < 20 * bound


@pytest.mark.parametrize("method,base,changes", slow_but({0}, [
    ("lpt", None, dict()), ("lpt", None, dict(order=1)),
    ("lpt", None, dict(ablation=2, lam=0.5, gamma=2.0)), ("lpt", "darts-", dict()),
    ("lpt", "pcdarts", dict()), ("lpt", "pdarts", dict()), ("il", None, dict(lam=100.0)),
    ("il", None, dict(lam=1.0, step="printed")), ("lease", None, dict(delta_radius=1e-8))]),
    ids=str)
def test_gradients_on_the_supernet_with_resnet18(method, base, changes):
    problem = PROBLEMS[method](supernet=True, **({"base": base} if base else {}))
    assert max(errors(method, problem, radius=1e-8, **changes)) < 1e-4
    if method == "lease":
        assert max(lease_errors(problem, radius=1e-8)) < 1e-4


def test_the_difference_along_delta_has_its_radius(monkeypatch):
    """And it alone is split between processes."""
    seen, real = [], ops.central_difference
    monkeypatch.setattr(lease, "central_difference", lambda grad_at, w, v, radius, split=False: (
        seen.append((radius, split)) or real(grad_at, w, v, radius, split)))
    gradients("lease", *lease_problem(), settings(lease, radius=0.02, delta_radius=3.0))
    assert seen == [(0.02, False), (3.0, True), (0.02, False)]


@pytest.mark.parametrize("method", METHODS)
def test_the_exact_gradient_is_the_problems(method):
    problem = PROBLEMS[method]()
    got = gradients(method, *problem, settings(MODULES[method], gradient="exact"))
    for a, b in zip(got, exact(method, *problem, settings(MODULES[method]))[0], strict=True):
        assert relative_error(a, b) < 1e-12


WRONG = {                               # what an error replaces, in darts_ops or the method
    "lpt-eq17-divisor": ("(p - n) / (2 * eps)", "(p - n) / 2 * eps"),
    "lpt-eq16-sign": ("[g - xi * p for g, p in zip(g_alpha, product)]",
                      "[g + xi * p for g, p in zip(g_alpha, product)]"),
    "lpt-eq20-sign": ("[g - args.gamma * xi * p", "[g + args.gamma * xi * p"),
    "lpt-eq20-without-gamma": ("[g - args.gamma * xi * p", "[g - xi * p"),
    "lpt-eq23-without-df/dC": (
        "f = selection(m.creator, tester(", "f = 0 * sum(c.sum() for c in m.creator) + selection("
        "ops.detached(m.creator), tester("),
    "lpt-eq23-without-df/dC-above": (
        "R = ops.weighted_mean(losses, f)  ", "R = (selection(ops.detached(m.creator), tester("
        "x_bank)[1]) * losses).sum() / f.sum()  "),
    "lpt-eq9-without-1/sum-f": ("R = ops.weighted_mean(losses, f)  ", "R = (f * losses).mean()  "),
    "lpt-step-without-momentum": (
        'torch._foreach_add_(step, buffers, alpha=group["momentum"])', "pass"),
    "lpt-eq15-sign-of-lambda": ("R - args.lam * F", "R + args.lam * F"),
    "lpt-eq13-f-constant-in-E": ("return (f * losses).mean()", "return (selection(creator, "
                                 "features.detach()) * losses).mean()"),
    "il-eq35-sweep-without-pull": ("[a + pull * b for", "[a + b for"),
    "il-eq35-sweep-without-1/(1+pull)": ("[t / (1 + pull) for t in encoder]", "encoder"),
    "il-eq35-step-without-1/(1+pull)": ("[(s + pull * b) / (1 + pull)",
                                        "[s + pull * (b - s) / (1 + pull) / 2"),
    "il-eq37-first-stage-first": (
        "for l in reversed(range(len(m.stages))):", "for l in range(len(m.stages)):"),
    "il-eq36-head-coupled": (
        "encoder = [t / (1 + pull) for t in encoder]",
        "encoder, head = ([t / (1 + pull) for t in part] for part in (encoder, head))"),
    "il-eq34-sign": ("[g - stage.eta * p", "[g + stage.eta * p"),
    "lease-eq7-descent": ("(delta + step_sizes(g) * g).detach()",
                          "(delta - step_sizes(g) * g).detach()"),
    "lease-eq14-without-dO/dA": ("[g + p for g, p in zip(g_alpha, by_a)]", "g_alpha"),
    "lease-eq17-without-E'": ("[v + p for v, p in zip(v_e, by_e)]", "v_e"),
    "lease-eq14-without-step-sizes": ("[xi_delta * v_delta]", "[v_delta]"),
    "lease-eq7-step-size-constant": (
        "v_delta - unit * (unit * v_delta).sum((1, 2, 3), keepdim=True)", "v_delta"),
    "lease-eq13-sign": ("v_delta = -xi_w * product", "v_delta = xi_w * product"),
    "lease-eq17-sign": ("[g - xi_e * p", "[g + xi_e * p"),
    "lease-eq2-one-argument-constant": ("b = F.softmax(explainer(x, A), 1)",
                                        "b = F.softmax(explainer(x, A), 1).detach()"),
}


def mutant(name):
    """The method's module with one piece of its source, or of darts_ops, replaced."""
    method, (old, new), modules, hits = name.split("-")[0], WRONG[name], {}, 0
    for part in ("darts_ops", method):
        source = (HERE / f"{part}.py").read_text()
        hits += source.count(old)
        modules[part] = types.ModuleType(f"mutant_{part}")
        held, sys.modules["darts_ops"] = sys.modules["darts_ops"], modules["darts_ops"]
        sys.modules[f"mutant_{part}"] = modules[part]
        try:
            exec(compile(source.replace(old, new), part, "exec"), modules[part].__dict__)
        finally:
            sys.modules["darts_ops"] = held
    assert hits == 1, f"{old!r} is there {hits} times"
    return modules[method]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_is_seen(name):
    method = name.split("-")[0]
    problem, module, changes = PROBLEMS[method](), mutant(name), dict(gamma=2.0, lam=10.0)
    found = (lease_errors(problem, module, radius=1e-2) if method == "lease" else
             errors(method, problem, module, **changes))
    assert max(found) > 1e-3


PRINTED = {                             # mutant: A's (0) or C's (1) gradient, mean, lowest, highest
    "lpt-eq23-without-df/dC-above": (1, -0.28, -0.47, -0.12),
    "lpt-step-without-momentum": (0, 0.996, 0.983, 1.0),
    "lease-eq7-descent": (0, -0.06, -0.90, 0.61),
    "lease-eq14-without-dO/dA": (0, 0.12, 0.01, 0.34),
    "lease-eq7-step-size-constant": (0, 0.78, 0.48, 0.97)}


@pytest.mark.parametrize("method", slow_but({0}, ["lpt", "lease"]))
def test_what_the_papers_print_points_elsewhere(method):
    """The cosine of the printed gradient with the exact one, for five seeds, as the companion has
    it; the code's is 1."""
    radius = 1e-8 if method == "lease" else 1e-3
    args = settings(MODULES[method], radius=radius, delta_radius=radius)
    found = {name: [] for name in PRINTED if name.startswith(method)}
    for seed in range(5):
        problem = PROBLEMS[method](method == "lease", seed=seed)
        right, _ = exact(method, *problem, args)
        for name, cosines in found.items():
            i = PRINTED[name][0]
            cosines.append(cosine(gradients(method, *problem, args, mutant(name))[i], right[i]))
    for name, cosines in found.items():
        values = np.mean(cosines), min(cosines), max(cosines)
        assert values == pytest.approx(PRINTED[name][1:], abs=0.006 if method == "lpt" else 0.02)


def darts_gradient(net, A, optimizer, train, val):
    """Second-order DARTS (its Eq. 7) by exact differentiation."""
    w = list(net.parameters())
    loss = F.cross_entropy(ops.at_weights(net, w)(train[0], A), train[1])
    ahead = ops.sgd_step(optimizer, ops.grad(loss, w, graph=True))
    return ops.grad(F.cross_entropy(ops.at_weights(net, ahead)(val[0], A), val[1]),
                    list(A.parameters()))


def test_without_their_own_parts_they_are_darts():
    """LPT with a constant test or --encoder none, IL of one stage, LeaSE without audience."""
    for tester in (True, False):
        m, batches = lpt_problem(tester=tester)
        for weight in m.creator[:1]:
            weight.data.zero_()                                    # f = sigmoid(bias) everywhere
        got = gradients("lpt", m, batches, settings(lpt, lam=0.0))[0]
        darts = darts_gradient(m.testee, m.A, m.testee_opt, *batches[:2])
        assert relative_error(got, darts) < 1e-6
    m, (train, val) = problem = il_problem(1, 1)
    darts = darts_gradient(m.stages[0].net, m.A, m.stages[0].opt, train[0], val[0])
    assert relative_error(*gradients("il", *problem, settings(il, lam=0.0)), darts) < 1e-5
    first, = gradients("il", *problem, settings(il, lam=0.0, order=1))
    direct, = exact("il", *problem, settings(il, lam=0.0))[1]
    assert relative_error(first, direct) < 1e-12
    m, (train, val, _) = problem = lease_problem()
    darts = darts_gradient(m.explainer, m.A, m.explainer_opt, train, val)
    assert relative_error(*gradients("lease", *problem, settings(lease, gamma=0.0)), darts) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("learns", [True, False])
def test_an_iteration_takes_the_steps_of_its_algorithm(method, learns, monkeypatch):
    """In the algorithm's order: A down, LPT's C up its gradient, each learner down its own loss."""
    m, batches = problem = PROBLEMS[method]()
    module, steps, real = MODULES[method], [], ops.descend
    args = settings(module, lam=1.0, grad_clip=0.0)
    m.alpha_opt = torch.optim.Adam(m.alphas, 0.1)
    outer, train, at = gradients(method, *problem, args), batches[0], ops.at_weights
    expected = [outer[0]] if learns else []
    if method == "lpt":
        m.creator_opt = torch.optim.Adam(m.creator, 0.1)
        expected += [[-g for g in outer[1]]] if learns else []
    elif method == "il":
        expected += stage_gradients(m, train)
    else:
        explanation = lease.look_ahead(m, batches, args).explanation
        expected += [ops.grad(F.cross_entropy(at(m.explainer, m.e)(train[0], m.A), train[1]),
                              m.e),
                     ops.grad(F.cross_entropy(at(m.audience, m.w)(explanation * train[0]),
                                              train[1]), m.w)]

    def descend(optimizer, grads, learner, clip=0.0):
        if learner == "the tester":                                # after C's step
            expected.append(ops.grad(lpt.tester_loss(m.tester, m.creator, *batches[:2], args),
                                     m.ex))
        elif learner == "the testee":                              # after A's
            expected.append(ops.grad(F.cross_entropy(m.testee(train[0], m.A), train[1]), m.w))
        steps.append(learner)
        assert relative_error(grads, expected[len(steps) - 1]) < 1e-10, learner
        real(optimizer, grads, learner, clip)

    monkeypatch.setattr(module, "descend", descend)
    monkeypatch.setattr(ops, "descend", descend)                   # A's step
    getattr(module, ITERATION[method])(m, batches, args, learns)
    learners = {"lpt": ["the tester", "the testee"], "lease": ["the explainer", "the audience"],
                "il": [f"learner {l}" for l in range(1, 5)]}[method]
    theirs = ["the architecture", *(["the creator"] if method == "lpt" else [])] if learns else []
    assert steps == theirs + learners


real = functools.partial(torch.tensor, dtype=torch.float64)


class Given(nn.Module):
    """A network whose parameter is its answer, whatever it sees."""

    def __init__(self, logits, features=None):
        super().__init__()
        self.logits, self.features = nn.Parameter(real(logits)), features

    def forward(self, x, A=None):
        return self.logits if self.features is None else (self.logits, self.features)


def test_the_losses_by_hand():
    """Problem and algorithm share them, so that each has an example worked out by hand."""
    log, f = math.log, [1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))]
    creator = [real([[1.0, -1.0]]), real([0.5])]
    features, y = real([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 1])
    logits = [[0.0, 0.0], [log(3), 0.0]]                           # losses log 2 and log 4
    tester, testee = Given(logits, features), Given([[log(7), 0.0], [0.0, 0.0]])
    assert lpt.selection(creator, features).tolist() == pytest.approx(f)             # Eq. 12
    answers, near = tester(None), lambda value: pytest.approx(value, rel=1e-12)
    printed, size = f[0] * log(2) + f[1] * log(4), f[0] + f[1]
    for created_test, value in (("printed", printed / 2), ("normalized", printed / size)):
        loss = lpt.created_test_loss(creator, *answers, y, created_test)
        assert loss.item() == near(value)                                            # Eq. 13
    train, bank, val = ((None, y, None), (None, y, torch.tensor([2, 0])),
                        (None, torch.tensor([1, 1]), None))
    args, own = settings(lpt, gamma=3.0, lam=2.0), (log(2) + log(4)) / 2
    assert lpt.testee_loss(lambda x, A: tester.logits, [], train).item() == near(own)  # Eq. 6
    for args.ablation, value in ((2, 3 * printed / 2), (0, own + 3 * printed / 2)):  # Eq. 26, 7
        assert lpt.tester_loss(tester, creator, train, bank, args).item() == near(value)
    m = lpt.Learners(testee, None, [], None, tester, None, creator)
    weights = [[net.logits.detach()] for net in (testee, tester)]
    J, R, _ = lpt.validation_objective(m, *weights, bank, val, args)
    expected = (f[0] * log(8 / 7) + f[1] * log(2)) / size                            # Eq. 9, 14
    assert R.item() == near(expected)
    assert J.item() == near(expected - 2 * (log(2) + log(4)) / 2)                    # Eq. 15, 19
    m.tester, m.creator = None, [real([0.0, 9.0, log(3)])]         # s = 3/4, 1/2 of rows 2 and 0
    J, R, _ = lpt.validation_objective(m, *weights, bank, val, args)
    assert J.item() == R.item() == near((0.75 * log(8 / 7) + 0.5 * log(2)) / 1.25)   # Eq. 25
    m.creator = []                                                 # --encoder none
    assert lpt.validation_objective(m, *weights, bank, val, args)[0].item() == near(
        (log(8 / 7) + log(2)) / 2)

    one, two, four = ([real(v)] for v in (1.0, 2.0, 4.0))
    assert il.coupled(one, two, four, 0.5, "printed")[0] == 2      # 1 - 0.5 (2 - 4), Eq. 35
    assert il.coupled(one, two, four, 0.5, "proximal")[0] == 2     # (1 + 0.5 * 4) / 1.5
    net = nn.Linear(2, 2)
    stage = il.Learner(net, torch.optim.SGD(net.parameters(), 0.1, 0.75))
    assert stage.pull(settings(il, lam=3.0)) == near(2 * 0.1 * 3 / 0.25)

    def explainer(x, A):                                      # logits (log 3 x_1, 0)
        return x.flatten(1) @ real([[log(3), 0.0], [0.0, 0.0]])

    x, delta = real([0.0, 0.0]).view(1, 2, 1, 1), real([1.0, 5.0]).view(1, 2, 1, 1)
    objective = lease.explanation_objective(explainer, [], x, delta)
    assert objective.item() == near(-0.5 * log(0.75) - 0.5 * log(0.25))              # Eq. 2
    g = real([3.0, 4.0]).view(1, 2, 1, 1)
    assert lease.step_sizes(g).item() == near(2 ** 0.5 / 5) and lease.step_sizes(0 * g) == 0
    explanation, xi = lease.explain(explainer, [], x, delta)       # gradient log 3 (3/4 - 1/2, 0)
    assert xi.item() == near(2 ** 0.5 / (0.25 * log(3)))
    assert explanation.flatten().tolist() == near([1 + 2 ** 0.5, 5.0])               # Eq. 7
    seen = []
    for weighting, sign in (("signed", -1), ("magnitude", 1)):                       # Eq. 3
        loss = lease.audience_loss(lambda x: seen.append(x) or x.flatten(1), -g,
                                   (g + 1, torch.tensor([0]), None),
                                   settings(lease, weighting=weighting))
        assert seen[-1].flatten().tolist() == near([sign * 12.0, sign * 20.0])
        assert loss.item() == near(log(1 + math.exp(sign * 8.0)))
    given = real([[log(3), 0.0]]), (None, torch.tensor([0]), None)                   # Eq. 1, 9
    for loss in (lease.explainer_loss(lambda x, A: given[0], [], given[1]),
                 lease.audience_val_loss(lambda x: given[0], given[1])):
        assert loss.item() == near(log(4 / 3))


def test_il_weights_take_the_virtual_step():
    """update_weights without clipping is the step that outer_gradient looks ahead by."""
    for step, lam in (("proximal", 100.0), ("printed", 10.0)):
        (m, (train, _)), args = il_problem(), settings(il, step=step, lam=lam, grad_clip=0.0)
        grads = stage_gradients(m, train)
        bars = il.look_ahead(m, grads, args)
        il.update_weights(m, grads, args)
        for s, bar in zip(m.stages, bars, strict=True):
            assert relative_error(s.weights, bar) < 1e-12


@pytest.mark.parametrize("step", ["proximal", "printed"])
def test_500_coupled_steps(step):
    """lambda = 100, eta = 0.025: the proximal step is stable; the printed one, here with p = 50 for
    the paper's 5 (test_growth_of_the_printed_step has both), is not."""
    (m, (train, _)), args = il_problem(), settings(il, step=step)

    def state():
        encoders = [ops.detached(s.weights[:-2]) for s in m.stages]
        apart = max(sum((a - b).square().sum() for a, b in zip(p, q)).sqrt().item()
                    for p, q in zip(encoders, encoders[1:]))
        with torch.no_grad():
            return apart, sum(F.cross_entropy(s.net(x, m.A), y).item()
                              for s, (x, y, _) in zip(m.stages, train))

    (apart, loss), largest = state(), 0.0
    for _ in range(500 if step == "proximal" else 14):
        il.update_weights(m, stage_gradients(m, train), args)
        largest = max(largest, state()[0])
    if step == "proximal":
        assert largest <= apart and state()[1] < 0.9 * loss
    else:
        assert not largest < 1e6 * apart


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("step,lam", [("proximal", 100.0), ("proximal", 1.0), ("printed", 1.0)])
def test_coupled_learners_settle_where_the_penalty_says(step, lam, momentum):
    """On (W - 1)^2 / 2 with W'_(l-1) = 0 that is 1 / (1 + 2 lambda), with momentum and without."""
    nets = [nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1)) for _ in range(2)]
    m = il.Learners([il.Learner(net, torch.optim.SGD(net.parameters(), 0.025, momentum))
                     for net in nets], [])
    nets[0][0].weight.data.zero_()
    for _ in range(300):
        grads = [[torch.zeros_like(t) for t in stage.weights] for stage in m.stages]
        grads[1][0] = nets[1][0].weight.detach() - 1
        il.update_weights(m, grads, settings(il, step=step, lam=lam, grad_clip=0.0))
    assert nets[1][0].weight.item() == pytest.approx(1 / (1 + 2 * lam), rel=1e-4)


def test_an_image_that_is_not_asked_about_keeps_its_scalar(tmp_path, monkeypatch):
    """Ablation 1: Adam's moments must not move the scalars of other steps' images."""
    descend, steps = ops.descend, []

    def watched(optimizer, grads, name, *args):
        theta = optimizer.param_groups[0]["params"][0]
        before = theta.detach().clone()
        descend(optimizer, grads, name, *args)
        if "creator" in name:
            steps.append([t.nonzero().flatten().tolist() for t in (theta - before, grads[0])])

    monkeypatch.setattr(lpt, "descend", watched)
    assert run_script(lpt, *TINY, *FIRST, "--batch-size", 10, "--epochs", 1, "--ablation", 1,
                      "--out", tmp_path / "run") == 0
    assert len(steps) == 10 and all(moved == asked and len(asked) == 10 for moved, asked in steps)


def test_an_explanation_has_unit_scale_and_raises_the_objective():
    m, ((x, _, _), _, delta) = lease_problem()
    explanation, _ = lease.explain(m.explainer, m.A, x, delta)
    assert ((explanation - delta).square().mean((1, 2, 3)).sqrt() - 1).abs().max() < 1e-12

    def objective(delta):
        return lease.explanation_objective(m.explainer, m.A, x, delta)

    assert objective(explanation) > objective(delta) > objective(torch.zeros_like(delta))


def test_the_start_of_the_perturbations():
    """Of the scale that is asked for, and another for another seed, step or rank."""
    starts = [lease.random_delta((8, 3, 32, 32), 0.3, "cpu", *keys)
              for keys in ((1, 5, 0), (1, 5, 0), (2, 5, 0), (1, 6, 0), (1, 5, 1))]
    assert all(abs(start.std() - 0.3) < 0.01 and abs(start.mean()) < 0.01 for start in starts)
    assert torch.equal(starts[0], starts[1])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(starts[1:], 2))


def test_a_start_at_zero_and_a_fixed_step_explain_nothing():
    """LeaSE Eq. 7 as printed: at zero the gradient is zero, and a step of 0.025 stays there."""
    m, ((x, _, _), _, delta) = lease_problem(True)

    def gradient(delta):
        at = delta.clone().requires_grad_()
        return ops.grad(lease.explanation_objective(m.explainer, m.A, x, at), [at])[0]

    assert gradient(torch.zeros_like(delta)).norm() < 1e-9 * gradient(delta).norm()
    assert 0.025 * gradient(delta).norm() < 1e-4 * delta.norm()


@pytest.mark.parametrize("method,changes", slow_but({0, 4}, [
    ("lpt", dict(order=2)), ("lpt", dict(order=1)), ("lpt", dict(ablation=1)),
    ("lpt", dict(ablation=2)), ("il", {}), ("lease", {}), ("lpt", dict(gradient="exact"))]),
    ids=str)
def test_a_gradient_evaluation_changes_no_state(method, changes):
    args = settings(MODULES[method], **changes)
    m, batches = (il_problem(2, 1, True) if method == "il" else lease_problem(True) if method ==
                  "lease" else lpt_problem(True, args.ablation))
    if method == "lease":                                          # which does move statistics
        ahead = lease.look_ahead(m, batches, args)
    held = [each for stage in m.stages for each in (stage.net, stage.opt)] if method == "il" else [
        *vars(m).values()]
    parts = [part for part in [*held, m.alphas, tree_leaves(batches)] if part is not None]
    net = next(part for part in parts if isinstance(part, nn.Module))
    for w in net.parameters():
        w.grad = torch.ones_like(w)
    before = snapshot(*parts)
    if method == "lease":
        lease.outer_gradient(m, batches, args, ahead)
    else:
        gradients(method, m, batches, args)
    assert same(before, snapshot(*parts))
    net(tree_leaves(batches)[0], m.A)                         # an ordinary pass does change it
    assert not same(before, snapshot(*parts))


def test_corners_of_the_gradients():
    """A difference along nothing; a BatchNorm that keeps no statistics."""
    w, a = [torch.randn(3)], torch.randn(3, requires_grad=True)

    def grad_at(w):
        return ops.grad((w[0] * a).sin().sum(), [a])

    assert ops.central_difference(grad_at, w, [torch.zeros(3)])[0].abs().max() == 0
    assert ops.central_difference(grad_at, w, [torch.full((3,), float("nan"))])[0].isnan().all()
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    ops.at_weights(norm, list(norm.parameters()))(torch.randn(3, 2, 4, 4))
    assert not norm.track_running_stats


def test_virtual_weights_are_the_optimizers_step():
    m, ((x, y, _), *_) = lpt_problem()
    grads = ops.grad(F.cross_entropy(m.testee(x, m.A), y), m.w)
    for fresh in (False, True):                                    # with and without momentum
        if fresh:
            m.testee_opt.state.clear()
        virtual, before = ops.virtual_weights(m.testee_opt, grads), [t.detach().clone()
                                                                     for t in m.w]
        ops.descend(m.testee_opt, grads)
        assert relative_error(virtual, m.w) < 1e-14
        with torch.no_grad():
            torch._foreach_copy_(m.w, before)


@pytest.mark.parametrize("nan_dropped", [False, True])
def test_descend_clips_and_refuses_what_is_not_finite(nan_dropped, monkeypatch):
    """Also where a maximum drops NaN, as on mps: the norm for it must not be the largest."""
    norm = torch._foreach_norm
    if nan_dropped:
        monkeypatch.setattr(torch, "_foreach_norm", lambda tensors, ord=2, **kw: norm(
            [t.nan_to_num() if ord == math.inf else t for t in tensors], ord, **kw))
    for poison in (math.nan, math.inf):
        w, g = torch.ones(3), torch.ones(3)
        g[1] = poison
        with pytest.raises(ops.NotFinite, match="the gradient of the testee is not finite"):
            ops.descend(torch.optim.SGD([w], lr=0.1), [g], "the testee")
        assert torch.equal(w, torch.ones(3))
    for clip, moved in ((0.0, 10.0), (20.0, 10.0), (5.0, 5.0)):
        w = torch.zeros(1)
        ops.descend(torch.optim.SGD([w], lr=1.0), [torch.tensor([10.0])], clip=clip)
        assert w.item() == pytest.approx(-moved, rel=1e-5) and w.grad is None




# ------------------------------------------------------- operations, supernet: the per-edge oracle


def naive_operation(name, C, stride):
    """One candidate operation on one edge, spelt out (DARTS §3.1.1); no BN has an affine part."""
    def norm():
        return nn.BatchNorm2d(C, affine=False)

    def separable(k, stride, dilation):
        return [nn.ReLU(), nn.Conv2d(C, C, k, stride, dilation * (k - 1) // 2, dilation, C, False),
                nn.Conv2d(C, C, 1, bias=False), norm()]

    if name == "none":
        return Zero(stride)
    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, 1), norm())
    if name == "avg_pool_3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), norm())
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else NaiveReduce(C, C)
    k = int(name[-1])
    if name.startswith("sep"):
        return nn.Sequential(*separable(k, stride, 1), *separable(k, 1, 1))
    return nn.Sequential(*separable(k, stride, 2))


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return 0 * x[:, :, ::self.stride, ::self.stride]


class NaiveReduce(nn.Module):
    def __init__(self, C_in, C):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(C_in, C // 2, 1, 2, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(C, affine=False)

    def forward(self, x):
        x = F.pad(F.relu(x), (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        return self.norm(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], 1))


class NaiveSupernet(nn.Module):
    """The search network with one mixed operation per edge (DARTS Eq. 2), for every base."""

    def __init__(self, C, num_classes, layers, kept=ops.ALL, partial=1, auxiliary=False,
                 large=False):
        super().__init__()
        self.kept, self.partial, self.beta, C_p = kept, partial, 0.0, C if large else 3 * C
        self.stem0 = nn.Sequential(nn.Conv2d(3, C_p, 3, padding=1, bias=False), nn.BatchNorm2d(C_p))
        self.stem1 = nn.Identity()
        if large:
            def conv(a, b):
                return nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b)
            self.stem0 = nn.Sequential(*conv(3, C // 2), nn.ReLU(), *conv(C // 2, C))
            self.stem1 = nn.Sequential(nn.ReLU(), *conv(C, C))
        self.pre, self.edges, self.reduction = nn.ModuleList(), nn.ModuleList(), []
        self.auxiliary, C_pp = nn.ModuleList(), C_p
        for i in range(layers):
            before = self.reduction[-1] if self.reduction else large
            self.reduction.append(i in (layers // 3, 2 * layers // 3))
            reduction = self.reduction[-1]
            C *= 2 if reduction else 1

            def one(C_in, C=C):
                return nn.Sequential(nn.ReLU(), nn.Conv2d(C_in, C, 1, bias=False),
                                     nn.BatchNorm2d(C, affine=False))
            self.pre.append(nn.ModuleList([NaiveReduce(C_pp, C) if before else one(C_pp),
                                           one(C_p)]))
            strides = [2 if reduction and j < 2 else 1
                       for node in range(4) for j in range(2 + node)]
            self.edges.append(nn.ModuleList(
                nn.ModuleDict({o: naive_operation(o, C // partial, stride) for o in names})
                for names, stride in zip(kept[reduction], strides)))
            self.auxiliary.append(nn.ModuleList(
                nn.Identity() if not auxiliary or stride == 1 else NaiveReduce(C, C)
                for stride in strides))
            C_pp, C_p = C_p, 4 * C
        self.classifier = nn.Linear(C_p, num_classes)

    def forward(self, x, A):
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        for pre, edges, auxiliary, reduction in zip(self.pre, self.edges, self.auxiliary,
                                                    self.reduction):
            states, e = [pre[0](s0), pre[1](s1)], 0
            for node in range(4):
                total, first = 0, e
                for j in range(2 + node):
                    x, alpha = states[j], A.alpha[reduction][e]
                    names = self.kept[reduction][e]
                    exps = {o: alpha[genotypes.PRIMITIVES.index(o)].exp() for o in names}
                    some = x.shape[1] // self.partial
                    seen, rest = x[:, :some], x[:, some:]
                    mixed = sum(exps[o] / sum(exps.values()) * op(seen)
                                for o, op in edges[e].items())
                    if self.beta:
                        mixed = mixed + self.beta * auxiliary[e](seen)
                    if self.partial > 1:
                        if mixed.shape[2] < x.shape[2]:
                            rest = F.max_pool2d(rest, 2)
                        mixed = torch.cat([mixed, rest], 1)
                        n, c, h, w = mixed.shape
                        mixed = mixed.view(n, self.partial, c // self.partial, h, w)
                        mixed = mixed.transpose(1, 2).reshape(n, c, h, w)
                        into = A.beta[reduction][first:first + 2 + node].exp()
                        mixed = mixed * into[j] / into.sum()
                    total = total + mixed
                    e += 1
                states.append(total)
            s0, s1 = s1, torch.cat(states[2:], 1)
        return self.classifier(s1.mean((2, 3)))


def weight_pairs(net, naive):
    """(merged parameter, its rows, per-edge parameter) for every parameter of the naive network."""
    whole = slice(None)
    for part in ("stem0", "stem1", "classifier"):
        for a, b in zip(net.get_submodule(part).parameters(),
                        naive.get_submodule(part).parameters(), strict=True):
            yield a, whole, b
    for cell, pre, edges, auxiliary in zip(net.cells, naive.pre, naive.edges, naive.auxiliary):
        for a, b in zip([*cell.preprocess0.parameters(), *cell.preprocess1.parameters()],
                        pre.parameters()):
            yield a, whole, b
        for j, state in enumerate(cell.states):
            rows = [sum(2 + i for i in range(node)) + j for node in range(max(0, j - 1), 4)]
            for m, e in enumerate(rows):
                for o, op in edges[e].items():
                    has_it = [r for r in rows if o in edges[r]]
                    parts = state.ops[o].parameters() if o in state.ops else []
                    for a, b in zip(parts, op.parameters(), strict=True):
                        k = has_it.index(e)
                        yield a, slice(k * len(b), (k + 1) * len(b)), b
                if isinstance(auxiliary[e], NaiveReduce):
                    for a, b in zip(state.auxiliary.parameters(), auxiliary[e].parameters()):
                        yield a, slice(m * len(b), (m + 1) * len(b)), b


def twins(C=4, num_classes=5, layers=3, dtype=torch.float64, kept=ops.ALL, partial=1, **options):
    torch.manual_seed(0)
    net = ops.place(ops.Supernet(C, num_classes, layers, kept, partial, **options), "cpu").to(dtype)
    naive = NaiveSupernet(C, num_classes, layers, kept, partial, **options).to(dtype)
    with torch.no_grad():
        for merged, rows, single in weight_pairs(net, naive):
            single.copy_(merged[rows])
    A = ops.Architecture(kept, partial).to(dtype)
    for parameter in A.parameters():
        nn.init.normal_(parameter)
    net.knobs.auxiliary = naive.beta = 0.7 * bool(options.get("auxiliary"))
    return net, naive, A


@pytest.mark.parametrize("size,options", slow_but({0, 3, 5, 7, 9}, [    # maps of
    (16, {}), (12, dict(layers=4)), (8, dict(layers=6)),          # 16..4, 12..3, 8..2
    (16, dict(kept=pruned(5))), (12, dict(kept=pruned(3, 1), layers=5)),           # P-DARTS
    (16, dict(partial=4, C=8)), (16, dict(partial=2, layers=4)),  # PC-DARTS
    (16, dict(auxiliary=True)), (12, dict(auxiliary=True, layers=6)),              # DARTS-
    (64, dict(large=True, partial=4, C=8)), (40, dict(large=True))]),
    ids=lambda v: str(v)[:40])
def test_supernet_is_the_per_edge_one(size, options):
    net, naive, A = twins(**options)
    alphas = list(A.parameters())
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in naive.parameters())
    x, y = torch.randn(3, 3, size, size, dtype=torch.float64), torch.tensor([0, 1, 2])
    a, b = net(x, A), naive(x, A)
    assert relative_error([a], [b]) < 1e-10
    n = len(alphas)
    ours = torch.autograd.grad(F.cross_entropy(a, y), [*alphas, *net.parameters()])
    theirs = torch.autograd.grad(F.cross_entropy(b, y), [*alphas, *naive.parameters()])
    for g, h in zip(ours[:n], theirs[:n]):
        assert relative_error([g], [h]) < 1e-10
    of, to = dict(zip(naive.parameters(), theirs[n:])), dict(zip(net.parameters(), ours[n:]))
    seen = {merged: torch.zeros_like(merged) for merged in to}
    for merged, rows, single in weight_pairs(net, naive):
        seen[merged][rows] += of.pop(single)
    assert not of                                                  # each has been compared, once
    assert max(relative_error([to[w]], [seen[w]]) for w in to) < 1e-10
    net.eval(), naive.eval()                                       # the same statistics were kept
    assert relative_error([net(x, A)], [naive(x, A)]) < 1e-10


def test_skip_dropout_is_one_mask_a_step():
    torch.manual_seed(0)
    net, A, x = ops.Supernet(4, 5, 3), ops.Architecture(), torch.randn(2, 3, 16, 16)
    plain = net(x, A)
    net.knobs.skip_dropout = 0.5
    torch.manual_seed(1)
    once, drawn = net(x, A), torch.rand(3)
    assert torch.equal(once, net(x, A)) and not torch.equal(once, plain)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))                       # as if there had been no pass
    torch.manual_seed(2)
    assert not torch.equal(once, net(x, A))
    net.eval()
    assert torch.equal(net(x, A), net(x, A))
    edges = ops.MixedEdges(2, [["none", "skip_connect"]] * 3, 1, ops.Knobs(skip_dropout=0.25))
    p = torch.zeros(3, 8)
    p[:, 3] = torch.tensor([0.1, 0.2, 0.3])
    outs = edges(torch.ones(8, 2, 32, 32), p).chunk(3, 1)
    for out, weight in zip(outs, p[:, 3]):                         # a mask per edge, the mean kept
        assert torch.allclose(out.unique(), torch.tensor([0, weight / 0.75]))
        assert abs(out.mean() - weight) < 0.02
    assert not torch.equal(outs[0] > 0, outs[1] > 0)


def test_the_contiguous_supernet_is_the_same(monkeypatch):
    for options in ({}, dict(partial=4, C=8), dict(kept=pruned(3))):
        net, _, A = twins(**options)
        x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        wanted = [*A.parameters(), *net.parameters()]
        one = torch.autograd.grad(net(x, A).square().sum(), wanted)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "memory_format", lambda device: torch.contiguous_format)
            net = ops.place(net, "cpu")
            two = torch.autograd.grad(net(x, A).square().sum(), wanted)
        assert max(relative_error([a], [b]) for a, b in zip(one, two)) < 1e-10


def test_a_strided_reduction_stays_in_its_memory():
    """The backward pass that crashed with strided convolutions, in a process of its own."""
    code = ("import torch, darts_ops as ops; net = ops.place(ops.FactorizedReduce(8, 8), 'cpu'); "
            "x = torch.randn(10, 8, 56, 56).contiguous(memory_format=torch.channels_last)\n"
            "for _ in range(10): net(x).sum().backward()")
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


# ------------------------------------------------------------------------------------ architecture


def decoded(normal, reduce, *beta, **options):
    """The cell of an architecture with these parameters."""
    A = ops.Architecture(partial=1 + len(beta), **options)
    for parameter, value in zip(A.parameters(), (normal, reduce, *beta), strict=True):
        parameter.data = value
    return A.cell()


def test_decoding_by_hand():
    """Rows: an edge each, in the order none max avg skip sep3 sep5 dil3 dil5."""
    alpha = torch.zeros(14, 8)
    alpha[0, 4], alpha[1, 6] = 2, 1                                # node 2 has two edges: both stay
    alpha[2, 0], alpha[3, 3], alpha[4, 5] = 9, 1, 2                # none is no reason to stay
    alpha[5:9] = 0                                                 # all tied: states 0, 1, max_pool
    alpha[9, 2] = alpha[9, 7] = 3                                  # a tie within an edge: the first
    alpha[12, 1], alpha[13, 1] = 1, 1.5                            # three edges compete: 5 <- 0, 4
    cell = decoded(alpha, torch.zeros(14, 8))
    assert cell.normal == [
        ("sep_conv_3x3", 0), ("dil_conv_3x3", 1),
        ("sep_conv_5x5", 2), ("skip_connect", 1),
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("avg_pool_3x3", 0), ("max_pool_3x3", 4)]
    assert cell.reduce == [("max_pool_3x3", s) for _ in range(4) for s in (0, 1)]
    # the softmax comes before the ranking: a large `none` takes from its edge's other operations
    alpha = torch.zeros(14, 8)
    alpha[2, 4], alpha[3, 4], alpha[4, 4] = 3, 2, 1
    alpha[2, 0] = 9
    assert decoded(alpha, alpha).normal[2:4] == [("sep_conv_3x3", 1), ("sep_conv_3x3", 2)]


def test_decoding_with_edge_weights_by_hand():
    """PC-DARTS: an edge counts by its softmaxed weight times its strongest operation."""
    alpha, beta = torch.zeros(14, 8), torch.zeros(14)
    alpha[2, 4], alpha[3, 5], alpha[4, 6] = 3, 2, 2.5              # node 3's edges: 0.74 0.51 0.63
    beta[2], beta[3], beta[4] = -1, 0, 1                           # times 0.09 0.24 0.67
    beta[5], beta[8] = 1, 2                                        # node 4: states 3 and 0
    cell = decoded(alpha, alpha, beta, torch.zeros(14))
    assert cell.normal[2:6] == [("dil_conv_3x3", 2), ("sep_conv_5x5", 1),
                                ("max_pool_3x3", 3), ("max_pool_3x3", 0)]
    assert cell.reduce[2:4] == [("sep_conv_3x3", 0), ("dil_conv_3x3", 2)]


def test_at_most_two_skip_connections_by_hand():
    """P-DARTS: the weakest skips of the decoded cell go, one at a time; each makes room for its
    edge's next operation or for another edge."""
    alpha = torch.zeros(14, 8)
    skip, sep = genotypes.PRIMITIVES.index("skip_connect"), 4
    for row, value in ((0, 4), (1, 3), (2, 2.0), (3, 1.5), (9, 2.5)):
        alpha[row, skip] = value
    alpha[4, sep] = 0.3                                            # comes in when row 3 goes
    alpha[2, sep] = 1.0                                            # and when row 2's goes
    normal = decoded(alpha, alpha).normal
    assert normal[:4] == [("skip_connect", 0), ("skip_connect", 1), ("skip_connect", 0),
                          ("skip_connect", 1)] and normal[6] == ("skip_connect", 0)
    limited = decoded(alpha, alpha, max_skips=2)
    assert limited.normal[:4] == [("skip_connect", 0), ("skip_connect", 1), ("sep_conv_3x3", 0),
                                  ("sep_conv_3x3", 2)]
    assert ("skip_connect", 0) not in limited.normal[6:]
    assert limited.reduce == decoded(alpha, alpha).reduce     # alone is limited


def test_a_decoded_cell_has_only_operations_of_its_edges():
    """A limit on skip connections does not turn an edge that has no other into something else."""
    for seed in range(100):
        torch.manual_seed(seed)
        kept = [[["none", genotypes.PRIMITIVES[o]] for o in torch.randint(1, 8, (14,)).tolist()]
                for _ in range(2)]
        kept[0][:5] = [["none", "skip_connect"]] * 5
        normal = decoded(*torch.randn(2, 14, 8), kept=kept, max_skips=1).normal
        rows = [0, 0, 2, 2, 5, 5, 9, 9]
        assert all(name in kept[0][row + state] for row, (name, state) in zip(rows, normal))


def test_pruning_by_hand():
    """P-DARTS: 8, 5, 3 candidates; the lower index goes first where alphas are equal."""
    names, A = genotypes.PRIMITIVES, ops.Architecture()
    A.alpha[0].data, A.alpha[1].data = torch.zeros(14, 8), torch.zeros(14, 8)
    A.alpha[0].data[0] = torch.tensor([0.5, -1, 2, 0.1, 0.2, -3, 1, 0.3])
    A.alpha[1].data = -A.alpha[0].data
    kept = A.prune(5)
    assert kept[0][0] == ["none", "avg_pool_3x3", "sep_conv_3x3", "dil_conv_3x3", "dil_conv_5x5"]
    assert kept[1][0] == ["max_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5",
                          "dil_conv_5x5"]
    assert kept[0][1] == names[3:]
    second = ops.Architecture(kept)
    for cell, dropped, (p, _) in zip(kept, second.dropped, second.weights()):
        assert [[n for n, gone in zip(names, row) if not gone] for row in dropped.tolist()] == cell
        assert ((p == 0) == dropped).all() and torch.allclose(p.sum(1), torch.ones(14))
    row = second.alpha[0].data[0]
    row[1] = 9                                                     # was dropped: does not return
    row[0], row[4] = -1, -2                                        # `none` goes, of the survivors
    assert second.prune(3)[0][0] == ["avg_pool_3x3", "dil_conv_3x3", "dil_conv_5x5"]
    row[0] = 5                                                     # strongest, and yet not decoded
    assert not {"none", "max_pool_3x3"} & {op for op, state in second.cell().normal[:2]}
    again = ops.Architecture(kept=ops.ALL)                         # a state says how it decodes
    again.load_state_dict(second.state_dict())
    assert again.cell() == second.cell() and again.prune(3) == second.prune(3)


def test_what_an_architecture_reports():
    """The entropy of a uniform edge is ln 8, of a decided one 0; edge weights do not count."""
    for partial in (1, 4):
        A = ops.Architecture(partial=partial)
        for alpha in A.alpha:
            alpha.data = torch.zeros(14, 8)
        A.alpha[0].data[:, 3] = 100
        figures, weights = A.report()
        assert figures["alpha_entropy"] == pytest.approx(math.log(8) / 2, rel=1e-5)
        assert figures["skip_connections"] == 8
        assert weights["normal"] == pytest.approx([0, 0, 0, 1, 0, 0, 0, 0], abs=1e-6)
        assert weights["reduce"] == pytest.approx([1 / 8] * 8)
    q = A.weights()[0][1].detach()
    assert all(part.sum() == pytest.approx(1) for part in q.split([2, 3, 4, 5]))


@pytest.mark.parametrize("method", METHODS)
def test_a_bases_own_penalty_is_added_once_where_A_steps(method, monkeypatch):
    """In every method, whatever its objective: the step's gradient moves by the penalty's."""
    (m, batches), given = PROBLEMS[method](), []
    args = settings(MODULES[method])
    m.alpha_opt, m.creator_opt = torch.optim.SGD(m.alphas, 0.0), torch.optim.SGD(
        getattr(m, "creator", None) or [torch.zeros(1)], 0.0)
    monkeypatch.setattr(ops, "descend", lambda opt, grads, *_: given.append(grads))
    monkeypatch.setattr(MODULES[method], "descend", lambda *args: None)
    monkeypatch.setattr(il, "update_weights", lambda *args: None)
    m.A.epoch = 3
    for penalty in (lambda: None, lambda: m.A.epoch * sum(a.square().sum() for a in m.alphas)):
        m.A.penalty = penalty
        getattr(MODULES[method], ITERATION[method])(m, batches, args)
    assert len(given) == 2
    for plain, more, a in zip(*given, m.alphas):
        assert torch.allclose(more - plain, 6 * a.detach(), rtol=1e-9, atol=1e-12)


# =============================================================================== networks, results

# ------------------------------------------------------------------------------ networks and cells

# Millions on cifar10, cifar100, imagenet, in the order of PUBLISHED
PARAMS = dict(zip(genotypes.PUBLISHED, [
    (3.169, 3.221, 4.51), (3.349, 3.401, 4.719), (3.434, 3.486, 4.944), (3.635, 3.687, 5.271),
    (3.722, 3.773, 5.342), (2.09, 2.142, 3.261), (2.116, 2.168, 3.307), (2.481, 2.533, 3.731),
    (3.716, 3.768, 5.167), (3.857, 3.908, 5.446), (3.212, 3.264, 4.668), (2.774, 2.826, 4.113),
    (2.702, 2.754, 3.95), (3.422, 3.474, 4.783), (3.434, 3.486, 4.866), (3.626, 3.678, 5.013),
    (3.331, 3.383, 4.75), (3.242, 3.293, 4.72), (4.542, 4.594, 6.223), (3.787, 3.838, 5.374),
    (3.213, 3.265, 4.647), (3.045, 3.097, 4.377), (3.463, 3.514, 4.916)]))


@pytest.mark.parametrize("name", slow_but({1, 9}, list(genotypes.PUBLISHED)))
def test_parameter_counts(name, capsys):
    counts = []
    for dataset in ("cifar10", "cifar100", "imagenet"):
        evaluate.main(["--arch", name, "--dataset", dataset, "--count-params"])
        found = json.loads(capsys.readouterr().out)
        counts.append(found["params_M"])
    assert tuple(counts) == PARAMS[name]
    adds = []                                                      # a multiply-add a weight
    with FakeTensorMode():
        network = evaluate.Network(genotypes.load(name), 48, 1000, 14, False, (224, 224)).eval()
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(lambda layer, _, out: adds.append(
                    out.numel() * layer.weight[0].numel()))
        network(torch.empty(1, 3, 224, 224))
    assert found["multiply_adds_M"] == pytest.approx(sum(adds) / 1e6, abs=0.06)


def test_network_sizes_and_auxiliary_head():
    cell = genotypes.load("LPT_PDARTS")
    for size in (28, 30, 32, 33, 48, 64, 96, 130):
        network = evaluate.Network(cell, 4, 7, 3, size=(size, size))
        logits, auxiliary = network(torch.randn(2, 3, size, size))
        assert logits.shape == auxiliary.shape == (2, 7)
        without = evaluate.Network(cell, 4, 7, 3, auxiliary=False, size=(size, size))
        assert evaluate.count_params(network) == evaluate.count_params(without)
        network.eval()
        assert network(torch.randn(1, 3, size, size))[1] is None
    for size, stride in ((95, 1), (96, 8)):                        # of the stem
        network = evaluate.Network(cell, 8, 7, 3, size=(size, size + 9))
        assert network.stem1(network.stem0(torch.zeros(1, 3, size, size))).shape[2] == size / stride


def test_the_auxiliary_head_pools_as_the_adaptive_one():
    """Of which a GPU has no deterministic gradient; 7 and 8 pixels have the published windows."""
    for size in [(n, n) for n in range(2, 40)] + [(5, 9), (6, 13)]:
        pool, x = evaluate.auxiliary_head(3, 2, size)[0], torch.randn(2, 3, *size)
        if size[0] in (7, 8):
            assert (pool.kernel_size, pool.stride) == ((5, 5), (size[0] - 5,) * 2)
        else:
            assert torch.allclose(pool(x), F.adaptive_avg_pool2d(x, 2), atol=1e-6)
    assert evaluate.auxiliary_head(3, 2, (1, 1))(torch.randn(2, 3, 1, 1)).shape == (2, 2)


def test_drop_path_drops_whole_paths_and_keeps_the_mean():
    """Every operation but the identity has a mask of its own: per image 0 or 1 / (1 - rate)."""
    torch.manual_seed(0)
    network, x = evaluate.Network(genotypes.load("LPT_PDARTS"), 4, 5, 3), torch.randn(6, 3, 32, 32)
    paths = [op for cell in network.cells for op in cell.ops if not isinstance(op, nn.Identity)]
    whole, _ = network(x)
    network.drop_path = 0.75
    masks = torch.stack([torch.stack([*network.path_masks(x)]) for _ in range(200)])
    assert masks.shape[1:] == (len(paths), 6, 1, 1, 1) and masks.unique().tolist() == [0, 4]
    assert abs(masks.mean() - 1) < 0.02
    assert abs(np.corrcoef(masks.flatten(1).T) - np.eye(masks[0].numel())).max() < 0.4
    assert not torch.equal(network(x)[0], whole)
    network.path_masks = lambda x: given
    given = iter(torch.ones(len(paths) + 1, 6, 1, 1, 1))
    assert torch.equal(network(x)[0], whole) and len([*given]) == 1
    network.eval()(x)                                              # which asks for none
    edges, images = [("sep_conv_3x3", 0), ("max_pool_3x3", 1)] * 4, torch.randn(6, 4, 8, 8)
    cell = evaluate.Cell(genotypes.Genotype(edges, [2], edges, [2]), 4, 4, 4, False, False)
    kept = torch.tensor([1.0, 0, 1, 1, 0, 1]).view(6, 1, 1, 1)
    out = cell(images, images, itertools.cycle([kept]))
    assert torch.equal(out, cell(images, images) * kept)


def test_genotypes_as_json_text_and_svg(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in [*genotypes.PUBLISHED, "random:3"]:
        cell = genotypes.load(name)
        (tmp_path / "g.json").write_text(genotypes.to_json(cell))
        assert genotypes.load("g.json") == cell
        genotypes.main([name])
        assert genotypes.to_text(cell) in capsys.readouterr().out
        svg = xml.etree.ElementTree.parse(f"{name.replace(':', '_')}.svg")
        words = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert sorted(w for w in words if w in genotypes.PRIMITIVES) == sorted(
            op for op, _ in cell.normal + cell.reduce)
        text = str(cell).replace("[2, 3, 4, 5]", "range(2, 6)")    # as DARTS prints it
        Path("log.txt").write_text(f"{genotypes.random_cell(9)}\n12:00 genotype = {text}\nend")
        assert genotypes.load(text) == genotypes.load("log.txt") == cell
        pairs = {k: [v[i:i + 2] for i in range(0, 8, 2)] if len(v) == 8 else v    # pt.darts'
                 for k, v in cell._asdict().items()}
        nested = "Genotype(" + ", ".join(f"{k}={v}" for k, v in pairs.items()) + ")"
        (tmp_path / "g.json").write_text(json.dumps(pairs))
        assert genotypes.load(nested) == genotypes.load("g.json") == cell
    assert genotypes.random_cell(1) == genotypes.random_cell(1) != genotypes.random_cell(2)
    with pytest.raises(genotypes.BadInput):                        # three edges in a node
        genotypes.load(nested.replace("[[(", "[[('skip_connect', 0), (", 1))


def test_a_drawing_overwrites_nothing_else(tmp_path, monkeypatch, capsys):
    """A run's search.svg beside its search.log; the text is printed first."""
    monkeypatch.chdir(tmp_path)
    cell = genotypes.load("DARTS_V2")
    Path("search.log").write_text(str(cell)), Path("search.svg").write_text("a curve")
    with pytest.raises(SystemExit):
        genotypes.main(["search.log"])
    page = capsys.readouterr()
    assert genotypes.to_text(cell) in page.out and "search.svg is another file" in page.err
    assert Path("search.svg").read_text() == "a curve"
    for _ in range(2):                                             # its own it writes again
        genotypes.main(["search.log", "--out", "x.svg"]), genotypes.main(["DARTS_V2"])


@pytest.mark.parametrize("end", ["\ngenotype = Genotype(normal=[('sep_co", "\nsaw Genotype(...)"])
def test_the_last_whole_cell_of_a_log(end):
    """Of a search that was killed as it printed."""
    cell, old = genotypes.load("DARTS_V2"), genotypes.load("DARTS_V1")
    assert genotypes.load(f"{old} then {cell}{end}") == cell


GOOD = json.loads(genotypes.to_json(genotypes.load("DARTS_V2")))


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", "[" * 100000, "\x00\xff", "Genotype(", "Genotype(print('executed'))",
    *(json.dumps({**GOOD, **change}) for change in [
        {"normal": []}, {"normal": 3}, {"normal": GOOD["normal"][:3]}, {"extra": 1},
        {"normal": [["conv", 0], *GOOD["normal"][1:]]}, {"normal": [[["a"], 0]] * 8},
        {"normal": [["none", 0], *GOOD["normal"][1:]]},
        {"normal": [["skip_connect", 2], *GOOD["normal"][1:]]},
        {"reduce_concat": [6]}, {"reduce_concat": []}, {"reduce_concat": None}]),
    json.dumps({k: v for k, v in GOOD.items() if k != "reduce"})],
    ids=lambda t: t[:30])
def test_malformed_genotypes(text, tmp_path, capsys):
    (tmp_path / "g.json").write_text(text)
    assert run_script(evaluate, "--arch", tmp_path / "g.json", "--count-params") == 2
    assert "executed" not in (page := capsys.readouterr()).out and page.err.count("\n") == 1


def test_a_search_as_a_picture():
    flat = {"normal": [1 / 8] * 8, "reduce": [1 / 8] * 8}
    weights = flat | {"normal": [0.1125 if o != 4 else 0.2125 for o in range(8)]}
    history = [{"train_loss": 2.0, "val_accuracy a/<b>": 0.1, "alpha_entropy": 2.08,
                "skip_connections": 1, "mean_weights": flat, "selection": 0.25},
               {"train_loss": 1.0, "val_accuracy a/<b>": 0.5, "alpha_entropy": 2.0, "val_loss": 3.0,
                "skip_connections": 3, "mean_weights": weights, "selection": 0.75}]
    root = xml.etree.ElementTree.fromstring(genotypes.search_svg(history, "a <b> & c"))
    lines = [[[float(v) for v in point.split(",")] for point in line.get("points").split()]
             for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    accuracy, val_loss, train_loss, entropy, skips, *mean, selection = lines
    assert selection[1][1] < selection[0][1]                       # which no other chart has
    assert accuracy[1][1] < accuracy[0][1] and train_loss[1][1] > train_loss[0][1]
    assert len(val_loss) == 1 and len(train_loss) == 2             # there was none in epoch 1
    assert entropy[1][1] > entropy[0][1] and skips[1][1] < skips[0][1]
    assert len(mean) == 16 and all(len(line) == 2 for line in mean)
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a <b> & c", "other figures", "selection 0.75", "<b> 0.5", "sep_conv_3x3 0.212"
            } <= set(texts)


def test_the_rows_of_the_papers_tables():
    """Each script names its own; the papers' errors are those of cells found where theirs were."""
    both = "cifar100+cifar10"
    for module, argv, row, found_on, dataset, errors in (
            (lpt, ["--base", "pdarts", "--encoder", "resnet50"], "LPT-R50-P-DARTS", "cifar100",
             "cifar100", ("16.38±0.07", "-")),
            (lpt, ["--base", "darts-", "--lambda", "0.5", "--seed", "2"],
             "LPT-R18-DARTS-, lambda 0.5", "cifar100", "cifar100", ("-", "-")),
            (lpt, ["--base", "pdarts", "--ablation", "2"], "LPT-R18-P-DARTS, ablation 2",
             "cifar100", "cifar100", ("17.54±0.07", "-")),
            (lpt, ["--base", "darts+", "--encoder", "none"], "DARTS+", "cifar100", "imagenet",
             ("23.7", "7.2")),
            (lpt, ["--base", "pdarts"], "LPT-R18-P-DARTS", "cifar10", "cifar100", ("-", "-")),
            (lease, [], "LeaSE-R18-DARTS-2nd", "cifar10", "imagenet", ("24.7", "7.9")),
            (il, ["--base", "pcdarts"], "IL-PC-DARTS", both, "cifar10", ("2.55±0.11", "-")),
            (il, ["--base", "pcdarts", "--coupling", "1"], "IL-PC-DARTS, lambda 1.0", both,
             "cifar10", ("-", "-")),
            (il, ["--joint"], "JL-DARTS-2nd", "cifar10", "cifar10", ("-", "-")),
            (il, ["--tasks", "cifar10"], "IL-DARTS-2nd of one task", both, "cifar10", ("-", "-"))):
        assert module.row(module.get_args(argv)[0]) == row
        assert genotypes.paper_errors(row, found_on, dataset) == errors
    assert genotypes.paper_errors("P-DARTS", "cifar10", "cifar10") == ("2.50", "-")
    for cell in genotypes.PUBLISHED.values():                      # each has an error of its own
        assert genotypes.paper_errors(cell.row, cell.found_on, cell.found_on)[0] != "-", cell.row
        assert ops.BASES[cell.base]["title"] in cell.row.replace(",", "").split("R18-")[-1].split(
            "R50-")[-1].split(" ")[0]


def test_summary_of_results(tmp_path, capsys):
    """Means and deviations by hand; what is told apart; the papers' values."""
    def write(name, **changes):
        (tmp_path / name).mkdir()
        result = {"cell": "LPT-R18-DARTS-2nd", "found_on": "cifar100", "dataset": "cifar100",
                  "data": "cifar100", "fingerprint": "1", "test_fingerprint": "1",
                  "genotype": GOOD, "test_error": 20.0,
                  "top5_error": 5.0, "params_M": 2.0, "layers": 20, "channels": 36, "epochs": 600,
                  "changed": {}, "search_days": 1.0} | changes
        (tmp_path / name / "result.json").write_text(json.dumps(result))

    write("a"), write("b", test_error=21.0, params_M=3.0), write("c", test_error=22.0, genotype=[])
    write("d", cell="random", found_on="", search_days=None, epochs=5, changed={"epochs": 5})
    write("e", test_error=30.0, fingerprint="2")                   # other data of the same name
    write("k", test_error=0.0, test_fingerprint="2")               # other test images
    write("l", test_error=40.0, found_in=["5"])                    # a cell from other data
    write("f", test_error=10.0, changed={"label_smoothing": 0.1})  # other settings
    write("g", cell="LPT-R18-P-DARTS", dataset="imagenet", data="imagenet", fingerprint="3")
    write("h", cell="LPT-R18-P-DARTS", found_on="cifar10")         # not where the paper found it
    write("m", cell="LPT, ablation 1, a 1, b 2, c 3, after 2 of 3 epochs", search_days=3 / 1440)
    for name in "ij":
        write(name, cell="LeaSE-R18-DARTS-2nd", genotype=name, top5_error=None, fingerprint="4")
    assert run_script(evaluate, "--summary", tmp_path, tmp_path / "a") == 0
    full, lines = "20 cells, C 36, 600 epochs", capsys.readouterr().out.splitlines()
    assert sorted(lines[2:-2]) == sorted(f"| {line} |" for line in (
        f"LPT-R18-DARTS-2nd | cifar100 | {full} | 21.00 ± 1.00 | 5.00 ± 0.00 | 3 trainings, 2 "
        "cells | 2.33 | 1 d | 19.47±0.20 | -",
        "random | cifar100 | 20 cells, C 36, 5 epochs | 20.00 | 5.00 | 1 | 2 | - | - | -",
        *(f"LPT-R18-DARTS-2nd | cifar100 | {full} | {error} | 5.00 | 1 | 2 | 1 d | 19.47±0.20 "
          "| -" for error in ("30.00", "0.00", "40.00")),
        f"LPT-R18-DARTS-2nd, trained with label-smoothing 0.1 | cifar100 | {full} | 10.00 | 5.00 | "
        "1 | 2 | 1 d | - | -",
        f"LPT-R18-P-DARTS found on cifar100 | imagenet | {full} | 20.00 | 5.00 | 1 | 2 | 1 d | "
        "24.0 | 7.1", f"LPT-R18-P-DARTS found on cifar10 | cifar100 | {full} | 20.00 | 5.00 | 1 | "
        "2 | 1 d | - | -",
        f"LeaSE-R18-DARTS-2nd | cifar100 | {full} | 20.00 ± 0.00 | - | 2 trainings, 2 cells | 2 | "
        "1 d | 19.26 | -",
        f"LPT, ablation 1, after 2 of 3 epochs [1] | cifar100 | {full} | 20.00 | 5.00 | 1 | 2 | "
        "3 min | - | -"))
    assert lines[-2:] == ["", "[1] LPT, ablation 1, a 1, b 2, c 3, after 2 of 3 epochs"]


PAGES = [HERE / name for name in ("README.md", "docs/measurements.md", "docs/companion.md")]


def python_blocks():
    return re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)


def test_the_readme_has_its_files_and_the_papers_errors():
    assert sum(map(len, readme_commands())) > 20                   # which are tried below
    for page in PAGES:
        text = page.read_text()
        for to in re.findall(r"\]\(([^):]+)\)", text) + re.findall(r'src="([^"]+)"', text):
            file, _, part = to.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), to
            assert not part or part in [
                re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                for title in re.findall(r"^#+ (.*)", target.read_text(), re.M)], to
        assert set(re.findall(r"`(test_\w+)`", text)) <= globals().keys()
    printed = PAGES[1].read_text().splitlines()
    for name, errors in (genotypes.PAPER | genotypes.PAPER_BOTH).items():
        row, = (line.strip("| ").split(" | ") for line in printed if line.startswith(f"| {name} |"))
        assert [cell.split(" (")[0] for cell in row[1:1 + len(errors)]] == list(errors)


def test_a_trained_network_in_ones_own_code(tmp_path, monkeypatch, capsys):
    """The README's lines, whose answers are those that the run was tested by."""
    monkeypatch.chdir(tmp_path)
    assert run_script(evaluate, *TINY, "--arch", "random:1", "--epochs", 1, "--out",
                      "runs/network") == 0
    result = json.loads(Path("runs/network/result.json").read_text())
    assert f"test error {result['test_error']:.2f}% after" in capsys.readouterr().out
    block, = [b for b in python_blocks() if "evaluate.load" in b]
    test = ops.synthetic(3, 8, "cpu", test=True)
    scope = {"image": test.images[-1]}
    exec(block, scope)
    logits, class_named = scope["logits"], capsys.readouterr().out.splitlines()[-1]
    assert class_named == test.classes[logits.argmax()]
    network, transform = scope["network"], scope["transform"]
    found = torch.cat([network(transform(image)[None])[0] for image in test.images])
    assert torch.equal(found[-1:], logits)
    wrong = (found.argmax(1) != test.labels).double().mean().item()
    assert 100 * wrong == pytest.approx(result["test_error"], abs=1e-3)
    assert logits.shape == (1, 3) and not network.training
    pil = torchvision.transforms.functional.to_pil_image(test.images[-1])
    assert torch.equal(network(transform(pil)[None])[0], logits)
    assert run_script(evaluate, "--resume", "--device", "cpu", "--out", "runs/network") == 0
    assert json.loads(Path("runs/network/result.json").read_text()) == result
    assert run_script(lpt, *TINY, "--epochs", 1, "--out", "runs/search") == 0
    interrupted(evaluate, [*TINY, "--arch", "random:1", "--epochs", 2, "--checkpoint-minutes", 0],
                Path("runs/half"), monkeypatch, 7)
    for folder, word in (("runs/search", "a run of lpt.py"), ("runs/none", "there is no"),
                         ("runs/network/checkpoint.pt", "there is no"),
                         ("runs/half", "trained for 1 of 2 epochs")):
        with pytest.raises(ops.BadInput, match=word):
            evaluate.load(folder)
    for pixels in (test.images[-1].float(), test.images[-1].long()):
        with pytest.raises(ops.BadInput, match="uint8"):
            transform(pixels)


# ------------------------------------------------------------------------------ the companion page

COMPANION = HERE / "docs" / "companion.md"
STATUSES = ("same", "up to a positive factor", "misprint", "departs", "no code")
NUMBERS = {"Skillearn": range(1, 6), "LPT": range(6, 27), "IL": range(27, 39),
           "LeaSE": range(1, 18)}


def entries():
    """The page's equations: (paper, number) -> text."""
    parts = re.split(r"^### (\w+) Eq\. (\d+)$", COMPANION.read_text().split("### Misprints")[0],
                     flags=re.M)
    return {(paper, int(n)): re.split("^### ", text, flags=re.M)[0]
            for paper, n, text in zip(parts[1::3], parts[2::3], parts[3::3])}


def test_every_equation_has_its_entry_and_its_line():
    """One status each; what has code is found in the code by a search for its number."""
    found = entries()
    assert list(found) == [(paper, n) for paper, numbers in NUMBERS.items() for n in numbers]
    for (paper, n), text in found.items():
        status, = {word for word in STATUSES if f"**{word}**" in text}
        assert "```math" in text
        if paper != "Skillearn":
            source = (HERE / f"{paper.lower()}.py").read_text()
            assert bool(re.search(rf"{paper} Eq\. {n}\b", source)) == (status != "no code")
            assert status == "no code" or re.search(r"`test_\w+`", text), (paper, n)
    assert not re.search(r"(LPT|IL|LeaSE) Eq\. \d+(, |-)\d", "".join(
        (HERE / f"{name}.py").read_text().split('"""', 2)[2] for name in METHODS))


def test_the_companions_lines_are_the_codes():
    """Each block stands, but for its indentation, in a file that its entry names."""
    blocks = 0
    for text in re.split("^##+ ", COMPANION.read_text(), flags=re.M):
        files = [(HERE / name).read_text().splitlines()
                 for name in re.findall(r"\]\(\.\./(\w+\.py)\)", text)]
        for block in re.findall(r"```python\n(.*?)\n```", text, re.DOTALL):
            n = block.count("\n") + 1
            assert n <= 6 and any(textwrap.dedent("\n".join(lines[i:i + n])) == block
                                  for lines in files for i in range(len(lines))), block
            blocks += 1
    assert blocks > 50
    assert set(re.findall(r"\btest_\w+", __doc__)) - {"test_smoke"} <= globals().keys()
    assert COMPANION.read_text().count("```") % 2 == 0
    prose = re.sub(r"```.*?```|`[^`]*`", "", COMPANION.read_text(), flags=re.DOTALL)
    assert prose.count("$") % 2 == 0


# ------------------------------------------------------- the companion's derivations, by numbers
# They use nothing of this project: each checks a formula of docs/companion.md, (a) to (f), in
# float64 against exact differentiation.

derivative = torch.autograd.grad
in_float64 = pytest.mark.usefixtures("float64")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


# (a) LPT's dJ/dC


def quotient_problem():
    """C, (E, X), the loss on the created test L_b(C, E, X), and f, R and lambda L_val at (E, X)."""
    C, E, X, x, labels = leaf(5), leaf(5, 6), leaf(4, 5), torch.randn(9, 6), torch.arange(9) % 4
    losses, val, f = torch.rand(9), torch.randn(9, 6), lambda C, E: torch.sigmoid(
        torch.tanh(x @ E.T) @ C)
    L_b = lambda C, E, X: (f(C, E) * F.cross_entropy(torch.tanh(x @ E.T) @ X.T, labels,
                                                     reduction="none")).mean()
    R = lambda C, E: (f(C, E) * losses).sum() / f(C, E).sum()
    return C, (E, X), L_b, f, R, losses, lambda E, X: 0.7 * F.cross_entropy(
        torch.tanh(val @ E.T) @ X.T, labels)


@in_float64
def test_dJ_dC_by_the_quotient_rule():
    (C, ex, L_b, f, R, losses, L_val), gamma, xi = quotient_problem(), 2.0, 0.5
    steps = derivative(L_b(C, *ex), ex, create_graph=True)
    ahead = [t - gamma * xi * g for t, g in zip(ex, steps)]        # its training loss has no C
    exact, = derivative(R(C, ahead[0]) - L_val(*ahead), C, retain_graph=True)
    E, X = (t.detach().requires_grad_() for t in ahead)
    weight = (losses - R(C, E).detach()) / f(C, E).sum().detach()          # (l_d - R) / S
    direct, u_E = derivative(weight @ f(C, E), [C, E])
    v_E, u_X = (-g for g in derivative(L_val(E, X), [E, X]))
    product, = derivative(sum((g * u).sum() for g, u in zip(steps, (u_E + v_E, u_X))), C)
    assert torch.allclose(direct - gamma * xi * product, exact, rtol=1e-10, atol=1e-14)
    printed = (derivative(-R(C, E).detach() / f(C, E).sum().detach() * f(C, E).sum(), C)[0]
               - gamma * xi * product)                             # Eq. 23 as it stands
    assert (printed - exact).norm() > 0.1 * exact.norm()


@in_float64
def test_one_joint_difference_is_the_sum_of_the_separate_ones():
    C, (E, X), L_b, *_ = quotient_problem()
    u_E, v_E, u_X = torch.randn(5, 6), torch.randn(5, 6), torch.randn(4, 5)

    def difference(u_E, u_X):
        eps = 1e-3 / torch.cat([u_E.flatten(), u_X.flatten()]).norm()
        plus, minus = (derivative(L_b(C, E + s * u_E, X + s * u_X), C)[0] for s in (eps, -eps))
        return (plus - minus) / (2 * eps)

    none_E, none_X = torch.zeros(5, 6), torch.zeros(4, 5)
    three = difference(u_E, none_X) + difference(v_E, none_X) + difference(none_E, u_X)
    assert (difference(u_E + v_E, u_X) - three).norm() < 1e-5 * three.norm()


@in_float64
def test_adam_hardly_sees_a_positive_scale():
    ends = []
    for scale in (1.0, 44.0):
        w = leaf(5).detach().zero_().requires_grad_()
        adam, generator = torch.optim.Adam([w], 3e-4), torch.Generator().manual_seed(1)
        for _ in range(50):
            w.grad = scale * torch.randn(5, generator=generator)
            adam.step()
        ends.append(w.detach().clone())
    assert (ends[0] - ends[1]).norm() < 1e-6 * ends[0].norm()


# (b) IL's step

ETA, LAM, MU = 0.025, 100.0, 0.9                                    # the paper's settings


@in_float64
def test_the_proximal_step_is_an_argmin():
    W_l, before, g = (torch.randn(7) for _ in range(3))

    def step(eta):
        return (W_l - eta * g + 2 * eta * LAM * before) / (1 + 2 * eta * LAM)

    W = step(ETA).requires_grad_()
    model = g @ W + (W - W_l).square().sum() / (2 * ETA) + LAM * (W - before).square().sum()
    assert derivative(model, W)[0].abs().max() < 1e-10
    apart = [(step(eta) - (W_l - eta * g - 2 * eta * LAM * (W_l - before))).norm()
             for eta in (1e-6, 1e-7)]                              # from Eq. 35: second order
    assert apart[0] / apart[1] == pytest.approx(100, rel=1e-2)


def gaps(momentum, steps, outside=None):
    """The distance of two stages' weights, without a loss, the first at rest: SGD on lambda |W|^2,
    or a pull of strength `outside` beside an optimizer that has nothing to do."""
    W = torch.ones(1, requires_grad=True)
    sgd, found = torch.optim.SGD([W], ETA, momentum), [1.0]
    for _ in range(steps):
        if outside is None:
            W.grad, = derivative(LAM * W.square().sum(), W)
            sgd.step()
        else:
            W = W - outside * W
        found.append(abs(W.item()))
    return found


@in_float64
def test_growth_of_the_printed_step():
    plain, both, here = gaps(0.0, 14), gaps(MU, 14), gaps(MU, 14, 2 * ETA * LAM / (1 - MU))
    for found, factor, after in ((plain, 4, 2.7e8), (both, 2.776, 2.4e6), (here, 49, 4.6e23)):
        assert found[-1] / found[-2] == pytest.approx(factor, rel=1e-3)
        assert found[-1] == pytest.approx(after, rel=0.02)
    recurrence = torch.tensor([[1 + MU - 2 * ETA * LAM, -MU], [1.0, 0.0]])
    root = torch.linalg.eigvals(recurrence).abs().max()            # z^2 - (1 + mu - p) z + mu = 0
    assert both[-1] / both[-2] == pytest.approx(root.item(), rel=1e-6)


@in_float64
@pytest.mark.parametrize("p", [0.5, 1.5])
def test_an_alternating_error_along_the_stages(p):
    """It grows by p / (2 - p) from stage to stage, which is above 1 from p = 1."""
    before, W = 1.0, 0.0
    for _ in range(200):
        before = -before
        W = W - p * (W - before)
    assert abs(W) == pytest.approx(p / (2 - p))


def settled(pull, momentum):
    """Where SGD on (W - 1)^2 / 2 with a proximal pull towards 0 outside it comes to rest."""
    W = torch.zeros(1, requires_grad=True)
    sgd = torch.optim.SGD([W], ETA, momentum)
    for _ in range(3000):
        W.grad = W.detach() - 1
        sgd.step()
        W.data /= 1 + pull
    return W.item()


@in_float64
def test_the_pull_outside_the_optimizer_settles_at_one_minus_mu():
    eq_30 = lambda lam: 1 / (1 + 2 * lam)                          # W - 1 + 2 lambda W = 0
    assert settled(2 * ETA * LAM, MU) == pytest.approx(eq_30((1 - MU) * LAM), rel=1e-6)   # 1/21
    assert settled(2 * ETA * LAM / (1 - MU), MU) == pytest.approx(eq_30(LAM), rel=1e-6)  # 1/201
    W = torch.zeros(1, requires_grad=True)                         # momentum over both, lambda = 1
    sgd = torch.optim.SGD([W], ETA, MU)
    for _ in range(3000):
        W.grad = W.detach() - 1 + 2 * W.detach()
        sgd.step()
    assert W.item() == pytest.approx(eq_30(1.0), rel=1e-6)


@in_float64
def test_the_answer_of_a_coupled_step():
    g, p, before = torch.zeros(1, requires_grad=True), 2 * ETA * LAM / (1 - MU), 0.3
    answer, = derivative((1.0 - ETA * g + p * before) / (1 + p), g)
    assert answer.item() == pytest.approx(-4.90e-4, rel=1e-3)
    far = 1e6 * p
    assert ETA / (1 + far) == pytest.approx((1 - MU) / (2 * 1e6 * LAM), rel=1e-6)
    hessian = torch.autograd.functional.hessian(                   # Eq. 30 of a linear loss g W:
        lambda z: z[1] * z[0] + LAM * (z[0] - before) ** 2, torch.randn(2))
    assert (-hessian[0, 1] / hessian[0, 0]).item() == pytest.approx(-1 / (2 * LAM), rel=1e-12)


# (c) IL's sweep


@in_float64
@pytest.mark.parametrize("rule", ["proximal", "printed"])
def test_the_sweep_of_two_stages(rule):
    a, (w1, w2, h2), p, eta = leaf(3), (leaf(3), leaf(3), leaf(3)), 0.6, 0.1
    train = [lambda w, h: ((a * w).sin() * torch.tanh(w + a)).sum(),
             lambda w, h: (torch.tanh(a * w) * (h + a).cos()).sum() + (a * h * w).sum()]
    val = [lambda w, h: (a * w.sin()).sum() ** 2, lambda w, h: ((a + w) * h).cos().sum()]
    g1, = derivative(train[0](w1, None), w1, create_graph=True)
    g2, gh = derivative(train[1](w2, h2), [w2, h2], create_graph=True)
    W1, H2 = w1 - eta * g1, h2 - eta * gh
    W2 = ((w2 - eta * g2 + p * W1) / (1 + p) if rule == "proximal" else
          w2 - eta * g2 - p * (w2 - W1))
    exact, = derivative(val[0](W1, None) + val[1](W2, H2), a, retain_graph=True)
    W1, W2, H2 = (t.detach().requires_grad_() for t in (W1, W2, H2))
    direct, u1, u2, uh = derivative(val[0](W1, None) + val[1](W2, H2), [a, W1, W2, H2])
    u2 = u2 / (1 + p) if rule == "proximal" else u2                # dW'_2 / d(the step on L)
    u1 = u1 + p * u2                                               # dW'_2 / dW'_1
    second, = derivative(g2 @ u2 + gh @ uh + g1 @ u1, a)
    assert torch.allclose(direct - eta * second, exact, rtol=1e-10)


# (d) LeaSE's chain


def explained_logits(a, e, x):
    return torch.tanh(x @ e.T) @ torch.softmax(a, 0).diag()


def O_delta(a, e, x, delta):
    return -(torch.softmax(explained_logits(a, e, x), 1)
             * torch.log_softmax(explained_logits(a, e, x + delta), 1)).sum()


def normalised(delta, g):
    return delta + g.shape[1] ** 0.5 * g / g.norm(dim=1, keepdim=True)


@in_float64
def test_leases_total_derivative():
    """Both paths through A, in the order of the code's sweep; without by_A it is another vector."""
    a, e, w, xi = leaf(4), leaf(4, 6), leaf(4, 6), 0.3
    x, y, val = torch.randn(5, 6), torch.arange(5) % 4, torch.randn(5, 6)
    delta = (0.3 * torch.randn(5, 6)).requires_grad_()
    loss = lambda x: lambda net: F.cross_entropy(net(x), y)
    g_e, = derivative(loss(x)(lambda x: explained_logits(a, e, x)), e, create_graph=True)

    def rest(e, of=lambda t: t):
        """J from E' on, with its Delta' and W'."""
        g, = derivative(O_delta(a, e, x, delta), delta, create_graph=True)
        explained = of(normalised(delta, g))
        g_w, = derivative(loss(explained * x)(lambda x: x @ w.T), w, create_graph=True)
        J = loss(val)(lambda x: explained_logits(a, e, x)) + loss(val)(lambda x: torch.tanh(
            x @ (w - xi * g_w).T))
        return J, g, explained

    exact, = derivative(rest(e - xi * g_e)[0], a, retain_graph=True)
    E = (e - xi * g_e).detach().requires_grad_()
    J, g, at = rest(E, lambda t: t.detach().requires_grad_())
    direct, v_e, v_delta = derivative(J, [a, E, at], retain_graph=True)
    unit = g.detach() / g.detach().norm(dim=1, keepdim=True)
    v_delta = v_delta - unit * (unit * v_delta).sum(1, keepdim=True)       # the projection
    xi_delta = 6 ** 0.5 / g.detach().norm(dim=1, keepdim=True)
    by_a, by_e = derivative((xi_delta * v_delta * g).sum(), [a, E])
    through_e, = derivative((g_e * (v_e + by_e)).sum(), a)
    assert torch.allclose(direct + by_a - xi * through_e, exact, rtol=1e-9, atol=1e-13)
    assert by_a.norm() > 0.01 * exact.norm()


@in_float64
def test_the_zero_gradient_at_delta_zero():
    """O_Delta has its minimum there; near it the gradient is the Fisher matrix times delta."""
    a, e, x = leaf(4), leaf(4, 6), torch.randn(5, 6)
    delta = torch.zeros(5, 6, requires_grad=True)
    assert derivative(O_delta(a, e, x, delta), delta)[0].abs().max() < 1e-14
    assert O_delta(a, e, x, torch.randn(5, 6)) > O_delta(a, e, x, delta)
    small = (1e-5 * torch.randn(5, 6)).requires_grad_()
    g, = derivative(O_delta(a, e, x, small), small)
    for i in range(5):
        J = torch.autograd.functional.jacobian(lambda x: explained_logits(a, e, x[None])[0], x[i])
        b = torch.softmax(explained_logits(a, e, x[i:i + 1]), 1)[0]
        fisher = J.T @ (b.diag() - b.outer(b)) @ J
        assert torch.allclose(g[i], fisher @ small[i].detach(), rtol=1e-3, atol=1e-9)


@in_float64
def test_the_jacobian_of_the_normalised_step():
    g = torch.randn(1, 6)
    J = torch.autograd.functional.jacobian(lambda g: normalised(torch.zeros(1, 6), g)[0], g)[:, 0]
    unit = g[0] / g.norm()
    assert torch.allclose(J, 6 ** 0.5 / g.norm() * (torch.eye(6) - unit.outer(unit)))


# (e) momentum and weight decay


@in_float64
def test_momentum_and_decay_leave_the_jacobian():
    a, w, xi = leaf(3), leaf(3), 0.1
    loss = lambda a, w: ((a * w).sin() * torch.tanh(w + a)).sum()
    g, = derivative(loss(a, w), w, create_graph=True)
    second = torch.stack([derivative(g_i, a, retain_graph=True)[0] for g_i in g])     # d2L / dw da
    ends = []
    for mu, decay in ((0.0, 0.0), (0.9, 3e-2)):
        ahead = w - xi * (mu * torch.ones(3) + g + decay * w)
        J = torch.stack([derivative(t, a, retain_graph=True)[0] for t in ahead])         # dw' / da
        assert torch.allclose(J, -xi * second)
        ends.append(ahead)
    assert (ends[0] - ends[1]).norm() > 0.05                       # W' itself has moved


# (f) differences at kinks


@in_float64
def test_a_difference_across_a_kink():
    """relu(a + w) has d/da = [a + w > 0] and no curvature; across the kink the difference is
    jump / (2 eps), whatever the exact derivative."""
    def difference(w, eps):
        a = torch.zeros(1, requires_grad=True)
        plus, minus = (derivative(F.relu(a + w + s).sum(), a)[0].item() for s in (eps, -eps))
        return (plus - minus) / (2 * eps)

    assert difference(0.005, 0.004) == 0
    assert difference(0.005, 0.010) == pytest.approx(1 / 0.020)


@in_float64
def test_the_error_of_many_kinks_grows_as_the_radius_falls():
    """Jumps of random sign at random places: the error's root mean square is as radius^(-1/2)."""
    places, signs = torch.rand(400, 2000) * 2 - 1, torch.randn(400, 2000).sign()

    def error(radius):
        return ((signs * (places.abs() < radius)).sum(1) / (2 * radius)).square().mean().sqrt()

    assert (error(0.01) / error(0.16)).item() == pytest.approx(4, rel=0.15)


@in_float64
def test_what_a_radius_moves():
    """Each of 50 x 3 x 16 x 16 numbers by 5.1e-5 (root mean square) at 0.01, by 5.1e-3 at 1."""
    v = torch.randn(50, 3, 16, 16)
    for radius, moved in ((0.01, 5.1e-5), (1.0, 5.1e-3)):
        step = radius / v.norm() * v
        assert step.square().mean().sqrt().item() == pytest.approx(moved, rel=0.01)


# ======================================================================= PART II: what runs them

# ---------------------------------------------------------------------------- bases and recipes


def test_schedules_of_the_bases():
    def values(base, epochs, **changes):
        args = argparse.Namespace(**ops.BASES[base] | dict(seed=1, epochs=epochs) | changes)
        net, A, found = ops.Supernet(4, 5, 3), ops.Architecture(), []
        opt, other = (torch.optim.SGD(net.parameters(), 1) for _ in range(2))
        for stage in range(len(args.layers)):
            for epoch in range(epochs):
                ops.set_epoch(args, stage, epoch, A, [net], [opt], other, 0.5)
                assert A.epoch == epoch
                rates = (each.param_groups[0]["lr"] for each in (opt, other))
                found.append((ops.learns(args, epoch), next(rates), net.knobs.auxiliary,
                              net.knobs.skip_dropout, next(rates)))
        return list(zip(*found))

    learns, lr, auxiliary, dropout, _ = values("darts-", 50)
    assert all(learns) and auxiliary[0] == 1 and auxiliary[-1] == 0 and not any(dropout)
    assert np.allclose(np.diff(auxiliary), -1 / 49) and (lr[0], round(lr[49], 4)) == (0.025, 0.001)
    learns, lr, auxiliary, dropout, over_all = values("pdarts", 25)
    assert learns == ((False,) * 10 + (True,) * 15) * 3 and not any(auxiliary)
    assert np.isclose(dropout[25], 0.4 * 24 / 25) and np.isclose(dropout[34], 0.4 * 15 / 25)
    assert np.isclose(dropout[60], 0.7) and np.isclose(dropout[62], 0.7 * np.exp(-0.4))
    assert lr[0] == lr[25] == 0.025 and lr[24] < 2e-4
    assert np.allclose(over_all, 0.25 + 0.25 * np.cos(np.pi * np.arange(75) / 75))    # one cosine
    learns, lr, *_ = values("pcdarts", 50)
    assert learns == (False,) * 15 + (True,) * 35 and lr[0] == 0.1


SEARCH = dict(channels=16, momentum=0.9, weight_decay=3e-4, grad_clip=5, alpha_weight_decay=1e-3,
              radius=0.01, gradient="difference")
LPT = SEARCH | dict(lam=1, gamma=1, tester_lr=0.025, creator_lr=3e-4, creator_weight_decay=1e-3,
                    encoder="resnet18", ablation=0, created_test="printed", batch_size=64)
IL = SEARCH | dict(lam=100, rounds=2, tasks=["cifar100", "cifar10"], step="proximal")
EXPLAINED = SEARCH | dict(gamma=1, audience_lr=0.025, audience="resnet18", batch_size=64)
ALONE = SEARCH | dict(encoder="none")
EVALUATE = dict(layers=20, channels=36, epochs=600, batch_size=96, lr=0.025, decay="cosine",
                momentum=0.9, weight_decay=3e-4, grad_clip=5, auxiliary_weight=0.4,
                warm_up=0, label_smoothing=0, drop_path=0.2)
NETWORK = EVALUATE | dict(layers=14, channels=48, epochs=250, batch_size=1024, lr=0.5,
                          decay="linear", weight_decay=3e-5, warm_up=5, label_smoothing=0.1,
                          drop_path=0, image_size=224)            # of ImageNet, P-DARTS §4.3


@pytest.mark.parametrize("module,argv,expected", [
    *((lpt, ["--encoder", "none", "--base", base], ops.BASES[base] | ALONE) for base in ops.BASES),
    *((lpt, ["--base", base], ops.BASES[base] | LPT) for base in ops.BASES),              # §3.2.2
    *((il, ["--base", base], ops.BASES[base] | IL | changes) for base, changes in (   # §4.3.1
        ("darts-1st", dict(alpha_lr=3e-5)), ("darts-2nd", dict(alpha_lr=3e-5)), ("darts-", {}),
        ("darts+", {}), ("pcdarts", dict(alpha_lr=3e-3)), ("pdarts", dict(batch_size=64)))),
    (il, ["--joint"], dict(rounds=1, lam=0, alpha_lr=3e-5)),
    *((lease, ["--base", base], ops.BASES[base] | EXPLAINED | dict(               # LeaSE §3.2
        warm_up=ops.BASES[base]["warm_up"] or 1)) for base in ops.BASES),         # departure 9
    (lpt, ["--order", "1", "--lr", "0.5", "--epochs", "9"], LPT | dict(order=1, lr=0.5, epochs=9)),
    (lpt, ["--dataset", "imagenet", "--base", "pcdarts"], LPT | dict(
        lr=0.5, alpha_lr=6e-3, batch_size=1024, warm_up=35, subsets=[0.1, 0.025], image_size=224)),
    (evaluate, ["--arch", "LPT_DARTS_R18_CIFAR100"], EVALUATE),                   # DARTS §A.2
    (evaluate, ["--arch", "LPT_PDARTS"], EVALUATE | dict(drop_path=0.3)),         # their papers'
    (evaluate, ["--arch", "PC_DARTS_cifar"], EVALUATE | dict(drop_path=0.3)),
    (evaluate, ["--arch", "LPT_PDARTS", "--dataset", "imagenet"], NETWORK)],
    ids=lambda v: getattr(v, "__name__", "-".join(v).replace("--", "") if isinstance(v, list)
                          else ""))
def test_the_papers_settings_are_the_defaults(module, argv, expected):
    args = vars(module.get_args(argv)[0])
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("method,base,dataset,expected", [
    ("lpt", "pdarts", "cifar100", (0.3, 96)), ("il", "pcdarts", "cifar10", (0.3, 64)),
    ("il", "darts-2nd", "cifar10", (0.2, 96)), ("lease", "pdarts", "imagenet", (0.0, 1024))])
def test_a_cells_base_sets_its_training(method, base, dataset, expected, monkeypatch):
    monkeypatch.setattr(evaluate, "origin", lambda arch: {"method": method, "base": base})
    args, _ = evaluate.get_args(["--arch", "x", "--dataset", dataset])
    assert (args.drop_path, args.batch_size) == expected
    assert not args.changed.keys() - {"arch", "dataset"}


def test_a_cells_file_is_its_searchs_only_by_name(tmp_path, monkeypatch):
    """Another cell that is evaluated inside a search's folder is not that search's."""
    monkeypatch.chdir(tmp_path)
    Path("log.jsonl").write_text('{"seconds": 5}')
    args = lpt.get_args([])[0]
    Path("run.json").write_text(json.dumps({
        "method": "lpt", "row": lpt.row(args), "epochs": 1, "sources": ["x"], "world_size": 2,
        "args": ops.identity(args)}))
    found = evaluate.origin("genotype.json")
    assert found["cell"] == "LPT-R18-DARTS-2nd" and found["found_on"] == "cifar100"
    assert found["search_days"] == pytest.approx(10 / 86400)       # of two devices
    for arch in ("random:1", "other.json", "Genotype(normal=[])"):
        assert evaluate.origin(arch)["found_on"] == ""


def test_run_folders_are_named_by_what_differs():
    def name(module, *argv):
        return module.get_args([str(a) for a in argv])[0].out.name

    assert name(lpt) == "lpt-cifar100-1" and name(il) == "il-cifar100-cifar10-1"
    assert name(lpt, "--encoder", "resnet50") == "lpt-cifar100-resnet50-1"
    assert name(lpt, "--ablation", 1, "--base", "pdarts") == "lpt-pdarts-cifar100-ablation1-1"
    assert name(lpt, "--lambda", 5, "--seed", 3) == "lpt-cifar100-lam5.0-3"
    assert name(il, "--joint") == "il-cifar100-cifar10-joint-1"
    assert name(lease, "--weighting", "magnitude") == "lease-cifar100-magnitude-1"
    assert name(lpt, "--quick", "--data", "x", "--device", "cpu") == "lpt-synthetic-1"
    assert name(evaluate, "--arch", "runs/lpt-1/genotype.json") == "evaluate-lpt-1-cifar100-1"
    assert len(name(il, "--tasks", f"folder:{'b' * 300}")) == 200


def test_the_learning_rate_of_an_evaluation():
    """On ImageNet P-DARTS' and PC-DARTS': linear, but to a fifth of it in the last five epochs."""
    args, _ = evaluate.get_args(["--arch", "PDARTS", "--dataset", "imagenet"])
    rates = [evaluate.learning_rate(args, epoch) for epoch in range(250)]
    assert np.allclose(rates[:5], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert np.allclose(rates[5:245], 0.5 * (245 - np.arange(5, 245)) / 245)
    assert np.allclose(rates[245:], 0.5 * (250 - np.arange(245, 250)) / (5 * 245))
    args, _ = evaluate.get_args(["--arch", "PDARTS"])
    assert evaluate.learning_rate(args, 0) == 0.025 and evaluate.learning_rate(args, 300) == (
        pytest.approx(0.0125)) and evaluate.learning_rate(args, 599) < 1e-6


def test_settings_that_follow_from_others(tmp_path, monkeypatch, capsys):
    """--quick on real images; what a resumed search recommends."""
    assert lpt.get_args(["--quick"])[0].changed == {"quick": True}
    monkeypatch.chdir(tmp_path)
    argv = ["--quick", "--image-size", 8, "--channels", 2, "--epochs", 1, "--out", "a"]
    assert run_script(lpt, *argv) == run_script(lpt, "--resume", "--out", "a") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "evaluate.py" in line]
    assert len(said) == 2 and said[0] == said[1] and said[0].endswith(" --quick")


def test_help_shows_the_defaults_of_the_chosen_base(capsys):
    with pytest.raises(SystemExit):
        lpt.main(["--help", "--base", "pdarts"])
    assert "(default: [5, 11, 17])" in " ".join(capsys.readouterr().out.split())


# ----------------------------------------------------------------------------- images and streams


def images(dataset, data="data", size=None, workers=0, like=None, hold_out=0):
    """A data set's training images, or its test images if those are given."""
    args = argparse.Namespace(data=data, image_size=size, workers=workers, hold_out=hold_out)
    return ops.load_images(dataset, args, "cpu", like)


def test_streams_are_pure_shuffled_and_independent():
    data = ops.synthetic(10, 8, "cpu")
    train, val, held = ops.split_rows(data.labels, seed=3, hold_out=100)
    assert sorted([*train, *val, *held]) == list(range(2000)) and len(train) == len(val) == 950
    assert np.array_equal(held, ops.split_rows(data.labels, seed=4, hold_out=100)[2])
    assert not np.array_equal(train, ops.split_rows(data.labels, seed=4, hold_out=100)[0])
    streams = [ops.Stream(data, val, 64, 3, name) for name in ("bank", "val", "bank")]
    drawn = [torch.cat([s(i)[2] for i in range(streams[0].epoch_steps())]) for s in streams]
    assert sorted(drawn[0][:950].tolist()) == sorted(val)          # each image once a pass
    assert sorted(streams[0].rows) == sorted(torch.cat([drawn[0][950:], streams[0](15)[2],
                                                        *(streams[0](i)[2] for i in range(16, 31))])
                                             [:950].tolist())      # and once in the next, which
    assert not torch.equal(drawn[0], drawn[1])                     # runs on across batches
    for step in (40, 3):                                           # any order of asking
        for a, b in zip(streams[0](step), streams[2](step)):
            assert torch.equal(a, b)
    other = ops.Stream(data, val, 64, 4, "bank")
    assert not torch.equal(other(0)[2], streams[0](0)[2])
    for step, k in itertools.product((0, 7), (0, 1)):              # processes have parts of one
        whole, part = (ops.Stream(data, range(100), 10, 1, "train", cutout=4) for _ in range(2))
        part.part = slice(5 * k, 5 * k + 5)
        for a, b in zip(whole(step), part(step)):
            assert torch.equal(a[part.part], b)


def test_augmentation_is_a_crop_flip_and_cutout_of_each_image():
    data, rows = ops.synthetic(10, 16, "cpu"), np.arange(64)
    plain, seeds = data.images[:64], np.arange(64)
    x, y, back = next(data.read([ops.Request(rows)]))
    assert torch.allclose(x, (plain / 255 - data.mean) / data.std, atol=1e-6)
    assert torch.equal(y, data.labels[:64]) and back.tolist() == [*range(64)]
    got = torch.from_numpy(data[ops.Request(rows, seeds)][0])
    padded, found = F.pad(plain, (2,) * 4), set()
    for i in range(64):                                            # find each image's own crop
        hits = [(dy, dx, flip) for dy in range(5) for dx in range(5) for flip in (0, 1)
                if torch.equal(padded[i, :, dy:dy + 16, dx:dx + 16].flip(-1) if flip else
                               padded[i, :, dy:dy + 16, dx:dx + 16], got[i])]
        assert len(hits) == 1
        found.add(hits[0])
    assert len(found) > 30                                         # drawn per image, not per batch
    assert {f for _, _, f in found} == {0, 1} and {d for d, _, _ in found} == set(range(5))
    straight = torch.from_numpy(data[ops.Request(rows, seeds, False)][0])  # --no-flip
    assert all(torch.equal(a, b) or torch.equal(a.flip(2), b) for a, b in zip(straight, got))
    assert sum(torch.equal(a, b) for a, b in zip(straight, got)) in range(16, 49)
    cut = torch.from_numpy(data[ops.Request(rows, seeds, True, 6)][0])
    holes = (cut == (255 * data.mean).byte()).all(1) & (cut != got).any(1)
    assert (holes.sum((1, 2)) <= 36).all() and (holes.sum((1, 2)) == 36).any()
    assert torch.equal(torch.where(holes[:, None], got, cut), got)
    for hole in holes:
        ys, xs = hole.any(1).nonzero()[:, 0], hole.any(0).nonzero()[:, 0]
        assert hole.sum() == (ys[-1] - ys[0] + 1) * (xs[-1] - xs[0] + 1) > 0


def test_subsets_of_every_class():
    labels = torch.arange(1000) % 5
    train, val, held = ops.split_rows(labels, 1, 0, [0.1, 0.025])
    assert len(train) == 100 and len(val) == 25 and not set(train) & set(val) and not len(held)
    assert (labels[train].bincount() == 20).all() and (labels[val].bincount() == 5).all()
    other = ops.split_rows(labels, 2, 0, [0.1, 0.025])
    assert not np.array_equal(other[0], train)
    assert np.array_equal(ops.split_rows(labels, 1, 0, [0.1, 0.025])[0], train)


def test_subsets_reach_leases_audience_mixed(tmp_path, monkeypatch):
    """It is scored by the batches' statistics, which in a batch of one class hide the class."""
    seen, accuracy = [], ops.accuracy

    def watched(predict, data, rows, batch_size):
        seen.append([set(y.tolist()) for _, y in ops.batches(data, rows, batch_size)])
        return accuracy(predict, data, rows, batch_size)

    monkeypatch.setattr(ops, "accuracy", watched)
    assert search("lease", *FIRST, "--epochs", 1, "--batch-size", 20, "--subsets", 0.5, 0.5,
                  "--out", tmp_path) == 0
    explainer, audience = seen
    assert {0} in explainer and all(classes == {0, 1, 2} for classes in audience)


def test_no_batch_of_one(tmp_path, monkeypatch):
    """Where the images are 1 modulo the batch size: LeaSE's audience takes the batch's own."""
    data = ops.synthetic(3, 8, "cpu")
    for n, size in ((1, 5), (2, 5), (5, 5), (6, 5), (7, 5), (11, 5), (3, 2), (101, 50), (0, 5)):
        sizes = [len(y) for _, y in ops.batches(data, np.arange(n), size)]
        assert sum(sizes) == n and (n < 2 or min(sizes) > 1) and max(sizes + [0]) <= size + 1
    split = ops.split_rows
    monkeypatch.setattr(ops, "split_rows", lambda *args: (
        lambda train, val, held: (train, np.append(val, train[0]), held))(*split(*args)))
    assert run_script(lease, *LEASE, *FIRST, "--epochs", 1, "--out", tmp_path / "run") == 0
    monkeypatch.setattr(ops, "world_size", lambda: 2)
    with pytest.raises(ops.BadInput, match="two images or more"):
        ops.Stream(data, range(100), 2, 1, "train")


def synthetic_truth(classes, size, n=2000):
    """The right labels of synthetic's training images: its first draw."""
    return torch.from_numpy(np.random.default_rng([classes, size, False]).integers(classes, size=n))


def test_synthetic_images_have_a_few_wrong_labels_and_fixed_content():
    a, b = ops.synthetic(10, 16, "cpu"), ops.synthetic(10, 16, "cpu")
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert a.fingerprint() == b.fingerprint()
    b.images[1] += 1                                               # every image counts
    assert a.fingerprint() != b.fingerprint()
    assert 0.02 < (a.labels != synthetic_truth(10, 16)).double().mean() < 0.06
    assert len(ops.synthetic(3, 16, "cpu").labels.unique()) == 3


def write_cifar(root, monkeypatch, kind="CIFAR10", n=40):
    """A small CIFAR in the original format, its checksums patched into torchvision's class; returns
    the pixels of its test images, (n, 3072)."""
    source = getattr(torchvision.datasets, kind)
    folder, rng, pixels = root / source.base_folder, np.random.default_rng(0), []
    folder.mkdir(parents=True)
    fine = kind == "CIFAR100"
    names = [f"class{i}" for i in range(100 if fine else 10)]

    def dump(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return [name, torchvision.datasets.utils.calculate_md5(folder / name)]

    def part(k):
        pixels.append(rng.integers(0, 256, (n, 3072), dtype=np.uint8))
        return {"data": pixels[-1],
                "fine_labels" if fine else "labels": [(k + i) % len(names) for i in range(n)]}

    lists = {key: [dump(name, part(k)) for k, (name, _) in enumerate(getattr(source, key))]
             for key in ("train_list", "test_list")}
    meta = dump(source.meta["filename"], {source.meta["key"]: names})
    for key, value in lists.items():
        monkeypatch.setattr(source, key, value)
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": meta[1]})
    return pixels[-1]                                              # the test part is the last


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
def test_cifar_files(kind, tmp_path, monkeypatch):
    pixels = write_cifar(tmp_path, monkeypatch, kind)
    train = images(kind.lower(), tmp_path)
    test = images(kind.lower(), tmp_path, like=train)
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 32, 32)
    assert torch.equal(test.images.flatten(1), torch.from_numpy(pixels))
    assert torch.allclose(train.mean.flatten(), (train.images / 255.).mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(train.std.flatten(), (train.images / 255.).std((0, 2, 3)), atol=1e-4)
    half = images(kind.lower(), tmp_path, 28)
    as_pil = [torchvision.transforms.functional.pil_to_tensor(ops.centre(
        torchvision.transforms.functional.to_pil_image(image), (28, 28))) for image in train.images]
    assert torch.equal(half.images, torch.stack(as_pil))           # as evaluate.load reads them


def offline(*args, **kwargs):
    raise OSError("no network")


def write_folder(root, sizes=(12,), classes=("cat", "dog"), n=12, parts=("train", "test")):
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                size = sizes[i % len(sizes)]
                shape = size, size + 2 * (len(sizes) > 1), 3
                pixels = ops.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                pixels.save(root / part / name / f"{i}.png")
    return root


def test_folder_of_images(tmp_path):
    root = write_folder(tmp_path / "a")
    (root / "train" / "cat" / "notes.txt").write_text("left out")
    data = images("folder", root)
    assert data.images.shape == (24, 3, 12, 12) and data.classes == ["cat", "dog"]
    first = np.asarray(ops.Image.open(root / "train" / "cat" / "0.png"))
    assert np.array_equal(data.images[0].permute(1, 2, 0).numpy(), first)
    assert data.mean.shape == (3, 1, 1) and not data.large
    mixed = write_folder(tmp_path / "b", sizes=(12, 20), parts=("train", "val"))
    train = images("folder", mixed, 16)
    assert train.images.shape == (24, 3, 16, 16)
    assert images("folder", mixed, 16, like=train).images.shape == (24, 3, 16, 16)
    with pytest.raises(ops.BadInput, match="--image-size"):
        images("folder", mixed)
    with pytest.raises(ops.BadInput, match="has the classes of"):
        images("folder", mixed, 16, like=argparse.Namespace(classes=["cat", "dog", "eel"]))
    for hidden in (mixed / "train" / ".ipynb_checkpoints", mixed / "train" / "cat" / ".trash"):
        hidden.mkdir()
        shutil.copy(mixed / "train" / "cat" / "0.png", hidden)     # is no class, no image
    assert len(images("folder", mixed, 16).labels) == 24
    shutil.copytree(mixed / "val", mixed / "test")
    shutil.rmtree(mixed / "test" / "cat")                          # has not the classes: val/ has
    assert len(images("folder", mixed, 16, like=train).labels) == 24
    for file in mixed.glob("train/*/*.png"):
        ops.Image.fromarray(np.full((9, 9), 31, np.uint8)).save(file)
    with pytest.raises(ops.BadInput, match="nearly black: their largest value is 31"):
        images("folder", mixed)


def test_class_folders_without_a_split(tmp_path):
    """They are the training images; --hold-out tests on some that nothing has seen."""
    root = write_folder(tmp_path / "a", parts=("",))
    with pytest.raises(ops.BadInput, match="--hold-out N, given to the search and to evaluate.py"):
        images("folder", root)
    data = images("folder", root, hold_out=6)
    assert len(data.labels) == 24 and data.classes == ["cat", "dog"]
    two = write_folder(tmp_path / "b", parts=("train",))           # nor has a train/ alone a test
    with pytest.raises(ops.BadInput, match="no test images"):
        images("folder", two)
    held = images("folder", two, hold_out=6)                       # and the statistics see none
    *halves, _ = ops.split_rows(held.labels, 1, 6)
    rest = held.images[np.concatenate(halves)] / 255.
    assert len(held.labels) == 24
    assert torch.allclose(held.mean.flatten(), rest.mean((0, 2, 3)), atol=1e-5)
    (two / "train").rename(two / "Train"), shutil.copytree(two / "Train", two / "Test")
    with pytest.raises(ops.BadInput, match="has the folders Test, Train: name them train and test"):
        images("folder", two, hold_out=6)


def photographs(root, n=5, classes=("cat", "dog", "eel"), parts=("train", "test")):
    """JPEGs of several shapes, some of them turned."""
    rng, exif = np.random.default_rng(0), ops.Image.Exif()
    exif[0x112] = 6
    for part, name, i in itertools.product(parts, classes, range(n)):
        (root / part / name).mkdir(parents=True, exist_ok=True)
        shape = [(120, 160), (200, 100), (98, 98)][i % 3]
        image = ops.Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(shape)
        image.save(root / part / name / f"{i}.jpg", exif=exif if i % 2 else ops.Image.Exif())
    return root


def test_large_images_are_treated_as_imagenets(tmp_path):
    """From 96 pixels on, whatever the data set is called: in files, cropped at random sizes."""
    root = photographs(tmp_path)
    small, large = images("folder", root, 95), images("folder", root, 96)
    assert torch.is_tensor(small.images) and not small.large and small.zoom == 1
    assert large.large and large.images[0].endswith("0.jpg") and large.size == (96, 96)
    assert large.zoom == 256 / 224 and large.mean.flatten().tolist() == pytest.approx(
        [0.485, 0.456, 0.406])
    assert images("imagenet", root, 96).fingerprint() == large.fingerprint()
    assert images("folder", root, 96, like=large).images[0].startswith(str(root / "test"))
    other = root / "train" / "cat" / "1.jpg"                       # which is not one of 16
    before, content = large.fingerprint(), other.read_bytes()
    other.write_bytes(content + b"more")
    assert images("folder", root, 96).fingerprint() != before
    other.write_bytes(content)
    x, y, _ = next(large.read([ops.Request(np.arange(15), np.arange(15))]))
    again, *_ = next(large.read([ops.Request(np.arange(15), np.arange(15))]))
    other, *_ = next(large.read([ops.Request(np.arange(15), np.arange(15) + 1)]))
    assert x.shape == (15, 3, 96, 96) and torch.equal(x, again) and not torch.equal(x, other)
    cut, _ = large[ops.Request(np.arange(15), np.arange(15), True, 50)]
    assert (cut == (255 * large.mean).byte().numpy()).all(1).sum() >= 15 * 25 * 25
    with pytest.raises(ops.BadInput, match="give --image-size"):   # they have several sizes
        images("folder", root)
    exif = ops.Image.Exif()
    exif[0x112] = 6                                                # turned: 100 high, 128 wide
    for file in root.glob("*/*/*.jpg"):
        ops.Image.open(file).resize((100, 128)).save(file, exif=exif)
    assert images("folder", root).size == (100, 128)               # their own
    held = ops.synthetic(3, 96, "cpu")                             # in memory, and yet large
    assert held.large and held.zoom == 1 and torch.is_tensor(held.images)
    x, *_ = next(held.read([ops.Request(np.arange(3), np.arange(3))]))
    assert x.shape == (3, 3, 96, 96)
    for data in (held, large):
        run = argparse.Namespace(args=lpt.get_args(["--channels", "4", "--layers", "3"])[0],
                                 state={"stage": 0})
        (net,), _ = ops.new_networks(run, [data], "cpu")
        assert net.stem1(net.stem0(torch.zeros(1, 3, 96, 96))).shape[2] == 12


def test_photographs_from_search_to_answer(tmp_path, monkeypatch, capsys):
    """Halves for the search; the network of the large stem; evaluate.load's transform is the
    test's; only the recipe is not ImageNet's."""
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos", n=8)
    some = ["--image-size", 96, "--layers", 3, "--channels", 4, "--epochs", 1, "--device", "cpu",
            "--dataset", "folder:photos", "--workers", 0]
    assert run_script(lpt, *some, *FIRST, "--batch-size", 6, "--out", "search") == 0
    assert run_script(evaluate, *some, "--arch", "search/genotype.json", "--batch-size", 12,
                      "--out", "network") == 0
    result = json.loads(Path("network/result.json").read_text())
    network, classes, transform = evaluate.load("network")
    files = sorted(Path("photos/test").glob("*/*"))
    train = images("folder", Path("photos"), 96)
    test = images("folder", Path("photos"), 96, like=train)
    x, *_ = next(test.read([ops.Request(np.arange(24))]))
    assert all(torch.equal(transform(ops.Image.open(file)), each) for file, each in zip(files, x))
    with torch.no_grad():
        found = [network(transform(ops.Image.open(file))[None])[0].argmax() for file in files]
    wrong = np.mean([classes[k] != file.parent.name for k, file in zip(found, files)])
    assert 100 * wrong == pytest.approx(result["test_error"], abs=1e-3)
    assert network.stem0[0].stride == (2, 2) and len(files) == result["test_images"] == 24


def test_images_of_every_mode(tmp_path):
    """Training and evaluate.load read an image of any mode as the same 8 bits of red, green, blue;
    transparent parts are white; what is deeper than its white is known is refused."""
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    rgb, make = np.stack([grey, grey[::-1], grey.T], 2), ops.Image.fromarray
    see_through = make(np.concatenate([rgb, np.full((8, 8, 1), 0, np.uint8)], 2))
    palette = make(rgb).quantize(8)
    palette.info["transparency"] = 0
    for image, expected in (
            (make(rgb), rgb), (make(grey), np.stack([grey] * 3, 2)), (see_through, 0 * rgb + 255),
            (make(grey.astype(np.uint16) * 257), np.stack([grey] * 3, 2)),
            (make(grey.astype(np.float32) / 255), np.stack([grey] * 3, 2)),
            (make(np.stack([grey, 0 * grey + 255], 2)), np.stack([grey] * 3, 2)),
            (make(grey > 99), np.stack([255 * (grey > 99)] * 3, 2))):
        assert np.array_equal(np.asarray(ops.as_rgb(image)), expected), image.mode
    exif = ops.Image.Exif()
    exif[0x112] = 6                                                # a camera on its side
    make(rgb[:, :6]).save(tmp_path / "a.png", exif=exif)
    assert ops.read_image(tmp_path / "a.png").size == (8, 6)
    at = np.asarray(palette) == 0
    assert (np.asarray(ops.as_rgb(palette))[at] == 255).all() and at.any()
    for pixels in (grey.astype(np.int32) * 70000, grey.astype(np.float32), grey / np.float32(-9)):
        with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
            ops.as_rgb(make(pixels))
    assert ops.centre(make(rgb), (8, 8)).size == (8, 8) and ops.centre(
        make(rgb[:, :6]), (3, 2)).size == (2, 3)


def test_a_download_that_breaks_off_ends_in_a_line(tmp_path, monkeypatch):
    def broken(*args, **kw):
        raise http.client.IncompleteRead(b"")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", broken)
    broken.filename = "cifar-10-python.tar.gz"
    with pytest.raises(ops.BadInput, match="put cifar-10-python.tar.gz there"):
        images("cifar10", tmp_path)


def test_no_flip_of_files(tmp_path):
    files = images("folder", photographs(tmp_path), 96)
    a, b = (files[ops.Request(np.arange(6), np.arange(6), flip)][0] for flip in (True, False))
    assert a.shape == b.shape and not np.array_equal(a, b)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_images_do_not_hang_on_the_workers(tmp_path):
    root = photographs(tmp_path, n=12)
    rows = np.arange(36)
    for size in (96, 16):                                          # in files and in memory
        sets = [images("folder", root, size, workers=n) for n in (0, 2)]
        streams = [ops.Stream(data, rows, 8, 1, "train") for data in sets]
        torch.manual_seed(0)
        state = torch.get_rng_state()
        for step in (0, 1, 2, 7, 8, 3):                            # on, ahead and back
            one, two = (stream(step) for stream in streams)
            assert one[0].shape == (8, 3, size, size) and one[0].dtype == torch.float32
            assert all(torch.equal(a, b) for a, b in zip(one, two))
        assert torch.equal(state, torch.get_rng_state())
        assert not torch.equal(streams[0](0)[0], streams[0](5)[0])
    image = ops.Image.open(root / "train" / "cat" / "0.jpg")       # 120 x 160: 110 wide, 96 of it
    image = ops.v2.functional.center_crop(ops.v2.functional.resize(image, [110]), [96])
    files = [images("folder", root, 96, workers=n) for n in (0, 2)]
    assert torch.equal(files[0].pixels([0])[0], ops.v2.functional.pil_to_tensor(image))
    broken = root / "train" / "dog" / "3.jpg"                      # is named, by a worker too
    broken.write_bytes(broken.read_bytes()[:300])
    for data in files:
        with pytest.raises(ops.BadInput, match="dog/3.jpg"):
            list(ops.batches(data, rows, 8))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_reading_processes_need_no_shared_memory(monkeypatch):
    """What they send goes through a pipe."""
    data = ops.synthetic(3, 16, "cpu")
    data.workers = 1
    monkeypatch.setattr(torch.multiprocessing.reductions, "reduce_storage", None)   # by /dev/shm
    x, y, rows = next(data.read([ops.Request(np.arange(5))]))
    assert torch.equal(y, data.labels[:5])


def test_reading_processes_end_with_a_killed_run(tmp_path):
    """A pipeline behind it would wait for them for ever."""
    photographs(tmp_path / "photos", n=12)
    run = subprocess.Popen(
        [sys.executable, HERE / "evaluate.py", "--arch", "random:1", "--dataset",
         f"folder:{tmp_path}/photos", "--image-size", "96", "--layers", "3", "--channels", "4",
         "--batch-size", "36", "--epochs", "500", "--workers", "2", "--out", tmp_path / "run"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not run.stdout.readline().startswith("epoch 2"):
        assert run.poll() is None
    run.kill()
    run.communicate(timeout=20)                                    # until nobody holds its output


def test_a_broken_test_image_is_named_before_the_training(tmp_path, capsys):
    photographs(tmp_path / "photos", n=12)
    file = tmp_path / "photos" / "test" / "cat" / "1.jpg"         # not one of 16 that are looked at
    file.write_bytes(file.read_bytes()[:300])
    assert run_script(evaluate, "--arch", "random:1", "--dataset", f"folder:{tmp_path}/photos",
                      "--image-size", 96, "--layers", 3, "--channels", 4, "--batch-size", 18,
                      "--epochs", 1, "--workers", 0, "--out", tmp_path / "run") == 2
    assert "cat/1.jpg" in one_line(capsys) and not (tmp_path / "run" / "log.jsonl").exists()


# ----------------------------------------------------------------------- command line, bad input

BAD = [
    (lpt, ["--dataset", "mnist"]), (lpt, ["--dataset", "synthetic:1"]), (lpt, ["--base", "enas"]),
    (lpt, ["--layers", 2]), (lpt, ["--lr", "nan"]), (lpt, ["--lr", "inf"]),
    (lpt, ["--nonsense"]), (lpt, [*TINY, "--batch-size", 5000]),
    (lpt, ["--dataset", "folder", "--data", "nowhere"]),
    (lpt, ["--dataset", "imagenet", "--data", "nowhere"]),
    (lpt, ["--dataset", "cifar100"]), (lpt, ["--dataset", "folder:~no-such-user/images"]),
    (lpt, ["--dataset", "folder", "--data", "empty"]),
    (lpt, ["--dataset", "folder", "--data", "corrupt"]),
    *((lpt, [*TINY, "--epochs", 1, *wrong]) for wrong in (
        ["--gradient", "exact", "--amp", "bf16-all"], ["--layers", 3, 4], ["--subsets", 0.8, 0.5],
        ["--seed", 2 ** 64])),
    (lpt, [*TINY, "--hold-out", 5000]), (lpt, [*TINY, "--epochs", 1, "--out", "held"]),
    (il, ["--tasks"]), (il, ["--tasks", "cifar10", "imagenet"]), (il, ["--rounds", 0]),
    (il, ["--tasks", "cifar100", "nothing"]),
    (il, [*SMALL, "--tasks", "synthetic:3", "--step", "printed"]),
    (il, ["--tasks", "folder:corrupt/train", "synthetic:3"]),
    (lease, ["--dataset", "folder:nowhere"]), (lease, [*TINY, "--delta-scale", 0]),
    (evaluate, []), (evaluate, ["--arch", "NOPE"]), (evaluate, ["--arch", "~no-such-user/x.json"]),
    (evaluate, [*TINY, "--arch", "DARTS_V2", "--hold-out", 2000]),
    (evaluate, ["--arch", "DARTS_V2", "--dataset", "folder:other-size", *SMALL[2:6], "--batch-size",
                6, "--epochs", 1, "--cutout", 4]),
    (evaluate, ["--arch", "full"]),
    (evaluate, [*TINY, "--arch", "DARTS_V2", "--drop-path", 1.5]),
]


@pytest.mark.parametrize("module,argv", BAD, ids=lambda v: " ".join(map(str, v))[-40:]
                         if isinstance(v, list) else v.__name__)
def test_bad_input_is_one_line_and_changes_nothing(module, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    corrupt = next((write_folder(tmp_path / "corrupt") / "train" / "cat").iterdir())
    corrupt.write_bytes(corrupt.read_bytes()[:200])
    for file in write_folder(tmp_path / "other-size").glob("test/*/*"):
        ops.Image.new("L", (12, 16), 255).save(file)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "held").mkdir()
    for name in (".lock", "checkpoint.pt"):                        # another run's
        (tmp_path / "held" / name).touch()
    before = tree(tmp_path)
    assert run_script(module, *argv) == 2
    error = capsys.readouterr().err                                # argparse names the script first
    assert error.count("\n") == 1 and "error: " in error
    if "corrupt" in argv:
        assert str(corrupt.relative_to(tmp_path)) in error
    if "imagenet" in argv:
        assert ("no imagenet" in error) == (module is il)
    assert tree(tmp_path) == before


def test_numbers_are_checked():
    for kind, low, high, good, wrong in ((int, 1, math.inf, "7", ("0", "-1", "x", "", "1.5")),
                                         (float, 0, 1, "0.5", ("-1", "1.1", "nan", "inf", ""))):
        parse = ops.number(kind, low, high)
        assert parse(good) == kind(good)
        for text in wrong:
            with pytest.raises(ValueError):
                parse(text)


BROKEN = {                              # an image among good ones, or the folder train/
    "truncated": lambda file, train: file.write_bytes(file.read_bytes()[:200]),
    "empty": lambda file, train: file.write_bytes(b""),
    "text": lambda file, train: file.write_text("no image"),
    "a dead link": lambda file, train: (file.unlink(), file.symlink_to("nowhere")),
    "no folder": lambda file, train: shutil.rmtree(train),
    "no classes": lambda file, train: [shutil.rmtree(each) for each in list(train.iterdir())],
    "an empty class": lambda file, train: (train / "ant").mkdir(),
    "too few images": lambda file, train: [each.unlink() for each in list(train.glob("*/*"))[2:]]}
READERS = {
    lpt: ["--dataset", "folder", "--data", "tree"], il: ["--tasks", "folder:tree"],
    lease: ["--dataset", "imagenet", "--data", "tree", "--subsets", 0.5, 0.5, "--workers", 1,
            "--image-size", 96],
    evaluate: ["--arch", "random:1", "--dataset", "folder:tree"]}


@pytest.mark.parametrize("module,what", [*((lpt, what) for what in BROKEN), (il, "truncated"),
                                         (lease, "truncated"), (evaluate, "an empty class")],
                         ids=lambda v: getattr(v, "__name__", v))
def test_broken_images_and_folders(module, what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = write_folder(tmp_path / "tree") / "train"
    file = train / "dog" / "7.png"
    BROKEN[what](file, train)
    some = [*SMALL[2:], "--image-size", 12, "--batch-size", 6, "--epochs", 9]
    assert run_script(module, *some, *READERS[module]) == 2
    error = one_line(capsys)
    assert (str(file.relative_to(tmp_path)) in error) == (
        what in ("truncated", "empty", "text", "a dead link"))
    assert module is lease or not (tmp_path / "runs").exists()    # which reads as it goes


def test_one_run_a_folder(tmp_path, capsys):
    """Another process holds the folder; a killed one has let it go."""
    (tmp_path / "run").mkdir()
    code = ("import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); "
            "print(flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run" / ".lock"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    argv = [*TINY, *FIRST, "--epochs", 1, "--out", tmp_path / "run"]
    assert run_script(lpt, *argv) == 2 and "another run is using" in one_line(capsys)
    other.kill(), other.communicate()
    assert run_script(lpt, *argv) == 0


def readme_commands():
    """Per code block of the pages, its commands that run a module of the top level; variables
    are put in, torchrun is left out."""
    text = "".join(page.read_text() for page in PAGES)
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        lines, values = [], {}
        for line in block.splitlines():
            words = [word for text in shlex.split(line, comments=True)
                     for word in values.get(text, [text])]
            name, equals, value = words[0].partition("=") if words else ("", "", "")
            if equals:
                values["$" + name] = value.split()
            lines.append(words[3:] if name == "torchrun" else words[1:])
        yield [line for line in lines
               if line and re.fullmatch(r"\w+\.py", line[0]) and line[0] != Path(__file__).name]


@pytest.mark.parametrize("block", [block for block in readme_commands() if block],
                         ids=lambda block: " ".join(block[0])[:40])
def test_the_commands_of_the_readme(block):
    """Their scripts take these arguments and name their folders so; .ci/run runs the first."""
    made = set()
    for script, *argv in block:
        args, _ = importlib.import_module(script[:-3]).get_args(argv)
        made.add(f"{args.out}/genotype.json")
        cell = getattr(args, "arch", None) or ""
        assert cell in made or not cell.startswith("runs/") or len(made) == 1, cell


@slow
def test_scripts_stand_alone():
    """Importing does nothing; --help works."""
    strict = ["-W", "error", "-W", "ignore::ResourceWarning"]      # torch 2.6 leaves a folder open
    started = [subprocess.Popen([sys.executable, *strict, HERE / f"{name}.py", "--help"], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for name in ("lpt", "il", "lease", "evaluate", "genotypes")]
    for code, out, error in finish(started):
        assert code == 0 and "--out" in out and not error


# ------------------------------------------------------------------------------------ whole runs

FILES = {".lock", "genotype.json", "checkpoint.pt", "cells.svg", "search.svg", "log.jsonl",
         "run.json"}


@pytest.mark.parametrize("module,extra,picture", slow_but({0, 3, 4, 7}, [
    (lpt, TINY, "tests.png"), (lpt, [*TINY, "--ablation", 1], "tests.png"),
    (lpt, [*TINY, "--ablation", 2], "tests.png"), (lpt, [*TINY, "--encoder", "none"], None),
    (il, [*SMALL, "--tasks", "synthetic:3", "synthetic:2", "--rounds", 1], None),
    (il, [*SMALL, "--tasks", "synthetic:3", "synthetic:2"], None),
    (il, [*SMALL, "--tasks", "synthetic:3", "synthetic:2", "--joint", "--order", 1], None),
    (lease, LEASE, "explanations-1.png"),
    (lease, [*LEASE, "--order", 1, "--weighting", "magnitude"], "explanations-1.png")]),
    ids=["lpt", "ablation 1", "ablation 2", "base alone", "il", "two rounds", "joint", "lease",
         "lease order 1"])
def test_search_then_evaluation(module, extra, picture, tmp_path, monkeypatch, capsys):
    """The search's last line is the command that trains its cell."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert run_script(module, *extra, "--batch-size", 100, "--epochs", 1, "--out", run) == 0
    assert {p.name for p in run.iterdir()} == {*FILES, *([picture] if picture else [])}
    command = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert command[:2] == ["python", "evaluate.py"] and "synthetic" in command[5]
    line, = log_of(run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    cell = genotypes.load(str(run / "genotype.json"))
    assert json.loads(json.dumps(cell._asdict())) == line["genotype"]
    for i, kind in enumerate(("normal", "reduce")):
        alpha = state["parts"]["A"][f"alpha.{i}"]
        assert np.allclose(line["mean_weights"][kind], F.softmax(alpha, 1).mean(0), atol=1e-6)
    A = ops.Architecture()
    A.load_state_dict(state["parts"]["A"])
    assert A.report()[0].items() <= line.items()
    about = json.loads((run / "run.json").read_text())
    assert about == {k: state[k] for k in about} and about["method"] == module.__name__
    if module is lpt:
        assert line["epoch"] == 1 and 0 < line["selection"] <= 1 and 0 <= line["val_accuracy"] <= 1
        assert (line["selection"] == 1) == ("none" in extra)
        assert not picture or ops.Image.open(run / picture).size[0] > 1000
    if module is il:                                               # a learner per task and round
        nets, args = {name.split(".")[0] for name in state["parts"]["nets"]}, state["args"]
        assert len(nets) == 2 * (1 if args["joint"] else args["rounds"])
    small = ["--layers", 3, "--channels", 2, "--epochs", 1, "--batch-size", 50, "--out", "e"]
    assert run_script(evaluate, *command[2:], *small) == 0
    result = json.loads((tmp_path / "e" / "result.json").read_text())
    assert 0 <= result["test_error"] <= 100 and result["test_images"] == 100
    assert result["genotype"] == line["genotype"] and result["search_days"] == pytest.approx(
        line["seconds"] / 86400)
    assert result["cell"] == about["row"]
    assert {"layers", "epochs"} <= result["changed"].keys() and "seed" not in result["changed"]


@pytest.mark.parametrize("method,base", [
    pytest.param(method, base, marks=() if (method, base) in (("lpt", "pcdarts"), ("lpt", "pdarts"))
                 else slow)
    for method in METHODS for base in ops.BASES])
def test_every_base_in_every_method(method, base, tmp_path, monkeypatch, capsys):
    seen, new_networks = [], ops.new_networks
    monkeypatch.setattr(ops, "new_networks", lambda *a: seen.append(new_networks(*a)) or seen[-1])
    layers = [5, 11, 17] if method == "il" else [3, 3, 3]           # the paper's, once
    changes = {"pdarts": ["--layers", *layers], "pcdarts": ["--channels", 8]}.get(base, [])
    warm_up = ["--warm-up", 1] if ops.BASES[base]["warm_up"] else []
    run = tmp_path / "run"
    assert search(method, "--base", base, *changes, *warm_up, "--batch-size", 100, "--epochs", 2,
                  "--out", run) == 0
    lines = log_of(run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    if base == "pdarts":
        assert [len(state["run"]["kept"][0][e]) for e in range(14)] == [3] * 14
        assert len(lines) == 6
        assert {len(net.cells) for nets, *_ in seen for net in nets} == set(layers)
    if base == "darts-":                                           # its auxiliary skips have gone
        net = seen[0][0][0]
        assert net.knobs.auxiliary == 0 and any("auxiliary" in name for name, _ in
                                                net.named_parameters())
    assert ("difficulty" in lines[0] or "val_loss" in lines[0]) == (not warm_up)
    assert "difficulty" in lines[-1] or "val_loss" in lines[-1]
    A = ops.Architecture(partial=ops.BASES[base]["partial"])
    A.load_state_dict(state["parts"]["A"])
    assert len([*A.parameters()]) == (4 if base == "pcdarts" else 2)
    if base == "pcdarts":                                          # beta learns, and is decoded
        assert state["parts"]["alpha_opt"]["state"][2]["exp_avg"].abs().max() > 0
    cell = genotypes.load(str(run / "genotype.json"))
    assert cell == A.cell() and A.max_skips == (2 if base == "pdarts" else 8)
    assert {op for op, _ in cell.normal + cell.reduce} <= set(genotypes.PRIMITIVES[1:])


def test_epochs_without_architecture_leave_both_players_alone(tmp_path, monkeypatch):
    states, save = [], ops.Run.save
    monkeypatch.setattr(ops.Run, "save", lambda run: (save(run), states.append(
        ops.read_checkpoint(run.args.out, "lpt")["parts"])))
    assert search("lpt", *FIRST, "--warm-up", 1, "--epochs", 2, "--out", tmp_path / "run") == 0
    _, first, second = states                                      # the first is of the beginning
    assert first["A"]["alpha.0"].abs().max() < 6e-3 and not first["alpha_opt"]["state"]
    assert not first["creator_opt"]["state"] and second["creator_opt"]["state"]
    assert not torch.equal(first["creator"]["0"], second["creator"]["0"])
    assert not torch.equal(first["A"]["alpha.0"], second["A"]["alpha.0"])
    assert first["tester_opt"]["state"] and first["testee_opt"]["state"]


def test_darts_plus_stops_at_planted_skips(tmp_path, monkeypatch, capsys):
    class Planted(ops.Architecture):
        def __init__(self, *args):
            super().__init__(*args)
            self.alpha[0].data[:2, 3] += 2                         # both edges into node 2

    run = tmp_path / "run"
    monkeypatch.setattr(ops, "Architecture", Planted)
    assert search("lpt", "--base", "darts+", "--epochs", 3, "--out", run) == 0
    out = capsys.readouterr().out
    assert "the search ends here: the normal cell has" in out and "Train it" in out
    line, = log_of(run)
    assert "skip connections" in line["stopped"]
    assert sum(op == "skip_connect" for op, _ in genotypes.load(str(run / "genotype.json")).normal
               ) >= 2
    assert run_script(lpt, "--device", "cpu", "--resume", "--out", run) == 0     # and stays so
    assert len(log_of(run)) == 1
    assert search("lpt", "--base", "darts+", "--epochs", 3, "--warm-up", 1, "--out",
                  tmp_path / "waits") == 0                         # until A has learnt
    assert len(log_of(tmp_path / "waits")) == 2


@slow
def test_a_search_prefers_what_the_data_needs(tmp_path, monkeypatch):
    """On `synthetic`, cells of skip connections or average pools alone fail where others do not;
    first-order DARTS' --quick search turns away from both, from seeds 1 to 3 alike."""
    def test_error(name):
        edges = [(name, state) for _ in range(4) for state in (0, 1)]
        cell = genotypes.Genotype(edges, [2, 3, 4, 5], edges, [2, 3, 4, 5])
        (tmp_path / name).with_suffix(".json").write_text(genotypes.to_json(cell))
        assert run_script(evaluate, "--arch", tmp_path / f"{name}.json", "--quick", "--dataset",
                          "synthetic", "--image-size", 16, "--out", tmp_path / name) == 0
        return json.loads((tmp_path / name / "result.json").read_text())["test_error"]

    monkeypatch.undo()                                             # all images, not make_small's
    need_not = "avg_pool_3x3", "skip_connect"
    assert min(map(test_error, need_not)) > 50 > 40 > test_error("max_pool_3x3")
    assert run_script(il, "--tasks", "synthetic", "--rounds", 1, "--coupling", 0, "--quick",
                      "--out", tmp_path / "search") == 0
    last = log_of(tmp_path / "search")[-1]
    weights = dict(zip(genotypes.PRIMITIVES, map(sum, zip(*last["mean_weights"].values()))))
    unwanted = sum(weights.pop(name) for name in need_not) / 2
    assert unwanted < 0.9 * min(weights.values())


# ------------------------------------------------------------------------------------ reliability


@pytest.mark.parametrize("module,extra", slow_but({4}, [            # lpt's are killed below
    (lpt, [*TINY, "--hold-out", 50]), (lpt, [*TINY, "--ablation", 1]),
    (il, [*SMALL, "--tasks", "synthetic:3", "synthetic:2"]), (lease, LEASE),
    (evaluate, [*TINY, "--arch", "random:1", "--drop-path", 0.5, "--hold-out", 60]),
    (lpt, [*TINY, "--gradient", "exact", "--created-test", "normalized"]),
    (il, [*SMALL, "--tasks", "synthetic:3", "--gradient", "exact"]),
    (lease, [*LEASE, "--gradient", "exact"])]), ids=[
        "lpt", "ablation 1", "il", "lease", "evaluate", "lpt exact", "il exact", "lease exact"])
def test_resume_equals_an_uninterrupted_run(module, extra, tmp_path, monkeypatch, capsys):
    """And an uninterrupted one of another seed is another."""
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    epochs = 3 if module is evaluate else 2                        # drop-path begins in the second
    argv = [*extra, "--epochs", epochs]
    assert run_script(module, *argv, "--out", whole) == 0
    capsys.readouterr()
    interrupted(module, argv, cut, monkeypatch, epochs)         # in the last epoch
    assert "--resume goes on" in one_line(capsys)
    assert run_script(module, "--device", "cpu", "--out", cut, "--resume") == 0
    a, b = finals(whole), finals(cut)
    assert same(a, b) and len(a) > 20
    assert run_script(module, "--out", cut, "--resume", "--seed", 2) == 2
    assert run_script(module, *argv, "--seed", 2, "--out", other) == 0
    weights = [[t for t in found if torch.is_tensor(t) and t.is_floating_point()]
               for found in (a, finals(other))]
    assert not same(*weights)


KILLED = {"lpt": [*FIRST, "--epochs", 2], "lease": ["--epochs", 2],
          "il": ["--tasks", "synthetic:3", "--rounds", 2, *PRUNED],
          "evaluate": ["--drop-path", 0.5, "--epochs", 3]}


def kills(job, folder, count):
    """Kill runs of a script `count` times at random times; each is begun again until it ends, and
    must end as one that nobody disturbed. Of use where torch has started no threads yet."""
    make_small()
    argv, rng = [*RUNS[job][1], *KILLED[job], "--checkpoint-minutes", 0], random.Random(count)

    def begun(*more):
        process = multiprocessing.get_context("fork").Process(
            target=lambda: sys.exit(run_script(RUNS[job][0], *argv, *more)))
        process.start()
        return process

    begin, process = time.time(), begun("--out", folder / "whole")
    process.join()
    seconds, whole, done, code = time.time() - begin, finals(folder / "whole"), 0, None
    while done < count or code:
        process = begun("--resume", "--out", folder / "cut")
        if done < count:
            time.sleep(rng.uniform(0.05, 0.6 * seconds))
            process.kill()
        process.join()
        code = process.exitcode
        assert code in (0, -signal.SIGKILL)
        done += code == -signal.SIGKILL
        if code == 0:
            assert same(finals(folder / "cut"), whole)
            shutil.rmtree(folder / "cut")
    return {"job": job, "kills": done}


def killed(count, *jobs):
    """kills of several jobs at once, each in a process that has started no threads."""
    started = [subprocess.Popen([sys.executable, __file__, "kills", job, str(count)], text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE) for job in jobs]
    for code, out, error in finish(started, 60 + 20 * count):
        assert code == 0, error
        yield json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("count,jobs", slow_but({0}, [
    (2, ("lpt",)), (6, ("lpt", "il")), (6, ("lease", "evaluate"))]), ids=str)
def test_killed_runs_end_as_undisturbed_ones(count, jobs):
    assert [found["kills"] for found in killed(count, *jobs)] == [count] * len(jobs)


@pytest.mark.parametrize("method", slow_but({0}, list(RUNS)))
def test_what_is_not_finite_is_not_saved(method, tmp_path, monkeypatch, capsys):
    """Each loss of the third step in turn is NaN."""
    module, argv = RUNS[method]
    argv = [*argv, "--checkpoint-minutes", 0, "--epochs", 2]
    interrupted(module, argv, tmp_path, monkeypatch, 3)         # after the second step
    saved, real, left = (tmp_path / "checkpoint.pt").read_bytes(), F.cross_entropy, 0

    def poisoned(*args, **kw):
        nonlocal left
        left -= 1
        return real(*args, **kw) * (math.nan if left == 0 else 1)

    monkeypatch.setattr(F, "cross_entropy", poisoned)
    for n in range(1, 2 if method == "evaluate" else 4):
        left, _ = n, capsys.readouterr()
        assert run_script(module, "--resume", "--device", "cpu", "--out", tmp_path) == 1
        assert "is not finite" in one_line(capsys)
        assert (tmp_path / "checkpoint.pt").read_bytes() == saved


@pytest.fixture
def saved_run(tmp_path):
    """A run folder with a good checkpoint."""
    run = tmp_path / "run"
    assert run_script(evaluate, *TINY, "--arch", "random:1", "--epochs", 1, "--out", run) == 0
    return run


def damages_seen(path, count):
    """How many of `count` truncations and as many flipped bits of a checkpoint are refused, or are
    bits (of padding) that change nothing."""
    good, rng, seen = path.read_bytes(), np.random.default_rng(0), 0
    whole = flat(ops.read_checkpoint(path.parent, "evaluate"))
    damaged = [good[:n] for n in rng.integers(len(good), size=count)]
    for at, bit in zip(rng.integers(len(good), size=count), rng.integers(8, size=count)):
        damaged.append(good[:at] + bytes([good[at] ^ 1 << int(bit)]) + good[at + 1:])
    for body in damaged:
        path.write_bytes(body)
        try:
            again = flat(ops.read_checkpoint(path.parent, "evaluate"))
            seen += same(again, whole) and len(body) == len(good)
        except ops.BadInput as error:
            seen += "checkpoint.pt is damaged" in str(error)
    return seen


def test_damaged_checkpoints_are_seen(saved_run, capsys):
    path = saved_run / "checkpoint.pt"
    assert torch.load(path, weights_only=True)["method"] == "evaluate"            # a plain archive
    good = path.read_bytes()
    at = good.rfind(b"PK\1\2") + 38                                # an attribute, in no checksum
    folder = good[:at] + bytes([good[at] ^ 16]) + good[at + 1:]    # torch 2.6 reads garbage then
    for content in (b"", b"no checkpoint", folder):
        path.write_bytes(content)
        capsys.readouterr()
        assert run_script(evaluate, "--resume", "--out", saved_run) == 2
        assert f"{path} is damaged" in one_line(capsys)
    path.write_bytes(good)
    assert damages_seen(path, 200) == 400


class Malicious:
    """Unpickled, it calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_a_run_of_another_version_is_refused_in_a_line(saved_run, capsys):
    """Also by evaluate.load; df0511b's checkpoints have no version."""
    path = saved_run / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    for other in ({k: v for k, v in content.items() if k != "version"}, content | {"version": 0},
                  [content]):
        torch.save(other, path)
        capsys.readouterr()
        assert run_script(evaluate, "--resume", "--out", saved_run) == 2
        assert "of another version of this code" in one_line(capsys)
        with pytest.raises(ops.BadInput, match="another version"):
            evaluate.load(saved_run)


def test_no_pickle_is_executed(saved_run, tmp_path, capsys):
    """The whole file is a pickle, or one is in a good archive with a right checksum."""
    marker, path = tmp_path / "executed", saved_run / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "args": Malicious(os.system, (f"touch {marker}",))}, path)
    for body in (pickle.dumps(Malicious(Path.touch, (marker,)), 2), path.read_bytes()):
        path.write_bytes(body)
        capsys.readouterr()
        assert run_script(evaluate, "--resume", "--out", saved_run) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not marker.exists()
    for name in ("darts_ops", "lpt", "il", "lease", "evaluate", "genotypes"):
        source = (HERE / f"{name}.py").read_text()
        assert "weights_only=False" not in source and "pickle.load" not in source


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path, capsys, monkeypatch):
    for name in ("lpt", "il"):
        assert search(name, *FIRST, "--epochs", 1, "--out", tmp_path / name) == 0
    for name, change, word in (
            ("lpt", ["--seed", 2], "seed"), ("lpt", ["--base", "pcdarts"], "base"),
            ("lpt", ["--epochs", 2], "epochs"), ("lpt", ["--dataset", "synthetic:4"], "dataset"),
            ("lpt", ["--amp", "bf16"], "amp"), ("il", ["--tasks", "synthetic:4"], "tasks"),
            ("il", ["--tasks", "synthetic:3"], "tasks"),
            ("il", ["--coupling", 1], "lam")):
        capsys.readouterr()
        before = tree(tmp_path / name)
        assert run_script(RUNS[name][0], "--resume", "--device", "cpu", *change, "--out",
                          tmp_path / name) == 2
        assert word in one_line(capsys) and before == tree(tmp_path / name)
    assert run_script(il, "--resume", "--out", tmp_path / "lpt") == 2
    assert "run of lpt.py" in capsys.readouterr().err
    few = ops.synthetic

    def other(*args):
        data = few(*args)
        data.images[0] += 1
        return data

    monkeypatch.setattr(ops, "synthetic", other)
    assert run_script(lpt, "--resume", "--device", "cpu", "--out", tmp_path / "lpt") == 2
    assert "another data" in capsys.readouterr().err
    monkeypatch.setattr(ops, "synthetic", few)
    monkeypatch.setattr(ops, "world_size", lambda: 2)
    assert run_script(lpt, "--resume", "--device", "cpu", "--out", tmp_path / "lpt") == 2
    assert "another world_size" in capsys.readouterr().err


def test_an_evaluation_keeps_its_cell_and_what_it_is(tmp_path, monkeypatch, capsys):
    """Wherever the search's folder has gone; another cell in its place is refused."""
    monkeypatch.chdir(tmp_path)
    assert search("lpt", *FIRST, "--hold-out", 50, "--epochs", 1, "--out", "search") == 0
    argv = [*TINY, "--epochs", 2, "--hold-out", 50, "--checkpoint-minutes", 0, "--arch",
            "search/genotype.json", "--out"]
    assert run_script(evaluate, *argv, "whole") == 0
    for name in ("moved", "another"):
        interrupted(evaluate, [*argv, name], Path(name), monkeypatch, 2)
    cell = genotypes.load("search/genotype.json")
    Path("search/genotype.json").write_text(genotypes.to_json(genotypes.random_cell(1)))
    capsys.readouterr()
    assert run_script(evaluate, *argv, "another", "--resume") == 2
    assert "is not the cell that another began with" in one_line(capsys)
    shutil.rmtree("search")
    assert run_script(evaluate, *argv, "moved", "--resume") == 0
    whole, moved = (json.loads(Path(name, "result.json").read_text())
                    for name in ("whole", "moved"))
    assert {k: v for k, v in whole.items() if k != "seconds"} == {
        k: v for k, v in moved.items() if k != "seconds"}
    assert moved["cell"].startswith("LPT-R18-DARTS-2nd") and moved["search_days"] > 0
    assert moved["genotype"] == json.loads(json.dumps(cell._asdict()))


def test_held_out_images_that_the_search_learned_from_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert search("lpt", *FIRST, "--hold-out", 50, "--epochs", 1, "--out", "s") == 0
    argv = [*TINY, "--epochs", 1, "--arch", "s/genotype.json", "--out", "e", "--hold-out"]
    capsys.readouterr()
    assert run_script(evaluate, *argv, 60) == 2
    assert "held out 50 of these images" in one_line(capsys)
    assert run_script(evaluate, *argv, 50, "--out", "f") == 0
    write_folder(tmp_path / "a")                                   # of any size
    some = ["--dataset", "folder:a", *SMALL[2:], "--batch-size", 6, "--epochs", 1]
    assert run_script(lpt, *some, *FIRST, "--out", "t") == 0
    capsys.readouterr()
    assert run_script(evaluate, *some, "--image-size", 20, "--arch", "t/genotype.json",
                      "--hold-out", 8, "--out", "g") == 2
    assert "held out 0 of these images" in one_line(capsys)
    shutil.copy(tmp_path / "a/train/cat/0.png", tmp_path / "a/train/cat/more.png")
    for again in ([], ["--dataset", "folder", "--data", tmp_path / "a"]):   # the same folder
        assert run_script(evaluate, *some, *again, "--arch", "t/genotype.json", "--hold-out", 8,
                          "--out", "h") == 2                       # another 8 would be held out
        assert "have changed since the search" in one_line(capsys)
    shutil.copytree(tmp_path / "a", tmp_path / "b")                # another data set may differ
    assert run_script(evaluate, *some, "--dataset", "folder:b", "--arch", "t/genotype.json",
                      "--hold-out", 8, "--out", "h") == 0


def test_a_folder_of_images_may_move(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "a")
    argv = [*SMALL[2:], "--batch-size", 6, "--epochs", 2, *FIRST, "--out", "run"]
    interrupted(lpt, ["--dataset", "folder:a", *argv], Path("run"), monkeypatch, 2)
    Path("a").rename("b")
    assert run_script(lpt, "--dataset", "folder:b", *argv, "--resume") == 0


def test_a_folder_with_somebodys_files_is_refused(tmp_path, capsys):
    """But --resume starts where a run was killed before its first checkpoint, and says so."""
    argv = [*TINY, *FIRST, "--epochs", 1, "--out", tmp_path]
    for name in ("notes.txt", "genotype.json", "search.log"):
        (tmp_path / name).write_text("mine")
        for more in ([], ["--resume"]):
            assert run_script(lpt, *argv, *more) == 2 and "is not empty" in one_line(capsys)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "run.json").write_text("{}"), (tmp_path / "checkpoint.pt.tmp").write_text("x")
    assert run_script(lpt, *argv, "--resume") == 0
    assert f"no checkpoint in {tmp_path}: starting" in capsys.readouterr().out


def test_the_cell_of_an_unfinished_search_is_called_so(tmp_path, monkeypatch, capsys):
    """In its row and in the table; DARTS+' early end is an end."""
    monkeypatch.chdir(tmp_path)
    search_argv = [*TINY, *PRUNED, "--epochs", 1, "--checkpoint-minutes", 0]
    interrupted(lpt, [*search_argv, "--out", "search"], Path("search"), monkeypatch, 5)
    assert len(log_of(Path("search"))) == 2                        # of three stages
    argv = [*TINY, "--epochs", 1, "--arch", "search/genotype.json"]
    assert evaluate.get_args([*map(str, argv)])[0].drop_path == 0.3
    for name in ("early", "late"):
        assert run_script(evaluate, *argv, "--out", name) == 0
        cell = json.loads(Path(name, "result.json").read_text())["cell"]
        assert (", after 2 of 3 epochs" in cell) == (name == "early")
        assert cell.startswith("LPT-R18-P-DARTS, ")
        assert run_script(lpt, *search_argv, "--resume", "--out", "search") == 0
    assert run_script(evaluate, "--summary", "early", "late") == 0
    assert len(capsys.readouterr().out.splitlines()[-2:]) == 2
    log = log_of(Path("search"))
    Path("search/log.jsonl").write_text(json.dumps(log[0] | {"stopped": "too many skips"}))
    assert ", after" not in evaluate.origin("search/genotype.json")["cell"]


def test_a_dead_class_shows(tmp_path, monkeypatch):
    """95 images of one class and 5 of another, which an answer of always the first hides."""
    monkeypatch.setattr(evaluate.Network, "forward", lambda net, x: (
        net.classifier.weight.sum() * 0 + torch.eye(3)[[0] * len(x)], None))
    synthetic = ops.synthetic

    def uneven(*args):
        data = synthetic(*args)
        data.labels = torch.tensor([0] * 95 + [2] * 5) if args[3] else data.labels
        return data

    monkeypatch.setattr(ops, "synthetic", uneven)
    assert run_script(evaluate, *TINY, "--arch", "random:1", "--epochs", 1, "--out",
                      tmp_path / "e") == 0
    result, names = json.loads((tmp_path / "e" / "result.json").read_text()), synthetic(
        3, 8, "cpu").classes
    assert result["test_error"] == 5 and result["class_errors"] == {names[0]: 0, names[2]: 100}


def test_results_on_other_test_images_are_told_apart(tmp_path):
    """The training images are the same, test/ is not."""
    for name in ("a", "b"):
        write_folder(tmp_path / name)
    file = tmp_path / "b" / "test" / "cat" / "1.png"               # a single one of 24
    ops.Image.open(file).rotate(90).save(file)
    found = []
    for name in "ab":
        assert run_script(evaluate, *SMALL[2:], "--batch-size", 6, "--epochs", 1, "--arch",
                          "random:1", "--dataset", f"folder:{tmp_path}/{name}", "--out",
                          tmp_path / f"run{name}") == 0
        found.append(json.loads((tmp_path / f"run{name}" / "result.json").read_text()))
    assert found[0]["fingerprint"] == found[1]["fingerprint"]
    assert found[0]["test_fingerprint"] != found[1]["test_fingerprint"]
    table = evaluate.summary([tmp_path])
    assert len(table.splitlines()) == 4


def test_a_clock_that_is_set_back_counts_no_negative_seconds(tmp_path, monkeypatch):
    now = itertools.count(1e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    assert search("lpt", *FIRST, "--epochs", 1, "--out", tmp_path / "run") == 0
    assert log_of(tmp_path / "run")[0]["seconds"] > 0


def test_the_home_folders_sign():
    args, _ = lpt.get_args(["--data=~/x", "--out", "~/y"])
    assert args.data == Path.home() / "x" and args.out == Path.home() / "y"


# ------------------------------------------------------------------------------ several processes


def own_part(batch):
    """A rank's part of a batch."""
    n = len(batch[0]) // ops.world_size()
    return tuple(t[ops.rank() * n:(ops.rank() + 1) * n] for t in batch)


@torch.no_grad()
def settle(net, *inputs):
    """The network in evaluation mode, with its BatchNorm statistics those of the inputs."""
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    net.train()(*inputs)
    net.eval()


def shared_gradients(method):
    """Return A's (and C's) gradients, on supernets in evaluation mode but for the smooth networks;
    each process has its part of the batches."""
    if method == "smooth lpt":
        method, (m, batches), changes = "lpt", lpt_problem(), {}
    else:
        (m, batches), changes = PROBLEMS[method](supernet=True), {"lam": 1.0}
        x = tree_leaves(batches)[0]
        for net in [stage.net for stage in m.stages] if method == "il" else [
                part for part in vars(m).values() if isinstance(part, nn.Module)
                and part is not m.A]:
            settle(net, x, *([m.A] if isinstance(net, ops.Supernet) else []))
        if method == "lpt":
            m.tester_opt.param_groups[0]["lr"] = 1e-4              # small enough in this mode
    parts = [[own_part(b) for b in each] if method == "il" else own_part(each) if isinstance(
        each, tuple) else own_part([each])[0] for each in batches]
    found = gradients(method, m, parts, settings(MODULES[method], **changes))
    return [t.detach() for group in found for t in group]


def worker(job, folder, argv):
    """One of several processes, started by `processes`."""
    if job == "gradients":
        ops.start(arguments(out=folder / "run"))
        torch.save(shared_gradients(*argv), folder / f"{ops.rank()}.pt")
        return
    make_small()
    held, load = [], ops.Run.load
    ops.Run.load = lambda run, parts: (held.append(parts), load(run, parts))
    destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, int
    code = run_script(importlib.import_module(job), *argv)
    torch.save({name: part.state_dict() for name, part in held[-1].items()},
               folder / f"{ops.rank()}.pt")
    destroy()
    sys.exit(code)


def processes(job, folder, *argv, count=2):
    """The started processes of a job."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [subprocess.Popen(
        [sys.executable, __file__, "worker", job, folder, *map(str, argv)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
             "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
        for rank in range(count)]


def finish(started, seconds=120):
    """Each process's exit code, output and error output."""
    try:
        said = [p.communicate(timeout=seconds) for p in started]
        return [(p.returncode, *each) for p, each in zip(started, said)]
    finally:
        for p in started:
            p.kill()


@pytest.mark.parametrize("method", slow_but({0}, ["smooth lpt", *METHODS]))
def test_two_processes_have_one_process_gradients(method, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("gradients")                # with the real ResNet
    started = processes("gradients", tmp_path, method)
    whole = shared_gradients(method)
    results = finish(started)
    assert [r[0] for r in results] == [0, 0], results
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for i, (one, first, second) in enumerate(zip(whole, a, b, strict=True)):
        if one.ndim:
            assert torch.equal(first, second), i
        assert relative_error([(first + second) / 2], [one]) < 1e-10, i    # a loss is averaged


@slow
@pytest.mark.parametrize("job", list(RUNS))
def test_two_processes_stay_equal(job, tmp_path):
    small = [*RUNS[job][1], *(["--tasks", "synthetic:3", "--rounds", 2] if job == "il" else []),
             "--batch-size", 20 if job != "evaluate" else 40, "--epochs", 2]
    results = finish(processes(job, tmp_path, *small, "--out", tmp_path / "run"))
    assert [r[0] for r in results] == [0, 0], results
    assert results[1][1] == "" and "epoch 2" in results[0][1]       # rank 0 alone speaks
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    a, b = ([t for path, t in tree_flatten_with_path(state)[0]      # but BatchNorm's statistics,
             if torch.is_tensor(t) and "running" not in str(path)]  # which are each process's own
            for state in states)
    assert len(a) > 20 and same(a, b)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["run"]["step"] == 10 and saved["world_size"] == 2
    if job == "evaluate":
        assert json.loads((tmp_path / "run" / "result.json").read_text())["test_images"] == 100
    assert run_script(RUNS[job][0], "--resume", "--device", "cpu", "--out",
                      tmp_path / "run") == 2                       # as one process


def test_a_killed_process_ends_the_job(tmp_path):
    started = processes("lpt", tmp_path, *TINY, *FIRST, "--epochs", 500, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert started[0].poll() is None and started[1].poll() is None
        time.sleep(0.1)
    started[1].kill()
    begin = time.time()
    code, *_ = finish(started[:1], 60)[0]
    assert code == 1 and time.time() - begin < 30


def arguments(**changes):
    return argparse.Namespace(**dict(device="cpu", tf32=False, deterministic=False, amp="off",
                                     graphs=False, resume=False, out=Path("nowhere")) | changes)


# ---------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_stays_on_its_device(method, monkeypatch):
    """On torch's meta device, whose tensors have no values: one of another device beside them, or a
    host that asks for a value, is an error."""
    monkeypatch.setattr(ops, "place", lambda net, device: net)
    monkeypatch.setattr(sys.modules[__name__], "moving", lambda net, lr, *_: torch.optim.SGD(
        net.parameters(), lr, 0.9))
    with torch.device("meta"):
        problem = PROBLEMS[method](supernet=True)
    found = gradients(method, *problem, settings(MODULES[method]))
    assert {t.device.type for group in found for t in group} == {"meta"}
    with pytest.raises(RuntimeError, match="not on the expected device"):
        found[0][0] + torch.ones(14, 8)


def test_replicas_compute_in_bfloat16_and_drop_their_own_paths(monkeypatch):
    """What DataParallel's threads do: they have neither the caller's autocast nor its seed."""
    network = evaluate.Network(genotypes.load("LPT_PDARTS"), 4, 5, 3, amp=True)
    seen = []
    network.cells[0].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    thread = threading.Thread(target=network, args=(torch.randn(2, 3, 32, 32),))
    thread.start(), thread.join()
    assert seen == [torch.bfloat16]
    devices = [torch.Generator() for _ in range(3)]
    monkeypatch.setattr(torch.cuda, "default_generators", devices)
    ops.seed_all("step", 1, 2)
    assert len({g.initial_seed() for g in devices}) == 3
    assert ops.mixed_seed("a", 1, 0) != ops.mixed_seed("a", 1) != ops.mixed_seed("b", 1)
    first = devices[0].initial_seed()
    ops.seed_all("step", 1, 2)
    assert devices[0].initial_seed() == first


@pytest.mark.parametrize("module,argv,passes", slow_but({0, 3}, [    # off, bf16, bf16-all
    (lpt, [*TINY, *FIRST], (0, 2, 4)), (lease, [*LEASE, *FIRST], (0, 6, 16)),
    (il, [*SMALL, *FIRST, "--tasks", "synthetic:3", "--rounds", 1], (0, 2, 4)),
    (evaluate, [*TINY, "--arch", "random:1"], (0, 18))]), ids=["lpt", "lease", "il", "evaluate"])
def test_what_amp_computes_in_bfloat16(module, argv, passes, tmp_path, monkeypatch):
    """A search's passes of its network in 2 steps, those that train weights or A's too; evaluate's
    of 3 cells, in 4 steps and 2 batches of the test."""
    seen, part = [], evaluate.Cell if module is evaluate else ops.Supernet
    forward = part.forward
    monkeypatch.setattr(part, "forward", lambda *args: (
        seen.append(torch.is_autocast_enabled("cpu")), forward(*args))[1])
    for level, count in zip(("off", "bf16", "bf16-all"), passes):
        seen.clear()
        assert run_script(module, *argv, "--epochs", 1, "--amp", level, "--out",
                          tmp_path / level) == 0
        assert sum(seen) == count


class Recorder(TorchDispatchMode):
    """Records operators as a CUDA graph does: with the numbers that they are given, in place; what
    a graph cannot hold is an error. Recording leaves no trace: tensors are put back."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "equal", "lift_fresh"):      # host and device
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for t in tree_leaves((args, kwargs)):
            if torch.is_tensor(t) and storage(t) not in self.made:
                self.before.setdefault(storage(t), (t, t.clone()))
        out = op(*args, **kwargs)
        given = {storage(t) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        made = [t for t in tree_leaves(out) if torch.is_tensor(t) and storage(t) not in given]
        self.made |= {storage(t) for t in made}
        self.calls.append((op, *tree_map(lambda t: t.detach() if torch.is_tensor(t) else t,
                                         (args, kwargs, out))))    # the memory, not the object
        return out


def storage(t):
    return t.untyped_storage().data_ptr()


class StandIn:
    """torch.cuda.CUDAGraph on a CPU: a replay repeats the recorded operators on their tensors."""
    made = []

    def __init__(self):
        self.calls, self.replays = [], 0
        StandIn.made.append(self)

    def pool(self):
        return self

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for op, args, kwargs, out in self.calls:
            given = {storage(t) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs))):
                if torch.is_tensor(old) and storage(old) not in given:
                    old.copy_(new)


@contextlib.contextmanager
def recording(graph, pool=None, capture_error_mode="global"):
    """torch.cuda.graph for StandIn."""
    assert pool is None or pool in StandIn.made and capture_error_mode == "thread_local"
    seed, recorder = torch.get_rng_state(), Recorder()
    try:
        with recorder:
            yield
    finally:
        torch.set_rng_state(seed)
        with torch.no_grad():
            for t, before in recorder.before.values():
                t.copy_(before)
    graph.calls = recorder.calls


@pytest.fixture
def graphs(monkeypatch):
    """--graphs on a CPU. Yields the graphs that were made."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(ops, "refuse_graphs", lambda *args: None)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn.made


GRAPHED = {"lpt": (lpt, [*TINY, *FIRST, "--base", "darts-"], 3), "lease": (lease, LEASE, 2),
           "il": (il, RUNS["il"][1], 2),
           "evaluate": (evaluate, [*RUNS["evaluate"][1], "--arch", "LPT_PDARTS"], 1)}


@pytest.mark.parametrize("job", slow_but({0, 3}, list(GRAPHED)))
def test_a_replayed_run_ends_with_an_eager_ones_bits(job, graphs, tmp_path, monkeypatch):
    """Two epochs of four steps: each pass runs once as new momenta and new rates come, is recorded
    in the next step, and replayed. So it is in a run that is cut within an epoch."""
    module, argv, passes = GRAPHED[job]
    argv = [*argv, "--batch-size", 25 if job != "evaluate" else 50, "--epochs", 2,
            "--checkpoint-minutes", 0]
    assert run_script(module, *argv, "--out", tmp_path / "eager") == 0
    assert run_script(module, *argv, "--graphs", "--out", tmp_path / "graphs") == 0
    assert [each.replays for each in graphs] == [3] * passes * 2
    interrupted(module, [*argv, "--graphs"], tmp_path / "cut", monkeypatch, 3)
    assert run_script(module, "--resume", "--graphs", "--out", tmp_path / "cut") == 0
    eager, *others = (finals(tmp_path / name) for name in ("eager", "graphs", "cut"))
    for found in others:
        found = dict(zip(found[::2], found[1::2]))
        assert same([*found.values()], [v for k, v in zip(eager[::2], eager[1::2]) if k in found])


def test_graphs_are_refused_by_name(monkeypatch):
    """What there is no replay for, before a run begins."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for module, argv, device, why in (
            (lpt, [], cpu, "needs a CUDA GPU"), (lpt, ["--base", "pdarts"], gpu, "base pdarts"),
            (il, ["--gradient", "exact"], gpu, "--gradient exact"),
            (evaluate, ["--arch", "LPT_PDARTS"], gpu, "exactly one visible GPU")):
        with pytest.raises(ops.BadInput, match=f"--graphs: .*{why}"):
            ops.refuse_graphs(module.get_args([*argv, "--graphs"])[0], device)
    ops.refuse_graphs(lease.get_args(["--graphs", "--base", "pcdarts"])[0], gpu)


if __name__ == "__main__":              # a process that a test has started
    task, job, *rest = sys.argv[1:]
    if task == "worker":
        worker(job, Path(rest[0]), rest[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(kills(job, Path(folder), int(rest[0]))))
