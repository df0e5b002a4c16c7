"""Exploration-enriched fine-tuning (paper 4.1): the expert's actions, learned by maximum likelihood.

    python train_sft.py --config configs/tiny.yaml                              # CPU, a few minutes
    torchrun --nproc-per-node 8 train_sft.py --config configs/qwen2.5-7b.yaml   # the paper's setting

Reads runs/NAME/data/trajectories.jsonl, writes runs/NAME/sft/ (a Hugging Face checkpoint). One training example
is one (state, action): the prompt is rendered for that state exactly as RL and evaluation render it, and the
loss counts the agent's tokens, the end-of-turn token included, each with the same weight over the global batch.

    L = - sum_i w_i log pi(token_i) / sum_i w_i        w = 1 on the action's tokens, prompt_weight on the prompt's

Without `model.path` a small decoder and a BPE tokenizer are made first, for machines without a pretrained
model. Differs from the paper (one example per conversation): the prompt is re-rendered per state, so the action
is predicted from exactly what acting would show.
"""

import math
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import config
import dist
import tasks
from agent import AgentConfig, PromptTooLong, encode_state, encode_text, end_token, render
from filters import Filters, keep_steps
from model import ModelConfig
from records import append_rows, claim, read_jsonl, require_checkpoint, states_of, truncate_log
from weights import build_model, load_model, load_tokenizer, save_model, train_tokenizer


@dataclass(frozen=True)
class ModelSpec:
    path: str = ""  # a Hugging Face directory or hub id to start from; empty = from scratch
    vocab_size: int = 1024  # from scratch: tokens of the BPE that is trained on the trajectories
    layers: int = 4  # from scratch: decoder blocks
    width: int = 128  # from scratch: hidden size; the MLP is 3 times as wide
    heads: int = 4  # from scratch: attention heads
    max_positions: int = 2048  # from scratch: the longest sequence


@dataclass(frozen=True)
class Config:
    run: str  # reads runs/RUN/data, writes runs/RUN/sft
    seed: int = 0
    model: ModelSpec = field(default_factory=ModelSpec)
    agent: AgentConfig = field(default_factory=AgentConfig)
    filters: Filters = field(default_factory=Filters)  # which of the expert's actions to learn from
    epochs: float = 2.0  # passes over the examples (paper C.1)
    max_updates: int = 0  # stop after this many updates; 0 = when the epochs are over
    batch_size: int = 64  # examples in one update, over all ranks (paper C.1)
    micro_batch_tokens: int = 16384  # padded tokens in one forward pass; changes memory and speed alone
    lr: float = 2e-5  # paper C.1; a model from scratch wants about 3e-3
    warmup: float = 0.0  # share of the updates with a rising learning rate
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    prompt_weight: float = 0.0  # weight of the prompt's tokens; about 0.1 helps a model from scratch
    heldout: float = 0.05  # share of the trajectories kept for the held-out loss, by trajectory
    eval_every: int = 200  # updates between held-out losses
    save_every: int = 200  # updates between checkpoints
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of compute: bf16 on GPUs; master weights are fp32
    checkpoint_blocks: bool = False  # recompute activations in the backward pass: less memory, slower

    def __post_init__(self):
        for key in ("batch_size", "micro_batch_tokens", "eval_every", "save_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be positive")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout = {self.heldout}: a share of the trajectories, below 1")


# Keys that may differ between a run and its continuation; no coder speaks in fine-tuning.
MAY_CHANGE = ("micro_batch_tokens", "save_every", "eval_every", "checkpoint_blocks", "agent.coder")


# ---------------------------------------------------------------------------------------------- data


def heldout_indices(rows: list[dict], cfg: Config) -> set[int]:
    """The trajectories that training does not see, each with all its renamed copies: states of one episode are
    nearly the same text."""
    indices = np.random.default_rng([cfg.seed, 1]).permutation(sorted({row["index"] for row in rows}))
    return set(indices[: round(cfg.heldout * len(indices))].tolist())


