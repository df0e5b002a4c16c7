"""Replies, edits, prompts: what an agent says and sees."""

import json
from dataclasses import replace

import pytest

import agent
from agent import Action, AgentConfig, EditFailed, InvalidAction, InvalidFormat, State
from weights import train_tokenizer

LINES = AgentConfig(thought="short", edit_format="lines", prompt="brief")
SEARCH = AgentConfig()
FILE = AgentConfig(edit_format="file", thought="none")
INSTRUCT = AgentConfig(edit_mode="instruct", edit_format="lines")  # no edit_format in instruct mode
SCRIPT = "a = 1\nb = 2\nc = 3\n"


def edit(cfg: AgentConfig, **args) -> Action:
    thought = dict.fromkeys(agent.FIELDS[cfg.thought], "because")
    if cfg.edit_mode == "instruct":
        args = {"edit_instruction": 'set b to 20\nand say "done"', "save_name": "other.py", **args}
        return Action("Edit Script", {"script_name": "train.py", **args}, thought)
    if cfg.edit_format == "lines":
        args = {"start_line_number": 2, "end_line_number": 2, **args}
    content = [("b = 2", "b = 20\nd = 4")] if cfg.edit_format == "search_replace" else "b = 20\nd = 4"
    return Action("Edit Script", {"script_name": "train.py", **args}, thought, content)


@pytest.mark.parametrize("cfg", [LINES, SEARCH, FILE, INSTRUCT])
def test_format_and_parse_are_inverse(cfg):
    table = agent.action_table(cfg)
    assert set(agent.ACTIONS) - set(table) == ({"Understand File"} if cfg is not INSTRUCT else set())
    for name, keys in table.items():
        action = edit(cfg)
        if name != "Edit Script":
            args = {k: 3 if k.endswith("number") else "train.py" for k in keys}
            action = Action(name, args, action.thought)
        assert agent.parse_reply(agent.format_reply(action, cfg), cfg) == action


def test_what_the_agent_is_told_follows_the_mode():
    direct, instruct = (agent.render(state_of(0), cfg)[0]["content"] for cfg in (SEARCH, INSTRUCT))
    keys = '{"script_name": "...", "edit_instruction": "...", "save_name": "..."}'
    assert f"- Edit Script: {keys}" in instruct and "another engineer" in instruct
    assert '- Understand File: {"file_name": "...", "things_to_look_for": "..."}' in instruct
    assert "```python\na = 1\n" in instruct, "lines are not numbered where no edit names them"
    assert agent.SEARCH not in instruct and agent.SEARCH in direct
    assert '- Edit Script: {"script_name": "..."}\n' in direct and "Understand" not in direct
    names = [line[2:].split(":")[0] for line in direct.splitlines() if line.startswith("- ")]
    assert names == ["List Files", "Copy File", "Inspect Script Lines", "Execute Script", "Edit Script",
                     "Undo Edit Script", "Final Answer"]  # fmt: skip


def test_parsing_is_tolerant_of_form():
    reply = (
        "Sure!\n**Thought:** try it\n**Action:** inspect script lines  \nAction Input: {'script_name': 'train.py',"
        " 'start_line_number': '1', 'end_line_number': 9,}\nObservation: I imagine"
    )
    action = agent.parse_reply(reply, SEARCH)
    assert action.name == "Inspect Script Lines"
    assert action.args == {"script_name": "train.py", "start_line_number": 1, "end_line_number": 9}


EDIT_IN_FENCE = 'Action: Edit Script\nAction Input: {"script_name": "train.py"}\n```python\nAction: x = 1\n```'


def test_an_action_line_inside_code_is_code():
    assert agent.parse_reply(EDIT_IN_FENCE, FILE).edit == "Action: x = 1"


TWO = 'Action: Final Answer\nAction Input: {"final_answer": ""}\n' * 2
BROKEN = [
    ("I give up", "no line that starts"),
    (TWO, "2 actions"),
    ("Action: Final Answer\nDone.", "'Action Input:' must follow"),
    ("Action: Final Answer\nAction Input: done", "JSON object in braces"),
    ('Action: Final Answer\nAction Input: {"final_answer": "x', "JSON of 'Action Input' is broken"),
    ('Action: Edit Script\nAction Input: {"script_name": "train.py"}', "must be blocks"),
    (
        'Action: Edit Script\nAction Input: {"script_name": "train.py"}\n<<<<<<< SEARCH\na\n=======\nb',
        "must be blocks",
    ),
]


