"""Exploration-enriched collection (paper 4.1): idea pools -> expert trajectories -> the pool of states.

    python collect.py --config configs/tiny.yaml                    # minutes on two CPU cores
    python collect.py --config configs/micro.yaml trajectories=600

Each trajectory starts from a task's starter and 1-3 sampled ideas; the expert edits, runs, keeps or undoes.
Writes runs/NAME/data/:
    trajectories.jsonl   one line a trajectory; append-only, so that a killed run resumes where it stopped
    states.jsonl         one line a state to act in, derived from the trajectories

The expert here is scripted (expert.py). Differs from the paper, whose expert is GPT-4o-mini.
"""

import io
import json
import re
import sys
import tokenize
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

import config
import sandbox
import tasks
from agent import Action, AgentConfig, State, format_reply, parse_reply
from environment import Environment, Episode, Experiment, SandboxConfig, initial_state, transition
from expert import ScriptedExpert, draw_ideas
from records import append_rows, claim, read_jsonl, states_of
from reward import Outcome


@dataclass(frozen=True)
class Config:
    run: str  # name of the run: everything it writes lies in runs/RUN
    seed: int = 0  # trajectory i is a function of (seed, i) and of nothing else
    tasks: tuple[str, ...] = ()  # training tasks; empty = every training task of the micro suite
    trajectories: int = 300  # executed trajectories (the paper: 10,000)
    expert: Literal["scripted"] = "scripted"  # scripted: needs no model
    max_steps: int = 15  # actions an episode may take (paper B.3)
    max_minutes: float = 30  # minutes of experiments an episode may take (paper B.3)
    keep_ideas: bool = False  # leave the sampled ideas in the saved task text; acting has none
    renamed_copies: int = 0  # copies of each trajectory with other variable names, for models from scratch
    agent: AgentConfig = field(default_factory=AgentConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)


# ------------------------------------------------------------------------------------- one trajectory


class Recorder:
    """An environment that remembers its experiments, so that a renamed copy can be replayed without them."""

    def __init__(self, env: Environment):
        self.env, self.cfg, self.part, self.seen = env, env.cfg, env.part, []

    def experiment(self, *args) -> Experiment:
        self.seen.append(self.env.experiment(*args))
        return self.seen[-1]


class Replay:
    """An environment that answers with recorded experiments, in order."""

    def __init__(self, recorder: Recorder):
        self.cfg, self.part, self.rest = recorder.cfg, recorder.part, list(recorder.seen)

    def experiment(self, *args) -> Experiment:
        return self.rest.pop(0)


def play(cfg: Config, names: tuple[str, ...], index: int, env: Environment) -> list[dict]:
    """Trajectory `index` and its renamed copies, as rows. Runs the experiments; thread-safe."""
    rng = np.random.default_rng([cfg.seed, index])
    task = tasks.load(names[index % len(names)])
    ideas = draw_ideas(task, rng)
    recorder = Recorder(env)
    texts = [idea.text for idea in ideas] if cfg.keep_ideas else []
    expert = ScriptedExpert(task, ideas, cfg.agent)
    episode = Episode(initial_state(task, recorder, texts))
    states, outcome = [], None
    while not episode.end:
        states.append(episode.state)
        step = transition(episode.state, expert.reply(episode.state, outcome), recorder)
        episode.add(step, cfg.max_steps, cfg.max_minutes)
        outcome = step.outcome
    rows = [to_row(index, task, ideas, states, episode, cfg)]
    if episode.end != "internal":
        for copy in range(cfg.renamed_copies):
            renamed = replay_renamed(task, texts, episode, recorder, rng)
            if renamed:
                rows.append(to_row(index, task, ideas, *renamed, cfg) | {"copy": copy + 1})
    return rows


def to_row(index: int, task, ideas, states: list[State], episode: Episode, cfg: Config) -> dict:
    """A trajectory as one JSON object. `files` of a step are the sources *before* its action."""
    steps = [
        {
            "action": step.action.name if step.action else None,
            "reply": step.state.messages[-2]["content"],
            "outcome": step.outcome.value,
            "score": step.after,
            "seconds": round(step.seconds, 3),
            "files": state.files,
            "undo": state.undo,
        }
        for state, step in zip(states, episode.steps)
    ]
    scores = [states[0].score] + [s.after for s in episode.steps if s.after is not None]
    best = min(scores) if task.lower_is_better else max(scores)
    return {
        "index": index,
        "copy": 0,
        "task": task.name,
        "ideas": [{"axis": idea.axis, "text": idea.text} for idea in ideas],
        "messages": episode.state.messages,
        "steps": steps,
        "initial_score": states[0].score,
        "final_score": episode.state.score,
        "best_score": best,
        "end": episode.end,
        "expert": cfg.expert,
        "seed": cfg.seed,
    }


# ----------------------------------------------------------------------------------- renamed copies

# Alternatives for the names that starters give their variables. A model trained from scratch on a few
# scripts remembers them; renamed copies, whose scores are the same, teach it to read the script instead.
ALTERNATIVES = {
    "X": ("X", "features", "inputs", "data", "x_train", "table", "A", "rows"),
    "y": ("y", "target", "labels", "t", "y_train", "answers", "b", "truth"),
    "X_test": ("X_test", "test", "unseen", "x_new", "hidden", "A_test", "queries", "X2"),
    "model": ("model", "clf", "estimator", "m", "learner", "net", "predictor", "machine"),
}


