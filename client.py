"""The one chat client: any OpenAI-compatible endpoint, for the expert that explores and the coder that edits.

    client = Client(Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-Coder-32B-Instruct"))
    client.check()      # a wrong address, key or model fails here, before hours of work
    client.chat([{"role": "user", "content": "Hello"}]).text

`chat` blocks and may be called from many threads: at most `in_flight` requests are under way at once, whatever may
go better the next time is tried again, and a budget of tokens or money stops everything before it is exceeded.
What still fails is a ChatError of one line, which never holds the key. No streaming; the first choice alone counts.
"""

import contextlib
import email.utils
import http.client
import json
import math
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import weakref
from dataclasses import dataclass, field, replace

BACKOFF_S = 1.0  # before the first retry; doubles up to MAX_BACKOFF_S, times a random factor from 0.5 to 1.5
MAX_BACKOFF_S = 60.0
MAX_WAIT_S = 600.0  # a server that asks for more patience (Retry-After) counts as failed
MAX_BYTES = 32 << 20  # of one reply
CLOSE_S = 2.0  # to wait for requests that `close` ended
CHECK_RETRIES = 2  # of `check`: enough for a hiccup, too few to wait long for a wrong address
TELL_S = 30.0  # troubles that are retried are shown on stderr, at most one line in this time
RESERVED = ("model", "messages", "stream", "n")  # keys of a request that are not the caller's to change


# Fields of an Endpoint that a run may change when it goes on: where, how fast and how dear, not what is said.
OPERATION = ("base_url", "api_key_env", "timeout_s", "retries", "in_flight")
OPERATION += ("price_in", "price_out", "max_usd", "max_total_tokens")


@dataclass(frozen=True)
class Endpoint:
    base_url: str  # POST <base_url>/chat/completions answers, e.g. http://localhost:8000/v1
    model: str  # as the server names it
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key; where it is unset, none is sent
    temperature: float | None = 1.0  # null = not sent: the server's own
    top_p: float | None = 1.0  # null = not sent: the server's own
    max_tokens: int = 4096  # of one reply; a longer one is cut off (finish = length)
    timeout_s: float = 300.0  # of one attempt
    retries: int = 8  # after 429, 5xx, time-outs, lost connections, unreadable replies; eight wait 3 minutes
    in_flight: int = 8  # requests at once, of each process
    price_in: float = 0.0  # USD per million prompt tokens
    price_out: float = 0.0  # USD per million completion tokens
    max_usd: float | None = None  # stop before a client has spent more
    max_total_tokens: int | None = None  # stop before a client has used more, prompts and completions together
    extra: dict = field(default_factory=dict, hash=False)  # more keys of a request's body; null leaves a key out

    def __post_init__(self):
        url = urllib.parse.urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname or not self.base_url.isascii():
            raise ValueError(f"base_url {self.base_url!r} must look like http://localhost:8000/v1")
        if url.username or url.password or url.query or url.fragment:
            raise ValueError("base_url must hold no key, user, ? or #: the key belongs into the variable api_key_env")
        if self.base_url.rstrip("/").endswith("/completions"):
            raise ValueError("base_url ends before /chat/completions, usually in /v1")
        if not re.fullmatch(r"([A-Za-z_]\w*)?", self.api_key_env, re.ASCII):  # not shown: it may be a key
            raise ValueError("api_key_env must be the name of an environment variable, not the key itself")
        if not self.model:
            raise ValueError("model must be the name that the server knows the model by")
        for name in ("max_tokens", "in_flight", "max_total_tokens", "max_usd", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value} must be positive")
        for name in ("retries", "price_in", "price_out", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} = {value} must not be negative")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1")
        if self.max_usd is not None and not self.price_in + self.price_out:
            raise ValueError("max_usd needs price_in and price_out, in USD per million tokens")
        for name in RESERVED:
            if name in self.extra:
                raise ValueError(f"extra.{name}: this key of a request cannot be changed")
        budget = self.max_usd is not None or self.max_total_tokens is not None
        if budget and not self.longest(self.extra):
            raise ValueError("extra.max_tokens = null: a budget needs the longest reply, as max_completion_tokens")

    def usd(self, tokens: tuple[int, int]) -> float:
        """What (prompt, completion) tokens cost."""
        return (tokens[0] * self.price_in + tokens[1] * self.price_out) / 1e6

    def longest(self, keys: dict) -> int:
        """Tokens of the longest reply that a request with these keys allows; 0: nothing says so."""
        limits = {"max_tokens": self.max_tokens} | keys
        return max(limits.get("max_tokens") or 0, limits.get("max_completion_tokens") or 0)


def without_thinking(text: str) -> str:
    """A reply without the <think> part that some models write first."""
    return re.sub(r"(?s)\A\s*<think>.*?</think>\s*", "", text)


