"""Print what docs/measurements.md reports, and check the scripts on a device.

    python .ci/measure.py --checks --device cuda            # the others: --help
    python .ci/measure.py --bench --device cuda --peers DIR
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

ALGORITHM = {module: tests.ITERATION[name] for name, module in tests.MODULES.items()}
with_auxiliary = lambda net, x, y: sum(c * F.cross_entropy(each, y)
                                       for c, each in zip((1, 0.4), net(x)))


def table_row(*cells, head=False):
    print(f"| {' | '.join(map(str, cells))} |" + head * f"\n|{'---|' * len(cells)}", flush=True)


def sgd(module):
    return torch.optim.SGD(module.parameters(), 0.025, 0.9, weight_decay=3e-4)


def problem(module, argv, device, batch, side=32, C=16, layers=8, supernet=ops.Supernet,
            dtype=torch.float32):
    """Return a method's learners, batches and arguments, made up: the same on every device."""
    torch.manual_seed(0)
    args, _ = module.get_args(argv)
    A = ops.Architecture().to(device, dtype)
    shared = A, torch.optim.Adam(A.parameters(), args.alpha_lr, (0.5, 0.999), weight_decay=1e-3)

    def learner(net):
        net = ops.place(net.to(dtype), device)
        return net, sgd(net)

    def images():
        return torch.randn(batch, 3, side, side).to(device, dtype,
                                                    memory_format=ops.memory_format(device))

    def labelled(count):
        return [(images(), torch.randint(100, (batch,)).to(device), None) for _ in range(count)]

    if module is il:
        stages = [il.Learner(*learner(supernet(C, 100, layers)))
                  for _ in range(args.rounds) for k, _ in enumerate(args.tasks)]
        return il.Learners(stages, *shared), (labelled(len(stages)), labelled(2)), args
    searched = learner(supernet(C, 100, layers))
    if module is lease:
        m = lease.Learners(*searched, *shared,
                           *learner(torchvision.models.resnet18(num_classes=100)))
        return m, (*labelled(2), args.delta_scale * images()), args
    m = lpt.Learners(*searched, *shared)
    if args.encoder != "none":
        m.tester, m.tester_opt = learner(lpt.Tester(args.encoder, 100))
        m.creator = list(nn.Linear(512, 1).to(device, dtype).parameters())
        m.creator_opt = torch.optim.Adam(m.creator, args.creator_lr, weight_decay=1e-3)
    return m, labelled(3), args


# ------------------------------------------------------------------------------- speed and memory


def weight_step(model, opt, loss):
    opt.zero_grad()
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    opt.step()


def peer_step(what, whose, device, peers, x, y):
    """Return a step of somebody else's code as it is; without a GPU .cuda() does nothing."""
    if device.type == "cpu":
        nn.Module.cuda = torch.Tensor.cuda = lambda self, *args, **kwargs: self
    criterion, args = nn.CrossEntropyLoss(), argparse.Namespace(
        learning_rate=0.025, momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-4,
        arch_weight_decay=1e-3, weight_gamma=1.0, weight_lambda=1.0, weight_decay_w=3e-4,
        weight_decay_h=3e-4, model_v_learning_rate=3e-4, model_v_weight_decay=1e-3,
        teacher_arch="18", is_cifar100=1)
    folder = peers / {"quark0": "darts/cnn", "authors": "LPT-COVIDx/darts-LPT"}[whose]
    for path in folder.glob("*.py"):                               # ours of the same names, too
        sys.modules.pop(path.stem, None)
    sys.path.insert(0, str(folder))
    first, second, *more = map(importlib.import_module, (
        ["model", "genotypes"] if what == "evaluation" else ["model_search", "architect"]
        if whose == "quark0" else ["model_search", "architect_ts", "teacher", "teacher_update"]))
    if what == "evaluation":
        net = first.NetworkCIFAR(36, 100, 20, True, second.DARTS_V2).to(device)
        net.drop_path_prob, opt = 0.0, sgd(net)
        return lambda: weight_step(net, opt, lambda: with_auxiliary(net, x, y))
    model = first.Network(16, 100, 8, criterion).to(device)
    opt, architect = sgd(model), second.Architect(model, args)
    if more:
        w, h, v = more[0].resnet18().to(device), *(nn.Linear(512, n).to(device) for n in (100, 2))
        opt_w, opt_h, creator = sgd(w), sgd(h), more[1].Teacher_Updater(w, h, v, args)

    def step():
        if what == "DARTS":
            architect.step(x, y, x, y, 0.025, opt, unrolled=True)
        elif more:
            architect.step(x, y, x, y, 0.025, opt, w, v, unrolled=True)
            creator.step(criterion, x, y, x, y, x, y, 0.025, 0.025, opt, opt_w, opt_h, model,
                         unrolled=True)
            opt_w.zero_grad(), opt_h.zero_grad()
            features = w(x)
            f, losses = v(features).softmax(1)[:, 1], F.cross_entropy(h(features), y,
                                                                      reduction="none")
            (criterion(h(w(x)), y) + (f * losses).mean()).backward()
            opt_w.step(), opt_h.step()
        weight_step(model, opt, lambda: criterion(model(x), y))
    return step


