"""Print the measurements that the README reports; the checks are in test_smoke.py.

    python .ci/measure.py --bench [--device cuda] [--peers DIR] [--data DIR]
    python .ci/measure.py --terms [--data DIR DIR]
    python .ci/measure.py --labels 3 [--data DIR]
    python .ci/measure.py --soak

--bench   Markdown tables: the time, memory and operator calls of a step of each method beside the
          per-edge supernet (and, with --peers, beside the originals), the least time that the
          device's own rates allow such a step, and 1 - cosine of each method's outer gradient at
          lower precision with float64's.
--terms   the second-order terms in a reduced search: their share of the gradient, the error of
          the central difference by its radius, and the cosine with the exact gradient.
--labels  whether LPT's tester weighs wrong labels less, for several lambda, as AUC over seeds.
--soak    a line per script after 150 kills (or as many as given), how many of 2,000 damages of a
          checkpoint are seen, and how memory grows in 180 steps.
"""

import argparse
import copy
import importlib
import itertools
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
from test_smoke import cosine, difference, relative_error

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
    g, _ = il.outer_gradient(stages, alphas, grads, train, val, 100.0)
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
                    return il.outer_gradient(stages, a, grads, [(x, y)] * 2, [val], 100.0)[:1]
            m = lease.Learners(mine[0], a, opts[0], his, opts[1])
            delta = lease.random_delta(x.shape, 0.01, device, 1, 0).to(dtype)
            with ops.autocast(device, train):
                ahead = tests.lease_ahead(m, (x, y), delta)
            with ops.autocast(device, outer):
                return lease.outer_gradient(m, (x, y), val, delta, *ahead)[:1]

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


def widen(part):
    """Make float64 in place: learners, their optimizers' buffers, tensors, and what holds them."""
    if isinstance(part, nn.Module):
        widen([*part.parameters(), *part.buffers()])
    elif isinstance(part, torch.optim.Optimizer):
        for state in part.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].double()
    elif isinstance(part, torch.Tensor):
        part.data = part.data.double() if part.is_floating_point() else part.data
    elif isinstance(part, (list, tuple, lpt.Learners, il.Learner, lease.Learners)):
        for each in part if isinstance(part, (list, tuple)) else vars(part).values():
            widen(each)


def lpt_terms(gradients, m, batches, order, lam, gamma, ablation, radius):
    def exact(wide):
        return tests.exact_lpt(*wide, order, lam, gamma, ablation)

    def ours(radius, wide=(m, batches)):
        return gradients(*wide, order, lam, gamma, ablation, radius)[:2]
    return (m, batches), exact, ours


def il_terms(gradient, stages, alphas, grads, train, val, lam, step, order, radius):
    def exact(wide):
        return [[part] for part in tests.exact_il(*wide, lam, step)]

    def ours(radius, wide=None):
        at = wide or (stages, alphas, train, val)
        g = tests.stage_gradients(*at[:3]) if wide else grads
        return [gradient(*at[:2], g, *at[2:], lam, step, order, radius)[0]]
    return (stages, alphas, train, val), exact, ours


def lease_terms(gradient, m, train, val, delta, *rest):
    *ahead, gamma, weighting, order, radius = rest

    def exact(wide):
        return [[part] for part in tests.exact_lease(*wide, gamma, weighting, order)]

    def ours(radius, wide=None):
        at = wide or (m, train, val, delta)
        ready = tests.lease_ahead(at[0], at[1], at[3], weighting, order) if wide else ahead
        return [gradient(*at, *ready, gamma, weighting, order, radius)[0]]
    return (m, train, val, delta), exact, ours


def study_terms(folders, radii=(1e-8, 1e-3, 1e-2)):
    """Print what the second-order terms are in a search, and how far the differences are from the
    exact derivative in float64: medians over three steps at the start, middle and end."""
    print("| | exact share | error at " + " | ".join(f"{r:g}" for r in radii)
          + " | as searched: share | error | cosine |\n|" + "---|" * (5 + len(radii)), flush=True)
    tasks = [f"folder:{folder}" for folder in folders] or ["synthetic:10", "synthetic:5"]
    one = ["--dataset", tasks[0]]
    n = len(ops.load_images(tasks[0], None, "cpu", 16).labels) // 2
    last = math.ceil(n / int(REDUCED[REDUCED.index("--batch-size") + 1]))
    for name, module, function, terms, argv in (
            ("LPT", lpt, "outer_gradients", lpt_terms, one),
            ("IL", il, "outer_gradient", il_terms, ["--tasks", *tasks]),
            ("LeaSE", lease, "outer_gradient", lease_terms, one)):
        real, step, found = getattr(module, function), itertools.count(1), {}

        def watched(*args):
            now = next(step)
            when = next((w for w, first in (("start", 1), ("middle", last // 2), ("end", last - 2))
                         if first <= now < first + 3), None)
            if when:
                parts, exact, ours = terms(real, *args)
                wide = copy.deepcopy(parts)
                widen(wide)
                totals, directs = exact(wide)
                tries = [ours(radius, wide) for radius in radii] + [ours(args[-1])]
                for i, (t, d) in enumerate(zip(totals, directs)):
                    term = difference(t, d)
                    line = [relative_error(d, t)]
                    line += [relative_error(difference(g[i], d), term) for g in tries[:-1]]
                    mine = [g.double() for g in tries[-1][i]]
                    line += [relative_error(d, mine), relative_error(difference(mine, d), term),
                             cosine(mine, t)]
                    found.setdefault((when, "AC"[i]), []).append(line)
            return real(*args)

        reduced_search(module, [*argv, "--epochs", "1"], (module, function, watched))
        for (when, player), lines in sorted(found.items(), key=lambda item: item[0][1]):
            middle = [f"{statistics.median(column):.2g}" for column in zip(*lines)]
            print(f"| {name}, {player}, {when} | " + " | ".join(middle) + " |", flush=True)


LABELS = [["--ablation", "1"], *(["--lambda", lam] for lam in ("0", "0.1", "0.5", "1", "2", "5"))]


def study_labels(folders, seeds, settings=LABELS, epochs=2):
    """Print whether LPT weighs wrongly labelled images less than the others: AUC (1: all of them
    less, 0.5: no telling, 0: all more) after every epoch of a search."""
    dataset = f"folder:{folders[0]}" if folders else "synthetic:10"
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
        bad = wrong["rows"][torch.as_tensor(rows)]
        found.append(tests.auc(f[bad], f[~bad]))
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
    add("--terms", action="store_true",
        help="how large the second-order terms are in a search, and how exact")
    add("--labels", type=int, metavar="SEEDS",
        help="how LPT's tester weighs wrong labels, for several lambda")
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
    if not (args.bench or args.terms or args.labels or args.soak or args.memory_of):
        parser.error("give --bench, --terms, --labels or --soak; the tests are python -m pytest "
                     "test_smoke.py")
    return args


def main():
    args = get_args()
    if args.memory_of:
        print(memory_here(args.memory_of, args.device, args.peers))
    if args.bench:
        bench_speed(args.device, args.peers)
        bench_floor(args.device)
        bench_precision(args.data and args.data[0], args.device)
    if args.terms:
        study_terms(args.data)
    if args.labels:
        study_labels(args.data, args.labels)
    if args.soak:
        soak(args.soak)


if __name__ == "__main__":
    main()
