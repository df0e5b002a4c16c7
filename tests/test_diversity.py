"""Diversity: words, names and axes of edits, and the report on files and checkpoints."""

import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
import yaml

import config
import diversity
import edits
import rollout
import tasks
from agent import AgentConfig, format_reply
from edits import Edit, axis_of, base_form, edits_of, new_names, verb_and_object
from expert import edit_action

NAME = "m-concrete"
CFG = AgentConfig(edit_format="lines", thought="short")
SCRIPT = tasks.load(NAME).sources()["train.py"]
IDEAS = tasks.load(NAME).ideas()


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("use a random forest", ("use", "random forest")),
        ("I will be dropping the age column, since it hurts.", ("drop", "age column")),
        ("We replaced MLP with boosted trees", ("replace", "mlp")),
        ("Normalizes all inputs", ("normalise", "inputs")),
        ("applied log to price", ("apply", "log")),
        ("Resize images to 64 pixels", ("resize", "images")),
        ("Let me tune, carefully", ("tune", "carefully")),
        ("increase", ("increase", "")),
        ("water to binder ratio", None),
        ("", None),
    ],
)
def test_the_verb_and_what_it_is_done_to(text, result):
    assert verb_and_object(text) == result


@pytest.mark.parametrize(
    ("forms", "verb"),
    [
        ("adds added adding", "add"),
        ("uses using used", "use"),
        ("stops stopped stopping", "stop"),
        ("tries tried trying", "try"),
        ("scaling scaled", "scale"),
        ("standardized standardizing standardise", "standardise"),
        ("switches", "switch"),
        ("house s ed", None),
    ],
)
def test_forms_of_verbs(forms, verb):
    assert {base_form(form) for form in forms.split()} == {verb}


def edit_of(idea: "tasks.Idea") -> Edit:
    return Edit(NAME, idea.text, SCRIPT, tasks.apply_block(SCRIPT, idea.block, idea.code))


def test_the_axis_is_the_block_that_changes():
    found = {idea.text: (axis_of(edit_of(idea)), idea.block) for idea in IDEAS}
    assert all(axis == block for axis, block in found.values() if block in tasks.AXES), found
    assert axis_of(Edit(NAME, "x", SCRIPT, SCRIPT)) is None
    lines = SCRIPT.splitlines()
    first, _ = tasks.block_lines(SCRIPT, "model")
    inserted = "\n".join([*lines[: first - 1], "import math", *lines[first - 1 :]])
    assert axis_of(Edit(NAME, "x", SCRIPT, inserted)) == "model"


@pytest.mark.parametrize(
    ("text", "code", "axis"),
    [
        ("augment the images", "x = flip(x)", "data"),
        ("try more", "net = resnet18(dropout=0.5)", "model"),
        ("a cosine schedule", "lr = schedule(epoch)", "learning"),
        ("hm", "a = 1", None),
    ],
)
def test_without_blocks_words_decide(text, code, axis):
    assert axis_of(Edit(NAME, text, "print(1)\n", f"print(1)\n{code}\n")) == axis


def test_names_are_those_that_the_script_did_not_have():
    edit = Edit(NAME, "", "import numpy as np\nx = np.zeros(3)\n", "import numpy as np\nx = np.ones(3)\ny = x\n")
    assert new_names(edit) == {"ones", "y"}
    assert edits.added_lines(edit) == ["x = np.ones(3)", "y = x"]


def test_entropy_is_in_nats():
    assert diversity.entropy(Counter(a=5, b=5, c=5)) == pytest.approx(math.log(3))
    assert diversity.entropy(Counter(a=7, b=0)) == 0 and diversity.entropy(Counter()) == 0


def steps(*ideas: "tasks.Idea", files: bool) -> list[dict]:
    """An episode that tries ideas, undoing each but the last, with one unreadable reply."""
    script, rows = SCRIPT, [{"reply": "nonsense", "files": {"train.py": SCRIPT}}]
    undo = 'Thought: x\nAction: Undo Edit Script\nAction Input: {"script_name": "train.py"}'
    for idea in ideas:
        reply = format_reply(edit_action(script, "train.py", idea, CFG), CFG)
        rows.append({"reply": reply, "files": {"train.py": script}})
        if idea is not ideas[-1]:
            after = tasks.apply_block(script, idea.block, idea.code)
            rows.append({"reply": undo, "files": {"train.py": after}})
    return rows if files else [{"reply": row["reply"]} for row in rows]


