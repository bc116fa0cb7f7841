"""Learning by Passing Tests (LPT) for neural architecture search.

Algorithm 2 of "Skillearn: Machine Learning Inspired by Humans' Learning Skills" (Xie, Du and Ban,
arXiv 2012.04863; LPT alone: arXiv 2011.15102), on DARTS. A tester weighs the images of a bank: more
if the testee finds them hard and if learning from them lowers the tester's own validation loss. The
testee's architecture learns to do well on the weighted bank, its test.

    max_C min_A  R(A, W*(A), C, E*(C)) - lambda L(E*, X*, D_er^val)                       Eq. 11
    s.t.  E*(C), X*(C) = argmin  L(E, X, D_er^tr) + gamma L(E, X, sigma(C, E, D_b))       Eq. 7
          W*(A)        = argmin  L(A, W, D_ee^tr)                                         Eq. 6
    R = sum f(d) l(A, W, d) / sum f(d) over the bank,  f(d) = sigmoid(C(E(d))) in (0, 1)  Eq. 9-14

    A  A          architecture of the testee       D_ee^tr = D_er^tr  train  (x, y, rows)
    W  w          weights of the testee            D_b                bank   (x, y, rows)
    E  encoder    ResNet of the tester             D_er^val           val    (x, y, rows)
    X  executor   linear layer: classes            W', E', X'         *_virtual: one step ahead
    C  creator    linear layer: weight f           lambda, gamma      args.lam, args.gamma

    python lpt.py --dataset cifar100 --encoder resnet18
    python lpt.py --dataset cifar100 --encoder none          # the base alone: f = 1, no tester

Departures from the printed equations:
1. Eq. 23 leaves out the direct dependence of f on C, which Eq. 24 keeps; it is kept in both. Eq. 16
   leaves out the 1/sum f of the R that A descends, which Eq. 9 and 15 have; it is kept.
2. Eq. 22 prints a difference for E and one for X, and a third stands below Eq. 23. The product that
   they approximate is linear in its direction, so one joint difference along (u_E, u_X) gives the
   sum.
3. A and C step on one evaluation of the objective; Algorithm 2 prints them one after the other.
4. Eq. 13 sums over the bank; here it is the mean over the bank's mini-batch, as of every loss.
5. W' and (E', X') are one step of the actual optimizer, before clipping: momentum and weight decay
   included.
6. Ablation 1's scalars are sigmoid(theta_d), from theta = 0, by Adam for those in the batch alone;
   the paper names no optimizer. Ablation 2 keeps gamma, which Eq. 26 leaves out: at 1 the same.
7. Where the paper is silent or contradicts itself: PC-DARTS has batch 64 at its rate for 256;
   P-DARTS keeps its three stages of 25 epochs; on ImageNet the tester has CIFAR's rates; C's Adam
   has torch's betas; A's gradient is not clipped. docs/companion.md compares the released code.
8. E is torchvision's ResNet with ImageNet's stem: at 32 pixels its last map is a single pixel.
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import darts_ops as ops
from darts_ops import (
    at_weights,
    central_difference,
    descend,
    detached,
    grad,
    gradients,
    sgd_step,
    virtual_weights,
)

# -------------------------------------------------------------------------------------- arguments


def get_args(argv=None):
    parser = ops.new_parser("Search a cell by Learning by Passing Tests (arXiv 2012.04863).",
                            "python lpt.py --dataset cifar100 --encoder resnet18")
    add, real = parser.add_argument, ops.real
    add("--dataset", type=ops.dataset_name, default="cifar100",
        help="cifar10, cifar100, imagenet, folder (at --data), folder:DIR, synthetic[:CLASSES]")
    add("--encoder", choices=("resnet18", "resnet50", "none"), default="resnet18",
        help="encoder E of the tester (§3.2.2); none: run the base search itself, without a tester")
    add("--lambda", dest="lam", type=real, default=1.0,
        help="weight of the tester's validation loss in A's and C's objective (§3.2.2)")
    add("--gamma", type=real, default=1.0,
        help="weight of the created test in the tester's training loss (§3.2.2)")
    add("--ablation", type=int, choices=(0, 1, 2), default=0,
        help="1: a trained number per bank image replaces the tester (Eq. 25); 2: the tester "
             "trains on the created test alone (Eq. 26)")
    add("--tester-lr", type=real, default=0.025,
        help="learning rate of the tester (E and X): SGD, cosine decay to 0 (§3.2.2)")
    add("--creator-lr", type=real, default=3e-4,
        help="learning rate of the creator C: Adam (§3.2.2)")
    add("--creator-weight-decay", type=real, default=1e-3, help="weight decay of C (§3.2.2)")
    add("--theta-lr", type=real, default=1e-2,
        help="learning rate of ablation 1's numbers: Adam without weight decay; not in the paper")
    add("--created-test", choices=("printed", "normalized"), default="printed",
        help="its loss in stage II: Eq. 13, or Eq. 13 divided by the sum of f as in Eq. 9")
    ops.search_arguments(parser)
    return ops.parse_search(parser, argv, "lpt", lambda chosen: (
        {} if chosen.encoder == "none" else {"batch_size": 64}))                  # §3.2.2


# --------------------------------------------------------------------------------------- learners


class Tester(nn.Module):
    """The tester's encoder E and executor X. The creator C is kept apart, as an outer variable."""

    def __init__(self, encoder: str, num_classes: int):
        super().__init__()
        self.encoder = torchvision.models.get_model(encoder, weights=None)
        self.executor = nn.Linear(self.encoder.fc.in_features, num_classes)
        self.encoder.fc = nn.Identity()

    def forward(self, x):                                      # x (N, 3, H, W)
        features = self.encoder(x)                             # (N, features)
        return self.executor(features), features               # logits (N, classes)


