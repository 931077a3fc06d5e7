"""OpenAI's embeddings API: parallel requests, what is paid for is recorded at once. Opens disk and network.

The official client waits and repeats after 408, 409, 429, 5xx, timeouts and cut connections: as long as the server's
`Retry-After` says, else exponentially longer with jitter.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from dq_lightning.config import Precision, TextConfig
from dq_lightning.describe import digest_text
from dq_lightning.errors import FeatureError
from dq_lightning.features.collect import Rows
from dq_lightning.records import DigestMemory
from dq_lightning.resuming import Paid

logger = logging.getLogger("dq_lightning")
PREFIX = "openai:"
Array = NDArray[np.float32]
KEY = "OPENAI_API_KEY"
SERVER = "OPENAI_BASE_URL"
MAX_RETRIES = 10
TIMEOUT_SECONDS = 60.0
REQUESTS_AT_ONCE = 8
# bounds of the API: inputs a request, and tokens of an input and of a request; a token is at least one byte
MOST_INPUTS, TOKENS_PER_INPUT, BYTES_PER_REQUEST = 2048, 8191, 280_000


@dataclass(frozen=True)
class OpenAIOrigin:
    """A model behind the API; its name is its identity, with the server's address where that is another one.

    Attributes:
        model: such as `text-embedding-3-small`.
        retries: attempts beyond the first.
        timeout: of one request, in seconds.
    """

    model: str
    retries: int = MAX_RETRIES
    timeout: float = TIMEOUT_SECONDS

    def identity(self, memory: DigestMemory) -> str | None:
        return digest_text("openai", self.model, os.environ.get(SERVER, ""))

    def resolve(self, memory: DigestMemory) -> Self:
        return self

    def load(self, device: str, precision: Precision) -> "OpenAIRows":
        return OpenAIRows(self)

    def client(self) -> Any:
        """The official client; it reads key and address from the environment.

        Raises:
            FeatureError: the package or the key is missing.
        """
        try:
            import openai
        except ImportError as error:
            raise FeatureError(
                f'encoder="{PREFIX}{self.model}" needs the package openai: pip install "dq-lightning[openai]"'
            ) from error
        if not os.environ.get(KEY):
            raise FeatureError(
                f'encoder="{PREFIX}{self.model}" needs an API key in the environment variable {KEY}; it is read from nowhere '
                "else and never stored"
            )
        return openai.OpenAI(max_retries=self.retries, timeout=self.timeout)


def openai_origin(name: str, settings: TextConfig) -> OpenAIOrigin:
    """The origin of `"openai:MODEL"`.

    Raises:
        FeatureError: the model's name is missing, or a setting is given that the API does not have.
    """
    model = name.removeprefix(PREFIX)
    if not model:
        raise FeatureError(f'{name!r} names no model: pass for instance "{PREFIX}text-embedding-3-small"')
    for setting in ("pooling", "max_length"):
        if getattr(settings, setting) != getattr(TextConfig(), setting):
            raise FeatureError(
                f"config.text.{setting} does not go with {name!r}: pooling and length are the server's own"
            )
    return OpenAIOrigin(model)


class OpenAIRows:
    """Embeddings of all texts of a source; see `encoders.RowEncoder`."""

    num_classes: None = None
    advice = "The server gave them: try again, or pass another model"

    def __init__(self, origin: OpenAIOrigin) -> None:
        self._origin = origin
        self._client = origin.client()

    def rows(self, source: Any, batch_size: int, num_workers: int | Literal["auto"], paid: Paid) -> Iterator[Rows]:
        """Embeddings of every sample, batches as they arrive; equal texts are sent once.

        Every batch is recorded in `paid` before it is used, so an interrupted run goes on where it was.

        Raises:
            FeatureError: the server refuses, or goes on failing.
        """
        # the API refuses an empty input
        texts = [text if text.strip() else " " for text in source.texts(range(len(source)))]
        places: dict[bytes, list[int]] = {}
        for position, text in enumerate(texts):
            places.setdefault(hashlib.sha256(text.encode(errors="surrogatepass")).digest(), []).append(position)
        name = digest_text(self._origin.model, os.environ.get(SERVER, ""))[:32]
        had = paid.of(f"openai-{name}")
        known = [key for key in places if key in had]
        waiting = [key for key in places if key not in had]
        widths = {len(had[key]) for key in known}
        for start in range(0, len(known) if len(widths) == 1 else 0, MOST_INPUTS):
            part = known[start : start + MOST_INPUTS]
            yield _spread([places[key] for key in part], np.stack([had[key] for key in part]))
        self._check_one(widths)
        sizes = [len(texts[places[key][0]].encode(errors="surrogatepass")) for key in waiting]
        batches = [[waiting[i] for i in batch] for batch in split(sizes, min(batch_size, MOST_INPUTS))]
        threads = REQUESTS_AT_ONCE if num_workers == "auto" else max(1, num_workers)

        lock = threading.Lock()

        def request(keys: list[bytes]) -> tuple[list[bytes], Array]:
            rows = self._request([texts[places[key][0]] for key in keys])
            with lock:
                widths.add(rows.shape[1])
                self._check_one(widths)
            had.record(keys, rows)
            return keys, rows

        for keys, rows in in_threads(request, batches, threads):
            yield _spread([places[key] for key in keys], rows)

    def _request(self, texts: list[str]) -> Array:
        import openai

        try:
            return self._embed(texts)
        except openai.BadRequestError as error:
            shorter = [cut_bytes(text, TOKENS_PER_INPUT) for text in texts]
            if shorter == texts:
                raise FeatureError(f"{self._origin.model} refuses a request: {error.message}") from None
            logger.warning(
                "features: a request with long texts was refused; they are cut to %d bytes", TOKENS_PER_INPUT
            )
        except openai.AuthenticationError as error:
            # the server's message repeats a part of the key
            raise FeatureError(f"{self._origin.model}: the key in {KEY} is refused ({error.status_code})") from None
        except openai.APIError as error:
            raise FeatureError(
                f"{self._origin.model} fails, after up to {self._origin.retries} further attempts ({type(error).__name__}: "
                f"{error.message}). What has arrived is kept: start again later"
            ) from None
        return self._request(shorter)

    def _embed(self, texts: list[str]) -> Array:
        answer = self._client.embeddings.create(model=self._origin.model, input=texts)
        data = sorted(answer.data, key=lambda row: row.index)
        widths = {len(row.embedding) for row in data}
        if [row.index for row in data] != list(range(len(texts))) or len(widths) != 1 or 0 in widths:
            raise FeatureError(
                f"{self._origin.model} answered {len(texts)} texts with {len(data)} embeddings of the widths {sorted(widths)}"
            )
        rows = np.array([row.embedding for row in data], dtype=np.float32)
        # recorded, they would be found again by every later run
        if not np.isfinite(rows).all():
            raise FeatureError(f"{self._origin.model} answered with numbers that are NaN or infinite: {self.advice}")
        return rows

    def _check_one(self, widths: set[int]) -> None:
        """The server may have changed the model behind a name."""
        if len(widths) > 1:
            raise FeatureError(
                f"{self._origin.model} now gives embeddings of another width than before ({sorted(widths)}): name a version of "
                "it, or pass another cache_dir="
            )


def in_threads(request: Any, batches: Sequence[Any], threads: int) -> Iterator[Any]:
    """Results of `request(batch)` as they arrive; after a failure no further request is sent, those under way are awaited."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="embed")
    todo = iter(batches)
    running: set[Future[Any]] = set()
    try:
        while True:
            while len(running) < 2 * threads and (batch := next(todo, None)) is not None:
                running.add(pool.submit(request, batch))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def split(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Positions in batches of at most `most`, and of at most `BYTES_PER_REQUEST` unless one alone is larger."""
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
    """The text's beginning, at most so many bytes of UTF-8, no character cut in two; the text itself if it fits."""
    data = text.encode(errors="surrogatepass")
    return text if len(data) <= most else data[:most].decode(errors="ignore")


def _spread(places: list[list[int]], rows: Array) -> Rows:
    counts = torch.tensor([len(some) for some in places])
    positions = torch.tensor([position for some in places for position in some])
    return Rows(positions, torch.from_numpy(rows).repeat_interleave(counts, dim=0))
