"""Instruct mode: edits and questions go through a coder, here a real HTTP server that plays one."""

import json
import re
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest

import client as client_module
import coder
import config
import reward
import tasks
from agent import Action, AgentConfig, State, format_reply
from client import Client, Endpoint
from environment import Environment, SandboxConfig, initial_state, transition
from fake_server import Answer, FakeServer
from reward import Outcome

BOX = SandboxConfig(allow_weak=True, workers=1)
NAME = "m-concrete"
BOOSTING = (
    "from sklearn.ensemble import GradientBoostingRegressor\nmodel = GradientBoostingRegressor(random_state=0)\n"
)

needs_data = pytest.mark.skipif(
    not tasks.load(NAME).is_prepared(), reason="the micro tasks are not prepared: run `make data`"
)


def obey(body: dict) -> str:
    """A coder that can do one thing: an instruction "A -> B" replaces A by B."""
    prompt = body["messages"][0]["content"]
    script = re.search(r"(?ms)^(```+)python\n(.*?)^\1$", prompt)
    if not script:
        return "OK"
    old, new = re.search(r"(?m)^(.*) -> (.*)$", prompt).groups()
    code = script.group(2).replace(old, new.replace("\\n", "\n"))
    fence = script.group(1)
    return f"Sure:\n\n{fence}python\n{code}{fence}\n\nRun it with\n```\npython train.py\n```"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.002)


@pytest.fixture(scope="module")
def module_server():
    with FakeServer() as server:
        yield server


@pytest.fixture
def server(module_server):
    module_server.answer, module_server.answers = obey, []
    module_server.requests.clear()
    return module_server


def config_for(server: FakeServer, **keys) -> AgentConfig:
    endpoint = Endpoint(server.url, "coder", **{"retries": 1, "timeout_s": 30.0, "in_flight": 4, **keys})
    return AgentConfig(thought="short", edit_mode="instruct", coder=endpoint)


@pytest.fixture(scope="module")
def env(module_server, tmp_path_factory):
    with Environment(config_for(module_server), BOX, tmp_path_factory.mktemp("cache")) as env:
        yield env


@pytest.fixture
def start(server, env) -> State:
    state = initial_state(tasks.load(NAME), env)
    server.requests.clear()
    return state


def say(env, name: str, **args) -> str:
    return format_reply(Action(name, args, {"Thought": "try"}), env.cfg)


def edit(env, instruction: str = "a comment -> x", script: str = "train.py", save: str = "train.py") -> str:
    args = {"script_name": script, "edit_instruction": instruction, "save_name": save}
    return say(env, "Edit Script", **args)


def model_line(state: State) -> str:
    return next(line for line in state.files["train.py"].splitlines() if line.startswith("model = "))


def improve(env, state: State, **names) -> str:
    return edit(env, f"{model_line(state)} -> {BOOSTING!r}".replace("'", ""), **names)


def python(code: str) -> str:
    return f"```python\n{code}\n```"


# --------------------------------------------------------------------------------------------- edits


@needs_data
def test_an_edit_is_written_by_the_coder_run_and_scored(env, start, server):
    step = transition(start, improve(env, start), env)
    assert step.outcome is Outcome.OK_EDIT, step.feedback
    assert tasks.load(NAME).better(step.after, step.before) and step.state.score == step.after
    assert "GradientBoosting" in step.state.files["train.py"]
    assert f"\n-{model_line(start)}\n" in step.feedback and "\n\nThe script prints:\n" in step.feedback
    assert step.action.args["save_name"] == "train.py" and step.action.edit is None
    (exchange,) = step.coder
    assert exchange["prompt"] == server.requests[0]["messages"][0]["content"]
    assert start.files["train.py"] in exchange["prompt"] and exchange["reply"].startswith("Sure:")
    assert exchange["finish"] == "stop" and exchange["completion_tokens"] > 0
    json.dumps(step.coder)
    assert "Sure" not in json.dumps(step.state.to_row()), "the coder's words are no part of the state"
    undone = transition(step.state, say(env, "Undo Edit Script", script_name="train.py"), env)
    assert undone.outcome is Outcome.OK_EDIT and undone.after == start.score
    assert undone.state.files == start.files and undone.coder == [] and len(server.requests) == 1


