"""LLM experts: what they are told, what counts as a reply, and collection against a real HTTP server with faults.

Experiments are faked (they have their own tests) except where a whole process is killed and resumed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import client as client_module
import collect
import config
import records
import tasks
from agent import AgentConfig, PromptTooLong, State, parse_reply
from client import Client, Endpoint
from environment import Experiment
from expert import EndpointVoice, LocalVoice, ModelExpert, Said, Spoken, tidy
from fake_server import Answer, FakeServer
from reward import Outcome
from rollout import Sampling, load_policy

ROOT = Path(__file__).resolve().parent.parent
NAME = "m-concrete"
CFG = AgentConfig(thought="short", edit_format="lines", max_prompt_tokens=4000)

needs_data = pytest.mark.skipif(
    not tasks.load(NAME).is_prepared(), reason="the micro tasks are not prepared: run `make data`"
)


def edit(depth: int, thought: str = "grow a deeper tree") -> str:
    script = tasks.load(NAME).sources()["train.py"].splitlines()
    line = next(i for i, text in enumerate(script, 1) if "max_depth" in text)
    args = json.dumps({"script_name": "train.py", "start_line_number": line, "end_line_number": line})
    code = re.sub(r"max_depth=\d+", f"max_depth={depth}", script[line - 1])
    return f"Thought: {thought}\nAction: Edit Script\nAction Input: {args}\n```python\n{code}\n```"


FINAL = 'Thought: that is all\nAction: Final Answer\nAction Input: {"final_answer": "done"}'


def explorer(body: dict) -> str:
    """An LLM that edits twice and ends; the depths it tries follow from what it is asked."""
    done = sum(m["role"] == "assistant" for m in body["messages"])
    if "could not be read" in body["messages"][-1]["content"]:
        done -= 1
    seed = sum(map(ord, body["messages"][0]["content"])) % 50
    return FINAL if done >= 2 else edit(5 + seed + done)


# ------------------------------------------------------------------------------------------- replies


def test_a_tidy_reply_has_the_form_that_is_taught():
    raw = f"Sure, here it is.\n\n**Thought:** grow\n{edit(7).split(chr(10), 1)[1]}\n\nObservation: score 0.1\n"
    assert tidy(raw, CFG) == edit(7, "grow")
    assert parse_reply(tidy(raw, CFG), CFG) == parse_reply(raw, CFG)
    with pytest.raises(ValueError, match="no line that starts with 'Thought:'"):
        tidy(edit(7).split("\n", 1)[1], CFG)
    assert tidy(edit(7), replace(CFG, thought="none")) == edit(7).split("\n", 1)[1]
    with pytest.raises(ValueError, match="no line that starts with 'Action:'"):
        tidy("I would rather not.", CFG)


def played(replies: list, retries: int) -> tuple[Said, list[State]]:
    asked = []

    def voice(state: State, number: int) -> Spoken:
        asked.append(state)
        text = replies[len(asked) - 1]
        return Spoken(text.removesuffix("<cut>"), text.endswith("<cut>"), 10, 3)

    state = State(NAME, [{"role": "user", "content": "start"}], tasks.load(NAME).sources(), 0.3)
    model = ModelExpert(voice, CFG, retries, range(99))
    said = model.reply(state)
    assert (model.prompt_tokens, model.completion_tokens) == (10 * len(asked), 3 * len(asked))
    return said, asked


def test_an_llm_is_asked_again_with_the_reason():
    said, asked = played(["nonsense", "Action: Dance\nAction Input: {}", edit(6) + "<cut>", edit(7)], 3)
    assert said.text == edit(7) and not said.cut
    assert [r["reply"] for r in said.refused] == ["nonsense", "Action: Dance\nAction Input: {}", edit(6)]
    reasons = [r["reason"] for r in said.refused]
    assert "Action:" in reasons[0] and "'Dance'" in reasons[1] and "cut off" in reasons[2]
    assert [len(state.messages) for state in asked] == [1, 3, 3, 3], "only the last bad reply is shown"
    assert asked[2].messages[1]["content"].startswith("Action: Dance")
    assert reasons[1] in asked[2].messages[2]["content"]


def test_the_last_bad_reply_is_taken_as_it_is():
    said, _ = played(["one", "two", "three"], 2)
    assert said.text == "three" and [r["reply"] for r in said.refused] == ["one", "two"]
    said, _ = played([edit(6) + "<cut>"], 0)
    assert said.cut and said.refused == []


def test_where_there_is_no_room_to_ask_again_the_bad_reply_is_taken():
    def voice(state: State, number: int) -> Spoken:
        if len(state.messages) > 1:
            raise PromptTooLong("full")
        return Spoken("nonsense", False, 1, 1)

    state = State(NAME, [{"role": "user", "content": "start"}], {}, 0.3)
    assert ModelExpert(voice, CFG, 3, range(9)).reply(state) == Said("nonsense", False, [])


def test_thinking_aloud_is_not_part_of_the_reply():
    said, _ = played([f"<think>\nAction: maybe\nAction: or not\n</think>\n\n{edit(9)}"], 0)
    assert said.text == edit(9)


def test_the_prompt_of_an_endpoint_keeps_to_the_limit():
    history = [{"role": "user", "content": "the task"}]
    for _ in range(6):
        history += [{"role": "assistant", "content": edit(5)}, {"role": "user", "content": "output " * 300}]
    state = State(NAME, history, tasks.load(NAME).sources(), 0.3)
    voice = EndpointVoice(None, replace(CFG, max_prompt_tokens=2000))
    messages = voice.prompt(state)
    assert sum(len(m["content"]) for m in messages) <= 8000 and "the task" in messages[0]["content"]
    assert "left out" in messages[2]["content"] and messages[-2]["content"] == edit(5)
    with pytest.raises(PromptTooLong, match="max_prompt_tokens = 50"):
        EndpointVoice(None, replace(CFG, max_prompt_tokens=50)).prompt(state)


# ------------------------------------------------------------------------------ collection, by real HTTP


class Box:
    """Stands in for collect.Environment: every script scores by its depth, at once."""

    def __init__(self, cfg, box, cache, coder=None):
        self.cfg, self.part, self.coder, self.workers = cfg, "reward", coder, 2
        self.counts = {"experiments": 0, "cache_hits": 0}
        self.pool = type("Pool", (), {"tier": "fake"})

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def experiment(self, task, files, script):
        depth = int(re.search(r"max_depth=(\d+)", files[script]).group(1))
        score = 0.4 - depth / 1000
        return Experiment(Outcome.OK_EDIT, f"validation rmsle {score}", {"reward": score}, 0.1)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**keys of collect.Config): `collect.py trajectories` with a server, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collect, "Environment", Box)
    monkeypatch.setattr(tasks.Task, "require_prepared", lambda task: None)
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.002)
    with FakeServer(explorer) as server:
        endpoint = Endpoint(server.url, "fake-4o", retries=2, timeout_s=5, price_in=1.0, price_out=4.0, in_flight=4)
        base = {"run": "x", "tasks": (NAME,), "trajectories": 12, "expert": "endpoint", "agent": CFG}
        cfg = collect.Config(endpoint=endpoint, max_steps=5, **base)

        def go(**keys):
            collect.collect_trajectories(replace(cfg, **keys))
            return rows()

        def rows():
            path = tmp_path / "runs/x/data/trajectories.jsonl"
            found = records.read_jsonl(path) if path.exists() else []
            return sorted(found, key=lambda row: (row["index"], row["copy"]))

        go.server, go.cfg, go.rows, go.folder = server, cfg, rows, tmp_path / "runs/x/data"
        yield go


def test_trajectories_of_an_endpoint(run, capsys):
    rows = run()
    assert [row["index"] for row in rows] == list(range(12))
    for row in rows:
        assert (row["expert"], row["model"], row["end"]) == ("endpoint", "fake-4o", "final")
        assert [s["action"] for s in row["steps"]] == ["Edit Script", "Edit Script", "Final Answer"]
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 3 + ["user"]
        assert [row["messages"][2 * t + 1]["content"] for t in range(3)] == [s["reply"] for s in row["steps"]]
        assert row["final_score"] == row["steps"][1]["score"] < row["initial_score"]
        assert 1 <= len(row["ideas"]) <= 3 and len({i["axis"] for i in row["ideas"]}) == len(row["ideas"])
        assert row["messages"][0]["content"].startswith(tasks.load(NAME).description.strip())
    bodies = [b["messages"][0]["content"] for b in run.server.requests[1:]]
    for row in rows:
        told = [b for b in bodies if all(i["text"] in b for i in row["ideas"])]
        assert told, "the expert reads its ideas"
        assert "Try these ideas" not in row["messages"][0]["content"], "who acts later does not"
    assert len({json.dumps(row["ideas"]) for row in rows}) > 6
    states = records.read_jsonl(run.folder / "states.jsonl")
    assert len(states) == 36 and not any("Try these ideas" in json.dumps(s) for s in states)
    assert run.server.most_active <= 4
    usage = sum(row["prompt_tokens"] for row in rows), sum(row["completion_tokens"] for row in rows)
    first, *later = (len(" ".join(m["content"] for m in b["messages"]).split()) for b in run.server.requests)
    assert usage[0] == sum(later)
    usage = usage[0] + first, usage[1] + len(explorer(run.server.requests[0]).split())  # which a start costs
    assert f"{usage[0]} prompt and {usage[1]} completion tokens" in capsys.readouterr().out


def test_ideas_may_stay_in_the_text_or_not_be_told_at_all(run):
    kept = run(trajectories=3, keep_ideas=True)
    assert all("Try these ideas" in row["messages"][0]["content"] for row in kept)
    run.folder.rename(run.folder.with_name("kept"))
    run.server.requests.clear()
    without = run(trajectories=3, ideas_from="none")
    assert not any("Try these ideas" in json.dumps(b) for b in run.server.requests)
    assert [row["ideas"] for row in without] == [[], [], []]


def write_ideas(folder) -> list[dict]:
    folder.mkdir(parents=True)
    entries = [{"axis": axis, "text": f"text {k} of {axis}"} for axis in tasks.AXES for k in range(3)]
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump({"ideas": entries}))
    return entries


def test_a_finished_collection_may_be_run_again_and_writes_its_states(run):
    write_ideas(run.folder.parent / "ideas")
    rows = run(ideas_from="run", trajectories=2)
    asked = len(run.server.requests)
    (run.folder / "states.jsonl").unlink()
    assert run(ideas_from="run", trajectories=2) == rows
    assert len(run.server.requests) == asked, "nothing is asked"
    assert len(records.read_jsonl(run.folder / "states.jsonl")) == sum(len(row["steps"]) for row in rows)


def test_ideas_of_the_run_are_drawn_from_what_was_chosen(run):
    entries = write_ideas(run.folder.parent / "ideas")
    rows = run(ideas_from="run")
    drawn = {i["text"] for row in rows for i in row["ideas"]}
    assert drawn <= {e["text"] for e in entries} and len(drawn) > 5
    assert all(len({i["axis"] for i in row["ideas"]}) == len(row["ideas"]) for row in rows)
    run.folder.rename(run.folder.with_name("mixed"))
    rows = run(ideas_from="run", pool=collect.PoolConfig(by_axis=False))
    assert any(len({i["axis"] for i in row["ideas"]}) < len(row["ideas"]) for row in rows), "whatever their axes"
    with pytest.raises(config.UserError, match=r"pool\.by_axis"):
        run(ideas_from="run", trajectories=99)
    run.folder.rename(run.folder.with_name("old"))
    with pytest.raises(tasks.TaskError, match=r"set collect\.expert = endpoint or local"):
        run(ideas_from="run", expert="scripted")


def test_bad_replies_are_recorded_beside_the_messages(run):
    run.server.answers = ["OK", "let me think", Answer(edit(9), finish="length"), edit(9) + "\nObservation: 0.1"]
    (row,) = run(trajectories=1)
    first, *rest = row["steps"]
    assert [r["reply"] for r in first["retries"]] == ["let me think", edit(9)] and first["reply"] == edit(9)
    assert not any("retries" in step for step in rest)
    assert "let me think" not in json.dumps(row["messages"])
    run.folder.rename(run.folder.with_name("old"))
    run.server.answers = ["OK", "no", "no", FINAL]
    (row,) = run(trajectories=1, retries=1)
    assert [s["outcome"] for s in row["steps"]] == ["invalid_format", "final"]
    assert row["steps"][0]["action"] is None and row["messages"][1]["content"] == "no"


def test_faults_of_the_server_cost_nothing_but_time(run):
    faults = [
        Answer(status=429, headers={"Retry-After": "0"}),
        Answer(status=500),
        Answer(""),
        Answer(body=b'{"choices": ['),
        Answer(edit(6), cut=40),
    ]
    count = [0]

    def shaky(body):
        with run.server.lock:
            count[0] += 1
            fault = count[0] % 3 == 0
        return faults[count[0] // 3 % 5] if fault else explorer(body)

    run.server.answer = shaky
    endpoint = replace(run.cfg.endpoint, retries=8)
    rows = run(endpoint=endpoint)
    assert [row["index"] for row in rows] == list(range(12))
    run.server.answer = explorer
    run.folder.rename(run.folder.with_name("shaky"))
    smooth = run(endpoint=endpoint)
    assert [r["messages"] for r in rows] == [r["messages"] for r in smooth]


def test_a_server_that_dies_and_returns_loses_and_doubles_nothing(run):
    run.server.answer = lambda body: explorer(body) if len(run.server.requests) < 12 else Answer(status=503)
    with pytest.raises(config.UserError, match=r"HTTP 503.*the same command goes on.*trajectories to go") as error:
        run(at_once=1)
    assert "\n" not in str(error.value)
    before = run.rows()
    assert 0 < len(before) < 12
    assert len(records.read_jsonl(run.folder / "states.jsonl")) == 3 * len(before)
    dropped = records.read_jsonl(run.folder / "dropped.jsonl")
    assert len(dropped) >= collect.FAILURES and not {d["index"] for d in dropped} & {r["index"] for r in before}
    assert sum(d["prompt_tokens"] for d in dropped) > 0, "the first of them had a reply or two"
    run.server.answer = explorer
    rows = run()
    assert [row["index"] for row in rows] == list(range(12))
    assert [row for row in rows if row["index"] in {r["index"] for r in before}] == before


def test_a_server_that_is_down_for_a_while_is_waited_for(run):
    def fall():
        while len(run.server.requests) < 8:
            time.sleep(0.001)
        run.server.stop()
        time.sleep(0.3)
        run.server.start()

    thread = threading.Thread(target=fall)
    thread.start()
    rows = run(endpoint=replace(run.cfg.endpoint, retries=12))
    thread.join()
    assert [row["index"] for row in rows] == list(range(12))


def test_an_expert_that_instructs_a_coder(run, monkeypatch, capsys):
    """The paper's way: two LLMs, over two connections; what the coder was asked and replied is kept."""

    def instruct(body: dict) -> str:
        done = sum(m["role"] == "assistant" for m in body["messages"])
        args = {"script_name": "train.py", "edit_instruction": f"depth {5 + done}", "save_name": "train.py"}
        return FINAL if done >= 2 else f"Thought: deeper\nAction: Edit Script\nAction Input: {json.dumps(args)}"

    def obey(body: dict) -> str:
        prompt = body["messages"][0]["content"]
        code, depth = re.search(r"(?s)```python\n(.*?)```.*depth (\d+)", prompt).groups()
        code = re.sub(r"max_depth=\d+", f"max_depth={depth}", code)
        return f"<think>\n```\nx = 1\n```\n</think>\n```python\n{code}```"

    with FakeServer(obey) as coder, Client(Endpoint(coder.url, "coder", price_in=1.0, price_out=1.0)) as client:
        monkeypatch.setattr(collect, "Environment", lambda *args: Box(*args, coder=client))
        run.server.answer = instruct
        rows = run(agent=replace(CFG, edit_mode="instruct", coder=client.endpoint), trajectories=3)
        used = client.usage
    assert [[s["outcome"] for s in row["steps"]] for row in rows] == [["ok_edit", "ok_edit", "final"]] * 3
    for row in rows:
        first, second = (step["coder"] for step in row["steps"][:2])
        assert "depth 5" in first[0]["prompt"] and "max_depth=6" in second[0]["reply"]
        assert "max_depth=6" in row["messages"][4]["content"], "the agent sees the difference"
    assert f"the coder: {used.prompt_tokens} prompt and {used.completion_tokens} completion" in capsys.readouterr().out


