"""Webhooks: signed as the standard says, kept until they are delivered, never sent into a network of ours."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fakes.backends import DrawingBackend
from fakes.certificates import self_signed
from serving.http.answers import Invalid
from serving.http.job import Delivery
from serving.http.job_runner import WEBHOOKS_AT_ONCE, WEBHOOKS_OF_ONE
from serving.http.job_table import JobTable
from serving.http.jobs import JobRunner, JobStore
from serving.http.keyring import Keys
from serving.http.keys import Caller
from serving.http.webhooks import WAITS, Sender, Webhook, WebhookRefused, check_url, is_public, sign
from serving.images import png_bytes
from serving.schema import SweepRequest

STUDIO = Caller(name="studio", scopes=("edit", "read"))
SECONDS = 120.0
"""Whatever has to happen happens in these, also on a machine that is busy."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt that a receiver answers is given up because the machine is busy."""
    monkeypatch.setattr("serving.http.webhooks.SECONDS", SECONDS)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    keys = Keys.open(tmp_path)
    keys.add("studio", ["edit"])
    return keys


def delivery(url: str, attempts: int = 0) -> Delivery:
    return Delivery(id="msg_1", caller="studio", url=url, body='{"type":"job.succeeded"}', attempts=attempts)


class Receiver:
    """A real HTTP server that keeps what it hears, and answers as it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[bytes] = []
        self.port = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.heard.append((first, headers, await reader.readexactly(int(headers["content-length"]))))
        writer.write(self.answers.pop(0) if self.answers else b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        writer.close()

    @asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{self.port}/hook?a=1"
        finally:
            server.close()


# -- signatures --


def test_the_signature_is_the_standards_own_example() -> None:
    """From the specification of Standard Webhooks."""
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    signed = sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_what_arrives_can_be_verified(keys: Keys) -> None:
    async def body() -> None:
        receiver = Receiver()
        async with receiver.running() as url:
            assert await Sender(keys, loopback=True).send(delivery(url)) == ("delivered", None)
        first, headers, content = receiver.heard[0]
        assert first == "POST /hook?a=1 HTTP/1.1"
        key = keys.named("studio")
        assert key is not None
        secret = base64.b64decode(key.webhook_secret.removeprefix("whsec_"))
        said = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + content
        expected = base64.b64encode(hmac.new(secret, said, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        assert headers["host"] == f"127.0.0.1:{receiver.port}"

    asyncio.run(body())


# -- delivering --


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ("delivered", None)),
        (b"HTTP/1.1 500 No\r\n\r\n", ("failed", WAITS[0])),
        (b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1/\r\n\r\n", ("failed", WAITS[0])),
        (b"HTTP/1.1 410 Gone\r\n\r\n", ("gone", None)),
        (b"SSH-2.0-OpenSSH\r\n", ("failed", WAITS[0])),
        (b"HTTP/1.1 200" + b"x" * 100_000, ("failed", WAITS[0])),
        (b"", ("failed", WAITS[0])),
    ],
)
def test_answers(keys: Keys, answer: bytes, outcome: tuple[str, float | None]) -> None:
    async def body() -> None:
        receiver = Receiver()
        receiver.answers = [answer]
        async with receiver.running() as url:
            assert await Sender(keys, loopback=True).send(delivery(url)) == outcome
        assert len(receiver.heard) == 1, "nothing is followed"

    asyncio.run(body())


def test_attempts_end(keys: Keys) -> None:
    async def body() -> None:
        receiver = Receiver()
        async with receiver.running() as url:
            sender = Sender(keys, loopback=True)
            receiver.answers = [b"HTTP/1.1 500 No\r\n\r\n"] * 2
            assert await sender.send(delivery(url, len(WAITS) - 1)) == ("failed", WAITS[-1])
            assert await sender.send(delivery(url, len(WAITS))) == ("failed", None)

    asyncio.run(body())


def test_a_receiver_that_says_nothing_does_not_hold_us(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.http.webhooks.SECONDS", 0.2)

    async def body() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(5)

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        assert await Sender(keys, loopback=True).send(delivery(url)) == ("failed", WAITS[0])
        server.close()

    asyncio.run(body())


def test_a_revoked_key_sends_no_more(keys: Keys) -> None:
    async def body() -> None:
        receiver = Receiver()
        async with receiver.running() as url:
            keys.revoke("studio")
            assert await Sender(keys, loopback=True).send(delivery(url)) == ("refused", None)
        assert not receiver.heard

    asyncio.run(body())


def test_the_end_of_a_job_is_told_also_after_a_restart(keys: Keys, tmp_path: Path) -> None:
    from fakes.backends import EXPRESSIONS

    now, told = [1_800_000_000.0], []

    class Table(JobTable):
        def told(self, id: str, again: float | None) -> None:
            super().told(id, again)
            told.append(id)

    def store() -> JobStore:
        table = Table(f"sqlite:///{tmp_path / 'jobs.db'}", lambda: now[0])
        return JobStore(table, Sender(keys, loopback=True), clock=lambda: now[0])

    async def worked(jobs: JobStore, until: Callable[[], bool], tries: int = 6000) -> None:
        encode = lambda request, result: png_bytes(result.image, result.facts())  # noqa: E731
        runner = JobRunner(DrawingBackend(), jobs, encode=encode)
        runner.start()
        for _ in range(tries):
            await asyncio.sleep(0.02)
            if until():
                break
        await runner.close()

    async def body() -> None:
        from PIL import Image

        receiver = Receiver()
        receiver.answers = [b"HTTP/1.1 503 Later\r\n\r\n"]
        picture = png_bytes(Image.new("RGB", (64, 64)), {})
        request = SweepRequest.make(image=picture, rows=({EXPRESSIONS[0]: 1.0},), steps=1)
        async with receiver.running() as url:
            first = store()
            job = await first.accept(request, caller=STUDIO, webhook=Webhook(url=url))
            await worked(first, lambda: len(told) == 1)
            now[0] += WAITS[0] - 1
            await worked(store(), lambda: len(receiver.heard) > 1, 60)
            assert len(receiver.heard) == 1, "too early"
            now[0] += 2
            await worked(store(), lambda: len(told) == 2)
            now[0] += 3600
            await worked(store(), lambda: len(receiver.heard) > 2, 60)
        assert len(receiver.heard) == 2
        (_, one, body_one), (_, two, body_two) = receiver.heard
        assert one["webhook-id"] == two["webhook-id"]
        assert body_one == body_two
        said = json.loads(body_one)
        assert (said["type"], said["data"]["id"], said["data"]["status"]) == (
            "job.succeeded",
            job.id,
            "succeeded",
        )

    asyncio.run(body())


# -- what must not stop the others --


class Clock:
    """A clock that stands until somebody moves it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Told(JobTable):
    """A table that keeps what came of each attempt.

    Attributes:
        attempts: seconds until the next one, in order.
        broken: raised when the next delivery is asked for, once.
    """

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        super().__init__(f"sqlite:///{folder / 'jobs.db'}", clock)
        self.attempts: list[float | None] = []
        self.broken: Exception | None = None

    def due(self, seconds: float, *, but: Collection[str] = ()) -> Delivery | None:
        """See `JobTable.due`."""
        broken, self.broken = self.broken, None
        if broken is not None:
            raise broken
        return super().due(seconds, but=but)

    def told(self, id: str, again: float | None) -> None:
        """See `JobTable.told`."""
        super().told(id, again)
        self.attempts.append(again)


