"""Learning by Passing Tests (LPT) for neural architecture search.

Algorithm 2 of "Skillearn: Machine Learning Inspired by Humans' Learning Skills" (Xie, Du and Ban,
arXiv 2012.04863), on DARTS. A tester picks test images that are hard for the testee and worth
learning from; the testee's architecture learns to pass the test.

    max_C min_A  R(A, W*(A), C, E*(C)) - lambda L(E*, X*, D_er^val)                       Eq. 11
    s.t.  E*(C), X*(C) = argmin  L(E, X, D_er^tr) + gamma L(E, X, sigma(C, E, D_b))       Eq. 7
          W*(A)        = argmin  L(A, W, D_ee^tr)                                         Eq. 6
    R = sum f(d) l(A, W, d) / sum f(d) over the bank,  f(d) = sigmoid(C(E(d))) in (0, 1)  Eq. 9-14

    A  alphas     architecture of the testee       D_ee^tr = D_er^tr  x, y            train stream
    W  w          weights of the testee            D_b                x_bank, y_bank  bank stream
    E  encoder    ResNet of the tester             D_er^val           x_val, y_val    val stream
    X  executor   linear layer: classes            W', E', X'         *_virtual: one step ahead
    C  creator    linear layer: selection f        lambda, gamma      lam, gamma

    python lpt.py --dataset cifar100 --encoder resnet18

Departures from the printed equations:
1. Eq. 23 leaves out the direct dependence of f on C, which Eq. 24 keeps; it is kept in both.
2. Eq. 22 prints a difference for E and one for X, Eq. 23 and 24 more of them. A central difference
   is linear in its direction, so one joint difference along (u_E, u_X) gives their sum.
3. A and C step on one evaluation of the objective; Algorithm 2 prints them one after the other.
4. Eq. 13 sums over the bank; here it is the mean over the bank's mini-batch, as of every loss.
5. W' and (E', X') are one step of the actual optimizer, before clipping: momentum and weight decay
   included.
6. Ablation 1's scalars are sigmoid(theta_d), from theta = 0, by Adam; the paper names no
   optimizer. Ablation 2 keeps gamma, which Eq. 26 leaves out: at 1 it is the same.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import darts_ops as ops
from darts_ops import call, central_difference, descend, global_sum, grad, virtual_weights


class Tester(nn.Module):
    """The tester's encoder E and executor X. Its creator C is apart: the other outer variable."""

    def __init__(self, encoder: str, num_classes: int):
        super().__init__()
        self.encoder = torchvision.models.get_model(encoder, weights=None)
        self.executor = nn.Linear(self.encoder.fc.in_features, num_classes)
        self.encoder.fc = nn.Identity()

    def forward(self, x):                                      # x (N, 3, H, W)
        features = self.encoder(x)                             # (N, features)
        return self.executor(features), features               # logits (N, classes)


@dataclass
class Learners:
    """Testee and tester with the optimizers of their weights; alphas is A, creator is C."""
    testee: nn.Module
    alphas: list
    testee_opt: torch.optim.SGD
    tester: nn.Module
    creator: list                                              # [weight, bias]; ablation 1: [theta]
    tester_opt: torch.optim.SGD


def selection(creator, features, rows):
    """f(d) in (0, 1), how likely each example is in the test, (N,).                  # LPT Eq. 12
    Ablation 1 has no features: a learnable scalar per bank example.                 # LPT Eq. 25"""
    if features is None:
        return torch.sigmoid(creator[0][rows])
    return torch.sigmoid(F.linear(features, *creator)).squeeze(1)


def created_test_loss(creator, logits, features, y_bank):
    """L(E, X, sigma(C, E, D_b)).                                                    # LPT Eq. 13"""
    losses = F.cross_entropy(logits, y_bank, reduction="none")
    return (selection(creator, features, None) * losses).mean()


def tester_loss(tester, creator, batches, gamma, ablation):
    """What E and X minimise in stage II; tester(x) returns logits and features.       # LPT Eq. 7
    Ablation 2 learns from the created test alone.                                   # LPT Eq. 26"""
    (x, y, _), (x_bank, y_bank, _), _ = batches
    loss = gamma * created_test_loss(creator, *tester(x_bank), y_bank)
    return loss if ablation == 2 else F.cross_entropy(tester(x)[0], y) + loss


