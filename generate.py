"""Batched sampling with a KV cache: prompts in, completions out as they end.

    generator = Generator(model, eos_ids, max_batch=64, max_len=1024)
    for c in generator.stream(prompts, max_new_tokens=128, temperature=1.0, rng=Rng(seed, step)):
        print(c.index, c.tokens, c.finish)          # not in the order of the prompts

Continuous batching: a finished sequence leaves its row to the next prompt at once. Running sequences occupy the
first rows of the cache, so that a batch that runs empty also runs faster. Prompts enter by length, longest first:
those computed together need little padding, and a prompt that occurs several times (n samples of one state) is
computed once. Nothing here communicates between ranks: under FSDP, call it inside dist.gathered.

Randomness: token t of sample i is drawn with one uniform number that is a function of (seed, step, i, t), by the
inverse of the cumulative distribution. So a sample depends neither on its batch, row or rank, nor on other samples.

Shapes: n sequences that run, S rows of the cache, T = max_new_tokens, V ids that exist, D width.
The decode step is plain PyTorch on every device; on CUDA it is not captured in a graph.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import Transformer, fp32_logits

PREFILL_TOKENS = 4096  # padded prompt tokens in one forward pass


@dataclass(frozen=True)
class Rng:
    """Uniform numbers by counter, not by state: `uniform` is a pure function of its arguments."""

    seed: int
    step: int

    def uniform(self, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """One number in [0, 1) for each sample and position (broadcast), float64.

        A chain of SplitMix64 finalisers (Steele et al. 2014), which turn close integers into unrelated ones.
        """
        state = np.zeros(np.broadcast_shapes(np.shape(samples), np.shape(positions)), np.uint64)
        with np.errstate(over="ignore"):  # arithmetic modulo 2^64
            for word in (self.seed, self.step, samples, positions):
                x = state + np.asarray(word).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
                x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                state = x ^ (x >> np.uint64(31))
        return (state >> np.uint64(11)) * 2.0**-53


@dataclass
class Completion:
    """One sampled action. With finish "stop" the last token is an end-of-sequence id that was sampled like the
    others; with "length" the reply was cut off and has none."""

    index: int  # of its prompt
    tokens: list[int]
    logprobs: list[float]  # of the tokens, at the sampling temperature, before top_p
    finish: str  # stop | length


class KVCache:
    """Keys and values of the running sequences: two tensors [S, G, positions, head_dim] a layer.

    Row r holds one sequence. What lies beyond its end (padding, an earlier tenant) is masked, then overwritten.
    """

    def __init__(self, layers: int, rows: int, positions: int):
        self.rows, self.positions = rows, positions
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * layers  # allocated when the dtype is known

    def prefill(self, first: int, source: Tensor) -> Callable:
        """For Transformer.forward on prompts: row first + i gets prompt source[i]; prompts attend to themselves."""
        rows = slice(first, first + len(source))

        def cache(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if self.layers[layer] is None:  # zeros: a masked position has weight 0, and 0 * NaN would be NaN
                shape = (self.rows, k.shape[1], self.positions, k.shape[3])
                self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
            for stored, new in zip(self.layers[layer], (k, v)):
                stored[rows, :, : new.shape[2]] = new[source]
            return k, v

        return cache

    def decode(self, positions: Tensor, seen: int) -> Callable:
        """For Transformer.forward on one token for each of the first rows, at positions [n], all below `seen`."""
        n = len(positions)
        at = (torch.arange(n, device=positions.device), slice(None), positions)

        def cache(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = self.layers[layer]
            keys[at], values[at] = k[:, :, 0], v[:, :, 0]
            return keys[:n, :, :seen], values[:n, :, :seen]

        return cache

    def move(self, source: int, target: int, length: int) -> None:
        for stored in (tensor for layer in self.layers for tensor in layer):
            stored[target, :, :length] = stored[source, :, :length]


class Generator:
    """Samples from a model, at most max_batch sequences at a time.

    eos_ids: any of them ends a completion. max_len: the longest prompt plus completion. The cache is allocated
    for each `stream`, no larger than its prompts need, and freed after it.
    """

    def __init__(self, model: Transformer, eos_ids: Sequence[int], max_batch: int, max_len: int, pad_id: int = 0):
        self.model, self.eos, self.pad = model, list(eos_ids), pad_id
        self.max_batch, self.max_len = max_batch, max_len

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

        Raises ValueError for an empty prompt, one that does not fit max_len, and options that make no sense.
        """
        ids = np.arange(len(prompts)) if sample_ids is None else np.asarray(sample_ids)
        if temperature > 0 and rng is None:
            raise ValueError("sampling needs rng=Rng(seed, step); temperature=0 is greedy")
        if not 0 < top_p <= 1 or max_new_tokens < 1 or temperature < 0:
            raise ValueError("generation needs temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1")
        if len(ids) != len(prompts):
            raise ValueError(f"{len(ids)} sample_ids for {len(prompts)} prompts")
        for i, prompt in enumerate(prompts):
            room = self.max_len - max_new_tokens
            if not 1 <= len(prompt) <= room:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones in max_len = "
                    f"{self.max_len}, between 1 and {room} fit"
                )
        waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i])))
        S, T = min(self.max_batch, len(prompts)), max_new_tokens
        cache = KVCache(self.model.config.num_layers, S, max(map(len, prompts), default=0) + T)
        head = self.model.head_weight()  # [V, D], of the ids that exist
        device = head.device

        # Row r of each: the sequence in row r of the cache. The host knows all lengths without asking the device.
        index = np.zeros(S, np.int64)  # of the prompt
        length = np.zeros(S, np.int64)  # tokens in the cache
        count = np.zeros(S, np.int64)  # tokens sampled
        uniform = torch.zeros(S, T, dtype=torch.float64, device=device)
        tokens = torch.zeros(S, T, dtype=torch.long, device=device)
        logprobs = torch.zeros(S, T, device=device)
        every = torch.arange(S, device=device)
        eos = torch.tensor(self.eos, dtype=torch.long, device=device)
        n = 0
        while waiting or n:
            # 1. Hidden states that predict the next token: of running sequences, then of new prompts.
            hidden = []
            if n:
                last = tokens[every[:n], torch.tensor(count[:n] - 1, device=device)]
                hidden.append(self._decode(cache, last, length[:n]))
                length[:n] += 1
            while waiting and n < S:
                fresh = self._take(waiting, prompts, S - n)
                hidden.append(self._prefill(cache, n, [prompts[i] for i in fresh]))
                rows = slice(n, n + len(fresh))
                index[rows], count[rows] = fresh, 0
                length[rows] = [len(prompts[i]) for i in fresh]
                if temperature > 0:
                    uniform[rows] = torch.from_numpy(rng.uniform(ids[fresh][:, None], np.arange(T))).to(device)
                n += len(fresh)

            # 2. The next token of every row.
            at = (every[:n], torch.tensor(count[:n], device=device))
            drawn, drawn_logprobs = sample(fp32_logits(torch.cat(hidden), head), temperature, top_p, uniform[at])
            tokens[at], logprobs[at] = drawn, drawn_logprobs
            count[:n] += 1

            # 3. Finished sequences leave, from the last row on; the last running one moves into the gap.
            stopped = torch.isin(drawn, eos).cpu().numpy()
            for row in np.flatnonzero(stopped | (count[:n] == T))[::-1]:
                size = count[row]
                done = Completion(
                    int(index[row]),
                    tokens[row, :size].tolist(),
                    logprobs[row, :size].tolist(),
                    "stop" if stopped[row] else "length",
                )
                n -= 1
                if row < n:
                    cache.move(n, row, length[n])
                    for state in (index, length, count, uniform, tokens, logprobs):
                        state[row] = state[n]
                yield done

    def _take(self, waiting: deque, prompts: list[list[int]], room: int) -> list[int]:
        """The next prompts that fit into the free rows and, repeats aside, into one forward pass."""
        taken = [waiting.popleft()]
        most = PREFILL_TOKENS // len(prompts[taken[0]])  # padded to the first, the longest
        unique = 1
        while waiting and len(taken) < room:
            unique += prompts[waiting[0]] != prompts[taken[-1]]
            if unique > max(1, most):
                break
            taken.append(waiting.popleft())
        return taken

    def _prefill(self, cache: KVCache, first: int, prompts: list[list[int]]) -> Tensor:
        """Compute prompts into the rows from `first` on; the hidden state at each prompt's end, [len(prompts), D]."""
        unique, source = [], []  # equal prompts are neighbours
        for prompt in prompts:
            if not unique or prompt != unique[-1]:
                unique.append(prompt)
            source.append(len(unique) - 1)
        device = self.model.embed.weight.device
        longest = len(unique[0])
        padded = torch.tensor([p + [self.pad] * (longest - len(p)) for p in unique], device=device)
        source = torch.tensor(source, device=device)
        ends = torch.tensor([len(p) - 1 for p in prompts], device=device)
        return self.model(padded, cache=cache.prefill(first, source))[source, ends]

    def _decode(self, cache: KVCache, last: Tensor, length: np.ndarray) -> Tensor:
        """One token further in the first rows: the hidden states [n, D] of the last sampled tokens [n]."""
        seen = int(length.max()) + 1
        positions = torch.tensor(length, device=last.device)
        mask = torch.arange(seen, device=last.device) <= positions[:, None, None]  # [n, 1, seen]
        return self.model(last[:, None], positions[:, None], mask, cache.decode(positions, seen))[:, 0]


def sample(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V] fp32, u [n] in [0, 1) float64 -> (token ids [n], their logprobs [n] fp32)."""
    scaled = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probabilities = scaled.double().exp()
        tokens = inverse_cdf(probabilities if top_p == 1 else nucleus(probabilities, top_p), u)
    return tokens, scaled.gather(1, tokens[:, None])[:, 0]


def inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds u: probabilities [n, V] float64, u [n] in [0, 1) -> [n].

    u is scaled by the row's own total, and a float64 below 1 times the total rounds to less than the total: the
    result can neither run past the end nor have probability 0.
    """
    cumulative = probabilities.cumsum(-1)
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most probable ids that holds top_p, the id that reaches it included."""
    ordered, order = probabilities.sort(-1, descending=True)
    dropped = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
