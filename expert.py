"""The scripted expert: a stand-in for the paper's LLM expert that needs no model (paper 4.1, B.1).

It draws 1-3 of the axes data, model and learning, shuffles them, takes one idea from each pool, and tries them
one by one: edit, look at the validation score that the script itself prints, keep the edit or undo it, finish.
It sees what any agent sees; the hidden answers play no part in its decisions.
"""

import re

import numpy as np

import tasks
from agent import Action, AgentConfig, State, format_reply
from reward import Outcome

AXES = ("data", "model", "learning")


def draw_ideas(task: "tasks.Task", rng: np.random.Generator) -> list["tasks.Idea"]:
    """One idea from each of 1-3 axes, in random order (paper B.1)."""
    pools = {axis: [idea for idea in task.ideas() if idea.axis == axis] for axis in AXES}
    filled = [axis for axis in AXES if pools[axis]]
    axes = rng.permutation(filled)[: rng.integers(1, len(filled) + 1)]
    return [pools[axis][rng.integers(len(pools[axis]))] for axis in axes]


def edit_action(script: str, name: str, idea: "tasks.Idea", cfg: AgentConfig) -> Action:
    """The Edit Script action that puts an idea's code into the block it replaces, in any edit format."""
    first, last = tasks.block_lines(script, idea.block)
    lines, code = script.splitlines(), idea.code.rstrip("\n")
    thought = {
        "Reflection": "The idea has not been tried on this script yet.",
        "Research Plan and Status": "Try one idea at a time and keep what improves the validation score.",
        "Fact Check": "Only printed scores count.",
        "Thought": idea.text,
    }
    args = {"script_name": name}
    if cfg.edit_format == "lines":
        args |= {"start_line_number": first, "end_line_number": last}
        return Action("Edit Script", args, thought, code)
    if cfg.edit_format == "file":
        return Action("Edit Script", args, thought, "\n".join([*lines[:first - 1], code, *lines[last:]]))
    head = lines[first - 2]  # the block's comment line makes the searched text unique
    old = "\n".join([head, *lines[first - 1 : last]])
    return Action("Edit Script", args, thought, [(old, f"{head}\n{code}")])


def printed_score(text: str) -> float | None:
    """The last number of the last line of a run's output, where scripts print their validation score."""
    last = text.rstrip().rsplit("\n", 1)[-1]
    found = re.search(r"^validation .*?(-?\d+(?:\.\d+)?(?:e-?\d+)?)$", last)
    return float(found.group(1)) if found else None


class ScriptedExpert:
    """Plays one episode: `reply(state, outcome)` gives the next reply, from what the last action gave."""

    def __init__(self, task: "tasks.Task", ideas: list["tasks.Idea"], cfg: AgentConfig):
        self.task, self.cfg, self.ideas = task, cfg, list(ideas)
        self.best: float | None = None  # the best validation score printed so far
        self.edited = False  # whether the last action was an edit

    def reply(self, state: State, outcome: Outcome | None) -> str:
        """`outcome` is the last action's, None at the start of an episode."""
        score = printed_score(state.messages[-1]["content"])
        if self.edited and outcome is not Outcome.EDIT_FAILED:  # a failed edit left nothing to undo
            self.edited = False
            failed = outcome is not Outcome.OK_EDIT
            worse = score is not None and self.task.better(self.best, score)
            if failed or worse:
                return self._say("Undo Edit Script", "failed, undo" if failed else "worse, undo")
        if score is not None and self.task.better(score, self.best):
            self.best = score
        script = state.files[self.cfg.script]
        while self.ideas:
            idea = self.ideas.pop(0)
            if tasks.apply_block(script, idea.block, idea.code) != script:
                self.edited = True
                return format_reply(edit_action(script, self.cfg.script, idea, self.cfg), self.cfg)
        return self._say("Final Answer", "done")

    def _say(self, action: str, thought: str) -> str:
        args = {"final_answer": thought} if action == "Final Answer" else {"script_name": self.cfg.script}
        return format_reply(Action(action, args, {"Thought": thought}), self.cfg)