def workload(kind, device, batch=None, peers=None):
    """Return one step to time, for kind "what: whose"."""
    what, _, whose = kind.partition(": ")
    batch = batch or (16 if device.type == "cpu" else 96 if what == "evaluation" else 64)
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32).to(device), torch.randint(100, (batch,)).to(device)
    if whose in ("quark0", "authors"):
        return peer_step(what, whose, device, peers, x, y)
    graphs = ["--graphs"] * (whose == "replayed")
    if what == "evaluation":
        args, _ = evaluate.get_args([*CELL.split(), *graphs])
        net = ops.place(evaluate.Network(genotypes.load("DARTS_V2"), 36, 100, 20), device)
        m = evaluate.Learner(net, sgd(net), net)
        m.recordings = {}
        x = x.contiguous(memory_format=ops.memory_format(device))
        return lambda: ops.descend(m.optimizer, evaluate.gradient(m, (x, y, None), args)[0],
                                   "the network", args.grad_clip)
    module = {"IL": il, "LeaSE": lease}.get(what, lpt)
    argv = ["--encoder", "none"] * (what in ("DARTS", "supernet"))
    made = problem(module, [*argv, *graphs], device, batch,
                   supernet=tests.NaiveSupernet if whose == "per edge" else ops.Supernet,
                   **dict(C=8, layers=4) if module is il else {})
    made[0].recordings = {}
    return lambda: getattr(module, ALGORITHM[module])(*made, what != "supernet")


class Calls(TorchDispatchMode):
    """Count the operator calls that are not views, the bytes that they read and write, and the
    multiplications and additions of convolutions and matrix products."""
    count = bytes = flops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not op.is_view:
            self.count += 1
            self.bytes += sum(getattr(t, "nbytes", 0) for t in tree_leaves((args, kwargs, out)))
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


