"""Cells of the DARTS search space: published ones, reading, writing, printing, drawing.

    python genotypes.py LPT_PDARTS           # the cell as text; LPT_PDARTS.svg beside it
    python genotypes.py runs/x/genotype.json # the same for a cell that a search wrote
    python genotypes.py random:1             # the same for a random cell
    python genotypes.py search.log           # the last Genotype(...) that a DARTS log prints

A cell has two inputs (states 0 and 1: the outputs of the cell before the previous one and of the
previous one) and intermediate nodes (states 2, 3, ...). Each node adds up two operations on earlier
states; the output concatenates nodes. A genotype lists (operation, input state), two per node.
"""

import argparse
import ast
import html
import json
import os
import re
from collections import namedtuple
from pathlib import Path

import numpy as np

PRIMITIVES = ["none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
              "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"]
SHORT = dict(zip(["none", "max", "avg", "skip", "sep3", "sep5", "dil3", "dil5"], PRIMITIVES))

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")
# row: its name in the papers' tables; base: the search that it was found with; found_on: that
# search's data; source: who published it
Published = namedtuple("Published", "row base found_on source normal reduce")


class BadInput(Exception):
    """The user's input cannot be used; the message is one line that says why."""


def path(text: str) -> Path:
    """Return a path with its leading ~ or ~name replaced by that home folder, if there is one."""
    return Path(os.path.expanduser(text))


