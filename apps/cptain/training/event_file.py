"""TensorBoard's files: the numbers of metrics.jsonl, with the tokens that the run has seen as the step.

Megatron's own (--tensorboard-dir) hold no speed, and know steps and sequences alone, not tokens.
The format is a file of records, each an `Event` of protobuf; tensorboard's classes write them here without its
thread, so that a step is on disk when it is over, and an error comes to whom it concerns.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any

_AXES = ("step", "tokens")  # of these two, which are proportional, TensorBoard's axis is tokens


class EventFile:
    """One start of training; TensorBoard reads all files of a folder as one run.

    Args:
        folder: where it is written.
        tokens: of the first numbers to come. Of earlier files, what is at that step or later is taken back: this start
            trains it again.

    Raises:
        ModuleNotFoundError: there is no tensorboard here.
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(open(folder / name, "wb", buffering=0))  # noqa: SIM115 closed by `finish`
        self._write(file_version="brain.Event:2")
        self._write(step=tokens, session_log=SessionLog(status=SessionLog.START))

    def log(self, line: dict[str, Any], step: int) -> None:
        """The numbers of a line of metrics.jsonl, each a scalar of its name."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in line.items() if tag not in _AXES]
        self._write(step=line["tokens"], summary=Summary(value=values))

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def finish(self) -> None:
        """Close the file."""
        self._records.close()
