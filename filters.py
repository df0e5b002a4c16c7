"""Which of the expert's actions fine-tuning learns from. The paper names no filter: all but the first are off.

In this order, so that what an early filter drops does not count for a later one:
    unparsable   replies that could not be read
    episodes     all actions of an episode that ended badly, gained too little, or has no edit that ran
    repeated     the same or nearly the same edit too often in one task; the first ones stay
    balance      edits of an axis that is more frequent than the rarest one; drawn at random
    cap          what one task has more than its share; drawn at random

Renamed copies are judged like their originals, as examples of their own.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

import config
import tasks
from agent import AgentConfig, InvalidAction, InvalidFormat, parse_reply
from edits import axis_of, content_words, edits_of
from reward import Outcome


@dataclass(frozen=True)
class Filters:
    unparsable: bool = True  # drop replies that could not be read
    ends: tuple[str, ...] = ()  # drop episodes that ended so: truncated, overflow, steps, minutes, internal
    min_gain: float | None = None  # drop episodes whose last score has a lower normalised gain (reward half)
    need_edit: bool = False  # drop episodes without an edit that ran
    max_same: int = 0  # keep nearly the same edit in a task at most so often; 0 = always
    same_words: float = 0.8  # instructions that share this much of their words (Jaccard) are nearly the same
    balance_axes: bool = False  # as many edits of data, model and learning as of the rarest (edits.axis_of)
    max_per_task: int = 0  # examples of a task; 0 = all

    def __post_init__(self):
        if self.max_same < 0 or self.max_per_task < 0:
            raise ValueError("filters.max_same and max_per_task must not be negative; 0 = off")
        if not 0 < self.same_words <= 1:
            raise ValueError(f"filters.same_words = {self.same_words}: a share of words, above 0 and at most 1")


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
        signed = [((r, t), rows[r]["task"], signature(rows[r]["steps"][t]["reply"], agent)) for r, t in pairs()]
        drop("repeated", repeated([(pair, task, *sign) for pair, task, sign in signed if sign], cfg))
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


def signature(reply: str, agent: AgentConfig) -> tuple[str, frozenset[str]] | None:
    """(what near-duplicates of an edit have in common, words of which a few may differ); None for other actions,
    which every episode repeats.

    In common: script, place, code without comments and spaces, and the numbers in an instruction, since a depth of 8
    and one of 10 are two experiments. The words are the instruction's (edits.content_words). Thoughts do not count.
    """
    try:
        action = parse_reply(reply, agent)
    except (InvalidFormat, InvalidAction):
        return None
    if action.name != "Edit Script":
        return None
    words = content_words(str(action.args.get("edit_instruction", "")))
    numbers = sorted(word for word in words if word[0].isdigit())
    place = {key: value for key, value in action.args.items() if key not in ("edit_instruction", "save_name")}
    written = [action.edit] if isinstance(action.edit, str) else [text for pair in action.edit or () for text in pair]
    code = ["".join(re.sub(r"(?m)(^|\s)#.*", "", text).split()) for text in written]
    common = json.dumps([place, numbers, code], sort_keys=True)
    return common, words.difference(numbers)


def repeated(edits: list[tuple[tuple, str, str, frozenset]], cfg: Filters) -> list[tuple]:
    """The names of edits (name, task, common, words) of whose kind cfg.max_same came before them. An edit is of the
    first kind whose first edit it resembles."""
    kinds, late = defaultdict(list), []  # (task, common) -> [[words of the first, how many], ...]
    for name, task, common, words in edits:
        group = kinds[task, common]
        kind = next((k for k in group if len(k[0] & words) >= cfg.same_words * len(k[0] | words)), None)
        if kind is None:
            kind = [words, 0]
            group.append(kind)
        kind[1] += 1
        late += [name] if kind[1] > cfg.max_same else []
    return late
