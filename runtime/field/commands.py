"""The commands of a model in the field."""

from __future__ import annotations

import json
import math
import threading
import time
from contextlib import suppress
from pathlib import Path

import click

from duallora_edge.errors import DataError, DualLoraEdgeError
from duallora_edge.runtime.commands.options import address
from duallora_edge.runtime.field.delta import apply_delta
from duallora_edge.runtime.field.keeping import copy_kept, kept_frames, remove_kept
from duallora_edge.runtime.field.store import SLOTS, Store
from duallora_edge.runtime.field.taught_folder import MAX_FRAMES, add_frames, reduced, remove_class
from duallora_edge.runtime.preprocess import Pixels
from duallora_edge.runtime.sources import Source, open_source
from duallora_edge.text import escaped


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("delta", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder of the new bundle."
)
def apply(bundle: Path, delta: Path, output: Path) -> None:
    """Make the new bundle of BUNDLE, an older one, and DELTA, which 'export --delta-from' wrote for it.

    Every file of the new bundle has the hash that the export gave it, or nothing is written. BUNDLE stays as it is.

    \b
    Example:
      duallora-edge apply bundles/0001 0001-0002.delta -o bundles/0002
    """
    made = apply_delta(bundle, delta, output)
    size = sum(record.bytes for record in made.manifest.files.values()) / 1e6
    click.echo(escaped(f"Bundle: {output}  version {made.manifest.bundle_version}, {size:.1f} MB"))


@click.command()
@click.argument("taught", type=click.Path(path_type=Path))
@click.argument("name")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--frames", default=10, show_default=True, type=click.IntRange(1, MAX_FRAMES), help="Frames to keep of each source."
)
@click.option(
    "--seconds",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0.1),
    help="How long to look at a camera.",
)
def teach(taught: Path, name: str, sources: tuple[str, ...], frames: int, seconds: float) -> None:
    """Teach the class NAME from SOURCE..., which are images, folders, videos or cameras as for 'run'.

    The frames are kept in the folder TAUGHT/NAME. A 'run --taught TAUGHT' takes them over within seconds, others when
    they start; the bundle stays as it is. Ten frames of different examples are a good start. 'train' reads TAUGHT as an
    image folder, to learn the class for good.

    \b
    Example:
      duallora-edge teach taught mug photos/mug1.jpg photos/mug2.jpg
      duallora-edge teach taught mug csi://0 --seconds 10 --frames 20
    """
    count = 0
    for each in sources:
        with open_source(each) as source:
            count = add_frames(taught, name, _spread(source, frames, seconds))
    click.echo(escaped(f"Taught {name} from {count} frame{'s' if count > 1 else ''}.  Folder: {taught}"))


def _spread(source: Source, count: int, seconds: float) -> list[Pixels]:
    """Up to ``count`` frames, spread over a file or folder of any length, or over the next ``seconds`` of a camera."""
    held: list[Pixels] = []
    every, due, step = 1, -math.inf, seconds / count
    for number, frame in enumerate(source):
        if source.live:
            if frame.captured >= due:
                held.append(reduced(frame.pixels))
                due = frame.captured + step
            if len(held) == count:
                break
        elif number % every == 0:
            if len(held) == count:
                held, every = held[::2], 2 * every
            if number % every == 0:
                held.append(reduced(frame.pixels))
    if not held:
        raise DataError(f"{source.description} gave no frame; give another source.")
    return held


