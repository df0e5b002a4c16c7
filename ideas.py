"""Idea pools (paper 4.1, B.1): an LLM proposes many ideas a task, a compact and diverse subset of them is kept.

    python collect.py ideas --config configs/X.yaml        # writes runs/NAME/ideas/
        <task>.jsonl    the pool: one line a request, with the ideas it added and those it repeated; append-only
        <task>.yaml     the subset, in the form of tasks/<task>/ideas.yaml; what collect.py draws from
        report.json     how diverse pool, subset, and random subsets of the same size are

Ideas are embedded by a sentence encoder (mean of the last hidden states, normalised). What lies closer to an idea
of the pool than `same` is the same idea. Two ways to choose the subset:

    fps              paper v2, farthest-point sampling: start with the idea of the largest mean distance, then always
                     add the one whose nearest chosen idea is farthest away
    mean_distance    paper v1: the ideas with the largest mean distance to all others

Embeddings are normalised, so that |a - b|^2 = 2 (1 - cos): cosine and euclidean distance order pairs alike, and differ
in means alone.
"""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

import config
import tasks
from client import ChatError, Client, without_thinking
from records import append_rows, claim, read_jsonl
from spend import Progress, connect, how_to_go_on, tokens_of, unaccounted

STALLED = 4  # requests in a row without a new idea: the axis is exhausted
ASK_AGAIN = 2  # more attempts after a reply that is no list of ideas
MAX_IDEA_CHARS = 400
RANDOM_SUBSETS = 500  # for the comparison

AXES = {
    "data": "the data: how they are cleaned, selected, split, represented, transformed or augmented before the model",
    "model": "the model: its kind, architecture, size, components and regularisation, or a combination of models",
    "learning": "the learning: loss, optimiser, learning rate and its schedule, length of training, validation and "
    "stopping, and how predictions are made from the trained model",
}
assert tuple(AXES) == tasks.AXES

ASK = """\
An engineer improves the score of a machine-learning script by experiments. The task:

{description}

The script at the start:
```python
{script}
```

Propose {count} ideas that change {axis}. Each idea is one sentence of at most 40 words that says what to do, \
concretely enough for one edit of the script. The ideas differ in kind, not in a number alone; some are obvious, \
some are unusual and may fail. No new packages, no downloads, no other data.
{known}
Reply with a JSON list of {count} strings and nothing else."""


@dataclass(frozen=True)
class PoolConfig:
    size: int = 100  # ideas in a task's pool, over its axes (paper B.3: at least 100)
    per_request: int = 10  # ideas asked for at once
    max_requests: int = 60  # for one task; whatever the pool holds then is used
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"  # a directory or hub id of a sentence encoder
    distance: Literal["cosine", "euclidean"] = "cosine"
    same: float = 0.1  # ideas at most this far apart are one idea (cosine 0.1 is euclidean 0.45)
    method: Literal["fps", "mean_distance"] = "fps"  # how the subset is chosen: paper v2 | v1
    by_axis: bool = True  # choose, and draw, within each axis (paper v2), or from the whole pool of a task (v1)
    keep: int = 10  # ideas that are chosen, of each axis or of the whole pool (paper v1: 10; v2 does not say)

    def __post_init__(self):
        for name in ("size", "per_request", "max_requests", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"pool.{name} = {getattr(self, name)} must be positive")
        if self.same < 0:
            raise ValueError(f"pool.same = {self.same} must not be negative")


@dataclass(frozen=True)
class PoolClaim:
    """What a directory of pools belongs to."""

    model: str  # of the endpoint
    pool: PoolConfig


# What may change between runs: how long to ask, and how to choose from what there is.
MAY_CHANGE = ("pool.size", "pool.max_requests", "pool.method", "pool.by_axis", "pool.keep")


# ---------------------------------------------------------------------------- distances and selection


