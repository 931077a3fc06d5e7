"""Text embeddings from OpenAI's API, requested in parallel; each is recorded as soon as it arrives.

The official client repeats a request after the status codes 408, 409, 429 and 5xx, timeouts and broken connections. It
waits as long as the server's `Retry-After` says, else with exponential backoff and jitter.
"""

import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.cache.api_embeddings import StoredEmbeddings
from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.config import Precision, TextConfig
from dq_lightning.core.errors import FeatureError
from dq_lightning.features.collect import Rows
from dq_lightning.features.origins import EncoderSpec
from dq_lightning.features.samples import SampleSource
from dq_lightning.features.text_loading import read_texts
from dq_lightning.identity.values import digest_text

logger = logging.getLogger("dq_lightning")
PREFIX = "openai:"
Array = NDArray[np.float32]
KEY = "OPENAI_API_KEY"
SERVER = "OPENAI_BASE_URL"
MAX_RETRIES = 10
TIMEOUT_SECONDS = 60.0
REQUESTS_AT_ONCE = 8
# The API limits the inputs of a request, the tokens of an input and the tokens of a request. A token is at least one
# byte, so bytes are counted instead.
MAX_INPUTS, TOKENS_PER_INPUT, BYTES_PER_REQUEST = 2048, 8191, 280_000
# When the run is stopped, requests that were already sent have this long to finish.
GRACE_SECONDS = 5.0
# Servers answer with these status codes if a request is too large or invalid, and if a failure is temporary.
_REFUSED, _PASSING = (400, 413, 422), (408, 409, 425, 429)
_SPEAKS_OF_LENGTH = re.compile(r"token|context|length|too (?:long|large)|exceed|maximum", re.IGNORECASE)
_SPEAKS_OF_ENCODING = re.compile(r"base64|encoding.?format", re.IGNORECASE)


@dataclass(frozen=True)
class OpenAIOrigin(EncoderSpec):
    """A model behind the API, identified by its name and, if `OPENAI_BASE_URL` is set, the address of the server.

    A request that fails is repeated up to `retries` times; it may take `timeout` seconds each time.
    """

    retries: int = MAX_RETRIES
    timeout: float = TIMEOUT_SECONDS

    @property
    def model(self) -> str:
        """Name of the model, such as `text-embedding-3-small`."""
        return self.name.removeprefix(PREFIX)

    def identity(self, memory: DigestMemory) -> str | None:
        return digest_text("openai 2", self.model, os.environ.get(SERVER, ""))

    def _load(self, device: torch.device, precision: Precision) -> "OpenAIRows":
        return OpenAIRows(self)

    def client(self) -> Any:
        """Return the official client, which reads the key and the server's address from the environment.

        Raises:
            FeatureError: the package `openai` is not installed, or `OPENAI_API_KEY` is not set.
        """
        try:
            import openai
        except ImportError as error:
            raise FeatureError(
                f'encoder="{self.name}" needs the package openai: pip install "dq-lightning[openai]"'
            ) from error
        if not os.environ.get(KEY):
            raise FeatureError(
                f'encoder="{self.name}" needs an API key in the environment variable {KEY}; it is read from nowhere '
                "else and never stored"
            )
        return openai.OpenAI(max_retries=self.retries, timeout=self.timeout)


def openai_origin(name: str, settings: TextConfig) -> OpenAIOrigin:
    """Return the origin that the encoder name `"openai:MODEL"` stands for.

    Raises:
        FeatureError: the name of the model is missing, or one of `pooling`, `max_length` and `prompt` is set; the API
            has none of them.
    """
    model = name.removeprefix(PREFIX)
    if not model:
        raise FeatureError(f'{name!r} names no model: pass for instance "{PREFIX}text-embedding-3-small"')
    for setting in ("pooling", "max_length", "prompt"):
        if getattr(settings, setting) != getattr(TextConfig(), setting):
            raise FeatureError(
                f"config.text.{setting} cannot be used with {name!r}, because the server decides about pooling, length and "
                "prompt: leave it out"
            )
    return OpenAIOrigin(name, f"OpenAI's {model}")


