"""What the benchmarks share: timing in turns, the matrix products alone, a profile, and how a result is told.

Knows functions without arguments and linear layers, not models. What is compared takes turns in one process, so that a
change of the machine's speed meets all alike, and a ratio is that of neighbours in time.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity


Deed = Callable[[], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What the profile calls a matrix product; everything else is what stands between a model and its floor.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")


class Product(NamedTuple):
    """One linear layer's part in a run: its weight `(outer, inner)`, and the rows it was given."""

    weight: torch.Tensor
    num_rows: int


class Clock(dict[str, list[float]]):
    """Seconds of each deed in each round, by one clock."""

    def milliseconds(self) -> dict[str, float]:
        """Medians of all deeds."""
        return {name: round(1000 * statistics.median(seconds), 3) for name, seconds in self.items()}

    def median(self, name: str) -> float:
        """Median of a deed, in seconds."""
        return statistics.median(self[name])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long one deed takes as another: the median of the rounds' own ratios."""
        pairs = zip(self[slow], self[fast], strict=True)
        return round(statistics.median(above / below for above, below in pairs), 3)


def take_turns(deeds: Mapping[str, Deed], num_repeats: int) -> dict[str, Clock]:
    """Times deeds one after the other, round by round, after one round that warms up.

    Args:
        deeds (`Mapping[str, Callable]`): By name.
        num_repeats (`int`): Rounds.

    Returns:
        `dict[str, Clock]`: `wall_clock`, and `processor`, the time of all threads of this process, which other
        programs on the machine disturb less; of every round but the first.
    """
    clocks = {"wall_clock": Clock(), "processor": Clock()}
    for number in range(num_repeats + 1):
        for name, deed in deeds.items():
            before = time.perf_counter(), time.process_time()
            deed()
            after = time.perf_counter(), time.process_time()
            for clock, start, end in zip(clocks.values(), before, after, strict=True):
                clock.setdefault(name, []).extend([end - start] if number else [])
    return clocks


