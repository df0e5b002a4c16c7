"""What only a GPU can show: the same numbers as on the CPU, in fp32 and bf16, and whole runs on it.

    python benchmarks/gpu_check.py                  these tests, then speed, with a report
    ML_AGENT_TEST_DEVICE=cpu pytest -m gpu          a rehearsal of the tests themselves, without a GPU
"""

import os

import pytest
import torch

from generate import Generator, Rng
from model import ModelConfig, ValueModel, pack_rows
from run_kit import make_run, metrics, train
from weights import build_model

DEVICE = os.environ.get("ML_AGENT_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17], [18], [19, 20, 21]]
ACTIONS = [[[1, 2, 3], [4, 2]], [[5, 2], [6, 7, 8, 9]], [[2], [3, 2]], [[30, 31, 32, 2], [33, 2]], [[40], [41, 42, 2]]]


def small(family: str) -> "torch.nn.Module":
    """A model on the CPU with weights far from their initial values, so that every part matters."""
    net = build_model(ModelConfig(family, 97, 64, 96, 3, 4, 2, 16, eos_ids=(2,)), 0)
    for i, parameter in enumerate(net.parameters()):
        centre = 1.0 if parameter.dim() == 1 else 0.0
        torch.nn.init.normal_(parameter, centre, 0.15, generator=torch.Generator().manual_seed(i))
    return net


def moved(net, dtype=torch.float32):
    """A copy on the device."""
    other = build_model(net.config, 0)
    other.load_state_dict(net.state_dict())
    return other.to(DEVICE, dtype)


def score(net, device, temperature=0.8):
    """(logprobs, entropies) of ACTIONS, on the CPU, and the packed rows' mask."""
    rows = pack_rows(PROMPTS, ACTIONS).to(device)
    out = net(rows.tokens, rows.positions, rows.mask, source_pos=rows.source_pos, targets=rows.targets,
              target_mask=rows.target_mask, temperature=temperature)  # fmt: skip
    return *out, rows.target_mask


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_scores_and_gradients_equal_the_cpus_in_fp32(family):
    here = small(family)
    there = moved(here)
    results = []
    for net, device in ((here, "cpu"), (there, DEVICE)):
        logp, entropy, _ = score(net, device)
        (logp.sum() + 0.1 * entropy.sum()).backward()
        gradients = {n: p.grad.cpu() for n, p in net.named_parameters()}
        results.append((logp.detach().cpu(), entropy.detach().cpu(), gradients))
    for one, two in zip(results[0][:2], results[1][:2]):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(gradient, results[1][2][name], atol=2e-4, rtol=2e-3, msg=name)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_bf16_is_near_fp32(family):
    net = small(family)
    exact, _, mask = score(net, "cpu")
    rounded, _, _ = score(moved(net, torch.bfloat16), DEVICE)
    error = (exact.exp() - rounded.cpu().exp())[mask].abs()
    assert error.mean() < 0.02 and error.max() < 0.15


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_greedy_replies_equal_the_cpus(family):
    net = small(family)
    replies = []
    for model in (net, moved(net)):
        with torch.no_grad():
            stream = Generator(model, [2], 3, 40).stream(PROMPTS, 24, temperature=0.0, rng=Rng(0, 0))
            replies.append(sorted((c.index, tuple(c.tokens), c.finish) for c in stream))
    assert replies[0] == replies[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampler_and_trainer_agree_and_samples_repeat(dtype):
    """PPO's ratio is exp(trainer - sampler): a bias here is a bias of every update."""
    net = moved(small("qwen3"), dtype)
    with torch.no_grad():
        runs = []
        for batch in (5, 5, 2):  # how many decode together must not matter in fp32
            stream = Generator(net, [2], batch, 40).stream(PROMPTS, 24, temperature=1.0, rng=Rng(7, 3))
            runs.append(sorted((c.index, tuple(c.tokens), tuple(c.logprobs)) for c in stream))
        assert runs[0] == runs[1], "the same seed, the same batch: the same bits"
        if dtype == torch.float32:
            assert [r[:2] for r in runs[0]] == [r[:2] for r in runs[2]]
        rows = pack_rows(PROMPTS, [[list(tokens)] for _, tokens, _ in runs[0]]).to(DEVICE)
        logp, _ = net(rows.tokens, rows.positions, rows.mask, source_pos=rows.source_pos, targets=rows.targets,
                      target_mask=rows.target_mask)  # fmt: skip
    differences = torch.cat([
        logp[i, : len(sampled)].cpu() - torch.tensor(sampled) for i, (_, _, sampled) in enumerate(runs[0])
    ])
    limit = 1e-4 if dtype == torch.float32 else 0.05
    assert differences.abs().mean() < limit
    assert abs(differences.exp().mean() - 1) < limit, "no bias: E[pi_trainer / pi_sampler] = 1"


def test_a_critic_is_fp32_at_its_head_and_equal():
    trunk = small("llama")
    here, there = ValueModel(trunk), ValueModel(moved(trunk))
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for critic in (here, there):
        critic.value_head.weight.data.copy_(weight)
    there.to(DEVICE)
    values = []
    for critic, device in ((here, "cpu"), (there, DEVICE)):
        rows = pack_rows(PROMPTS, ACTIONS).to(device)
        values.append(critic(rows.tokens, rows.positions, rows.mask, rows.source_pos, rows.target_mask))
    assert values[1].dtype == torch.float32
    torch.testing.assert_close(values[0], values[1].cpu(), atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(autouse=True)
def rehearse(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that tests start


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_reinforcement_learning_runs_and_its_first_ratio_is_one(run_dir, dtype):
    out = f"one_{dtype}"
    train(run_dir, out, steps=2, dtype=dtype)
    rows = metrics(run_dir, out)
    assert len(rows) == 2
    assert rows[0]["ratio_first"] == pytest.approx(1, abs=1e-5 if dtype == "fp32" else 1e-2)
    assert abs(rows[0]["mismatch_kl"]) < (1e-5 if dtype == "fp32" else 1e-2)
    train(run_dir, out, steps=3, dtype=dtype)
    assert metrics(run_dir, out)[-1]["step"] == 3, "and resumes"


def test_two_gpus_equal_one(run_dir):
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    train(run_dir, "alone", steps=2, dtype="fp32")
    train(run_dir, "pair", ranks=2, steps=2, dtype="fp32")
    for one, two in zip(metrics(run_dir, "alone"), metrics(run_dir, "pair"), strict=True):
        assert one["reward"] == two["reward"]
        assert one["kl"] == pytest.approx(two["kl"], abs=1e-4)
        assert one["policy_loss"] == pytest.approx(two["policy_loss"], abs=1e-4)
