"""Which of the expert's actions fine-tuning learns from. The paper names no filter: all but the first are off.

In this order, so that what an early filter drops does not count for a later one:
    unparsable   replies that could not be read
    episodes     all actions of an episode that ended badly, gained too little, or has no edit that ran
    repeated     the same action (whatever the thought before it) too often in one task; the first ones stay
    balance      edits of an axis that is more frequent than the rarest one; drawn at random
    cap          what one task has more than its share; drawn at random

Renamed copies are judged like their originals, as examples of their own.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

import config
import tasks
from agent import AgentConfig, InvalidAction, InvalidFormat, parse_reply
from edits import axis_of, edits_of
from reward import Outcome


@dataclass(frozen=True)
class Filters:
    unparsable: bool = True  # drop replies that could not be read
    ends: tuple[str, ...] = ()  # drop episodes that ended so: truncated, overflow, steps, minutes, internal
    min_gain: float | None = None  # drop episodes whose last score has a lower normalised gain (reward half)
    need_edit: bool = False  # drop episodes without an edit that ran
    max_same: int = 0  # keep the same action in a task at most so often; 0 = always
    balance_axes: bool = False  # as many edits of data, model and learning as of the rarest (edits.axis_of)
    max_per_task: int = 0  # examples of a task; 0 = all

    def __post_init__(self):
        if self.max_same < 0 or self.max_per_task < 0:
            raise ValueError("filters.max_same and max_per_task must not be negative; 0 = off")


def keep_steps(rows: list[dict], cfg: Filters, agent: AgentConfig, seed: int) -> tuple[list[list[int]], dict]:
    """(for each trajectory row the steps to learn from, how many each filter dropped). `agent` reads the replies."""
    kept = [list(range(len(row["steps"]))) for row in rows]
    dropped = {}

    def drop(name: str, unwanted) -> None:
        """Drop the (row, step) pairs in `unwanted`."""
        unwanted = set(unwanted)
        for r, steps in enumerate(kept):
            kept[r] = [t for t in steps if (r, t) not in unwanted]
        dropped[name] = len(unwanted)

    def pairs():
        return [(r, t) for r, steps in enumerate(kept) for t in steps]

    if cfg.unparsable:
        drop("unparsable", [(r, t) for r, t in pairs() if rows[r]["steps"][t]["action"] is None])
    drop("episodes", [(r, t) for r, t in pairs() if _is_bad(rows[r], cfg)])
    if cfg.max_same:
        seen, repeated = Counter(), []
        for r, t in pairs():
            key = (rows[r]["task"], same_action(rows[r]["steps"][t]["reply"], agent))
            seen[key] += 1
            repeated += [(r, t)] if seen[key] > cfg.max_same else []
        drop("repeated", repeated)
    rng = np.random.default_rng([seed, 3])
    if cfg.balance_axes:
        axes, left = defaultdict(list), set(pairs())
        for r, row in enumerate(rows):
            for edit in edits_of(row["task"], row["steps"], agent):
                if (r, edit.step) in left and (axis := axis_of(edit)):
                    axes[axis].append((r, edit.step))
        rarest = min(len(axes[axis]) for axis in tasks.AXES)
        if rarest == 0:
            missing = next(axis for axis in tasks.AXES if not axes[axis])
            raise config.UserError(f"filters.balance_axes: there is no edit on the axis {missing}; set it to false")
        drop("balance", [pair for axis in tasks.AXES for pair in _at_random(axes[axis], rarest, rng)])
    if cfg.max_per_task:
        by_task = defaultdict(list)
        for r, t in pairs():
            by_task[rows[r]["task"]].append((r, t))
        drop("cap", [pair for task in sorted(by_task) for pair in _at_random(by_task[task], cfg.max_per_task, rng)])
    return kept, dropped


def _is_bad(row: dict, cfg: Filters) -> bool:
    if cfg.ends and row["end"] in cfg.ends:
        return True
    if cfg.min_gain is not None and tasks.load(row["task"]).gain(row["final_score"], "reward") < cfg.min_gain:
        return True
    ran = any(s["action"] == "Edit Script" and s["outcome"] == Outcome.OK_EDIT for s in row["steps"])
    return cfg.need_edit and not ran


def _at_random(items: list, keep: int, rng: np.random.Generator) -> list:
    """The items that go, so that `keep` stay."""
    order = rng.permutation(len(items))
    return [items[i] for i in order[keep:]]


def same_action(reply: str, agent: AgentConfig) -> str:
    """What two replies share when they do the same, whatever they think: action, input and edit, spaces aside."""
    try:
        action = parse_reply(reply, agent)
    except (InvalidFormat, InvalidAction):
        return " ".join(reply.split())
    edit = json.dumps(action.edit) if action.edit else ""
    return " ".join(f"{action.name} {json.dumps(action.args, sort_keys=True)} {edit}".split())
