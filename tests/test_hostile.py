"""Checkpoints and models made to do harm, or damaged at random: refused with one line, and nothing of theirs runs."""

import io
import pickle
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import count, rows_of
from cptain.checkpoint.streaming import write_files
from cptain.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from cptain.checkpoint.torch_save import _NAMES, _PLAIN, load_pickle
from cptain.errors import CptainError
from cptain.progress import Progress
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

# What Python itself reports when something is run, whoever asks for it.
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec", "compile", "import")
RUNS += ("socket.connect", "shutil.rmtree", "os.remove", "ctypes.dlopen", "pickle.find_class", "marshal.loads")
WATCH: list[list[str]] = []


def _report(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCH and event in RUNS:
        WATCH[-1].append(f"{event} {arguments!r:.80}")


sys.addaudithook(_report)
b"x".decode("cp437")  # zipfile's: imported here, so that it is not what a hostile file imports


def write_sound(folder: Path) -> Path:
    """A small torch_dist checkpoint: a tensor of two chunks, one of a single chunk, an object and common.pt."""
    writer = TorchDistWriter(100)
    for row in (0, 2):
        rows = torch.arange(row, row + 6.0).reshape(2, 3)
        writer.add_chunk("layers.weight", (4, 3), (row, 0), (2, 3), rows.dtype, 2, rows_of(rows))
    writer.add_chunk("norm.weight", (5,), (0,), (5,), torch.float32, 5, rows_of(torch.arange(5.0)))
    writer.add_object("layers._extra_state", (0,), (1,), None)
    write_files(folder, writer.files, 1, Progress("test", 1, "B").advance)
    writer.finish(folder, {"args": None, "iteration": 3})
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def read_all(folder: Path) -> None:
    """Everything that export and train read of a checkpoint."""
    with TorchDistReader(folder) as reader:
        for name in reader.names():
            shape, dtype = reader.shape(name), reader.dtype(name)
            reader.read(name, (), 0, shape[0], torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8))
        reader.check_objects()


def refusal(read: Callable[[Path], None], folder: Path) -> str | None:
    """The one line with which reading is refused, or None; nothing may run and no other exception may escape."""
    events: list[str] = []
    WATCH.append(events)
    try:
        read(folder)
        line = None
    except CptainError as error:
        line = str(error)
    finally:
        WATCH.pop()
    count("hostile checkpoints and models tried")
    assert not events, events
    assert line is None or line.isprintable(), line
    return line


def test_the_sound_checkpoint_is_read(copy: Path) -> None:
    assert refusal(read_all, copy) is None


def test_the_suite_would_notice_something_that_runs(tmp_path: Path) -> None:
    def loads(folder: Path) -> None:
        pickle.loads(b"cos\nsystem\n(Vtrue\ntR.")

    with pytest.raises(AssertionError, match=r"os\.system"):
        refusal(loads, tmp_path)


CALLABLES = [
    "os.system",
    "posix.system",
    "nt.system",
    "os.popen",
    "os.execv",
    "os.posix_spawn",
    "subprocess.Popen",
    "subprocess.check_output",
    "subprocess.getoutput",
    "builtins.eval",
    "builtins.exec",
    "builtins.compile",
    "builtins.__import__",
    "builtins.open",
    "builtins.breakpoint",
    "__builtin__.eval",
    "importlib.import_module",
    "runpy.run_path",
    "pickle.loads",
    "_pickle.loads",
    "marshal.loads",
    "operator.attrgetter",
    "operator.methodcaller",
    "functools.partial",
    "functools.reduce",
    "types.CodeType",
    "types.FunctionType",
    "shutil.rmtree",
    "os.remove",
    "pty.spawn",
    "code.interact",
    "timeit.timeit",
    "pdb.run",
    "ctypes.CDLL",
    "socket.create_connection",
    "webbrowser.open",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.save",
    "torch.compile",
    "torch.serialization.load",
    "torch.storage._load_from_bytes",
    "torch._utils._rebuild_wrapper_subclass",
    "torch._tensor._rebuild_from_type_v2",
    "torch.ops.load_library",
    "torch.utils.cpp_extension.load",
    "torch.utils.collect_env.run",
    "torch._dynamo.config",
    "torch.classes.load_library",
    "torch.distributed.checkpoint.filesystem.os",
    "torch.distributed.checkpoint.utils.run",
    "numpy.load",
    "numpy.core.multiarray.fromfile",
    "megatron.core.os",
    "megatron.training.initialize.exec",
    "transformer_engine.common.subprocess",
    "asyncio.run",
    "signal.signal",
    "signal.raise_signal",
    "signal.SIG_DFL",
    "bdb.Bdb",
    "cProfile.run",
    "trace.Trace",
    "doctest.debug_script",
    "distutils.spawn.spawn",
    "xmlrpc.client.ServerProxy",
]