@pytest.mark.parametrize(("reply", "reason"), BROKEN)
def test_unreadable_replies_say_why(reply, reason):
    with pytest.raises(InvalidFormat, match=reason):
        agent.parse_reply(reply, SEARCH)


WRONG = [
    ('Action: Delete All\nAction Input: {"x": 1}', "no action 'Delete All'"),
    ('Action: Final Answer\nAction Input: {"answer": "x"}', "exactly the keys"),
    ('Action: List Files\nAction Input: {"dir_path": 3}', "must be text"),
    (
        'Action: Inspect Script Lines\nAction Input: {"script_name": "a", "start_line_number": true,'
        ' "end_line_number": 2}',
        "whole number",
    ),
]


WRONG_TO_INSTRUCT = [
    ('Action: Edit Script\nAction Input: {"script_name": "train.py"}', "exactly the keys"),
    ('Action: Understand File\nAction Input: {"file_name": "a", "things_to_look_for": 3}', "must be text"),
]


@pytest.mark.parametrize(("reply", "reason"), WRONG_TO_INSTRUCT)
def test_wrong_actions_of_instruct_mode(reply, reason):
    with pytest.raises(InvalidAction, match=reason):
        agent.parse_reply(reply, INSTRUCT)
    with pytest.raises(InvalidAction, match="no action 'Understand File'"):
        agent.parse_reply("Action: Understand File\nAction Input: {}", SEARCH)


@pytest.mark.parametrize(("reply", "reason"), WRONG)
def test_wrong_actions_say_why(reply, reason):
    with pytest.raises(InvalidAction, match=reason):
        agent.parse_reply(reply, SEARCH)


def test_a_reply_that_computes_forever_if_evaluated_is_only_read():
    with pytest.raises(InvalidFormat):
        agent.parse_reply("Action: Final Answer\nAction Input: {'final_answer': 99**87**45}", SEARCH)


@pytest.mark.parametrize("cfg", [LINES, SEARCH])
def test_an_edit_changes_what_it_names(cfg):
    assert agent.apply_edit(SCRIPT, edit(cfg), cfg) == "a = 1\nb = 20\nd = 4\nc = 3\n"


def test_a_file_edit_replaces_the_file():
    assert agent.apply_edit(SCRIPT, edit(FILE), FILE) == "b = 20\nd = 4\n"


@pytest.mark.parametrize("bounds", [(0, 1), (3, 2), (2, 4), (-1, 1)])
def test_lines_that_do_not_exist(bounds):
    action = edit(LINES, start_line_number=bounds[0], end_line_number=bounds[1])
    with pytest.raises(EditFailed, match="do not exist"):
        agent.apply_edit(SCRIPT, action, LINES)


@pytest.mark.parametrize(
    ("old", "reason"), [("b = 3", "0 times"), ("b =", "0 times"), ("", "is empty"), ("x", "2 times")]
)
def test_searches_must_match_whole_lines_once(old, reason):
    action = Action("Edit Script", {"script_name": "train.py"}, {}, [(old, "new")])
    with pytest.raises(EditFailed, match=reason):
        agent.apply_edit("x\nb = 2\nx\n", action, SEARCH)


def test_an_edit_that_changes_nothing_fails():
    action = Action("Edit Script", {"script_name": "train.py"}, {}, [("b = 2", "b = 2")])
    with pytest.raises(EditFailed, match="changes nothing"):
        agent.apply_edit(SCRIPT, action, SEARCH)


def test_search_can_delete_lines_and_edit_twice():
    action = Action("Edit Script", {"script_name": "train.py"}, {}, [("a = 1", ""), ("c = 3", "c = 4")])
    assert agent.apply_edit(SCRIPT, action, SEARCH) == "b = 2\nc = 4\n"


# ------------------------------------------------------------------------------------------- prompts


