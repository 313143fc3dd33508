"""What both benchmarks run on: two networks, images, and the path of a published run, replayed.

The published code draws its noise from torchsde's Brownian interval and accumulates time in float32. A second interval with
the same entropy, asked for the same increments in the same order, gives the same path: `published_path` returns it as
explicit noise on that float32 grid. Every contender and the float64 definition then run on one path, so that what is left
between them is rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torchsde
from timing import environment, finite_or_none
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import coupfast
from coupfast.data import load_images
from coupfast.engine.rates import matmul_rate
from coupfast.engines import ENGINES
from coupfast.methods import METHODS
from coupfast.sde import parity_grid, time_grid

NETWORKS = {"paper": ("cifar10-ddpmpp-deep", "wrn-28-10"), "tiny": ("cifar10-tiny", "cifar10-tiny")}
IMAGE_SHAPE = (3, 32, 32)
#: What a table of results has of every row, with some more of each benchmark's own.
COLUMNS = (
    *("engine", "precision", "network", "t", "batch", "seconds_per_image", "spread", "host_seconds_per_image"),
    *("launches_per_step", "kernels_per_step", "share_of_matmul", "ratio_to_eager", "within_contract", "device", "torch"),
)
_PROBES = 16  # images on which a random classifier is set up
_KINK_DISTANCE = 4.0  # in standard deviations of a batch norm's input


@dataclasses.dataclass(frozen=True)
class Networks:
    """A score network and a classifier, in eval mode.

    Attributes:
        name: `"paper"` or `"tiny"`.
        score, classifier: float32; every parameter requires a gradient, as in the published code (a purifier works on a
            frozen view of them, whatever they say).
        score64, classifier64: The same weights in float64, frozen.
        weights: Where the weights come from, in words.
        relus_may_flip: Whether some ReLUs of the classifier lie so near to their kinks that rounding decides on their side.
    """

    name: str
    score: nn.Module
    classifier: nn.Module
    score64: nn.Module
    classifier64: nn.Module
    weights: str
    relus_may_flip: bool


def load_networks(name: str, *, device: torch.device, score: str | None, classifier: str | None, seed: int) -> Networks:
    """The networks that a benchmark names.

    Args:
        score, classifier: Weight files; None takes the package's weights where it has some ("tiny"), random ones elsewhere.
        seed: Fixes random weights.

    Random weights are made so that parity means something. The score network's near-zero layers are drawn at ordinary scale
    (`DDPMpp.redraw_small_layers`), which gives outputs of order one. For the classifier see `scale_random_classifier`.
    """
    random = "random" if name == "paper" else None
    score_name, classifier_name = NETWORKS[name]
    score_net = coupfast.load_score(score_name, weights=score or random, seed=seed)
    classifier_net = coupfast.load_classifier(classifier_name, weights=classifier or random, seed=seed)
    far_from_kinks = random is not None and classifier is None
    if far_from_kinks:
        scale_random_classifier(classifier_net, seed)
    origins = {
        "score": "file" if score else random or "shipped",
        "classifier": "file" if classifier else random or "shipped",
    }
    score_net, classifier_net = score_net.to(device), classifier_net.to(device)
    return Networks(
        name,
        score_net.requires_grad_(True),
        classifier_net.requires_grad_(True),
        copy.deepcopy(score_net).double().requires_grad_(False),
        copy.deepcopy(classifier_net).double().requires_grad_(False),
        ", ".join(f"{network}: {origin}" for network, origin in origins.items()),
        relus_may_flip=not far_from_kinks,
    )


def scale_random_classifier(classifier: nn.Module, seed: int) -> None:
    """Give a random residual network activations, logits and a guidance gradient of order one, and ReLUs far from kinks.

    A batch norm gets the statistics that its inputs have on random images, and a bias of +4 or -4 for each channel. So about
    half of the ReLUs are open, and hardly any lies so near to its kink that rounding decides on which side: one that flips
    moves the gradient by up to a percent, and a comparison of two sound implementations would turn on such flips. The last
    layer's logits are centred and scaled to a standard deviation of one over random images; g then has a norm of about one.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = torch.rand(_PROBES, *IMAGE_SHAPE, generator=generator)
    norms = [module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    last = [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        for norm in norms:
            norm.bias.copy_(_KINK_DISTANCE * (2.0 * torch.randint(2, norm.bias.shape, generator=generator) - 1.0))
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over what is seen
            norm.train()
        classifier(probes)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
        last.bias.sub_(classifier(probes).mean(dim=0))
        scale = classifier(probes).std(dim=0).mean()
        last.weight.div_(scale)
        last.bias.div_(scale)


def benchmark_images(source: str, batch: int, *, device: torch.device, seed: int) -> torch.Tensor:
    """`batch` images in [0, 1], float32: uniform noise (`source="random"`), or the first of a set that coupfast.data knows."""
    if source == "random":
        x = torch.rand(batch, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(seed))
    else:
        x, _ = load_images(source)
        if len(x) < batch:
            raise ValueError(f"{source!r} has {len(x)} images, a batch of {batch} was asked for; use a smaller `--batch`")
        x = x[:batch]
    return x.to(device)


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """Steps and noise that a published run takes.

    Attributes:
        grid: t_0 > … > t_K as float32 time accumulates to them; float64, shape (K + 1,).
        noise: Standard normal, float32, shape (K, *x.shape); one more row, the last, for forward noising.
        entropy: Seed of the Brownian interval (and of torch's generator, where the image is noised first).
    """

    grid: np.ndarray
    noise: torch.Tensor
    entropy: int

    @property
    def t_end(self) -> float:
        """Where the published run has to stop so that it takes exactly these steps."""
        return float(self.grid[-1])

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """torch's global generator, from which the published code noises its images, as this path has it."""
        with torch.random.fork_rng():
            torch.manual_seed(self.entropy)
            yield


def published_path(x_0: torch.Tensor, *, t: float, steps: int, forward_noising: bool, entropy: int) -> Path:
    """The path of `purify_published(x_0, …, t=t, t_end=path.t_end, entropy=entropy)`, called inside `path.seeded()`."""
    grid = parity_grid(t)[: steps + 1]
    s = 1.0 - grid
    interval = torchsde.BrownianInterval(
        s[0], s[-1], size=x_0.flatten(1).shape, dtype=x_0.dtype, device=x_0.device, entropy=entropy
    )
    rows = [interval(s[k], s[k + 1]).view_as(x_0) / float(np.sqrt(s[k + 1] - s[k])) for k in range(steps)]
    if forward_noising:
        with torch.random.fork_rng():
            torch.manual_seed(entropy)
            rows.append(torch.randn_like(x_0))
    return Path(grid, torch.stack(rows), entropy)


def purifier_on(grid: np.ndarray, networks: Networks, method: str, **options: object) -> coupfast.Purifier:
    """A purifier with the public options, on any grid of times; without clips, which the published code has outside it."""
    classifier = networks.classifier if METHODS[method].guided else None
    return coupfast.Purifier(networks.score, classifier, method=method, t=grid, clamp=False, **options)


def pass_flop(networks: Networks, x: torch.Tensor) -> dict[str, int]:
    """FLOP (2 a multiply-add) that one forward pass of one image takes by direct sums, of `score` and `classifier`.

    A backward pass with respect to the input takes as many again, but for attention, whose 0.3 GMAC count double.
    """
    found = {}
    label = torch.ones(1, device=x.device)
    for name, call in (("score", lambda: networks.score(x[:1], label)), ("classifier", lambda: networks.classifier(x[:1]))):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        found[name] = counter.get_total_flops()
    return found


def share_of_matmul(flop: float | None, seconds: float | None, case: Case) -> float | None:
    """FLOP per second as a share of what a float32 matrix product reached in this run; None if either is not known."""
    if flop is None or seconds is None:
        return None
    return flop / seconds / case.machine["matmul_flop_per_second"]


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a − b|, taken in float64."""
    return float((a.double() - b.double()).abs().max())


# --- what the command lines share -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Networks and images of one run of a benchmark, and the machine it runs on."""

    networks: Networks
    images: str
    x: torch.Tensor
    machine: dict[str, Any]

    def __str__(self) -> str:
        networks, machine = self.networks, self.machine
        return (
            f"networks {networks.name} ({networks.weights}), {len(self.x)} images ({self.images})\n"
            f"{machine['device']}, {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
            f"commit {machine['commit']}{' with uncommitted changes' if machine['uncommitted_changes'] else ''}"
        )

    def machine_fields(self) -> dict[str, Any]:
        """What of the machine goes into every row."""
        return {name: self.machine[name] for name in ("device", "torch", "threads")}


def add_case_options(parser: argparse.ArgumentParser, *, images: str | None) -> None:
    """The options that `load_case`, `steps_to_time` and `write_results` read; `images` is the default of `--images`."""
    add = parser.add_argument
    add("--t", nargs="+", type=float, default=[0.1], help="purification times (default 0.1)")
    add("--batch", type=positive, default=1, help="images at a time (default 1)")
    add_network_options(parser, images=images)
    add("--classifier", metavar="FILE", help="weights of the classifier (default: the shipped ones, or random)")
    add("--steps-timed", type=positive, metavar="K", help="take only the first K steps and scale the times")
    add("--full", action="store_true", help="take all steps; the default but for the paper's networks on a CPU")
    add("--device", default="cpu", help="cpu (default) or cuda")


def add_network_options(parser: argparse.ArgumentParser, *, images: str | None) -> None:
    """Those of `add_case_options` that benchmarks without a purification have too."""
    default = images or "cifar10-20 for the tiny networks, random for the paper's"
    add = parser.add_argument
    add("--network", choices=list(NETWORKS), default="paper", help="DDPM++ deep and WRN-28-10, or the shipped small pair")
    add("--score", metavar="FILE", help="weights of the score network (default: the shipped ones, or random)")
    add(
        "--images",
        default=images,
        help=f"'random' (uniform noise), or what coupfast.data.load_images takes (default: {default})",
    )
    add("--repeats", type=positive, default=5, help="interleaved repeats (default 5)")
    add("--threads", type=positive, help="CPU threads (default: PyTorch's)")
    add("--seed", type=int, default=0, help="of random weights, random images and noise (default 0)")
    add("--json", metavar="FILE", help="write rows and environment there")
    add("--markdown", action="store_true", help="print the rows as a Markdown table at the end, too")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load_case(options: argparse.Namespace) -> Case:
    """Networks and images as the options say; sets the number of threads."""
    if options.json and not pathlib.Path(options.json).resolve().parent.is_dir():
        raise SystemExit(f"--json {options.json}: there is no such folder; make it first")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    networks = load_networks(
        options.network, device=device, score=options.score, classifier=options.classifier, seed=options.seed
    )
    images = options.images or ("cifar10-20" if options.network == "tiny" else "random")
    x = benchmark_images(images, options.batch, device=device, seed=options.seed)
    machine = environment(device) | {"matmul_flop_per_second": matmul_rate(device)}
    return Case(networks, images, x, machine)


def engines_here(case: Case) -> tuple[list[str], list[dict[str, str]]]:
    """The engines that run here, found by taking one step, and the others with their reasons (also printed)."""
    engines, others = [], []
    for name in ENGINES:
        try:
            purifier = purifier_on(time_grid(0.1, 1), case.networks, "coup", engine=name, precision="strict")
            with torch.no_grad():
                purifier(case.x[:1], seed=0)
        except Exception as error:  # whatever an engine says about this machine
            others.append({"engine": name, "reason": f"{type(error).__name__}: {error}"})
            print(f"engine {name} does not run here: {error}", file=sys.stderr)
        else:
            engines.append(name)
    return engines, others


def steps_to_time(options: argparse.Namespace, num_steps: int) -> int:
    """How many of the steps to take."""
    if options.full:
        return num_steps
    few = 3 if options.network == "paper" and options.device == "cpu" else num_steps
    return min(num_steps, options.steps_timed or few)


def markdown(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a table to send along with their file; what was not measured is left empty."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (row.get(column) for column in columns)
        texts = ("" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(["", *lines])


def write_results(
    file: str, rows: list[dict[str, Any]], case: Case, options: argparse.Namespace, **more: Any
) -> None:
    """The JSON document of a run: its rows, and the environment that it ran in."""
    # Names of files are left out: they say where, not what.
    asked = {name: value for name, value in vars(options).items() if name not in ("json", "score", "classifier")}
    environment = case.machine | {"weights": case.networks.weights, "options": asked | {"images": case.images}} | more
    pathlib.Path(file).write_text(json.dumps(finite_or_none({"rows": rows, "environment": environment}), indent=1) + "\n")