@needs_data
def test_the_result_may_be_saved_under_another_name(env, start):
    step = transition(start, improve(env, start, save="better.py"), env)
    assert step.outcome is Outcome.OK_EDIT and step.after != start.score, "the new script is the one that runs"
    assert step.state.files["train.py"] == start.files["train.py"]
    assert f"\n-{model_line(start)}\n" in step.feedback, "the diff is to the script that was edited"
    refused = transition(step.state, say(env, "Undo Edit Script", script_name="train.py"), env)
    assert refused.outcome is Outcome.INVALID_ACTION
    undone = transition(step.state, say(env, "Undo Edit Script", script_name="better.py"), env)
    assert undone.outcome is Outcome.OK_EDIT and undone.after == start.score
    assert undone.state.files["better.py"] == start.files["train.py"]
    assert undone.state.undo["better.py"] == []

    onto = transition(step.state, edit(env, "# model -> # the model", save="better.py"), env)
    assert onto.state.files["better.py"] == start.files["train.py"].replace("# model", "# the model")
    undone = transition(onto.state, say(env, "Undo Edit Script", script_name="better.py"), env)
    assert undone.state.files == step.state.files and undone.after == step.after


@needs_data
def test_what_the_coder_wrote_runs_once_whoever_asked_for_it(env, start, monkeypatch):
    runs, real = [], env._run
    monkeypatch.setattr(env, "_run", lambda *args: runs.append(1) or real(*args))
    reply = edit(env, "# model -> # the same model")
    first, second = transition(start, reply, env), transition(start, reply, env)
    assert first.after == second.after == start.score and len(runs) == 1


@needs_data
def test_an_error_of_the_script_is_the_agents(env, start):
    step = transition(start, edit(env, f"{model_line(start)} -> model = 1 / 0"), env)
    assert step.outcome is Outcome.SCRIPT_ERROR and "ZeroDivisionError" in step.feedback


FAILURES = {
    "no code": (["I would rather not."] * 2, 2, "no closed block"),
    "no end": (["```python\nx = 1"] * 2, 2, "no closed block"),
    "no python": ([python("def (:")] * 2, 2, "not valid Python: invalid syntax (line 1)"),
    "too deep": ([python("-" * 60_000 + "1")] * 2, 2, "not valid Python"),
    "nothing": ([python("")] * 2, 2, "The block of code is empty"),
    "cut off": ([Answer(python("x = 1"), finish="length")], 1, "cut off"),
    "down": ([Answer(status=500)] * 2, 2, "could not be reached"),
    "too long for it": ([Answer("maximum context length", status=400)], 1, "could not be reached"),
    "too long": ([python("x = 1\n" * 10_001)], 1, "longer than 60000 characters"),
}


@needs_data
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_the_coder_changes_nothing_and_costs_nothing(env, start, server, name):
    server.answers, requests, reason = list(FAILURES[name][0]), *FAILURES[name][1:]
    step = transition(start, edit(env), env)
    assert step.outcome is Outcome.CODER_FAILED
    assert step.feedback.startswith("Nothing was done: ") and reason in step.feedback
    assert "127.0.0.1" not in step.feedback and "500" not in step.feedback
    assert (step.state.files, step.state.undo, step.state.score) == (start.files, start.undo, start.score)
    assert step.after is None and len(server.requests) == requests and server.answers == []
    assert all("reply" in e or server.url in e["error"] for e in step.coder) and step.coder
    scale = tasks.load(NAME).scale("reward")
    for table in reward.REWARDS:
        value = reward.compute(step.outcome, step.before, step.after, scale, table)
        assert value == (0.5 if table == "sigmoid" else 0.0)


@needs_data
def test_a_coder_that_changes_nothing_has_failed(env, start):
    step = transition(start, edit(env, "what is not there -> x"), env)
    assert step.outcome is Outcome.CODER_FAILED and "changed nothing" in step.feedback