class ScalarAdam(torch.optim.SparseAdam):
    """Adam that leaves alone the scalars of the images that are not in the batch (ablation 1)."""

    def step(self):
        for theta in self.param_groups[0]["params"]:
            theta.grad = theta.grad.to_sparse()
        super().step()


@dataclass
class Learners:
    """Testee and tester with their optimizers. creator is C: [weight, bias], with ablation 1
    [theta], without a tester []."""
    testee: nn.Module
    testee_opt: torch.optim.SGD
    A: nn.Module
    alpha_opt: torch.optim.Adam | None = None
    tester: Tester | None = None
    tester_opt: torch.optim.SGD | None = None
    creator: list = field(default_factory=list)
    creator_opt: torch.optim.Optimizer | None = None

    @property
    def alphas(self) -> list:
        return list(self.A.parameters())

    @property
    def w(self) -> list:
        return list(self.testee.parameters())

    @property
    def ex(self) -> list:
        return list(self.tester.parameters()) if self.tester else []


def new_tester(args, data, device) -> dict:
    """Return the tester and the creator with their optimizers, as fields of Learners; with ablation
    1 the scalars alone, with --encoder none nothing."""
    if args.encoder == "none":
        return {}
    if args.ablation == 1:                                                        # departure 6
        theta = [nn.Parameter(torch.zeros(len(data.labels), device=device))]
        return dict(creator=theta, creator_opt=ScalarAdam(theta, args.theta_lr))
    tester = ops.place(Tester(args.encoder, len(data.classes)), device)
    creator = list(nn.Linear(tester.executor.in_features, 1).to(device).parameters())
    return dict(tester=tester, creator=creator,
                tester_opt=torch.optim.SGD(tester.parameters(), args.tester_lr, args.momentum,
                                           weight_decay=args.weight_decay),
                creator_opt=torch.optim.Adam(creator, args.creator_lr,
                                             weight_decay=args.creator_weight_decay))


# ----------------------------------------------------------------------------------------- losses
# A network that a loss takes is a module, or a module at_weights: both are functions of the images.


