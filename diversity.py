"""How diverse edits are: one row for each file of trajectories, file of evaluated episodes, or checkpoint.

    python diversity.py runs/tiny/data/trajectories.jsonl runs/tiny/sft runs/tiny/rl/step_16
    python diversity.py runs/with/sft runs/without/sft samples=300 out=runs/diversity        # .json and .md

Compares, as the paper's Figure 7 does, a sample of the same size from each source: distinct counts grow with it. A
file gives the edits that applied, at whatever step; a checkpoint is asked for actions in the start states of the
tasks, which are not carried out. The agent's configuration comes from the config.yaml beside each source.

ideas            different (task, idea) that the edits carry out, of those drawn for the expert (edits.closest)
verbs, objects   of what an edit says of itself (its instruction, else its Thought): by word lists, see edits.py
names            identifiers in the code that an edit adds and that its script did not have
texts, changes   different (task, what it says of itself), (task, code added); entropy in nats
axes             the block of the script that changes most (micro tasks), else the axis with most words of its own;
                 entropy in nats, ln 3 = 1.10 where data, model and learning are equally frequent
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

import config
import ideas
import sandbox
import tasks
from agent import AgentConfig, PromptTooLong, encode_state
from client import Client
from edits import Edit, added_lines, axis_of, edits_of, new_names, verb_and_object
from environment import Environment, SandboxConfig, initial_state
from records import read_jsonl, require_checkpoint


@dataclass(frozen=True)
class Config:
    seed: int = 0  # of the sample, and of a checkpoint's actions
    samples: int = 100  # edits of each source (paper Figure 7: 100); 0 = all, and then only equal counts compare
    first_edits: bool = False  # of files, only what is done in start states, as a checkpoint's
    out: str = ""  # write OUT.json and OUT.md
    encoder: str = ""  # a sentence encoder: adds the mean pairwise cosine distance of what edits say of themselves
    tasks: tuple[str, ...] = ()  # whose start states a checkpoint acts in; empty = those of its run
    temperature: float = 1.0
    top_p: float = 1.0
    max_batch: int = 64
    agent: AgentConfig = field(default_factory=AgentConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)


def entropy(counts: Counter) -> float:
    """Of the distribution that the counts estimate, in nats."""
    total = sum(counts.values())
    return sum(-n / total * math.log(n / total) for n in counts.values() if n) if total else 0.0


def read_edits(path: Path, cfg: Config) -> tuple[list[Edit], dict]:
    """(edits, what else there is to say) of trajectories.jsonl, or of a JSON file of evaluated episodes."""
    if path.suffix == ".jsonl":
        rows = [row for row in read_jsonl(path) if row.get("copy", 0) == 0]
    else:
        rows = json.loads(path.read_text()).get("episodes")
    if not rows or any("steps" not in row for row in rows):
        raise config.UserError(f"{path} holds no episodes: give a trajectories.jsonl or a file of runs/NAME/eval")
    edits = []
    for row in rows:
        drawn = [idea["text"] for idea in row.get("ideas", ())]
        found = edits_of(row["task"], row["steps"], cfg.agent, drawn)
        edits += [edit for edit in found if edit.step == 0 or not cfg.first_edits]
    actions = sum(1 if cfg.first_edits else len(row["steps"]) for row in rows)
    return edits, {"actions": actions}


def sample_edits(path: Path, cfg: Config, env: Environment) -> tuple[list[Edit], dict]:
    """(edits, what else there is to say) of a checkpoint, in the start states of the tasks.

    Actions are drawn until there are cfg.samples edits, but no more than about four times as many.
    """
    from generate import Rng  # late: they import torch, which files do not need
    from rollout import Sampling, load_policy

    if not cfg.samples:
        raise config.UserError("samples = 0 (all) is for files: say how many actions to draw from a checkpoint")
    policy = load_policy(str(path), env, Sampling(cfg.temperature, cfg.top_p, cfg.max_batch))
    names = cfg.tasks or tuple(tasks.names("micro", "train"))
    prompts = [encode_state(initial_state(tasks.load(n), env), cfg.agent, policy.tokenizer) for n in names]
    edits, drawn = [], 0
    while len(edits) < cfg.samples and drawn < 4 * cfg.samples:
        ids = list(range(drawn, drawn + len(names) * -(-cfg.samples // len(names))))
        rows = [prompts[i % len(names)] for i in ids]
        done = {c.index: c for c in policy.sample(rows, Rng(cfg.seed, 1 << 26), ids)}
        for k, i in enumerate(ids):
            if done[k].finish == "stop":
                edits += edits_of(names[i % len(names)], [{"reply": policy.text(done[k].tokens)}], cfg.agent)
        drawn += len(ids)
    return edits, {"actions": drawn}


def measure(edits: list[Edit], cfg: Config, encoder=None) -> dict:
    """The numbers of one source, over a sample of cfg.samples of its edits."""
    if cfg.samples and len(edits) > cfg.samples:
        picks = np.random.default_rng(cfg.seed).choice(len(edits), cfg.samples, replace=False)
        edits = [edits[i] for i in sorted(picks)]
    pairs = {pair for edit in edits if (pair := verb_and_object(edit.text))}
    axes = Counter(axis_of(edit) or "none" for edit in edits)
    verbs = {verb for verb, _ in pairs}
    written = [edit for edit in edits if edit.after is not None]  # a checkpoint's instructions wait for a coder
    changes = Counter((edit.task, tuple(added_lines(edit))) for edit in written)
    row = {
        "edits": len(edits),
        "ideas": len({(edit.task, edit.idea) for edit in edits if edit.idea}) or None,
        "verbs": len(verbs),
        "objects": len({thing for _, thing in pairs if thing}),
        "objects_per_verb": len(pairs) / len(verbs) if verbs else 0.0,
        "names": len(set().union(*map(new_names, written))) if written else None,
        "texts": len({(edit.task, ideas.normalised(edit.text)) for edit in edits}),
        "changes": len(changes) if written else None,
        "changes_entropy": entropy(changes) if written else None,
        "axes": {axis: axes[axis] for axis in (*tasks.AXES, "none")},
        "axes_entropy": entropy(Counter({axis: axes[axis] for axis in tasks.AXES})),
    }
    if encoder:
        vectors = encoder([edit.text for edit in edits])
        row["distance"] = ideas.mean_pairwise(ideas.distances(vectors, vectors, "cosine"))
    return row


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    columns = ["actions", "edits", "ideas", "verbs", "objects", "objects_per_verb", "names", "texts", "changes"]
    columns += ["changes_entropy", "axes_entropy", *(["distance"] if "distance" in rows[0] else [])]
    heads = [*(c.replace("_", " ") for c in columns), *tasks.AXES]
    lines = [f"| source | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [row[c] for c in columns] + [row["axes"][axis] for axis in tasks.AXES]
        shown = ["-" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells]
        lines.append(f"| {row['source']} | {' | '.join(shown)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ main


def settings_beside(path: Path) -> Iterator[str]:
    """`key=value` of the configuration that a source was made with: its agent's, its run's tasks and sandbox."""
    if path.suffix == ".json" and path.is_file():  # evaluated episodes hold their own
        settings = json.loads(path.read_text()).get("settings", {})
        yield f"agent={json.dumps(settings.get('agent', {}))}"
        return
    for key, candidates in {
        "agent": [folder / "config.yaml" for folder in (path, *list(path.parents)[:2])],
        "tasks": [folder / "data" / "config.yaml" for folder in (path, *list(path.parents)[:3])],
        "sandbox": [folder / "data" / "config.yaml" for folder in (path, *list(path.parents)[:3])],
    }.items():
        for candidate in candidates:
            values = yaml.safe_load(candidate.read_text()) if candidate.is_file() else {}
            if values.get(key):
                yield f"{key}={json.dumps(values[key])}"
                break


def main():
    argv = sys.argv[1:]
    if "-h" in argv or "--help" in argv:
        config.load(Config, "diversity", ["--help"])
    after_config = {i + 1 for i, arg in enumerate(argv) if arg == "--config"}
    paths = [a for i, a in enumerate(argv) if "=" not in a and not a.startswith("-") and i not in after_config]
    options = [a for a in argv if a not in paths]
    if not paths:
        raise config.UserError("give files of trajectories or episodes, or checkpoints: python diversity.py PATH...")
    rows, encoder = [], None
    for path in map(Path, paths):
        beside = () if after_config else settings_beside(path)
        cfg = config.load(Config, "diversity", [*beside, *options])
        encoder = encoder or (ideas.Encoder(cfg.encoder) if cfg.encoder else None)
        if path.is_dir():
            require_checkpoint(str(path), "give a checkpoint, or a file of trajectories or episodes")
            # Nothing is carried out: a coder is named, but need not be there.
            coder = Client(cfg.agent.coder) if cfg.agent.coder else None
            with Environment(cfg.agent, cfg.sandbox, Path("runs") / "cache", coder=coder) as env:
                edits, more = sample_edits(path, cfg, env)
        elif path.is_file():
            edits, more = read_edits(path, cfg)
        else:
            raise config.UserError(f"{path} does not exist")
        rows.append({"source": str(path)} | more | measure(edits, cfg, encoder))
    print(table(rows))
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{cfg.out}.json").write_text(json.dumps(rows, indent=1))
        Path(f"{cfg.out}.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    config.main(main, user_errors=(tasks.TaskError, sandbox.SandboxError, PromptTooLong))
