"""Multi-step evaluation (paper 5.1): k episodes a task for several models, against the starter and references.

    python evaluate.py --config configs/tiny.yaml                        # the run's fine-tuned and RL-trained models
    python evaluate.py --config configs/tiny.yaml 'models={rl: runs/tiny/rl/step_16}' episodes=16
    torchrun --nproc-per-node 8 evaluate.py --config configs/qwen2.5-7b.yaml    # episodes split over the ranks

Scores use the half of the hidden answers that neither collection nor RL has seen (on the paper's held-out tasks
all answers, as the benchmarks do). Writes runs/NAME/eval/: one JSON file a model with all its episodes,
results.json, results.md (the tables) and results.png.

    normalised gain   (m - m_init) / (m_best - m_init)      0 is the starter, 1 the best known score
    Delta             beta (m - m_init) / m_init            the paper's; beta = -1 where lower is better

An episode's score m is its last valid one; best@k is the best episode of k. Errors are standard errors over
episodes, the tasks being fixed. Reference rows: the scripted expert, and the best single idea (chosen on the
answers' reward half). With `draws`, also the step-wise reward on states of the pool, as RL measures it.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import config
import dist
import sandbox
import tasks
from agent import AgentConfig, PromptTooLong, state_from_row
from environment import Environment, Episode, SandboxConfig, counted, initial_state, transition
from expert import ScriptedExpert, draw_ideas
from generate import Rng
from records import read_jsonl, require_checkpoint
from reward import Outcome
from rollout import Policy, RewardConfig, Sampling, describe, load_policy, reward_of, summarise


@dataclass(frozen=True)
class Config:
    run: str  # evaluates runs/RUN, writes runs/RUN/OUT
    out: str = "eval"
    seed: int = 0
    models: dict[str, str] = field(default_factory=dict)  # name -> directory; empty = runs/RUN's sft and rl
    tasks: tuple[str, ...] = ()  # training tasks of the run (held-in); empty = the micro suite's
    heldout_tasks: tuple[str, ...] | None = None  # null = every held-out task of the micro suite
    episodes: int = 8  # per task and model (paper 5.1)
    max_steps: int = 15  # actions an episode may take
    max_minutes: float = 30.0  # minutes of experiments
    expert: bool = True  # a reference row: the scripted expert
    best_idea: bool = True  # a reference row: each idea tried alone on the starter
    draws: int = 0  # step-wise rollouts on this many states of the pool, per model
    agent: AgentConfig = field(default_factory=AgentConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    sampling: Sampling = field(default_factory=Sampling)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU

    def __post_init__(self):
        if min(self.episodes, self.max_steps) < 1 or self.draws < 0:
            raise ValueError("episodes and max_steps must be positive, draws not negative")


# ----------------------------------------------------------------------------------------- episodes


def episode_row(task: "tasks.Task", episode: Episode, k: int) -> dict:
    """One episode as JSON: its scores, how it went and every action."""
    scores = [s.after for s in episode.steps if s.after is not None]
    start = task.initial_score[counted(task, "eval")]
    best = start
    for score in scores:
        best = score if task.better(score, best) else best
    invalid = (Outcome.INVALID_FORMAT, Outcome.INVALID_ACTION, Outcome.EDIT_FAILED)
    return {
        "task": task.name,
        "k": k,
        "score": scores[-1] if scores else start,
        "best": best,
        "end": episode.end,
        "actions": len(episode.steps),
        "valid": sum(s.outcome not in invalid for s in episode.steps),
        "edits": sum(s.outcome is Outcome.OK_EDIT for s in episode.steps),
        "steps": [
            {
                "reply": s.state.messages[-2]["content"],
                "outcome": s.outcome.value,
                "score": s.after,
                "coder": s.coder,
            }
            for s in episode.steps
        ],
    }


def play_model(policy: Policy, names: list[str], cfg: Config, ctx) -> list[dict]:
    """k episodes of every task, on this rank every world-th of them; all ranks' rows on every rank. COLLECTIVE."""
    jobs = [(name, k) for name in names for k in range(cfg.episodes)]
    mine = list(range(ctx.rank, len(jobs), ctx.world))
    states = [initial_state(tasks.load(jobs[i][0]), policy.env) for i in mine]
    played = policy.rollout_episodes(
        states, mine, lambda t: Rng(cfg.seed, (1 << 24) + t), cfg.max_steps, cfg.max_minutes
    )
    rows = []
    for i, (episode, _) in zip(mine, played):
        if episode.end != "internal":
            rows.append(episode_row(tasks.load(jobs[i][0]), episode, jobs[i][1]))
    return [row for part in dist.gather_objects(rows) for row in part]