def testee_loss(testee, A, batch):
    x, y, _ = batch
    return F.cross_entropy(testee(x, A), y)                                       # LPT Eq. 6


def selection(creator, features):
    """Return f(d) in (0, 1), the weight of each image in the test; features (N, F) -> (N,)."""
    return torch.sigmoid(F.linear(features, *creator)).squeeze(1)                 # LPT Eq. 12


def created_test_loss(creator, logits, features, y, created_test):
    """Return L(E, X, sigma(C, E, D_b)) from the tester's outputs on the bank; normalized: divided
    by its size, as R is, so that E cannot shrink it by selecting less."""
    losses, f = F.cross_entropy(logits, y, reduction="none"), selection(creator, features)
    if created_test == "normalized":
        return ops.weighted_mean(losses, f)
    return (f * losses).mean()                                                    # LPT Eq. 13


def tester_loss(tester, creator, train, bank, args):
    """Return what E and X minimise in stage II."""
    (x, y, _), (x_bank, y_bank, _) = train, bank
    test = created_test_loss(creator, *tester(x_bank), y_bank, args.created_test)
    if args.ablation == 2:
        return args.gamma * test                                                  # LPT Eq. 26
    return F.cross_entropy(tester(x)[0], y) + args.gamma * test                   # LPT Eq. 7


def validation_objective(m: Learners, w, ex, bank, val, args):
    """Return (J, R, f) at the weights w and ex = (E, X): J = R - lambda L(E, X, D_er^val), f (N,).
    """
    x_bank, y_bank, rows = bank
    losses = F.cross_entropy(at_weights(m.testee, w)(x_bank, m.A), y_bank,
                             reduction="none")                                    # LPT Eq. 8
    if not m.tester:
        f = torch.ones_like(losses)
        if m.creator:
            f = torch.sigmoid(m.creator[0])[rows]                                 # LPT Eq. 25
        R = ops.weighted_mean(losses, f)
        return R, R, f
    tester, (x_val, y_val, _) = at_weights(m.tester, ex), val
    # C is in f directly, too: what LPT Eq. 23 leaves out and LPT Eq. 24 keeps (departure 1)
    f = selection(m.creator, tester(x_bank)[1])
    R = ops.weighted_mean(losses, f)                              # LPT Eq. 9; by LPT Eq. 14, sum f
    return R - args.lam * F.cross_entropy(tester(x_val)[0], y_val), R, f          # LPT Eq. 15


# ------------------------------------------------------------------------------------ the problem


def objective(m: Learners, batches, args):
    """Return (J, R, f) with one step in place of each argmin, in a graph that reaches A and C.

    Written in Skillearn's general form: stage by stage a step on the stage's loss, given what the
    stages before have learned (its Eq. 1, 3, 4; Tables 3, 4), then the validation objective of the
    parameters that no stage learns (Eq. 5; Table 5).
    """
    (train, bank, val), w, ex = batches, m.w, m.ex

    # Stage I: the testee learns
    if args.order == 2:
        loss = testee_loss(at_weights(m.testee, w), m.A, train)              # LPT Eq. 6
        w = sgd_step(m.testee_opt, grad(loss, w, graph=True))

    # Stage II: the tester learns from its data and the created test
    if m.tester:
        loss = tester_loss(at_weights(m.tester, ex), m.creator, train, bank, args)  # LPT Eq. 7
        ex = sgd_step(m.tester_opt, grad(loss, ex, graph=True))                   # LPT Eq. 18

    # Validation stage, LPT Eq. 11, as LPT Eq. 19 has it one step ahead
    return validation_objective(m, w, ex, bank, val, args)


# -------------------------------------------------------------------------------------- algorithm


