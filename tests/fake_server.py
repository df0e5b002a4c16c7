"""An OpenAI-compatible chat server on loopback, with replies and faults on command. Real HTTP, no model.

    with FakeServer() as server:
        server.answers = ["first reply", Answer(status=500), Answer("cut", finish="length")]   # in this order, then
        server.answer = lambda body: f"you said {body['messages'][-1]['content']}"             # this for all others
        client = Client(Endpoint(server.url, "fake", retries=2))
        ...
        server.stop()    # connections are refused
        server.start()   # on the same port again

Seen by the server: `requests` (bodies, in order of arrival), `headers` (one mapping for each), `most_active` (the
largest number of requests that were under way at once).
"""

import json
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Answer:
    text: str | None = ""
    finish: str | None = "stop"
    status: int = 200
    headers: dict = field(default_factory=dict)
    body: bytes | None = None  # instead of a well-formed reply
    usage: dict | str | None = "words"  # words: one token a word; None: left out
    delay: float = 0.0  # seconds before the answer
    wait: threading.Event | None = None  # answer once it is set, or the server stops
    cut: int | None = None  # reset the connection after this many bytes of the body
    trickle: float | None = None  # seconds between the bytes of the body


class FakeServer:
    def __init__(
        self, answer: "Callable[[dict], str | Answer] | str | Answer" = "OK", certificate: Path | None = None
    ):
        self.answer = answer  # a function of the request's body, or the same for all
        self.answers: list[str | Answer] = []
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.active = self.most_active = 0
        self.certificate = certificate  # a folder with cert.pem and key.pem: https
        self.lock, self.port, self.server = threading.Lock(), 0, None
        self.start()

    @property
    def url(self) -> str:
        return f"http{'s' if self.certificate else ''}://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

    def start(self) -> None:
        assert self.server is None
        self.stopped = threading.Event()
        self.server = _Server(("127.0.0.1", self.port), _Handler)
        self.server.fake, self.port = self, self.server.server_address[1]
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate / "cert.pem", self.certificate / "key.pem")
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and reset those whose answer has not been given."""
        if self.server:
            self.stopped.set()
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def next_answer(self, body: dict, headers: dict) -> Answer:
        with self.lock:
            self.requests.append(body)
            self.headers.append(headers)
            answer = self.answers.pop(0) if self.answers else self.answer
        answer = answer(body) if callable(answer) else answer
        return Answer(answer) if isinstance(answer, str) else answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: FakeServer

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client that went away is part of the tests
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        fake: FakeServer = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._write(Answer(status=404, body=b'{"detail": "Not Found"}'), b'{"detail": "Not Found"}')
            return
        with fake.lock:
            fake.active += 1
            fake.most_active = max(fake.most_active, fake.active)
        answer, stopped = fake.next_answer(body, dict(self.headers)), fake.stopped
        end = time.monotonic() + answer.delay
        while not stopped.is_set() and (
            time.monotonic() < end or (answer.wait is not None and not answer.wait.is_set())
        ):
            stopped.wait(0.005)
        with fake.lock:  # before the answer: the client may send its next request as soon as it has read this one
            fake.active -= 1
        if stopped.is_set():
            self._reset()
        else:
            self._write(answer, answer.body if answer.body is not None else self._reply(answer, body))

    def _reply(self, answer: Answer, body: dict) -> bytes:
        if answer.status != 200:
            return json.dumps({"error": {"message": answer.text or f"status {answer.status}"}}).encode()
        message = {"role": "assistant", "content": answer.text}
        reply = {
            "object": "chat.completion",
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": answer.finish}],
        }
        usage = answer.usage
        if usage == "words":
            prompt = sum(len(m["content"].split()) for m in body["messages"])
            usage = {"prompt_tokens": prompt, "completion_tokens": len((answer.text or "").split())}
        return json.dumps(reply | ({"usage": usage} if usage is not None else {})).encode()

    def _write(self, answer: Answer, data: bytes) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if answer.trickle is not None:
            for i in range(len(data)):
                self.wfile.write(data[i : i + 1])
                self.server.fake.stopped.wait(answer.trickle)
        elif answer.cut is not None:
            self.wfile.write(data[: answer.cut])
            self._reset()
        else:
            self.wfile.write(data)

    def _reset(self) -> None:
        """End the connection with RST, as a process that dies does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()  # else it would keep the socket open
        self.connection.close()

    def log_message(self, *args):
        pass
