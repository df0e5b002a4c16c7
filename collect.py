"""Exploration-enriched collection (paper 4.1): idea pools -> expert trajectories -> the pool of states.

    python collect.py --config configs/tiny.yaml                    # minutes on two CPU cores, no model needed
    python collect.py --config configs/micro.yaml trajectories=600
    python collect.py ideas --config configs/X.yaml                 # an LLM proposes ideas: see ideas.py
    python collect.py trajectories --config configs/X.yaml expert=endpoint ideas_from=run

Each trajectory starts from a task's starter and 1-3 sampled ideas; the expert edits, runs, keeps or undoes.
Writes runs/NAME/data/:
    trajectories.jsonl   one line a trajectory; append-only, so that a killed run resumes where it stopped
    states.jsonl         one line a state to act in, derived from the trajectories
    dropped.jsonl        what else cost tokens: episodes that an endpoint, our own failure or Ctrl-C ended; they are
                         played again

Experts (expert.py): scripted, needs no model; endpoint, an LLM behind a chat endpoint (the paper: GPT-4o-mini);
local, a checkpoint on this machine. An LLM's replies are saved in the form of `format_reply`; what it must say again
since it cannot be read stands in the step ("retries"), not in the messages. Differs from the paper: an edit also runs.
"""

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

import config
import ideas
import sandbox
import tasks
from agent import AgentConfig, PromptTooLong, State, problem_text
from client import OPERATION, BudgetSpent, ChatError, Endpoint
from copies import Recorder, replay_renamed
from environment import Environment, Episode, SandboxConfig, initial_state, transition
from experiments import SANDBOX_MAY_CHANGE
from expert import EndpointVoice, LocalVoice, ModelExpert, Said, ScriptedExpert, draw_ideas, habits
from ideas import PoolConfig
from records import append_rows, claim, iterate_jsonl, require_checkpoint, states_of
from reward import Outcome
from spend import Progress, connect, how_to_go_on, tokens_of, unaccounted


@dataclass(frozen=True)
class LocalConfig:
    checkpoint: str = ""  # a Hugging Face directory or hub id
    temperature: float = 1.0
    top_p: float = 1.0
    max_batch: int = 64  # sequences that decode together
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU


@dataclass(frozen=True)
class Config:
    run: str  # name of the run: everything it writes lies in runs/RUN
    seed: int = 0  # trajectory i is a function of (seed, i), up to what an endpoint replies
    tasks: tuple[str, ...] = ()  # training tasks; empty = every training task of the micro suite
    trajectories: int = 300  # executed trajectories (the paper: 10,000)
    expert: Literal["scripted", "endpoint", "local"] = "scripted"  # needs no model | an LLM | a checkpoint here
    endpoint: Endpoint | None = None  # the LLM of `ideas` and of expert = endpoint; budgets are this directory's
    local: LocalConfig = field(default_factory=LocalConfig)  # the model of expert = local
    ideas_from: Literal["task", "run", "none"] = "task"  # the task's ideas.yaml | what `ideas` chose | none, to compare
    pool: PoolConfig = field(default_factory=PoolConfig)  # of `ideas`
    max_steps: int = 15  # actions an episode may take (paper B.3)
    max_minutes: float = 30  # minutes of experiments an episode may take (paper B.3)
    keep_ideas: bool = False  # leave the sampled ideas in the saved task text; acting has none
    retries: int = 3  # times that an LLM is asked again for one reply that cannot be read
    at_once: int = 0  # episodes under way at once; 0 = enough to keep the sandbox, and the LLM, busy
    renamed_copies: int = 0  # copies of each trajectory with other variable names, for models from scratch
    agent: AgentConfig = field(default_factory=AgentConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)

    def __post_init__(self):
        brief = self.agent.prompt == "brief"
        if self.trajectories < 1 or self.max_steps < 1 or self.retries < 0 or self.at_once < 0:
            raise ValueError("trajectories and max_steps must be positive, retries and at_once not negative")
        if self.expert == "endpoint" and self.endpoint is None:
            raise ValueError("expert = endpoint needs endpoint.base_url and endpoint.model")
        if self.expert == "local" and not self.local.checkpoint:
            raise ValueError("expert = local needs local.checkpoint, a Hugging Face directory or hub id")
        if self.expert == "endpoint" and brief:
            raise ValueError("agent.prompt = brief does not tell an LLM how to reply: set agent.prompt = full here")
        if self.expert == "local" and brief and self.ideas_from != "none":
            raise ValueError("agent.prompt = brief shows no ideas: set it to full here, or ideas_from = none")
        if self.agent.edit_mode == "instruct" and (self.expert == "scripted" or self.renamed_copies):
            raise ValueError("the scripted expert and renamed copies write code: they need agent.edit_mode = direct")


