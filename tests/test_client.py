"""The chat client against a real HTTP server: replies, faults, budgets, secrecy."""

import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import pytest

import client as module
from client import BudgetSpent, ChatError, Client, Endpoint
from fake_server import Answer, FakeServer

KEY = "sk-secret-0123456789"
HELLO = [{"role": "user", "content": "say hello now"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_S", 0.002)
    monkeypatch.setenv("TEST_CHAT_KEY", KEY)


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


def connect(server: FakeServer, **keys) -> Client:
    keys = {"api_key_env": "TEST_CHAT_KEY", "retries": 3, "timeout_s": 20.0, **keys}
    return Client(Endpoint(server.url, "fake", **keys))


def failure(client: Client, **overrides) -> str:
    with pytest.raises(ChatError) as error:
        client.chat(HELLO, **overrides)
    text = str(error.value)
    assert text.startswith(client.endpoint.base_url) and "\n" not in text and KEY not in text
    return text


# ------------------------------------------------------------------------------------------- replies


def test_a_reply_with_its_usage(server):
    client = connect(server, temperature=0.5, extra={"seed": 3}, price_in=2.0, price_out=10.0)
    server.answer = "hello there"
    reply = client.chat(HELLO, stop=["x"])
    assert (reply.text, reply.finish, reply.prompt_tokens, reply.completion_tokens) == ("hello there", "stop", 3, 2)
    want = {"model": "fake", "messages": HELLO, "temperature": 0.5, "top_p": 1.0, "max_tokens": 4096}
    assert server.requests == [want | {"seed": 3, "stop": ["x"]}]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    usage = client.usage
    assert (usage.requests, usage.retries, usage.prompt_tokens, usage.completion_tokens) == (1, 0, 3, 2)
    assert usage.usd == pytest.approx(26e-6) and usage.estimated == 0


def test_null_leaves_a_key_out(server):
    client = connect(server, temperature=None, extra={"max_tokens": None, "max_completion_tokens": 7})
    client.chat(HELLO, top_p=None)
    assert server.requests == [{"model": "fake", "messages": HELLO, "max_completion_tokens": 7}]
    with pytest.raises(ValueError, match="n: this key"):
        client.chat(HELLO, n=2)


def test_a_reply_that_was_cut_off_says_so(server):
    server.answers = [Answer("half a", finish="length"), Answer("", finish="length"), Answer(None, "content_filter")]
    client = connect(server)
    assert [client.chat(HELLO).finish for _ in range(3)] == ["length", "length", "content_filter"]
    assert client.usage.retries == 0


def test_without_a_key_none_is_sent(server, monkeypatch):
    monkeypatch.delenv("TEST_CHAT_KEY")
    connect(server).chat(HELLO)
    connect(server, api_key_env="").chat(HELLO)
    assert not any("Authorization" in headers for headers in server.headers)


def test_missing_usage_is_estimated_and_marked(server):
    server.answers = [Answer("12345678", usage=None), Answer("1234", usage={"prompt_tokens": "many"})]
    client = connect(server)
    reply = client.chat(HELLO)
    assert (reply.prompt_tokens, reply.completion_tokens) == (4, 2)  # 13 and 8 characters
    client.chat(HELLO)
    assert client.usage.estimated == 2 and client.usage.completion_tokens == 3


def test_a_lone_surrogate_does_not_pass(server):
    body = b'{"choices": [{"message": {"content": "a\\ud800b"}, "finish_reason": "stop"}]}'
    server.answers = [Answer(body=body)]
    assert connect(server).chat(HELLO).text == "a?b"


# -------------------------------------------------------------------------------------------- faults

FAULTS = {
    "500": (Answer("overloaded", status=500), "HTTP 500: overloaded"),
    "429": (Answer("slow down", status=429), "HTTP 429: slow down"),
    "garbage": (Answer(body=b"<html>bad gateway</html>"), "not JSON"),
    "no body": (Answer(body=b""), "the reply is empty"),
    "no choices": (Answer(body=b'{"error": {"message": "upstream"}}'), "no choices: {'message': 'upstream'}"),
    "a list": (Answer(body=b"[1]"), "no choices"),
    "nested": (Answer(body=b"[" * 200_000), "not JSON"),
    "no text": (Answer(None), "the reply is empty"),
    "blank": (Answer(" \n"), "the reply is empty"),
    "parts": (Answer(body=b'{"choices": [{"message": {"content": [1]}}]}'), "no text"),
    "reset in the body": (Answer("hello", cut=20), ""),
    "reset before the body": (Answer("hello", cut=0), ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_go_better_is_tried_again(server, name, capsys):
    fault, reason = FAULTS[name]
    client = connect(server, retries=2)
    server.answers = [fault, fault, "hello"]
    assert client.chat(HELLO).text == "hello"
    assert (client.usage.requests, client.usage.retries) == (3, 2)
    assert "attempt 2 of 3" in capsys.readouterr().err  # shown once
    server.answers = [fault] * 3
    text = failure(client)
    assert reason in text and "3 attempts" in text
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        (400, "check model, max_tokens"),
        (401, "the key in TEST_CHAT_KEY is not valid"),
        (403, "must be allowed to use fake"),
        (404, "check base_url"),
        (422, "refused"),
    ],
)
def test_what_cannot_go_better_fails_at_once(server, status, fix):
    server.answers = [Answer(f"you sent {KEY},\nno", status=status)]
    client = connect(server)
    text = failure(client)
    assert f"HTTP {status}: you sent ***, no" in text and fix in text
    assert len(server.requests) == 1


def test_a_missing_key_is_named(server, monkeypatch):
    monkeypatch.delenv("TEST_CHAT_KEY")
    server.answers = [Answer("Unauthorized", status=401)]
    assert "set the variable TEST_CHAT_KEY" in failure(connect(server))
    monkeypatch.setenv("TEST_CHAT_KEY", "sk-\x07bell")
    assert "bell" not in failure(connect(server)) and len(server.requests) == 1


def test_an_account_without_credit_is_not_asked_again(server):
    body = b'{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'
    server.answers = [Answer(status=429, body=body)]
    assert "no credit" in failure(connect(server)) and len(server.requests) == 1


def test_a_redirect_is_not_followed(server):
    with FakeServer() as other:
        server.answers = [Answer(status=status, headers={"Location": f"{other.url}/x"}) for status in (302, 307)]
        for _ in range(2):
            assert f"redirects to {other.url}/x" in failure(connect(server))
        assert not other.requests


def test_retry_after_is_respected(server, monkeypatch):
    waited = []
    client = connect(server)
    monkeypatch.setattr(client._closed, "wait", waited.append)
    date = formatdate(time.time() + 120, usegmt=True)
    for value, low, high in (("7", 7, 7), ("0.5", 0.5, 0.5), (date, 110, 121), ("soon", 0, 0.1), ("-3", 0, 0.1)):
        server.answers = [Answer(status=429, headers={"Retry-After": value})]
        client.chat(HELLO)
        assert low <= waited.pop() <= high, value
    server.answers = [Answer(status=503, headers={"Retry-After": "86400"})]
    assert "asks to wait 86400 s" in failure(client) and not waited


def test_waiting_doubles_up_to_a_bound(server, monkeypatch):
    waited = []
    monkeypatch.setattr(module, "BACKOFF_S", 1.0)
    client = connect(server, retries=9)
    monkeypatch.setattr(client._closed, "wait", waited.append)
    server.answers = [Answer(status=500)] * 9
    client.chat(HELLO)
    assert all(0.5 * min(60, 2**i) <= s <= 1.5 * min(60, 2**i) for i, s in enumerate(waited)) and len(waited) == 9
    assert len({s / min(60, 2**i) for i, s in enumerate(waited)}) > 1, "with jitter"


def test_a_time_out_is_tried_again(server):
    never = threading.Event()
    server.answers = [Answer("late", wait=never), "hello"]
    client = connect(server, timeout_s=0.3)
    assert client.chat(HELLO).text == "hello" and client.usage.retries == 1
    assert client.usage.completion_tokens == 4096 + 1 and client.usage.estimated == 1  # may have been billed
    server.answers = [Answer("late", wait=never)] * 4
    assert "no reply within 0.3 s (4 attempts)" in failure(client)


def test_a_reply_that_trickles_in_is_a_time_out(server):
    server.answers = [Answer("a long reply", trickle=0.05), "hello"]
    client = connect(server, timeout_s=0.4)
    assert client.chat(HELLO).text == "hello" and client.usage.retries == 1


def test_a_server_that_dies_and_comes_back(server):
    hang = threading.Event()
    server.answers = [Answer("never", wait=hang)]
    client = connect(server, retries=200)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(client.chat, HELLO)
        while not server.requests:
            time.sleep(0.005)
        server.stop()  # in the middle of a request
        while client.usage.retries < 3:
            time.sleep(0.005)
        server.start()
        assert future.result(30).text == "OK"
    assert len(server.requests) == 2


def test_check_finds_what_is_wrong_in_one_call(server, monkeypatch):
    connect(server).check()
    assert len(server.requests) == 1
    with pytest.raises(ChatError, match="check base_url"):
        Client(Endpoint(server.url.replace("/v1", "/v2"), "fake")).check()
    server.stop()
    client = connect(server, retries=1000)
    with pytest.raises(ChatError, match=r"no connection: .*refused.* \(3 attempts\)"):
        client.check()


def test_closing_ends_a_request_that_is_under_way(server):
    server.answer = Answer("never", wait=threading.Event())
    client = connect(server, in_flight=1, timeout_s=600.0)
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(client.chat, HELLO) for _ in range(2)]  # one under way, one behind it
        while not server.requests:
            time.sleep(0.005)
        client.close()
        try:
            for future in futures:
                with pytest.raises(ChatError, match="closed"):
                    future.result(30)
        finally:
            server.stop()
    assert len(server.requests) == 1
    assert "closed" in failure(client)


# ------------------------------------------------------------------------------------- connections


def test_a_proxy_never_stands_between_this_machine_and_itself(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    monkeypatch.delenv("no_proxy", raising=False)
    away = Client(Endpoint("http://example.invalid/v1", "fake", retries=0))
    assert "HTTP 404" in failure(away), "through the proxy, which knows no such path"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert connect(server).chat(HELLO).text == "OK"


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with the openssl command")
def test_encrypted_connections_need_a_certificate_that_is_known(tmp_path, monkeypatch):
    names = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    about = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes"]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", *about, *names], check=True, capture_output=True)
    with FakeServer(certificate=tmp_path) as server:
        assert "certificate verify failed" in failure(connect(server))
        assert server.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert connect(server).chat(HELLO).text == "OK"


