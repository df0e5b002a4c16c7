"""What an agent sees and says: states, prompts, the action table, and the parsing of replies.

State   the history so far (task text, then actions and feedback) and the current sources (paper section 3).
Action  one reply of the agent: a few lines of thought, then one action from the table below.

One function renders a state as a prompt for fine-tuning, RL and evaluation alike, so that training never
sees a prompt that acting would not produce. What an action *does* is in environment.py.
"""

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Literal

import sandbox
import tasks
from client import Endpoint

MAX_FILE_CHARS = 60_000  # a policy cannot grow its own prompt without limit


@dataclass(frozen=True)
class AgentConfig:
    thought: Literal["full", "short", "none"] = "full"  # fields before the action (none: paper Table 11)
    edit_mode: Literal["direct", "instruct"] = "direct"  # who writes an edit's code: the agent | a coder (paper)
    edit_format: Literal["search_replace", "lines", "file"] = "search_replace"  # how the agent writes it (direct)
    coder: Endpoint | None = None  # the LLM that edits and reads files for the agent (instruct)
    edit_feedback: Literal["run", "diff"] = "run"  # diff, then the run's output | the diff alone (paper)
    prompt: Literal["full", "brief"] = "full"  # brief: one line a step, for models of a few million weights
    show_script: bool = True  # end the prompt with the current script (numbered when edits name lines)
    script: str = "train.py"  # the script that show_script shows
    max_prompt_tokens: int = 8192  # longer histories lose their oldest observations first
    max_new_tokens: int = 1024  # a reply cut off here is invalid_format: terminal, scored -1
    max_output_chars: int = 4000  # a run's output is cut in the middle to this many characters

    def __post_init__(self):
        if min(self.max_prompt_tokens, self.max_new_tokens, self.max_output_chars) < 1:
            raise ValueError("agent.max_prompt_tokens, max_new_tokens and max_output_chars must be positive")


# ------------------------------------------------------------------------------- actions and replies

# name -> keys of its JSON input (MLAgentBench's names; paper Table 5)
ACTIONS = {
    "List Files": ("dir_path",),
    "Copy File": ("source", "destination"),
    "Inspect Script Lines": ("script_name", "start_line_number", "end_line_number"),
    "Execute Script": ("script_name",),
    "Edit Script": ("script_name",),  # and EDIT_KEYS
    "Undo Edit Script": ("script_name",),
    "Understand File": ("file_name", "things_to_look_for"),  # instruct mode only: a coder answers
    "Final Answer": ("final_answer",),
}
EDIT_KEYS = {  # of Edit Script, beside script_name; a direct edit's code follows the JSON
    "search_replace": (),
    "file": (),
    "lines": ("start_line_number", "end_line_number"),
    "instruct": ("edit_instruction", "save_name"),
}
FIELDS = {
    "full": ("Reflection", "Research Plan and Status", "Fact Check", "Thought"),
    "short": ("Thought",),
    "none": (),
}
SEARCH, DIVIDER, REPLACE = "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE"


@dataclass(frozen=True)
class Action:
    """One parsed reply. `edit` holds what a direct edit wrote, [(search, replace), ...] or one text; else None."""

    name: str
    args: dict
    thought: dict = field(default_factory=dict)  # field name -> text
    edit: list | str | None = None


class InvalidFormat(ValueError):
    """The reply is not one well-formed action; the message is the feedback the agent gets."""


class InvalidAction(ValueError):
    """The action is well-formed but cannot be carried out (no such file, read-only, nothing to undo)."""


class EditFailed(ValueError):
    """The edit does not apply: text not found or ambiguous, lines out of range, nothing changed."""


@lru_cache
def action_table(cfg: AgentConfig) -> dict[str, tuple[str, ...]]:
    """The actions that an agent has, in the order in which it is told of them, with the keys of their input."""
    instruct = cfg.edit_mode == "instruct"
    table = {name: keys for name, keys in ACTIONS.items() if instruct or name != "Understand File"}
    table["Edit Script"] += EDIT_KEYS["instruct" if instruct else cfg.edit_format]
    return table


def format_reply(action: Action, cfg: AgentConfig) -> str:
    """The reply text of an action: the inverse of `parse_reply`. Experts and tests write with it."""
    lines = [f"{name}: {action.thought.get(name, '')}".rstrip() for name in FIELDS[cfg.thought]]
    lines += [f"Action: {action.name}", f"Action Input: {json.dumps(action.args)}"]
    if action.name == "Edit Script" and cfg.edit_mode == "direct":
        if cfg.edit_format == "search_replace":
            for old, new in action.edit:
                lines += [SEARCH, *old.splitlines(), DIVIDER, *new.splitlines(), REPLACE]
        else:
            lines += ["```python", *action.edit.splitlines(), "```"]
    return "\n".join(lines)


