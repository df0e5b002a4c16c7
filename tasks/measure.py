"""Measure a task: its starter, every idea alone, and the best combination of ideas.

    python -m tasks measure m-ames            # prints what it finds
    python -m tasks measure m-ames --write    # and puts it into task.yaml and ideas.yaml

This is where initial_score, best_score, noise and every idea's note come from. All runs go through
the sandbox with the task's limits, exactly like an agent's experiments.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import sandbox
import tasks
from tasks.metrics import METRICS

BOOTSTRAP_ROUNDS = 400
BOOTSTRAP_ROWS = 400 * 100_000  # in all rounds: larger sets get fewer rounds, down to 20
BEAM = 3  # combinations that the search keeps at each length
MIN_STEP = 0.1  # standard errors that one more idea must add


@dataclass(frozen=True)
class Run:
    """One run of a script: its scores by part (None unless it ran and was scored)."""

    reason: str  # ok, or why there is no score: the sandbox's word, or bad_submission
    scores: dict | None
    seconds: float
    output: str
    submission: bytes | None = None


def run(task: tasks.Task, script: str, pool, gpus: tuple[int, ...] = ()) -> Run:
    """Run a train.py in a fresh workspace, with these GPUs (numbers N of /dev/nvidiaN), and score what it wrote."""
    task.require_data()
    task.require_packages()
    workspace = sandbox.new_workspace()
    try:
        for name, text in (task.helpers() | {"train.py": script}).items():
            (workspace / name).write_text(text)
        result = pool.submit(
            ["python", "train.py"],
            workspace,
            limits=sandbox.Limits(**task.limits),
            read_only=((task.public, "data"),),
            hidden=(task.private,),
            gpus=gpus,
        ).result()
        output = result.stdout + result.stderr
        if result.reason != "ok":
            return Run(result.reason, None, result.wall_s, output)
        try:
            submission = sandbox.safe_read(workspace, "submission.csv", task.max_submission_bytes())
            scores = task.scores(submission)
        except (sandbox.SubmissionError, tasks.InvalidSubmission) as error:
            return Run("bad_submission", None, result.wall_s, output + str(error))
        return Run("ok", scores, result.wall_s, output, submission)
    finally:
        sandbox.remove(workspace)


def new_pool():
    """One worker: times are worth more than speed here."""
    return sandbox.Pool(1, preload=tasks.PRELOAD)


def check(task: tasks.Task, pool, gpus: tuple[int, ...] = ()) -> str | None:
    """None when data, starter and scores are in order, else what is wrong, in one line."""
    task.require_data()
    for name, digest in task.manifest()["files"].items():
        path = tasks.DATA / task.name / name
        if not path.exists() or tasks.sha256(path) != digest:
            return f"{path} has changed; run: python -m tasks prepare {task.name}"
    starter = run(task, task.sources()["train.py"], pool, gpus)
    if starter.scores is None:
        last = starter.output.strip().splitlines()[-1:]
        return f"the starter gives no score ({starter.reason}) {' '.join(last)}"
    if task.initial_source != "measured":
        return None  # a score from elsewhere is another starter's
    for part, expected in task.initial_score.items():
        if abs(starter.scores[part] - expected) > task.noise / 2:
            return f"the starter scores {starter.scores[part]:.5g} on {part}, not {expected:.5g}"
    return None


def standard_error(task: tasks.Task, submission: bytes, seed: int = 0) -> float:
    """Bootstrap standard error of a submission's score: rows, or whole groups, drawn anew."""
    truth, predictions, answers = task.aligned(submission)
    metric, rng = METRICS[task.metric].function, np.random.default_rng(seed)
    members = None
    if answers.groups is not None:
        number = np.unique(answers.groups, return_inverse=True)[1]
        members = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
    n = len(truth) if members is None else len(members)
    scores = []
    for _ in range(max(20, min(BOOTSTRAP_ROUNDS, BOOTSTRAP_ROWS // len(truth)))):
        rows = rng.integers(0, n, n)
        if members is not None:
            rows = np.concatenate([members[i] for i in rows])
        try:
            scores.append(metric(truth[rows], predictions[rows]))
        except ValueError:  # an AUC whose rare class was not drawn
            continue
    return float(np.std(scores))


def note(task: tasks.Task, starter: Run, idea: Run, noise: float) -> str:
    """What an idea does alone: it has to beat the noise to count as better or worse."""
    if idea.scores is None:
        return "times_out" if idea.reason in ("wall", "cpu") else "crashes"
    change = idea.scores["all"] - starter.scores["all"]
    if abs(change) <= noise:
        return "neutral"
    return "improves" if task.better(idea.scores["all"], starter.scores["all"]) else "hurts"


def combine(task: tasks.Task, script: str, ideas: list, alone: dict, noise: float, pool, gpus: tuple[int, ...] = ()):
    """Beam search over one idea a block; returns (ideas, run) of the best combination.

    An idea that does little alone may do much after another, so the search starts from the best
    idea of each block, not from the best ones over all; then it keeps the best pairs, and triples.
    """
    sign = -1 if task.lower_is_better else 1

    def quality(candidate):
        return sign * candidate[1].scores["all"]

    beam = []
    for block in tasks.AXES:
        singles = [((i,), alone[i.text]) for i in ideas if i.block == block and alone[i.text].scores]
        beam += sorted(singles, key=quality, reverse=True)[: BEAM // len(tasks.AXES)]
    best = max([*beam, ((), alone[None])], key=quality)
    for _ in tasks.AXES[1:]:
        wider = {}
        for chosen, _ in beam:
            for idea in ideas:
                if any(idea.block == other.block for other in chosen):
                    continue
                combination = tuple(sorted((*chosen, idea), key=lambda i: tasks.AXES.index(i.block)))
                if combination in wider:
                    continue
                edited = script
                for part in combination:
                    edited = tasks.apply_block(edited, part.block, part.code)
                wider[combination] = run(task, edited, pool, gpus)
        scored = [item for item in wider.items() if item[1].scores]
        beam = sorted(scored, key=quality, reverse=True)[:BEAM]
        # a longer combination has to be worth its length
        if beam and quality(beam[0]) > quality(best) + MIN_STEP * noise:
            best = beam[0]
    return best


def measure(name: str, pool, combinations: bool = True, log=print, gpus: tuple[int, ...] = ()) -> dict:
    """Everything measured about a task, as a dict; `write` stores it.

    gpus: numbers N of /dev/nvidiaN that the scripts may use: those that experiments will have (sandbox.gpus).

    Ideas that are texts without code cannot be run: then only the starter is measured.
    """
    task = tasks.load(name)
    script, ideas = task.sources()["train.py"], [idea for idea in task.ideas() if idea.code is not None]
    starter = run(task, script, pool, gpus)
    if starter.scores is None:
        last = " ".join(starter.output.strip().splitlines()[-1:])
        raise tasks.TaskError(f"{name}: the starter fails ({starter.reason}) {last}")
    noise = standard_error(task, starter.submission)
    log(f"{name}: starter {starter.scores['all']:.5g} +- {noise:.2g} ({starter.seconds:.2f} s)")
    if not ideas:
        return {"starter": starter, "noise": noise}
    alone = {None: starter}
    for idea in ideas:
        alone[idea.text] = run(task, tasks.apply_block(script, idea.block, idea.code), pool, gpus)
    chosen, best = (), starter
    if combinations:
        chosen, best = combine(task, script, ideas, alone, noise, pool, gpus)
        noise = standard_error(task, best.submission)
    notes = {i.text: note(task, starter, alone[i.text], noise) for i in ideas}
    for axis in tasks.AXES:
        log(f"  {axis}")
        for idea in ideas:
            if idea.axis == axis:
                log(f"    {notes[idea.text]:<10}{_figures(alone[idea.text])}  {idea.text}")
    texts = " + ".join(idea.text for idea in chosen)
    log(f"  best {best.scores['all']:.5g} +- {noise:.2g} ({best.seconds:.2f} s): {texts}")
    return {
        "starter": starter,
        "alone": alone,
        "notes": notes,
        "best": best,
        "best_texts": texts,
        "noise": noise,
    }


def write(name: str, found: dict) -> None:
    """Put measured values into task.yaml (one line each) and ideas.yaml (its `notes`)."""
    initial = found["starter"].scores
    parts = ", ".join(f"{part}: {initial[part]:.5g}" for part in tasks.PARTS)
    values = {"initial_score": f"{{{parts}}}", "noise": f"{found['noise']:.2g}"}
    if "best" not in found:  # of a task whose best score is not ours
        values["initial_source"] = "measured"
        _write_values(tasks.spec_path(name), values)
        return
    values["best_score"] = f"{found['best'].scores['all']:.5g}"
    values["best_source"] = '"measured, on all answers: ' + found["best_texts"] + '"'
    _write_values(tasks.spec_path(name), values)
    lines = ["notes:  # alone on the starter: python -m tasks measure " + name]
    for idea, word in found["notes"].items():
        lines.append(f"  {idea}: {word}  # {_figures(found['alone'][idea]).strip()}")
    path = tasks.load(name).dir / "ideas.yaml"
    ideas = path.read_text().split("\nnotes:")[0].rstrip("\n")
    path.write_text(ideas + "\n\n" + "\n".join(lines) + "\n")


def _write_values(path: Path, values: dict[str, str]) -> None:
    text = path.read_text()
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^{key}:.*$", lambda _, line=f"{key}: {value}": line, text)
        if count != 1:
            raise tasks.TaskError(f"{path} must have one line '{key}:'")
    path.write_text(text)


def _figures(run: Run) -> str:
    if run.scores is None:
        return f"{run.reason:>10} {run.seconds:6.2f} s"
    return f"{run.scores['all']:10.5g} {run.seconds:6.2f} s"
