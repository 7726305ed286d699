"""The command line: `spectralar COMMAND`. Names every command and where it lives; a command is imported when called.

This is the one place that knows all rooms, so it names the functions of the training room as text and not by import.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import spectralar

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("spectralar.training.demo:demo", "learn from photographs and draw new ones; minutes, no download"),
    "sample": ("spectralar.commands:sample", "draw pictures: a labelled grid and one from coarse to fine"),
    "reconstruct": ("spectralar.training.commands:reconstruct", "rebuild pictures from their first n tokens"),
    "shards": ("spectralar.training.data.shards:shards_command", "pack a folder of pictures into WebDataset shards"),
    "emoji": ("spectralar.training.data.emoji:emoji_command", "the embedded model's pictures as shards, from a font"),
    "train tokenizer": ("spectralar.training.commands:train_tokenizer_command", "stage one, from shards"),
    "tokenize": ("spectralar.training.commands:tokenize_command", "encode shards into a token store"),
    "train generator": ("spectralar.training.commands:train_generator_command", "stage two, from a token store"),
    "inspect tokenizer": (
        "spectralar.training.evaluation.inspection:inspect_tokenizer_command",
        "what every token says and does, as a table and a picture",
    ),
    "bench kernels": ("spectralar.bench.commands:bench_kernels_command", "time the kernels against ceilings and peers"),
    "bench sampler": (
        "spectralar.bench.commands:bench_sampler_command",
        "time whole generations, to tokens and pixels",
    ),
    "bench training": (
        "spectralar.bench.commands:bench_training_command",
        "time training steps, on one GPU and several",
    ),
    "bench loader": (
        "spectralar.bench.commands:bench_loader_command",
        "time how fast pictures reach the device",
    ),
    "bench tune": ("spectralar.bench.tune:bench_tune_command", "try other rows of the kernels' launch tables"),
    "info": ("spectralar.commands:info", "what is installed, and what a model is made of"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for an error, 2 for a wrong call, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _overview(Console())
        return 0
    if arguments[0] == "--version":
        print(f"spectralar {spectralar.__version__}")
        return 0
    name = next((n for n in COMMANDS if n.split() == arguments[: len(n.split())]), None)
    if arguments[1:] in (["-h"], ["--help"]) and any(n.startswith(f"{arguments[0]} ") for n in COMMANDS):
        _overview(Console(), group=arguments[0])
        return 0
    if name is None:
        _error(f"no command {' '.join(arguments[:2])!r}; see spectralar --help")
        return 2
    rest = arguments[len(name.split()) :]
    try:
        _run(_resolve(COMMANDS[name][0]), rest, f"spectralar {name}")
    except BrokenPipeError:
        # Who reads, `head` perhaps, has seen enough; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if "--traceback" in arguments:
            raise
        _error(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _resolve(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


def _run(command: Callable[..., Any], arguments: list[str], program: str) -> None:
    """Commands that take `(arguments, program)` parse for themselves; tyro reads all others' parameters."""
    from spectralar.devices import many_queues  # here, as it imports PyTorch, which the overview does not need

    many_queues()
    if getattr(command, "parses_arguments", False):
        command(arguments, program)
        return
    import tyro

    tyro.cli(command, args=[a for a in arguments if a != "--traceback"], prog=program)


def _error(message: str) -> None:
    # A message may hold brackets, which are not markup, and paths, which no line break should cut.
    Console(stderr=True).print(f"[red]error[/]: {escape(message)}", highlight=False, soft_wrap=True)


def _overview(console: Console, group: str = "") -> None:
    """All commands, or those of one group, such as `train`."""
    console.print(f"[bold]spectralar {spectralar.__version__}[/]: images as ordered spectral tokens, and new images")
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name, (_, text) in COMMANDS.items():
        if group in ("", name.split()[0]):
            table.add_row(f"spectralar [bold]{name}[/]", text)
    console.print(table)
    console.print("Every command explains itself with --help; --traceback shows where an error comes from.")


if __name__ == "__main__":
    sys.exit(main())