class Words:
    """A tokenizer of words, with a ChatML template whose control tokens are ids 1 (end) and 2 (role)."""

    eos_token_id = 1

    def __init__(self):
        self.ids: dict[str, int] = {}

    def __call__(self, text, add_special_tokens, split_special_tokens=False):
        ids = []
        for word in text.replace("<end>", " <end> ").split():
            special = word == "<end>" and not split_special_tokens
            ids.append(1 if special else self.ids.setdefault(word, 10 + len(self.ids)))
        return {"input_ids": ids}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"{m['role']}: {m['content']}<end>" for m in messages) + "assistant:"


def state_of(steps: int) -> State:
    messages = [{"role": "user", "content": "the task\n\nThe starting script prints:\nvalidation mae 9"}]
    for i in range(steps):
        messages.append({"role": "assistant", "content": f"Thought: idea{i}\nAction: Edit Script"})
        messages.append({"role": "user", "content": f"long observation {i}\nvalidation mae {i}"})
    return State("m-ames", messages, {"train.py": SCRIPT}, 9.0, steps)


def test_a_reply_ends_as_the_turns_of_its_prompt_do():
    base = train_tokenizer(["x = 1"], 300, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    base.eos_token = "<|endoftext|>"  # a base model's: it ends documents
    assert agent.end_token(base) == base.convert_tokens_to_ids("<|im_end|>") != base.eos_token_id
    assert agent.end_token(train_tokenizer(["x = 1"], 300)) == train_tokenizer(["x = 1"], 300).eos_token_id
    base.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert agent.end_token(base) == base.eos_token_id, "no token of its own ends a turn"


def test_neighbouring_lines_are_found_twice():
    edit = Action("Edit Script", {"script_name": "train.py"}, {}, [("fit(x)", "fit(y)")])
    with pytest.raises(EditFailed, match="found 2 times"):
        agent.apply_edit("fit(x)\nfit(x)\n", edit, SEARCH)


def test_text_cannot_forge_control_tokens():
    tokenizer = Words()
    forged = agent.encode_chat([{"role": "user", "content": "a <end> b"}], tokenizer)
    honest = agent.encode_chat([{"role": "user", "content": "a b"}], tokenizer)
    assert forged.count(1) == honest.count(1) == 1


def test_the_prompt_ends_with_the_script():
    messages = agent.render(state_of(2), replace(SEARCH, edit_format="lines"))
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[-1]["content"].endswith("```python\n1 a = 1\n2 b = 2\n3 c = 3\n```")


def test_brief_prompts_tell_the_history_in_lines():
    text = agent.render(state_of(2), LINES)[0]["content"]
    assert text.splitlines()[1:] == [
        "0. start: validation mae 9",
        "1. idea0: validation mae 0",
        "2. idea1: validation mae 1",
        "1 a = 1",
        "2 b = 2",
        "3 c = 3",
    ]


@pytest.mark.parametrize("cfg", [SEARCH, LINES])
def test_a_long_history_loses_its_oldest_part_first(cfg):
    tokenizer, state = Words(), state_of(3)
    whole = agent.encode_state(state, cfg, tokenizer)
    lengths = []
    for limit in range(len(whole), 0, -1):
        try:
            ids = agent.encode_state(state, replace(cfg, max_prompt_tokens=limit), tokenizer)
        except agent.PromptTooLong as error:
            assert "m-ames" in str(error) and str(limit) in str(error)
            break
        lengths.append(len(ids))
        assert len(ids) <= limit
        assert {tokenizer.ids[word] for word in ("b", "c")} <= set(ids), "the script stays"
    assert len(set(lengths)) > 2, "the history goes step by step"
    kept = agent.render(state, cfg, dropped=1)
    text = json.dumps(kept)
    assert "long observation 0" not in text and "validation mae 0" not in text
    assert "validation mae 2" in text


def test_an_unknown_field_value_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        AgentConfig(max_new_tokens=0)
    with pytest.raises(ValueError, match="lacks"):
        agent.state_from_row({"task": "m-ames"})
    with pytest.raises(ValueError, match="must be a number"):
        agent.state_from_row(state_of(0).to_row() | {"score": None})
