"""The endpoints: who asks, what for, and the answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, cast

import msgspec

from gateway.http import (
    Exchange,
    HttpSettings,
    encode_headers,
    header_safe,
    read_body_untrusted,
    send_error,
    send_whole,
)
from gateway.keys import KeyRing
from gateway.metrics import CONTENT_TYPE, GatewayMetrics
from gateway.openai.answers import StreamSink, WholeSink
from gateway.openai.errors import ApiError, error_of, retry_headers
from gateway.openai.plan import plan_chat, plan_completion
from gateway.openai.render import CHAT_FORMAT, TEXT_FORMAT, Answer
from gateway.openai.requests import decode_chat_untrusted, decode_completion_untrusted
from gateway.openai.runner import Runner, placement_headers, usage_of
from gateway.rate_limit import RateLimiter, limit_headers
from gateway.service import Failed, InferenceService, ModelInfo
from protocol.instants import MILLISECOND_NS

#: Models named in a 404; the whole list is at /v1/models.
MAX_MODELS_SHOWN: Final = 20


class Endpoints:
    """All handlers, over one service."""

    def __init__(
        self,
        service: InferenceService,
        *,
        keys: KeyRing,
        settings: HttpSettings,
        metrics: GatewayMetrics,
        island_count: Callable[[], int] | None,
    ) -> None:
        self._service = service
        self._keys = keys
        self._settings = settings
        self._metrics = metrics
        self._island_count = island_count
        self._limiter = RateLimiter()

    # --- completions ----------------------------------------------------------------------------

    async def chat_completions(self, exchange: Exchange) -> None:
        arrived_ns = time.monotonic_ns()
        limits = self._admit(exchange)
        body = await self._body(exchange)
        if body is None:
            return
        request = decode_chat_untrusted(body)
        today = datetime.now(UTC).date().isoformat()
        plan = plan_chat(request, self._model(request.model), seed=_fresh_seed(), date=today)
        answer = Answer(plan, CHAT_FORMAT, created_unix_s=int(time.time()))
        await self._answer(exchange, answer, arrived_ns, limits)

    async def completions(self, exchange: Exchange) -> None:
        arrived_ns = time.monotonic_ns()
        limits = self._admit(exchange)
        body = await self._body(exchange)
        if body is None:
            return
        request = decode_completion_untrusted(body)
        plan = plan_completion(request, self._model(request.model), seed=_fresh_seed())
        answer = Answer(plan, TEXT_FORMAT, created_unix_s=int(time.time()))
        await self._answer(exchange, answer, arrived_ns, limits)

    async def _answer(
        self, exchange: Exchange, answer: Answer, arrived_ns: int, limits: tuple[tuple[str, str], ...]
    ) -> None:
        plan = answer.plan
        runner = Runner(self._service, plan, self._metrics, arrived_ns=arrived_ns)
        if plan.stream:
            stream = StreamSink(
                exchange.send, answer, runner.runs, keep_alive_s=self._settings.keep_alive_s, headers=limits
            )
            outcome = await runner.run(stream, exchange.receive)
            if stream.started:
                return
        else:
            whole = WholeSink(answer)
            outcome = await runner.run(whole, exchange.receive)
            if outcome == "completed":
                headers = encode_headers([*placement_headers(runner.runs), *limits])
                body = answer.whole(whole.finished, usage_of(plan, runner.runs))
                await send_whole(exchange.send, 200, body, headers=headers)
        if isinstance(outcome, Failed):
            error = error_of(outcome, prompt_param=plan.prompt_param)
            await send_error(exchange, error, headers=encode_headers(limits))

    # --- the rest -------------------------------------------------------------------------------

    async def models(self, exchange: Exchange) -> None:
        self._authenticate(exchange)
        listed = [_model_object(model) for model in self._service.models()]
        await send_whole(exchange.send, 200, msgspec.json.encode({"object": "list", "data": listed}))

    async def model(self, exchange: Exchange) -> None:
        self._authenticate(exchange)
        path_params = cast("dict[str, str]", exchange.scope["path_params"])
        found = self._model(path_params["model"])
        await send_whole(exchange.send, 200, msgspec.json.encode(_model_object(found)))

    async def health(self, exchange: Exchange) -> None:
        """200 as long as the gateway lives; `status` says whether it could answer a request."""
        models = self._service.models()
        ready = any(model.ready for model in models)
        body = {
            "status": "ok" if ready else "no-islands",
            "version": self._settings.version,
            "islands": self._islands(models),
            "models": [{"id": m.id, "islands": m.islands, "ready": m.ready} for m in models],
        }
        await send_whole(
            exchange.send, 200, msgspec.json.encode(body), headers=[(b"cache-control", b"no-store")]
        )

    async def metrics(self, exchange: Exchange) -> None:
        if self._settings.metrics_need_key:
            self._authenticate(exchange)
        await send_whole(exchange.send, 200, self._metrics.render(), content_type=CONTENT_TYPE)

    # --- who and what ---------------------------------------------------------------------------

    def _islands(self, models: tuple[ModelInfo, ...]) -> int:
        if self._island_count is not None:
            return self._island_count()
        return max((model.islands for model in models), default=0)

    def _authenticate(self, exchange: Exchange) -> tuple[str, int]:
        """(consumer for the rate limiter, requests a minute). Raises ApiError (401)."""
        authorization = exchange.header(b"authorization")
        key = self._keys.identify_untrusted(authorization)
        if key is not None:
            limit = key.requests_per_minute
            return f"key:{key.name}", self._settings.requests_per_minute if limit is None else limit
        if self._keys.open_to_all:
            client = cast("tuple[str, int] | None", exchange.scope.get("client"))
            return f"address:{client[0] if client else ''}", self._settings.requests_per_minute
        if authorization is None:
            message = "No API key was given. Send it as a header: 'Authorization: Bearer YOUR_KEY'."
        else:
            message = "The API key is not one of this gateway's."
        raise ApiError(401, message, code="invalid_api_key", headers=(("www-authenticate", "Bearer"),))

    def _admit(self, exchange: Exchange) -> tuple[tuple[str, str], ...]:
        """Key and rate limit, before the body is read. Returns the headers that tell what is left."""
        consumer, limit = self._authenticate(exchange)
        if limit == 0:
            return ()
        allowance = self._limiter.take(consumer, limit, time.monotonic_ns())
        headers = limit_headers(allowance)
        if allowance.wait_ns:
            wait_ms = -(-allowance.wait_ns // MILLISECOND_NS)
            raise ApiError(
                429,
                f"Rate limit reached: {limit} requests a minute. Try again in {wait_ms / 1000:.3f} s.",
                kind="requests",
                code="rate_limit_exceeded",
                headers=(*retry_headers(wait_ms), *headers),
            )
        return headers

    async def _body(self, exchange: Exchange) -> bytes | None:
        return await read_body_untrusted(
            exchange, limit=self._settings.max_body_bytes, timeout_s=self._settings.body_timeout_s
        )

    def _model(self, name: str) -> ModelInfo:
        found = self._service.model(name)
        if found is not None:
            return found
        known = [model.id for model in self._service.models()]
        shown = ", ".join(known[:MAX_MODELS_SHOWN]) or "none at the moment"
        more = f", and {len(known) - MAX_MODELS_SHOWN} more" if len(known) > MAX_MODELS_SHOWN else ""
        raise ApiError(
            404,
            f"The model '{header_safe(name)[:128]}' does not exist here. There is: {shown}{more}.",
            param="model",
            code="model_not_found",
        )


def _fresh_seed() -> int:
    return secrets.randbits(53)


def _model_object(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.first_seen_unix_s,
        "owned_by": model.publisher or "archipelag",
        "archipelag": {
            "digest": model.digest,
            "version": model.version,
            "runtime": model.runtime,
            "context_length": model.context_length,
            "islands": model.islands,
            "ready": model.ready,
            "decode_tps": round(model.decode_tps, 2),
        },
    }
