"""Say by exit status whether the scheduler answers, or whether a worker is fit to use.

Usage: ``python docker/healthy.py http://scheduler:8787 [WORKER]``

A worker is fit when the scheduler lists it by its name as running, with this package:
a worker without it says nothing under the package's name. Needs the standard library
alone, and asks over HTTP, so that it costs no import of Dask or Keras.
"""

from __future__ import annotations

import json
import sys
from urllib.request import urlopen


def main(url: str, worker: str | None = None) -> str | None:
    """Return what is wrong, or None."""
    with urlopen(f"{url}/json/identity.json", timeout=5) as answer:
        workers = json.load(answer)["workers"].values()
    if worker is None:
        return None
    for row in workers:
        if row["name"] == worker:
            if row["status"] != "running":
                return f"worker {worker} is {row['status']}"
            if "dask-keras-serialize" not in row:
                return f"worker {worker} lacks dask-keras-serialize"
            return None
    return f"worker {worker} has not joined"


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except OSError as error:
        sys.exit(f"{sys.argv[1]} does not answer: {error}")
