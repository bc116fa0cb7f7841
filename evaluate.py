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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
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
        edges, self.concat = genotype[2:] if reduction else genotype[:2]
        self.preprocess0 = ops.preprocess(C_prev_prev, C, reduction_prev, affine=True)
        self.preprocess1 = ops.preprocess(C_prev, C, affine=True)
        self.inputs = [state for _, state in edges]
        self.ops = nn.ModuleList(operation(name, C, 2 if reduction and state < 2 else 1)
                                 for name, state in edges)

    def forward(self, s0, s1, masks=None):
        """masks: an iterator over Network.path_masks, or None."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(0, len(self.ops), 2):
            terms = []
            for op, state in zip(self.ops[i:i + 2], self.inputs[i:i + 2]):
                term = op(states[state])
                if masks and not isinstance(op, nn.Identity):
                    term = term * next(masks)
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

    size: (H, W) of the images; large ones (ops.LARGE) pass three convolutions of stride 2 first;
    amp: compute in bfloat16, which DataParallel's threads learn only from the module itself.
    """

    def __init__(self, genotype, C, num_classes, layers, auxiliary=True, size=(32, 32), amp=False):
        super().__init__()
        large = min(size) >= ops.LARGE
        self.drop_path, self.auxiliary_at, self.amp = 0.0, 2 * layers // 3, amp
        self.stem0, self.stem1, C_prev = ops.stem(C, large)
        self.cells, C_prev_prev, reduction, self.auxiliary = nn.ModuleList(), C_prev, large, None
        size = [-(-n // 8) if large else n for n in size]
        for i in range(layers):
            reduction_prev, reduction = reduction, i in (layers // 3, 2 * layers // 3)
            C, size = (2 * C, [-(-n // 2) for n in size]) if reduction else (C, size)
            cell = Cell(genotype, C_prev_prev, C_prev, C, reduction, reduction_prev)
            self.cells.append(cell)
            C_prev_prev, C_prev = C_prev, len(cell.concat) * C
            if i == self.auxiliary_at and auxiliary:
                self.auxiliary = auxiliary_head(C_prev, num_classes, size)
        self.classifier = nn.Linear(C_prev, num_classes)
        self.paths = sum(not isinstance(op, nn.Identity) for cell in self.cells for op in cell.ops)

    def path_masks(self, x):
        """Return drop-path's factors, 0 or 1 / (1 - rate), as an iterator over the operations
        other than the identity: (N, 1, 1, 1) each. One draw serves all, as launches cost time."""
        keep = 1 - self.drop_path
        return iter(x.new_empty(self.paths, len(x), 1, 1, 1).bernoulli_(keep).div_(keep))

    def forward(self, x):
        with ops.autocast(x.device, self.amp):
            s0 = self.stem0(x)
            s1, auxiliary = self.stem1(s0), None
            masks = self.path_masks(s0) if self.drop_path and self.training else None
            for i, cell in enumerate(self.cells):
                out = cell(s0, s1, masks)
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
                       warm_up=5, decay="linear", weight_decay=3e-5, label_smoothing=0.1,
                       drop_path=0.0, image_size=224)          # Skillearn §3.2.2, P-DARTS §4.3
QUICK = dict(dataset="synthetic", image_size=16, layers=5, channels=8, epochs=4, batch_size=50,
             warm_up=0, cutout=4, log_every=10)


def recipe(chosen) -> dict:
    """Return the defaults for the chosen cell, data set and --quick: drop-path as in P-DARTS' and
    PC-DARTS' papers on their cells, and the batch of IL and JL on them (Skillearn §4.3.1)."""
    found = origin(chosen.arch or "")
    on_them = found["base"] in ("pdarts", "pcdarts")
    return (dict(drop_path=0.3 if on_them else 0.2,
                 batch_size=64 if on_them and found.get("method") == "il" else 96)
            | (RECIPE_IMAGENET if chosen.dataset == "imagenet" else {})
            | (QUICK if chosen.quick else {}))


def get_args(argv=None):
    parser = ops.new_parser("Train a network of stacked cells and test it once (DARTS §A.2).",
                            "python evaluate.py --arch LPT_PDARTS")
    add, real = parser.add_argument, ops.real
    add("--arch", help="a published cell (python genotypes.py --help lists them), a genotype.json, "
                       "random:SEED, the text Genotype(...) or a log with it")
    add("--dataset", type=ops.dataset_name, default="cifar100",
        help="cifar10, cifar100, imagenet, folder (at --data), folder:DIR, synthetic[:CLASSES]")
    add("--count-params", action=ops.flag, default=False,
        help="print the numbers of parameters and of multiply-adds, and exit")
    add("--summary", type=ops.path, nargs="+", metavar="RUNS",
        help="print a table of the results in these folders, and exit")
    ops.data_arguments(parser)
    add = parser.add_argument_group(
        "the network and its training (DARTS §A.2; Skillearn §3.2.2); defaults for --dataset and "
        "--arch").add_argument
    add("--layers", type=ops.number(int, 3), default=20, help="number of cells")
    add("--channels", type=ops.number(int, 2), default=36, help="channels C of the first cell")
    add("--epochs", type=ops.number(int, 1), default=600, help="passes over the training images")
    add("--batch-size", type=ops.number(int, 2), default=96,
        help="images per step, over all GPUs; 64 for IL's cells on P-DARTS and PC-DARTS (§4.3.1)")
    add("--lr", type=real, default=0.025, help="initial learning rate: SGD, falling to 0")
    add("--decay", choices=("cosine", "linear"), default="cosine",
        help="decay of the learning rate")
    add("--warm-up", type=ops.number(int, 0), default=0,
        help="epochs in which the learning rate rises to --lr")
    add("--momentum", type=ops.number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--weight-decay", type=real, default=3e-4, help="weight decay of SGD")
    add("--grad-clip", type=real, default=5.0,
        help="clip the gradient to this norm; 0: do not clip")
    add("--label-smoothing", type=ops.number(float, 0, 1), default=0.0,
        help="label smoothing of the training loss")
    add("--cutout", type=ops.number(int, 0),
        help="side in pixels of the square that is erased from training images; unless given, 16 "
             "or half of the image if that is less, and none from images of 96 pixels or more")
    add("--auxiliary", action=ops.flag, default=True, help="train with the auxiliary head")
    add("--auxiliary-weight", type=real, default=0.4,
        help="weight of the auxiliary head's loss")
    add("--drop-path", type=ops.number(float, 0, 0.99), default=0.2,
        help="rate of drop-path at the end of a linear rise; 0.3 for cells of P-DARTS and "
             "PC-DARTS")
    add("--amp", choices=("off", "bf16"), default="off", help="compute in bfloat16")
    ops.run_arguments(parser, log_every=50)
    args, checkpoint = ops.parse(parser, argv, "evaluate", recipe)
    if not args.arch and not args.summary:
        raise ops.BadInput("--arch: name a cell to evaluate")
    return args, checkpoint


def origin(arch: str) -> dict:
    """Return a cell's row in the tables, or its own name, the data and the base it was found on. If
    it lies in a search's run folder, also where that data was and what it was, how many of its
    images the search held out and what it cost; the row tells if it has not come to its end."""
    known, file = genotypes.PUBLISHED.get(arch), ops.path(arch)
    if known:
        return {"cell": known.row, "found_on": known.found_on, "base": known.base}
    other = {"cell": "random" if arch.startswith("random:") else arch, "found_on": "", "base": ""}
    if file.name != "genotype.json":
        return other
    try:
        search = json.loads((file.parent / "run.json").read_text())
        lines = (file.parent / "log.jsonl").read_text().splitlines()
        history, args, done = [json.loads(line) for line in lines], search["args"], len(lines)
        ended = done == search["epochs"] or "stopped" in history[-1]
        data = args.get("tasks") or [args["dataset"]]
        left = "" if ended else f", after {done} of {search['epochs']} epochs"
        return {"cell": search["row"] + left,
                "found_on": "+".join(name.partition(":")[0] for name in data),
                "base": args["base"], "method": search["method"],
                "found_at": search.get("folders", []), "found_in": search["sources"],
                "search_hold_out": args["hold_out"],
                "search_days": sum(line["seconds"] for line in history) / 86400
                * search["world_size"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return other


# ------------------------------------------------------------------------------- the three programs


def count_parameters(args):
    """Print the parameters of a cell's network without the auxiliary head, and its multiply-adds
    for an image, both in millions, as JSON."""
    classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[args.dataset]
    size = (args.image_size or 32,) * 2
    network = Network(genotypes.load(args.arch), args.channels, classes, args.layers, False,
                      size).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, *size))
    print(json.dumps({"arch": args.arch, "dataset": args.dataset,
                      "params_M": round(count_params(network), 3),
                      "multiply_adds_M": round(counter.get_total_flops() / 2e6, 1)}))


NETWORK = ("layers", "channels", "epochs")                        # a column of their own


def summary(folders: list[Path]) -> str:
    """Return a Markdown table of the results in folders and below them: a line per data set,
    network, cell and settings, whose seeds it takes together. Data, for training, for the test and
    of the search, are told apart by content. The papers' figures are shown only for their own
    settings."""
    groups = {}
    for file in sorted({each.resolve() for top in folders for each in top.rglob("result.json")}):
        r = json.loads(file.read_text())
        network = f"{r['layers']} cells, C {r['channels']}, {r['epochs']} epochs"
        on = f" found on {r['found_on']}" * (r["found_on"] not in ("", r["dataset"]))
        how = ", ".join(ops.settings(r["changed"], *NETWORK))
        cell = r["cell"] + on + (f", trained with {how}" if how else "")
        paper = ("-", "-") if r["changed"] else genotypes.paper_errors(
            r["cell"], r["found_on"], r["dataset"])
        key = (r["data"], network, cell, r["fingerprint"], r["test_fingerprint"],
               str(r.get("found_in")))
        groups.setdefault(key, (paper, []))[1].append((
            r["test_error"], r["top5_error"], r["params_M"], str(r["genotype"]),
            r.get("search_days")))
    lines = ["| cell | data | network | test error, % | top-5 | n | parameters, M | search | "
             "paper: error | top-5 |", "|---" * 10 + "|"]
    notes = []
    for (data, network, cell, *_), (paper, runs) in sorted(groups.items()):
        errors, top5, params, cells, days = zip(*runs)
        n, found = len(runs), len(set(cells))
        count = f"{n} trainings, {found} cell{'s' * (found > 1)}" if n > 1 else "1"
        top5, days = ([v for v in values if v is not None] for values in (top5, days))
        lines.append("| " + " | ".join((
            short(cell, notes), data, network, spread(errors), spread(top5), count,
            f"{statistics.mean(params):.3g}", duration(statistics.mean(days)) if days else "-",
            *paper)) + " |")
    return "\n".join(lines + [""] * bool(notes) + [f"[{i}] {note}" for i, note in
                                                   enumerate(notes, 1)])


def short(cell: str, notes: list[str]) -> str:
    """Return a row's name; one with more than two settings is shortened and goes into notes."""
    name, *rest = cell.split(", ")
    kept = [part for part in rest if part.startswith(("ablation", "after"))]
    if len(rest) - len(kept) <= 2:
        return cell
    if cell not in notes:
        notes.append(cell)
    return f"{', '.join([name, *kept])} [{notes.index(cell) + 1}]"


def duration(days: float) -> str:
    """Return how long a search took on one device, in days or, below 0.01 of them, in minutes."""
    return f"{days:.2g} d" if days >= 0.01 else f"{1440 * days:.2g} min"


def spread(values) -> str:
    """Return mean ± standard deviation; "-" of no values."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


@dataclass
class Learner:
    """A network in training. model: itself, or the wrapper that spreads a batch over GPUs."""
    network: Network
    optimizer: torch.optim.SGD
    model: nn.Module


@ops.graphed
def gradient(m: Learner, batch, args):
    """Return the gradient of the loss by every weight, the loss without the auxiliary head's part,
    and the accuracy, all on a batch."""
    x, y, _ = batch
    logits, auxiliary = m.model(x)
    loss = total = cross_entropy(logits, y, args.label_smoothing)
    if auxiliary is not None:
        total = loss + args.auxiliary_weight * cross_entropy(auxiliary, y, args.label_smoothing)
    total.backward()                                              # averaged by the wrapper
    return ([w.grad for w in m.optimizer.param_groups[0]["params"]], loss.detach(),
            (logits.argmax(1) == y).float().mean())


def chosen_cell(args, checkpoint) -> tuple[genotypes.Genotype, dict]:
    """Return the cell to train and its origin; a run that goes on takes its checkpoint's. Raises
    BadInput if the cell has changed since."""
    if not checkpoint:
        return genotypes.load(args.arch), origin(args.arch)
    cell = genotypes.validate(json.loads(checkpoint["genotype"]), str(args.out))
    try:
        now = genotypes.load(args.arch)
    except ops.BadInput:                                          # its file is elsewhere
        now = cell
    if now != cell:
        raise ops.BadInput(f"--resume: {args.arch} is not the cell that {args.out} began with")
    return cell, checkpoint["origin"]


def train(args, checkpoint):
    """Train a cell's network and test it once, after the last epoch: result.json."""
    genotype, found = chosen_cell(args, checkpoint)
    device = ops.start(args)
    data = ops.load_images(args.dataset, args, device)
    *halves, held = ops.split_rows(data.labels, args.seed, args.hold_out)
    rows = np.sort(np.concatenate(halves))
    cutout = args.cutout
    if cutout is None:
        cutout = 0 if data.large else min(16, min(data.size) // 2)
    stream = ops.Stream(data, rows, args.batch_size, args.seed, "evaluate", args.flip, cutout)
    test_data, test_rows = data, held
    if not args.hold_out:
        test_data = ops.load_images(args.dataset, args, device, data)
        test_rows = np.arange(len(test_data.labels))
    network_args = dict(C=args.channels, num_classes=len(data.classes), layers=args.layers,
                        auxiliary=args.auxiliary, size=list(data.size))
    run = ops.Run("evaluate", args, checkpoint, [data], found["cell"], {
        "network": network_args, "genotype": genotypes.to_json(genotype), "origin": found,
        "classes": data.classes, "zoom": data.zoom, "mean": data.mean.flatten().tolist(),
        "std": data.std.flatten().tolist()})
    if data.source in found.get("found_in", ()) and args.hold_out > found["search_hold_out"]:
        raise ops.BadInput(f"--hold-out {args.hold_out}: the search that found this cell held out "
                           f"{found['search_hold_out']} of these images and learned from the rest")
    if args.hold_out and data.folder and data.folder in found.get("found_at", ()) and (
            data.source not in found["found_in"]):
        raise ops.BadInput(f"--hold-out {args.hold_out}: the images of {args.dataset} have changed "
                           "since the search, which held out others")

    if not checkpoint:                     # a broken image is named now, not after the training
        for _ in ops.batches(test_data, test_rows, args.batch_size):
            pass
    ops.seed_all("network", args.seed)
    network = model = ops.place(Network(genotype, **network_args, amp=args.amp == "bf16"), device)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(
            network, [device] if device.type == "cuda" else None)
    elif device.type == "cuda" and torch.cuda.device_count() > 1:
        model = nn.DataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), args.lr, args.momentum,
                                weight_decay=args.weight_decay)
    m = Learner(network, optimizer, model)
    run.load({"network": network, "optimizer": optimizer})
    params = count_params(network)
    print(f"{args.arch}: {params:.3f} M parameters without the auxiliary head")

    for epoch in run.epochs(stream.epoch_steps()):
        optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
        network.drop_path = args.drop_path * epoch / args.epochs
        for step in run.steps(m):
            grads, loss, accuracy = gradient(m, stream(step), args)
            ops.descend(optimizer, grads, "the network", args.grad_clip)
            run.log_step(train_loss=loss, train_accuracy=accuracy)
        run.log_epoch()

    with ops.evaluating(network):
        hits = ops.hits(lambda x: network(x)[0], test_data, test_rows, args.batch_size, top=(1, 5))
    images = torch.bincount(test_data.labels[test_rows], minlength=len(data.classes))
    wrong = 100 * (1 - hits.sum(0) / len(test_rows))              # of all; for top 1 and top 5
    by_class = {name: round(100 * (1 - (right / n).item()), 4)
                for name, right, n in zip(data.classes, hits[:, 0], images) if n}
    history, top5 = run.state["history"], len(data.classes) > 5
    dataset = args.dataset.partition(":")[0]
    where = Path(data.folder).name if dataset == "folder" else args.dataset
    changed = {k: v for k, v in args.changed.items() if k not in ("arch", "dataset", "seed")}
    result = {"arch": args.arch, **found, "dataset": dataset, "data": where,
              "fingerprint": run.about["data"][0],
              "test_fingerprint": f"{test_data.fingerprint()}, {len(test_rows)} images",
              "genotype": genotype._asdict(), "test_error": round(wrong[0].item(), 4),
              "top5_error": round(wrong[1].item(), 4) if top5 else None, "class_errors": by_class,
              "test_images": len(test_rows), "params_M": round(params, 3), "layers": args.layers,
              "channels": args.channels, "epochs": args.epochs, "seed": args.seed,
              "drop_path": args.drop_path, "changed": changed,
              "train_loss": history[-1]["train_loss"],
              "seconds": sum(line["seconds"] for line in history)}
    ops.write(args.out / "result.json", json.dumps(result, indent=1) + "\n")
    top5_too = f" (top-5 error {wrong[1]:.2f}%)" if top5 else ""
    print(f"test error {wrong[0]:.2f}%{top5_too} after the last epoch, on {len(test_rows)} "
          f"images; {args.out}/result.json")


def cross_entropy(logits, y, label_smoothing):
    return F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)    # of bfloat16 too


def learning_rate(args, epoch: int) -> float:
    """Return an epoch's learning rate: rising for --warm-up epochs, then as if from epoch 0 on.
    A linear decay is P-DARTS' and PC-DARTS': to a fifth of its slope in the last five epochs."""
    left = args.epochs - epoch
    if epoch < args.warm_up:
        return args.lr * (epoch + 1) / args.warm_up
    if args.decay == "cosine":
        return ops.cosine(args.lr, 0, epoch, args.epochs)
    end = max(1, args.epochs - 5)
    return args.lr * ((left - 5) / end if left > 5 else left / (5 * end))


# ------------------------------------------------------------------------------- for your own code


def load(folder, device="cpu"):
    """Return a trained network in evaluation mode on a device, its classes' names, and the
    transform that its images take: from a PIL image of any mode or a uint8 tensor (3, H, W) to its
    input, as training read the image from its file.

        network, classes, transform = evaluate.load("runs/evaluate-LPT_PDARTS-cifar100-1")
        logits, _ = network(transform(image)[None])               # (1, classes)
        print(classes[logits.argmax()])

    Reads weights and plain values alone, their checksums compared. Raises BadInput.
    """
    saved = ops.read_checkpoint(Path(folder), "evaluate")
    done, epochs = len(saved["run"]["history"]), saved["args"]["epochs"]
    if done < epochs:
        raise ops.BadInput(f"{folder} has been trained for {done} of {epochs} epochs; finish it "
                           "with --resume")
    genotype = genotypes.validate(json.loads(saved["genotype"]), str(folder))
    network = Network(genotype, **saved["network"])
    network.load_state_dict(saved["parts"]["network"])
    mean, std = (torch.tensor(saved[name]).view(3, 1, 1) for name in ("mean", "std"))

    def transform(image):
        if torch.is_tensor(image):
            if image.dtype != torch.uint8:
                raise ops.BadInput(f"an image is a PIL image or a uint8 tensor, not {image.dtype}")
            image = v2.functional.to_pil_image(image)
        image = ops.centre(ops.as_rgb(image), saved["network"]["size"], saved["zoom"])
        return ops.normalised(v2.functional.pil_to_tensor(image)[None], mean, std)[0]

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