def test_a_budget_stops_it_and_holds_over_restarts(run, capsys):
    endpoint = replace(run.cfg.endpoint, max_tokens=50, max_total_tokens=6000)
    with pytest.raises(config.UserError, match=r"max_total_tokens = .*raise collect.endpoint.max_usd"):
        run(endpoint=endpoint, at_once=2)
    before = run.rows()
    assert 0 < len(before) < 12
    lost = records.read_jsonl(run.folder / "dropped.jsonl")
    spent = sum(r[key] for r in [*before, *lost] for key in ("prompt_tokens", "completion_tokens"))
    assert 2000 < spent <= 6000
    requests = len(run.server.requests)
    with pytest.raises(config.UserError, match="budget"):
        run(endpoint=endpoint)
    assert len(run.server.requests) <= requests + 3, "what is spent stays spent"
    with pytest.raises(config.UserError, match="max_total_tokens = 6010 does not allow"):
        run(endpoint=replace(endpoint, max_total_tokens=6010))  # the limit that was set, not what is left of it
    capsys.readouterr()
    rows = run(endpoint=replace(endpoint, max_total_tokens=None))
    lost = records.read_jsonl(run.folder / "dropped.jsonl")
    prompt, completion = (sum(r[key] for r in [*rows, *lost]) for key in ("prompt_tokens", "completion_tokens"))
    assert f"{prompt} prompt and {completion} completion tokens" in capsys.readouterr().out
    assert completion == sum(len(explorer(body).split()) for body in run.server.requests), "every reply is paid for, the first tiny ones too"
    assert [row["index"] for row in rows] == list(range(12))
    assert rows[: len(before)] != [] and all(row in rows for row in before)


