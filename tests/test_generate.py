"""generate.py against full forward passes, brute force, and itself under other batches."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import generate
from generate import Generator, Rng, inverse_cdf, nucleus, sample
from model import ModelConfig, pack_rows
from weights import build_model, save_model

SHAPE = ModelConfig("qwen2", 64, 32, 48, 2, 4, 2, 8)
RAGGED = (1, 9, 4, 17, 2, 9, 30, 5)  # lengths of prompts; one has a single token


def small(seed=0, family="qwen2"):
    """Weights so large that every token depends on the whole context."""
    model = build_model(ModelConfig(family, 64, 32, 48, 2, 4, 2, 8), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.25, generator=generator)
    return model


def random_prompts(lengths=RAGGED, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(64) for _ in range(length)] for length in lengths]


def run(model, prompts, new=12, eos=(), batch=8, **kwargs):
    """Completions in the order of the prompts."""
    generator = Generator(model, eos, max_batch=batch, max_len=max(map(len, prompts)) + new)
    done = list(generator.stream(prompts, new, **kwargs))
    assert sorted(c.index for c in done) == list(range(len(prompts)))
    return sorted(done, key=lambda c: c.index)


@torch.no_grad()
def greedy_by_full_forward(model, prompt, new, eos=()):
    """No cache, no batch: the whole sequence again for every token."""
    tokens, logprobs = list(prompt), []
    for _ in range(new):
        scores = model.unembed(model(torch.tensor([tokens])))[0, -1].log_softmax(-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :], logprobs


# ---------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_greedy_batch_equals_singles_equals_full_forward(family):
    model, prompts = small(family=family), random_prompts()
    batch = run(model, prompts, temperature=0)
    refilled = run(model, prompts, temperature=0, batch=3)
    for i, prompt in enumerate(prompts):
        tokens, logprobs = greedy_by_full_forward(model, prompt, 12)
        (single,) = run(model, [prompt], temperature=0)
        for c in (batch[i], refilled[i], single):
            assert c.tokens == tokens and c.finish == "length"
            assert c.logprobs == pytest.approx(logprobs, abs=1e-5)
    assert len({tuple(c.tokens) for c in batch}) == len(prompts)  # the prompts matter, or nothing was tested


def test_greedy_equals_transformers(tmp_path):
    model = small()
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for c, prompt in zip(run(model, random_prompts(), temperature=0), random_prompts()):
        tokens = torch.tensor([prompt])
        out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert c.tokens == out[0, len(prompt) :].tolist()


# ---------------------------------------------------------------------------------------------- ends


def test_several_end_ids_and_truncation():
    """Each end id ends a reply and is its last token; a reply without one is marked as cut off and has all of T."""
    model, prompts = small(), random_prompts((6,) * 40)
    free = [greedy_by_full_forward(model, p, 12)[0] for p in prompts]
    eos = [token for token, _ in Counter(t for tokens in free for t in set(tokens)).most_common()[5:8]]
    done = run(model, prompts, temperature=0, eos=eos, batch=7)
    for c, tokens in zip(done, free):
        ends = [t for t, token in enumerate(tokens) if token in eos]
        assert c.tokens == (tokens[: ends[0] + 1] if ends else tokens)
        assert c.finish == ("stop" if ends else "length")
        assert len(c.logprobs) == len(c.tokens)
    assert {c.tokens[-1] for c in done if c.finish == "stop"} == set(eos)
    assert {c.finish for c in done} == {"stop", "length"}
    assert any(c.finish == "stop" and len(c.tokens) == 1 for c in done)


def test_an_end_at_the_last_possible_token_is_a_stop():
    model, (prompt,) = small(), random_prompts((6,))
    tokens = greedy_by_full_forward(model, prompt, 12)[0]
    new = next(t for t in range(2, 12) if tokens[t] not in tokens[:t]) + 1
    (c,) = run(model, [prompt], new=new, eos=[tokens[new - 1]], temperature=0)
    assert (c.finish, len(c.tokens)) == ("stop", new)


def test_completions_come_as_they_end():
    """The consumer gets a short reply while others still decode: its experiment starts then."""
    model, prompts = small(), random_prompts((6,) * 12)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    free = {i: greedy_by_full_forward(model, p, 12)[0] for i, p in enumerate(prompts)}
    eos = [free[0][1]]
    forwards.clear()
    when = {}
    for c in Generator(model, eos, 12, 32).stream(prompts, 12, temperature=0):
        when[c.index] = (len(forwards), len(c.tokens))
    assert all(calls == tokens for calls, tokens in when.values())  # one forward per token, the first a prefill
    assert when[0][0] <= 2 and max(calls for calls, _ in when.values()) == 12


# ---------------------------------------------------------------------------------------------- randomness


def test_samples_depend_on_neither_order_nor_batch():
    """Any order, number of rows, company or prefill: the same sample id draws the same tokens."""
    model, prompts = small(), random_prompts()
    options = {"rng": Rng(3, 5), "temperature": 1.3, "eos": [3, 11, 30, 40, 50]}
    expected = run(model, prompts, **options)
    assert len({len(c.tokens) for c in expected}) > 3  # rows come free at different times and are moved
    for batch in (1, 2, 3, 100):
        assert [c.tokens for c in run(model, prompts, batch=batch, **options)] == [c.tokens for c in expected]
    order = [5, 2, 7, 0, 3, 1, 6, 4]
    shuffled = run(model, [prompts[i] for i in order], sample_ids=order, batch=3, **options)
    assert [c.tokens for c in shuffled] == [expected[i].tokens for i in order]
    for i in order[:3]:  # alone, as on another rank
        assert run(model, [prompts[i]], sample_ids=[i], **options)[0].tokens == expected[i].tokens
    for c, other in zip(shuffled, order):
        assert c.logprobs == pytest.approx(expected[other].logprobs, abs=1e-5)


def test_other_seed_step_or_sample_draws_other_tokens():
    model, prompts = small(), random_prompts((5,)) * 4
    draws = [
        [tuple(c.tokens) for c in run(model, prompts, temperature=1.5, rng=rng, sample_ids=ids)]
        for rng, ids in ((Rng(0, 0), None), (Rng(1, 0), None), (Rng(0, 1), None), (Rng(0, 0), [4, 5, 6, 7]))
    ]
    assert len({tokens for one in draws for tokens in one}) == 16  # n samples of one state differ as well
    assert len({tokens[0] for one in draws for tokens in one}) > 3  # already in their first token


def test_generation_leaves_the_global_random_state_alone():
    """Otherwise evaluating in between would change training."""
    model = small()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run(model, [[1, 2, 3]] * 3, rng=Rng(0, 0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


def test_uniforms_are_uniform_and_independent():
    """Over samples, positions, steps and seeds: Kolmogorov-Smirnov, and no correlation between neighbours."""
    n = 100_000
    wide = np.arange(300)[:, None], np.arange(340)
    draws = {
        "samples": Rng(0, 0).uniform(np.arange(n), 0),
        "positions": Rng(0, 0).uniform(7, np.arange(n)),
        "grid": Rng(9, 2).uniform(*wide).ravel(),
        "steps": np.array([Rng(0, step).uniform(0, 0) for step in range(20_000)]),
        "seeds": np.array([Rng(seed, 0).uniform(0, 0) for seed in range(20_000)]),
    }
    for name, u in draws.items():
        assert u.min() >= 0 and u.max() < 1, name
        distance = np.abs(np.sort(u) - np.arange(len(u)) / len(u)).max()
        assert distance < 2 / len(u) ** 0.5, name  # p < 0.001
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / len(u) ** 0.5, name
    assert len(np.unique(draws["grid"])) == 300 * 340
    assert Rng(0, 1).uniform(2, 3) != Rng(1, 0).uniform(2, 3) != Rng(0, 1).uniform(3, 2)


# ---------------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_sampler_logprobs_are_the_trainers(temperature):
    """What PPO's ratio rests on: both at the sampling temperature, both without the ids that do not exist."""
    model, prompts = small(), random_prompts()
    model.valid_vocab = 60
    prompts = [[token % 60 for token in prompt] for prompt in prompts]
    done = run(model, prompts, temperature=temperature, rng=Rng(0, 1), batch=3, eos=[7])
    rows = pack_rows(prompts, [[c.tokens] for c in done])
    with torch.no_grad():
        trainer, _ = model(rows.tokens, rows.positions, rows.mask, source_pos=rows.source_pos, targets=rows.targets,
                           target_mask=rows.target_mask, temperature=temperature)  # fmt: skip
        other, _ = model(rows.tokens, source_pos=rows.source_pos, targets=rows.targets,
                         target_mask=rows.target_mask, temperature=temperature + 0.3)  # fmt: skip
    for c, row, wrong in zip(done, trainer, other):
        assert c.logprobs == pytest.approx(row[: len(c.tokens)].tolist(), abs=1e-5)
        assert c.logprobs != pytest.approx(wrong[: len(c.tokens)].tolist(), abs=1e-2)