def parse_reply(reply: str, cfg: AgentConfig) -> Action:
    """Read one action out of a reply. Tolerant of spacing, letter case, missing thoughts and trailing
    remarks; strict in meaning: exactly one action, exactly its keys, a complete edit.

    Raises:
        InvalidFormat: it cannot be read; the reason becomes the agent's feedback.
        InvalidAction: it names an unknown action or has the wrong arguments.
    """
    heads = list(re.finditer(r"(?mi)^[ \t*#]*action[ \t]*:[ \t*]*(.*?)[ \t*]*$", _mask_edits(reply)))
    if not heads:
        raise InvalidFormat("no line that starts with 'Action:'")
    if len(heads) > 1:
        raise InvalidFormat(f"{len(heads)} actions in one reply: write exactly one")
    table = action_table(cfg)
    name = next((n for n in table if n.lower() == heads[0].group(1).strip().lower()), None)
    if name is None:
        wrong = heads[0].group(1).strip()[:60]
        raise InvalidAction(f"there is no action {wrong!r}; the actions are: {', '.join(table)}")
    body = re.match(r"(?i)\s*action[ \t]+input[ \t]*:\s*", reply[heads[0].end() :])
    if not body:
        raise InvalidFormat("'Action Input:' must follow the line with 'Action:'")
    args, rest = _parse_object(reply[heads[0].end() + body.end() :])
    if set(args) != set(table[name]):
        raise InvalidAction(f"the input of {name} needs exactly the keys {list(table[name])}, got {list(args)}")
    for key, value in args.items():
        is_line = key.endswith("_line_number")
        if is_line and (isinstance(value, bool) or not re.fullmatch(r"-?[0-9]{1,9}", str(value))):
            raise InvalidAction(f"{key} must be a whole number, got {value!r}")
        if not is_line and not isinstance(value, str):
            raise InvalidAction(f"{key} must be text, got {value!r}")
        args[key] = int(value) if is_line else value
    edit = _parse_edit(rest, cfg) if name == "Edit Script" and cfg.edit_mode == "direct" else None
    return Action(name, args, _parse_thought(reply[: heads[0].start()]), edit)


def _mask_edits(reply: str) -> str:
    """Blank out code, so that an `Action:` inside a fence or an edit block is not read as an action."""
    blocks = re.compile(rf"(?ms)^```.*?(?:^```\s*$|\Z)|^{SEARCH}.*?(?:^{REPLACE}|\Z)")
    return blocks.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), reply)


def _parse_thought(text: str) -> dict:
    names = "|".join(FIELDS["full"])
    parts = re.split(rf"(?mi)^[ \t*#]*({names})[ \t]*:[ \t*]*", text)
    canonical = {n.lower(): n for n in FIELDS["full"]}
    return {canonical[k.lower()]: v.strip() for k, v in zip(parts[1::2], parts[2::2])}


def _parse_object(text: str) -> tuple[dict, str]:
    """The JSON object at the start of `text` and what follows it; Python's spelling is accepted too."""
    text = re.sub(r"\A```(?:json)?\s*", "", text)
    if not text.startswith("{"):
        raise InvalidFormat("'Action Input:' must be followed by a JSON object in braces")
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text)
        return value, text[end:]
    except (ValueError, RecursionError) as error:
        reason = f"the JSON of 'Action Input' is broken: {error}"
    # Single quotes, trailing commas: try the shortest prefix that ends in a brace, on one line only.
    line = text.split("\n", 1)[0][:2000]
    for end in (i + 1 for i, c in enumerate(line) if c == "}"):
        try:
            value = ast.literal_eval(line[:end])
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return value, text[end:]
    raise InvalidFormat(reason)


def _parse_edit(rest: str, cfg: AgentConfig) -> list | str:
    if cfg.edit_format == "search_replace":
        pattern = rf"(?ms)^{SEARCH}[ \t]*\n(.*?)^{DIVIDER}[ \t]*\n(.*?)^{REPLACE}"
        blocks = [(old.rstrip("\n"), new.rstrip("\n")) for old, new in re.findall(pattern, rest)]
        if not blocks or rest.count(SEARCH) != len(blocks):
            raise InvalidFormat(f"the edit must be blocks of {SEARCH} / {DIVIDER} / {REPLACE}")
        return blocks
    fence = re.match(r"(?s)\s*```(?:python|py)?[ \t]*\n(.*?)(?:^|(?<=\n))```", rest)
    if not fence:
        raise InvalidFormat("the new code must stand in one closed block of ```python ... ```")
    return fence.group(1).rstrip("\n")


