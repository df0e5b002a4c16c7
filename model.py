"""Decoder-only language model of the Qwen2/2.5, Qwen3 and Llama families, and a value model on the same trunk.

One file holds all that PPO asks of a model: the forward pass, token logprobs that never hold [tokens, vocabulary]
whole, and rows that share one prompt among several actions. It knows nothing of files (weights.py loads and saves),
nor of parallelism (dist.py shards a model from outside), nor of a KV cache (generate.py hands one in as a function).

    model = weights.load_model("Qwen/Qwen2.5-0.5B-Instruct")             # a directory or a hub id
    hidden = model(tokens)                                               # [B, L, D]
    rows = pack_rows(prompts, actions)                                   # B prompts, n actions each
    logp, entropy = model(rows.tokens, rows.positions, rows.mask,        # [N, T] each, N = B * n
                          source_pos=rows.source_pos, targets=rows.targets, target_mask=rows.target_mask)

Shapes: B rows, L positions in a row, D width, H query heads, G key/value heads, K keys attended to, V vocabulary,
N = B * n actions (action i lies in row i // n), T tokens in the longest action, M selected tokens.

Not covered, and refused by name: other RoPE scalings than Llama-3's, sliding windows in use, mixture of experts,
biases outside q, k and v, quantised weights, dropout.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 2**26  # fp32 logits held at once while scoring tokens: 256 MiB, as much again for gradients

# What tells the families apart; everything else is in config.json.
FAMILIES = {
    "qwen2": {"qkv_bias": True, "qk_norm": False, "architecture": "Qwen2ForCausalLM"},
    "qwen3": {"qkv_bias": False, "qk_norm": True, "architecture": "Qwen3ForCausalLM"},
    "llama": {"qkv_bias": False, "qk_norm": False, "architecture": "LlamaForCausalLM"},
}


# ---------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a model; `from_hf` and `to_hf` translate config.json."""

    family: str  # a key of FAMILIES
    vocab_size: int  # rows of the embedding; the tokenizer may use fewer
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = field(default=None, hash=False)  # None, or Llama-3's {"factor": ...}
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()  # any of them ends a reply

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"model family {self.family!r} is not covered; use one of {', '.join(FAMILIES)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.family]["qkv_bias"]

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.family]["qk_norm"]

    @classmethod
    def from_hf(cls, hf: dict) -> "ModelConfig":
        """Read config.json as transformers 4 spells it (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

        Raises ValueError naming the first feature that this decoder lacks, or the missing key.
        """
        family = hf.get("model_type")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        layers = hf.get("layer_types") or ()
        not_covered = {
            f"model_type {family!r}": family not in FAMILIES,
            f"RoPE scaling {rope_type!r}": rope_type not in ("default", "llama3"),
            "partial_rotary_factor": (rope | hf).get("partial_rotary_factor") not in (None, 1),
            "sliding-window attention": hf.get("use_sliding_window") or "sliding_attention" in layers,
            "mixture of experts": hf.get("num_experts") or hf.get("num_local_experts"),
            f"hidden_act {hf.get('hidden_act')!r}": hf.get("hidden_act", "silu") != "silu",
            "attention_bias": hf.get("attention_bias") and family != "qwen2",  # qwen2's are part of the family
            "mlp_bias": hf.get("mlp_bias"),
            "attention_dropout": hf.get("attention_dropout"),
            "quantization_config": hf.get("quantization_config"),
        }
        for feature in (name for name, present in not_covered.items() if present):
            families = ", ".join(FAMILIES)
            raise ValueError(f"config.json: {feature} is not covered; {families} with plain or llama3 RoPE are")
        try:
            heads = hf["num_attention_heads"]
            eos = hf.get("eos_token_id")
            return cls(
                family=family,
                vocab_size=hf["vocab_size"],
                hidden_size=hf["hidden_size"],
                intermediate_size=hf["intermediate_size"],
                num_layers=hf["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=hf.get("num_key_value_heads") or heads,
                head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
                rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
                rope_scaling={k: rope[k] for k in LLAMA3_KEYS} if rope_type == "llama3" else None,
                rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
                max_position_embeddings=hf.get("max_position_embeddings", 2048),
                tie_word_embeddings=hf.get("tie_word_embeddings", False),
                eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            )
        except KeyError as key:
            raise ValueError(f"config.json: the key {key} is missing") from key

    def to_hf(self) -> dict:
        """The config.json of an equal transformers model, in the spelling that versions 4 and 5 both read."""
        hf = {
            "architectures": [FAMILIES[self.family]["architecture"]],
            "model_type": self.family,
            "hidden_act": "silu",
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "rope_scaling": self.rope_scaling and {"rope_type": "llama3", **self.rope_scaling},
            "eos_token_id": list(self.eos_ids) if len(self.eos_ids) > 1 else next(iter(self.eos_ids), None),
            "bos_token_id": None,
            "pad_token_id": None,
        }
        same = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rope_theta", "rms_norm_eps")
        same += ("max_position_embeddings", "tie_word_embeddings")
        return hf | {key: asdict(self)[key] for key in same}


# ---------------------------------------------------------------------------------------------- layers

LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@lru_cache
def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair of channels, [head_dim / 2], fp32.

    A function and not a buffer: a buffer would be lost between the meta device and `to_empty`, and cast
    with the weights.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is None:
        return frequencies
    # Llama 3: wavelengths beyond the original context are stretched by `factor`, short ones kept, others mixed.
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_KEYS)
    turns = context * frequencies / (2 * math.pi)  # rotations within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / factor


