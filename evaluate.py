"""Train a network of stacked cells from scratch and test it once: the evaluation of a found cell.

CIFAR: 20 cells, C 36, 600 epochs, cutout, auxiliary head, drop-path (DARTS §A.2, Skillearn
§3.2.2); the result is the test error after the last epoch. ImageNet: 14 cells, C 48, 250 epochs,
label smoothing, warm-up and linear decay. Several GPUs: DataParallel in one process, or
DistributedDataParallel under torchrun; --batch-size is the whole batch in either.

    python evaluate.py --arch LPT_PDARTS --dataset cifar100
    python evaluate.py --arch runs/lpt-cifar100-1/genotype.json --dataset cifar100
    python evaluate.py --arch random:1 --dataset cifar100         # the baseline to beat
    python evaluate.py --arch LPT_PDARTS --dataset imagenet --count-params
    python evaluate.py --summary runs                             # all results, as a table
    torchrun --nproc-per-node 8 evaluate.py --arch LPT_PDARTS --dataset imagenet --data DIR
"""

import json
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

import darts_ops as ops
import genotypes

# ------------------------------------------------------------------------------------ the network


def operation(name: str, C: int, stride: int) -> nn.Module:
    """Return an operation on one edge (DARTS §3.1.1)."""
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, 1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if name == "skip_connect":
        return (nn.Identity() if stride == 1 else
                nn.Sequential(nn.ReLU(), ops.FactorizedReduce(C, C, affine=True)))
    kernel = int(name[-1])
    if name.startswith("sep_conv"):
        return nn.Sequential(nn.ReLU(), ops.SeparableConv(C, kernel, stride, affine=True),
                             nn.ReLU(inplace=True), ops.SeparableConv(C, kernel, affine=True))
    return nn.Sequential(nn.ReLU(), ops.SeparableConv(C, kernel, stride, 2, affine=True))