# Nodes 2 | 3 | 4 | 5, all four concatenated. The LPT cells were published with the authors' code;
# tables are those of Skillearn. LPT_PDARTS is the cell of Tables 7 (CIFAR-100) and 9 (ImageNet).
PUBLISHED = {
    "DARTS_V1": Published(
        "DARTS-1st", "darts-1st", "cifar10", "Liu et al. 2019",
        "sep3:1 sep3:0 | skip:0 sep3:1 | skip:0 sep3:1 | sep3:0 skip:2",
        "max:0 max:1 | skip:2 max:0 | max:0 skip:2 | skip:2 avg:0"),
    "DARTS_V2": Published(
        "DARTS-2nd", "darts-2nd", "cifar10", "Liu et al. 2019",
        "sep3:0 sep3:1 | sep3:0 sep3:1 | sep3:1 skip:0 | skip:0 dil3:2",
        "max:0 max:1 | skip:2 max:1 | max:0 skip:2 | skip:2 max:1"),
    "PDARTS": Published(
        "P-DARTS", "pdarts", "cifar10", "Chen et al. 2019",
        "skip:0 dil3:1 | skip:0 sep3:1 | sep3:1 sep3:3 | sep3:0 dil5:4",
        "avg:0 sep5:1 | sep3:0 dil5:2 | max:0 dil3:1 | dil3:1 dil5:3"),
    "PC_DARTS_cifar": Published(
        "PC-DARTS", "pcdarts", "cifar10", "Xu et al. 2020",
        "sep3:1 skip:0 | sep3:0 dil3:1 | sep5:0 sep3:1 | avg:0 dil3:1",
        "sep5:1 max:0 | sep5:1 sep5:2 | sep3:0 sep3:3 | sep3:1 sep3:2"),
    "PC_DARTS_image": Published(
        "PC-DARTS", "pcdarts", "imagenet", "Xu et al. 2020",
        "skip:1 sep3:0 | sep3:0 skip:1 | sep3:1 sep3:3 | sep3:1 dil5:4",
        "sep3:0 skip:1 | dil5:2 max:1 | sep3:2 sep3:1 | sep5:0 sep3:3"),
    "LPT_DARTS_1ST_R18_CIFAR100": Published(
        "LPT-R18-DARTS-1st", "darts-1st", "cifar100", "authors' DARTS_CIFAR100_TS_1ST",
        "sep3:0 sep3:1 | skip:0 skip:1 | skip:0 skip:1 | skip:0 skip:1",
        "avg:0 avg:1 | skip:2 avg:0 | skip:2 avg:0 | skip:2 avg:0"),
    "LPT_DARTS_R18_CIFAR100": Published(
        "LPT-R18-DARTS-2nd", "darts-2nd", "cifar100", "authors' DARTS_CIFAR100_TS_18",
        "sep3:0 sep3:1 | skip:0 skip:1 | skip:0 skip:1 | skip:0 skip:1",
        "avg:0 skip:1 | avg:0 skip:2 | avg:0 skip:2 | skip:2 avg:0"),
    "LPT_DARTS_R50_CIFAR100": Published(
        "LPT-R50-DARTS-2nd", "darts-2nd", "cifar100", "authors' DARTS_CIFAR100_TS_50",
        "sep3:0 sep3:1 | skip:0 skip:1 | skip:0 dil3:1 | skip:0 dil3:1",
        "max:1 max:0 | max:0 dil5:2 | skip:2 max:0 | skip:2 max:0"),
    "LPT_DARTS_PLUS_R18_CIFAR100": Published(
        "LPT-R18-DARTS+", "darts+", "cifar100", "authors' DARTS_CIFAR100_TS_18_ES",
        "sep3:0 sep3:1 | skip:0 sep5:1 | sep3:0 sep3:1 | sep5:2 skip:0",
        "max:0 skip:1 | max:0 skip:2 | max:0 sep5:3 | max:0 skip:2"),
    "LPT_PDARTS": Published(
        "LPT-R18-P-DARTS", "pdarts", "cifar100", "authors' PDARTS_TS_CIFAR100",
        "sep3:0 sep5:1 | skip:0 sep3:1 | sep3:0 skip:2 | sep3:0 sep3:1",
        "dil3:0 avg:1 | dil3:1 sep5:2 | sep5:1 sep5:2 | avg:0 dil5:2"),
    "LPT_PDARTS_R50_CIFAR100": Published(
        "LPT-R50-P-DARTS", "pdarts", "cifar100", "authors' PDARTS_TS_50_CIFAR100",
        "skip:0 dil5:1 | sep3:0 sep3:1 | max:0 skip:2 | sep3:0 sep3:1",
        "avg:0 sep3:1 | avg:0 dil3:2 | avg:0 sep3:3 | avg:0 sep3:2"),
    "LPT_DARTS_MINUS_R18_CIFAR100": Published(
        "LPT-R18-DARTS-", "darts-", "cifar100", "authors' DARTS_MINUS_TS_CIFAR100_NEW",
        "sep3:0 sep3:1 | sep3:0 skip:1 | dil5:0 skip:1 | skip:0 skip:1",
        "sep3:0 sep5:1 | skip:2 avg:1 | skip:2 skip:3 | skip:2 skip:3"),
    "LPT_DARTS_1ST_R18_CIFAR10": Published(
        "LPT-R18-DARTS-1st", "darts-1st", "cifar10", "authors' DARTS_CIFAR10_TS_1ST",
        "sep3:0 dil5:1 | skip:0 sep5:1 | skip:0 dil3:1 | skip:0 dil3:1",
        "max:0 max:1 | skip:2 max:0 | max:1 skip:2 | skip:2 skip:3"),
    "LPT_DARTS_R18_CIFAR10": Published(
        "LPT-R18-DARTS-2nd", "darts-2nd", "cifar10", "authors' DARTS_CIFAR10_TS_18_V2",
        "sep3:0 sep3:1 | skip:0 sep5:1 | sep3:0 sep3:1 | skip:0 dil5:1",
        "avg:0 avg:1 | avg:0 skip:2 | skip:2 avg:1 | avg:0 skip:2"),
    "LPT_DARTS_R50_CIFAR10": Published(
        "LPT-R50-DARTS-2nd", "darts-2nd", "cifar10", "authors' DARTS_CIFAR10_TS_50",
        "sep3:0 sep3:1 | sep3:0 sep3:1 | sep3:0 skip:1 | skip:0 dil3:1",
        "dil3:0 sep3:1 | max:0 skip:2 | skip:2 skip:3 | skip:2 skip:3"),
    "LPT_DARTS_PLUS_R18_CIFAR10": Published(
        "LPT-R18-DARTS+", "darts+", "cifar10", "authors' DARTS_CIFAR10_TS_18_ES",
        "sep3:0 sep3:1 | skip:0 sep5:1 | sep3:0 sep3:1 | skip:0 sep5:1",
        "avg:0 avg:1 | avg:0 skip:2 | skip:2 max:0 | avg:0 skip:2"),
    "LPT_DARTS_MINUS_R18_CIFAR10": Published(
        "LPT-R18-DARTS-", "darts-", "cifar10", "authors' DARTS_MINUS_TS_CIFAR10_NEW",
        "sep3:1 sep3:0 | sep3:0 sep5:1 | sep3:0 skip:1 | skip:0 skip:1",
        "sep3:1 sep3:0 | skip:2 max:1 | skip:2 skip:3 | skip:2 skip:3"),
    "LPT_PDARTS_R18_CIFAR10": Published(
        "LPT-R18-P-DARTS", "pdarts", "cifar10", "authors' PDARTS_TS_CIFAR10",
        "sep3:0 sep3:1 | sep3:0 dil3:2 | skip:0 dil3:3 | skip:2 dil5:4",
        "avg:0 dil3:1 | avg:0 dil5:2 | skip:0 sep3:3 | sep3:0 dil3:2"),
    "LPT_PC_DARTS_R18_IMAGENET": Published(
        "LPT-R18-PC-DARTS", "pcdarts", "imagenet", "authors' PCDARTS_TS_IMAGENET",
        "sep5:1 dil5:0 | sep3:0 sep3:1 | sep3:1 sep3:3 | sep5:1 sep5:3",
        "sep3:0 sep3:1 | dil5:2 sep5:0 | max:2 dil5:3 | dil5:4 dil5:3"),
    "LPT_PDARTS_CIFAR100_ABLATION_1": Published(
        "LPT-R18-P-DARTS, ablation 1", "pdarts", "cifar100", "authors' PDARTS_TS_18_CIFAR100_AB_1",
        "dil3:0 sep3:1 | skip:0 sep3:2 | sep3:0 dil3:1 | sep3:0 sep3:3",
        "skip:0 dil5:1 | avg:0 skip:1 | skip:0 sep5:2 | skip:0 sep3:1"),
    "LPT_PDARTS_CIFAR100_ABLATION_2": Published(
        "LPT-R18-P-DARTS, ablation 2", "pdarts", "cifar100", "authors' PDARTS_TS_18_CIFAR100_AB_4",
        "sep3:0 dil3:1 | sep3:0 skip:1 | max:0 sep3:1 | skip:0 sep5:1",
        "avg:0 skip:1 | avg:0 sep5:2 | avg:0 dil3:1 | avg:0 sep3:4"),
    "LPT_DARTS_CIFAR10_ABLATION_1": Published(
        "LPT-R18-DARTS-2nd, ablation 1", "darts-2nd", "cifar10",
        "authors' DARTS_TS_18_CIFAR10_AB_1",
        "sep3:0 sep3:1 | skip:0 dil5:1 | skip:0 sep3:1 | skip:0 sep3:1",
        "max:0 dil5:1 | skip:2 max:0 | skip:2 avg:0 | skip:2 skip:3"),
    "LPT_DARTS_CIFAR10_ABLATION_2": Published(
        "LPT-R18-DARTS-2nd, ablation 2", "darts-2nd", "cifar10",
        "authors' DARTS_TS_18_CIFAR10_AB_4",
        "sep3:0 sep3:1 | skip:0 dil3:1 | sep3:0 sep3:1 | skip:0 sep3:1",
        "dil3:0 sep3:1 | skip:2 max:1 | skip:2 dil3:3 | skip:2 skip:4"),
}


