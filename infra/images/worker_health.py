"""Whether Prefect's server hears the worker of this container: exit status 0 if so.

The worker tells the server that it lives every 15 seconds; the server calls it offline when it falls silent.
"""

from __future__ import annotations

import os
import socket

from flows.pools import LOCAL
from flows.server import ask

TIMEOUT = 15.0


def main() -> int:
    """Return 0 if a worker whose name begins with this machine's is online in the local pool.

    Raises:
        OSError: the server does not answer.
    """
    url = f"{os.environ['PREFECT_API_URL']}/work_pools/{LOCAL}/workers/filter"
    rows = ask(url, {"limit": 200}, timeout=TIMEOUT)
    mine = f"{socket.gethostname()}-"
    return 0 if any(row["status"] == "ONLINE" and row["name"].startswith(mine) for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
