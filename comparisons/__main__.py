"""Command line: `python -m hsbackend.comparisons speed`, and `portfolio`, `qp`, `degenerate`, `accuracy` likewise."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hsbackend.comparisons import large_sparse, least_squares
from hsbackend.comparisons.accuracy import CASES, run_accuracy
from hsbackend.comparisons.accuracy import screen_text as accuracy_text
from hsbackend.comparisons.accuracy import write_report as write_accuracy
from hsbackend.comparisons.contestants import DEFAULT_ACCURACY, choose_contestants, layer_contestants
from hsbackend.comparisons.degenerate import run_degenerate
from hsbackend.comparisons.degenerate import screen_text as degenerate_text
from hsbackend.comparisons.degenerate import write_report as write_degenerate
from hsbackend.comparisons.environment import describe_environment
from hsbackend.comparisons.experiments.portfolio import (
    DEFAULT_CONTESTANTS,
    QUICK,
    Schedule,
    portfolio_text,
    run_portfolio,
    write_portfolio,
)
from hsbackend.comparisons.experiments.sp500 import load_market
from hsbackend.comparisons.experiments.studies import EXPERIMENTS, run_experiment, setting_of
from hsbackend.comparisons.problems import SUITES, BenchmarkProblem, make_problem
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.qp_contestants import Request, contestants_named
from hsbackend.comparisons.qp_families import SIZES, keys_of
from hsbackend.comparisons.qp_report import QPReport
from hsbackend.comparisons.qp_report import screen_text as qp_text
from hsbackend.comparisons.qp_report import write_report as write_qp
from hsbackend.comparisons.qp_runner import Worker, accepted_families, run_families, steps_of_families
from hsbackend.comparisons.report import SpeedReport, screen_text, write_report
from hsbackend.comparisons.scaling import SERIES, Series, projecting, run_series
from hsbackend.comparisons.speed import run_speed, steps_of
from hsbackend.comparisons.suites import TITLES, every_contestant, suite_contestants

_DEFAULT_OUTPUT = Path("results")
# Of `qp --quick`: one size, few instances, and nobody may take long.
_QP_QUICK_SIZE = 10
_QP_QUICK_INSTANCES = 2
_QP_QUICK_LIMIT_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, or 2 for a request that cannot be met."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class UsageError(Exception):
    """A request that this machine or this installation cannot meet."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hsbackend.comparisons", description="Comparisons with peers.")
    commands = parser.add_subparsers(required=True, metavar="command")

    speed = commands.add_parser("speed", help="problems x contestants: correctness first, then time")
    speed.add_argument("--suite", choices=sorted(SUITES), default="speed", help="which problems (default: speed)")
    speed.add_argument("--problems", nargs="+", metavar="NAME", help="only these problems and series of the suite")
    speed.add_argument(
        "--budget", type=float, default=3.0, metavar="S", help="seconds of repetitions per row (default: 3)"
    )
    speed.set_defaults(run=_speed)

    portfolio = commands.add_parser("portfolio", help="train a portfolio network once per backend on S&P 500 prices")
    portfolio.add_argument("--steps", type=int, metavar="N", help=f"training steps (default: {Schedule().steps})")
    portfolio.set_defaults(run=_portfolio)

    qp = commands.add_parser("qp", help="QP and LP solvers on published families: success rates and times, one thread")
    qp.add_argument("--families", nargs="+", metavar="NAME", help="only these families")
    qp.add_argument("--sizes", nargs="+", type=int, metavar="N", help=f"about N variables (default: {SIZES})")
    qp.add_argument(
        "--budget", type=float, default=0.05, metavar="S", help="seconds of repetitions per row (default: 0.05)"
    )
    qp.add_argument("--time-limit", type=float, default=20.0, metavar="S", help="per solve (default: 20)")
    qp.add_argument(
        "--minutes", type=float, default=22.0, metavar="M", help="begin nothing new after M minutes (default: 22)"
    )
    qp.set_defaults(run=_qp)

    degenerate = commands.add_parser("degenerate", help="gradients at degenerate points, and training through them")
    degenerate.set_defaults(run=_degenerate)

    accuracy = commands.add_parser("accuracy", help="errors of x, multipliers and gradients where they are known")
    accuracy.set_defaults(run=_accuracy)

    sparse = commands.add_parser("sparse", help="large sparse programs: time, memory and error of one item")
    sparse.add_argument("--families", nargs="+", metavar="NAME", help="only these families")
    sparse.add_argument(
        "--sizes", nargs="+", type=int, metavar="N", help=f"N variables (default: {large_sparse.SIZES})"
    )
    sparse.add_argument("--time-limit", type=float, default=300.0, metavar="S", help="per contestant (default: 300)")
    sparse.add_argument("--contestants", nargs="+", metavar="NAME", help="only these contestants")
    sparse.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    sparse.add_argument("--seed", type=int, default=0)
    sparse.add_argument("--output", type=Path, default=_DEFAULT_OUTPUT, help="folder for reports (default: results)")
    sparse.set_defaults(run=_sparse)

    squares = commands.add_parser("lstsq", help="least squares by products: cost and error of gradients")
    squares.add_argument("--contestants", nargs="+", metavar="NAME", help="only these contestants")
    squares.add_argument("--repetitions", type=int, default=5, metavar="N", help="timed calls per row (default: 5)")
    squares.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    squares.add_argument("--seed", type=int, default=0)
    squares.add_argument("--output", type=Path, default=_DEFAULT_OUTPUT, help="folder for reports (default: results)")
    squares.set_defaults(run=_lstsq)

    for command in (speed, portfolio, degenerate, accuracy):
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--seed", type=int, default=0)
    for command in (speed, portfolio, qp, degenerate):
        command.add_argument("--contestants", nargs="+", metavar="NAME", help="only these contestants")
    for command in (speed, portfolio, qp, degenerate, accuracy):
        command.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
        command.add_argument(
            "--accuracy",
            type=float,
            default=DEFAULT_ACCURACY,
            help=f"asked of every solver (default: {DEFAULT_ACCURACY:g})",
        )
        command.add_argument(
            "--output", type=Path, default=_DEFAULT_OUTPUT, help="folder for reports (default: results)"
        )
    for name, experiment in EXPERIMENTS.items():
        command = commands.add_parser(name, help=experiment.help)
        command.add_argument("--quick", action="store_true", help="a size for two cores and two minutes")
        command.add_argument(
            "--steps", type=int, metavar="N", help=f"training steps (default: {experiment.full.steps})"
        )
        command.add_argument("--repeats", type=int, metavar="N", help=f"how many {experiment.repeats}")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument(
            "--output", type=Path, default=_DEFAULT_OUTPUT, help="folder for reports (default: results)"
        )
        command.set_defaults(run=_experiment, name=name)
    return parser