def test_an_id_that_does_not_exist_is_never_sampled():
    """A logit of about +100 on a padding row of the embedding: greedy or sampled, it never comes out."""
    model = small()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.weight[0] = 1.0  # hidden states are now +-(something, 0, 0, ...)
        model.lm_head.weight[60:64] = 0.0
        model.lm_head.weight[61, 0], model.lm_head.weight[62, 0] = 100.0, -100.0
    prompts = random_prompts((5,) * 20)
    tempted = run(model, prompts, temperature=0)
    assert {token for c in tempted for token in c.tokens} <= {61, 62}
    model.valid_vocab = 60
    for options in ({"temperature": 0}, {"rng": Rng(0, 0)}, {"rng": Rng(0, 0), "top_p": 0.9}):
        done = run(model, prompts, **options)
        assert max(token for c in done for token in c.tokens) < 60
        assert all(np.isfinite(c.logprobs).all() for c in done)


def test_frequencies_follow_the_softmax():
    """Chi-square of the first token of 4,000 samples, at a temperature."""
    model, (prompt,) = small(), random_prompts((6,))
    n, temperature = 4000, 1.5
    done = run(model, [prompt] * n, new=1, batch=1000, temperature=temperature, rng=Rng(0, 0))
    counts = np.bincount([c.tokens[0] for c in done], minlength=64)
    with torch.no_grad():
        logits = model.unembed(model(torch.tensor([prompt])))[0, -1]
    expected = n * (logits / temperature).softmax(-1).numpy()
    big = expected > 5
    assert big.sum() > 5
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum()
    assert chi2 < big.sum() + 4 * (2 * big.sum()) ** 0.5
    for c in done[:50]:
        assert c.logprobs[0] == pytest.approx(float((logits / temperature).log_softmax(-1)[c.tokens[0]]), abs=1e-5)