def make_rope(config: ModelConfig, positions: Tensor) -> Callable[[Tensor], Tensor]:
    """positions [B, L] -> a function that rotates [B, L, heads, head_dim] in fp32 and returns the input's dtype.

    A closure and not two tensors, since FSDP casts every floating tensor that enters a block to its compute dtype,
    and bf16 angles are wrong by whole turns far into a context.
    """
    # [B, L, 1, head_dim / 2]
    angles = positions[..., None, None].float() * rope_frequencies(config, positions.device)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        left, right = x.float().chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)

    return rotate


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [..., size], any dtype; statistics in fp32
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        width, q_size = config.hidden_size, config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotate: Callable, mask: Tensor | None, cache: Callable | None) -> Tensor:
        B, L, _ = x.shape
        head_dim = self.config.head_dim
        q, k, v = (proj(x).view(B, L, -1, head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q), rotate(k), v))  # [B, heads, L, head_dim]
        if cache is not None:
            k, v = cache(self.index, k, v)  # [B, G, K, head_dim]

        share = self.config.num_heads // self.config.num_kv_heads  # query heads per key/value head
        if L == 1:  # decoding: the query heads of a group are so many queries on the same keys, none is copied
            q = q.view(B, -1, share, head_dim)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.view(B, -1, L, head_dim).transpose(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer, the unit that dist.py shards; the names inside are those of Hugging Face checkpoints."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotate: Callable, mask: Tensor | None, cache: Callable | None, recompute: bool):
        if not recompute:
            return self.compute(x, rotate, mask, cache)
        # Inside the block, not around it: under FSDP the backward pass then gathers the weights once.
        return checkpoint(self.compute, x, rotate, mask, cache, use_reentrant=False, preserve_rng_state=False)

    def compute(self, x: Tensor, rotate: Callable, mask: Tensor | None, cache: Callable | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotate, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------- models


class Transformer(nn.Module):
    """The decoder. Attributes that a caller may set:

    checkpoint_blocks  recompute every block in the backward pass instead of storing its activations
    valid_vocab        how many ids exist. Checkpoints pad their embedding; the ids from there on are left out of
                       every softmax, since one that is sampled has no text
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpoint_blocks = False
        self.valid_vocab = config.vocab_size

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        source_pos: Tensor | None = None,
        targets: Tensor | None = None,
        target_mask: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states, or the logprobs and entropies of `targets`.

        tokens [B, L] int64; positions [B, L] (default 0, 1, ...); mask bool [B, L, K], True where a query may
        attend (default causal, which also serves rows padded on the right); cache(layer, k, v) stores the new keys
        and values [B, G, L, head_dim] and returns those to attend to, [B, G, K, head_dim].

        Without targets: the normalised hidden states [B, L, D]. With targets [N, T], N a multiple of B: the
        distribution of targets[i, t] is read at position source_pos[i, t] of row i // (N // B), and the result is
        (logprobs, entropies), each [N, T] fp32, of the softmax at `temperature` over the ids below valid_vocab.
        Both are 0 where target_mask [N, T] is False, and have gradients (zero ones when nothing is selected).
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        rotate = make_rope(self.config, positions)
        x = self.embed(tokens)
        if mask is not None:  # additive, made once for all layers: [B, 1, L, K]
            mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, -torch.inf)[:, None]
        recompute = self.checkpoint_blocks and torch.is_grad_enabled()
        for block in self.layers:
            x = block(x, rotate, mask, cache, recompute)
        x = self.norm(x)
        if targets is None:
            return x
        selected = select(x, source_pos, target_mask)
        scores = token_scores(selected, targets[target_mask], self.head_weight(), temperature)
        return tuple(scatter(score, target_mask) for score in scores)

    def head_weight(self) -> Tensor:
        """[valid_vocab, D] fp32. Logits are fp32 whatever the model's dtype: rounding them to bf16 moves
        probabilities by percents, and differently in sampler and trainer."""
        weight = self.embed.weight if self.lm_head is None else self.lm_head.weight
        return weight[: self.valid_vocab].float()

    def unembed(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V] fp32, -inf for ids that do not exist."""
        absent = self.config.vocab_size - self.valid_vocab
        return F.pad(fp32_logits(hidden, self.head_weight()), (0, absent), value=-torch.inf)


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [..., D] of any dtype, weight [V, D] fp32 -> [..., V] fp32, under autocast too."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), weight)


def select(hidden: Tensor, source_pos: Tensor, target_mask: Tensor) -> Tensor:
    """hidden [B, L, D] at the positions that predict the selected targets, [M, D], in the order of the mask."""
    rows, actions = hidden.shape[0], source_pos.shape[0]
    assert actions % rows == 0, f"{actions} actions do not divide among {rows} rows"
    row = torch.arange(actions, device=hidden.device)[:, None] // (actions // rows)
    return hidden[row.expand_as(source_pos)[target_mask], source_pos[target_mask]]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """values [M] -> [N, T], 0 where the mask is False; keeps the graph even when M is 0."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)


def token_scores(hidden: Tensor, targets: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logprob and entropy of each target: hidden [M, D], targets [M], weight [V, D] fp32 -> ([M], [M]) fp32.

    Works through chunks of rows; several of them are recomputed in backward, so that the [M, V] logits never exist
    at once.
    """
    assert temperature > 0, "logprobs need a temperature above 0"

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = fp32_logits(hidden, weight) / temperature
        log_z = logits.logsumexp(-1)
        entropy = log_z - ((logits - log_z[:, None]).exp() * logits).sum(-1)
        return logits.gather(1, targets[:, None])[:, 0] - log_z, entropy

    size = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    if len(hidden) <= size:  # backward starts with these logits: recomputing them would save no memory
        return score(hidden, targets)
    chunks = zip(hidden.split(size), targets.split(size))
    scores = [checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    logprobs, entropies = zip(*scores)
    return torch.cat(logprobs), torch.cat(entropies)


class ValueModel(nn.Module):
    """The critic: a trunk of its own and a linear head that starts at zero, so that its first values are 0."""

    def __init__(self, trunk: Transformer):
        super().__init__()
        self.trunk = trunk
        if trunk.lm_head is not None:
            trunk.lm_head.requires_grad_(False)  # unused, but a saved critic is then a whole checkpoint
        weight = trunk.embed.weight
        self.value_head = nn.Linear(trunk.config.hidden_size, 1, device=weight.device, dtype=weight.dtype)
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)

    @property
    def config(self) -> ModelConfig:
        return self.trunk.config

    @property
    def layers(self) -> nn.ModuleList:
        return self.trunk.layers

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
        source_pos: Tensor,
        target_mask: Tensor,
    ) -> Tensor:
        """Value of the state before each action token, [N, T] fp32, 0 where target_mask is False.

        Arguments as in Transformer.forward: the value of an action token is read where that token is predicted.
        """
        selected = select(self.trunk(tokens, positions, mask), source_pos, target_mask)
        with torch.autocast(selected.device.type, enabled=False):
            values = F.linear(selected.float(), self.value_head.weight.float(), self.value_head.bias.float())
        return scatter(values[:, 0], target_mask)


# ---------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Rows:
    """B prompts with n actions each, as tensors; see pack_rows."""

    tokens: Tensor  # [B, L] int64: the prompt once, then its actions, then padding
    positions: Tensor  # [B, L]: every action continues from the end of the prompt
    mask: Tensor | None  # [B, L, L] bool, True = may attend; None when n = 1, where causal order suffices
    source_pos: Tensor  # [N, T]: the position in the row whose hidden state predicts the token
    targets: Tensor  # [N, T]: the actions' tokens
    target_mask: Tensor  # [N, T] bool: False on padding

    def to(self, device) -> "Rows":
        return Rows(*(None if x is None else x.to(device, non_blocking=True) for x in vars(self).values()))


def pack_rows(prompts: list[list[int]], actions: list[list[list[int]]], pad_id: int = 0) -> Rows:
    """One row for each prompt and all n actions taken from it; n is the same for all prompts.

    An action attends to the prompt and to its own past only, so a row scores its actions exactly as n separate
    sequences would, for the price of one prompt. Masks come from lengths, never from pad_id.

        pack_rows([[5, 6]], [[[7, 8], [9]]])
            tokens     [[5, 6, 7, 8, 9]]      source_pos   [[1, 2], [1, 0]]     # first tokens: from the prompt's end
            positions  [[0, 1, 2, 3, 2]]      targets      [[7, 8], [9, 0]]
                                              target_mask  [[1, 1], [1, 0]]
    Raises ValueError for an empty prompt or action, and for prompts with different numbers of actions.
    """
    n = len(actions[0]) if actions else 0
    if len(actions) != len(prompts) or n == 0 or any(len(group) != n for group in actions):
        raise ValueError("pack_rows needs one group of actions per prompt, all groups of one size above 0")
    if not all(prompts) or not all(action for group in actions for action in group):
        raise ValueError("pack_rows needs at least one token in each prompt and each action")
    B, N = len(prompts), len(prompts) * n
    L = max(len(prompt) + sum(map(len, group)) for prompt, group in zip(prompts, actions))
    T = max(len(action) for group in actions for action in group)
    tokens = torch.full((B, L), pad_id)
    positions = torch.zeros(B, L, dtype=torch.long)
    owner = torch.full((B, L), -1)  # 0 = prompt, 1..n = action, -1 = padding
    source_pos = torch.zeros(N, T, dtype=torch.long)
    targets = torch.full((N, T), pad_id)
    target_mask = torch.zeros(N, T, dtype=torch.bool)
    for b, (prompt, group) in enumerate(zip(prompts, actions)):
        start = 0
        for j, piece in enumerate([prompt, *group]):
            size = len(piece)
            span = slice(start, start + size)
            tokens[b, span] = torch.tensor(piece)
            positions[b, span] = torch.arange(size) + (len(prompt) if j else 0)
            owner[b, span] = j
            if j:
                i = b * n + j - 1
                source_pos[i, :size] = torch.arange(start - 1, start - 1 + size)
                source_pos[i, 0] = len(prompt) - 1
                targets[i, :size] = tokens[b, span]
                target_mask[i, :size] = True
            start += size
    if n == 1:
        return Rows(tokens, positions, None, source_pos, targets, target_mask)
    mine = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)  # [B, query, key]
    return Rows(tokens, positions, mine & torch.ones(L, L).tril().bool(), source_pos, targets, target_mask)
