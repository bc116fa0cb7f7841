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
1. Eq. 23 leaves out the direct dependence of f on C, which Eq. 24 keeps; it is kept in both. Eq. 16
   leaves out the 1/sum f of the R that A descends, which Eq. 9 and 15 have; it is kept.
2. Eq. 22 prints a difference for E and one for X, Eq. 23 and 24 more of them. The product that they
   approximate is linear in its direction, so one joint difference along (u_E, u_X) gives the sum.
3. A and C step on one evaluation of the objective; Algorithm 2 prints them one after the other.
4. Eq. 13 sums over the bank; here it is the mean over the bank's mini-batch, as of every loss.
5. W' and (E', X') are one step of the actual optimizer, before clipping: momentum and weight decay
   included.
6. Ablation 1's scalars are sigmoid(theta_d), from theta = 0, by Adam for those in the batch alone;
   the paper names no optimizer. Ablation 2 keeps gamma, which Eq. 26 leaves out: at 1 the same.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import darts_ops as ops
from darts_ops import call, central_difference, descend, detached, grad, virtual_weights

# -------------------------------------------------------------------------------------- arguments


def get_args(argv=None):
    parser = ops.new_parser("Search a cell by Learning by Passing Tests (arXiv 2012.04863).",
                            "python lpt.py --dataset cifar100 --encoder resnet18")
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
    add("--created-test", choices=("printed", "normalized"), default="printed",
        help="its loss in stage II: Eq. 13, or Eq. 13 divided by the sum of f, as Eq. 9 is")
    ops.search_arguments(parser)
    return ops.parse_search(parser, argv, "lpt", {"all": {"batch_size": 64}})      # §3.2.2


# --------------------------------------------------------------------------------------- learners


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
    tester: nn.Module | None                                   # ablation 1 has none
    creator: list                                              # [weight, bias]; ablation 1: [theta]
    tester_opt: torch.optim.SGD | None


# ----------------------------------------------------------------------------------------- losses


def selection(creator, features):
    """Return f(d) in (0, 1), how likely each example is in the test; features (N, F) -> (N,)."""
    return torch.sigmoid(F.linear(features, *creator)).squeeze(1)                 # LPT Eq. 12


def created_test_loss(creator, logits, features, y_bank, created="printed"):
    """Return L(E, X, sigma(C, E, D_b)) from the tester's outputs on the bank; normalized: divided
    by its size, as R is, so that E cannot shrink it by selecting less."""
    losses, f = F.cross_entropy(logits, y_bank, reduction="none"), selection(creator, features)
    if created == "normalized":
        return ops.global_sum((f * losses).sum()) / ops.global_sum(f.sum())
    return (f * losses).mean()                                                    # LPT Eq. 13


def tester_loss(tester, creator, batches, gamma, ablation, created="printed"):
    """Return what E and X minimise in stage II; tester(x) gives logits and features."""
    (x, y, _), (x_bank, y_bank, _), _ = batches
    test = created_test_loss(creator, *tester(x_bank), y_bank, created)
    if ablation == 2:
        return gamma * test                                                       # LPT Eq. 26
    return F.cross_entropy(tester(x)[0], y) + gamma * test                        # LPT Eq. 7


def validation_objective(m: Learners, w, ex, batches, lam, ablation):
    """Return (J, R, f), J = R - lambda L(E, X, D_er^val), at the weights w and ex = (E, X); f
    (N,)."""
    _, (x_bank, y_bank, rows), (x_val, y_val, _) = batches
    if ablation == 1:
        f, tester_val_loss = torch.sigmoid(m.creator[0])[rows], 0.0               # LPT Eq. 25
    else:
        f = selection(m.creator, call(m.tester, ex, x_bank)[1])                   # LPT Eq. 12
        tester_val_loss = F.cross_entropy(call(m.tester, ex, x_val)[0], y_val)
    losses = F.cross_entropy(call(m.testee, w, x_bank, m.alphas), y_bank,
                             reduction="none")                                    # LPT Eq. 8
    R = ops.global_sum((f * losses).sum()) / ops.global_sum(f.sum())              # LPT Eq. 9, 14
    return R - lam * tester_val_loss, R, f                                        # LPT Eq. 15, 19


# ------------------------------------------------------------------------------------ formulation