def rename(code: str, names: dict[str, str]) -> str:
    """Python code (whole lines) with variables renamed; attributes, keyword arguments, strings untouched.

    Raises ValueError when the code cannot be tokenised.
    """
    lines = code.splitlines(keepends=True)
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError) as error:
        raise ValueError(f"cannot tokenise: {error}") from None
    depth, edits = 0, []
    for i, token in enumerate(tokens):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        if token.type != tokenize.NAME or token.string not in names:
            continue
        attribute = i > 0 and tokens[i - 1].string == "."
        keyword = depth > 0 and tokens[i + 1].string == "="
        if not attribute and not keyword:
            edits.append((token.start, token.string))
    for (row, column), old in reversed(edits):
        line = lines[row - 1]
        lines[row - 1] = line[:column] + names[old] + line[column + len(old) :]
    return "".join(lines)


def rename_action(action: Action, names: dict[str, str]) -> Action:
    if isinstance(action.edit, str):
        return Action(action.name, action.args, action.thought, rename(action.edit, names))
    if action.edit:
        pairs = [(rename(old, names), rename(new, names)) for old, new in action.edit]
        return Action(action.name, action.args, action.thought, pairs)
    return action


def replay_renamed(task, ideas: list[str], episode: Episode, recorder: Recorder, rng):
    """(states, episode) of the same trajectory with other variable names; None where that cannot be done."""
    replies = [step.state.messages[-2]["content"] for step in episode.steps]
    taken = set(re.findall(r"\w+", "\n".join([*task.sources().values(), *replies])))
    names = {}
    for old, alternatives in ALTERNATIVES.items():
        free = [n for n in alternatives if n not in taken and n not in names.values()]
        names[old] = str(rng.choice([*free, old]))
    replay = Replay(recorder)
    state = initial_state(task, replay, ideas)
    states, copy = [], None
    try:
        files = {name: rename(text, names) for name, text in state.files.items()}
        copy = Episode(State(state.task, state.messages, files, state.score, 0, {}, "start", state.id))
        for reply in replies:
            states.append(copy.state)
            action = rename_action(parse_reply(reply, replay.cfg), names)
            step = transition(copy.state, format_reply(action, replay.cfg), replay)
            copy.add(step, len(replies), float("inf"))
    except ValueError:  # code that cannot be tokenised: some ideas are meant to crash
        return None
    same = [s.outcome for s in copy.steps] == [s.outcome for s in episode.steps]
    copy.end = episode.end
    return (states, copy) if same else None


# ------------------------------------------------------------------------------------------- files


def write_states(folder: Path, rows: list[dict]) -> int:
    """states.jsonl, whole and atomically, from the trajectories; renamed copies are left out."""
    temporary = folder / "states.jsonl.tmp"
    count = 0
    with open(temporary, "w") as file:
        for row in sorted(rows, key=lambda r: r["index"]):
            if row["copy"] == 0:
                for state, step in zip(states_of(row), row["steps"]):
                    file.write(json.dumps(state.to_row() | {"action": step["action"]}) + "\n")
                    count += 1
    temporary.replace(folder / "states.jsonl")
    return count


def main():
    cfg = config.load(Config, "collect")
    names = cfg.tasks or tuple(tasks.names("micro", "train"))
    for name in names:
        tasks.load(name).require_prepared()
    folder = Path("runs") / cfg.run / "data"
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, cfg, ignore=("trajectories", "sandbox"))
    path = folder / "trajectories.jsonl"
    rows = read_jsonl(path, repair=True) if path.exists() else []
    done = {row["index"] for row in rows}
    todo = [i for i in range(cfg.trajectories) if i not in done]
    failed = 0
    cache = Path("runs") / "cache"
    with Environment(cfg.agent, cfg.sandbox, cache) as env:
        print(f"sandbox tier {env.pool.tier}, {len(todo)} trajectories to go, {len(done)} done")
        threads = ThreadPoolExecutor(4 * env.workers)
        futures = [threads.submit(play, cfg, names, i, env) for i in todo]
        try:
            bar = tqdm(as_completed(futures), total=len(todo), disable=not sys.stderr.isatty())
            for future in bar:
                new = future.result()
                if new[0]["end"] == Outcome.INTERNAL:
                    failed += 1  # our own failure: not a trajectory; the next run tries it again
                    continue
                append_rows(path, new)
                rows += new
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
    count = write_states(folder, rows)
    originals = [row for row in rows if row["copy"] == 0]
    gains = [tasks.load(r["task"]).gain(r["final_score"], "reward") for r in originals]
    print(
        f"{len(originals)} trajectories, {len(rows) - len(originals)} renamed copies, {count} states; "
        f"mean normalised gain {np.mean(gains):.3f}; {env.counts['experiments']} experiments asked for, "
        f"{env.counts['cache_hits']} found; {failed} internal failures"
    )


if __name__ == "__main__":
    config.main(main, user_errors=(tasks.TaskError, sandbox.SandboxError))
