"""Every cell of the reward table, in both directions of the metric, and every modifier."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import reward
from reward import REWARDS, Outcome, Scale, compute

UP = Scale(initial=0.5, best=0.9, noise=0.01)
DOWN = Scale(initial=20.0, best=12.0, noise=0.2, lower_is_better=True)

NOT_EDITS = {  # outcome: linear, sigmoid, binary, milestone
    "invalid_format": (-1, 0, -1, -1),
    "invalid_action": (-1, 0, -1, -0.75),
    "edit_failed": (-1, 0, -1, -0.75),
    "script_error": (-1, 0, -1, -0.5),
    "bad_submission": (-1, 0, -1, -0.25),
    "timeout": (0, 0.5, 0, 0),
    "out_of_memory": (0, 0.5, 0, 0),
    "resource_limit": (0, 0.5, 0, 0),
    "coder_failed": (0, 0.5, 0, 0),
    "ok_action": (0, 0.5, 0, 0),
    "final": (0, 0.5, 0, 0),
}
S1 = 1 / (1 + math.exp(-1))  # 1 % of the gap
EDITS = [  # before and after as a share of the way from initial (0) to best (1); then as above
    (0.5, 0.51, (0.01, S1, 1, 0.75)),
    (0.51, 0.5, (-0.01, 1 - S1, 0, 0.25)),
    (0.5, 0.5, (0, 0.5, 0, 0.25)),
    (-0.5, -0.25, (0.25, 1, 1, 0.5)),  # better than before, still worse than the starter
    (0.5, 1.25, (0.75, 1, 1, 1)),  # beats the best
    (0.75, -0.25, (-1, 0, 0, 0.25)),
]


def at(scale, share):
    return scale.initial + share * (scale.best - scale.initial)


def test_the_table_covers_every_outcome():
    assert {*NOT_EDITS, "ok_edit", "internal"} == {str(o) for o in Outcome}
    assert list(REWARDS) == ["linear", "sigmoid", "binary", "milestone"]


@pytest.mark.parametrize("scale", [UP, DOWN])
@pytest.mark.parametrize("outcome", NOT_EDITS)
def test_outcomes_other_than_an_edit(outcome, scale):
    for name, expected in zip(REWARDS, NOT_EDITS[outcome]):
        assert compute(Outcome(outcome), scale.initial, None, scale, name) == expected, name


@pytest.mark.parametrize("scale", [UP, DOWN])
@pytest.mark.parametrize("before, after, expected", EDITS)
def test_edits_pay_by_their_gain_in_either_direction(before, after, expected, scale):
    for name, value in zip(REWARDS, expected):
        got = compute(Outcome.OK_EDIT, at(scale, before), at(scale, after), scale, name)
        assert got == pytest.approx(value, abs=1e-9), name


def test_a_better_metric_pays_more_than_a_worse_one_by_hand():
    assert compute("ok_edit", 0.6, 0.7, UP) == pytest.approx(0.1 / 0.4)  # accuracy went up
    assert compute("ok_edit", 16.0, 14.0, DOWN) == pytest.approx(2 / 8)  # error went down
    assert compute("ok_edit", 14.0, 16.0, DOWN) == pytest.approx(-2 / 8)


@pytest.mark.parametrize("scale", [UP, DOWN])
def test_clip_bounds_a_ruinous_edit_and_null_is_the_papers_text(scale):
    edit = Outcome.OK_EDIT, at(scale, 0), at(scale, -1000), scale
    assert compute(*edit) == -1
    assert compute(*edit, clip=None) == pytest.approx(-1000)
    assert compute(*edit, clip=(-2, 0.5)) == -2
    assert compute("ok_edit", at(scale, 0), at(scale, 1), scale, clip=(-2, 0.5)) == 0.5
    assert compute(*edit, name="sigmoid", clip=None) == 0  # exp(1e5) must not overflow
    assert compute("ok_edit", at(scale, -1000), at(scale, 0), scale, "sigmoid") == 1


@pytest.mark.parametrize("scale", [UP, DOWN])
def test_min_gain_ignores_improvements_below_the_noise_but_no_regression(scale):
    sign = -1 if scale.lower_is_better else 1
    m = at(scale, 0.5)
    small, large = m + sign * 0.9 * scale.noise, m + sign * 1.1 * scale.noise
    for name, unchanged in (("linear", 0), ("sigmoid", 0.5), ("binary", 0), ("milestone", 0.25)):
        assert compute("ok_edit", m, small, scale, name, min_gain=True) == unchanged
        assert compute("ok_edit", m, small, scale, name) > unchanged
        assert compute("ok_edit", m, large, scale, name, min_gain=True) > unchanged
    assert compute("ok_edit", small, m, scale, min_gain=True) < 0


def rewards_of(name, **modifiers):
    """Rewards of: an error, a corner case, a failed coder, a non-edit, a better and a worse edit."""
    cases = [("script_error", None), ("timeout", None), ("coder_failed", None), ("ok_action", None),
             ("ok_edit", 0.74), ("ok_edit", 0.66)]  # fmt: skip
    return [round(compute(o, 0.7, after, UP, name, **modifiers), 9) for o, after in cases]


def test_table_3_switches_off_one_part_of_the_reward_each():
    assert rewards_of("linear") == [-1, 0, 0, 0, 0.1, -0.1]
    assert rewards_of("linear", no_format=True) == [0, 0, 0, 0, 0.1, -0.1]
    assert rewards_of("linear", no_corner=True) == [-1, -1, 0, 0, 0.1, -0.1]
    assert rewards_of("linear", no_corner=True, no_format=True) == [0, 0, 0, 0, 0.1, -0.1]
    assert rewards_of("linear", no_performance=True) == [-1, 0, 0, 0, 1, 0]
    assert rewards_of("linear", no_performance=True) == rewards_of("binary")
    assert rewards_of("sigmoid", no_format=True)[0] == 0.5
    assert rewards_of("sigmoid", no_corner=True)[:3] == [0, 0, 0.5]
    assert rewards_of("sigmoid", no_performance=True)[4:] == [1, 0.5]
    small = {"min_gain": True, "no_performance": True}
    assert compute("ok_edit", 0.7, 0.705, UP, **small) == 0


def test_refusals():
    for name in REWARDS:
        with pytest.raises(ValueError, match="mask"):
            compute(Outcome.INTERNAL, 0.5, None, UP, name)
    with pytest.raises(ValueError, match="choose one of linear"):
        compute("ok_edit", 0.5, 0.6, UP, "cubic")
    with pytest.raises(ValueError, match="clip"):
        compute("ok_edit", 0.5, 0.6, UP, clip=(1, -1))
    with pytest.raises(ValueError, match="not a valid Outcome"):
        compute("okay", 0.5, 0.6, UP)
    for bad in (Scale(0.5, 0.5), Scale(0.5, 0.9, lower_is_better=True), Scale(0.9, 0.5)):
        with pytest.raises(ValueError, match="must be better"):
            compute("ok_edit", 0.5, 0.6, bad)
    for score in (math.nan, math.inf):
        with pytest.raises(AssertionError):
            compute("ok_edit", 0.5, score, UP)


def test_an_outcome_is_its_string_in_json():
    assert json.dumps({"outcome": Outcome.OK_EDIT}) == '{"outcome": "ok_edit"}'
    assert Outcome(json.loads('"ok_edit"')) is Outcome.OK_EDIT and str(Outcome.FINAL) == "final"


def test_reward_imports_no_torch():
    code = "import reward, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    root = Path(reward.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
