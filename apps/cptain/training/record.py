"""What a training leaves for the record once it has done a step: its line in the history, the run file, the versions.

An attempt that trained nothing changes none of them. With several nodes this is done by the one that sees the steps:
Megatron logs them on the node of its last rank.
"""

import time

from cptain import provenance
from cptain.checkpoint.tracker import TRACKER, read_tracker
from cptain.errors import CptainError, one_line
from cptain.history import Recorder, Start, now
from cptain.run_file import RunFile, write_resolved
from cptain.training.follow import Follower
from cptain.training.prepare import Command

_BETWEEN = 30.0  # seconds between two lines that differ in the step alone


class TrainingRecord:
    """The record of one start of training."""

    def __init__(self, run: RunFile, command: Command) -> None:
        self._run, self._command = run, command
        self._began, self._written = now(), 0.0
        self._recorder: Recorder | None = None

    @property
    def saved(self) -> int:
        """The last step that is saved, by the checkpoints' tracker."""
        if not (self._run.checkpoints_folder / TRACKER).exists():
            return self._command.start
        try:
            return read_tracker(self._run.checkpoints_folder) or 0
        except CptainError:
            return self._command.start  # Megatron is just writing it

    def look(self, follower: Follower) -> None:
        """Bring the record to what the output has said so far."""
        if follower.last and time.monotonic() - self._written >= _BETWEEN:
            self._write(follower)

    def end(self, follower: Follower, outcome: str) -> None:
        """Say how the training ended; nothing where it did no step."""
        if follower.last:
            self._write(follower, outcome=outcome, ended=now())

    def _write(self, follower: Follower, **changes: str) -> None:
        """Write what is known; a disk that takes no more is said, and ends no training."""
        assert follower.last is not None
        self._written = time.monotonic()
        try:
            if self._recorder is None:
                write_resolved(self._run)
                self._recorder = Recorder(self._run.folder, self._start)
            self._recorder.record(
                last=follower.last.number, saved=self.saved, sequences=follower.last.sequences, **changes
            )
        except (CptainError, OSError) as error:
            follower.progress.say(f"train: {one_line(error)}")

    def _start(self) -> Start:
        parallel, command = self._run.parallel, self._command
        sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
        sizes |= {"expert": parallel.expert} if parallel.expert > 1 else {}
        return Start(
            began=self._began,
            start=command.start,
            steps=command.steps,
            run=self._run.model_dump(mode="json", exclude_none=True),
            data=command.data,
            layout={"processes": command.processes, "nodes": command.node_count, **sizes},
            versions=provenance.write_provenance(self._run, "train"),
            accepted=command.accepted,
        )