# ------------------------------------------------------------------------------------------- bounds


def test_at_most_in_flight_requests_at_once(server):
    server.answer = Answer("hello", delay=0.02)
    client = connect(server, in_flight=3)
    with ThreadPoolExecutor(16) as threads:
        assert {r.text for r in threads.map(lambda _: client.chat(HELLO), range(24))} == {"hello"}
    assert server.most_active == 3
    assert client.usage.requests == 24 and client.usage.completion_tokens == 24


def test_the_budget_stops_before_it_is_exceeded(server):
    client = connect(server, max_tokens=10, max_total_tokens=100)
    server.answer = "w " * 10
    bound = len(HELLO[0]["content"]) + 16 + 10  # no request can use more: 39
    sent = 0
    with pytest.raises(BudgetSpent, match=r"max_total_tokens = 100 does not allow .* 39 tokens.* 65 tokens"):
        while True:
            client.chat(HELLO)
            sent += 1
    assert sent == 5 and len(server.requests) == 5  # 13 each: 65 + 39 > 100
    assert client.usage.prompt_tokens + client.usage.completion_tokens + bound > 100
    with pytest.raises(BudgetSpent):
        connect(server, max_total_tokens=100).check()


def test_a_budget_of_money(server):
    client = connect(server, max_tokens=10, price_in=1000.0, price_out=1000.0, max_usd=0.1)
    server.answer = "w " * 10
    with pytest.raises(BudgetSpent, match=r"max_usd = 0.1 .*0.0650 USD"):
        while True:
            client.chat(HELLO)
    assert client.usage.usd == pytest.approx(0.065)


