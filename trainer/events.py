"""The record of a run: one JSON object a line, appended and never rewritten.

Everything a person sees of a run (progress, tables, plots) is drawn from this file. A line is one `write` to a file
opened for appending, so several processes may write to the same file without mixing their lines, and a reader may
meet torn lines only where a disk was full or a writer died: they are passed over, and cost no other line.

The disk has every event within a second: what a machine loses that loses its power is the last one. The file may be
rotated while it is written (`mv events.jsonl events.jsonl.1`, as logrotate does): writers begin a new one within a
second, and readers read events.jsonl.2, events.jsonl.1, events.jsonl. Who follows it gets what is still added to those
put aside, too.

The meaning of kinds and fields is a schema with a version, which every command writes first. Fields and kinds may be
added within one; a reader passes over what it does not know, and refuses a record of a later version.

On file systems on which hosts append without seeing each other (NFS, SMB) a line is written under the file's lock.
Where somebody else holds that, nobody waits for it: the line comes with the next one, or within a second.

A full disk does not end training: events wait in memory, in order and with the time at which they happened, and are
written with the next one that can be. It is an error when more than 16 MiB wait, when a checkpoint relies on them
(`sync`), and when the process ends (`close`). What waits is lost with a process that is killed; the ledger misses it.

Every event has `time` (Unix seconds) and `kind`; the rest depends on the kind:
    command_started     schema (version of this table), version (of the package): a command works on the run from now on
    run_started         resumed (bool)
    stage_started       stage
    stage_finished      stage, seconds, result (one line for a person)
    data_prepared       documents, tokens (each by split), vocab_size, dropped, repaired (counts by reason)
    blend               datasets: of each data set share (of the training samples), epochs (passes over it), documents
                        and tokens (to train on), dropped (counts by reason)
    training_started    step, checkpoint (path, or null for a fresh start), tier ("memory" or "disk"),
                        threads_per_rank, ranks, device (its model, as the vendor calls it); steps after it are void
    planned             nodes, layout, device (as its cluster calls it), step_seconds (of the full batch), step_parts,
                        tokens_per_second (of all ranks), mfu, memory_bytes (of the fullest rank) and memory_parts:
                        what `broadgauge plan` says of the layout that trains from now on
    unplanned           nodes, layout, reason: nothing can be said of it
    plan_checked        step, num_steps (measured), num_samples (of each), step_seconds (median), tokens_per_second,
                        mfu, memory_bytes (of the rank that takes most, or null), and what was planned of a batch of
                        that size: planned_step_seconds, ...; slow (whether GPUs take far longer): once for a plan
    checkpoint_rejected reason: a damaged checkpoint was passed over
    step                step (1-based), tokens (consumed so far), first_sample, num_samples, tokens_xxh3 (of what all
                        replicas were fed, see `trainer.data.digest`), loss, grad_norm, lr, seconds, phases (of them in
                        each phase of the step, see `trainer.heartbeat.StepPhase`, on rank 0)
    step_skipped        step, first_sample, num_samples, tokens_xxh3, reason ("not finite", "loss spike", "gradient
                        norm spike", or "quarantined" where it was not computed), loss, grad_norm (null where there is
                        no number); the weights are as before it
    rolled_back         from_step, to_step (steps after it are void), reason, quarantined (steps to pass over from now
                        on), checkpoint (path, or null for a fresh start)
    diverged            verdict
    evaluated           step, loss (nats per token), tokens (evaluated), uniform_loss, unigram_loss, bits_per_byte (of
                        text, or null where the tokenizer does not tell), datasets (of each data set loss, tokens,
                        bits_per_byte), positions (loss at positions in the sequence, from each named one to before the
                        next; at position p there are p + 1 tokens to go by)
    answered            step, seconds (for which training stood still), answers (path): the training ranks have answered
                        what tasks ask of the checkpoint of that step
    checkpoint_evaluated    step, results (path), seconds, heldout_loss (null where only tasks were asked), scores (by
                        `TASK/SHOTS-shot/MEASURE`, the larger the better)
    evaluation_skipped  step, reason: that checkpoint is not evaluated
    evaluation_failed   step, reason: it could not be
    checkpoint_snapshot step, durable (whether it is to become a checkpoint), seconds (for which training stood still)
    checkpoint_saved    step, path, bytes, seconds (to write it; training stood still where there was no snapshot)
    checkpoint_skipped  step, durable, reason: one was due and was left out, as `checkpoint.when_busy` says (snapshots
                        that only serve restarts never wait)
    checkpoint_waited   step, seconds: one was due, and training stood still until the one before had ended
    checkpoint_failed   step, reason: it could not be written; those before it are as they were
    checkpoint_uploaded step, url, bytes, seconds
    checkpoint_upload_failed    step, reason: it will be tried again, unless a newer one is there by then
    checkpoint_service_died     code (negative for a signal, null if it did not start), log: it is replaced by a new one
    checkpoint_fetched  step, url: it had been uploaded, and there was none as new here
    life_started        number (of the job's lives), nodes, data (replicas), why: ranks are started
    life_failed         what ("rank", "agent", "machine" or "hang"), error, machine (Ray's name of it), step: ranks were
                        cut short after that step; log (path of what was written by what failed, or null)
    machine_excluded    machine (Ray's name of it), failures: of its own, so that lives are begun without it
    hung                verdict (one line), suspects (ranks), stacks (path): ranks that said nothing for long are killed
    ranks               step, seconds (in which each rank works in a step and does not wait for others; of `group` ranks
                        in a row the longest), group, min, mean, max, slowest (rank)
    straggler           rank, node, phase, ratio (of the time that steps take to what they would without it)
    sink_failed         sink, reason: it is told nothing more
    profiled            first_step, last_step, ranks, folder (of their traces), problem (why there are none, or null)
    preempted           reason; where ranks were training also step, saved_step: the run was asked to end, and did
    export_verified     how ("full", "sample" or "none"), largest_difference (of logits), tokens (compared)
    generated           prompt, text
    run_finished        seconds
    failed              error, log (as of life_failed)
"""