Chosen = list[tuple[dict, list[int]]]  # trajectory rows, each with the steps to learn from


def make_examples(chosen: Chosen, cfg: Config, tokenizer) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, reply ids with the token that ends a turn) for every action to learn from."""
    examples, end, too_long = [], end_token(tokenizer), 0
    for row, steps in tqdm(chosen, desc="tokenise", disable=not sys.stderr.isatty()):
        states = states_of(row)
        for t in steps:
            try:
                prompt = encode_state(states[t], cfg.agent, tokenizer)
            except PromptTooLong as error:
                too_long, reason = too_long + 1, error
                continue
            examples.append((prompt, [*encode_text(row["steps"][t]["reply"], tokenizer), end]))
    if too_long:
        dist.print0(f"{too_long} actions left out, whose prompt is too long ({reason})")
    kept = [e for e in examples if len(e[1]) <= cfg.agent.max_new_tokens]
    if len(kept) < len(examples):
        dist.print0(
            f"{len(examples) - len(kept)} of {len(examples)} examples left out: their reply is longer than "
            f"agent.max_new_tokens = {cfg.agent.max_new_tokens} and could not be sampled"
        )
    return kept


def texts_of(chosen: Chosen, cfg: Config):
    """What the tokenizer of a model from scratch is trained on: every prompt's and reply's text."""
    for row, steps in chosen:
        states = states_of(row)
        for t in steps:
            yield "\n".join(m["content"] for m in render(states[t], cfg.agent))
            yield row["steps"][t]["reply"]


def micro_batches(examples: list, limit: int) -> list[list]:
    """Consecutive examples, longest first, in groups of at most `limit` padded tokens."""
    groups: list[list] = []
    for example in sorted(examples, key=lambda e: -len(e[0]) - len(e[1])):
        longest = len(groups[-1][0][0]) + len(groups[-1][0][1]) if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= limit:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def equal_groups(mine: list, dummy, cfg: Config) -> list[tuple[list, float]]:
    """(micro-batch, 1.0) for this rank's examples, then (dummy, 0.0) until every rank has as many. COLLECTIVE.

    Under FSDP each forward is a collective, so all ranks must make the same number of them.
    """
    groups = micro_batches(mine, cfg.micro_batch_tokens)
    most = int(dist.all_reduce_max(torch.tensor(len(groups))))
    return [(g, 1.0) for g in groups] + [([dummy], 0.0)] * (most - len(groups))


def collate(group: list, prompt_weight: float, pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [B, L] and weights [B, L-1]: weights[:, t] is the weight of predicting tokens[:, t+1]."""
    length = max(len(p) + len(r) for p, r in group)
    tokens = torch.full((len(group), length), pad)
    weights = torch.zeros(len(group), length - 1)
    for i, (prompt, reply) in enumerate(group):
        end = len(prompt) + len(reply)
        tokens[i, :end] = torch.tensor(prompt + reply)
        weights[i, : len(prompt) - 1] = prompt_weight
        weights[i, len(prompt) - 1 : end - 1] = 1.0
    return tokens.to(device), weights.to(device)


def weight_of(examples: list, prompt_weight: float) -> float:
    return sum(len(r) + prompt_weight * (len(p) - 1) for p, r in examples)


def batch_loss(model, group: list, prompt_weight: float, pad: int, device) -> torch.Tensor:
    """Sum over the group's tokens of -weight * log-probability: the caller divides by the global weight."""
    tokens, weights = collate(group, prompt_weight, pad, device)
    positions = torch.arange(tokens.shape[1] - 1, device=device).expand(len(group), -1)
    logprobs, _ = model(tokens, source_pos=positions, targets=tokens[:, 1:], target_mask=weights > 0)
    return -(logprobs * weights).sum()


def heldout_loss(model, examples: list, cfg: Config, pad: int, ctx) -> float:
    """Mean loss per action token on trajectories that training does not see. COLLECTIVE."""
    total = torch.zeros((), dtype=torch.float64, device=ctx.device)
    with torch.no_grad():
        for group, real in equal_groups(examples[ctx.rank :: ctx.world], examples[0], cfg):
            total += real * batch_loss(model, group, 0.0, pad, ctx.device).double()
    return (dist.all_reduce_sum(total) / weight_of(examples, 0.0)).item()


