# SPDX-License-Identifier: Apache-2.0
"""The examples as servers, and a model's server that they can ask."""

import json
import re
import select
import shutil
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
from servers import HOST, Server

EXAMPLES = Path(__file__).parents[2] / "examples"


class App(Server):
    """
    An example that serves HTTP, with its files in a folder of its own.

    :param command: A program of the environment, and its arguments. `{port}` stands for the port.
    :param ready: The path that answers when the example is up.
    :param environment: Variables of its environment.
    """

    discard_signal = signal.SIGTERM  # it may have workers, which it ends itself

    def __init__(self, *command, ready="/docs", **environment):
        super().__init__({})
        self._arguments, self._ready = command, ready
        quiet = {"HAYSTACK_TELEMETRY_ENABLED": "False", "OPENAI_API_KEY": "", "PYTHONUNBUFFERED": "1"}
        self._environment = {**quiet, **environment}
        self.url = f"http://{HOST}:{self.port}"

    def _command(self):
        variables = [f"{name}={value}" for name, value in self._environment.items()]
        arguments = [str(argument).replace("{port}", str(self.port)) for argument in self._arguments]
        program = Path(sys.executable).parent / arguments[0]
        return [shutil.which("env"), *variables, program, *arguments[1:]]

    def _answers(self):
        try:
            return httpx.get(self.url + self._ready).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


class OpenAIServer:
    """
    A server with the part of OpenAI's interface that the examples use. It answers "You said: ", and what was said.

    After `hold()` it stops after the first words of an answer that is streamed, and before any other one, until
    `go_on()`. `requests` are the bodies of all requests, and `cancelled` those of streams whose client has closed the
    connection meanwhile. If it `refuses`, as at first, a question with the word "refuse" gets status 400. The stream
    for a question with the word "garble" ends with something that is no JSON.
    """

    def __enter__(self):
        self.requests = []
        self.cancelled = []
        self.refuses = True
        self._free = threading.Event()
        self._free.set()
        self._server = ThreadingHTTPServer((HOST, 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._free.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self):
        url = f"http://{HOST}:{self._server.server_address[1]}/v1"
        return {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "a key"}

    def hold(self):
        self._free.clear()

    def go_on(self):
        self._free.set()

    def _answer(self, body):
        if not body.get("stream"):
            self._free.wait()
        said = body["messages"][-1]["content"]
        text = said if isinstance(said, str) else " ".join(part.get("text", "") for part in said)
        return f"You said: {text} This is answer {len(self.requests)}."

    def _may_go_on(self, connection):
        """Wait until `go_on()`. It is False if the client closes the connection before."""
        while not self._free.wait(0.05):
            if select.select([connection], [], [], 0)[0] and not connection.recv(1, socket.MSG_PEEK):
                return False
        return True

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                text = server._answer(body)
                is_refused = server.refuses and "refuse" in text
                self.send_response(400 if is_refused else 200)
                self.send_header("Content-Type", "text/event-stream" if body.get("stream") else "application/json")
                self.end_headers()
                if is_refused:
                    self.wfile.write(b'{"error": {"message": "refused"}}')
                elif body.get("stream"):
                    self._stream(text, body)
                else:
                    message = {"role": "assistant", "content": text}
                    choice = {"index": 0, "finish_reason": "stop", "message": message}
                    self.wfile.write(json.dumps(self._envelope("chat.completion", [choice])).encode())

            def _stream(self, text, body):
                for place, word in enumerate([*re.findall(r"\S+\s*", text), None]):
                    if place == 2 and not server._may_go_on(self.connection):
                        server.cancelled.append(body)
                        return
                    delta = {} if word is None else {"role": "assistant", "content": word}
                    choice = {"index": 0, "delta": delta, "finish_reason": "stop" if word is None else None}
                    self._event(json.dumps(self._envelope("chat.completion.chunk", [choice])))
                self._event("{a secret" if "garble" in text else "[DONE]")

            def _event(self, data):
                self.wfile.write(f"data: {data}\n\n".encode())
                self.wfile.flush()

            def _envelope(self, kind, choices):
                return {"id": "1", "object": kind, "created": 0, "model": "test", "choices": choices}

            def log_message(self, *_):
                pass

        return Handler