# Test errors, % (mean ± sd), of CIFAR-100 and CIFAR-10 by the rows' names; the cells were found on
# the data that they are trained on (Skillearn's Tables 7, 8, 10, 11, 17, 18; LeaSE's 2, 3).
PAPER = {
    "DARTS-1st":                     ("20.52±0.31", "3.00±0.14"),
    "DARTS-2nd":                     ("20.58±0.44", "2.76±0.09"),
    "DARTS-":                        ("18.97±0.16", "2.97±0.04"),
    "DARTS+":                        ("17.11±0.43", "2.83±0.05"),
    "PC-DARTS":                      ("17.96±0.15", "2.57±0.07"),
    "P-DARTS":                       ("17.49", "2.50"),
    "LPT-R18-DARTS-1st":             ("19.11±0.11", "2.85±0.09"),
    "LPT-R18-DARTS-2nd":             ("19.47±0.20", "2.72±0.07"),
    "LPT-R50-DARTS-2nd":             ("18.40±0.16", "2.68±0.02"),
    "LPT-R18-DARTS-":                ("18.28±0.14", "2.74±0.07"),
    "LPT-R18-DARTS+":                ("16.58±0.19", "2.69±0.05"),
    "LPT-R18-PC-DARTS":              ("17.04±0.05", "2.65±0.17"),
    "LPT-R50-PC-DARTS":              ("16.97±0.21", "-"),
    "LPT-R18-P-DARTS":               ("16.28±0.10", "2.58±0.14"),
    "LPT-R50-P-DARTS":               ("16.38±0.07", "-"),
    "LPT-R18-P-DARTS, ablation 1":   ("18.12±0.11", "-"),
    "LPT-R18-P-DARTS, ablation 2":   ("17.54±0.07", "-"),
    "LPT-R18-DARTS-2nd, ablation 1": ("-", "2.79±0.06"),
    "LPT-R18-DARTS-2nd, ablation 2": ("-", "2.75±0.03"),
    "LeaSE-R18-DARTS-2nd":           ("19.26", "2.62"),
}
# The same of cells that were found on both data sets.
BOTH = "cifar100+cifar10"
PAPER_BOTH = {
    "IL-DARTS-2nd": ("17.12±0.08", "2.62±0.04"),
    "IL-P-DARTS": ("16.14±0.17", "2.51±0.10"),
    "IL-PC-DARTS": ("17.83±0.14", "2.55±0.11"),
    "JL-DARTS-2nd": ("18.92±0.17", "2.91±0.12"),
    "JL-P-DARTS": ("17.67±0.31", "2.63±0.12"),
    "JL-PC-DARTS": ("18.11±0.27", "2.63±0.05"),
}
# Top-1 and top-5 errors on ImageNet, by row and the data that the cell was found on (Skillearn's
# Tables 9, 19; LeaSE's 4). IL and JL search on both sets of CIFAR.
PAPER_IMAGENET = {
    ("DARTS-2nd", "cifar10"):             ("26.7", "8.7"),
    ("DARTS-", "imagenet"):               ("23.8", "7.0"),
    ("DARTS+", "imagenet"):               ("23.9", "7.4"),
    ("DARTS+", "cifar100"):               ("23.7", "7.2"),
    ("PC-DARTS", "imagenet"):             ("24.2", "7.3"),
    ("PC-DARTS", "cifar10"):              ("25.1", "7.8"),
    ("P-DARTS", "cifar10"):               ("24.4", "7.4"),
    ("P-DARTS", "cifar100"):              ("24.7", "7.5"),
    ("LPT-R18-DARTS-2nd", "cifar10"):     ("25.3", "7.9"),
    ("LPT-R18-P-DARTS", "cifar10"):       ("24.2", "7.3"),
    ("LPT-R18-P-DARTS", "cifar100"):      ("24.0", "7.1"),
    ("LPT-R18-PC-DARTS", "imagenet"):     ("23.4", "6.8"),
    ("IL-DARTS-2nd", "cifar100+cifar10"): ("25.5", "8.0"),
    ("IL-P-DARTS", "cifar100+cifar10"):   ("24.1", "7.1"),
    ("JL-DARTS-2nd", "cifar100+cifar10"): ("26.4", "8.5"),
    ("JL-P-DARTS", "cifar100+cifar10"):   ("25.0", "7.9"),
    ("LeaSE-R18-DARTS-2nd", "cifar10"):   ("24.7", "7.9"),
}


