"""predict.py --engine: a server answers, asked as vLLM, SGLang and llama.cpp are asked."""

import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import answers_of

import predict
from support.dialogues.samples import first_question, read_samples
from support.errors import UserError
from support.model.server import Server
from tests.forked import free_port

ELSEWHERE = "http://engine.example"


class FakeServer(ThreadingHTTPServer):
    """Lists two models, and answers every question with itself backwards, at the length the sum of its characters says."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.asked = f"http://127.0.0.1:{self.server_port}/v1", []
        self.fails_after = math.inf  # so many questions
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, status: int, value: dict):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path.removeprefix(ELSEWHERE) != "/v1/models":  # which is what a proxy is asked
            return self.reply(404, {"error": {"message": "no such page"}})
        self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in ("role", "other")]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, request))
        if len(self.server.asked) > self.server.fails_after:
            return self.reply(400, {"error": {"message": "the prompt is too long"}})
        question = request["messages"][-1]["content"]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": question[::-1]},
            "finish_reason": "length" if len(question) % 2 else "stop",
        }
        self.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "role", "choices": [choice]})

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.shutdown()
    server.server_close()


def run(server, samples, output, *more):
    flags = ["--engine", getattr(server, "url", server), "--test_path", samples[1], "--output_path", output]
    flags += ["--lang", "en", "--resamples", 20, "--train_path", "none.json", "--max_new_tokens", 9]
    predict.main([str(flag) for flag in (*flags, *more)])


def test_a_server_answers_the_test_set(server, samples, tmp_path, capsys):
    run(server, samples, tmp_path / "answers.jsonl")
    out = capsys.readouterr().out
    assert "what comes from likelihoods is left out" in out
    prompts = {(sample["system"], first_question(sample["messages"])) for sample in read_samples(samples[1])}
    text = (tmp_path / "answers.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n")[1:] if line]
    assert len(lines) == len(prompts)
    for line in lines:
        assert line["answer"] == line["prompt"][::-1] and line["stopped"] == (len(line["prompt"]) % 2 == 0)
    assert len(server.asked) == len(prompts)
    for path, request in server.asked:
        (system, question) = (message["content"] for message in request.pop("messages"))
        assert path == "/v1/chat/completions" and (system, question) in prompts
        greedy = {"temperature": 0, "max_tokens": 9, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
        assert request == {"model": "role", **greedy}

    run(server, samples, tmp_path / "answers.jsonl")
    assert len(server.asked) == len(prompts) and "has all answers" in capsys.readouterr().err


def test_the_model_is_chosen_by_name_and_its_answers_are_not_mixed(server, samples, tmp_path, capsys):
    run(server, samples, tmp_path / "answers.jsonl", "--engine_model", "other")
    assert {request["model"] for _, request in server.asked} == {"other"}
    asked = len(server.asked)
    run(server, samples, tmp_path / "answers.jsonl")
    assert "other settings (model)" in capsys.readouterr().err and len(server.asked) == 2 * asked


def test_typed_markers_do_not_reach_a_server_and_an_answer_that_is_none_is_an_error(server, monkeypatch):
    engine, reply = Server(server.url).check(), Handler.reply
    text = "好<reserved_107>我</s>是<s><unk><reserved_10<s>6>谁<</s>s><reserved_108>"  # some appear as others go
    ((_, answer),) = engine.generate_all([(0, [{"role": "user", "content": text}])], 1, 9)
    assert server.asked[0][1]["messages"] == [{"role": "user", "content": "好我是谁<reserved_108>"}]
    assert answer.text == "好我是谁<reserved_108>"[::-1]
    monkeypatch.setattr(Handler, "reply", lambda self, status, value: reply(self, 200, {"choices": []}))
    with pytest.raises(UserError, match="no answer from it"):
        list(engine.generate_all([(0, [{"role": "user", "content": "好"}])], 1, 9))


def test_another_machine_is_asked_through_the_proxy_and_this_one_never(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "other.example")
    for here in ("127.0.0.1", "LOCALHOST", "0.0.0.0"):  # as servers print it
        for name, proxy in {"http_proxy": "http://127.0.0.1:1", "all_proxy": "socks5://127.0.0.1:1"}.items():
            monkeypatch.setenv(name, proxy)
            assert Server(server.url.replace("127.0.0.1", here)).check().model == "role"
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    for unusable in ("socks5://127.0.0.1:1", "gopher://127.0.0.1"):
        monkeypatch.setenv("all_proxy", unusable)
        with pytest.raises(UserError, match=f"--engine {ELSEWHERE}/v1: no answer .*(socks|scheme)"):
            Server(f"{ELSEWHERE}/v1").check()
    monkeypatch.delenv("all_proxy")
    assert Server(f"{ELSEWHERE}/v1").check().model == "role"
    monkeypatch.setenv("no_proxy", "engine.example")
    with pytest.raises(UserError, match="no answer from it"):
        Server(f"{ELSEWHERE}/v1").check()


def error_of(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "error: " in error and "Traceback" not in error
    return error


def test_what_a_server_lacks_is_told_in_a_line(server, samples, tmp_path, capsys, monkeypatch):
    output = tmp_path / "answers.jsonl"
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    assert "start the server" in error_of(capsys, nobody, samples, output)
    assert "start the server" in error_of(capsys, server.url.removesuffix("/v1"), samples, output)
    assert "serves role, other" in error_of(capsys, server, samples, output, "--engine_model", "none")
    assert "answers greedily" in error_of(capsys, server, samples, output, "--sample")
    assert "not allowed with argument" in error_of(capsys, server, samples, output, "--model_path", tmp_path)
    assert not output.exists() and not server.asked
    server.fails_after = 0
    assert "the prompt is too long" in error_of(capsys, server, samples, output)
    assert not output.exists()
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install openai" in error_of(capsys, server, samples, output)


def test_what_has_been_answered_is_kept_when_the_server_fails(server, samples, tmp_path, capsys):
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    server.fails_after = 11
    error_of(capsys, server, samples, output, "--batch_size", "4")
    kept = answers_of(part)
    assert 11 - 4 < len(kept) <= 11 and not output.exists()
    server.fails_after, done = math.inf, part.read_text(encoding="utf-8")
    run(server, samples, output, "--batch_size", "4")
    assert output.read_text(encoding="utf-8").startswith(done) and not part.exists()
