"""Renamed copies of a trajectory: the same experiments and scores, with other variable names in scripts and edits.

A model trained from scratch on a few scripts remembers them; renamed copies teach it to read the script instead. The
experiments of the original are recorded and replayed: a copy costs none.
"""

import io
import re
import tokenize

import numpy as np

from agent import Action, State, format_reply, parse_reply
from environment import Environment, Episode, Experiment, initial_state, transition


class Recorder:
    """An environment that remembers its experiments, so that a renamed copy can be replayed without them."""

    def __init__(self, env: Environment):
        self.env, self.cfg, self.part, self.coder, self.seen = env, env.cfg, env.part, env.coder, []

    def experiment(self, *args) -> Experiment:
        self.seen.append(self.env.experiment(*args))
        return self.seen[-1]


class Replay:
    """An environment that answers with recorded experiments, in order. Raises ValueError when there is none left:
    an edit that did not apply to the original does to its copy."""

    def __init__(self, recorder: Recorder):
        self.cfg, self.part, self.rest = recorder.cfg, recorder.part, list(recorder.seen)

    def experiment(self, *args) -> Experiment:
        if not self.rest:
            raise ValueError("no experiment was recorded for this")
        return self.rest.pop(0)


# Alternatives for the names that starters give their variables.
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


def replay_renamed(task, ideas: list[str], episode: Episode, recorder: Recorder, rng: np.random.Generator):
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
    except ValueError:  # code that cannot be tokenised (some ideas are meant to crash), an unreadable reply
        return None
    same = [s.outcome for s in copy.steps] == [s.outcome for s in episode.steps]
    copy.end = episode.end
    return (states, copy) if same else None