def play_expert(names: list[str], cfg: Config, env: Environment) -> list[dict]:
    """The scripted expert on every task, with ideas drawn afresh: what imitation alone could reach."""

    def one(job):
        name, k = job
        task = tasks.load(name)
        rng = np.random.default_rng([cfg.seed, 6, k, *name.encode()])
        expert = ScriptedExpert(task, draw_ideas(task, rng), cfg.agent)
        episode, outcome = Episode(initial_state(task, env)), None
        while not episode.end:
            step = transition(episode.state, expert.reply(episode.state, outcome), env)
            episode.add(step, cfg.max_steps, cfg.max_minutes)
            outcome = step.outcome
        return episode_row(task, episode, k) if episode.end != "internal" else None

    jobs = [(name, k) for name in names for k in range(cfg.episodes)]
    with ThreadPoolExecutor(4 * env.workers) as threads:
        return [row for row in threads.map(one, jobs) if row]


def best_single_idea(name: str, env: Environment, cfg: Config) -> dict:
    """Every idea alone on the starter: the one that is best on the reward half, scored on the eval half."""
    task = tasks.load(name)
    script = cfg.agent.script
    source = task.sources()[script]
    part = counted(task, "eval")
    best = {"idea": None, "reward": task.initial_score["reward"], "score": task.initial_score[part]}
    ideas = task.ideas()
    files = [{**task.sources(), script: tasks.apply_block(source, i.block, i.code)} for i in ideas]
    with ThreadPoolExecutor(4 * env.workers) as threads:
        runs = list(threads.map(lambda f: env.experiment(task, f, script), files))
    for idea, run in zip(ideas, runs):
        if run.outcome is Outcome.OK_EDIT and task.better(run.scores["reward"], best["reward"]):
            best = {"idea": idea.text, "reward": run.scores["reward"], "score": run.scores[part]}
    return best


def step_rewards(policy: Policy, names: list[str], rows: list[dict], cfg: Config, ctx) -> dict:
    """Mean step reward, edits and valid actions on fresh draws from the pool's edit states of `names`; a
    held-out task has its initial state alone. COLLECTIVE."""
    states = [state_from_row(r) for r in rows if r["task"] in names and r.get("action") == "Edit Script"]
    seen = {state.task for state in states}
    states += [initial_state(tasks.load(name), policy.env) for name in names if name not in seen]
    drawn = np.random.default_rng([cfg.seed, 7]).integers(len(states), size=cfg.draws)
    mine = list(range(ctx.rank, cfg.draws, ctx.world))
    rollouts = policy.rollout_steps([states[drawn[i]] for i in mine], mine, 1, Rng(cfg.seed, 1 << 25))
    rows = [describe(r, reward_of(r, policy.env.part, cfg.reward), policy.env.part) for r in rollouts]
    return summarise([row for part in dist.gather_objects(rows) for row in part])


# ------------------------------------------------------------------------------------------ tables


def mean_error(values: list[float]) -> tuple[float, float]:
    """(mean, standard error of the mean); nan where there are too few values to tell."""
    if not values:
        return float("nan"), float("nan")
    spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(spread)


def summarise_task(task: "tasks.Task", rows: list[dict]) -> dict:
    """avg@k, best@k, gain and Delta of one model on one task."""
    scores = [row["score"] for row in rows]
    best = scores[0] if scores else float("nan")
    for score in scores:
        best = score if task.better(score, best) else best
    part = counted(task, "eval")
    gain, error = mean_error([task.gain(s, part) for s in scores])
    actions = sum(row["actions"] for row in rows)
    return {
        "k": len(rows),
        "avg": mean_error(scores)[0],
        "best": best,
        "gain": gain,
        "gain_se": error,
        "best_gain": task.gain(best, part) if rows else float("nan"),
        "delta": mean_error([task.delta(s, part) for s in scores])[0],
        "valid": sum(row["valid"] for row in rows) / actions if actions else float("nan"),
        "edits": sum(row["edits"] for row in rows) / max(1, len(rows)),
    }


def mean_over_tasks(summaries: list[dict]) -> dict:
    """Mean over tasks; the tasks are fixed, so the error is that of the episodes alone."""
    summaries = [s for s in summaries if s["k"]]  # a task none of whose episodes ran (our own failures)
    if not summaries:
        return {}
    errors = [s["gain_se"] for s in summaries]
    mean = {k: float(np.mean([s[k] for s in summaries])) for k in ("gain", "best_gain", "delta", "valid", "edits")}
    return mean | {"gain_se": float(np.sqrt(np.sum(np.square(errors))) / len(errors))}