# Keys that may differ between a run and its continuation: how long, how fast, how dear.
MAY_CHANGE = ("trajectories", "at_once", "local.max_batch", *SANDBOX_MAY_CHANGE)
MAY_CHANGE += tuple(f"pool.{key.name}" for key in fields(PoolConfig) if key.name != "by_axis")  # decides draws, too
MAY_CHANGE += tuple(f"{who}.{key}" for who in ("endpoint", "agent.coder") for key in OPERATION)
FAILURES = 5  # episodes in a row that an endpoint ends before the run gives up


# ------------------------------------------------------------------------------------- one trajectory


@dataclass
class Played:
    """What came of one trajectory: its rows, the original first, or why it was dropped and what it cost."""

    index: int
    rows: list[dict]
    error: Exception | None
    spent: dict  # prompt_tokens, completion_tokens


class Collector:
    """What all trajectories of a run share. `play` is thread-safe. Raises config.UserError, tasks.TaskError."""

    def __init__(self, cfg: Config, names: tuple[str, ...], env: Environment):
        self.cfg, self.names, self.env = cfg, names, env
        self.voice: EndpointVoice | LocalVoice | None = None  # of an LLM expert
        self.pools = {name: pool_of(tasks.load(name), cfg) for name in names}
        for name, pool in self.pools.items():
            self.expert(tasks.load(name), pool, 0)  # complains about ideas that it cannot carry out

    def play(self, index: int) -> Played:
        """Trajectory `index` and its renamed copies. Runs the experiments."""
        rng = np.random.default_rng([self.cfg.seed, index])
        task = tasks.load(self.names[index % len(self.names)])
        pool = self.pools[task.name]
        by_axis = self.cfg.pool.by_axis or self.cfg.ideas_from != "run"  # the tasks' own ideas have axes
        drawn = draw_ideas(task, rng, pool, by_axis) if pool else []
        expert = self.expert(task, drawn, index)
        rows, error = [], None
        try:
            rows = self.rows(index, task, drawn, expert, rng)
        except (ChatError, config.UserError) as reason:  # UserError: the coder's budget
            error = reason
        tokens = {"prompt_tokens": expert.prompt_tokens, "completion_tokens": expert.completion_tokens}
        return Played(index, rows, error, tokens)

    def expert(self, task, drawn, index: int) -> ScriptedExpert | ModelExpert:
        if self.cfg.expert == "scripted":
            return ScriptedExpert(task, drawn, self.cfg.agent)
        calls = self.cfg.max_steps * (1 + self.cfg.retries)  # the most that one trajectory makes
        return ModelExpert(self.voice, self.cfg.agent, self.cfg.retries, range(index * calls, (index + 1) * calls))

    def rows(self, index: int, task, drawn, expert, rng) -> list[dict]:
        cfg, recorder = self.cfg, Recorder(self.env)
        texts = [idea.text for idea in drawn] if cfg.ideas_from != "none" else []
        saved = texts if cfg.keep_ideas else []
        told = saved if cfg.expert == "scripted" else texts  # the scripted expert knows its ideas
        episode = Episode(initial_state(task, recorder, told))
        states, said, outcome = [], [], None
        while not episode.end:
            try:
                reply = expert.reply(episode.state, outcome)
            except PromptTooLong:
                if not episode.steps:
                    raise  # the task itself does not fit: the user must know
                episode.end = "overflow"
                break
            said.append(reply if self.voice else Said(reply))
            states.append(episode.state)
            step = transition(episode.state, said[-1].text, recorder, said[-1].cut)
            episode.add(step, cfg.max_steps, cfg.max_minutes)
            outcome = step.outcome
        row = to_row(index, task, drawn, states, episode, cfg)
        if told != saved:
            leave_out_ideas(row, task, told)
        if self.voice:
            row |= {"model": cfg.endpoint.model if cfg.expert == "endpoint" else cfg.local.checkpoint}
            row |= {"prompt_tokens": expert.prompt_tokens, "completion_tokens": expert.completion_tokens}
            for step, reply in zip(row["steps"], said):
                step |= {"retries": reply.refused} if reply.refused else {}
        rows = [row]
        if episode.end != "internal":
            for copy in range(cfg.renamed_copies):
                renamed = replay_renamed(task, saved, episode, recorder, rng)
                if renamed:
                    rows.append(to_row(index, task, drawn, *renamed, cfg) | {"copy": copy + 1})
        return rows


