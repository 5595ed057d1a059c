"""The shell command ``dask keras``; dask finds it by its entry point (``dask/cli.py``).

Loads neither Keras nor a backend, unless it is to examine a cluster, and runs nothing that is in
the files it is given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from dask import config as dask_config

from dask_keras_serialize import views
from dask_keras_serialize.errors import DecodeError, UnreachableError
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


@keras.command()
@click.argument("address", required=False)
@click.option("--scheduler-file", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="For the connection, and for each answer of a process.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
@click.pass_context
def doctor(
    context: click.Context,
    address: str | None,
    scheduler_file: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Say whether the cluster of the scheduler at ADDRESS is right; exit with 1 if not.

    Without ADDRESS, Dask's config says where it is: scheduler-address. What fails is marked with
    "!", what differs but may be meant so with "~".

    Workers load Keras and start its backend, to send each a small model and back; so register
    PlaceKeras before, if they are to have limits.
    """
    if scheduler_file is not None:
        address = _address(scheduler_file)
    address = address or dask_config.get("scheduler-address", None)
    if not address:
        raise click.UsageError("which cluster? Give the ADDRESS of its scheduler.")
    from dask_keras_serialize.cluster.doctor import examine

    try:
        found = examine(address, timeout=timeout)
    except UnreachableError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(found.plain(), indent=2))
    else:
        click.echo(views.examination(found.processes, found.findings))
    context.exit(0 if found.ok else 1)


def _address(scheduler_file: str) -> str:
    """Read what ``dask scheduler --scheduler-file`` wrote."""
    try:
        return str(json.loads(Path(scheduler_file).read_bytes())["address"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise click.ClickException(f"{scheduler_file}: no scheduler's file: {error!r}") from None


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