def outer_gradients(m: Learners, batches, order=2, lam=1.0, gamma=1.0, ablation=0, radius=1e-2):
    """dJ/dA and dJ/dC of J = R - lambda L(E', X', D_er^val): A descends J, C ascends it.

    batches: (x, y, rows) of train, bank and validation stream. order 1 sets xi = 0 for A.
    Returns (gradients of alphas, of creator, test loss R, mean selection). Changes no state.
    """
    (x, y, _), (x_bank, y_bank, rows), (x_val, y_val, _) = batches
    w = list(m.testee.parameters())

    # Stage I: the testee learns one step, W' = W - xi grad_W L(A, W, D_ee^tr)     # LPT Eq. 6, 16
    w_virtual = []
    if order == 2:
        loss = F.cross_entropy(call(m.testee, w, x, m.alphas), y)
        w_virtual = virtual_weights(m.testee_opt, w, grad(loss, w))

    # Stage II: the tester learns one step from its data and the created test         # LPT Eq. 18
    ex_virtual, features, tester_val_loss = [], None, 0.0
    if ablation != 1:
        ex = list(m.tester.parameters())
        loss = tester_loss(lambda x: call(m.tester, ex, x), m.creator, batches, gamma, ablation)
        ex_virtual = virtual_weights(m.tester_opt, ex, grad(loss, ex))
        features = call(m.tester, ex_virtual, x_bank)[1]
        tester_val_loss = F.cross_entropy(call(m.tester, ex_virtual, x_val)[0], y_val)

    # Validation stage: one evaluation and one backward pass serve A and C        # LPT Eq. 15, 19
    losses = F.cross_entropy(call(m.testee, w_virtual or [p.detach() for p in w], x_bank, m.alphas),
                             y_bank, reduction="none")                               # LPT Eq. 8
    f = selection(m.creator, features, rows)
    difficulty = global_sum((f * losses).sum()) / global_sum(f.sum())             # LPT Eq. 9, 14
    parts = (m.alphas, m.creator, w_virtual, ex_virtual)
    grads = iter(grad(difficulty - lam * tester_val_loss, [t for part in parts for t in part]))
    # the direct parts; v = dJ/dW', u = dJ/d(E', X')
    g_alpha, g_creator, v, u = ([next(grads) for _ in part] for part in parts)

    # dJ/dA through W': - xi (d2 L(A, W, D_ee^tr) / dA dW) v                      # LPT Eq. 16, 17
    if order == 2:
        def grad_alpha(w):
            return grad(F.cross_entropy(call(m.testee, w, x, m.alphas), y), m.alphas)

        xi = m.testee_opt.param_groups[0]["lr"]
        product = central_difference(grad_alpha, w, v, radius)
        g_alpha = [g - xi * p for g, p in zip(g_alpha, product)]

    # dJ/dC through E', X': - gamma xi (d2 L(E, X, sigma) / dC d(E, X)) u            # LPT Eq. 20-24
    if ablation != 1:
        def grad_creator(ex):
            with torch.no_grad():                              # C acts after E and X
                logits, features = call(m.tester, ex, x_bank)
            return grad(created_test_loss(m.creator, logits, features, y_bank), m.creator)

        xi = m.tester_opt.param_groups[0]["lr"]
        product = central_difference(grad_creator, ex, u, radius)
        g_creator = [g - gamma * xi * p for g, p in zip(g_creator, product)]
    return g_alpha, g_creator, difficulty.detach(), f.detach().mean()


def get_args(argv=None):
    parser = ops.new_parser("Search a cell by Learning by Passing Tests (arXiv 2012.04863).")
    add, real = parser.add_argument, ops.real
    add("--dataset", type=ops.dataset_name, default="cifar100",
        help="cifar10, cifar100, imagenet, folder (in --data), folder:DIR, synthetic[:CLASSES]")
    add("--encoder", choices=("resnet18", "resnet50"), default="resnet18",
        help="the tester's encoder E (§3.2.2)")
    add("--lambda", dest="lam", type=real, default=1.0, help="weight of meaningfulness (§3.2.2)")
    add("--gamma", type=real, default=1.0, help="weight of the created test in stage II (§3.2.2)")
    add("--ablation", type=int, choices=(0, 1, 2), default=0,
        help="1: a selection scalar per bank image, no tester (Eq. 25); 2: the tester learns from "
             "the created test alone (Eq. 26)")
    add("--tester-lr", type=real, default=0.025, help="of E and X, cosine to 0 (§3.2.2)")
    add("--creator-lr", type=real, default=3e-4, help="of C, Adam (§3.2.2)")
    add("--creator-weight-decay", type=real, default=1e-3, help="of C (§3.2.2)")
    add("--theta-lr", type=real, default=1e-2,
        help="of ablation 1's scalars, Adam without weight decay; not in the paper")
    ops.search_arguments(parser)
    return ops.parse_search(parser, argv, "lpt", {"all": {"batch_size": 64}})      # §3.2.2


@torch.no_grad()
def review(tester, creator, data, rows, batch_size):
    """f of every image `rows`, (len(rows),), and the share of them that the tester gets right."""
    f, hits = [], 0
    for x, y in ops.batches(data, rows, batch_size):
        logits, features = tester(x)
        f.append(selection(creator, features, None))
        hits += (logits.argmax(1) == y).sum().item()
    return torch.cat(f), hits / len(rows)


