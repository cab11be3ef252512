"""What happens to adapters, as Prefect events that automations react to.

An event is news and no proof: whoever can reach Prefect can make one up. What reacts to it verifies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal


def tell(what: Literal["promoted", "rejected"], name: str, payload: Mapping[str, Any]) -> None:
    """Emit ``adapter.<what>`` about the resource ``adapter.<name>``; nobody waits for it.

    Args:
        what: what happened.
        name: of the adapter.
        payload: JSON values about it.
    """
    from prefect.events import emit_event

    resource = {"prefect.resource.id": f"adapter.{name}", "prefect.resource.name": name}
    emit_event(f"adapter.{what}", resource=resource, payload=dict(payload))