@asynccontextmanager
async def telling(store: JobStore) -> AsyncIterator[None]:
    """A runner that sends what the jobs of a store owe."""
    runner = JobRunner(DrawingBackend(), store, encode=lambda request, result: b"")
    runner.start()
    try:
        yield
    finally:
        await runner.close()


async def until(condition: Callable[[], bool]) -> None:
    """Waits until something holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def owe(store: JobStore, url: str, name: str = "studio") -> None:
    """A job of a key ends, and its webhook is due."""
    caller = Caller(name=name, scopes=("edit", "read"))
    request = SweepRequest.make(image=b"a picture", rows=({},))
    job = await store.accept(request, caller=caller, webhook=Webhook(url=url))
    await store.cancel(job.id, caller)


@pytest.mark.parametrize("content", [b"{", None], ids=["damaged", "missing"])
def test_what_falls_due_while_the_keys_cannot_be_read_is_delivered_later(
    keys: Keys, tmp_path: Path, content: bytes | None
) -> None:
    clock, file = Clock(), tmp_path / "serving" / "keys.json"
    table = Told(tmp_path, clock)

    async def body() -> None:
        receiver, store = Receiver(), JobStore(table, Sender(keys, loopback=True), clock=clock)
        good = file.read_bytes()
        async with receiver.running() as url:
            await owe(store, url)
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
            async with telling(store):
                await until(lambda: table.attempts == [WAITS[0]])
                assert not receiver.heard
                file.write_bytes(good)
                await owe(store, url)
                await until(lambda: len(receiver.heard) == 1)
                clock.now += WAITS[0]
                await until(lambda: len(receiver.heard) == 2)
                await until(lambda: table.attempts == [WAITS[0], None, None])

    asyncio.run(body())


def test_a_key_that_is_over_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    clock = Clock()
    keys = Keys(tmp_path / "serving" / "keys.json", clock)
    keys.add("studio", ["edit"], days=1)

    async def body() -> None:
        receiver = Receiver()
        async with receiver.running() as url:
            sender = Sender(keys, loopback=True, clock=clock)
            assert await sender.send(delivery(url)) == ("delivered", None)
            clock.now += 86400
            assert await sender.send(delivery(url)) == ("refused", None)
            nobody = Sender(Keys.open(tmp_path / "elsewhere"), loopback=True, clock=clock)
            assert await nobody.send(delivery(url)) == ("failed", WAITS[0])
            assert await nobody.send(delivery(url, len(WAITS))) == ("failed", None)
        assert len(receiver.heard) == 1

    asyncio.run(body())


def test_whatever_one_delivery_causes_the_others_are_sent(
    keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = Told(tmp_path, Clock())

    async def broken(host: str, port: int) -> Sequence[str]:
        raise LookupError("nobody thought of this")

    async def body() -> None:
        receiver = Receiver()
        store = JobStore(table, Sender(keys, loopback=True, resolve=broken))
        async with receiver.running() as url, telling(store):
            await owe(store, "https://hooks.example.com/")
            await until(lambda: table.attempts == [WAITS[0]])
            assert "nobody thought of this" in caplog.text
            store.sender = Sender(keys, loopback=True)
            await owe(store, url)
            await until(lambda: len(receiver.heard) == 1)

    asyncio.run(body())


def test_a_loop_that_dies_is_started_again(
    keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = Told(tmp_path, Clock())
    table.broken = ArithmeticError("a mistake of ours")

    async def body() -> None:
        receiver, store = Receiver(), JobStore(table, Sender(keys, loopback=True))
        async with receiver.running() as url, telling(store):
            await until(lambda: table.broken is None)
            await owe(store, url)
            await until(lambda: len(receiver.heard) == 1)
        assert "a mistake of ours" in caplog.text

    asyncio.run(body())


def test_names_that_hang_hold_up_nobody_else(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than asyncio has threads for everything else that it may not wait for itself."""
    over = threading.Event()

    def hang(*asked: object, **options: object) -> list[object]:
        over.wait(3 * SECONDS)
        raise OSError("no such name")

    async def body() -> None:
        sender = Sender(keys)
        sends = [asyncio.create_task(sender.send(delivery(f"https://h{n}.example.com/"))) for n in range(40)]
        await asyncio.sleep(0)
        try:
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "answered"), SECONDS) == "answered"
            assert not any(one.done() for one in sends)
        finally:
            over.set()
        assert {await one for one in sends} == {("failed", WAITS[0])}

    monkeypatch.setattr("serving.http.webhooks.SECONDS", 2 * SECONDS)
    monkeypatch.setattr("socket.getaddrinfo", hang)
    asyncio.run(body())


