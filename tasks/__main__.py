"""The command line of the tasks.

python -m tasks list
python -m tasks prepare NAME... [--raw DIR]      NAME may be a suite: `prepare micro`
python -m tasks check NAME...                    data, starter and scores as they should be?
python -m tasks score NAME submission.csv
python -m tasks measure NAME... [--write]        where task.yaml's numbers and the notes come from
"""

import argparse
import sys
from pathlib import Path

import tasks


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all tasks, and whether their data are prepared")
    for command in ("prepare", "check", "measure"):
        sub = commands.add_parser(command)
        sub.add_argument("names", nargs="+", metavar="NAME", help="a task or a suite")
        if command == "prepare":
            sub.add_argument("--raw", type=Path, help="folder of the raw files")
        if command == "measure":
            sub.add_argument("--write", action="store_true", help="change task.yaml, ideas.yaml")
    score = commands.add_parser("score")
    score.add_argument("name", metavar="NAME")
    score.add_argument("submission", type=Path)
    args = parser.parse_args(argv)
    try:
        return {
            "list": list_tasks,
            "prepare": prepare,
            "check": check,
            "score": score_file,
            "measure": measure,
        }[args.command](args)
    except (tasks.TaskError, tasks.InvalidSubmission) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def list_tasks(args) -> int:
    row = "{:<14}{:<7}{:<9}{:<9}{:<15}{:<16}{:>10}{:>10}{:>9}  {}"
    header = ("name", "suite", "split", "modality", "kind", "metric", "initial", "best", "noise")
    print(row.format(*header, "data"))
    for name in tasks.names():
        task = tasks.load(name)
        metric = f"{task.metric} {'down' if task.lower_is_better else 'up'}"
        numbers = ["-"] * 3
        if task.best_score is not None:
            scale = task.scale()
            numbers = [f"{x:.5g}" for x in (scale.initial, scale.best, scale.noise)]
        data = "ready" if task.is_prepared() else "stale" if task.manifest() else "-"
        print(row.format(name, task.suite, task.split, task.modality, task.kind, metric, *numbers, data))
    return 0


def prepare(args) -> int:
    for name in expand(args.names):
        manifest = tasks.prepare(name, args.raw)
        print(f"{name}: {len(manifest['files'])} files, fingerprint {manifest['fingerprint'][:12]}")
    return 0


def score_file(args) -> int:
    task = tasks.load(args.name)
    if not args.submission.is_file():
        raise tasks.TaskError(f"there is no file {args.submission}")
    submission = args.submission.read_bytes()
    for part in tasks.PARTS:
        m = task.score(submission, part)
        print(f"{part:<7} {task.metric} {m:.5f}   gain {task.gain(m, part):.3f}")
    return 0


def check(args) -> int:
    from tasks import measure as measuring

    failed = 0
    with measuring.new_pool() as pool:
        for name in expand(args.names):
            problem = measuring.check(tasks.load(name), pool)
            print(f"{name}: {problem or 'fine'}")
            failed += problem is not None
    return 1 if failed else 0


def measure(args) -> int:
    from tasks import measure as measuring

    with measuring.new_pool() as pool:
        for name in expand(args.names):
            found = measuring.measure(name, pool)
            if args.write:
                measuring.write(name, found)
    return 0


def expand(names: list[str]) -> list[str]:
    """Task names, with each suite's name replaced by its tasks."""
    return [task for name in names for task in (tasks.names(suite=name) or [name])]


if __name__ == "__main__":
    sys.exit(main())