@click.command()
@click.argument("taught", type=click.Path(path_type=Path))
@click.argument("name")
def unteach(taught: Path, name: str) -> None:
    """Forget the class NAME that 'teach' put into the folder TAUGHT.

    Images that were put there otherwise stay, and are named.

    \b
    Example:
      duallora-edge unteach taught mug
    """
    remove_class(taught, name)
    click.echo(escaped(f"Forgot {name}.  Folder: {taught}"))


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("channel")
@click.option(
    "--root", type=click.Path(path_type=Path), metavar="FILE",
    help="The root.json of the channel, by which it is trusted; needed once.",
)  # fmt: skip
@click.option("--every", type=click.FloatRange(1), metavar="SECONDS", help="Go on, and look again after this time.")
def update(store: Path, channel: str, root: Path | None, every: float | None) -> None:
    """Bring the newest bundle of CHANNEL into the store STORE, which is made if there is none.

    CHANNEL is a folder or an address that begins with http:// or https://. What it offers is checked by python-tuf
    before anything of it is used. 'run STORE' tries a new bundle and goes back by itself; this command starts nothing.

    \b
    Example:
      duallora-edge update store https://updates.example.org/site-a --root root.json
      duallora-edge update store /media/usb/channel
    """
    from duallora_edge.runtime.field.update import update as update_store  # python-tuf takes a while to import

    opened = Store.create(store)
    while True:
        try:
            update_store(opened, channel, root, lambda text: click.echo(escaped(text)))
        except DualLoraEdgeError as error:
            if every is None:
                raise
            click.echo(escaped(f"Error: {error}"), err=True)
        if every is None:
            return
        time.sleep(every)


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def slots(store: Path, as_json: bool) -> None:
    """Show what the two slots of the store STORE hold, and what was given up.

    \b
    Example:
      duallora-edge slots store
    """
    found = Store(store).read()
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    for name in SLOTS:
        slot = found.slots[name]
        answers = "  answers" if name == found.active else ""
        version = f"  version {slot.bundle_version}" if slot.digest else ""
        reason = f"  {slot.reason}" if slot.reason else ""
        click.echo(escaped(f"{name}  {slot.state:<8}{version}{answers}{reason}"))
    for digest, reason in found.refused.items():
        click.echo(escaped(f"given up: {digest[:12]}  {reason}"))


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
def revert(store: Path) -> None:
    """Go back to the other good bundle of the store STORE; the one that answers is not taken again.

    A 'run STORE' follows within seconds.

    \b
    Example:
      duallora-edge revert store
    """
    opened = Store(store)
    name = opened.revert()
    click.echo(f"Slot {name} answers again: version {opened.read().slots[name].bundle_version}.")


@click.command()
@click.argument("keep", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Write them there as images.")
@click.option("--delete", is_flag=True, help="Delete them; with -o once they are written.")
def kept(keep: Path, output: Path | None, delete: bool) -> None:
    """Show or fetch the frames that 'run --keep KEEP' kept; the most novel ones come first by name.

    Sort the images into a folder for each class, and 'train' learns them, or 'teach' teaches them.

    \b
    Example:
      duallora-edge kept keep -o frames --delete
    """
    if output is None:
        sizes = {frame.id: len(frame.jpeg) for frame in kept_frames(keep)}
        ids = list(sizes)
        click.echo(escaped(f"{len(ids)} frames, {sum(sizes.values()) / 1e6:.1f} MB.  Folder: {keep}"))
    else:
        ids = copy_kept(keep, output)
        click.echo(escaped(f"{len(ids)} frames.  Folder: {output}"))
    if delete:
        remove_kept(keep, ids)
        click.echo(f"Deleted {len(ids)} frames.")


@click.command()
@click.argument("keep", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
    help="Write a folder of images for each class there.  [default: KEEP/labelled]",
)  # fmt: skip
@click.option(
    "--listen", callback=address, default="127.0.0.1:8081", show_default=True, metavar="HOST:PORT",
    help="Serve the page there.",
)  # fmt: skip
def label(keep: Path, output: Path | None, listen: tuple[str, int]) -> None:
    """Name the frames that 'run --keep KEEP' kept, on a page in the browser.

    The page shows groups of frames that look alike, names whole groups or single frames, and needs no mouse. Whoever
    has its address can use it. A camera may go on keeping frames meanwhile. 'train --data KEEP/labelled' learns them.

    \b
    Example:
      duallora-edge label keep
      duallora-edge label keep --listen 0.0.0.0:8081
    """
    from duallora_edge.runtime.service.label_server import LabelServer

    output = output or keep / "labelled"
    with LabelServer(keep, output, *listen) as server:
        click.echo(f"Open {server.url} in a browser; Ctrl-C ends.")
        if not server.is_local:
            click.echo("This is not encrypted: anyone who sees the address or the traffic can use it.", err=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    click.echo(escaped(f"Folder: {output}"))
