"""``bitsmith sites`` and ``bitsmith targets``: what a model is made of, and what a target computes."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import arguments, show

if TYPE_CHECKING:
    from ..site import Site
    from ..targets.base import Target
    from ..technique import Technique

_SHOWN = ("Float()", "Int(8, 8)", "Int(8, None)", "Int(4, 8)", "Int(4, None, granularity='group', group=32)")


def add(commands: Any) -> None:
    """Add the commands of this file."""
    sites = commands.add_parser("sites", help="list the sites of a model, in execution order")
    arguments.add_model(sites)
    arguments.add_data(sites)
    sites.add_argument("--inside", action="store_true", help="also what composites (attention, LSTM) are made of")
    sites.add_argument("--json", action="store_true", help="everything known of each site, as JSON")
    sites.set_defaults(run=run_sites)

    targets = commands.add_parser("targets", help="what a target computes: technique by operation, with the reasons")
    targets.add_argument("name", metavar="NAME", help="onnxruntime, openvino, ..., or your own: file.py:function")
    arguments.add_techniques(targets)
    targets.add_argument(
        "--json", action="store_true", help="the table as JSON: operation -> technique -> true or reason"
    )
    targets.set_defaults(run=run_targets)


def run_sites(options: Namespace) -> int:
    import dataclasses

    import bitsmith as bs

    from ..data import batch_size, first_inputs
    from ..model.load import load_calibration, load_model

    model = load_model(options.model)
    loader, forward = load_calibration(options.data)
    example = first_inputs(loader)
    found = bs.sites(model, example, forward=forward, inside=options.inside)
    if options.json:
        show.as_json([dataclasses.asdict(site) for site in found.values()])
        return 0
    rows = [
        (
            site.name,
            site.kind,
            site.role,
            " ".join("x".join(map(str, shape)) for shape in site.out_shapes),
            site.calls,
            f"{site.macs / 1e6:.3f}" if site.macs else "",
            f"{site.parameter_bytes / 1024:.1f}" if site.parameter_bytes else "",
            ", ".join(site.epilogue),
        )
        for site in found.values()
    ]
    numbers = ("calls", "million MACs", "weights KiB")
    changeable = sum(site.role == "integer" for site in found.values())
    total = sum(site.macs for site in found.values() if site.role != "composite" or not options.inside)
    caption = (
        f"{len(found)} sites, {changeable} of them can be computed another way; {total / 1e6:.2f} million MACs "
        f"for a batch of {batch_size(example)}; weights as float32"
    )
    if not options.inside and any(site.role == "composite" for site in found.values()):
        caption += "\nComposite sites: see their inside with --inside"
    show.table(("site", "operation", "role", "output", *numbers, "fused behind it"), rows, numbers, caption)
    return 0


def run_targets(options: Namespace) -> int:
    target = arguments.target(options.name)
    techniques = arguments.techniques(options.techniques) or arguments.techniques(_shown()) or []
    verdicts = support(target, techniques)
    if options.json:
        show.as_json({kind: {str(t): reason or True for t, reason in row.items()} for kind, row in verdicts.items()})
        return 0
    reasons: dict[str, int] = {}
    rows = []
    for kind, row in verdicts.items():
        cells = []
        for reason in row.values():
            # one footnote for all operations that are refused in the same words
            words = re.sub(rf"\b{kind}\b(?=$| is | have )", "this operation", reason)
            cells.append(f"no ({reasons.setdefault(words, len(reasons) + 1)})" if reason else "yes")
        rows.append((kind, *cells))
    caption = "\n".join(f"({number}) {reason}" for reason, number in reasons.items())
    show.plain(f"{target}: {f'times are {target.source}' if target.runs else 'writes files, runs and times none here'}")
    show.table(("operation", *map(str, techniques)), rows, caption=caption)
    show.plain("Judged at a small example of each operation, neighbours aside; 'bitsmith profile' judges your model.")
    return 0


def _shown() -> list[str]:
    """Some settings of Int, and every other built-in technique with its defaults."""
    from ..technique import Technique

    others = []
    for name, kind in arguments.technique_classes().items():
        if issubclass(kind, Technique) and name not in ("Float", "Int"):
            try:
                kind()
            except TypeError:
                continue  # it has no defaults: name it with --techniques
            others.append(f"{name}()")
    return [*_SHOWN, *others]


def support(target: Target, techniques: list[Technique]) -> dict[str, dict[Technique, str]]:
    """Why not, by operation and technique; "" where the target has a kernel."""
    from ..technique import No

    table: dict[str, dict[Technique, str]] = {}
    for name, site in example_sites().items():
        for technique in techniques:
            verdict = technique.fits(site)
            if verdict:
                verdict = target.supports(technique, site)
            reason = "" if verdict else verdict.reason if isinstance(verdict, No) else "it does not fit"
            table.setdefault(name, {})[technique] = reason
    return table


def example_sites() -> Mapping[str, Site]:
    """A small site of every operation that a technique can compute, by operation, and a depthwise convolution."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from ..model.network import sites
    from ..operations import OPERATIONS

    class Examples(nn.Module):
        """32 channels each, so that group sizes and kernels of 8-bit code fit."""

        def __init__(self) -> None:
            super().__init__()
            for n in (1, 2, 3):
                self.register_parameter(f"conv{n}", nn.Parameter(torch.ones(32, 32, *[3] * n)))
            self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
            self.linear = nn.Linear(32, 32)
            self.embedding = nn.Embedding(8, 32)
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
            self.lstm = nn.LSTM(32, 32, batch_first=True)

        def forward(self, x: Tensor, tokens: Tensor) -> list[Tensor]:
            index = torch.tensor([1, 0])
            maps = {1: x.flatten(2), 2: x, 3: x[:, :, None].expand(-1, -1, 4, -1, -1)}
            outputs: list[Tensor] = [self.depthwise(x)]
            for n, y in maps.items():
                weight = self.get_parameter(f"conv{n}")
                outputs += [getattr(F, f"conv{n}d")(y, weight), getattr(F, f"conv_transpose{n}d")(y, weight)]
                outputs += [getattr(F, f"avg_pool{n}d")(y, 2), getattr(F, f"adaptive_avg_pool{n}d")(y, 1)]
            words = self.embedding(tokens)
            square = words @ words.transpose(1, 2)
            outputs += [self.linear(words), torch.baddbmm(square, words, words.transpose(1, 2))]
            outputs += [torch.einsum("bic,bjc->bij", words, words), words + words, words - words, words * words]
            outputs += [torch.cat([words, words]), words.mean(1)]
            outputs += [torch.index_add(words, 0, index, words), words.scatter_add(0, tokens[:, :, None] % 2, words)]
            outputs += [words.scatter_reduce(0, tokens[:, :, None] % 2, words, "sum")]
            outputs += [F.scaled_dot_product_attention(words, words, words)]
            outputs += [self.attention(words, words, words, need_weights=False)[0], self.lstm(words)[0]]
            return outputs

    x, tokens = torch.ones(2, 32, 8, 8), torch.ones(2, 4, dtype=torch.long)
    with torch.no_grad():
        found = sites(Examples().eval(), (x, tokens))
    examples: dict[str, Site] = {}
    for site in found.values():
        if site.role != "float":
            examples.setdefault("conv2d, depthwise" if site.path == "depthwise" else site.kind, site)
    order = list(OPERATIONS)
    return dict(sorted(examples.items(), key=lambda item: (order.index(item[1].kind), item[0])))
