"""Print what measurements.md reports; the checks are in test_smoke.py.

    python .ci/measure.py --bench [--device cuda] [--peers DIR] [--data DIR]
    python .ci/measure.py --worth [--data DIR DIR]
    python .ci/measure.py --starts [--data DIR]
    python .ci/measure.py --calls
    python .ci/measure.py --labels 3 [--data DIR]
    python .ci/measure.py --mechanisms 5 [--data DIR DIR]
    python .ci/measure.py --curves runs > curves.svg
    python .ci/measure.py --soak

--bench   Markdown tables: the time, memory and operator calls of a step of each method beside the
          per-edge supernet (and, with --peers, beside the originals), the least time that the
          device's own rates allow such a step, and 1 - cosine of each method's outer gradient at
          lower precision with float64's.
--worth   how well gradients of A by several ways predict the change of the objective where A moves,
          and how far the objective falls along each, in reduced searches.
--starts  whether LeaSE's gradient from one start of delta descends the objective at others.
--calls   the operator calls of a first step of each script at the defaults' sizes.
--labels  whether LPT's tester weighs wrong labels less, for several lambda, as AUC over seeds.
--mechanisms  a table: is LPT's test harder than its bank, and what is the created test's share;
          do IL's learners stay close and learn as well as JL's; does LeaSE mark the object.
--curves  LPT's test errors over lambda and gamma, from runs that are there, as an SVG.
--soak    a line per script after 150 kills (or as many as given), how many of 2,000 damages of a
          checkpoint are seen, and how memory grows in 180 steps.
"""

import argparse
import contextlib
import copy
import importlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import darts_ops as ops
import evaluate
import genotypes
import il
import lease
import lpt
import test_smoke as tests
from test_smoke import cosine

# ------------------------------------------------------------------------ other people's networks