def test_requests_in_flight_count_as_the_most_that_they_may_use(server):
    release = threading.Event()
    client = connect(server, max_tokens=10, max_total_tokens=100, in_flight=8)
    server.answer = Answer("w " * 10, wait=release)
    spent = []

    def ask(_):
        try:
            client.chat(HELLO)
        except BudgetSpent:
            spent.append(1)
            release.set()  # cannot come first: while requests are under way the others wait for what they used

    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(ask, i) for i in range(8)]
        while len(server.requests) < 2:
            time.sleep(0.005)
        time.sleep(0.1)
        assert len(server.requests) == 2 and not spent  # a third could make it 117
        release.set()
        for future in futures:
            future.result(30)
    assert len(server.requests) == 5 and len(spent) == 3 and server.most_active == 2


def test_the_longest_reply_that_a_request_allows_is_set_aside():
    for extra, longest in (({}, 10), ({"max_completion_tokens": 70}, 70), ({"max_tokens": 3}, 3)):
        assert Endpoint("http://localhost:1/v1", "m", max_tokens=10).longest(extra) == longest
    both = {"max_tokens": None, "max_completion_tokens": 7}
    assert Endpoint("http://localhost:1/v1", "m", max_total_tokens=99, extra=both).longest(both) == 7


def test_behind_a_gateways_time_out_a_model_may_have_written(server):
    server.answers = [Answer(status=504)]
    client = connect(server, max_tokens=50)
    client.chat([{"role": "user", "content": "four"}])
    assert client.usage.completion_tokens == 50 + 1 and client.usage.estimated == 1