def pool_of(task: "tasks.Task", cfg: Config) -> "list[tasks.Idea]":
    """The ideas that trajectories of a task draw from; empty where the expert gets none."""
    if cfg.ideas_from == "run":
        return ideas.load_subset(Path("runs") / cfg.run / "ideas", task)
    if cfg.ideas_from == "none":
        return habits(task.ideas()) if cfg.expert == "scripted" else []
    return task.ideas()


def to_row(index: int, task, drawn, states: list[State], episode: Episode, cfg: Config) -> dict:
    """A trajectory as one JSON object. `files` of a step are the sources *before* its action."""
    steps = [
        {
            "action": step.action.name if step.action else None,
            "reply": step.state.messages[-2]["content"],
            "outcome": step.outcome.value,
            "score": step.after,
            "seconds": round(step.seconds, 3),
            "files": state.files,
            "undo": state.undo,
        }
        | ({"coder": step.coder} if step.coder else {})
        for state, step in zip(states, episode.steps)
    ]
    scores = [states[0].score] + [s.after for s in episode.steps if s.after is not None]
    best = min(scores) if task.lower_is_better else max(scores)
    return {
        "index": index,
        "copy": 0,
        "task": task.name,
        "ideas": [{"axis": idea.axis, "text": idea.text} for idea in drawn],
        "messages": episode.state.messages,
        "steps": steps,
        "initial_score": states[0].score,
        "final_score": episode.state.score,
        "best_score": best,
        "end": episode.end,
        "expert": cfg.expert,
        "seed": cfg.seed,
    }


def leave_out_ideas(row: dict, task, texts: list[str]) -> None:
    """Take the ideas out of a row's task text, as acting has none."""
    first, *rest = row["messages"]
    told = problem_text(task, texts)
    assert first["content"].startswith(told)
    row["messages"] = [{**first, "content": problem_text(task) + first["content"][len(told) :]}, *rest]


# ------------------------------------------------------------------------------------------- files


@dataclass
class Tally:
    """What the trajectories of a run add up to: ten thousand with all their files would fill gigabytes."""

    done: set[int] = field(default_factory=set)  # indices of trajectories
    copies: int = 0
    gain: float = 0.0  # sum over the trajectories
    steps: int = 0
    asked_again: int = 0  # replies that could not be read
    spent: tuple[int, int] = (0, 0)  # (prompt, completion) tokens, those of dropped episodes included

    def add(self, row: dict) -> None:
        if row["copy"]:
            self.copies += 1
            return
        self.done.add(row["index"])
        self.gain += tasks.load(row["task"]).gain(row["final_score"], "reward")
        self.steps += len(row["steps"])
        self.asked_again += sum(len(step.get("retries", ())) for step in row["steps"])
        self.pay(row)

    def pay(self, row: dict) -> None:
        self.spent = tuple(a + b for a, b in zip(self.spent, tokens_of([row])))


def write_states(folder: Path) -> int:
    """states.jsonl, whole and atomically, in the order of the trajectories; renamed copies are left out."""
    source, temporary = folder / "trajectories.jsonl", folder / "states.jsonl.tmp"
    source.touch()
    count, place, places = 0, 0, []
    with open(source, "rb") as trajectories, open(temporary, "w") as file:
        for line in trajectories:  # in the order in which they ended
            row = json.loads(line)
            places += [(row["index"], place)] if row["copy"] == 0 else []
            place += len(line)
        for _, place in sorted(places):
            trajectories.seek(place)
            row = json.loads(trajectories.readline())
            for state, step in zip(states_of(row), row["steps"]):
                file.write(json.dumps(state.to_row() | {"action": step["action"]}) + "\n")
                count += 1
    temporary.replace(folder / "states.jsonl")
    return count


def open_voice(cfg: Config, env: Environment, spent: tuple[int, int]) -> EndpointVoice | LocalVoice | None:
    """How an LLM expert speaks; None for the scripted one. Raises config.UserError."""
    if cfg.expert == "scripted":
        return None
    if cfg.expert == "endpoint":
        # A longer reply could be learned by nobody: acting is cut off there.
        longest = min(cfg.endpoint.max_tokens, cfg.agent.max_new_tokens)
        return EndpointVoice(connect(replace(cfg.endpoint, max_tokens=longest), spent), cfg.agent)
    local = cfg.local
    require_checkpoint(local.checkpoint, "give a Hugging Face directory or hub id as collect.local.checkpoint")
    from rollout import Sampling, load_policy  # late: they import torch, which the other experts do not need

    sampling = Sampling(local.temperature, local.top_p, local.max_batch)
    return LocalVoice(load_policy(local.checkpoint, env, sampling, dtype=local.dtype), cfg.seed)