def test_a_wrong_address_or_key_is_one_line_at_once(run, monkeypatch):
    started = time.monotonic()
    for answer, reason in ((Answer(status=401), "no key was sent"), (Answer(status=404), "check base_url")):
        run.server.answer = answer
        with pytest.raises(config.UserError, match=reason) as error:
            run()
        assert "collect.endpoint" in str(error.value)
    run.server.stop()
    with pytest.raises(config.UserError, match="no connection"):
        run()
    assert run.rows() == [] and time.monotonic() - started < 60


def test_a_directory_keeps_its_model_but_not_its_address(run):
    run(trajectories=2)
    run(trajectories=4, endpoint=replace(run.cfg.endpoint, base_url=run.cfg.endpoint.base_url + "/", in_flight=2))
    with pytest.raises(config.UserError, match=r"endpoint.model is 'fake-4o' there"):
        run(endpoint=replace(run.cfg.endpoint, model="other"))
    with pytest.raises(config.UserError, match=r"expert is 'endpoint' there and 'scripted' now"):
        run(endpoint=None, expert="scripted")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"endpoint": None}, "endpoint.base_url"),
        ({"expert": "local"}, "local.checkpoint"),
        ({"agent": replace(CFG, prompt="brief")}, "prompt = brief does not tell"),
        ({"agent": replace(CFG, edit_mode="instruct"), "renamed_copies": 1}, "edit_mode = direct"),
        ({"agent": replace(CFG, edit_mode="instruct"), "expert": "scripted"}, "edit_mode = direct"),
        ({"retries": -1}, "not negative"),
    ],
)
def test_what_cannot_be_is_said_before_it_starts(run, keys, reason):
    with pytest.raises(ValueError, match=reason):
        run(**keys)


