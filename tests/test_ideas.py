"""Every idea of every micro task, run through the sandbox: does it do what its note says?

Minutes: about 400 experiments. A note may differ only where the idea's effect is close to the
noise, since other versions of the libraries and other processors round differently.
"""

import pytest

import tasks
from tasks import measure

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool():
    with measure.new_pool() as pool:
        yield pool


@pytest.mark.parametrize("name", tasks.names(suite="micro"))
def test_starter_and_ideas(name, pool):
    task = tasks.load(name)
    if not task.is_prepared():
        pytest.skip(f"run: python -m tasks prepare {name}")
    script = task.sources()["train.py"]
    starter = measure.run(task, script, pool)
    assert starter.output.splitlines()[-1].startswith(f"validation {task.metric} ")
    for part, expected in task.initial_score.items():
        assert starter.scores[part] == pytest.approx(expected, abs=task.noise / 10)
    again = measure.run(task, script, pool)
    assert again.submission == starter.submission
    for idea in task.ideas():
        run = measure.run(task, tasks.apply_block(script, idea.block, idea.code), pool)
        found = measure.note(task, starter, run, task.noise)
        if found != idea.note:
            assert run.scores is not None, f"{idea.text}: {found}, not {idea.note}\n{run.output}"
            change = abs(run.scores["all"] - starter.scores["all"])
            assert abs(change - task.noise) < task.noise / 4, f"{idea.text}: {found}"


@pytest.mark.parametrize("name", tasks.names(suite="micro"))
def test_best_combination_gives_the_best_score(name, pool):
    task = tasks.load(name)
    if not task.is_prepared():
        pytest.skip(f"run: python -m tasks prepare {name}")
    script = task.sources()["train.py"]
    ideas = {idea.text: idea for idea in task.ideas()}
    for text in task.best_source.split(": ", 1)[1].split(" + "):
        script = tasks.apply_block(script, ideas[text].block, ideas[text].code)
    run = measure.run(task, script, pool)
    assert run.scores["all"] == pytest.approx(task.best_score, abs=task.noise / 4)
    assert measure.standard_error(task, run.submission) == pytest.approx(task.noise, rel=0.1)