def formulation(m: Learners, batches, order=2, lam=1.0, gamma=1.0, ablation=0, created="printed"):
    """Return LPT in Skillearn's general form: the stages (its Tables 3 and 4), the objective of the
    validation stage (Table 5) and the groups of remaining parameters, A and C."""
    x, y, _ = batches[0]

    def testee_loss(w, learned):
        return F.cross_entropy(call(m.testee, w, x, m.alphas), y)                 # LPT Eq. 6

    def stage_2_loss(ex, learned):
        return tester_loss(lambda x: call(m.tester, ex, x), m.creator, batches, gamma, ablation,
                           created)                                               # LPT Eq. 7

    def validation(learned):
        return validation_objective(m, learned["testee"], learned.get("tester"), batches, lam,
                                    ablation)                                     # LPT Eq. 11

    def testee_step(w, g, learned):
        return ops.sgd_step(m.testee_opt, g) if order == 2 else detached(w)

    def tester_step(ex, g, learned):
        return ops.sgd_step(m.tester_opt, g)                                      # LPT Eq. 18

    stages = [ops.Stage("testee", list(m.testee.parameters()), testee_loss, testee_step)]
    if ablation != 1:
        stages += [ops.Stage("tester", list(m.tester.parameters()), stage_2_loss, tester_step)]
    return stages, validation, [m.alphas, m.creator]


def exact_gradients(*problem):
    """Return what outer_gradients does, by exact differentiation of the formulation;
    problem: formulation's arguments."""
    (_, R, f), (g_alpha, g_creator) = ops.skillearn(*formulation(*problem))
    return g_alpha, g_creator, R.detach(), f.detach().mean()


# -------------------------------------------------------------------------------------- algorithm


def outer_gradients(m: Learners, batches, order=2, lam=1.0, gamma=1.0, ablation=0,
                    created="printed", radius=1e-2):
    """Return dJ/dA and dJ/dC of J = R - lambda L(E', X', D_er^val), which A descends and C ascends,
    by finite differences.

    batches: (x, y, rows) of train, bank and validation stream. order 1 sets xi = 0 for A.
    Returns (gradients of alphas, of creator, test loss R, mean selection). Changes no state.
    """
    (x, y, _), (x_bank, y_bank, _), _ = batches
    w, ex_virtual = list(m.testee.parameters()), []

    # Stage I: the testee learns one step
    w_virtual, w_wanted = detached(w), []
    if order == 2:
        loss = F.cross_entropy(call(m.testee, w, x, m.alphas), y)
        w_virtual = virtual_weights(m.testee_opt, grad(loss, w))                  # W' of LPT Eq. 16
        w_wanted = w_virtual

    # Stage II: the tester learns one step from its data and the created test
    if ablation != 1:
        ex = list(m.tester.parameters())
        loss = tester_loss(lambda x: call(m.tester, ex, x), m.creator, batches, gamma, ablation,
                           created)
        ex_virtual = virtual_weights(m.tester_opt, grad(loss, ex))                # LPT Eq. 18

    # Validation stage: one evaluation and one backward pass serve A and C
    J, R, f = validation_objective(m, w_virtual, ex_virtual, batches, lam, ablation)
    g_alpha, g_creator, v, u = grad(J, m.alphas, m.creator, w_wanted, ex_virtual)

    # dJ/dA through W': v = dJ/dW'
    if order == 2:
        def grad_alpha(w):
            return grad(F.cross_entropy(call(m.testee, w, x, m.alphas), y), m.alphas)

        xi = m.testee_opt.param_groups[0]["lr"]
        product = central_difference(grad_alpha, w, v, radius)                    # LPT Eq. 17
        g_alpha = [g - xi * p for g, p in zip(g_alpha, product)]                  # LPT Eq. 16

    # dJ/dC through E' and X': u = dJ/d(E', X')
    if ablation != 1:
        def grad_creator(ex):
            with torch.no_grad():                              # C acts after E and X
                logits, features = call(m.tester, ex, x_bank)
            return grad(created_test_loss(m.creator, logits, features, y_bank, created), m.creator)

        xi = m.tester_opt.param_groups[0]["lr"]
        product = central_difference(grad_creator, ex, u, radius)                 # LPT Eq. 22
        g_creator = [g - gamma * xi * p for g, p in zip(g_creator, product)]      # LPT Eq. 20-24
    return g_alpha, g_creator, R.detach(), f.detach().mean()


