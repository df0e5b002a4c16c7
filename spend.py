"""What an endpoint has cost a run directory, what its budget leaves, and progress that shows it.

A budget (endpoint.max_usd, max_total_tokens) holds for a directory: the rows in it say what they cost, and a run that
continues it gets the rest. What belongs to no row, of episodes under way when a process ended and the first tiny
request of each start, is written down at the end (`unaccounted`); only a process that is killed (SIGKILL, a machine
that fails), or that finds no endpoint to start with, leaves that much uncounted.
"""

import sys
import time

from tqdm import tqdm

import config
from client import BudgetSpent, ChatError, Client, Endpoint

TELL_S = 60.0  # between lines of progress where there is no terminal


def tokens_of(rows: list[dict]) -> tuple[int, int]:
    """(prompt, completion) tokens that rows say they cost."""
    return sum(row.get("prompt_tokens", 0) for row in rows), sum(row.get("completion_tokens", 0) for row in rows)


def connect(endpoint: Endpoint, spent: tuple[int, int]) -> Client:
    """A client that has answered once and may spend what `spent` leaves of the budget.

    Raises config.UserError with what to fix.
    """
    for key, used in (("max_total_tokens", sum(spent)), ("max_usd", endpoint.usd(spent))):
        limit = getattr(endpoint, key)
        if limit is not None and used >= limit:
            raise config.UserError(
                f"the budget is spent ({sum(spent)} tokens, {endpoint.usd(spent):.4f} USD): to go on, raise "
                f"collect.endpoint.{key} and run the same command"
            )
    client = Client(endpoint, spent)
    try:
        client.check()
    except ChatError as error:
        client.close()
        raise config.UserError(f"collect.endpoint: {error}{how_to_go_on(error)}") from None
    return client


def unaccounted(client: Client, told: tuple[int, int]) -> dict:
    """Close the client; what it and those before it used beyond what rows tell, (prompt, completion) tokens."""
    client.close()
    used = client.usage
    return {"prompt_tokens": used.prompt_tokens - told[0], "completion_tokens": used.completion_tokens - told[1]}


def how_to_go_on(error: Exception) -> str:
    """The end of an error's line. A config.UserError (a coder's) says it itself."""
    if isinstance(error, config.UserError):
        return ""
    if isinstance(error, BudgetSpent):
        return "; to go on, raise collect.endpoint.max_usd or max_total_tokens and run the same command"
    return "; the same command goes on"


class Progress:
    """A bar on a terminal, else a line a minute; with tokens and money where an endpoint is paid for them."""

    def __init__(self, name: str, total: int, done: int, client: Client | None):
        self.name, self.client, self.told = name, client, time.monotonic()
        self.bar = tqdm(desc=name, total=total, initial=done, disable=None)  # None: off without a terminal
        self.done = done

    def add(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        self.bar.set_postfix_str(self.cost(), refresh=False)
        if self.bar.disable and time.monotonic() - self.told > TELL_S:
            self.told = time.monotonic()
            print(", ".join(filter(None, (f"{self.done} of {self.bar.total} {self.name}", self.cost()))), flush=True)

    def cost(self) -> str:
        if self.client is None:
            return ""
        usage = self.client.usage
        tokens = usage.prompt_tokens + usage.completion_tokens
        guess = f", {usage.estimated} replies of unknown length" if usage.estimated else ""
        return f"{tokens / 1e3:.0f}k tokens, {usage.usd:.2f} USD, {usage.retries} retries{guess}"

    def close(self) -> None:
        self.bar.close()
        sys.stderr.flush()