def test_inverse_cdf_by_brute_force():
    probabilities = torch.rand(200, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probabilities[probabilities < 0.3] = 0
    probabilities[:, 4] += 0.1
    probabilities /= probabilities.sum(1, keepdim=True)
    u = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row, x, token in zip(probabilities.tolist(), u.tolist(), inverse_cdf(probabilities, u).tolist()):
        assert sum(row[:token]) <= x < sum(row[: token + 1]) and row[token] > 0


def test_extreme_uniforms_hit_ids_that_can_occur():
    """0 and the largest number below 1, with impossible ids at both ends and sums that rounding moves off 1."""
    u = torch.tensor([0.0, np.nextafter(1, 0)], dtype=torch.float64)
    for total in (1.0, 1 - 1e-7, 1 + 1e-7, np.nextafter(1, 0), np.nextafter(1, 2)):
        probabilities = torch.zeros(2, 1000, dtype=torch.float64)
        probabilities[:, 100:900] = total / 800
        assert inverse_cdf(probabilities, u).tolist() == [100, 899]


def test_nucleus_keeps_the_smallest_set_that_holds_top_p():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64)
    assert nucleus(probabilities, 0.6).tolist() == [[0, 0.5, 0, 0.25], [0.97, 0, 0, 0]]
    assert nucleus(probabilities, 0.8).tolist() == [[0, 0.5, 0.15, 0.25], [0.97, 0, 0, 0]]
    assert torch.equal(nucleus(probabilities, 1.0), probabilities)
    u = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    logits = probabilities[:1].log().float().expand(50, 4)
    tokens, logprobs = sample(logits, 1.0, 0.6, u)
    assert set(tokens.tolist()) == {1, 3}
    assert (tokens == 1).float().mean() == pytest.approx(2 / 3, abs=0.03)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])  # before top_p