class Encoder:
    """A sentence encoder of the transformers library: mean-pooled, normalised, fp32. Thread-safe.

    Raises config.UserError when there is no encoder at `path`.
    """

    def __init__(self, path: str, batch: int = 64):
        import torch  # late: drawing from a pool needs neither
        from transformers import AutoModel, AutoTokenizer

        self.torch, self.batch, self.lock = torch, batch, threading.Lock()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModel.from_pretrained(path, dtype=torch.float32).to(self.device).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise config.UserError(f"no sentence encoder at {path!r} ({reason}): give a directory or hub id") from None
        self.width = self.model.config.hidden_size
        self.limit = min(512, self.model.config.max_position_embeddings)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [n, width], float32."""
        torch, vectors = self.torch, []
        with self.lock, torch.no_grad():
            for i in range(0, len(texts), self.batch):
                rows = self.tokenizer(
                    texts[i : i + self.batch], padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
                ).to(self.device)
                mask = rows["attention_mask"].unsqueeze(-1)
                mean = (self.model(**rows).last_hidden_state * mask).sum(1) / mask.sum(1)
                vectors.append(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
        return np.concatenate(vectors) if vectors else np.zeros((0, self.width), np.float32)


def distances(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """[n, m] distances of unit vectors a [n, D] and b [m, D], rounded to 1e-6: ties are ties on every machine."""
    cosine = np.clip(a.astype(np.float64) @ b.astype(np.float64).T, -1, 1)
    return np.round(1 - cosine if kind == "cosine" else np.sqrt(2 - 2 * cosine), 6)


def mean_to_others(d: np.ndarray) -> np.ndarray:
    """[n] mean distance of each of n points to the others; d [n, n]."""
    return np.round((d.sum(1) - d.diagonal()) / max(1, len(d) - 1), 6)


def farthest_points(d: np.ndarray, k: int) -> list[int]:
    """k of n points by farthest-point sampling, in the order of choice; d [n, n]. Ties: the lowest index.

    The first is the point with the largest mean distance to the others.
    """
    chosen = [int(mean_to_others(d).argmax())]
    nearest = d[chosen[0]].copy()  # of every point: how far its nearest chosen point is
    while len(chosen) < min(k, len(d)):
        nearest[chosen] = -1  # never chosen twice, even where points coincide
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, d[chosen[-1]])
    return chosen


def largest_means(d: np.ndarray, k: int) -> list[int]:
    """The k points with the largest mean distance to all others, largest first. Ties: the lowest index."""
    return np.argsort(-mean_to_others(d), kind="stable")[:k].tolist()


def mean_pairwise(d: np.ndarray) -> float:
    """Mean distance over all pairs of the points; 0 for fewer than two."""
    return float(d[np.triu_indices(len(d), 1)].mean()) if len(d) > 1 else 0.0


def random_subsets(d: np.ndarray, k: int, rng: np.random.Generator, count: int = RANDOM_SUBSETS) -> tuple[float, float]:
    """Mean and standard deviation of `mean_pairwise` over random subsets of k points."""
    picks = [rng.choice(len(d), min(k, len(d)), replace=False) for _ in range(count)]
    values = [mean_pairwise(d[np.ix_(pick, pick)]) for pick in picks]
    return float(np.mean(values)), float(np.std(values))


def choose(d: np.ndarray, axes: list[str], cfg: PoolConfig) -> list[int]:
    """The subset of a pool whose ideas have the distances d [n, n] and these axes: indices, axis by axis."""
    select = farthest_points if cfg.method == "fps" else largest_means
    if not cfg.by_axis:
        return select(d, cfg.keep)
    groups = [[i for i, a in enumerate(axes) if a == axis] for axis in AXES]
    return [group[i] for group in groups if group for i in select(d[np.ix_(group, group)], cfg.keep)]


# --------------------------------------------------------------------------------------- asking for ideas


def request(task: "tasks.Task", axis: str, count: int, known: list[str]) -> str:
    """The prompt for `count` more ideas of an axis. The pool so far stands in it, not to be repeated."""
    listed = "".join(f"\n- {text}" for text in known)
    return ASK.format(
        description=task.description.strip(),
        script=task.sources()["train.py"].rstrip("\n"),
        count=count,
        axis=AXES[axis],
        known=f"\nThese are known already; propose others:{listed}\n" if known else "",
    )


def parse_ideas(reply: str) -> list[str]:
    """The ideas in a reply that is a JSON list of sentences, in a block or not.

    Raises ValueError with what is wrong, for whoever wrote it.
    """
    text = re.sub(r"\A```(?:json)?\s*\n(.*)\n```\Z", r"\1", reply.strip(), flags=re.DOTALL)
    try:
        ideas = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(ideas, list) or not ideas or not all(isinstance(idea, str) for idea in ideas):
        raise ValueError("it is not a list of strings")
    ideas = [" ".join(idea.split()) for idea in ideas]
    for idea in ideas:
        if len(idea.split()) < 2 or len(idea) > MAX_IDEA_CHARS:
            raise ValueError(f"an idea is one sentence of at most {MAX_IDEA_CHARS} characters, not {idea[:60]!r}")
    return ideas


def normalised(text: str) -> str:
    """What makes two texts the same idea at once: the words, without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


