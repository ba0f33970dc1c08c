"""The FastAPI application of the gateway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from gateway.http import Boundary, Endpoint, HttpSettings, not_found
from gateway.keys import KeyRing
from gateway.metrics import GatewayMetrics
from gateway.openai.endpoints import Endpoints
from gateway.service import InferenceService

#: OpenAI's prefix, and the one that the platform's own pages use.
PREFIXES: Final = ("/v1", "/api/v1")


def create_app(
    service: InferenceService,
    *,
    keys: KeyRing,
    settings: HttpSettings | None = None,
    metrics: GatewayMetrics | None = None,
    island_count: Callable[[], int] | None = None,
) -> FastAPI:
    """The OpenAI-compatible API over this service.

    `island_count`: Islands known now, for /health; without it the best-served model's count is shown. The
    interactive documentation is off: its pages load scripts from elsewhere. docs/api.md describes the API.
    """
    settings = settings or HttpSettings()
    metrics = metrics or GatewayMetrics(service.models)
    ends = Endpoints(service, keys=keys, settings=settings, metrics=metrics, island_count=island_count)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    names: dict[str, str] = {}
    handlers = (
        ("/chat/completions", "POST", ends.chat_completions),
        ("/completions", "POST", ends.completions),
        ("/models", "GET", ends.models),
        ("/models/{model:path}", "GET", ends.model),
        ("/health", "GET", ends.health),
        ("/metrics", "GET", ends.metrics),
    )
    for path, method, handler in handlers:
        rooted = ("",) if path in {"/health", "/metrics"} else ()
        for prefix in (*PREFIXES, *rooted):
            app.router.routes.append(Route(prefix + path, Endpoint(handler), methods=[method]))
            names[prefix + path] = f"/v1{path}"
    app.add_exception_handler(HTTPException, not_found)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "x-archipelag-island"],
        )
    app.add_middleware(Boundary, metrics=metrics, routes=names)
    return app
