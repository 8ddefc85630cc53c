"""``duallora-edge channel``: publish bundles for devices that update themselves."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import click

from duallora_edge.runtime.field.channel import ROLES, Channel
from duallora_edge.text import escaped

_keys = click.option(
    "--keys", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder of the keys."
)
_share = click.option(
    "--share", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="Share of the devices that take it."
)
_channel = click.argument("channel", type=click.Path(path_type=Path))


@click.group()
def channel() -> None:
    """Publish bundles for devices, in a folder that any web server can serve.

    Devices check every file by the keys of the channel, never take an older version, and refuse a channel that was not
    refreshed in time.

    \b
    Example:
      duallora-edge channel init channel --keys keys
      duallora-edge channel publish channel bundles/0001 --keys keys
    """


@channel.command()
@_channel
@_keys
def init(channel: Path, keys: Path) -> None:
    """Make the channel CHANNEL and its keys.

    KEYS/offline signs what is published: keep it off the server. KEYS/online signs that it is the newest.
    CHANNEL/root.json goes to each device once, by a way that you trust.

    \b
    Example:
      duallora-edge channel init channel --keys keys
    """
    Channel.create(channel, keys)
    click.echo(escaped(f"Channel: {channel}  keys: {keys}  for the devices: {channel / 'root.json'}"))


@channel.command()
@_channel
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option(
    "--delta", "deltas", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="A delta to the newest bundle; can be given several times.",
)  # fmt: skip
@_share
@_keys
def publish(channel: Path, bundle: Path | None, deltas: tuple[Path, ...], share: float, keys: Path) -> None:
    """Offer BUNDLE, or further deltas to the newest one.

    \b
    Example:
      duallora-edge channel publish channel bundles/0008 --delta 0007-0008.delta --share 0.1 --keys keys
    """
    offer = Channel.open(channel, keys).publish(bundle, deltas, share)
    count = len(offer.deltas)
    click.echo(
        escaped(
            f"Channel: {channel}  version {offer.bundle_version} for {100 * offer.share:g} % of the devices, "
            f"{count} delta{'s' if count != 1 else ''}"
        )
    )


@channel.command()
@_channel
@click.argument("version", type=click.IntRange(1))
@click.argument("share", type=click.FloatRange(0, 1))
@_keys
def share(channel: Path, version: int, share: float, keys: Path) -> None:
    """Offer VERSION to another SHARE of the devices, from 0 (withdrawn) to 1. Devices that have it keep it.

    \b
    Example:
      duallora-edge channel share channel 8 1.0 --keys keys
    """
    Channel.open(channel, keys).set_share(version, share)
    click.echo(escaped(f"Channel: {channel}  version {version} for {100 * share:g} % of the devices"))


@channel.command()
@_channel
@_keys
def refresh(channel: Path, keys: Path) -> None:
    """Sign anew that nothing is newer; run it every day, where only KEYS/online is needed.

    \b
    Example:
      duallora-edge channel refresh channel --keys keys
    """
    opened = Channel.open(channel, keys)
    opened.refresh()
    click.echo(escaped(f"Channel: {channel}  good until {min(opened.expiry().values()):%Y-%m-%d}"))


@channel.command()
@_channel
@click.argument("role", type=click.Choice(ROLES))
@_keys
def rotate(channel: Path, role: str, keys: Path) -> None:
    """Replace the key of ROLE, as after it was lost or stolen. Devices follow by themselves.

    \b
    Example:
      duallora-edge channel rotate channel timestamp --keys keys
    """
    Channel.open(channel, keys).rotate(role)
    click.echo(escaped(f"Channel: {channel}  the key of {role} is another one"))


@channel.command()
@_channel
def status(channel: Path) -> None:
    """Show what the channel offers and when devices will refuse it. Needs no key.

    \b
    Example:
      duallora-edge channel status channel
    """
    opened = Channel.open(channel, channel)
    for offer in opened.offers():
        click.echo(
            escaped(
                f"version {offer.bundle_version}  {100 * offer.share:g} % of the devices  {len(offer.deltas)} deltas  "
                f"{offer.sha256[:12]}"
            )
        )
    for role, expires in opened.expiry().items():
        days = (expires - datetime.now(timezone.utc)).days
        click.echo(f"{role:<9} {'expired' if days < 0 else f'good for {days} days'}")
