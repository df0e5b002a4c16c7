"""The edits of an episode, and what they are about: verbs and objects, names in the code, the axis. No torch.

Word lists and line diffs, no grammar and no model: coarse, the same for every source, and easy to check by eye.
"""

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import tasks
from agent import AgentConfig, EditFailed, InvalidAction, InvalidFormat, apply_edit, parse_reply


@dataclass(frozen=True)
class Edit:
    """One edit that applies."""

    task: str
    text: str  # what it says of itself
    before: str  # the script
    after: str | None  # None: a coder would have to write it
    step: int = 0  # of its episode
    idea: str = ""  # of those drawn for its episode, the one it carries out


def edits_of(task: str, steps: list[dict], cfg: AgentConfig, ideas: Iterable[str] = ()) -> list[Edit]:
    """The edits among an episode's steps that apply, each with its script before and after, and the idea that it
    tries: of the episode's `ideas` the one that shares most words with what the edit says of itself.

    Steps with their files (trajectories) give the scripts; without (evaluated episodes) the replies are replayed
    from the starter, which cannot be done in instruct mode.
    """
    edits, files, undo = [], tasks.load(task).sources(), {}
    for t, step in enumerate(steps):
        files = step.get("files", files)
        try:
            action = parse_reply(step["reply"], cfg)
        except (InvalidFormat, InvalidAction):
            continue
        path = os.path.normpath(action.args.get("script_name", ""))
        if action.name == "Undo Edit Script" and undo.get(path):
            files = {**files, path: undo[path].pop()}
        if action.name != "Edit Script" or path not in files:
            continue
        if step.get("outcome") in ("coder_failed", "invalid_action", "invalid_format"):
            continue  # nothing changed
        text, after = action.thought.get("Thought", ""), None
        if cfg.edit_mode == "instruct":
            text = action.args["edit_instruction"]
            if t + 1 < len(steps):
                after = steps[t + 1].get("files", {}).get(os.path.normpath(action.args["save_name"]))
        else:
            try:
                after = apply_edit(files[path], action, cfg)
            except EditFailed:
                continue
        edits.append(Edit(task, text, files[path], after, t, closest(text, ideas)))
        undo.setdefault(path, []).append(files[path])
        files = {**files, path: files[path] if after is None else after}
    return edits


# ------------------------------------------------------------------------------------- what an edit says


def content_words(text: str) -> frozenset[str]:
    """Its words and numbers in lower case, without "the" and the like."""
    return frozenset(re.findall(r"\d+(?:\.\d+)?|\w+", text.lower())) - FUNCTION_WORDS


def closest(text: str, ideas: Iterable[str]) -> str:
    """The idea that shares the largest part of its words with a text; "" when none shares any."""
    words, best = content_words(text), (0.0, "")
    for idea in ideas:
        theirs = content_words(idea)
        best = max(best, (len(words & theirs) / max(1, len(words | theirs)), idea), key=lambda pair: pair[0])
    return best[1]


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


VERBS = word_set("""
    add adjust aggregate anneal apply augment average bag balance bin binarise blend boost
    build calibrate cap change choose clean clip combine compute concatenate convert create
    crop cut decay decompose decrease deepen denoise disable double drop embed enable encode
    engineer enlarge ensemble expand express extract fill filter fit flip freeze generate
    group grow halve hash ignore implement improve impute include incorporate increase
    initialise insert introduce keep limit lower merge mix modify normalise oversample pad
    penalise predict pretrain project prune raise reduce refine regularise remove replace
    resize rotate round scale search select set shrink shuffle smooth sort split stack
    standardise stop swap switch take tokenise train transform try tune unfreeze update use
    validate vary vectorise weight whiten widen
""")
FUNCTION_WORDS = word_set("""
    a an the this that these those its it of in on to into onto for from with without by at
    as and or but so than then while when where which because since if instead before after
    over under per is are be was will can could should may might i we you not no more less
    very each every all both only also again now there here them their our my your
""")
AXIS_WORDS = {
    "data": word_set("""
        data dataset feature features column columns row rows missing impute outlier
        outliers augment augmentation flip crop rotate normalise normalize standardise
        standardize scale encode encoding token tokens tokenise tokenize vocabulary
        ngram ngrams tfidf clean duplicates resample oversample preprocess preprocessing
        log bin
    """),
    "model": word_set("""
        model models layer layers network cnn resnet mlp transformer bert lstm gnn gcn
        hidden width depth deeper wider forest tree trees boosting boosted gradient
        ensemble stack blend architecture backbone head attention dropout kernel
        neighbours linear ridge lasso svm regressor classifier
    """),
    "learning": word_set("""
        learning rate lr optimizer optimiser adam adamw sgd momentum schedule scheduler
        warmup cosine epoch epochs batch loss objective smoothing early stopping
        iterations clipping weight decay seed fold folds validation calibrate threshold
        finetune pretrain
    """),
}  # fmt: skip