class OpenAIRows:
    """An encoder that requests the embeddings of all texts of a source; see `encoders.RowEncoder`."""

    num_classes: None = None
    advice = "The server sent them: try again, or pass another model"

    def __init__(self, origin: OpenAIOrigin) -> None:
        self._origin = origin
        self._client = origin.client()
        self._most = MAX_INPUTS
        self._options: dict[str, Any] = {}
        self._answered = False
        self._stopped = threading.Event()

    def rows(
        self,
        source: SampleSource,
        batch_size: int,
        num_workers: int | Literal["auto"],
        api_embeddings: Path | None,
        positions: Tensor,
    ) -> Iterator[Rows]:
        """Yield the embeddings of the samples, batch by batch as they arrive; equal texts are sent only once.

        Every batch is stored before it is used, so an interrupted run continues where it stopped. With `num_workers`
        `"auto"` or 0, up to 8 requests run at the same time.

        Raises:
            FeatureError: the server rejects a request or still fails after all retries.
        """
        # The API rejects an empty input, so an empty text is sent as one space.
        texts = [text if text.strip() else " " for text in read_texts(source, positions)]
        places: dict[bytes, list[int]] = {}
        for place, text in enumerate(texts):
            places.setdefault(_key(text), []).append(place)
        name = digest_text(self._origin.model, os.environ.get(SERVER, ""))[:32]
        stored = StoredEmbeddings(None if api_embeddings is None else api_embeddings / f"openai-{name}")
        known = [key for key in places if key in stored]
        waiting = [key for key in places if key not in stored]
        widths = {len(stored[key]) for key in known}
        for start in range(0, len(known) if len(widths) == 1 else 0, MAX_INPUTS):
            part = known[start : start + MAX_INPUTS]
            yield _spread(positions, [places[key] for key in part], np.stack([stored[key] for key in part]))
        self._check_one(widths)
        sizes = [len(texts[places[key][0]].encode()) for key in waiting]
        batches = [[waiting[i] for i in batch] for batch in split(sizes, min(batch_size, MAX_INPUTS))]
        # 0 asks for the dataset to be read in this process, which is always the case here, so 0 sets no limit.
        threads = REQUESTS_AT_ONCE if num_workers == "auto" or num_workers < 1 else num_workers

        lock = threading.Lock()

        def request(keys: list[bytes]) -> tuple[list[bytes], Array]:
            rows = self._request([texts[places[key][0]] for key in keys])
            with lock:
                widths.add(rows.shape[1])
                self._check_one(widths)
            stored.record(keys, rows)
            return keys, rows

        for keys, rows in _in_threads(request, batches, threads, self._stopped):
            yield _spread(positions, [places[key] for key in keys], rows)

    def _request(self, texts: list[str]) -> Array:
        """Return embeddings float32 [B, D], each of which is as if its text had been sent alone.

        A rejected request is split into smaller ones. A text is only cut if it is rejected when sent alone.
        """
        if len(texts) > self._most:
            parts = [texts[start : start + self._most] for start in range(0, len(texts), self._most)]
            return np.concatenate([self._request(part) for part in parts])
        answer = self._try(texts)
        if isinstance(answer, np.ndarray):
            return answer
        if len(texts) == 1:
            return self._cut(texts[0], answer)
        if isinstance(answer, _UnorderedError):
            self._most = 1
            logger.warning(
                "features: the server (see %s) does not say which embedding belongs to which text, so continuing with one text "
                "in each request",
                SERVER,
            )
            return self._request(texts)
        long = [len(text.encode()) > TOKENS_PER_INPUT for text in texts]
        if any(long) and not all(long):
            rest = self._request([text for text, is_long in zip(texts, long, strict=True) if not is_long])
            rows = np.empty((len(texts), rest.shape[1]), np.float32)
            rows[[not is_long for is_long in long]] = rest
            for place, is_long in enumerate(long):
                if is_long:
                    rows[place] = self._request([texts[place]])[0]
            return rows
        half, options = (len(texts) + 1) // 2, self._options
        rows = np.concatenate([self._request(texts[:half]), self._request(texts[half:])])
        if not any(long) and options is self._options:  # so the number of texts was too large
            self._most = min(self._most, half)
        return rows

    def _cut(self, text: str, refusal: Exception) -> Array:
        """Return the embedding of the longest accepted beginning of a text that is rejected when sent alone.

        A length of 8191 bytes is tried first, then 4096, 2048, 1024 and 512 as long as the server's message is about
        the length of the text. FeatureError if the server rejects the text at every length that is tried.
        """
        size = len(text.encode())
        for most in (TOKENS_PER_INPUT, 4096, 2048, 1024, 512):
            if most < size and (most == TOKENS_PER_INPUT or _SPEAKS_OF_LENGTH.search(_message(refusal))):
                answer = self._try([cut_bytes(text, most)])
                if isinstance(answer, np.ndarray):
                    logger.warning(
                        "features: the server refused a text of %d bytes, so it is cut to %d bytes", size, most
                    )
                    return answer
                refusal = answer
        raise FeatureError(
            f"{self._origin.model} refuses the text {text[:40]!r} ({size:,} bytes): {_message(refusal)}. Leave the row out, or "
            f"pass another model; the environment variable {SERVER} names the server"
        ) from None

    def _try(self, texts: list[str]) -> "Array | Exception":
        """Send one request and return its embeddings, or the error with which the server rejected it.

        FeatureError if the run was stopped, the server fails, or it rejects requests whatever their content.
        """
        import openai

        if self._stopped.is_set():
            raise FeatureError("the run was stopped")
        model, options = self._origin.model, self._options
        try:
            try:
                rows = self._embed(texts, options)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                # Some servers do not support the client's default encoding; one that has answered before does.
                about_encoding = len(texts) == 1 or _SPEAKS_OF_ENCODING.search(_message(error))
                if options is self._options and (options or self._answered or not about_encoding):
                    raise
                # Another thread may have set the options in the meantime.
                options = self._options or {"encoding_format": "float"}
                rows = self._embed(texts, options)
                self._options = options
            self._answered = True
            return rows
        except _UnorderedError as error:
            return error
        except openai.AuthenticationError as error:
            # The server's message repeats a part of the key, so it is not shown.
            raise FeatureError(f"{model}: the key in {KEY} is refused ({error.status_code}): set a valid key") from None
        except openai.APIStatusError as error:
            if error.status_code in _REFUSED:
                return error
            if error.status_code < 500 and error.status_code not in _PASSING:
                raise FeatureError(
                    f"{model} refuses a request ({error.status_code}): {_message(error)}. Pass another model, or check "
                    f"the server in {SERVER}"
                ) from None
            raise self._failed(error) from None
        except openai.APIError as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> FeatureError:
        return FeatureError(
            f"{self._origin.model} fails, after up to {self._origin.retries} further attempts ({type(error).__name__}: "
            f"{_message(error)}). The embeddings that have arrived are stored: start again later"
        )

    def _embed(self, texts: list[str], options: dict[str, Any]) -> Array:
        model = self._origin.model
        try:
            answer = self._client.embeddings.create(model=model, input=texts, **options)
            data = list(answer.data or ())
            order: list[Any] = [getattr(row, "index", None) for row in data]
            widths = {len(row.embedding or ()) for row in data}
            rows = (
                np.array([row.embedding for row in data], dtype=np.float32)
                if len(widths) == 1
                else np.empty((0, 0), np.float32)
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise FeatureError(
                f"{model} did not answer with embeddings ({error}): check the server in {SERVER}"
            ) from error
        if len(data) != len(texts) or len(widths) != 1 or 0 in widths:
            raise FeatureError(
                f"{model} answered {len(texts)} texts with {len(data)} embeddings of the widths {sorted(widths)}: try "
                "again, or pass another model"
            )
        # If such numbers were recorded, every later run would find them again.
        if not np.isfinite(rows).all():
            raise FeatureError(f"{model} answered with numbers that are NaN or infinite: {self.advice}")
        if len(texts) == 1:
            return rows
        if None in order or sorted(order) != list(range(len(texts))):
            raise _UnorderedError(f"it numbers {len(texts)} embeddings {order[:5]}")
        return rows[np.argsort(order)]

    def _check_one(self, widths: set[int]) -> None:
        """Raise a FeatureError unless all embeddings have one width; the model behind a name may have changed."""
        if len(widths) > 1:
            raise FeatureError(
                f"{self._origin.model} now gives embeddings of another width than before ({sorted(widths)}): name a fixed "
                "version of the model, or pass another cache_dir="
            )


def _in_threads(request: Any, batches: Sequence[Any], threads: int, stopped: threading.Event) -> Iterator[Any]:
    """Call `request(batch)` for every batch in several threads and yield the results as they arrive.

    After a failure or an interruption no further request is sent, and requests that were already sent have
    `GRACE_SECONDS` to finish and be recorded. The threads end with the process, however long a server makes them wait.
    The event `stopped` is cleared at the start and set at the end, so that requests can see that the run is over.
    """
    todo, taking = iter(batches), threading.Lock()
    stopped.clear()
    arrived: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with taking:
                batch = next(todo, None)
            if batch is None:
                return
            try:
                arrived.put((request(batch), None))
            except BaseException as error:
                arrived.put((None, error))
                return

    # Daemon threads are used because the process would wait for the threads of an executor before it ends.
    workers = [threading.Thread(target=work, name=f"embed-{n}", daemon=True) for n in range(min(threads, len(batches)))]
    for worker in workers:
        worker.start()
    try:
        for _ in batches:
            result, error = arrived.get()
            if error is not None:
                raise error
            yield result
    finally:
        stopped.set()
        ends = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.join(max(0.0, ends - time.monotonic()))


def split(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Split texts, given by their sizes in bytes, into consecutive batches of at most `most`, as lists of positions.

    A batch also has at most `BYTES_PER_REQUEST` bytes, unless it consists of one text that is larger.

    >>> split([200_000, 90_000, 10], 2)
    [[0], [1, 2]]
    """
    batches: list[list[int]] = []
    total = 0
    for position, size in enumerate(sizes):
        if not batches or len(batches[-1]) == most or total + size > BYTES_PER_REQUEST:
            batches.append([])
            total = 0
        batches[-1].append(position)
        total += size
    return batches


def cut_bytes(text: str, most: int) -> str:
    """Return the longest beginning of a text that has at most `most` bytes of UTF-8, without splitting a character."""
    data = text.encode()
    return text if len(data) <= most else data[:most].decode(errors="ignore")


def _key(text: str) -> bytes:
    """Return the key, 32 bytes, that the embedding of a text is recorded under."""
    data = text.encode()
    # Earlier releases could cut a long text because of other texts in its request, so long texts have other keys now.
    return hashlib.sha256(data if len(data) <= TOKENS_PER_INPUT else b"alone\0" + data).digest()


def _message(error: Exception) -> str:
    # Servers may repeat the key in their message, so it is removed.
    return str(getattr(error, "message", None) or error).replace(os.environ.get(KEY) or KEY, "...")


class _UnorderedError(Exception):
    """The server's answer does not say which embedding belongs to which text."""


def _spread(positions: Tensor, places: list[list[int]], rows: Array) -> Rows:
    counts = torch.tensor([len(some) for some in places])
    chosen = positions[[place for some in places for place in some]]
    return Rows(chosen, torch.from_numpy(rows).repeat_interleave(counts, dim=0))