def peer(folder, *names):
    """Import modules of somebody else's folder beside ours of the same names."""
    stems = [path.stem for path in folder.glob("*.py")]
    ours = {name: sys.modules.pop(name) for name in stems if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in stems:
            sys.modules.pop(name, None)
        sys.modules.update(ours)


def peer_modules(whose, peers, device, *names):
    """Import a peer's modules; without a GPU .cuda() then returns what it is called on."""
    if device.type == "cpu":
        nn.Module.cuda = torch.Tensor.cuda = lambda self, *args, **kwargs: self
    warnings.simplefilter("ignore")                                # they are of 2018 and 2021
    return peer(peers / {"quark0": "darts/cnn", "authors": "LPT-COVIDx/darts-LPT"}[whose], *names)


RATES = dict(learning_rate=0.025, momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-4,
             arch_weight_decay=1e-3, weight_gamma=1.0, weight_lambda=1.0, weight_decay_w=3e-4,
             weight_decay_h=3e-4, model_v_learning_rate=3e-4, model_v_weight_decay=1e-3,
             teacher_arch="18", is_cifar100=1)


def sgd(module):
    return torch.optim.SGD(module.parameters(), 0.025, 0.9, weight_decay=3e-4)


def lpt_step(m, alpha_opt, creator_opt, batches):
    """Repeat the body of lpt.py's loop on the same batches."""
    ga, gc = lpt.outer_gradients(m, batches)[:2]
    ops.descend(alpha_opt, ga), ops.descend(creator_opt, [-g for g in gc])
    for opt, loss, clip in (
            (m.tester_opt, lpt.tester_loss(m.tester, m.creator, batches, 1.0, 0), None),
            (m.testee_opt, F.cross_entropy(m.testee(batches[0][0], m.alphas), batches[0][1]), 5.0)):
        weights = opt.param_groups[0]["params"]
        ops.descend(opt, ops.grad(loss, weights), "a learner", loss, clip)


def il_step(stages, alphas, alpha_opt, train, val):
    grads = tests.stage_gradients(stages, alphas, train)
    g, _ = il.outer_gradient(stages, alphas, train, val, 100.0, "proximal", 2, grads)
    il.update_weights(stages, grads, [torch.zeros(())] * len(grads), 100.0, "proximal", clip=5.0)
    ops.descend(alpha_opt, g)


def authors_step(modules, device, x, y):
    """Return one step of the LPT authors' search, by their own classes."""
    model_search, architect_ts, teacher, updater = modules
    args, criterion = types.SimpleNamespace(**RATES), nn.CrossEntropyLoss()
    model = model_search.Network(16, 100, 8, criterion).to(device)
    w, h, v = (teacher.resnet18().to(device), nn.Linear(512, 100).to(device),
               nn.Linear(512, 2).to(device))
    opt, opt_w, opt_h = map(sgd, (model, w, h))
    architect, creator = architect_ts.Architect(model, args), updater.Teacher_Updater(w, h, v, args)

    def step():
        architect.step(x, y, x, y, 0.025, opt, w, v, unrolled=True)
        creator.step(criterion, x, y, x, y, x, y, 0.025, 0.025, opt, opt_w, opt_h, model,
                     unrolled=True)
        opt_w.zero_grad(), opt_h.zero_grad()
        features = w(x)
        f = v(features).softmax(1)[:, 1]
        (criterion(h(w(x)), y) + (f * F.cross_entropy(h(features), y, reduction="none")).mean()
         ).backward()
        opt_w.step(), opt_h.step()
        weight_step(model, opt, lambda: criterion(model(x), y))
    return step


def weight_step(model, opt, loss):
    opt.zero_grad()
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    opt.step()


def workload(kind, device, peers=None):
    """Return one step to time, for kind "what: whose"."""
    torch.manual_seed(0)
    what, _, whose = kind.partition(": ")
    x, y = torch.randn(16, 3, 32, 32, device=device), torch.randint(100, (16,), device=device)
    alphas = ops.initial_alphas(device)
    alpha_opt = torch.optim.Adam(alphas, 3e-4, (0.5, 0.999), weight_decay=1e-3)
    if whose == "authors":
        modules = peer_modules(whose, peers, device, "model_search", "architect_ts", "teacher",
                               "teacher_update")
        return authors_step(modules, device, x, y)
    if whose == "quark0" and what != "evaluation":
        search, architect = peer_modules(whose, peers, device, "model_search", "architect")
        model = search.Network(16, 100, 8, nn.CrossEntropyLoss()).to(device)
        opt, architect = sgd(model), architect.Architect(model, types.SimpleNamespace(**RATES))

        def weights():
            weight_step(model, opt, lambda: model._loss(x, y))

        def step():
            architect.step(x, y, x, y, 0.025, opt, unrolled=True)
            weights()
        return weights if what == "supernet" else step
    if whose == "quark0":
        model, cells = peer_modules(whose, peers, device, "model", "genotypes")
        net = model.NetworkCIFAR(36, 100, 20, True, cells.DARTS_V2).to(device)
        net.drop_path_prob, opt = 0.0, sgd(net)

        def loss():
            logits, auxiliary = net(x)
            return F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(auxiliary, y)
        return lambda: weight_step(net, opt, loss)

    x = x.contiguous(memory_format=ops.memory_format(device))

    def supernet(C=16, layers=8):
        if whose == "per edge":
            return tests.NaiveSupernet(C, 100, layers).to(device)
        return ops.place(ops.Supernet(C, 100, layers), device)
    if what == "evaluation":
        net = ops.place(evaluate.Network(genotypes.load("DARTS_V2"), 36, 100, 20), device)
        opt = sgd(net)

        def step():
            logits, auxiliary = net(x)
            loss = F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(auxiliary, y)
            loss.backward()
            weights = opt.param_groups[0]["params"]
            ops.descend(opt, [w.grad for w in weights], "the network", loss, 5.0)
        return step
    if what == "supernet":
        net = supernet()
        opt = sgd(net)
        return lambda: weight_step(net, opt, lambda: F.cross_entropy(net(x, alphas), y))
    if what == "LPT":
        testee, tester = supernet(), ops.place(lpt.Tester("resnet18", 100), device)
        creator = list(nn.Linear(512, 1).to(device).parameters())
        m = lpt.Learners(testee, alphas, sgd(testee), tester, creator, sgd(tester))
        creator_opt = torch.optim.Adam(creator, 3e-4, weight_decay=1e-3)
        return lambda: lpt_step(m, alpha_opt, creator_opt, [(x, y, None)] * 3)
    rounds = int(whose) if what == "IL" else None                  # else second-order DARTS
    nets = [supernet(8, 4) for _ in range(2 * rounds)] if rounds else [supernet()]
    stages = [il.Learner(l % 2, net, sgd(net)) for l, net in enumerate(nets)]
    val = [(x, y)] * min(2, len(nets))
    return lambda: il_step(stages, alphas, alpha_opt, [(x, y)] * len(stages), val)


def resident():
    """Return this process's largest resident memory so far, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory(kind, device, peers):
    """Return memory_here of a workload, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--memory-of", kind, "--device", str(device),
                           *(["--peers", str(peers)] if peers else [])],
                          capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory_here(kind, device, peers):
    """Return the MiB that two steps of a workload add to what this process had."""
    step = workload(kind, device, peers)
    before = 0 if device.type == "cuda" else resident()
    step(), step()
    return ops.peak_memory(device) if device.type == "cuda" else resident() - before


class Calls(TorchDispatchMode):
    """Count the operator calls that are not views, the bytes that they read and write, and the
    multiplications and additions of convolutions and matrix products."""
    count = bytes = flops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not op.is_view:
            self.count += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out))
                              if torch.is_tensor(t))
        if op == torch.ops.aten.convolution.default:
            self.flops += 2 * out.numel() * args[1][0].numel()
        elif op == torch.ops.aten.convolution_backward.default:
            self.flops += 2 * args[0].numel() * args[2][0].numel() * sum(args[10][:2])
        elif op == torch.ops.aten.mm.default:
            self.flops += 2 * out.numel() * args[0].shape[1]
        return out


def timed(step, device):
    """Return the seconds of a step, until the device has done it."""
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def interleaved(kinds, count, device, peers):
    """Return per workload the median of `count` steps timed in turn, and the first step's time."""
    steps = {kind: workload(kind, device, peers) for kind in kinds}
    seconds = {kind: [] for kind in kinds}
    for _ in range(count + 1):
        for kind, step in steps.items():
            seconds[kind].append(timed(step, device))
    return {kind: (statistics.median(values[1:]), values[0]) for kind, values in seconds.items()}