class Cell(nn.Module):
    """A cell with its operations fixed by a genotype."""

    def __init__(self, genotype, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        edges, self.concat = (genotype[2:] if reduction else genotype[:2])
        self.preprocess0 = ops.preprocess(C_prev_prev, C, reduction_prev, affine=True)
        self.preprocess1 = ops.preprocess(C_prev, C, affine=True)
        self.inputs = [state for _, state in edges]
        self.ops = nn.ModuleList(operation(name, C, 2 if reduction and state < 2 else 1)
                                 for name, state in edges)

    def forward(self, s0, s1, drop_path):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(0, len(self.ops), 2):
            terms = []
            for op, state in zip(self.ops[i:i + 2], self.inputs[i:i + 2]):
                term = op(states[state])
                if drop_path and not isinstance(op, nn.Identity):  # whole paths, per image
                    term = stochastic_depth(term, drop_path, "row", self.training)
                terms.append(term)
            states.append(terms[0] + terms[1])
        return torch.cat([states[i] for i in self.concat], 1)


def auxiliary_head(C, num_classes, size):
    """Return a second classifier, for training only, on the features after the second reduction and
    its ReLU, of size (H, W)."""
    # two windows a side: the published ones at 8 pixels (CIFAR) and 7 (ImageNet), elsewhere those
    # of AdaptiveAvgPool2d(2), which itself has no deterministic gradient on a GPU (a single pixel)
    window, stride = zip(*[(5, n - 5) if n in (7, 8) else ((n + 1) // 2, n // 2) for n in size])
    pool = nn.AvgPool2d(window, stride) if min(size) > 1 else nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(
        pool, nn.Conv2d(C, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768), nn.ReLU(), nn.Flatten(),
        nn.Linear(768, num_classes))


class Network(nn.Module):
    """Stacked cells, reductions at 1/3 and 2/3. x (N, 3, H, W) -> logits and, in training with an
    auxiliary head, its logits, else None.

    imagenet: three convolutions of stride 2 come first; size: (H, W) of the images; amp: compute in
    bfloat16, which DataParallel's threads learn only from the module itself.
    """

    def __init__(self, genotype, C, num_classes, layers, auxiliary=True, imagenet=False,
                 size=(32, 32), amp=False):
        super().__init__()
        self.drop_path, self.auxiliary_at, self.amp = 0.0, 2 * layers // 3, amp
        self.stem0, self.stem1, C_prev = ops.stem(C, imagenet)
        self.cells, C_prev_prev, reduction, self.auxiliary = nn.ModuleList(), C_prev, imagenet, None
        size = [-(-n // 8) if imagenet else n for n in size]
        for i in range(layers):
            reduction_prev, reduction = reduction, i in (layers // 3, 2 * layers // 3)
            C, size = (2 * C, [-(-n // 2) for n in size]) if reduction else (C, size)
            cell = Cell(genotype, C_prev_prev, C_prev, C, reduction, reduction_prev)
            self.cells.append(cell)
            C_prev_prev, C_prev = C_prev, len(cell.concat) * C
            if i == self.auxiliary_at and auxiliary:
                self.auxiliary = auxiliary_head(C_prev, num_classes, size)
        self.classifier = nn.Linear(C_prev, num_classes)

    def forward(self, x):
        with ops.autocast(x.device, self.amp):
            s0 = self.stem0(x)
            s1, auxiliary = self.stem1(s0), None
            for i, cell in enumerate(self.cells):
                out = cell(s0, s1, self.drop_path)
                s0, s1 = s1, F.relu(out)
                if i == self.auxiliary_at and self.auxiliary is not None and self.training:
                    auxiliary = self.auxiliary(s1)
            return self.classifier(out.mean((2, 3))), auxiliary


def count_params(network: Network) -> float:
    """Return millions of parameters, the auxiliary head left out."""
    return sum(p.numel() for name, p in network.named_parameters()
               if not name.startswith("auxiliary.")) / 1e6


# -------------------------------------------------------------------------------------- arguments

RECIPE_IMAGENET = dict(layers=14, channels=48, epochs=250, batch_size=1024, lr=0.5,
                       warm_up=5, decay="linear", weight_decay=3e-5, label_smoothing=0.1, cutout=0,
                       drop_path=0.0, image_size=224)          # Skillearn §3.2.2, P-DARTS §4.3
QUICK = dict(dataset="synthetic", image_size=16, layers=5, channels=8, epochs=4, batch_size=50,
             cutout=4, log_every=10)


def get_args(argv=None):
    parser = ops.new_parser("Train a network of stacked cells and test it once (DARTS §A.2).",
                            "python evaluate.py --arch LPT_PDARTS")
    add, real = parser.add_argument, ops.real
    add("--arch", help="a published cell (python genotypes.py --help lists them), a genotype.json "
                       "or random:SEED")
    add("--dataset", type=ops.dataset_name, default="cifar100",
        help="cifar10, cifar100, imagenet, folder (in --data), folder:DIR, synthetic[:CLASSES]")
    add("--count-params", action=ops.flag, default=False, help="print the parameter count and exit")
    add("--summary", type=Path, nargs="+", default=None, metavar="RUNS",
        help="print a table of the results in these folders, and exit")
    ops.data_arguments(parser)
    add = parser.add_argument_group(
        "the network and its training (DARTS §A.2; Skillearn §3.2.2); the defaults hang on "
        "--dataset").add_argument
    add("--layers", type=ops.number(int, 3), default=20, help="cells")
    add("--channels", type=ops.number(int, 2), default=36, help="C of the first cell")
    add("--epochs", type=ops.number(int, 1), default=600, help="passes over the training images")
    add("--batch-size", type=ops.number(int, 2), default=96,
        help="of a step, over all GPUs; IL on P-DARTS and PC-DARTS has 64 (§4.3.1)")
    add("--lr", type=real, default=0.025, help="SGD, to 0")
    add("--decay", choices=("cosine", "linear"), default="cosine", help="of the learning rate")
    add("--warm-up", type=ops.number(int, 0), default=0, help="epochs of a linear rise to --lr")
    add("--momentum", type=ops.number(float, 0, 1), default=0.9, help="of SGD")
    add("--weight-decay", type=real, default=3e-4, help="of SGD")
    add("--grad-clip", type=real, default=5.0, help="largest gradient norm; 0: any")
    add("--label-smoothing", type=ops.number(float, 0, 1), default=0.0, help="of the training loss")
    add("--cutout", type=ops.number(int, 0), default=16, help="side of the square cut out; 0: none")
    add("--auxiliary", action=ops.flag, default=True, help="train with the auxiliary head")
    add("--auxiliary-weight", type=real, default=0.4, help="of its loss")
    add("--drop-path", type=ops.number(float, 0, 0.99), default=None,
        help="rate that drop-path rises to, linearly over the epochs; else 0.3 for the published "
             "P-DARTS and PC-DARTS cells, 0.2 for others")
    ops.run_arguments(parser, 50, "off or bf16", ("off", "bf16"))
    args, checkpoint = ops.parse(parser, argv, "evaluate", lambda chosen: (
        (RECIPE_IMAGENET if chosen.dataset == "imagenet" else {})
        | (QUICK if chosen.quick else {})))
    if not args.arch and not args.summary:
        raise ops.BadInput("--arch: name a cell to evaluate")
    if args.cutout and args.dataset == "imagenet":
        raise ops.BadInput("--cutout: not for the images of imagenet")
    return args, checkpoint


# ------------------------------------------------------------------------------- the three programs


def count_parameters(args):
    """Print the parameter count of a cell's network, without the auxiliary head, as JSON."""
    classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}.get(args.dataset)
    if classes is None:
        raise ops.BadInput(f"--count-params: the classes of {args.dataset} are not fixed")
    network = Network(genotypes.load(args.arch), args.channels, classes, args.layers, False,
                      args.dataset == "imagenet")
    print(json.dumps({"arch": args.arch, "dataset": args.dataset,
                      "params_M": round(count_params(network), 3)}))


def summary(folders: list[Path]) -> str:
    """Return a Markdown table of the results in run folders or in the folders they lie in: a line
    per data set, network, cell or search and its settings, whose seeds it takes together."""
    groups = {}
    for folder in folders:
        files = sorted(folder.rglob("result.json"))
        if not files:
            raise ops.BadInput(f"--summary: there is no result.json in {folder}")
        for file in files:
            try:
                r = json.loads(file.read_text())
                network = f"{r['layers']} cells, C {r['channels']}, {r['epochs']} epochs"
                setting = r["search"] | {f"evaluate {k}": v for k, v in r["training"].items()}
                line = (r["test_error"] + 0.0, r["params_M"] + 0.0, r["dataset"],
                        r.get("search_seconds"))
                key = r["data"], network, r["cell"], json.dumps(setting, sort_keys=True)
                groups.setdefault(key, []).append(line)
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise ops.BadInput(f"--summary: {file} is no result of evaluate.py ({error!r})"
                                   ) from None
    lines = ["| cell | data | network | test error, % | n | parameters, M | search, days | paper |",
             "|---" * 8 + "|"]
    for (data, network, cell, setting), runs in sorted(groups.items()):
        others = [json.loads(k[3]) for k in groups if k[:3] == (data, network, cell)]
        changed = [f", {k} {v}" for k, v in json.loads(setting).items()
                   if any(other.get(k) != v for other in others)]
        errors, params, datasets, seconds = zip(*runs)
        spread = f" ± {statistics.stdev(errors):.2f}" if len(runs) > 1 else ""
        days = [s / 86400 for s in seconds if s is not None]
        lines.append("| " + " | ".join((
            cell + "".join(changed), data, network, f"{statistics.mean(errors):.2f}{spread}",
            f"{len(runs)}", f"{statistics.mean(params):.3g}",
            f"{statistics.mean(days):.2g}" if days else "-",
            genotypes.paper_error(cell, datasets[0]))) + " |")
    return "\n".join(lines)


def train(args, checkpoint):
    """Train a cell's network and test it once, after the last epoch: result.json."""
    genotype, imagenet = genotypes.load(args.arch), args.dataset == "imagenet"
    device = ops.start(args)
    data = ops.load_images(args.dataset, args.data, device, args.image_size, workers=args.workers)
    *halves, held = ops.split_rows(data.labels, args.seed, args.hold_out)
    rows = np.sort(np.concatenate(halves))
    stream = ops.Stream(data, rows, args.batch_size, args.seed, "evaluate", args.cutout)
    test_data, test_rows = data, held
    if not args.hold_out:
        test_data = ops.load_images(args.dataset, args.data, device, args.image_size, test=True,
                                    workers=args.workers)
        if test_data.classes != data.classes:
            raise ops.BadInput("the test folder's classes are not the training folder's")
        test_data.mean, test_data.std = data.mean, data.std
        test_rows = range(len(test_data.labels))
    network_args = dict(C=args.channels, num_classes=len(data.classes), layers=args.layers,
                        auxiliary=args.auxiliary, imagenet=imagenet, size=list(data.size))
    run = ops.Run("evaluate", args, checkpoint, [data], {
        "network": network_args, "genotype": genotypes.to_json(genotype), "classes": data.classes,
        "mean": data.mean.flatten().tolist(), "std": data.std.flatten().tolist()})

    torch.manual_seed(args.seed)
    network = model = ops.place(Network(genotype, **network_args, amp=args.amp == "bf16"), device)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(
            network, [device] if device.type == "cuda" else None)
    elif device.type == "cuda" and torch.cuda.device_count() > 1:
        model = nn.DataParallel(network)
    weights = list(network.parameters())
    optimizer = torch.optim.SGD(weights, args.lr, args.momentum, weight_decay=args.weight_decay)
    drop_path = args.drop_path
    if drop_path is None:
        known = genotypes.PUBLISHED.get(args.arch)
        drop_path = known.drop_path if known else 0.2
    run.load({"network": network, "optimizer": optimizer})
    params = count_params(network)
    print(f"{args.arch}: {params:.3f} M parameters without the auxiliary head")
    if len(run.state["history"]) == args.epochs:
        print("this run has been trained to its end; it is tested again")

    for epoch in run.epochs(stream.epoch_steps()):
        optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
        network.drop_path = drop_path * epoch / args.epochs
        for step in run.steps():
            x, y, _ = stream(step)
            logits, auxiliary = model(x)
            loss = total = cross_entropy(logits, y, args.label_smoothing)
            if auxiliary is not None:
                total = loss + args.auxiliary_weight * cross_entropy(auxiliary, y,
                                                                     args.label_smoothing)
            with ops.together():
                total.backward()                                  # averaged by the wrapper
            ops.descend(optimizer, [w.grad for w in weights], run.at("the network"), total,
                        args.grad_clip)
            run.log(train_loss=loss, train_accuracy=(logits.argmax(1) == y).float().mean())
        run.end_epoch()

    with ops.evaluating(network):
        top1, top5 = ops.accuracies(lambda x: network(x)[0], test_data, test_rows, args.batch_size,
                                    top=(1, 5))
    history = run.state["history"]
    where = args.data.name if args.dataset == "folder" else args.dataset
    training = {k: v for k, v in ops.plain(args).items()
                if k not in ("arch", "seed", *ops.MAY_CHANGE)}
    result = {"arch": args.arch, **search_of(args.arch), "dataset": args.dataset, "data": where,
              "test_error": round(100 * (1 - top1), 4), "top5_error": round(100 * (1 - top5), 4),
              "test_images": len(test_rows), "params_M": round(params, 3), "layers": args.layers,
              "channels": args.channels, "epochs": args.epochs, "seed": args.seed,
              "drop_path": drop_path, "training": training, "train_loss": history[-1]["train_loss"],
              "seconds": sum(line["seconds"] for line in history)}
    ops.write(args.out / "result.json", json.dumps(result, indent=1) + "\n")
    top5_too = f" (top-5 error {100 * (1 - top5):.2f}%)" if len(data.classes) > 5 else ""
    print(f"test error {100 * (1 - top1):.2f}%{top5_too} after the last epoch, on {len(test_rows)} "
          f"images; {args.out}/result.json")


def cross_entropy(logits, y, label_smoothing):
    return F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)    # of bfloat16 too


def learning_rate(args, epoch: int) -> float:
    """Return an epoch's: rising for --warm-up epochs, decaying to 0 after them as if there were
    none."""
    if epoch < args.warm_up:
        return args.lr * (epoch + 1) / args.warm_up
    if args.decay == "linear":
        return args.lr * (1 - epoch / args.epochs)
    return ops.cosine(args.lr, 0, epoch, args.epochs)


def search_of(arch: str) -> dict:
    """Return what found a cell that lies in the run folder of a search: the search's name in the
    papers' tables, its arguments but the seed, its seconds. Of other cells, their name."""
    try:
        found = ops.read_checkpoint(Path(arch).parent) if arch.endswith(".json") else None
    except ops.BadInput:
        found = None
    if not found or found["method"] == "evaluate":
        return {"cell": "random" if arch.startswith("random:") else arch, "search": {}}
    search = {k: v for k, v in found["args"].items() if k != "seed" and k not in ops.MAY_CHANGE}
    return {"cell": genotypes.row(found["method"], search), "search": search,
            "search_seconds": sum(line["seconds"] for line in found["run"]["history"])}


# ------------------------------------------------------------------------------- for your own code


def load(folder, device="cpu"):
    """Return a trained network in evaluation mode on a device, its classes' names, and the
    transform that its images take: from a PIL image or a uint8 tensor (3, H, W) to its input.

        network, classes, transform = evaluate.load("runs/evaluate-LPT_PDARTS-cifar100-1")
        logits, _ = network(transform(image)[None])               # (1, classes)
        print(classes[logits.argmax()])

    Reads weights and plain values alone, their checksums compared. Raises BadInput.
    """
    saved = ops.read_checkpoint(Path(folder))
    if saved["method"] != "evaluate":
        raise ops.BadInput(f"{folder} is a run of {saved['method']}.py, not evaluate.py")
    genotype = genotypes.validate(json.loads(saved["genotype"]), str(folder))
    network = Network(genotype, **saved["network"])
    network.load_state_dict(saved["parts"]["network"])
    size = saved["network"]["size"]
    resize = ([round(size[0] * 256 / 224)] if saved["network"]["imagenet"] else [min(size)])
    transform = v2.Compose([v2.ToImage(), v2.Resize(resize), v2.CenterCrop(size),
                            v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize(saved["mean"], saved["std"])])
    return ops.place(network, device).eval(), saved["classes"], transform


# ------------------------------------------------------------------------------------------- main


def main(argv=None):
    args, checkpoint = get_args(argv)
    if args.summary:
        print(summary(args.summary))
    elif args.count_params:
        count_parameters(args)
    else:
        train(args, checkpoint)


if __name__ == "__main__":
    ops.run(main)