def record_products(model: nn.Module, run: Deed) -> list[Product]:
    """Lists the matrix products of a run's linear layers, in order, each time one is called."""
    products: list[Product] = []

    def note(layer: nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        products.append(Product(layer.weight, output.numel() // layer.out_features))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return products


def products_alone(
    products: Iterable[Product], *, backward: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Makes the floor of a run: its matrix products with the model's own weights, and nothing else.

    The weights are read from where they lie, as in the model, so the floor of a decoder that writes token by token is
    the time to read all of them once a token.

    Args:
        products (`Iterable[Product]`): From `record_products`.
        backward (`bool`, defaults to `False`): Computes both gradients of each product too.
        dtype (`torch.dtype`, defaults to `torch.float32`): What is multiplied.

    Returns:
        `Callable`: without arguments.
    """
    products = list(products)
    kept: dict[int, torch.Tensor] = {}  # a weight that several products share stays one
    for product in products:
        kept.setdefault(id(product.weight), product.weight.detach().to(dtype))
    steps = [(kept[id(product.weight)], product.num_rows) for product in products]
    rows = {(number, weight.shape[1]): torch.randn(number, weight.shape[1]).to(dtype) for weight, number in steps}
    grads = {(number, weight.shape[0]): torch.randn(number, weight.shape[0]).to(dtype) for weight, number in steps}

    @torch.no_grad()
    def run() -> None:
        for weight, number in steps:
            inputs = rows[number, weight.shape[1]]
            torch.mm(inputs, weight.T)
            if backward:
                gradient = grads[number, weight.shape[0]]
                torch.mm(gradient, weight)
                torch.mm(gradient.T, inputs)

    return run


def attention_alone(
    shape: tuple[int, int, int], num_keys: int, num_times: int, *, backward: bool = False, dtype: torch.dtype
) -> Callable[[], None]:
    """Makes the matrix products of attention, which no linear layer holds: scores, their sum of values, no softmax.

    Args:
        shape (`tuple[int, int, int]`): Rows times heads, queries, and the size of a head.
        num_keys (`int`): Keys of each row.
        num_times (`int`): How often attention runs.
        backward (`bool`, defaults to `False`): Computes the four products of its gradients too.
        dtype (`torch.dtype`): What is multiplied.

    Returns:
        `Callable`: without arguments.
    """
    num_heads, num_queries, head_dim = shape
    queries = torch.randn(shape).to(dtype)
    keys = torch.randn(num_heads, num_keys, head_dim).to(dtype)
    scores = torch.randn(num_heads, num_queries, num_keys).to(dtype)

    def run() -> None:
        for _ in range(num_times):
            torch.bmm(queries, keys.mT)
            torch.bmm(scores, keys)
            if backward:
                torch.bmm(queries, keys.mT)  # of the scores
                torch.bmm(scores.mT, queries)  # of the values
                torch.bmm(scores, keys)  # of the queries
                torch.bmm(scores.mT, queries)  # of the keys

    return run


def optimizer_alone(model: nn.Module) -> Callable[[], None]:
    """Makes what a step does once its gradients are there: clips them and takes a step of fused AdamW."""
    weights = [nn.Parameter(weight.detach().clone()) for weight in model.parameters()]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW(weights, fused=True)

    def run() -> None:
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return run


def one_after_another(*deeds: Deed) -> Callable[[], None]:
    """Makes one deed of several."""

    def run() -> None:
        for deed in deeds:
            deed()

    return run


def count_parameters(model: nn.Module) -> int:
    """Counts weights."""
    return sum(weight.numel() for weight in model.parameters())


def autocast(dtype: torch.dtype) -> AbstractContextManager:
    """Runs matrix products in `dtype`, as a training recipe does."""
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def profile(deed: Deed, num_ops: int = 12) -> dict[str, Any]:
    """Profiles a deed and prints its costliest operations.

    Args:
        deed (`Callable`): Has run before.
        num_ops (`int`, defaults to 12): Operations in the result.

    Returns:
        `dict`: the share of the time in matrix products, and that of the costliest operations with their calls.
    """
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        deed()
    events = profiler.key_averages()
    print(events.table(sort_by="self_cpu_time_total", row_limit=num_ops, max_name_column_width=60))
    total = sum(event.self_cpu_time_total for event in events)
    costliest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:num_ops]
    return {
        "in_matrix_products": round(
            sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS) / total, 3
        ),
        "operations": {
            event.key: {"share": round(event.self_cpu_time_total / total, 3), "calls": event.count}
            for event in costliest
        },
    }


def judge(measured: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """Sets what was measured beside its target."""
    bound = {"at_most": at_most} if at_least is None else {"at_least": at_least}
    met = (at_least is None or measured >= at_least) and (at_most is None or measured <= at_most)
    return {"measured": measured, **bound, "met": met}


def benchmark_parser(
    description: str | None, *, num_threads: int | None = 1, num_repeats: int | None = 9
) -> argparse.ArgumentParser:
    """Makes a parser of what all benchmarks are asked; `None` leaves an argument out."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    if num_threads is not None:
        parser.add_argument("--num_threads", type=int, default=num_threads)
    if num_repeats is not None:
        parser.add_argument("--num_repeats", type=int, default=num_repeats, help="Rounds that medians are over.")
    parser.add_argument("--output", type=Path, help="JSON file to write the result to.")
    return parser


def find_processor() -> str:
    """Names the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or "unknown processor"


def describe(arguments: argparse.Namespace, modules: Iterable[ModuleType]) -> dict[str, Any]:
    """Says what a result was measured on and with; to be called before the work, for the load of the machine."""
    return {
        "machine": {
            "processor": f"{find_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "system": f"{platform.system()}, {platform.machine()}",
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version()} | {one.__name__: one.__version__ for one in modules},
        "configuration": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(arguments).items()
            if name != "output" and value is not None
        },
    }


def tell(result: Mapping[str, Any], output: Path | None) -> None:
    """Prints a result and writes it, if asked to."""
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