@dataclass
class Reply:
    text: str
    finish: str  # stop | length: cut off at max_tokens | another reason of the server's
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Usage:
    """What a client has used, and others before it of which it was told (`spent`). A request that may have been
    billed without an answer (a time-out, a connection dropped in the middle) counts as long as it could have been."""

    requests: int = 0  # sent, retries included
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    estimated: int = 0  # requests without a token count from the server: a token is taken as 4 characters


class ChatError(Exception):
    """No reply. The message is one line: endpoint, status, reason, and the fix where there is one."""


class BudgetSpent(ChatError):
    """The next request could exceed max_usd or max_total_tokens."""


class _Trouble(Exception):
    """An attempt that failed and may go better the next time.

    wait: seconds that the server asks for; billed: (prompt, completion) tokens that may have been, if any.
    """

    def __init__(self, reason: str, wait: float = 0.0, billed: tuple[int, int] | None = None):
        super().__init__(reason)
        self.wait, self.billed = wait, billed


def estimate_tokens(text: str) -> int:
    return math.ceil(len(text) / 4)


# ---------------------------------------------------------------------------------------------- HTTP


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would turn POST into GET and carry the key to another host."""

    def redirect_request(self, *args):
        return None


class _Sockets:
    """The sockets of requests under way, so that another thread can end them."""

    def __init__(self):
        self.lock, self.alive, self.ended = threading.Lock(), weakref.WeakSet(), False

    def add(self, sock: socket.socket) -> None:
        with self.lock:
            self.alive.add(sock)
            if self.ended:
                raise OSError("the client was closed")

    def end(self) -> None:
        with self.lock:
            self.ended = True
            for sock in self.alive:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it


def _make_opener(url: str, sockets: _Sockets) -> urllib.request.OpenerDirector:
    """urllib with the proxies of the environment, which never stand between this machine and itself."""

    def tracked(kind):
        class Connection(kind):
            def connect(self):
                super().connect()
                sockets.add(self.sock)

        return Connection

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(tracked(http.client.HTTPConnection), request)

    class Encrypted(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(tracked(http.client.HTTPSConnection), request, context=context)

    context = ssl.create_default_context()
    host = urllib.parse.urlsplit(url).hostname
    here = host == "localhost" or host == "::1" or host.startswith("127.")
    proxies = urllib.request.ProxyHandler({} if here else None)
    return urllib.request.build_opener(proxies, _NoRedirect, Plain, Encrypted)


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body, by the deadline even if it trickles in."""
    data, length = bytearray(), response.length  # None: chunked, or until the connection ends
    while length is None or len(data) < length:
        piece = response.read1(1 << 16)
        if not piece:
            break
        data += piece
        if len(data) > MAX_BYTES:
            raise http.client.HTTPException(f"the reply is longer than {MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if length is not None and len(data) < length:
        raise http.client.IncompleteRead(bytes(data), length - len(data))
    return bytes(data)


def _retry_after(headers) -> float:
    """Seconds of a Retry-After header, in either of its forms; 0 without one."""
    value = headers.get("Retry-After", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value)) if math.isfinite(float(value)) else 0.0
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _parse(data: bytes) -> tuple[str, str, dict]:
    """(text, finish, usage) of a reply's body. Raises ValueError for what is no reply."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("the reply is not JSON" if data.strip() else "the reply is empty") from None
    try:
        choice = answer["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        reason = answer.get("error") if isinstance(answer, dict) else None
        raise ValueError(f"the reply has no choices: {reason or answer!r:.2000}") from None
    if not isinstance(text, str | None) or not isinstance(finish, str | None):
        raise ValueError(f"the reply's content is no text: {choice!r:.2000}")
    if not (text or "").strip() and finish in (None, "stop"):
        raise ValueError("the reply is empty")
    text = (text or "").encode("utf-8", "replace").decode()  # a lone surrogate fits in no file
    usage = answer.get("usage")
    return text, finish or "stop", usage if isinstance(usage, dict) else {}


# -------------------------------------------------------------------------------------------- client


class Client:
    """Thread-safe. Close it (or use it as a context) to end what is under way and refuse what follows.

    spent: (prompt, completion) tokens that were used before, by other processes: `usage` and the budget count on.
    """

    def __init__(self, endpoint: Endpoint, spent: tuple[int, int] = (0, 0)):
        self.endpoint = endpoint
        self._slots = threading.Semaphore(endpoint.in_flight)
        self._change = threading.Condition()  # guards what follows
        self._usage = Usage(prompt_tokens=spent[0], completion_tokens=spent[1], usd=endpoint.usd(spent))
        self._reserved = [0, 0]  # the most that requests in flight may use: prompt, completion tokens
        self._told = -math.inf
        self._sockets = _Sockets()
        self._opener = _make_opener(endpoint.base_url, self._sockets)
        self._closed = threading.Event()
        self._random = random.Random()  # apart from the global one, on which experiments may depend

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self) -> None:
        """Waits a moment for what it ends, so that `usage` is whole."""
        self._closed.set()
        with self._change:
            self._change.notify_all()
        self._sockets.end()
        with self._change:
            self._change.wait_for(lambda: not any(self._reserved), CLOSE_S)

    @property
    def usage(self) -> Usage:
        """A snapshot."""
        with self._change:
            return replace(self._usage)

    def check(self) -> None:
        """One tiny request, with few retries. Raises ChatError naming what to fix."""
        retries = min(CHECK_RETRIES, self.endpoint.retries)
        self._chat([{"role": "user", "content": "Reply with the word OK."}], {}, retries)

    def chat(self, messages: list[dict], **overrides) -> Reply:
        """The model's reply to chat messages ({"role": ..., "content": ...}). Blocks.

        Args:
            overrides: keys of the request's body (temperature, seed, stop, ...); None leaves one out.

        Raises:
            BudgetSpent: this request could exceed the budget. It was not sent.
            ChatError: refused, or failed in every attempt.
        """
        return self._chat(messages, overrides, self.endpoint.retries)

    def _chat(self, messages: list[dict], overrides: dict, retries: int) -> Reply:
        e = self.endpoint
        if wrong := set(overrides) & set(RESERVED):
            raise ValueError(f"{', '.join(sorted(wrong))}: this key of a request cannot be changed")
        body = {"model": e.model, "messages": messages, "temperature": e.temperature, "top_p": e.top_p}
        body = body | {"max_tokens": e.max_tokens} | e.extra | overrides
        body = {key: value for key, value in body.items() if value is not None}
        longest = e.longest(e.extra | overrides) or e.max_tokens
        content = "".join(str(m["content"]) for m in messages)
        # No tokenizer makes more tokens than bytes; 16 for a message's frame.
        worst = (len(content.encode("utf-8", "replace")) + 16 * len(messages), longest)
        prompt, payload = estimate_tokens(content), json.dumps(body).encode()
        with self._slots:
            for attempt in range(retries + 1):
                try:
                    return self._attempt(payload, prompt, worst, attempt > 0)
                except _Trouble as trouble:
                    if self._closed.is_set():
                        raise self._error("the client was closed") from None
                    if trouble.wait > MAX_WAIT_S:
                        raise self._error(f"{trouble}; it asks to wait {trouble.wait:.0f} s") from None
                    if attempt == retries:
                        raise self._error(f"{trouble} ({attempt + 1} attempts)") from None
                    factor = self._random.uniform(0.5, 1.5)
                    delay = max(trouble.wait, factor * min(MAX_BACKOFF_S, BACKOFF_S * 2**attempt))
                    self._tell(f"{trouble}; attempt {attempt + 2} of {retries + 1} follows in {delay:.1f} s")
                self._closed.wait(delay)  # the slot stays taken: a server in trouble gets fewer requests

    def _attempt(self, payload: bytes, prompt: int, worst: tuple[int, int], again: bool) -> Reply:
        """One request within the budget. `prompt`: its estimated tokens, `worst`: the most it may use."""
        self._reserve(worst, again)
        used, estimated = (0, 0), False
        try:
            data = self._send(payload, (prompt, worst[1]))
            try:
                text, finish, usage = _parse(data)
            except ValueError as error:
                raise _Trouble(str(error), billed=(prompt, min(worst[1], math.ceil(len(data) / 4)))) from None
            used = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
            if not all(type(count) is int and count >= 0 for count in used):
                used, estimated = (prompt, estimate_tokens(text)), True
            return Reply(text, finish, *used)
        except _Trouble as trouble:
            used, estimated = trouble.billed or (0, 0), trouble.billed is not None
            raise
        finally:
            self._settle(worst, used, estimated)

    # ---- budget

    def _reserve(self, worst: tuple[int, int], again: bool) -> None:
        """Set `worst` aside. Where only what is in flight stands in the way, wait until that is known."""
        with self._change:
            while True:
                if self._closed.is_set():
                    raise self._error("the client was closed")
                spent = (self._usage.prompt_tokens, self._usage.completion_tokens)
                alone = [a + b for a, b in zip(spent, worst)]
                if over := self._exceeds(*alone):
                    raise BudgetSpent(
                        f"{self.endpoint.base_url}: the budget {over} does not allow another request (of up to "
                        f"{sum(worst)} tokens): {sum(spent)} tokens and {self.endpoint.usd(spent):.4f} USD are spent"
                    )
                if not self._exceeds(*(a + b for a, b in zip(alone, self._reserved))):
                    break
                self._change.wait()
            self._reserved = [a + b for a, b in zip(self._reserved, worst)]
            self._usage.requests += 1
            self._usage.retries += again

    def _exceeds(self, prompt: int, completion: int) -> str:
        """The limit that these tokens exceed, as text, or nothing."""
        e = self.endpoint
        if e.max_total_tokens is not None and prompt + completion > e.max_total_tokens:
            return f"max_total_tokens = {e.max_total_tokens}"
        if e.max_usd is not None and e.usd((prompt, completion)) > e.max_usd:
            return f"max_usd = {e.max_usd:g}"
        return ""

    def _settle(self, worst: tuple[int, int], used: tuple[int, int], estimated: bool) -> None:
        with self._change:
            self._reserved = [a - b for a, b in zip(self._reserved, worst)]
            self._usage.prompt_tokens += used[0]
            self._usage.completion_tokens += used[1]
            self._usage.usd = self.endpoint.usd((self._usage.prompt_tokens, self._usage.completion_tokens))
            self._usage.estimated += estimated
            self._change.notify_all()

    # ---- one request

    def _send(self, payload: bytes, billed: tuple[int, int]) -> bytes:
        """The body of a reply with status 200.

        Raises _Trouble for what may go better the next time, ChatError for what will not.
        """
        e = self.endpoint
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "ml-agent"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        url = f"{e.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, payload, headers, method="POST")
        try:
            with self._opener.open(request, timeout=e.timeout_s) as response:
                return _read(response, time.monotonic() + e.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                detail = ""
                with contextlib.suppress(OSError, http.client.HTTPException):
                    detail = error.read(4000).decode(errors="replace")
            raise self._refusal(error.code, error.headers, detail, billed) from None
        except urllib.error.URLError as error:  # no connection: nothing was sent
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise self._error(f"{error.reason}: check base_url") from None
            raise _Trouble(f"no connection: {_reason(error.reason, e)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Trouble(_reason(error, e), billed=billed) from None

    def _refusal(self, status: int, headers, body: str, billed: tuple[int, int]) -> Exception:
        """The error of an answer with a status other than 200; behind a gateway's time-out (408, 504) a model may
        have written all the same."""
        e, message, code = self.endpoint, body, None
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            answer = json.loads(body)
            inner = answer.get("error", answer)
            message = inner if isinstance(inner, str) else inner.get("message", body)
            code = None if isinstance(inner, str) else inner.get("code")
        found = f"HTTP {status}" + f": {self._clean(str(message), 300)}".rstrip(": ")
        if (status in (408, 425, 429) or status >= 500) and code != "insufficient_quota":
            return _Trouble(found, _retry_after(headers), billed if status in (408, 504) else None)
        name = e.api_key_env or "api_key_env"
        fix = {
            400: "check model, max_tokens, temperature, top_p and extra",
            401: f"the key in {name} is not valid" if self._key() else f"no key was sent: set the variable {name}",
            403: f"the key in {name} must be allowed to use {e.model}",
            404: f"check base_url, which usually ends in /v1, and model = {e.model}",
            429: "the account has no credit left",
        }.get(status, "the request is refused")
        if 300 <= status < 400:
            fix = f"it redirects to {self._clean(headers.get('Location', ''), 300)}: set base_url accordingly"
        return self._error(f"{found}; {fix}")

    def _key(self) -> str:
        key = os.environ.get(self.endpoint.api_key_env, "").strip() if self.endpoint.api_key_env else ""
        if not key.isascii() or not key.isprintable():  # http.client would show it in its own error
            raise self._error(f"the key in {self.endpoint.api_key_env} holds characters that no header may have")
        return key

    def _clean(self, text: str, limit: int = 600) -> str:
        """One line of at most `limit` characters, without the key, which a server may repeat."""
        key = os.environ.get(self.endpoint.api_key_env, "").strip()
        return " ".join((text.replace(key, "***") if key else text).split())[:limit]

    def _error(self, reason: str) -> ChatError:
        return ChatError(f"{self.endpoint.base_url}: {self._clean(reason)}")

    def _tell(self, trouble: str) -> None:
        with self._change:
            if time.monotonic() - self._told < TELL_S:
                return
            self._told = time.monotonic()
        print(f"{self.endpoint.base_url}: {self._clean(trouble)}", file=sys.stderr, flush=True)


def _reason(error: Exception, endpoint: Endpoint) -> str:
    if isinstance(error, TimeoutError):
        return f"no reply within {endpoint.timeout_s:g} s"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended in the middle of the reply"
    return str(error) or type(error).__name__
