"""The shell command ``dask keras``; dask finds it by its entry point (``dask/cli.py``).

Loads neither Keras nor a backend, and runs nothing that is in the files it is given.
"""

from __future__ import annotations

import json
from typing import Any

import click

from dask_keras_serialize import views
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.inside import inspect as find
from dask_keras_serialize.packed import Parcel
from dask_keras_serialize.registration import imported_by_dask, leave_to_user

if imported_by_dask():  # in every process that the command ``dask`` starts
    leave_to_user()


@click.group()
def keras() -> None:
    """Keras models as Dask values."""


@keras.command()
@click.argument("file")
@click.option("--config", is_flag=True, help="Print the config, as JSON; null if by value.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def inspect(file: str, config: bool, as_json: bool) -> None:
    """Say what Keras objects are in FILE, written by pickle or joblib; open none of them."""
    try:
        parcels = find(file)
        if as_json:
            click.echo(json.dumps([_plain(parcel) for parcel in parcels], indent=2))
        elif config:
            for parcel in parcels:
                click.echo(json.dumps(parcel.config, indent=2))
        else:
            click.echo("\n\n".join(views.text(parcel.header) for parcel in parcels))
    except (DecodeError, OSError) as error:
        raise click.ClickException(str(error)) from None
    except RecursionError:
        raise click.ClickException(f"{file}: its config is nested too deep to print") from None


def _plain(parcel: Parcel) -> dict[str, Any]:
    header = parcel.header
    table = [
        {
            "path": v.path,
            "shape": v.shape,
            "dtype": v.dtype,
            "trainable": v.trainable,
            "bytes": v.location.nbytes,
        }
        for v in parcel.variables
    ]
    return {
        "object": header.owner,
        "name": header.name,
        "class": header.class_name,
        "encoding": header.encoding,
        "backend": header.backend,
        "versions": parcel.versions,
        "code": dict(parcel.code),
        "bytes": sum(v.location.nbytes for v in parcel.variables),
        "variables": table,
        "config": parcel.config,
    }