# ------------------------------------------------------------------------------- whole processes, killed


FAKED = """
import collect, config, tasks, test_expert_llm
collect.Environment, tasks.Task.require_prepared = test_expert_llm.Box, lambda task: None
config.main(collect.main)
"""


def command(folder: Path, url: str, real: bool) -> dict:
    """A process of its own; `real`: with experiments in the sandbox."""
    section = {
        "run": "k",
        "tasks": [NAME],
        "trajectories": 8,
        "max_steps": 5,
        "expert": "endpoint",
        "endpoint": {"base_url": url, "model": "fake", "retries": 2, "in_flight": 2, "max_tokens": 1},
        "agent": {"thought": "short", "edit_format": "lines"},
        "sandbox": {"allow_weak": True, "workers": 1},
    }
    (folder / "c.yaml").write_text(json.dumps({"collect": section}))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    script = [str(ROOT / "collect.py")] if real else ["-c", FAKED]
    args = [sys.executable, *script, "trajectories", "--config", "c.yaml"]
    return {"args": args, "cwd": folder, "env": env, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


@pytest.mark.parametrize(
    ("signum", "real"),
    [
        (signal.SIGKILL, False),
        (signal.SIGINT, False),
        pytest.param(signal.SIGKILL, True, marks=[pytest.mark.slow, needs_data]),
    ],
)
def test_a_killed_collection_goes_on_in_a_fresh_process(tmp_path, signum, real):
    path = tmp_path / "runs/k/data/trajectories.jsonl"
    with FakeServer(lambda body: Answer(explorer(body), delay=0.1)) as server:
        process = subprocess.Popen(**command(tmp_path, server.url, real))
        deadline = time.monotonic() + 600
        while (path.read_text().count("\n") if path.exists() else 0) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
        if signum == signal.SIGINT:
            assert process.returncode == 130 and "the same command continues" in error
        asked = len(server.requests)
        time.sleep(0.5)
        assert len(server.requests) == asked, "nobody asks any more"
        if signum == signal.SIGINT:  # two may have been in flight
            answered = sum(len(explorer(body).split()) for body in server.requests[: asked - 2])
            told = [*records.read_jsonl(path), *records.read_jsonl(path.with_name("dropped.jsonl"))]
            assert sum(row["completion_tokens"] for row in told) >= answered, "what it cost is not forgotten"
        with open(path, "a") as file:
            file.write('{"index": 7, "copy"')  # a kill in the middle of a write
        before = path.read_text().splitlines()[:-1]
        assert 2 <= len(before) < 8
        done = subprocess.run(**command(tmp_path, server.url, real), timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    lines = path.read_text().splitlines()
    assert lines[: len(before)] == before
    assert sorted(json.loads(line)["index"] for line in lines) == list(range(8))


# ------------------------------------------------------------------------------------ a local checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from model import ModelConfig
    from weights import build_model, save_model, train_tokenizer

    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer([edit(5), FINAL] * 20, 320)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
    }
    cfg = ModelConfig("llama", len(tokenizer), **shape, tie_word_embeddings=True, eos_ids=(tokenizer.eos_token_id,))
    save_model(build_model(cfg, 0), path, tokenizer=tokenizer)
    return str(path)


SMALL = replace(CFG, prompt="brief", max_prompt_tokens=1500, max_new_tokens=12)


def test_a_local_reply_depends_on_its_number_and_not_on_its_batch(checkpoint):
    env = type("Env", (), {"cfg": SMALL})
    states = [
        State(NAME, [{"role": "user", "content": f"start {k}"}], tasks.load(NAME).sources(), 0.3) for k in range(6)
    ]

    def replies(order: list[int], threads: int) -> dict:
        voice, found = LocalVoice(load_policy(checkpoint, env, Sampling(max_batch=4)), 0), {}

        def ask(k):
            found[k] = voice(states[k], 10 + k).text

        for i in range(0, 6, threads):
            group = [threading.Thread(target=ask, args=[k]) for k in order[i : i + threads]]
            for thread in group:
                thread.start()
            for thread in group:
                thread.join()
        voice.close()
        return found

    alone = replies([0, 1, 2, 3, 4, 5], 1)
    assert replies([5, 3, 1, 0, 2, 4], 6) == alone and len(set(alone.values())) > 1


def test_a_closed_local_voice_leaves_nobody_waiting(checkpoint):
    voice = LocalVoice(load_policy(checkpoint, type("Env", (), {"cfg": SMALL}), Sampling(max_batch=4)), 0)
    voice.close()
    with pytest.raises(RuntimeError, match="closed"):
        voice(State(NAME, [{"role": "user", "content": "start"}], tasks.load(NAME).sources(), 0.3), 1)
    short = replace(SMALL, max_prompt_tokens=9)
    voice = LocalVoice(load_policy(checkpoint, type("Env", (), {"cfg": short}), Sampling(max_batch=4)), 0)
    with pytest.raises(PromptTooLong):
        voice(State(NAME, [{"role": "user", "content": "start"}], tasks.load(NAME).sources(), 0.3), 1)


def test_trajectories_of_a_checkpoint_are_a_function_of_the_seed(run, checkpoint):
    keys = {
        "expert": "local",
        "local": collect.LocalConfig(checkpoint),
        "agent": SMALL,
        "ideas_from": "none",
        "trajectories": 5,
        "max_steps": 2,
        "retries": 1,
    }
    rows = run(**keys, at_once=1)
    assert len(rows) == 5 and all(row["model"] == checkpoint for row in rows)
    assert all(len(row["steps"][0]["retries"]) == 1 for row in rows), "random weights say nothing readable"
    assert len({row["steps"][0]["reply"] for row in rows}) == 5
    run.folder.rename(run.folder.with_name("one"))
    assert run(**keys, at_once=8) == rows
    run.folder.rename(run.folder.with_name("two"))
    assert run(**keys, seed=1) != rows