import errno
import fcntl
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import orjson

from trainer.config import UserError

SCHEMA = 1
"""Version of the events that this code writes, and the latest that it can read."""

Event = dict[str, Any]

KINDS = tuple(re.findall(r"^    (\w+) ", (__doc__ or "").partition("depends on the kind:\n")[2], flags=re.MULTILINE))
"""Of events, as above."""

_VOIDING = {"training_started": "step", "rolled_back": "to_step"}
"""Kind of event -> its field that names the last step which is not void."""


_BEGIN = re.compile(rb'\{"time":')
"""Of every line that is written here."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MOST_WAITING_BYTES = 16 << 20  # about 50,000 steps
_FLUSH_SECONDS = 1.0
_WITHOUT_ATOMIC_APPENDS = ("nfs", "nfs4", "cifs", "smb3")
"""File systems, as /proc/self/mountinfo names them."""
_LATE_SECONDS = 60.0  # in which every writer has noticed a rotation: so long may NFS believe what it knows of a folder
_MOST_PARTS = 16  # that a reader keeps open


class EventLog:
    """Appends events to one file; threads may share it."""

    def __init__(self, path: Path, locks: bool | None = None) -> None:
        """`locks`: whether to write under the file's lock; None: as its file system needs it."""
        self._path = path
        self._locks = _needs_locks(path) if locks is None else locks
        self._is_blocked = False
        """Whether somebody else held the lock."""
        self._waiting: deque[bytes] = deque()
        """Lines that the disk has not taken yet, oldest first."""
        self._is_torn = False
        """Whether the disk has taken a part of the first of them."""
        self._lock = threading.Lock()
        self._fd = self._opened()
        self._looked = time.monotonic()
        self._is_dirty, self._is_closed = False, threading.Event()
        self._flusher = threading.Thread(
            target=_keep_flushing, args=(weakref.ref(self), self._is_closed), name="events", daemon=True
        )

    def _opened(self) -> int:
        """The file, with the line ended that a killed writer may have left open, so that ours starts a new one."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
        return descriptor

    def write(self, kind: str, **fields: Any) -> None:
        """Append an event, or keep it until the disk has room.

        Raises:
            OSError: too much waits for room, or it is something else than room that lacks.
        """
        line = orjson.dumps({"time": round(time.time(), 3), "kind": kind, **fields}, option=orjson.OPT_SERIALIZE_NUMPY)
        with self._lock:
            self._waiting.append(line + b"\n")
            try:
                self._write_waiting()
                self._flush_soon()
            except OSError as error:
                if error.errno not in _FULL or sum(map(len, self._waiting)) > _MOST_WAITING_BYTES:
                    raise

    def _follow_rotation(self) -> None:
        """Where another file has taken the path, or none is there any more, go on in that."""
        now = time.monotonic()
        if now - self._looked < _FLUSH_SECONDS:
            return
        self._looked = now
        try:
            is_there = os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            is_there = False
        if not is_there:
            before, self._fd, self._is_torn = self._fd, self._opened(), False
            os.close(before)

    def _flush_soon(self) -> None:
        self._is_dirty = True
        if self._flusher.ident is None:
            self._flusher.start()

    def _flush(self) -> None:
        with self._lock:
            if self._is_blocked:
                with suppress(OSError):  # a disk that takes nothing: the next event tries again
                    self._write_waiting()
                self._is_dirty = True
            descriptor = os.dup(self._fd) if self._is_dirty else None
            self._is_dirty = False
        if descriptor is not None:
            with suppress(OSError):  # `sync` is for those who rely on it
                os.fdatasync(descriptor)
            os.close(descriptor)

    def _write_waiting(self, *, is_patient: bool = False) -> None:
        if self._waiting:
            self._follow_rotation()
        if not self._locks:
            self._write_lines()
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if is_patient else fcntl.LOCK_NB))
        except BlockingIOError:
            self._is_blocked = True
            if sum(map(len, self._waiting)) > _MOST_WAITING_BYTES:
                raise
            return
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            self._locks = False  # nobody grants any here: then lines are written without
            self._write_lines()
            return
        try:
            self._is_blocked = False
            self._write_lines()
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _write_lines(self) -> None:
        while self._waiting:
            line = b"\n" * self._is_torn + self._waiting[0]
            num_written = os.write(self._fd, line)
            if num_written == len(line):
                self._waiting.popleft()
                self._is_torn = False
            elif num_written:  # written again as a whole: another process may have gone on behind the piece
                self._is_torn = num_written > self._is_torn

    def sync(self) -> None:
        """Wait until the disk has all that this process has recorded, and any other has written, so far.

        Raises:
            OSError: it does not take it.
        """
        with self._lock:
            self._write_waiting(is_patient=True)
        os.fsync(self._fd)

    def close(self) -> None:
        """Raises:
        OSError: events are lost that the disk does not take.
        """
        try:
            with self._lock:
                self._write_waiting(is_patient=True)
        finally:
            self._is_closed.set()
            if self._flusher.ident is not None:
                self._flusher.join()
            with suppress(OSError):
                os.fdatasync(self._fd)
            os.close(self._fd)


def _keep_flushing(log: "weakref.ref[EventLog]", is_closed: threading.Event) -> None:
    """From a thread, since a disk may take its time; it ends with the log, even if that was not closed."""
    while not is_closed.wait(_FLUSH_SECONDS) and (each := log()) is not None:
        each._flush()
        del each


def _needs_locks(path: Path) -> bool:
    """Whether appending from several hosts at once would lose lines: `open(2)` says so of O_APPEND on NFS."""
    absolute, found, kind = str(path.resolve()), "", ""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        mounted_at = fields.split()[4].replace("\\040", " ")
        is_below = absolute.startswith(mounted_at.rstrip("/") + "/")
        if is_below and len(mounted_at) >= len(found):
            found, kind = mounted_at, rest.split()[0]
    return kind in _WITHOUT_ATOMIC_APPENDS


class _Part:
    """One file of a record, open: whatever it is called by now, and if it is deleted."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.inode = os.fstat(self.descriptor).st_ino
        self.offset = 0
        """Of what has not been read."""
        self.left: float | None = None
        """When a newer one was found."""

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def size(self) -> int:
        """Of one that was cut short, all is new."""
        size = os.fstat(self.descriptor).st_size
        if size < self.offset:
            self.offset = 0
        return size

    def lines(self, size: int) -> list[bytes]:
        """The whole lines up to there that have not been read."""
        with open(self.descriptor, "rb", closefd=False) as handle:
            handle.seek(self.offset)
            chunk = handle.read(size - self.offset)
        whole, newline, _ = chunk.rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        return whole.splitlines()