def bench_floor(device):
    """Print how long a pass takes if its multiplications run at the rate of a large matrix product,
    or its operators read and wrote at the rate of a large copy."""
    a, large = torch.randn(2048, 2048, device=device), torch.randn(2, 2 ** 26, device=device)
    rates = {}
    for name, step, work in (("GFLOP", lambda: a @ a, 2 * 2048 ** 3),
                             ("GB", lambda: large[0].copy_(large[1]), large.nbytes)):
        rates[name] = work / 1e9 / min(timed(step, device) for _ in range(9))
    print("| step | GFLOP | at a matrix product's rate, s | GB | at a copy's rate, s |\n"
          "|---|---|---|---|---|")
    for kind in ("supernet: ours", "DARTS: ours", "LPT: ours", "evaluation: ours"):
        step = workload(kind, device)
        with Calls() as calls:
            step()
        work, moved = calls.flops / 1e9, calls.bytes / 1e9
        print(f"| {kind} | {work:.1f} | {work / rates['GFLOP']:.2f} | {moved:.2f} | "
              f"{moved / rates['GB']:.2f} |", flush=True)
    print("\nmeasured rates: " + ", ".join(f"{rate:.0f} {name}/s" for name, rate in rates.items()))


def bench_speed(device, peers, count=5):
    """Print the time, memory and calls of a step as Markdown tables."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}\n")
    others = {"supernet": ["quark0"], "DARTS": ["quark0"], "LPT": ["authors"],
              "evaluation": ["quark0"]} if peers else {}
    for what, title in (("supernet", "weight step of the supernet, C 16, 8 cells, batch 16"),
                        ("DARTS", "step of second-order DARTS (IL, one task and round), the same"),
                        ("LPT", "step of LPT, the same with ResNet-18"),
                        ("evaluation", "weight step of evaluate.py, C 36, 20 cells, batch 16"),
                        ("IL", "step of IL, K = 2, C 8, 4 cells, batch 16, by rounds M")):
        whose = others.get(what, []) + (["1", "2", "4"] if what == "IL" else
                                        ["per edge", "ours"] if what != "evaluation" else ["ours"])
        kinds = [f"{what}: {who}" for who in whose]
        seconds, first = interleaved(kinds, count, device, peers), None
        print(f"| {title} | s | ratio | MiB | ratio | calls | first, s |", "|---" * 7 + "|",
              sep="\n")
        for kind in kinds:
            step = workload(kind, device, peers)
            with Calls() as calls:
                step()
            line = seconds[kind][0], memory(kind, device, peers)
            first = first or line
            print(f"| {kind.split(': ')[1]} | {line[0]:.3g} | {line[0] / first[0]:.2f} | "
                  f"{line[1]:.0f} | {line[1] / first[1]:.2f} | {calls.count} | "
                  f"{seconds[kind][1]:.3g} |", flush=True)
        print()


def bench_precision(data_dir, device):
    """Print how far the outer gradient's direction is from float64's at the same radius."""
    data = ops.load_images("folder" if data_dir else "synthetic", data_dir, device)
    n, settings = len(data.classes), {"float32": (False, False), "--amp bf16": (True, False),
                                      "--amp bf16-all": (True, True)}
    if device.type == "cuda":
        settings["--tf32"] = (False, False)
    rows = ops.split_rows(data.labels, 1)
    streams = [ops.Stream(data, rows[name != "train"], 16, 1, name)
               for name in ("train", "bank", "val")]
    print(f"1 - cosine of the outer gradient with float64's, radius 0.01, order 2, C 8, 4 cells, "
          f"batch 16, {data_dir or 'synthetic images'}\n")
    print("| | " + " | ".join(settings) + " |\n|---" + "|---" * len(settings) + "|")
    for method, when in itertools.product(("LPT", "IL", "LeaSE"), (0, 30)):
        torch.manual_seed(1)
        nets = [ops.place(ops.Supernet(8, n, 4), device) for _ in range(2 if method == "IL" else 1)]
        other = ops.place(lpt.Tester("resnet18", n) if method == "LPT" else
                          torchvision.models.resnet18(num_classes=n), device)
        alphas = ops.initial_alphas(device)
        creator = list(nn.Linear(512, 1).to(device).parameters())
        for step in range(when):                                   # of the weights alone
            x, y, _ = streams[0](step)
            for net in [*nets, other]:
                logits = net(x, alphas) if net is not other else net(x)
                loss = F.cross_entropy(logits[0] if method == "LPT" and net is other else logits, y)
                w = list(net.parameters())
                opt = torch.optim.SGD(w, 0.025)
                ops.descend(opt, ops.grad(loss, w), "a learner", loss, 5.0)

        def gradients(dtype, train, outer):
            def cast(tensors):
                return [nn.Parameter(t.detach().to(dtype)) for t in tensors]
            *mine, his = [copy.deepcopy(net).to(dtype) for net in [*nets, other]]
            opts = [torch.optim.SGD(net.parameters(), 0.025) for net in [*mine, his]]
            a, c = cast(alphas), cast(creator)
            batches = [(x.to(dtype), y, i) for x, y, i in (stream(100) for stream in streams)]
            (x, y), val = batches[0][:2], batches[2][:2]
            if method == "LPT":
                with ops.autocast(device, outer):
                    return lpt.outer_gradients(lpt.Learners(mine[0], a, opts[0], his, c, opts[1]),
                                               batches)[:2]
            if method == "IL":
                stages = [il.Learner(0, net, opt) for net, opt in zip(mine, opts)]
                with ops.autocast(device, train):
                    grads = tests.stage_gradients(stages, a, [(x, y)] * 2)
                with ops.autocast(device, outer):
                    return il.outer_gradient(stages, a, [(x, y)] * 2, [val], 100.0,
                                             "proximal", 2, grads)[:1]
            m = lease.Learners(mine[0], a, opts[0], his, opts[1])
            delta = lease.random_delta(x.shape, 0.01, device, 1, 0).to(dtype)
            with ops.autocast(device, train):
                ahead = tests.lease_ahead(m, (x, y), delta)
            with ops.autocast(device, outer):
                return lease.outer_gradient(m, (x, y), val, delta, 1.0, "signed", 2, *ahead)[:1]

        exact, found = gradients(torch.float64, False, False), {}
        for name, (train, outer) in settings.items():
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = "tf32" in name
            found[name] = gradients(torch.float32, train, outer)
        for i, player in enumerate("AC"[:len(exact)]):
            cells = [f"{1 - cosine(got[i], exact[i]):.1e}" for got in found.values()]
            print(f"| {method}, {player}, after {when} steps | " + " | ".join(cells) + " |",
                  flush=True)


# ------------------------------------------------------------------------------------ the studies

REDUCED = ["--image-size", "16", "--layers", "3", "--channels", "4", "--batch-size", "50",
           "--alpha-lr", "6e-3", "--device", "cpu"]


def reduced_search(module, argv, *patches):
    """Run a script's search at REDUCED, attributes replaced, its words kept out of a table."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for owner, name, value in patches:
            patch.setattr(owner, name, value)
        patch.setattr("builtins.print", lambda *args, **kw: None)
        module.main([*argv, *REDUCED, "--out", folder])


