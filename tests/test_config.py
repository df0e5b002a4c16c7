"""Configuration: precedence, strictness (each refusal names the key and the fix), --help, exit codes."""

import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

import config

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Agent:
    max_steps: int = 15  # actions per episode
    thought: Literal["full", "short", "none"] = "full"  # fields of a reply


@dataclass(frozen=True)
class Coder:
    url: str  # endpoint
    tokens: int = 100


@dataclass(frozen=True)
class Config:
    name: str  # of the run; the folder under runs/
    # A heading, not a part of the comment above.
    seed: int = 0
    level: Literal[1, 2] = 1
    lr: float = 1e-6  # "#" is no comment here; a constant
                      # learning rate
    clip: tuple[float, float] | None = (-1.0, 1.0)  # reward clip
    tasks: tuple[str, ...] = ("a", "b")
    resume: bool = True
    limits: dict = field(default_factory=lambda: {"wall_s": 60, "threads": 1})
    agent: Agent = Agent(thought="short")
    coder: Coder | None = None
    seeds: list[int] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


def load(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(textwrap.dedent(text))
    return config.load(Config, "train", ["--config", str(path), *overrides])


def refusal(tmp_path, text, *overrides):
    with pytest.raises(config.UserError) as error:
        load(tmp_path, text, *overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_defaults_common_section_and_command_line_in_that_order(tmp_path):
    text = """
        common: {name: c, seed: 1, lr: 1, agent: {max_steps: 1}, of_another_script: 5}
        other: {anything: goes}
        train: {seed: 2, lr: 2, tasks: [x]}
        """
    cfg = load(tmp_path, text, "lr=3", "limits.wall_s=9")
    assert (cfg.name, cfg.seed, cfg.lr, cfg.resume) == ("c", 2, 3.0, True)
    assert cfg.tasks == ("x",)
    assert cfg.agent == Agent(max_steps=1, thought="short")  # not Agent's own default, but Config's
    assert cfg.limits == {"wall_s": 9, "threads": 1}


def test_mappings_with_types_are_checked_entry_by_entry(tmp_path):
    cfg = load(tmp_path, "train: {name: c, weights: {a: 1}}", "weights={b-2: 1e-3}")
    assert cfg.weights == {"a": 1.0, "b-2": 0.001}
    assert "weights.b" in refusal(tmp_path, "train: {name: c, weights: {b: x}}")
    assert "weights" in refusal(tmp_path, "train: {name: c, weights: [a]}")


def test_values_are_converted_where_nothing_is_lost_and_nowhere_else(tmp_path):
    text = "train: {name: n, lr: 1e-6, clip: [0, 1], seeds: [3]}"
    cfg = load(tmp_path, text, "coder.url=http://x", "agent.thought=none")
    assert cfg.lr == 1e-6 and isinstance(cfg.lr, float)  # PyYAML reads 1e-6 as text
    assert cfg.clip == (0.0, 1.0) and isinstance(cfg.clip[0], float)
    assert cfg.coder == Coder("http://x", 100) and cfg.seeds == [3]
    assert load(tmp_path, text, "clip=null", "coder=null").clip is None
    for override in ("seed=1.0", "seed=true", "seed='1'", "resume=1", "lr=fast", "lr=true", "lr=.nan",
                     "name=3", "name=off", "level=true",
                     "clip=[1]", "clip=[1,2,3]", "tasks=a", "tasks=[1]", "limits=3",
                     "agent=3", "agent.thought=loud", "agent.thought=null", "seeds=[1.5]"):  # fmt: skip
        key, _, _ = override.partition("=")
        message = refusal(tmp_path, text, override)
        assert key in message and "expected" in message, message


@pytest.mark.parametrize(
    "text, override, expected",
    [
        ("train: {name: n, sede: 1}", "", "train.sede: unknown key; did you mean 'seed'?"),
        ("train: {name: n, xyz: 1}", "", "known: name, seed"),
        ("{common: {sede: 1}, train: {name: n}}", "", "common.sede: unknown key; did you mean 'seed'"),
        ("{common: {agent: {max_stpes: 1}}, train: {name: n}}", "", "agent.max_stpes: unknown key"),
        ("train: {name: n}", "sede=1", "command line.sede: unknown key; did you mean 'seed'?"),
        ("train: {name: n}", "agent.max_stpes=1", "agent.max_stpes: unknown key; did you mean 'max_"),
        ("train: {name: n}", "coder.uri=x", "coder.uri: unknown key; did you mean 'url'?"),
        ("train: {name: n}", "coder.tokens=1", "coder.url: missing"),
        ("train: {}", "", "train.name: missing; set it in the file or as name=VALUE"),
        ("train:", "", "train.name: missing"),
        ("train: {name: n, name: m}", "", "name is given twice"),
        ("train:\n  name: n\n  seed: 1\n  seed: 2", "", "line 4: seed is given twice"),
        ("train:\n  name: [", "", "line 2"),
        ("train: [1]", "", "must hold `key: value` lines"),
        ("evaluate: {}", "", "no section 'train' among ['evaluate']"),
        ("- 1", "", "no section 'train'"),
        ("train: {name: n}", "seed=-1", "seed=-1 must not be negative"),
        ("train: {name: n}", "--seed=1", "--seed=1: not understood; write --config FILE, key=value"),
        ("train: {name: n}", "seed", "seed: not understood"),
        ("train: {name: n}", "seed=[", "seed:"),
    ],
)
def test_refusals_name_the_key_and_the_fix(tmp_path, text, override, expected):
    assert expected in refusal(tmp_path, text, *filter(None, [override]))


def test_a_common_key_of_another_script_is_no_slip_once_the_similar_key_is_given(tmp_path):
    assert load(tmp_path, "{common: {seed: 1, seed_x: 2}, train: {name: n}}").seed == 1


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path):
    with pytest.raises(config.UserError, match="No such file"):
        config.load(Config, "train", ["--config", str(tmp_path / "none.yaml")])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(config.UserError, match="binary"):
        config.load(Config, "train", ["--config", str(tmp_path / "binary")])


def test_every_yaml_in_configs_parses():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert isinstance(config._parse(path.read_text(), path), dict)


def test_saved_configuration_loads_back_equal(tmp_path):
    cfg = load(tmp_path, "train: {name: n, lr: 1e-6, clip: null}", "coder.url='3'", "name='off'")
    config.save(cfg, tmp_path / "saved.yaml", section="train")
    assert config.load(Config, "train", ["--config", str(tmp_path / "saved.yaml")]) == cfg
    config.save(cfg, tmp_path / "flat.yaml")
    assert yaml.safe_load((tmp_path / "flat.yaml").read_text()) == config.to_dict(cfg)
    assert not list(tmp_path.glob("*.tmp"))


def test_help_shows_every_key_with_type_default_and_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        config.load(Config, "train", ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith("Configuration: precedence")
    rows = [
        "  name  (str, required)\n      of the run; the folder under runs/\n  seed",
        "  seed  (int, default 0)\n  level",  # no comment, and none borrowed from its neighbours
        '  lr  (float, default 1e-06)\n      "#" is no comment here; a constant learning rate\n  clip',
        "  clip  (tuple[float, float] | None, default (-1.0, 1.0))\n      reward clip\n",
        "  agent.max_steps  (int, default 15)\n      actions per episode\n",
        "  agent.thought  (Literal['full', 'short', 'none'], default short)\n      fields of a reply\n",
        "  coder.url  (str, required)\n      endpoint\n",
    ]
    for row in rows:
        assert row in out, out


# ---- main, in a fresh process --------------------------------------------------------------------

SCRIPT = """
    import sys, time
    import config
    class TaskError(ValueError): pass
    def work():
        match sys.argv[1]:
            case "user": raise config.UserError("train.seed: bad;\\n  fix it")
            case "task": raise TaskError("run: python -m tasks prepare x")
            case "bug": raise ValueError("a bug")
            case "ok": return
        print("ready", flush=True)
        try:
            time.sleep(30)
        except Exception:
            print("swallowed", flush=True)
    config.main(work, user_errors=(TaskError,), resume="run it again")
    """


def run_script(tmp_path, argument, signum=None):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, script, argument], cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    if signum:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "argument, code, err",
    [
        ("ok", 0, ""),
        ("user", 2, "script.py: train.seed: bad; fix it\n"),
        ("task", 2, "script.py: run: python -m tasks prepare x\n"),
    ],
)
def test_main_turns_user_errors_into_one_line_and_exit_code_2(tmp_path, argument, code, err):
    assert run_script(tmp_path, argument) == (code, "", err)


def test_main_leaves_a_bug_its_traceback(tmp_path):
    code, _, err = run_script(tmp_path, "bug")
    assert code == 1 and "Traceback" in err and err.endswith("ValueError: a bug\n")


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_main_says_how_to_resume_when_a_signal_stops_it(tmp_path, signum, code):
    expected = f"script.py: {signum.name}; run it again"
    assert run_script(tmp_path, "wait", signum) == (code, "", f"\n{expected}\n")