def test_requests_that_may_have_been_billed_count_against_the_budget(server):
    server.answer = Answer("hello", cut=5)
    client = connect(server, max_tokens=10, max_total_tokens=100, retries=6)
    with pytest.raises(BudgetSpent):
        client.chat(HELLO)
    assert len(server.requests) == 5 and client.usage.estimated == 5  # 4 + 10 each


# ------------------------------------------------------------------------------------- the endpoint


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"base_url": "localhost:8000/v1"}, "must look like http"),
        ({"base_url": "ftp://x/v1"}, "must look like http"),
        ({"base_url": "http:///v1"}, "must look like http"),
        ({"base_url": f"http://{KEY}@x/v1"}, "must hold no key"),
        ({"base_url": f"http://x/v1?key={KEY}"}, "must hold no key"),
        ({"base_url": "http://x/v1/chat/completions"}, "ends before"),
        ({"model": ""}, "model must be"),
        ({"api_key_env": KEY}, "must be the name of an environment variable"),
        ({"max_tokens": 0}, "max_tokens = 0 must be positive"),
        ({"in_flight": 0}, "in_flight = 0"),
        ({"timeout_s": float("inf")}, "timeout_s = inf"),
        ({"retries": -1}, "retries = -1"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"price_in": float("nan")}, "price_in = nan"),
        ({"max_usd": 1.0}, "needs price_in and price_out"),
        ({"max_total_tokens": 0}, "max_total_tokens = 0"),
        ({"extra": {"stream": True}}, "extra.stream"),
        ({"extra": {"max_tokens": None}, "max_total_tokens": 9}, "a budget needs the longest reply"),
    ],
)
def test_an_endpoint_checks_itself(keys, reason):
    with pytest.raises(ValueError, match=reason) as error:
        Endpoint(**{"base_url": "http://localhost:8000/v1", "model": "m", **keys})
    assert KEY not in str(error.value)


def test_an_endpoint_can_be_hashed_and_shown():
    endpoint = Endpoint("https://api.example.org/v1/", "m", extra={"seed": 1})
    assert hash(endpoint) == hash(Endpoint("https://api.example.org/v1/", "m", extra={"seed": 1}))
    assert KEY not in repr(endpoint) + repr(vars(Client(endpoint)))