# LeaSE's setting in the studies: the paper's one radius, and A learns from the first step
ONE_RADIUS = ["--delta-scale", "0.01", "--delta-radius", "0.01", "--warm-up", "0"]
MOVES = 4.5e-3, 0.09        # Adam's first step along 2 x 14 x 8 alphas, at rates 3e-4 and 6e-3


def data_sets(folders):
    """Return the names of the data sets that a study runs on."""
    return [f"folder:{folder}" for folder in folders] or ["synthetic:10", "synthetic:5"]


def spread(values):
    """Return mean and standard deviation as text."""
    deviation = f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{deviation}"


class Enough(Exception):
    """Ends a search that has been watched for long enough."""


def vector(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def by_difference(module, problem, radius=1e-2, order=2, gamma=None, delta_radius=None):
    """Return A's gradient by a method's difference code; gamma replaces LeaSE's, delta_radius is
    its own."""
    problem, ahead = list(problem), []
    problem[2 if module is lpt else 6] = order
    if module is il:
        ahead = [tests.stage_gradients(*problem[:3])]
    elif module is lease:
        problem[4] = problem[4] if gamma is None else gamma
        ahead = tests.lease_ahead(problem[0], problem[1], problem[3], *problem[5:])

    outer = lpt.outer_gradients if module is lpt else module.outer_gradient
    radii = [radius, delta_radius] if module is lease else [radius]
    return vector(outer(*problem, *ahead, *radii)[0])


def worth(values, alphas, parts, count, seed):
    """Yield (part, row, column, number): how well gradients predict the objectives that values()
    returns, one per part, where A moves.

    parts: name -> {column: gradient}. R2 and correlation are over `count` random directions; what
    the kinks add, the same to all of them where it is the start's, lowers R2 alone. Rounding: the
    largest change where A moves by 1e-5, which should be nothing. Leaves A as it is.
    """
    start, base = vector(alphas), values()

    def changes(move):
        nn.utils.vector_to_parameters(start + move, alphas)
        return [(moved - before).item() for moved, before in zip(values(), base)]

    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(count, len(start), generator=generator))
    rounding = torch.tensor([changes(1e-5 * d) for d in directions[:3]]).abs().amax(0)
    for part, value in zip(parts, rounding.tolist()):
        yield part, "rounding", "exact", value
    for length in MOVES:
        true = torch.tensor([changes(length * d) for d in directions])
        for (part, gradients), t in zip(parts.items(), true.T):
            for column, g in gradients.items():
                predicted = length * directions @ g
                missed = (t - predicted).square().sum() / (t - t.mean()).square().sum()
                yield part, f"R2, moves of {length:g}", column, 1 - missed.item()
                correlation = torch.corrcoef(torch.stack([t, predicted]))[0, 1].item()
                yield part, f"correlation, moves of {length:g}", column, correlation
    for i, (part, gradients) in enumerate(parts.items()):
        for column, g in gradients.items():
            yield part, f"descent of {length:g}: promised", column, -length * g.norm().item()
            yield part, "true", column, changes(-length * F.normalize(g, dim=0))[i]
            yield part, "norm of the gradient", column, g.norm().item()
            yield part, "its cosine with exact", column, cosine([g], [gradients["exact"]])
    nn.utils.vector_to_parameters(start, alphas)


def plain_case(module, problem):
    """Return what worth takes, of LPT and IL."""
    stages, validation, (alphas, *_) = module.formulation(*problem)
    exact = lpt.exact_gradients if module is lpt else il.exact_gradient
    gradients = {"order 1": by_difference(module, problem, order=1),
                 "exact": vector(exact(*problem)[0]),
                 **{f"{r:g}": by_difference(module, problem, r) for r in (0.01, 0.1, 1)}}
    if module is lpt:                    # the tester learns the same wherever A is: once is enough
        tester = []
        ops.skillearn(stages, lambda learned: [tester.append(learned["tester"])], [], exact=False)
        testee, validate = stages[0], validation
        stages, validation = [testee], lambda learned: validate(learned | {"tester": tester[0]})
    return lambda: ops.skillearn(stages, validation, [], exact=False)[0][:1], alphas, {
        "objective": gradients}