def harvest(futures: list[Future], folder: Path, tally: Tally, progress: Progress) -> tuple[int, Exception | None]:
    """Save trajectories as they end; (dropped episodes, what stopped it all or None).

    Once the budget is spent, or FAILURES episodes in a row got no answer, nothing new begins; what is under way
    may still end and is saved.
    """
    dropped, in_a_row, reason = 0, 0, None
    for future in as_completed(futures):
        if future.cancelled():
            continue
        played = future.result()
        if played.error is None and played.rows[0]["end"] != Outcome.INTERNAL:
            append_rows(folder / "trajectories.jsonl", played.rows)
            for row in played.rows:
                tally.add(row)
            in_a_row = 0
            progress.add(1)
            continue
        # Our own failure or the endpoint's: not a trajectory; the next run plays it again.
        dropped += 1
        in_a_row += isinstance(played.error, ChatError)
        why = str(played.error or "internal failure")
        append_rows(folder / "dropped.jsonl", [{"index": played.index, "reason": why} | played.spent])
        tally.pay(played.spent)
        fatal = isinstance(played.error, (BudgetSpent, config.UserError)) or in_a_row >= FAILURES
        if fatal and reason is None:
            reason = played.error
            for other in futures:
                other.cancel()
    return dropped, reason


def collect_trajectories(cfg: Config) -> None:
    names = cfg.tasks or tuple(tasks.names("micro", "train"))
    for name in names:
        tasks.load(name).require_prepared()
    folder = Path("runs") / cfg.run / "data"
    claim(folder, cfg, ignore=MAY_CHANGE)
    tally = Tally()
    for name, count in (("trajectories.jsonl", tally.add), ("dropped.jsonl", tally.pay)):
        for row in iterate_jsonl(folder / name, repair=True) if (folder / name).exists() else ():
            count(row)
    todo = [i for i in range(cfg.trajectories) if i not in tally.done]
    with ExitStack() as stack:
        env = stack.enter_context(Environment(cfg.agent, cfg.sandbox, Path("runs") / "cache"))
        collector = Collector(cfg, names, env)
        voice = collector.voice = open_voice(cfg, env, tally.spent) if todo else None
        if voice:
            stack.callback(voice.close)
        print(f"sandbox tier {env.pool.tier}, {len(todo)} trajectories to go, {len(tally.done)} done", flush=True)
        client = voice.client if isinstance(voice, EndpointVoice) else None
        busy = client.endpoint.in_flight if client else cfg.local.max_batch if voice else 0
        threads = ThreadPoolExecutor(cfg.at_once or 4 * env.workers + busy)
        progress = Progress("trajectories", cfg.trajectories, len(tally.done), client)
        try:
            futures = [threads.submit(collector.play, i) for i in todo]
            dropped, reason = harvest(futures, folder, tally, progress)
        finally:
            # After an error or Ctrl-C: nothing new begins; what is under way fails as voice and env close.
            threads.shutdown(wait=False, cancel_futures=True)
            progress.close()
            if client:
                rest = unaccounted(client, tally.spent)
                append_rows(folder / "dropped.jsonl", [{"index": None, "reason": "in no trajectory"} | rest])
                tally.pay(rest)
    count, done = write_states(folder), len(tally.done)
    print(
        f"{done} trajectories, {tally.copies} renamed copies, {count} states; mean normalised gain "
        f"{tally.gain / max(1, done):.3f}; {env.counts['experiments']} experiments asked for, "
        f"{env.counts['cache_hits']} found; {dropped} dropped"
    )
    if voice:
        prompt, completion = tally.spent
        cost = f", {cfg.endpoint.usd(tally.spent):.2f} USD" if client else ""
        print(
            f"{prompt} prompt and {completion} completion tokens{cost}; "
            f"{tally.asked_again} replies to {tally.steps} asked again"
        )
    if env.coder:
        used = env.coder.usage
        tokens = f"{used.prompt_tokens} prompt and {used.completion_tokens} completion tokens"
        print(f"the coder: {tokens}, {used.usd:.2f} USD in this process")
    left = cfg.trajectories - done
    if reason:
        raise config.UserError(
            f"{reason}{how_to_go_on(reason)} ({left} trajectories to go; the others are in {folder})"
        )
    if left > 0:
        print(f"{left} trajectories to go: {folder / 'dropped.jsonl'} says why; the same command plays them again")


def main():
    command = sys.argv.pop(1) if sys.argv[1:2] in (["ideas"], ["trajectories"]) else "trajectories"
    cfg = config.load(Config, "collect")
    if command == "ideas":
        ideas.make(cfg, Path("runs") / cfg.run / "ideas")
    else:
        collect_trajectories(cfg)


if __name__ == "__main__":
    config.main(main, user_errors=(tasks.TaskError, sandbox.SandboxError, PromptTooLong))