def tests(data, rows, f, count=12):
    """For tests.png: the bank images that the tester weighs most and least, f (len(rows),)."""
    order = f.argsort(descending=True, stable=True).tolist()

    def pictures(picks):
        return [(image, f"{data.classes[data.labels[rows[i]]]}\nf = {f[i]:.4f}")
                for i, image in zip(picks, data.pixels(rows[picks]))]

    return {"Weighed most by the tester": pictures(order[:count]),
            "Weighed least by the tester": pictures(order[::-1][:count])}


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.pick_device(args)
    data = ops.load_images(args.dataset, args.data, device, args.image_size, workers=args.workers)
    train_rows, val_rows, _ = ops.split_rows(data.labels, args.seed, args.hold_out, args.subsets)
    train_stream = ops.Stream(data, train_rows, args.batch_size, args.seed, "train")
    bank_stream = ops.Stream(data, val_rows, args.batch_size, args.seed, "bank")
    val_stream = ops.Stream(data, val_rows, args.batch_size, args.seed, "val")
    run = ops.Run("lpt", args, checkpoint, [data])

    torch.manual_seed(args.seed)
    num_classes = len(data.classes)
    tester = ops.place(Tester(args.encoder, num_classes), device)
    ex = list(tester.parameters())
    tester_opt = torch.optim.SGD(ex, args.tester_lr, args.momentum, weight_decay=args.weight_decay)
    creator = list(nn.Linear(tester.executor.in_features, 1).to(device).parameters())
    creator_opt = torch.optim.Adam(creator, args.creator_lr, weight_decay=args.creator_weight_decay)
    if args.ablation == 1:                                     # departure 6
        creator = [nn.Parameter(torch.zeros(len(data.labels), device=device))]
        creator_opt = torch.optim.Adam(creator, args.theta_lr)

    for stage in run.stages():                                 # several in P-DARTS: a new testee
        (testee,), (testee_opt,), alphas, alpha_opt = ops.new_stage(
            args, stage, run.state["kept"], [num_classes], device)
        w = list(testee.parameters())
        m = Learners(testee, alphas, testee_opt, tester, creator, tester_opt)
        run.load({"testee": testee, "outer": nn.ParameterList(alphas + creator), "tester": tester,
                  "testee_opt": testee_opt, "alpha_opt": alpha_opt, "tester_opt": tester_opt,
                  "creator_opt": creator_opt}, alphas)
        steps = train_stream.epoch_steps()
        for epoch, step in run.steps(steps):
            learns = ops.schedule(args, stage, epoch, step, [testee], [testee_opt])
            tester_opt.param_groups[0]["lr"] = ops.cosine(args.tester_lr, 0, step // steps,
                                                          len(args.layers) * args.epochs)
            batches = train_stream(step), bank_stream(step), val_stream(step)
            x, y, _ = batches[0]
            figures = {}

            # Algorithm 2, 1. and 2.: A descends, C ascends the objective           # LPT Eq. 16-24
            if learns:
                with ops.autocast(device, args.amp == "bf16-all"):
                    g_alpha, g_creator, difficulty, f = outer_gradients(
                        m, batches, args.order, args.lam, args.gamma, args.ablation, args.radius)
                descend(alpha_opt, alphas, g_alpha, None, run.at("the architecture"), difficulty)
                descend(creator_opt, creator, [-g for g in g_creator], None, run.at("the creator"))
                figures = {"difficulty": difficulty, "selection": f}

            # 3. The tester's E and X                                                 # LPT Eq. 18
            if args.ablation != 1:
                with ops.autocast(device, args.amp != "off"):
                    loss = tester_loss(tester, creator, batches, args.gamma, args.ablation)
                descend(tester_opt, ex, grad(loss, ex), None, run.at("the tester"), loss)

            # 4. The testee's W
            with ops.autocast(device, args.amp != "off"):
                loss = F.cross_entropy(testee(x, alphas), y)
            descend(testee_opt, w, grad(loss, w), args.grad_clip, run.at("the testee"), loss)

            if not run.log(train_loss=loss, **figures):
                continue
            ops.evaluating(testee, tester)
            accuracy = ops.accuracy(lambda x: testee(x, alphas), data, val_rows, args.batch_size)
            if args.ablation == 1:
                f, tested = selection(creator, None, val_rows).detach(), {}
            else:
                f, hits = review(tester, creator, data, val_rows, args.batch_size)
                tested = {"tester_val_accuracy": hits}
            testee.train(), tester.train()
            run.end_epoch(val_accuracy=accuracy, **tested)
            run.picture("tests.png", tests(data, val_rows, f))

    ops.print_next(args)


if __name__ == "__main__":
    ops.run(main)