def _experiment(options: argparse.Namespace) -> int:
    device = _device(options.device)
    try:
        setting = setting_of(options.name, quick=options.quick, steps=options.steps, repeats=options.repeats)
        study = run_experiment(options.name, setting, device=device, seed=options.seed)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    print(study.text())
    paths = study.write(options.output)
    print("written: " + ", ".join(str(path) for path in paths))
    return 0


def _device(name: str) -> torch.device:
    """Return the device; a requested device is never silently replaced."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device cuda was given, but torch {torch.__version__} sees no CUDA device; use --device cpu, or install "
            "a CUDA build of torch on a machine with an NVIDIA GPU"
        )
    return torch.device(name)


def _speed(options: argparse.Namespace) -> int:
    device = _device(options.device)
    try:
        if options.contestants is None:
            contestants = suite_contestants(options.suite, options.accuracy)
        else:
            contestants = choose_contestants(every_contestant(options.accuracy), options.contestants)
        problems, series = _chosen_problems(options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    by_series = [one.problems(quick=options.quick, seed=options.seed) for one in series]
    grown = [problem for one in by_series for problem in one]
    budget_s = 0.0 if options.quick else options.budget
    progress = Progress(steps_of(problems, contestants) + steps_of(grown, projecting(contestants)))
    rows = run_speed(problems, contestants, device=device, budget_s=budget_s, progress=progress)
    for one in by_series:
        rows += run_series(one, contestants, device=device, budget_s=budget_s, progress=progress)
    progress.close()
    report = SpeedReport(
        title=TITLES[options.suite],
        environment=describe_environment(device),
        problems=problems,
        series=series,
        grown=grown,
        contestants=contestants,
        rows=rows,
        accuracy=options.accuracy,
        seed=options.seed,
        command="python -m hsbackend.comparisons " + " ".join(sys.argv[1:]),
    )
    print(screen_text(report))
    paths = write_report(report, options.output, options.suite)
    print("written: " + ", ".join(str(path) for path in paths))
    return 0


def _chosen_problems(options: argparse.Namespace) -> tuple[list[BenchmarkProblem], list[Series]]:
    """Return the problems and the series asked for, all of the suite by default.

    Raises:
        ValueError: a name is neither a problem nor a series of the suite.
    """
    known = SERIES[options.suite]
    if options.problems is None:
        return _problems_named(SUITES[options.suite], options), list(known.values())
    names = [name for name in options.problems if name not in known]
    unknown = [name for name in names if name not in SUITES[options.suite]]
    if unknown:
        expected = ", ".join((*SUITES[options.suite], *known))
        raise ValueError(f"unknown problem {unknown[0]!r} in suite {options.suite}, expected one of: {expected}")
    return _problems_named(names, options), [known[name] for name in options.problems if name in known]


def _problems_named(names: Sequence[str], options: argparse.Namespace) -> list[BenchmarkProblem]:
    return [make_problem(name, quick=options.quick, seed=options.seed) for name in names]


def _portfolio(options: argparse.Namespace) -> int:
    device = _device(options.device)
    if device.type != "cpu":
        raise UsageError("the portfolio experiment runs on the CPU; use --device cpu")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError('the portfolio plot needs matplotlib; install it with: pip install "hsbackend[compare]"')
    schedule = QUICK if options.quick else Schedule()
    if options.steps is not None:
        schedule = replace(schedule, steps=options.steps)
    try:
        names = options.contestants or list(DEFAULT_CONTESTANTS)
        contestants = choose_contestants(layer_contestants(options.accuracy), names)
        market = load_market()
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    progress = Progress((schedule.steps + 1) * len(contestants))
    runs = run_portfolio(contestants, market, schedule, seed=options.seed, progress=progress)
    progress.close()
    environment = describe_environment(device)
    print(portfolio_text(runs, market, schedule, environment))
    paths = write_portfolio(runs, environment, options.output)
    print("written: " + ", ".join(str(path) for path in paths))
    return 0


def _qp(options: argparse.Namespace) -> int:
    try:
        contestants = contestants_named(options.contestants)
        families = accepted_families(options.families)
    except ValueError as error:
        raise UsageError(str(error)) from error
    sizes = options.sizes or ([_QP_QUICK_SIZE] if options.quick else list(SIZES))
    if min(sizes) < _QP_QUICK_SIZE:
        raise UsageError(f"--sizes {min(sizes)} was given, the families begin at {_QP_QUICK_SIZE} variables")
    keys = keys_of(families, sizes)
    limit_s, budget_s = options.time_limit, options.budget
    if options.quick:
        keys = [key for key in keys if key.number < _QP_QUICK_INSTANCES]
        limit_s, budget_s = min(limit_s, _QP_QUICK_LIMIT_S), 0.0
    request = Request(options.accuracy, limit_s)
    progress = Progress(steps_of_families(keys))
    with Worker(request, budget_s) as worker:
        rows, not_run = run_families(
            keys,
            contestants,
            worker.measure,
            limit_s=limit_s,
            deadline_s=60.0 * options.minutes,
            progress=progress,
        )
    progress.close()
    report = QPReport(
        environment=describe_environment(torch.device("cpu")),
        families=families,
        contestants=contestants,
        rows=rows,
        not_run=not_run,
        accuracy=options.accuracy,
        limit_s=limit_s,
        minutes=options.minutes,
        command="python -m hsbackend.comparisons " + " ".join(sys.argv[1:]),
    )
    print(qp_text(report))
    paths = write_qp(report, options.output)
    print("written: " + ", ".join(str(path) for path in paths))
    return 0


def _degenerate(options: argparse.Namespace) -> int:
    device = _device(options.device)
    if device.type != "cpu":
        raise UsageError("the comparison at degenerate points runs on the CPU; use --device cpu")
    try:
        report = run_degenerate(
            names=options.contestants,
            accuracy=options.accuracy,
            seed=options.seed,
            quick=options.quick,
            command="python -m hsbackend.comparisons " + " ".join(sys.argv[1:]),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(degenerate_text(report))
    paths = write_degenerate(report, options.output)
    print("written: " + ", ".join(str(path) for path in paths))
    return 0


def _accuracy(options: argparse.Namespace) -> int:
    device = _device(options.device)
    if device.type != "cpu":
        raise UsageError("the comparison with known answers runs on the CPU; use --device cpu")
    progress = Progress(len(CASES))
    report = run_accuracy(
        tolerance=options.accuracy,
        seed=options.seed,
        quick=options.quick,
        command="python -m hsbackend.comparisons " + " ".join(sys.argv[1:]),
        progress=progress,
    )
    progress.close()
    print(accuracy_text(report))
    paths = write_accuracy(report, options.output)
    print("written: " + ", ".join(str(path) for path in paths))
    return 0


def _sparse(options: argparse.Namespace) -> int:
    sizes = options.sizes or (large_sparse.QUICK_SIZES if options.quick else large_sparse.SIZES)
    if min(sizes) < large_sparse.QUICK_SIZES[0]:
        raise UsageError(
            f"--sizes {min(sizes)} was given, the families begin at {large_sparse.QUICK_SIZES[0]} variables"
        )
    try:
        report = large_sparse.run_large(
            families=options.families or list(large_sparse.FAMILIES),
            sizes=sizes,
            contestants=options.contestants or list(large_sparse.CONTESTANTS),
            seed=options.seed,
            quick=options.quick,
            limit_s=options.time_limit,
            command="python -m hsbackend.comparisons " + " ".join(sys.argv[1:]),
            folder=options.output / "sparse",
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(large_sparse.screen_text(report))
    paths = large_sparse.write_report(report, options.output)
    print("written: " + ", ".join(str(path) for path in paths))
    return 0


def _lstsq(options: argparse.Namespace) -> int:
    names = options.contestants or list(least_squares.CONTESTANTS)
    progress = Progress(len(names) * len(least_squares.CASES))
    try:
        report = least_squares.run_lstsq(
            contestants=names,
            quick=options.quick,
            seed=options.seed,
            repetitions=options.repetitions,
            command="python -m hsbackend.comparisons " + " ".join(sys.argv[1:]),
            progress=progress,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    progress.close()
    print(least_squares.screen_text(report))
    paths = least_squares.write_report(report, options.output)
    print("written: " + ", ".join(str(path) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