@ops.graphed
def outer_gradient(m: Learners, batches, args):
    """Return dJ/dA and dJ/dC of objective, by finite differences, with R and f. Changes no state.
    With order 1 A's term through W' is left out (its xi = 0)."""
    (train, bank, val), w, ex = batches, m.w, m.ex
    if args.gradient == "exact":
        J, R, f = objective(m, batches, args)
        return *gradients(J, m.alphas, m.creator), R.detach(), f.detach()

    # Stage I: the testee learns one step
    w_virtual, w_wanted = detached(w), []                      # order 1: W' = W, v is not needed
    if args.order == 2:
        loss = testee_loss(at_weights(m.testee, w), m.A, train)
        w_virtual = virtual_weights(m.testee_opt, grad(loss, w))                  # LPT Eq. 16's W'
        w_wanted = w_virtual

    # Stage II: the tester learns one step from its data and the created test
    ex_virtual = []
    if m.tester:
        loss = tester_loss(at_weights(m.tester, ex), m.creator, train, bank, args)
        ex_virtual = virtual_weights(m.tester_opt, grad(loss, ex))                # LPT Eq. 18

    # Validation stage: one evaluation and one backward pass serve A and C
    J, R, f = validation_objective(m, w_virtual, ex_virtual, bank, val, args)     # LPT Eq. 19
    g_alpha, g_creator, v, u = gradients(J, m.alphas, m.creator, w_wanted, ex_virtual)

    # dJ/dA through W': v = dJ/dW'
    if args.order == 2:
        def grad_alpha(w):
            return grad(testee_loss(at_weights(m.testee, w), m.A, train), m.alphas)

        xi = m.testee_opt.param_groups[0]["lr"]
        product = central_difference(grad_alpha, w, v, args.radius)               # LPT Eq. 17
        g_alpha = [g - xi * p for g, p in zip(g_alpha, product)]                  # LPT Eq. 16

    # dJ/dC through E' and X': u = dJ/d(E', X') holds the validation loss's part (LPT Eq. 20) and
    # R's (LPT Eq. 23, LPT Eq. 24), so that one difference serves all (departure 2)
    if m.tester:
        x_bank, y_bank, _ = bank

        def grad_creator(ex):
            with torch.no_grad():                              # differentiated by C alone
                logits, features = at_weights(m.tester, ex)(x_bank)
            return grad(created_test_loss(m.creator, logits, features, y_bank, args.created_test),
                        m.creator)

        xi = m.tester_opt.param_groups[0]["lr"]
        product = central_difference(grad_creator, ex, u, args.radius)            # LPT Eq. 22
        g_creator = [g - args.gamma * xi * p for g, p in zip(g_creator, product)]  # LPT Eq. 21
    return g_alpha, g_creator, R.detach(), f.detach()


@ops.graphed
def tester_gradient(m: Learners, batches, args):
    """Return the gradients of E and X in stage II, and their loss."""
    train, bank, _ = batches
    with ops.autocast(train[0].device, args.amp != "off"):
        loss = tester_loss(m.tester, m.creator, train, bank, args)
    return grad(loss, m.ex), loss.detach()


@ops.graphed
def testee_gradient(m: Learners, batches, args):
    """Return W's gradient in stage I, and its loss."""
    train, _, _ = batches
    with ops.autocast(train[0].device, args.amp != "off"):
        loss = testee_loss(m.testee, m.A, train)
    return grad(loss, m.w), loss.detach()


def algorithm_2(m: Learners, batches, args, learns=True):
    """Take an iteration of Algorithm 2, A's and C's steps only if A learns. Returns its figures."""
    device, figures = batches[0][0].device, {}

    # 1. and 2. A descends the objective, C ascends it
    if learns:
        with ops.autocast(device, args.amp == "bf16-all"):
            g_alpha, g_creator, R, f = outer_gradient(m, batches, args)
        m.A.step(m.alpha_opt, g_alpha)
        if m.creator:
            descend(m.creator_opt, [-g for g in g_creator], "the creator")
        figures = {"difficulty": R, "selection": f.mean()}

    # 3. The tester's E and X
    if m.tester:
        g, figures["tester_loss"] = tester_gradient(m, batches, args)
        descend(m.tester_opt, g, "the tester")

    # 4. The testee's W
    g, loss = testee_gradient(m, batches, args)
    descend(m.testee_opt, g, "the testee", args.grad_clip)
    return {"train_loss": loss, **figures}