def learning_rate(update: int, total: int, cfg: Config) -> float:
    """Linear warm-up, then a cosine from cfg.lr to 0 (paper's launcher: cosine, no warm-up)."""
    warm = cfg.warmup * total
    if update < warm:
        return cfg.lr * (update + 1) / (warm + 1)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, total - warm)))


# ---------------------------------------------------------------------------------------------- main


def starting_model(cfg: Config, chosen: Chosen, ctx):
    """(model, tokenizer): pretrained weights, or a small decoder and tokenizer made for these trajectories.

    COLLECTIVE."""

    def shard(model):
        return dist.shard(model, dist.compute_dtype(cfg.dtype, ctx))

    if cfg.model.path:
        require_checkpoint(cfg.model.path, "give a Hugging Face directory or hub id as model.path")
        tokenizer = load_tokenizer(cfg.model.path)
        model = load_model(cfg.model.path, torch.float32, ctx.device, shard)
        ends = dict.fromkeys([end_token(tokenizer), *model.config.eos_ids])
        model.config = replace(model.config, eos_ids=tuple(ends))  # whoever serves the checkpoint must stop there
        return model, tokenizer
    spec = cfg.model
    tokenizer = train_tokenizer(texts_of(chosen, cfg), spec.vocab_size)
    shape = ModelConfig(
        family="llama",  # transformers keeps our tokenizer as it is for llama; for qwen2 it splits words its own way
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        intermediate_size=3 * spec.width,
        num_layers=spec.layers,
        num_heads=spec.heads,
        num_kv_heads=spec.heads,
        head_dim=spec.width // spec.heads,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=True,
        eos_ids=(tokenizer.eos_token_id,),
    )
    return shard(build_model(shape, cfg.seed).to(ctx.device)), tokenizer