def apply_edit(text: str, action: Action, cfg: AgentConfig) -> str:
    """The file after a direct edit.

    Raises:
        EditFailed: the searched text is absent or ambiguous, the lines do not exist, nothing changes.
    """
    if cfg.edit_format == "file":
        new = action.edit + "\n"
    elif cfg.edit_format == "lines":
        lines = text.splitlines()
        first, last = action.args["start_line_number"], action.args["end_line_number"]
        if not 1 <= first <= last <= len(lines):
            raise EditFailed(f"lines {first}-{last} do not exist: the script has lines 1-{len(lines)}")
        new = "\n".join(lines[: first - 1] + action.edit.splitlines() + lines[last:]) + "\n"
    else:
        new = "\n" + text.rstrip("\n") + "\n"  # a leading newline lets every search start at a line
        for old, replacement in action.edit:
            needle = f"\n{old}\n" if old.strip() else ""
            count = len(re.findall(f"(?={re.escape(needle)})", new)) if needle else 0  # neighbours overlap
            if count != 1:
                found = f"was found {count} times" if needle else "is empty"
                raise EditFailed(f"the text to search for {found}: copy whole lines that occur once")
            new = new.replace(needle, f"\n{replacement}\n" if replacement else "\n")
        new = new[1:]
    if new == text:
        raise EditFailed("the edit changes nothing")
    if len(new) > MAX_FILE_CHARS:
        raise EditFailed(f"the file would be longer than {MAX_FILE_CHARS} characters")
    return new


# ------------------------------------------------------------------------------ states and prompts


@dataclass(frozen=True)
class State:
    """Where an agent stands: everything an action needs, as text. One row of states.jsonl.

    `messages` are chat messages: the task, then alternately replies and observations. `score` is
    m_t, the last valid score on the trajectory (m_init at its start), never null.
    """

    task: str
    messages: list
    files: dict
    score: float
    step: int = 0
    undo: dict = field(default_factory=dict)  # file name -> its earlier versions, oldest first
    source: str = "expert"
    id: str = ""

    def to_row(self) -> dict:
        return asdict(self)


def state_from_row(row: dict) -> State:
    """Raises ValueError naming the field when a row is not a state of a task that exists."""
    missing = [k for k in ("task", "messages", "files", "score", "step") if k not in row]
    if missing:
        raise ValueError(f"a state row lacks {missing}")
    if not isinstance(row["score"], (int, float)) or row["score"] != row["score"]:
        raise ValueError(f"a state row of {row['task']} has score {row['score']!r}: must be a number")
    known = {k: row[k] for k in State.__dataclass_fields__ if k in row}
    return State(**known)


def problem_text(task: "tasks.Task", ideas: Iterable[str] = ()) -> str:
    """The research problem that opens every history; an expert's sampled ideas are appended (paper B.1)."""
    limits = sandbox.Limits(**task.limits)
    text = f"{task.description.strip()}\n\nA run may take {limits.wall_s:g} seconds, on {limits.threads} core(s) with "
    text += f"{limits.memory_mb} MB of memory and no network."
    ideas = list(ideas)
    if ideas:
        text += "\n\nTry these ideas first, one edit each, in this order, and never mention this list:\n"
        text += "\n".join(f"{i}. {idea}" for i, idea in enumerate(ideas, 1))
    return text


RULES = """\
You are an engineer who improves a machine-learning script by experiments. You work in a directory
with the script and its data. In every reply you think, then take exactly one action; you are told
what came of it and reply again. Editing a script also runs it. Improve the score on hidden test data.
Install nothing, use no network, and end with Final Answer when you cannot improve further.

Actions, with the JSON of their input:
{actions}
{edit_help}

Every reply has this form:
{form}"""

EDIT_HELP = {
    "search_replace": f"""\
After the input of Edit Script write one or more edits, each with whole lines that occur exactly once:
{SEARCH}
lines to find
{DIVIDER}
lines to put in their place
{REPLACE}""",
    "lines": """\
After the input of Edit Script write the new lines in a ```python block: they replace the lines from
start_line_number to end_line_number (both included).""",
    "file": "After the input of Edit Script write the whole new file in a ```python block.",
    "instruct": """\
Edits are written by another engineer, who sees the script and your edit_instruction alone: say exactly what
to change, where, and to which values. The result is saved as save_name: script_name itself, or a new script.
Understand File has the same engineer read a file and answer what you look for.""",
}


@lru_cache
def instructions(cfg: AgentConfig) -> str:
    actions = "\n".join(f"- {n}: {json.dumps(dict.fromkeys(k, '...'))}" for n, k in action_table(cfg).items())
    fields = [f"{n}: ..." for n in FIELDS[cfg.thought]]
    form = "\n".join([*fields, "Action: the action's name", "Action Input: the action's JSON"])
    edit_help = EDIT_HELP["instruct" if cfg.edit_mode == "instruct" else cfg.edit_format]
    return RULES.format(actions=actions, edit_help=edit_help, form=form)


