"""The ``fastpo`` command. Heavy imports happen in the command that needs them, so ``--help`` is quick."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import strftime
from typing import Any

from fastpo.version import __version__

END_SECONDS = 20  # that one of several processes has to end after an error
_RAW = argparse.RawDescriptionHelpFormatter


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None: those of this process.

    Returns:
        The exit status: 0; 1 where a self-check failed or a run stopped; 2 for a mistake in the command, the
        configuration or the data, told in one line on stderr.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in _CONFIGURED:
        parser.error(f"unexpected arguments: {' '.join(rest)}")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warning_shower(arguments.command)
            return int(arguments.run(arguments, rest))
    except Exception as error:
        _end_with_the_others(error)
        if not _told_in_full(error):
            raise
        # In the middle of a progress bar's line.
        stopped = isinstance(error, ArithmeticError | ChildProcessError) or _is_ours(error)
        lead = "\n" if stopped else ""
        print(f"{lead}fastpo {arguments.command}: error: {_one_line(error)}", file=sys.stderr)
        return 1 if stopped else 2


def _end_with_the_others(error: Exception) -> None:
    """Where this is one of several processes: tell their launcher the reason, and be sure to end."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return
    from fastpo.rank_watch import tell_launcher

    tell_launcher(error)
    # A communicator that waits for the others may hold up the end of Python for good. The signal ends the
    # process, whatever thread is waiting.
    if hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(END_SECONDS)


def _warning_shower(command: str) -> Callable[..., None]:
    """A ``warnings.showwarning`` that tells fastpo's own warnings in one line, on the main process alone."""
    others = warnings.showwarning
    package = str(Path(__file__).parents[1])

    def show(message: Warning, category: type[Warning], filename: str, *rest: Any) -> None:
        if category is not UserWarning or not filename.startswith(package):
            others(message, category, filename, *rest)
        elif os.environ.get("RANK", "0") == "0":
            print(f"fastpo {command}: warning: {_one_line(message)}", file=sys.stderr)

    return show


def _told_in_full(error: Exception) -> bool:
    """Whether the message says all: fastpo raised it on purpose, or a file could not be read or written.

    Anything else is a defect somewhere, and its traceback is shown.
    """
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame else ""
    kinds = (ValueError, TypeError, ImportError, ArithmeticError)
    ours = isinstance(error, kinds) and module.split(".")[0] == "fastpo"
    return isinstance(error, OSError) or _is_ours(error) or ours


def _is_ours(error: Exception) -> bool:
    """Whether the class is fastpo's own: work that stopped, of which what was finished is kept."""
    return type(error).__module__.split(".")[0] == "fastpo"