def main():
    cfg = config.load(Config, "train_sft")
    ctx = dist.init()
    data = Path("runs") / cfg.run / "data" / "trajectories.jsonl"
    out = Path("runs") / cfg.run / "sft"
    share = cfg.batch_size // ctx.world
    if share * ctx.world != cfg.batch_size:
        raise config.UserError(f"batch_size = {cfg.batch_size} must be a multiple of {ctx.world} ranks")
    rows = sorted(read_jsonl(data), key=lambda row: (row["index"], row["copy"]))  # collect writes them as they end
    if not rows:
        raise config.UserError(f"{data} is empty: run collect.py first")
    if ctx.is_main:
        claim(out, cfg, ignore=MAY_CHANGE)
    dist.barrier()
    if (out / "config.json").exists():  # written last
        dist.print0(f"{out} is finished already; remove it to train again")
        dist.close()
        return

    held = heldout_indices(rows, cfg)
    kept, dropped = keep_steps(rows, cfg.filters, cfg.agent, cfg.seed)
    chosen = list(zip(rows, kept))
    actions = sum(len(row["steps"]) for row in rows)
    report = ", ".join(f"{name} {count}" for name, count in dropped.items())
    dist.print0(f"{sum(map(len, kept))} of {actions} actions to learn from; left out by filters: {report}")
    if not any(kept):
        raise config.UserError("train_sft.filters leave nothing to learn from")
    with config.user_error():
        model, tokenizer = starting_model(cfg, chosen, ctx)
    model.valid_vocab = len(tokenizer)
    model.checkpoint_blocks = cfg.checkpoint_blocks
    train = make_examples([(r, s) for r, s in chosen if r["index"] not in held], cfg, tokenizer)
    valid = make_examples([(r, s) for r, s in chosen if r["index"] in held and r["copy"] == 0], cfg, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    per_epoch = len(train) // cfg.batch_size
    if per_epoch == 0:
        raise config.UserError(
            f"{len(train)} examples are fewer than batch_size = {cfg.batch_size}: collect more, lower it, or raise "
            "agent.max_prompt_tokens and max_new_tokens"
        )
    updates = math.ceil(cfg.epochs * per_epoch)
    updates = min(updates, cfg.max_updates) if cfg.max_updates else updates

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=cfg.weight_decay
    )
    start = 0
    latest = dist.find_latest(out)
    if latest:
        start = dist.load_checkpoint(latest, {"model": model}, {"adam": optimizer})["update"]
        dist.print0(f"resumed {latest}")
    if ctx.is_main:
        truncate_log(out / "metrics.jsonl", start, key="update")
    parameters = sum(p.numel() for p in model.parameters())
    lengths = [len(p) + len(r) for p, r in train]
    dist.print0(
        f"{parameters / 1e6:.2f}M parameters, vocabulary {len(tokenizer)}; {len(train)} examples (mean "
        f"{np.mean(lengths):.0f}, longest {max(lengths)} tokens), {len(valid)} held out; {updates} updates"
    )

    def save(update: int, log: list[dict]):
        """COLLECTIVE. A checkpoint to resume from; the one before it is removed."""
        if ctx.is_main and log:
            append_rows(out / "metrics.jsonl", log)
        log.clear()
        path = out / f"step_{update}"
        dist.save_checkpoint(path, {"model": model}, {"adam": optimizer}, {"update": update})
        if ctx.is_main:
            remove_checkpoints(out, keep=path)

    log: list[dict] = []
    bar = tqdm(total=updates, initial=start, desc="sft", disable=not sys.stderr.isatty())
    with dist.graceful_stop() as stop_requested:
        for update in range(start, updates):
            began = time.perf_counter()
            epoch, position = divmod(update, per_epoch)
            order = np.random.default_rng([cfg.seed, 2, epoch]).permutation(len(train))
            batch = [train[i] for i in order[position * cfg.batch_size : (position + 1) * cfg.batch_size]]
            denominator = weight_of(batch, cfg.prompt_weight)
            mine = batch[ctx.rank * share : (ctx.rank + 1) * share]
            total = torch.zeros((), device=ctx.device)
            for group, real in equal_groups(mine, train[0], cfg):
                loss = real * batch_loss(model, group, cfg.prompt_weight, pad, ctx.device) / denominator
                loss.backward()
                total += loss.detach()
            norm = dist.clip_grad_norm(model.parameters(), cfg.grad_clip)
            rate = learning_rate(update, updates, cfg)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row = {"update": update + 1, "loss": dist.all_reduce_sum(total).item(), "lr": rate}
            row |= {"grad_norm": norm, "seconds": time.perf_counter() - began}
            if valid and ((update + 1) % cfg.eval_every == 0 or update + 1 == updates):
                row["heldout_loss"] = heldout_loss(model, valid, cfg, pad, ctx)
                dist.print0(
                    f"update {update + 1}/{updates} loss {row['loss']:.3f} "
                    f"held-out {row['heldout_loss']:.3f} lr {rate:.2e} {row['seconds']:.2f} s"
                )
            log.append(row)
            bar.update()
            if signum := stop_requested():
                save(update + 1, log)
                dist.close()
                sys.exit(128 + signum)
            if (update + 1) % cfg.save_every == 0 and update + 1 < updates:
                save(update + 1, log)
    bar.close()
    if ctx.is_main and log:
        append_rows(out / "metrics.jsonl", log)
    state = dist.full_state_dict(model)
    if ctx.is_main:
        save_model(model, out, state_dict=state, tokenizer=tokenizer)
        remove_checkpoints(out)
    dist.barrier()
    dist.print0(f"wrote {out}")
    dist.close()


def remove_checkpoints(folder: Path, keep: Path | None = None) -> None:
    for path in folder.glob("step_*"):
        if path != keep:
            shutil.rmtree(path)


if __name__ == "__main__":
    config.main(main, user_errors=(tasks.TaskError, PromptTooLong, dist.CheckpointError))