# ---------------------------------------------------------------------------------------------- work


def test_repeated_prompts_are_computed_once(monkeypatch):
    """n samples of a state, however they stand in the list, cost one prompt."""
    model, prompts = small(), random_prompts((20, 20, 12))
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape) if args[0].shape[1] > 1 else None)
    expected = [run(model, [p], temperature=0)[0].tokens for p in prompts]
    seen.clear()
    done = run(model, prompts * 4, temperature=0, batch=12)
    assert seen == [(3, 20)]
    assert [c.tokens for c in done] == expected * 4
    seen.clear()
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 25)
    assert [c.tokens for c in run(model, prompts * 4, temperature=0, batch=12)] == expected * 4
    assert seen == [(1, 20), (1, 20), (1, 12)]  # a small budget splits prompts, not repeats


def test_prompts_of_like_length_are_padded_little(monkeypatch):
    model, prompts = small(), random_prompts((3, 30, 4, 29, 2, 28))
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()) if args[0].shape[1] > 1 else None)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 90)
    run(model, prompts, temperature=0, new=2)
    assert sum(seen) <= sum(map(len, prompts)) + 6


def test_a_shrinking_batch_decodes_only_what_runs():
    model, prompts = small(), random_prompts((6,) * 12)
    free = [greedy_by_full_forward(model, p, 12)[0] for p in prompts]
    eos = [free[0][1], free[1][3]]
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    done = run(model, prompts, temperature=0, eos=eos, batch=12)
    running = [sum(len(c.tokens) > t for c in done) for t in range(12)]
    assert seen == running and running[-1] < 12


def test_no_gradient_and_no_dropped_consumer():
    """A consumer may stop early, and gradients are as they were outside and between completions."""
    model = small()
    model.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    inside = []
    stream = Generator(model, [], 2, 20).stream(random_prompts((4, 4, 4)), 5, rng=Rng(0, 0))
    next(stream)
    assert torch.is_grad_enabled() and not any(inside)
    stream.close()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert list(Generator(model, [], 2, 20).stream([], 5, rng=Rng(0, 0))) == []


def test_bf16_model_samples_with_fp32_logits():
    model = small().to(torch.bfloat16)
    done = run(model, random_prompts(), temperature=0.7, rng=Rng(0, 0))
    rows = pack_rows(random_prompts(), [[c.tokens] for c in done])
    with torch.no_grad():
        trainer, _ = model(rows.tokens, source_pos=rows.source_pos, targets=rows.targets,
                           target_mask=rows.target_mask, temperature=0.7)  # fmt: skip
    sampler = torch.tensor([c.logprobs for c in done])
    assert (sampler.exp() - trainer.exp()).abs().mean() < 0.02  # bf16 hidden states differ a little, no more


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 has 0 tokens"),
        ([[1] * 16], {}, "prompt 0 has 16 tokens; with 5 new ones in max_len = 20, between 1 and 15 fit"),
        ([[1]], {"rng": None}, "sampling needs rng"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"sample_ids": [1, 2]}, "2 sample_ids for 1 prompts"),
    ],
)
def test_bad_requests_are_refused(prompts, options, message):
    generator = Generator(small(), [], max_batch=2, max_len=20)
    with pytest.raises(ValueError, match=message):
        list(generator.stream(prompts, **({"max_new_tokens": 5, "rng": Rng(0, 0)} | options)))


def test_prompts_may_fill_max_len():
    generator = Generator(small(), [], max_batch=2, max_len=20)
    assert len(next(generator.stream([[1] * 15], 5, rng=Rng(0, 0))).tokens) == 5