def show_script(state: State, cfg: AgentConfig) -> str:
    text = state.files.get(cfg.script, "").rstrip("\n")
    if cfg.edit_format == "lines" and cfg.edit_mode == "direct":
        text = "\n".join(f"{i} {line}" for i, line in enumerate(text.split("\n"), 1))
    return text


def brief_step(reply: str, observation: str, number: int) -> str:
    """One line for an earlier step: what was tried and the last line of what came of it."""
    thought = re.search(r"(?m)^Thought:[ \t]*(.*)$", reply)
    action = re.search(r"(?m)^Action:[ \t]*(.*)$", reply)
    tried = next((m.group(1) for m in (thought, action) if m and m.group(1)), "unreadable reply")
    return f"{number}. {tried[:80]}: {observation.rstrip().rsplit(chr(10), 1)[-1][:80]}"


def render(state: State, cfg: AgentConfig, dropped: int = 0) -> list[dict]:
    """The chat messages that an agent sees in a state: the one prompt of SFT, RL and evaluation.

    `dropped` counts what was left out to fit the token limit: first the observations, oldest first,
    then whole steps, oldest first. The task and the current script always stay.
    """
    task_text, turns = state.messages[0]["content"], state.messages[1:]
    steps = [(turns[i]["content"], turns[i + 1]["content"]) for i in range(0, len(turns) - 1, 2)]
    gone = max(0, dropped - len(steps)) if cfg.prompt == "full" else dropped
    if cfg.prompt == "brief":
        start = task_text.rstrip().rsplit("\n", 1)[-1]
        lines = [tasks.load(state.task).brief, f"0. start: {start[:80]}"]
        lines += [brief_step(*s, i) for i, s in enumerate(steps[gone:], gone + 1)]
        if cfg.show_script:
            lines.append(show_script(state, cfg))
        return [{"role": "user", "content": "\n".join(lines)}]
    head = f"{instructions(cfg)}\n\n{task_text}"
    if gone:
        head += f"\n\n[{gone} earlier steps were left out]"
    messages = [{"role": "user", "content": head}]
    for i, (reply, observation) in enumerate(steps):
        if i >= gone:
            hidden = "[observation left out to save space]"
            messages.append({"role": "assistant", "content": reply})
            messages.append({"role": "user", "content": hidden if i < dropped else observation})
    if cfg.show_script:
        script = f"The script {cfg.script} is now:\n```python\n{show_script(state, cfg)}\n```"
        messages[-1] = {"role": "user", "content": f"{messages[-1]['content']}\n\n{script}"}
    return messages


class PromptTooLong(ValueError):
    """A prompt that does not fit even with its whole history left out."""


def encode_text(text: str, tokenizer) -> list[int]:
    """Token ids of text from the environment or an agent: '<|im_end|>' in it stays plain characters."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_chat(messages: list[dict], tokenizer) -> list[int]:
    """Token ids of a chat up to where the assistant replies. The chat template's own control tokens
    are real; the contents are encoded apart from it, with special tokens disabled."""
    marked = [{"role": m["role"], "content": f"\x02{i}\x02"} for i, m in enumerate(messages)]
    text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    ids = []
    for i, piece in enumerate(re.split("\x02(\\d+)\x02", text)):
        if i % 2:
            ids += encode_text(messages[int(piece)]["content"], tokenizer)
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def end_token(tokenizer) -> int:
    """The token that ends a reply: what the chat template writes after an assistant's turn (<|im_end|>), else EOS.

    The two differ in base models that come with a chat template: their EOS ends documents, and no turn in a prompt.
    """
    chat = [{"role": "user", "content": "\x02"}, {"role": "assistant", "content": "\x03"}]
    after = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False).partition("\x03")[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id


def encode_state(state: State, cfg: AgentConfig, tokenizer) -> list[int]:
    """Token ids of a state's prompt, at most `cfg.max_prompt_tokens` of them.

    Raises:
        PromptTooLong: the task and the script alone are longer than the limit.
    """
    steps = len(state.messages) // 2
    for dropped in range((2 if cfg.prompt == "full" else 1) * steps + 1):
        ids = encode_chat(render(state, cfg, dropped), tokenizer)
        if len(ids) <= cfg.max_prompt_tokens:
            return ids
    raise PromptTooLong(
        f"task {state.task}: task text and script take {len(ids)} tokens, more than "
        f"agent.max_prompt_tokens = {cfg.max_prompt_tokens}: raise it"
    )