def paper_errors(row: str, found_on: str, dataset: str) -> tuple[str, str]:
    """Return the top-1 and top-5 errors that the papers print for a row whose cell was found on
    some data (joined by + if several) and trained on a data set; "-" where they print none."""
    if dataset == "imagenet":
        return PAPER_IMAGENET.get((row, found_on), ("-", "-"))
    table = PAPER_BOTH if found_on == BOTH else PAPER if found_on == dataset else {}
    return dict(zip(("cifar100", "cifar10"), table.get(row, ()))).get(dataset, "-"), "-"


def parse(normal: str, reduce: str) -> Genotype:
    """Return the genotype of two cells written as in PUBLISHED."""
    def edges(text):
        pairs = (edge.split(":") for edge in text.replace("|", " ").split())
        return [(SHORT[op], int(state)) for op, state in pairs]
    return Genotype(edges(normal), [2, 3, 4, 5], edges(reduce), [2, 3, 4, 5])


def random_cell(seed: int) -> Genotype:
    """Return a uniformly random cell: two different inputs per node, any operation but `none`."""
    rng = np.random.default_rng(seed)

    def edges():
        return [(PRIMITIVES[rng.integers(1, len(PRIMITIVES))], int(state)) for node in range(2, 6)
                for state in sorted(rng.choice(node, 2, replace=False))]
    return Genotype(edges(), [2, 3, 4, 5], edges(), [2, 3, 4, 5])


