"""Experts that explore (paper 4.1, B.1). All see what any agent sees; the hidden answers play no part.

ScriptedExpert   needs no model: it tries its ideas one by one, looks at the validation score that the script itself
                 prints, keeps the edit or undoes it, and finishes
ModelExpert      an LLM that finds its ideas in the task text (the paper's GPT-4o-mini), which speaks through
    EndpointVoice    a chat endpoint (client.py)
    LocalVoice       a checkpoint on this machine (rollout.Policy), one batch for the episodes of many threads
"""

import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

import tasks
from agent import (
    FIELDS,
    Action,
    AgentConfig,
    InvalidAction,
    InvalidFormat,
    PromptTooLong,
    State,
    encode_state,
    format_reply,
    parse_reply,
    render,
)
from client import Client, estimate_tokens, without_thinking
from reward import Outcome


def draw_ideas(
    task: "tasks.Task", rng: np.random.Generator, ideas: "list[tasks.Idea] | None" = None, by_axis: bool = True
) -> list["tasks.Idea"]:
    """One idea from each of 1-3 axes, in random order (paper B.1), or 1-3 different ones whatever their axes (paper
    v1, B.3); of `ideas`, or of the task's own."""
    ideas = task.ideas() if ideas is None else ideas
    if not by_axis:
        return [ideas[i] for i in rng.permutation(len(ideas))[: rng.integers(1, 4)]]
    pools = {axis: [idea for idea in ideas if idea.axis == axis] for axis in tasks.AXES}
    filled = [axis for axis in tasks.AXES if pools[axis]]
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


def habits(ideas: list["tasks.Idea"]) -> list["tasks.Idea"]:
    """The first idea of each axis: the repertoire of a scripted expert that is given no pools.

    A stand-in, for comparisons, for what an LLM does without ideas: it falls back on the same few edits.
    """
    first = {idea.axis: idea for idea in reversed(ideas)}
    return [first[axis] for axis in tasks.AXES if axis in first]


class ScriptedExpert:
    """Plays one episode: `reply(state, outcome)` gives the next reply, from what the last action gave.

    Raises tasks.TaskError for ideas without code, or where edits are not the agent's to write.
    """

    prompt_tokens = completion_tokens = 0

    def __init__(self, task: "tasks.Task", ideas: list["tasks.Idea"], cfg: AgentConfig):
        if cfg.edit_mode != "direct":
            raise tasks.TaskError("the scripted expert writes its edits itself: set agent.edit_mode = direct")
        if any(idea.code is None for idea in ideas):
            raise tasks.TaskError(
                f"the ideas of {task.name} are texts without code, which the scripted expert cannot carry out: "
                "set collect.expert = endpoint or local"
            )
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


# ----------------------------------------------------------------------------------------- LLM experts


@dataclass
class Spoken:
    """What an LLM replied, as it stands, and what it cost."""

    text: str
    cut: bool  # its end is missing: it reached the longest reply allowed
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Said:
    """The reply that counts, and those before it that could not be read: [{"reply", "reason"}, ...]."""

    text: str
    cut: bool = False
    refused: list[dict] = field(default_factory=list)


Voice = Callable[[State, int], Spoken]  # (what to reply to, a number that no other call has)

AGAIN = "Your reply could not be read: {reason}. Reply once more, in the form that was described."


class ModelExpert:
    """Plays one episode with an LLM: `reply(state)` asks again, with the reason, for what cannot be read.

    numbers: for the voice, one for each call; a local checkpoint draws its randomness from them.
    """

    def __init__(self, voice: Voice, cfg: AgentConfig, retries: int, numbers: range):
        self.voice, self.cfg, self.retries, self.numbers = voice, cfg, retries, iter(numbers)
        self.prompt_tokens = self.completion_tokens = 0

    def reply(self, state: State, outcome: Outcome | None = None) -> Said:
        """The first readable reply, else the last one: the transition tells the agent what is wrong with it.
        `outcome` (the last action's) is not looked at: its feedback stands in the state.

        Raises client.ChatError (of an endpoint), agent.PromptTooLong.
        """
        asked, refused = state, []
        while True:
            try:
                spoken = self.voice(asked, next(self.numbers))
            except PromptTooLong:
                if not refused:
                    raise
                return Said(refused[-1]["reply"], spoken.cut, refused[:-1])  # no room to be asked again
            self.prompt_tokens += spoken.prompt_tokens
            self.completion_tokens += spoken.completion_tokens
            text = without_thinking(spoken.text)
            try:
                if spoken.cut:
                    raise InvalidFormat("it was cut off: be shorter")
                return Said(tidy(text, self.cfg), False, refused)
            except (InvalidFormat, InvalidAction) as error:
                if len(refused) == self.retries:
                    return Said(text, spoken.cut, refused)
                refused.append({"reply": text, "reason": str(error)})
            again = AGAIN.format(reason=refused[-1]["reason"])
            turns = [{"role": "assistant", "content": text}, {"role": "user", "content": again}]
            asked = replace(state, messages=[*state.messages, *turns])