class Pool:
    """One task's pool in the making, on disk: every request is a line of <task>.jsonl, so that a killed run
    goes on after its last answered request."""

    def __init__(self, task: "tasks.Task", path: Path, encoder: Encoder, cfg: PoolConfig):
        self.task, self.path, self.encoder, self.cfg = task, path, encoder, cfg
        self.rows = read_jsonl(path, repair=True) if path.exists() else []
        self.ideas = [(row["axis"], text) for row in self.rows for text in row["ideas"]]
        self.seen = {normalised(text) for _, text in self.ideas}
        self.vectors = encoder([text for _, text in self.ideas])

    def texts(self, axis: str) -> list[str]:
        return [text for a, text in self.ideas if a == axis]

    def exhausted(self, axis: str) -> bool:
        last = [row for row in self.rows if row["axis"] == axis][-STALLED:]
        return len(last) == STALLED and not any(row["ideas"] for row in last)

    def next_axis(self) -> str | None:
        """The axis with the fewest ideas that is neither full nor exhausted; None when there is none."""
        full = -(-self.cfg.size // len(AXES))
        left = [axis for axis in AXES if len(self.texts(axis)) < full and not self.exhausted(axis)]
        if not left or len(self.rows) >= self.cfg.max_requests:
            return None
        return min(left, key=lambda axis: len(self.texts(axis)))

    def add(self, axis: str, proposed: list[str], spent: dict) -> list[str]:
        """Put the new ones among the proposed ideas into the pool; returns them.

        An idea is new when neither its words nor its meaning (embedding) are in the task's pool, on any axis.
        """
        new, vectors = [], self.encoder(proposed)
        for text, vector in zip(proposed, vectors):
            near = distances(vector[None], self.vectors, self.cfg.distance)
            if normalised(text) in self.seen or (near <= self.cfg.same).any():
                continue
            new.append(text)
            self.seen.add(normalised(text))
            self.vectors = np.concatenate([self.vectors, vector[None]])
        self.ideas += [(axis, text) for text in new]
        row = {"task": self.task.name, "axis": axis, "ideas": new} | spent
        self.rows.append(row | {"repeated": [text for text in proposed if text not in new]})
        append_rows(self.path, self.rows[-1:])
        return new


def ask(client: Client, prompt: str) -> tuple[list[str], dict]:
    """(ideas, what they cost) of one request; a reply that is no list of ideas is asked for again, with the reason.

    Raises client.ChatError.
    """
    messages, spent = [{"role": "user", "content": prompt}], {"prompt_tokens": 0, "completion_tokens": 0}
    failures = []
    for _ in range(1 + ASK_AGAIN):
        reply = client.chat(messages)
        spent["prompt_tokens"] += reply.prompt_tokens
        spent["completion_tokens"] += reply.completion_tokens
        try:
            if reply.finish == "length":
                raise ValueError("it was cut off: propose fewer or shorter ideas")
            return parse_ideas(without_thinking(reply.text)), spent | {"failures": failures}
        except ValueError as error:
            failures.append(str(error))
            again = (
                f"Your reply cannot be used: {error}. Reply once more, with a JSON list of strings and nothing else."
            )
            messages = [*messages, {"role": "assistant", "content": reply.text}, {"role": "user", "content": again}]
    return [], spent | {"failures": failures}


def fill(pool: Pool, client: Client, told=lambda new: None) -> None:
    """Ask until the pool is full, every axis exhausted, or max_requests spent. Raises client.ChatError."""
    while axis := pool.next_axis():
        count = pool.cfg.per_request
        proposed, spent = ask(client, request(pool.task, axis, count, pool.texts(axis)))
        told(len(pool.add(axis, proposed, spent)))


# ------------------------------------------------------------------------------------------- subsets


def write_subset(pool: Pool, folder: Path) -> list[int]:
    """<task>.yaml with the chosen ideas of a pool; returns their indices in it."""
    d = distances(pool.vectors, pool.vectors, pool.cfg.distance)
    chosen = choose(d, [axis for axis, _ in pool.ideas], pool.cfg)
    document = {"ideas": [{"axis": axis, "text": text} for axis, text in (pool.ideas[i] for i in chosen)]}
    path = folder / f"{pool.task.name}.yaml"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1000), "utf-8")
    temporary.replace(path)
    return chosen


def spread(pool: Pool, chosen: list[int], seed: int) -> list[dict]:
    """Mean pairwise distance of the pool, of the chosen subset, and of random subsets of its size, by axis
    (or for the whole pool, axis "all", where the subset was chosen from it)."""
    rows = []
    for number, axis in enumerate(AXES if pool.cfg.by_axis else ("all",)):
        members = [i for i, (a, _) in enumerate(pool.ideas) if axis in (a, "all")]
        subset = [i for i in chosen if i in set(members)]
        d = distances(pool.vectors[members], pool.vectors[members], pool.cfg.distance)
        inner = distances(pool.vectors[subset], pool.vectors[subset], pool.cfg.distance)
        rng = np.random.default_rng([seed, number, *pool.task.name.encode()])
        mean, sd = random_subsets(d, len(subset), rng)
        row = {"task": pool.task.name, "axis": axis, "pool": len(members), "subset": len(subset)}
        row |= {"pool_distance": mean_pairwise(d), "subset_distance": mean_pairwise(inner)}
        rows.append(row | {"random_distance": mean, "random_sd": sd})
    return rows