def base_form(word: str) -> str | None:
    """The verb of VERBS that a word is a form of."""
    stems = [word]
    for ending in ("s", "es", "d", "ed", "ing"):
        if word.endswith(ending):
            stem = word[: -len(ending)]
            stems += [stem, f"{stem}e", stem[:-1] if stem[-2:-1] == stem[-1:] else stem]
            stems += [f"{stem[:-1]}y"] if stem.endswith("i") else []
    stems += [f"{stem[:-3]}ise" for stem in stems if stem.endswith("ize")]
    return next((stem for stem in stems if stem in VERBS), None)


def verb_and_object(text: str) -> tuple[str, str] | None:
    """("use", "random forest") of "I will use a random forest, since ..."; None without a verb that is known."""
    words = re.findall(r"[a-z][\w'-]*|[^\w\s]", text.lower())
    at = next((i for i, word in enumerate(words) if base_form(word)), None)
    if at is None:
        return None
    phrase = []
    for word in words[at + 1 :]:
        stop = word in FUNCTION_WORDS or not word[0].isalpha()
        if (stop and phrase) or len(phrase) == 3:
            break
        phrase += [] if stop else [word]
    return base_form(words[at]), " ".join(phrase)


# ------------------------------------------------------------------------------------- what an edit does


def added_lines(edit: Edit) -> list[str]:
    if edit.after is None:
        return []
    diff = difflib.ndiff(edit.before.splitlines(), edit.after.splitlines())
    return [line[2:].strip() for line in diff if line.startswith("+ ") and line[2:].strip()]


def new_names(edit: Edit) -> set[str]:
    """Identifiers in the added code that the script did not have."""
    return set(re.findall(r"[A-Za-z_]\w*", "\n".join(added_lines(edit)))) - set(re.findall(r"\w+", edit.before))


def axis_of(edit: Edit) -> str | None:
    """data, model or learning: the block that most changed lines are in, else what the words speak of; None where
    nothing tells."""
    try:
        blocks = {axis: tasks.block_lines(edit.before, axis) for axis in tasks.AXES} if edit.after is not None else {}
    except ValueError:  # a script without blocks
        blocks = {}
    if not blocks:
        words = re.findall(r"[a-z]+", f"{edit.text} {' '.join(added_lines(edit))}".lower().replace("_", " "))
        votes = Counter({axis: sum(word in known for word in words) for axis, known in AXIS_WORDS.items()})
    else:
        votes = Counter(dict.fromkeys(tasks.AXES, 0))
        old, new = edit.before.splitlines(), edit.after.splitlines()
        for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            for axis, (first, last) in blocks.items():  # old[first - 1 : last] is the block's body
                if tag == "insert":
                    votes[axis] += (j2 - j1) * (first - 1 <= i1 <= last)
                elif tag != "equal":
                    votes[axis] += max(0, min(i2, last) - max(i1, first - 1))
    axis, most = max(votes.items(), key=lambda item: item[1])
    return axis if most else None