def validate(cell: object, where: str) -> Genotype:
    """Return the genotype in a decoded JSON value; its edges may be grouped by node, two each.
    Raises BadInput, naming `where`."""
    def edges(part):
        by_node = all(len(node) == 2 and isinstance(node[0], (list, tuple)) for node in part)
        return [tuple(edge) for edge in (sum(map(list, part), []) if by_node else part)]

    try:
        found = Genotype(**{name: [*part] if name.endswith("concat") else edges(part)
                            for name, part in cell.items()})
        for edges, concat in (found[:2], found[2:]):
            nodes = range(2, 2 + len(edges) // 2)
            if not edges or len(edges) % 2 or not concat or not set(concat) <= {*nodes}:
                raise ValueError("it needs two edges per node, and nodes to concatenate")
            for i, (name, state) in enumerate(edges):
                if name not in PRIMITIVES[1:] or state not in range(2 + i // 2):
                    raise ValueError(f"edge {i} cannot be {name!r} on state {state!r}")
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{where} is not a genotype: {error}") from None
    return found


def from_text(text: str, where: str) -> Genotype:
    """Return the last whole cell that a text holds as Genotype(normal=[...], ...), which DARTS'
    code and logs print. Nothing in it is executed. Raises BadInput."""
    edges, nodes = r"(\[(?:\[?\('\w+',\d\)\]?,?)+\])", r"(\[[\d,]+\]|range\(\d,\d\))"
    found = re.findall(rf"Genotype\(normal={edges},normal_concat={nodes},reduce={edges},"
                       rf"reduce_concat={nodes}", "".join(text.split()))
    if not found:
        raise BadInput(f"{where} holds no Genotype(normal=[...], normal_concat=..., ...)")
    cell = {}
    for name, value in zip(Genotype._fields, found[-1]):
        if value.startswith("range"):
            value = [*range(*map(int, re.findall(r"\d", value)))]
        cell[name] = value if isinstance(value, list) else ast.literal_eval(value)
    return validate(cell, where)


def load(arch: str) -> Genotype:
    """Return the cell that `arch` names: a published name, random:SEED, the text Genotype(...), or
    a file that holds such a text or is a genotype.json.

    Raises BadInput for an unknown name and for a file that cannot be read or is malformed.
    """
    if arch in PUBLISHED:
        return parse(PUBLISHED[arch].normal, PUBLISHED[arch].reduce)
    kind, _, seed = arch.partition(":")
    if kind == "random":
        return random_cell(int(seed))
    if "Genotype(" in arch:
        return from_text(arch, "--arch")
    try:
        text = path(arch).read_text(encoding="utf-8-sig")
        return from_text(text, arch) if "Genotype(" in text else validate(json.loads(text), arch)
    except (FileNotFoundError, IsADirectoryError):
        raise BadInput(f"no cell {arch!r}: neither a file, nor random:SEED, nor one of "
                       + ", ".join(PUBLISHED)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"the cell {arch} cannot be read: {error}") from None


def to_json(cell: Genotype) -> str:
    return json.dumps(cell._asdict(), indent=1)


def to_text(cell: Genotype) -> str:
    """Return the cell as one line per node."""
    lines = []
    for kind in ("normal", "reduce"):
        edges, concat = getattr(cell, kind), getattr(cell, f"{kind}_concat")
        lines.append(f"{kind} cell")
        for node in range(len(edges) // 2):
            terms = [f"{op}({state})" for op, state in edges[2 * node:2 * node + 2]]
            lines.append(f"  {node + 2} = {' + '.join(terms)}")
        lines.append(f"  output = concat({', '.join(map(str, concat))})")
    return "\n".join(lines)


COLOURS = {"none": "#c2497d", "skip_connect": "#7a7f87",
           "max_pool_3x3": "#b5651d", "avg_pool_3x3": "#c9971c",
           "sep_conv_3x3": "#2f6fbb", "sep_conv_5x5": "#1d4e89",
           "dil_conv_3x3": "#2e8b6f", "dil_conv_5x5": "#1c6350"}


def to_svg(cell: Genotype, title: str) -> str:
    """Return the cell as a standalone SVG: states run down the diagonal, each a column (its output)
    and a row (its inputs); an operation sits where its input's column meets its node's row."""
    dx, dy, pill_w, pill_h, top = 124, 50, 104, 28, 78
    parts, y0 = [], 0
    for kind in ("normal", "reduce"):
        edges, concat = getattr(cell, kind), getattr(cell, f"{kind}_concat")
        states = 2 + len(edges) // 2
        x = [70 + dx * s for s in range(states + 1)]
        y = [y0 + top + dy * s for s in range(states + 1)]
        name = {0: "c(k−2)", 1: "c(k−1)", states: "c(k)"}
        lines, pills, last = [], [], {s: s for s in range(states)}

        def pill(cx, cy, text, colour, css=""):
            pills.append(f'<rect x="{cx - pill_w / 2}" y="{cy - pill_h / 2}" width="{pill_w}" '
                         f'height="{pill_h}" rx="{pill_h / 2}" fill="{colour}" class="{css}"/>'
                         f'<text x="{cx}" y="{cy + 4.5}" class="{css} on">{text}</text>')

        for i, (op, s) in enumerate(edges):
            node = 2 + i // 2
            pill(x[s], y[node], op, COLOURS[op])
            lines.append(f'<path d="M{x[s]} {y[node]}H{x[node] - pill_w / 2}" class="w"/>')
            last[s] = node
        for s in concat:
            lines.append(f'<circle cx="{x[s]}" cy="{y[states]}" r="4.5" class="d"/>')
            last[s] = states
        end = x[states] - pill_w / 2
        lines.append(f'<path d="M{x[min(concat)]} {y[states]}H{end}" class="w"/>')
        lines += [f'<path d="M{x[s]} {y[s]}V{y[end]}" class="w"/>' for s, end in last.items()]
        for s in range(states + 1):
            pill(x[s], y[s], name.get(s, f"node {s}"), "", "s")
        heading = f'<text x="18" y="{y0 + 32}" class="h">{kind} cell</text>'
        parts.append(heading + "".join(lines) + "".join(pills))
        y0, width = y[-1] + 24, x[-1] + 70
    return svg(title, "\n".join(parts), width, y0 + 10)


HUES = ["#2f6fbb", "#b5651d", "#2e8b6f", "#8250df", "#c2497d"]       # lines that are no operation


def search_svg(history: list[dict], title: str) -> str:
    """Return how a search went as a standalone SVG: accuracies, losses, what the architecture does,
    whatever else it logs.

    history: a dictionary per epoch, as in log.jsonl; mean_weights in the order of PRIMITIVES.
    """
    endings = {"accuracy": ("accuracy",), "loss": ("loss", "difficulty"),
               "entropy of α, nats": ("alpha_entropy",), "skip connections": ("skip_connections",)}
    charts = {name: {} for name in endings} | {f"{kind} cell, mean weights": {
        name: [line["mean_weights"][kind][o] for line in history]
        for o, name in enumerate(PRIMITIVES)} for kind in ("normal", "reduce")}
    for name in history[-1]:
        if name not in ("epoch", "seconds", "stopped", "mean_weights", "genotype"):
            into = next((each for each, ends in endings.items()
                         if name.split()[0].endswith(ends)), "other figures")     # IL's name a task
            charts.setdefault(into, {})[name.replace("_", " ")] = [line.get(name)
                                                                   for line in history]
    parts = [chart(24 + 540 * (i % 2), 66 + 220 * (i // 2), name, lines)
             for i, (name, lines) in enumerate(charts.items())]
    return svg(title, "\n".join(parts), 1090, 66 + 220 * -(-len(charts) // 2))


def chart(left: float, top: float, title: str, lines: dict[str, list]) -> str:
    """Return a chart with its legend, 530 x 200, for an SVG; lines: name -> a value per epoch, or
    None."""
    values = [v for line in lines.values() for v in line if v is not None]
    low, high, height, width = min(values), max(values), 140, 240
    high = high if low < high else low + 1
    x0, y0, n = left + 40, top + 14, max(map(len, lines.values()))
    parts = [f'<text x="{left}" y="{top}" class="h">{title}</text>'
             f'<path d="M{x0} {y0}V{y0 + height}H{x0 + width}" class="w"/>'
             f'<text x="{x0 + width}" y="{y0 + height + 18}" class="t">epoch {n}</text>']
    for value, y in ((high, y0 + 10), (low, y0 + height)):
        parts.append(f'<text x="{x0 - 6}" y="{y}" class="t">{value:.3g}</text>')
    for i, name in enumerate(sorted(lines, key=lambda name: -lines[name][-1])):
        points = [(x0 + width * (epoch + 1) / n, y0 + height * (high - value) / (high - low))
                  for epoch, value in enumerate(lines[name]) if value is not None]
        colour = COLOURS.get(name) or HUES[list(lines).index(name) % len(HUES)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        y = y0 + 10 + 18 * i                                       # in the legend
        parts.append(f'<g class="o" fill="{colour}" stroke="{colour}">'
                     f'<polyline points="{path}" fill="none" stroke-width="2"/>'
                     f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="3"/>'
                     f'<circle cx="{x0 + width + 14}" cy="{y - 4.5}" r="4.5"/></g>'
                     f'<text x="{x0 + width + 24}" y="{y}">{html.escape(name.split("/")[-1])} '
                     f'{lines[name][-1]:.3g}</text>')
    return "".join(parts)


def svg(title: str, body: str, width: float, height: float) -> str:
    """Return a drawing with the styles of this file, for light and dark backgrounds."""
    title = html.escape(title)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" \
width="{width}" height="{height}">
<title>{title}</title>
<style>
text {{ font: 13px system-ui, sans-serif; fill: #1f2328; }}
text.on {{ text-anchor: middle; fill: #fff; }}
text.h {{ font-size: 16px; font-weight: 600; }}
text.t {{ text-anchor: end; fill: #656d76; }}
.bg {{ fill: #fff; }}
.w {{ fill: none; stroke: #a8b0ba; stroke-width: 1.8; }}
.d {{ fill: #a8b0ba; }}
rect.s {{ fill: #e9edf2; stroke: #8b949e; }}
text.s {{ fill: #1f2328; }}
@media (prefers-color-scheme: dark) {{
  text, text.s {{ fill: #e6edf3; }}
  text.t {{ fill: #9198a1; }}
  .bg {{ fill: #0d1117; }}
  .w {{ stroke: #57606a; }}
  .d {{ fill: #57606a; }}
  .o {{ filter: brightness(1.6); }}
  rect.s {{ fill: #21262d; stroke: #6e7681; }}
}}
</style>
<rect class="bg" width="100%" height="100%"/>
<text x="{width - 18}" y="32" class="t">{title}</text>
{body}
</svg>
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print a cell and draw it as an SVG.",
                                     usage=argparse.SUPPRESS)     # so that an error is one line
    parser.add_argument("arch", help="a published name, a genotype.json, random:SEED, the text "
                                     "Genotype(...) or a log with it; published: "
                                     + ", ".join(PUBLISHED))
    parser.add_argument("--out", type=path, help="the SVG (default: ARCH.svg here)")
    args = parser.parse_args(argv)
    try:
        cell, name = load(args.arch), Path(args.arch).stem.replace(":", "_")
        known = PUBLISHED.get(args.arch)
        print(f"{known.row}, found on {known.found_on}; {known.source}" if known else args.arch)
        print(to_text(cell))
        out = args.out or Path("genotype.svg" if "Genotype(" in args.arch else f"{name}.svg")
        drawing = to_svg(cell, args.arch)
        if out.exists() and not args.out and out.read_text(encoding="utf-8") != drawing:
            raise BadInput(f"{out} is another file: name the drawing by --out")
        out.write_text(drawing, encoding="utf-8")
    except (BadInput, OSError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"drawn in {out}")


if __name__ == "__main__":
    main()
