"""OpenAI's protocol against a server on this machine that limits, fails, stalls and hangs up."""

import base64
import hashlib
import json
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_lightning.core.config import TextConfig
from dq_lightning.core.errors import FeatureError
from dq_lightning.features import openai_embeddings
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features
from dq_lightning.features.openai_embeddings import OpenAIOrigin, cut_bytes, split
from tests.features.text_models import Texts

# found, not imported: processes that run none of these tests do not pay for it
pytestmark = pytest.mark.skipif(find_spec("openai") is None, reason="the optional extra openai is not installed")
NAME, KEY, WIDTH = "openai:text-embedding-3-small", "sk-secret-of-this-test", 8


def vector(text):
    digest = hashlib.sha256(text.encode()).digest()[: 4 * WIDTH]
    return (np.frombuffer(digest, np.uint8)[:WIDTH] / 255).astype(np.float32)


class Server(ThreadingHTTPServer):
    """Counts what it is paid for; `trouble(request number)` says what goes wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests, self.times, self.paid, self.running, self.most_running = [], [], [], 0, 0
        self.trouble = lambda number: None
        self.delay = 0.0
        self.index, self.most_inputs, self.only_floats = "right", 10_000, None
        self.closing = threading.Event()

    def end(self):
        """Refuse what is still asked for until nobody asks: a client that tries again draws random numbers to wait."""
        self.closing.set()
        for thread in threading.enumerate():
            if thread.name.startswith("embed-"):
                thread.join(30)
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append((self.path, self.headers["Authorization"], body))
            server.times.append(time.monotonic())
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            time.sleep(server.delay)
            self.answer(body, server.trouble(number))
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.running -= 1

    def answer(self, body, trouble):
        kind, value = ("status", (400, {})) if self.server.closing.is_set() else trouble or ("ok", None)
        if kind == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif kind == "numbers":
            self.reply(
                200,
                {
                    "object": "list",
                    "model": "m",
                    "usage": {"prompt_tokens": 1, "total_tokens": 1},
                    "data": [
                        {
                            "object": "embedding",
                            "index": i,
                            "embedding": base64.b64encode(np.float32(value).tobytes()).decode(),
                        }
                        for i in range(len(body["input"]))
                    ],
                },
                {},
            )
        elif kind == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b'{"data": [')
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif kind == "stall":
            self.server.closing.wait(value)
            self.close_connection = True
        elif kind == "status":
            status, headers = value
            self.reply(status, {"error": {"message": f"status {status} for {KEY}", "type": "t"}}, headers)
        elif any(not text for text in body["input"]) or any(len(text.encode()) > 20_000 for text in body["input"]):
            self.reply(400, {"error": {"message": "maximum context length"}}, {})
        elif len(body["input"]) > self.server.most_inputs:
            self.reply(422, {"error": {"message": "batch size is too large"}}, {})
        elif self.server.only_floats and body.get("encoding_format") == "base64":
            self.reply(self.server.only_floats, {"error": {"message": "not valid"}}, {})
        else:
            with self.server.lock:
                self.server.paid += body["input"]
            rows = [vector(text) for text in body["input"]]
            rows = rows[:-1] if kind == "short" else rows
            encoded = body.get("encoding_format") == "base64"
            shown = [base64.b64encode(row.tobytes()).decode() if encoded else row.tolist() for row in rows]
            data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(shown)]
            for row in data if self.server.index != "right" else ():
                row.update({"index": 0})
                if self.server.index == "missing":
                    del row["index"]
            usage = {"prompt_tokens": 1, "total_tokens": 1}
            # the order of the answer is not promised
            self.reply(200, {"object": "list", "data": data[::-1], "model": body["model"], "usage": usage}, {})

    def reply(self, status, body, headers):
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(monkeypatch):
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{running.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.2)
    yield running
    running.end()


TEXTS = [f"text {i} é 你" for i in range(23)] + ["", "text 3 é 你", "  "]


def embed(texts=TEXTS, batch_size=4, threads=3, **options):
    spec = choose_encoder(NAME, modality="text")
    return extract_features(
        Texts(texts), spec, batch_size=batch_size, num_workers=threads, progress=False, **options
    ).embedding


def wanted(texts=TEXTS):
    return torch.from_numpy(np.stack([vector(text if text.strip() else " ") for text in texts]))


def test_rows_in_order_equal_texts_paid_once(server):
    assert torch.equal(embed(), wanted())
    assert sorted(server.paid) == sorted({text if text.strip() else " " for text in TEXTS})
    paths, keys, bodies = zip(*server.requests, strict=True)
    assert set(paths) == {"/v1/embeddings"}
    assert set(keys) == {f"Bearer {KEY}"}
    assert {body["model"] for body in bodies} == {"text-embedding-3-small"}
    assert max(len(body["input"]) for body in bodies) == 4


def test_requests_go_in_parallel_but_not_more_than_asked(server):
    server.delay = 0.1
    embed(batch_size=2, threads=4)
    assert 2 <= server.most_running <= 4


@pytest.mark.parametrize(
    "trouble",
    [
        ("status", (429, {"Retry-After": "0.05"})),
        ("status", (429, {})),
        ("status", (500, {})),
        ("status", (503, {})),
        ("stall", 60),
        ("hang up", None),
        ("cut", None),
    ],
    ids=str,
)
def test_trouble_that_passes_is_waited_out(server, trouble, monkeypatch):
    if trouble[0] == "stall":
        # longer than an answer takes on a busy machine, which would be paid for twice
        monkeypatch.setattr(openai_embeddings.OpenAIOrigin, "client", _with_timeout(OpenAIOrigin.client, 1.5))
    server.trouble = lambda number: trouble if number % 3 == 0 else None
    assert torch.equal(embed(), wanted())
    # what the server refused was not paid for, and what it answered was asked once
    assert len(server.paid) == len(set(server.paid)) == 25 - 1


def _with_timeout(make, seconds):
    def client(self):
        return make(replace(self, timeout=seconds))

    return client


def test_the_wait_that_the_server_asks_for_is_kept(server):
    server.trouble = lambda number: ("status", (429, {"Retry-After": "0.7"})) if number == 0 else None
    embed(TEXTS[:3], batch_size=8)
    assert server.times[1] - server.times[0] >= 0.7


def test_an_interrupted_run_goes_on_without_paying_twice(server, tmp_path):
    server.trouble = lambda number: ("status", (400, {})) if number >= 3 else None
    with pytest.raises(FeatureError, match="refuses"):
        embed(api_embeddings=tmp_path, threads=1)
    before = list(server.paid)
    assert 4 <= len(before) < 24
    server.trouble = lambda number: None
    # another batch size cuts the texts in another way
    assert torch.equal(embed(api_embeddings=tmp_path, batch_size=5), wanted())
    assert len(server.paid) == len(set(server.paid)) == 24
    assert torch.equal(embed(api_embeddings=tmp_path), wanted())
    assert len(server.paid) == 24


def test_a_damaged_record_is_paid_again_and_others_are_not_touched(server, tmp_path, caplog):
    embed(api_embeddings=tmp_path)
    records = sorted(tmp_path.rglob("*.rows"))
    assert len(records) == 6
    records[0].write_bytes(records[0].read_bytes()[:60])
    records[1].with_suffix(".partial").write_bytes(b"cut")
    assert torch.equal(embed(api_embeddings=tmp_path), wanted())
    assert len(server.paid) == 24 + 4
    assert records[0].name in caplog.text


@pytest.mark.parametrize("row", [[float("nan")] * WIDTH, [float("inf")] + [0.0] * (WIDTH - 1), []])
def test_a_bad_answer_is_an_error_that_the_next_run_does_not_find_again(server, tmp_path, row):
    server.trouble = lambda number: ("numbers", row)
    with pytest.raises(FeatureError, match=r"NaN or infinite|widths \[0\]"):
        embed(api_embeddings=tmp_path)
    server.trouble = lambda number: None
    assert torch.equal(embed(api_embeddings=tmp_path), wanted())


def test_a_model_that_has_another_width_now(server, tmp_path):
    embed(TEXTS[:4], api_embeddings=tmp_path)
    server.trouble = lambda number: ("numbers", [0.5] * (WIDTH + 1))
    for _ in range(2):
        with pytest.raises(FeatureError, match=r"another width than before \(\[8, 9\]\)"):
            embed(api_embeddings=tmp_path)
    server.trouble = lambda number: None
    assert torch.equal(embed(api_embeddings=tmp_path), wanted())


def test_models_and_servers_do_not_share_records_or_identity(server, tmp_path, memory, monkeypatch):
    embed(TEXTS[:4], api_embeddings=tmp_path)
    names = [NAME, "openai:text-embedding-3-large"]
    first, second = (choose_encoder(name, modality="text").identity(memory) for name in names)
    extract_features(
        Texts(TEXTS[:4]),
        choose_encoder(names[1], modality="text"),
        progress=False,
        api_embeddings=tmp_path,
    )
    assert len(server.paid) == 8
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert len({first, second, choose_encoder(NAME, modality="text").identity(memory)}) == 3


def test_long_texts_are_cut_when_the_server_refuses_them(server, caplog):
    long = "äb" * 20_000
    made = embed(["short", long])
    assert torch.equal(made, wanted(["short", long.encode()[:8191].decode(errors="ignore")]))
    assert "cut" in caplog.text


def test_a_long_text_is_cut_only_where_it_is_refused_itself(server):
    fits, long = "c" * 15_000, "äb" * 20_000
    texts = ["short", fits, long, fits + "d"]
    cut = long.encode()[:8191].decode(errors="ignore")
    assert torch.equal(embed(texts), wanted(["short", fits, cut, fits + "d"]))
    # so the vector of a text is the same beside any others
    assert torch.equal(embed([fits, "short"]), wanted([fits, "short"]))


@pytest.mark.parametrize("index", ["zero", "missing"])
def test_embeddings_without_numbers_are_asked_for_one_by_one(server, index, caplog):
    server.index = index
    # the server answers in the reverse order
    assert torch.equal(embed(), wanted())
    assert "which embedding belongs to which text" in caplog.text


def test_a_server_that_takes_fewer_texts(server):
    server.most_inputs = 3
    texts = [f"text {i}" for i in range(200)]
    assert torch.equal(embed(texts, batch_size=100, threads=1), wanted(texts))
    # the limit is found once: 100, 50, 25, 13, 7, 4 are too many
    assert sum(len(body["input"]) > 3 for _, _, body in server.requests) <= 6
    assert len(server.paid) == 200


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_has_no_base64(server, status):
    server.only_floats = status
    texts = [f"text {i}" for i in range(80)]
    assert torch.allclose(embed(texts, batch_size=8, threads=1), wanted(texts))
    # found out with the first request; the others are not made smaller
    assert [len(body["input"]) for _, _, body in server.requests[-9:]] == [8] * 9


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
def test_what_is_refused_for_good_is_not_told_as_trouble_that_passes(server, status):
    server.trouble = lambda number: ("status", (status, {}))
    with pytest.raises(FeatureError, match="refuses") as caught:
        embed(threads=1)
    assert "later" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(server.requests) <= 8


@pytest.mark.parametrize("answer", [{"data": []}, {"error": "no"}, {"data": [{"index": 0}]}, []])
def test_an_answer_that_holds_no_embeddings(server, answer, monkeypatch):
    monkeypatch.setattr(Handler, "answer", lambda self, body, trouble: self.reply(200, answer, {}))
    with pytest.raises(FeatureError, match=r"answered|did not answer with embeddings"):
        embed(threads=1)


def test_an_interruption_does_not_wait_for_slow_servers(server, monkeypatch, tmp_path):
    monkeypatch.setattr(openai_embeddings, "GRACE_SECONDS", 0.5)
    server.trouble = lambda number: ("stall", 30) if number % 2 else None
    spec = choose_encoder(NAME, modality="text").load("cpu")
    rows = spec.rows(Texts(TEXTS), 4, 2, tmp_path, torch.arange(len(TEXTS)))
    next(rows)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        rows.throw(KeyboardInterrupt)
    assert time.monotonic() - started < 20
    # nothing new is asked for, once what was on its way is there, and what had arrived is kept
    time.sleep(0.3)
    count = len(server.requests)
    time.sleep(0.3)
    assert len(server.requests) == count
    assert len(list(tmp_path.rglob("*.rows"))) >= 1


def test_half_a_character_names_the_sample(server):
    with pytest.raises(FeatureError, match=r"sample 1 holds half of a character"):
        embed(["a", "b\ud83d"])


def test_the_key_is_in_no_message_and_no_file(server, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    embed(TEXTS[:4], api_embeddings=tmp_path)
    server.trouble = lambda number: ("status", (401, {}))
    with pytest.raises(FeatureError, match="OPENAI_API_KEY is refused") as caught:
        embed(api_embeddings=tmp_path)
    shown = str(caught.value) + caplog.text + "".join(capsys.readouterr())
    assert KEY not in shown
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in repr(choose_encoder(NAME, modality="text"))


def test_trouble_that_stays_is_told(server, monkeypatch):
    monkeypatch.setattr(OpenAIOrigin, "client", _with_retries(OpenAIOrigin.client, 2))
    server.trouble = lambda number: ("status", (500, {}))
    with pytest.raises(FeatureError, match=r"InternalServerError.*start again later"):
        embed(TEXTS[:4], threads=1)
    assert len(server.requests) == 3
    server.trouble = lambda number: ("short", None)
    with pytest.raises(FeatureError, match="4 texts with 3 embeddings"):
        embed(TEXTS[:4])


def _with_retries(make, retries):
    def client(self):
        return make(replace(self, retries=retries))

    return client


def test_without_key_or_model(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(FeatureError, match="OPENAI_API_KEY"):
        embed()
    with pytest.raises(FeatureError, match="max_length"):
        choose_encoder(NAME, modality="text", text=TextConfig(max_length=9))


@given(st.lists(st.integers(0, 400_000), max_size=40), st.integers(1, 9))
def test_requests_hold_everything_in_order_within_their_bounds(sizes, most):
    batches = split(sizes, most)
    assert [position for batch in batches for position in batch] == list(range(len(sizes)))
    for batch in batches:
        total = sum(sizes[position] for position in batch)
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or total <= openai_embeddings.BYTES_PER_REQUEST


@given(st.text(), st.integers(0, 30))
def test_a_cut_text_is_a_beginning_within_the_bound(text, most):
    cut = cut_bytes(text, most)
    assert text.startswith(cut)
    assert len(cut.encode()) <= most
    assert len(text.encode()) > most or cut == text
    assert len(text.encode()) <= most or len(cut.encode()) > most - 4