def programs(module: str, name: str, argument: str) -> Iterator[bytes]:
    """Pickles that call module.name(argument), in every way that the format has."""
    value = b"X" + struct.pack("<I", len(argument)) + argument.encode()
    plain = f"c{module}\n{name}\n".encode()
    by_stack = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93"
    for named in (plain, by_stack):
        yield b"\x80\x04" + named + value + b"\x85R."
        yield b"\x80\x04" + named + value + b"\x85\x81."
        yield b"\x80\x04" + named + value + b"\x85}\x92."
        yield b"\x80\x04(" + named + value + b"o."
        yield b"\x80\x04]" + named + value + b"\x85Ra."
    yield b"(" + value + f"i{module}\n{name}\n.".encode()
    yield b"\x80\x04" + f"cbuiltins\ngetattr\nc{module}\n{name}\n".encode() + value + b"\x86R."


def archive(pickled: bytes) -> bytes:
    """A torch.save archive of a pickle."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", b"\0" * 64)
    return content.getvalue()


def places(folder: Path) -> dict[str, _StorageInfo]:
    """Where the archives of a checkpoint lie, by their keys; of two chunks the last."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return {index.fqn: place for index, place in metadata.storage_data.items()}


def replace_archive(folder: Path, key: str, content: bytes) -> None:
    """Put an archive of any length in the place of a tensor's or an object's."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    file = folder / "__9_0.distcp"
    file.write_bytes(content)
    for index, place in metadata.storage_data.items():
        if index.fqn == key:
            place.relative_path, place.offset, place.length = file.name, 0, len(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def put(folder: Path, place: str, pickled: bytes) -> None:
    """Put a pickle where a checkpoint has one."""
    if place == ".metadata":
        (folder / place).write_bytes(pickled)
    elif place == "common.pt":
        (folder / place).write_bytes(archive(pickled))
    else:
        replace_archive(folder, place, archive(pickled))


@pytest.mark.parametrize("place", [".metadata", "common.pt", "norm.weight", "layers._extra_state/shard_0_1"])
@pytest.mark.parametrize("dotted", CALLABLES)
def test_a_pickle_that_calls_anything_is_refused_and_nothing_runs(copy: Path, place: str, dotted: str) -> None:
    module, _, name = dotted.rpartition(".")
    split_otherwise = (module.rpartition(".")[0], f"{module.rpartition('.')[2]}.{name}") if "." in module else None
    metadata = (copy / ".metadata").read_bytes()
    for names in filter(None, ((module, name), split_otherwise)):
        for program in programs(*names, f"touch {copy}/ran"):
            (copy / ".metadata").write_bytes(metadata)
            put(copy, place, program)
            line = refusal(read_all, copy)
            assert line is not None, program
            assert str(copy) in line
    assert not (copy / "ran").exists()


MEMBER = b"\x80\x02c__builtin__\ngetattr\n%b\x86R"  # of an enum, as Python 3.11.2 pickles it; to go on or to end


MODE = b"cmegatron.core.rerun_state_machine\nRerunMode\n"


def test_a_member_of_an_enum_that_an_older_python_pickled_by_getattr_is_read(copy: Path) -> None:
    mode, number = MEMBER % (MODE + b"U\x08DISABLED"), b"csignal\nSIGTERM\n"
    put(copy, "layers._extra_state/shard_0_1", b"\x80\x02" + mode[2:] + number + b"\x86.")
    assert refusal(read_all, copy) is None


@pytest.mark.parametrize(
    "program",
    [
        MEMBER % (b"cargparse\nNamespace\n" + b"U\x08__init__") + b".",
        MEMBER % (b"cargparse\nNamespace\n" + b"U\x04walk") + b".",
        MEMBER % (MODE + b"U\x08__init__") + b".",
        MEMBER % (MODE + b"U\x0b__globals__") + b".",
        MEMBER % (MODE + b"K\x01") + b".",
        MEMBER % (MODE + b")R" + b"U\x04call") + b".",  # of an instance
        MEMBER % (b"cio\nBytesIO\n" + b"U\x04read") + b".",
        MEMBER % (MEMBER % (MODE + b"U\x04name") + b"U\x04call") + b".",  # of what it gave
        MEMBER % (MODE + b"U\x04name") + b")R.",  # called
        MEMBER % (MODE + b"U\x04name") + b")\x81.",
        MEMBER % (MODE + b"U\x04name") + b"}U\x08__code__Nsb.",  # changed
        MEMBER % (MODE + b"U\x04name") + b"N}U\x0c__defaults__Ns\x86b.",
        MEMBER % (MODE + b"U\x04name") + b"U\x01xNs.",
        MEMBER % (MODE + b"U\x04name") + b"Na.",
    ],
)
def test_getattr_leads_nowhere_but_to_members_of_enums(copy: Path, program: bytes) -> None:
    put(copy, "layers._extra_state/shard_0_1", program)
    assert refusal(read_all, copy)


CLASSES = [f"{module}.{name}" for module, name in sorted({*_NAMES, *_PLAIN} - {("builtins", "getattr")})]


CLASSES += ["torch.FloatStorage", "torch.storage.UntypedStorage", "megatron.core.x.MCoreMetadata"]


ALLOWED = [*CLASSES, "builtins.getattr", "__builtin__.getattr", "torch.float32", "signal.SIGTERM"]


STATES = [
    (attribute, value)
    for attribute in ("__call__", "__setstate__", "__class__", "__new__", "__init__", "__eq__", "value", "arguments")
    for value in (b"cmegatron.core.x\nAny\n", b"cbuiltins\nset\n", b"N")
]


def changes(dotted: str) -> Iterator[bytes]:
    """Pickles that give a state, in both of the forms that there are, to a global and to what it and getattr make."""
    module, _, name = dotted.rpartition(".")
    named = f"c{module}\n{name}\n".encode()
    member = MEMBER[2:] % (named + b"U\x04name")
    for target in (named, named + b")R", named + b"K\x01\x85R", named + b")\x81", named + b"K\x01\x85\x81", member):
        for attribute, value in STATES:
            state = b"}U" + bytes([len(attribute)]) + attribute.encode() + value + b"s"
            yield b"\x80\x04" + target + state + b"b."
            yield b"\x80\x04" + target + b"N" + state + b"\x86b."


def read(pickled: bytes) -> str:
    """What a pickle holds, or why it is refused."""
    try:
        return re.sub(r"0x\w+", "0x", repr(load_pickle(pickled)))
    except ValueError as error:
        return f"refused: {error}"


def test_no_pickle_changes_what_a_later_one_is_given_or_refused() -> None:
    """One that gave the stand-in for getattr a __call__ let every later pickle call what getattr had made."""
    file_system = b"ctorch.distributed.checkpoint.filesystem\nFileSystem\n"
    hostile = MEMBER % (file_system + b"U\x06rename") + b"(U\x01aU\x01btR."
    honest = b"\x80\x04(" + MEMBER[2:] % (MODE + b"U\x08DISABLED")
    for dotted in ALLOWED:
        honest += b"c%b\n%b\n" % tuple(dotted.encode().rsplit(b".", 1)) + (b"2)R" if dotted in CLASSES else b"")
    honest += b"t."
    before = read(honest), read(hostile)
    assert [text.startswith("refused") for text in before] == [False, True]
    for dotted in ALLOWED:
        for pickled in changes(dotted):
            read(pickled)
            count("pickles that change what they are given")
        assert (read(honest), read(hostile)) == before, dotted


BOMBS = {
    "a memo of 4 billion places": b"\x80\x04Nr\xff\xff\xff\xff.",
    "a memo place in decimal": b"Np99999999999\n.",
    "a string of 2 EB": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 61) + b".",
    "a bytearray of 1 TB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a long of 2 GB": b"\x80\x04\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
    "lists in lists": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "tuples in tuples": b"\x80\x04)" + b"\x85" * 200_000 + b".",
    "a registered extension": b"\x80\x04\x82\x01.",
    "an out-of-band buffer": b"\x80\x05\x97.",
    "no end": b"\x80\x04]",
    "nothing on the stack": b"\x80\x04.",
    "a protocol of the future": b"\x80\x7f.",
    "a persistent id": b"\x80\x04K\x01Q.",
    "a class changed": b"\x80\x04cmegatron.core.x\nMCoreMetadata\n}X\x0b\x00\x00\x00__setstate__cbuiltins\nset\nsb.",
    "a tuple changed": b"\x80\x04ctorch\nSize\nN}X\x07\x00\x00\x00__new__Ns\x86b.",
}


@pytest.mark.parametrize("place", [".metadata", "norm.weight"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_asks_for_much_or_for_nothing_is_refused(copy: Path, place: str, bomb: str) -> None:
    put(copy, place, BOMBS[bomb])
    assert refusal(read_all, copy)