def test_receivers_that_never_answer_hold_up_their_own_key_alone(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.http.webhooks.SECONDS", 10 * SECONDS)
    keys.add("tarpits", ["edit"])
    clock, knocked = Clock(), 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal knocked
        knocked += 1
        await reader.read()

    async def body() -> None:
        table, receiver = Told(tmp_path, clock), Receiver()
        store = JobStore(table, Sender(keys, loopback=True), clock=clock)
        tarpit = await asyncio.start_server(silent, "127.0.0.1", 0)
        for _ in range(2 * WEBHOOKS_AT_ONCE):
            await owe(store, f"http://127.0.0.1:{tarpit.sockets[0].getsockname()[1]}/", "tarpits")
        clock.now += 1
        async with receiver.running() as url, telling(store):
            await until(lambda: knocked == WEBHOOKS_OF_ONE)
            for number in range(3):
                await owe(store, url)
                await until(lambda number=number: len(receiver.heard) == number + 1)  # type: ignore[misc]
            assert knocked == WEBHOOKS_OF_ONE
        tarpit.close()

    asyncio.run(body())


# -- where they may go --

PRIVATE = [
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "0.0.0.0", "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1",
    "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "64:ff9b::a00:1", "2002:7f00:1::", "2002:0a00:0001::1", "2001:0:7f00:1::", "fec0::1", "::127.0.0.1",
    "not an address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/", "ftp://example.com/", "file:///etc/passwd", "https://", "https:///x",
        "example.com",
        "https://user:word@example.com/", "https://user@example.com/", "https://127.0.0.1/", "https://[::1]/",
        "https://localhost/", "https://localhost./", "https://169.254.169.254/latest/meta-data",
        "https://[::ffff:10.0.0.1]/", "https://10.1.2.3:8443/", "https://example.com:0/",
        "https://example.com:99999/", "https://example.com/a b", "https://example.com/\r\nx: y",
        "https://example.com/\u00e4", "https://exa\\mple.com/", "https://example.com/" + "a" * 2000,
        "https://[::1", "javascript:alert(1)", "", "https://example.com\\@10.0.0.1/",
    ],
)  # fmt: skip
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(WebhookRefused):
        check_url(url)