def test_an_edit_tries_the_idea_that_it_shares_most_words_with():
    drawn = ["Use a random forest instead of the tree.", "Take the logarithm of the price", "scale the inputs"]
    said = {"I replace the tree by a forest": 0, "train on the log price": 1, "Scaling: scale all inputs": 2}
    assert {text: edits.closest(text, drawn) for text in said} == {text: drawn[i] for text, i in said.items()}
    assert edits.closest("drop the outliers", drawn) == edits.closest("anything", []) == ""


@pytest.mark.parametrize("files", [True, False])
def test_edits_are_found_with_their_scripts_stored_or_replayed(files):
    ideas = [IDEAS[1], IDEAS[-1], IDEAS[3]]
    found = edits_of(NAME, steps(*ideas, files=files), CFG)
    assert [e.text for e in found] == [i.text for i in ideas] and [e.step for e in found] == [1, 3, 5]
    assert [(e.before, e.after) for e in found] == [(SCRIPT, tasks.apply_block(SCRIPT, i.block, i.code)) for i in ideas]


def test_instructions_are_the_edits_of_instruct_mode():
    cfg = AgentConfig(edit_mode="instruct", thought="none")
    args = {"script_name": "train.py", "edit_instruction": "add dropout", "save_name": "new.py"}
    reply = f"Action: Edit Script\nAction Input: {json.dumps(args)}"
    rows = [
        {"reply": reply, "files": {"train.py": "a\n"}},
        {"reply": "?", "files": {"train.py": "a\n", "new.py": "b\n"}},
    ]
    assert edits_of(NAME, rows, cfg) == [Edit(NAME, "add dropout", "a\n", "b\n", 0)]
    unwritten = edits_of(NAME, [{"reply": reply}], cfg)  # a checkpoint's: no coder has written it
    assert unwritten == [Edit(NAME, "add dropout", SCRIPT, None, 0)]
    found = diversity.measure(unwritten, diversity.Config())
    assert (found["texts"], found["changes"], found["names"]) == (1, None, None)
    assert found["axes"]["none"] == 0, "its words tell"
    assert "| - |" in diversity.table([{"source": "x", "actions": 1, "ideas": None} | found])


# -------------------------------------------------------------------------------------- the report


def test_more_ideas_give_larger_numbers():
    wide = [edit_of(idea) for idea in IDEAS if edit_of(idea).after != SCRIPT]
    cfg = diversity.Config(samples=40)
    few = diversity.measure([wide[i % 3] for i in range(60)], cfg)
    many = diversity.measure([wide[i % len(wide)] for i in range(60)], cfg)
    assert few["edits"] == many["edits"] == 40 and few["changes"] == 3
    for key in ("names", "objects", "verbs", "texts", "changes", "changes_entropy", "axes_entropy"):
        assert many[key] > few[key], key
    assert diversity.measure(wide, cfg) == diversity.measure(wide, cfg), "the sample is drawn by the seed"
    assert diversity.measure([], cfg)["edits"] == 0