def tidy(text: str, cfg: AgentConfig) -> str:
    """A reply as `format_reply` writes it: the fields in their order, the action, and no remark before or after.
    A reply that goes on to invent what the environment answers would otherwise be learned as it is.

    Raises InvalidFormat, InvalidAction: it cannot be read, or gives no thought where thoughts are asked for.
    """
    action = parse_reply(text, cfg)
    if FIELDS[cfg.thought] and not any(action.thought.get(name) for name in FIELDS[cfg.thought]):
        raise InvalidFormat(f"no line that starts with '{FIELDS[cfg.thought][-1]}:'")
    short = format_reply(action, cfg)
    try:
        again = parse_reply(short, cfg)
    except (InvalidFormat, InvalidAction):
        return text
    return short if (again.name, again.args, again.edit) == (action.name, action.args, action.edit) else text


class EndpointVoice:
    """Speaks through a chat endpoint. Prompts are cut to agent.max_prompt_tokens, counted as 4 characters each."""

    def __init__(self, client: Client, cfg: AgentConfig):
        self.client, self.cfg = client, cfg

    def __call__(self, state: State, number: int) -> Spoken:
        reply = self.client.chat(self.prompt(state))
        return Spoken(reply.text, reply.finish == "length", reply.prompt_tokens, reply.completion_tokens)

    def prompt(self, state: State) -> list[dict]:
        for dropped in range(2 * (len(state.messages) // 2) + 1):
            messages = render(state, self.cfg, dropped)
            tokens = estimate_tokens("".join(m["content"] for m in messages))
            if tokens <= self.cfg.max_prompt_tokens:
                return messages
        raise PromptTooLong(
            f"task {state.task}: task text and script take about {tokens} tokens, more than "
            f"agent.max_prompt_tokens = {self.cfg.max_prompt_tokens}: raise it"
        )

    def close(self) -> None:
        self.client.close()


class LocalVoice:
    """Speaks through a checkpoint. Whatever the threads ask while one batch is generated makes up the next.

    policy: a rollout.Policy. A reply is a function of the prompt, the seed and its number, not of its batch.
    """

    def __init__(self, policy, seed: int):
        from generate import Rng  # late: it imports torch, which the other experts do not need

        self.policy, self.rng = policy, Rng(seed, 1 << 27)  # a stream apart from those of RL and evaluation
        self.waiting: queue.Queue = queue.Queue()
        self.closed = False
        threading.Thread(target=self._serve, daemon=True, name="local voice").start()

    def __call__(self, state: State, number: int) -> Spoken:
        future: Future = Future()
        self.waiting.put((state, number, future))
        return future.result()

    def close(self) -> None:
        """End the generation under way; who waits gets an error."""
        self.closed = True
        self.waiting.put(None)

    def _serve(self) -> None:
        while True:
            jobs = [self.waiting.get()]
            time.sleep(0.02)  # episodes whose experiments end together belong into one batch
            while not self.waiting.empty():
                jobs.append(self.waiting.get())
            ready = []
            for state, number, future in filter(None, jobs):
                try:
                    prompt = encode_state(state, self.policy.cfg, self.policy.tokenizer)
                    ready.append((prompt, number, future))
                except Exception as error:  # PromptTooLong, or a chat template that fails: the one who asked must know
                    future.set_exception(error)
            try:
                if self.closed:
                    raise RuntimeError("the local expert was closed")
                for c in self.policy.sample([p for p, _, _ in ready], self.rng, [n for _, n, _ in ready]):
                    if self.closed:
                        raise RuntimeError("the local expert was closed")
                    prompt, _, future = ready[c.index]
                    text = self.policy.text(c.tokens)
                    future.set_result(Spoken(text, c.finish == "length", len(prompt), len(c.tokens)))
            except Exception as error:  # the threads that wait must not wait for ever
                for _, _, future in ready:
                    if not future.done():
                        future.set_exception(error)