def lease_case(problem):
    """Return what worth takes, of LeaSE: its objective, and the audience's part of it alone."""
    m, _, (x, y), _, gamma, *_ = problem
    (explainer, *others), validation, (alphas,) = lease.formulation(*problem)
    sizes = lease.step_sizes

    def own(learned):
        return [F.cross_entropy(ops.call(m.explainer, learned["explainer"], x, m.alphas), y)]

    def values():
        def both(learned):
            (J,), (mine,) = validation(learned), own(learned)
            return [J, J - mine, mine]
        return ops.skillearn([explainer, *others], both, [], exact=False)[0]

    whole = {"order 1": by_difference(lease, problem, order=1),
             "exact": vector(lease.exact_gradient(*problem)[0])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "step_sizes", lambda g: sizes(g).detach())
        whole["exact, xi held"] = vector(lease.exact_gradient(*problem)[0])
    exact = vector(ops.skillearn([explainer], own, [alphas])[1])
    without = {"exact": exact, "exact, xi held": exact,
               "order 1": by_difference(lease, problem, order=1, gamma=0.0)}
    whole["0.01"] = by_difference(lease, problem)
    without["0.01"] = by_difference(lease, problem, gamma=0.0)
    for total in (1, 10):
        whole[f"0.01, of delta {total}"] = by_difference(lease, problem, delta_radius=total)
    heard = {column: g - without.get(column, without["0.01"]) for column, g in whole.items()}
    return values, alphas, {"objective": whole, "the audience's part": heard,
                            "the explainer's part": {"exact": exact}}


def at_steps(module, argv, moments, batches, measure, end):
    """Run a reduced search; in each of so many steps from every moment on call measure(step, the
    problem of A's gradient), after the last of them end(moment)."""
    function = "outer_gradients" if module is lpt else "outer_gradient"
    real, step = getattr(module, function), itertools.count()

    def watched(*args):
        now = next(step)
        when = next((w for w in moments if w <= now < w + batches), None)
        if when is not None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, function, real)
                measure(now, list(copy.deepcopy(args[:7])))
            if now == when + batches - 1:
                end(when)
            if now == moments[-1] + batches - 1:
                raise Enough
        return real(*args)

    with contextlib.suppress(Enough):
        reduced_search(module, [*argv, "--epochs", "20"], (module, function, watched))


def study_worth(folders, count=12, batches=5, *moments):
    """Print what gradients of A are worth to a search: R2 of the change that they predict where A
    moves in random directions, and how far it falls along minus themselves; mean and deviation over
    consecutive steps' batches, after so many steps of a reduced search. All in its float32."""
    tasks = data_sets(folders)
    moments, one = moments or (0, 50, 200), ["--dataset", tasks[0]]
    for name, module, argv in (("LPT", lpt, one), ("LeaSE", lease, [*one, *ONE_RADIUS]),
                               ("IL", il, ["--tasks", *tasks])):
        found = {}

        def measure(now, problem):
            for scale in (0.01, 0.3) if module is lease else ("",):
                at = list(problem)
                if scale:
                    at[3] = at[3] * scale / 0.01
                case = lease_case(at) if scale else plain_case(module, at)
                for part, row, column, value in worth(*case, count, now):
                    title = f"{part}{scale and f', start {scale}'}"
                    rows = found.setdefault(title, {}).setdefault(row, {})
                    rows.setdefault(column, []).append(value)

        def end(when):
            print_worth(f"{name} after {when} steps", found)
            found.clear()

        at_steps(module, argv, moments, batches, measure, end)


def study_starts(folders, count=4, batches=5, *moments):
    """Print whether LeaSE's gradient from some starts of delta descends the objective at others:
    its change by a move of 0.09 along minus the gradient of one start, of so many, and of the
    explainer's part alone, at the starts that it was taken at and at as many fresh ones; the cosine
    of two starts' gradients. At the defaults, but A learns from the first step."""
    found, (defaults, _) = {}, lease.get_args([])

    def note(row, column, value):
        found.setdefault(row, {}).setdefault(column, []).append(value)

    def measure(now, problem):
        deltas = [lease.random_delta(problem[3].shape, defaults.delta_scale, problem[3].device,
                                     now, i) for i in range(2 * count)]
        alphas = problem[0].alphas
        start = vector(alphas)

        def at(delta):
            return [*problem[:3], delta, *problem[4:]]

        def objective(deltas):
            return statistics.mean(ops.skillearn(*lease.formulation(*at(delta)), exact=False)[0][0]
                                   .item() for delta in deltas)

        ways = {"the explainer's part": (by_difference(lease, at(deltas[0]), gamma=0.0), count)}
        for name, gradient in (("exact", lambda delta: vector(lease.exact_gradient(*at(delta))[0])),
                               ("difference", lambda delta: by_difference(
                                   lease, at(delta), delta_radius=defaults.delta_radius))):
            each = [gradient(delta) for delta in deltas[:count]]
            ways |= {f"{name}, one start": (each[0], 1),
                     f"{name}, mean of {count}": (sum(each) / count, count)}
            note("cosine of two starts", f"{name}, one start", cosine([each[0]], [each[1]]))
        for column, (g, starts) in ways.items():
            own, fresh = deltas[:starts], deltas[count:]
            before = objective(own), objective(fresh)
            nn.utils.vector_to_parameters(start - MOVES[1] * F.normalize(g, dim=0), alphas)
            note("promised", column, -MOVES[1] * g.norm().item())
            note("at its starts", column, objective(own) - before[0])
            note("at fresh ones", column, objective(fresh) - before[1])
            nn.utils.vector_to_parameters(start, alphas)

    def end(when):
        print_worth(f"LeaSE after {when} steps", {"objective": found})
        found.clear()

    at_steps(lease, ["--dataset", data_sets(folders)[0], "--warm-up", "0"], moments or (0, 50, 200),
             batches, measure, end)