def test_urls_that_are_not() -> None:
    target = check_url("https://hooks.example.com/path?q=1#part")
    assert (target.authority, target.path, target.tls) == ("hooks.example.com", "/path?q=1", True)
    assert check_url("https://example.com:8443").authority == "example.com:8443"
    assert check_url("http://127.0.0.1:80/", loopback=True).authority == "127.0.0.1"
    with pytest.raises(WebhookRefused):
        check_url("http://example.com/", loopback=True)
    with pytest.raises(WebhookRefused):
        check_url("https://10.0.0.1/", loopback=True)


def names(*answers: Sequence[str]) -> tuple[Callable[..., object], list[str]]:
    """A name service that gives these answers in turn, the last one for ever."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return resolve, asked


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["10.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::1"], []])
def test_a_public_name_with_a_private_address_is_refused(keys: Keys, addresses: list[str]) -> None:
    async def body() -> None:
        resolve, asked = names(addresses)
        sender = Sender(keys, resolve=resolve)  # type: ignore[arg-type]
        assert await sender.send(delivery("https://hooks.example.com/")) == ("refused", None)
        assert asked == ["hooks.example.com"]

    asyncio.run(body())


def test_the_connection_goes_to_the_checked_address_and_the_certificate_is_the_names(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name means another address by the time of the connection: it is not asked again."""

    async def body() -> None:
        server, client = self_signed(tmp_path, "hooks.example.com")
        receiver = Receiver()
        async with receiver.running(server):
            resolve, asked = names(["127.0.0.1"], ["10.0.0.1"])
            # the only public address that a test has is the loopback's
            monkeypatch.setattr("serving.http.webhooks.is_public", lambda address: address == "127.0.0.1")
            sender = Sender(keys, resolve=resolve, trust=client)  # type: ignore[arg-type]
            url = f"https://hooks.example.com:{receiver.port}/"
            assert await sender.send(delivery(url)) == ("delivered", None)
            assert asked == ["hooks.example.com"]
            resolve, _ = names(["127.0.0.1"])
            other = Sender(keys, resolve=resolve, trust=client)  # type: ignore[arg-type]
            assert (await other.send(delivery(f"https://other.example.com:{receiver.port}/")))[0] == "failed"
            stranger = Sender(keys, resolve=resolve)  # type: ignore[arg-type]
            assert (await stranger.send(delivery(url)))[0] == "failed", (
                "the system does not know this certificate"
            )

    asyncio.run(body())


def test_nobody_without_a_secret_asks_for_webhooks(keys: Keys) -> None:
    sender = Sender(keys)
    sender.check(Webhook(url="https://example.com/"), "studio")
    sender.check(Webhook(url="https://example.com/", secret="studio"), "studio")
    with pytest.raises(Invalid, match="signed"):
        sender.check(Webhook(url="https://example.com/"), "local")
    with pytest.raises(Invalid, match="secret"):
        sender.check(Webhook(url="https://example.com/", secret="other"), "studio")
    with pytest.raises(WebhookRefused):
        sender.check(Webhook(url="https://127.0.0.1/"), "studio")
