"""Why a run ran out of memory: what was asked, what stood in the way, and what would have let it through.

Each remedy is tried: the recording up to that moment is replayed with it, and either the request is served or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np

from memprof.errors import BadValue
from memprof.simulator.allocator import AllocatorSettings
from memprof.snapshots.columns import highest, stretches
from memprof.snapshots.holding import Fragmentation, Instant, SiteHolder, Way, labeller
from memprof.snapshots.recording import OOM, Recording
from memprof.snapshots.replay import Replayed
from memprof.snapshots.sites import call_site, shown
from memprof.snapshots.trials import Room, Trials
from memprof.snapshots.versions import knows_expandable_segments
from memprof.units import GIB, format_bytes

#: Sizes that cards are sold with, in GiB.
CARD_SIZES = (6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 94, 96, 128, 141, 180, 192, 256, 288)
#: ``max_split_size_mb`` that are tried, in this order; the first that helps is told.
SPLIT_SIZES = (128, 256, 512, 1024)
#: From so many events on, the room that would do is found to an eighth of what fragmentation adds, not to 2 MiB.
MANY_EVENTS = 100_000
#: How many of the largest holders are tried away.
MOST_HOLDERS = 3


@dataclass(frozen=True, slots=True)
class Remedy:
    """One thing that was tried, and whether the request would have been served (predicted).

    ``detail`` says more in words; empty where there is nothing to say.
    """

    name: str
    helps: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Death:
    """An out-of-memory event explained. Sizes in bytes.

    Attributes:
        event: Its index among the device's events.
        count: How many such events the recording holds; this is the last.
        asked_bytes: What was asked for, rounded up to a block.
        site: Which line asked.
        free_bytes: What the driver still had; None where it was not recorded.
        room_bytes: What the process could have had in all: reserved and free.
        memory: What was allocated, reserved and unusable then.
        missing_bytes: How much more would have had to be free in one piece.
        holders: Who held the rest.
        remedies: What was tried.
        metadata: What the user had set by ``torch.cuda.memory._set_memory_metadata`` then.
        replayed: Whether the model refuses the same request; where it does not, the remedies say less.
    """

    event: int
    count: int
    asked_bytes: int
    site: str
    free_bytes: int
    room_bytes: int
    memory: Fragmentation
    missing_bytes: int
    holders: tuple[SiteHolder, ...]
    remedies: tuple[Remedy, ...]
    metadata: str
    replayed: bool

    def to_json(self) -> dict[str, object]:
        """Every field by its name."""
        return asdict(self)


def explain(replayed: Replayed, room: Room, top: int, way: Way) -> Death | None:
    """The last out-of-memory event of a recording; None if there is none."""
    recording = replayed.lives.recording
    event = recording.last_oom
    if event is None:
        return None
    asked = int(recording.sizes[event])
    instant = Instant.of(replayed, event)
    memory, free = instant.fragmentation(), int(recording.addresses[event])
    trials = Trials(replayed.lives, room, event)
    in_reach = max(free, memory.largest_free_block_bytes)
    text = recording.labels[int(recording.label_ids[event])] if len(recording.label_ids) else ""
    return Death(
        event=event,
        count=sum(map(len, recording.events_of(OOM))),
        asked_bytes=asked,
        site=call_site(recording.stacks[int(recording.stack_ids[event])]),
        free_bytes=free,
        room_bytes=room.n_bytes,
        memory=memory,
        missing_bytes=max(0, recording.settings.round_size(asked) - in_reach),
        holders=instant.holders(way)[:top],
        remedies=tuple(_remedies(trials, replayed, instant, event)),
        metadata=shown(text),
        replayed=not trials.run(room=room.n_bytes, as_recorded=True).fits,
    )


def _remedies(trials: Trials, replayed: Replayed, instant: Instant, event: int) -> Iterator[Remedy]:
    recording = trials.lives.recording
    assert trials.room is not None
    room = trials.room.n_bytes
    # Where all that is held at once is too much, no arrangement of it can fit, and none needs to be tried.
    yield from _settings(trials, recording, room)
    yield _emptied(trials, replayed, event, room)
    yield _larger(trials, room)
    yield from _without(trials, replayed, instant, event, room)


TOO_MUCH = "no arrangement fits: too much is held at once"


def _fits(trials: Trials, settings: AllocatorSettings, room: int) -> bool:
    return trials.least(settings) <= room and trials.run(settings, room).fits


def _settings(trials: Trials, recording: Recording, room: int) -> Iterator[Remedy]:
    """Other allocator settings."""
    if not knows_expandable_segments(recording.version):
        yield Remedy("expandable_segments:True", False, "torch has it from 2.1 on; this was recorded by an earlier one")
    else:
        wanted = not recording.settings.expandable_segments
        changed = replace(recording.settings, expandable_segments=wanted)
        detail = TOO_MUCH if trials.least(changed) > room else ""
        yield Remedy(f"expandable_segments:{wanted}", _fits(trials, changed, room), detail)
    tried = list(_splits(recording.settings))
    helps = next((size for size, settings in tried if _fits(trials, settings, room)), None)
    if tried:
        others = ", ".join(str(size) for size, _ in tried[1:])
        yield Remedy(
            f"max_split_size_mb:{helps or tried[0][0]}",
            helps is not None,
            f"nor {others}" if helps is None and others else "",
        )


def _splits(settings: AllocatorSettings) -> Iterator[tuple[int, AllocatorSettings]]:
    for size in SPLIT_SIZES:
        if size != settings.max_split_size_mb:
            try:
                yield size, replace(settings, max_split_size_mb=size)
            except BadValue:
                continue


def _emptied(trials: Trials, replayed: Replayed, event: int, room: int) -> Remedy:
    """``empty_cache()`` at the instant when most was cached."""
    columns = stretches(trials.lives.reserved, replayed.allocated(), stop=event)
    most, at = highest((begin, reserved - allocated) for begin, (reserved, allocated) in columns)
    if at < 0:
        return Remedy("empty_cache() before", False, "nothing was recorded before")
    fits = trials.least() <= room and trials.run(room=room, as_recorded=True, empty_at=at).fits
    return Remedy(
        "empty_cache() before",
        fits,
        f"called when most was cached, {format_bytes(most)}, {event - at:,} events earlier"
        if fits
        else "torch had given back all that it could before it failed",
    )


def _larger(trials: Trials, room: int) -> Remedy:
    """A card of the next size: as much more as the next size is above the one that this room suggests."""
    needed = trials.smallest(halvings=64 if trials.stop < MANY_EVENTS else 3)
    now = next((size for size in CARD_SIZES if size * GIB >= room), None)
    if now is None:
        return Remedy("a larger card", False, f"PyTorch had {format_bytes(room)}, more than any card that is known")
    after = next((size for size in CARD_SIZES if size > now), now)
    detail = f"it fits where PyTorch has {format_bytes(needed)}; it had {format_bytes(room)}"
    enough = room + (after - now) * GIB >= needed
    if not enough:
        fitting = next((size for size in CARD_SIZES if room + (size - now) * GIB >= needed), None)
        detail += f"; a card of {fitting} GiB would do" if fitting else "; no card has so much"
    return Remedy(f"a card of {after} GiB instead of {now}", enough, detail)


def _without(trials: Trials, replayed: Replayed, instant: Instant, event: int, room: int) -> Iterator[Remedy]:
    """The largest call sites gone, one after the other until the request is served."""
    lives = replayed.lives
    label = labeller(lives.recording, call_site)
    held = lives.held_at(event)
    stacks, away, gone = lives.stacks(held), np.zeros(len(held), dtype=bool), []
    for holder in instant.holders(call_site)[:MOST_HOLDERS]:
        away |= np.isin(stacks, [number for number in np.unique(stacks).tolist() if label(number) == holder.site])
        without = held[away]
        gone.append(holder.site)
        fits = trials.least(without=without) <= room and trials.run(room=room, as_recorded=True, without=without).fits
        n_bytes = int(replayed.granted[without].sum())
        yield Remedy(f"without what {' and '.join(gone)} held", fits, f"{format_bytes(n_bytes)} less")
        if fits:
            return