def print_worth(title, found):
    """Print a table for each part of an objective."""
    for part, rows in found.items():
        columns = max(rows.values(), key=len)
        sys.stdout.write(f"| {title}: {part} | " + " | ".join(columns) + " |\n"
                         + "|" + "---|" * (len(columns) + 1) + "\n")
        for row, cells in rows.items():
            sys.stdout.write(f"| {row} | " + " | ".join(
                spread(cells[column]) if column in cells else "" for column in columns) + " |\n")
        sys.stdout.write("\n")
    sys.stdout.flush()


def count_calls():
    """Print the operator calls of a first step at the defaults' sizes, and how often its host waits
    for the device, as a Markdown table."""
    size = ["--image-size", 32, "--epochs", 1]
    search = [*size, "--layers", 8, "--channels", 16, "--batch-size", 64, "--warm-up", 0]
    one, many = ["--dataset", "synthetic:10"], ["--tasks", "synthetic:10", "synthetic:5"]
    synthetic = ops.synthetic

    def few(*args, **kw):
        """Images for one step."""
        data = synthetic(*args, **kw)
        data.images, data.labels = data.images[:128], data.labels[:128]
        return data

    print("| a step of | calls | waits |\n|---|---|---|", flush=True)
    for name, module, argv in (
            ("lpt", lpt, [*one, *search]),
            ("lpt --base pcdarts", lpt, [*one, *search, "--base", "pcdarts"]),
            ("il, one task and round", il, [*many[:2], "--rounds", 1, *search]),
            ("il", il, [*many, *search]),
            ("lease", lease, [*one, *search]),
            ("evaluate", evaluate, [*one, "--arch", "DARTS_V2", "--batch-size", 96, *size])):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "synthetic", few)
            patch.setattr(ops.Run, "last_step", lambda run: False)     # which looks at A's step too
            patch.setattr("builtins.print", lambda *args, **kw: None)
            waits, calls = tests.steps_abroad(module, argv, Path(folder))[0]
        print(f"| {name} | {calls} | {waits} |", flush=True)


LABELS = [["--ablation", "1"], *(["--lambda", lam] for lam in ("0", "0.1", "0.5", "1", "2", "5"))]


def labels_auc(f, rows, wrong):
    """Return how often a rightly labelled image weighs more than a wrongly labelled one; f: of the
    images `rows`, wrong: of all."""
    bad = wrong[torch.as_tensor(rows)]
    return tests.auc(f[bad], f[~bad])


