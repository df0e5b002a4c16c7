"""Fine-tuning: batches and losses against plain loops, and whole runs in fresh processes."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import dist
import run_kit
import tasks
import train_sft
from agent import Action, AgentConfig, format_reply
from expert import edit_action
from filters import Filters, keep_steps
from generate import Generator
from model import ModelConfig
from train_sft import batch_loss, collate, learning_rate, micro_batches, weight_of
from weights import build_model, load_model, save_model, train_tokenizer

EXAMPLES = [([5, 6, 7], [8, 9]), ([5], [6, 7, 8]), ([1, 2, 3, 4, 5], [9])]


def tiny_model():
    return build_model(ModelConfig("qwen2", 12, 16, 32, 1, 2, 2, 8, tie_word_embeddings=True), 0)


def test_weights_cover_the_reply_and_its_end():
    tokens, weights = collate(EXAMPLES, 0.25, 0, "cpu")
    assert tokens[1].tolist() == [5, 6, 7, 8, 0, 0]
    assert weights[0].tolist() == [0.25, 0.25, 1, 1, 0]
    assert weights[1].tolist() == [1, 1, 1, 0, 0]
    assert weights.sum().item() == weight_of(EXAMPLES, 0.25)


@pytest.mark.parametrize("prompt_weight", [0.0, 0.3])
def test_the_loss_is_that_of_a_plain_loop_at_any_micro_batch_size(prompt_weight):
    model = tiny_model()
    expected = torch.zeros(())
    for prompt, reply in EXAMPLES:
        ids = prompt + reply
        logp = model.unembed(model(torch.tensor([ids])))[0].log_softmax(-1)
        for t in range(1, len(ids)):
            weight = 1.0 if t >= len(prompt) else prompt_weight
            expected = expected - weight * logp[t - 1, ids[t]]
    expected.backward()
    gradient = model.embed.weight.grad.clone()
    for limit in (1, 9, 1000):
        model.zero_grad()
        total = 0.0
        for group in micro_batches(EXAMPLES, limit):
            loss = batch_loss(model, group, prompt_weight, 0, "cpu")
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(expected.item(), rel=1e-5)
        assert torch.allclose(model.embed.weight.grad, gradient, atol=1e-5)


def test_the_cosine():
    cfg = train_sft.Config(run="x", lr=1.0, warmup=0.1)
    rates = [learning_rate(u, 100, cfg) for u in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_trajectory_is_held_out_with_all_its_copies():
    rows = [{"index": i, "copy": copy} for i in range(40) for copy in range(3)]
    held = train_sft.heldout_indices(rows, train_sft.Config(run="x", heldout=0.25))
    assert len(held) == 10 and held < set(range(40))
    assert held == train_sft.heldout_indices(rows[::-3], train_sft.Config(run="x", heldout=0.25))
    assert held != train_sft.heldout_indices(rows, train_sft.Config(run="x", heldout=0.25, seed=1))


# --------------------------------------------------------------------------------------------- filters

LINES = AgentConfig(edit_format="lines", thought="short")


def an_edit(idea: tasks.Idea, task: str = "m-concrete", thought: str = "") -> dict:
    script = tasks.load(task).sources()["train.py"]
    action = edit_action(script, "train.py", idea, LINES)
    reply = format_reply(replace(action, thought={"Thought": thought or idea.text}), LINES)
    files = {"train.py": script}
    return {"action": "Edit Script", "reply": reply, "outcome": "ok_edit", "score": 0.2, "files": files, "undo": {}}


FINISH = {"action": "Final Answer", "reply": 'Thought: done\nAction: Final Answer\nAction Input: {"final_answer": "x"}'}
FINISH |= {"outcome": "final", "score": None, "files": {}, "undo": {}}
BROKEN = {"action": None, "reply": "hm", "outcome": "invalid_format", "score": None, "files": {}, "undo": {}}


def a_row(index: int, *steps: dict, task: str = "m-concrete", **keys) -> dict:
    row = {"index": index, "copy": 0, "task": task, "steps": list(steps), "end": "final", "initial_score": 0.36}
    return row | {"final_score": 0.2} | keys


def kept(rows: list[dict], **keys) -> tuple[list[list[int]], dict]:
    return keep_steps(rows, Filters(**keys), LINES, 0)


def by_axis(task: str) -> dict[str, list[tasks.Idea]]:
    """Ideas that change something, by the block that they change."""
    script, found = tasks.load(task).sources()["train.py"], {axis: [] for axis in tasks.AXES}
    for idea in tasks.load(task).ideas():
        if idea.block == idea.axis and tasks.apply_block(script, idea.block, idea.code) != script:
            found[idea.axis].append(idea)
    return found


def test_by_default_only_what_cannot_be_read_is_left_out():
    a, b = by_axis("m-concrete")["data"][:2]
    rows = [a_row(0, an_edit(a), an_edit(a), BROKEN, FINISH), a_row(1, an_edit(b), FINISH, end="internal")]
    assert kept(rows) == ([[0, 1, 3], [0, 1]], {"unparsable": 1, "episodes": 0})
    assert kept(rows, unparsable=False) == ([[0, 1, 2, 3], [0, 1]], {"episodes": 0})


def test_episodes_are_left_out_whole():
    a = by_axis("m-concrete")["data"][0]
    failed = an_edit(a) | {"outcome": "script_error"}
    best = tasks.load("m-concrete").scale("reward").best
    rows = [
        a_row(0, an_edit(a), FINISH, final_score=best),
        a_row(1, an_edit(a), FINISH, final_score=0.5),  # rmsle: worse than at the start
        a_row(2, failed, FINISH, final_score=best),
        a_row(3, an_edit(a), end="truncated", final_score=best),
    ]
    assert kept(rows, min_gain=0.5)[0] == [[0, 1], [], [0, 1], [0]]
    assert kept(rows, need_edit=True) == ([[0, 1], [0, 1], [], [0]], {"unparsable": 0, "episodes": 2})
    assert kept(rows, ends=("truncated", "minutes"))[0] == [[0, 1], [0, 1], [0, 1], []]


def test_actions_whose_prompt_is_too_long_are_left_out_and_counted(capsys):
    rows = [trajectory(0), trajectory(1)]
    rows[1]["steps"][0]["files"] = {"train.py": "x = 1\n" * 200}
    tokenizer = train_tokenizer(["x = 1", "the task"], 300)
    agent = AgentConfig(prompt="brief", thought="short", max_prompt_tokens=200)
    cfg = train_sft.Config(run="x", agent=agent)
    ((_, reply),) = train_sft.make_examples([(row, [0]) for row in rows], cfg, tokenizer)
    assert reply[-1] == tokenizer.eos_token_id
    assert "1 actions left out, whose prompt is too long" in capsys.readouterr().out


def test_the_same_edit_is_kept_so_often_and_other_actions_always():
    a, b = by_axis("m-concrete")["data"][:2]
    other = by_axis("m-ames")["data"][0]
    rows = [
        a_row(0, an_edit(a), an_edit(b), FINISH),
        a_row(1, an_edit(a, thought="again the same"), FINISH),
        a_row(2, an_edit(a), an_edit(b), FINISH),
        a_row(3, an_edit(other, "m-ames"), FINISH, task="m-ames"),
    ]
    steps, dropped = kept(rows, max_same=1)
    assert steps == [[0, 1, 2], [1], [2], [0, 1]] and dropped["repeated"] == 3
    assert kept(rows, max_same=2)[0] == [[0, 1, 2], [0, 1], [1, 2], [0, 1]]


def test_comments_and_spaces_make_no_other_edit_but_places_and_values_do():
    def lines(code: str, first: int = 3) -> dict:
        args = {"script_name": "train.py", "start_line_number": first, "end_line_number": 4}
        reply = format_reply(Action("Edit Script", args, {"Thought": "x"}, code), LINES)
        return {"action": "Edit Script", "reply": reply, "outcome": "ok_edit", "score": 0.3, "files": {}, "undo": {}}

    code = "x = scale(x)\ny = f(x, depth=8)"
    same = [code, "# first\nx = scale( x )\n\ny = f(x, depth=8)  # deeper"]
    other = [lines("x = scale(x)\ny = f(x, depth=10)"), lines("x = scale(x)"), lines(code, first=2)]
    assert kept([a_row(0, *map(lines, same), *other, FINISH)], max_same=1)[0] == [[0, 2, 3, 4, 5]]


def test_instructions_in_nearly_the_same_words_are_one():
    def instruct(text: str, save: str = "train.py") -> dict:
        args = {"script_name": "train.py", "edit_instruction": text, "save_name": save}
        reply = f"Thought: x\nAction: Edit Script\nAction Input: {json.dumps(args)}"
        return {"action": "Edit Script", "reply": reply, "outcome": "ok_edit", "score": 0.3, "files": {}, "undo": {}}

    texts = [
        "Use a random forest with 100 trees instead of the single tree.",
        "use the random forest, with 100 trees instead of a single tree",  # the same words
        "Use a random forest with 100 trees instead of that single decision tree.",  # one more
        "Use a random forest with 200 trees instead of the single tree.",  # another number
        "Scale the inputs before the single tree.",
    ]
    row = a_row(0, *map(instruct, texts), instruct(texts[0], "better.py"), FINISH)
    agent = AgentConfig(thought="short", edit_mode="instruct")
    steps = [keep_steps([row], Filters(max_same=1, same_words=s), agent, 0)[0][0] for s in (1.0, 0.8, 0.05)]
    assert steps == [[0, 2, 3, 4, 6], [0, 3, 4, 6], [0, 3, 4, 6]]
    with pytest.raises(ValueError, match="same_words"):
        Filters(same_words=0)


def test_axes_are_balanced_and_other_actions_stay():
    ideas = by_axis("m-concrete")
    pick = [ideas["data"][k % len(ideas["data"])] for k in range(12)] + ideas["model"][:3] + [ideas["learning"][0]] * 5
    rows = [a_row(i, an_edit(idea), FINISH) for i, idea in enumerate(pick)]
    steps, dropped = kept(rows, balance_axes=True)
    axes = Counter(idea.axis for idea, s in zip(pick, steps) if 0 in s)
    assert axes == {"data": 3, "model": 3, "learning": 3} and dropped["balance"] == 11
    assert all(1 in s for s in steps)
    assert steps == kept(rows, balance_axes=True)[0] != keep_steps(rows, Filters(balance_axes=True), LINES, 1)[0]


def test_no_task_has_more_than_its_share():
    a, b = by_axis("m-concrete")["data"][0], by_axis("m-ames")["data"][0]
    rows = [a_row(i, an_edit(a), FINISH) for i in range(9)] + [a_row(9, an_edit(b, "m-ames"), FINISH, task="m-ames")]
    steps, dropped = kept(rows, max_per_task=5)
    assert sum(map(len, steps[:9])) == 5 and steps[9] == [0, 1] and dropped["cap"] == 13
    with pytest.raises(ValueError, match="max_per_task"):
        Filters(max_per_task=-1)


# ------------------------------------------------------------------------------------------ whole runs

REPLY = 'Thought: tree {i}\nAction: Final Answer\nAction Input: {{"final_answer": "{i}"}}'


def trajectory(i: int) -> dict:
    text = f"the task\nvalidation rmsle 0.3{i % 3}"
    reply = REPLY.format(i=i % 3)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    step = {"action": "Final Answer", "reply": reply, "outcome": "final", "score": None, "seconds": 0}
    step |= {"files": {"train.py": f"x = {i % 3}\n"}, "undo": {}}
    return {
        "index": i,
        "copy": 0,
        "task": "m-concrete",
        "messages": [*messages, {"role": "user", "content": "The episode has ended."}],
        "steps": [step],
        "initial_score": 0.3,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    for run in ("whole", "killed", "ranks", "broken"):
        data = folder / "runs" / run / "data"
        data.mkdir(parents=True)
        (data / "trajectories.jsonl").write_text("".join(json.dumps(trajectory(i)) + "\n" for i in range(20)))
    (folder / "c.yaml").write_text(json.dumps({"train_sft": {}}))
    return folder


KEYS = {
    "max_updates": 60,
    "epochs": 100,
    "batch_size": 6,
    "lr": "1e-2",
    "heldout": 0.1,
    "eval_every": 20,
    "save_every": 5,
    "prompt_weight": 0.1,
    "agent.prompt": "brief",
    "agent.thought": "short",
    "model.vocab_size": 320,
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
}


def command(folder: Path, run: str, ranks: int = 1, **keys) -> dict:
    words = run_kit.command(folder, "train_sft.py", ranks, **{"run": run, **KEYS, **keys})
    return words | {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}


@pytest.fixture(scope="module")
def whole(folder):
    done = subprocess.run(**command(folder, "whole"), timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs" / "whole" / "sft"


def test_the_model_learns_the_replies_and_to_stop(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["update"] for r in rows] == list(range(1, 61))
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"] and rows[-1]["heldout_loss"] < 0.5
    tokenizer, model = AutoTokenizer.from_pretrained(whole), load_model(whole)
    row = trajectory(1)
    cfg = train_sft.AgentConfig(prompt="brief", thought="short")
    prompt = train_sft.encode_state(train_sft.states_of(row)[0], cfg, tokenizer)
    (completion,) = Generator(model, (tokenizer.eos_token_id,), 1, 400).stream([prompt], 100, 0.0)
    assert completion.finish == "stop"
    pattern = r'Thought: tree \d\nAction: Final Answer\nAction Input: {"final_answer": "\d"}'
    assert re.fullmatch(pattern, tokenizer.decode(completion.tokens[:-1]))


def test_a_killed_run_resumes_bit_for_bit(folder, whole):
    process = subprocess.Popen(**command(folder, "killed"))
    out = folder / "runs" / "killed" / "sft"
    deadline = time.monotonic() + 100
    while not dist.find_latest(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "model.safetensors").exists(), "killed before the end"
    done = subprocess.run(**command(folder, "killed"), timeout=200)
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr[-2000:]
    one, two = load_file(whole / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    again = subprocess.run(**command(folder, "killed"), timeout=100)
    assert again.returncode == 0 and "finished already" in again.stdout


def test_sigterm_saves_and_says_so(folder):
    shutil.rmtree(folder / "runs" / "killed" / "sft")
    process = subprocess.Popen(**command(folder, "killed", max_updates=100000, epochs=100000))
    out = folder / "runs" / "killed" / "sft"
    deadline = time.monotonic() + 100
    while not dist.find_latest(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert dist.find_latest(out)


def test_a_pretrained_model_learns_to_end_its_turns(folder, tmp_path):
    """As Qwen2.5-7B: the tokenizer's EOS ends documents, the chat template's turns end with another token."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = train_tokenizer([json.dumps(trajectory(i)) for i in range(3)], 320, special)
    tokenizer.eos_token = "<|endoftext|>"
    shape = ModelConfig("llama", len(tokenizer), 32, 64, 1, 2, 2, 16, tie_word_embeddings=True, eos_ids=(0,))
    save_model(build_model(shape, 0), tmp_path / "base", tokenizer=tokenizer)
    data = folder / "runs" / "pretrained" / "data"
    data.mkdir(parents=True)
    shutil.copy(folder / "runs" / "whole" / "data" / "trajectories.jsonl", data)
    done = subprocess.run(**command(folder, "pretrained", **{"model.path": tmp_path / "base"}), timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    out = data.parent / "sft"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [end, 0], "also for who serves it"
    cfg = train_sft.AgentConfig(prompt="brief", thought="short")
    prompt = train_sft.encode_state(train_sft.states_of(trajectory(1))[0], cfg, tokenizer)
    (completion,) = Generator(load_model(out), (end,), 1, 600).stream([prompt], 150, 0.0)
    assert completion.finish == "stop" and completion.tokens[-1] == end


def test_two_ranks_equal_one(folder, whole):
    done = subprocess.run(**command(folder, "ranks", ranks=2), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        load_file(whole / "model.safetensors"),
        load_file(folder / "runs" / "ranks" / "sft" / "model.safetensors"),
    )
    losses = [
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (whole, folder / "runs" / "ranks" / "sft")
    ]
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=1e-4)
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 0.05  # 60 Adam steps amplify rounding


@pytest.mark.parametrize(
    ("content", "keys", "reason"),
    [
        ("", {}, "empty"),
        ("nonsense\n", {}, "line 1"),
        (None, {}, "does not exist"),
        ("ok", {"batch_size": 64}, "fewer than batch_size"),
        ("ok", {"agent.max_prompt_tokens": 5}, "max_prompt_tokens"),
        ("ok", {"model.path": "nowhere"}, "nowhere"),
        ("ok", {"lrr": 1}, "lrr"),
        ("ok", {"filters.need_edit": "true"}, "leave nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, content, keys, reason):
    shutil.rmtree(folder / "runs" / "broken" / "sft", ignore_errors=True)
    path = folder / "runs" / "broken" / "data" / "trajectories.jsonl"
    path.unlink(missing_ok=True)
    if content == "ok":
        path.write_text("".join(json.dumps(trajectory(i)) + "\n" for i in range(20)))
    elif content is not None:
        path.write_text(content)
    done = subprocess.run(**command(folder, "broken", **keys), timeout=100)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and reason in lines[0], done.stderr[-2000:]