# ------------------------------------------------------------------------------------------- main


def row(args):
    """Return the search's row in the papers' tables."""
    name = args.title if args.encoder == "none" else f"LPT-R{args.encoder[6:]}-{args.title}"
    if args.ablation:
        name += f", ablation {args.ablation}"
    return ops.row(name, args, "encoder", "ablation")


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.start(args)
    data = ops.load_images(args.dataset, args, device)
    train_rows, val_rows, _ = ops.split_rows(data.labels, args.seed, args.hold_out, args.subsets)
    train_stream, bank_stream, val_stream = (
        ops.Stream(data, rows, args.batch_size, args.seed, name, args.flip)
        for name, rows in (("train", train_rows), ("bank", val_rows), ("val", val_rows)))
    run = ops.Run("lpt", args, checkpoint, [data], row(args))

    ops.seed_all("tester", args.seed)
    tester_fields = new_tester(args, data, device)
    for stage in ops.stages(run):                              # several in P-DARTS: a new testee
        A, alpha_opt = ops.new_architecture(run, device)
        (testee,), (testee_opt,) = ops.new_networks(run, [data], device)
        m = Learners(testee, testee_opt, A, alpha_opt, **tester_fields)
        run.load({"testee": testee, "testee_opt": testee_opt, "A": A, "alpha_opt": alpha_opt,
                  **tester_fields, "creator": nn.ParameterList(m.creator)})
        for epoch in run.epochs(train_stream.epoch_steps()):
            ops.set_epoch(args, stage, epoch, A, [testee], [testee_opt], m.tester_opt,
                          args.tester_lr)
            for step in run.steps(m):
                val = val_stream(step) if m.tester else None   # D_er^val is the tester's alone
                batches = train_stream(step), bank_stream(step), val
                run.log_step(**algorithm_2(m, batches, args, ops.learns(args, epoch)))

            figures, f = {}, None
            if args.ablation == 1:
                f = torch.sigmoid(m.creator[0].detach())[val_rows]
            with ops.evaluating(testee, *([m.tester] if m.tester else [])):
                figures["val_accuracy"] = ops.accuracy(lambda x: testee(x, A), data, val_rows,
                                                       args.batch_size)
                if m.tester:
                    f, figures["tester_val_accuracy"] = score_bank(m, data, val_rows,
                                                                   args.batch_size)
            ops.end_epoch(run, A, **figures)
            if f is not None:
                run.picture("tests", tests(data, val_rows, f.cpu()))
        ops.end_stage(run, A)

    ops.print_next(args)


# --------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def score_bank(m: Learners, data, rows, batch_size):
    """Return f of every image `rows`, (len(rows),), and the share of them that the tester gets
    right."""
    f, hits = [], 0
    for x, y in ops.batches(data, rows, batch_size):
        logits, features = m.tester(x)
        f.append(selection(m.creator, features))
        hits += (logits.argmax(1) == y).sum().item()
    return torch.cat(f), hits / len(rows)


def tests(data, rows, f, count=12):
    """Return the bank images that the tester weighs most and least, f (len(rows),), as rows of a
    picture."""
    order, f = f.argsort(descending=True, stable=True).tolist(), f.tolist()
    labels = data.labels.tolist()

    def pictures(picks):
        return [(image, f"{data.classes[labels[rows[i]]]}\nf = {f[i]:.4f}")
                for i, image in zip(picks, data.pixels(rows[picks]))]

    return {"Weighed most by the tester": pictures(order[:count]),
            "Weighed least by the tester": pictures(order[::-1][:count])}


if __name__ == "__main__":
    ops.run(main)