class EventReader:
    """Reads a growing record: each call to `new_events` yields the whole lines added since the last one.

    Each line once, and those of one writer in order. Of files that rotation has put aside also what writers add that
    have not noticed yet: it comes late, behind lines of others that are in the new file already.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._parts: list[_Part] = []
        """The file that is written, and before it those lately put aside, oldest first."""

    def skip_to_end(self) -> None:
        self._find_parts()
        for part in reversed(self._parts):
            part.offset = part.size()
        self._forget_parts()

    def new_events(self) -> Iterator[Event]:
        """Raises:
        UserError: a later version has written it.
        """
        self._find_parts()
        # A writer never goes back to an older file, so what it wrote before what is read of a newer one is read too.
        sizes = [part.size() for part in reversed(self._parts)]
        for part, size in zip(self._parts, reversed(sizes), strict=True):
            for line in part.lines(size) if size > part.offset else ():
                event = _parse(line)
                if event is not None:
                    yield self._checked(event)
        self._forget_parts()

    def _find_parts(self) -> None:
        """Open the files begun since the last look: newest first, so that none slips by while they are renumbered."""
        known, begun = {part.inode for part in self._parts}, dict[int, _Part]()
        for path in _newest_first(self._path):
            with suppress(FileNotFoundError):
                part = _Part(path)
                if part.inode in known:
                    break
                begun.setdefault(part.inode, part)
        self._parts += reversed(begun.values())

    def _forget_parts(self) -> None:
        """Those that have been put aside for long, and were read since."""
        now = self._clock()
        for part in self._parts[:-1]:
            part.left = now if part.left is None else part.left
        recent = [part for part in self._parts if part.left is None or now - part.left < _LATE_SECONDS]
        self._parts = recent[-_MOST_PARTS:]

    def _checked(self, event: Event) -> Event:
        schema = event.get("schema")
        if event["kind"] == "command_started" and isinstance(schema, int) and schema > SCHEMA:
            raise UserError(
                f"{self._path} has events of schema {schema}, and this version reads up to {SCHEMA}; use the version "
                f"{event.get('version')} that has written them"
            )
        return event


def _newest_first(path: Path) -> Iterator[Path]:
    """The files of a record: the one that is written, and those that rotation has put aside."""
    yield path
    ends = (each.name.removeprefix(f"{path.name}.") for each in path.parent.glob(f"{path.name}.*"))
    yield from (
        path.with_name(f"{path.name}.{number}") for number in sorted(int(end) for end in ends if end.isdecimal())
    )


def read_events(path: Path) -> list[Event]:
    return list(EventReader(path).new_events())


def last_sound_step(event: Event) -> int | None:
    """After which all steps until then are void, and what was saved of them; None of an event that voids none."""
    return int(event[_VOIDING[event["kind"]]]) if event["kind"] in _VOIDING else None


def void_checkpoints(events: Iterable[Event]) -> set[int]:
    """Steps whose checkpoint is of no history that counts, and has not been written anew."""
    saved: set[int] = set()
    void: set[int] = set()
    for event in events:
        if event["kind"] == "checkpoint_saved":
            saved.add(event["step"])
            void.discard(event["step"])
        elif (last := last_sound_step(event)) is not None:
            void |= {step for step in saved if step > last}
    return void


def surviving_steps(events: list[Event], kind: Literal["step", "step_skipped"] = "step") -> list[Event]:
    """The events of steps in the history of the final weights: a restart or a rollback voids the steps after it."""
    steps: dict[int, Event] = {}
    for event in events:
        if event["kind"] in ("step", "step_skipped"):
            steps[event["step"]] = event
        elif (last := last_sound_step(event)) is not None:
            steps = {step: seen for step, seen in steps.items() if step <= last}
    return [steps[step] for step in sorted(steps) if steps[step]["kind"] == kind]


def _parse(line: bytes) -> Event | None:
    """The event of a line; of one that begins with a piece of another, what stands behind the piece."""
    for begin in (0, *(match.start() for match in _BEGIN.finditer(line))):
        try:
            event = orjson.loads(line[begin:])
        except orjson.JSONDecodeError:
            continue
        return event if isinstance(event, dict) and "kind" in event else None
    return None
