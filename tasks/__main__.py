"""The command line of the tasks.

python -m tasks list
python -m tasks prepare NAME... [--raw PATH]     NAME may be a suite: `prepare micro`; PATH a folder
                                                 or the archive that the download command leaves
python -m tasks check NAME...                    data, starter and scores as they should be?
python -m tasks score NAME submission.csv
python -m tasks measure NAME... [--write]        where task.yaml's numbers and the notes come from
    --gpus 0 1                                   check, measure: with these GPUs, as sandbox.gpus grants them to agents
"""

import argparse
import sys
from pathlib import Path

import sandbox
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
            sub.add_argument("--raw", type=Path, help="folder or archive of the raw files")
            sub.add_argument("--again", action="store_true", help="also what is prepared and up to date")
        else:
            sub.add_argument("--gpus", type=int, nargs="*", default=[], metavar="N", help="N of each /dev/nvidiaN")
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
    except (tasks.TaskError, tasks.InvalidSubmission, sandbox.SandboxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def list_tasks(args) -> int:
    every = [variant for name in tasks.names() for variant in (name, *tasks.variants(name))]
    row = f"{{:<{max(map(len, [*every, 'name'])) + 2}}}{{:<7}}{{:<9}}{{:<9}}{{:<21}}{{:>10}} {{:>9}}  {{}}"
    print(row.format("name", "suite", "split", "modality", "metric", "initial", "best", "data"))
    for name in every:
        task = tasks.load(name)
        metric = f"{task.metric} {'down' if task.lower_is_better else 'up'}"
        initial = "-" if task.initial_score is None else f"{task.initial_score['all']:.5g}"
        initial += "*" if task.initial_score and task.initial_source != "measured" else " "
        cells = name, task.suite, task.split, task.modality, metric, initial, f"{task.best_score:.5g}"
        print(row.format(*cells, to_do(task) or "ready"))
    print("* not measured: task.yaml says where it is from. data: ready, or the next command")
    return 0


def to_do(task: tasks.Task) -> str:
    """What comes next for this task, or nothing when an agent can work on it."""
    if not task.is_prepared():
        return "prepare again" if task.manifest() else "prepare"
    try:
        task.require_prepared()
    except tasks.TaskError as error:  # packages or scores
        return str(error).rpartition("run: ")[2].removeprefix("python -m tasks ")
    return ""


def prepare(args) -> int:
    names, failed = expand(args.names), False
    if args.raw and len(names) > 1:
        raise tasks.TaskError("--raw is one task's: name one task")
    for name in names:
        if tasks.load(name).is_prepared() and not args.raw and not args.again:
            continue  # what runs on the data now must keep it
        try:
            manifest = tasks.prepare(name, args.raw)
            print(f"{name}: {len(manifest['files'])} files, fingerprint {manifest['fingerprint'][:12]}")
        except tasks.TaskError as error:  # the others may have their files
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            failed = True
    return 2 if failed else 0


def score_file(args) -> int:
    task = tasks.load(args.name)
    if not args.submission.is_file():
        raise tasks.TaskError(f"there is no file {args.submission}")
    submission = args.submission.read_bytes()
    for part, m in task.scores(submission).items():
        gain = "" if task.initial_score is None else f"   gain {task.gain(m, part):.3f}"
        print(f"{part:<7} {task.metric} {m:.5f}{gain}")
    return 0


def check(args) -> int:
    from tasks import measure as measuring

    failed = 0
    with measuring.new_pool() as pool:
        for name in expand(args.names):
            task = tasks.load(name)
            problem = measuring.check(task, pool, tuple(args.gpus))
            fine = "fine"
            if task.initial_source != "measured":
                fine += f"; its initial score is not measured, run: python -m tasks measure {name} --write"
            print(f"{name}: {problem or fine}")
            failed += problem is not None
    return 1 if failed else 0


def measure(args) -> int:
    from tasks import measure as measuring

    with measuring.new_pool() as pool:
        for name in expand(args.names):
            found = measuring.measure(name, pool, gpus=tuple(args.gpus))
            if args.write:
                measuring.write(name, found)
    return 0


def expand(names: list[str]) -> list[str]:
    """Task names, with each suite's name replaced by its tasks."""
    return [task for name in names for task in (tasks.names(suite=name) or [name])]


if __name__ == "__main__":
    sys.exit(main())
