"""The process: uvicorn with limits on connections and headers, an orderly end, and an exit when a model has died."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from ..errors import InputError, ShapleyCamError
from ..model.zoo import DEFAULT_MODEL, load_classifier, pick_device
from .app import create_app
from .config import Limits, ModelConfig, ServerConfig
from .logs import log
from .onnx_runtime import OnnxRuntime
from .program_runtime import WAYS, ProgramRuntime
from .runtime import ExplainerRuntime, Runtime
from .server import Server

#: Exit statuses of the command besides 0.
UNFINISHED, DIED = 1, 70  # sysexits.h: EX_SOFTWARE
_MOST_HEADERS = 65_536  # bytes, and what one read from the connection has beyond
_PIPELINED = 8  # requests behind one that is not answered yet
#: Seconds that a connection may wait for its client before it is closed for another.
_GRACE = 1.0


def load_runtime(told: ModelConfig) -> Runtime:
    """What a model's configuration describes.

    Raises:
        InputError: an unknown runtime, device or model, or a file that cannot be read.
    """
    device = pick_device(told.device)
    if told.runtime == "explainer":
        if told.file is not None:
            raise InputError("file is for runtime 'onnx'; the explainer's weights are weights=.")
        options: dict[str, Any] = {} if told.nodes is None else {"nodes": told.nodes}
        return ExplainerRuntime(
            load_classifier(told.model or DEFAULT_MODEL, weights=told.weights, classes=told.classes, device=device),
            layer=told.layer,
            methods=told.methods,
            utilities=told.utilities,
            engines=told.engines,
            baseline=told.baseline,
            backend=told.backend,
            check=told.check,
            **options,
        )
    if told.runtime in WAYS:
        if told.check is not None or told.file is not None:
            raise InputError("check and file are not for programs: check= compares the operators of the explainer.")
        loaded = load_classifier(told.model or DEFAULT_MODEL, weights=told.weights, classes=told.classes, device=device)
        first = {"method": told.methods, "utility": told.utilities, "engine": told.engines}
        names: dict[str, Any] = {name: values[0] for name, values in first.items() if values}
        if told.nodes is not None:
            names["nodes"] = told.nodes
        return ProgramRuntime(loaded, told.runtime, layer=told.layer, baseline=told.baseline, **names)
    if told.runtime in ("onnx", "openvino"):
        if told.file is None:
            raise InputError(f"runtime {told.runtime!r} needs file: the program that shapleycam's exporter wrote.")
        how: dict[str, Any] = {"engine": "openvino" if told.runtime == "openvino" else "onnxruntime"}
        if told.check is not None:
            raise InputError("check is not for files: it compares the operators of the explainer.")
        how["providers"] = ["CPUExecutionProvider"] if device.type == "cpu" else None
        if told.model is None:
            return OnnxRuntime(told.file, **how)
        classifier = load_classifier(told.model, weights=told.weights, classes=told.classes)
        return OnnxRuntime(told.file, classifier.preprocess, classifier.classes, **how)
    known = ("explainer", *WAYS, "onnx", "openvino")
    raise InputError(f"Unknown runtime {told.runtime!r}: expected one of {', '.join(known)}.")


def serve(config: ServerConfig) -> int:
    """Load the models, serve until SIGTERM or SIGINT, and return the exit status.

    On the first signal the server is not ready any more; ``pre_stop`` seconds later it stops listening, answers what it has
    admitted, and returns 0, or 1 if that took longer than ``grace``. A second signal skips the wait. When a model's thread
    dies, the status is 70, so that whoever started the process starts another.

    Raises:
        ShapleyCamError: a model cannot be loaded, the address cannot be had, or uvicorn is another than is needed.
    """
    asyncio.run(check_uvicorn())
    ended = _End(config)
    server = Server(config, {name: load_runtime(told) for name, told in config.models.items()}, on_death=ended.died)
    app = create_app(server, manage=False)
    gc.collect()
    gc.freeze()  # or every collection, as while a large JSON is read, goes through all of torch and holds all threads
    ended.server, ended.uvicorn = server, _Uvicorn(settings(app, config), ended)
    server.start()
    try:
        ended.uvicorn.run()
    except SystemExit as error:  # uvicorn's, when the address cannot be had
        raise InputError(f"The server cannot listen on {config.host}:{config.port}.") from error
    finally:
        finished = server.stop(ended.left())
    if isinstance(ended.death, ShapleyCamError):  # a model could not be made ready: starting again would not help
        raise ended.death
    status = DIED if ended.death else 0 if finished else UNFINISHED
    log("stopped", status=status)
    return status


def settings(app: Any, config: ServerConfig) -> uvicorn.Config:
    """Uvicorn's, for the application and the configuration's address and limits."""
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=type("Protocol", (BoundedProtocol,), {"limits": config.limits}),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(config.grace)),
        backlog=1024,
    )


async def check_uvicorn() -> None:
    """Have two requests answered by :class:`BoundedProtocol`, which is made of more than uvicorn promises to keep.

    Raises:
        InputError: they are not.
    """

    async def app(_: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    client, server = socket.socketpair()
    protocol = BoundedProtocol(settings(app, ServerConfig()), ServerState(), {})
    reader, writer = await asyncio.open_connection(sock=client)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, server)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    try:
        got = await asyncio.wait_for(reader.read(), 30)
    except TimeoutError:
        got = b""
    writer.close()
    if got.count(b"HTTP/1.1 200 OK") != 2:
        raise InputError(f"This server does not work with uvicorn {uvicorn.__version__}: pip install 'shapleycam[serve]'.")


class _End:
    """What ends the process, in its order."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.server: Server | None = None
        self.uvicorn: uvicorn.Server | None = None
        self.death: BaseException | None = None
        self._timer: threading.Timer | None = None
        self._until: float | None = None

    def died(self, error: BaseException) -> None:
        """A model's thread has: nothing can be answered any more."""
        self.death = error
        self._stop()

    def signalled(self, number: int) -> None:
        """In the main thread: not ready from now on; the second time, at once."""
        assert self.server is not None
        again, self.server.draining = self.server.draining, True
        log("signal", signal=signal.Signals(number).name, pre_stop=0 if again else self._config.pre_stop)
        if again or self._config.pre_stop == 0:
            self._stop()
        else:
            self._timer = threading.Timer(self._config.pre_stop, self._stop)
            self._timer.daemon = True
            self._timer.start()

    def left(self) -> float:
        """Seconds of the grace time that are left."""
        return self._config.grace if self._until is None else max(0.0, self._until - time.monotonic())

    def _stop(self) -> None:
        self._until = time.monotonic() + self._config.grace
        if self.uvicorn is not None:
            self.uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Uvicorn, whose process does not end by the signal that it was sent but by its own status."""

    def __init__(self, config: uvicorn.Config, end: _End) -> None:
        super().__init__(config)
        self._end = end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn, which would raise the signal again in the end."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self._end.signalled(sig)

    async def startup(self, sockets: Any = None) -> None:
        """Log where it listens, as a port of 0 is any."""
        await super().startup(sockets)
        for one in self.servers:
            for sock in one.sockets:
                host, port = sock.getsockname()[:2]
                log("listening", host=host, port=port)


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 of which a client cannot have more than its share.

    A request's headers, also of one that follows another before its answer, arrive within ``header_time`` seconds and 64 KiB,
    and so large may trailers be; uvicorn itself waits for ever, and takes all. Of more connections than allowed those that have
    waited longest for their clients, for a second at least, are closed, where uvicorn's own limit would refuse requests, those
    of the probes too; of more than twice as many, younger ones also, whose requests may be on their way. While there are as
    many as allowed, an answer is a connection's last.
    """

    limits = Limits()
    _late: asyncio.TimerHandle | None = None  # runs while headers are expected
    _early = 0  # bytes since the last headers or the last piece of a body
    _since = 0.0  # when the connection was last of use; not by uvloop's clock, which stands still within a turn
    _cycles: tuple[RequestResponseCycle, ...] = ()  # not answered; uvicorn forgets the one that runs when another follows it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`."""
        transport.set_write_buffer_limits(0)  # what waits to be sent waits in the answer, whose time is limited
        super().connection_made(transport)
        self._since = time.monotonic()
        self._expect()
        extra = len(self.connections) - self.limits.connections
        if extra > 0:
            waiting = [one for one in self.connections if isinstance(one, BoundedProtocol) and one._waits()]
            for n, one in enumerate(sorted(waiting, key=lambda one: one._since)[:extra]):
                if n < extra - self.limits.connections or one._since <= self._since - _GRACE:
                    one._drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._arrived()
        super().connection_lost(exc)
        self._disconnect()

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        if self._late is None and self._idle():  # uvicorn's own timer between two requests ends with the first byte
            self._expect()
        self._early += len(data)
        super().data_received(data)
        if self._early > _MOST_HEADERS:
            self._drop()

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        if self._late is None:
            self._expect()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._arrived()
        self._since = time.monotonic()
        self.scope["shapleycam.abort"] = self._drop  # type: ignore[typeddict-unknown-key]
        if len(self.pipeline) >= _PIPELINED:
            self._drop()
        if self.transport.is_closing():
            return
        super().on_headers_complete()
        self._cycles = (*(one for one in self._cycles if not one.response_complete), self.cycle)
        if len(self.connections) >= self.limits.connections:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._early = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """See uvicorn."""
        self._since = time.monotonic()
        super().on_response_complete()

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _waits(self) -> bool:
        """For its client: nothing of it is being answered."""
        return self._idle() or self.cycle.more_body

    def _expect(self) -> None:
        self._early = 0
        self._late = self.loop.call_later(self.limits.header_time, self._drop)

    def _arrived(self) -> None:
        self._early = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _drop(self) -> None:
        self._arrived()
        self.transport.abort()
        self._disconnect()  # at once, or what ends now is an error to uvicorn

    def _disconnect(self) -> None:
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