def study_labels(folders, seeds, settings=LABELS, epochs=2):
    """Print whether LPT weighs wrongly labelled images less than the others: AUC (1: all of them
    less, 0.5: no telling, 0: all more) after every epoch of a search."""
    dataset = data_sets(folders)[0]
    shares = ["--subsets", "0.2", "0.2"] if folders else []
    load, picture, found, wrong = ops.load_images, lpt.tests, [], {}

    def planted(*args, **kw):
        """The images with the truth about their labels; in real ones every tenth is replaced."""
        data = load(*args, **kw)
        n, classes, rng = len(data.labels), len(data.classes), np.random.default_rng(7)
        if folders:
            true = data.labels.clone()
            rows = torch.from_numpy(rng.choice(n, n // 10, False))
            data.labels[rows] += torch.from_numpy(rng.integers(1, classes, n // 10))
            data.labels %= classes
        else:
            true = tests.synthetic_truth(classes, 16)
        wrong["rows"] = data.labels != true
        return data

    def watched(data, rows, f):
        found.append(labels_auc(f, rows, wrong["rows"]))
        return picture(data, rows, f)

    print(f"{dataset}, {seeds} seeds: AUC after each epoch\n\n| |"
          + "".join(f" {epoch + 1} |" for epoch in range(epochs)) + "\n|" + "---|" * (epochs + 1),
          flush=True)
    for setting in settings:
        found.clear()
        for seed in range(1, seeds + 1):
            reduced_search(lpt, ["--dataset", dataset, *shares, *setting, "--epochs", str(epochs),
                                 "--seed", str(seed)],
                           (ops, "load_images", planted), (lpt, "tests", watched))
        by_epoch = [found[i::epochs] for i in range(epochs)]
        cells = [f"{statistics.mean(v):.3f}" + (f" ± {statistics.stdev(v):.3f}" if seeds > 1
                                                else "") for v in by_epoch]
        print(f"| {' '.join(setting)} | " + " | ".join(cells) + " |", flush=True)


MECHANISMS = {
    "LPT": (lpt, ["--dataset", "{0}"]),
    "LPT, normalized": (lpt, ["--dataset", "{0}", "--created-test", "normalized"]),
    "IL": (il, ["--tasks", "{0}", "{1}"]),
    "JL": (il, ["--tasks", "{0}", "{1}", "--joint"]),
    "LeaSE": (lease, ["--dataset", "{0}", *ONE_RADIUS]),
    "LeaSE, gamma 0": (lease, ["--dataset", "{0}", *ONE_RADIUS, "--gamma", "0"]),
    "LeaSE, magnitude": (lease, ["--dataset", "{0}", *ONE_RADIUS, "--weighting", "magnitude"])}


def created_test_figures(m, batches, order, lam, gamma, ablation, created, *radius):
    """Yield what LPT's created test is, at the weights; the arguments: outer_gradients'."""
    w, ex = list(m.testee.parameters()), list(m.tester.parameters())
    _, (x, y, _), _ = batches
    _, R, f = lpt.validation_objective(m, w, ex, batches, 0.0, ablation)
    loss = F.cross_entropy(ops.call(m.testee, w, x, m.alphas), y)
    yield "R / mean loss", (R / loss).item()
    yield "selection", f.mean().item()
    # of stage II's loss: gamma times the created test alone (Eq. 26), and all of it (Eq. 7)
    part, whole = (vector(ops.grad(lpt.tester_loss(
        lambda x: ops.call(m.tester, ex, x), m.creator, batches, gamma, which, created), ex)).norm()
        for which in (2, 0))
    yield "share of stage II", (part / whole).item()


def neighbour_figures(learners, *args):
    """Yield how far IL's learners are from each other; the arguments: update_weights'."""
    encoders = [vector(il.split(learner.weights)[0]) for learner in learners]
    yield "distance", statistics.mean(((b - a).norm() / b.norm()).item()
                                      for a, b in itertools.pairwise(encoders))


def study_mechanisms(folders, seeds, epochs=2):
    """Print whether each mechanism does what its paper says, after each epoch of reduced searches
    of order 1: mean and deviation over seeds.

    LPT: R over the mean loss on the bank's batch (above 1: the test is harder than the bank), the
    mean selection, the created test's share |gamma grad| / |grad| of stage II's gradient; on
    synthetic images the AUC of f on right against wrong labels. IL: the mean of |W_l - W_(l-1)| /
    |W_l| over neighbours. LeaSE, on synthetic images: the AUC of |delta'| inside against outside
    the object, over eight images. All: the validation accuracies.
    """
    tasks, shares = data_sets(folders), ["--subsets", "0.2", "0.2"] if folders else []
    where, end_epoch, explanations, pictured = (np.where, ops.end_epoch, lease.explanations,
                                                lpt.tests)
    watched = {lpt: ("outer_gradients", lpt.outer_gradients, created_test_figures),
               il: ("update_weights", il.update_weights, neighbour_figures),
               lease: ("outer_gradient", lease.outer_gradient, lambda *args: ())}
    for name, (module, argv) in MECHANISMS.items():
        if folders and module is lease:                            # whose objects nobody knows
            continue
        found, masks, last = {}, [], []
        function, real, figures_of = watched[module]

        def note(key, value):
            found.setdefault(key, []).append(value)

        def remembering(*args):
            last[:] = args
            return real(*args)

        def seeing_masks(condition, *args):
            if condition.ndim == 4:                                # synthetic's objects
                masks.append(condition[:, 0])
            return where(condition, *args)

        def seeing_explanations(data, rows, explanation):
            inside = torch.from_numpy(masks[0][np.asarray(rows)])  # of the training images
            heat = explanation.abs().mean(1)
            note("AUC", statistics.mean(tests.auc(h[~i], h[i]) for h, i in zip(heat, inside)))
            return explanations(data, rows, explanation)

        def seeing_weights(data, rows, f):
            if not folders:
                wrong = data.labels != tests.synthetic_truth(len(data.classes), 16)
                note("AUC of right labels", labels_auc(f, rows, wrong))
            return pictured(data, rows, f)

        def ending(run, alphas, **figures):
            for key, value in [*figures_of(*last), *figures.items()]:
                note(key, value)
            end_epoch(run, alphas, **figures)

        for seed in range(1, seeds + 1):
            masks.clear()
            reduced_search(module, [word.format(*tasks) for word in argv] + [
                *shares, "--base", "darts-1st", "--epochs", str(epochs), "--seed", str(seed)],
                (module, function, remembering), (ops, "end_epoch", ending),
                (np, "where", seeing_masks), (lease, "explanations", seeing_explanations),
                (lpt, "tests", seeing_weights))
        for key, values in found.items():
            print(f"| {name}: {key} | " + " | ".join(
                spread(values[epoch::epochs]) for epoch in range(epochs)) + " |", flush=True)


# ------------------------------------------------------------------------------------- the curves


def curves_svg(folder):
    """Return the test errors of LPT's cells over lambda and over gamma (Skillearn Figures 4 and 5)
    as an SVG, mean and standard deviation over seeds, beside those of random cells, from the
    results of evaluate.py below a folder."""
    results = [json.loads(file.read_text()) for file in sorted(folder.rglob("result.json"))]
    panels = {}

    def summed_up(errors):
        return statistics.mean(errors), statistics.stdev(errors)

    random = summed_up([r["test_error"] for r in results if r["cell"] == "random"])
    for title, name, other in (("λ", "lam", "gamma"), ("γ", "gamma", "lam")):
        errors = {}
        for r in results:
            if r["cell"] == "LPT-R18-DARTS-2nd" and r["search"][other] == 1:
                errors.setdefault(r["search"][name], []).append(r["test_error"])
        panels[title] = [(value, *summed_up(e)) for value, e in sorted(errors.items())]
    groups = [random, *(point[1:] for panel in panels.values() for point in panel)]
    low = min(mean - deviation for mean, deviation in groups)
    high = max(mean + deviation for mean, deviation in groups)
    parts, height, width = [], 150, 300

    def at(error):
        return 70 + height * (high - error) / (high - low)

    for i, (title, panel) in enumerate(panels.items()):
        x0, end = 64 + 390 * i, math.log(panel[-1][0] / panel[0][0])
        mean, deviation = random
        parts.append(
            f'<text x="{x0 - 44}" y="32" class="h">test error, %, over {title}</text>'
            f'<rect x="{x0}" y="{at(mean + deviation):.1f}" width="{width}" opacity="0.25" '
            f'height="{at(mean - deviation) - at(mean + deviation):.1f}" class="d"/>'
            f'<path d="M{x0} {at(high)}V{at(low)}H{x0 + width}" class="w"/>'
            f'<text x="{x0 - 8}" y="{at(high) + 5}" class="t">{high:.1f}</text>'
            f'<text x="{x0 - 8}" y="{at(low)}" class="t">{low:.1f}</text>')
        points = []
        for value, mean, deviation in panel:
            x = x0 + 20 + (width - 40) * math.log(value / panel[0][0]) / end
            points.append(f"{x:.1f},{at(mean):.1f}")
            parts.append(
                f'<g class="o" stroke="{genotypes.HUES[0]}" fill="{genotypes.HUES[0]}">'
                f'<path d="M{x:.1f} {at(mean - deviation):.1f}V{at(mean + deviation):.1f}" '
                f'stroke-width="2"/><circle cx="{x:.1f}" cy="{at(mean):.1f}" r="4"/></g>'
                f'<text x="{x + 9:.1f}" y="{at(low) + 20}" class="t">{value:g}</text>')
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" class="o" '
                     f'stroke="{genotypes.HUES[0]}" stroke-width="1.5"/>')
    return genotypes.svg("grey: random cells", "".join(parts), 800, 260)


# --------------------------------------------------------------------------------------- the soak


def soak(count):
    """Kill each script `count` times, damage checkpoints, then watch the memory of long runs."""
    for jobs in (("lpt", "il"), ("lease", "evaluate")):
        for found in tests.killed(count, *jobs):
            print(found, flush=True)
    tests.make_small()
    with tempfile.TemporaryDirectory() as folder:
        assert tests.run_script(evaluate, *tests.TINY, "--arch", "random:1", "--epochs", 1, "--out",
                                f"{folder}/run") == 0
        (Path(folder) / "run" / "checkpoint.previous.pt").unlink()
        seen = tests.damages_seen(Path(folder) / "run" / "checkpoint.pt", 1000)
        print(seen, "damages seen of 2000")
        for job in tests.RUNS:
            pages = tests.growth(job, Path(folder), lambda: int(
                Path("/proc/self/statm").read_text().split()[1]), (20, 200), 10)
            print(f"{job}: resident memory at step 200 / step 20 = {pages[1] / pages[0]:.4f}")


def get_args():
    parser = argparse.ArgumentParser(description="Measurements; the tests run under pytest.")
    add = parser.add_argument
    add("--bench", action="store_true", help="print the tables of speed, memory and precision")
    add("--worth", type=int, nargs="*", metavar="N",
        help="how well gradients of A predict the objective in a search, and descend it: random "
             "directions, batches, then steps of the search (12 5 0 50 200)")
    add("--starts", type=int, nargs="*", metavar="N",
        help="whether LeaSE's gradient from one start of delta descends at others: starts, "
             "batches, then steps of the search (4 5 0 50 200)")
    add("--calls", action="store_true", help="print the operator calls of a step at the defaults")
    add("--labels", type=int, metavar="SEEDS",
        help="how LPT's tester weighs wrong labels, for several lambda")
    add("--mechanisms", type=int, metavar="SEEDS",
        help="whether LPT's test is hard, IL's learners stay close, LeaSE marks the object")
    add("--curves", type=Path, metavar="RUNS",
        help="print LPT's test errors over lambda and gamma as an SVG, from a folder's results")
    add("--soak", type=int, nargs="?", const=150, metavar="KILLS",
        help="kill each script so many times (150), then damage checkpoints")
    add("--device", type=torch.device, default="cpu", help="cpu or cuda, for --bench")
    add("--peers", type=Path,
        help="a folder with checkouts of quark0/darts and Focusjd/LPT-COVIDx, as darts and "
             "LPT-COVIDx, to time beside us")
    add("--data", type=Path, nargs="+", default=[],
        help="ImageFolder trees of 32-pixel images; IL takes all, others the first")
    add("--memory-of", metavar="STEP", help="the MiB that one step of --bench adds: 'LPT: ours'")
    args = parser.parse_args()
    chosen = args.worth is not None or args.starts is not None
    if not (args.bench or chosen or args.calls or args.labels or args.mechanisms or args.curves
            or args.soak or args.memory_of):
        parser.error("say what to measure; the tests are python -m pytest test_smoke.py")
    return args


def main():
    args = get_args()
    if args.memory_of:
        print(memory_here(args.memory_of, args.device, args.peers))
    if args.bench:
        bench_speed(args.device, args.peers)
        bench_floor(args.device)
        bench_precision(args.data and args.data[0], args.device)
    if args.worth is not None:
        study_worth(args.data, *args.worth)
    if args.starts is not None:
        study_starts(args.data, *args.starts)
    if args.calls:
        count_calls()
    if args.labels:
        study_labels(args.data, args.labels)
    if args.mechanisms:
        study_mechanisms(args.data, args.mechanisms)
    if args.curves:
        print(curves_svg(args.curves))
    if args.soak:
        soak(args.soak)


if __name__ == "__main__":
    main()