# ------------------------------------------------------------------------------------------- main


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.start(args)
    data = ops.load_images(args.dataset, args.data, device, args.image_size, workers=args.workers)
    train_rows, val_rows, _ = ops.split_rows(data.labels, args.seed, args.hold_out, args.subsets)
    train_stream = ops.Stream(data, train_rows, args.batch_size, args.seed, "train")
    bank_stream = ops.Stream(data, val_rows, args.batch_size, args.seed, "bank")
    val_stream = ops.Stream(data, val_rows, args.batch_size, args.seed, "val")
    run = ops.Run("lpt", args, checkpoint, [data])

    torch.manual_seed(args.seed)
    num_classes, tester, tester_opt, tester_parts = len(data.classes), None, None, {}
    if args.ablation == 1:                                                        # departure 6
        creator = [nn.Parameter(torch.zeros(len(data.labels), device=device))]
        creator_opt = torch.optim.SparseAdam(creator, args.theta_lr)
    else:
        tester = ops.place(Tester(args.encoder, num_classes), device)
        ex = list(tester.parameters())
        tester_opt = torch.optim.SGD(ex, args.tester_lr, args.momentum,
                                     weight_decay=args.weight_decay)
        tester_parts = {"tester": tester, "tester_opt": tester_opt}
        creator = list(nn.Linear(tester.executor.in_features, 1).to(device).parameters())
        creator_opt = torch.optim.Adam(creator, args.creator_lr,
                                       weight_decay=args.creator_weight_decay)

    for stage in ops.stages(run):                              # several in P-DARTS: a new testee
        (testee,), (testee_opt,), alphas, alpha_opt = ops.new_stage(run, [num_classes], device)
        w = list(testee.parameters())
        m = Learners(testee, alphas, testee_opt, tester, creator, tester_opt)
        run.load({"testee": testee, "outer": nn.ParameterList(alphas + creator),
                  "testee_opt": testee_opt, "alpha_opt": alpha_opt, "creator_opt": creator_opt,
                  **tester_parts})
        for epoch in run.epochs(train_stream.epoch_steps()):
            learns = ops.schedule(args, stage, epoch, [testee], [testee_opt], tester_opt,
                                  args.tester_lr)
            for step in run.steps():
                batches = train_stream(step), bank_stream(step), val_stream(step)
                x, y, _ = batches[0]
                figures = {}

                # Algorithm 2, 1. and 2.: A descends the objective, C ascends it
                if learns:
                    problem = (m, batches, args.order, args.lam, args.gamma, args.ablation,
                               args.created_test)
                    with ops.autocast(device, args.amp == "bf16-all"):
                        g_alpha, g_creator, R, mean_f = (
                            exact_gradients(*problem) if args.gradient == "exact" else
                            outer_gradients(*problem, args.radius))
                    with ops.foresight(run, formulation(*problem), alphas, g_alpha):
                        descend(alpha_opt, g_alpha, run.at("the architecture"), R)
                    g_creator = [-g.to_sparse() if args.ablation == 1 else -g for g in g_creator]
                    descend(creator_opt, g_creator, run.at("the creator"))
                    figures = {"difficulty": R, "selection": mean_f}

                # 3. The tester's E and X
                if args.ablation != 1:
                    with ops.autocast(device, args.amp != "off"):
                        loss = tester_loss(tester, creator, batches, args.gamma, args.ablation,
                                           args.created_test)
                    descend(tester_opt, grad(loss, ex), run.at("the tester"), loss)

                # 4. The testee's W
                with ops.autocast(device, args.amp != "off"):
                    loss = F.cross_entropy(testee(x, alphas), y)
                descend(testee_opt, grad(loss, w), run.at("the testee"), loss, args.grad_clip)
                run.log(train_loss=loss, **figures)

            figures = {}
            if args.ablation == 1:
                f = torch.sigmoid(creator[0].detach())[val_rows]
            with ops.evaluating(testee, *([tester] if tester else [])):
                accuracy, = ops.accuracies(lambda x: testee(x, alphas), data, val_rows,
                                           args.batch_size)
                if args.ablation != 1:
                    f, figures["tester_val_accuracy"] = score_bank(tester, creator, data, val_rows,
                                                                   args.batch_size)
            ops.end_epoch(run, alphas, val_accuracy=accuracy, **figures)
            run.picture("tests", tests(data, val_rows, f.cpu()))

    ops.print_next(run)


# --------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def score_bank(tester, creator, data, rows, batch_size):
    """Return f of every image `rows`, (len(rows),), and the share of them that the tester gets
    right."""
    f, hits = [], 0
    for x, y in ops.batches(data, rows, batch_size):
        logits, features = tester(x)
        f.append(selection(creator, features))
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
