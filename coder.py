"""The coder: a second LLM, inside the environment, that edits scripts and reads files for the agent (paper B.3).

With `edit_mode: instruct` the agent says what to change and the coder, behind a chat endpoint, writes the code.
What goes wrong on its side is a CoderFailed: not the agent's fault, so it never scores -1, and nothing changes.

    log    a list to which every exchange is appended: {prompt, reply, finish, prompt_tokens, completion_tokens},
           or {prompt, error} where none came of it
"""

import ast
import re

from client import BudgetSpent, ChatError, Client, Reply, estimate_tokens, without_thinking

PIECE_CHARS = 10_000  # longer files are read in pieces (as MLAgentBench does)
OVERLAP_CHARS = 500  # what a piece repeats of the one before, so that nothing is cut in two unseen
NOTE_CHARS = 4_000  # kept of what is noted about one piece

EDIT = """\
This is the Python script {name}:

{fence}python
{code}
{fence}

Change it as follows, and change nothing else:

{instruction}

Reply with the whole new script, from its first line to its last, in one block that starts with {fence}python \
and ends with {fence}."""
AGAIN = "{problem}. Reply once more, with the whole new script in one block."
READ = """\
This is {part} of the file {name}:

{fence}
{text}
{fence}

Look for this: {question}

Reply in a few lines with what is said about it, names and numbers exactly as they are written; if nothing is \
said about it, reply with the word nothing."""
MERGE = """\
The file {name} was read in {count} parts, to look for this: {question}

What was noted on each part, in order:

{notes}

Reply in a few lines with what the whole file says about it, names and numbers exactly as they are noted."""


class CoderFailed(Exception):
    """The coder gave nothing that can be used. The message tells the agent why; the log has the details."""


def write_edit(client: Client, name: str, code: str, instruction: str, log: list[dict]) -> str:
    """The script `name` with its text `code` changed as the instruction says: valid Python, not run.

    A reply without usable code is asked for once more.

    Raises:
        CoderFailed: no reply, twice none with code in it, or a script too long for one reply.
        client.BudgetSpent: for the caller to stop everything.
    """
    if estimate_tokens(code) > client.endpoint.max_tokens:
        raise CoderFailed(f"{name} is too long for the coder, which must write it whole ({len(code)} characters)")
    fence = _fence(code)
    prompt = EDIT.format(name=name, fence=fence, code=code.rstrip("\n"), instruction=instruction.strip())
    messages = [{"role": "user", "content": prompt}]
    for _ in range(2):
        reply = _ask(client, messages, log)
        if reply.finish == "length":
            raise CoderFailed("the coder's reply was cut off before its end")
        new, problem = find_code(without_thinking(reply.text))
        if not problem:
            return new
        messages.append({"role": "assistant", "content": reply.text})
        messages.append({"role": "user", "content": AGAIN.format(problem=problem)})
    raise CoderFailed(f"the coder gave no usable code, twice. {problem}")


def read_file(client: Client, name: str, text: str, question: str, log: list[dict]) -> str:
    """What the coder finds in a file; a long one is read piece by piece, and the notes are merged.

    Raises:
        CoderFailed: no reply, an empty one, or one that is cut off.
        client.BudgetSpent: for the caller to stop everything.
    """
    pieces, notes, question = split_text(text), [], question.strip()
    for i, piece in enumerate(pieces, 1):
        part = f"part {i} of {len(pieces)}" if len(pieces) > 1 else "the whole"
        prompt = READ.format(name=name, part=part, fence=_fence(piece), text=piece.rstrip("\n"), question=question)
        notes.append(_answer(client, prompt, log))
    if len(notes) == 1:
        return notes[0]
    listed = "\n\n".join(f"Part {i}: {note[:NOTE_CHARS]}" for i, note in enumerate(notes, 1))
    return _answer(client, MERGE.format(name=name, count=len(notes), question=question, notes=listed), log)


def split_text(text: str, size: int = PIECE_CHARS, overlap: int = OVERLAP_CHARS) -> list[str]:
    """Pieces of at most `size` characters, each repeating the end of the one before; they end with a line where
    one ends in their second half."""
    pieces, start = [], 0
    while len(text) - start > size:
        newline = text.rfind("\n", start + size // 2, start + size)
        end = newline + 1 if newline >= 0 else start + size
        pieces.append(text[start:end])
        start = end - overlap
    return [*pieces, text[start:]]


def find_code(reply: str) -> tuple[str, str]:
    """(the Python script in a reply, what is wrong with it or nothing). Of several blocks the longest counts:
    the others show how to run or test it."""
    text = reply.replace("\r\n", "\n")
    blocks = re.findall(r"(?ms)^[ \t]*(`{3,})[^\n`]*\n(.*?)^[ \t]*\1`*[ \t]*$", text)
    if not blocks:
        return "", "There is no closed block of code in the reply"
    code = max((block for _, block in blocks), key=len).rstrip("\n") + "\n"
    try:
        ast.parse(code)
    except SyntaxError as error:
        return "", f"The code is not valid Python: {error.msg} (line {error.lineno})"
    except (ValueError, MemoryError, RecursionError):
        return "", "The code is not valid Python"
    return code, "" if code.strip() else "The block of code is empty"


def _fence(text: str) -> str:
    """Backticks that do not occur in the text."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def _answer(client: Client, prompt: str, log: list[dict]) -> str:
    reply = _ask(client, [{"role": "user", "content": prompt}], log)
    text = without_thinking(reply.text).strip()
    if reply.finish == "length":
        raise CoderFailed("the coder's reply was cut off before its end")
    if not text:
        raise CoderFailed("the coder's reply is empty")
    return text


def _ask(client: Client, messages: list[dict], log: list[dict]) -> Reply:
    prompt = messages[-1]["content"]
    try:
        reply = client.chat(messages)
    except BudgetSpent:
        raise
    except ChatError as error:  # its text is ours to read: an agent must not learn from addresses and status codes
        log.append({"prompt": prompt, "error": str(error)})
        raise CoderFailed("the coder could not be reached") from None
    tokens = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
    log.append({"prompt": prompt, "reply": reply.text, "finish": reply.finish, **tokens})
    return reply
