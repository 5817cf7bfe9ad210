"""Times training in two data-parallel processes of one thread each against one process.

python benchmarks/data_parallel.py --output data_parallel.json

The loop, optimizer and data parallelism are the recipes' own; each process trains on as many sequences as the one
alone. A third contestant is one process of two threads. They take turns, those who wait asleep. Two cores at least.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import accelerate
import torch
import transformers
from torch import distributed

from code_peers import BOI, EOI, FIRST_TEXT, IMAGE, PATCH_SIZE, TEXT_TOKENS, build_transfusion
from hf_mm.training.loop import Batch, TrainingProgress, train
from hf_mm.training.optimization import prepare_training
from hf_mm.training.recipe import TrainingRecipe, build_accelerator
from timing import Clock, benchmark_parser, count_parameters, describe, judge, tell


TARGET = 1.7
PROMPT_LENGTH = 32
SIDE = 8  # patches along each side of an image
MANY = 10**6  # steps that never come


def endless_batches(batch_size: int, seed: int) -> Iterator[Batch]:
    """Repeats one batch of texts and images, as a collator gives it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(FIRST_TEXT, TEXT_TOKENS, (batch_size, PROMPT_LENGTH), generator=generator)
    image = torch.full((batch_size, SIDE**2 + 2), IMAGE)
    image[:, 0], image[:, -1] = BOI, EOI
    ids = torch.cat([text, image], 1)
    latents = torch.randn(batch_size, 3, PATCH_SIZE * SIDE, PATCH_SIZE * SIDE, generator=generator)
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == IMAGE, -100),
        "position_ids": torch.arange(ids.shape[1]).expand(batch_size, -1).contiguous(),
        "latents": latents,
        "noise": torch.randn(latents.shape, generator=generator),
        "timesteps": torch.randint(1000, (batch_size,), generator=generator).float(),
    }
    while True:
        yield batch


def work(pipe: Connection, environment: dict[str, str], num_threads: int, arguments: argparse.Namespace) -> None:
    """Trains as many steps as it is told to, each time it is told, and answers with the seconds that took."""
    os.environ.update(environment)
    torch.set_num_threads(num_threads)
    with tempfile.TemporaryDirectory() as folder:
        recipe = TrainingRecipe(
            output_dir=folder,
            max_steps=MANY,
            logging_steps=MANY,
            save_steps=MANY,
            report_to=["none"],
            mixed_precision=arguments.mixed_precision,
        )
        accelerator = build_accelerator(recipe)
        model = build_transfusion(arguments.hidden_size, arguments.num_layers, 512, side=SIDE)
        parts = prepare_training(accelerator, model, recipe)
        progress = TrainingProgress()
        batches = endless_batches(arguments.batch_size, seed=accelerator.process_index)
        pipe.send(count_parameters(model))
        while num_steps := pipe.recv():
            begin = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
                train(
                    accelerator,
                    parts,
                    batches,
                    replace(recipe, max_steps=progress.step + num_steps),
                    count_targets=model.count_targets,
                    save=lambda step: None,
                    progress=progress,
                )
            pipe.send(time.perf_counter() - begin)
        if distributed.is_initialized():
            distributed.destroy_process_group()


class Crew:
    """Processes that train together.

    Args:
        num_processes (`int`): How many.
        num_threads (`int`): Threads of each.
        arguments (`argparse.Namespace`): Sizes.
    """

    def __init__(self, num_processes: int, num_threads: int, arguments: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(num_processes):
            environment = {"ACCELERATE_USE_CPU": "true"}
            if num_processes > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(num_processes),
                    "LOCAL_WORLD_SIZE": str(num_processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, environment, num_threads, arguments), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies is noticed
            self.pipes.append(mine)
            self.processes.append(process)

    def ask(self, num_steps: int) -> float:
        """Has all of them train; returns the seconds of the slowest."""
        for pipe in self.pipes:
            pipe.send(num_steps)
        return max(pipe.recv() for pipe in self.pipes)

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self.pipes:
            pipe.send(0)
        for process in self.processes:
            process.join()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Has the crews take turns and returns what was found, and on what."""
    result = describe(arguments, (torch, transformers, accelerate))
    sizes = {"one_process": (1, 1), "two_processes": (2, 1), "one_process_of_two_threads": (1, 2)}
    crews = {name: Crew(*size, arguments) for name, size in sizes.items()}
    (result["parameters"],) = {pipe.recv() for crew in crews.values() for pipe in crew.pipes}
    clock = Clock({name: [] for name in crews})
    for number in range(arguments.num_repeats + 1):
        for name, crew in crews.items():
            seconds = crew.ask(arguments.num_steps) / arguments.num_steps
            if number:  # the first one warms up
                clock[name].append(seconds)
    for crew in crews.values():
        crew.close()
    per_second = {name: arguments.batch_size * sizes[name][0] / clock.median(name) for name in crews}
    # Two processes do twice the work in a step.
    speedup = round(2 * clock.ratio("one_process", "two_processes"), 3)
    return result | {
        "milliseconds_per_step": clock.milliseconds(),
        "sequences_per_second": {name: round(value, 2) for name, value in per_second.items()},
        "two_processes_over_one": judge(speedup, at_least=TARGET),
        "two_threads_over_one": clock.ratio("one_process", "one_process_of_two_threads"),
    }


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = benchmark_parser(__doc__, num_threads=None, num_repeats=7)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8, help="Sequences of each process.")
    parser.add_argument("--num_steps", type=int, default=4, help="Steps of each turn.")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    arguments = parser.parse_args()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