@needs_data
def test_a_reply_without_code_is_asked_for_once_more(env, start, server):
    server.answers = ["I would rather not."]
    step = transition(start, edit(env, "# model -> # a model"), env)
    assert step.outcome is Outcome.OK_EDIT and len(step.coder) == 2
    roles = [m["role"] for m in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert "no closed block" in server.requests[1]["messages"][2]["content"]


@needs_data
def test_a_coder_that_dies_and_comes_back(env, start, server):
    server.stop()
    step = transition(start, edit(env, "# model -> # my model"), env)
    assert step.outcome is Outcome.CODER_FAILED and "no connection" in step.coder[0]["error"]
    server.start()
    assert transition(step.state, edit(env, "# model -> # my model"), env).outcome is Outcome.OK_EDIT


INVALID = [
    ({"script": "missing.py"}, "no script"),
    ({"script": "helper.py"}, "read-only"),
    ({"save": "helper.py"}, "read-only"),
    ({"save": "data/train.py"}, "read-only"),
    ({"save": "submission.csv"}, "read-only"),
    ({"save": "train.txt"}, "must be a Python script"),
    ({"save": "../train.py"}, "outside"),
    ({"save": "train.py/x.py"}, "both a file and a directory"),
    ({"instruction": " \n"}, "edit_instruction is empty"),
]


@needs_data
@pytest.mark.parametrize(("names", "reason"), INVALID)
def test_a_wrong_edit_is_the_agents_fault_and_costs_no_coder(env, start, server, names, reason):
    step = transition(start, edit(env, **names), env)
    assert step.outcome is Outcome.INVALID_ACTION and reason in step.feedback
    assert server.requests == [] and step.coder == [] and step.state.files == start.files


def test_a_script_longer_than_a_reply_is_not_sent(server):
    log, client = [], Client(Endpoint(server.url, "coder", max_tokens=100))
    with pytest.raises(coder.CoderFailed, match=r"train.py is too long for the coder.*\(402 characters\)"):
        coder.write_edit(client, "train.py", "x" * 402, "shorten it", log)
    assert server.requests == [] and log == []


CODES = [
    ("```python\nx = 1\n```", "x = 1\n"),
    ("Here:\n\n  ```py\nx = 1\r\ny = 2\r\n  ```\nDone.", "x = 1\ny = 2\n"),
    ("```bash\npip\n```\n```python\nx = 1\nx = 2\n```\n```\nx\n```", "x = 1\nx = 2\n"),
    ('````python\ns = """\n```\nx\n```\n"""\n````', 's = """\n```\nx\n```\n"""\n'),
]


@pytest.mark.parametrize(("reply", "code"), CODES)
def test_the_code_in_a_reply(reply, code):
    assert coder.find_code(reply) == (code, "")


@needs_data
def test_a_script_with_fences_of_its_own_survives(env, start):
    script = f'"""Notes\n```\ncode\n```\n"""\n{start.files["train.py"]}'
    state = replace(start, files={"train.py": script})
    step = transition(state, edit(env, "# model -> # some model"), env)
    assert step.outcome is Outcome.OK_EDIT
    assert step.state.files["train.py"] == script.replace("# model", "# some model")


# ------------------------------------------------------------------------------------------- reading


@needs_data
def test_a_short_file_is_read_at_once(env, start, server):
    server.answer = "It is a linear model."
    step = transition(start, say(env, "Understand File", file_name="train.py", things_to_look_for="the model"), env)
    assert step.outcome is Outcome.OK_ACTION and step.feedback == "It is a linear model."
    assert step.after is None and step.state.files == start.files
    (body,) = server.requests
    prompt = body["messages"][0]["content"]
    assert start.files["train.py"].rstrip() in prompt and "Look for this: the model" in prompt
    assert [e["reply"] for e in step.coder] == ["It is a linear model."]


@needs_data
def test_a_long_file_is_read_in_pieces(env, start, server):
    server.answer = lambda body: f"note {len(server.requests)}"
    text = "\n".join(f"# line {i}" for i in range(2500))
    state = replace(start, files={**start.files, "long.py": text})
    step = transition(state, say(env, "Understand File", file_name="./long.py", things_to_look_for="line 7"), env)
    pieces = coder.split_text(text)
    assert step.outcome is Outcome.OK_ACTION and len(pieces) == 3 and step.feedback == "note 4"
    prompts = [body["messages"][0]["content"] for body in server.requests]
    for i, piece in enumerate(pieces):
        assert f"part {i + 1} of 3 of the file long.py" in prompts[i] and piece.rstrip("\n") in prompts[i]
    assert all(f"Part {i}: note {i}\n" in prompts[3] for i in (1, 2, 3))
    assert [e["prompt"] for e in step.coder] == prompts


@needs_data
def test_data_can_be_read_and_nothing_outside(env, start, server):
    server.answer = "columns"
    name = next(tasks.load(NAME).public.glob("*.csv")).name
    reply = say(env, "Understand File", file_name=f"data/{name}", things_to_look_for="columns")
    assert transition(start, reply, env).outcome is Outcome.OK_ACTION
    sent = len(server.requests)
    for wrong in ({"file_name": "../private/answers.csv"}, {"file_name": "no.py"}, {"things_to_look_for": " "}):
        reply = say(env, "Understand File", **({"file_name": "train.py", "things_to_look_for": "x"} | wrong))
        assert transition(start, reply, env).outcome is Outcome.INVALID_ACTION
    assert len(server.requests) == sent


@needs_data
def test_a_coder_that_cannot_read_has_failed(env, start, server):
    reply = say(env, "Understand File", file_name="train.py", things_to_look_for="x")
    for answer, reason in ((Answer("a line", finish="length"), "cut off"), (Answer("<think>x</think>\n"), "empty")):
        server.answers = [answer]
        step = transition(start, reply, env)
        assert step.outcome is Outcome.CODER_FAILED and reason in step.feedback
    server.answers = [Answer(status=500)] * 2
    assert transition(start, reply, env).outcome is Outcome.CODER_FAILED


def test_pieces_cover_a_text_overlap_and_end_with_lines():
    for text in ("", "x" * 10, "x" * 95, "\n".join(f"line {i}" for i in range(100)), "ab\n" * 7 + "x" * 200):
        pieces = coder.split_text(text, size=40, overlap=5)
        assert all(len(piece) <= 40 for piece in pieces)
        assert pieces[0] + "".join(piece[5:] for piece in pieces[1:]) == text
        assert all(a[-5:] == b[:5] for a, b in pairwise(pieces))
        for piece in pieces[:-1]:
            assert piece.endswith("\n") or "\n" not in piece[20:]


# --------------------------------------------------------------------------------- set-up and budget


@needs_data
def test_without_a_coder_that_answers_nothing_starts(server, tmp_path):
    with pytest.raises(config.UserError, match=r"set agent\.coder\.base_url and agent\.coder\.model"):
        Environment(AgentConfig(edit_mode="instruct"), BOX, tmp_path)
    wrong = Endpoint(server.url.replace("v1", "v9"), "coder")
    with pytest.raises(config.UserError, match=r"agent\.coder: http.*HTTP 404.*check base_url") as error:
        Environment(AgentConfig(edit_mode="instruct", coder=wrong), BOX, tmp_path)
    assert "\n" not in str(error.value)


@needs_data
def test_direct_mode_asks_no_coder(server, tmp_path):
    cfg = replace(config_for(server), edit_mode="direct")
    with Environment(cfg, BOX, tmp_path) as env:
        state = initial_state(tasks.load(NAME), env)
        reply = format_reply(Action("Edit Script", {"script_name": "train.py"}, {}, [("# model", "# a model")]), cfg)
        step = transition(state, reply, env)
    assert step.outcome is Outcome.OK_EDIT and step.coder == [] and server.requests == []


@needs_data
def test_a_spent_budget_stops_the_run(server, env, start):
    with Client(replace(env.cfg.coder, max_tokens=400, max_total_tokens=1200)) as client:
        with Environment(env.cfg, BOX, env.cache_dir, coder=client) as poor:
            step = poor.submit(start, edit(poor, "# model -> # first model")).result()
            assert step.outcome is Outcome.OK_EDIT
            with pytest.raises(config.UserError, match=r"agent\.coder: .*max_total_tokens = 1200") as error:
                for _ in range(9):
                    poor.submit(step.state, edit(poor, "model -> model ")).result()
            assert "\n" not in str(error.value)
        assert client.chat([{"role": "user", "content": "Hi"}]).text == "OK", "a client of the caller's stays open"


@needs_data
def test_a_slow_coder_keeps_no_experiment_waiting(server, env, start):
    release = threading.Event()
    server.answer = lambda body: Answer(obey(body), wait=release)
    edits = [env.submit(start, edit(env, "# model -> # late model")) for _ in range(env.coder.endpoint.in_flight)]
    while len(server.requests) < len(edits):
        time.sleep(0.005)
    script = replace(start, files={"train.py": start.files["train.py"] + "# meanwhile\n"})
    others = [env.submit(script, say(env, "Execute Script", script_name="train.py")) for _ in range(4 * env.workers)]
    try:
        assert all(f.result(600).outcome is Outcome.OK_ACTION for f in others)
        assert not any(f.done() for f in edits)
    finally:
        release.set()
    assert all(f.result(600).outcome is Outcome.OK_EDIT for f in edits)


def test_the_coder_is_set_in_the_configuration(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("common: {edit_mode: instruct, coder: {model: m, max_tokens: 8192}}\nx: {}\n")
    cfg = config.load(AgentConfig, "x", ["--config", str(path), "coder.base_url=http://localhost:1/v1"])
    assert cfg.coder == Endpoint("http://localhost:1/v1", "m", max_tokens=8192)
    with pytest.raises(config.UserError, match="base_url: missing"):
        config.load(AgentConfig, "x", ["--config", str(path)])
    with pytest.raises(config.UserError, match="must look like http"):
        config.load(AgentConfig, "x", ["--config", str(path), "coder.base_url=localhost"])
    config.save(cfg, tmp_path / "saved.yaml", "x")
    assert config.load(AgentConfig, "x", ["--config", str(tmp_path / "saved.yaml")]) == cfg
    assert "coder.api_key_env" in config.help_text(AgentConfig, "x")