def resident(field):
    """Return this process's memory in MiB (Linux); VmHWM: the largest so far."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def figures_here(kind, device, *given):
    """Print, as JSON, the seconds of a workload's first step, the MiB that two add to what this
    process had, operator calls and what they compute and move; on a GPU kernels and their time."""
    step, gpu, before = workload(kind, device, *given), device.type == "cuda", resident("VmHWM")
    found = {"first": timed(step, device), "second": timed(step, device)}
    found["MiB"] = (torch.cuda.max_memory_allocated() / 2 ** 20 if gpu else
                    resident("VmHWM") - before)
    if gpu:
        timed(step, device)                                        # which a graph is recorded in
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            timed(step, device)
        kernels = [event.time_range.elapsed_us() for event in seen.events() if event.device_type
                   == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
        found |= {"kernels": len(kernels), "busy": sum(kernels) / 1e6}
    with Calls() as calls:
        step()
    print(json.dumps(found | {"calls": calls.count, "flops": calls.flops, "bytes": calls.bytes}))


def bench(device, batch, peers, count=5):
    """Print what a step takes, as Markdown tables: the median of `count` steps of a table's
    workloads in turn; beside it the least that it would take if it multiplied at the rate of a
    large matrix product, or if its operators read and wrote at the rate of a large copy."""
    gpu, n = (True, 2 ** 13) if device.type == "cuda" else (False, 2 ** 11)
    a, (b, c) = (torch.randn(*shape, device=device) for shape in ((n, n), (2, 2 * n ** 2)))
    multiplying, moving = (work / min(timed(step, device) for _ in range(9)) for step, work in (
        (lambda: a @ a, 2 * n ** 3), (lambda: b.copy_(c), 2 * c.nbytes)))
    name, batches = (torch.cuda.get_device_name(), "64, evaluation 96") if gpu else (device, 16)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {name}, batch "
          f"{batch or batches}; {multiplying / 1e9:.0f} GFLOP/s, {moving / 1e9:.0f} GB/s")
    for what, title, whose in (
            ("supernet", "weight step of the supernet, C 16, 8 cells", ["quark0", "per edge"]),
            ("DARTS", "step of second-order DARTS, the same", ["quark0", "per edge"]),
            ("LPT", "step of LPT, the same with ResNet-18", ["authors", "per edge"]),
            ("evaluation", "weight step of evaluate.py, C 36, 20 cells", ["quark0"]),
            ("IL", "step of IL, two tasks and rounds, C 8, 4 cells", []),
            ("LeaSE", "step of LeaSE, C 16, 8 cells, ResNet-18", [])):
        whose = [*(who for who in whose if peers or who == "per edge"), "ours",
                 *["replayed"] * gpu]
        found = [json.loads(subprocess.run(                        # each in a process of its own
            [sys.executable, *sys.argv, "--figures-of", f"{what}: {who}"], capture_output=True,
            text=True, check=True).stdout.splitlines()[-1]) for who in whose]
        with contextlib.redirect_stdout(None):                     # peers print their widths
            steps = [workload(f"{what}: {who}", device, batch, peers) for who in whose]
        first = 3 if gpu else 1                                    # they choose, record, warm up
        times = [[timed(step, device) for step in steps] for _ in range(first + count)][first:]
        print()
        table_row(title, "s", "ratio", "MiB", "ratio", "calls", *["kernels", "busy, s"] * gpu,
                  "first, s", "multiplying, s", "moving, s", head=True)
        for who, f, seconds in zip(whose, found, zip(*times)):
            f["s"] = statistics.median(seconds)
            table_row(who, *(cell for name in ("s", "MiB") for cell in (
                f"{f[name]:.4g}", f"{f[name] / found[0][name]:.2f}")), f["calls"],
                *[f.get("kernels"), f"{f.get('busy', 0):.3g}"] * gpu, f"{f['first']:.3g}",
                f"{f['flops'] / multiplying:.3g}", f"{f['bytes'] / moving:.3g}")


# ------------------------------------------------------------------------------------- the checks

ROOT, CELL = Path(lpt.__file__).parent, "--arch LPT_PDARTS"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node"
JOBS = [*(f"{method} --base {base}" for method in ("lpt", "il", "lease")
          for base in ("darts-2nd", "pcdarts", "pdarts")), "lpt --order 2", "il --order 2",
        "lease --order 2", "lpt --encoder none", "lpt --amp bf16-all", "lease --amp bf16",
        "lpt --tf32", f"evaluate {CELL}", f"evaluate {CELL} --amp bf16"]


class Checks:
    """Runs the scripts on a device, below a folder. A check returns what it saw, or raises."""

    def __init__(self, device, folder):
        self.device, self.folder = device, folder

    def command(self, job, quick=True, python="", folder=None):
        script, *argv = job.split()
        return [sys.executable, *python.split(), f"{script}.py", *argv, *["--quick"] * quick,
                "--device", self.device.type, "--out", str(self.folder / (folder or job))]

    def run(self, command):
        """Return the lines that a command prints, standard error's last."""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        assert not done.returncode, f"exit code {done.returncode}: {' / '.join(lines[-3:])}"
        return lines

    def job(self, job, *more):
        """Run a script to its end; return its last figures."""
        lines = self.run(self.command(job, *more))
        return [line for line in lines if line.startswith(("epoch ", "test error"))][-1][:80]

    def killed(self, job, *more):
        """Kill a run in its second epoch and resume it: it must end as an undisturbed one. more:
        arguments that the undisturbed one is without."""
        job += " --deterministic --checkpoint-minutes 0.02"
        command, _ = [*self.command(job, folder=f"{job} cut"), *more], self.job(job)
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("epoch 2/") and " step 10/" in line:
                    process.kill()
        assert process.returncode == -9, f"exit code {process.returncode}"
        self.run([*command, "--resume"])
        whole, cut = (tree_leaves(ops.read_checkpoint(self.folder / name, job.split()[0])["parts"])
                      for name in (job, f"{job} cut"))
        same = [torch.equal(a, b) if torch.is_tensor(a) else a == b
                for a, b in zip(whole, cut, strict=True)]
        assert same and all(same), f"{same.count(False)} of {len(same)} values differ"
        return f"{len(same)} values are equal"

    def imagenet(self):
        """Search and train on made-up files, which other processes read."""
        tree = self.folder / "images"
        for part, kind, i in itertools.product(("train", "val"), "abc", range(48)):
            (tree / part / kind).mkdir(parents=True, exist_ok=True)
            torchvision.io.write_png(torch.randint(256, (3, 48, 56)).byte(),
                                     str(tree / part / kind / f"{i}.png"))
        argv = (f"--dataset imagenet --data {tree} --image-size 96 --channels 8 --epochs 1 "
                "--batch-size 16 --workers 2")
        self.job(f"lpt --base pcdarts --layers 3 --warm-up 0 --subsets 0.5 0.5 {argv}", False, "",
                 "files of lpt")
        return self.job(f"evaluate {CELL} --layers 5 {argv}", False, "", "files of evaluate")

    def load(self):
        self.job(f"evaluate {CELL} --epochs 1", True, "", "load")
        network, classes, transform = evaluate.load(self.folder / "load", self.device)
        x = transform(torch.zeros(3, 16, 16, dtype=torch.uint8))[None].to(self.device)
        return f"{classes[network(x)[0].argmax()]}, on {x.device}"

    def gradients(self, module):
        """Compare outer gradients in float64: exact ones with the CPU's and with differences."""
        def at(device, **changes):
            m, batches, args = problem(module, [], device, 8, 16, 4, 3, dtype=torch.float64)
            vars(args).update(changes)
            found = tests.gradients(module.__name__, m, batches, args)
            return torch.cat([t.detach().flatten() for group in found for t in group]).cpu()

        exact, cpu = at(self.device, gradient="exact"), torch.device("cpu")
        there, near = (((g - exact).norm() / exact.norm()).item() for g in (
            at(cpu, gradient="exact"), at(self.device, radius=1e-8, delta_radius=1e-8)))
        assert there < 1e-10 and near < 1e-4, (there, near)
        return f"the CPU's {there:.0e} away, the difference at radius 1e-8 {near:.0e}"