def run(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["diversity.py", *argv])
    diversity.main()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """runs/x/data/trajectories.jsonl and runs/x/eval/sft.json of the same episodes, with configurations beside them."""
    monkeypatch.chdir(tmp_path)
    agent = {"edit_format": "lines", "thought": "short"}
    data, done = tmp_path / "runs/x/data", tmp_path / "runs/x/eval"
    data.mkdir(parents=True)
    done.mkdir()
    (data / "config.yaml").write_text(yaml.safe_dump({"agent": agent, "tasks": [NAME]}))
    rng = np.random.default_rng(0)
    rows, episodes = [], []
    for index in range(10):
        ideas = [IDEAS[i] for i in rng.choice(len(IDEAS), 2, replace=False)]
        row = {"index": index, "task": NAME, "ideas": [{"axis": i.axis, "text": i.text} for i in ideas]}
        rows += [row | {"copy": copy, "steps": steps(*ideas, files=True)} for copy in (0, 1)]
        episodes.append({"task": NAME, "steps": steps(*ideas, files=False)})
    (data / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (done / "sft.json").write_text(json.dumps({"settings": {"agent": agent}, "episodes": episodes}))
    return "runs/x/data/trajectories.jsonl", "runs/x/eval/sft.json"


def test_a_report_of_trajectories_and_of_evaluated_episodes(files, monkeypatch, capsys):
    run(monkeypatch, *files, "samples=0", "out=report/d")
    rows = json.loads(open("report/d.json").read())
    assert open("report/d.md").read() in capsys.readouterr().out
    assert [row["source"] for row in rows] == list(files)
    stored = [json.loads(line) for line in open(files[0])]
    assert rows[0]["ideas"] == len({idea["text"] for row in stored for idea in row["ideas"]}), "all were tried"
    assert rows[1]["ideas"] is None and rows[0]["actions"] == 40, "copies are left out"
    for key in ("edits", "verbs", "objects", "names", "changes", "axes"):
        assert rows[0][key] == rows[1][key], key
    run(monkeypatch, files[0], "samples=3", "out=report/few")
    (few,) = json.loads(open("report/few.json").read())
    assert few["edits"] == 3 and few["ideas"] <= 3, "of the sample, not of the file"
    run(monkeypatch, files[0], "first_edits=true")
    assert "| 10 | 0 |" in capsys.readouterr().out, "the first reply of every episode is unreadable"


def test_what_is_no_source_is_one_line(files, monkeypatch, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"a": 1}\n')
    for argv, reason in (
        ([], "give files"),
        (["nowhere.jsonl"], "does not exist"),
        (["empty.jsonl"], "holds no episodes"),
        (["runs/x"], "holds no model"),
        ([files[0], "smaples=3"], "did you mean 'samples'"),
    ):
        with pytest.raises(config.UserError, match=reason):
            run(monkeypatch, *argv)


class Once:
    """A policy for tests: reply i tries idea i; the first one of a round is cut off."""

    def __init__(self, cfg):
        self.cfg, self.tokenizer = cfg, None

    def sample(self, prompts, rng, ids):
        for k, i in enumerate(ids):
            yield type("C", (), {"index": k, "tokens": [i], "finish": "length" if k == 0 else "stop"})

    def text(self, tokens):
        idea = IDEAS[tokens[0] % len(IDEAS)]
        return format_reply(edit_action(SCRIPT, "train.py", idea, CFG), CFG)


def test_a_checkpoint_is_asked_until_there_are_edits_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(rollout, "load_policy", lambda path, env, sampling: Once(CFG))
    monkeypatch.setattr(diversity, "initial_state", lambda task, env: None)
    monkeypatch.setattr(diversity, "encode_state", lambda *args: [0])
    cfg = diversity.Config(samples=20, tasks=(NAME,), agent=CFG)
    found, more = diversity.sample_edits(tmp_path, cfg, None)
    texts = {edit.text for edit in found}
    assert len(found) >= 20 and more["actions"] in (40, 60) and len(texts) > 10


def test_the_coder_of_a_checkpoint_need_not_be_there(monkeypatch, tmp_path, capsys):
    """Its instructions are looked at, not carried out."""

    class Instructs(Once):
        def text(self, tokens):
            args = {"script_name": "train.py", "edit_instruction": IDEAS[tokens[0] % 8].text, "save_name": "train.py"}
            return f"Thought: x\nAction: Edit Script\nAction Input: {json.dumps(args)}"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rollout, "load_policy", lambda path, env, sampling: Instructs(env.cfg))
    monkeypatch.setattr(diversity, "initial_state", lambda task, env: None)
    monkeypatch.setattr(diversity, "encode_state", lambda *args: [0])
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/config.json").write_text("{}")
    coder = {"base_url": "http://127.0.0.1:9/v1", "model": "nobody"}
    agent = {"edit_mode": "instruct", "thought": "short", "coder": coder}
    (tmp_path / "sft/config.yaml").write_text(yaml.safe_dump({"agent": agent}))
    run(monkeypatch, "sft", "samples=10", f"tasks=[{NAME}]", "sandbox.allow_weak=true", "out=d")
    (row,) = json.loads((tmp_path / "d.json").read_text())
    assert row["edits"] == 10 and row["texts"] > 3 and row["changes"] is None