def _one_line(error: Exception | Warning) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_LAUNCH = "On several devices: accelerate launch -m fastpo.cli {} --config FILE.yaml ...\n"
# Commands whose settings are a dataclass, from a YAML file and the command line: command → its class and its
# function, both as module:name, what it does in a line, and what its help says further.
_CONFIGURED = {
    "train": (
        "fastpo.trainer:PreferenceConfig",
        "fastpo.trainer:train",
        "train a checkpoint on preference pairs",
        _LAUNCH.format("train"),
    ),
    "sft": (
        "fastpo.trainer:SFTConfig",
        "fastpo.trainer:fine_tune",
        "fine-tune a checkpoint on examples of good answers",
        _LAUNCH.format("sft"),
    ),
    "ref-logps": (
        "fastpo.trainer:RefLogpsConfig",
        "fastpo.trainer:write_reference_logps",
        "write the reference's log-probs of a training run's pairs to a Parquet file",
        "The file of `fastpo train` serves, and --output; then set ref_logps in it.\n"
        + _LAUNCH.format("ref-logps"),
    ),
    "estimate": (
        "fastpo.estimate:EstimateConfig",
        "fastpo.estimate:print_estimate",
        "say how much memory a training run needs per device, without its weights",
        "The file of `fastpo train` serves; of the model it reads config.json alone.\n",
    ),
    "iterate": (
        "fastpo.selfplay.loop_config:LoopConfig",
        "fastpo.selfplay.loop:iterate",
        "run SPIN, DNPO, SynPO or iterative DPO: generate, score, pair and train, again and again",
        "A run that was stopped goes on with the same command.\n",
    ),
    "generate": (
        "fastpo.selfplay.generate:GenerateConfig",
        "fastpo.selfplay.generate:generate",
        "have a model answer a file of prompts",
        "",
    ),
    "score": (
        "fastpo.selfplay.score:ScoreConfig",
        "fastpo.selfplay.score:score",
        "give every response of a file a score",
        "",
    ),
    "pairs": (
        "fastpo.selfplay.pairs:PairsConfig",
        "fastpo.selfplay.pairs:make_pairs",
        "make preference pairs of scored responses",
        "",
    ),
    "prompts": (
        "fastpo.selfplay.synpo:PromptsConfig",
        "fastpo.selfplay.synpo:make_prompts",
        "make prompts from the keywords of a corpus (SynPO)",
        "",
    ),
    "improve": (
        "fastpo.selfplay.synpo:ImproveConfig",
        "fastpo.selfplay.synpo:improve",
        "have an improver rewrite responses (SynPO)",
        "",
    ),
    "eval-export": (
        "fastpo.selfplay.export:ExportConfig",
        "fastpo.selfplay.export:export",
        "write responses in AlpacaEval's format, and the commands of the papers' benchmarks",
        "",
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastpo",
        description="Preference optimisation of language models without materialised logits.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastpo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for name, (_, _, help_line, *_) in _CONFIGURED.items():
        configured = commands.add_parser(name, help=help_line, add_help=False, allow_abbrev=False)
        configured.add_argument("-h", "--help", action="store_true")
        configured.add_argument("--config", metavar="FILE.yaml")
        configured.set_defaults(run=_run_configured)

    demo = commands.add_parser(
        "demo",
        help="train a tiny model on a task of its own, four ways",
        description="Make a small task whose answers a program checks, fine-tune a tiny model on careless\n"
        "examples, train it by DPO, γ-DPO, SimPO and γ-SimPO on pairs of which 30 % are flipped, and\n"
        "print the exact-match accuracy before and after each. Takes a few minutes on two CPU cores.",
        formatter_class=_RAW,
        allow_abbrev=False,
    )
    demo.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="a new or empty directory (default: runs/demo-DATE-TIME)",
    )
    demo.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="each draws its own model, data and flips (default: 0 1; with --prepare: 0)",
    )
    demo.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiplies the numbers of examples, pairs and test prompts (default: 1)",
    )
    demo.add_argument(
        "--prepare",
        type=Path,
        metavar="DIR",
        help="stop before training: write the fine-tuned checkpoint DIR/model and the pairs DIR/train.jsonl, "
        "for `fastpo train` with recipes/cpu-gamma-simpo.yaml",
    )
    demo.add_argument(
        "--prepare-loop",
        type=Path,
        metavar="DIR",
        help="stop before training: write a checkpoint, seeds, a corpus and templates into DIR, for "
        "`fastpo iterate` with recipes/loops/cpu-*.yaml; with --scale below 1 the model learns too little "
        "for them",
    )
    demo.set_defaults(run=_demo)

    plot = commands.add_parser(
        "plot",
        help="plot the curves of a run",
        description="Plot loss, rewards, margins, accuracies and γ of a run into RUN_DIR/training.png.",
        allow_abbrev=False,
    )
    plot.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of a run")
    plot.set_defaults(run=_plot)

    bench = commands.add_parser(
        "bench",
        help="measure time, memory and accuracy beside other libraries",
        description="Measure fastpo beside the other libraries that are installed, on states of a language "
        "model and on random ones: time of forward and of forward + backward in interleaved rounds, peak extra "
        "memory, and errors against float64. Prints tables and writes JSON. `pip install 'fastpo[bench]'` gets "
        "the others.",
        allow_abbrev=False,
    )
    bench.add_argument(
        "--set",
        metavar="NAME",
        help="cpu (10 minutes on two cores), gpu (8 minutes) or quick (2 minutes); default: gpu with a CUDA "
        "device, else cpu",
    )
    bench.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        metavar="M",
        help="start nothing more after M minutes; the most important comes first (default: 10)",
    )
    bench.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="the JSON file (default: runs/bench-DATE-TIME.json); with --report: the directory of the report "
        "(default: that of the first file's name)",
    )
    bench.add_argument(
        "--only", nargs="+", default=[], metavar="RIVAL", help="only these take part"
    )
    bench.add_argument("--skip", nargs="+", default=[], metavar="RIVAL", help="these do not")
    bench.add_argument(
        "--rounds", type=int, metavar="N", help="rounds of timing (default: 5 to 9, by case)"
    )
    bench.add_argument(
        "--states",
        type=Path,
        metavar="FILE",
        help="safetensors file with hidden (rows, H) and weight (V, H) of a language model (default: those of "
        "a small one that is trained here, once)",
    )
    bench.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing: turn these JSON files into Markdown tables and plots",
    )
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser(
        "doctor",
        help="report versions and devices, and check the arithmetic",
        description="Report versions, devices and optional packages, and compare every backend that works here "
        "with float64. Exit status 1 if one of them is wrong.",
        allow_abbrev=False,
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _run_configured(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from fastpo.cli.configuration import help_text, load_config
    from fastpo.config_folder import known_config_folder

    command = arguments.command
    class_name, function, help_line, further = _CONFIGURED[command]
    config_class = _imported(class_name)
    if arguments.help:
        about = f"{help_line[0].upper()}{help_line[1:]}."
        print(help_text(config_class, command, about, further))
        return 0
    with known_config_folder(arguments.config):
        _imported(function)(load_config(config_class, arguments.config, overrides, command))
    return 0


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _demo(arguments: argparse.Namespace, rest: list[str]) -> int:
    from fastpo.demo.run import prepare, run_demo

    if arguments.prepare_loop is not None:
        from fastpo.demo.words import prepare_loop

        if arguments.output_dir or arguments.prepare or len(arguments.seeds or [0]) > 1:
            raise ValueError("--prepare-loop: takes one seed, and no --output-dir or --prepare")
        made = prepare_loop(arguments.prepare_loop, (arguments.seeds or [0])[0], arguments.scale)
        print(f"{made}: model, seeds.jsonl, corpus.txt and SynPO's templates")
        return 0
    if arguments.prepare is None:
        output_dir = arguments.output_dir or Path("runs", strftime("demo-%Y%m%d-%H%M%S"))
        run_demo(output_dir, seeds=arguments.seeds or [0, 1], scale=arguments.scale)
        return 0
    if arguments.output_dir or len(arguments.seeds or [0]) > 1:
        raise ValueError(
            "--prepare: writes one start into its own DIR; give no --output-dir, and one seed"
        )
    _, pairs = prepare(arguments.prepare, (arguments.seeds or [0])[0], arguments.scale)
    print(f"{arguments.prepare / 'model'}: a fine-tuned checkpoint")
    print(f"{arguments.prepare / 'train.jsonl'}: {pairs} preference pairs")
    return 0


def _plot(arguments: argparse.Namespace, rest: list[str]) -> int:
    from fastpo.trainer.plots import plot_run

    print(plot_run(arguments.run_dir))
    return 0


def _bench(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.report:
        from fastpo.benchmarks.report import report

        print(report(arguments.report, arguments.out))
        return 0
    from fastpo.benchmarks.bench import run

    run(
        arguments.set,
        arguments.out or Path("runs", strftime("bench-%Y%m%d-%H%M%S.json")),
        minutes=arguments.minutes,
        only=arguments.only,
        skip=arguments.skip,
        states=arguments.states,
        rounds=arguments.rounds,
    )
    return 0


def _doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    from fastpo.cli.doctor import report

    return 0 if report() else 1
