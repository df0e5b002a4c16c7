"""Batched sampling with a KV cache: prompts in, completions out as they end.

    generator = Generator(model, eos_ids, max_batch=64, max_len=1024)
    for c in generator.stream(prompts, max_new_tokens=128, temperature=1.0, rng=Rng(seed, step)):
        print(c.index, c.tokens, c.finish)          # not in the order of the prompts

Continuous batching: a finished sequence leaves its slot to the next prompt at once. The active slots are kept at
the front of the cache, so that a batch that runs empty also runs faster. A prompt that occurs several times in a
row (n samples of one state) is computed once. Nothing here communicates: under FSDP, call it inside dist.gathered.

Randomness: token t of sample i is drawn with one uniform number that is a function of (seed, step, i, t), by the
inverse of the cumulative distribution. So a sample depends neither on its batch, slot or rank, nor on other samples.

The decode step is plain PyTorch on every device; on CUDA it is not captured in a graph.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import Transformer

PREFILL_TOKENS = 16_384  # padded prompt tokens in one forward pass


@dataclass(frozen=True)
class Rng:
    """Uniform numbers by counter, not by state: `uniform` is a pure function of its arguments."""

    seed: int
    step: int

    def uniform(self, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """One number in [0, 1) for each (sample, position), float64. SplitMix64's finaliser, applied per word."""
        state = np.zeros(len(samples), np.uint64)
        for word in (self.seed, self.step, samples, positions):
            state = mix(state + np.asarray(word).astype(np.uint64))
        return (state >> np.uint64(11)) * 2.0**-53


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers so that close inputs give unrelated outputs (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass
class Completion:
    """One sampled action. With finish "stop" the last token is an end-of-sequence id that was sampled like the
    others; with "length" the reply was cut off and has none."""

    index: int  # of its prompt
    tokens: list[int]
    logprobs: list[float]  # of the tokens, at the sampling temperature, before top_p
    finish: str  # stop | length


@dataclass
class Slot:
    """A sequence that is being written."""

    index: int
    sample: int
    length: int  # tokens whose keys and values are in the cache
    tokens: list[int]
    logprobs: list[float]


class Generator:
    """Owns the KV cache, [max_batch, heads, max_len, head_dim] twice a layer, allocated at the first prompt.

    eos_ids: any of them ends a completion. max_len: the longest prompt plus completion.
    """

    def __init__(self, model: Transformer, eos_ids: Sequence[int], max_batch: int, max_len: int, pad_id: int = 0):
        self.model, self.eos, self.pad = model, frozenset(eos_ids), pad_id
        self.max_batch, self.max_len = max_batch, max_len
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        c = self.model.config
        shape = (self.max_batch, c.num_kv_heads, self.max_len, c.head_dim)
        if not self.keys or self.keys[0].dtype != dtype or self.keys[0].device != device:
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(c.num_layers)]
            self.values = [torch.zeros_like(k) for k in self.keys]

    @torch.no_grad()  # not inference_mode: parameters gathered by FSDP under it could not be trained again
    def stream(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        rng: Rng | None = None,
        sample_ids: Sequence[int] | None = None,
    ) -> Iterator[Completion]:
        """Yield a Completion for every prompt, each the moment it ends.

        temperature 0 is greedy (logprobs then at temperature 1) and needs no rng. sample_ids name the samples for
        the random numbers; default: their positions.

        Raises ValueError for an empty prompt, one that does not fit max_len, or sampling without an rng.
        """
        if temperature > 0 and rng is None:
            raise ValueError("sampling needs rng=Rng(seed, step); temperature=0 is greedy")
        if not 0 < top_p <= 1 or max_new_tokens < 1:
            raise ValueError("generation needs 0 < top_p <= 1 and max_new_tokens >= 1")
        for i, prompt in enumerate(prompts):
            if not prompt or len(prompt) + max_new_tokens > self.max_len:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens: with {max_new_tokens} new ones it must have between "
                    f"{max_new_tokens + 1} and max_len = {self.max_len}"
                )
        ids = range(len(prompts)) if sample_ids is None else sample_ids
        waiting = deque(range(len(prompts)))
        slots: list[Slot] = []
        while waiting or slots:
            hidden: list[Tensor] = []
            if slots:
                hidden.append(self._decode(slots))
            while waiting and len(slots) < self.max_batch:
                fresh = self._take(waiting, prompts, self.max_batch - len(slots))
                hidden.append(self._prefill([prompts[i] for i in fresh], len(slots)))
                slots += [Slot(i, ids[i], len(prompts[i]), [], []) for i in fresh]
            self._sample(torch.cat(hidden), slots, temperature, top_p, rng)
            for slot in reversed(range(len(slots))):
                s = slots[slot]
                finish = "stop" if s.tokens[-1] in self.eos else "length"
                if finish == "stop" or len(s.tokens) == max_new_tokens:
                    self._free(slots, slot)
                    yield Completion(s.index, s.tokens, s.logprobs, finish)

    def _take(self, waiting: deque, prompts: list[list[int]], room: int) -> list[int]:
        """The next prompts that fit into the free slots and, padded, into one forward pass (at least one)."""
        taken: list[int] = []
        longest = 0
        while waiting and len(taken) < room:
            longest = max(longest, len(prompts[waiting[0]]))
            if taken and longest * (len(taken) + 1) > PREFILL_TOKENS:
                break
            taken.append(waiting.popleft())
        return taken

    def _prefill(self, prompts: list[list[int]], first: int) -> Tensor:
        """Compute prompts into the slots from `first` on; the hidden state at each prompt's end, [n, D]."""
        unique, source = [], []  # equal neighbours are computed once
        for prompt in prompts:
            if not unique or prompt != unique[-1]:
                unique.append(prompt)
            source.append(len(unique) - 1)
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(p) for p in unique], device=device)
        longest = int(lengths.max())
        tokens = torch.tensor([p + [self.pad] * (longest - len(p)) for p in unique], device=device)
        copy = torch.tensor(source, device=device)

        def cache(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            self._allocate(k.dtype, k.device)
            self.keys[layer][first : first + len(prompts), :, :longest] = k[copy]
            self.values[layer][first : first + len(prompts), :, :longest] = v[copy]
            return k, v  # causal among themselves; the padding behind a prompt is overwritten or masked later

        hidden = self.model(tokens, cache=cache)
        return hidden[torch.arange(len(unique), device=device), lengths - 1][copy]

    def _decode(self, slots: list[Slot]) -> Tensor:
        """One token further in every slot: the hidden states after the last sampled tokens, [n, D]."""
        device = self.keys[0].device
        n = len(slots)
        tokens = torch.tensor([[s.tokens[-1]] for s in slots], device=device)
        positions = torch.tensor([[s.length] for s in slots], device=device)
        seen = max(s.length for s in slots) + 1
        mask = (torch.arange(seen, device=device) <= positions)[:, None]  # [n, 1, seen]
        rows, columns = torch.arange(n, device=device), positions[:, 0]

        def cache(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            self.keys[layer][rows, :, columns] = k[:, :, 0]
            self.values[layer][rows, :, columns] = v[:, :, 0]
            return self.keys[layer][:n, :, :seen], self.values[layer][:n, :, :seen]

        hidden = self.model(tokens, positions, mask, cache)[:, 0]
        for s in slots:
            s.length += 1
        return hidden

    def _sample(self, hidden: Tensor, slots: list[Slot], temperature: float, top_p: float, rng: Rng | None) -> None:
        """Draw the next token of every slot from hidden [n, D]; ids that do not exist have probability 0."""
        logits = self.model.unembed(hidden)
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            tokens = logits.argmax(-1)
        else:
            probabilities = logprobs.double().exp()
            if top_p < 1:
                probabilities = nucleus(probabilities, top_p)
            samples = np.array([s.sample for s in slots])
            u = torch.from_numpy(rng.uniform(samples, np.array([len(s.tokens) for s in slots])))
            tokens = inverse_cdf(probabilities, u.to(logits.device))
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        for slot, token, logprob in zip(slots, tokens.tolist(), chosen.tolist()):
            slot.tokens.append(token)
            slot.logprobs.append(logprob)

    def _free(self, slots: list[Slot], slot: int) -> None:
        """Take a sequence out; the last one moves into its place, so that the active slots stay in front."""
        last = slots.pop()
        if slot < len(slots):
            for cache in (*self.keys, *self.values):
                cache[slot, :, : last.length] = cache[len(slots), :, : last.length]
            slots[slot] = last


def inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds u: probabilities [n, V] float64, u [n] in [0, 1) -> [n].

    u is scaled by the row's own total, so that rounding can neither run past the end nor pick an id of probability 0.
    """
    cumulative = probabilities.cumsum(-1)
    target = u[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most probable ids that holds top_p, the id that reaches it included."""
    ordered, order = probabilities.sort(-1, descending=True)
    dropped = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