def make_results(played: dict[str, list[dict]], ideas: dict, steps: dict, heldin: list, heldout: list) -> dict:
    results = {"heldin": heldin, "heldout": heldout, "models": {}, "best_idea": ideas, "steps": steps}
    for model, rows in played.items():
        per_task = {
            name: summarise_task(tasks.load(name), [r for r in rows if r["task"] == name])
            for name in [*heldin, *heldout]
        }
        results["models"][model] = {
            "tasks": per_task,
            "heldin": mean_over_tasks([per_task[n] for n in heldin]),
            "heldout": mean_over_tasks([per_task[n] for n in heldout]),
        }
    return results


def to_markdown(results: dict, cfg: Config) -> str:
    models = results["models"]
    lines = [f"# {cfg.run}: {cfg.episodes} episodes a task, seed {cfg.seed}", ""]
    lines += ["Normalised gain: 0 is the starter, 1 the best known score; ± standard error over episodes.", ""]
    lines += ["| | held-in gain | held-out gain | held-in Δ | held-out Δ | valid actions | edits an episode |"]
    lines += ["|---|---|---|---|---|---|---|", "| starter | 0 | 0 | 0 | 0 | - | - |"]
    for name, model in models.items():
        a, b = model["heldin"], model["heldout"]
        valid = f"{a['valid']:.1%}" + (f" / {b['valid']:.1%}" if b else "")
        edits = f"{a['edits']:.1f}" + (f" / {b['edits']:.1f}" if b else "")
        held = (f"{b['gain']:+.3f} ± {b['gain_se']:.3f}", f"{b['delta']:+.1%}") if b else ("-", "-")
        lines.append(
            f"| {name} | {a['gain']:+.3f} ± {a['gain_se']:.3f} | {held[0]} | {a['delta']:+.1%} | {held[1]} "
            f"| {valid} | {edits} |"
        )
    if results["best_idea"]:
        cells = []
        for names in (results["heldin"], results["heldout"]):
            scores = [(tasks.load(n), results["best_idea"][n]["score"]) for n in names]
            gains = [task.gain(score, counted(task, "eval")) for task, score in scores]
            cells.append(f"{np.mean(gains):+.3f}" if gains else "-")
        lines.append(f"| best single idea | {cells[0]} | {cells[1]} | | | | 1 |")
    if results["steps"]:
        lines += ["", "One action in states of the pool (held-out tasks: in their initial state):", ""]
        lines += [
            "| | mean reward | valid | edits | reward, held-out | valid | edits |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, parts in results["steps"].items():
            cells = [
                f"{parts[p]['reward']:+.3f} | {parts[p]['valid_share']:.1%} | {parts[p]['edit_share']:.1%}"
                for p in ("heldin", "heldout")
                if p in parts
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for title, names in (("Held-in", results["heldin"]), ("Held-out", results["heldout"])):
        if not names:
            continue
        lines += ["", f"## {title} tasks", ""]
        columns = [f"{m} avg / best | gain" for m in models]
        lines.append("| task | metric | starter | " + " | ".join(columns) + " | best idea |")
        lines.append("|---" * (4 + 2 * len(models)) + "|")
        for name in names:
            task = tasks.load(name)
            arrow = "↓" if task.lower_is_better else "↑"
            cells = [name, f"{task.metric} {arrow}", f"{task.initial_score[counted(task, 'eval')]:.4g}"]
            for model in models.values():
                s = model["tasks"][name]
                cells += [f"{s['avg']:.4g} / {s['best']:.4g}", f"{s['gain']:+.2f} ± {s['gain_se']:.2f}"]
            idea = results["best_idea"].get(name)
            cells.append(f"{idea['score']:.4g} ({idea['idea']})" if idea else "-")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    """Bars of the normalised gain per task, held-in left of held-out."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    names = [*results["heldin"], *results["heldout"]]
    models = results["models"]
    figure, axis = plt.subplots(figsize=(max(7, 0.9 * len(names)), 4.2), constrained_layout=True)
    width = 0.8 / max(1, len(models))
    for m, (model, result) in enumerate(models.items()):
        x = np.arange(len(names)) + (m - (len(models) - 1) / 2) * width
        gains = [result["tasks"][n]["gain"] for n in names]
        errors = [result["tasks"][n]["gain_se"] for n in names]
        axis.bar(x, gains, width, yerr=errors, label=model, error_kw={"linewidth": 0.8})
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    if results["heldout"]:
        axis.axvline(len(results["heldin"]) - 0.5, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axis.set_ylabel("normalised gain (0 starter, 1 best)")
    axis.set_ylim(max(-1.5, axis.get_ylim()[0]), min(1.6, axis.get_ylim()[1]))
    axis.set_title("held-in | held-out" if results["heldout"] else "held-in")
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# -------------------------------------------------------------------------------------------- main


def latest_step(folder: Path) -> Path | None:
    steps = [p for p in folder.glob("step_*") if p.name[5:].isdigit() and (p / "config.json").exists()]
    return max(steps, key=lambda p: int(p.name[5:]), default=None)


def find_models(cfg: Config) -> dict[str, str]:
    """The models to evaluate; raises UserError for one that is not there."""
    root = Path("runs") / cfg.run
    models = dict(cfg.models)
    if not models:
        if (root / "sft" / "config.json").exists():
            models["sft"] = str(root / "sft")
        if step := latest_step(root / "rl"):
            models["rl"] = str(step)
    if not models:
        raise config.UserError(f"{root} holds no model: run train_sft.py and train_rl.py, or set models")
    for name, path in models.items():
        require_checkpoint(path, f"set models.{name} to a checkpoint")
    return models


def main():
    cfg = config.load(Config, "evaluate")
    ctx = dist.init()
    heldin = list(cfg.tasks or tasks.names("micro", "train"))
    heldout = list(tasks.names("micro", "heldout") if cfg.heldout_tasks is None else cfg.heldout_tasks)
    for name in [*heldin, *heldout]:
        task = tasks.load(name)
        task.require_prepared()
        task.scale(counted(task, "eval"))  # a task whose starter was never measured says so here
    direct = cfg.agent.edit_mode == "direct"
    references = direct and all(idea.code for name in [*heldin, *heldout] for idea in tasks.load(name).ideas())
    if not references and (cfg.expert or cfg.best_idea):
        dist.print0("no reference rows: the scripted expert and the best idea need ideas with code and direct edits")
    models = find_models(cfg)
    out = Path("runs") / cfg.run / cfg.out
    out.mkdir(parents=True, exist_ok=True)
    cache = Path("runs") / "cache"
    pool = Path("runs") / cfg.run / "data" / "states.jsonl"
    pool_rows = read_jsonl(pool) if cfg.draws else []
    settings = {k: v for k, v in config.to_dict(cfg).items() if k not in ("models", "sandbox", "out")}
    settings |= {"cpu_s": cfg.sandbox.cpu_s} if cfg.sandbox.cpu_s else {}  # what of a sandbox changes outcomes
    played, steps = {}, {}
    with (
        Environment(cfg.agent, cfg.sandbox, cache, part="eval") as env,
        Environment(cfg.agent, cfg.sandbox, cache, part="reward", coder=env.coder) as training_env,
    ):
        bar = tqdm(models.items(), desc="evaluate", disable=not (ctx.is_main and sys.stderr.isatty()))
        for name, path in bar:
            file = out / f"{name}.json"
            done = json.loads(file.read_text()) if file.exists() else {}
            files = sorted(Path(path).glob("model*.safetensors"))
            weights = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
            if (
                done.get("weights") != weights
                or done.get("path") != path
                or done.get("settings") != json.loads(json.dumps(settings))
            ):
                policy = load_policy(path, env, cfg.sampling, ctx.device, cfg.dtype)
                with torch.no_grad():
                    done = {"path": path, "weights": weights, "settings": settings}
                    done["episodes"] = play_model(policy, [*heldin, *heldout], cfg, ctx)
                    if cfg.draws:
                        policy.env = training_env
                        parts = {"heldin": heldin, "heldout": heldout}
                        done["steps"] = {p: step_rewards(policy, n, pool_rows, cfg, ctx) for p, n in parts.items() if n}
                if ctx.is_main:
                    temporary = file.with_suffix(".tmp")
                    temporary.write_text(json.dumps(done))
                    temporary.replace(file)
            played[name] = done["episodes"]
            if "steps" in done:
                steps[name] = done["steps"]
        if ctx.is_main:
            ideas = {}
            if cfg.expert and references:
                played["expert"] = play_expert([*heldin, *heldout], cfg, env)
            if cfg.best_idea and references:
                ideas = {name: best_single_idea(name, env, cfg) for name in [*heldin, *heldout]}
    if ctx.is_main:
        results = make_results(played, ideas, steps, heldin, heldout)
        (out / "results.json").write_text(json.dumps(results, indent=1))
        table = to_markdown(results, cfg)
        (out / "results.md").write_text(table)
        draw(results, out / "results.png")
        print(table)
        print(f"wrote {out}/results.json, results.md, results.png")
    dist.barrier()
    dist.close()


if __name__ == "__main__":
    config.main(main, user_errors=(tasks.TaskError, PromptTooLong, sandbox.SandboxError))
