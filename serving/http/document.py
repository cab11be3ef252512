"""The OpenAPI document of the service, and what it says about an address."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.routing import compile_path

from serving.http.bodies import EditBody

ABOUT = """Edits of portraits by verified LoRA adapters, at continuous intensities of expressions.

Every answer of an edit names the adapter that made it, its version and the digest of its signed manifest, in
the headers `Adapter-Name`, `Adapter-Version` and `Adapter-Digest`. Errors are JSON in OpenAI's shape plus
`mend`, which says what to do."""


def document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document, with the schemas of bodies that routes read themselves."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schema = EditBody.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(schema.pop("$defs", {}))
        schemas["EditBody"] = schema
        made["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "An API key, afk_…"},
            "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        }
        made["security"] = [{"key": []}, {"header": []}, {}]
        app.openapi_schema = made
    return app.openapi_schema


def allowed(request: Request) -> str:
    """Return all methods of an address: the framework names only those of the first route that fits."""
    paths: Mapping[str, Mapping[str, Any]] = request.app.openapi()["paths"]
    methods = {
        method.upper()
        for template, operations in paths.items()
        if compile_path(template)[0].match(request.url.path)
        for method in operations
    }
    return ", ".join(sorted(methods))
