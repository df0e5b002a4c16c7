"""The ML-specific reward (paper 4.3): the outcome of one action, and a table of reward functions.

m_t is the task's metric before the action (`before`), m_{t+1} after it (`after`). An edit, or an
undo, is always followed by running and scoring the script: `after` exists when the outcome is OK_EDIT.

    name        errors  corner cases, non-edits  a successful edit or undo
    linear        -1      0                      (m_{t+1} - m_t) / (m_best - m_init)    the paper, v2
    sigmoid        0      0.5                    sigmoid(100 times that)                the paper, v1
    binary        -1      0                      1 if better, else 0                    ablation
    milestone   by the stage the action reached, from -1 (unreadable) to 1 (beats the best known score)

The ratio needs no case for the metric's direction: numerator and denominator change sign together.
"""

import math
from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What became of one action. A str, so that it goes into JSON as it is."""

    # errors: the policy's fault
    INVALID_FORMAT = "invalid_format"  # the reply is unreadable, or was cut off at max_new_tokens
    INVALID_ACTION = "invalid_action"  # unknown action, or bad arguments
    EDIT_FAILED = "edit_failed"  # the edit does not apply to the script
    SCRIPT_ERROR = "script_error"  # the script failed
    BAD_SUBMISSION = "bad_submission"  # it ran, and left no submission that can be scored
    # corner cases: resources, or somebody else's fault
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    RESOURCE_LIMIT = "resource_limit"  # processes, disk, file size, output
    CODER_FAILED = "coder_failed"  # the environment's coder gave no usable code
    # success
    OK_ACTION = "ok_action"  # valid, and not an edit
    OK_EDIT = "ok_edit"  # an edit or undo that applied, ran and was scored
    FINAL = "final"  # the policy ended the episode
    # our own failure: counted and masked out of training, never scored
    INTERNAL = "internal"


ERRORS = frozenset(
    (Outcome.INVALID_FORMAT, Outcome.INVALID_ACTION, Outcome.EDIT_FAILED, Outcome.SCRIPT_ERROR,
     Outcome.BAD_SUBMISSION)
)  # fmt: skip
CORNER_CASES = frozenset(
    (Outcome.TIMEOUT, Outcome.OUT_OF_MEMORY, Outcome.RESOURCE_LIMIT, Outcome.CODER_FAILED)
)


@dataclass(frozen=True)
class Scale:
    """The scores that give a metric its meaning, all in the metric's own unit."""

    initial: float  # m_init, the starter script's
    best: float  # m_best, the best known
    noise: float = 0.0  # a smaller improvement is luck
    lower_is_better: bool = False


def gain(before, after, task):
    """(m_{t+1} - m_t) / (m_best - m_init): above 0 is better, 1 is all the way from starter to best.

    Raises ValueError when the best score is not better than the initial one.
    """
    assert math.isfinite(before) and math.isfinite(after), "only finite scores may reach the reward"
    span = task.best - task.initial
    if (span >= 0 if task.lower_is_better else span <= 0):
        raise ValueError(f"the best score {task.best} must be better than the initial {task.initial}")
    return (after - before) / span


# ---- the table: reward(outcome, before, after, task) -> float ------------------------------------


def linear(outcome, before, after, task):
    if outcome == Outcome.OK_EDIT:
        return gain(before, after, task)
    return -1.0 if outcome in ERRORS else 0.0


def sigmoid(outcome, before, after, task):
    if outcome == Outcome.OK_EDIT:  # sigmoid(x) = (1 + tanh(x / 2)) / 2, which cannot overflow
        return (1 + math.tanh(100 * gain(before, after, task) / 2)) / 2
    return 0.0 if outcome in ERRORS else 0.5


def binary(outcome, before, after, task):
    if outcome == Outcome.OK_EDIT:
        return 1.0 if gain(before, after, task) > 0 else 0.0
    return -1.0 if outcome in ERRORS else 0.0


def milestone(outcome, before, after, task):
    """Partial credit: the further an edit gets, the more it pays. Corner cases and non-edits: 0."""
    if outcome == Outcome.OK_EDIT:
        if gain(before, after, task) <= 0:
            return 0.25  # scored
        if gain(task.initial, after, task) <= 0:
            return 0.5  # better than before
        return 0.75 if gain(task.best, after, task) <= 0 else 1.0  # ... than the starter, the best
    stages = {
        Outcome.INVALID_FORMAT: -1.0,
        Outcome.INVALID_ACTION: -0.75,  # the format was right
        Outcome.EDIT_FAILED: -0.75,
        Outcome.SCRIPT_ERROR: -0.5,  # the edit applied
        Outcome.BAD_SUBMISSION: -0.25,  # the script ran
    }
    return stages.get(outcome, 0.0)


REWARDS = {"linear": linear, "sigmoid": sigmoid, "binary": binary, "milestone": milestone}


# ---- modifiers -----------------------------------------------------------------------------------


def compute(outcome, before, after, scale, name="linear", clip=(-1.0, 1.0), min_gain=False,
            no_format=False, no_corner=False, no_performance=False):  # fmt: skip
    """The reward of one action, a float.

    before, after   m_t and m_{t+1}, read for OK_EDIT only
    scale           the task's scores that mean 0 and 1
    clip            (low, high) or None. The paper has none: one edit that ruins an unbounded metric
                    then outweighs the rest of its batch
    min_gain        an improvement smaller than scale.noise counts as no change
    no_format, no_corner, no_performance   the paper's Table 3, one part of the reward switched off:
                    errors pay like non-edits · corner cases pay like errors (save a failed coder,
                    which is not the policy's fault) · a better edit pays 1, any other like a non-edit

    Raises ValueError for an unknown name, a bad clip, a bad scale, and for INTERNAL, which has no
    reward: the caller masks that action out of training.
    """
    outcome = Outcome(outcome)
    if outcome == Outcome.INTERNAL:
        raise ValueError("an internal failure has no reward; mask this action out of training")
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; choose one of {', '.join(REWARDS)}")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"reward clip {clip}: must be (low, high) with low < high, or null")

    if no_corner and outcome in CORNER_CASES and outcome != Outcome.CODER_FAILED:
        outcome = Outcome.SCRIPT_ERROR
    if no_format and outcome in ERRORS:
        outcome = Outcome.OK_ACTION
    improved = outcome == Outcome.OK_EDIT and gain(before, after, scale) > 0
    if improved and min_gain and abs(after - before) < scale.noise:
        after, improved = before, False
    if no_performance and improved:
        value = 1.0
    elif no_performance and outcome == Outcome.OK_EDIT:
        value = REWARDS[name](Outcome.OK_ACTION, before, after, scale)
    else:
        value = REWARDS[name](outcome, before, after, scale)
    return value if clip is None else min(max(value, clip[0]), clip[1])