def check(device, only=""):
    """Print a line per check whose name has `only`, then how many passed."""
    with tempfile.TemporaryDirectory() as folder:
        on = Checks(device, Path(folder))
        todo = {job: (on.job, job) for job in JOBS} | {
            f"gradients of {m.__name__}": (on.gradients, m) for m in (lpt, il, lease)} | {
            "lpt killed and resumed": (on.killed, "lpt"), "ImageNet's files": (on.imagenet,),
            "evaluate killed and resumed": (on.killed, f"evaluate {CELL}"),
            "evaluate.load": (on.load,), "torchrun": (on.job, "lpt", True, f"{TORCHRUN} 1", "run"),
            **({f"{job}, killed with --graphs": (on.killed, job, "--graphs") for job in (
                    "lpt --order 2", "il", "lease --order 2", f"evaluate {CELL} --amp bf16")}
               if device.type == "cuda" else {})}
        todo = {name: job for name, job in todo.items() if only in name}

        def passes(name):
            begin, (function, *words) = time.time(), todo[name]
            try:
                sign, said = "ok  ", function(*words)
            except (AssertionError, RuntimeError, OSError, LookupError,
                    subprocess.SubprocessError) as error:
                sign, said = "FAIL", f"{type(error).__name__}: {error}"
            print(f"{sign} {time.time() - begin:4.0f} s  {name}: {said}", flush=True)
            return sign != "FAIL"

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 3)) as pool:
            print(f"{sum(pool.map(passes, todo))} of {len(todo)} passed")


def main():
    parser = argparse.ArgumentParser(description="Measurements; the tests run under pytest.")
    add = parser.add_argument
    add("--checks", nargs="?", const="", metavar="WORDS", help="run scripts (those) on a device")
    add("--bench", action="store_true", help="time, memory, calls and kernels of a step of each "
        "method, beside the per-edge supernet, the peers, and what the device's rates allow")
    add("--device", type=torch.device, default="cpu", help="cpu or cuda, of --checks and --bench")
    add("--batch", type=int, help="of --bench; else 16, on a GPU 64 and of evaluate.py 96")
    add("--peers", type=Path, help="of --bench: the folder of checkouts darts and LPT-COVIDx")
    add("--figures-of", help=argparse.SUPPRESS)                    # what bench starts
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True  # as in a run
    where = args.device, args.batch, args.peers
    for chosen, measure, *given in (
            (args.figures_of, figures_here, args.figures_of, *where), (args.bench, bench, *where),
            (args.checks is not None, check, args.device, args.checks)):
        if chosen:
            return measure(*given)
    parser.error("say what to measure; the tests are python -m pytest test_smoke.py")


if __name__ == "__main__":
    main()