def load_subset(folder: Path, task: "tasks.Task") -> list["tasks.Idea"]:
    """The ideas that `collect.py ideas` chose for a task: texts, without code.

    Raises config.UserError when there are none.
    """
    path = folder / f"{task.name}.yaml"
    if not path.exists():
        raise config.UserError(f"{path} does not exist: run `python collect.py ideas` first, or set ideas_from = task")
    entries = yaml.safe_load(path.read_text("utf-8"))["ideas"]
    return [tasks.Idea(entry["axis"], entry["text"], None, None, None) for entry in entries]


# -------------------------------------------------------------------------------------- the command


def fill_all(pools: list[Pool], client: Client, told) -> None:
    """Fill the pools of several tasks, each on its own thread; `told(n)` hears of n new ideas.

    Raises the first client.ChatError, when what was under way has been written.
    """
    with ThreadPoolExecutor(len(pools)) as threads:
        futures = [threads.submit(fill, pool, client, told) for pool in pools]
        try:
            wait(futures)
        except BaseException:  # Ctrl-C: what is under way ends now
            client.close()
            raise
    for future in futures:
        future.result()


def table(rows: list[dict], distance: str) -> str:
    """The rows of `spread` as Markdown."""
    lines = [
        f"| task | axis | pool | its mean {distance} distance | chosen | theirs | as many at random |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['task']} | {r['axis']} | {r['pool']} | {r['pool_distance']:.3f} | {r['subset']} "
            f"| {r['subset_distance']:.3f} | {r['random_distance']:.3f} ± {r['random_sd']:.3f} |"
        )
    return "\n".join(lines)


def make(cfg, folder: Path) -> None:
    """`python collect.py ideas`; cfg is collect.Config. Raises config.UserError."""
    if cfg.endpoint is None:
        raise config.UserError("`collect.py ideas` asks an LLM: set collect.endpoint.base_url and endpoint.model")
    names = cfg.tasks or tuple(tasks.names("micro", "train"))
    claim(folder, PoolClaim(cfg.endpoint.model, cfg.pool), ignore=MAY_CHANGE)
    encoder = Encoder(cfg.pool.encoder)
    pools = [Pool(tasks.load(name), folder / f"{name}.jsonl", encoder, cfg.pool) for name in names]
    lost = folder / "lost.jsonl"  # what requests cost that gave no row

    def spent() -> tuple[int, int]:
        """Of all tasks that this directory has seen."""
        return tokens_of([row for path in folder.glob("*.jsonl") for row in read_jsonl(path, repair=True)])

    if any(pool.next_axis() for pool in pools):
        client = connect(cfg.endpoint, spent())
        size = len(AXES) * -(-cfg.pool.size // len(AXES))
        progress = Progress("ideas", size * len(pools), sum(len(pool.ideas) for pool in pools), client)
        try:
            fill_all(pools, client, progress.add)
        except ChatError as error:
            raise config.UserError(f"{error}{how_to_go_on(error)} (all ideas so far are in {folder})") from None
        finally:
            progress.close()
            append_rows(lost, [unaccounted(client, spent())])
    for pool in pools:
        for axis in AXES if pool.ideas else ():
            if len(pool.texts(axis)) < -(-cfg.pool.size // len(AXES)):
                reason = "nothing new came" if pool.exhausted(axis) else f"after {cfg.pool.max_requests} requests"
                print(f"{pool.task.name}: only {len(pool.texts(axis))} ideas on the axis {axis}: {reason}")
    report = [row for pool in pools if pool.ideas for row in spread(pool, write_subset(pool, folder), cfg.seed)]
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    rows = [row for pool in pools for row in pool.rows]
    tokens = spent()
    print(f"\n{table(report, cfg.pool.distance)}\n")
    print(
        f"{sum(len(pool.ideas) for pool in pools)} ideas from {len(rows)} requests, {sum(tokens)} tokens, "
        f"{cfg.endpoint.usd(tokens):.2f} USD; the chosen ones are in {folder}"
    )
    if empty := [pool for pool in pools if not pool.ideas]:
        names = ", ".join(pool.task.name for pool in empty)
        raise config.UserError(f"{names}: no reply held ideas (see {empty[0].path}): try another model")
